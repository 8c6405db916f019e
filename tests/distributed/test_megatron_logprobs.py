"""Vocab-parallel log-probabilities against torch's log_softmax in float64, whole and cut over two ranks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from support.workers import Workers
from torch import Tensor

from nemo_pivotrl.backends.megatron import logprobs
from nemo_pivotrl.backends.megatron.logprobs import chunked_log_probs, shard_of

VOCABULARY, PADDED, HIDDEN, TOKENS = 37, 40, 8, 12


def case(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [M, H], weight [padded V, H], targets [M], and a weight for each log-probability."""
    maker = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, HIDDEN, generator=maker, dtype=torch.float64).to(dtype)
    weight = torch.randn(PADDED, HIDDEN, generator=maker, dtype=torch.float64).to(dtype)
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=maker)
    targets[0], targets[1] = 0, VOCABULARY - 1
    return hidden, weight, targets, torch.randn(TOKENS, generator=maker, dtype=torch.float64)


def plain(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """The formula, straight from torch."""
    return torch.log_softmax(logits[..., :VOCABULARY] / temperature, -1).gather(-1, targets[..., None])[..., 0]


def expected(temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probs, hidden's gradient, weight's gradient) of the weighted sum, in float64 on one rank."""
    hidden, weight, targets, a = case()
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    log_probs = plain(hidden @ weight.t(), targets, temperature)
    (a * log_probs).sum().backward()
    return log_probs.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_chunks_equal_torch_in_float64(temperature: float, chunk: int) -> None:
    hidden, weight, targets, a = case()
    hidden.requires_grad_(), weight.requires_grad_()
    found = chunked_log_probs(hidden, weight, targets, None, chunk, VOCABULARY, temperature)
    (a * found).sum().backward()
    for got, want in zip((found, hidden.grad, weight.grad), expected(temperature), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_gradcheck() -> None:
    hidden, weight, targets, _ = case()
    hidden, weight = hidden[:4].clone().requires_grad_(), weight.clone().requires_grad_()

    def chunked(h: Tensor, w: Tensor) -> Tensor:
        return chunked_log_probs(h, w, targets[:4], None, 3, VOCABULARY, 0.8)

    assert torch.autograd.gradcheck(chunked, (hidden, weight))


def test_bf16_logits_lose_nothing_but_their_own_rounding() -> None:
    hidden, weight, targets, _ = case(torch.bfloat16)
    found = chunked_log_probs(4 * hidden, weight, targets, None, 5, VOCABULARY)
    want = plain((4 * hidden @ weight.t()).double(), targets, 1.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), want, rtol=0, atol=5e-6)


def test_large_logits_do_not_overflow_and_padding_has_no_probability() -> None:
    logits = torch.zeros(2, PADDED)
    logits[:, VOCABULARY:] = 1e4  # garbage in padding columns
    logits[1, 3] = 9e3
    found = chunked_log_probs(torch.eye(2), logits.t().contiguous(), torch.tensor([0, 3]), None, 2, VOCABULARY)
    torch.testing.assert_close(found, torch.tensor([-math.log(VOCABULARY), 0.0]))


def test_ignored_targets_give_zero_and_no_gradient_and_impossible_ones_give_nan() -> None:
    hidden, weight, targets, _ = case()
    hidden.requires_grad_(), weight.requires_grad_()
    targets[2], targets[3] = -100, VOCABULARY
    found = chunked_log_probs(hidden, weight, targets, None, 5, VOCABULARY)
    assert found[2] == 0 and found[3].isnan() and found[4:].isfinite().all()
    found[2].backward()
    assert not hidden.grad.any() and not weight.grad.any()


def test_wrong_sizes_are_refused() -> None:
    hidden, weight, targets, _ = case()
    for wrong in ({"chunk": 0}, {"chunk": 4, "vocab_size": PADDED + 1}, {"chunk": 4, "temperature": 0.0}):
        with pytest.raises(ValueError):
            chunked_log_probs(hidden, weight, targets, None, **wrong)
    with pytest.raises(ValueError, match="12 tokens for 11 targets"):
        chunked_log_probs(hidden, weight, targets[1:], None, 4)


def test_the_last_shard_holds_the_padding() -> None:
    assert shard_of(PADDED, None, VOCABULARY).real == VOCABULARY
    assert shard_of(PADDED, None).real == PADDED


# ---- two ranks ----


def half(x: Tensor) -> Tensor:
    return x.chunk(2)[dist.get_rank()]


def sharded(temperature: float) -> dict[str, Tensor]:
    """On one of two ranks: results, gradients of hidden states and of this rank's weight."""
    hidden, weight, targets, a = case()
    w, h = half(weight).clone().requires_grad_(), hidden.clone().requires_grad_()
    found = chunked_log_probs(h, w, targets, dist.group.WORLD, 5, VOCABULARY, temperature)
    (a * found).sum().backward()
    return {"log_probs": found.detach(), "hidden": h.grad, "weight": w.grad}


def on_two_ranks() -> dict[str, dict[str, Tensor]]:
    """Every sharded case and every wrong variant."""
    dist.init_process_group("gloo")
    found = {str(t): sharded(t) for t in (1.0, 0.7)}
    found["all padding on rank 1"] = padding_alone()
    real = dist.all_reduce

    def without(kind: str):
        def reduce(tensor, op=dist.ReduceOp.SUM, group=None):
            if (kind, op) == ("max", dist.ReduceOp.MAX) or (kind == "sum" and tensor.dim() == 2):
                return None
            return real(tensor, op, group)

        return reduce

    merge = logprobs._merge
    for kind in ("max", "sum"):
        # `sum` is the hidden states' gradient, or the sums of two numbers a token: told apart below by their size
        dist.all_reduce = without(kind)
        if kind == "sum":
            logprobs._merge = with_reductions(merge, real, without(kind))
        try:
            found[f"without {kind}"] = sharded(1.0)
        finally:
            dist.all_reduce, logprobs._merge = real, merge
    return found


def with_reductions(merge, real, broken):
    """`_merge` with its own collectives in place, so that only the backward one is missing."""

    def whole(*arguments):
        dist.all_reduce = real
        try:
            return merge(*arguments)
        finally:
            dist.all_reduce = broken

    return whole


def padding_alone() -> dict[str, Tensor]:
    """Rank 1 holds nothing but padding."""
    hidden, weight, targets, _ = case()
    targets = targets % 20
    found = chunked_log_probs(hidden, half(weight), targets, dist.group.WORLD, 5, 20)
    log_p = torch.log_softmax(hidden @ weight[:20].t(), -1)
    want = log_p.gather(1, targets[:, None])[:, 0]
    return {"apart": (found - want).abs().max()}


@pytest.fixture(scope="module")
def two(workers: Workers) -> list[dict[str, dict[str, Tensor]]]:
    return workers.run(2, "test_megatron_logprobs:on_two_ranks")


def apart(found: dict[str, Tensor], rank: int, temperature: float) -> dict[str, float]:
    """Largest error of each result of a rank."""
    log_probs, grad_hidden, grad_weight = expected(temperature)
    want = {"log_probs": log_probs, "hidden": grad_hidden, "weight": grad_weight.chunk(2)[rank]}
    return {name: float((found[name] - value).abs().max()) for name, value in want.items()}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_two_ranks_equal_one(two: list[dict[str, dict[str, Tensor]]], temperature: float) -> None:
    for rank in range(2):
        errors = apart(two[rank][str(temperature)], rank, temperature)
        assert max(errors.values()) < 1e-12, errors


def test_a_rank_of_padding_alone_changes_nothing(two: list[dict[str, dict[str, Tensor]]]) -> None:
    for rank in range(2):
        assert max(float(x) for x in two[rank]["all padding on rank 1"].values()) < 1e-12


def test_wrong_variants_are_told_apart(two: list[dict[str, dict[str, Tensor]]]) -> None:
    """Each rank's own maximum, and a hidden gradient that is not summed: the checks above would see them."""
    worst = {
        kind: max(max(apart(two[rank][f"without {kind}"], rank, 1.0).values()) for rank in range(2))
        for kind in ("max", "sum")
    }
    assert worst["max"] > 1e-3 and worst["sum"] > 1e-3, worst
    sound = apart(two[0]["without sum"], 0, 1.0)
    assert sound["log_probs"] < 1e-12 and sound["weight"] < 1e-12  # only the hidden states' gradient is hurt
