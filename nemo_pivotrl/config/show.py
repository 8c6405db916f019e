"""A recipe as YAML, with one line of explanation beside every setting. It loads back as the same recipe."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from nemo_pivotrl.config.recipe import Recipe
from nemo_pivotrl.config.schema import choices, explanations, named_section


def to_yaml(recipe: Recipe, changed: bool = False) -> str:
    """The complete recipe, defaults included, or with `changed` only what differs from them."""
    return "".join(f"{line}\n" for line in _section(recipe, Recipe(), changed, "")) or "{}\n"


def _section(section: Any, default: Any, changed: bool, indent: str) -> Iterator[str]:
    hints, explained = typing.get_type_hints(section.__class__), explanations(section.__class__)
    for spec in dataclasses.fields(section):
        value, usual = getattr(section, spec.name), getattr(default, spec.name)
        if changed and value == usual:
            continue
        inner, note = named_section(hints[spec.name]), explained[spec.name]
        if dataclasses.is_dataclass(value):
            yield from _titled(spec.name, note, indent, list(_section(value, usual, changed, f"{indent}  ")))
        elif inner is not None and value:
            below = []
            for key, part in value.items():
                own = list(_section(part, inner(), changed, f"{indent}    "))
                below += [f"{indent}  {_dump(key)}:", *own] if own else [f"{indent}  {_dump(key)}: {{}}"]
            yield from _titled(spec.name, note, indent, below)
        else:
            words = choices(hints[spec.name])
            yield from _leaf(spec.name, value, f"{note} [{', '.join(words)}]" if words else note, indent)


def _titled(name: str, note: str, indent: str, below: list[str]) -> Iterator[str]:
    yield f"{indent}{name}:{_comment(note)}"
    yield from below


def _leaf(name: str, value: Any, note: str, indent: str) -> Iterator[str]:
    first, *rest = _dump({name: _plain(value)}).split("\n")
    if rest and isinstance(value, str):  # no comment may stand inside a text of several lines
        yield f"{indent}# {note}"
        note = ""
    yield f"{indent}{first}{_comment(note)}"
    yield from (f"{indent}{line}" if line else "" for line in rest)


def _comment(note: str) -> str:
    return f"  # {note}" if note else ""


def _dump(value: Any) -> str:
    """YAML of a value on as few lines as there are, without a line's end."""
    import yaml

    text: str = yaml.safe_dump(value, sort_keys=False, width=float("inf"))
    return text.removesuffix("\n").removesuffix("\n...")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value
