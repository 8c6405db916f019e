"""Sampling turns from OpenAI-compatible servers, which get the weights in training before they sample.

Every model-parallel group's first rank asks the servers for its own rows; rank 0 alone sends weights. Two checks follow every
refit, as in `backends/vllm/refit.py`: each server's fingerprint of what it loaded, and its log-probabilities of a probe, which
must be those that Megatron computes. Training goes on with Megatron's log-probabilities, so that the first ratio is exactly 1.
"""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
import tempfile
import weakref
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from nemo_pivotrl.backends.vllm.refit import PROBE_TOKENS, Fingerprint, read_folder
from nemo_pivotrl.components.rollout import sample_seed
from nemo_pivotrl.config import Generation, Policy
from nemo_pivotrl.config.nemo_aligner_blocks import FILE, PivotRLModelBlock, served_problems
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.core.types import FailedSample, Sample
from nemo_pivotrl.integrations.nemo_aligner.exported import everywhere, export, on_first
from nemo_pivotrl.integrations.nemo_aligner.versions import REMEDY, require
from nemo_pivotrl.sizing.architecture import read_architecture

require()

from nemo.utils import logging  # noqa: E402
from nemo_aligner.utils.distributed import broadcast_2d_tensor_within_mp, run_if_model_parallel_src  # noqa: E402

PROBE = list(range(3, 3 + PROBE_TOKENS))


def in_these_words(error: InputError) -> list[Problem]:
    """The pool's problems with the fields as this config has them."""
    return [dataclasses.replace(p, field=re.sub(r"^vllm\.", "model.pivotrl.servers.", p.field)) for p in error.problems]


