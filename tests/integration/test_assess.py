"""LLMdoctor end to end on the embedded world, small: from lessons to a table of arms."""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from support.journals import journals_kept
from support.recipes import ROOT, SMALL_LLMDOCTOR
from support.scripted_judge import Asked, Server

from nemo_pivotrl.config import Recipe
from nemo_pivotrl.config.load import load_recipe
from nemo_pivotrl.core.artifacts import read_rows
from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.llmdoctor.assess import assess, distinct, repetition_diversity, verdict
from nemo_pivotrl.report.page import report


def recipe(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(str(ROOT / "recipes/llmdoctor/tiny.yaml"), [f"run_dir={folder}", *SMALL_LLMDOCTOR, *overrides])


def summary(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "assessment.json").read_text())
    assert isinstance(found, dict)
    return found


def test_run_goes_from_lessons_to_a_doctor_and_a_table(steered: Path) -> None:
    for name in (
        "ranked/kindness.jsonl",
        "preferences.jsonl",
        "token_rewards.jsonl",
        "doctor-kindness/policy/model.safetensors",
        "doctor-brevity/policy/model.safetensors",
    ):
        assert (steered / name).exists(), name
    arms = summary(steered)["arms"]
    assert list(arms)[:5] == ["patient", "greedy", "top-p 0.9", "best of 4", "kind 0.5"]
    rows = list(read_rows(steered / "assessment.jsonl"))
    assert len(rows) == len(arms) * 6 * 2 and {row["arm"] for row in rows} == set(arms)


def test_the_first_arm_ties_with_itself_and_only_doctors_leave_the_patient(steered: Path) -> None:
    arms = summary(steered)["arms"]
    first = arms["patient"]["objectives"]["kindness"]
    assert first["tie"] == [1.0, 1.0, 1.0] and first["win"][0] == first["lose"][0] == 0.0
    assert {label for label, arm in arms.items() if arm["kl"] > 0} == {
        label for label in arms if label.startswith(("kind", "brief"))
    }
    assert arms["kind 0.5"]["kl"] < arms["kind 1"]["kl"] < arms["kind 2"]["kl"]
    for arm in arms.values():
        assert set(arm["objectives"]) == {"kindness", "brevity"}
        o = arm["objectives"]["kindness"]
        assert o["win"][0] + o["tie"][0] + o["lose"][0] == pytest.approx(1.0)
        assert o["score"][1] <= o["score"][0] <= o["score"][2]
    assert arms["best of 4"]["tokens_spent"] > 2 * arms["patient"]["tokens_spent"]
    assert arms["best of 4"]["objectives"]["kindness"]["score"][0] >= first["score"][0]
    assert arms["greedy"]["different_answers"] == 0.0


def test_forwards_count_every_model_that_reads(steered: Path) -> None:
    arms = summary(steered)["arms"]
    assert set(arms["patient"]["forwards_per_token"]) == {"patient"}
    one, both = (set(arms[label]["forwards_per_token"]) for label in ("kind 1", "kind 1 brief 1"))
    assert one == {"patient", "kindness", "kindness reference"}
    assert both == {"patient", "kindness", "brevity", "kindness reference"}  # one novice is the reference of both
    found = arms["kind 1"]["forwards_per_token"]
    assert found["patient"] == found["kindness"] == found["kindness reference"] >= 0.9
    assert arms["best of 4"]["forwards_per_token"]["patient"] > 2.5 * arms["patient"]["forwards_per_token"]["patient"]


def test_shown_answers_keep_what_guidance_did_to_every_token(steered: Path) -> None:
    rows = list(read_rows(steered / "assessment.jsonl"))
    shown = [row for row in rows if "trace" in row]
    assert {(row["prompt"], row["sample"]) for row in shown} == {(p, 0) for p in range(4)}

    def plain(text: str) -> list[str]:
        """Words without characters of several bytes, which tokens of a model this raw may share."""
        return text.replace("<|end|>", "").encode("ascii", "ignore").decode().split()

    for row in shown:
        assert len(row["trace"]) == row["tokens"]
        assert plain("".join(piece for piece, *_ in row["trace"])) == plain(row["text"])
        assert sum(kl for *_, kl, _ in row["trace"]) / row["tokens"] == pytest.approx(row["kl"], abs=1e-4)


