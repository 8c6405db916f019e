"""A recipe of ours as NeMo-RL's: pure mappings of settings, with the names of its release 0.7, and what they lose.

Only what our recipe decides is written; all else is the base recipe's (`export.nemo_rl_base`).
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, cast

from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.verifiers.base import Bounded, Judging
from nemo_pivotrl.verifiers.loading import load_verifier

GYM_FAMILIES = {
    "single_step": ("single_step_tool_use_with_argument_comparison", "tool_simulation_agent"),
    "swe": ("swe_pivot", "tool_simulation_agent"),
    "terminus": ("terminus_judge", "simple_agent"),
    "terminal_multi_harness": ("terminal_multi_harness", "tool_simulation_agent"),
}
"""Our verifier to NeMo-Gym's resources server and the agent that asks it."""
NESTED = {
    "single_step": (
        "word_count_similarity_threshold",
        "floating_point_comparison_threshold",
        "parallel_tool_call_rewarding",
        "allow_subset",
        "allow_superset",
        "parallel_tool_call_reward_mode",
    ),
    "terminal_multi_harness": ("string_similarity_threshold",),
}
"""Settings that stand under `tool_call_comparator_config`."""
FLAT = {
    "swe": (
        "reward_mode",
        "enable_target_match",
        "enable_argument_similarity",
        "similarity_threshold",
        "similarity_full_credit",
        "enable_diff_size_shaping",
        "diff_size_alpha",
    ),
    "terminus": ("enable_string_similarity", "string_similarity_threshold", "enable_llm_judge"),
}
"""Settings that stand beside `entrypoint`."""
HERE = "NEMO_PIVOTRL_EXPORT"
PLACE = f"${{oc.env:{HERE}}}"
"""The export's folder in its recipe: NeMo-RL runs in a folder of its own, and the export may be moved to another machine."""
OWN_SERVER = "resources_servers/nemo_pivotrl"
"""Folder of the resources server for a verifier that NeMo-Gym does not have."""
MODEL_CONFIG = "responses_api_models/vllm_model/configs/vllm_model_for_training.yaml"


def _loaded(recipe: Recipe) -> Bounded:
    """The recipe's verifier, its judge not asked for."""
    return load_verifier(recipe.verifier, lambda judge: cast(Judging, judge))


def settings_of(recipe: Recipe) -> Any:
    """The recipe's verifier as its settings."""
    return _loaded(recipe).inner


def has_own_server(recipe: Recipe) -> bool:
    """Whether NeMo-Gym has no server of the recipe's verifier: it is ours, asks a judge, or has a switch of ours."""
    loaded = _loaded(recipe)
    verifier = loaded.inner
    if verifier.name not in GYM_FAMILIES or loaded.asks_judge:
        return True
    ours = {"swe": ("mode", "arguments"), "terminal_multi_harness": ("harness", "generic")}
    switch, usual = ours.get(verifier.name, ("name", verifier.name))
    return bool(getattr(verifier, switch) != usual)


def gym_config(recipe: Recipe, agent: str) -> tuple[dict[str, Any], bool]:
    """(NeMo-Gym config whose agent is called `agent`, whether its verifier is a server of ours)."""
    own, verifier = has_own_server(recipe), settings_of(recipe)
    name = verifier.name
    server = agent.removesuffix("_agent") + "_resources_server"
    settings: dict[str, Any] = {"entrypoint": "app.py", "domain": "agent", "verified": False}
    kind, asked_by = ("nemo_pivotrl", "tool_simulation_agent") if own else GYM_FAMILIES[name]
    if not own:
        if name in NESTED:
            settings["tool_call_comparator_config"] = {key: getattr(verifier, key) for key in NESTED[name]}
        settings |= {key: getattr(verifier, key) for key in FLAT.get(name, ())}
    settings["description"] = f"{name} of nemo_pivotrl" if own else f"pivots of {Path(recipe.run_dir).name}"
    refs = {
        "resources_server": {"type": "resources_servers", "name": server},
        "model_server": {"type": "responses_api_models", "name": "policy_model"},
    }
    return {
        server: {"resources_servers": {kind: settings}},
        agent: {"responses_api_agents": {asked_by: {"entrypoint": "app.py", **refs}}},
    }, own


def own_server(recipe: Recipe) -> dict[str, str]:
    """Files of a NeMo-Gym resources server that judges by the recipe's verifier, name to text."""
    app = (
        '"""Started by NeMo-Gym, in an environment that requirements.txt describes."""\n\n'
        "from pathlib import Path\n\n"
        "from nemo_pivotrl.tools.gym_server import serve_in_gym\n\n"
        'if __name__ == "__main__":\n'
        '    serve_in_gym(Path(__file__).with_name("verifier.json"))\n'
    )
    return {
        "app.py": app,
        "requirements.txt": "nemo-pivotrl[verifiers,serve]\n",
        "verifier.json": json.dumps(dataclasses.asdict(recipe.verifier), indent=2) + "\n",
    }


