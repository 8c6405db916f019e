"""Tiny models of one vocabulary for guided decoding, and a recipe of the decode stage over them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from nemo_pivotrl.demo import tiny_models as tiny

TEXTS = ["book a flight to oslo", "the quick brown fox", "cancel 12 tickets, please!", "a b c d e"] * 3
TOKENIZER = tiny.make_tokenizer(TEXTS, 320)
VOCAB = len(TOKENIZER)
EOS = TOKENIZER.eos_token_id


def model(seed: int, layers: int = 1, extra: int = 0, kind: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    shape = {
        "vocab_size": VOCAB + extra,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 96,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": TOKENIZER.pad_token_id,
    }
    torch.manual_seed(seed)
    made: Any = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**shape)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=8)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**shape, tie_word_embeddings=False)),
    }[kind]()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.25)  # far from uniform, so that mistakes show
        made.get_output_embeddings().weight[VOCAB:] *= 20  # padding columns that would win
    return made.to(dtype).eval().requires_grad_(False)


def decode_recipe(folders: Path, where: Path, **decode: Any) -> str:
    """A recipe of the decode stage with five prompts of every shape."""
    rows = [
        {"messages": [{"role": "user", "content": "book a flight"}], "id": "a"},
        [{"role": "user", "content": "the quick fox"}],
        "cancel 12",
        {"prompt": "oslo", "alpha": 0.5, "beta": {"brief": 0.0}},
        {"messages": [{"role": "user", "content": "hi"}], "beta": {"kind": 0, "brief": 0}, "id": 7},
    ]
    where.mkdir(parents=True, exist_ok=True)
    (where / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + "\n")
    settings = {
        "prompts": f"{where}/prompts.jsonl",
        "doctors": {
            "kind": {"path": f"{folders}/kind", "beta": 0.8},
            "brief": {"path": f"{folders}/brief", "beta": 0.5},
        },
        "max_new_tokens": 8,
        "num_samples": 2,
        "answers_per_wave": 4,
        "guidance_off": ["tool_calls"],
        **decode,
    }
    content = {
        "run_dir": f"{where}/run",
        "patient": {"model_name": f"{folders}/patient", "device": "cpu"},
        "decode": settings,
    }
    (where / "r.yaml").write_text(json.dumps(content))
    return str(where / "r.yaml")
