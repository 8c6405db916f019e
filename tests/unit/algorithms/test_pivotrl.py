"""The PivotRL paper's mathematics against slow float64 formulas, hand-computed cases and wrong variants."""

import itertools
import math

import pytest
import torch

from nemo_pivotrl.algorithms import selection
from nemo_pivotrl.algorithms.pivotrl import group_advantages, grpo_loss, kl_k3
from nemo_pivotrl.algorithms.selection import keep_pivot, statistics
from nemo_pivotrl.config import LossFn
from nemo_pivotrl.core.types import Action, Candidate, Profile, ToolCall

PLAIN = LossFn()


def outcomes(successes: int, count: int) -> list[float]:
    return [1.0] * successes + [0.0] * (count - successes)


# ---- selection ----


@pytest.mark.parametrize(("count", "low", "high"), [(4, 1, 2), (8, 1, 4), (16, 1, 9), (32, 1, 19), (64, 1, 38)])
def test_adv_at_lambda_0_6_keeps_exactly_the_success_counts_of_the_page(count: int, low: int, high: int) -> None:
    kept = [k for k in range(count + 1) if keep_pivot(statistics(outcomes(k, count)), "adv", 0.6)]
    assert kept == list(range(low, high + 1))


@pytest.mark.parametrize(
    ("p", "k4", "k8", "k16"),
    [(0.01, 0.04, 0.08, 0.15), (0.1, 0.34, 0.57, 0.81), (0.5, 0.63, 0.63, 0.77), (0.9, 0.05, 0.01, 0.00)],
)
def test_chance_of_being_kept_equals_the_binomial_table(p: float, k4: float, k8: float, k16: float) -> None:
    for count, expected in ((4, k4), (8, k8), (16, k16)):
        chance = sum(
            math.comb(count, k) * p**k * (1 - p) ** (count - k)
            for k in range(count + 1)
            if keep_pivot(statistics(outcomes(k, count)), "adv", 0.6)
        )
        assert chance == pytest.approx(expected, abs=0.0051)


def test_the_bound_is_decided_on_integers_where_floats_would_round() -> None:
    # 0.3 * 10 is 3.0000000000000004 in floats: k = 3 is not below lambda = 0.3, and is with `inclusive`
    assert not keep_pivot(statistics(outcomes(3, 10)), "adv", 0.3)
    assert keep_pivot(statistics(outcomes(3, 10)), "adv", 0.3, inclusive=True)
    assert keep_pivot(statistics(outcomes(2, 10)), "adv", 0.3)


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        ("all", [0, 1, 2, 3, 4]),
        ("random", [0, 1, 2, 3, 4]),
        ("mixed", [1, 2, 3]),
        ("adv", [1, 2]),
        ("adv_with_zeros", [0, 1, 2]),
    ],
)
def test_each_rule_keeps_its_own_success_counts_at_k_4(rule: str, kept: list[int]) -> None:
    assert [k for k in range(5) if keep_pivot(statistics(outcomes(k, 4)), rule, 0.6)] == kept


def test_all_equal_is_never_mixed_whatever_lambda() -> None:
    for k, lam in itertools.product((0, 8), (0.1, 0.6, 1.0)):
        assert not keep_pivot(statistics(outcomes(k, 8)), "adv", lam)
        assert not keep_pivot(statistics(outcomes(k, 8)), "mixed", lam)


def test_non_binary_rewards_use_variance_and_mean_so_a_constant_half_is_dropped() -> None:
    assert not keep_pivot(statistics([0.5] * 8), "adv", 0.6)
    assert keep_pivot(statistics([0.5] * 7 + [0.4]), "adv", 0.6)
    assert not keep_pivot(statistics([0.7] * 7 + [0.8]), "adv", 0.6)


def test_statistics_refuse_no_rollouts_and_impossible_rewards() -> None:
    for bad in ([], [1.5], [float("nan")]):
        with pytest.raises(ValueError):
            statistics(bad)


def profile(name: str, rewards: list[float], kind: str = "calls", failure: str | None = None) -> Profile:
    expected = Action("message", "hello") if kind == "message" else Action("calls", calls=(ToolCall("f", "{}"),))
    state = ({"role": "user", "content": "q"},)
    candidate = Candidate(name, "t-" + name, "task-" + name, "train", 1, 0, state, (), expected)
    return Profile(candidate, tuple({"reward": r} for r in rewards), 1, 1, failure)


