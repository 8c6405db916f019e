"""Any settings dataclass from a mapping: unknown keys, wrong types and values out of range are errors, all raised together."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
import warnings
from collections.abc import Mapping
from operator import attrgetter
from typing import Any, Literal

from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.errors import InputError, Problem, short

_NOT_SAMPLED = "remove it: no stage samples from a doctor alone; `decode` says how answers are sampled"
GONE = {
    "serve_guided": "remove it: `serve` is vLLM's server now; `serve.model` has its model's name, `vllm.engine_args` its bounds",
    "warmup.puzzle_batch_size": "remove it: a step of the demo's warm-up has 32 puzzles",
    "sft.puzzle_batch_size": "remove it: only the demo's warm-up has puzzles",
    "doctor.sampler": _NOT_SAMPLED,
    "doctor.generation": _NOT_SAMPLED,
}
"""Settings of earlier versions -> what to do about them."""


RENAMED = {"world.slips": "expert_error_rate"}
"""Settings of earlier versions -> their names now, in the same section. The old ones are still read, with a warning."""


def build(cls: type[Any], values: Mapping[str, Any], file: str, prefix: str = "") -> Any:
    """`cls` filled from a mapping, checked; `prefix` begins the field names in errors. Raises InputError with all problems."""
    problems: list[Problem] = []
    made = _build(cls, values, prefix, file, problems)
    if isinstance(made, Recipe):
        problems += _without_effect(made, file)
    if problems:
        raise InputError(problems)
    return made


def _build(cls: type[Any], values: Mapping[str, Any], prefix: str, file: str, problems: list[Problem]) -> Any:
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    default = _section_default(cls, prefix)
    arguments = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if name in RENAMED:
            key = RENAMED[name]
            if key in values:
                problems.append(Problem(file, None, name, "an old name", f"remove it: {prefix}{key} is given too"))
            warnings.warn(f"{file}: {name} is {prefix}{key} now: write that", FutureWarning, stacklevel=2)
            name = f"{prefix}{key}"
        if key not in fields:
            problems.append(
                Problem(file, None, name, f"unknown key `{key}`", GONE.get(name) or _nearest(key, prefix, fields))
            )
        elif dataclasses.is_dataclass(hints[key]):
            if isinstance(value, Mapping):
                arguments[key] = _build(typing.cast(type[Any], hints[key]), value, name + ".", file, problems)
            else:
                problems.append(Problem(file, None, name, short(value), "this is a section: give it keys"))
        elif typing.get_origin(hints[key]) is dict and dataclasses.is_dataclass(typing.get_args(hints[key])[1]):
            arguments[key] = _build_named(typing.get_args(hints[key])[1], value, name, file, problems)
        else:
            try:
                arguments[key] = _convert(hints[key], value)
            except ValueError as error:
                problems.append(Problem(file, None, name, short(value), str(error)))
                continue
            problems.extend(_out_of_range(fields[key], arguments[key], name, file))
    return dataclasses.replace(default, **arguments) if default is not None else cls(**arguments)


def _nearest(key: Any, prefix: str, fields: Mapping[str, Any]) -> str:
    """What an unknown key of the section `prefix` may have meant: a setting of that very name further down or elsewhere, else the
    nearest name of the section."""
    whole = [name for name in _settings(Recipe(), "") if name.rpartition(".")[2] == key]
    inside = [name for name in whole if name.startswith(prefix)] or whole
    if inside:
        more = f" ({', '.join(inside[1:4])} {'is' if len(inside) == 2 else 'are'} there, too)" if inside[1:] else ""
        return f"did you mean `{inside[0]}`?{more}"
    near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
    return f"did you mean `{near[0]}`?" if near else f"known keys: {', '.join(fields)}"


def _settings(section: Any, prefix: str) -> typing.Iterator[str]:
    """Full names of a recipe's settings; those of sections that the user names are left out."""
    for spec in dataclasses.fields(section):
        value = getattr(section, spec.name)
        if dataclasses.is_dataclass(value):
            yield from _settings(value, f"{prefix}{spec.name}.")
        else:
            yield f"{prefix}{spec.name}"