class ServedTurns:
    """The servers of `model.pivotrl`, for all ranks. Raises InputError for a block or a model that they cannot serve."""

    def __init__(self, block: PivotRLModelBlock, cfg: Any):
        problems = served_problems(block)
        lora, overlap = cfg.get("peft", {}).get("peft_scheme", "none"), cfg.optim.get("overlap_param_sync", False)
        if lora not in (None, "none"):
            remedy = "servers are sent whole weights: set it to none, or generation to nemo"
            problems.append(Problem(FILE, None, "model.peft.peft_scheme", str(lora), remedy))
        if overlap:  # weights that an optimiser hands out only in the next forward pass would be sent too early
            problems.append(Problem(FILE, None, "model.optim.overlap_param_sync", "true", "set it to false"))
        if problems:
            raise InputError(problems)
        try:
            from nemo_pivotrl.backends.vllm.servers import Servers
        except ModuleNotFoundError as error:
            if error.name != "httpx":
                raise
            raise InputError(Problem("environment", None, "httpx", "not installed", REMEDY)) from None
        self.pool_of = Servers
        self.settings, self.source = block.servers, Path(block.hf_folder)
        self.architecture = read_architecture(block.hf_folder)
        if self.architecture.moe is not None:
            remedy = "experts are not sent to servers: set generation to nemo, or train with policy.backend megatron"
            raise InputError(Problem(f"{self.source}/config.json", None, "experts", "a mixture", remedy))
        self.generation = Generation(
            temperature=block.sampling_params.temperature,
            top_p=block.sampling_params.top_p,
            max_new_tokens=block.length_params.max_length,
        )
        self.stale = True
        """The servers do not have the weights in training; at the start they may have been started with others."""
        self.mismatch = 0.0
        """Nats a token between Megatron and the servers on the probe, at the latest refit."""
        self.pool: Any = None
        """On ranks that ask."""
        self.folder: Path | None = None
        self.refused: list[Problem] = []

    # ---- weights ----

    def refit(self, actor: Any) -> None:
        """Send the actor's weights and compare both sides. A collective of all ranks; raises InputError on every one."""
        if self.folder is None:
            self.folder = Path(on_first(self._make_folder))
            everywhere(lambda: run_if_model_parallel_src(self._open))
        weights = self.folder / "weights"
        export(actor.model, self.architecture, self.source, weights)
        fingerprint, loaded = on_first(lambda: self._send(weights))
        if self.pool is not None and torch.distributed.get_rank() != 0:
            self.pool.expect(str(weights), fingerprint, loaded)
        self._probe(actor)
        self.stale = False

    def _make_folder(self) -> str:
        if self.settings.refit_folder:
            return self.settings.refit_folder
        made = tempfile.mkdtemp(prefix="refit-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
        weakref.finalize(self, shutil.rmtree, made, ignore_errors=True)
        return made

    def _open(self) -> None:
        policy = Policy(model_name=str(self.source), sampler="vllm", generation=self.generation)
        try:
            self.pool = self.pool_of(policy, self.settings)
        except InputError as error:
            raise InputError(in_these_words(error)) from None
        weakref.finalize(self, self.pool.close)

    def _send(self, weights: Path) -> tuple[str, list[str]]:
        """(fingerprint of the folder, addresses of the servers that have loaded it). Rank 0 alone."""
        sent = Fingerprint()
        for _ in sent.through(read_folder(weights)):
            pass
        arrived = self.pool.refit(str(weights))
        wrong = sorted({found for found in arrived if found != sent.value})
        if wrong or not arrived:
            found = f"{', '.join(wrong) or 'no answer'}; the trainer sent {sent.value}"
            remedy = "see the servers' logs; the same command resumes"
            raise InputError(Problem("refit", None, "fingerprint of the weights", found, remedy))
        return sent.value, self.pool.well

    def _probe(self, actor: Any) -> None:
        """Draw a short answer and compare its log-probabilities with Megatron's, at the policy's temperature."""
        generation = Generation(temperature=self.generation.temperature, max_new_tokens=PROBE_TOKENS)
        drawn = on_first(lambda: self.pool.infer([PROBE], [[1]], frozenset(), generation)[0][0])
        if isinstance(drawn, FailedSample):
            remedy = "mend the servers; the same command resumes"
            raise InputError(Problem("refit", None, "probe", f"{drawn.kind}: {drawn.detail}", remedy))
        tokens = torch.tensor([[*PROBE, *drawn.token_ids]], device=torch.cuda.current_device())
        own = actor.get_inference_log_probs(tokens, forward_micro_batch_size=1)[0, PROBE_TOKENS - 1 :].tolist()
        self.mismatch = on_first(lambda: fmean(abs(a - b) for a, b in zip(own, drawn.log_probs, strict=True)))
        if not math.isfinite(self.mismatch) or self.mismatch > self.settings.refit_tolerance:
            found = f"{self.mismatch:.4f} nats a token from Megatron's"
            remedy = (
                "the servers do not compute what is trained (weights, hf_folder's config, precision); if their precision alone is "
                f"coarser than model.pivotrl.servers.refit_tolerance={self.settings.refit_tolerance}, raise that"
            )
            raise InputError(Problem("refit", None, "log-probabilities of the probe", found, remedy))

    # ---- turns ----

    def generate_turns(
        self, actor: Any, prompt_tokens: Tensor, prompt_lengths: Tensor, seed: int, stop_ids: frozenset[int]
    ) -> dict[str, Tensor]:
        """One turn for each row, as `generation.generate_turns` returns them, and `lost` [b] bool: no server gave one.

        prompt_tokens [b, longest + max_length] and prompt_lengths [b] are on the device. A lost row ends with its prompt. A
        collective of the model-parallel group, which a refusal does not end: `check` says it on all ranks.
        """
        arguments = (prompt_tokens.tolist(), prompt_lengths.tolist(), seed, stop_ids, actor.tokenizer)
        own = run_if_model_parallel_src(self._rows, *arguments)
        packed = broadcast_2d_tensor_within_mp(own, dtype=torch.long).to(prompt_tokens.device)
        lengths, ended, lost = packed[:, :3].unbind(1)
        return {
            "response_tokens": packed[:, 3:],
            "response_lengths": lengths,
            "prompt_lengths": prompt_lengths,
            "is_end": ended.bool(),
            "lost": lost.bool(),
        }

    def _rows(
        self, tokens: list[list[int]], lengths: list[int], seed: int, stop_ids: frozenset[int], tokenizer: Any
    ) -> Tensor:
        """[b, 3 + S] int64: whole length, whether it ended, whether it was lost, and prompt and turn padded with EOS."""
        prompts = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
        seeds = [[sample_seed("turn", seed, row)] for row in range(len(prompts))]
        turns: list[Sample | FailedSample] = [FailedSample("sampler_refused", "the pool has given up")] * len(prompts)
        if not self.refused:
            try:
                turns = [one for (one,) in self.pool.infer(prompts, seeds, stop_ids, self.generation)]
            except InputError as error:
                self.refused = in_these_words(error)
        rows = []
        for prompt, turn in zip(prompts, turns, strict=True):
            if (
                isinstance(turn, Sample) and max(turn.token_ids) >= tokenizer.vocab_size
            ):  # columns that the loss has not
                turn = FailedSample("sampler_malformed", f"token {max(turn.token_ids)} of {tokenizer.vocab_size}")
            if isinstance(turn, FailedSample):
                if not self.refused:
                    logging.warning(f"a turn is lost, and left out: {turn.kind}: {turn.detail}")
                rows.append([len(prompt), 0, 1, *prompt])
            else:
                ids = [*prompt, *turn.token_ids]
                rows.append([len(ids), int(turn.finish_reason == "stop"), 0, *ids])
        width = max(map(len, rows))
        return torch.tensor([row + [tokenizer.eos_id] * (width - len(row)) for row in rows])

    def check(self) -> None:
        """Raise InputError on every rank when the servers have refused any. A collective of all ranks."""
        wrong = [problem for found in everywhere(lambda: self.refused) for problem in found]
        if wrong:
            raise InputError(dict.fromkeys(wrong))
