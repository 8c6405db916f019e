"""The doctors as vLLM's logits processor, for both of its model runners.

Given as `logits_processors`, and on purpose no entry point: those are made in every engine of an environment, and the second
runner refuses the first one's. `Guide` is one class for both, so nobody has to know beforehand which runner an engine takes.

With tensor parallelism the doctors run on the group's first rank alone and the others are sent what it found: all of them draw
from the same numbers, to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_tp_group
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor as FirstRunner, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SecondRunner

from nemo_pivotrl.backends.vllm.guidance import SECTION, TENANTS, Guidance, Row, names_here, read_wish


class Guide(FirstRunner, SecondRunner):
    """Does nothing in an engine whose `additional_config` has no section of ours."""

    def __init__(self, vllm_config: Any, *rest: Any):
        """rest: (device, is_pin_memory) from the first runner, (req_states,) from the second."""
        settings = (vllm_config.additional_config or {}).get(SECTION)
        self.states = rest[0] if len(rest) == 1 else None
        device = self.states.device if self.states is not None else rest[0]
        self.rows: dict[int, Row] = {}
        """Guided requests by their place in the batch; in the second runner by their slot."""
        self.group = get_tp_group()
        self.fresh: dict[int, Any] = {}
        """Second runner: parameters of requests whose prompts have not been read yet."""
        self.guidance: Guidance | None = None
        if settings is not None:
            self.guidance = Guidance(settings, device, compute=self.group.rank_in_group == 0)

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse a request before it reaches the engine. Raises ValueError, over HTTP a 400."""
        read_wish(sampling_params.extra_args, names_here(), names_here(TENANTS) or ())

    def is_argmax_invariant(self) -> bool:
        return False

    # ---- the first runner ----

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None or self.guidance is None:
            return
        for place in batch_update.removed:
            self._leave(place)
        for place, params, prompt, output in batch_update.added:
            self._leave(place)
            row = self.guidance.row(params.extra_args, prompt or [], output)
            if row is not None:
                self.rows[place] = row
        for source, target, direction in batch_update.moved:
            moving, standing = self.rows.pop(source, None), self.rows.pop(target, None)
            if moving is not None:
                self.rows[target] = moving
            if standing is not None and direction == MoveDirectionality.SWAP:
                self.rows[source] = standing
            elif standing is not None:
                self.guidance.drop(standing)

    def _leave(self, place: int) -> None:
        row = self.rows.pop(place, None)
        if row is not None and self.guidance is not None:
            self.guidance.drop(row)

    # ---- the second runner ----

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        self._leave(req_idx)  # the slot's last request
        self.fresh.pop(req_idx, None)
        if self.guidance is None or self.guidance.row(sampling_params.extra_args, [0], []) is None:
            return False
        self.fresh[req_idx] = sampling_params.extra_args
        return True

    def _in_batch(self, ctx: Any) -> list[tuple[int, Row]]:
        """This step's guided requests with their row of logits, everything sampled so far read from the runner's states."""
        assert self.states is not None and self.guidance is not None
        slots, seen = ctx.expanded_idx_mapping.tolist(), (ctx.pos + 1).tolist()
        if len(slots) != len(set(slots)):
            raise RuntimeError("guided decoding and speculative decoding exclude each other")
        found = []
        for at, (slot, length) in enumerate(zip(slots, seen, strict=True)):
            prompt_len = int(self.states.prompt_len.np[slot])
            if (slot not in self.rows and slot not in self.fresh) or length < prompt_len:
                continue  # not ours, or in the middle of its prompt
            if slot in self.fresh:
                ids = self.states.all_token_ids.gpu[slot, :length].tolist()
                row = self.guidance.row(self.fresh.pop(slot), ids[:prompt_len], ids[prompt_len:])
                assert row is not None, "it was guided when it came"
                self.rows[slot] = row
            row = self.rows[slot]
            known = prompt_len + len(row.output)
            if length == known + 1:
                row.output = [*row.output, int(ctx.input_ids[at])]
            elif length > known:
                row.output = self.states.all_token_ids.gpu[slot, prompt_len:length].tolist()
            found.append((at, row))
        return found

    # ---- both ----

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """logits [rows, V], before temperature and truncation; rows that are not guided stay as they are, to the bit."""
        if self.guidance is None or not (self.rows or self.fresh):
            return logits
        found = sorted(self.rows.items()) if ctx is None else self._in_batch(ctx)
        found = [(at, row) for at, row in found if at < len(logits)]
        if not found:
            return logits
        index = torch.tensor([at for at, _ in found], device=logits.device)
        patient = logits[index]
        first = self.group.rank_in_group == 0
        scores = self.guidance.scores(patient, [row for _, row in found]) if first else torch.empty_like(patient)
        scores = scores.to(patient.dtype)
        if self.group.world_size > 1:
            scores = self.group.broadcast(scores.contiguous(), src=0)
        return logits.index_copy_(0, index, scores)
