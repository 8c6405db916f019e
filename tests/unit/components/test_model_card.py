"""The card says where a model comes from and what was measured, names no folder of this machine, and may be edited."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_pivotrl.components.conclusions import Check
from nemo_pivotrl.components.model_card import write_card
from nemo_pivotrl.config import Policy, Recipe


@pytest.mark.parametrize(
    ("start", "named", "front"),
    [
        ("/secret/place/my-model", "`my-model`", ""),
        ("/cache/models--maker--model/snapshots/abc", "`maker/model`", "base_model: maker/model\n"),
    ],
)
def test_a_card(tmp_path: Path, start: str, named: str, front: str) -> None:
    policy = tmp_path / "run" / "pivotrl" / "policy"
    policy.mkdir(parents=True)
    rows = [{"step": 0, "val/accuracy": 0.25}, {"step": 1, "reward": 0.5}, {"step": 1, "val/accuracy": 0.75}]
    (policy.parent / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Recipe(run_dir=str(tmp_path / "run"), policy=Policy(model_name=start))
    checks = [Check("truncated samples", "50 %", False, "raise max_new_tokens"), Check("fine", "0", True)]
    write_card(policy, recipe, "policy", ["12 pivots"], {"val/accuracy": "held-out accuracy", "no": "none"}, checks)
    card = (policy / "README.md").read_text()
    assert card.startswith(f"---\n{front}library_name: transformers\n")
    assert f"Trained from {named} by PivotRL" in card and "- 12 pivots" in card
    assert "| held-out accuracy | 0.25 | 0.75 |" in card and "| none" not in card
    assert "- truncated samples: 50 %. raise max_new_tokens." in card and "fine" not in card
    assert "/secret" not in card and str(tmp_path) not in card
    (policy / "README.md").write_text("mine")
    write_card(policy, recipe, "policy", [], {}, [])
    assert (policy / "README.md").read_text() == "mine"
