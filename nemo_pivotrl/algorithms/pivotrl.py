"""The losses of PivotRL (arXiv 2603.21383), pure: advantages, loss, its SFT baseline. `selection.py` has what comes before.

Shapes: `P` pivots, `G` samples of a pivot, `N` = P*G sequences, `T` response tokens (padded). Log-probabilities are in
nats, of the sampled token under the distribution it was sampled from. `P1`, `equation (3)`
and the like are numbers of docs/algorithms.md.

Deviations from the paper, all switchable:
- the loss is a mean over the batch's tokens (`token_level_loss`), not of sequences (P9); NVIDIA's recipes do so;
- the ratio is per token, the paper writes it per action (`ratio_level`, P9);
- beta defaults to 0 (P11), the paper has a KL term;
- the standard deviation is the sample one (P7), the paper does not say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from nemo_pivotrl.algorithms.model_outputs import ModelOutputs
from nemo_pivotrl.config import LossFn


def group_advantages(
    rewards: Tensor,
    valid: Tensor,
    leave_one_out: bool = False,
    normalize: bool = True,
    tolerance: float = 1e-6,
    delta: float = 1e-6,
    clip: float | None = None,
) -> Tensor:
    """Advantages [P, G] of rewards [P, G] within each pivot's group (equations (8) and (9); P7, P8).

    `valid` [P, G] bool: samples that exist; the others are left out of every statistic and get 0. A group whose valid
    rewards span at most `tolerance`, or with fewer than two of them, gets exactly 0 (Proposition 3.1). Default: group mean
    and sample standard deviation (G-1), divided by std + `delta`. `leave_one_out` reproduces NeMo-RL: mean and sample
    std of the *other* samples, no division where that std is 0 (within `tolerance`, so that rounding cannot explode).
    Computed in float64, returned in the rewards' dtype.

    >>> rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])  # the second pivot has no signal
    >>> group_advantages(rewards, valid=torch.ones(2, 4, dtype=torch.bool))
    tensor([[ 1.5000, -0.5000, -0.5000, -0.5000],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    raw, mask = rewards.double(), valid.double()
    count = mask.sum(1, keepdim=True)
    high = raw.masked_fill(~valid, -math.inf).amax(1, keepdim=True)
    low = raw.masked_fill(~valid, math.inf).amin(1, keepdim=True)
    has_signal = (count >= 2) & (high - low > tolerance)
    total = (raw * mask).sum(1, keepdim=True)
    if leave_one_out:
        others = (count - 1).clamp(min=1)
        mean = (total - raw * mask) / others
        # spread of the others around their own mean, one pass per sample: [P, G, G]
        apart = (raw[:, None, :] - mean[:, :, None]) ** 2 * mask[:, None, :]
        apart = apart.sum(2) - (raw - mean) ** 2 * mask
        std = (apart.clamp(min=0) / (others - 1).clamp(min=1)).sqrt()
        divisor = torch.where((std > tolerance) & (others > 1), std + delta, torch.ones_like(std))
    else:
        mean = total / count.clamp(min=1)
        std = (((raw - mean) ** 2 * mask).sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
        divisor = std + delta
    advantages = raw - mean
    if normalize:
        advantages = advantages / divisor
    if clip is not None:
        advantages = advantages.clamp(-clip, clip)
    return torch.where(has_signal & valid, advantages, torch.zeros_like(advantages)).to(rewards.dtype)


def kl_k3(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """Per-token k3 estimate (nats, >= 0) of KL(policy || reference): e^d - d - 1 with d = reference - policy.

    d is clamped to +-20, beyond which e^d would overflow the loss.
    """
    d = (ref_log_probs - log_probs).clamp(-20.0, 20.0)
    return d.exp() - d - 1.0


def grpo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    normaliser: float,
    settings: LossFn,
    ref_log_probs: Tensor | None = None,
    sampler_log_probs: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped policy-gradient loss of equation (15) and its metrics, as sums already divided by the global `normaliser`.

    log_probs, old_log_probs, mask and the optional ones are [N, T]; advantages [N] or [N, T]. `mask` is 1 on the
    sampled action's tokens that train. `normaliser` is the global count over all micro-batches and ranks: trained
    tokens (`token_level_loss`), or trained sequences. Micro-batches therefore add up to the batch, and an empty one gives a
    connected zero. Raises ValueError without `ref_log_probs` where there is a KL penalty, and without `sampler_log_probs`
    where the importance of a token is corrected.

    >>> old, advantages = torch.full((2, 3), -1.0), torch.tensor([1.0, -1.0])
    >>> loss, metrics = grpo_loss(old, old, advantages, torch.ones(2, 3), normaliser=6, settings=LossFn())
    >>> float(loss), float(metrics["clip_share"])  # the policy that sampled: its ratios are 1
    (0.0, 0.0)
    """
    beta = settings.reference_policy_kl_penalty
    if beta > 0 and ref_log_probs is None:
        raise ValueError("reference_policy_kl_penalty > 0 needs ref_log_probs of the profiling policy")
    if settings.use_importance_sampling_correction and sampler_log_probs is None:
        raise ValueError("use_importance_sampling_correction needs sampler_log_probs")
    mask = mask.to(log_probs.dtype)
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    lengths = mask.sum(1, keepdim=True).clamp(min=1)
    log_ratio = (log_probs - old_log_probs) * mask
    if settings.ratio_level == "sequence":
        # one ratio a sequence, the geometric mean of its tokens'; the gradient still reaches every token
        log_ratio = (log_ratio.sum(1, keepdim=True) / lengths).expand_as(log_probs)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1.0 - settings.ratio_clip_min, 1.0 + settings.ratio_clip_max)
    gain = torch.minimum(ratio * advantages, clipped * advantages)
    if settings.ratio_clip_c is not None:
        gain = torch.where(advantages < 0, torch.maximum(gain, settings.ratio_clip_c * advantages), gain)
    per_token = -gain
    if settings.use_importance_sampling_correction and sampler_log_probs is not None:
        low, high = settings.truncated_importance_sampling_ratio_min, settings.truncated_importance_sampling_ratio
        per_token = per_token * (old_log_probs - sampler_log_probs).exp().clamp(low, high).detach()
    if beta > 0 and ref_log_probs is not None:
        per_token = per_token + beta * kl_k3(log_probs, ref_log_probs)
    share = mask / normaliser if settings.token_level_loss else mask / lengths / normaliser
    loss = (per_token * share).sum()
    with torch.no_grad():
        binding = (clipped * advantages < ratio * advantages).to(mask.dtype)
        metrics = {
            "loss": loss.detach(),
            "ratio": (ratio * share).sum(),
            "clip_share": (binding * share).sum(),
            "policy_kl": (kl_k3(log_probs, old_log_probs) * share).sum(),
        }
        if ref_log_probs is not None:
            metrics["kl"] = (kl_k3(log_probs, ref_log_probs) * share).sum()
        if sampler_log_probs is not None:
            metrics["sampler_mismatch"] = ((old_log_probs - sampler_log_probs).abs() * share).sum()
    return loss, metrics


def policy_loss(
    outputs: ModelOutputs, data: Mapping[str, Tensor], settings: LossFn, normaliser: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """`grpo_loss` of a micro-batch, as backends call it.

    data: `advantages` [N], `mask` [N, T], `sampler` [N, T] (the sampler's log-probabilities) and perhaps `old` [N, T];
    without it the old policy is the current one (ratio 1), as on the first update after sampling.
    """
    log_probs = outputs.log_probs
    return grpo_loss(
        log_probs,
        data.get("old", log_probs.detach()),
        data["advantages"].to(log_probs.dtype),
        data["mask"],
        normaliser,
        settings,
        ref_log_probs=outputs.reference,
        sampler_log_probs=data["sampler"],
    )


def sequence_error(old_log_probs: Tensor, sampler_log_probs: Tensor, mask: Tensor) -> Tensor:
    """How far trainer and sampler disagree on each sample: mean of exp(|difference|) over its tokens [N], 1 where they agree.

    All arguments [N, T]; differences (nats) are clamped at 20. A sample without tokens has 1. NeMo-RL masks samples by this
    number (`seq_logprob_error_threshold`); unlike the importance weight it grows whichever side is the likelier.
    """
    apart = (old_log_probs - sampler_log_probs).abs().clamp(max=20.0).exp() - 1.0
    mask = mask.to(apart.dtype)
    return 1.0 + (apart * mask).sum(1) / mask.sum(1).clamp(min=1)


def sft_loss(outputs: ModelOutputs, data: Mapping[str, Tensor], normaliser: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood (nats a token) of the expert tokens in `data["mask"]` [N, T], divided by their global count."""
    loss = -(outputs.log_probs * data["mask"].to(outputs.log_probs.dtype)).sum() / normaliser
    return loss, {"loss": loss.detach()}
