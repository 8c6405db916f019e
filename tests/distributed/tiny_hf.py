"""Tiny random HF checkpoints of every supported architecture, with no tensor left at a value that hides a mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

COMMON: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
GPT = COMMON | {"num_hidden_layers": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
HYBRID = COMMON | {
    "ssm_state_size": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "chunk_size": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 40,
    "routed_scaling_factor": 2.5,
    # transformers 5.19 clamps Mamba's time step at `time_step_min`; megatron-core, which trained these models, and
    # mamba_ssm do not
    "time_step_min": 1e-12,
}
LATENT = {"moe_latent_size": 16, "hybrid_override_pattern": "MEM*EM-E"}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GPT | {"tie_word_embeddings": False}),
    "llama_tied": ("LlamaConfig", GPT | {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "qwen2": ("Qwen2Config", {k: v for k, v in GPT.items() if k != "head_dim"}),
    "qwen3": ("Qwen3Config", GPT),
    "qwen3_moe": ("Qwen3MoeConfig", GPT | EXPERTS | {"norm_topk_prob": True, "mlp_only_layers": [1]}),
    "qwen3_moe_unnormalised": ("Qwen3MoeConfig", GPT | EXPERTS | {"norm_topk_prob": False}),
    # padded to 384 rows on one tensor-parallel rank and to 512 on two
    "qwen3_padded": ("Qwen3Config", GPT | {"vocab_size": 300, "num_hidden_layers": 2}),
    "nemotron_h": ("NemotronHConfig", HYBRID | LATENT),
    "nemotron_h_groups": (
        "NemotronHConfig",
        HYBRID
        | {"hybrid_override_pattern": "M*E-", "n_routed_experts": 8, "n_group": 4, "topk_group": 2}
        | {"num_experts_per_tok": 4},
    ),
}
BATCH, LENGTH = 2, 16


def make(name: str, folder: Path) -> None:
    """Write the checkpoint `name` into `folder`, with `tokens.pt` [B, T] and transformers' own `logits.pt` [B, T, V], and
    a checkpoint `gradients` that has the gradient of `score` where the weights stand."""
    import transformers

    kind, settings = MODELS[name]
    torch.manual_seed(sorted(MODELS).index(name))
    config = getattr(transformers, kind)(**settings)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point() and "inv_freq" not in key:
                tensor.add_(0.1 * torch.randn_like(tensor))
    tokens = torch.randint(0, config.vocab_size, (BATCH, LENGTH))
    logits = model(tokens, use_cache=False).logits
    model.save_pretrained(folder)
    torch.save(tokens, folder / "tokens.pt")
    torch.save(logits.detach(), folder / "logits.pt")
    score(logits, tokens).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    model.save_pretrained(folder / "gradients")


def score(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean log-probability (nats) of the next tokens: logits [B, T, V], tokens [B, T] to []."""
    log_probs = logits[:, :-1].log_softmax(-1)
    return log_probs.gather(2, tokens[:, 1:, None]).mean()
