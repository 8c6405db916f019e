"""A patient's own answers become preference files that every reader of the format understands."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.recipes import ROOT

from nemo_pivotrl.config import Preferences, Rank
from nemo_pivotrl.config.load import load_recipe
from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.data.preferences import read_preferences
from nemo_pivotrl.llmdoctor.rank import rank, ranked

ASKED = {"a": [{"role": "user", "content": "how is the tea"}]}


def answers(*texts: str) -> list[dict[str, Any]]:
    return [{"id": "a", "sample": k, "text": text, "finish_reason": "stop"} for k, text in enumerate(texts)]


def test_best_and_worst_of_each_lot_make_a_pair_and_the_rest_is_counted() -> None:
    rows = answers("b", "a", "c", "d", "b", "a", "e", "f", "g")
    rows[2]["finish_reason"] = "length"
    scores = [0.5, 0.1, 9.0, 0.3, 0.5, 0.1, 0.2, 0.2, 0.9]
    records, left_out = ranked(rows, scores, ASKED, Rank(answers_per_pair=2))
    #       lots: (b, a) a pair; (d, b) a pair; (a, e) a pair; (f, g) a pair; c was cut off
    assert [(r["chosen"][0]["content"], r["rejected"][0]["content"]) for r in records] == [
        ("b", "a"),
        ("b", "d"),
        ("e", "a"),
        ("g", "f"),
    ]
    assert (
        records[0]["score_chosen"] == 0.5 and records[0]["score_rejected"] == 0.1 and records[0]["prompt"] == ASKED["a"]
    )
    assert left_out == Counter(unfinished=1)


def test_ties_small_gaps_and_repeats_prefer_nothing() -> None:
    rows = answers("x", "y", "b", "a", "b", "a", "p", "q")
    scores = [1.0, 1.0, 0.5, 0.1, 0.5, 0.1, 0.30, 0.35]
    records, left_out = ranked(rows, scores, ASKED, Rank(answers_per_pair=2, min_gap=0.1))
    assert len(records) == 1 and left_out == Counter(ties=2, repeats=1)


def test_a_ranked_file_reads_as_trl_preferences(tmp_path: Path) -> None:
    records, _ = ranked(answers("good", "bad"), [1.0, -1.0], ASKED, Rank(answers_per_pair=2))
    path = tmp_path / "wit.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    found = read_preferences(Preferences(objectives={"wit": (str(path),)})).preferences
    assert [(p.objective, p.chosen, p.rejected, list(p.prompt)) for p in found] == [("wit", "good", "bad", ASKED["a"])]


def test_what_cannot_be_ranked_is_named_before_anything_is_asked(tmp_path: Path) -> None:
    tiny = str(ROOT / "recipes/llmdoctor/tiny.yaml")
    with pytest.raises(InputError) as caught:
        rank(load_recipe(tiny, ["rank.objectives=[wit]", 'rank.prompts=""', "rank.answers_per_prompt=2"]))
    assert [p.field for p in caught.value.problems] == [
        "rank.objectives",
        "rank.prompts",
        "rank.answers_per_prompt",
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text('"a text"\n{"id": "x", "messages": [{"role": "user", "content": "q"}]}\n' * 2)
    with pytest.raises(InputError) as caught:
        rank(load_recipe(tiny, [f"rank.prompts={path}", f"run_dir={tmp_path}"]))
    assert [(p.line, p.field) for p in caught.value.problems] == [(1, "prompt"), (3, "prompt"), (2, "id"), (4, "id")]
