"""The stages: where the function of each is, and how it is run, in this process or in many.

Nothing heavy is imported before a stage's function is.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from nemo_pivotrl.cli.exits import BAD_INPUT, missing_module
from nemo_pivotrl.core.errors import InputError

if TYPE_CHECKING:
    from nemo_pivotrl.backends.launch import Place
    from nemo_pivotrl.config import Recipe

STAGES = {
    "world": (
        "nemo_pivotrl.demo.expert_trajectories:make_expert_trajectories",
        "write the trajectories of the embedded example",
    ),
    "extract": (
        "nemo_pivotrl.pivotrl.extract:extract",
        "cut trajectories into candidates, one for each assistant turn",
    ),
    "warmup": ("nemo_pivotrl.pivotrl.sft:warmup", "make a start policy by a short fine-tuning, where there is none"),
    "profile": (
        "nemo_pivotrl.pivotrl.profile:profile",
        "let the start policy try every candidate up to K times, and judge what it does",
    ),
    "merge": ("nemo_pivotrl.pivotrl.profile:merge", "put the shards of a profile together"),
    "audit": ("nemo_pivotrl.pivotrl.verifier_audit:audit", "try the verifier on actions whose verdict is known"),
    "rescore": ("nemo_pivotrl.pivotrl.rescore:rescore", "judge a profile's samples by another verifier or threshold"),
    "select": (
        "nemo_pivotrl.pivotrl.select:select_pivots",
        "keep the candidates that the policy sometimes solves: the pivots",
    ),
    "export": (
        "nemo_pivotrl.pivotrl.export:export",
        "write the pivots for others: NeMo-Gym rows; with `nemo-rl` a recipe, with `nemotron` an artefact",
    ),
    "nemotron": (
        "nemo_pivotrl.integrations.nemotron:nemotron",
        "run extract to train, with the artefacts of Nemotron's pipeline",
    ),
    "sft": ("nemo_pivotrl.pivotrl.sft:sft", "fine-tune on the same data, to compare with"),
    "train": ("nemo_pivotrl.pivotrl.train:train", "train the policy on the pivots, by single-turn GRPO"),
    "manners": (
        "nemo_pivotrl.demo.answer_styles_models:make_manners",
        "LLMdoctor: write the embedded example: patient, doctor and questions",
    ),
    "rank": (
        "nemo_pivotrl.llmdoctor.rank:rank",
        "LLMdoctor: make preferences of the patient's own answers, ranked by oracles",
    ),
    "tfpo": ("nemo_pivotrl.llmdoctor.train_doctor:train_doctor", "LLMdoctor: train doctors on token rewards"),
    "assess": (
        "nemo_pivotrl.llmdoctor.assess:assess",
        "LLMdoctor: compare steered answers with others, with intervals",
    ),
    "evaluate": ("nemo_pivotrl.pivotrl.evaluate:evaluate", "compare policies, with intervals"),
    "preferences": ("nemo_pivotrl.llmdoctor.preferences:preferences", "LLMdoctor: read preference files"),
    "reward": (
        "nemo_pivotrl.llmdoctor.reward:build_rewards",
        "LLMdoctor: reward every token of the preferences, by the patient's two faces",
    ),
    "decode": (
        "nemo_pivotrl.llmdoctor.decode:decode",
        "LLMdoctor: answer prompts with the patient steered by doctors",
    ),
    "report": ("nemo_pivotrl.report.page:report", "put the run on one HTML page, its numbers beside it as JSON"),
    "run": (
        "nemo_pivotrl.pipeline:run",
        "run all stages of the recipe; with loop.max_rounds profile and train again when the pivots are used up",
    ),
}
LIGHT = ("world", "extract", "audit", "rescore", "select", "export", "report", "preferences")
"""Stages that load no model."""
EXPORTS = ("nemo-gym", "nemo-rl", "nemotron")
"""`export nemo-rl RECIPE` is `export RECIPE export.target=nemo-rl`."""
NEXT = {
    "world": "extract",
    "extract": "profile",
    "warmup": "profile",
    "audit": "profile",
    "profile": "select",
    "merge": "select",
    "rescore": "select",
    "select": "train",
    "train": "evaluate",
    "sft": "evaluate",
    "evaluate": "report",
    "manners": "rank",
    "rank": "preferences",
    "preferences": "reward",
    "reward": "tfpo",
    "tfpo": "assess",
    "assess": "report",
}
"""Stage to the one after it. After every other stage the run is there to be looked at."""
CHECKED = ("profile", "sft", "train", "rank", "reward", "tfpo", "decode", "assess")
"""Stages that load a model which must be there already: `tools/checks.py` looks at all they need before they begin."""
STARTED = frozenset({"RANK", "WORLD_SIZE", "SLURM_STEP_ID"})
"""Variables of torchrun and srun: without one of them this is the only process, and launch.py, a second's import, is not asked."""


