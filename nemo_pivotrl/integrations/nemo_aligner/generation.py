"""Sampling turns with NeMo's own `generate`: seeded, and stopped where the chat template ends a turn."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nemo_pivotrl.integrations.nemo_aligner.versions import require

require()

from nemo.collections.nlp.modules.common.text_generation_strategy import GPTModelTextGenerationStrategy  # noqa: E402
from nemo_aligner.utils.distributed import broadcast_2d_tensor_within_pp  # noqa: E402
from nemo_aligner.utils.text_generation_utils import TrackLengthGPTModelTextGenerationStrategy  # noqa: E402


class _EndsAtTokens(GPTModelTextGenerationStrategy):  # type: ignore[misc]
    """A turn ends at a token id. NeMo's own rule compares decoded text, which a template's marker may not survive."""

    stop_ids: Tensor

    def end_of_generation_condition(self, tokens: Tensor, prev: Tensor, eod_id: int, end_strings: list[str]) -> Tensor:
        """[b] bool: the token just sampled is a stop token."""
        return torch.isin(prev, self.stop_ids)


class TurnStrategy(TrackLengthGPTModelTextGenerationStrategy, _EndsAtTokens):  # type: ignore[misc]
    """NeMo-Aligner's strategy, which remembers where each row ended, over ends at token ids."""

    def __init__(self, model: Any, context_lengths: Tensor, max_length: int, stop_ids: frozenset[int]):
        super().__init__(model, context_lengths, max_length)
        self.stop_ids = torch.tensor(sorted(stop_ids), device=context_lengths.device)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's random numbers follow from `seed` inside, and go on outside as if nothing had been drawn."""
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    torch.manual_seed(seed % 2**63)
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)


def generate_turns(
    model: Any, prompt_tokens: Tensor, prompt_lengths: Tensor, seed: int, stop_ids: frozenset[int]
) -> dict[str, Tensor]:
    """One turn for each row, in NeMo-Aligner's keys: `response_tokens` [b, S] with the prompt, `response_lengths`,
    `prompt_lengths` [b], `is_end` [b] bool.

    prompt_tokens [b, longest + max_length] and prompt_lengths [b] are on the device. Every row gets at most `max_length`
    new tokens: NeMo goes on until the longest prompt has had its share, and shorter ones are cut back to theirs. The
    ranks of a tensor-parallel group draw the same tokens, since they start from the same seed.
    """
    max_length = model._length_params["max_length"]
    strategy = TurnStrategy(model, prompt_lengths, max_length, stop_ids)
    with seeded(seed):
        output = model.generate(
            inputs=(prompt_tokens, prompt_lengths),
            length_params=model._length_params,
            sampling_params=model._sampling_params,
            strategy=strategy,
        )
    token_ids = torch.tensor(output["token_ids"], device=prompt_tokens.device) if output else None
    tokens = broadcast_2d_tensor_within_pp(token_ids, dtype=torch.long)
    lengths = torch.minimum(strategy.get_lengths(), prompt_lengths + max_length)
    last = tokens.gather(1, (lengths - 1)[:, None])[:, 0]
    ended = torch.isin(last, strategy.stop_ids)
    width = int(lengths.max())
    return {
        "response_tokens": tokens[:, :width],
        "response_lengths": lengths,
        "prompt_lengths": prompt_lengths,
        "is_end": ended,
    }