def names(profiles: list[Profile]) -> list[str]:
    return [p.candidate.candidate_id for p in profiles]


def test_a_failed_candidate_is_never_selected_not_even_by_adv_with_zeros() -> None:
    profiles = [profile("a", outcomes(1, 4)), profile("failed", [], failure="judge"), profile("zero", outcomes(0, 4))]
    assert names(selection.select(profiles, "adv_with_zeros", 0.6, 0)) == ["a", "zero"]
    assert "failed" not in names(selection.select(profiles, "random", 0.6, 0, limit=3))


def test_random_without_a_limit_is_as_large_as_adv_and_does_not_look_at_rewards() -> None:
    profiles = [profile(str(i), outcomes(i % 5, 4)) for i in range(50)]
    flipped = [profile(str(i), outcomes(4 - i % 5, 4)) for i in range(50)]
    drawn = selection.select(profiles, "random", 0.6, seed=3)
    assert len(drawn) == len(selection.select(profiles, "adv", 0.6, seed=3)) == 20
    assert names(drawn) == names(selection.select(flipped, "random", 0.6, seed=3, limit=20))


def test_another_seed_is_another_subset_and_smaller_subsets_are_nested() -> None:
    profiles = [profile(f"c{i}", [1.0, 0.0, 0.0, 0.0]) for i in range(40)]
    drawn = {
        (seed, n): set(names(selection.select(profiles, "adv", 0.6, seed, limit=n))) for seed in (1, 2) for n in (8, 20)
    }
    assert drawn[1, 8] < drawn[1, 20] and drawn[2, 8] < drawn[2, 20]
    assert drawn[1, 20] != drawn[2, 20] and drawn[1, 8] != drawn[2, 8]


def test_max_message_ratio_bounds_talking_turns_and_only_them() -> None:
    profiles = [profile(f"m{i}", outcomes(1, 4), "message") for i in range(6)] + [
        profile(f"c{i}", outcomes(1, 4)) for i in range(6)
    ]
    kept = names(selection.select(profiles, "adv", 0.6, 0, max_message_ratio=0.25))
    assert [n for n in kept if n[0] == "c"] == [f"c{i}" for i in range(6)]
    assert sum(n[0] == "m" for n in kept) == 2  # 2 of 8 is a quarter, 3 of 9 would be a third


# ---- advantages ----


def advantages(rewards: list[float], **settings: object) -> list[float]:
    row = torch.tensor([rewards], dtype=torch.float64)
    return group_advantages(row, torch.ones_like(row, dtype=torch.bool), **settings)[0].tolist()


@pytest.mark.parametrize(
    ("k", "success", "failure"),
    [
        (1, 3.75, -0.250),
        (2, 2.56, -0.366),
        (4, 1.68, -0.559),
        (8, 0.968, -0.968),
        (14, 0.366, -2.56),
        (15, 0.250, -3.75),
    ],
)
def test_group_mean_and_sample_std_give_the_table_of_the_page(k: int, success: float, failure: float) -> None:
    found = advantages(outcomes(k, 16))
    assert found[0] == pytest.approx(success, abs=0.006) and found[-1] == pytest.approx(failure, abs=0.006)
    assert sum(found) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    ("k", "success", "failure"),
    [(1, 1.00, -0.258), (2, 3.61, -0.379), (4, 1.93, -0.583), (8, 1.03, -1.03), (14, 0.379, -3.61), (15, 0.258, -1.00)],
)
def test_leave_one_out_reproduces_nemo_rl(k: int, success: float, failure: float) -> None:
    found = advantages(outcomes(k, 16), leave_one_out=True)
    assert found[0] == pytest.approx(success, abs=0.006) and found[-1] == pytest.approx(failure, abs=0.006)


def test_leave_one_out_does_not_explode_on_rounding_residue_and_g_2_is_not_scaled() -> None:
    row = torch.tensor([[0.0] + [0.95] * 7], dtype=torch.float32)
    found = group_advantages(row, torch.ones_like(row, dtype=torch.bool), leave_one_out=True)
    assert found.abs().max() < 4  # NeMo-RL's fp32 path gives -2075 here
    assert advantages([1.0, 0.0], leave_one_out=True) == [1.0, -1.0]


