"""How a setting is declared, and what can be read off its declaration.

A setting is a field of a dataclass: `name: type = default`, or `= ranged(default, low, high)`, and below it a docstring. The first
line of the docstring is the setting's explanation; more may follow after an empty line.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal


def ranged(default: Any, low: float | None = None, high: float | None = None) -> Any:
    """A field whose value must lie in [low, high]."""
    return field(default=default, metadata={"low": low, "high": high})


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting of a section."""

    name: str
    """With all sections before it, e.g. `policy.optimizer.lr`; NAME stands for a name that the user chooses."""
    kind: Any
    """Its type."""
    default: Any
    low: float | None
    high: float | None
    explanation: str
    """One line."""


def settings_of(section: Any, prefix: str = "") -> Iterator[Setting]:
    """Every setting of a section (a dataclass instance that holds the defaults) and of the sections in it."""
    hints, explained = typing.get_type_hints(section.__class__), explanations(section.__class__)
    for spec in dataclasses.fields(section):
        name, default = f"{prefix}{spec.name}", getattr(section, spec.name)
        if dataclasses.is_dataclass(default):
            yield from settings_of(default, f"{name}.")
            continue
        low, high = spec.metadata.get("low"), spec.metadata.get("high")
        yield Setting(name, hints[spec.name], default, low, high, explained[spec.name])
        if (inner := named_section(hints[spec.name])) is not None:
            yield from settings_of(inner(), f"{name}.NAME.")


def named_section(kind: Any) -> type[Any] | None:
    """The section's class of a `dict[str, Section]`, whose keys the user chooses; None for any other type."""
    if typing.get_origin(kind) is not dict:
        return None
    inner: type[Any] = typing.get_args(kind)[1]
    return inner if dataclasses.is_dataclass(inner) else None


def choices(kind: Any) -> tuple[str, ...]:
    """The words that a setting of this type may have, or a list of them may hold; empty for a type that is not of words."""
    if typing.get_origin(kind) is Literal:
        return tuple(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        return choices(typing.get_args(kind)[0])
    return ()


@lru_cache(maxsize=256)
def explanations(cls: type[Any]) -> Mapping[str, str]:
    """Field -> first line of its docstring; of a section without one, the first line of its class's. "" where there is none."""
    found: dict[str, str] = {}
    hints = typing.get_type_hints(cls)
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            found |= _docstrings(inspect.getfile(base)).get(base.__qualname__, {})
    lines = {}
    for spec in dataclasses.fields(cls):
        kind = hints[spec.name]
        text = found.get(spec.name) or (kind.__doc__ if dataclasses.is_dataclass(kind) else "")
        lines[spec.name] = inspect.cleandoc(text or "").partition("\n")[0]
    return lines


@lru_cache(maxsize=64)
def _docstrings(path: str) -> dict[str, dict[str, str]]:
    """Class -> field -> docstring of a source file: Python does not keep them."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(Path(path).read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ClassDef):
            continue
        own = found.setdefault(node.name, {})
        for declared, below in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(declared, ast.AnnAssign) and isinstance(declared.target, ast.Name):
                text = (
                    below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else None
                )
                own[declared.target.id] = text if isinstance(text, str) else ""
    return found
