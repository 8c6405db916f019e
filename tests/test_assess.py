"""LLMdoctor end to end on the embedded world, small: from lessons to a table of arms."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from nemo_pivotrl.config import Recipe
from nemo_pivotrl.recipe import load_recipe
from nemo_pivotrl.records import InputError, read_rows
from nemo_pivotrl.stages.assess import assess, distinct, repetition_diversity
from nemo_pivotrl.stages.quickstart import run

SMALL = [
    "num_threads=1",
    "manners.lessons=400",
    "manners.hidden_size=48",
    "manners.layers=2",
    "manners.doctor_hidden_size=32",
    "manners.doctor_layers=1",
    "manners.num_steps=60",
    "rank.answers_per_prompt=4",
    "tfpo.max_num_steps=6",
    "tfpo.pairs_per_step=8",
    "tfpo.val_period=3",
    "assess.limit=6",
    "assess.samples=2",
    "decode.max_new_tokens=24",
]


def recipe(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(str(ROOT / "recipes/llmdoctor/tiny.yaml"), [f"run_dir={folder}", *SMALL, *overrides])


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole small run."""
    folder = tmp_path_factory.mktemp("llmdoctor") / "run"
    run(recipe(folder))
    return folder


def summary(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "assessment.json").read_text())
    assert isinstance(found, dict)
    return found


def test_run_goes_from_lessons_to_a_doctor_and_a_table(done: Path) -> None:
    for name in (
        "ranked/kindness.jsonl",
        "preferences.jsonl",
        "token_rewards.jsonl",
        "doctor-kindness/policy/model.safetensors",
        "doctor-brevity/policy/model.safetensors",
    ):
        assert (done / name).exists(), name
    arms = summary(done)["arms"]
    assert list(arms)[:5] == ["patient", "greedy", "top-p 0.9", "best of 4", "kind 0.5"]
    rows = list(read_rows(done / "assessment.jsonl"))
    assert len(rows) == len(arms) * 6 * 2 and {row["arm"] for row in rows} == set(arms)


def test_the_first_arm_ties_with_itself_and_only_doctors_leave_the_patient(done: Path) -> None:
    arms = summary(done)["arms"]
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


def test_forwards_count_every_model_that_reads(done: Path) -> None:
    arms = summary(done)["arms"]
    assert set(arms["patient"]["forwards_per_token"]) == {"patient"}
    one, both = (set(arms[label]["forwards_per_token"]) for label in ("kind 1", "kind 1 brief 1"))
    assert one == {"patient", "kindness", "kindness reference"}
    assert both == {"patient", "kindness", "brevity", "kindness reference"}  # one novice is the reference of both
    found = arms["kind 1"]["forwards_per_token"]
    assert found["patient"] == found["kindness"] == found["kindness reference"] >= 0.9
    assert arms["best of 4"]["forwards_per_token"]["patient"] > 2.5 * arms["patient"]["forwards_per_token"]["patient"]


def test_shown_answers_keep_what_guidance_did_to_every_token(done: Path) -> None:
    rows = list(read_rows(done / "assessment.jsonl"))
    shown = [row for row in rows if "trace" in row]
    assert {(row["prompt"], row["sample"]) for row in shown} == {(p, 0) for p in range(4)}
    for row in shown:
        assert len(row["trace"]) == row["tokens"]
        assert "".join(piece for piece, *_ in row["trace"]).replace("<|end|>", "").split() == row["text"].split()
        assert sum(kl for *_, kl, _ in row["trace"]) / row["tokens"] == pytest.approx(row["kl"], abs=1e-4)


def test_an_assessment_resumes_at_any_byte_to_the_same_answers(done: Path) -> None:
    path = done / "assessment.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.rename(path.with_name("kept"))
    path.with_name("assessment.jsonl.part").write_bytes(b"".join(lines[: 1 + 5 * 12 + 3]) + lines[64][:20])
    assess(recipe(done))

    def answers(content: bytes) -> list[tuple[Any, ...]]:
        rows = map(json.loads, content.splitlines()[1:])
        return [(r["arm"], r["prompt"], r["sample"], r["text"], r["kl"]) for r in rows]

    assert answers(path.read_bytes()) == answers(whole)


def test_an_unknown_doctor_or_objective_is_named_before_anything_is_decoded(done: Path) -> None:
    with pytest.raises(InputError) as caught:
        assess(recipe(done, "assess.arms.new.beta.wit=1.0", "assess.objectives=[wit]"))
    assert {(p.field, p.found) for p in caught.value.problems} == {
        ("assess.arms.new.beta", "wit"),
        ("assess.objectives", "wit"),
    }


def test_diversity_by_hand() -> None:
    assert distinct(["a b c", "a b d"], 2) == 3 / 4 and distinct(["a"], 2) == 0.0
    assert repetition_diversity("a b c d e") == 1.0
    assert repetition_diversity("a b a b") == pytest.approx(2 / 3)  # 2 of 3 pairs, all triples and quadruples differ
