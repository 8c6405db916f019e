"""A NeMo-Aligner config and a recipe are two ways of writing the same settings."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.recipes import ROOT

from nemo_pivotrl import config
from nemo_pivotrl.cli import main
from nemo_pivotrl.config import nemo_aligner as dialect
from nemo_pivotrl.config.load import load_recipe
from nemo_pivotrl.config.nemo_aligner_blocks import (
    LengthParams,
    LLMDoctorModelBlock,
    PivotRLModelBlock,
    PivotRLTrainerBlock,
    served_problems,
)
from nemo_pivotrl.core.errors import InputError

CONFS = sorted(dialect.CONF.glob("*.yaml"))
RECIPES = sorted((ROOT / "recipes/aligner").glob("*.yaml"))
ALIGNER = """
defaults: [gpt_pivotrl, _self_]
trainer:
  precision: 32
  pivotrl: {max_steps: 7, num_rollouts_per_prompt: 8, initial_policy_kl_penalty: 0.1, seed: 3, gradient_clip_val: 2.0}
model:
  tensor_model_parallel_size: 2
  sequence_parallel: true
  global_batch_size: 32
  optim: {name: mcore_distributed_optim, lr: 3e-6, betas: [0.9, 0.95]}
  data: {seq_length: 2048}
  pivotrl:
    num_rollout_samples: 16
    sampling_params: {temperature: 0.7}
    length_params: {max_length: 99}
    verifier: {name: functional}
    loss_fn: {ratio_clip_max: 0.28}
pretrained_checkpoint: {restore_from_path: start.nemo}
exp_manager: {explicit_log_dir: runs/x, create_wandb_logger: true}
"""
OURS = """
seed: 3
run_dir: runs/x
policy:
  model_name: start.nemo
  backend: megatron
  max_total_sequence_length: 2048
  generation: {temperature: 0.7, max_new_tokens: 99}
  lora: {r: 32}
  optimizer: {lr: 3e-6, beta2: 0.95, max_grad_norm: 2.0}
megatron: {tensor_model_parallel_size: 2, sequence_parallel: true, bf16: false}
grpo:
  num_prompts_per_step: 16
  num_generations_per_prompt: 8
  max_num_steps: 7
  num_minibatches: 4
  val_candidates: 16
  val_generations: 1
  pivots: PIVOTS
