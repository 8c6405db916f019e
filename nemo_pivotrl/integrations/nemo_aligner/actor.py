"""`MegatronGPTPivotRLActorModel`: NeMo-Aligner's PPO actor with PivotRL's loss and a turn's own end.

Batches keep NeMo-Aligner's keys. Beside `response_tokens` [B, S], `mask` and `prev_logprobs` [B, S-1] a training batch has
`advantages` [B], one a turn, `valid` [B] (0 where a sample has no verdict) and with a KL penalty `init_logprobs` [B, S-1].
Log-probabilities are those of the tokens' own vocabulary: columns that only pad it to a multiple of the tensor-parallel
size are left out, so that the loss does not depend on the layout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from nemo_pivotrl.algorithms.pivotrl import grpo_loss
from nemo_pivotrl.config.nemo_aligner_blocks import PivotRLModelBlock, read_block
from nemo_pivotrl.integrations.nemo_aligner.generation import generate_turns
from nemo_pivotrl.integrations.nemo_aligner.pivot_data import chat_of
from nemo_pivotrl.integrations.nemo_aligner.served import ServedTurns
from nemo_pivotrl.integrations.nemo_aligner.versions import require, without_tensorrt_llm

require()

from megatron.core.num_microbatches_calculator import get_num_microbatches  # noqa: E402
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func  # noqa: E402
from nemo.collections.nlp.modules.common.megatron.utils import get_iterator_k_split  # noqa: E402
from nemo.collections.nlp.parts.utils_funcs import get_last_rank  # noqa: E402
from nemo_aligner.utils import parallel_state  # noqa: E402
from nemo_aligner.utils.distributed import from_parallel_logits_to_logprobs  # noqa: E402
from nemo_aligner.utils.train_utils import set_sync_funcs  # noqa: E402
from omegaconf import DictConfig, OmegaConf, open_dict  # noqa: E402

with without_tensorrt_llm():
    from nemo_aligner.models.nlp.gpt.megatron_gpt_ppo_actor import MegatronGPTActorModel

METRICS = ("loss", "ratio", "clip_share", "policy_kl", "kl")
FIRST_STAGE = {"response_tokens", "position_ids", "attention_mask"}
LAST_STAGE = {"response_tokens", "attention_mask", "mask", "advantages", "prev_logprobs", "init_logprobs"}

Step = Callable[[Iterator[dict[str, Tensor]], Any], tuple[Tensor, Callable[..., Any]]]


def policy_log_probs(logits: Tensor, tokens: Tensor, vocab_size: int, temperature: float, inference: bool) -> Tensor:
    """[B, S-1] log-probability (nats) of each next token under the distribution that turns are sampled from.

    logits [B, S, V / tensor-parallel size] of this rank's part of the vocabulary, tokens [B, S]. A collective of the
    tensor-parallel group.
    """
    first = parallel_state.get_tensor_model_parallel_rank() * logits.size(-1)
    if first + logits.size(-1) > vocab_size:
        columns = torch.arange(first, first + logits.size(-1), device=logits.device)
        logits = logits.masked_fill(columns >= vocab_size, -torch.inf)
    if temperature != 1.0:
        logits = logits / temperature
    found: Tensor = from_parallel_logits_to_logprobs(
        vocab_parallel_logits=logits, target=tokens, inference_only=inference, higher_stability=True
    )
    return found


def needed_here(batch: dict[str, Tensor]) -> dict[str, Any]:
    """The micro-batch on the device, with None for what this pipeline stage does not read."""
    needed = set(batch)
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        needed = {"attention_mask"}
        needed |= FIRST_STAGE if parallel_state.is_pipeline_first_stage() else set()
        needed |= LAST_STAGE if parallel_state.is_pipeline_last_stage() else set()
    return {key: value.cuda(non_blocking=True) if key in needed else None for key, value in batch.items()}


def data_parallel_sum(value: Tensor) -> Tensor:
    """`value` added up over the data-parallel ranks."""
    value = value.to(torch.cuda.current_device())
    torch.distributed.all_reduce(value, group=parallel_state.get_data_parallel_group())
    return value


def reduced_metrics(parts: list[dict[str, Tensor]], names: tuple[str, ...]) -> dict[str, float]:
    """Metrics that add up over micro-batches and data-parallel ranks, as numbers that every rank holds.

    `parts` is empty on all pipeline stages but the last, which tells the others.
    """
    totals = torch.zeros(len(names), dtype=torch.float64, device=torch.cuda.current_device())
    for part in parts:
        totals += torch.stack([part[n].double() if n in part else totals.new_zeros(()) for n in names]).to(
            totals.device
        )
    totals = data_parallel_sum(totals)
    torch.distributed.broadcast(totals, get_last_rank())
    return dict(zip(names, totals.tolist(), strict=True))


def parents_block(block: PivotRLModelBlock) -> DictConfig:
    """`model.ppo` as the PPO actor reads it."""
    sampling, length = block.sampling_params, block.length_params
    return OmegaConf.create(
        {
            "length_params": {"max_length": length.max_length, "min_length": length.min_length},
            "sampling_params": {
                **dataclasses.asdict(sampling),
                "end_strings": [],
            },
            "offload_adam_states": block.offload_adam_states,
            "entropy_bonus": 0.0,
            "ratio_eps": block.loss_fn.ratio_clip_min,
            "forward_micro_batch_size": block.forward_micro_batch_size,
        }
    )


class MegatronGPTPivotRLActorModel(MegatronGPTActorModel):  # type: ignore[misc]
    """A GPT policy that samples turns, scores them and takes PivotRL's clipped step.

    `cfg` is the `model` block, with `model.pivotrl` (`config.nemo_aligner_blocks.PivotRLModelBlock`).
    """

    def __init__(self, cfg: DictConfig, trainer: Any):
        self.block: PivotRLModelBlock = read_block(PivotRLModelBlock, cfg.pivotrl, "model.pivotrl")
        self.served = ServedTurns(self.block, cfg) if self.block.generation == "servers" else None
        with open_dict(cfg):
            cfg.ppo = parents_block(self.block)  # the parent hard-codes its own name
        super().__init__(cfg, trainer=trainer)
        self.settings = self.block.loss_fn
        self.stop_ids = chat_of(self.tokenizer, self.block).stop_ids

    # ---- training ----

    def get_actor_forward_output_and_loss_func(self, normaliser: float = 1.0, scale: float = 1.0) -> Step:
        """Forward step and loss of one micro-batch; `scale` undoes the averages that follow (see get_loss_and_metrics)."""

        def forward_step(data_iterator: Iterator[dict[str, Tensor]], model: Any) -> tuple[Tensor, Callable[..., Any]]:
            batch = needed_here(next(data_iterator))
            logits = model(batch["response_tokens"], batch["position_ids"], batch["attention_mask"], labels=None)
            if not parallel_state.is_pipeline_last_stage():
                logits = logits.to(dtype=self.autocast_dtype)  # what the next stage expects to receive

            def loss_func(logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
                log_probs = self._log_probs(logits, batch["response_tokens"], inference=False)
                loss, metrics = grpo_loss(
                    log_probs,
                    batch["prev_logprobs"],
                    batch["advantages"],
                    batch["mask"],
                    normaliser,
                    self.settings,
                    ref_log_probs=batch.get("init_logprobs"),
                )
                return loss * scale, metrics

            return logits, loss_func

        return forward_step

    def get_loss_and_metrics(self, batch: dict[str, Tensor], forward_only: bool) -> tuple[float, dict[str, float]]:
        """Loss and metrics of this rank's rows and all others', backward included unless `forward_only`.

        The normaliser is counted over all data-parallel ranks and micro-batches. Megatron divides each micro-batch's loss
        by their number and averages gradients over the ranks, which is right for means and not for shares of a sum: both
        divisions are undone beforehand.
        """
        if batch["response_tokens"].size(0) != get_num_microbatches() * self.cfg.micro_batch_size:
            rows, wanted = batch["response_tokens"].size(0), get_num_microbatches() * self.cfg.micro_batch_size
            raise ValueError(f"{rows} rows for {wanted}: call prepare_for_training, and give a whole local batch")
        mask, position_ids = self._masks(batch["response_tokens"])
        batch = {**batch, "attention_mask": mask, "position_ids": position_ids}
        counted = batch["mask"].sum() if self.settings.token_level_loss else batch["valid"].sum()
        normaliser = max(1.0, float(data_parallel_sum(counted.double())))
        scale = get_num_microbatches() * parallel_state.get_data_parallel_world_size()
        set_sync_funcs(self, forward_only)
        parts = get_forward_backward_func()(
            forward_step_func=self.get_actor_forward_output_and_loss_func(normaliser, scale),
            data_iterator=self._make_data_iterator_list(get_iterator_k_split(batch, get_num_microbatches())),
            model=self.model,
            num_microbatches=get_num_microbatches(),
            forward_only=forward_only,
            seq_length=batch["response_tokens"].size(1),
            micro_batch_size=self.cfg.micro_batch_size,
        )
        names = METRICS if self.settings.reference_policy_kl_penalty > 0 else METRICS[:-1]
        metrics = reduced_metrics(parts, names)
        return metrics["loss"], metrics

    def _masks(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Attention mask [B, 1, S, S] and position ids [B, S]."""
        attention_mask, _, position_ids = self.get_ltor_masks_and_position_ids(tokens=tokens)
        return attention_mask, position_ids

    def _log_probs(self, logits: Tensor, tokens: Tensor, inference: bool) -> Tensor:
        return policy_log_probs(
            logits, tokens, self.tokenizer.vocab_size, self.block.sampling_params.temperature, inference
        )

    def finish_training_step(self) -> None:
        """Gradients are whole afterwards, and the optimiser moves the weights: servers have old ones from here on."""
        super().finish_training_step()
        if self.served is not None:
            self.served.stale = True

    # ---- inference ----

    def prepare_for_inference(self) -> None:
        """The parent's part, and the weights to the servers if they have moved. Raises InputError on every rank when that
        fails."""
        super().prepare_for_inference()
        if self.served is not None and self.served.stale:
            self.served.refit(self)

    def finish_inference(self) -> None:
        """The parent's part. Raises InputError on every rank when servers have refused to sample for any."""
        super().finish_inference()
        if self.served is not None:
            self.served.check()

    def get_logprob_output_only_func(self, inference_only: bool = True) -> Step:
        """Forward step of `get_inference_log_probs`."""
        forward = self.get_forward_output_only_func()

        def forward_step(data_iterator: Iterator[Any], model: Any) -> tuple[Tensor, Callable[..., Any]]:
            batch = next(data_iterator)
            logits, _ = forward(iter([batch]), model)
            return logits, lambda logits, non_loss_data=True: self._log_probs(logits, batch[0], inference_only)

        return forward_step

    @torch.no_grad()
    def infer(self, inference_batch: dict[str, Any]) -> dict[str, Tensor]:
        """One turn for each state: `text` [b, longest + max_length], `length` [b] and a `seed` that decides the draws.

        The answer has NeMo-Aligner's keys (`generation.generate_turns`); from servers also `lost` [b] bool.
        """
        sample = generate_turns if self.served is None else self.served.generate_turns
        return sample(
            self,
            inference_batch["text"].cuda(non_blocking=True),
            inference_batch["length"].cuda(non_blocking=True),
            inference_batch["seed"],
            self.stop_ids,
        )
