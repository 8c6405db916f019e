"""The PivotRL paper's claims on the embedded world, small: several seeds, intervals, one command that resumes.

    python benchmarks/pivotrl_claims.py --processes 2

The start policy is a tiny model that can do all the desk needs but often does not, for those it learned from are careless
(`world.EXPERT_ERRORS`), and that is good at puzzles, which nobody trains on later. All arms get the same trajectories of an
expert whose wording is another than the start policy's (`world.teacher: other`), which is what an SFT set from other models is to a
post-trained policy. Arms that learn from rewards take the same number of steps: of 192 turns, end-to-end GRPO of 192 whole
episodes; SFT takes as many as cost about PivotRL's processor time, its profile included. The verifier compares calls as `functional`
does and talk by what it does (`demo/talk_judge.py`). **Every arm's learning rate** is the
one of `GRID` with the best success on validation tasks of the tuning seeds, which are none of the reported ones.

FOLDER has a folder for each choice of settings; in it, start is the start policy and seed-N/ARM-LR one training with its result. What
is there is not made again.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from claims import ROOT, Job, Result, provenance, results

from nemo_pivotrl.algorithms.early_stopping import StoppingRule
from nemo_pivotrl.backends import loading
from nemo_pivotrl.backends.base import Backend, Sampler, TokenBatch
from nemo_pivotrl.components.metrics import read_metrics
from nemo_pivotrl.components.rollout import load_chat, sample_seed
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.artifacts import digest
from nemo_pivotrl.core.atomic import write_atomically
from nemo_pivotrl.demo import service_desk as world, simulators
from nemo_pivotrl.pivotrl.evaluate import evaluate, play, read_items, sampled
from nemo_pivotrl.pivotrl.profile_rows import light_of_row

SETTINGS = """
num_threads=1 logger.tensorboard=false audit.before_profile=false
world.expert_error_rate=0.8 world.teacher=other world.vocab_size=512
world.train_tasks=300 world.test_tasks=200 world.puzzle_test_tasks=200
world.warmup_tasks=2000 world.puzzle_warmup_tasks=16000 warmup.num_steps=1500 warmup.copy_steps=220
verifier.name=nemo_pivotrl.demo.talk_judge:DeskTalk extract.validation_share=0.2
profile.num_generations=8 profile.curtail=none select.lambda_diff=0.6
policy.generation.max_new_tokens=48 policy.generation.batch_tokens=65536
sft.batch_size=16 sft.num_steps=120
grpo.max_num_steps=30 grpo.num_prompts_per_step=24 grpo.num_generations_per_prompt=8 grpo.val_period=0 grpo.val_kl=false
evaluate.trials=2
""".split()
"""All else is recipes/pivotrl/tiny.yaml."""
GRID = (1e-4, 3e-4, 1e-3, 3e-3)
POINTS = 3
"""How often success is measured in training, at equal distances."""
TRIAL_TASKS = 150
"""Validation tasks, one episode each."""


@dataclass(frozen=True)
class Arm:
    """One way of training."""

    title: str
    settings: tuple[str, ...] = ()
    kind: str = "pivots"
    """`pivots`, `sft` or `e2e`."""
    data: str = "data"
    """Whose candidates and profile it reads: `data`, or `house`, where the expert words things as the start policy does."""
    profile: str = "profiles.jsonl"
    like: str = ""
    """The arm whose learning rate it takes; empty: its own is tuned."""


ARMS = {
    "sft": Arm("SFT", kind="sft"),
    "pivotrl": Arm("PivotRL"),
    "random": Arm("no pivot filter", ("select.rule=random",)),
    "exact": Arm("strict match", ("verifier.name=exact",), profile="profiles.exact.jsonl"),
    "mixed": Arm("mixed instead of adv", ("select.rule=mixed",)),
    "e2e": Arm("end-to-end GRPO", kind="e2e"),
    "any-text": Arm(
        "any text where the expert talks", ("verifier.name=functional",), profile="profiles.functional.jsonl"
    ),
}
HOUSE = {
    "house-sft": Arm("SFT", kind="sft", data="house"),
    "house-pivotrl": Arm("PivotRL", data="house", like="pivotrl"),
}
"""The same with an expert who words things as the start policy does: what SFT's trouble is due to."""
SWEEP = {
    "lambda-0.9": Arm("lambda 0.9 (P2: 0.6)", ("select.lambda_diff=0.9",), like="pivotrl"),
    "leave-one-out": Arm("leave-one-out (P7: group)", ("grpo.use_leave_one_out_baseline=true",), like="pivotrl"),
    "kl-0.1": Arm("KL 0.1 (P11: 0)", ("loss_fn.reference_policy_kl_penalty=0.1",), like="pivotrl"),
}
EVERY = ARMS | HOUSE | SWEEP
SETS = {"multi_turn": "whole tasks", "one_turn": "held-out turns", "retention": "out of domain"}


