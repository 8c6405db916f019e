"""The benchmark of the PivotRL paper's claims: its arithmetic by hand, its baseline, and the whole of it in small."""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.recipes import ROOT, SMALL, recipe_at

sys.path.append(str(ROOT / "benchmarks"))
import claims
import closed_loop
import pivotrl_claims
import pivotrl_e2e
import pivotrl_tables
import pivotrl_theory

from nemo_pivotrl.backends import loading
from nemo_pivotrl.backends.base import TokenBatch
from nemo_pivotrl.core.types import Sample
from nemo_pivotrl.demo import service_desk as world, talk_judge


def test_an_interval_over_seeds_is_wider_than_one_over_their_items_together() -> None:
    apart = [np.full(50, 0.2), np.full(50, -0.1), np.full(50, 0.5)]
    mean, low, high = claims.interval(apart)
    assert (mean, low, high) == (
        pytest.approx(0.2),
        pytest.approx(-0.1),
        pytest.approx(0.5),
    )  # the three seeds alone vary
    items = np.tile([0.0, 1.0], 200)
    mean, low, high = claims.interval([items])
    assert mean == 0.5
    assert (low, high) == (pytest.approx(0.45, abs=0.01), pytest.approx(0.55, abs=0.01))  # 1.96 * 0.5 / 20


def test_results_are_made_once_and_a_failing_job_is_named(tmp_path: Path) -> None:
    made = claims.results([claims.Job(tmp_path / "a", square, (3,))], 1)
    assert made[tmp_path / "a"]["square"] == 9
    (tmp_path / "a/result.json").write_text(json.dumps({"square": 10}))
    assert claims.results([claims.Job(tmp_path / "a", square, (3,))], 1)[tmp_path / "a"]["square"] == 10
    with pytest.raises(TypeError) as caught:
        claims.results([claims.Job(tmp_path / "b", square, ("x",))], 1)
    assert str(tmp_path / "b") in " ".join(caught.value.__notes__)


def square(folder: Path, number: int) -> dict[str, int]:
    return {"square": number**2}


def test_turns_to_a_target_lie_between_the_points_that_enclose_it() -> None:
    turns, success = np.array([0.0, 100.0, 200.0]), np.array([0.1, 0.1, 0.3])
    assert pivotrl_tables.reached(turns, success, 0.2) == 150.0
    assert pivotrl_tables.reached(turns, success, 0.05) == 0.0
    assert pivotrl_tables.reached(turns, success, 0.31) == math.inf


@pytest.mark.parametrize(
    ("found", "said"), [((1, 0.1, 2), "yes"), ((1, -0.1, 2), "not shown"), ((-1, -2, -0.1), "no: the other way round")]
)
def test_a_claim_holds_only_beyond_its_interval(found: tuple[float, float, float], said: str) -> None:
    assert pivotrl_tables.verdict(found) == said


def test_the_loop_is_compared_item_by_item() -> None:
    def result(*apart: float) -> claims.Result:
        once = {str(i): 0.5 for i in range(len(apart))}
        again = {str(i): 0.5 + a for i, a in enumerate(apart)}
        arms = {"base": once, "loop": dict(reversed(again.items())), "one-shot": once}
        found = {arm: dict.fromkeys(pivotrl_claims.SETS, items) for arm, items in arms.items()}
        return found | {"rounds": {"loop": ["round 1: said"], "one-shot": []}}

    text = closed_loop.tables(["loop", "one-shot"], [1, 2], [result(0.1, 0.1), result(-0.3, -0.3)], 100)
    assert "loop minus one-shot: -10.00 [-30.00, +10.00], ahead in 1 of 2 seeds" in text
    assert "seed 2, loop:\n  round 1: said" in text


def test_the_best_rate_is_the_smaller_of_equals(tmp_path: Path) -> None:
    curves = {0.1: 0.3, 0.2: 0.5, 0.4: 0.5}
    made = {tmp_path / f"seed-9/x-{lr:g}": {"curve": [[0, 0.9], [8, last]]} for lr, last in curves.items()}
    assert pivotrl_claims.best(tmp_path, made, "x", list(curves), [9]) == 0.2


def test_curtailed_counts_what_would_have_been_drawn() -> None:
    # lambda 0.6 of 8: kept iff 0 < k < 4.8; decided by one success and four failures, or by five successes
    assert pivotrl_claims.curtailed([0.0] * 8) == 8
    assert pivotrl_claims.curtailed([1.0] * 8) == 5
    assert pivotrl_claims.curtailed([1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0]) == 5


def test_experts_make_errors_at_their_rates_and_another_teacher_does_the_same_in_other_words() -> None:
    import random

    rng = random.Random(0)
    drawn = [world.draw_errors(rng, 0.5) for _ in range(4000)]
    for name, rate in world.EXPERT_ERRORS.items():
        assert sum(name in errors for errors in drawn) / 4000 == pytest.approx(rate / 2, abs=0.03)
    assert all(not world.draw_errors(rng, 0.0) for _ in range(100))
    tasks = world.tasks(0, {"train": 300})["train"]
    careless = [world.expert_trajectory(t, rng, errors=frozenset(world.EXPERT_ERRORS))["reward"] for t in tasks]
    assert sum(careless) < 100
    for task in tasks:
        house, other = (list(world.expert_turns(task, random.Random(1), teacher)) for teacher in ("house", "other"))
        assert world.expert_trajectory(task, rng, "other")["reward"] == 1.0
        assert [a.kind for a in house] == [a.kind for a in other]
        for ours, theirs in zip(house, other, strict=True):
            assert not ours.content or ours.content != theirs.content
            for a, b in zip(ours.calls, theirs.calls, strict=True):
                same = {k: v for k, v in json.loads(a.arguments).items() if k not in ("note", "summary")}
                assert same == {k: v for k, v in json.loads(b.arguments).items() if k not in ("note", "summary")}


