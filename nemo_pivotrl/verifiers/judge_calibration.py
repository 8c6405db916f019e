"""How far a judge can be trusted: its agreement with labelled pairs."""

from __future__ import annotations

import json
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_pivotrl.core.artifacts import canonical_json
from nemo_pivotrl.core.errors import InputError, Problem, short
from nemo_pivotrl.core.types import Action, Case
from nemo_pivotrl.verifiers.base import Judging, VerifierFault
from nemo_pivotrl.verifiers.judge_prompt import RUBRICS

CALIBRATION = Path(__file__).with_name("judge_calibration.jsonl")


@dataclass(frozen=True)
class Calibration:
    """How a judge does on pairs whose verdict is known."""

    n: int
    """Pairs that it answered."""
    agreement: float
    """Share of these where it says what the label says; 0 where it answered none."""
    low: float
    high: float
    """Wilson 95 % interval of the agreement."""
    false_accepts: int
    false_rejects: int
    faults: int
    """Pairs without an answer."""
    by_kind: dict[str, dict[str, int]]
    """For every kind: n, agreed, false_accepts, false_rejects, faults."""
    disagreements: tuple[int, ...]
    """Lines of the set where the judge and the label differ."""


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % score interval of a share; (0, 1) where nothing was counted."""
    if not n:
        return 0.0, 1.0
    z2, share = 1.959963984540054**2, successes / n
    centre, width = share + z2 / (2 * n), math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n)))
    return max(0.0, (centre - width) / (1 + z2 / n)), min(1.0, (centre + width) / (1 + z2 / n))


def calibrate(judge: Judging, path: str | Path = "") -> Calibration:
    """Ask the judge about labelled pairs: JSONL with kind, context, expected, actual and equivalent.

    `path` empty: the set that comes with the package. Raises InputError for a set that cannot be read.
    """
    pairs = _read_pairs(Path(path) if path else CALIBRATION)

    def outcome(pair: dict[str, Any]) -> str:
        state = ({"role": "user", "content": pair["context"]},) if pair["context"] else ()
        case = Case(Action("message", pair["expected"]), messages=state)
        try:
            said = judge.equivalent(pair["kind"], case, pair["expected"], pair["actual"]).same
        except VerifierFault:
            return "faults"
        return "agreed" if said == pair["equivalent"] else "false_accepts" if said else "false_rejects"

    with ThreadPoolExecutor(max(1, min(judge.concurrency, len(pairs)))) as pool:
        outcomes = list(pool.map(outcome, pairs.values()))
    kinds = {kind: Counter[str]() for kind in sorted({pair["kind"] for pair in pairs.values()})}
    for pair, found in zip(pairs.values(), outcomes, strict=True):
        kinds[pair["kind"]][found] += 1
    total = Counter(outcomes)
    n, columns = len(pairs) - total["faults"], ("agreed", "false_accepts", "false_rejects", "faults")
    return Calibration(
        n,
        total["agreed"] / n if n else 0.0,
        *wilson(total["agreed"], n),
        total["false_accepts"],
        total["false_rejects"],
        total["faults"],
        {k: {"n": c.total() - c["faults"], **{name: c[name] for name in columns}} for k, c in kinds.items()},
        tuple(line for line, found in zip(pairs, outcomes, strict=True) if found.startswith("false")),
    )


def _read_pairs(path: Path) -> dict[int, dict[str, Any]]:
    """Pairs by line number."""
    pairs, problems = {}, []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        found = short(error.strerror or str(error))
        remedy = "give a JSONL file of labelled pairs in verifier.judge.calibration"
        raise InputError(Problem(str(path), None, "file", found, remedy)) from None
    for number, line in enumerate(lines, start=1):
        try:
            pair = json.loads(line)
            if not isinstance(pair, dict):
                raise ValueError
        except (ValueError, RecursionError):
            found = short(line.decode("utf-8", "replace"))
            problems.append(Problem(str(path), number, "line", found, "write one JSON object a line"))
            continue
        pairs[number] = pair
        for name, needed in (("context", str), ("expected", str), ("actual", str), ("equivalent", bool)):
            if not isinstance(pair.get(name), needed):
                remedy = "true or false" if needed is bool else "give a text"
                problems.append(Problem(str(path), number, name, short(canonical_json(pair.get(name))), remedy))
        if pair.get("kind") not in tuple(RUBRICS):
            remedy = f"use one of {', '.join(RUBRICS)}"
            problems.append(Problem(str(path), number, "kind", short(canonical_json(pair.get("kind"))), remedy))
    if not pairs and not problems:
        problems.append(Problem(str(path), None, "file", "no pairs", "write one labelled pair a line"))
    if problems:
        raise InputError(problems)
    return pairs
