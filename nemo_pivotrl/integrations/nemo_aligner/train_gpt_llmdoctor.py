"""Train a doctor on token rewards: `python -m nemo_pivotrl.integrations.nemo_aligner.train_gpt_llmdoctor key=value ...`.

Follows NeMo-Aligner's `train_gpt_dpo.py` step by step; the config is `conf/gpt_llmdoctor.yaml`.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

from nemo_pivotrl.integrations.nemo_aligner.versions import require

require()

import torch.multiprocessing as mp  # noqa: E402
from nemo.core.config import hydra_runner  # noqa: E402
from nemo_aligner.data.nlp.builders import build_dataloader, identity_collate  # noqa: E402
from nemo_aligner.utils.utils import load_checkpoint_model_config, retrieve_model_state_dict_in_cpu  # noqa: E402

from nemo_pivotrl.integrations.nemo_aligner import launch  # noqa: E402
from nemo_pivotrl.integrations.nemo_aligner.doctor_data import build_token_reward_datasets, collate_pairs  # noqa: E402
from nemo_pivotrl.integrations.nemo_aligner.doctor_model import MegatronGPTLLMDoctorModel, headless  # noqa: E402
from nemo_pivotrl.integrations.nemo_aligner.doctor_trainer import LLMDoctorTrainer  # noqa: E402
from nemo_pivotrl.integrations.nemo_aligner.state import TrainingState  # noqa: E402

launch.prepare()


def make_trainer(cfg: Any, lightning: Any, model: Any, state: TrainingState) -> LLMDoctorTrainer:
    """The trainer of a config around a model, resumed where exp_manager found a checkpoint."""
    if model.anchored and cfg.model.peft.peft_scheme == "none":
        model.ref_policy_state_dict = retrieve_model_state_dict_in_cpu(
            model, megatron_amp_O2=cfg.model.get("megatron_amp_O2", False)
        )
    launch.join(cfg, lightning, model)
    train_ds, validation_ds, _ = launch.datasets(cfg, model, build_token_reward_datasets)
    loader = partial(
        build_dataloader,
        cfg=cfg,
        consumed_samples=0,  # a resumed run sets it once the state is read
        mbs=cfg.model.micro_batch_size,
        gbs=cfg.model.global_batch_size,
        load_gbs=True,
        collate_fn=identity_collate,
    )
    train_dataloader = loader(dataset=train_ds)
    trainer = LLMDoctorTrainer(
        cfg=cfg.trainer.llmdoctor,
        train_dataloader=train_dataloader,
        val_dataloader=loader(dataset=validation_ds, use_random_sampler=False),
        test_dataloader=None,
        collate_fn=partial(collate_pairs, eos_id=model.tokenizer.eos_id),
        pad_length_to_multiple_of=cfg.model.data.get("pad_length_to_multiple_of", None),
        **launch.set_up(cfg, lightning, model, train_ds, train_dataloader),
    )
    state.attach(trainer, resumed=lightning.ckpt_path is not None)
    return trainer


@hydra_runner(config_path="conf", config_name="gpt_llmdoctor")  # type: ignore[untyped-decorator]
def main(cfg: Any) -> None:
    """Train as `cfg` says. A checkpoint whose config has no `llmdoctor` block has no head either."""
    start_has_head = "llmdoctor" in load_checkpoint_model_config(cfg.pretrained_checkpoint.restore_from_path)
    with contextlib.nullcontext() if start_has_head else headless():
        lightning, model, state = launch.start(cfg, "llmdoctor", MegatronGPTLLMDoctorModel)
    make_trainer(cfg, lightning, model, state).fit()


if __name__ == "__main__":
    mp.set_start_method("spawn", force=True)
    main()
