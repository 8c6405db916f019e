"""The launch scripts from a `.nemo` file to a `.nemo` file, by their own command lines."""

from pathlib import Path
from typing import Any

import pytest
from conftest import Run

SMALL = [
    "trainer.devices=1",
    "trainer.accelerator=cpu",
    "trainer.precision=32",
    "exp_manager.explicit_log_dir=logs",
    "model.megatron_amp_O2=false",
    "model.encoder_seq_length=128",
    "model.micro_batch_size=4",
    "~model.optim",
    "+model.optim={name: sgd, lr: 0.05, weight_decay: 0.0}",
]
PIVOTRL = [
    "trainer.pivotrl.max_steps=-1",
    "trainer.pivotrl.val_check_interval=3",
    "trainer.pivotrl.num_rollouts_per_prompt=4",
    "trainer.pivotrl.initial_policy_kl_penalty=0.02",
    "model.pivotrl.rollout_micro_batch_size=2",
    "model.pivotrl.num_rollout_samples=4",
    "model.pivotrl.length_params.max_length=8",
    "model.pivotrl.offload_adam_states=false",
    "model.global_batch_size=16",
]
LLMDOCTOR = ["trainer.llmdoctor.max_steps=2", "trainer.llmdoctor.val_check_interval=2", "model.global_batch_size=4"]


def series(found: dict[str, Any], name: str) -> list[Any]:
    return [row[name] for row in found["rows"] if name in row]


def data(path: str) -> list[str]:
    return [f"model.data.data_prefix.{split}=[{path}]" for split in ("train", "validation", "test")]


def test_pivotrl_from_nemo_through_an_epoch_to_nemo_and_on_from_it(run: Run, tmp_path: Path) -> None:
    run("save_nemo")
    arguments = [*SMALL, *PIVOTRL, *data("pivots.jsonl")]
    start = "pretrained_checkpoint.restore_from_path=start.nemo"
    (found,) = run("script", name="train_gpt_pivotrl", arguments=[*arguments, start])
    assert found["state"]["step"] == 3  # max_steps -1: twelve pivots, four a step
    assert series(found, "train_optim/kl")[0] == pytest.approx(0.0, abs=1e-9)
    assert series(found, "train_optim/kl")[-1] > 0.0
    assert len(series(found, "val_rollouts/rewards")) == 1
    (written,) = (tmp_path / "logs/checkpoints").glob("*.nemo")
    again = [*arguments, f"pretrained_checkpoint.restore_from_path={written}", "exp_manager.explicit_log_dir=logs2"]
    again += ["model.optim.lr=0.0", "trainer.pivotrl.max_steps=1", "trainer.pivotrl.save_interval=0"]
    again += ["trainer.pivotrl.val_check_interval=0"]
    (resumed,) = run("script", name="train_gpt_pivotrl", arguments=again)
    assert resumed["norm"] == found["norm"]
    assert resumed["state"]["step"] == 1


def test_llmdoctor_starts_from_a_policy_without_a_head(run: Run, tmp_path: Path) -> None:
    run("save_nemo")
    arguments = [*SMALL, *LLMDOCTOR, *data("token_rewards.jsonl"), "model.optim.lr=0.002"]
    start = "pretrained_checkpoint.restore_from_path=start.nemo"
    (found,) = run("script", name="train_gpt_llmdoctor", arguments=[*arguments, start])
    assert series(found, "train/chosen_drift")[0] == pytest.approx(0.0, abs=1e-5)  # anchored to the start model
    assert len(series(found, "val/loss")) == 1
    (written,) = (tmp_path / "logs/checkpoints").glob("*.nemo")
    again = [*arguments, f"pretrained_checkpoint.restore_from_path={written}", "exp_manager.explicit_log_dir=logs2"]
    again += ["model.optim.lr=0.0", "trainer.llmdoctor.max_steps=1", "trainer.llmdoctor.save_interval=0"]
    (trained,) = run("script", name="train_gpt_llmdoctor", arguments=[*again, "trainer.llmdoctor.val_check_interval=0"])
    assert trained["norm"] == found["norm"]
