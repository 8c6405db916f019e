"""The LLMdoctor paper's mathematics against slow float64 formulas, hand-computed cases and wrong variants."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from nemo_pivotrl.algorithms import llmdoctor
from nemo_pivotrl.algorithms.llmdoctor import (
    FlowStatistics,
    Layout,
    flow_statistics,
    guided_logits,
    merge_flow,
    mix_logits,
    plan,
    subtb,
    tfpo_loss,
    token_rewards,
)
from nemo_pivotrl.config import TfpoLoss

PLAIN = TfpoLoss(kappa=1.0)
CHANGES: list[dict[str, object]] = [
    {},
    {"reduction": "sum"},
    {"decay": 0.5},
    {"decay": 0.9, "reduction": "sum"},
    {"decay": 0.99, "anchor": "reference"},
    {"anchor": "reference", "kappa": 2.5},
    {"length_normalize": True, "value_weight": 0.3},
    {"value_pairs": "position", "gamma": 1.5},
    {"linear_margin": True, "gamma": 0.7},
    {"value_pairs": "position", "linear_margin": True, "decay": 0.7, "gamma": 2.0},
]
SETTINGS = [dataclasses.replace(PLAIN, **change) for change in CHANGES]  # type: ignore[arg-type]


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def doubles(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# ---- stage 1: token rewards ----


def rewards_of(positive: Tensor, negative: Tensor, mask: Tensor, chosen: list[bool], tau=1.0, theta=0.5, eps=1e-6):  # type: ignore[no-untyped-def]
    return token_rewards(positive, negative, mask, torch.tensor(chosen), tau, theta, eps)


def test_rewards_of_a_hand_computed_table() -> None:
    # Delta 1, 0, 3 and (two tokens only) 2, 2; means 4/3 and 2
    positive = doubles([-1.0, -2.0, -4.0], [-3.0, -1.0, -9.0])
    negative = doubles([-2.0, -2.0, -1.0], [-1.0, -3.0, -1.0])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    found = rewards_of(positive, negative, mask, [True, False], eps=1e-300)
    assert found.importance.tolist() == [[1.0, 0.0, 3.0], [2.0, 2.0, 0.0]]
    s = [math.tanh(0.75), math.tanh(2.25), math.tanh(1.0)]
    assert found.smoothed.tolist() == [pytest.approx([s[0], 0.0, s[1]]), pytest.approx([s[2], s[2], 0.0])]
    assert found.rewards.tolist() == [pytest.approx([s[0], 0.0, s[1]]), pytest.approx([-s[2], -s[2], 0.0])]
    sparse = rewards_of(positive, negative, mask, [True, False], tau=2.0, theta=0.5, eps=1e-300)
    assert sparse.rewards.tolist() == [pytest.approx([0.0, 0.0, math.tanh(1.125)]), [0.0, 0.0, 0.0]]


def slow_rewards(
    positive: list[float], negative: list[float], sign: int, tau: float, theta: float, eps: float
) -> list[float]:
    """One answer without padding, equations (21) to (23) line by line."""
    delta = [abs(p - n) for p, n in zip(positive, negative, strict=True)]
    mean = sum(delta) / len(delta)
    smoothed = [math.tanh(d / (mean + eps) / tau) for d in delta]
    return [sign * s if s > theta else 0.0 for s in smoothed]


@pytest.mark.parametrize(("tau", "theta", "eps"), [(1.0, 0.5, 1e-6), (0.5, 0.1, 1e-3), (2.0, 0.0, 1.0)])
def test_rewards_equal_the_slow_definition_and_nothing_outside_the_mask_matters(
    tau: float, theta: float, eps: float
) -> None:
    positive, negative = (-3 * torch.rand(4, 6, generator=rng(i), dtype=torch.float64) for i in (0, 1))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 0, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0]]).bool()
    chosen = [True, False, True, False]
    found = rewards_of(positive, negative, mask, chosen, tau, theta, eps)
    for n in range(3):
        expected = slow_rewards(
            positive[n, mask[n]].tolist(), negative[n, mask[n]].tolist(), 1 if chosen[n] else -1, tau, theta, eps
        )
        assert found.rewards[n, mask[n]].tolist() == pytest.approx(expected, rel=1e-12)
        padded_mean = (positive - negative)[n].abs().mean()  # the wrong variant: padding votes in the mean
        if not mask[n].all():
            wrong = torch.tanh((positive - negative)[n].abs() / (padded_mean + eps) / tau)[mask[n]]
            assert (wrong - found.smoothed[n, mask[n]]).abs().max() > 1e-3
    junk = torch.full_like(positive, math.nan)
    again = rewards_of(
        torch.where(mask, positive, junk), torch.where(mask, negative, -junk), mask, chosen, tau, theta, eps
    )
    for a, b in zip(found, again, strict=True):
        assert torch.equal(a, b) and torch.count_nonzero(a[~mask]) == 0


def test_identical_faces_give_exactly_nothing_even_without_a_threshold() -> None:
    same = -torch.rand(2, 4, generator=rng(0))
    found = rewards_of(same, same, torch.ones(2, 4, dtype=torch.bool), [True, False], theta=0.0)
    assert torch.count_nonzero(found.rewards) == 0 and bool(found.smoothed.isfinite().all())


def test_the_label_alone_gives_the_sign() -> None:
    positive, negative = -torch.rand(1, 5, generator=rng(0)), -torch.rand(1, 5, generator=rng(1))
    mask = torch.ones(1, 5, dtype=torch.bool)
    chosen = rewards_of(positive, negative, mask, [True]).rewards
    assert torch.count_nonzero(chosen) > 0 and bool((chosen >= 0).all())
    assert torch.equal(rewards_of(positive, negative, mask, [False]).rewards, -chosen)
    assert torch.equal(rewards_of(negative, positive, mask, [True]).rewards, chosen)


def test_the_threshold_is_strict() -> None:
    positive, negative = torch.zeros(1, 2, dtype=torch.float64), doubles([-1.0, -3.0])
    mask = torch.ones(1, 2, dtype=torch.bool)
    bound = float(rewards_of(positive, negative, mask, [True]).smoothed[0, 0])
    assert torch.count_nonzero(rewards_of(positive, negative, mask, [True], theta=bound).rewards) == 1
    below = math.nextafter(bound, 0)
    assert torch.count_nonzero(rewards_of(positive, negative, mask, [True], theta=below).rewards) == 2


@pytest.mark.parametrize(("theta", "bound"), [(0.1, 0.10), (0.5, 0.55), (0.7, 0.87), (0.762, 1.0), (0.9, 1.47)])
def test_theta_keeps_tokens_above_the_multiple_of_the_mean_that_the_page_lists(theta: float, bound: float) -> None:
    importance = torch.empty(1, 50_000, dtype=torch.float64).exponential_(generator=rng(0))
    mask = torch.ones_like(importance, dtype=torch.bool)
    found = rewards_of(-importance, torch.zeros_like(importance), mask, [True], theta=theta)
    kept = found.rewards[0] != 0
    assert float(importance[0, kept].min() / importance.mean()) == pytest.approx(bound, abs=0.006)
    assert float(kept.double().mean()) == pytest.approx(math.exp(-math.atanh(theta)), abs=0.006)  # 90 % at theta 0.1


def test_rewards_hide_how_far_the_faces_lie_apart_and_a_single_token_always_gets_tanh_1() -> None:
    positive, mask = -torch.rand(1, 6, generator=rng(0), dtype=torch.float64), torch.ones(1, 6, dtype=torch.bool)
    near, far = (rewards_of(positive * k, 0 * positive, mask, [True], eps=1e-12) for k in (1e-3, 10.0))
    assert torch.allclose(near.rewards, far.rewards, atol=1e-8)
    assert float(far.importance.sum() / near.importance.sum()) == pytest.approx(1e4)
    for gap in (0.1, 7.0):
        single = rewards_of(doubles([-gap]), doubles([0.0]), mask[:, :1], [True])
        assert float(single.rewards) == pytest.approx(math.tanh(1.0), abs=1e-4)


def test_a_log_probability_that_is_not_finite_is_refused_with_its_place() -> None:
    mask = torch.tensor([[True, True], [True, False]])
    positive = torch.tensor([[-1.0, -1.0], [-math.inf, math.nan]])
    with pytest.raises(ValueError, match="answer 1, token 0"):
        rewards_of(positive, torch.zeros(2, 2), mask, [True, False])


@pytest.mark.parametrize("change", [{"tau": 0.0}, {"theta": 1.0}, {"theta": -0.1}, {"eps": 0.0}])
def test_impossible_reward_settings_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="tau"):
        rewards_of(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1).bool(), [True], **change)


def test_half_precision_log_probabilities_are_subtracted_in_fp32() -> None:
    positive, negative = torch.tensor([[-300.0, -2.0]]).half(), torch.tensor([[-1.125, -2.25]]).half()
    found = rewards_of(positive, negative, torch.ones(1, 2).bool(), [True])
    assert found.importance.dtype == torch.float32
    assert found.importance.tolist() == [[298.875, 0.25]] and float(positive[0, 0] - negative[0, 0]) == -299.0


# ---- stage 2: a slow TFPO ----


@dataclasses.dataclass
class Batch:
    log_probs: Tensor
    log_values: Tensor
    reference: Tensor
    ids: Tensor
    rewards: Tensor
    mask: Tensor
    ended: Tensor
    pairs: Tensor

    def layout(self, settings: TfpoLoss) -> Layout:
        return plan(self.ids, self.rewards, self.mask, self.ended, self.pairs, settings)

    def loss(self, settings: TfpoLoss, normaliser: float = 2.0) -> tuple[Tensor, dict[str, Tensor]]:
        return tfpo_loss(self.log_probs, self.log_values, self.layout(settings), normaliser, settings, self.reference)


def batch(seed: int = 0, mask: list[list[int]] | None = None) -> Batch:
    """Two pairs, (0, 2) and (3, 1), of ragged answers; the pairs part at their third and first token."""
    right = [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]]
    kept = torch.tensor(mask or right).bool()
    g = rng(seed)
    log_probs, reference = (-3 * torch.rand(4, 6, generator=g, dtype=torch.float64) for _ in range(2))
    log_values = 2 * torch.randn(4, 7, generator=g, dtype=torch.float64)
    rewards = torch.rand(4, 6, generator=g, dtype=torch.float64)
    rewards = torch.where(rewards < 0.2, 0.0, rewards) * torch.tensor([1, -1, -1, 1])[:, None]
    answers = torch.tensor([[5, 6, 7, 8, 9, 2], [1, 6, 2, 0, 0, 0], [5, 6, 4, 8, 0, 0], [3, 6, 7, 7, 2, 0]])
    ids = torch.full((4, 6), 99)
    for row in range(4):  # the k-th kept place holds the k-th token, wherever the places are
        ids[row, kept[row]] = answers[row, : int(kept[row].sum())]
    ended = torch.tensor([True, True, False, True])
    return Batch(log_probs, log_values, reference, ids, rewards, kept, ended, torch.tensor([[0, 2], [3, 1]]))


def slow_subtb(c: Callable[[int, int], Tensor], length: int, s: TfpoLoss, skip_start: bool = False) -> Tensor:
    """Every sub-trajectory of one answer; c(m, n) is its residual."""
    terms, weights = [], []
    for m, n in itertools.combinations(range(length + 1), 2):
        if not (skip_start and m == 0):
            terms.append(s.decay ** (n - m) * c(m, n) ** 2)
            weights.append(s.decay ** (n - m))
    total = torch.stack(terms).sum()
    return total / sum(weights) if s.reduction == "pair_mean" else total


def slow_tfpo(b: Batch, s: TfpoLoss, normaliser: float, wrong: str = "") -> Tensor:
    """Equation (32) pair by pair. `wrong` names a variant that somebody published or could write."""
    columns = [row.nonzero()[:, 0].tolist() for row in b.mask]
    values, flows = [], []
    for row, places in enumerate(columns):
        v = [b.log_values[row, places[0]]] + [b.log_values[row, t + 1] for t in places]
        if b.ended[row] and wrong != "unpinned":
            v[-1] = torch.zeros((), dtype=torch.float64)
        values.append(v)
        q = [0.0]
        for t in places:
            q.append(q[-1] + s.kappa * float(b.rewards[row, t]) / (len(places) if s.length_normalize else 1))
        flows.append(q)
    if wrong != "unshared":
        for w, r in b.pairs.tolist():
            values[w][0] = values[r][0] = (values[w][0] + values[r][0]) / 2
    if wrong == "late values":  # read one state too late
        values = [[*v[1:], v[-1]] for v in values]
    if wrong == "late Q":  # Q(s_t) without the token that s_t ends in
        flows = [[0.0, *q[:-1]] for q in flows]
    total = torch.zeros((), dtype=torch.float64)
    for row in b.pairs.flatten().tolist():

        def residual(m: int, n: int, row: int = row) -> Tensor:
            path = b.log_probs[row] - b.reference[row] if s.anchor == "reference" else b.log_probs[row]
            taken = sum(path[t] for t in columns[row][m:n])
            q = flows[row][n] - flows[row][m]
            v = values[row][n] - values[row][m]
            if wrong == "clamped Q":
                q = math.log(max(flows[row][n], 1e-8)) - math.log(max(flows[row][m], 1e-8))
            signs = {"draft sign": (-1, 1), "reciprocal flow": (-1, -1)}.get(wrong, (1, 1))
            return signs[0] * q + signs[1] * v - (-taken if wrong == "sign of log pi" else taken)

        total = total + slow_subtb(residual, len(columns[row]), s, wrong == "skip s_0") / (2 * normaliser)
    for w, r in b.pairs.tolist():
        pairs = list(zip(columns[w], columns[r], strict=False))
        differs = [k for k, (a, c) in enumerate(pairs) if b.ids[w, a] != b.ids[r, c]]
        at = []
        if differs and s.value_pairs == "divergence":
            a, c = pairs[differs[0]]
            at = differs[:1] if b.rewards[w, a] > b.rewards[r, c] else []
        elif differs:
            at = [
                k
                for k in range(0 if wrong == "positions before the parting" else differs[0], len(pairs))
                if b.rewards[w, pairs[k][0]] > 0 > b.rewards[r, pairs[k][1]]
            ]
        shape = (lambda x: x.exp()) if s.linear_margin else (lambda x: x)
        step = 0 if wrong == "hinge before the token" else 1
        for k in at:
            gap = shape(values[w][k + step]) - shape(values[r][k + step])
            gap = -gap if wrong == "hinge sign" else gap
            total = total + s.value_weight * (s.gamma - gap).clamp(min=0) / len(at) / normaliser
    return total


def leaves(b: Batch) -> Batch:
    return dataclasses.replace(
        b, log_probs=b.log_probs.clone().requires_grad_(), log_values=b.log_values.clone().requires_grad_()
    )


def gradients(b: Batch, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [b.log_probs, b.log_values]))


LEFT = [[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]]
HOLES = [[1, 1, 1, 1, 1, 1], [1, 0, 0, 1, 1, 0], [0, 1, 1, 0, 1, 1], [0, 1, 0, 1, 0, 1]]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("mask", [None, LEFT, HOLES])
def test_loss_and_gradient_equal_the_slow_formula(settings: TfpoLoss, mask: list[list[int]] | None) -> None:
    b = leaves(batch(1, mask))
    loss, metrics = b.loss(settings)
    expected = slow_tfpo(b, settings, 2.0)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    assert float(metrics["loss"]) == float(loss.detach())
    for found, right in zip(gradients(b, loss), gradients(b, expected), strict=True):
        assert (found - right).abs().max() < 1e-10 * max(1.0, float(right.abs().max()))


@pytest.mark.parametrize("settings", SETTINGS)
def test_gradcheck(settings: TfpoLoss) -> None:
    b = leaves(batch(2))

    def loss(log_probs: Tensor, log_values: Tensor) -> Tensor:
        return dataclasses.replace(b, log_probs=log_probs, log_values=log_values).loss(settings)[0]

    assert torch.autograd.gradcheck(loss, (b.log_probs, b.log_values), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        "draft sign",
        "reciprocal flow",
        "sign of log pi",
        "clamped Q",
        "unpinned",
        "unshared",
        "late values",
        "late Q",
        "skip s_0",
        "hinge sign",
        "hinge before the token",
    ],
)
def test_the_loss_is_none_of_the_wrong_variants(wrong: str) -> None:
    b = batch(1)
    settings = dataclasses.replace(PLAIN, gamma=2.0, kappa=2.0)
    right = float(b.loss(settings)[0])
    assert right == pytest.approx(float(slow_tfpo(b, settings, 2.0)), rel=1e-12)
    assert abs(float(slow_tfpo(b, settings, 2.0, wrong)) - right) > 1e-2


def test_position_pairs_begin_where_the_answers_part() -> None:
    b = batch(1)
    settings = dataclasses.replace(PLAIN, gamma=5.0, value_pairs="position")
    wrong = slow_tfpo(b, settings, 2.0, "positions before the parting")
    assert abs(float(wrong) - float(b.loss(settings)[0])) > 1e-3


# ---- closed forms ----


def flow_of(c: Tensor, decay: float = 1.0) -> FlowStatistics:
    """Statistics of rows that have `c` as their log V and nothing else."""
    return flow_statistics(torch.zeros_like(c), c, torch.ones_like(c, dtype=torch.bool), decay)


def test_the_sum_over_pairs_is_a_variance_and_its_gradient_2n_times_the_distance_from_the_mean() -> None:
    c = torch.randn(3, 9, generator=rng(0), dtype=torch.float64).requires_grad_()
    flow = flow_of(c)
    loops = torch.stack([sum((row[n] - row[m]) ** 2 for m in range(9) for n in range(m + 1, 9)) for row in c])
    assert torch.allclose(subtb(flow, "sum"), loops, rtol=1e-13)
    assert torch.allclose(subtb(flow, "pair_mean"), 2 * c.var(1), rtol=1e-13)
    (gradient,) = torch.autograd.grad(subtb(flow, "sum").sum(), c)
    assert torch.allclose(gradient, 2 * 9 * (c - c.mean(1, keepdim=True)).detach(), atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 32, 200])
def test_an_untrained_doctor_of_constant_surprise_has_the_closed_form_loss(length: int) -> None:
    log_probs = torch.full((2, length), -1.5, dtype=torch.float64)
    mask = torch.ones_like(log_probs, dtype=torch.bool)
    settings = dataclasses.replace(PLAIN, value_weight=0.0)
    layout = plan(mask.long(), 0 * log_probs, mask, torch.tensor([False, True]), torch.tensor([[0, 1]]), settings)
    loss, _ = tfpo_loss(log_probs, torch.zeros(2, length + 1).double(), layout, 1.0, settings)
    states = length + 1
    assert float(loss) == pytest.approx(1.5**2 * states * (states + 1) / 6, rel=1e-12)


def test_the_anchored_loss_of_an_untrained_doctor_is_twice_the_variance_of_log_q() -> None:
    b = batch(3)
    settings = dataclasses.replace(PLAIN, anchor="reference", kappa=1.7, value_weight=0.0)
    untrained = dataclasses.replace(b, log_probs=b.reference, log_values=torch.zeros(4, 7).double())
    log_q = [1.7 * pad(row[kept].cumsum(0), (1, 0)) for row, kept in zip(b.rewards, b.mask, strict=True)]
    expected = sum(2 * float(q.var()) for q in log_q) / 4
    assert float(untrained.loss(settings)[0]) == pytest.approx(expected, rel=1e-12)
    plain = dataclasses.replace(settings, anchor="none")
    assert float(untrained.loss(plain)[0]) > 2 * expected


@pytest.mark.parametrize("decay", [1.0, 0.8])
def test_a_constant_in_log_v_is_free_exactly_where_the_end_is(decay: float) -> None:
    settings = dataclasses.replace(PLAIN, decay=decay)
    for ended, moved in ((False, False), (True, True)):
        b = dataclasses.replace(batch(4), ended=torch.full((4,), ended))
        shifted = dataclasses.replace(b, log_values=b.log_values + 3.0)
        assert (abs(float(b.loss(settings)[0] - shifted.loss(settings)[0])) > 1e-3) is moved


def test_log_q_is_finite_on_rejected_answers_and_its_steps_are_hand_computed() -> None:
    rewards = doubles([0.5, 0.0, 0.75], [-0.5, -1.0, 7.0])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    steps = llmdoctor.log_q_steps(rewards, mask, 2.0, False)
    assert steps.tolist() == [[1.0, 0.0, 1.5], [-1.0, -2.0, 0.0]]
    assert llmdoctor.log_q_steps(rewards, mask, 6.0, True).tolist() == [[1.0, 0.0, 1.5], [-1.5, -3.0, 0.0]]


def test_the_layout_of_a_hand_made_pair() -> None:
    ids = torch.tensor([[9, 9, 4, 5, 2, 0], [9, 9, 4, 6, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 0, 0]]).bool()
    rewards = torch.tensor([[9.0, 9.0, 0.5, 0.0, 0.25, 9.0], [9.0, 9.0, 0.0, -1.0, 9.0, 9.0]])
    layout = plan(ids, rewards, mask, torch.tensor([True, False]), torch.tensor([[0, 1]]), PLAIN)
    assert layout.state.int().tolist() == [[0, 0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 0, 0]]  # L tokens, L+1 states
    assert layout.start.int().tolist() == [[0, 0, 1, 0, 0, 0, 0]] * 2
    assert layout.edge.int().tolist() == [[0, 0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0, 0]]
    assert layout.pinned.int().tolist() == [[0, 0, 0, 0, 0, 1, 0], [0] * 7]
    assert layout.step.tolist() == [[0, 0, 0.5, 0.0, 0.25, 0, 0], [0, 0, 0.0, -1.0, 0, 0, 0]]
    assert layout.comparison.tolist() == [[-1, -1, -1, -1, 0, -1, -1]] * 2  # the state after 5, and after 6
    assert layout.comparison_weight.tolist() == [[1.0]] and layout.target.tolist() == [0.75, -1.0]
    bounded = llmdoctor.boundary_values(torch.arange(14.0).view(2, 7), layout)
    # s_0: (2 + 9) / 2; after EOS: 0; truncated: free
    assert bounded.tolist() == [[0, 0, 5.5, 3, 4, 0, 0], [0, 0, 5.5, 10, 11, 0, 0]]


# ---- the value hinge ----


def hinge_of(b: Batch, **change: object) -> tuple[float, float]:
    metrics = b.loss(dataclasses.replace(PLAIN, **change))[1]  # type: ignore[arg-type]
    return float(metrics["hinge"]), float(metrics["compared"])


def test_hinge_of_hand_computed_pairs() -> None:
    b = batch(0)
    b.log_values.zero_()
    b.log_values[0, 3], b.log_values[2, 3] = 0.5, 0.2  # after the third token: margin 0.3
    b.log_values[3, 1], b.log_values[1, 1] = -1.0, 1.0  # after the first one: margin -2
    b.rewards[:] = torch.tensor([0.5, -0.5, -0.5, 0.5])[:, None]
    assert hinge_of(b, gamma=0.1) == (pytest.approx(2.1 / 2), 1.0)
    assert hinge_of(b, gamma=0.4) == (pytest.approx((0.1 + 2.4) / 2), 1.0)
    linear = 4 - math.exp(0.5) + math.exp(0.2) + 4 - math.exp(-1) + math.exp(1)
    assert hinge_of(b, gamma=4.0, linear_margin=True) == (pytest.approx(linear / 2), 1.0)
    b.rewards[3, 0] = b.rewards[1, 0] = 0.0  # neither is preferred where they part
    assert hinge_of(b, gamma=0.4) == (pytest.approx(0.1 / 2), 0.5)
    # by position the first pair has tokens 3 and 4, the second one tokens 2 and 3
    assert hinge_of(b, gamma=0.4, value_pairs="position") == (pytest.approx(((0.1 + 0.4) / 2 + 0.4) / 2), 1.0)


def test_a_linear_margin_reads_the_compared_states_alone_so_that_others_cannot_overflow() -> None:
    b, settings = leaves(batch(0)), dataclasses.replace(PLAIN, linear_margin=True)
    with torch.no_grad():
        b.log_values[0, 1], b.log_values[2, 2] = 1000.0, -1000.0
    loss = b.loss(settings)[0]
    assert bool(loss.isfinite()) and all(bool(g.isfinite().all()) for g in gradients(b, loss))


def test_no_comparison_without_a_common_prefix_that_parts() -> None:
    b = batch(0)
    b.rewards[:] = torch.tensor([0.5, -0.5, -0.5, 0.5])[:, None]
    b.ids[2] = b.ids[0]  # a truncated copy
    assert hinge_of(b, value_pairs="position")[1] == hinge_of(b)[1] == 0.5


def test_a_row_belongs_to_one_pair() -> None:
    b = batch(0)
    with pytest.raises(ValueError, match="more than one pair"):
        dataclasses.replace(b, pairs=torch.tensor([[0, 2], [0, 1]])).layout(PLAIN)


# ---- masks, packing, shards, micro-batches ----


@pytest.mark.parametrize("settings", SETTINGS)
def test_padding_on_any_side_and_holes_count_as_cut_out(settings: TfpoLoss) -> None:
    tight = batch(5)
    wide = dataclasses.replace(batch(6, HOLES), ended=tight.ended)
    for row in range(4):  # the same answers, scattered over the places of HOLES; row lengths are those of `tight`
        places, kept = wide.mask[row].nonzero()[:, 0], int(wide.mask[row].sum())
        tight.mask[row] = torch.arange(6) < kept
        for name in ("log_probs", "reference", "rewards", "ids"):
            getattr(wide, name)[row, places] = getattr(tight, name)[row, :kept]
        wide.log_values[row, [int(places[0]), *(places + 1).tolist()]] = tight.log_values[row, : kept + 1]
    assert float(wide.loss(settings)[0]) == pytest.approx(float(tight.loss(settings)[0]), rel=1e-12)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("mask", [None, LEFT, HOLES])
def test_nothing_outside_the_mask_matters_or_gets_a_gradient(settings: TfpoLoss, mask: list[list[int]] | None) -> None:
    b = batch(7, mask)
    state = b.layout(settings).state
    poisoned = leaves(
        dataclasses.replace(
            b,
            log_probs=b.log_probs.masked_fill(~b.mask, math.nan),
            log_values=b.log_values.masked_fill(~state, math.inf),
            reference=b.reference.masked_fill(~b.mask, -math.inf),
            rewards=b.rewards.masked_fill(~b.mask, math.nan),
        )
    )
    loss = poisoned.loss(settings)[0]
    assert float(loss.detach()) == float(b.loss(settings)[0])
    in_tokens, in_states = gradients(poisoned, loss)
    assert torch.count_nonzero(in_tokens[~b.mask]) == 0 and torch.count_nonzero(in_states[~state]) == 0
    assert torch.count_nonzero(in_tokens[b.mask]) > 10 and torch.count_nonzero(in_states[state]) > 8


@pytest.mark.parametrize("decay", [1.0, 0.9, 0.3])
def test_merging_is_associative_and_an_empty_run_neutral(decay: float) -> None:
    c = 5 * torch.randn(3, 12, generator=rng(1), dtype=torch.float64)
    runs = [flow_of(c[:, i:j], decay) for i, j in ((0, 5), (5, 6), (6, 12))]
    merge = functools.partial(merge_flow, decay=decay)
    left, right = merge(merge(runs[0], runs[1]), runs[2]), merge(runs[0], merge(runs[1], runs[2]))
    none = torch.zeros(3, 2, dtype=torch.float64)
    empty = flow_statistics(none, none, none.bool(), decay)
    for other in (right, merge(empty, left), merge(left, empty), flow_of(c, decay)):
        for a, b in zip(left, other, strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.99, 0.999999])
@pytest.mark.parametrize("states", [1, 2, 3, 8, 23])
def test_the_weighted_tree_equals_the_loop_over_gaps(decay: float, states: int) -> None:
    c = torch.randn(2, states, generator=rng(2), dtype=torch.float64)
    flow = flow_of(c, decay)
    total, weight = torch.zeros(2, dtype=torch.float64), 0.0
    for gap in range(1, states):
        total += decay**gap * ((c[:, gap:] - c[:, :-gap]) ** 2).sum(1)
        weight += decay**gap * (states - gap)
    assert torch.allclose(flow.pair_sum, total, rtol=1e-12) and torch.allclose(
        flow.pair_weight, torch.full_like(total, weight), rtol=1e-12
    )
    if decay > 0.9999 and states > 2:
        assert torch.allclose(subtb(flow, "pair_mean"), subtb(flow_of(c), "pair_mean"), rtol=1e-3)


@pytest.mark.parametrize("settings", SETTINGS)
def test_micro_batches_of_pairs_add_up_to_the_batch(settings: TfpoLoss) -> None:
    b = batch(11)
    whole = b.loss(settings)[1]
    parts = []
    for rows in ([0, 2], [3, 1]):
        fields = {f.name: getattr(b, f.name)[rows] for f in dataclasses.fields(b) if f.name != "pairs"}
        parts.append(Batch(pairs=torch.tensor([[0, 1]]), **fields).loss(settings)[1])
    for name, value in whole.items():
        assert float(value) == pytest.approx(float(parts[0][name] + parts[1][name]), rel=1e-12, abs=1e-14), name
    one_pair_counts = float(b.loss(settings, normaliser=1.0)[0])  # the wrong variant: each divides by its own count
    assert one_pair_counts == pytest.approx(2 * float(whole["loss"]))


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_batch_with_everything_masked_or_without_pairs_is_a_connected_zero(settings: TfpoLoss) -> None:
    b = batch(12)
    for empty in (
        dataclasses.replace(b, mask=torch.zeros_like(b.mask)),
        dataclasses.replace(b, pairs=torch.zeros(0, 2, dtype=torch.long)),
    ):
        leaf = leaves(empty)
        loss, metrics = leaf.loss(settings)
        loss.backward()
        assert float(loss.detach()) == 0.0 and all(float(v) == 0.0 for v in metrics.values())
        assert torch.count_nonzero(leaf.log_probs.grad) == 0 and torch.count_nonzero(leaf.log_values.grad) == 0


def test_a_row_outside_the_pairs_does_not_count() -> None:
    b = leaves(dataclasses.replace(batch(13), pairs=torch.tensor([[3, 1]])))
    loss = b.loss(PLAIN)[0]
    in_tokens, _ = gradients(b, loss)
    assert torch.count_nonzero(in_tokens[[0, 2]]) == 0 and torch.count_nonzero(in_tokens[[1, 3]]) > 0
    assert float(loss.detach()) == pytest.approx(float(slow_tfpo(b, PLAIN, 2.0).detach()))


# ---- precision ----


def nearly_solved(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 gain and log V [1, length+1] of a doctor whose c is noise of 0.05 nats; log V carries all still to come."""
    log_probs = -3 * torch.rand(1, length, generator=rng(0))
    left = log_probs.double().flip(1).cumsum(1).flip(1)
    noise = 0.05 * torch.randn(1, length + 1, generator=rng(1), dtype=torch.float64)
    return pad(-log_probs, (0, 1)), (noise - pad(left, (0, 1))).float(), torch.ones(1, length + 1, dtype=torch.bool)


