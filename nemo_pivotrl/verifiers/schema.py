"""JSON schemas against hostile values: the work of a validation is limited, and the time of a pattern within it.

A schema is the row's, so it may be assumed sane, but a sane one can be dear on what a policy writes: alternatives that refer
to themselves double with every level, `enum` and `uniqueItems` compare pairs, a pattern may backtrack for ever.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import regex
from jsonschema import ValidationError, validators

from nemo_pivotrl.verifiers.bounds import LimitExceeded

KEYWORD_WORK = 600
"""Units of `Limits.max_work` that one keyword of a schema costs on one value (measured: 6 to 12 us)."""
OPTION_WORK = 100
"""Units for each entry of a keyword that is a list, an `enum` above all."""
UNIT_SECONDS = 20e-9
PATTERN_SECONDS = 0.02
"""Of one match. A pattern that backtracks longer on what the policy wrote has not matched."""
RE_STEPS = 100_000
"""Up to this many steps at worst Python's `re` does the matching, which has no time limit but the exact meaning."""


class _Left(threading.local):
    units: float = math.inf


_left = _Left()


def _spend(units: float) -> None:
    _left.units -= units
    if _left.units < 0:
        raise LimitExceeded("the arguments take too much work to validate")


def follows(validator: Any, value: Any, max_work: int) -> bool:
    """Whether `value` is valid under a `bounded` validator. Raises LimitExceeded, and what the schema library raises."""
    _left.units = max_work
    try:
        return bool(validator.is_valid(value))
    finally:
        _left.units = math.inf


def _steps(pattern: str, length: int) -> float:
    """An upper bound on the steps of a backtracking search, infinite where the pattern is no simple one."""
    plain = re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", "x", pattern, flags=re.DOTALL)
    if re.search(r"\)[*+{]|\(\?(?!:)", plain) or re.search(r"\\[1-9]", pattern):
        return math.inf
    choices = plain.count("|") + plain.count("?")
    repeats = len(re.findall(r"[*+]|\{\d*,\d*\}", plain)) + (not plain.startswith("^") or "|" in plain)
    return 2.0 ** min(choices, 100) * (length + 1.0) ** min(repeats, 20)


def matches(pattern: str, text: str) -> bool:
    """Whether `pattern` is found in `text`; False where that takes too long. Raises re.error for no pattern."""
    compiled = re.compile(pattern)
    begun = time.thread_time()
    if _steps(pattern, len(text)) <= RE_STEPS:
        found = compiled.search(text) is not None
    else:
        # a brace that is no repetition is a letter to re, and a fuzzy match to regex
        pattern = re.sub(r"(?<!\\)\{(?!\d*,?\d*\})", r"\\{", pattern)
        try:
            found = regex.search(pattern, text, timeout=PATTERN_SECONDS) is not None
        except TimeoutError:
            found = False
    _spend((time.thread_time() - begun) / UNIT_SECONDS)
    return found


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


def _counted(keyword: Callable[..., Any]) -> Callable[..., Any]:
    def counted(validator: Any, value: Any, instance: Any, schema: Any) -> Any:
        _spend(KEYWORD_WORK + (OPTION_WORK * len(value) if isinstance(value, list) else 0))
        return keyword(validator, value, instance, schema)

    return counted


@lru_cache(maxsize=8)
def bounded(cls: Any) -> Any:
    """`cls`, a jsonschema validator class, at a cost that what the policy wrote cannot drive up; for `follows`."""
    own = {
        "pattern": _pattern,
        "patternProperties": _pattern_properties,
        "additionalProperties": _additional_properties,
        "uniqueItems": _unique_items,
    }
    extend: Any = validators.extend
    return extend(cls, {name: _counted(keyword) for name, keyword in {**cls.VALIDATORS, **own}.items()})
