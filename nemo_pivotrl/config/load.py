"""Reading recipe files into the dataclasses of `config/recipe.py`, and any such dataclass from a mapping.

A recipe is YAML with an optional `defaults:` chain (paths relative to the file, later ones win) and `${...}`
interpolation. A NeMo-Aligner config is read too (`config/nemo_aligner.py`). An unknown key, a wrong type or a value
out of range is an error that names the nearest key or the allowed
range; all errors of a recipe come at once.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_pivotrl.config import Recipe, Verifier
from nemo_pivotrl.config.build import build
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
        if key in ("compat", "message"):
            values[key] = value
            continue
        node: dict[str, Any] = values
        for part in [first, *rest][:-1] if first in ("limits", "judge") else ["settings", first, *rest][:-1]:
            node = node.setdefault(part, {})
        node[key.split(".")[-1]] = value
    return typing.cast(Verifier, build(Verifier, values, "command line", "verifier."))
