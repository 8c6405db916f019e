"""Profiling of a simulated million candidates: what curtailed sampling saves, and what the machinery itself costs.

    python benchmarks/profiling.py --savings           # rollouts saved, by population, mode and wave; no files
    python benchmarks/profiling.py --machinery         # candidates a second and peak memory of index, waves, journal, artefact

Everything but the model is real: the candidates file, its index, waves, seeds, curtailment, the map, its journal and the artefact.
The model's turns and their verdicts are replaced by a table of hit rates and a counter-based generator, so that a rollout is a
function of candidate and k as it is with a real sampler. Hit rates: 71 % of the candidates always fail or always succeed (the
paper's share for random turns), the others are Beta(0.8, 1.2). How the 71 % divide is not published as such; three divisions:
- `tau`: 39.2 % fail, 31.8 % succeed: of 96,968 public rows profiled by Qwen3-30B-A3B, 66,522 had a rate of at most 0.6 and 57.1 %
  of those were all zero.
- `even`: 35.5 % each.
- `swe`: 10 % fail, 61 % succeed, as a coarse verifier (the tool's name alone) would have it. An assumption of ours.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from nemo_pivotrl.algorithms.early_stopping import StoppingRule
from nemo_pivotrl.algorithms.selection import keep_pivot, statistics
from nemo_pivotrl.components.durable_map import Map
from nemo_pivotrl.components.rollout import sample_seeds
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.artifacts import Header, file_digest, json_bytes, write_artefact
from nemo_pivotrl.data.states import reference
from nemo_pivotrl.pivotrl.candidate_index import Index, index_candidates
from nemo_pivotrl.pivotrl.profile_items import Items
from nemo_pivotrl.pivotrl.profile_statistics import summarise
from nemo_pivotrl.pivotrl.profile_worker import Drawn, Wave

POPULATIONS = {"tau": (0.392, 0.318), "even": (0.355, 0.355), "swe": (0.10, 0.61)}
K, LAMBDA = 16, 0.6


def hit_rates(name: str, size: int, seed: int) -> np.ndarray:
    """Hit rates of a population [size]."""
    zeros, ones = POPULATIONS[name]
    rng = np.random.default_rng(seed)
    kind, rates = rng.random(size), rng.beta(0.8, 1.2, size)
    return np.where(kind < zeros, 0.0, np.where(kind < zeros + ones, 1.0, rates))


def savings(size: int, seed: int) -> None:
    """A table: share of K rollouts saved, and candidates selected otherwise than by all K."""
    print(f"{size:,} candidates, K = {K}, lambda {LAMBDA}, seed {seed}\n")
    print(
        f"| {'hit rates':<9} | {'mode':<28} | min_wave | saved % | all 0 | kept | too easy | all 1 | selected otherwise % |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    modes = [("exact", 0.0, (0.5, 0.5), wave) for wave in (1, 2, 4)]
    modes += [
        ("sequential 0.05, Beta(.5, .5)", 0.05, (0.5, 0.5), 2),
        ("sequential 0.05, Beta(.2, .3)", 0.05, (0.2, 0.3), 2),
    ]
    for name in POPULATIONS:
        outcomes = np.random.default_rng(seed + 1).random((size, K)) < hit_rates(name, size, seed)[:, None]
        whole = outcomes.sum(1)
        kept = np.array([keep_pivot(statistics([1.0] * k + [0.0] * (K - k)), "adv", LAMBDA) for k in range(K + 1)])[
            whole
        ]
        classes = {
            "all 0": whole == 0,
            "kept": kept,
            "too easy": ~kept & (whole > 0) & (whole < K),
            "all 1": whole == K,
        }
        for mode, error, prior, wave in modes:
            drawn, chosen = simulate(StoppingRule(K, "adv", LAMBDA, LAMBDA, False, error, prior, wave), outcomes)
            by_class = " | ".join(f"{100 * (1 - drawn[of].mean() / K):.1f}" for of in classes.values())
            wrong = f"{100 * (chosen != kept).mean():.3f}"
            print(f"| {name:<9} | {mode:<28} | {wave} | {100 * (1 - drawn.mean() / K):.1f} | {by_class} | {wrong} |")
            assert error or (chosen == kept).all(), "exact curtailment selects what all K rollouts select"
        best = np.where(whole == 0, K, np.where(kept, 0, 0))
        most = K - int(LAMBDA * K) - 1  # failures after which a success settles it; 10 successes settle the other side
        least = np.where(whole == 0, K, np.where(kept, most + 1 + best, int(LAMBDA * K) + 1))
        print(f"| {name:<9} | {'no exact rule saves more than':<28} | | {100 * (1 - least.mean() / K):.1f} | | | | | |")


def simulate(plan: StoppingRule, outcomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rollouts drawn, selected) of every candidate, all of them wave by wave together."""
    size = len(outcomes)
    totals = np.concatenate([np.zeros((size, 1), int), outcomes.cumsum(1)], 1)
    asks = np.zeros((K + 1, K + 1), int)
    keeps = np.zeros((K + 1, K + 1), bool)
    for s in range(K + 1):
        for f in range(K + 1 - s):
            asks[s, f] = plan.ask([1.0] * s + [0.0] * f)
            keeps[s, f] = s + f > 0 and keep_pivot(statistics([1.0] * s + [0.0] * f), "adv", LAMBDA)
    drawn = np.zeros(size, int)
    while True:
        hits = totals[np.arange(size), drawn]
        more = asks[hits, drawn - hits]
        if not more.any():
            return drawn, keeps[hits, drawn - hits]
        drawn += more


