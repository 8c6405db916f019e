"""Reading recipe files into the dataclasses of `config/recipe.py`, and any such dataclass from a mapping.

A recipe is YAML with an optional `defaults:` chain (paths relative to the file, later ones win) and `${...}`
interpolation. A NeMo-Aligner config is read too (`config/nemo_aligner.py`). An unknown key, a wrong type or a value
out of range is an error that names the nearest key or the allowed
range; all errors of a recipe come at once.
"""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from nemo_pivotrl.config import Recipe, Verifier
from nemo_pivotrl.config.build import RENAMED, build
from nemo_pivotrl.core.atomic import open_input
from nemo_pivotrl.core.errors import InputError, Problem, short

MAX_BYTES, MAX_VALUES, MAX_DEFAULTS = 1 << 20, 100_000, 50
"""Bounds of a recipe file, of its values with aliases written out, and of a `defaults:` chain."""
MAPPING = "a recipe is a YAML mapping of sections"


def load_recipe(path: str, overrides: Sequence[str] = (), beside: Sequence[str] = ()) -> Recipe:
    """The recipe at `path` with `key=value` overrides. Raises InputError with every problem found.

    `beside`: sections of the file that are another program's.

    >>> load_recipe("recipe.yaml", ["select.lambda_diff=0.6"]).select.lambda_diff
    0.6
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from nemo_pivotrl.config import nemo_aligner as dialect

    parts = _chain(Path(path))
    aligner = any(map(dialect.is_aligner, parts))
    if aligner:
        dialect.register_resolvers()
    try:
        tree = typing.cast(DictConfig, OmegaConf.merge(dialect.BASE if aligner else {}, *parts))
        for section in beside:
            tree.pop(section, None)
        for override in overrides:
            _override(tree, override)
        plain = typing.cast(dict[str, Any], OmegaConf.to_container(tree, resolve=True))
    except (OmegaConfBaseException, RecursionError) as error:
        found = "values that refer to themselves" if isinstance(error, RecursionError) else short(str(error))
        remedy = "name an existing key or environment variable, and give a key one kind of value in all files"
        raise InputError(Problem(path, None, "interpolation", found, remedy)) from None
    try:
        return dialect.recipe_of(plain, path) if aligner else typing.cast(Recipe, build(Recipe, plain, path))
    except InputError as error:
        given = {override.partition("=")[0] for override in overrides}
        places = ("command line" if p.field in given else p.file for p in error.problems)
        problems = [replace(p, file=place) for p, place in zip(error.problems, places, strict=True)]
        raise InputError(problems) from None


def _override(tree: Any, override: str) -> None:
    """Set one `key=value` of the command line. Raises InputError."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    key, equals, value = override.partition("=")
    if not equals or not key:
        remedy = "write section.key=value, e.g. select.lambda_diff=0.5"
        raise InputError(Problem("command line", None, override, "no key=value", remedy))
    try:
        given = yaml.safe_load(value)
        OmegaConf.update(tree, key, given, merge=given != {}, force_add=True)  # {} empties a mapping
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise InputError(Problem("command line", None, key, short(value), short(str(error)))) from None


def _chain(path: Path, above: Sequence[Path] = (), seen: set[Path] | None = None) -> list[Any]:
    """The files of a `defaults:` chain, the most basic first. Each is loaded once, where it comes first."""
    from nemo_pivotrl.config.nemo_aligner import defaults_of

    seen = set() if seen is None else seen
    try:
        own = path.resolve()
    except (ValueError, OSError, RuntimeError) as error:  # a NUL, a name that is too long, links in a circle
        raise InputError(Problem(str(path), None, "recipe", short(str(error)), "give the path of a file")) from None
    if own in above:
        raise InputError(Problem(str(path), None, "defaults", "a circle", "a recipe cannot be its own default"))
    if len(above) >= MAX_DEFAULTS:
        found = f"more than {MAX_DEFAULTS} files, each the default of the last"
        raise InputError(Problem(str(path), None, "defaults", found, "put some of them together"))
    if own in seen:
        return []
    seen.add(own)
    node = _load(path, above)
    defaults = node.pop("defaults", None)
    entries = [defaults] if isinstance(defaults, str) else [] if defaults is None else defaults
    if not _is_list(entries) or any(_is_list(entry) or isinstance(entry, (int, float)) for entry in entries):
        remedy = "name a file, or a list of files, relative to this one"
        raise InputError(Problem(str(path), None, "defaults", short(str(defaults)), remedy))
    below = [part for file in defaults_of(list(entries), path.parent) for part in _chain(file, (*above, own), seen)]
    return [*below, node]


