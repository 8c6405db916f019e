"""Does re-profiling pay? One profile against rounds of them, at the same number of rollouts, on the embedded world.

    python benchmarks/closed_loop.py --processes 2

World, start policy and settings are those of `pivotrl_claims.py`. Both arms of a seed have the same trajectories and the same first
profile, of all candidates, and end at the step that reaches `--rollouts`: profiling, training and validation together. Each
arm's last policy counts, not its best, on held-out turns, whole tasks and puzzles that neither has trained on. Intervals are
bootstraps of the paired difference, over seeds and over items within a seed. What was interrupted resumes, and what is done
is in FOLDER/seed-N.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from claims import Job, Result, interval, provenance, results
from pivotrl_claims import SETS, recipe_of, scores, start

from nemo_pivotrl.records import write_atomically

SETTINGS = """
world.test_tasks=300 extract.validation_share=0.1
profile.curtail=exact profile.min_wave=4 profile.candidates_per_chunk=512
policy.optimizer.lr=3e-4
grpo.max_num_steps=100000 grpo.val_period=10 grpo.val_candidates=80 grpo.val_generations=2
checkpointing.save_period=20
loop.std_window=5 loop.gain_window=100 loop.patience=100
""".split()
"""Beyond those of `pivotrl_claims.py`. A round ends when the reward's std in a group is a third of its first window's (the
default)."""
ARMS = {"loop": "loop.max_rounds=100", "one-shot": "loop.max_rounds=1"}
"""`one-shot` goes on with the first round of `loop`, which both have in common."""


def main() -> None:
    """Run what is missing, then print the tables and write them to `--output`."""
    options = arguments()
    home, settings = Path(options.folder).resolve(), tuple(options.set)
    results([Job(home / "start", start, (settings,))], 1)
    jobs = [Job(home / f"seed-{seed}/runs", both, (seed, options.rollouts, settings)) for seed in options.seeds]
    made = results(jobs, options.processes)
    text = tables(options.seeds, [made[job.folder] for job in jobs], options.rollouts)
    text = f"{provenance(options.seeds)}\n\n{text}"
    print(text)
    if options.output:
        write_atomically(Path(options.output), text + "\n")


def arguments() -> argparse.Namespace:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    made.add_argument("--rollouts", type=int, default=30000, help="of each arm")
    made.add_argument("--folder", default="runs/closed_loop")
    made.add_argument("--processes", type=int, default=2, help="seeds at a time")
    made.add_argument("--output", default="benchmarks/results/closed_loop.txt", help="file for the tables; empty: none")
    made.add_argument("--set", nargs="*", default=[], metavar="key=value", help="settings of both arms")
    return made.parse_args()


def both(folder: Path, seed: int, rollouts: int, settings: Sequence[str]) -> Result:
    """Run both arms from the start policy, and score them and it: arm -> scores, and what its rounds said."""
    from nemo_pivotrl.stages.extract import extract
    from nemo_pivotrl.stages.loop import loop, read_history
    from nemo_pivotrl.stages.quickstart import make_world

    found: Result = {"rounds": {}}
    for arm, rounds in ARMS.items():
        home = folder.parent / arm
        if arm == "one-shot" and not home.exists():
            later = shutil.ignore_patterns("round-*", "final", "evaluation*", "loop.jsonl", "ledger.jsonl")
            part = home.with_name("one-shot.part")
            shutil.copytree(folder.parent / "loop", part, ignore=later, dirs_exist_ok=True)
            os.replace(part, home)
        own = recipe_of(home, seed, *SETTINGS, f"budget.rollouts={rollouts}", rounds, *settings)
        if not own.path("candidates.jsonl").exists():
            make_world(own)
            extract(own)
        loop(own)
        history = read_history(home)
        done = max(e["round"] for e in history if "round" in e and "step" in e)
        last = own.path("pivotrl" if done == 1 else f"round-{done:02d}/pivotrl") / "policy"
        if not found.get("base"):
            found["base"] = scores(own, own.policy.model_name)
        found[arm] = scores(own, str(last))
        found["rounds"][arm] = [e["text"] for e in history if e["event"] != "stopped"]
    return found


def tables(seeds: Sequence[int], made: Sequence[Result], rollouts: int) -> str:
    """Per seed and over all seeds, in per cent; and what the rounds did."""
    lines = [f"{rollouts} rollouts an arm; per cent"]
    for name, title in SETS.items():
        labels = ("base", *ARMS)
        lines.append(f"{title:<16}" + "".join(f"{label:>12}" for label in labels))
        for seed, result in zip(seeds, made, strict=True):
            means = [100 * float(np.mean(list(result[label][name].values()))) for label in labels]
            lines.append(f"{f'  seed {seed}':<16}" + "".join(f"{mean:>12.1f}" for mean in means))
        apart = [
            np.array([r["loop"][name][item] - r["one-shot"][name][item] for item in sorted(r["loop"][name])])
            for r in made
        ]
        mean, low, high = (100 * value for value in interval(apart))
        ahead = f"ahead in {sum(d.mean() > 0 for d in apart)} of {len(apart)} seeds"
        lines.append(f"  loop minus one-shot: {mean:+.2f} [{low:+.2f}, {high:+.2f}], {ahead}")
    for seed, result in zip(seeds, made, strict=True):
        for arm in ARMS:
            lines.append(f"seed {seed}, {arm}:")
            lines += [f"  {text}" for text in result["rounds"][arm]]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
