"""The LLMdoctor paper (arXiv 2601.10416) in one file, pure: token rewards, TFPO, guided decoding.

Shapes: `N` answers (rows), `T` tokens, `S` = T+1 states, `P` pairs; when decoding `R` requests, `V` vocabulary columns,
`D` doctors. State s is the prompt and the answer's first s tokens: a token is an edge from its state to the next. Logs
are natural, in nats. `D1`, `equation (22)` and the like are numbers of docs/algorithms.md; nobody here could
read more of the paper than its abstract, so a default of that table is a choice, never "the paper's value".

Deviations from the paper as others report it:
- log Q is kappa times the running reward (D6). A running sum as Q itself is <= 0 on every rejected prefix;
- the head gives log V (D7), 0 at the state after EOS (D8) and one value for both answers at the prompt: with
  either missing, V can absorb any policy and the preference is not identified. `ended` False leaves an end free;
- squared residuals are averaged over the sub-trajectories of an answer, the paper sums them (`reduction`, D9). Both
  come from moments, in O(T): over all pairs m < n, sum (c_n - c_m)^2 = S * sum (c - mean)^2 (equation (28));
- sub-trajectories may be weighted by decay^(n-m) (`decay`; 1 is the paper);
- log pi may be taken relative to a reference (`anchor`, D10); the paper has none and so no language prior;
- the value hinge compares the two answers where they part (D11), the only prefix at which data has two next tokens;
- `mixture` divides by a reference where it is given one (D16).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from nemo_pivotrl.algorithms.model_outputs import ModelOutputs, wide
from nemo_pivotrl.config import TfpoLoss

# ---- stage 1: token rewards ----


class TokenRewards(NamedTuple):
    """Stage 1 for a batch of answers, each [N, T], 0 outside the mask."""

    importance: Tensor
    """Delta (nats, >= 0): how far the two faces' log-probabilities of the token lie apart."""
    smoothed: Tensor
    """S = tanh(Delta / (mean Delta + eps) / tau), in [0, 1). Scale-free: look at `importance` before trusting it."""
    rewards: Tensor
    """r = +S on chosen answers and -S on rejected ones where S > theta, else 0."""


def token_rewards(
    positive: Tensor, negative: Tensor, mask: Tensor, chosen: Tensor, tau: float, theta: float, eps: float
) -> TokenRewards:
    """Importance, smoothing, threshold and sign: equations (21) to (23), D3 to D5.

    positive, negative [N, T]: log-probabilities (nats) of the same answer tokens under the patient's two faces, from
    the same engine in the same precision. mask [N, T] bool: answer tokens, EOS included, prompt and padding not; the
    mean is taken over them, answer by answer. chosen [N] bool. The threshold is strict, hence identical faces give
    rewards of exactly 0. Which face prefers the token plays no part: the label alone gives the sign.

    Raises ValueError for a log-probability inside the mask that is not finite, and for settings out of range.

    >>> kind, rude = torch.tensor([[-1.0, -1.0, -1.0]]), torch.tensor([[-1.0, -4.0, -1.0]])
    >>> mask, chosen = torch.ones(1, 3, dtype=torch.bool), torch.tensor([False])
    >>> token_rewards(kind, rude, mask, chosen, tau=1.0, theta=0.5, eps=1e-6).rewards  # a rejected answer
    tensor([[ 0.0000, -0.9951,  0.0000]])
    """
    if not (tau > 0 and eps > 0 and 0 <= theta < 1):
        raise ValueError(f"tau and eps must be > 0 and theta in [0, 1): got tau {tau}, eps {eps}, theta {theta}")
    broken = ~(positive.isfinite() & negative.isfinite()) & mask
    if bool(broken.any()):
        row, token = broken.nonzero()[0].tolist()
        raise ValueError(
            f"answer {row}, token {token}: log-probabilities {float(positive[row, token])} and "
            f"{float(negative[row, token])} are not finite; a face that excludes the token has no importance to give"
        )
    importance = (wide(positive) - wide(negative)).abs().masked_fill(~mask, 0.0)
    mean = importance.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    smoothed = torch.tanh(importance / (mean + eps) / tau)
    signed = torch.where(chosen[:, None], smoothed, -smoothed)
    return TokenRewards(importance, smoothed, torch.where(smoothed > theta, signed, torch.zeros_like(signed)))


