"""`nemo pivotrl STAGE`: the project's stages as commands of NeMo-Run, which finds this module by its entry point.

    nemo pivotrl train --factory "recipe(path='recipes/pivotrl/tiny.yaml')" recipe.grpo.max_num_steps=3

`--yaml` takes what `--to-yaml` wrote, without its line `_partial_: true`, which NeMo-Run 0.11 does not read back.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Callable
from typing import Any

import nemo_run

from nemo_pivotrl.cli import STAGES, guarded, run_stage
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.recipe import build, load_recipe


def readable(hint: Any) -> Any:
    """`hint` as NeMo-Run's parser knows it: it reads neither `X | None` nor tuples."""
    origin, arguments = typing.get_origin(hint), tuple(map(readable, typing.get_args(hint)))
    if origin in (types.UnionType, typing.Union):
        return typing.Union[arguments]  # noqa: UP007
    if origin is tuple:
        return list[arguments[0]]  # type: ignore[valid-type]
    return hint


def annotate(cls: type[Any]) -> None:
    """Give the constructors of a dataclass and its sections types that NeMo-Run can read.

    It takes them off the constructor, where a postponed annotation is only text.
    """
    hints = typing.get_type_hints(cls)
    cls.__init__.__annotations__ = {name: readable(hint) for name, hint in hints.items()}  # type: ignore[misc]
    for hint in hints.values():
        for part in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(part):
                annotate(typing.cast(type[Any], part))


annotate(Recipe)


def as_config(value: Any) -> Any:
    """A dataclass as NeMo-Run's own description of it, so that its fields can be overridden on the command line.

    Settings at their default are left out: NeMo-Run cannot read back the empty text that many of them are.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        held = {f.name: (getattr(value, f.name), f.default) for f in dataclasses.fields(value)}
        return nemo_run.Config(type(value), **{name: as_config(v) for name, (v, usual) in held.items() if v != usual})
    if isinstance(value, dict):
        return {key: as_config(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _command(stage: str) -> Callable[..., None]:
    def command(recipe: Recipe, fresh: bool = False) -> None:
        def run() -> int:
            settings = json.loads(json.dumps(dataclasses.asdict(recipe)))  # lists for tuples, as in a file
            return run_stage(stage, build(Recipe, settings, "nemo pivotrl"), fresh)  # checked as a file is

        code = guarded(stage, run)
        if code:
            raise SystemExit(code)

    command.__name__ = command.__qualname__ = stage
    command.__annotations__ = {"recipe": Recipe, "fresh": bool, "return": None}
    return command


def _register(stage: str) -> Callable[..., None]:
    command: Callable[..., None] = nemo_run.cli.entrypoint(namespace="pivotrl", help=STAGES[stage][1])(_command(stage))

    def recipe(path: str) -> Any:
        """The recipe file at `path`."""
        return nemo_run.Partial(command, recipe=as_config(load_recipe(path)))

    recipe.__annotations__ = {"path": str, "return": nemo_run.Partial}
    nemo_run.cli.factory(target=command)(recipe)
    return command


for _stage in STAGES:
    globals()[_stage] = _register(_stage)  # NeMo-Run's files name a command by its module and its name