@pytest.mark.parametrize("decay", [1.0, 0.99])
@pytest.mark.parametrize("prompt", [0, 500])
def test_fp32_keeps_a_nearly_solved_long_answer(decay: float, prompt: int) -> None:
    gain, values, state = nearly_solved(8192)
    exact = float(subtb(flow_statistics(gain.double(), values.double(), state, decay), "pair_mean"))
    gain, values, state = (pad(x, (prompt, 0)) for x in (gain, values, state))
    hole = torch.arange(prompt + 8193) == 4000  # a place between two states, which must not cost digits either
    gain, values, state = (
        torch.cat([x[:, :4000], 0 * x[:, :1], x[:, 4000:]], 1) for x in (gain, values, state.float())
    )
    state = state.bool() & ~pad(hole, (0, 1))
    fast = float(subtb(flow_statistics(gain, values, state, decay), "pair_mean"))
    assert fast == pytest.approx(exact, rel=3e-6)


def test_fp32_keeps_a_long_answer_whose_first_state_lies_far_from_the_others() -> None:
    gain, values, state = nearly_solved(8192)
    values[:, 0] += 300.0  # c is summed from here, hence all other states lie 300 nats from where it starts
    exact = float(subtb(flow_statistics(gain.double(), values.double(), state, 1.0), "pair_mean"))
    c = (values.double() + pad(gain.double().cumsum(1), (1, -1))).float()
    c, n = c - c[:, :1], 8193
    not_centred = 2 / (n - 1) * ((c**2).sum() - n * c.mean() ** 2)  # the wrong variant
    assert float(not_centred) != pytest.approx(exact, rel=3e-6)
    assert float(subtb(flow_statistics(gain, values, state, 1.0), "pair_mean")) == pytest.approx(exact, rel=3e-6)