loss_fn: {ratio_clip_max: 0.28, reference_policy_kl_penalty: 0.1}
verifier: {name: functional, message: exclude}
logger: {tensorboard: true, wandb: true}
"""


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return str(path)


def test_both_dialects_make_the_same_recipe(tmp_path: Path) -> None:
    found = load_recipe(written(tmp_path, ALIGNER))
    assert found == load_recipe(written(tmp_path, OURS.replace("PIVOTS", str(Path("pivots.jsonl").absolute()))))


def test_served_turns_are_vllms_in_a_recipe(tmp_path: Path) -> None:
    text = "defaults: gpt_pivotrl\nmodel: {pivotrl: {generation: servers, hf_folder: start, servers: {servers: [http://a:1]}}}"
    found = load_recipe(written(tmp_path, text))
    assert (found.policy.sampler, found.policy.model_name, found.policy.dtype) == ("vllm", "start", "bfloat16")
    assert found.vllm == config.Vllm(servers=("http://a:1",))
    block = PivotRLModelBlock(generation="servers", length_params=LengthParams(min_length=4))
    assert [p.field.rpartition(".")[2] for p in served_problems(block)] == ["servers", "hf_folder", "min_length"]


def test_llmdoctors_config_makes_its_recipe(tmp_path: Path) -> None:
    text = "defaults: [gpt_llmdoctor, _self_]\ntrainer: {llmdoctor: {max_epochs: 3}}\n"
    text += "model: {global_batch_size: 8, llmdoctor: {gamma: 0.3, objective: kindness, reward: {theta: 0.2}}}\n"
    found = load_recipe(written(tmp_path, text))
    expected = config.Tfpo(
        anchor="reference", gamma=0.3, objective="kindness", pairs_per_step=8, max_num_steps=-1, max_num_epochs=3
    )
    assert (found.algorithm, found.tfpo, found.reward.theta) == ("llmdoctor", expected, 0.2)
    assert found.doctor.backend == "megatron" and found.doctor.optimizer.lr == 1e-5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("trainer: {pivotrl: {num_rollout_per_prompt: 4}}", "did you mean `num_rollouts_per_prompt`"),
        ("model: {pivotrl: {sampling_params: {temprature: 1}}}", "did you mean `temperature`"),
        ("trainer: {pivotrl: {max_steps: many}}", "trainer.pivotrl.max_steps: found many"),
        ("trainer: {pivotrl: {num_rollouts_per_prompt: 1}}", "at least 2"),
        ("modle: {}", "did you mean `model`"),
        ("model: {tensor_model_parallel_size: two}", "model.tensor_model_parallel_size: found two"),
    ],
)
def test_an_unknown_key_fails_with_the_nearest_one(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        load_recipe(written(tmp_path, "defaults: gpt_pivotrl\n" + text))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("trainer: {pivotlr: {}}\nmodel: {}", "did you mean `pivotrl`"),
        ("trainer: {pivotrl: {}}\nmodel: {pivot_rl: {}}", "rename it to `pivotrl`"),
        ("trainer: {pivotrl: {}}\nmodel: {}", "wants model.pivotrl beside it"),
        ("trainer: {devices: 1}\nmodel: {}", "no algorithm"),
    ],
)
def test_a_missing_block_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        load_recipe(written(tmp_path, text))


def test_all_problems_of_both_blocks_come_at_once(tmp_path: Path) -> None:
    text = "defaults: gpt_pivotrl\nfoo: 1\ntrainer: {pivotrl: {a: 1, b: 2}}\nmodel: {pivotrl: {c: 3}}"
    with pytest.raises(InputError) as caught:
        load_recipe(written(tmp_path, text))
    assert len(caught.value.problems) == 4


@pytest.mark.parametrize("path", CONFS + RECIPES, ids=lambda p: p.name)
def test_every_config_of_the_project_is_complete_and_keeps_the_defaults(path: Path) -> None:
    found = load_recipe(str(path))
    if path in CONFS and found.algorithm == "pivotrl":
        usual = config.Grpo()
        for name in ("num_prompts_per_step", "num_generations_per_prompt", "normalize_rewards", "advantage_clip"):
            assert getattr(found.grpo, name) == getattr(usual, name), name
        assert found.loss_fn == config.LossFn()
        assert found.policy.optimizer == config.Optimizer()


@pytest.mark.parametrize(
    ("name", "block", "cls"),
    [
        ("gpt_pivotrl", ("trainer", "pivotrl"), PivotRLTrainerBlock),
        ("gpt_pivotrl", ("model", "pivotrl"), PivotRLModelBlock),
        ("gpt_llmdoctor", ("model", "llmdoctor"), LLMDoctorModelBlock),
    ],
)
def test_a_config_shows_every_key_of_its_block(name: str, block: tuple[str, str], cls: Any) -> None:
    shown = yaml.safe_load((dialect.CONF / f"{name}.yaml").read_text())[block[0]][block[1]]
    assert set(shown) == {f.name for f in dataclasses.fields(cls)}


def test_print_config_turns_one_dialect_into_the_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", written(tmp_path, ALIGNER), "trainer.pivotrl.max_steps=9", "--print-config"]) == 0
    path = tmp_path / "ours.yaml"
    path.write_text(capsys.readouterr().out)
    assert load_recipe(str(path)) == load_recipe(str(tmp_path / "config.yaml"), ["trainer.pivotrl.max_steps=9"])
    assert load_recipe(str(path)).grpo.max_num_steps == 9
