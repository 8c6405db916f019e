"""What every stage cost, in `ledger.jsonl`. Times live here and nowhere else, so that artefacts of a resumed run equal those
of an undisturbed one.

A running stage writes its line again and again, each with all that it spent so far, so that a killed process has left its
costs, too: all but the last second, or the last tenth of a longer run. The last line of an `id` is the one that counts.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

from nemo_pivotrl.algorithms import round_rules as rounds
from nemo_pivotrl.backends.base import Sampler
from nemo_pivotrl.config import Generation
from nemo_pivotrl.core.atomic import append_line, open_input
from nemo_pivotrl.core.types import FailedSample, Sample

Entry = dict[str, Any]
COUNTS = (*rounds.COSTS, "tokens_trained")
READ = ("tokens_read", "tokens_prompt", "tokens_scored")
"""What stages call the tokens that they read."""


@contextmanager
def spend(run_dir: Path, stage: str) -> Iterator[Entry]:
    """Time the block for the ledger; the block may add tokens and counts to the dict it is given, at any time."""
    run_dir.mkdir(parents=True, exist_ok=True)
    entry: Entry = {}
    start, name, done = time.perf_counter(), f"{time.time_ns():x}-{os.getpid()}", threading.Event()

    def note() -> None:
        line = {"stage": stage, "seconds": round(time.perf_counter() - start, 2), **dict(entry), "id": name}
        append_line(run_dir / "ledger.jsonl", json.dumps(line).encode() + b"\n")

    def keep_noting() -> None:
        while not done.wait(max(1.0, min(60.0, (time.perf_counter() - start) / 10))):
            with suppress(OSError):  # the stage itself will meet the full disk
                note()

    noting = threading.Thread(target=keep_noting, name="ledger", daemon=True)
    noting.start()
    try:
        yield entry
    finally:
        done.set()
        noting.join()
        note()


@dataclass(slots=True)
class CountingSampler:
    """A sampler that counts rollouts and tokens, in itself and in a ledger entry."""

    sampler: Sampler
    entry: Entry = field(default_factory=dict)
    spent: rounds.Spent = field(default_factory=rounds.Spent)

    def infer(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        stop_ids: frozenset[int],
        generation: Generation,
    ) -> list[list[Sample | FailedSample]]:
        """See `backends.base.Sampler`."""
        groups = self.sampler.infer(prompts, seeds, stop_ids, generation)
        generated = sum(len(s.token_ids) for group in groups for s in group if isinstance(s, Sample))
        now = rounds.Spent(sum(map(len, seeds)), generated, sum(map(len, prompts)))
        self.spent += now
        for key, value in zip(rounds.COSTS, astuple(now), strict=True):
            self.entry[key] = self.entry.get(key, 0) + value
        return groups

    def costs(self) -> dict[str, float]:
        """The counts under their names in the metrics."""
        return dict(zip(rounds.COSTS, map(float, astuple(self.spent)), strict=True))


def read_ledger(run_dir: Path) -> list[Entry]:
    """What each process spent on each stage, oldest first; empty where nothing ran. Torn lines are left out."""
    path = run_dir / "ledger.jsonl"
    found: dict[str, Entry] = {}
    if not path.exists():
        return []
    with open_input(path) as handle:
        lines = handle.read().splitlines()
    for number, line in enumerate(lines):
        with suppress(ValueError, RecursionError):
            entry = json.loads(line)
            if isinstance(entry, dict):
                found[entry.pop("id", str(number))] = entry
    return list(found.values())


def read_ledgers(run_dir: Path) -> list[Entry]:
    """The ledgers of a run and of its later rounds, whose stages are named after them."""
    lines = read_ledger(run_dir)
    for folder in sorted(run_dir.glob("round-*")):
        lines += [{**line, "stage": f"{folder.name} {line['stage']}"} for line in read_ledger(folder)]
    return lines


def by_stage(lines: Sequence[Entry]) -> list[Entry]:
    """One entry a stage: its processes, seconds and counts added up, those of killed processes included."""
    found: dict[str, Entry] = {}
    for line in lines:
        entry = found.setdefault(line["stage"], {"stage": line["stage"], "processes": 0, "seconds": 0.0})
        entry["processes"] += 1
        read = next((line[key] for key in READ if key in line), 0)
        for key, value in ({"tokens_read": read} | line).items():
            if isinstance(value, (int, float)):
                entry[key] = round(entry.get(key, 0) + value, 2)
    return list(found.values())


def totals(lines: Sequence[Entry], gpus: int, pivots: int = 0, points: float = 0.0) -> dict[str, Any]:
    """All stages together, and for each accepted pivot and each point of held-out accuracy (`pivots`, `points`; 0: not known).

    `per_pivot` has the cost of profiling, `per_point` that of profiling and training.
    """
    entries = by_stage(lines)

    def sums(chosen: Sequence[Entry], share: float) -> dict[str, float]:
        found = {key: sum(e.get(key, 0) for e in chosen) / share for key in ("seconds", *COUNTS)}
        return {key: round(value, 2) for key, value in found.items()}

    profiling = [e for e in entries if e["stage"].split()[-1] == "profile"]
    training = [e for e in entries if "train" in e["stage"].split()]
    whole: dict[str, Any] = sums(entries, 1.0)
    whole["gpu_hours"] = round(whole["seconds"] * gpus / 3600, 4)
    if pivots and profiling:
        whole["per_pivot"] = sums(profiling, pivots)
    if points > 0 and training:
        whole["per_point"] = sums([*profiling, *training], points)
    return whole


def table(lines: Sequence[Entry], gpus: int, pivots: int = 0, points: float = 0.0) -> str:
    """The costs as text."""
    heads = ("seconds", "GPU-hours", "rollouts", "generated", "read", "trained")
    rows = [f"{'stage':<28}" + "".join(f"{head:>12}" for head in heads)]

    def row(name: str, entry: Entry) -> str:
        cells = [f"{entry['seconds']:.1f}", f"{entry['seconds'] * gpus / 3600:.4f}"]
        return f"{name:<28}" + "".join(f"{c:>12}" for c in [*cells, *(f"{entry.get(k) or 0:.10g}" for k in COUNTS)])

    rows += [row(entry["stage"], entry) for entry in by_stage(lines)]
    found = totals(lines, gpus, pivots, points)
    rows.append(row("all", found))
    for key, text in (("per_pivot", "profiling, a pivot"), ("per_point", "rounds, a point gained")):
        if key in found:
            rows.append(row(text, found[key]))
    return "\n".join(
        [*rows, "seconds and counts include what killed processes spent; tokens generated, read as prompts, trained"]
    )
