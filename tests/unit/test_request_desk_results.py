"""The request desk's page: rates by validation, paired changes, and what an arm that was not run leaves out."""

from __future__ import annotations

import sys
from argparse import Namespace
from typing import Any

import pytest
from support.recipes import ROOT


@pytest.fixture(scope="module")
def desk() -> Any:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import request_desk
    finally:
        sys.path.pop(0)
    return request_desk


def items(value: float, other: float) -> dict[str, dict[str, float]]:
    """Scores of two items a set; the second of each has `other`."""
    sets = ("whole tasks", "seen families", "other families", "held-out turns", "out of domain")
    return {name: {"one": value, "two": other} for name in sets}


def made() -> dict[str, Any]:
    base = {"items": items(0.0, 0.5), "candidates": 7, "constant": 0.6, "always": 0.5}
    return {
        "seed-1/data": base,
        "seed-1/sft-0.001": {"items": items(0.0, 0.0), "curve": [[0, 0.1], [5, 0.2]]},
        "seed-1/mixed-0.003": {"items": items(1.0, 0.5), "curve": [[0, 0.1]]},
        "seed-9/sft-0.001": {"curve": [[0, 0.1], [5, 0.3], [9, 0.2]]},
        "seed-9/sft-0.003": {"curve": [[0, 0.1]]},
        "seed-9/mixed-0.001": {"curve": [[0, 0.1]]},
        "seed-9/mixed-0.003": {"curve": [[0, 0.1], [5, 0.4]]},
    }


def test_rows_have_the_change_from_base_and_between_arms(desk: Any) -> None:
    rates = {"sft": 0.001, "mixed": 0.003}
    rows = desk.table(made(), rates, [1])
    assert rows[2].startswith("| base | | 25.0 | 25.0 ") and len(rows) == 5
    assert rows[3].startswith("| SFT | 0.001 | 0.0 (-25.0 [-50.0, +0.0])")
    assert rows[4].startswith("| PivotRL, `mixed` | 0.003 | 75.0 (+50.0 [+0.0, +100.0])")
    (difference,) = desk.against(made(), rates, [1])[2:]
    assert difference.startswith("| `mixed` minus `sft` | +75.0 [+50.0, +100.0]")


def test_the_page_names_each_rate_by_the_best_checkpoint_of_the_tuning_seeds(desk: Any) -> None:
    options = Namespace(seeds=[1], tuning_seeds=[9], grid=[0.001, 0.003])
    page = desk.document(made(), options, {"sft": 0.001, "mixed": 0.003})
    assert "| SFT | 30.0 | 10.0 |" in page and "| PivotRL, `mixed` | 10.0 | 40.0 |" in page
    assert "7 train candidates a seed. By seed 60 % of the groups" in page
