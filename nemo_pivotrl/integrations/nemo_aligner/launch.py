"""The steps that NeMo-Aligner's launch scripts share, in their order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nemo_pivotrl.config.nemo_aligner import recipe_of, register_resolvers
from nemo_pivotrl.config.nemo_aligner_blocks import FILE, plain
from nemo_pivotrl.integrations.nemo_aligner.registration import register
from nemo_pivotrl.integrations.nemo_aligner.state import TrainingState
from nemo_pivotrl.integrations.nemo_aligner.versions import require

require()

from megatron.core.utils import divide  # noqa: E402
from nemo.utils import logging  # noqa: E402
from nemo.utils.exp_manager import exp_manager  # noqa: E402
from nemo_aligner.utils import parallel_state  # noqa: E402
from nemo_aligner.utils.distributed import Timer  # noqa: E402
from nemo_aligner.utils.train_script_utils import (  # noqa: E402
    CustomLoggerWrapper,
    add_custom_checkpoint_callback,
    extract_optimizer_scheduler_from_ptl_model,
    init_distributed,
    init_peft,
    init_using_ptl,
    resolve_and_create_trainer,
)
from nemo_aligner.utils.utils import load_and_override_model_config, load_from_nemo  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402


def prepare() -> None:
    """What a launch script does before Hydra reads its config: resolvers for the YAML files, our classes' names for NeMo."""
    register_resolvers()
    register()


def start(cfg: Any, algorithm: str, model_cls: Any) -> tuple[Any, Any, TrainingState]:
    """(Lightning trainer, model out of `pretrained_checkpoint`, state) of a config; `trainer.<algorithm>` is its block."""
    path = cfg.pretrained_checkpoint.restore_from_path
    cfg.model = load_and_override_model_config(path, cfg.model)
    recipe_of(plain(cfg), FILE)  # everything that is wrong with it, at once
    logging.info(f"\n{OmegaConf.to_yaml(cfg)}")
    trainer, state = lightning(cfg, algorithm)
    model = load_from_nemo(model_cls, cfg.model, trainer, strict=True, restore_path=path)
    init_peft(model, cfg.model)
    return trainer, model, state


def lightning(cfg: Any, algorithm: str) -> tuple[Any, TrainingState]:
    """The Lightning trainer of a config, with NeMo's experiment folder and our state in it."""
    trainer = resolve_and_create_trainer(cfg, algorithm)
    exp_manager(trainer, cfg.exp_manager)
    state = TrainingState()
    trainer.callbacks.append(state)
    return trainer, state


def join(cfg: Any, trainer: Any, model: Any) -> None:
    """Join torch.distributed and make Megatron's groups."""
    init_distributed(trainer, model, cfg.model.get("transformer_engine", False))


def set_up(cfg: Any, trainer: Any, model: Any, train_ds: Any, dataloader: Any = None) -> dict[str, Any]:
    """Optimiser, resumed state and logging: the constructor keywords that every NeMo-Aligner trainer has.

    Without a `dataloader` NeMo gets one that only says how many optimiser steps an epoch has, and never loads anything.
    """
    counted = dataloader
    if counted is None:
        size = divide(cfg.model.global_batch_size, parallel_state.get_data_parallel_world_size())
        counted = torch.utils.data.DataLoader(dataset=train_ds, batch_size=size)
    init_using_ptl(trainer, model, counted, train_ds)
    if dataloader is None:
        del model._train_dl
    optimizer, scheduler = extract_optimizer_scheduler_from_ptl_model(model)
    logger = CustomLoggerWrapper(trainer.loggers)
    logger.log_hyperparams(OmegaConf.to_container(cfg))
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "logger": logger,
        "ckpt_callback": add_custom_checkpoint_callback(trainer, model),
        "run_timer": Timer(cfg.exp_manager.get("max_time_per_run")),
    }


def datasets(cfg: Any, model: Any, build: Callable[..., Any]) -> Any:
    """(train, validation, test) of `model.data` by an Aligner-style builder."""
    return build(
        cfg=cfg.model,
        data_prefix=cfg.model.data.data_prefix,
        data_impl=cfg.model.data.data_impl,
        splits_string=cfg.model.data.splits_string,
        train_valid_test_num_samples=[-1 * cfg.model.global_batch_size] * 3,
        seq_length=cfg.model.data.seq_length,
        seed=cfg.model.seed,
        tokenizer=model.tokenizer,
    )
