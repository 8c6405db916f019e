"""What every sampler shares: which rows decode together, and which token a row's seed draws from its logits.

A backend's loop is its own; the arithmetic here is not, so that two backends whose log-probabilities agree draw the same
turn from the same seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from nemo_pivotrl.backends.batching import batches
from nemo_pivotrl.config import Generation
from nemo_pivotrl.core.errors import NotFiniteError, Problem
from nemo_pivotrl.core.types import FailedSample, FinishReason, Sample

Row = tuple[int, int]
"""Number of a prompt, and which of its seeds."""


class Turns:
    """Turns that are decoded together, one a row. `alive` are the rows that still stand in the running batch.

    A row that has finished may stand there a while longer; what is drawn for it then goes nowhere.
    """

    def __init__(self, seeds: Sequence[int], stop_ids: frozenset[int], generation: Generation):
        self.generation, self.stop_ids = generation, stop_ids
        self.noise = np.stack(
            [np.random.Generator(np.random.Philox(seed)).random(generation.max_new_tokens) for seed in seeds]
        )
        self.tokens: list[list[int]] = [[] for _ in seeds]
        self.log_probs: list[list[float]] = [[] for _ in seeds]
        self.alive = list(range(len(seeds)))
        self.finished: set[int] = set()
        self.step = 0

    def draw(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The next token [N] and its log-probability [N] of every row that is alive, from logits [N, V]."""
        return draw(logits, torch.from_numpy(self.noise[self.alive, self.step]).to(logits.device), self.generation)

    def note(self, tokens: Sequence[int], log_probs: Sequence[float]) -> None:
        """Add what was drawn; a row that drew a stop token is finished."""
        for row, token, log_prob in zip(self.alive, tokens, log_probs, strict=True):
            if row not in self.finished:
                self.tokens[row].append(token)
                self.log_probs[row].append(log_prob)
                if token in self.stop_ids:
                    self.finished.add(row)
        self.step += 1

    @property
    def done(self) -> bool:
        """Nothing is left to draw."""
        return len(self.finished) == len(self.tokens) or self.step == self.generation.max_new_tokens

    def leave(self) -> list[int] | None:
        """Take finished rows out of the running batch. The places in it that stay, or None when all do: taking rows out
        copies the cache, so it happens only when half of them have finished. At least one row stays."""
        running = [place for place, row in enumerate(self.alive) if row not in self.finished]
        if len(running) > len(self.alive) // 2 or len(self.alive) == 1:
            return None
        running = running or [0]
        self.alive = [self.alive[place] for place in running]
        return running

    def samples(self) -> list[Sample | FailedSample]:
        """The turns, row by row. One with a log-probability that is no number was drawn from logits that are none: `FailedSample`."""
        found: list[Sample | FailedSample] = []
        for tokens, log_probs in zip(self.tokens, self.log_probs, strict=True):
            wrong = next((place for place, value in enumerate(log_probs) if not math.isfinite(value)), None)
            if wrong is None:
                reason: FinishReason = "stop" if tokens[-1] in self.stop_ids else "length"
                found.append(Sample(tuple(tokens), tuple(log_probs), reason))
            else:
                found.append(FailedSample("sampler_not_finite", f"log-probability {log_probs[wrong]} of token {wrong}"))
        return found


def draw(logits: Tensor, uniform: Tensor, generation: Generation) -> tuple[Tensor, Tensor]:
    """Token [N] and its log-probability [N] by inverse CDF of `uniform` [N]; float64, so that seeds decide, not rounding.

    Temperature 0 takes the likeliest token and reports its log-probability at temperature 1.
    """
    log_p = torch.log_softmax(logits.double() / (generation.temperature or 1.0), -1)
    if generation.temperature == 0.0:
        token = log_p.argmax(-1)
        return token, log_p.gather(1, token[:, None])[:, 0]
    if generation.top_p < 1.0:
        ordered, index = log_p.exp().sort(-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= generation.top_p
        log_p = log_p.masked_fill(torch.zeros_like(outside).scatter(1, index, outside), -math.inf).log_softmax(-1)
    cumulative = log_p.exp().cumsum(-1)
    token = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0].clamp(
        max=log_p.shape[1] - 1
    )
    return token, log_p.gather(1, token[:, None])[:, 0]


def truncate(log_probs: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Log-probabilities [R, V] to sample from: temperature, then top-k, then top-p of what top-k left (D16).

    Apply it to the mixture, not to the patient. All settings [R]: temperature 0 keeps the argmax alone, top_k 0 and
    top_p 1 keep all. Top-p keeps the fewest likeliest tokens whose mass reaches it, one at least; lower ids win ties.
    """
    greedy = temperature == 0
    ordered, token = log_probs.sort(dim=1, descending=True, stable=True)
    ordered = ordered / temperature.to(ordered.dtype).masked_fill(greedy, 1.0)[:, None]
    keep = top_k.masked_fill(top_k == 0, log_probs.shape[1]).masked_fill(greedy, 1)[:, None]
    ordered = ordered.masked_fill(torch.arange(log_probs.shape[1], device=token.device) >= keep, -torch.inf)
    before = pad(torch.softmax(ordered, 1).cumsum(1), (1, -1))
    cut = (before >= top_p[:, None]) & (top_p < 1)[:, None]
    cut[:, 0] = False
    kept = torch.log_softmax(ordered.masked_fill(cut, -torch.inf), 1)
    return torch.empty_like(kept).scatter(1, token, kept)


def check_finite(totals: Mapping[str, float]) -> dict[str, float]:
    """The metrics of a training step. Raises NotFiniteError for one that is NaN or infinite, by its name."""
    wrong = {name: value for name, value in totals.items() if not math.isfinite(value)}
    if wrong:
        remedy = "lower the learning rate, or check the data; the last checkpoint is whole"
        raise NotFiniteError([Problem("training", None, name, str(value), remedy) for name, value in wrong.items()])
    return dict(totals)


def check_log_probs(log_probs: Tensor) -> Tensor:
    """Log-probabilities [N, T] as they are. Raises NotFiniteError where the model gave NaN or infinity for one."""
    rows = (~torch.isfinite(log_probs)).any(1).nonzero()[:, 0].tolist()
    if rows:
        found = f"NaN or infinity in {len(rows)} of {len(log_probs)} rows, first in row {rows[0]}"
        remedy = "the weights have diverged, or overflow in this precision: go on from an earlier checkpoint"
        raise NotFiniteError(Problem("model", None, "log-probabilities", found, remedy))
    return log_probs


def shares(
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    generation: Generation,
    ranks: int = 1,
    equal: bool = False,
) -> list[list[list[Row]]]:
    """[rank][batch] -> rows, every row exactly once: whole prompts in turn, or single rows where prompts are few.

    A batch's rows, with room for their new tokens, stay within `generation.batch_tokens`; `equal`: their prompts are of one length.
    """
    order = sorted(range(len(prompts)), key=lambda p: (len(prompts[p]), p))
    groups = [[(p, k) for k in range(len(seeds[p]))] for p in order]
    if len(groups) < ranks:
        groups = [[row] for group in groups for row in group]
    dealt = [[row for group in groups[rank::ranks] for row in group] for rank in range(ranks)]

    def batched(share: list[Row]) -> list[list[Row]]:
        sizes = [len(prompts[p]) + generation.max_new_tokens for p, _ in share]
        found = batches(sizes, generation.batch_tokens, range(len(share)), equal=equal)
        return [[share[i] for i in batch] for batch in found]

    return [batched(share) for share in dealt]
