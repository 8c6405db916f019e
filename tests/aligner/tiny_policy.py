"""A tiny Llama's weights and a batch to train on, the same numbers in every environment, whatever its transformers says.

Imports torch alone: the ordinary environment scores the batch with the reference backend (`tests/test_aligner_golden.py`),
NeMo-Aligner's environment with a `MegatronGPTModel`, and both compare with `golden.json`.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch

VOCAB = 300
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
HEAD = SHAPE["hidden_size"] // SHAPE["num_attention_heads"]

PROMPTS = [[13, 55, 28, 131, 22, 219], [44, 144, 101], [211, 76, 19, 120]]
PROMPT_OF = [0, 0, 0, 1, 1, 2, 2, 2]
RESPONSES = [[59, 99, 0], [51], [112, 13, 15, 38, 0], [22, 0], [200, 83, 0], [219], [31, 7, 7, 0], [250, 299]]
ADVANTAGES = [0.9, -1.2, 0.3, 0.7, -0.7, 1.1, -0.4, -0.7]
OLD_SHIFT = [0.0, 0.5, -0.5, 0.1, 0.4, -0.3, 0.2, 0.0]
"""Added to the current log-probabilities to make old ones: some ratios are clipped, some are not."""
REF_SHIFT = 0.3
SETTINGS = {"ratio_clip_min": 0.2, "ratio_clip_max": 0.28, "ratio_clip_c": 3.0}
KL_BETA = 0.05

PREFERENCES = [
    ("alpha bravo", "charlie delta echo", "foxtrot golf"),
    ("hotel", "india", "juliet kilo lima mike november"),
    ("oscar papa quebec", "alpha alpha bravo", "alpha alpha delta"),
    ("echo", "kilo kilo", "lima"),
    ("golf hotel india", "mike", "oscar oscar papa"),
]
"""Prompt, chosen and rejected answer, for stage 1."""

PAIRS: list[dict[str, Any]] = [
    {
        "prompt_ids": [13, 55, 28, 131],
        "chosen": {"ids": [59, 99, 21, 0], "rewards": [0.9, 0.0, 0.7, 0.6], "ended": True},
        "rejected": {"ids": [59, 44, 0], "rewards": [-0.8, -0.6, 0.0], "ended": True},
    },
    {
        "prompt_ids": [44, 144, 101, 9, 87],
        "chosen": {"ids": [7, 0], "rewards": [0.8, 0.0], "ended": True},
        "rejected": {"ids": [200, 83, 31, 12, 250], "rewards": [-0.7, 0.0, -0.9, -0.6, 0.0], "ended": False},
    },
    {
        "prompt_ids": [211, 76],
        "chosen": {"ids": [219, 17, 0], "rewards": [0.0, 0.9, 0.6], "ended": True},
        "rejected": {"ids": [18, 17, 0], "rewards": [-0.9, 0.0, -0.7], "ended": True},
    },
    {
        "prompt_ids": [5, 6, 7],
        "chosen": {"ids": [8, 9, 10, 11, 0], "rewards": [0.6, 0.6, 0.0, 0.9, 0.0], "ended": True},
        "rejected": {"ids": [8, 9, 77, 0], "rewards": [-0.6, 0.0, -0.9, 0.0], "ended": True},
    },
]
TFPO: dict[str, Any] = {
    "kappa": 1.3,
    "length_normalize": False,
    "reduction": "pair_mean",
    "decay": 0.9,
    "value_weight": 0.8,
    "gamma": 0.4,
    "value_pairs": "position",
    "linear_margin": False,
}


def head() -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of the log-V head, not at zero."""
    return 0.1 * torch.randn(1, SHAPE["hidden_size"], generator=torch.Generator().manual_seed(5)), torch.tensor([0.25])


def shapes(of: dict[str, Any] = SHAPE) -> dict[str, tuple[int, ...]]:
    """HF names of the parameters of a Llama, with their shapes."""
    hidden, inner = of["hidden_size"], of["intermediate_size"]
    keys = of["num_key_value_heads"] * hidden // of["num_attention_heads"]
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, hidden),
        "lm_head.weight": (VOCAB, hidden),
    }
    for i in range(of["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        found |= {
            f"{layer}self_attn.q_proj.weight": (hidden, hidden),
            f"{layer}self_attn.k_proj.weight": (keys, hidden),
            f"{layer}self_attn.v_proj.weight": (keys, hidden),
            f"{layer}self_attn.o_proj.weight": (hidden, hidden),
            f"{layer}mlp.gate_proj.weight": (inner, hidden),
            f"{layer}mlp.up_proj.weight": (inner, hidden),
            f"{layer}mlp.down_proj.weight": (hidden, inner),
            f"{layer}input_layernorm.weight": (hidden,),
            f"{layer}post_attention_layernorm.weight": (hidden,),
        }
    return found | {"model.norm.weight": (hidden,)}


def weights(of: dict[str, Any] = SHAPE) -> dict[str, torch.Tensor]:
    """Every parameter, float32, far enough from zero that mistakes show."""
    found = {}
    for name, shape in shapes(of).items():
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        found[name] = 1.0 + 0.1 * noise if "norm" in name else 0.15 * noise
    return found