# ---- stage 2: TFPO ----


@dataclass(frozen=True, slots=True)
class Layout:
    """What the data alone decides about a batch."""

    edge: Tensor
    """[N, S] bool: the token taken in this state belongs to the answer."""
    step: Tensor
    """[N, S] nats: growth of log Q by that token, 0 where there is none."""
    state: Tensor
    """[N, S] bool: the answer's L+1 states, from the prompt's end to the state after its last token."""
    start: Tensor
    """[N, S] bool: the first of them, s_0."""
    pinned: Tensor
    """[N, S] bool: the last of them, where the answer ended with EOS: log V is 0 there."""
    comparison: Tensor
    """[N, S] long: index into the flattened `comparison_weight` of the hinge that reads this state, or -1."""
    comparison_weight: Tensor
    """[P, 1] or [P, T]: weight of each hinge, summing to 1 a pair, or to 0 in a pair that has none."""
    pairs: Tensor
    """[P, 2] long: rows of the chosen and of the rejected answer."""
    target: Tensor
    """[N] nats: log Q of the whole answer."""


def log_q_steps(rewards: Tensor, mask: Tensor, kappa: float, length_normalize: bool) -> Tensor:
    """Growth of log Q by each token [N, T], nats: log Q(s_t) = sum of the first t of them, log Q(s_0) = 0 (D6)."""
    steps = kappa * wide(rewards).masked_fill(~mask, 0.0)
    return steps / mask.sum(1, keepdim=True).clamp(min=1) if length_normalize else steps


def plan(token_ids: Tensor, rewards: Tensor, mask: Tensor, ended: Tensor, pairs: Tensor, settings: TfpoLoss) -> Layout:
    """The layout of a batch of answers.

    token_ids, rewards, mask (bool) [N, T]: column t is the token taken in state t, so a row that holds its prompt, too,
    has the whole sequence's T = length - 1 predictions, prompt masked out. Padding may stand on either side, and masked
    tokens may stand in between: they are not the doctor's, and the row counts as if they were cut out. ended [N] bool:
    the last token is EOS (True) or the answer was truncated. pairs [P, 2]: rows of chosen and rejected answers to the
    same prompt; a row belongs to one pair at most (ValueError), and counts only as a member of a pair.
    """
    if not (settings.kappa > 0 and 0 < settings.decay <= 1 and settings.gamma >= 0 and settings.value_weight >= 0):
        raise ValueError(
            "kappa must be > 0, decay in (0, 1], gamma and value_weight >= 0: got kappa "
            f"{settings.kappa}, decay {settings.decay}, gamma {settings.gamma}, value_weight {settings.value_weight}"
        )
    if len(set(pairs.flatten().tolist())) != pairs.numel():
        raise ValueError(f"a row is in more than one pair: {pairs.tolist()}; repeat the row instead")
    rank = mask.cumsum(1)
    last = mask & (rank == rank[:, -1:])
    start = pad(mask & (rank == 1), (0, 1))
    steps = log_q_steps(rewards, mask, settings.kappa, settings.length_normalize)
    comparison, weight = _comparisons(token_ids, rewards, mask, pairs, settings.value_pairs)
    return Layout(
        edge=pad(mask, (0, 1)),
        step=pad(steps, (0, 1)),
        state=start | pad(mask, (1, 0)),
        start=start,
        pinned=pad(last, (1, 0)) & ended[:, None],
        comparison=comparison,
        comparison_weight=weight,
        pairs=pairs,
        target=steps.sum(1),
    )


