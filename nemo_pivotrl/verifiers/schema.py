"""JSON schemas as data, and against hostile values.

No reference is fetched or read: one that the schema itself does not answer is an error. Patterns are matched with a time
limit, checks are counted, so recursion ends, and unique items are found in one pass.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import regex
from jsonschema import Draft202012Validator, SchemaError, ValidationError, validators
from referencing import Registry
from referencing.exceptions import Unresolvable

from nemo_pivotrl.verifiers.bounds import LimitExceeded

RE_STEPS = 100_000
"""Up to this many steps at worst Python's `re` does the matching: it knows no time limit, but it is what released code uses."""
PATTERN_SECONDS = 0.02
"""Of one match. A pattern that backtracks longer on what the policy wrote has not matched."""
MATCHING_SECONDS = 0.04
"""Of all matches of one validation; what comes after has not matched."""
MAX_CHECKS = 6000
"""Keywords that one validation of what the policy wrote may look at, 4 microseconds each or so."""
OWN_CHECKS, OWN_SECONDS = 200_000, 2.0
"""The same of one validation of what an expert wrote, and the time of all its pattern matches."""
MAX_SCHEMA_CHARS = 1 << 19
MAX_PATTERN_CHARS = 4096
MAX_REPEATS = 1_000_000
"""Repetitions of repetitions that a pattern may ask for: some are written out when it is read."""


class _Spent(threading.local):
    """What the validation that runs in this thread has cost so far, and may cost."""

    checks = 0
    seconds = 0.0
    max_checks = MAX_CHECKS
    max_seconds = MATCHING_SECONDS
    exact = False
    """Whether a match that takes too long ends the validation, instead of being none."""


_spent = _Spent()


PLAIN_BRACE = re.compile(r"(\\.)|\{(?!\d*,?\d*\})", re.DOTALL)
"""An escape, or a brace that begins no repetition: a character to `re`, fuzzy matching to `regex`."""


@lru_cache(maxsize=512)
def _compiled(pattern: str) -> Any:
    return regex.compile(PLAIN_BRACE.sub(lambda found: found[1] or r"\{", pattern))


@lru_cache(maxsize=512)
def _growth(pattern: str) -> tuple[float, int] | None:
    """(a, b): a backtracking search of n characters takes at most a * (n + 1) ** b steps. None for a pattern that is not simple."""
    plain = re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", "x", pattern, flags=re.DOTALL)
    if re.search(r"\)[*+{]|\(\?(?!:)", plain) or re.search(
        r"\\[1-9]", pattern
    ):  # repeated groups, look-around, references
        return None
    anchored = plain.startswith("^") and "|" not in plain
    choices, repeats = plain.count("|") + plain.count("?"), len(re.findall(r"[*+]|\{\d*,\d*\}", plain)) + (not anchored)
    return (2.0**choices, repeats) if choices < 20 and repeats < 20 else None


def matches(pattern: str, text: str) -> bool:
    """Whether `pattern` is found in `text`; False where that takes too long. Raises re.error for no pattern."""
    if _spent.seconds > _spent.max_seconds:
        return _gave_up(pattern)
    begun = time.perf_counter()
    plain, growth = re.compile(pattern), _growth(pattern)
    try:
        if growth and growth[0] * (len(text) + 1.0) ** growth[1] <= RE_STEPS:
            return plain.search(text) is not None
        # what \w, \s and \b mean differs for some characters beyond ASCII
        seconds = OWN_SECONDS if _spent.exact else PATTERN_SECONDS
        return _compiled(pattern).search(text, timeout=seconds) is not None
    except TimeoutError:
        return _gave_up(pattern)
    finally:
        _spent.seconds += time.perf_counter() - begun


def _gave_up(pattern: str) -> bool:
    if _spent.exact:
        raise LimitExceeded(f"the pattern {pattern[:60]!r} takes too long to match")
    return False


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if isinstance(instance, str) and not matches(pattern, instance):
        yield ValidationError("does not match the pattern")


def _pattern_properties(
    validator: Any, declared: Mapping[str, Any], instance: Any, schema: Any
) -> Iterator[ValidationError]:
    if not isinstance(instance, dict):
        return
    for pattern, inner in declared.items():
        for key, value in instance.items():
            if matches(pattern, key):
                yield from validator.descend(value, inner, path=key, schema_path=pattern)


def _additional_properties(
    validator: Any, allowed: Any, instance: Any, schema: Mapping[str, Any]
) -> Iterator[ValidationError]:
    if not isinstance(instance, dict):
        return
    named, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    for key, value in instance.items():
        if key in named or any(matches(pattern, key) for pattern in patterns):
            continue
        if isinstance(allowed, dict):
            yield from validator.descend(value, allowed, path=key)
        elif not allowed:
            yield ValidationError("additional properties are not allowed")