@pytest.mark.parametrize(
    ("actual", "same"),
    [
        ("shall i cancel alfa ?", True),
        ("may i cancel your rug ?", True),
        ("alfa is cancelled .", False),  # does not ask
        ("shall i cancel bravo ?", False),  # another order
        ("alfa is pending ?", False),  # tells a status
        ("shall i pause alfa ?", False),  # does something else with it
    ],
)
def test_talk_is_judged_by_what_it_does(actual: str, same: bool) -> None:
    assert talk_judge.same_act("sorry to hear that ! do you agree that alfa stops ?", actual) is same


def test_every_turn_of_an_episode_gets_its_advantage_and_all_tokens_count() -> None:
    def turn(*tokens: int) -> pivotrl_e2e.Turn:
        return [7], Sample(tokens, tuple(-0.5 for _ in tokens), "stop")

    episodes = [[turn(1, 2), turn(3)], [turn(4, 5, 6)], [turn(9)]]
    batch, tokens = pivotrl_e2e.batch_of(episodes, [1.5, 0.0, -0.5])
    assert tokens == 7
    assert batch is not None
    assert batch.responses == [(1, 2), (3,), (9,)]
    assert batch.data["advantages"].tolist() == [1.5, 1.5, -0.5]
    assert batch.data["mask"].tolist() == [[1, 1], [1, 0], [1, 0]]
    assert pivotrl_e2e.batch_of(episodes, [0.0] * 3) == (None, 7.0)


def test_every_task_is_drawn_once_an_epoch() -> None:
    tasks = world.tasks(0, {"train": 6})["train"]
    seen = [t.task_id for step in (1, 2, 3) for t in pivotrl_e2e.drawn(tasks, step, 4, 0)]
    assert sorted(seen[:6]) == sorted(seen[6:]) == sorted(t.task_id for t in tasks)


def test_end_to_end_training_raises_the_chance_of_what_ended_well(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # this policy solves nothing; every other episode ends well, so that groups are mixed
    won: dict[int, bool] = {}
    monkeypatch.setattr(world.Episode, "success", property(lambda e: won.setdefault(id(e), len(won) % 2 == 0)))
    taken: list[tuple[list[tuple[list[int], Sample]], float]] = []

    def watched(episodes: list[list[pivotrl_e2e.Turn]], advantages: list[float]) -> Any:
        taken.extend(zip(episodes, advantages, strict=True))
        return batch_of(episodes, advantages)

    batch_of = pivotrl_e2e.batch_of
    monkeypatch.setattr(pivotrl_e2e, "batch_of", watched)
    recipe = recipe_at(tmp_path, f"policy.model_name={trained / 'start/policy'}", "grpo.max_num_steps=1")
    seen = []
    rows, _ = pivotrl_e2e.train(recipe, lambda step, *rest: seen.append((step, rest[-1])), tmp_path / "policy")
    assert [step for step, _ in seen] == [0, 1]
    assert seen[1][1] == rows[0]["turns"] == sum(len(turns) for turns, _ in taken)
    after = loading.load(dataclasses.replace(recipe.policy, model_name=str(tmp_path / "policy")))
    gain = 0.0
    for turns, advantage in taken:
        for prompt, sample in turns:
            now = after.get_inference_log_probs(TokenBatch([prompt], [0], [sample.token_ids], {}))
            gain += advantage * (float(now.sum()) - sum(sample.log_probs))
    assert rows[0]["mixed_group_share"] > 0 and gain > 0


def test_the_statements_of_the_theory_hold_and_the_misprint_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pivotrl_theory, "PROBLEMS", 5)
    one = pivotrl_theory.proposition_3_1(4)
    assert (one["wrong"], one["gradient, equal"]) == (0, 0)
    assert one["least gradient, mixed"] > 0.1
    two = pivotrl_theory.theorem_3_2(0.5)
    assert max(two["std"], two["natural gradient"]) < 1e-6
    assert two["variance"] > 0.1
    three = pivotrl_theory.theorem_3_3(0.5)
    assert max(three["conditionals"], three["mass"]) < 1e-12
    assert three["sft"] > 0.05


def test_the_whole_benchmark_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Path) -> None:
    monkeypatch.setattr(pivotrl_claims, "TRIAL_TASKS", 4)
    monkeypatch.setattr(pivotrl_theory, "PROBLEMS", 2)
    command = ["x", "--seeds", "1", "--sweep-seeds", "--tuning-seeds", "2", "--grid", "1e-3", "--processes", "0"]
    command += ["--folder", str(tmp_path / "runs"), "--output", str(tmp_path / "table"), "--set", *SMALL]
    command += ["select.rule=adv_with_zeros", "select.lambda_diff=1.0"]  # a policy this weak has no pivots
    monkeypatch.setattr(sys, "argv", command)
    pivotrl_claims.main()
    text = (tmp_path / "table.md").read_text()
    assert "| PivotRL is above SFT in domain |" in text
    assert (tmp_path / "table.svg").read_text().startswith("<svg")
    made = sorted((tmp_path / "runs").glob("*/seed-*/*/result.json"))
    assert (
        len(made) == 2 * (1 + len(pivotrl_claims.ARMS)) + 2
    )  # data and arms of both seeds, and the tuning seed's house
    before = {path: path.stat().st_mtime_ns for path in made}
    pivotrl_claims.main()
    assert {path: path.stat().st_mtime_ns for path in made} == before
    assert torch.get_num_threads() == 1
