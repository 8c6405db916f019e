"""Reading recipe files into the dataclasses of `config/recipe.py`, and any such dataclass from a mapping.

A recipe is YAML with an optional `defaults:` chain (paths relative to the file, later ones win) and `${...}`
interpolation. A NeMo-Aligner config is read too (`config/nemo_aligner.py`). An unknown key, a wrong type or a value
out of range is an error that names the nearest key or the allowed
range; all errors of a recipe come at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from nemo_pivotrl.config import Recipe, Verifier
from nemo_pivotrl.core.errors import InputError, Problem, short


def load_recipe(path: str, overrides: Sequence[str] = (), beside: Sequence[str] = ()) -> Recipe:
    """The recipe at `path` with `key=value` overrides. Raises InputError with every problem found.

    `beside`: sections of the file that are another program's.
    """
    import yaml
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from nemo_pivotrl.config import nemo_aligner as dialect

    parts = _chain(Path(path), [])
    aligner = any(map(dialect.is_aligner, parts))
    if aligner:
        dialect.register_resolvers()
    tree = typing.cast(DictConfig, OmegaConf.merge(dialect.BASE if aligner else {}, *parts))
    for section in beside:
        tree.pop(section, None)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise InputError(
                Problem(
                    "command line",
                    None,
                    override,
                    "no key=value",
                    "write section.key=value, e.g. select.lambda_diff=0.5",
                )
            )
        try:
            OmegaConf.update(tree, key, yaml.safe_load(value), force_add=True)
        except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError) as error:
            raise InputError(Problem("command line", None, key, value, short(str(error)))) from None
    try:
        plain = typing.cast(dict[str, Any], OmegaConf.to_container(tree, resolve=True))
    except OmegaConfBaseException as error:
        raise InputError(
            Problem(path, None, "interpolation", short(str(error)), "name an existing key or environment variable")
        ) from None
    return dialect.recipe_of(plain, path) if aligner else typing.cast(Recipe, build(Recipe, plain, path))


def _chain(path: Path, above: list[Path]) -> list[Any]:
    """The files of a `defaults:` chain, the most basic first."""
    from omegaconf import OmegaConf
    from yaml import YAMLError

    if path.resolve() in above:
        raise InputError(Problem(str(path), None, "defaults", "a circle", "a recipe cannot be its own default"))
    try:
        node = OmegaConf.load(path)
    except FileNotFoundError:
        where = str(above[-1]) if above else "command line"
        raise InputError(
            Problem(where, None, "recipe", str(path), "no such file; recipes live under recipes/")
        ) from None
    except (YAMLError, OSError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        raise InputError(
            Problem(str(path), mark.line + 1 if mark else None, "YAML", short(str(error)), "mend the file")
        ) from None
    if not OmegaConf.is_dict(node):
        raise InputError(Problem(str(path), 1, "recipe", "no mapping", "a recipe is a YAML mapping of sections"))
    defaults = typing.cast(Any, node).pop("defaults", [])
    defaults = [defaults] if isinstance(defaults, str) else list(defaults or [])
    from nemo_pivotrl.config.nemo_aligner import defaults_of

    files = defaults_of(defaults, path.parent)
    return [part for file in files for part in _chain(file, [*above, path.resolve()])] + [node]


def build(cls: type[Any], values: Mapping[str, Any], file: str, prefix: str = "") -> Any:
    """`cls` filled from a mapping, checked; `prefix` begins the field names in errors. Raises InputError with all problems."""
    problems: list[Problem] = []
    made = _build(cls, values, prefix, file, problems)
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
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
            hint = f"did you mean `{near[0]}`?" if near else f"known keys: {', '.join(fields)}"
            problems.append(Problem(file, None, name, f"unknown key `{key}`", hint))
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
        for option in args:
            try:
                return _convert(option, value)
            except ValueError:
                continue
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


def verifier_settings(name: str, compat: str | None, overrides: Sequence[str]) -> Verifier:
    """A verifier section from a command line: `key=value` is a setting, `limits.key=value` one of that section.

    Raises InputError for what no section takes.
    """
    import yaml

    values: dict[str, Any] = {"name": name, "settings": {}} | ({"compat": compat} if compat else {})
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            problem = Problem("command line", None, override, "no key=value", "write --set key=value")
            raise InputError(problem)
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(Problem("command line", None, key, text, short(str(error)))) from None
        first, *rest = key.split(".")
        if key == "compat":
            values[key] = value
            continue
        node: dict[str, Any] = values
        for part in [first, *rest][:-1] if first in ("limits", "judge") else ["settings", first, *rest][:-1]:
            node = node.setdefault(part, {})
        node[key.split(".")[-1]] = value
    return typing.cast(Verifier, build(Verifier, values, "command line", "verifier."))


def to_yaml(recipe: Recipe) -> str:
    """The complete recipe, defaults included, for `--print-config`."""
    import yaml

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    return yaml.safe_dump(plain(dataclasses.asdict(recipe)), sort_keys=False)
