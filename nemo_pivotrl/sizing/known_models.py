"""Published models' shapes, for planning before anything is downloaded: the fields of their config.json that matter.

Each is the file of that name on huggingface.co, under the owner that stands with it. A folder with a config.json of its
own always comes first; these only stand in for one that is not there yet.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from nemo_pivotrl.sizing.architecture import Architecture, architecture_of

ROPE = {"rope_type": "default"}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
    "rope_parameters": ROPE | {"rope_theta": 1e4},
    "max_position_embeddings": 4096,
}
LLAMA_7B = LLAMA | {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
LLAMA_13B = LLAMA | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
LLAMA_70B = LLAMA | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
LLAMA_3_1_8B = LLAMA_7B | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
    "head_dim": 128,
    "rope_parameters": ROPE | {"rope_theta": 1e6},
    "max_position_embeddings": 40960,
}
QWEN3_8B = QWEN3 | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
QWEN3_1_7B = QWEN3 | {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
QWEN3_30B_A3B_2507 = QWEN3 | {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "max_position_embeddings": 262144,
    "rope_parameters": ROPE | {"rope_theta": 1e7},
}
NEMOTRON_3: dict[str, Any] = {
    "model_type": "nemotron_h",
    "mlp_hidden_act": "relu2",
    "mamba_hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "mamba_proj_bias": False,
    "use_bias": False,
    "use_conv_bias": True,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "sliding_window": None,
    "residual_in_fp32": False,
    "tie_word_embeddings": False,
    "time_step_limit": (0.0, float("inf")),
    "layer_norm_epsilon": 1e-5,
    "vocab_size": 131072,
    "max_position_embeddings": 262144,
    "head_dim": 128,
    "conv_kernel": 4,
    "ssm_state_size": 128,
    "n_groups": 8,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "moe_latent_size": None,
}
SUPER_120B = NEMOTRON_3 | {
    "hybrid_override_pattern": (
        "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME"
    ),
    "hidden_size": 4096,
    "intermediate_size": 2688,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "chunk_size": 128,
    "n_routed_experts": 512,
    "num_experts_per_tok": 22,
    "moe_intermediate_size": 2688,
    "moe_latent_size": 1024,
    "moe_shared_expert_intermediate_size": 5376,
    "routed_scaling_factor": 5.0,
}
NANO_30B = NEMOTRON_3 | {
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "hidden_size": 2688,
    "intermediate_size": 1856,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "mamba_num_heads": 64,
    "mamba_head_dim": 64,
    "chunk_size": 128,
    "n_routed_experts": 128,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "routed_scaling_factor": 2.5,
}
NANO_4B = NEMOTRON_3 | {
    "hybrid_override_pattern": "M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-",
    "hidden_size": 3136,
    "intermediate_size": 12544,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "mamba_num_heads": 96,
    "mamba_head_dim": 80,
    "chunk_size": 256,
}
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "NVIDIA-Nemotron-3-Super-120B-A12B-BF16": ("nvidia", SUPER_120B),
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": ("nvidia", NANO_30B),
    "NVIDIA-Nemotron-3-Nano-4B-BF16": ("nvidia", NANO_4B),
    "Qwen3-30B-A3B-Thinking-2507": ("Qwen", QWEN3_30B_A3B_2507),
    "Qwen3-30B-A3B-Instruct-2507": ("Qwen", QWEN3_30B_A3B_2507),
    "Qwen3-8B": ("Qwen", QWEN3_8B),
    "Qwen3-1.7B": ("Qwen", QWEN3_1_7B),
    "Llama-3.1-8B-Instruct": ("meta-llama", LLAMA_3_1_8B),
    "Llama-2-7b-hf": ("meta-llama", LLAMA_7B),
    "llama-7b-sft-float32": ("argsearch", LLAMA_7B | {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6}),
    "alpaca-7b-reproduced": (
        "PKU-Alignment",
        LLAMA_7B | {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "vocab_size": 32001},
    ),
    "tulu-2-7b": ("allenai", LLAMA_7B | {"max_position_embeddings": 8192}),
    "tulu-2-13b": ("allenai", LLAMA_13B | {"max_position_embeddings": 8192}),
    "tulu-2-70b": ("allenai", LLAMA_70B | {"max_position_embeddings": 8192}),
}
"""Folder name -> (owner on huggingface.co, config.json's fields)."""


def published(name: str) -> tuple[Architecture, str] | None:
    """A published model's architecture and where it was published, by the name of its folder; None: not known."""
    for known, (owner, fields) in PUBLISHED.items():
        if name.lower() == known.lower():
            source = f"huggingface.co/{owner}/{known}"
            return architecture_of(SimpleNamespace(**fields), source), source
    return None