def test_leave_one_out_equals_the_slow_definition_on_random_rewards() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(5, 6, generator=generator, dtype=torch.float64)
    found = group_advantages(rewards, torch.ones_like(rewards, dtype=torch.bool), leave_one_out=True)
    for p, g in itertools.product(range(5), range(6)):
        others = torch.cat([rewards[p, :g], rewards[p, g + 1 :]])
        assert found[p, g] == pytest.approx(float((rewards[p, g] - others.mean()) / (others.std() + 1e-6)), rel=1e-9)


@pytest.mark.parametrize("rewards", [[0.0] * 8, [1.0] * 8, [0.7] * 8, [0.1 + 0.2] * 4 + [0.3] * 4])
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_a_group_without_spread_has_advantages_of_exactly_zero(rewards: list[float], leave_one_out: bool) -> None:
    assert advantages(rewards, leave_one_out=leave_one_out) == [0.0] * 8


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_invalid_samples_do_not_vote_and_get_nothing(leave_one_out: bool) -> None:
    row = torch.tensor([[1.0, 0.0, 0.0, 1.0, 1.0]], dtype=torch.float64)
    valid = torch.tensor([[True, True, True, False, False]])
    found = group_advantages(row, valid, leave_one_out=leave_one_out)[0]
    assert found[:3].tolist() == pytest.approx(advantages([1.0, 0.0, 0.0], leave_one_out=leave_one_out))
    assert found[3:].tolist() == [0.0, 0.0]
    alone = group_advantages(row, torch.tensor([[True, False, False, False, False]]), leave_one_out=leave_one_out)
    assert alone.tolist() == [[0.0] * 5]


def test_advantage_clip_and_no_normalisation() -> None:
    assert advantages(outcomes(1, 16), clip=2.0)[0] == 2.0
    assert advantages([1.0, 0.0, 0.0, 0.0], normalize=False) == [0.75, -0.25, -0.25, -0.25]


# ---- loss ----


def slow_loss(lp, old, adv, mask, normaliser, s: LossFn, ref=None, sampler=None) -> float:  # type: ignore[no-untyped-def]
    """Equation (15) token by token in Python floats."""
    total = 0.0
    for n in range(len(lp)):
        tokens = [t for t in range(len(lp[n])) if mask[n][t]]
        for t in tokens:
            if s.ratio_level == "sequence":
                w = math.exp(sum(lp[n][j] - old[n][j] for j in tokens) / len(tokens))
            else:
                w = math.exp(lp[n][t] - old[n][t])
            gain = min(w * adv[n], min(max(w, 1 - s.ratio_clip_min), 1 + s.ratio_clip_max) * adv[n])
            if s.ratio_clip_c is not None and adv[n] < 0:
                gain = max(gain, s.ratio_clip_c * adv[n])
            value = -gain
            if s.use_importance_sampling_correction:
                low, high = s.truncated_importance_sampling_ratio_min, s.truncated_importance_sampling_ratio
                value *= min(max(math.exp(old[n][t] - sampler[n][t]), low), high)
            if s.reference_policy_kl_penalty > 0:
                d = ref[n][t] - lp[n][t]
                value += s.reference_policy_kl_penalty * (math.exp(d) - d - 1)
            total += value / (1 if s.token_level_loss else len(tokens))
    return total / normaliser


def random_batch(seed: int = 0):  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(seed)
    lp, old, ref, sampler = (-2 * torch.rand(4, 5, generator=generator, dtype=torch.float64) for _ in range(4))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0]], dtype=torch.float64)
    adv = torch.tensor([1.5, -0.7, 2.0, -1.1], dtype=torch.float64)
    return lp, old, ref, sampler, adv, mask


