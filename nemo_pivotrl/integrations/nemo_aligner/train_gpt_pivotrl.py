"""Train a GPT policy with PivotRL: `python -m nemo_pivotrl.integrations.nemo_aligner.train_gpt_pivotrl key=value ...`.

Follows NeMo-Aligner's `train_gpt_reinforce_actor.py` step by step; the config is `conf/gpt_pivotrl.yaml`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from nemo_pivotrl.integrations.nemo_aligner.versions import require

require()

import torch.multiprocessing as mp  # noqa: E402
from nemo.core.config import hydra_runner  # noqa: E402
from nemo_aligner.data.nlp.builders import build_dataloader  # noqa: E402
from nemo_aligner.utils.batch_iterators import get_batch_iterator_cls  # noqa: E402
from nemo_aligner.utils.utils import retrieve_model_state_dict_in_cpu  # noqa: E402

from nemo_pivotrl.config.nemo_aligner_blocks import (  # noqa: E402
    PivotRLModelBlock,
    PivotRLTrainerBlock,
    check_pivotrl,
    read_block,
)
from nemo_pivotrl.integrations.nemo_aligner import launch  # noqa: E402
from nemo_pivotrl.integrations.nemo_aligner.actor import MegatronGPTPivotRLActorModel  # noqa: E402
from nemo_pivotrl.integrations.nemo_aligner.pivot_data import build_pivot_datasets, collate_pivots, make_verifier  # noqa: E402
from nemo_pivotrl.integrations.nemo_aligner.state import TrainingState  # noqa: E402
from nemo_pivotrl.integrations.nemo_aligner.trainer import PivotRLTrainer  # noqa: E402

launch.prepare()


def make_trainer(cfg: Any, lightning: Any, model: Any, state: TrainingState) -> PivotRLTrainer:
    """The trainer of a config around a model, resumed where exp_manager found a checkpoint."""
    trainer_block = read_block(PivotRLTrainerBlock, cfg.trainer.pivotrl, "trainer.pivotrl")
    block = read_block(PivotRLModelBlock, cfg.model.pivotrl, "model.pivotrl")
    check_pivotrl(trainer_block, block, cfg.model.global_batch_size)
    if trainer_block.initial_policy_kl_penalty > 0 and cfg.model.peft.peft_scheme == "none":
        model.init_policy_state_dict = retrieve_model_state_dict_in_cpu(
            model, megatron_amp_O2=cfg.model.get("megatron_amp_O2", False)
        )
    launch.join(cfg, lightning, model)
    train_ds, validation_ds, _ = launch.datasets(cfg, model, build_pivot_datasets)
    collate = partial(
        collate_pivots, response_token_length=block.length_params.max_length, eos_id=model.tokenizer.eos_id
    )
    loader = partial(build_dataloader, cfg=cfg, collate_fn=collate, load_gbs=False)
    trainer = PivotRLTrainer(
        cfg=cfg.trainer.pivotrl,
        train_dataloader_builder=partial(
            loader, dataset=train_ds, mbs=block.rollout_micro_batch_size, gbs=block.num_rollout_samples
        ),
        val_dataloader_builder=partial(
            loader,
            dataset=validation_ds,
            mbs=block.val_rollout_micro_batch_size,
            gbs=block.num_val_samples,
            use_random_sampler=False,
        ),
        collate_fn=collate,
        rm=make_verifier(model.tokenizer, trainer_block, block),
        batch_iterator_cls=get_batch_iterator_cls(cfg.trainer.pivotrl.get("batch_iterator", {})),
        **launch.set_up(cfg, lightning, model, train_ds),
    )
    state.attach(trainer, resumed=lightning.ckpt_path is not None)
    return trainer


@hydra_runner(config_path="conf", config_name="gpt_pivotrl")  # type: ignore[untyped-decorator]
def main(cfg: Any) -> None:
    """Train as `cfg` says."""
    lightning, model, state = launch.start(cfg, "pivotrl", MegatronGPTPivotRLActorModel)
    trainer = make_trainer(cfg, lightning, model, state)
    try:
        trainer.fit()
    finally:
        trainer.rm.close()


if __name__ == "__main__":
    mp.set_start_method("spawn", force=True)
    main()