def stage_command(stage: str, options: argparse.Namespace) -> int | None:
    """Run a stage, or print its recipe."""
    from nemo_pivotrl.config.load import load_recipe
    from nemo_pivotrl.config.show import to_yaml

    fresh = "fresh=true" in options.overrides
    recipe = load_recipe(options.recipe, [o for o in options.overrides if o not in ("fresh=true", "fresh=false")])
    if not options.print_config:
        code = run_stage(stage, recipe, fresh, options.shard)
        if code == 0 and not options.shard and (not os.environ.keys() & STARTED or here().rank == 0):
            print(f"next: {following(stage, recipe, options.recipe, options.overrides)}")
        return code
    print(to_yaml(recipe, options.changed), end="")
    return None


def following(stage: str, recipe: Recipe, path: str, overrides: Sequence[str]) -> str:
    """The command that a person would type next, with the recipe and the settings of the last one."""
    then = NEXT.get(stage, "view")
    if stage == "extract" and _awaits_warmup(recipe):
        then = "warmup"
    if then == "evaluate" and not recipe.evaluate.policies:
        then = "report"
    if then == "assess" and not recipe.assess.arms:
        then = "decode"
    if then == "view":
        return shlex.join(["nemo-pivotrl", "view", recipe.run_dir])
    kept = [o for o in overrides if not o.startswith("fresh=")]
    more = ["select.profiles=profiles.rescored.jsonl"] if stage == "rescore" else []
    return shlex.join(["nemo-pivotrl", then, path, *kept, *more])


def _awaits_warmup(recipe: Recipe) -> bool:
    """Whether the start policy is the warmup's to make, and not made yet."""
    start = recipe.path(recipe.warmup.name) / "policy"
    return Path(recipe.policy.model_name).resolve() == start.resolve() and not start.exists()


def run_stage(stage: str, recipe: Recipe, fresh: bool, shard: str | None = None) -> int:
    """Import a stage's function and call it: here, or on the first of many processes that torchrun or srun started.

    Returns this process's exit code; every process but the first is silent.
    """
    light = stage in LIGHT
    if not light and recipe.num_threads:
        os.environ.setdefault("OMP_NUM_THREADS", str(recipe.num_threads))
        import torch

        torch.set_num_threads(recipe.num_threads)
    with missing_module(f"stage {stage}", {}, "reference"):
        from nemo_pivotrl.backends.hub import with_local_models
    recipe = with_local_models(recipe, fetch=not light)
    module, _, function = STAGES[stage][0].partition(":")
    extras = {"matplotlib": "report", "jinja2": "report", "httpx": "verifiers", "openapi_schema_validator": "verifiers"}

    more = {}
    if shard is not None:
        from nemo_pivotrl.components.shards import shard_of
        from nemo_pivotrl.core.errors import Problem

        if stage != "profile":
            raise InputError(Problem("command line", None, "--shard", f"stage {stage}", "only profile has shards"))
        more["shard"] = shard_of(shard)

    def call() -> None:
        with missing_module(f"stage {stage}", extras, "reference"), alone(stage, recipe, shard):
            if stage in CHECKED:
                from nemo_pivotrl.tools.checks import preflight

                preflight(recipe, stage, here().world if os.environ.keys() & STARTED else 1)
            getattr(import_module(module), function)(recipe, fresh, **more)

    if os.environ.keys() & STARTED and (place := here()).world > 1:
        if "megatron" not in (recipe.policy.backend, recipe.doctor.backend, recipe.patient.backend):
            return one_too_many(place)
        with missing_module(f"stage {stage}", {}, "megatron"):
            from nemo_pivotrl.backends.megatron.workers import run_together
        return run_together(call, recipe.megatron, place)
    call()
    return 0


def alone(stage: str, recipe: Recipe, shard: str | None) -> contextlib.AbstractContextManager[None]:
    """The lock of the stage's run folder, before anything heavy is imported."""
    from pathlib import Path

    from nemo_pivotrl.core.lock import only_writer

    return only_writer(Path(recipe.run_dir), stage, f"shard {shard}" if shard else "")


def here() -> Place:
    """Which process of how many this is."""
    with missing_module("many processes", {}, "reference"):
        from nemo_pivotrl.backends.launch import place_of
    return place_of(os.environ)


def one_too_many(place: Place) -> int:
    """Refuse processes that would all run the same stage; the first says so."""
    from nemo_pivotrl.core.errors import Problem

    if place.rank > 0:
        from nemo_pivotrl.backends.launch import SPEAK_S

        time.sleep(SPEAK_S)
        return BAD_INPUT
    remedy = "start one process, or set policy.backend, doctor.backend or patient.backend to megatron"
    raise InputError(Problem("recipe", None, "backend", f"reference, in {place.world} processes", remedy))


def leave_together(code: int) -> NoReturn:
    """End this process; one of many that has worked leaves as torch.distributed needs it."""
    if code == 0 and os.environ.keys() & STARTED and here().world > 1:
        from nemo_pivotrl.backends.launch import leave

        leave(code)
    sys.exit(code)