SETTINGS = [
    PLAIN,
    LossFn(ratio_clip_max=0.28),
    LossFn(ratio_clip_c=1.5),
    LossFn(ratio_level="sequence"),
    LossFn(token_level_loss=False),
    LossFn(reference_policy_kl_penalty=0.1),
    LossFn(
        use_importance_sampling_correction=True,
        truncated_importance_sampling_ratio=1.3,
        truncated_importance_sampling_ratio_min=0.8,
    ),
    LossFn(
        ratio_clip_min=0.1,
        ratio_clip_max=0.3,
        ratio_clip_c=2.0,
        ratio_level="sequence",
        token_level_loss=False,
        reference_policy_kl_penalty=0.05,
        use_importance_sampling_correction=True,
        truncated_importance_sampling_ratio=1.2,
        truncated_importance_sampling_ratio_min=0.5,
    ),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_loss_equals_the_token_by_token_formula_and_its_gradient_is_right(settings: LossFn) -> None:
    lp, old, ref, sampler, adv, mask = random_batch()
    normaliser = float(mask.sum()) if settings.token_level_loss else 4.0
    loss, metrics = grpo_loss(lp, old, adv, mask, normaliser, settings, ref, sampler)
    expected = slow_loss(
        *(x.tolist() for x in (lp, old, adv, mask)), normaliser, settings, ref.tolist(), sampler.tolist()
    )
    assert float(loss) == pytest.approx(expected, rel=1e-12) and float(metrics["loss"]) == float(loss)
    assert torch.autograd.gradcheck(
        lambda x: grpo_loss(x, old, adv, mask, normaliser, settings, ref, sampler)[0],
        lp.clone().requires_grad_(),
        eps=1e-7,
    )


@pytest.mark.parametrize("settings", SETTINGS)
def test_micro_batches_add_up_to_the_batch(settings: LossFn) -> None:
    lp, old, ref, sampler, adv, mask = random_batch(1)
    whole = grpo_loss(lp, old, adv, mask, 12.0, settings, ref, sampler)[1]
    parts = [
        grpo_loss(
            lp[i : i + 2],
            old[i : i + 2],
            adv[i : i + 2],
            mask[i : i + 2],
            12.0,
            settings,
            ref[i : i + 2],
            sampler[i : i + 2],
        )[1]
        for i in (0, 2)
    ]
    for key in whole:
        assert float(whole[key]) == pytest.approx(float(parts[0][key] + parts[1][key]), rel=1e-12)


def test_hand_computed_clipping_in_all_four_corners() -> None:
    # ratio 1.5 and 0.5 with advantage +1 and -1, clip 0.2: the pessimistic side is 1.2, 1.5, 0.5, 0.8
    lp = torch.log(torch.tensor([[1.5], [1.5], [0.5], [0.5]], dtype=torch.float64))
    adv = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    one = torch.ones(4, 1, dtype=torch.float64)
    loss, metrics = grpo_loss(lp, torch.zeros_like(lp), adv, one, 4.0, PLAIN)
    assert float(loss) == pytest.approx(-(1.2 - 1.5 + 0.5 - 0.8) / 4)
    assert float(metrics["clip_share"]) == 0.5
    dual = grpo_loss(lp, torch.zeros_like(lp), adv, one, 4.0, LossFn(ratio_clip_c=1.25))[0]
    assert float(dual) == pytest.approx(-(1.2 - 1.25 + 0.5 - 0.8) / 4)


def test_on_policy_gradient_is_minus_advantage_over_the_global_count() -> None:
    lp = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    grpo_loss(lp, lp.detach(), torch.tensor([2.0, -1.0]).double(), mask, 8.0, PLAIN)[0].backward()
    assert lp.grad.tolist() == [[-0.25, -0.25, -0.25], [0.125, 0.0, 0.0]]


def test_prop_3_1_a_zero_variance_group_has_a_gradient_of_exactly_zero() -> None:
    rewards = torch.tensor([[1.0] * 4, [0.0] * 4])
    adv = group_advantages(rewards, torch.ones_like(rewards, dtype=torch.bool)).flatten()
    lp = torch.randn(8, 3, requires_grad=True)
    grpo_loss(lp, lp.detach() - 0.3, adv, torch.ones(8, 3), 24.0, PLAIN)[0].backward()
    assert torch.count_nonzero(lp.grad) == 0


def test_only_masked_in_tokens_carry_loss_and_an_empty_mask_is_a_connected_zero() -> None:
    lp, old, ref, sampler, adv, mask = random_batch(2)
    settings = SETTINGS[-1]
    x = lp.clone().requires_grad_()
    grpo_loss(x, old, adv, mask, 4.0, settings, ref, sampler)[0].backward()
    assert torch.count_nonzero(x.grad[mask == 0]) == 0 and torch.count_nonzero(x.grad[mask == 1]) > 0
    y = lp.clone().requires_grad_()
    loss = grpo_loss(y, old, adv, torch.zeros_like(mask), 4.0, settings, ref, sampler)[0]
    loss.backward()
    assert float(loss.detach()) == 0.0 and torch.count_nonzero(y.grad) == 0


def test_wrong_variants_differ_from_the_loss() -> None:
    """The slow formula would notice: a flipped sign, clipping that helps, a KL in the other direction, a local count."""
    lp, old, ref, _, adv, mask = random_batch(3)
    settings = LossFn(reference_policy_kl_penalty=0.1)
    right = float(grpo_loss(lp, old, adv, mask, 12.0, settings, ref)[0])
    ratio = (lp - old).exp()
    optimistic = -(torch.maximum(ratio * adv[:, None], ratio.clamp(0.8, 1.2) * adv[:, None]) * mask).sum() / 12
    reverse_kl = 0.1 * (kl_k3(ref, lp) * mask).sum() / 12
    pessimistic = right - 0.1 * float((kl_k3(lp, ref) * mask).sum() / 12)
    for wrong in (-right, float(optimistic) + right - pessimistic, pessimistic + float(reverse_kl), right * 12 / 11):
        assert abs(wrong - right) > 1e-3


def test_k3_is_zero_at_equality_positive_elsewhere_and_unbiased() -> None:
    p, q = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4]], dtype=torch.float64)
    assert float((p * kl_k3(p.log(), q.log())).sum()) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-12)
    assert float(kl_k3(p.log(), p.log()).abs().max()) == 0.0
    assert bool((kl_k3(p.log(), q.log()) > 0).all())
    assert bool(torch.isfinite(kl_k3(torch.tensor([-200.0]), torch.tensor([0.0]))).all())


