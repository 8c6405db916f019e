"""Stage 1's patient: a frozen GPT of NeMo that scores tokens through NeMo-Aligner's `get_inference_log_probs`.

The stage itself runs on rank 0, as everywhere in this project; the other ranks answer its scorer until it is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_pivotrl.backends.batching import batches
from nemo_pivotrl.config.nemo_aligner_blocks import PatientBlock, PivotRLModelBlock
from nemo_pivotrl.integrations.nemo_aligner.actor import MegatronGPTActorModel, Step, parents_block, policy_log_probs
from nemo_pivotrl.integrations.nemo_aligner.versions import require

require()

from nemo_aligner.utils import parallel_state  # noqa: E402
from omegaconf import open_dict  # noqa: E402

Sequences = Sequence[tuple[Sequence[int], Sequence[int]]]


class MegatronGPTPatientModel(MegatronGPTActorModel):  # type: ignore[misc]
    """A GPT that only scores. `cfg` is the `model` block of a checkpoint; nothing is asked of it."""

    def __init__(self, cfg: Any, trainer: Any):
        with open_dict(cfg):
            cfg.ppo = parents_block(PivotRLModelBlock(forward_micro_batch_size=1))
        super().__init__(cfg, trainer=trainer)

    def get_logprob_output_only_func(self, inference_only: bool = True) -> Step:
        """As the parent's, without the columns that only pad the vocabulary."""
        forward, size = self.get_forward_output_only_func(), self.tokenizer.vocab_size

        def forward_step(data_iterator: Any, model: Any) -> tuple[Tensor, Any]:
            batch = next(data_iterator)
            logits, _ = forward(iter([batch]), model)
            return logits, lambda logits, non_loss_data=True: policy_log_probs(
                logits, batch[0], size, 1.0, inference_only
            )

        return forward_step


class AlignerScorer:
    """`backends.base.Scorer` over a patient on all ranks: `log_probs` on rank 0, `serve` on the others until `close`."""

    def __init__(self, model: MegatronGPTPatientModel, settings: PatientBlock):
        self.model, self.settings = model, settings
        model.prepare_for_inference()

    def log_probs(self, sequences: Sequences) -> list[Tensor]:
        """Log-probability [T] (nats) of each response token, on the CPU; called on rank 0."""
        _broadcast([(list(p), list(r)) for p, r in sequences])
        return self._score(sequences)

    def serve(self) -> None:
        """Take part in rank 0's calls until it closes."""
        while (sequences := _broadcast(None)) is not None:
            self._score(sequences)

    def close(self) -> None:
        """Let the other ranks go."""
        _broadcast(None)

    @torch.no_grad()
    def _score(self, sequences: Sequences) -> list[Tensor]:
        """All sequences on every rank; each data-parallel rank computes its part of them."""
        rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        mine: dict[int, Tensor] = {}
        numbers = range(rank, len(sequences), ranks)
        sizes = [len(sequences[n][0]) + len(sequences[n][1]) for n in numbers]
        for places in batches(sizes, self.settings.batch_tokens):
            batch = [numbers[place] for place in places]
            rows = [[*sequences[n][0], *sequences[n][1]] for n in batch]
            tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
            for row, ids in zip(tokens, rows, strict=True):
                row[: len(ids)] = torch.tensor(ids)
            found = self.model.get_inference_log_probs(tokens.cuda(), forward_micro_batch_size=len(rows)).float().cpu()
            starts = [len(sequences[n][0]) - 1 for n in batch]
            mine |= {n: found[i, s : len(rows[i]) - 1] for i, (n, s) in enumerate(zip(batch, starts, strict=True))}
        parts: list[dict[int, Tensor]] = [{} for _ in range(ranks)]
        torch.distributed.all_gather_object(parts, mine, group=parallel_state.get_data_parallel_group())
        whole = {n: found for part in parts for n, found in part.items()}
        return [whole[n] for n in range(len(sequences))]


def _broadcast(value: Any) -> Any:
    """Rank 0's `value`, on every rank."""
    held = [value]
    torch.distributed.broadcast_object_list(held, src=0)
    return held[0]
