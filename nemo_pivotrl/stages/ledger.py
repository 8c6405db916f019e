"""What every stage cost: one line a stage in `ledger.jsonl`. Times live here and nowhere else, so that artefacts of a
resumed run equal those of an undisturbed one."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def spend(run_dir: Path, stage: str) -> Iterator[dict[str, Any]]:
    """Time the block and append a ledger line; the block may add tokens and counts to the dict it is given."""
    entry: dict[str, Any] = {}
    start = time.perf_counter()
    try:
        yield entry
    finally:
        run_dir.mkdir(parents=True, exist_ok=True)
        line = {"stage": stage, "seconds": round(time.perf_counter() - start, 2), **entry}
        with (run_dir / "ledger.jsonl").open("a", encoding="utf-8") as handle:
            handle.write("\n" + json.dumps(line) + "\n")  # a line torn by a kill ends before this one begins


def read_ledger(run_dir: Path) -> list[dict[str, Any]]:
    """All whole lines, oldest first; empty where nothing ran."""
    path = run_dir / "ledger.jsonl"
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(ValueError):
            found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict)]
