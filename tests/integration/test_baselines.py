"""The baselines of benchmarks/ against their papers' formulas by hand, and in training against the start model."""

import dataclasses
import importlib
import math
import random
import sys
from typing import Any

import pytest
import torch
from support.recipes import ROOT

from nemo_pivotrl.backends.reference.policy import ReferencePolicy
from nemo_pivotrl.config import Optimizer, Policy, Recipe
from nemo_pivotrl.demo import answer_styles as manners, tiny_models as tiny
from nemo_pivotrl.llmdoctor import train_doctor as tfpo

sys.path.append(str(ROOT / "benchmarks"))
ARMS, BASELINES, SPEED = map(importlib.import_module, ("llmdoctor_claims_arms", "llmdoctor_baselines", "tfpo_speed"))


def doubles(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_dpo_of_two_hand_computed_pairs() -> None:
    log_probs = doubles([-1.0, -2.0], [-3.0, 0.0], [-4.0, -1.0], [-1.0, -1.0]).requires_grad_()
    reference = doubles([-1.5, -3.5], [-2.0, 0.0], [-4.0, -1.0], [-1.0, -1.0])
    # the chosen answer gained 2, the rejected one lost 1: 0.5 * 3; the second pair did not move
    loss = BASELINES.dpo_loss(log_probs, reference, 0.5)
    assert float(loss.detach()) == pytest.approx(math.log(1 + math.exp(-1.5)) + math.log(2))
    (gradient,) = torch.autograd.grad(loss, log_probs)
    slope = 0.5 / (1 + math.exp(1.5))
    expected = [[-slope] * 2, [slope] * 2, [-0.25] * 2, [0.25] * 2]
    assert gradient.tolist() == [pytest.approx(row) for row in expected]


def test_the_autoregressive_reward_model_of_two_hand_computed_pairs() -> None:
    log_probs = doubles([-1.0, -2.0], [-3.0, -4.0], [-4.0, -1.0], [-1.0, 0.0]).requires_grad_()
    # rewards -3 against -7, and -5 against -1: the second pair is the wrong way round
    loss = BASELINES.arm_loss(log_probs, 0.25)
    assert float(loss.detach()) == pytest.approx(math.log(1 + math.exp(-1.0)) + math.log(1 + math.exp(1.0)))
    (gradient,) = torch.autograd.grad(loss, log_probs)
    low, high = 0.25 / (1 + math.exp(1.0)), 0.25 / (1 + math.exp(-1.0))
    expected = [[-low] * 2, [low] * 2, [-high] * 2, [high] * 2]
    assert gradient.tolist() == [pytest.approx(row) for row in expected]


def test_the_baselines_train_on_both_answers_of_a_pair_in_micro_batches(tmp_path: Any) -> None:
    tokenizer = tiny.make_tokenizer(["say something nice or something rude"] * 4, 300)
    tiny.save(tiny.make_model(tokenizer, 32, 1, 2, seed=1), tokenizer, tmp_path)

    def side(ids: list[int]) -> dict[str, Any]:
        return {"ids": ids, "rewards": [0.0] * len(ids), "ended": True}

    pairs = [
        {"prompt_ids": [5, 6, 7], "chosen": side([11, 12, 13, 0]), "rejected": side([11, 14, 0])},
        {"prompt_ids": [9, 10], "chosen": side([15, 0]), "rejected": side([16, 17, 18, 0])},
    ]
    recipe = Recipe()
    recipe = dataclasses.replace(recipe, tfpo=dataclasses.replace(recipe.tfpo, pairs_per_step=len(pairs)))
    for name in ("dpo", "arm", "reward"):
        loss_fn = ARMS.pair_loss(ARMS.Contestant(name, 0.1), recipe, len(pairs))
        policy = Policy(model_name=str(tmp_path), dtype="float64", train_micro_batch_tokens=12)
        backend = ReferencePolicy(policy, value_head=True, reference=name == "dpo")
        backend.prepare_for_training(Optimizer(lr=1e-3))
        losses = []
        for _ in range(4):
            backend.prepare_for_training_step()
            metrics = backend.get_loss_and_metrics(tfpo.batch_of(pairs), loss_fn, reference=name == "dpo")
            losses.append(metrics["loss"])
            backend.finish_training_step()
        assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 1e-3
        if name != "arm":  # nothing has moved yet, and the head is 0
            assert losses[0] == pytest.approx(math.log(2), abs=1e-6)


def test_well_formed_is_what_the_world_can_answer_about_the_thing_asked() -> None:
    rng = random.Random(0)
    for tone in manners.MANNERS:
        for size in ("short", "long"):
            for _ in range(20):
                asked, thing = manners.question(rng)
                text = manners.answer(thing, manners.Manner(tone, size), rng)
                assert BASELINES.well_formed(asked, text), text
                assert not BASELINES.well_formed(asked, text.replace(thing, "tea" if thing != "tea" else "soup"))
    mixed = "if you must , the lamp is lovely and dull , it is on the left , take care ."
    assert BASELINES.well_formed("how is the lamp", mixed)
    for wrong in ("", "lovely", "the lamp is lovely", "the lamp is lovely lovely .", mixed.replace(" , take care", "")):
        assert not BASELINES.well_formed("how is the lamp", wrong)


def test_an_ill_formed_answer_is_worth_the_least() -> None:
    assert BASELINES.worth("how is the lamp", "the lamp is lovely .", 1.0) == 1.0
    assert BASELINES.worth("how is the lamp", "the lamp is lovely .", -0.2) == -0.2
    assert BASELINES.worth("how is the lamp", "lamp lovely lovely", 1.0) == -1.0


def test_validation_and_test_prompts_do_not_meet() -> None:
    assert not {*manners.questions(0, "train")} & {*manners.questions(0, "test")}


def test_all_forms_of_the_speed_benchmark_are_the_same_loss() -> None:
    assert SPEED.agreement() < 1e-12
