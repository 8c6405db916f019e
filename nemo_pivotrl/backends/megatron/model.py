"""This rank's part of a model: TransformerConfig and layer specs from an HF config, and the chunks they build.

On a machine with Transformer Engine every layer is Transformer Engine's; without it, megatron-core's own plain-torch
layers, which know no FP8. Dropout is off throughout: the policy that trains is the policy that sampled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.activations import squared_relu
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional

from nemo_pivotrl.backends.hf_models import check_weights
from nemo_pivotrl.backends.installed import probe
from nemo_pivotrl.backends.megatron.local_layers import Norm, StreamAttention, te_with_forests
from nemo_pivotrl.backends.megatron.parallel import Groups
from nemo_pivotrl.backends.megatron.pretrained import load_pretrained
from nemo_pivotrl.backends.megatron.weights import load_hf, mark
from nemo_pivotrl.config import Megatron
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.sizing.architecture import Architecture, padded_vocab_size, read_architecture
from nemo_pivotrl.sizing.layout_rules import fp8_dimensions, model_problems
from nemo_pivotrl.sizing.precision import CONTAINER, fp8_fields, require_fp8


def build_model(policy_folder: str | Path, megatron: Megatron, groups: Groups) -> list[nn.Module]:
    """This rank's model chunks, with the weights of an HF checkpoint folder or of `megatron.load`, in training mode.

    Raises InputError for what the recipe, the model and this machine do not have in common, and for missing,
    unexpected, misshapen or integer tensors, and for NaN and infinity among their values.
    """
    if not megatron.load:
        check_weights(policy_folder, "policy.model_name")
    architecture = read_architecture(policy_folder)
    chunks = build_chunks(architecture, megatron, groups)
    if megatron.load:
        load_pretrained(chunks, megatron.load, architecture, groups)
    else:
        load_hf(chunks, policy_folder, architecture, groups)
    mark(chunks, architecture, groups)
    if megatron.moe_freeze_router:
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                if name.endswith("router.weight"):
                    parameter.requires_grad_(False)
    return chunks


def build_chunks(architecture: Architecture, megatron: Megatron, groups: Groups) -> list[nn.Module]:
    """This rank's model chunks with weights that hold nothing yet. There is one chunk: pipelines do not interleave."""
    if problems := model_problems(architecture, megatron):
        raise InputError(problems)
    found = probe()
    require_fp8(megatron, found, fp8_dimensions(architecture, megatron))
    te = found.transformer_engine is not None and not megatron.cpu
    if architecture.hybrid and not te and not megatron.cpu:
        remedy = f"megatron-core builds such models on GPUs only with it: {CONTAINER}"
        raise InputError(
            Problem("environment", None, "policy.model_name", "a hybrid, without Transformer Engine", remedy)
        )
    config = transformer_config(architecture, megatron, te)
    common: dict[str, Any] = {
        "config": config,
        "vocab_size": padded_vocab_size(architecture.vocab_size, groups.tp.size()),
        "max_sequence_length": architecture.max_position_embeddings,
        "pre_process": groups.first_stage,
        "post_process": groups.last_stage,
        "parallel_output": True,
        "share_embeddings_and_output_weights": architecture.tied,
        "pg_collection": groups.collection,
    }
    if architecture.hybrid:
        from nemo_pivotrl.backends.megatron.hybrid import build_hybrid

        model = build_hybrid(architecture, te, common)
    else:
        model = GPTModel(
            transformer_layer_spec=gpt_spec(config, te, groups),
            position_embedding_type="rope",
            rotary_base=architecture.rope_theta,
            rope_scaling=architecture.rope_factor is not None,
            rope_scaling_factor=architecture.rope_factor or 1.0,
            **common,
        )
    return [model.to(groups.device)]


def forward(chunk: nn.Module, tokens: Tensor, position_ids: Tensor) -> Tensor:
    """One pipeline stage's forward pass; what the schedule's forward step calls.

    tokens and position_ids [B, T] hold this context-parallel rank's part of the sequences. Sequences are padded on the
    right only: attention is causal and Mamba runs left to right, so no mask is needed, and padding's own outputs mean
    nothing. Their whole length is a multiple of `legality.multiple_of`.

    Returns logits [B, T, V_padded / tp] on the last stage, and hidden states [T / (tp if sequence_parallel), B, hidden] on the
    others. Columns at or beyond the model's own vocabulary size are padding: leave them out of every normaliser.
    """
    logits: Tensor = chunk(input_ids=tokens, position_ids=position_ids, attention_mask=None)
    return logits