def _comparisons(
    token_ids: Tensor, rewards: Tensor, mask: Tensor, pairs: Tensor, kind: Literal["divergence", "position"]
) -> tuple[Tensor, Tensor]:
    """`comparison` and `comparison_weight` of a layout. Tokens align by their number in the answer, not by column."""
    better, worse = pairs.unbind(1)
    column = (~mask).to(torch.uint8).argsort(dim=1, stable=True)  # of the k-th answer token
    ids, values = token_ids.gather(1, column), rewards.gather(1, column)
    length = mask.sum(1)
    both = torch.arange(mask.shape[1], device=mask.device) < torch.minimum(length[better], length[worse])[:, None]
    differs = (ids[better] != ids[worse]) & both
    parted = differs.cumsum(1)
    if kind == "divergence":
        used = differs & (parted == 1) & (values[better] > values[worse])
    else:
        used = both & (parted > 0) & (values[better] > 0) & (values[worse] < 0)
    pair, token = used.nonzero(as_tuple=True)
    width = used.shape[1] if kind == "position" else 1
    number = pair * width + (token if kind == "position" else 0)
    comparison = torch.full((mask.shape[0], mask.shape[1] + 1), -1, dtype=torch.long, device=mask.device)
    for rows in (better, worse):
        comparison[rows[pair], column[rows[pair], token] + 1] = number
    weight = (used if kind == "position" else used.any(1, keepdim=True)).to(wide(rewards).dtype)
    return comparison, weight / weight.sum(1, keepdim=True).clamp(min=1)


class FlowStatistics(NamedTuple):
    """All that SubTB needs of a run of states, each [N] (and `torch.stack`able for a collective).

    c of a state is log V + log Q - sum log pi, the latter two counted from where the run begins. `left` moments
    weigh a state by decay^(states of the run before it), `right` ones by decay^(states after it).
    """

    total: Tensor
    """Growth of log Q - sum log pi over the run: what the next run's c must be raised by."""
    states: Tensor
    left_weight: Tensor
    left_mean: Tensor
    left_m2: Tensor
    """Weighted sum of squared distances from the weighted mean."""
    right_weight: Tensor
    right_mean: Tensor
    right_m2: Tensor
    pair_weight: Tensor
    """Sum of decay^(n-m) over the run's m < n: their number at decay 1."""
    pair_sum: Tensor
    """Sum of decay^(n-m) (c_n - c_m)^2 over the run's m < n."""


def merge_flow(a: FlowStatistics, b: FlowStatistics, decay: float) -> FlowStatistics:
    """Statistics of run a followed by run b. Associative; a run without states and edges is neutral.

    Every term added to `pair_sum` is >= 0: nothing cancels, at any decay.
    """
    left_b, right_b = b.left_mean + a.total, b.right_mean + a.total
    across = decay * a.right_weight * b.left_weight
    spread = decay * (b.left_weight * a.right_m2 + a.right_weight * b.left_m2) + across * (left_b - a.right_mean) ** 2
    pairs = (a.pair_weight + b.pair_weight + across, a.pair_sum + b.pair_sum + spread)
    fade = decay**a.states
    left = _merge_moments(a.left_weight, a.left_mean, a.left_m2, fade * b.left_weight, left_b, fade * b.left_m2)
    fade = decay**b.states
    right = _merge_moments(fade * a.right_weight, a.right_mean, fade * a.right_m2, b.right_weight, right_b, b.right_m2)
    return FlowStatistics(a.total + b.total, a.states + b.states, *left, *right, *pairs)


