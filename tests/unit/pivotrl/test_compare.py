"""compare: two profiles of the same candidates, against numbers worked out by hand."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.pointers import profile_row

from nemo_pivotrl import cli
from nemo_pivotrl.algorithms.early_stopping import StoppingRule
from nemo_pivotrl.algorithms.early_stopping_estimates import unbiased_rate
from nemo_pivotrl.core.artifacts import ArtefactWriter, Header
from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.core.types import Action, Candidate, Profile, ToolCall
from nemo_pivotrl.pivotrl.compare import compare, significant_to
from nemo_pivotrl.pivotrl.compare_text import as_text

FOUR = StoppingRule(4, curtailed=False)
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 64}


def outcomes(successes: int, count: int) -> list[float]:
    return [1.0] * successes + [0.0] * (count - successes)


def row(name: str, rewards: Sequence[float] | None, **more: Any) -> dict[str, Any]:
    """A profile's row; `rewards` None: it failed."""
    expected = Action("calls", calls=(ToolCall(more.pop("tool", "f"), "{}"),))
    split, depth = more.pop("split", "train"), more.pop("depth", 0)
    candidate = Candidate(name, "tr-" + name, more.pop("task", "t"), split, 1, depth, (), (), expected)
    samples = tuple({"reward": r, "text": ""} for r in rewards or ())
    tokens = more.pop("tokens", 100)
    failure = "judge" if rewards is None else None
    return profile_row(Profile(candidate, samples, 1, tokens, failure, **more))


def write(path: Path, rows: Sequence[dict[str, Any]], plan: StoppingRule = FOUR, **fields: Any) -> Path:
    told = dataclasses.asdict(plan) | {"prior": list(plan.prior), "control_share": 0.1}
    extra = {"num_generations": plan.count, "sampling": SAMPLING, "plan": told} | fields.pop("extra", {})
    header = Header(**{"stage": "profiles", "config_hash": "c", "policy": path.stem, "extra": extra, **fields})
    writer = ArtefactWriter(path, header)
    writer.write(rows)
    return writer.finish()


def test_a_small_comparison_equals_the_one_done_by_hand(tmp_path: Path) -> None:
    ours = {"a": 1, "b": 0, "c": 2, "d": 3, "f": 4, "g": 1}
    theirs = {"a": 4, "b": 2, "c": 0, "d": 3, "e": 1, "f": 4, "h": 0, "i": 0}

    def rows(found: dict[str, int]) -> list[dict[str, Any]]:
        return [row(n, outcomes(k, 4), split="validation" if n == "f" else "train") for n, k in found.items()]

    left = write(tmp_path / "l.jsonl", [*rows(ours), row("e", None)])
    right = write(tmp_path / "r.jsonl", rows(theirs))
    found = compare(left, right)
    assert found["candidates"] == {"both": 6, "only_left": 1, "only_right": 2, "compared": 5}
    # changes 3/4, 1/2, -1/2, 0, 0: mean 0.15, squared deviations 0.95
    rate, reach = found["hit_rate"], 1.959964 * math.sqrt(0.95 / 4 / 5)
    assert [rate[k] for k in ("left", "right", "change")] == pytest.approx([0.5, 0.65, 0.15])
    assert [rate["low"], rate["high"]] == pytest.approx([0.15 - reach, 0.15 + reach], rel=1e-6)
    cells = {(a, b): n for a, line in found["classes"].items() for b, n in line.items() if n}
    assert cells == {
        ("kept", "all 1"): 1,  # a
        ("all 0", "kept"): 1,  # b
        ("kept", "all 0"): 1,  # c
        ("too easy", "too easy"): 1,  # d
        ("failed", "kept"): 1,  # e
        ("all 1", "all 1"): 1,  # f
    }
    assert found["pivots"] == {
        "left": 2,  # a, c
        "right": 2,  # b, e
        "both": 0,
        "jaccard": 0.0,
        "rates_of_left": {"left": 0.375, "right": 0.5},
        "rates_of_right": {"left": 0.0, "right": 0.5},  # of b; e has no rate in the left one
    }
    assert found["undecided"] == {"left": 0, "right": 0} and found["other_reasons"] == found["notes"] == []
    moved = found["moved"]
    assert (moved["tested"], moved["up"], moved["down"], moved["threshold"]) == (5, 0, 0, 0.0)
    assert moved["smallest_p"] == 8 / 56
    assert [(m["candidate_id"], m["p_value"]) for m in found["largest"]] == [
        ("a", 8 / 56),
        ("b", 12 / 28),
        ("c", 12 / 28),
    ]
    text = as_text(found)
    assert "change +0.150 [-0.277, +0.577]" in text and "a  1/4 -> 4/4" in text and "NOT DRIFT" not in text
    assert "no single candidate stands out" in text


