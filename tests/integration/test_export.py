"""Pivots for other trainers: rows and Gym config agree on the agent, the recipe says what ours says, and what is lost is told."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf
from support.recipes import ROOT, recipe_at

from nemo_pivotrl import cli
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.config.load import load_recipe
from nemo_pivotrl.core.artifacts import read_rows
from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.data.gym_rows import to_messages
from nemo_pivotrl.data.states import candidates_of
from nemo_pivotrl.pivotrl import export_nemo_rl as nemo_rl
from nemo_pivotrl.pivotrl.export import export
from nemo_pivotrl.pivotrl.profile_rows import RATES

AGENT = "single_step_tool_use_with_argument_comparison_agent"
NEMO_RL = """
defaults grpo.num_prompts_per_step grpo.num_generations_per_prompt grpo.max_rollout_turns grpo.max_num_steps
grpo.max_num_epochs grpo.normalize_rewards grpo.use_leave_one_out_baseline grpo.advantage_clip_low grpo.advantage_clip_high
grpo.overlong_filtering grpo.invalid_tool_call_advantage grpo.seq_logprob_error_threshold
grpo.skip_reference_policy_logprobs_calculation grpo.val_period grpo.val_at_start grpo.val_num_generations_per_prompt grpo.seed
loss_fn.ratio_clip_min loss_fn.ratio_clip_max loss_fn.ratio_clip_c loss_fn.sequence_level_importance_ratios
loss_fn.token_level_loss loss_fn.reference_policy_kl_penalty loss_fn.reference_policy_kl_type
loss_fn.use_importance_sampling_correction loss_fn.truncated_importance_sampling_ratio
loss_fn.truncated_importance_sampling_ratio_min loss_fn.truncated_importance_sampling_type
policy.model_name policy.tokenizer.chat_template_kwargs policy.train_global_batch_size policy.max_total_sequence_length
policy.max_grad_norm policy.precision policy.make_sequence_length_divisible_by policy.sequence_packing.enabled
policy.megatron_cfg.enabled policy.megatron_cfg.tensor_model_parallel_size policy.megatron_cfg.pipeline_model_parallel_size
policy.megatron_cfg.context_parallel_size policy.megatron_cfg.expert_model_parallel_size
policy.megatron_cfg.expert_tensor_parallel_size policy.megatron_cfg.sequence_parallel
policy.megatron_cfg.activation_checkpointing policy.megatron_cfg.freeze_moe_router
policy.megatron_cfg.moe_token_dispatcher_type policy.megatron_cfg.fp8_cfg.enabled policy.megatron_cfg.fp8_cfg.fp8
policy.megatron_cfg.fp8_cfg.fp8_recipe policy.megatron_cfg.fp8_cfg.fp8_param policy.megatron_cfg.optimizer.lr
policy.megatron_cfg.optimizer.min_lr policy.megatron_cfg.optimizer.weight_decay policy.megatron_cfg.optimizer.adam_beta1
policy.megatron_cfg.optimizer.adam_beta2 policy.megatron_cfg.optimizer.adam_eps policy.megatron_cfg.optimizer.bf16
policy.megatron_cfg.optimizer.use_distributed_optimizer policy.megatron_cfg.scheduler.lr_warmup_iters
policy.megatron_cfg.scheduler.lr_warmup_init policy.megatron_cfg.scheduler.lr_decay_style policy.generation.max_new_tokens
policy.generation.temperature policy.generation.top_p policy.generation.vllm_cfg.tensor_parallel_size
policy.generation.vllm_cfg.gpu_memory_utilization policy.generation.vllm_cfg.enforce_eager
data.shuffle data.train.data_path data.validation.data_path data.default.dataset_name data.default.env_name
data.default.processor env._override_ env.should_use_nemo_gym env.should_mask_flagged_samples env.nemo_gym.config_paths
checkpointing.enabled checkpointing.checkpoint_dir checkpointing.metric_name checkpointing.higher_is_better
checkpointing.keep_top_k checkpointing.save_period checkpointing.checkpoint_must_save_by
logger.wandb_enabled logger.tensorboard_enabled logger.mlflow_enabled logger.wandb.project logger.wandb.name
cluster.num_nodes cluster.gpus_per_node
""".split()
"""Every setting we write; each is one of NeMo-RL's: they were checked against its recipes at 7ea279ab (2026-08-22)."""


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield from flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]