def test_the_plain_forms_lose_a_nearly_solved_long_answer() -> None:
    gain, values, state = nearly_solved(8192)
    exact = float(subtb(flow_statistics(gain.double(), values.double(), state, 1.0), "pair_mean"))

    def c(dtype: torch.dtype) -> Tensor:
        return (values.to(dtype) + pad(gain.to(dtype).cumsum(1), (1, -1))).to(torch.float64)

    assert exact == pytest.approx(float(2 * c(torch.float64).var())) == pytest.approx(0.005, rel=0.05)
    assert abs(float(2 * c(torch.float32).var()) / exact - 1) > 2e-5  # two large sums
    single, n = c(torch.float32).float(), 8193
    raw = (n * (single**2).sum() - single.sum() ** 2) / (n * (n - 1) / 2)
    assert abs(float(raw) / exact - 1) > 0.1  # not centred
    assert float(2 * c(torch.bfloat16).var()) > 100 * exact


def test_half_precision_inputs_are_widened_before_any_arithmetic() -> None:
    b = batch(14)
    names = ("log_probs", "log_values", "reference", "rewards")
    half = dataclasses.replace(b, **{n: getattr(b, n).bfloat16() for n in names})
    wide = dataclasses.replace(half, **{n: getattr(half, n).float() for n in names})
    for settings in SETTINGS:
        (loss, metrics), (expected, others) = half.loss(settings), wide.loss(settings)
        assert loss.dtype == torch.float32 and torch.equal(loss, expected)
        assert all(torch.equal(value, others[name]) for name, value in metrics.items())


