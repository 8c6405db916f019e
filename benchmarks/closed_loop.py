"""Does re-profiling pay? One profile against rounds of them, at the same number of rollouts, on the embedded world.

    python benchmarks/closed_loop.py --processes 2

All runs begin with the same warmed policy. Both arms of a seed have the same trajectories and the same first profile, and end at
the step that reaches `--rollouts`: profiling, training and validation together. Each arm's last policy counts, not its best,
on held-out turns, whole tasks and puzzles that neither has trained on. Intervals are bootstraps of the paired difference, over
seeds and over items within a seed. What was interrupted resumes, and what is done is in FOLDER/seed-N.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from claims import ROOT, Job, Result, interval, provenance, results
from pivotrl_claims import scores

from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.artifacts import digest
from nemo_pivotrl.core.atomic import write_atomically

SETTINGS = """
num_threads=1 logger.tensorboard=false
world.train_tasks=300 world.test_tasks=400 world.puzzle_test_tasks=150
warmup.num_steps=400
extract.validation_share=0.1
profile.num_generations=4 profile.candidates_per_chunk=128 profile.limit=150 audit.before_profile=false
policy.optimizer.lr=3e-4 policy.generation.batch_tokens=65536
grpo.num_prompts_per_step=24 grpo.max_num_steps=100000 grpo.val_candidates=80 grpo.val_generations=2 grpo.val_kl=false
checkpointing.save_period=20
evaluate.num_generations=4 evaluate.trials=4
loop.std_window=5 loop.std_ratio=0.75 loop.gain_window=2 loop.patience=100
""".split()
"""All else is recipes/pivotrl/tiny.yaml. A profile takes 150 of some 1,050 train candidates, as where all would be too many."""
ARMS = {
    "loop": ["loop.max_rounds=100"],
    "new pivots alone": ["loop.max_rounds=100", "loop.rehearse=false"],
    "one-shot": ["loop.max_rounds=1"],
}
"""What follows the first goes on with its first round, which all have in common. `new pivots alone`: a round trains on those of
its own profile only."""
SETS = {"one_turn": "held-out turns", "multi_turn": "whole tasks", "retention": "out of domain"}


def main() -> None:
    """Run what is missing, then print the tables and write them to `--output`."""
    options = arguments()
    settings = tuple(options.set)
    given = [SETTINGS, settings, options.rollouts, [ARMS[arm] for arm in options.arms]]
    home = Path(options.folder).resolve() / digest(given, 8)  # other settings are other results
    results([Job(home / "start", start, (settings,))], 1)
    jobs = [
        Job(home / f"seed-{seed}/runs", every, (seed, options.rollouts, tuple(options.arms), settings))
        for seed in options.seeds
    ]
    made = results(jobs, options.processes)
    text = tables(options.arms, options.seeds, [made[job.folder] for job in jobs], options.rollouts)
    text = f"{provenance(options.seeds)}\n\n{text}"
    print(text)
    if options.output:
        write_atomically(Path(options.output), text + "\n")


def arguments() -> argparse.Namespace:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--seeds", type=int, nargs="+", default=[8, 9, 10, 11, 12])
    made.add_argument("--arms", nargs="+", default=["loop", "one-shot"], choices=ARMS, help="the first one is compared")
    made.add_argument("--rollouts", type=int, default=20000, help="of each arm")
    made.add_argument("--folder", default="runs/closed_loop")
    made.add_argument("--processes", type=int, default=2, help="seeds at a time")
    made.add_argument("--output", default="benchmarks/results/closed_loop.txt", help="file for the tables; empty: none")
    made.add_argument("--set", nargs="*", default=[], metavar="key=value", help="settings of both arms")
    return made.parse_args()


def recipe_of(home: Path, *settings: str) -> Recipe:
    """The recipe of one run in `home`."""
    from nemo_pivotrl.config.load import load_recipe

    return load_recipe(str(ROOT / "recipes/pivotrl/tiny.yaml"), [f"run_dir={home}", *SETTINGS, *settings])


def start(folder: Path, settings: Sequence[str]) -> Result:
    """Make the start policy of all runs, `folder`/policy."""
    from nemo_pivotrl.pivotrl.sft import warmup

    warmup(recipe_of(folder.parent, *settings))
    return {}


def every(folder: Path, seed: int, rollouts: int, arms: Sequence[str], settings: Sequence[str]) -> Result:
    """Run the arms from the start policy, and score them and it: arm -> scores, and what its rounds said."""
    from nemo_pivotrl.demo.expert_trajectories import make_expert_trajectories as make_world
    from nemo_pivotrl.pivotrl.extract import extract
    from nemo_pivotrl.pivotrl.loop import loop, read_history

    found: Result = {"rounds": {}}
    base = folder.parents[1] / "start/policy"
    for arm in arms:
        home = folder.parent / arm.replace(" ", "-")
        if arm != arms[0] and not home.exists():
            later = shutil.ignore_patterns("round-*", "final", "evaluation*", "loop.jsonl", "ledger.jsonl")
            part = home.with_suffix(".part")
            shutil.copytree(folder.parent / arms[0].replace(" ", "-"), part, ignore=later, dirs_exist_ok=True)
            os.replace(part, home)
        given = [f"seed={seed}", f"policy.model_name={base}", f"budget.rollouts={rollouts}", *ARMS[arm], *settings]
        own = recipe_of(home, *given)
        if not own.path("candidates.jsonl").exists():
            make_world(own)
            extract(own)
        loop(own)
        history = read_history(home)
        done = max(e["round"] for e in history if "round" in e and "step" in e)
        last = own.path("pivotrl" if done == 1 else f"round-{done:02d}/pivotrl") / "policy"
        if arm == arms[0]:
            found["base"] = scores(own, str(base))
        found[arm] = scores(own, str(last))
        found["rounds"][arm] = [e["text"] for e in history if e["event"] != "stopped"]
    return found


def tables(arms: Sequence[str], seeds: Sequence[int], made: Sequence[Result], rollouts: int) -> str:
    """Per seed and over all seeds, in per cent; and what the rounds did."""
    lines = [f"{rollouts} rollouts an arm; per cent"]
    first, labels = arms[0], ("base", *arms)
    for name, title in SETS.items():
        lines.append(f"{title:<16}" + "".join(f"{label:>18}" for label in labels))
        for seed, result in zip(seeds, made, strict=True):
            means = [100 * float(np.mean(list(result[label][name].values()))) for label in labels]
            lines.append(f"{f'  seed {seed}':<16}" + "".join(f"{mean:>18.1f}" for mean in means))
        for other in arms[1:]:
            apart = [np.array([r[first][name][i] - r[other][name][i] for i in sorted(r[first][name])]) for r in made]
            mean, low, high = (100 * value for value in interval(apart))
            ahead = f"ahead in {sum(d.mean() > 0 for d in apart)} of {len(apart)} seeds"
            lines.append(f"  {first} minus {other}: {mean:+.2f} [{low:+.2f}, {high:+.2f}], {ahead}")
    for seed, result in zip(seeds, made, strict=True):
        for arm in arms:
            lines.append(f"seed {seed}, {arm}:")
            lines += [f"  {text}" for text in result["rounds"][arm]]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
