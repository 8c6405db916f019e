"""Kill -9 at random moments of a stage on the map, again and again, and compare the bytes with those of an undisturbed run.

    python benchmarks/map_kills.py --kills 50 --stages profile,audit,rescore,verify,evaluate,rank,reward,decode,assess

Each run is a process of its own (forked, so that none of them spends seconds on imports) that gets SIGKILL after a random time; the
next one goes on where it was. When one ends before its time, its bytes are compared and everything begins anew.
Kills on Ray are in benchmarks/ray_nodes.py.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nemo_pivotrl.config import Recipe
from nemo_pivotrl.config.load import load_recipe
from nemo_pivotrl.demo.answer_styles_models import make_manners
from nemo_pivotrl.demo.expert_trajectories import make_expert_trajectories
from nemo_pivotrl.llmdoctor.assess import assess
from nemo_pivotrl.llmdoctor.decode import decode
from nemo_pivotrl.llmdoctor.preferences import preferences
from nemo_pivotrl.llmdoctor.rank import rank
from nemo_pivotrl.llmdoctor.reward import build_rewards
from nemo_pivotrl.pivotrl.evaluate import evaluate
from nemo_pivotrl.pivotrl.extract import extract
from nemo_pivotrl.pivotrl.profile import profile
from nemo_pivotrl.pivotrl.rescore import rescore
from nemo_pivotrl.pivotrl.sft import warmup
from nemo_pivotrl.pivotrl.verifier_audit import audit
from nemo_pivotrl.tools.verify import verify

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from support.recipes import SMALL, SMALL_LLMDOCTOR  # noqa: E402

QUIET = ["audit.before_profile=false", "logger.tensorboard=false"]
Run = Callable[[Recipe], object]


@dataclass(frozen=True)
class Stage:
    """A stage, the artefact that its map writes, the recipe it is of, and what of that is made smaller."""

    run: Run
    artefact: str
    algorithm: str = "pivotrl"
    settings: tuple[str, ...] = ()
    smaller: Callable[[Recipe], Recipe] = lambda recipe: recipe


def evaluated(recipe: Recipe) -> Recipe:
    """With the start policy alone."""
    policies = {"base": str(recipe.path("start/policy"))}
    return replace(recipe, evaluate=replace(recipe.evaluate, policies=policies))


def decoded(recipe: Recipe) -> Recipe:
    """The patient's answers to the test prompts, in several waves."""
    prompts = str(recipe.path("manners/test.jsonl"))
    return replace(recipe, decode=replace(recipe.decode, prompts=prompts, doctors={}, answers_per_wave=4))


def assessed(recipe: Recipe) -> Recipe:
    """Arms without doctors."""
    arms = {label: arm for label, arm in recipe.assess.arms.items() if not arm.beta}
    return replace(recipe, decode=replace(recipe.decode, doctors={}), assess=replace(recipe.assess, arms=arms))


def verified(recipe: Recipe) -> object:
    """The profile's samples, as the command does."""
    target = recipe.path("verdicts.jsonl")
    return verify(recipe.verifier, recipe.path("profiles.jsonl"), target, recipe.executor, recipe.workers)


STAGES = {
    "profile": Stage(profile, "profiles.jsonl"),
    "audit": Stage(audit, "audit.jsonl", settings=("audit.sample=0",)),
    "verify": Stage(verified, "verdicts.jsonl"),
    "rescore": Stage(rescore, "profiles.rescored.jsonl", settings=("verifier.name=functional",)),
    "evaluate": Stage(evaluate, "evaluation.jsonl", smaller=evaluated),
    "rank": Stage(rank, "answers.jsonl", "llmdoctor"),
    "reward": Stage(build_rewards, "token_rewards.jsonl", "llmdoctor", ("reward.pairs_per_wave=4",)),
    "decode": Stage(decode, "decoded.jsonl", "llmdoctor", smaller=decoded),
    "assess": Stage(assess, "assessment.jsonl", "llmdoctor", smaller=assessed),
}
BEFORE: dict[str, tuple[Run, ...]] = {
    "pivotrl": (make_expert_trajectories, extract, warmup, profile),
    "llmdoctor": (make_manners, rank, preferences),
}
"""What makes a run folder for the stages of a recipe."""


def recipe_of(algorithm: str, folder: Path, settings: tuple[str, ...] = ()) -> Recipe:
    """The tiny recipe, smaller still."""
    small = [*SMALL, *QUIET] if algorithm == "pivotrl" else SMALL_LLMDOCTOR
    return load_recipe(str(ROOT / f"recipes/{algorithm}/tiny.yaml"), [f"run_dir={folder}", *small, *settings])


def run_folder(place: Path, algorithm: str) -> Path:
    """What the stages of an algorithm read, made where it is not there yet."""
    folder = place / algorithm
    if not folder.exists():
        with silence():
            for before in BEFORE[algorithm]:
                before(recipe_of(algorithm, folder))
    return folder


def main() -> None:
    """Print for each stage how many kills it took and whether all bytes were equal. Exits with 1 when they were not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", default=",".join(STAGES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        for name in options.stages.split(","):
            stage = STAGES[name]
            folder = run_folder(Path(place), stage.algorithm)
            recipe = stage.smaller(recipe_of(stage.algorithm, folder, stage.settings))
            torture(name, stage, recipe, options.kills, options.seed)


def torture(name: str, stage: Stage, recipe: Recipe, kills: int, seed: int) -> None:
    """Kill the stage so often. Exits with 1 where it ends with other bytes."""
    rng, path, counts = random.Random(f"{seed} {name}"), recipe.path(stage.artefact), [0, 0]
    path.unlink(missing_ok=True)
    with silence():
        start = time.perf_counter()
        stage.run(recipe)
    straight, whole = time.perf_counter() - start, digest(path)
    path.unlink()
    while True:
        killed = counts[0] < kills and killed_after(stage, recipe, rng.uniform(0.0, straight))
        if killed:
            counts[0] += 1
            continue
        if counts[0] == kills and not path.exists():
            with silence():
                stage.run(recipe)
        if digest(path) != whole:
            raise SystemExit(f"{name}: other bytes after {counts[0]} kills")
        counts[1] += 1
        path.unlink()
        if counts[0] == kills:
            break
    with silence():
        stage.run(recipe)  # for the stages after it
    print(
        f"{name}: {counts[0]} kills at random moments of {straight:.1f} s; {counts[1]} runs ended, all the same bytes",
        flush=True,
    )


def silence() -> contextlib.ExitStack:
    """Nothing is printed in the block."""
    stack = contextlib.ExitStack()
    stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
    stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
    return stack


def killed_after(stage: Stage, recipe: Recipe, seconds: float) -> bool:
    """Run in a process that is killed after so many seconds; False when it had ended before."""
    child = os.fork()
    if child == 0:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            stage.run(recipe)
        os._exit(0)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