# ---- what is learned ----


def minimise(parameters: list[Tensor], loss: Callable[[], Tensor]) -> float:
    for p in parameters:
        p.requires_grad_()
    optimiser = torch.optim.LBFGS(
        parameters, max_iter=400, tolerance_grad=1e-12, tolerance_change=1e-18, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss()
        value.backward()
        return value

    optimiser.step(closure)
    return float(loss().detach())


def learned_margin(wrong: str, seed: int, ours: bool = False) -> tuple[float, float]:
    """(loss, log pi(y+) - log pi(y-)) of a tabular doctor with free values after training on one pair, target 4.1."""
    settings = dataclasses.replace(PLAIN, value_weight=0.0)
    logits = torch.randn(2, 3, 4, generator=rng(seed), dtype=torch.float64)
    values = torch.randn(2, 4, generator=rng(seed + 100), dtype=torch.float64)
    ids = torch.tensor([[0, 1, 3], [1, 3, 0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    rewards = doubles([0.9, 0.8, 0.7], [-0.9, -0.8, 0.0])

    def build() -> Batch:
        tied = torch.cat([logits[:1, :1].expand(2, 1, 4), logits[:, 1:]], 1)  # one policy at the common prompt
        log_probs = tied.log_softmax(2).gather(2, ids[..., None])[..., 0]
        return Batch(log_probs, values, 0 * log_probs, ids, rewards, mask, torch.ones(2).bool(), torch.tensor([[0, 1]]))

    final = minimise(
        [logits, values],
        lambda: build().loss(settings, 1.0)[0] if ours else slow_tfpo(build(), settings, 1.0, wrong),
    )
    total = (build().log_probs * mask).sum(1).detach()
    return final, float(total[0] - total[1])


def test_a_pinned_end_and_a_shared_start_identify_the_preference_and_nothing_less_does() -> None:
    for seed in (0, 1):
        loss, margin = learned_margin("", seed, ours=True)
        assert loss < 1e-12 and margin == pytest.approx(4.1, abs=1e-4)
        for wrong in ("unpinned", "unshared"):
            loss, margin = learned_margin(wrong, seed)
            assert loss < 1e-10 and abs(margin - 4.1) > 0.1, wrong  # solved, with an arbitrary margin


@pytest.mark.parametrize("wrong", ["draft sign", "reciprocal flow"])
def test_the_published_reimplementations_learn_the_reverse_preference(wrong: str) -> None:
    loss, margin = learned_margin(wrong, 0)
    assert loss < 1e-12 and margin == pytest.approx(-4.1, abs=1e-4)


def test_a_clamped_q_is_blind_to_rejected_rewards_and_ours_is_not() -> None:
    settings = dataclasses.replace(PLAIN, value_weight=0.0)
    b = batch(15)
    harsher = dataclasses.replace(b, rewards=torch.where(b.rewards < 0, 0.5 * b.rewards, b.rewards))
    assert bool((b.rewards < 0).any())
    assert float(slow_tfpo(b, settings, 2.0, "clamped Q")) == float(slow_tfpo(harsher, settings, 2.0, "clamped Q"))
    assert abs(float(b.loss(settings)[0] - harsher.loss(settings)[0])) > 1e-2
    # clamped as a product F = Q V, the flow does not even reach V on a rejected answer
    value = torch.randn(4, dtype=torch.float64, generator=rng(0)).requires_grad_()
    flow = (doubles([0.0, -0.5, -1.0, -1.5])[0] * value.exp()).clamp(min=1e-8).log()
    (gradient,) = torch.autograd.grad((flow[:, None] - flow[None, :] + 1.0).square().sum(), value)
    assert torch.count_nonzero(gradient) == 0
    leaf = leaves(b)
    assert torch.count_nonzero(gradients(leaf, leaf.loss(settings)[0])[1][2, :5]) == 5  # a rejected, truncated answer


STRINGS = [(2,)] + [(a, 2) for a in (0, 1)] + [(a, b, 2) for a in (0, 1) for b in (0, 1)]  # 2 is EOS, forced at the end


def tree(seed: int) -> tuple[dict[tuple[int, ...], float], dict[tuple[int, ...], Tensor]]:
    """Rewards of every prefix's last token, and a reference policy at every prefix, for all strings of the tree."""
    g = rng(seed)
    prefixes = sorted({s[:k] for s in STRINGS for k in range(len(s) + 1)})
    rewards = {p: float(2 * torch.rand((), generator=g, dtype=torch.float64) - 1) for p in prefixes}
    reference = {
        p: torch.randn(3, generator=g, dtype=torch.float64).log_softmax(0)
        for p in prefixes
        if len(p) < 2 and 2 not in p
    }
    return rewards, reference


def tree_batch(
    rewards: dict[tuple[int, ...], float],
    policy: dict[tuple[int, ...], Tensor],
    reference: dict[tuple[int, ...], Tensor],
    values: dict[tuple[int, ...], Tensor],
) -> Batch:
    """All seven strings and the first one again, as four pairs; log V after EOS is junk, which the pin must remove."""
    rows = [*STRINGS, STRINGS[0]]
    zero, junk = torch.zeros((), dtype=torch.float64), torch.tensor(100.0, dtype=torch.float64)

    def line(s: tuple[int, ...], cell: Callable[[int], Tensor], length: int) -> Tensor:
        return torch.stack([cell(k) if k < len(s) + length - 3 else zero for k in range(length)])

    def log_prob(table: dict[tuple[int, ...], Tensor], s: tuple[int, ...], k: int) -> Tensor:
        return table[s[:k]][s[k]] if k < 2 else zero  # after two tokens only EOS is left

    return Batch(
        log_probs=torch.stack([line(s, lambda k, s=s: log_prob(policy, s, k), 3) for s in rows]),
        log_values=torch.stack([line(s, lambda k, s=s: values[s[:k]] if k < len(s) else junk, 4) for s in rows]),
        reference=torch.stack([line(s, lambda k, s=s: log_prob(reference, s, k), 3) for s in rows]),
        ids=torch.tensor([[*s, 0, 0][:3] for s in rows]),
        rewards=doubles(*([rewards[s[: k + 1]] if k < len(s) else 0.0 for k in range(3)] for s in rows)),
        mask=torch.tensor([[k < len(s) for k in range(3)] for s in rows]),
        ended=torch.ones(8, dtype=torch.bool),
        pairs=torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]]),
    )


@pytest.mark.parametrize("anchor", ["none", "reference"])
@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_on_a_whole_tree_the_loss_is_0_at_p_proportional_to_q_and_training_arrives_there(
    anchor: str, decay: float
) -> None:
    settings = dataclasses.replace(PLAIN, kappa=1.5, anchor=anchor, decay=decay, value_weight=0.0)
    rewards, reference = tree(0)

    def prior(s: tuple[int, ...]) -> float:
        return sum(float(reference[s[:k]][s[k]]) for k in range(min(len(s), 2))) if anchor == "reference" else 0.0

    def log_q(s: tuple[int, ...]) -> float:
        return 1.5 * sum(rewards[s[: k + 1]] for k in range(len(s)))

    # F of a prefix is what flows through it: the mass of its completions, in units of its own prior and Q
    weight = {s: math.exp(prior(s) + log_q(s)) for s in STRINGS}
    through = {p: sum(w for s, w in weight.items() if s[: len(p)] == p) for p in rewards}
    policy = {
        p: torch.tensor([math.log(through[(*p, y)] / through[p]) for y in range(3)], dtype=torch.float64)
        for p in reference
    }
    values = {
        p: torch.tensor(math.log(through[p]) - prior(p) - log_q(p), dtype=torch.float64) for p in rewards if 2 not in p
    }
    solved = tree_batch(rewards, policy, reference, values)
    assert float(solved.loss(settings, 4.0)[0]) < 1e-24
    bent = {p: (x + doubles([0.3, 0.0, 0.0])[0]).log_softmax(0) for p, x in policy.items()}
    assert float(tree_batch(rewards, bent, reference, values).loss(settings, 4.0)[0]) > 1e-3

    logits = {p: torch.zeros(3, dtype=torch.float64) for p in policy}
    free = {p: torch.zeros((), dtype=torch.float64) for p in values}

    def trained() -> Batch:
        return tree_batch(rewards, {p: x.log_softmax(0) for p, x in logits.items()}, reference, free)

    assert minimise([*logits.values(), *free.values()], lambda: trained().loss(settings, 4.0)[0]) < 1e-12
    found = trained().log_probs.detach().sum(1)[:7].exp()
    expected = torch.tensor(list(weight.values()), dtype=torch.float64)
    assert torch.allclose(found, expected / expected.sum(), atol=1e-5)
    assert (found - 1 / 7).abs().max() > 0.03  # not the start


def test_metrics_of_a_hand_computed_batch() -> None:
    b = batch(0)
    b.log_probs[:], b.reference[:] = -1.0, -0.75
    b.log_probs[0], b.log_probs[3, 0], b.reference[3] = -0.5, 2.0, 1.0
    b.rewards[:] = torch.tensor([0.5, -0.5, -0.5, 0.5])[:, None]
    metrics = b.loss(dataclasses.replace(PLAIN, kappa=2.0))[1]
    # lengths 6, 3, 4, 5; pairs (0, 2) and (3, 1): -3 + 4 and (2 - 4) + 3
    assert float(metrics["margin"]) == pytest.approx((1 + 1) / 2)
    assert float(metrics["ordered"]) == 1.0
    assert float(metrics["target_margin"]) == pytest.approx((6 + 4 + 5 + 3) / 2)
    assert float(metrics["chosen_drift"]) == pytest.approx((6 * 0.25 + 1 - 8) / 2)
    assert float(metrics["rejected_drift"]) == pytest.approx((-1.0 - 0.75) / 2)
    assert float(metrics["ordered_drift"]) == 0.5
    assert float(metrics["loss"]) == pytest.approx(float(metrics["subtb"] + metrics["hinge"]))
    halved = b.loss(dataclasses.replace(PLAIN, kappa=2.0, value_weight=0.5))[1]
    assert float(halved["loss"]) == pytest.approx(float(metrics["subtb"] + 0.5 * metrics["hinge"]))


def test_the_anchor_demands_its_reference_and_settings_their_ranges() -> None:
    b, settings = batch(0), dataclasses.replace(PLAIN, anchor="reference")
    with pytest.raises(ValueError, match="reference_log_probs"):
        tfpo_loss(b.log_probs, b.log_values, b.layout(settings), 1.0, settings)
    for change in ({"kappa": -1.0}, {"decay": 0.0}, {"decay": 1.1}, {"gamma": -0.1}, {"value_weight": -1.0}):
        with pytest.raises(ValueError, match=next(iter(change))):
            b.layout(dataclasses.replace(PLAIN, **change))


# ---- stage 3: guided decoding ----


def models(count: int, rows: int = 3, width: int = 7, seed: int = 0) -> list[Tensor]:
    return [3 * torch.randn(rows, width, generator=rng(seed + i), dtype=torch.float64) for i in range(count)]


ALPHA = torch.tensor([1.0, 0.5, 1.0], dtype=torch.float64)
BETA = doubles([0.5, 0.3], [2.0, -0.4], [0.0, 1.5])


def slow_mixture(patient, doctors, alpha, beta, references=None):  # type: ignore[no-untyped-def]
    """Products of probabilities in Python floats, one row at a time."""
    rows = []
    for r in range(len(patient)):
        product = [p ** float(alpha[r]) for p in patient[r].softmax(0).tolist()]
        for i, doctor in enumerate(doctors):
            product = [x * p ** float(beta[r, i]) for x, p in zip(product, doctor[r].softmax(0).tolist(), strict=True)]
            if references is not None and references[i] is not None:
                below = references[i][r].softmax(0).tolist()
                product = [x / p ** float(beta[r, i]) for x, p in zip(product, below, strict=True)]
        rows.append([x / sum(product) for x in product])
    return doubles(*rows)


@pytest.mark.parametrize("ratio", [[], [0], [0, 1]])
def test_the_mixture_equals_the_product_of_powers(ratio: list[int]) -> None:
    patient, *others = models(5)
    doctors, bases = others[:2], others[2:]
    references = [bases[i] if i in ratio else None for i in range(2)]
    found = mix_logits(patient, doctors, ALPHA, BETA, 7, references)
    expected = slow_mixture(patient, doctors, ALPHA, BETA, references)
    assert torch.allclose(found.exp(), expected, rtol=1e-12, atol=1e-15)
    swapped = slow_mixture(patient, doctors, ALPHA, BETA.flip(1), references)
    reversed_ = slow_mixture(patient, doctors, ALPHA, -BETA, references)
    assert min(float((wrong - expected).abs().max()) for wrong in (swapped, reversed_)) > 1e-2
    if ratio:
        assert (slow_mixture(patient, doctors, ALPHA, BETA) - expected).abs().max() > 1e-2


def test_raw_logits_and_log_probabilities_mix_alike_and_objectives_commute() -> None:
    patient, *doctors = models(3)
    found = mix_logits(patient, doctors, ALPHA, BETA, 7)
    shifted = mix_logits(patient.log_softmax(1), [d + 5.0 for d in doctors], ALPHA, BETA, 7)
    assert torch.allclose(found, shifted, atol=1e-12)
    assert torch.allclose(found, mix_logits(patient, doctors[::-1], ALPHA, BETA.flip(1), 7), atol=1e-12)


def test_alpha_0_beta_1_is_the_doctor_and_a_reference_equal_to_the_doctor_cancels_it() -> None:
    patient, doctor = models(2)
    one, none = torch.ones(3, 1).double(), torch.zeros(3).double()
    assert torch.allclose(mix_logits(patient, [doctor], none, one, 7), doctor.log_softmax(1), atol=1e-12)
    blind = patient.masked_fill(torch.arange(7) == 2, -math.inf)  # a weight of 0 excludes nothing
    assert torch.allclose(mix_logits(blind, [doctor], none, one, 7), doctor.log_softmax(1), atol=1e-12)
    cancelled = mix_logits(patient, [doctor], one[:, 0], 3 * one, 7, [doctor])
    assert torch.allclose(cancelled, patient.log_softmax(1), atol=1e-12)


def test_probabilities_far_below_the_smallest_float_mix_in_log_space() -> None:
    patient, doctor = doubles([0.0, -2000.0, -2000.5]), doubles([-3000.0, 0.0, -1.0])
    ones = torch.ones(1, 1).double()
    found = mix_logits(patient, [doctor], ones[0], ones, 3)
    assert found[0].tolist() == pytest.approx([-1000 - math.log1p(math.exp(-1.5)), 0.0, -1.5], abs=0.21)
    assert float(found[0, 1] - found[0, 2]) == pytest.approx(1.5) and float(found[0, 1] - found[0, 0]) == 1000.0
    underflown = patient.softmax(1) * doctor.softmax(1)
    assert float(underflown.sum()) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_beta_0_leaves_the_patient_to_the_bit_whatever_the_doctor_holds(dtype: torch.dtype) -> None:
    patient, doctor, base = (x.to(dtype) for x in models(3, rows=4, width=1001))
    patient[1, 3] = -math.inf  # a token that a grammar forbids
    doctor[1:], base[1:] = math.nan, math.inf
    alpha = torch.ones(4)
    beta = torch.tensor([[0.5], [0.0], [0.0], [-0.0]])
    mixed = mix_logits(patient, [doctor], alpha, beta, 1000, [base])
    logits = guided_logits(patient, mixed, alpha, beta)
    wide = patient.to(torch.promote_types(dtype, torch.float32))
    assert torch.equal(logits[1:], wide[1:]) and logits.dtype == wide.dtype
    assert torch.equal(mixed[1:, :1000], wide[1:, :1000].log_softmax(1)) and torch.equal(logits[0], mixed[0])
    assert not torch.allclose(mixed[0, :1000].float(), wide[0, :1000].log_softmax(0).float(), atol=1e-2)
    assert torch.equal(llmdoctor.unguided(torch.tensor([1.0, 1.0, 0.5, 1.0]), beta), torch.tensor([0, 1, 0, 1]).bool())
    assert bool(torch.tensor([0.0 * -math.inf]).isnan())  # why a zero weight must skip and not multiply


def test_a_tempered_patient_without_a_doctor_is_still_tempered() -> None:
    patient, doctor = models(2)
    half, zero = torch.full((3,), 0.5).double(), torch.zeros(3, 1).double()
    mixed = mix_logits(patient, [doctor * math.nan], half, zero, 7)
    assert torch.allclose(mixed, (0.5 * patient).log_softmax(1), atol=1e-12)
    assert torch.equal(guided_logits(patient, mixed, half, zero), mixed)


def test_a_batch_mixes_as_its_rows_do_alone_to_the_bit() -> None:
    patient, doctor, base = (x.float() for x in models(3, rows=8, width=1000))
    alpha = torch.linspace(0.5, 1.5, 8)
    beta = torch.linspace(-0.5, 2.0, 8)[:, None]
    together = mix_logits(patient, [doctor], alpha, beta, 1000, [base])
    for r in range(8):
        row = slice(r, r + 1)
        alone = mix_logits(patient[row], [doctor[row]], alpha[row], beta[row], 1000, [base[row]])
        assert torch.equal(alone[0], together[r])
    assert not torch.allclose(together, mix_logits(patient, [doctor], alpha, beta.flip(0), 1000, [base]), atol=1e-2)


def test_padding_columns_never_win_and_may_differ_in_number() -> None:
    patient, doctor = models(2, width=8)
    padded = pad(patient, (0, 4), value=50.0)  # uninitialised columns, likelier than any token
    wider = pad(doctor, (0, 1), value=90.0)
    found = mix_logits(padded, [wider], ALPHA, BETA[:, :1], 8)
    assert found.shape == padded.shape and bool(found[:, 8:].isneginf().all())
    assert torch.allclose(found[:, :8], mix_logits(patient, [doctor], ALPHA, BETA[:, :1], 8), atol=1e-12)
    unmasked = mix_logits(padded[:, :9], [wider], ALPHA, BETA[:, :1], 9)  # the wrong variant
    assert (unmasked[:, :8].exp() - found[:, :8].exp()).abs().max() > 0.5
    with pytest.raises(ValueError, match="7 columns"):
        mix_logits(patient, [doctor[:, :7]], ALPHA, BETA[:, :1], 8)


def test_a_token_that_one_model_excludes_is_excluded_at_weights_of_either_sign() -> None:
    patient, doctor, base = models(3)
    doctor[:, 0] = base[:, 0] = base[:, 1] = -math.inf
    patient[:, 6] = -math.inf
    beta = doubles([0.5], [-0.5], [1.0])
    found = mix_logits(patient, [doctor], ALPHA, beta, 7, [base])
    assert bool(found[:, [0, 1, 6]].isneginf().all()) and bool(found[:, 2:6].isfinite().all())
    rest = slow_mixture(patient[:, 2:6], [doctor[:, 2:6]], ALPHA, beta, [base[:, 2:6]])
    assert torch.allclose(found[:, 2:6].exp(), rest, rtol=1e-9)


def test_a_row_without_any_token_left_is_refused() -> None:
    patient, doctor = models(2, width=2)
    patient[1, 0] = doctor[1, 1] = -math.inf
    with pytest.raises(ValueError, match="row 1"):
        mix_logits(patient, [doctor], ALPHA, torch.ones(3, 1), 2)
    assert bool(mix_logits(patient, [doctor], torch.ones(3), torch.zeros(3, 1), 2)[:, 1].isfinite().all())


def test_half_precision_logits_are_mixed_in_fp32() -> None:
    patient, doctor = (x.bfloat16() for x in models(2, width=4000))
    alpha, beta = torch.ones(3), torch.full((3, 1), 0.7)
    found = mix_logits(patient, [doctor], alpha, beta, 4000)
    exact = (patient.double().log_softmax(1) + beta.double() * doctor.double().log_softmax(1)).log_softmax(1)
    assert found.dtype == torch.float32 and (found.double().exp() - exact.exp()).abs().sum(1).max() < 1e-5
    low = (patient.log_softmax(1) + beta.bfloat16() * doctor.log_softmax(1)).log_softmax(1)
    assert (low.double().exp() - exact.exp()).abs().sum(1).min() > 1e-3


# ---- what is sampled from, and what it cost ----


def test_the_entropy_gate_switches_off_rows_where_the_patient_is_sure() -> None:
    patient = doubles([0.0, 0.0, 0.0, 0.0, 9.0], [8.0, 0.0, 0.0, 0.0, 9.0], [0.0, 0.0, -math.inf, -math.inf, 9.0])
    beta = torch.ones(3, 2)
    for minimum, on in ((0.5, [1, 0, 1]), (0.7, [1, 0, 0]), (1.3, [1, 0, 0]), (1.4, [0, 0, 0])):  # log 4, ~0.02, log 2
        gated = llmdoctor.entropy_gate(patient, beta, torch.full((3,), minimum), 4)
        assert gated.tolist() == [[float(x)] * 2 for x in on]


def test_kl_is_hand_computed_and_survives_excluded_tokens() -> None:
    p = doubles([0.5, 0.5, 0.0], [0.2, 0.3, 0.5], [1.0, 0.0, 0.0]).log()
    q = doubles([0.25, 0.25, 0.5], [0.2, 0.3, 0.5], [0.0, 0.5, 0.5]).log()
    assert llmdoctor.kl(p, q).tolist() == [pytest.approx(math.log(2)), pytest.approx(0.0), math.inf]
    assert llmdoctor.kl(q, p)[0] == math.inf  # the other direction