def test_an_assessment_resumes_at_any_byte_to_the_same_answers(steered: Path) -> None:
    path = steered / "assessment.jsonl"
    whole = path.read_bytes()
    path.rename(path.with_name("kept"))
    with journals_kept() as kept:
        assess(recipe(steered))
    path.unlink()
    path.with_name("assessment.jsonl.journal").write_bytes(kept[0][: len(kept[0]) * 3 // 5])
    assess(recipe(steered))

    def answers(content: bytes) -> list[tuple[Any, ...]]:
        rows = map(json.loads, content.splitlines()[1:])
        return [(r["arm"], r["prompt"], r["sample"], r["text"], r["kl"]) for r in rows]

    assert answers(path.read_bytes()) == answers(whole)


def test_a_judge_compares_the_answers_that_are_there(steered: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def vowels(text: str) -> int:
        return sum(letter in "aeiou" for letter in text)

    def judge(asked: Asked, number: int) -> str:
        one, two = (vowels(asked.sections[name]) for name in ("ANSWER 1", "ANSWER 2"))
        return f"{asked.code} {'ONE' if one > two else 'TWO' if two > one else 'EQUAL'}"

    before, server = (steered / "assessment.jsonl").read_bytes(), Server(judge)
    server.models = {"data": [{"id": "referee"}]}
    try:
        told = f"assess.judge={{base_url: {server.url}, model: referee}}"
        assess(recipe(steered, told, "assess.criterion=The kinder answer."))
    finally:
        server.close()
    assert (steered / "assessment.jsonl").read_bytes() == before, "the answers are those that were there"
    arms = summary(steered)["arms"]
    assert "judge" not in arms["patient"]
    rows = list(read_rows(steered / "assessment.jsonl"))
    for label in list(arms)[1:]:
        pairs = zip(*([vowels(r["text"]) for r in rows if r["arm"] == arm] for arm in (label, "patient")), strict=True)
        differ = [mine - first for mine, first in pairs]
        expected = {"win": fmean(d > 0 for d in differ), "tie": fmean(d == 0 for d in differ)}
        said = arms[label]["judge"]
        assert {name: said[name][0] for name in expected} == pytest.approx(expected)
        assert said["score"][0] == pytest.approx(expected["win"] + expected["tie"] / 2) and said["pairs"] == len(differ)
    out = capsys.readouterr().out
    assert "judge referee" in out and "pairs without a verdict" in out
    page = report(recipe(steered)).read_text()
    assert "Judge referee, both answers side by side" in page and "The kinder answer." in page


def test_an_unknown_doctor_or_objective_is_named_before_anything_is_decoded(steered: Path) -> None:
    with pytest.raises(InputError) as caught:
        assess(recipe(steered, "assess.arms.new.beta.wit=1.0", "assess.objectives=[wit]"))
    assert {(p.field, p.found) for p in caught.value.problems} == {
        ("assess.arms.new.beta", "wit"),
        ("assess.objectives", "wit"),
    }


def test_diversity_by_hand() -> None:
    assert distinct(["a b c", "a b d"], 2) == 3 / 4 and distinct(["a"], 2) == 0.0
    assert repetition_diversity("a b c d e") == 1.0
    assert repetition_diversity("a b a b") == pytest.approx(2 / 3)  # 2 of 3 pairs, all triples and quadruples differ


def test_the_sentence_names_what_doctors_won_and_what_is_not_shown() -> None:
    def arm(win: list[float], lose: list[float], beta: dict[str, float]) -> dict:
        return {"setting": {"beta": beta}, "objectives": {"o": {"win": win, "lose": lose}}, "kl": 0.05}

    arms = {
        "patient": arm([0.0] * 3, [0.0] * 3, {}),
        "greedy": arm([0.9] * 3, [0.0] * 3, {}),
        "kind": arm([0.5, 0.4, 0.6], [0.1, 0.05, 0.15], {"k": 1.0}),
        "brief": arm([0.2, 0.1, 0.3], [0.1, 0.05, 0.15], {"b": 1.0}),
    }
    assert verdict({"arms": arms}) == (
        "Against patient, by o: kind wins 50.0 % and loses 10.0 % at 0.050 nats a token; "
        "brief wins 20.0 % and loses 10.0 % (not shown) at 0.050 nats a token."
    )
    assert (
        verdict({"arms": {"patient": arms["patient"], "greedy": arms["greedy"]}})
        == "No arm is steered against patient."
    )
