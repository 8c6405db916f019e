"""Tiny models that vLLM's CPU attention takes (heads of 32), random, with logits far enough apart to be told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

VOCAB = 320
ATTENTION = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}


def llama(tied: bool, seed: int = 0, **more: Any) -> Any:
    from transformers import LlamaConfig

    sizes = {**COMMON, **ATTENTION, "intermediate_size": 128, "num_hidden_layers": 2, **more}
    return _made(LlamaConfig(tie_word_embeddings=tied, **sizes), seed)


def qwen3(tied: bool = True, seed: int = 0, **more: Any) -> Any:
    from transformers import Qwen3Config

    sizes = {**COMMON, **ATTENTION, "intermediate_size": 128, "num_hidden_layers": 2, **more}
    return _made(Qwen3Config(tie_word_embeddings=tied, **sizes), seed)


def qwen3_moe() -> Any:
    from transformers import Qwen3MoeConfig

    sizes = {**COMMON, **ATTENTION, "intermediate_size": 64, "num_hidden_layers": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
    return _made(Qwen3MoeConfig(tie_word_embeddings=False, **sizes, **experts), 0)


def nemotron_h() -> Any:
    """A hybrid of Mamba-2, attention and MLP layers: with experts vLLM cannot run it on CPUs."""
    from transformers import NemotronHConfig

    mamba = {"mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 1, "conv_kernel": 4}
    layers = ["linear_attention", "mlp", "full_attention", "mlp"]
    sizes = {**COMMON, **ATTENTION, **mamba, "intermediate_size": 128, "chunk_size": 32}
    sizes["initializer_range"] = 0.05  # wider weights blow rounding up, layer by layer and step by step
    return _made(NemotronHConfig(layers_block_type=layers, tie_word_embeddings=False, **sizes), 0)


KINDS = {
    "llama": lambda: llama(tied=True),
    "qwen3": lambda: qwen3(tied=False),
    "qwen3-moe": qwen3_moe,
    "nemotron-h": nemotron_h,
}


def _made(config: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def saved(model: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)
