"""Training over megatron-core: the verbs of `backends.base.Trainer` on any layout of ranks.

Every rank is given the same batch and calls the same verbs; each data-parallel rank takes its share of the rows.

Losses arrive already divided by a global count, so gradients are summed over data-parallel ranks, context-parallel
ranks and micro-batches, and never averaged: `calculate_per_token_loss` makes Megatron do so, in dense and expert weights
alike, and gradients are finalised once a step, without its division by a number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from nemo_pivotrl.algorithms import prefix_tree as prefix
from nemo_pivotrl.algorithms.model_outputs import ModelOutputs
from nemo_pivotrl.algorithms.prefix_tree import packs, token_ratio
from nemo_pivotrl.backends.base import SequenceScores, TokenBatch
from nemo_pivotrl.backends.megatron import checkpoint, lora
from nemo_pivotrl.backends.megatron.microbatches import Rows, lay_out, schedule
from nemo_pivotrl.backends.megatron.model import build_model
from nemo_pivotrl.backends.megatron.parallel import Groups
from nemo_pivotrl.backends.megatron.pipeline_stage import PipelineStage
from nemo_pivotrl.backends.megatron.sampler import sample
from nemo_pivotrl.backends.megatron.weights import export_hf, save_hf
from nemo_pivotrl.backends.sampling import check_finite, check_log_probs
from nemo_pivotrl.backends.tree_attention import check_form
from nemo_pivotrl.config import Generation, Megatron, Optimizer, Policy
from nemo_pivotrl.core.errors import InputError, NotFiniteError, Problem
from nemo_pivotrl.core.types import FailedSample, Sample
from nemo_pivotrl.sizing.architecture import read_architecture
from nemo_pivotrl.sizing.layout_rules import multiple_of, training_problems
from nemo_pivotrl.sizing.precision import token_multiple

if TYPE_CHECKING:
    from nemo_pivotrl.backends.base import LossFn

Work = Callable[[Rows, Tensor, Tensor | None], tuple[Tensor, dict[str, Tensor]]]
"""(rows, log-probs [n, T], log V [n, T+1] or None) of one micro-batch -> (loss, metrics)."""


class MegatronPolicy(SequenceScores):
    """A causal language model that samples, scores and trains. See `backends.base.Backend`.

    value_head: its last stage has a head for log V of the final hidden state at the L+1 states of a response; it starts at zero,
    stays in float32 and is dropped on export. Under context parallelism log pi and log V of a row's positions are put
    together over the ranks before the loss, one float a token: a loss sees whole responses, and each rank's gradient is that
    of its own positions. reference: the start weights are kept, in CPU memory.

    With LoRA its weights are frozen, and adapters train (`lora.py`); the reference is the policy without them.

    Raises InputError for what it cannot do: a reference beside FP8 weights, `allgather` between unequal ranks.
    """

    def __init__(
        self, policy: Policy, megatron: Megatron, groups: Groups, value_head: bool = False, reference: bool = False
    ):
        if problems := training_problems(policy, megatron, reference):
            raise InputError(problems)
        self.settings, self.megatron, self.groups, self.with_head = policy, megatron, groups, value_head
        (chunk,) = build_model(policy.model_name, megatron, groups)
        self.architecture = read_architecture(policy.model_name)
        if policy.prefix_sharing:
            kind = torch.bfloat16 if megatron.bf16 else torch.float32
            width = self.architecture.head_dim
            check_form(policy.prefix_attention, not megatron.cpu, width, kind, "policy.prefix_attention")
        if policy.lora.enabled:
            lora.add_adapters(chunk, self.architecture, policy.lora, groups)
        chunk.config.calculate_per_token_loss = True
        self.stage = PipelineStage(
            chunk, groups, self.architecture.vocab_size, megatron.logprob_chunk_tokens, self.with_head
        )
        self.stage.temperature = policy.generation.temperature or 1.0
        self.stage.prefix_attention = policy.prefix_attention
        self.model: Any = self.stage
        keep = reference and not policy.lora.enabled
        self.start = [p.detach().cpu().clone() for p in chunk.parameters()] if keep else None
        self.optimizer: Any = None
        self.steps = 0

    def tick(self, doing: str) -> None:
        """Called with every piece of work; `workers.py` puts the watch that finds hanging ranks in its place."""

    # ---- sampling ----

    def infer(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        stop_ids: frozenset[int],
        generation: Generation,
    ) -> list[list[Sample | FailedSample]]:
        """One sample per seed and prompt, on every rank; that of the reference backend up to rounding."""
        rows = token_multiple(self.megatron)
        return sample(self.stage, self.groups, prompts, seeds, stop_ids, generation, rows, self.tick)

    # ---- micro-batches ----

    def _plan(self, batch: TokenBatch) -> list[list[list[int]]]:
        """[data-parallel rank][micro-batch] -> rows, the same on every rank."""
        m, groups, units = self.megatron, self.groups, batch.units
        prompts, budget = batch.prompts_of_rows, self.settings.train_micro_batch_tokens
        if self.settings.prefix_sharing:
            width = 6.0 * self.stage.config.hidden_size
            return packs(
                prompts, batch.responses, budget, groups.dp.size(), units, self._multiple(), self.with_head, width
            )
        lengths = [len(p) + len(r) for p, r in zip(prompts, batch.responses, strict=True)]
        return schedule(units, lengths, budget, groups.dp.size(), self._multiple(), m.sequence_packing)

    def _multiple(self) -> int:
        m, groups = self.megatron, self.groups
        return multiple_of(groups.tp.size(), groups.cp.size(), m.sequence_parallel, token_multiple(m))

    def _layouts(self, batch: TokenBatch) -> list[Rows]:
        """This data-parallel rank's micro-batches, on its device."""
        m, groups, prompts, multiple = self.megatron, self.groups, batch.prompts_of_rows, self._multiple()

        def made(rows: Sequence[int]) -> Rows:
            given = [prompts[n] for n in rows], [batch.responses[n] for n in rows]
            if self.settings.prefix_sharing:
                return self._shared(prefix.lay_out(rows, *given, multiple, self.with_head))
            return prefix.on_device(lay_out(rows, *given, multiple, m.sequence_packing, batch.asked), groups.device)

        return [made(rows) for rows in self._plan(batch)[groups.dp.rank()]]

    def _shared(self, forest: prefix.Forest) -> Rows:
        """A micro-batch of a forest, on this rank's device."""
        mirrored = self.architecture.mamba is not None
        made: Rows = prefix.on_device(Rows.of(forest, self.groups.cp.size(), mirrored), self.groups.device)
        return replace(made, forest=forest.to(self.groups.device))

    def _run(self, batch: TokenBatch, work: Work | None, forward_only: bool) -> list[Any]:
        """All micro-batches through the pipeline. What the last stage found for each: metrics, or without `work` the
        rows and their log-probabilities."""
        layouts = self._layouts(batch)

        def finish(rows: Rows, output: Tensor, non_loss_data: bool = False) -> Any:
            log_probs = _pick(output[: len(rows.places)], rows.predicts, rows.mask)
            if non_loss_data or work is None:
                return rows.rows, log_probs.detach()
            values = None
            if self.with_head:
                seen = torch.cat([torch.ones_like(rows.mask[:, :1]), rows.mask], 1)
                values = _pick(output[len(rows.places) :], rows.states, seen)
            idle = output.sum() * 0.0  # a filler's loss hangs on its graph, too
            loss, metrics = work(rows, log_probs, values) if rows.rows else (idle, {})
            return loss + idle, torch.tensor(0, dtype=torch.int, device=loss.device), metrics

        def step(data: Iterator[Rows], model: Any) -> tuple[Tensor, Any]:
            rows = next(data)
            self.tick("a micro-batch")
            return model(rows), partial(finish, rows)

        with torch.set_grad_enabled(not forward_only):
            found: list[Any] = get_forward_backward_func()(
                forward_step_func=step,
                data_iterator=iter(layouts),
                model=[self.model],
                num_microbatches=len(layouts),
                seq_length=layouts[0].tokens.shape[1],
                micro_batch_size=layouts[0].tokens.shape[0],
                forward_only=forward_only,
                collect_non_loss_data=work is None,
            )
        return found

    # ---- log-probabilities ----

    def get_inference_log_probs(self, batch: TokenBatch, reference: bool = False) -> Tensor:
        """[N, T] log-probabilities (nats) under the current policy, or under the start policy; on every rank's CPU."""
        return check_log_probs(self._log_probs(batch, reference))

    @torch.no_grad()
    def _log_probs(self, batch: TokenBatch, reference: bool = False) -> Tensor:
        whole = torch.zeros(len(batch.responses), max(len(r) for r in batch.responses), device=self.groups.device)
        with self._start_weights() if reference else _nothing():
            found = self._run(batch, None, forward_only=True)
        if self.groups.last_stage:
            for rows, log_probs in found:
                if rows:
                    whole[list(rows), : log_probs.shape[1]] = log_probs.to(whole.dtype)
        for group in (self.groups.dp, self.groups.pp):
            if group.size() > 1:
                dist.all_reduce(whole, group=group)
        return whole.cpu()

    @contextmanager
    def _start_weights(self) -> Iterator[None]:
        """The start policy's weights in place of the trained ones, which come back to the bit."""
        if self.settings.lora.enabled:
            with lora.without_adapters(self.stage.module):
                yield
            return
        if self.start is None:
            raise ValueError("the reference was not kept: load the model with reference=True")
        parameters = list(self.stage.module.parameters())
        held = [p.detach().clone() for p in parameters]
        _copy(self.start, parameters)
        try:
            yield
        finally:
            _copy(held, parameters)

    # ---- training ----

    def prepare_for_training(self, optimizer: Optimizer) -> None:
        """Wrap the stage for data parallelism and make the optimiser. Dropout is off throughout."""
        m, distributed = self.megatron, self.megatron.use_distributed_optimizer
        self.optimizer_settings = optimizer
        self.model = DistributedDataParallel(
            config=self.stage.config,
            ddp_config=DistributedDataParallelConfig(
                grad_reduce_in_fp32=m.grad_reduce_in_fp32,
                use_distributed_optimizer=distributed,
                fp8_param_gather=m.fp8 != "none" and m.fp8_param,
            ),
            module=self.stage,
            pg_collection=self.groups.collection,
        )
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=optimizer.lr,
                min_lr=0.0,
                weight_decay=optimizer.weight_decay,
                adam_beta1=optimizer.beta1,
                adam_beta2=optimizer.beta2,
                adam_eps=optimizer.eps,
                clip_grad=optimizer.max_grad_norm,
                bf16=m.bf16,
                params_dtype=torch.bfloat16 if m.bf16 else torch.float32,
                use_distributed_optimizer=distributed,
            ),
            [self.model],
            use_gloo_process_groups=not m.cpu,
        )

    def prepare_for_training_step(self) -> None:
        """Zero gradients."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()

    def get_loss_and_metrics(
        self, batch: TokenBatch, loss_fn: LossFn, forward_only: bool = False, reference: bool = False
    ) -> dict[str, float]:
        """Run the batch, accumulate gradients, and return the summed metrics, the same on every rank."""
        if not batch.responses:
            return {}
        start = self.get_inference_log_probs(batch, reference=True) if reference else None

        def work(rows: Rows, log_probs: Tensor, values: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
            own = None if start is None else _of_rows(start, rows, log_probs)
            data = {key: _of_rows(value, rows, log_probs) for key, value in batch.data.items()}
            return loss_fn(ModelOutputs(log_probs, values, own), data)

        return self._totals(self._run(batch, work, forward_only)) | self._token_ratio(batch)

    def _token_ratio(self, batch: TokenBatch) -> dict[str, float]:
        """The metric `token_ratio`: tokens of the rows one by one over those run on all ranks; 1 without sharing."""
        if not self.settings.prefix_sharing:
            return {"token_ratio": 1.0}
        plan = [rows for rank in self._plan(batch) for rows in rank]
        return {"token_ratio": token_ratio(batch.prompts_of_rows, batch.responses, plan, self.with_head)}

    def _totals(self, found: Sequence[dict[str, Tensor]]) -> dict[str, float]:
        """Metrics summed over micro-batches and data-parallel ranks, in an order that is the same everywhere."""
        own = [{key: float(value) for key, value in metrics.items()} for metrics in found]
        totals: dict[str, float] = {}
        if self.groups.last_stage:
            shares: list[Any] = [None] * self.groups.dp.size()
            dist.all_gather_object(shares, own, group=self.groups.dp)
            for metrics in (metrics for share in shares for metrics in share):
                for key, value in metrics.items():
                    totals[key] = totals.get(key, 0.0) + value
        if self.groups.pp.size() > 1:
            box = [totals]
            last = dist.get_global_rank(self.groups.pp, self.groups.pp.size() - 1)
            dist.broadcast_object_list(box, last, group=self.groups.pp, device=self.groups.device)
            totals = box[0]
        return check_finite(totals)

    decay: float = 1.0
    """Factor on the learning rate, set by a stage that decays it."""

    def finish_training_step(self) -> dict[str, float]:
        """Sum gradients over ranks, clip, step, and return gradient norm and learning rate.

        Raises NotFiniteError on a non-finite gradient, before any weight has moved.
        """
        assert self.optimizer is not None, "prepare_for_training first"
        settings, self.steps = self.optimizer_settings, self.steps + 1
        finalize_model_grads([self.model], None, self.groups.collection)
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        if not math.isfinite(norm):
            remedy = "lower the optimizer's lr or check the data; the last checkpoint is whole"
            raise NotFiniteError(Problem("training", None, f"step {self.steps}", f"gradient norm {norm}", remedy))
        scale = min(1.0, self.steps / settings.warmup_steps) if settings.warmup_steps else 1.0
        rate = settings.lr * scale * self.decay
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return {"grad_norm": norm, "lr": rate}

    # ---- state ----

    def save_training_state(self, folder: Path) -> None:
        """Write everything that a resume needs; every rank takes part. Raises OSError on every rank."""
        checkpoint.save(self, folder)

    def load_training_state(self, folder: Path) -> None:
        """Undo `save_training_state`, in this layout or another. Raises InputError on every rank."""
        checkpoint.load(self, folder)

    def export(self, folder: Path, trained_only: bool = False) -> None:
        """Write an ordinary HF checkpoint, and adapters alone beside it; every rank takes part, rank 0 writes."""
        chunk, settings = self.stage.module, self.settings
        only = self._trained() if trained_only else None
        save_hf([chunk], folder, settings.model_name, self.groups, adapters=lora.merged(chunk), only=only)
        if settings.lora.enabled and not trained_only:
            base = str(settings.model_name)
            lora.save_adapters(chunk, folder / lora.ADAPTER, self.architecture, settings.lora, base, self.groups)

    def weights(self, trained_only: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of `export`, by its HF name, whole, with its adapters in it; all ranks must iterate together."""
        chunk, only = self.stage.module, self._trained() if trained_only else None
        for name, tensor in export_hf([chunk], self.architecture, self.groups, True, lora.merged(chunk), only):
            assert tensor is not None, "all ranks asked"
            yield name, tensor

    def _trained(self) -> Collection[str] | None:
        """Names in the mapping of the weights that training changes; None: all."""
        return lora.places(self.architecture, self.settings.lora).keys() if self.settings.lora.enabled else None


def _of_rows(value: Tensor, rows: Rows, like: Tensor) -> Tensor:
    """A tensor's part for the micro-batch; what is token-wise is cut to the micro-batch's width."""
    found = value[list(rows.rows)]
    return (found[:, : like.shape[1]] if value.dim() > 1 else found).to(like.device)


def _pick(found: Tensor, index: Tensor, mask: Tensor) -> Tensor:
    """[n, T] of what was found, 0 outside the mask."""
    return found[index].masked_fill(~mask, 0.0)


@torch.no_grad()
def _copy(source: Sequence[Tensor], target: Sequence[Tensor]) -> None:
    for here, there in zip(source, target, strict=True):
        there.copy_(here)


@contextmanager
def _nothing() -> Iterator[None]:
    yield
