"""`MegatronGPTLLMDoctorModel`: a GPT with a head for log V, trained on pairs of answers with token rewards.

The head stands on the last pipeline stage, is the same on every tensor-parallel rank, starts at zero and computes in
float32. The loss is `llmdoctor.tfpo_loss` on whole sequences whose prompt is masked out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from nemo_pivotrl.algorithms.llmdoctor import plan, tfpo_loss
from nemo_pivotrl.config.nemo_aligner_blocks import LLMDoctorModelBlock, read_block
from nemo_pivotrl.integrations.nemo_aligner.actor import data_parallel_sum, policy_log_probs, reduced_metrics
from nemo_pivotrl.integrations.nemo_aligner.versions import require

require()

from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.num_microbatches_calculator import get_num_microbatches  # noqa: E402
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region  # noqa: E402
from megatron.core.utils import divide  # noqa: E402
from nemo.collections.nlp.models.language_modeling import megatron_gpt_model  # noqa: E402
from nemo.collections.nlp.modules.common.megatron.utils import (  # noqa: E402
    get_iterator_k_split,
    get_ltor_masks_and_position_ids,
)
from nemo.collections.nlp.parts.mixins.nlp_adapter_mixins import NLPAdapterModelMixin  # noqa: E402
from nemo_aligner.models.alignable_interface import SupervisedInterface  # noqa: E402
from nemo_aligner.utils import parallel_state  # noqa: E402
from nemo_aligner.utils.distributed import broadcast_2d_tensor_within_pp  # noqa: E402
from nemo_aligner.utils.train_utils import (  # noqa: E402
    finish_validation_step,
    grad_reductions,
    prepare_for_training_step,
    prepare_for_validation_step,
    set_sync_funcs,
)
from nemo_aligner.utils.utils import adapter_control, cpu_weight_swap  # noqa: E402

METRICS = (
    *("loss", "subtb", "hinge", "compared", "margin", "target_margin", "ordered"),
    *("chosen_drift", "rejected_drift", "ordered_drift"),
)
Step = Callable[[Iterator[dict[str, Tensor]], Any], tuple[Any, Callable[..., Any]]]


class FlowGPTModel(GPTModel):  # type: ignore[misc]
    """megatron-core's GPT whose last stage answers with (logits [b, S, V / tensor-parallel size], log V [b, S])."""

    with_head = True
    """False leaves the head out of what is saved and loaded: a start model has none."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        if self.post_process:
            self.doctor_head = torch.nn.Linear(config.hidden_size, 1)
            torch.nn.init.zeros_(self.doctor_head.weight)
            torch.nn.init.zeros_(self.doctor_head.bias)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As GPTModel's, with log V beside the logits."""
        with patch.object(self, "post_process", False):
            hidden = super().forward(*args, **kwargs)
        if not self.post_process:
            return hidden
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits, _ = self.output_layer(hidden, weight=weight)
        if self.config.sequence_parallel:
            # each rank has the whole gradient of log V already, so that its own part is a slice and no sum
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        head = self.doctor_head
        values = torch.nn.functional.linear(hidden.float(), head.weight.float(), head.bias.float())
        return logits.transpose(0, 1).contiguous(), values[:, :, 0].transpose(0, 1)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As GPTModel's; the head only `with_head`."""
        found = super().sharded_state_dict(*args, **kwargs)
        return found if self.with_head else {k: v for k, v in found.items() if "doctor_head" not in k}

    def load_state_dict(self, state_dict: Any, strict: bool = True, **kwargs: Any) -> Any:
        """As torch's; without `with_head` the head stays as it is, and all else must still be there."""
        if not self.with_head and self.post_process:
            head = self.doctor_head
            state_dict = {**state_dict, **{f"doctor_head.{k}": v for k, v in head.state_dict().items()}}
        return super().load_state_dict(state_dict, strict=strict, **kwargs)


@contextlib.contextmanager
def headless() -> Iterator[None]:
    """Load a start model that has no head: ours stays at zero."""
    with patch.object(FlowGPTModel, "with_head", False):
        yield


