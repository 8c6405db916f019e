"""The benchmark of doctors on a real model: its statistics by hand, its prompts and oracle, and its report on made-up answers."""

import importlib
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.recipes import ROOT

sys.path.append(str(ROOT / "benchmarks"))
doctors, data, tables = (
    importlib.import_module(name) for name in ("smollm2_doctors", "smollm2_doctors_data", "smollm2_doctors_tables")
)


def row(prompt: int, score: float, kl: float = 0.0, sample: int = 0) -> dict[str, Any]:
    scores = {"sentiment": score, "plainness": -score}
    return {"prompt": prompt, "sample": sample, "text": "it", "tokens": 4, "kl": kl, "scores": scores}


# ---- statistics ----


def test_best_of_n_costs_log_n_minus_its_share() -> None:
    assert [tables.best_of_kl(n) for n in (1, 2, 8)] == pytest.approx([0, math.log(2) - 1 / 2, math.log(8) - 7 / 8])


def test_best_of_takes_the_highest_of_the_first_n_and_the_earlier_of_equals() -> None:
    lots = [[row(0, 0.1), row(0, 0.5), row(0, 0.5), row(0, 0.9)]]
    assert tables.best_of(lots, 3, [[1.0, 7.0, 7.0, 9.0]]) == [lots[0][1]]
    assert tables.best_of(lots, 4, [[9.0, 7.0, 7.0, 9.0]]) == [lots[0][0]]


def test_a_score_at_equal_kl_lies_between_the_weights_around_it_and_is_none_beyond_them() -> None:
    patient = [row(0, 0.0), row(1, 1.0)]
    weak = [row(0, 0.5, 1.0), row(1, 1.0, 1.0)]
    strong = [row(0, 1.0, 2.0), row(1, 1.0, 4.0)]
    curve = tables.Curve([patient, weak, strong], "sentiment")
    everyone = np.array([[0, 1]])
    assert curve.at(0.5, everyone) == pytest.approx([0.625])  # half way from 0.5 to 0.75
    assert curve.at(2.0, everyone) == pytest.approx([0.875])  # half way from KL 1 to 3
    assert math.isnan(curve.at(3.5, everyone)[0])
    assert curve.at(1.5, np.array([[0, 0], [1, 1]])) == pytest.approx([0.75, 1.0])  # each draw by its own KL


def test_prompts_weigh_the_same_however_many_answers_they_have() -> None:
    assert tables.by_prompt([row(1, 1.0), row(0, 0.0), row(1, 0.0)], lambda r: r["scores"]["sentiment"]).tolist() == [
        0,
        0.5,
    ]


def test_weights_are_doubled_and_halved_until_they_lie_around_what_is_compared() -> None:
    def weights(slope: float) -> list[float]:
        return sorted(doctors.around(lambda weight: [row(0, 0, slope * weight**2)], tables.mean_kl))

    assert weights(0.1) == [1.0, 2.0, 4.0]  # 0.1, 0.4, 1.6 nats
    assert weights(4.0) == [0.25, 0.5, 1.0]
    assert weights(1.0) == [0.5, 1.0, 2.0]
    assert weights(0.0)[-1] == 32 and weights(1e9)[0] == 0.03125  # a dead or a wild model ends, too


# ---- prompts and the oracle ----


def test_prompts_are_those_of_the_recipe_and_new_ones_none_of_which_is_tested(tmp_path: Path) -> None:
    opinions = ROOT / "recipes/llmdoctor/opinions"
    assert data.write_prompts(opinions / "train.jsonl", tmp_path / "x/prompts.jsonl") == 260
    asked = [json.loads(line)[0]["content"] for line in (tmp_path / "x/prompts.jsonl").read_text().splitlines()]
    tested = [json.loads(line)[0]["content"] for line in (opinions / "test.jsonl").read_text().splitlines()]
    assert len(set(asked)) == 260 and not set(asked) & set(tested)
    assert not [t for t in data.TOPICS if any(f" {t}" in question for question in tested)]