def tiny(*overrides: str) -> Recipe:
    return load_recipe(str(ROOT / "recipes/pivotrl/tiny.yaml"), list(overrides))


@pytest.fixture
def exported(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run that `cli` exported for NeMo-RL."""
    (tmp_path / "run").mkdir()
    for name in ("pivots.jsonl", "trajectories.jsonl"):
        (tmp_path / "run" / name).write_bytes((trained / name).read_bytes())
    words = ["export", "nemo-rl", str(ROOT / "recipes/pivotrl/tiny.yaml"), f"run_dir={tmp_path}/run"]
    assert cli.main(words) == 0
    return tmp_path / "run/nemo-rl"


def test_rows_and_gym_config_agree_on_the_agents_name(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [json.loads(line) for line in (exported / "train.jsonl").read_text().splitlines()]
    gym = yaml.safe_load((exported / "gym.yaml").read_text())
    assert {row["agent_ref"]["name"] for row in rows} == {AGENT} and AGENT in gym
    (agent,) = gym[AGENT]["responses_api_agents"].values()
    assert agent["resources_server"]["name"] in gym  # NeMo-Gym refuses a reference to nothing
    (server,) = gym[agent["resources_server"]["name"]]["resources_servers"].values()
    assert server["tool_call_comparator_config"]["word_count_similarity_threshold"] == 0.1 and server["domain"]
    text = (exported / "grpo-pivotrl.yaml").read_text()
    assert str(exported) not in text and str(exported.parent) not in text
    monkeypatch.setenv("NEMO_PIVOTRL_EXPORT", str(exported.rename(exported.with_name("moved"))))
    exported = exported.with_name("moved")
    made = OmegaConf.to_container(OmegaConf.create(text), resolve=True)
    assert made["env"]["nemo_gym"]["config_paths"][1] == str(exported / "gym.yaml")
    assert Path(made["policy"]["model_name"]).resolve() == (exported.parent / "start/policy").resolve()
    assert Path(made["data"]["train"]["data_path"]).read_bytes() == (exported / "train.jsonl").read_bytes()


def test_the_splits_are_those_of_the_pivot_set_and_rows_keep_its_hit_rates(exported: Path) -> None:
    ours = list(read_rows(exported.parent / "pivots.jsonl"))
    for split in ("train", "validation"):
        rows = [json.loads(line) for line in (exported / f"{split}.jsonl").read_text().splitlines()]
        wanted = [row for row in ours if row["split"] == split]
        assert [row["provenance"]["candidate_id"] for row in rows] == [row["candidate_id"] for row in wanted] != []
        assert [[row[key] for key in RATES] for row in rows] == [[row[key] for key in RATES] for row in wanted]
    states = {c.candidate_id: c for c in candidates_of(exported.parent / "pivots.jsonl", "validation")}
    for row in rows:  # NeMo-Gym's contract
        params = row["responses_create_params"]
        assert tuple(to_messages(params["input"])) == states[row["provenance"]["candidate_id"]].messages
        assert params["input"] and params["tool_choice"] == "auto" and params.get("metadata", {}) is not None
        assert isinstance(params["parallel_tool_calls"], bool)


def test_every_setting_that_is_written_is_one_of_nemo_rls(exported: Path) -> None:
    made = yaml.safe_load((exported / "grpo-pivotrl.yaml").read_text())
    assert set(flat(made)) == set(NEMO_RL)
    unlimited, _ = nemo_rl.recipe_of(tiny("grpo.max_num_steps=-1", "grpo.max_num_epochs=3"), exported, False)
    assert set(NEMO_RL) - set(flat(unlimited)) == {"grpo.max_num_steps", "data.validation.data_path"}
    assert unlimited["grpo"]["max_num_epochs"] == 3 and unlimited["grpo"]["val_period"] == 0


def test_the_recipe_says_what_ours_says(tmp_path: Path) -> None:
    ours = tiny(
        "policy.model_name=/models/m",
        "grpo.num_prompts_per_step=64",
        "grpo.num_generations_per_prompt=16",
        "grpo.num_minibatches=2",
        "grpo.advantage_clip=50",
        "loss_fn.ratio_clip_max=0.28",
        "loss_fn.use_importance_sampling_correction=true",
        "megatron.tensor_model_parallel_size=8",
        "megatron.context_parallel_size=4",
        "megatron.fp8=hybrid",
        "megatron.fp8_recipe=blockwise",
        "checkpointing.checkpoint_must_save_by='00:03:45:00'",
        "cluster.num_nodes=64",
    )
    made, _ = nemo_rl.recipe_of(ours, tmp_path, True)
    assert made["policy"]["train_global_batch_size"] == 512 and made["policy"]["model_name"] == "/models/m"
    assert (made["grpo"]["advantage_clip_low"], made["grpo"]["advantage_clip_high"]) == (-50.0, 50.0)
    assert made["grpo"]["use_leave_one_out_baseline"] is False  # a lone success keeps its weight
    assert made["loss_fn"]["ratio_clip_max"] == 0.28 and made["loss_fn"]["truncated_importance_sampling_ratio"] == 5.0
    assert made["policy"]["sequence_packing"]["enabled"] and made["policy"]["make_sequence_length_divisible_by"] == 64
    assert made["policy"]["megatron_cfg"]["fp8_cfg"] == {
        "enabled": True, "fp8": "hybrid", "fp8_recipe": "blockwise", "fp8_param": False,
    }  # fmt: skip
    assert made["checkpointing"]["checkpoint_must_save_by"] == "00:03:45:00" and made["cluster"]["num_nodes"] == 64
    thinking, _ = nemo_rl.recipe_of(tiny("policy.template_kwargs={enable_thinking: true}"), tmp_path, True)
    served = thinking["policy"]["generation"]["vllm_cfg"]["http_server_serving_chat_kwargs"]
    assert served["default_chat_template_kwargs"] == thinking["policy"]["tokenizer"]["chat_template_kwargs"]
    plain, _ = nemo_rl.recipe_of(tiny(), tmp_path, True)
    assert plain["loss_fn"]["truncated_importance_sampling_ratio"] is None  # NeMo-RL refuses a bound without correction
    assert (
        plain["policy"]["make_sequence_length_divisible_by"] == 1 and not plain["policy"]["sequence_packing"]["enabled"]
    )
    assert plain["checkpointing"]["checkpoint_must_save_by"] is None


def test_what_nemo_rl_refuses_is_refused_here(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="token_level_loss"):
        nemo_rl.recipe_of(tiny("loss_fn.ratio_level=sequence"), tmp_path, True)
    made, _ = nemo_rl.recipe_of(tiny("loss_fn.ratio_level=sequence", "loss_fn.token_level_loss=false"), tmp_path, True)
    assert made["loss_fn"]["sequence_level_importance_ratios"] is True


def test_what_is_lost_is_told_in_the_recipe_itself(exported: Path) -> None:
    head = (exported / "grpo-pivotrl.yaml").read_text().partition("\ndefaults:")[0]
    assert "policy.prefix_sharing" in head and "policy.lora" not in head
    assert any("policy.lora" in what for what in nemo_rl.not_exported(tiny("policy.lora.enabled=true")))


@pytest.mark.parametrize(
    ("verifier", "server", "agent", "settings"),
    [
        (
            ["verifier.name=swe_pivot", "verifier.settings={reward_mode: continuous}"],
            "swe_pivot",
            "tool_simulation_agent",
            {"reward_mode": "continuous", "similarity_threshold": 0.4},
        ),
        (
            ["verifier.name=terminus", "verifier.settings={string_similarity_threshold: 0.8}"],
            "terminus_judge",
            "simple_agent",
            {"enable_llm_judge": False, "string_similarity_threshold": 0.8},
        ),
        (
            ["verifier.name=terminal_multi_harness"],
            "terminal_multi_harness",
            "tool_simulation_agent",
            {"tool_call_comparator_config": {"string_similarity_threshold": 0.9}},
        ),
        (["verifier.name=functional"], "nemo_pivotrl", "tool_simulation_agent", {}),
        (["verifier.name=exact"], "nemo_pivotrl", "tool_simulation_agent", {}),
        (["verifier.name=swe", "verifier.settings={mode: tool_name}"], "nemo_pivotrl", "tool_simulation_agent", {}),
        (
            ["verifier.name=terminal_multi_harness", "verifier.settings={harness: codex}"],
            "nemo_pivotrl",
            "tool_simulation_agent",
            {},
        ),
    ],
)
def test_each_verifier_has_its_server(verifier: list[str], server: str, agent: str, settings: dict[str, Any]) -> None:
    gym, own = nemo_rl.gym_config(tiny(*verifier), "pivots_agent")
    (kind,) = gym["pivots_resources_server"]["resources_servers"]
    (asked_by,) = gym["pivots_agent"]["responses_api_agents"]
    assert (kind, asked_by, own) == (server, agent, server == "nemo_pivotrl")
    held = gym["pivots_resources_server"]["resources_servers"][kind]
    assert {key: held[key] for key in settings} == settings and held["entrypoint"] == "app.py"


def test_rows_and_gym_config_name_the_recipes_agent(trained: Path, tmp_path: Path) -> None:
    recipe = recipe_at(tmp_path / "run", "export.target=nemo-rl", "extract.agent_ref=mine")
    (tmp_path / "run").mkdir()
    for name in ("pivots.jsonl", "trajectories.jsonl"):
        (tmp_path / "run" / name).write_bytes((trained / name).read_bytes())
    folder = export(recipe)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert {row["agent_ref"]["name"] for row in rows} == {"mine"} and "mine" in yaml.safe_load(
        (folder / "gym.yaml").read_text()
    )


def test_our_own_server_starts_as_nemo_gym_starts_it_and_judges(tmp_path: Path) -> None:
    recipe = tiny("verifier.name=exact")
    for name, text in nemo_rl.own_server(recipe).items():
        (tmp_path / name).write_text(text)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    gym, _ = nemo_rl.gym_config(recipe, "pivots_agent")
    gym["pivots_resources_server"]["resources_servers"]["nemo_pivotrl"] |= {"host": "127.0.0.1", "port": port}
    told = {"NEMO_GYM_CONFIG_DICT": yaml.safe_dump(gym), "NEMO_GYM_CONFIG_PATH": "pivots_resources_server"}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    started = subprocess.Popen(
        [sys.executable, "app.py"],
        cwd=tmp_path,
        env={**os.environ, **told, "PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
    )
    try:
        call = {"type": "function_call", "name": "f", "arguments": "{}"}
        rewards = []
        for made in (call, {**call, "arguments": '{"a": 1}'}):
            row = {"expected_action": call, "response": {"output": [made]}, "responses_create_params": {"input": []}}
            rewards.append(posted(f"http://127.0.0.1:{port}/verify", row)["reward"])
        assert rewards == [1.0, 0.0]
    finally:
        started.terminate()
        started.wait(10)


def posted(url: str, body: Any) -> Any:
    asked = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    for _ in range(100):
        try:
            with urllib.request.urlopen(asked, timeout=10) as answer:
                return json.load(answer)
        except urllib.error.HTTPError:
            raise
        except OSError:
            time.sleep(0.2)
    raise AssertionError("the server never came up")


def test_the_nemotron_artefact_has_its_fields(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in ("pivots.jsonl", "trajectories.jsonl"):
        (tmp_path / "run" / name).write_bytes((trained / name).read_bytes())
    words = ["export", "nemotron", str(ROOT / "recipes/pivotrl/tiny.yaml"), f"run_dir={tmp_path}/run"]
    assert cli.main(words) == 0
    folder = tmp_path / "run/nemotron"
    manifest, metadata = (json.loads((folder / name).read_text()) for name in ("manifest.json", "metadata.json"))
    assert set(manifest) == {"train", "val", "test", "mode", "source", "run_hash", "train_rows", "val_rows"}
    counted = {key: len((folder / manifest[key]).read_text().splitlines()) for key in ("train", "val")}
    assert counted == {"train": manifest["train_rows"], "val": manifest["val_rows"]} and min(counted.values()) > 0
    assert (manifest["train"], manifest["val"], manifest["source"]) == (
        "train/train.jsonl", "val/val.jsonl", "../pivots.jsonl",
    )  # fmt: skip
    assert metadata["type"] == "SplitJsonlDataArtifact" and metadata["path"] == "manifest.json"
    assert str(tmp_path) not in (folder / "manifest.json").read_text() + (folder / "metadata.json").read_text()
    assert metadata["total_sequences"] == sum(counted.values()) == metadata["metadata"]["total_sequences"]
    assert metadata["metadata"]["verifier"] and metadata["metadata"]["policy"] and metadata["metadata"]["pivot_set"]
    assert metadata["source_datasets"] == ["../world/trajectories.jsonl"]