def recipe_of(recipe: Recipe, folder: Path, has_validation: bool) -> tuple[dict[str, Any], list[str]]:
    """(NeMo-RL recipe over the files in `folder`, what of ours it cannot say). Raises InputError for what NeMo-RL refuses."""
    if recipe.loss_fn.ratio_level == "sequence" and recipe.loss_fn.token_level_loss:
        remedy = "set loss_fn.token_level_loss=false: NeMo-RL has sequence ratios with the mean over sequences only"
        raise InputError(Problem("recipe", None, "loss_fn.ratio_level", "sequence", remedy))
    made = {
        "defaults": recipe.export.nemo_rl_base,
        "grpo": _grpo(recipe, has_validation),
        "loss_fn": _loss_fn(recipe),
        "policy": _policy(recipe, folder),
        "data": _data(has_validation),
        "env": {
            "_override_": True,  # no environment of the base recipe is left
            "should_use_nemo_gym": True,
            "should_mask_flagged_samples": True,  # a verifier's fault is not a reward of 0
            "nemo_gym": {"config_paths": [MODEL_CONFIG, f"{PLACE}/gym.yaml"]},
        },
        "checkpointing": _checkpointing(recipe),
        "logger": {
            "wandb_enabled": recipe.logger.wandb,
            "tensorboard_enabled": recipe.logger.tensorboard,
            "mlflow_enabled": recipe.logger.mlflow,
            "wandb": {"project": recipe.logger.project, "name": recipe.grpo.name},
        },
        "cluster": {"num_nodes": recipe.cluster.num_nodes, "gpus_per_node": recipe.cluster.gpus_per_node},
    }
    return made, not_exported(recipe)


def _grpo(recipe: Recipe, has_validation: bool) -> dict[str, Any]:
    grpo, clip = recipe.grpo, recipe.grpo.advantage_clip
    steps = {} if grpo.max_num_steps < 0 else {"max_num_steps": grpo.max_num_steps}
    epochs = grpo.max_num_epochs if grpo.max_num_steps < 0 else 1_000_000  # the first limit that is met ends the run
    return {
        "num_prompts_per_step": grpo.num_prompts_per_step,
        "num_generations_per_prompt": grpo.num_generations_per_prompt,
        "max_rollout_turns": 1,
        **steps,
        "max_num_epochs": epochs,
        "normalize_rewards": grpo.normalize_rewards,
        "use_leave_one_out_baseline": grpo.use_leave_one_out_baseline,
        "advantage_clip_low": None if clip is None else -clip,
        "advantage_clip_high": clip,
        "overlong_filtering": grpo.overlong_filtering,
        "invalid_tool_call_advantage": grpo.malformed_action_advantage,
        "seq_logprob_error_threshold": recipe.loss_fn.seq_logprob_error_threshold,
        "skip_reference_policy_logprobs_calculation": recipe.loss_fn.reference_policy_kl_penalty == 0.0,
        "val_period": grpo.val_period if has_validation else 0,
        "val_at_start": has_validation and grpo.val_period > 0,
        "val_num_generations_per_prompt": grpo.val_generations,
        "seed": recipe.seed,
    }


def _loss_fn(recipe: Recipe) -> dict[str, Any]:
    loss_fn = recipe.loss_fn
    correct = loss_fn.use_importance_sampling_correction
    floor = loss_fn.truncated_importance_sampling_ratio_min
    return {
        "ratio_clip_min": loss_fn.ratio_clip_min,
        "ratio_clip_max": loss_fn.ratio_clip_max,
        "ratio_clip_c": loss_fn.ratio_clip_c,
        "sequence_level_importance_ratios": loss_fn.ratio_level == "sequence",
        "token_level_loss": loss_fn.token_level_loss,
        "reference_policy_kl_penalty": loss_fn.reference_policy_kl_penalty,
        "reference_policy_kl_type": "k3",
        "use_importance_sampling_correction": correct,
        "truncated_importance_sampling_ratio": loss_fn.truncated_importance_sampling_ratio if correct else None,
        "truncated_importance_sampling_ratio_min": floor if correct and floor > 0 else None,
        "truncated_importance_sampling_type": "tis" if correct else None,
    }


