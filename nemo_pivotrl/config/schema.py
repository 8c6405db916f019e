"""How a setting is declared: `name: type = default` or `= ranged(default, low, high)`, and its explanation as the docstring below."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def ranged(default: Any, low: float | None = None, high: float | None = None) -> Any:
    """A field whose value must lie in [low, high]."""
    return field(default=default, metadata={"low": low, "high": high})