def test_kl_and_truncated_weights_demand_their_inputs() -> None:
    lp, old, _, _, adv, mask = random_batch()
    for settings in (SETTINGS[5], SETTINGS[6]):
        with pytest.raises(ValueError):
            grpo_loss(lp, old, adv, mask, 1.0, settings)


# ---- the theorems, in the tabular case ----


def test_theorem_3_3_training_with_kl_keeps_conditionals_inside_and_outside_the_accepted_set() -> None:
    """Exact gradient ascent on E[r] - beta KL over a softmax policy of five actions, two of them acceptable."""
    start = torch.tensor([0.35, 0.05, 0.3, 0.2, 0.1], dtype=torch.float64)
    accepted = torch.tensor([False, True, False, True, False])
    reward, beta = accepted.double(), 0.5
    logits = start.log().clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-14, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        policy = logits.softmax(0)
        loss = -(policy * reward).sum() + beta * (policy * (policy / start).log()).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    policy = logits.detach().softmax(0)
    p0 = float(start[accepted].sum())
    mass = p0 * math.exp(1 / beta) / (1 - p0 + p0 * math.exp(1 / beta))
    assert float(policy[accepted].sum()) == pytest.approx(mass, abs=1e-7)
    for inside in (accepted, ~accepted):
        assert (policy[inside] / policy[inside].sum()).tolist() == pytest.approx(
            (start[inside] / start[inside].sum()).tolist(), abs=1e-6
        )


def test_theorem_3_2_the_natural_gradient_norm_is_the_std_not_the_variance() -> None:
    policy, reward = (
        torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64),
        torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64),
    )
    fisher = torch.diag(policy) - torch.outer(policy, policy)  # of a softmax policy in its logits
    gradient = policy * (reward - (policy * reward).sum())
    norm = math.sqrt(float(gradient @ torch.linalg.pinv(fisher) @ gradient))
    assert norm == pytest.approx(math.sqrt(0.25)) and norm != pytest.approx(0.25)


# ---- the duplicate-seed detector ----


def test_identical_improbable_samples_are_suspicious_and_confident_ones_are_not() -> None:
    shared_seed = [((1, 2, 3), -4.0)] * 8
    confident = [((1,), -0.001)] * 8
    honest = [((1,), -1.0), ((2,), -1.0), ((1,), -1.0)]
    assert selection.identical_groups([shared_seed, confident, honest, shared_seed]) == [0, 3]