def test_significant_moves_are_told_up_and_down_by_tool_depth_task_and_length(tmp_path: Path) -> None:
    plan = StoppingRule(16, curtailed=False)
    cases = [("up", 1, 15, "f", 0), ("up2", 0, 13, "g", 3), ("down", 16, 2, "g", 4)]
    cases += [(f"same{i}", 8, 8 + i % 2, "f", 0) for i in range(9)]
    rows = [
        [row(c[0], outcomes(c[side], 16), tool=c[3], depth=c[4], tokens=60 if c[4] else 70) for c in cases]
        for side in (1, 2)
    ]
    found = compare(write(tmp_path / "l.jsonl", rows[0], plan), write(tmp_path / "r.jsonl", rows[1], plan))
    assert (found["moved"]["up"], found["moved"]["down"]) == (2, 1)
    assert [m["candidate_id"] for m in found["largest"][:3]] == ["down", "up", "up2"]  # 14 apart of 16 twice, then 13
    assert [m["significant"] for m in found["largest"]] == [True] * 3 + [False] * 4
    assert found["by"]["action"] == {
        "f": {"candidates": 10, "change": pytest.approx((14 + 4) / 16 / 10), "up": 1, "down": 0},
        "g": {"candidates": 2, "change": pytest.approx((13 - 14) / 16 / 2), "up": 1, "down": 1},
    }
    assert {n: (r["candidates"], r["up"], r["down"]) for n, r in found["by"]["depth"].items()} == {
        "0": (10, 1, 0),
        "3-4": (2, 1, 1),
    }
    assert {n: r["candidates"] for n, r in found["by"]["prompt"].items()} == {"0-64": 2, "65-128": 10}
    assert found["by"]["task"]["t"]["candidates"] == 12


@pytest.mark.parametrize(
    ("values", "threshold"),
    [
        ([0.5, 0.03, 0.01, 0.02], 0.03),
        ([0.02, 0.02, 0.03, 0.5], 0.03),  # the least is above 0.05/4: a step-up procedure looks further
        ([0.04, 0.04], 0.04),
        ([0.03, 0.9], 0.0),
        ([], 0.0),
    ],
)
def test_benjamini_and_hochbergs_threshold(values: list[float], threshold: float) -> None:
    assert significant_to(values, 0.05) == threshold


def test_curtailed_samples_say_what_they_do_not_know_and_their_mean_is_without_bias(tmp_path: Path) -> None:
    plan = StoppingRule(8, "adv", 0.6, 0.6)
    rows = [
        row("easy", outcomes(5, 5)),  # may end as 5 to 8 of 8: no pivot, whichever
        row("hard", [0.0] * 4 + [1.0]),
        row("zero", outcomes(0, 8)),
        row("control", outcomes(6, 8), control=True),
        row("longer", [1.0] * 5 + [0.0] * 3),  # drawn on by an earlier plan; this one had stopped at five
    ]
    left, right = write(tmp_path / "l.jsonl", rows, plan), write(tmp_path / "r.jsonl", rows, plan)
    found = compare(left, right)
    assert found["classes"] == {
        "all 0": {"all 0": 1, "kept": 0, "too easy": 0, "1 so far": 0},
        "kept": {"all 0": 0, "kept": 1, "too easy": 0, "1 so far": 0},
        "too easy": {"all 0": 0, "kept": 0, "too easy": 2, "1 so far": 0},
        "1 so far": {"all 0": 0, "kept": 0, "too easy": 0, "1 so far": 1},
    }
    rates = [unbiased_rate(plan, end) for end in ((5, 0), (1, 4), (0, 8), (5, 0))]
    assert found["hit_rate"]["left"] == pytest.approx(float(sum(rates) + 6 / 8) / 5)
    assert found["hit_rate"]["change"] == 0 and found["moved"]["tested"] == 5
    assert found["undecided"] == {"left": 0, "right": 0} and "so far: stopped before all K" in as_text(found)
    wider = compare(left, right, 0.9)
    assert wider["undecided"] == {"left": 1, "right": 1}  # easy: its 5 to 8 of 8 lie on both sides of 7.2
    assert "1 train candidates of the left one are not decided" in as_text(wider)
    assert (wider["pivots"]["left"], found["pivots"]["left"]) == (3, 1)


