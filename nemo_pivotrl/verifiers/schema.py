"""JSON schemas against hostile values: patterns are matched with a time limit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import regex
from jsonschema import ValidationError
from jsonschema.validators import extend

PATTERN_SECONDS = 0.02
"""Of one match. A pattern that backtracks longer on what the policy wrote has not matched."""


def matches(pattern: str, text: str) -> bool:
    """Whether `pattern` is found in `text`; False where that takes too long. Raises re.error for no pattern."""
    re.compile(pattern)
    try:
        return regex.search(pattern, text, timeout=PATTERN_SECONDS) is not None
    except TimeoutError:
        return False


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if isinstance(instance, str) and not matches(pattern, instance):
        yield ValidationError("does not match the pattern")


@lru_cache(maxsize=8)
def bounded_patterns(cls: Any) -> Any:
    """`cls`, a jsonschema validator class, with patterns under a time limit."""
    return extend(cls, {"pattern": _pattern})
