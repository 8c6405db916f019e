"""Settings by their names in a recipe, kept beside the hash that is made of them, so that a difference can be named."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

from nemo_pivotrl.core.errors import short

SHOWN, WIDTH = 8, 60
"""Settings that a message names, and characters of a value."""
_ABSENT = object()


def named(recipe: object, *names: str, but: Sequence[str] = ()) -> dict[str, Any]:
    """The settings of a recipe under dotted names: of a whole section (`select`) or one (`policy.dtype`), each leaf by its full name.

    but: leaves to leave out. Raises AttributeError for a name that the recipe does not have.
    """
    found: dict[str, Any] = {}
    for name in names:
        value = recipe
        for part in name.split("."):
            value = getattr(value, part)
        found |= leaves(value, name)
    return {name: value for name, value in found.items() if name not in but}


def leaves(value: Any, name: str) -> dict[str, Any]:
    """Every value that is no mapping, under its dotted name."""
    value = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    if not isinstance(value, Mapping) or not value:
        return {name: value}
    return {
        k: v for key, inner in value.items() for k, v in leaves(inner, f"{name}.{key}" if name else str(key)).items()
    }


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """`NAME=OLD (now NEW)` of each setting that differs; '' where none does, or where one side tells nothing."""
    if not old or not new:
        return ""
    old, new = (json.loads(json.dumps(side, default=str)) for side in (old, new))  # a tuple is a list in a file
    differing = [n for n in dict.fromkeys([*new, *old]) if old.get(n, _ABSENT) != new.get(n, _ABSENT)]
    shown = [f"{name}={_shown(old, name)} (now {_shown(new, name)})" for name in differing[:SHOWN]]
    more = [f"and {len(differing) - SHOWN} more"] if len(differing) > SHOWN else []
    return ", ".join([*shown, *more])


def _shown(side: Mapping[str, Any], name: str) -> str:
    return short(repr(side[name]), WIDTH) if name in side else "nothing"