def transformer_config(architecture: Architecture, megatron: Megatron, te: bool) -> TransformerConfig:
    """Megatron's configuration of a model. Every field that is set here is set on purpose; the rest are its defaults."""
    dtype = torch.bfloat16 if megatron.bf16 else torch.float32
    # stages exchange shapes first, so that micro-batches may differ in length; Megatron refuses it with `allgather`
    dispatcher = megatron.moe_token_dispatcher_type if architecture.moe else "alltoall"
    return TransformerConfig(
        num_layers=len(architecture.layers),
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.intermediate_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_key_value_heads,
        kv_channels=architecture.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_epsilon,
        qk_layernorm=architecture.qk_norm,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        gated_linear_unit=architecture.gated,
        activation_func=functional.silu if architecture.gated else squared_relu,
        # fused, an activation keeps its input alone; experts' weights, which are float32, make no tensor of that width
        bias_activation_fusion=te and architecture.gated,
        use_fused_weighted_squared_relu=te and not architecture.gated,
        apply_rope_fusion=te and architecture.rope_theta is not None,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=megatron.bf16,
        attention_softmax_in_fp32=True,
        tensor_model_parallel_size=megatron.tensor_model_parallel_size,
        pipeline_model_parallel_size=megatron.pipeline_model_parallel_size,
        context_parallel_size=megatron.context_parallel_size,
        expert_model_parallel_size=megatron.expert_model_parallel_size,
        expert_tensor_parallel_size=megatron.expert_tensor_parallel_size,
        sequence_parallel=megatron.sequence_parallel,
        variable_seq_lengths=dispatcher != "allgather",
        moe_token_dispatcher_type=dispatcher,
        use_cpu_initialization=megatron.cpu,
        perform_initialization=False,  # every weight is read from the checkpoint, and checked to have been
        **_recompute(megatron),
        **fp8_fields(megatron),
        **_moe(architecture, megatron, te),
        **_mamba(architecture),
    )


def _recompute(megatron: Megatron) -> dict[str, Any]:
    if megatron.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {"recompute_granularity": None if megatron.recompute == "none" else "selective"}


def _moe(architecture: Architecture, megatron: Megatron, te: bool) -> dict[str, Any]:
    moe = architecture.moe
    if moe is None:
        return {}
    mixed = not architecture.hybrid and "D" in architecture.layers
    # left out where every layer has experts: a list makes Megatron name each layer's tensors, which it would stack
    frequency = {"moe_layer_freq": [int(layer == "E") for layer in architecture.layers]} if mixed else {}
    return {
        "num_moe_experts": moe.num_experts,
        "moe_ffn_hidden_size": moe.intermediate_size,
        "moe_shared_expert_intermediate_size": moe.shared_intermediate_size,
        "moe_latent_size": moe.latent_size,
        "moe_router_topk": moe.top_k,
        "moe_router_score_function": moe.score_function,
        "moe_router_pre_softmax": moe.score_function == "softmax" and not moe.normalise_top_k,
        "moe_router_topk_scaling_factor": moe.scaling_factor,
        "moe_router_num_groups": moe.num_groups,
        "moe_router_group_topk": moe.group_topk,
        "moe_router_enable_expert_bias": moe.expert_bias,
        "moe_router_bias_update_rate": 0.0,  # the loss alone moves the policy
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_router_dtype": "fp32",
        "moe_grouped_gemm": megatron.moe_grouped_gemm and te,
        "moe_permute_fusion": te,
        **frequency,
    }


def _mamba(architecture: Architecture) -> dict[str, Any]:
    mamba = architecture.mamba
    if mamba is None:
        return {"is_hybrid_model": True} if architecture.hybrid else {}
    return {
        "is_hybrid_model": True,
        "mamba_num_heads": mamba.num_heads,
        "mamba_head_dim": mamba.head_dim,
        "mamba_num_groups": mamba.num_groups,
        "mamba_state_dim": mamba.state_dim,
    }


def gpt_spec(config: TransformerConfig, te: bool, groups: Groups) -> TransformerBlockSubmodules:
    """The layers of this rank's stage of a GPT."""
    rank = groups.pp.rank()
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=te, normalization="RMSNorm", pp_rank=rank)
    if te:
        swap(block, te_with_forests())
    else:
        swap(block, LOCAL_TWINS)
        block.layer_norm = Norm
        for layer in block.layer_specs:
            if layer.submodules.mlp.module is not MLP:
                # as Transformer Engine's layers name it in checkpoints, where only a dense MLP has its norm inside
                layer.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    return block


LOCAL_TWINS: dict[type, type] = {WrappedTorchNorm: Norm, DotProductAttention: StreamAttention}
"""megatron-core's plain-torch layers that refuse a layout, and what stands in for them."""


def swap(spec: Any, twins: dict[type, type]) -> None:
    """Put `twins` into every slot of a layer spec that names their keys."""
    if isinstance(spec, Sequence) and not isinstance(spec, str):
        for part in spec:
            swap(part, twins)
    elif isinstance(spec, ModuleSpec):
        spec.module = twins.get(spec.module, spec.module)
        swap(spec.submodules, twins)
    elif dataclasses.is_dataclass(spec):
        for name in spec.__dataclass_fields__:
            part = getattr(spec, name)
            if isinstance(part, type):
                setattr(spec, name, twins.get(part, part))
            else:
                swap(part, twins)