def _merge_moments(
    weight_a: Tensor, mean_a: Tensor, m2_a: Tensor, weight_b: Tensor, mean_b: Tensor, m2_b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    weight = weight_a + weight_b
    share = weight_b / torch.where(weight > 0, weight, torch.ones_like(weight))
    apart = mean_b - mean_a
    return weight, mean_a + share * apart, m2_a + m2_b + weight_a * share * apart**2


def flow_statistics(gain: Tensor, log_values: Tensor, state: Tensor, decay: float) -> FlowStatistics:
    """Statistics of one run of states (`state` [N, S] bool; elsewhere log V is ignored, but has to be finite).

    gain [N, S] nats: growth of log Q - log pi by the token taken in a state, 0 where that is none of the answer's.

    c is summed from one-step residuals, which stay small when the doctor is nearly solved while log V and sum log pi
    grow with the length. Decay 1 takes one cumulative sum; otherwise states are merged two by two, then the runs of
    two, and so on: O(S) work and memory in log2(S) steps.
    """
    index = torch.arange(state.shape[1], device=state.device)
    # elsewhere log V stays as it was in the last state, or before the first one as it will be: large jumps would cost
    # the sum its last digits
    seen = torch.where(state, index, -1).cummax(1).values
    at = torch.maximum(seen, state.to(torch.uint8).argmax(1, keepdim=True))
    values = log_values.gather(1, at)
    residual = (values[:, 1:] - values[:, :-1]) + gain[:, :-1]
    weight, zero = state.to(gain.dtype), torch.zeros_like(gain)
    if decay == 1:
        c, n = pad(residual.cumsum(1), (1, 0)), weight.sum(1)
        mean = (c * weight).sum(1) / n.clamp(min=1)
        m2 = ((c - mean[:, None]) ** 2 * weight).sum(1)
        found = FlowStatistics(zero[:, 0], n, n, mean, m2, n, mean, m2, n * (n - 1) / 2, n * m2)
    else:
        runs = FlowStatistics(pad(residual, (0, 1)), weight, weight, zero, zero, weight, zero, zero, zero, zero)
        while runs.states.shape[1] > 1:
            if runs.states.shape[1] % 2:
                runs = FlowStatistics(*(pad(field, (0, 1)) for field in runs))
            even, odd = (FlowStatistics(*(field[:, i::2] for field in runs)) for i in (0, 1))
            runs = merge_flow(even, odd, decay)
        found = FlowStatistics(*(field[:, 0] for field in runs))
    base = values[:, 0]
    return found._replace(total=gain.sum(1), left_mean=found.left_mean + base, right_mean=found.right_mean + base)


def subtb(flow: FlowStatistics, reduction: Literal["pair_mean", "sum"]) -> Tensor:
    """Squared SubTB residuals (nats^2) of each answer [N], averaged or summed over its sub-trajectories (D9)."""
    if reduction == "sum":
        return flow.pair_sum
    return flow.pair_sum / torch.where(flow.pair_weight > 0, flow.pair_weight, torch.ones_like(flow.pair_weight))


def boundary_values(log_values: Tensor, layout: Layout) -> Tensor:
    """Log V [N, S] with its boundary conditions: 0 after EOS, at s_0 the mean of the pair's two, 0 outside the mask.

    The two are the same number for a causal model without noise.
    """
    values = wide(log_values).masked_fill(~layout.state | layout.pinned, 0.0)
    first, held = (values * layout.start).sum(1), layout.start.any(1)
    partner = torch.arange(len(first), device=first.device)
    partner[layout.pairs] = layout.pairs.flip(1)
    shared = torch.where(held & held[partner], (first + first[partner]) / 2, first)
    return torch.where(layout.start, shared[:, None], values)


class TfpoStatistics(NamedTuple):
    """All that the loss needs of a batch."""

    flow: FlowStatistics
    value_margin: Tensor
    """[P, 1] or [P, T]: V (or log V) after the chosen answer's token minus that after the rejected one's."""
    log_prob: Tensor
    """[N] nats: log pi of the answer."""
    drift: Tensor
    """[N] nats: log pi - log pi of the reference; 0 without one."""


def tfpo_statistics(
    log_probs: Tensor,
    log_values: Tensor,
    layout: Layout,
    settings: TfpoLoss,
    reference_log_probs: Tensor | None = None,
) -> TfpoStatistics:
    """Statistics of the states that `layout` holds; all tensors [N, S].

    log_probs: of the token taken in each state, as models with shifted labels return them. Anything may stand in masked
    places, even NaN.
    """
    if settings.anchor == "reference" and reference_log_probs is None:
        raise ValueError("anchor: reference needs reference_log_probs of the doctor before training")
    taken = wide(log_probs).masked_fill(~layout.edge, 0.0)
    drift = torch.zeros_like(taken)
    if reference_log_probs is not None:
        drift = taken - wide(reference_log_probs).masked_fill(~layout.edge, 0.0)
    values = boundary_values(log_values, layout)
    gain = layout.step - (drift if settings.anchor == "reference" else taken)
    sign = torch.zeros_like(values[:, 0])
    sign[layout.pairs[:, 0]], sign[layout.pairs[:, 1]] = 1.0, -1.0
    compared = layout.comparison >= 0
    worth = values.masked_fill(~compared, 0.0)  # before exp: what is not compared must not overflow
    worth = sign[:, None] * compared * (worth.exp() if settings.linear_margin else worth)
    margin = torch.zeros_like(layout.comparison_weight, dtype=values.dtype).flatten()
    if len(margin):
        margin = margin.index_add(0, layout.comparison.clamp(min=0).flatten(), worth.flatten())
    flow = flow_statistics(gain, values, layout.state, settings.decay)
    return TfpoStatistics(flow, margin.view_as(layout.comparison_weight), taken.sum(1), drift.sum(1))


def tfpo_loss_of(
    found: TfpoStatistics, layout: Layout, normaliser: float, settings: TfpoLoss
) -> tuple[Tensor, dict[str, Tensor]]:
    """TFPO loss of a batch's statistics and its metrics, as sums already divided by the global number of pairs.

    `normaliser` counts the pairs of all micro-batches and data-parallel ranks: SubTB is then the mean over answers,
    chosen and rejected alike (D9), the hinge the mean over pairs, where a pair without a comparison adds 0.
    Micro-batches add up to the batch; one with everything masked gives a connected zero.
    """
    better, worse = layout.pairs.unbind(1)
    balance = subtb(found.flow, settings.reduction)[layout.pairs].sum() / (2 * normaliser)
    short = (settings.gamma - found.value_margin).clamp(min=0)
    hinge = (short * layout.comparison_weight).sum() / normaliser
    loss = balance + settings.value_weight * hinge
    with torch.no_grad():
        margin, drift = (x[better] - x[worse] for x in (found.log_prob, found.drift))
        metrics = {
            "loss": loss,
            "subtb": balance,
            "hinge": hinge,
            "compared": layout.comparison_weight.sum() / normaliser,
            "margin": margin.sum() / normaliser,
            "target_margin": (layout.target[better] - layout.target[worse]).sum() / normaliser,
            "ordered": (margin > 0).sum() / normaliser,
            "chosen_drift": found.drift[better].sum() / normaliser,
            "rejected_drift": found.drift[worse].sum() / normaliser,
            "ordered_drift": (drift > 0).sum() / normaliser,
        }
    return loss, {name: value.detach() for name, value in metrics.items()}


def tfpo_loss(
    log_probs: Tensor,
    log_values: Tensor,
    layout: Layout,
    normaliser: float,
    settings: TfpoLoss,
    reference_log_probs: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """SubTB over all sub-trajectories plus the value hinge (equation (32)), and metrics; see `tfpo_loss_of` for the normaliser.

    log_probs, reference_log_probs [N, T], of the token taken in each state; log_values [N, T+1], log V of each state,
    both from one forward pass. Metrics, a mean over pairs each: `subtb`,
    `hinge`, `compared` (share of pairs with a hinge), `margin` (log pi of chosen minus rejected answer, nats),
    `target_margin` (what it is when the loss is 0 and both answers ended; the anchored loss sets the drifts'
    difference to it), `ordered` (margin > 0), and against the reference, 0 without one: `chosen_drift`,
    `rejected_drift` (nats an answer; the latter rising is rejected text becoming likelier) and `ordered_drift`.

    >>> tokens, rewards = torch.tensor([[5, 6], [5, 7]]), torch.tensor([[0.0, 1.0], [0.0, -1.0]])
    >>> mask, ended, settings = torch.ones(2, 2, dtype=torch.bool), torch.tensor([True, True]), TfpoLoss()
    >>> layout = plan(tokens, rewards, mask, ended, pairs=torch.tensor([[0, 1]]), settings=settings)
    >>> loss, metrics = tfpo_loss(torch.full((2, 2), -1.0), torch.zeros(2, 3), layout, normaliser=1, settings=settings)
    >>> float(metrics["margin"]), float(metrics["target_margin"])  # both answers are as likely; one should be likelier
    (0.0, 4.0)
    """
    if reference_log_probs is not None:
        reference_log_probs = pad(reference_log_probs, (0, 1))
    found = tfpo_statistics(pad(log_probs, (0, 1)), log_values, layout, settings, reference_log_probs)
    return tfpo_loss_of(found, layout, normaliser, settings)


def doctor_loss(
    outputs: ModelOutputs, data: Mapping[str, Tensor], settings: TfpoLoss, pairs: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """`tfpo_loss` of a micro-batch, as backends call it; rows 2p and 2p+1 are the chosen and the rejected answer of a pair.

    data: `token_ids`, `rewards` [N, T], `length` [N] in tokens, `ended` [N] bool. pairs: how many there are in all
    micro-batches and on all ranks.
    """
    assert outputs.values is not None, "a doctor has a value head"
    token_ids = data["token_ids"]
    mask = torch.arange(token_ids.shape[1], device=token_ids.device) < data["length"][:, None]
    rows = torch.arange(len(mask), device=token_ids.device).view(-1, 2)
    layout = plan(token_ids, data["rewards"], mask, data["ended"], rows, settings)
    return tfpo_loss(outputs.log_probs, outputs.values, layout, pairs, settings, outputs.reference)


# ---- stage 3: guided decoding ----


def mix_logits(
    patient: Tensor,
    doctors: Sequence[Tensor],
    alpha: Tensor,
    beta: Tensor,
    vocab_size: int,
    references: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """Normalised log-probabilities [R, V] of patient^alpha * prod_i (doctor_i / reference_i)^beta_i (equation (34), D16).

    patient [R, V], doctors [R, >= vocab_size] each: next-token logits or log-probabilities, each normalised over the
    first `vocab_size` columns in fp32; columns beyond are padding (D18) and come out as -inf. alpha [R], beta [R, D],
    of any sign. references: for each doctor None (the paper's product) or the model that it was trained from (ratio).

    A model with weight 0 in a row is not read there: it may hold anything, and beta 0 with alpha 1 gives the patient's
    log-softmax to the bit. A token that a model with another weight excludes (-inf) is excluded. Raises ValueError for
    a row in which that leaves no token.

    >>> patient, doctor = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]]).log()
    >>> mix_logits(patient, [doctor], alpha=torch.ones(1), beta=torch.tensor([[2.0]]), vocab_size=2).exp()  # 9 to 1
    tensor([[0.9000, 0.1000]])
    """
    logs = [_log_probs(model, vocab_size) for model in (patient, *doctors)]
    weights = [alpha, *beta.unbind(1)]
    if references is not None:
        for weight, reference in zip(beta.unbind(1), references, strict=True):
            if reference is not None:
                logs.append(_log_probs(reference, vocab_size))
                weights.append(-weight)
    mixed = torch.zeros_like(logs[0])
    excluded = torch.zeros_like(mixed, dtype=torch.bool)
    for weight, log in zip(weights, logs, strict=True):
        column = weight.to(mixed.dtype)[:, None]
        mixed = torch.where(column == 0, mixed, mixed + column * log)
        excluded |= (column != 0) & log.isneginf()
    if bool(excluded.all(1).any()):
        row = int(excluded.all(1).nonzero()[0])
        raise ValueError(f"row {row}: the models exclude every token between them; do they share masks and vocabulary?")
    mixed = torch.log_softmax(mixed.masked_fill(excluded, -torch.inf), 1)
    mixed = torch.where(unguided(alpha, beta)[:, None], logs[0], mixed)
    return pad(mixed, (0, patient.shape[1] - vocab_size), value=-torch.inf)


def unguided(alpha: Tensor, beta: Tensor) -> Tensor:
    """[R] bool: rows that decode from the patient alone, as it is."""
    return (alpha == 1) & (beta == 0).all(1)


def guided_logits(patient: Tensor, mixed: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """What a server's or generate()'s sampler gets [R, V]: the mixture, or in unguided rows the patient's own logits.

    These are the patient's to the bit, in at least fp32, padding columns included.
    """
    return torch.where(unguided(alpha, beta)[:, None], wide(patient), mixed)


def entropy_gate(patient: Tensor, beta: Tensor, minimum: Tensor, vocab_size: int) -> Tensor:
    """beta [R, D], set to 0 in rows where the patient's next-token entropy (nats) is below `minimum` [R]."""
    log = _log_probs(patient, vocab_size)
    entropy = -(log.exp() * log.masked_fill(log.isneginf(), 0.0)).sum(1)
    return beta.masked_fill((entropy < minimum)[:, None], 0.0)


def kl(log_probs: Tensor, other: Tensor) -> Tensor:
    """KL (nats) [R] of normalised log-probabilities [R, V] from `other`: what guidance costs, or entropy it removes."""
    reached = ~log_probs.isneginf()
    apart = torch.where(reached, log_probs - other, torch.zeros_like(other))
    return (log_probs.exp() * apart).sum(1)


def _log_probs(logits: Tensor, vocab_size: int) -> Tensor:
    if logits.shape[1] < vocab_size:
        raise ValueError(f"logits have {logits.shape[1]} columns for {vocab_size} tokens: another tokenizer?")
    return torch.log_softmax(wide(logits[:, :vocab_size]), 1)