def _is_list(value: Any) -> bool:
    from omegaconf import OmegaConf

    return isinstance(value, list) or OmegaConf.is_list(value)


def _load(path: Path, above: Sequence[Path]) -> Any:
    """A recipe file as OmegaConf reads it. Raises InputError for what is no mapping, or no file of a recipe's size."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        with open_input(path) as handle:
            text = handle.read(MAX_BYTES + 1).decode()
        if len(text) > MAX_BYTES:
            found, remedy = f"more than {MAX_BYTES} bytes", "a recipe is a page of settings; is this another file?"
            raise InputError(Problem(str(path), None, "recipe", found, remedy))
        _check_size(text, path)
        node = OmegaConf.create(text)
    except FileNotFoundError:
        where = str(above[-1]) if above else "command line"
        raise InputError(
            Problem(where, None, "recipe", str(path), "no such file; recipes live under recipes/")
        ) from None
    except (YAMLError, OmegaConfBaseException, OSError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        mark = getattr(error, "problem_mark", None)
        raise InputError(
            Problem(str(path), mark.line + 1 if mark else None, "YAML", _said(error), "mend the file")
        ) from None
    if not OmegaConf.is_dict(node):
        raise InputError(Problem(str(path), 1, "recipe", "no mapping", MAPPING))
    if node and not _is_recipe(map(str, node), named=not above):
        found = (
            f"{len(node)} keys, of which none is one of a recipe (they are not shown: this may be a file of secrets)"
        )
        raise InputError(
            Problem(
                str(path),
                1,
                "recipe",
                found,
                f"{MAPPING}; does {above[-1] if above else 'the command'} mean this file?",
            )
        )
    return node


def _said(error: Exception) -> str:
    """An error of reading YAML without what it quotes of the file, which may be no recipe but one of secrets."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    said = getattr(error, "problem", None)
    if not said:
        return short(re.sub(r"'.*'", "'…'", str(error), flags=re.DOTALL))
    # marks of one character and names like '<block end>' stay; pair by pair, so that what is between two of them is not taken for one
    return short(re.sub(r"'([^']*)'", lambda m: m[0] if len(m[1]) < 2 or m[1][0] == "<" else "'…'", said))


def _is_recipe(keys: Iterable[str], named: bool) -> bool:
    """Whether a file's keys are those of a recipe of either dialect. Of a file that a person named (`named`) they may all be
    misspelt, but they are names."""
    from nemo_pivotrl.config.nemo_aligner import TOP

    known = {*(field.name for field in fields(Recipe)), *(old.partition(".")[0] for old in RENAMED), *TOP, "defaults"}
    found = set(keys)
    return bool(found & known) or (named and all(re.fullmatch(r"\w[\w.-]{0,63}", key) for key in found))


def _check_size(text: str, path: Path) -> None:
    """Refuse YAML whose aliases make a few lines into a tree without end. Raises InputError and YAMLError."""
    import yaml

    sizes: dict[int, float] = {}

    def size(node: Any) -> float:
        if id(node) not in sizes:
            sizes[id(node)] = math.inf  # met again below itself: a tree without end
            below = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
            sizes[id(node)] = 1 + (0 if isinstance(node, yaml.ScalarNode) else sum(map(size, below)))
        return sizes[id(node)]

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is None:
        return
    if root.tag != "tag:yaml.org,2002:map":
        raise InputError(Problem(str(path), 1, "recipe", "no mapping", MAPPING))
    if size(root) > MAX_VALUES:
        found = f"more than {MAX_VALUES} values, its aliases written out"
        raise InputError(Problem(str(path), None, "YAML", found, "write the values down, or fewer aliases"))


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
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise InputError(Problem("command line", None, key, short(text), short(str(error)))) from None
        first, *rest = key.split(".")
        if key in ("compat", "message"):
            values[key] = value
            continue
        node: dict[str, Any] = values
        for part in [first, *rest][:-1] if first in ("limits", "judge") else ["settings", first, *rest][:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                remedy = "it has a value already: give it once"
                raise InputError(Problem("command line", None, key, short(node), remedy))
        node[key.split(".")[-1]] = value
    return typing.cast(Verifier, build(Verifier, values, "command line", "verifier."))