# ---- jobs ----


def recipe_of(home: Path, seed: int, *settings: str) -> Recipe:
    """The recipe of one training in `home`, FOLDER/seed-N/ARM."""
    from nemo_pivotrl.config.load import load_recipe

    start = home.parents[1] / "start/policy"
    own = [f"run_dir={home}", f"seed={seed}", f"policy.model_name={start}", *SETTINGS, *settings]
    return load_recipe(str(ROOT / "recipes/pivotrl/tiny.yaml"), own)


def start(folder: Path, settings: Sequence[str]) -> Result:
    """Make the start policy, `folder`/policy."""
    from nemo_pivotrl.config.load import load_recipe
    from nemo_pivotrl.pivotrl.sft import warmup

    home = folder.parent
    warmup(load_recipe(str(ROOT / "recipes/pivotrl/tiny.yaml"), [f"run_dir={home}", "seed=0", *SETTINGS, *settings]))
    return {}


def data(folder: Path, seed: int, settings: Sequence[str]) -> Result:
    """Trajectories, candidates, the start policy's K rollouts of each, the same judged otherwise, and its scores."""
    from nemo_pivotrl.demo.expert_trajectories import make_expert_trajectories as make_world
    from nemo_pivotrl.pivotrl.extract import extract
    from nemo_pivotrl.pivotrl.profile import profile
    from nemo_pivotrl.pivotrl.rescore import rescore

    recipe = recipe_of(folder, seed, *settings)
    make_world(recipe)
    extract(recipe)
    begun = time.perf_counter()
    source = profile(recipe)
    seconds = time.perf_counter() - begun
    for name in ("exact", "functional"):
        judge = dataclasses.replace(recipe.verifier, name=name)
        to = dataclasses.replace(recipe.rescore, output=f"profiles.{name}.jsonl")
        rescore(dataclasses.replace(recipe, verifier=judge, rescore=to))
    groups = [light_of_row(row).rewards for row in rows_of(source) if row["split"] == "train"]
    return {
        "items": scores(recipe, recipe.policy.model_name),
        "curve": [[0, trial(recipe, recipe.policy.model_name)]],
        "candidates": len(groups),
        "rollouts": sum(map(len, groups)),
        "curtailed": sum(map(curtailed, groups)),
        "constant": statistics.fmean(len(set(group)) == 1 for group in groups),
        "always": statistics.fmean(set(group) == {1.0} for group in groups),
        "profile_seconds": seconds,
    }


