"""`functional` on labelled pairs: what does the same and what does not, chosen to break rules, so no natural rates.

`equivalence_pairs.jsonl` holds a pair a line in the form that `nemo-pivotrl verify` reads, with `domain`, `same` (the
tool would do the same) and `note`. A pair whose note begins with `beyond the rules` does the same for a reason that no rule
knows.
"""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from nemo_pivotrl import config
from nemo_pivotrl.core.types import Action, Case
from nemo_pivotrl.verifiers.loading import load_verifier
from nemo_pivotrl.verifiers.rows import case_of, sampled_action

DATA = Path(__file__).parent / "equivalence_pairs.jsonl"
PAIRS = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
VERIFIER = load_verifier(config.Verifier(name="functional"))
BEYOND = "beyond the rules"


def sides(row: dict[str, Any]) -> tuple[Case, Action]:
    return case_of(row), sampled_action(row)


def reward(case: Case, expected: Action, actual: Action) -> float:
    return VERIFIER.verify(Case(expected, case.tools, fields=case.fields), actual).reward


def test_the_pairs_are_many_of_every_kind_and_none_stands_there_twice() -> None:
    keys = Counter((r["expected"]["name"], r["expected"]["arguments"], r["actual"]["arguments"]) for r in PAIRS)
    assert len(PAIRS) >= 1100 and max(keys.values()) == 1
    counts = Counter((r["domain"], r["same"]) for r in PAIRS)
    assert min(counts[domain, False] for domain in ("shell", "json", "sql", "search", "edit")) >= 30


@pytest.mark.parametrize("row", PAIRS, ids=lambda r: f"{r['domain']} {r['same']} {r['note']}"[:40])
def test_a_pair_gets_its_label_both_ways(row: dict[str, Any]) -> None:
    case, actual = sides(row)
    expected = row["same"] and not row["note"].startswith(BEYOND)
    assert reward(case, case.expected, actual) == reward(case, actual, case.expected) == float(expected)


def test_being_the_same_is_reflexive_symmetric_and_transitive() -> None:
    """Over triples of the pairs' calls; `benchmarks/equivalence.py` tries more, and calls made from parts of others."""
    draw = random.Random(0)
    pools: dict[str, list[tuple[Case, Action]]] = defaultdict(list)
    for row in PAIRS:
        case, actual = sides(row)
        pools[row["expected"]["name"]] += [(case, case.expected), (case, actual)]
    seen: dict[tuple[str, int, int], bool] = {}

    def same(tool: str, i: int, j: int) -> bool:
        if (tool, i, j) not in seen:
            pool = pools[tool]
            seen[tool, i, j] = reward(pool[i][0], pool[i][1], pool[j][1]) == 1.0
        return seen[tool, i, j]

    tools = [tool for tool, pool in pools.items() if len(pool) > 2]
    related = Counter()
    for number in range(8_000):
        tool = tools[number % len(tools)]
        # neighbours are the sides of one pair, which is where relations are
        a, b, c = ((draw.randrange(len(pools[tool])) // 2 * 2 + draw.randrange(2)) for _ in range(3))
        if number % 3 == 0:
            b = a ^ 1 if (a ^ 1) < len(pools[tool]) else a
        assert same(tool, a, a)
        if pools[tool][a][0].tools == pools[tool][b][0].tools == pools[tool][c][0].tools:
            assert same(tool, a, b) == same(tool, b, a)
            if same(tool, a, b):
                assert same(tool, b, c) == same(tool, a, c)
                related[tool] += 1
    assert related.total() > 500
