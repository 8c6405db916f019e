"""JSON schemas against hostile values: patterns are matched with a time limit, unique items found in one pass."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import regex
from jsonschema import ValidationError, validators

PATTERN_SECONDS = 0.02
"""Of one match. A pattern that backtracks longer on what the policy wrote has not matched."""


PLAIN_BRACE = re.compile(r"(\\.)|\{(?!\d*,?\d*\})", re.DOTALL)
"""An escape, or a brace that begins no repetition: a character to `re`, fuzzy matching to `regex`."""


@lru_cache(maxsize=512)
def _compiled(pattern: str) -> Any:
    re.compile(pattern)  # what `re` takes for no pattern is none
    return regex.compile(PLAIN_BRACE.sub(lambda found: found[1] or r"\{", pattern))


def matches(pattern: str, text: str) -> bool:
    """Whether `pattern` is found in `text`; False where that takes too long. Raises re.error for no pattern."""
    try:
        return _compiled(pattern).search(text, timeout=PATTERN_SECONDS) is not None
    except TimeoutError:
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


@lru_cache(maxsize=8)
def bounded_patterns(cls: Any) -> Any:
    """`cls`, a jsonschema validator class, at a cost that what the policy wrote cannot drive up."""
    extend: Any = validators.extend
    return extend(
        cls,
        {
            "pattern": _pattern,
            "patternProperties": _pattern_properties,
            "additionalProperties": _additional_properties,
            "uniqueItems": _unique_items,
        },
    )