@pytest.mark.parametrize(("grade", "score"), [(5.0, 0.5), (20.0, -1.0), (42.0, -1.0), (-33.0, 1.0)])
def test_plainness_holds_the_grade_to_its_range(monkeypatch: pytest.MonkeyPatch, grade: float, score: float) -> None:
    monkeypatch.setitem(sys.modules, "textstat", SimpleNamespace(coleman_liau_index=lambda _: grade))
    assert data.plainness("it is a dog") == pytest.approx(score)


def test_what_is_no_sentence_is_not_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "textstat", SimpleNamespace(coleman_liau_index=lambda _: -33.0))
    assert data.plainness("Hi you 3 !") == -1.0 and data.plainness("") == -1.0


def test_every_oracle_has_several_faces_and_they_differ() -> None:
    assert set(data.FACES) == set(data.ORACLES)
    assert all(len(set(faces)) == len(faces) > 1 and all(p != n for p, n in faces) for faces in data.FACES.values())


# ---- the report ----


def job(root: Path, name: str, **result: Any) -> None:
    tables.write_json(root / name / "result.json", result | {"seconds": 2.0, "processor_seconds": 1.0})


def made(root: Path) -> None:
    lots = [[row(p, (p + n) / 10) for n in range(4)] for p in range(4)]
    face = {"positive": "p", "negative": "n"}
    job(root, "pairs", prompts=4, answers=8, tokens=32, pairs=dict.fromkeys(data.ORACLES, 3))
    job(root, "sentiment-faces", faces=face, probed=[face | {"agreement": 0.6, "delta": 0.5}])
    told = {"tokens": 32, "kept_share": 0.5, "delta_mean": 0.4, "noise_floor": 0.01, "agreement": {"chosen": 0.7}}
    job(root, "sentiment-rewards", summary=told)
    job(root, "alone", lots=lots, greedy=[row(p, 0.4) for p in range(4)], prompts=[[1]] * 4)
    for name, gain in (("LLMdoctor", 0.2), ("DPO", 0.1)):
        curve = {str(w): [row(p, p / 10 + gain * w, 0.5 * w) for p in range(4)] for w in (1, 2, 4)}
        held = {"pairs": 5, "ordered": 4, "gap": 1.5}
        job(root, f"sentiment-{name}", curve=curve, losses=[2.0, 1.0], held_out=held, reward=[[0, 1, 2, 3]] * 4)


def test_the_report_says_what_is_there_and_leaves_out_what_is_not(tmp_path: Path) -> None:
    made(tmp_path)
    text, svg = tables.report(tmp_path, data.ORACLES, ["LLMdoctor", "GenARM", "DPO", "GenARM, product"], [2, 4])
    assert "## sentiment: at equal KL" in text and "## plainness: at equal KL" not in text
    at = 2 * tables.best_of_kl(4)  # weight at that KL
    equal = text.split("## sentiment: every arm")[0]
    for gain in (0.2, 0.1, 0.2 - 0.1):  # of each over the patient, then of the first over the other
        assert f"{gain * at:+.3f} [{gain * at:+.3f}, {gain * at:+.3f}]" in equal
    assert "| GenARM" not in text and "| best of 4 by the oracle |" in text.split("## plainness: every arm")[1]
    assert "+0.300" in text  # best of four, each a tenth above the one before
    assert "| sentiment | DPO | 2.000, 1.000 | 4 of 5 | 1.50 |" in text
    assert "| sentiment | p | n | 0.600 | 0.500 | yes |" in text and "agreement chosen 0.700" in text
    assert svg.startswith("<?xml")


def test_each_objective_has_a_run_folder_of_its_own_with_its_pairs_alone() -> None:
    face = {"positive": "p", "negative": "n"}
    recipe = doctors.recipe_of("runs/x/run", 3, "plainness", {"plainness": face})
    assert (recipe.run_dir, recipe.seed, recipe.tfpo.objective) == ("runs/x/run-plainness", 3, "plainness")
    assert recipe.preferences.objectives == {"plainness": ("runs/x/run/ranked/plainness.jsonl",)}
    assert recipe.reward.faces == {"plainness": face}
    assert doctors.recipe_of("runs/x/run", 3).run_dir == "runs/x/run"
