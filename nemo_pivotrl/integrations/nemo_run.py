"""`nemo pivotrl STAGE`: the project's stages as commands of NeMo-Run, which finds this module by its entry point.

    nemo pivotrl train --factory "recipe(path='recipes/pivotrl/tiny.yaml')" recipe.grpo.max_num_steps=3
    nemo pivotrl train --factory "recipe(path='/shared/recipe.yaml')" run.executor=slurm run.executor.nodes=2

`--yaml` takes what `--to-yaml` wrote, without its line `_partial_: true`, which NeMo-Run 0.11 does not read back.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import types
import typing
from collections.abc import Callable
from typing import Any

import nemo_run
from nemo_run.cli import cli_parser

from nemo_pivotrl.cli import STAGES, guarded, run_stage
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.config.build import build
from nemo_pivotrl.config.load import load_recipe
from nemo_pivotrl.core.errors import InputError, Problem


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

if hasattr(cli_parser.parse_value, "__wrapped__"):
    # NeMo-Run remembers what it made of a text. For `Config[Class]` that is an object which later lines fill in, so that two sections
    # of one class, `warmup` and `sft` for instance, would become one and share the settings of the last.
    cli_parser.parse_value = cli_parser.parse_value.__wrapped__


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


def local(processes: int = 1) -> Any:
    """This machine; several processes are started by torchrun."""
    launcher = {"launcher": "torchrun"} if processes > 1 else {}
    return nemo_run.Config(nemo_run.LocalExecutor, ntasks_per_node=processes, **launcher)


def slurm(nodes: int = 1, gpus_per_node: int = 8, retries: int = 0) -> Any:
    """A Slurm cluster as the variables of deploy/slurm/cluster.env describe it, a process for each GPU, through Pyxis.

    With `retries` a run that ends badly, or stops at `checkpoint_must_save_by`, is put back into the queue so often.
    Raises InputError naming the variables that are not set.
    """
    missing = [name for name in ("SLURM_ACCOUNT", "SLURM_PARTITION", "CONTAINER") if not os.environ.get(name)]
    if missing:
        remedy = "set -a; source deploy/slurm/cluster.env (filled in); set +a"
        raise InputError(Problem("environment", None, ", ".join(missing), "not set", remedy))
    cache, extra = os.environ.get("PERSISTENT_CACHE"), os.environ.get("EXTRA_MOUNTS")
    mounts = [f"{os.getcwd()}:{os.getcwd()}", *([f"{cache}:{cache}"] if cache else [])]
    return nemo_run.Config(
        nemo_run.SlurmExecutor,
        account=os.environ["SLURM_ACCOUNT"],
        partition=os.environ["SLURM_PARTITION"],
        time=os.environ.get("SLURM_TIME_LIMIT") or "4:00:00",
        nodes=nodes,
        ntasks_per_node=gpus_per_node,
        gpus_per_node=gpus_per_node,
        exclusive=True,
        retries=retries,
        container_image=os.environ["CONTAINER"],
        container_mounts=mounts + (extra.split(",") if extra else []),
        packager=nemo_run.Config(nemo_run.Packager),  # the image has the project
    )


def ray_job(stage: str, path: str, executor: Any, *overrides: str, dryrun: bool = False) -> Any:
    """Submit a stage as NeMo-Run's Ray job: Ray over the nodes of `executor` (e.g. Slurm), the stage on its head.

    The job runs in the folder that this is called in, which all nodes must see. Returns NeMo-Run's `RayJob`.
    """
    from nemo_run.run.ray.job import RayJob

    if stage not in STAGES:
        remedy = "use one of " + ", ".join(STAGES)
        raise InputError(Problem("ray_job", None, "stage", stage, remedy))
    words = ["nemo-pivotrl", stage, path, "executor=ray", "ray.address=auto", *overrides]
    job = RayJob(name=f"pivotrl-{stage}", executor=executor)
    job.start(command=f"cd {shlex.quote(os.getcwd())} && {shlex.join(words)}", workdir="", dryrun=dryrun)
    return job


# NeMo-Run finds a factory's kind by its return type, and cannot read a postponed annotation
local.__annotations__ = {"processes": int, "return": nemo_run.Config[nemo_run.LocalExecutor]}
slurm.__annotations__ = {"nodes": int, "gpus_per_node": int, "retries": int}
slurm.__annotations__["return"] = nemo_run.Config[nemo_run.SlurmExecutor]
for _executor in (local, slurm):
    nemo_run.cli.factory(_executor)