# ---- the machinery ----


def write_candidates(path: Path, size: int, turns: int = 8) -> None:
    """Rows as `extract` writes them; the machinery reads no state, so that all point into one trajectory."""
    stored = path.with_name("trajectories.jsonl")
    row = {"trajectory_id": "t", "messages": [{"role": "user", "content": "x"}] * turns, "tools": [], "fields": {}}
    write_artefact(stored, Header("trajectories", "simulated"), [row])
    rows = (
        {
            "candidate_id": f"c{n:09d}",
            "trajectory_id": f"t{n // turns}",
            "task_id": f"k{n // turns}",
            "split": "train",
            "trajectory": 0,
            "turn": n % turns,
            "depth": n % turns,
            "calls": [],
            "num_unique_actions": 1,
        }
        for n in range(size)
    )
    write_artefact(path, Header("candidates", "simulated", extra=reference(stored, path)), rows)


class Simulated:
    """Draws and judges waves by hit rate: the k-th uniform of a candidate's seed against its rate."""

    def __init__(self, rates: np.ndarray, count_json: bool = True):
        self.rates, self.count_json, self.seconds = rates, count_json, 0.0

    def __call__(self, wave: Wave) -> Drawn:
        """As `ProfileWorker`. The making of the rows is the model's part, and is not counted; their JSON is if `count_json`."""
        rollouts = []
        for asked in wave:
            seeds = sample_seeds(("profile", 0, asked.candidate_id), asked.ks)
            bound, start = self.rates[int(asked.candidate_id[1:])] * 2.0**64, time.thread_time()
            rows = [simulated_row(seed, seed < bound) for seed in seeds]
            made = time.thread_time()
            rollouts += [(asked.place, k, json_bytes(row), row) for k, row in zip(asked.ks, rows, strict=True)]
            self.seconds += (made if self.count_json else time.thread_time()) - start
        return Drawn([(asked.place, 200, None, "") for asked in wave], rollouts)


def simulated_row(seed: int, hit: bool) -> dict[str, Any]:
    """A judged rollout as a profile keeps it."""
    return {
        "text": f"turn {seed}",
        "tokens": 40,
        "log_prob": -31.5,
        "finish_reason": "stop",
        "reward": 1.0 if hit else 0.0,
        "category": "EXPECTED" if hit else "UNEXPECTED",
        "action": {"type": "message", "content": f"turn {seed}"},
    }


def in_memory(recipe: Recipe, index: Index, plan: StoppingRule, rates: np.ndarray) -> float:
    """Processor seconds of reading, waves, seeds and curtailment alone: rollouts come as JSON, and nothing is stored."""
    simulated, items = Simulated(rates, count_json=False), Items(recipe, index, plan, together=True)
    start = time.process_time()
    for _, opens in items.of_chunks(range(index.chunks)):
        group = opens()
        while wave := group.ask():
            group.take(simulated(wave))
    return time.process_time() - start - simulated.seconds


def machinery(size: int, name: str, folder: Path) -> None:
    """Time each part, in processor time of this one process, so that what else the machine does counts little, and print it."""
    from nemo_pivotrl.config.load import load_recipe

    recipe = load_recipe(
        "recipes/pivotrl/tiny.yaml", [f"run_dir={folder}", "profile.num_generations=16", "select.lambda_diff=0.6"]
    )
    source, rates = folder / "candidates.jsonl", hit_rates(name, size, 0)
    write_candidates(source, size)
    times = {}
    start = time.process_time()
    index = index_candidates(source, 0, 0, recipe.profile.candidates_per_chunk)
    times["index"] = time.process_time() - start
    plan = StoppingRule(K, "adv", LAMBDA, LAMBDA, min_wave=2)
    times["waves, seeds and curtailment, nothing stored"] = in_memory(recipe, index, plan, rates)
    simulated, items, target = Simulated(rates), Items(recipe, index, plan, True), folder / "profiles.jsonl"
    start = time.process_time()
    Map(
        recipe,
        "profile",
        target,
        Header("profiles", "simulated"),
        lambda: items.of_chunks(range(index.chunks)),
        lambda: simulated,
        size,
        "cand",
        items.tally,
    ).run()
    times["waves, seeds, curtailment, JSON, journal, artefact"] = time.process_time() - start - simulated.seconds
    start = time.process_time()
    summary = summarise(target, plan)
    times["statistics"] = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\n{size:,} candidates ({name}), {summary['rollouts']:,} rollouts, {summary['saved_share']:.1%} saved")
    print(f"file {target.stat().st_size / 2**20:,.0f} MiB, digest {file_digest(target)}; peak memory {peak:,.0f} MiB\n")
    print("| part | CPU seconds | candidates/s | rollouts/s |")
    print("|---|---|---|---|")
    for part, seconds in times.items():
        print(f"| {part} | {seconds:.1f} | {size / seconds:,.0f} | {summary['rollouts'] / seconds:,.0f} |")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--savings", action="store_true")
    parser.add_argument("--machinery", action="store_true")
    parser.add_argument("--size", type=int, default=1_000_000)
    parser.add_argument("--hit-rates", choices=POPULATIONS, default="tau")
    options = parser.parse_args()
    if options.savings or not options.machinery:
        savings(options.size, 0)
    if options.machinery:
        with tempfile.TemporaryDirectory() as folder:
            machinery(options.size, options.hit_rates, Path(folder))
    print(f"\nPython {sys.version.split()[0]}, {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