class MegatronGPTLLMDoctorModel(  # type: ignore[misc]
    NLPAdapterModelMixin, megatron_gpt_model.MegatronGPTModel, SupervisedInterface
):
    """A doctor. `cfg` is the `model` block, with `model.llmdoctor` (`config.nemo_aligner_blocks.LLMDoctorModelBlock`)."""

    def __init__(self, cfg: Any, trainer: Any):
        self.block: LLMDoctorModelBlock = read_block(LLMDoctorModelBlock, cfg.llmdoctor, "model.llmdoctor")
        super().__init__(cfg, trainer=trainer)
        self.automatic_optimization = False
        self.ref_policy_state_dict: dict[str, Any] | None = None

    def model_provider_func(self, pre_process: bool, post_process: bool) -> Any:
        """A pipeline stage, built as NeMo builds a GPT's."""
        with patch.object(megatron_gpt_model, "MCoreGPTModel", FlowGPTModel):
            return super().model_provider_func(pre_process, post_process)

    @property
    def anchored(self) -> bool:
        """Whether the loss reads the reference's log-probabilities."""
        return self.block.anchor == "reference"

    def get_forward_output_and_loss_func(
        self, normaliser: float = 1.0, scale: float = 1.0, logprobs_only: bool = False
    ) -> Step:
        """Forward step and loss of one micro-batch of pairs; `scale` undoes the averages that follow."""

        def forward_step(data_iterator: Iterator[dict[str, Tensor]], model: Any) -> tuple[Any, Callable[..., Any]]:
            batch = {key: value.cuda(non_blocking=True) for key, value in next(data_iterator).items()}
            tokens = torch.cat([batch["chosen"], batch["rejected"]])
            mask, position_ids = self._masks(tokens)
            output = model(input_ids=tokens, position_ids=position_ids, attention_mask=mask, labels=None)
            if not parallel_state.is_pipeline_last_stage():
                output = output.to(dtype=self.autocast_dtype)  # what the next stage expects to receive

            def log_probs_of(output: Any, non_loss_data: bool = True) -> Tensor:
                return policy_log_probs(output[0], tokens, self.tokenizer.vocab_size, 1.0, inference=True)

            def loss_func(output: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
                logits, log_values = output
                log_probs = policy_log_probs(logits, tokens, self.tokenizer.vocab_size, 1.0, inference=False)
                both = {
                    k: torch.cat([batch[f"chosen_{k}"], batch[f"rejected_{k}"]]) for k in ("rewards", "mask", "ended")
                }
                rows = torch.arange(len(tokens), device=tokens.device).view(2, -1).T
                layout = plan(tokens[:, 1:], both["rewards"], both["mask"], both["ended"], rows, self.block)
                reference = None
                if self.anchored:
                    names = ("ref_policy_log_probs_chosen", "ref_policy_log_probs_rejected")
                    reference = torch.cat([batch[name] for name in names])
                loss, metrics = tfpo_loss(log_probs, log_values, layout, normaliser, self.block, reference)
                return loss * scale, metrics

            return output, log_probs_of if logprobs_only else loss_func

        return forward_step

    def get_loss_and_metrics(self, batch: dict[str, Tensor], forward_only: bool) -> tuple[float, dict[str, float]]:
        """Loss and metrics of all ranks' pairs, backward included unless `forward_only`.

        Everything is a mean over the pairs of all data-parallel ranks; see the actor's method for `scale`.
        """
        pairs = float(data_parallel_sum(torch.tensor(float(len(batch["chosen"])), dtype=torch.float64)))
        scale = get_num_microbatches() * parallel_state.get_data_parallel_world_size()
        parts = self._run(
            batch,
            self.get_forward_output_and_loss_func(pairs, scale),
            get_num_microbatches(),
            self.cfg.micro_batch_size,
            forward_only=forward_only,
        )
        metrics = reduced_metrics(parts, METRICS)
        return metrics["loss"], metrics

    def _run(
        self, batch: dict[str, Tensor], step: Step, number: int, mbs: int, forward_only: bool, collect: bool = False
    ) -> list[Any]:
        """What the last stage returned for each of `number` micro-batches of `mbs` pairs; [] on the other stages."""
        if len(batch["chosen"]) != number * mbs:
            raise ValueError(f"{len(batch['chosen'])} pairs for {number} micro-batches of {mbs}")
        set_sync_funcs(self, forward_only)
        found: list[Any] = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=self._make_data_iterator_list(get_iterator_k_split(batch, number)),
            model=self.model,
            num_microbatches=number,
            forward_only=forward_only,
            seq_length=batch["chosen"].size(1),
            micro_batch_size=2 * mbs,  # both answers of a pair
            collect_non_loss_data=collect,
        )
        return found

    def _masks(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        mask, _, position_ids = get_ltor_masks_and_position_ids(
            data=tokens,
            eod_token=self.tokenizer.eos_id,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
        )
        return mask.expand(tokens.size(0), -1, -1, -1), position_ids.expand(tokens.size(0), -1)

    # ---- the reference ----

    @torch.no_grad()
    def get_inference_log_probs(self, batch: dict[str, Tensor]) -> Tensor:
        """[2b, S-1] log-probabilities (nats) of the chosen answers' rows, then the rejected ones'."""
        mbs = self.block.log_prob_forward_micro_batch_size
        number = divide(len(batch["chosen"]), mbs)
        step = self.get_forward_output_and_loss_func(logprobs_only=True)
        parts = self._run(batch, step, number, mbs, forward_only=True, collect=True)
        halves = [part.chunk(2) for part in parts]
        whole = torch.cat([torch.cat(side) for side in zip(*halves, strict=True)]) if halves else None
        found: Tensor = broadcast_2d_tensor_within_pp(whole)
        return found

    def get_ref_policy_logprobs(self, batch: dict[str, Tensor]) -> Tensor:
        """`get_inference_log_probs` of the model as it was before training."""
        if self.use_peft and self.ref_policy_state_dict is None:
            swapped = adapter_control(self)
        else:
            swapped = cpu_weight_swap(self, self.ref_policy_state_dict, megatron_amp_O2=self.megatron_amp_O2)
        with swapped:
            return self.get_inference_log_probs(batch)

    # ---- the rest of SupervisedInterface ----

    def prepare_for_training_step(self) -> None:
        """The trainer zeroes the gradients."""
        prepare_for_training_step(self, zero_grad=False)

    def finish_training_step(self) -> None:
        """Add up gradients over the ranks."""
        grad_reductions(self)

    def prepare_for_validation_step(self) -> None:
        """Evaluation mode."""
        prepare_for_validation_step(self)

    def finish_validation_step(self) -> None:
        """Back to training mode."""
        finish_validation_step(self)