def _policy(recipe: Recipe, folder: Path) -> dict[str, Any]:
    policy, megatron, optimizer = recipe.policy, recipe.megatron, recipe.policy.optimizer
    batch = recipe.grpo.num_prompts_per_step * recipe.grpo.num_generations_per_prompt
    tensor, context = megatron.tensor_model_parallel_size, megatron.context_parallel_size
    packed = megatron.sequence_packing or context > 1  # NeMo-RL shares sequences among ranks only when they are packed
    return {
        "model_name": _model_name(recipe, folder),
        "tokenizer": {"chat_template_kwargs": dict(policy.template_kwargs) or None},
        "train_global_batch_size": batch // recipe.grpo.num_minibatches,
        "max_total_sequence_length": policy.max_total_sequence_length,
        "max_grad_norm": optimizer.max_grad_norm,
        "precision": "bfloat16" if megatron.bf16 else "float32",
        "make_sequence_length_divisible_by": 2 * context * tensor if packed else tensor,
        "sequence_packing": {"enabled": packed},
        "megatron_cfg": {
            "enabled": True,
            "tensor_model_parallel_size": tensor,
            "pipeline_model_parallel_size": megatron.pipeline_model_parallel_size,
            "context_parallel_size": context,
            "expert_model_parallel_size": megatron.expert_model_parallel_size,
            "expert_tensor_parallel_size": megatron.expert_tensor_parallel_size,
            "sequence_parallel": megatron.sequence_parallel,
            "activation_checkpointing": megatron.recompute != "none",
            "freeze_moe_router": megatron.moe_freeze_router,
            "moe_token_dispatcher_type": megatron.moe_token_dispatcher_type,
            "fp8_cfg": {
                "enabled": megatron.fp8 != "none",
                "fp8": "e4m3" if megatron.fp8 == "none" else megatron.fp8,
                "fp8_recipe": megatron.fp8_recipe,
                "fp8_param": megatron.fp8_param,
            },
            "optimizer": {
                "lr": optimizer.lr,
                "min_lr": optimizer.lr,
                "weight_decay": optimizer.weight_decay,
                "adam_beta1": optimizer.beta1,
                "adam_beta2": optimizer.beta2,
                "adam_eps": optimizer.eps,
                "bf16": megatron.bf16,
                "use_distributed_optimizer": megatron.use_distributed_optimizer,
            },
            "scheduler": {
                "lr_warmup_iters": optimizer.warmup_steps,
                "lr_warmup_init": 0.0,
                "lr_decay_style": "constant",
            },
        },
        "generation": {
            "max_new_tokens": policy.generation.max_new_tokens,
            "temperature": policy.generation.temperature,
            "top_p": policy.generation.top_p,
            "vllm_cfg": {
                "tensor_parallel_size": recipe.vllm.tensor_parallel_size,
                "gpu_memory_utilization": recipe.vllm.gpu_memory_utilization,
                "enforce_eager": recipe.vllm.enforce_eager,
                **_served_template(recipe),
            },
        },
    }


def _model_name(recipe: Recipe, folder: Path) -> str:
    """The policy's folder as the export's recipe names it: from the export on, unless it lies elsewhere by an absolute path."""
    name = recipe.policy.model_name
    if Path(name).is_absolute() and not Path(name).is_relative_to(Path(recipe.run_dir).absolute()):
        return name
    return f"{PLACE}/{os.path.relpath(name, folder)}"


def _served_template(recipe: Recipe) -> dict[str, Any]:
    """The template's settings for vLLM's server, which renders NeMo-Gym's requests: both must render alike."""
    kwargs = dict(recipe.policy.template_kwargs)
    return {"http_server_serving_chat_kwargs": {"default_chat_template_kwargs": kwargs}} if kwargs else {}


def _data(has_validation: bool) -> dict[str, Any]:
    return {
        "shuffle": True,
        "train": {"data_path": f"{PLACE}/train.jsonl"},
        "validation": {"data_path": f"{PLACE}/validation.jsonl"} if has_validation else None,
        "default": {
            "dataset_name": "NemoGymDataset",
            "env_name": "nemo_gym",
            "processor": "nemo_gym_data_processor",
        },
    }


def _checkpointing(recipe: Recipe) -> dict[str, Any]:
    settings = recipe.checkpointing
    return {
        "enabled": True,
        "checkpoint_dir": f"results/{recipe.grpo.name}",
        "metric_name": "val:total_reward/mean",
        "higher_is_better": True,
        "keep_top_k": settings.keep_top_k,
        "save_period": settings.save_period,
        "checkpoint_must_save_by": settings.checkpoint_must_save_by or None,
    }


def not_exported(recipe: Recipe) -> list[str]:
    """What the recipe says and NeMo-RL cannot do, or does in another way."""
    told = {
        "policy.lora: all weights train": recipe.policy.lora.enabled,
        "policy.prefix_sharing: each sample runs its whole prompt": recipe.policy.prefix_sharing,
        "policy.chat_template: NeMo-RL takes the tokenizer's": recipe.policy.chat_template is not None,
        "policy.tool_parser: vLLM's parser is the base recipe's (policy.generation.vllm_cfg.http_server_serving_chat_kwargs)": True,
        "loss_fn.max_sampler_mismatch: nothing stops such a run": recipe.loss_fn.max_sampler_mismatch is not None,
        "grpo.malformed_action_advantage: NeMo-RL's check is for tool-call markup in the text": recipe.grpo.malformed_action_advantage
        is not None,
        "grpo.max_failure_share: flagged samples are masked and counted, and stop nothing": True,
        "verifier.compat: the rules are those of the NeMo-Gym that runs": not has_own_server(recipe),
        "verifier.limits: NeMo-Gym's servers have none": not has_own_server(recipe),
        "grpo.val_candidates: all held-out rows are validated": True,
    }
    return [what for what, holds in told.items() if holds]