def _without_effect(recipe: Recipe, file: str) -> list[Problem]:
    """Settings that were changed and that nothing reads in this recipe: sections of one kind do not all use all of theirs."""
    usual, found = Recipe(), []
    copying = "remove it: only `warmup` with `source: world` begins with copying"
    found.append(("sft.copy_steps", attrgetter("sft.copy_steps"), copying))
    if recipe.warmup.source != "world":
        found.append(("warmup.copy_steps", attrgetter("warmup.copy_steps"), copying))
    return [
        Problem(file, None, name, str(read(recipe)), remedy)
        for name, read, remedy in found
        if read(recipe) != read(usual)
    ]


def _build_named(cls: type[Any], value: Any, name: str, file: str, problems: list[Problem]) -> dict[str, Any]:
    """A mapping from names that the user chooses to sections of one kind."""
    sections = value if isinstance(value, Mapping) else {name: value}
    for key, section in sections.items():
        if not isinstance(section, Mapping):
            where = f"{name}.{key}" if section is not value else name
            problems.append(Problem(file, None, where, short(section), "this is a section: give it keys"))
    return {
        str(key): _build(cls, section, f"{name}.{key}.", file, problems)
        for key, section in sections.items()
        if isinstance(section, Mapping)
    }


def _section_default(cls: type[Any], prefix: str) -> Any:
    """The default of the section at `prefix`, which may differ from `cls()` (warmup and sft are both Sft)."""
    node: Any = Recipe()
    for part in prefix.rstrip(".").split(".") if prefix else []:
        node = getattr(node, part, None)
    return node if isinstance(node, cls) else None


def _out_of_range(spec: dataclasses.Field[Any], value: Any, name: str, file: str) -> list[Problem]:
    low, high = spec.metadata.get("low"), spec.metadata.get("high")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return []
    if (low is None or value >= low) and (high is None or value <= high) and value == value:
        return []
    allowed = (
        f"a value from {low} to {high}"
        if high is not None
        else "a number"
        if low is None
        else f"a value at least {low}"
    )
    return [Problem(file, None, name, str(value), f"out of range: use {allowed}")]


def _convert(hint: Any, value: Any) -> Any:
    """`value` as type `hint`. Raises ValueError that says what is wanted."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        for option in sorted(args, key=lambda option: typing.get_origin(option) is Literal):
            try:
                return _convert(option, value)
            except ValueError:
                if typing.get_origin(option) is Literal:
                    raise  # it names what may stand here; None, the other choice, is not written
        raise ValueError("expected " + " or ".join(getattr(a, "__name__", str(a)) for a in args))
    if origin is Literal:
        if value in args:
            return value
        if isinstance(value, (int, float)) and str(value) in args:
            return str(value)  # YAML reads `compat: 0.7` as a number
        near = difflib.get_close_matches(str(value), [str(a) for a in args], n=1)
        raise ValueError(f"use one of {', '.join(map(str, args))}" + (f"; did you mean `{near[0]}`?" if near else ""))
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list):
            raise ValueError("expected a list")
        return tuple(_convert(args[0], item) for item in items)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError("expected a mapping")
        return {str(k): _convert(args[1], v) for k, v in value.items()}
    if isinstance(value, str) and (bad := [c for c in value if c == "\0" or "\ud800" <= c <= "\udfff"]):
        raise ValueError(f"remove the character U+{ord(bad[0]):04X}, which no file name or text can hold")
    if hint in (int, Any) and isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        raise ValueError("use a number of 64 bits")
    if hint is Any:
        return value
    if hint is type(None):
        if value is None:
            return None
    elif hint is bool or isinstance(value, bool):
        if hint is bool and isinstance(value, bool):
            return value
    elif hint is float and isinstance(value, (int, float, str)):
        try:
            return float(value)  # YAML reads 1e-6 as text
        except (ValueError, OverflowError):
            raise ValueError("expected float") from None
    elif isinstance(value, hint):
        return value
    raise ValueError(f"expected {getattr(hint, '__name__', hint)}")
