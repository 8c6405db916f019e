"""The LLMdoctor paper's claims, small: on the embedded world of manners, with seeds and intervals, from one command.

    python benchmarks/llmdoctor_claims.py --processes 2      # resumes; writes benchmarks/results/llmdoctor_claims.md and plots

A seed is a world of its own: a patient, a doctor's start model of half its parameters, questions, the patient's answers ranked
by the oracle into pairs, token rewards. Every contestant reads the same pairs in the same batches for the same number of
steps with the same optimiser, and answers the same questions with the same random numbers. Learning rate and weight of each
are the best of one grid, by the mean worth of answers to validation questions of worlds that are not reported: 4 rates x 3
weights, and for doctors both ways of decoding (doctor / start model, and the doctor as it is); for DPO on the patient its beta
is the weight. Worth is the oracle's score, and -1 for what the world's grammar cannot make.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import llmdoctor_claims_arms as arms
import llmdoctor_claims_plan as plan
import llmdoctor_claims_tables as tables
from claims import ROOT, Job, Result, provenance, results
from llmdoctor_claims_arms import World

from nemo_pivotrl.core.artifacts import digest
from nemo_pivotrl.core.atomic import write_atomically


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="how many worlds are reported")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("runs/llmdoctor-claims"), help="worlds, models and results")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks/results", help="folder of the table and the plots"
    )
    parser.add_argument("--quick", action="store_true", help="everything at a size that shows nothing, in a minute")
    args = parser.parse_args()
    size, tuning = (plan.QUICK, plan.TUNING_SEEDS[:1]) if args.quick else (plan.FULL, plan.TUNING_SEEDS)
    seeds, begun = range(args.seeds), time.perf_counter()
    root = args.folder / digest([size.overrides], 8)
    worlds = {seed: World(str(root / f"world-{seed}"), seed, size.overrides) for seed in (*tuning, *seeds)}

    def made(jobs: Mapping[Any, Job]) -> dict[Any, Result]:
        found = results(list(jobs.values()), args.processes)
        return {key: found[one.folder] for key, one in jobs.items()}

    ground = made({s: plan.job(root, f"seed-{s}/world", arms.make_world, worlds[s]) for s in worlds})
    tuned = {
        (s, key): one for s in tuning for key, one in plan.tuning_jobs(root / f"seed-{s}", worlds[s], size).items()
    }
    found = made(tuned)
    table = plan.grid({s: {key: found[t, key] for t, key in found if t == s} for s in tuning})
    best = plan.chosen(table)
    first = {
        (s, name): one
        for s in seeds
        for name, one in plan.reported_jobs(root / f"seed-{s}", worlds[s], size, best).items()
    }
    first |= {
        (s, f"patient {h}"): plan.job(root, f"seed-{s}/patient-{h}", arms.make_patient, worlds[s], h)
        for s in seeds
        for h in size.patients
    }
    reported = made(first)
    later = {}
    for s in seeds:
        models = {name: str(one.folder / "model") for (t, name), one in first.items() if t == s}
        for name, one in plan.later_jobs(root / f"seed-{s}", worlds[s], size, best, models).items():
            later[s, name] = one
    last = made(later)
    report = tables.Report(list(seeds), ground, table, best, reported, last, list(size.patients))
    spent = sum(r["processor_seconds"] for r in (*ground.values(), *found.values(), *reported.values(), *last.values()))
    head = provenance([*seeds])
    head += f"\n- tuning seeds: {', '.join(map(str, tuning))}; {spent / 60:.0f} minutes of a processor for all jobs"
    args.out.mkdir(parents=True, exist_ok=True)
    text, plots = report.text()
    write_atomically(args.out / "llmdoctor_claims.md", f"{tables.TITLE}\n\n{head}\n\n{text}\n")
    for name, svg in plots.items():
        write_atomically(args.out / f"llmdoctor_{name}.svg", svg + "\n")
    print(f"{args.out / 'llmdoctor_claims.md'}: {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
