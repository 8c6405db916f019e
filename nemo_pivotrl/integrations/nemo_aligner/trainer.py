"""`PivotRLTrainer`: NeMo-Aligner's REINFORCE loop around PivotRL's rollouts and advantages.

A step samples `num_rollouts_per_prompt` turns of each of `num_rollout_samples` pivots, judges them, takes advantages within
each pivot's group, and makes one optimiser step for every `model.global_batch_size` rows. All turns of a pivot stay on one
data-parallel rank, so that no rank trains on another's rows and every row trains once. Which states a step draws and which
turns it samples follow from its number: a resumed run goes on as if it had not been stopped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_pivotrl.algorithms import pivotrl
from nemo_pivotrl.components.rollout import sample_seed
from nemo_pivotrl.config.nemo_aligner_blocks import PivotRLTrainerBlock, read_block
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.integrations.nemo_aligner.pivot_data import Judged
from nemo_pivotrl.integrations.nemo_aligner.versions import require, without_tensorrt_llm

require()

from nemo_aligner.utils import parallel_state  # noqa: E402
from nemo_aligner.utils.distributed import all_reduce_dict  # noqa: E402
from nemo_aligner.utils.ppo_utils import create_mask  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402

with without_tensorrt_llm():
    from nemo_aligner.algorithms.reinforce import (
        ReinforceRolloutBatch,
        ReinforceTrainer,
        compute_num_rollout_microbatches,
    )

Batch = dict[str, Tensor]


class PivotRLTrainer(ReinforceTrainer):  # type: ignore[misc]
    """Trains a `MegatronGPTPivotRLActorModel`; the constructor's keywords are `ReinforceTrainer`'s.

    `cfg` is the `trainer.pivotrl` block, `rm` a `PivotVerifier`. Raises InputError for a block that it cannot follow.
    """

    def __init__(
        self,
        cfg: DictConfig,
        model: Any,
        optimizer: Any,
        scheduler: Any,
        train_dataloader_builder: Callable[..., Any],
        val_dataloader_builder: Callable[..., Any],
        collate_fn: Callable[..., Any],
        rm: Any,
        batch_iterator_cls: Any,
        logger: Any,
        ckpt_callback: Any,
        run_timer: Any,
    ):
        self.block: PivotRLTrainerBlock = read_block(PivotRLTrainerBlock, cfg, "trainer.pivotrl")
        complete = OmegaConf.create({**OmegaConf.to_container(cfg), **_read_by_parent(self.block)})
        super().__init__(
            cfg=complete,
            model=model,
            optimizer=optimizer,
            scheduler=scheduler,
            train_dataloader_builder=train_dataloader_builder,
            val_dataloader_builder=val_dataloader_builder,
            collate_fn=collate_fn,
            rm=rm,
            batch_iterator_cls=batch_iterator_cls,
            logger=logger,
            ckpt_callback=ckpt_callback,
            run_timer=run_timer,
        )
        sampler = train_dataloader_builder(consumed_samples=0).batch_sampler
        if self.num_steps_per_epoch == 0:
            found = f"{sampler.total_samples} pivots for batches of {sampler.global_batch_size}"
            remedy = "use at most as many a step as there are"
            raise InputError(Problem("NeMo-Aligner config", None, "model.pivotrl.num_rollout_samples", found, remedy))
        self.pivots_per_step: int = sampler.global_batch_size
        self.pivots_per_epoch: int = (
            sampler.total_samples - sampler.total_samples % sampler.micro_batch_times_data_parallel_size
        )

    # ---- rollouts ----

    @torch.no_grad()
    def generate_rollouts(self) -> tuple[Batch, dict[str, Any], dict[str, float]]:
        """(training rows of this rank, metrics over all ranks with one turn as `table`, seconds) of this step."""
        with self.timer("prepare_for_inference"):
            self.model.prepare_for_inference()
        rollouts, metrics = self._run_inference(self.train_dataloader_builder, self._position(), is_validation=False)
        with self.timer("finish_inference"):
            self.model.finish_inference()
        rows, more = self.generate_pivotrl_data(rollouts)
        self.consumed_samples += self.pivots_per_step
        metrics |= {**more, "consumed_samples": self.consumed_samples}
        return rows, metrics, self.timer.consume_durations()

    def _position(self) -> int:
        """Where the sampler begins: the pivots that an epoch has left over after whole batches are not drawn.

        The parent counts sampled turns here, which skips all but one of `num_rollouts_per_prompt` pivots.
        """
        done = self.step % self.num_steps_per_epoch
        return self.epoch * self.pivots_per_epoch + done * self.pivots_per_step

    def _run_inference(
        self, dataloader_builder: Callable[..., Any], consumed_samples: int, is_validation: bool
    ) -> tuple[Batch, dict[str, Any]]:
        """Sample and judge this rank's share of a batch: (rollouts [P*G], each pivot's G turns together; metrics)."""
        dataloader = dataloader_builder(consumed_samples=consumed_samples)
        batches = self.batch_iterator_cls(
            iter(dataloader.batch_sampler),
            compute_num_rollout_microbatches(dataloader),
            dataloader.dataset,
            self.collate_fn,
        )
        group = 1 if is_validation else self.block.num_rollouts_per_prompt
        rank = parallel_state.get_data_parallel_rank()
        # a validation draws the same every time, so that only the policy changes
        drawn = ("validation",) if is_validation else ("train", self.step)
        turns: list[Batch] = []
        judged: list[Judged] = []
        with self.timer("generate"):
            for number, batch in enumerate(batches):
                for k in range(group):
                    seed = sample_seed(*drawn, self.block.seed, rank, number, k)
                    turns.append(self.model.infer({**batch, "seed": seed}))
                    judged.append(self.rm.infer_rm({**turns[-1], "pivot": batch["pivot"]}))
        with self.timer("verifier_wait"):
            verdicts = torch.stack([j.result().cpu() for j in judged])
        rollouts = self._stacked(turns, group)
        rollouts["rewards"], rollouts["malformed"] = _by_pivot(verdicts, group).unbind(1)
        if "lost" in rollouts:  # there is no turn, so that what the verifier says of its absence is no verdict
            lost = rollouts["lost"].cpu()
            rollouts["rewards"] = rollouts["rewards"].masked_fill(lost, torch.nan)
            rollouts["malformed"] = rollouts["malformed"].masked_fill(lost, 0.0)
        if not is_validation:
            with self.timer("logprobs"):
                rollouts["logprobs"] = self.model.get_inference_log_probs(rollouts["response_tokens"])
            if self.compute_init_policy_kl:
                with self.timer("init_logprobs"):
                    rollouts["init_logprobs"] = self.model.get_init_policy_logprobs(rollouts["response_tokens"])
        return rollouts, self.compute_rollout_metrics(rollouts)

    def _stacked(self, turns: Sequence[Batch], group: int) -> Batch:
        """The turns as rows, padded to one width; a pivot's `group` turns follow each other."""
        if not turns:
            problem = (
                "no batch of states for this rank: fewer held-out states than val_rollout_micro_batch_size * ranks"
            )
            raise InputError(Problem("NeMo-Aligner config", None, "model.pivotrl.num_val_samples", "0 states", problem))
        width = self.block.rollout_batch_seq_length
        data = ReinforceRolloutBatch.from_rollout_batches(turns, self.model.tokenizer.eos_id, width).data
        if self.model.cfg.get("sequence_parallel", False):
            missing = -data["response_tokens"].size(1) % self.model.cfg.tensor_model_parallel_size
            tokens = torch.nn.functional.pad(data["response_tokens"], (0, missing), value=self.model.tokenizer.eos_id)
            data["response_tokens"] = tokens
        return {key: _by_pivot(value.view(len(turns), -1, *value.shape[1:]), group) for key, value in data.items()}

    def generate_pivotrl_data(self, rollouts: Batch) -> tuple[Batch, dict[str, float]]:
        """(what the actor trains on, metrics over all ranks). Raises InputError when too many turns have no verdict."""
        block, group = self.block, self.block.num_rollouts_per_prompt
        rewards = rollouts["rewards"].view(-1, group)
        valid = ~rewards.isnan()
        lost = float(rollouts["lost"].sum()) if "lost" in rollouts else 0.0
        failed = all_reduce_dict(
            {"failed": float((~valid).sum()), "turns": float(valid.numel()), "lost": lost},
            group=parallel_state.get_data_parallel_group(),
        )
        if failed["failed"] > block.max_failure_share * failed["turns"]:
            found = f"{failed['failed']:.0f} of {failed['turns']:.0f} turns of step {self.step} could not be judged"
            found += f"; the servers lost {failed['lost']:.0f} of them" if failed["lost"] else ""
            mended = "servers" if failed["lost"] else "verifier"
            remedy = f"mend the {mended}, then run the same command again: it resumes"
            raise InputError(Problem(mended, None, "trainer.pivotrl.max_failure_share", found, remedy))
        if block.overlong_filtering:
            valid &= rollouts["is_end"].cpu().view(-1, group)
        advantages = pivotrl.group_advantages(
            rewards.nan_to_num(0.0),
            valid,
            block.use_leave_one_out_baseline,
            block.normalize_rewards,
            block.zero_variance_tolerance,
            clip=block.advantage_clip,
        )
        if block.malformed_action_advantage is not None:
            broken = rollouts["malformed"].view(-1, group).bool() & valid
            advantages = torch.where(broken, torch.full_like(advantages, block.malformed_action_advantage), advantages)
        log_probs, counted = rollouts["logprobs"].cpu(), valid.flatten().float()
        mask = create_mask(log_probs, rollouts["prompt_lengths"], rollouts["response_lengths"]) * counted[:, None]
        rows = {
            "response_tokens": rollouts["response_tokens"].cpu(),
            "prev_logprobs": log_probs,
            "advantages": advantages.flatten(),
            "valid": counted,
            "mask": mask,
        }
        if "init_logprobs" in rollouts:
            rows["init_logprobs"] = rollouts["init_logprobs"].cpu()
        trained = all_reduce_dict(
            {"trained_share": float((rows["advantages"] != 0).sum()), "turns": float(len(counted))},
            group=parallel_state.get_data_parallel_group(),
        )
        return rows, {"trained_share": trained["trained_share"] / trained["turns"]}

    def compute_rollout_metrics(self, rollout_batch: Batch) -> dict[str, Any]:
        """Means over all ranks' turns. Those without a verdict have no part in `rewards`, and those that a sampler lost in
        nothing but `failed`, where both count. `table` is this rank's first turn."""
        rewards, lengths = rollout_batch["rewards"], rollout_batch["response_lengths"] - rollout_batch["prompt_lengths"]
        judged, sampled = ~rewards.isnan(), torch.ones(len(rewards), dtype=torch.bool)
        if "lost" in rollout_batch:
            sampled = ~rollout_batch["lost"].cpu()

        def total(value: Tensor) -> float:
            return float(value.cpu()[sampled].float().sum())

        by_pivot = (
            rewards.view(-1, self.block.num_rollouts_per_prompt) if "logprobs" in rollout_batch else rewards[:, None]
        )
        signal = (
            by_pivot.nan_to_num(-1.0).amax(1) - by_pivot.nan_to_num(2.0).amin(1) > self.block.zero_variance_tolerance
        )
        sums = {
            "rollout_size": float(len(rewards)),
            "judged": float(judged.sum()),
            "pivots": float(len(by_pivot)),
            "rewards": float(rewards.nansum()),
            "failed": float((~judged).sum()),
            "mixed_group_share": float(signal.sum()),
            "sampled": float(sampled.sum()),
            "malformed_share": total(rollout_batch["malformed"]),
            "fraction_of_samples_properly_ended": total(rollout_batch["is_end"]),
            "prompt_lengths": total(rollout_batch["prompt_lengths"]),
            "response_lengths": total(rollout_batch["response_lengths"]),
            "generation_length": total(lengths),
        }
        whole = all_reduce_dict(sums, dtype=torch.float64, group=parallel_state.get_data_parallel_group())
        over = {"rewards": "judged", "mixed_group_share": "pivots", "rollout_size": "", "failed": ""}
        metrics: dict[str, Any] = {
            name: value / max(1.0, whole[over.get(name, "sampled")]) if over.get(name, "_") else value
            for name, value in whole.items()
            if name not in ("judged", "pivots", "sampled")
        }
        start, stop = int(rollout_batch["prompt_lengths"][0]), int(rollout_batch["response_lengths"][0])
        tokens = rollout_batch["response_tokens"][0].tolist()
        text = self.model.tokenizer.ids_to_text
        table = {"reward": float(rewards[0]), "prompt": text(tokens[:start]), "response": text(tokens[start:stop])}
        return {**metrics, "table": table}

    # ---- state ----

    def state_dict(self) -> dict[str, int]:
        """Counters; `state.TrainingState` puts them into the checkpoint."""
        return {
            "step": self.step,
            "consumed_samples": self.consumed_samples,
            "epoch": self.epoch,
            "pivotrl_optimization_step": self.reinforce_optimization_step,
        }

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Go on where `state_dict` was taken. Raises KeyError for a state without one of the counters."""
        self.step = state_dict["step"]
        self.consumed_samples = state_dict["consumed_samples"]
        self.reinforce_optimization_step = state_dict["pivotrl_optimization_step"]
        self.set_max_steps()


def _read_by_parent(block: PivotRLTrainerBlock) -> dict[str, Any]:
    """Keys that `ReinforceTrainer` reads without a default."""
    names = (
        "max_epochs",
        "max_steps",
        "val_check_interval",
        "save_interval",
        "gradient_clip_val",
        "initial_policy_kl_penalty",
        "rollout_batch_seq_length",
        "num_rollouts_per_prompt",
        "model_gbs",
        "model_mbs",
    )
    return {name: value for name, value in dataclasses.asdict(block).items() if name in names}


def _by_pivot(value: Tensor, group: int) -> Tensor:
    """[calls, b, ...] of calls that each sampled one turn of b pivots, to rows [P*group, ...] pivot by pivot."""
    size, rest = value.shape[1], value.shape[2:]
    return value.view(-1, group, size, *rest).transpose(1, 2).reshape(-1, *rest)
