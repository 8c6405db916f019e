"""The benchmark of the LLMdoctor paper's claims: its arithmetic by hand, and all of it once at a size that shows nothing."""

import dataclasses
import importlib
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from support.processes import run
from support.recipes import ROOT

from nemo_pivotrl.algorithms.model_outputs import ModelOutputs
from nemo_pivotrl.backends.reference.guided import GuidedSamplingParams
from nemo_pivotrl.config import Recipe, Tfpo
from nemo_pivotrl.demo import tiny_models as tiny

sys.path.append(str(ROOT / "benchmarks"))
arms, opponents, plan, tables = (
    importlib.import_module(name)
    for name in ("llmdoctor_claims_arms", "llmdoctor_baselines", "llmdoctor_claims_plan", "llmdoctor_claims_tables")
)


# ---- opponents ----


def test_the_reward_model_reads_the_state_after_the_last_token_alone() -> None:
    values = torch.tensor([[9.0, 9.0, 2.0], [9.0, 0.5, 9.0]], dtype=torch.float64).requires_grad_()
    loss = opponents.reward_model_loss(values, torch.tensor([2, 1]))
    assert float(loss.detach()) == pytest.approx(math.log(1 + math.exp(-1.5)))
    (gradient,) = torch.autograd.grad(loss, values)
    slope = 1 / (1 + math.exp(1.5))
    assert gradient.tolist() == [pytest.approx([0, 0, -slope]), pytest.approx([0, slope, 0])]


def test_a_soup_of_one_half_lies_between_and_of_one_is_the_first() -> None:
    first, second = {"w": torch.tensor([1.0, 3.0])}, {"w": torch.tensor([2.0, -1.0])}
    assert opponents.soup(first, second, 0.25)["w"].tolist() == [1.75, 0.0]
    assert opponents.soup(first, second, 1.0)["w"].tolist() == [1.0, 3.0]


def test_args_scores_the_likeliest_tokens_by_log_probability_plus_weighted_reward() -> None:
    log_probs = torch.tensor([[0.5, 0.25, 0.2, 0.05]]).log()
    asked = []

    def rewards(candidates: torch.Tensor) -> torch.Tensor:
        asked.append(candidates.tolist())
        return torch.tensor([[0.0, 3.0]])

    scores = opponents.args_scores(log_probs, rewards, 2, 0.5)
    assert asked == [[[0, 1]]]
    assert scores[0].tolist() == pytest.approx([math.log(0.5), math.log(0.25) + 1.5, -math.inf, -math.inf])


def small(folder: Any, seed: int) -> Any:
    tokenizer = tiny.make_tokenizer(["say something nice or something rude"] * 4, 300)
    model = tiny.make_model(tokenizer, 32, 2, 2, seed=seed).double().eval()
    tiny.save(model, tokenizer, folder)
    return model


@torch.no_grad()
def test_candidates_in_one_pass_are_rewarded_as_whole_texts_are(tmp_path: Any) -> None:
    model = small(tmp_path, 1)
    head = torch.nn.Linear(32, 1, dtype=torch.float64)
    prompts = [[5, 6, 7], [9, 10, 11, 12, 13]]

    def whole(text: list[int]) -> float:
        return float(head(model(torch.tensor([text]), output_hidden_states=True).hidden_states[-1][0, -1]))

    rewards = opponents.PartialRewards(model, head, prompts)
    candidates = torch.tensor([[20, 21, 22], [22, 23, 24]])
    for more in ([30, 31], [32, 33]):
        expected = [
            [whole([*prompt, token]) for token in row] for prompt, row in zip(prompts, candidates.tolist(), strict=True)
        ]
        assert rewards.of(candidates).tolist() == [pytest.approx(row, abs=1e-9) for row in expected]
        rewards.feed(torch.tensor(more))
        prompts = [[*prompt, token] for prompt, token in zip(prompts, more, strict=True)]
    rewards.select(torch.tensor([1]))
    assert rewards.of(candidates[1:]).tolist() == [
        pytest.approx([whole([*prompts[1], t]) for t in (22, 23, 24)], abs=1e-9)
    ]


