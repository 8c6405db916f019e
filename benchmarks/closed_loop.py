"""Does re-profiling pay? One profile against rounds of them, at the same number of rollouts, on the embedded world.

    python benchmarks/closed_loop.py --seeds 1 2 3 4 5 --processes 2

All runs begin with the same warmed policy. Both arms of a seed have the same trajectories, and end at the step that
reaches `--rollouts`, profiling, training and validation together. Each arm's last policy is scored on held-out turns, whole
tasks and puzzles that neither arm has trained on. Intervals are bootstraps of the paired difference, over seeds and over items
within a seed. What was interrupted resumes; what is done is in FOLDER/seed-N.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = """
num_threads=1 logger.tensorboard=false
world.train_tasks=300 world.test_tasks=100 world.puzzle_test_tasks=150
warmup.num_steps=400
extract.validation_share=0.1
profile.num_generations=4 profile.candidates_per_chunk=128 profile.limit=150 audit.before_profile=false
policy.optimizer.lr=3e-4 policy.generation.batch_tokens=65536
grpo.num_prompts_per_step=24 grpo.max_num_steps=100000 grpo.val_candidates=80 grpo.val_generations=2 grpo.val_kl=false
checkpointing.save_period=20
evaluate.num_generations=4 evaluate.trials=2
loop.std_window=5 loop.std_ratio=0.75 loop.gain_window=2 loop.patience=100
""".split()
"""All else is recipes/pivotrl/tiny.yaml. A profile takes 150 of some 1,050 train candidates, as where all would be too many."""
ARMS = {
    "loop": ["loop.max_rounds=100"],
    "one-shot": ["loop.max_rounds=1"],
    "all": ["loop.max_rounds=1", "profile.limit=0"],
}
"""`one-shot` goes on with the first round of `loop`, which both have in common. `all`: one profile of every candidate, at a cost
that is part of the same budget."""
SETS = {"one_turn": "held-out turns", "multi_turn": "whole tasks", "retention": "out of domain"}
BOOTSTRAPS = 10000


def main() -> None:
    """Run what is missing, then print the tables and write them to `--output`."""
    options = arguments()
    if options.seed is not None:
        return one_seed(options, options.seed)
    start(options)
    waiting, running = list(options.seeds), []
    while waiting or running:
        if waiting and len(running) < options.processes:
            seed = waiting.pop(0)
            folder = Path(options.folder, f"seed-{seed}")
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "log.txt").open("ab") as log:
                command = [sys.executable, __file__, *sys.argv[1:], "--seed", str(seed)]
                env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
                running.append((seed, subprocess.Popen(command, stdout=log, stderr=log, env=env)))
            continue
        seed, process = running.pop(0)
        if process.wait():
            sys.exit(f"seed {seed} failed: see {Path(options.folder, f'seed-{seed}', 'log.txt')}")
    text = tables(options)
    print(text)
    if options.output:
        Path(options.output).write_text(text + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    made.add_argument("--rollouts", type=int, default=20000, help="of each arm")
    made.add_argument("--folder", default="runs/closed_loop")
    made.add_argument("--processes", type=int, default=1, help="seeds at a time")
    made.add_argument("--output", default="", help="file for the tables")
    made.add_argument("--set", nargs="*", default=[], metavar="key=value", help="settings of both arms")
    made.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    made.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    return made.parse_args()


def start(options: argparse.Namespace) -> None:
    """Make the start policy of all runs, FOLDER/start/policy, unless it is there."""
    import torch

    from nemo_pivotrl.recipe import load_recipe
    from nemo_pivotrl.stages.sft import warmup

    torch.set_num_threads(1)
    if not Path(options.folder, "start/policy").exists():
        home = Path(options.folder).resolve()
        warmup(load_recipe(str(ROOT / "recipes/pivotrl/tiny.yaml"), [f"run_dir={home}", *SETTINGS, *options.set]))


def one_seed(options: argparse.Namespace, seed: int) -> None:
    """Run both arms from the start policy, and score them."""
    import torch

    from nemo_pivotrl.recipe import load_recipe
    from nemo_pivotrl.stages.evaluate import evaluate
    from nemo_pivotrl.stages.extract import extract
    from nemo_pivotrl.stages.loop import loop, read_history
    from nemo_pivotrl.stages.quickstart import make_world

    torch.set_num_threads(1)
    home = Path(options.folder, f"seed-{seed}").resolve()
    base = home.parent / "start/policy"
    settings = [f"seed={seed}", f"budget.rollouts={options.rollouts}", *SETTINGS, *options.set]
    recipe = str(ROOT / "recipes/pivotrl/tiny.yaml")
    for arm in options.arms:
        rounds = ARMS[arm]
        own = load_recipe(recipe, [f"run_dir={home / arm}", f"policy.model_name={base}", *settings, *rounds])
        if (home / arm / "evaluation.json").exists():
            continue
        if arm == "one-shot" and not (home / arm).exists():
            later = shutil.ignore_patterns("round-*", "final", "evaluation*", "loop.jsonl", "ledger.jsonl")
            shutil.copytree(home / "loop", home / "one-shot.part", ignore=later, dirs_exist_ok=True)
            os.replace(home / "one-shot.part", home / arm)
        if not own.path("candidates.jsonl").exists():
            make_world(own)
            extract(own)
        loop(own)
        done = max(e["round"] for e in read_history(home / arm) if "round" in e and "step" in e)
        last = own.path("pivotrl" if done == 1 else f"round-{done:02d}/pivotrl") / "policy"
        policies = {"base": str(base)} if arm == options.arms[0] else {}
        evaluate(
            dataclasses.replace(
                own, evaluate=dataclasses.replace(own.evaluate, policies={**policies, "result": str(last)})
            )
        )


def scores(folder: Path, arm: str, policy: str, name: str) -> dict[str, float]:
    """Mean score of each item of a set."""
    from nemo_pivotrl.stages.evaluate import read_items

    rows = read_items(folder / arm / "evaluation.jsonl")
    return {
        r["item"]: float(np.mean(r["scores"]))
        for r in rows
        if (r["policy"], r["set"]) == (policy, name) and r["scores"]
    }


def interval(by_seed: list[np.ndarray]) -> tuple[float, float, float]:
    """(mean, low, high) of differences, 95 %: seeds are drawn with replacement, then the items of each."""
    rng = np.random.default_rng(0)
    draws = np.empty(BOOTSTRAPS)
    for i in range(BOOTSTRAPS):
        chosen = rng.integers(0, len(by_seed), len(by_seed))
        draws[i] = np.mean([by_seed[s][rng.integers(0, len(by_seed[s]), len(by_seed[s]))].mean() for s in chosen])
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(np.mean([d.mean() for d in by_seed])), float(low), float(high)


def tables(options: argparse.Namespace) -> str:
    """Per seed and over all seeds, in per cent; and what the rounds did."""
    from nemo_pivotrl.stages.loop import read_history

    arms = list(options.arms)
    found = {  # set -> policy -> seed -> item -> score; the start policy is scored with the first arm
        name: {
            label: [scores(Path(options.folder, f"seed-{seed}"), arm, policy, name) for seed in options.seeds]
            for label, arm, policy in [("base", arms[0], "base"), *((arm, arm, "result") for arm in arms)]
        }
        for name in SETS
    }
    lines = [f"{options.rollouts} rollouts an arm; per cent"]
    for name, title in SETS.items():
        lines.append(f"{title:<16}" + "".join(f"{label:>12}" for label in found[name]))
        for place, seed in enumerate(options.seeds):
            means = [100 * float(np.mean(list(by_seed[place].values()))) for by_seed in found[name].values()]
            lines.append(f"{f'  seed {seed}':<16}" + "".join(f"{mean:>12.1f}" for mean in means))
        for other in [arm for arm in arms if arm != "loop" and "loop" in arms]:
            pairs = zip(found[name]["loop"], found[name][other], strict=True)
            apart = [np.array([again[item] - once[item] for item in sorted(once)]) for again, once in pairs]
            mean, low, high = (100 * value for value in interval(apart))
            ahead = f"ahead in {sum(d.mean() > 0 for d in apart)} of {len(apart)} seeds"
            lines.append(f"  loop minus {other}: {mean:+.2f} [{low:+.2f}, {high:+.2f}], {ahead}")
    for seed in options.seeds:
        for arm in arms:
            events = read_history(Path(options.folder, f"seed-{seed}", arm))
            lines.append(f"seed {seed}, {arm}:")
            lines += [f"  {e['text']}" for e in events if e["event"] != "stopped"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