def curtailed(rewards: Sequence[float]) -> int:
    """How many of a candidate's K rollouts curtailed sampling would have drawn."""
    plan, drawn = StoppingRule(len(rewards)), 0
    while more := plan.ask(rewards[:drawn]):
        drawn += more
    return drawn


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of an artefact."""
    from nemo_pivotrl.core.artifacts import read_rows

    return list(read_rows(path))


def training(folder: Path, seed: int, name: str, lr: float, settings: Sequence[str]) -> Result:
    """Train one arm and score it."""
    arm = EVERY[name]
    rate = f"{'sft' if arm.kind == 'sft' else 'policy'}.optimizer.lr={lr}"
    recipe = recipe_of(folder, seed, *arm.settings, rate, *settings)
    base = folder.parent / arm.data
    for name in ("trajectories.jsonl", "candidates.jsonl"):
        shutil.copyfile(base / name, recipe.path(name))
    made = {"sft": by_sft, "e2e": by_episodes, "pivots": by_pivots}[arm.kind](recipe, base / arm.profile)
    policy = str(made.pop("policy"))
    judged = recipe_of(folder, seed, *settings)  # all arms by one verifier
    made |= {"items": scores(judged, policy), "drift": drift(judged, policy)}
    for heavy in folder.glob("*/step_*"):  # checkpoints; the policy stays
        shutil.rmtree(heavy)
    return made


def by_sft(recipe: Recipe, _: Path) -> Result:
    """SFT on all train trajectories."""
    from nemo_pivotrl.pivotrl.sft import sft

    begun = time.perf_counter()
    policy = sft(recipe)
    seconds = time.perf_counter() - begun
    return {"policy": policy, "curve": [[0, trial(recipe, str(policy))]], "training_seconds": seconds}


def by_pivots(recipe: Recipe, profiles: Path) -> Result:
    """PivotRL and what differs from it in what is selected, or how it is judged; training stops for every measurement."""
    from nemo_pivotrl.pivotrl.select import select_pivots
    from nemo_pivotrl.pivotrl.train import train

    shutil.copyfile(profiles, recipe.path("profiles.jsonl"))
    found = rows_of(select_pivots(recipe))
    curve = []
    for step in measured(recipe):
        policy = train(dataclasses.replace(recipe, grpo=dataclasses.replace(recipe.grpo, max_num_steps=step)))
        curve.append([step * turns_a_step(recipe), trial(recipe, str(policy))])
    folder, shown = recipe.path("pivotrl"), ("step", "reward", "reward_std", "mixed_group_share")
    steps = [{key: row[key] for key in shown} for row in read_metrics(folder / "metrics.jsonl") if row["step"]]
    return {
        "policy": policy,
        "curve": curve,
        "steps": steps,
        "pivots": sum(row["split"] == "train" for row in found),
        "training_seconds": sum(row.get("seconds", 0.0) for row in read_metrics(folder / "timing.jsonl")),
    }


def turns_a_step(recipe: Recipe) -> int:
    """Rollout turns of one step of single-turn GRPO."""
    return recipe.grpo.num_prompts_per_step * recipe.grpo.num_generations_per_prompt


def measured(recipe: Recipe) -> list[int]:
    """The steps after which success is measured; the last is one of them."""
    return [recipe.grpo.max_num_steps * (i + 1) // POINTS for i in range(POINTS)]


def by_episodes(recipe: Recipe, _: Path) -> Result:
    """End-to-end GRPO on the tasks that the trajectories are about."""
    import pivotrl_e2e

    curve: list[list[float]] = []

    def seen(step: int, backend: Backend, chat: Any, turns: int) -> None:
        if step in measured(recipe):
            curve.append([turns, success(recipe, backend, chat)])

    folder = recipe.path("e2e") / "policy"
    steps, seconds = pivotrl_e2e.train(recipe, seen, folder)
    return {"policy": folder, "curve": curve, "steps": steps, "training_seconds": seconds}


# ---- what is measured ----


def trial(recipe: Recipe, policy: str) -> float:
    """Success on validation tasks of the policy in a folder."""
    own = dataclasses.replace(recipe.policy, model_name=policy)
    return success(recipe, loading.load_sampler(own), load_chat(own))


def success(recipe: Recipe, sampler: Sampler, chat: Any) -> float:
    """Share of validation tasks, which are neither train nor test tasks, that end well."""
    simulator = simulators.ServiceDesk(recipe.seed + 10_000, {"trial": TRIAL_TASKS}, split="trial")
    return statistics.fmean(
        e.success for e in play(simulator, simulator.tasks(), ("trial", recipe.seed), recipe.policy, sampler, chat)
    )


def scores(recipe: Recipe, policy: str) -> dict[str, dict[str, float]]:
    """Set -> item -> mean score of the policy in a folder, on test tasks, held-out turns and puzzles."""
    own = dataclasses.replace(recipe, evaluate=dataclasses.replace(recipe.evaluate, policies={"it": policy}))
    source = evaluate(own, fresh=True)
    rows = [row for row in read_items(source) if row["scores"]]
    return {
        name: {row["item"]: statistics.fmean(row["scores"]) for row in rows if row["set"] == name}
        for name in dict.fromkeys(row["set"] for row in rows)
    }


def drift(recipe: Recipe, policy: str) -> float:
    """KL(start policy || policy) on the puzzles' answers, nats a token: how far the policy has moved where nobody trained it."""
    tasks = simulators.puzzles(recipe).tasks()
    chat = load_chat(recipe.policy)
    prompts = [chat.prompt_ids(world.Episode(task).messages, ()) for task in tasks]
    seeds = [[sample_seed("drift", recipe.seed, task.task_id)] for task in tasks]
    first = loading.load_sampler(recipe.policy)
    samples = [s for (s,) in sampled(first.infer(prompts, seeds, chat.stop_ids, recipe.policy.generation))]
    batch = TokenBatch(prompts, range(len(prompts)), [s.token_ids for s in samples], {})
    after = loading.load(dataclasses.replace(recipe.policy, model_name=policy)).get_inference_log_probs(batch)
    tokens = sum(len(s.token_ids) for s in samples)
    kept = [after[i, : len(s.token_ids)] for i, s in enumerate(samples)]
    return sum(sum(s.log_probs) - float(k.sum()) for s, k in zip(samples, kept, strict=True)) / tokens