def test_args_without_weight_is_the_patient_over_its_likeliest_tokens_and_with_much_of_it_the_reward_decides(
    tmp_path: Any,
) -> None:
    model = small(tmp_path, 2)
    prompts, width = [[5, 6, 7], [9, 10], [3, 4, 5, 6]], model.config.vocab_size
    requests = [GuidedSamplingParams(max_new_tokens=5, seed=n) for n in range(3)]
    silent = torch.nn.Linear(32, 1, dtype=torch.float64)

    def answers(weight: float, k: int) -> list[Any]:
        return opponents.args_answers(model, (model, silent), prompts, requests, frozenset({0}), weight, k)

    from nemo_pivotrl.backends.reference.guided import GuidedGenerator
    from nemo_pivotrl.data.chat_template import load_tokenizer

    alone = GuidedGenerator(model, {}, load_tokenizer(str(tmp_path)), stop_ids=frozenset({0})).generate(
        prompts, requests
    )
    free = answers(0.0, width)
    assert [a.tokens for a in free] == [list(a.token_ids) for a in alone]
    assert [a.kl for a in free] == pytest.approx([0.0] * 3, abs=1e-9)
    first = [a.tokens[0] for a in answers(1e4, width)]
    hidden = [
        model(torch.tensor([[*p, t] for t in range(width)]), output_hidden_states=True).hidden_states[-1][:, -1]
        for p in prompts
    ]
    assert first == [int(silent(states)[:, 0].argmax()) for states in hidden]


# ---- contestants ----


def pair() -> dict[str, Any]:
    side = {"ids": [11, 12, 13, 0], "rewards": [], "importance": [0.0, 1.0, 0.0, 3.0], "ended": True}
    return {"prompt_ids": [5, 6], "chosen": side, "rejected": side | {"ids": [14, 0], "importance": [1.0, 1.0]}}


def test_rewards_of_a_variant_come_from_the_importance() -> None:
    recipe = Recipe()
    smoothed = [0.0, math.tanh(1.0), 0.0, math.tanh(3.0)]
    found = arms.rewarded(pair(), plan.tfpo(), recipe)
    assert found["chosen"]["rewards"] == pytest.approx(smoothed, abs=1e-5)
    assert found["rejected"]["rewards"] == pytest.approx([-math.tanh(1.0)] * 2, abs=1e-5)
    sparse = arms.rewarded(pair(), plan.tfpo(theta=0.8), recipe)
    assert sparse["chosen"]["rewards"] == pytest.approx([0, 0, 0, smoothed[3]], abs=1e-5)
    assert sparse["rejected"]["rewards"] == [0, 0]
    even = arms.rewarded(pair(), plan.tfpo(spread="even"), recipe)["chosen"]["rewards"]
    assert even == pytest.approx([sum(smoothed) / 4] * 4, abs=1e-5)
    end = arms.rewarded(pair(), plan.tfpo(spread="end"), recipe)["chosen"]["rewards"]
    assert end == pytest.approx([0, 0, 0, sum(smoothed)], abs=1e-5)
    assert not arms.rewarded(pair(), plan.tfpo(ended=False), recipe)["rejected"]["ended"]


def test_without_subtb_the_hinge_alone_is_left_and_moves_no_log_probability() -> None:
    log_probs = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    log_values = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[11, 12, 13, 0], [14, 0, 0, 0]])
    data = {
        "rewards": torch.tensor([[0.9, 0, 0, 0], [-0.9, 0, 0, 0]]),
        "length": torch.tensor([4, 2]),
        "ended": torch.tensor([True, True]),
    }
    recipe = dataclasses.replace(Recipe(), tfpo=Tfpo(anchor="reference", gamma=100.0))
    loss, _ = arms.pair_loss(plan.tfpo(subtb=False), recipe, 1)(
        ModelOutputs(log_probs, log_values, log_probs.detach()), {**data, "token_ids": ids}
    )
    assert float(loss.detach()) == pytest.approx(100.0 - float((log_values[0, 1] - log_values[1, 1]).detach()))
    policy, values = torch.autograd.grad(loss, (log_probs, log_values))
    assert policy.abs().max() < 1e-12
    expected = torch.zeros(2, 5, dtype=torch.float64)
    expected[0, 1], expected[1, 1] = -1.0, 1.0
    assert torch.allclose(values, expected, atol=1e-12)


def test_the_best_setting_is_the_smaller_rate_among_equals() -> None:
    cells = {(1e-3, 0.0, "product 1"): 0.5, (1e-4, 0.0, "product 2"): 0.5, (1e-2, 0.0, "ratio 1"): 0.4}
    assert plan.chosen({"x": cells}) == {"x": (1e-4, 0.0, "product 2")}
    assert plan.way_of((1e-4, 0.0, "product 0.5")) == arms.Way("product", 0.5)