def test_a_profile_for_an_interval_of_lambdas_must_be_told_which(tmp_path: Path) -> None:
    wide = write(tmp_path / "l.jsonl", [row("a", outcomes(1, 4))], StoppingRule(4, "adv", 0.2, 0.9))
    with pytest.raises(InputError, match=r"from 0.2 to 0.9(?s:.*)--lambda"):
        compare(wide, wide)
    assert compare(wide, wide, 0.3)["left"]["lambda_diff"] == 0.3


def test_rewards_between_and_rescored_samples_are_compared_and_not_tested(tmp_path: Path) -> None:
    half = [row("a", [0.5, 0.5, 0.5, 0.5]), row("b", outcomes(1, 4))]
    found = compare(write(tmp_path / "l.jsonl", half), write(tmp_path / "r.jsonl", [row("a", [0.5, 1, 1, 1]), half[1]]))
    assert found["moved"]["tested"] == found["moved"]["not_testable"] == 1
    assert found["hit_rate"]["change"] == pytest.approx(0.375 / 2) and "all equal" in found["classes"]
    assert found["largest"][0]["p_value"] is None and "not testable" in as_text(found)
    plan, rows = StoppingRule(8, "adv", 0.6, 0.6), [row("a", outcomes(2, 5)), row("c", outcomes(2, 8), control=True)]
    rescored = write(tmp_path / "s.jsonl", rows, plan, extra={"rescored_from": "x"})
    found = compare(write(tmp_path / "l.jsonl", rows, plan), rescored)
    assert found["moved"]["tested"] == 1 and found["hit_rate"]["right"] == pytest.approx((0.4 + 0.25) / 2)
    assert any("rescored" in note for note in found["notes"])


def test_every_other_reason_for_a_difference_is_named(tmp_path: Path) -> None:
    rows = [row("a", outcomes(1, 4))]
    left = write(tmp_path / "l.jsonl", rows, verifier="v 1", tokenizer="t1", chat_template="c1", policy="p")
    warm = {"sampling": SAMPLING | {"temperature": 0.7}}
    other = {"verifier": "v 2", "tokenizer": "t2", "chat_template": "c2", "parent": "else", "config_hash": "d"}
    right = write(tmp_path / "r.jsonl", rows, policy="p", extra=warm, **other)
    found = compare(left, right)
    said = [reason.partition(":")[0] for reason in found["other_reasons"]]
    assert said == ["verifier", "tokenizer", "chat_template", "sampling", "policy"] and len(found["notes"]) == 2
    assert as_text(found).count("NOT DRIFT ALONE") == 5 and "v 1 | v 2" in as_text(found)


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    a, b = row("a", outcomes(1, 4)), row("b", outcomes(1, 4))
    one, other = write(tmp_path / "1.jsonl", [a]), write(tmp_path / "2.jsonl", [b])
    twice = write(tmp_path / "3.jsonl", [a, a])
    with pytest.raises(InputError, match="same candidates"):
        compare(one, other)
    for pair in ((twice, one), (one, twice)):
        with pytest.raises(InputError, match="a twice"):
            compare(*pair)
    failed = write(tmp_path / "4.jsonl", [row("a", None)])
    found = compare(failed, one)
    assert found["hit_rate"]["change"] is None and found["candidates"]["compared"] == 0 and as_text(found)


def test_the_command_prints_text_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left = write(tmp_path / "l.jsonl", [row("a", outcomes(1, 4)), row("b", outcomes(3, 4))])
    right = write(tmp_path / "r.jsonl", [row("a", outcomes(4, 4)), row("b", outcomes(1, 4))])
    assert cli.main(["compare", str(left), str(right), "--json", "--lambda", "0.8"]) == 0
    assert json.loads(capsys.readouterr().out) == compare(left, right, 0.8)
    assert cli.main(["compare", str(left), str(right)]) == 0
    assert "lambda_diff 0.6" in capsys.readouterr().out
    assert cli.main(["compare", str(left), str(tmp_path / "gone.jsonl")]) == 2
    assert "gone.jsonl" in capsys.readouterr().err
    for wrong in ("7", "most"):
        with pytest.raises(SystemExit):
            cli.main(["compare", str(left), str(right), "--lambda", wrong])
        assert "no number from 0 to 1" in capsys.readouterr().err