# ---- the run ----


def main() -> None:
    """Run what is missing, then write tables and plots."""
    options = arguments()
    settings, processes = tuple(options.set), options.processes
    home = Path(options.folder).resolve() / digest([SETTINGS, settings], 8)  # other settings are other results
    results([Job(home / "start", start, (settings,))], 1)
    tuning, seeds = options.tuning_seeds, options.seeds
    made = results(data_jobs(home, [*tuning, *seeds], [*tuning, *options.sweep_seeds], settings), processes)
    tuned = [name for name, arm in EVERY.items() if not arm.like]
    grid = [
        Job(home / f"seed-{seed}/{name}-{lr:g}", training, (seed, name, lr, settings))
        for name in sorted(tuned, key=lambda name: name != "e2e")  # the longest first
        for lr in options.grid
        for seed in tuning
    ]
    made |= results(grid, processes)
    rates = {name: best(home, made, name, options.grid, tuning) for name in tuned}
    jobs = [
        Job(
            home / f"seed-{seed}/{name}-{rates[arm.like or name]:g}",
            training,
            (seed, name, rates[arm.like or name], settings),
        )
        for name, arm in sorted(EVERY.items(), key=lambda kv: kv[0] != "e2e")
        for seed in (seeds if name in ARMS else options.sweep_seeds)
    ]
    made |= results(jobs, processes)
    import pivotrl_tables

    shown = pivotrl_tables.Shown(
        {str(path.relative_to(home)): result for path, result in made.items()},
        list(seeds),
        list(options.sweep_seeds),
        list(tuning),
        list(options.grid),
        rates,
    )
    text = pivotrl_tables.document(shown, provenance(seeds))
    print(text)
    if options.output:
        output = Path(options.output)
        write_atomically(output.with_suffix(".md"), text + "\n")
        write_atomically(output.with_suffix(".svg"), pivotrl_tables.plots(shown) + "\n")


def data_jobs(home: Path, seeds: Sequence[int], sweep_seeds: Sequence[int], settings: tuple[str, ...]) -> list[Job]:
    """What the arms of each seed read."""
    house = (*settings, "world.teacher=house")
    return [Job(home / f"seed-{seed}/data", data, (seed, settings)) for seed in seeds] + [
        Job(home / f"seed-{seed}/house", data, (seed, house)) for seed in sweep_seeds
    ]


def best(home: Path, made: dict[Path, Result], name: str, grid: Sequence[float], seeds: Sequence[int]) -> float:
    """The learning rate with the best success on validation tasks after the last step; ties go to the smaller one."""

    def success_at(lr: float) -> float:
        return statistics.fmean(made[home / f"seed-{seed}/{name}-{lr:g}"]["curve"][-1][1] for seed in seeds)

    return max(grid, key=lambda lr: (success_at(lr), -lr))


def arguments() -> argparse.Namespace:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    made.add_argument("--sweep-seeds", type=int, nargs="*", default=[1, 2, 3], help="of --seeds, for the sweeps")
    made.add_argument("--tuning-seeds", type=int, nargs="+", default=[101])
    made.add_argument("--grid", type=float, nargs="+", default=list(GRID), help="learning rates of every arm")
    made.add_argument("--folder", default="runs/pivotrl_claims")
    made.add_argument("--processes", type=int, default=2)
    made.add_argument("--output", default="benchmarks/results/pivotrl_claims", help="of .md and .svg; empty: none")
    made.add_argument("--set", nargs="*", default=[], metavar="key=value", help="settings of all arms")
    return made.parse_args()


if __name__ == "__main__":
    main()
