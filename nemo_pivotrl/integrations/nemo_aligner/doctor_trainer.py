"""`LLMDoctorTrainer`: NeMo-Aligner's DPO loop over pairs with token rewards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from nemo_pivotrl.config.nemo_aligner_blocks import FILE, LLMDoctorTrainerBlock, read_block
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.integrations.nemo_aligner.versions import require

require()

import torch  # noqa: E402
from nemo_aligner.algorithms.dpo import DPOTrainer  # noqa: E402


class LLMDoctorTrainer(DPOTrainer):  # type: ignore[misc]
    """Trains a `MegatronGPTLLMDoctorModel`; the constructor's keywords are `DPOTrainer`'s.

    `cfg` is the `trainer.llmdoctor` block. Raises InputError for a block that it cannot follow.
    """

    def __init__(
        self,
        cfg: Any,
        model: Any,
        optimizer: Any,
        scheduler: Any,
        train_dataloader: Any,
        val_dataloader: Any,
        test_dataloader: Any,
        collate_fn: Callable[..., dict[str, torch.Tensor]],
        logger: Any,
        ckpt_callback: Any,
        run_timer: Any,
        pad_length_to_multiple_of: int | None = None,
    ):
        self.block: LLMDoctorTrainerBlock = read_block(LLMDoctorTrainerBlock, cfg, "trainer.llmdoctor")
        super().__init__(
            cfg=cfg,
            model=model,
            optimizer=optimizer,
            scheduler=scheduler,
            train_dataloader=train_dataloader,
            val_dataloader=val_dataloader,
            test_dataloader=test_dataloader,
            collate_fn=collate_fn,
            logger=logger,
            ckpt_callback=ckpt_callback,
            run_timer=run_timer,
            pad_length_to_multiple_of=pad_length_to_multiple_of,
        )
        problems = []
        if self.num_steps_per_epoch == 0:
            found = f"{train_dataloader.batch_sampler.total_samples} pairs"
            problems.append(Problem(FILE, None, "model.global_batch_size", found, "make a batch no larger than that"))
        if self.block.val_check_interval and self.block.limit_val_batches and not len(val_dataloader):
            found = f"{val_dataloader.batch_sampler.total_samples} held-out pairs make no batch"
            remedy = "lower model.global_batch_size, or set trainer.llmdoctor.val_check_interval to 0"
            problems.append(Problem(FILE, None, "model.global_batch_size", found, remedy))
        if problems:
            raise InputError(problems)

    def augment_dataloader(self, dataloader: Any) -> Iterator[dict[str, torch.Tensor]]:
        """Batches as tensors, with the reference's log-probabilities where the loss is anchored to it."""
        for pairs in dataloader:
            batch = self.collate_fn(pairs, pad_length_to_multiple_of=self.pad_seq_length_to_mult)
            if self.model.anchored:
                chosen, rejected = self.model.get_ref_policy_logprobs(batch).cpu().chunk(2)
                batch |= {"ref_policy_log_probs_chosen": chosen, "ref_policy_log_probs_rejected": rejected}
            yield batch

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Go on where `state_dict` was taken, in the data too. Raises KeyError for a state without one of the counters."""
        self.step = state_dict["step"]
        self.consumed_samples = state_dict["consumed_samples"]
        self.train_dataloader.batch_sampler.consumed_samples = self.consumed_samples
        self.set_max_steps()
