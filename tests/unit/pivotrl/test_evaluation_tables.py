"""What `evaluate` says of its scores: tables by family, and a sentence that a change must earn."""

import pytest

from nemo_pivotrl.pivotrl.evaluation_tables import MOST_FAMILIES, summarise, table, verdict


def rows(policy: str, name: str, scores: list[float], families: int = 2) -> list[dict]:
    return [
        {"policy": policy, "set": name, "item": str(i), "family": f"kind {i % families}", "scores": [s]}
        for i, s in enumerate(scores)
    ]


def summary_of(inside: list[float], outside: list[float], families: int = 2) -> dict:
    base = rows("base", "multi_turn", [0.0, 1.0] * 20, families) + rows("base", "retention", [1.0] * 40, families)
    own = rows("sft", "multi_turn", inside, families) + rows("sft", "retention", outside, families)
    return summarise(base + own, "base", 0.95, 0)


def test_the_sentence_has_both_changes_and_what_is_not_shown() -> None:
    said = verdict(summary_of([1.0] * 40, [0.0] * 10 + [1.0] * 30))
    assert said.startswith("Against base: sft +50.0 [") and "points of whole tasks and -25.0 [" in said
    assert "not shown" not in said and said.endswith("points out of domain.")
    said = verdict(summary_of([1.0, 1.0] + [0.0, 1.0] * 19, [1.0] * 40))
    assert "sft +2.5 [+0.0, +7.5] (not shown) points of whole tasks and +0.0 [+0.0, +0.0] (not shown)" in said
    assert verdict(summarise(rows("base", "multi_turn", [1.0, 0.0]), "base", 0.95, 0)) == "Only base was measured."


def test_whole_tasks_are_told_apart_by_a_few_families() -> None:
    found = summary_of([0.0, 1.0] * 10 + [1.0, 1.0] * 10, [1.0] * 40)["policies"]["sft"]["multi_turn"]["families"]
    assert {name: entry["mean"] for name, entry in found.items()} == {"kind 0": 0.5, "kind 1": 1.0}
    assert found["kind 0"]["difference"]["mean"] == pytest.approx(0.5) and found["kind 1"]["items"] == 20
    printed = table(summary_of([1.0] * 40, [1.0] * 40))
    assert "kind 0" in printed and "100.0 [100.0, 100.0] (+100.0)" in printed
    many = summary_of([1.0] * 40, [1.0] * 40, MOST_FAMILIES + 1)
    assert "families" not in many["policies"]["sft"]["multi_turn"]