def _unique_items(validator: Any, unique: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if unique and isinstance(instance, list) and len({_hashable(value) for value in instance}) < len(instance):
        yield ValidationError("the items are not unique")


def _hashable(value: Any) -> Any:
    """Equal for values that JSON schema takes for equal: 1 is 1.0, and neither is true."""
    if isinstance(value, dict):
        return "object", frozenset((key, _hashable(inner)) for key, inner in value.items())
    if isinstance(value, list):
        return "array", tuple(map(_hashable, value))
    return ("boolean" if isinstance(value, bool) else ""), value


def _counted(check: Any) -> Any:
    """`check`, one keyword's, against the number of checks that a validation may take."""

    def counted(validator: Any, value: Any, instance: Any, schema: Any) -> Any:
        _spent.checks += 1 + (len(value) // 7 if isinstance(value, list) else 0)  # an enum looks at all its values
        if _spent.checks > _spent.max_checks:
            raise LimitExceeded(f"more than {_spent.max_checks} schema checks")
        return check(validator, value, instance, schema)

    return counted


@lru_cache(maxsize=8)
def bounded(cls: Any) -> Any:
    """`cls`, a jsonschema validator class, at a cost that what the policy wrote cannot drive up."""
    extend: Any = validators.extend
    own = {
        "pattern": _pattern,
        "patternProperties": _pattern_properties,
        "additionalProperties": _additional_properties,
        "uniqueItems": _unique_items,
    }
    return extend(cls, {keyword: _counted(check) for keyword, check in {**cls.VALIDATORS, **own}.items()})


def is_valid(validator: Any, instance: Any) -> bool:
    """Whether `instance` follows the schema of a `bounded` validator. Raises LimitExceeded where that takes too much."""
    _spent.checks, _spent.seconds = 0, 0.0
    _spent.max_checks, _spent.max_seconds, _spent.exact = MAX_CHECKS, MATCHING_SECONDS, False
    return bool(validator.is_valid(instance))


class BadSchema(ValueError):
    """A schema by which nothing can be checked."""


def difference(schema: Mapping[str, Any], instance: Any) -> str:
    """What of an expert's arguments the schema does not allow; '' for nothing. Raises BadSchema."""
    try:
        text = json.dumps(schema, sort_keys=True)
    except RecursionError:
        raise BadSchema("it is nested too deeply") from None
    if len(text) > MAX_SCHEMA_CHARS:
        raise BadSchema(f"{len(text)} characters, at most {MAX_SCHEMA_CHARS}")
    validator = _draft_2020(text)
    if isinstance(validator, str):
        raise BadSchema(validator)
    _spent.checks, _spent.seconds = 0, 0.0
    _spent.max_checks, _spent.max_seconds, _spent.exact = OWN_CHECKS, OWN_SECONDS, True
    try:
        error = next(validator.iter_errors(instance), None)
    except Unresolvable as unresolved:
        raise BadSchema(f"the reference {unresolved.ref!r} points out of the schema, and none is fetched") from None
    except LimitExceeded as exceeded:
        raise BadSchema(str(exceeded)) from None
    except BaseException as fault:  # the schema library raises any type, its Rust part no Exception: `_as_reason` tells
        raise BadSchema(_as_reason(fault)) from None
    return "" if error is None else str(error.message)


@lru_cache(maxsize=512)
def _draft_2020(text: str) -> Any:
    """A validator of the schema, or what is wrong with it."""
    try:
        schema = json.loads(text)
        for pattern in _patterns(schema):
            if len(pattern) > MAX_PATTERN_CHARS or _repeats(pattern) > MAX_REPEATS:
                return f"the pattern {pattern[:60]!r} is too large"
        Draft202012Validator.check_schema(schema)
        return bounded(Draft202012Validator)(schema, registry=Registry())
    except SchemaError as error:
        return str(error.message)
    except BaseException as fault:  # as in `difference`
        return _as_reason(fault)


def _as_reason(fault: BaseException) -> str:
    """A fault of the schema library as words; others are raised again. Where recursion ends inside its Rust part that is a
    PanicException, which is no Exception."""
    if isinstance(fault, RecursionError) or type(fault).__name__ == "PanicException":
        return "it refers to itself without an end"
    if isinstance(fault, Exception):
        return f"{type(fault).__name__}: {fault}"
    raise fault


def _patterns(schema: Any) -> Iterator[str]:
    pending = [schema]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            named = node.get("patternProperties")
            yield from named if isinstance(named, dict) else ()
            if isinstance(node.get("pattern"), str):
                yield node["pattern"]
        pending += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()


def _repeats(pattern: str) -> float:
    """At most so many copies of a part are made where counted repetitions are written out."""
    product = 1.0
    for low, high in re.findall(r"\{(\d*),?(\d*)\}", pattern):
        product *= max(1.0, float(low or 0), float(high or 0))
    return product