def test_a_setting_is_judged_over_all_tuning_seeds_and_never_by_the_oracles_own_choice() -> None:
    def rows(*worths: float) -> list[dict[str, Any]]:
        return [{"worth": {"kindness": w}} for w in worths]

    seeds = {
        100: {("ARGS", 1e-3, 0.0): {"arms": {"args 1": rows(1, 0), "oracle's best of 4": rows(1, 1)}}},
        101: {("ARGS", 1e-3, 0.0): {"arms": {"args 1": rows(0, 0), "oracle's best of 4": rows(1, 1)}}},
    }
    assert plan.grid(seeds) == {"ARGS": {(1e-3, 0.0, "args 1"): 0.25}}


def test_every_contestant_has_the_same_rates_weights_and_pairs() -> None:
    jobs = plan.tuning_jobs(ROOT, arms.World("w", 1, ()), plan.FULL)
    cells: dict[str, set[tuple[float, str]]] = {}
    for (name, rate, beta), job in jobs.items():
        for weight in {w.weight for w in job.arguments[-1]} if name in plan.DOCTORS else {beta}:
            cells.setdefault(name, set()).add((rate, weight))
    assert {len(cells[name]) for name in plan.DOCTORS} == {12}
    assert len(cells[plan.TUNED]) == 12 + len(plan.FULL.beyond)  # more for an opponent, never for a doctor
    assert len({job.folder for job in jobs.values()}) == len(jobs)


# ---- tables ----


def answer(prompt: int, worth: float, text: str = "") -> dict[str, Any]:
    return {"prompt": prompt, "sample": 0, "worth": {"kindness": worth}, "text": text}


def test_wins_count_half_a_tie_and_the_other_order_makes_up_the_rest() -> None:
    ours = [answer(0, 1), answer(0, 0), answer(1, -1)]
    theirs = [answer(0, 0), answer(0, 0), answer(1, 1)]
    assert tables.wins(ours, theirs).tolist() == [0.75, 0.0]
    assert (tables.wins(ours, theirs) + tables.wins(theirs, ours)).tolist() == [1.0, 1.0]


def test_the_hypervolume_of_two_steps_and_of_a_dominated_point() -> None:
    assert tables.hypervolume([(0.0, 0.0), (1.0, -0.5)], (-1.0, -1.0)) == pytest.approx(2 * 0.5 + 1 * 0.5)
    assert tables.hypervolume([(0.0, 0.0), (-0.5, -0.5)], (-1.0, -1.0)) == pytest.approx(1.0)
    assert tables.hypervolume([(-2.0, 3.0)], (-1.0, -1.0)) == 0.0


def test_half_of_a_gap_is_reached_between_two_places() -> None:
    places = np.array(arms.PLACES)
    assert tables.halfway(places.tolist()) == pytest.approx(0.5)
    assert tables.halfway((places**2).tolist()) == pytest.approx(math.sqrt(0.5), abs=1e-3)
    assert tables.halfway((-2 * places).tolist()) == pytest.approx(0.5)
    assert tables.halfway([1.0] * len(places)) == 0.0
    assert tables.halfway([0.0] * (len(places) - 1) + [3.0]) == pytest.approx(0.975)


def test_log_v_has_no_whole_gap_and_a_reward_models_value_has() -> None:
    found = {name: tables.is_log_value(name) for name in ("LLMdoctor, value", "LLMdoctor, flow", "reward model, value")}
    assert found == {"LLMdoctor, value": True, "LLMdoctor, flow": False, "reward model, value": False}


def test_a_signal_is_read_at_relative_positions_of_its_states() -> None:
    found = arms.at_places(np.array([0.0, 4.0, 2.0]))
    assert found[[0, 5, 10, 15, 20]].tolist() == [0.0, 2.0, 4.0, 3.0, 2.0]


def test_answers_that_differ_are_counted_in_pairs() -> None:
    assert tables.different(["a", "a", "b"]) == pytest.approx(2 / 3)


@pytest.mark.slow
def test_the_whole_benchmark_at_a_size_that_shows_nothing_resumes_to_the_same_table(tmp_path: Any) -> None:
    command = [str(ROOT / "benchmarks/llmdoctor_claims.py"), "--quick", "--seeds", "1", "--processes", "0"]
    command += ["--folder", str(tmp_path / "jobs"), "--out", str(tmp_path / "out")]
    tables_found = []
    for _ in range(2):
        done = run(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        tables_found.append((tmp_path / "out/llmdoctor_claims.md").read_text(encoding="utf-8"))
    assert tables_found[0] == tables_found[1]
    for heading in (
        "against each opponent",
        "Ablations",
        "Sweeps",
        "patients of several sizes",
        "Two objectives",
        "Tuning",
    ):
        assert heading in tables_found[0]
    for plot in ("front", "early", "kl"):
        assert (tmp_path / f"out/llmdoctor_{plot}.svg").read_text(encoding="utf-8").startswith("<svg")
