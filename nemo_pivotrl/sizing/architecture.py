"""What an HF config says about a model, as plain numbers.

Everything megatron-core would silently compute differently is refused here, by name, before any weight is read. One
difference stays: transformers (seen in 5.19) clamps the time steps of NemotronH's Mamba layers at `time_step_min`, which
is 0.001 by default; megatron-core, which trained these models, and mamba_ssm's kernels do not. Log-probabilities of a
transformers sampler differ by so much.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_pivotrl.core.errors import InputError, Problem, short
from nemo_pivotrl.sizing.hf_folder import load_config

MODEL_TYPES = ("llama", "qwen2", "qwen3", "qwen3_moe", "nemotron_h")
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What megatron-core's RotaryEmbedding has built in; only the factor can be told to it."""


@dataclass(frozen=True, slots=True)
class Moe:
    """The mixture-of-experts layers, all alike."""

    num_experts: int
    top_k: int
    intermediate_size: int
    latent_size: int | None
    """Width the routed experts work in; None: the hidden size."""
    shared_intermediate_size: int | None
    """Width of the expert that sees every token; None: there is none."""
    score_function: str
    """`softmax` or `sigmoid`."""
    normalise_top_k: bool
    """The chosen experts' scores are divided by their sum."""
    scaling_factor: float
    """Factor on the routed experts' sum."""
    num_groups: int | None
    group_topk: int | None
    """Experts are chosen in the best `group_topk` of `num_groups` groups; None: there are no groups."""
    expert_bias: bool
    """A bias per expert takes part in the choice, but not in the weights."""


@dataclass(frozen=True, slots=True)
class Mamba:
    """The Mamba-2 layers, all alike."""

    num_heads: int
    head_dim: int
    num_groups: int
    state_dim: int
    conv_kernel: int
    chunk_size: int


@dataclass(frozen=True, slots=True)
class Architecture:
    """A causal language model's shape."""

    model_type: str
    layers: str
    """One letter a layer. Of a GPT: `D` (attention and MLP) and `E` (attention and experts). Of a hybrid, Megatron's
    own: `M` (Mamba-2), `*` (attention), `-` (MLP), `E` (experts)."""
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    """As in the checkpoint, before padding."""
    max_position_embeddings: int
    norm_epsilon: float
    activation: str
    """`silu`, gated, or `relu2`, not gated."""
    tied: bool
    """The output layer is the embedding."""
    qkv_bias: bool
    qk_norm: bool
    rope_theta: float | None
    """None: no position embedding (hybrids)."""
    rope_factor: float | None
    """Llama 3's rope scaling; None: none."""
    moe: Moe | None
    mamba: Mamba | None

    @property
    def hybrid(self) -> bool:
        return self.model_type == "nemotron_h"

    @property
    def gated(self) -> bool:
        """MLPs have a gate beside their up projection."""
        return self.activation == "silu"


def read_architecture(folder: str | Path) -> Architecture:
    """The architecture of an HF checkpoint folder. Raises InputError with everything that is not supported."""
    if not Path(folder, "config.json").exists():
        raise InputError(Problem(str(folder), None, "config.json", "nothing", "give an HF checkpoint folder"))
    return architecture_of(load_config(folder, "config.json"), f"{folder}/config.json")


def architecture_of(config: Any, file: str) -> Architecture:
    """The architecture that an HF config describes. Raises InputError with everything that is not supported."""
    problems: list[Problem] = []

    def need(field: str, found: Any, wanted: Any) -> None:
        if found != wanted:
            problems.append(Problem(file, None, field, short(found), f"the Megatron backend needs {wanted}"))

    if config.model_type not in MODEL_TYPES:
        need("model_type", config.model_type, " or ".join(MODEL_TYPES))
        raise InputError(problems)
    read = _hybrid if config.model_type == "nemotron_h" else _gpt
    architecture = read(config, need)
    if problems:
        raise InputError(problems)
    return architecture


def _gpt(config: Any, need: Any) -> Architecture:
    """Llama, Qwen2, Qwen3 and Qwen3-MoE."""
    qwen = config.model_type.startswith("qwen")
    need("hidden_act", config.hidden_act, "silu")
    if config.model_type != "qwen2":  # its q, k and v always have a bias, whatever the config says
        need("attention_bias", config.attention_bias, False)
    need("attention_dropout", float(config.attention_dropout), 0.0)
    if config.model_type == "llama":
        need("mlp_bias", config.mlp_bias, False)
    if qwen:
        need("use_sliding_window", config.use_sliding_window, False)
    rope = getattr(config, "rope_parameters", None)
    if rope is None:  # transformers 4
        rope = {**(config.rope_scaling or {}), "rope_theta": config.rope_theta}
    kind = rope.get("rope_type", "default")
    if kind == "llama3":
        for field, value in LLAMA3_ROPE.items():
            need(f"rope_parameters.{field}", rope[field], value)
    else:
        need("rope_parameters.rope_type", kind, "default")
    need("rope_parameters.partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), 1.0)
    moe = None
    layers = "D" * config.num_hidden_layers
    if config.model_type == "qwen3_moe":
        sparse = [
            i not in config.mlp_only_layers and (i + 1) % config.decoder_sparse_step == 0
            for i in range(config.num_hidden_layers)
        ]
        layers = "".join("E" if s else "D" for s in sparse)
        moe = Moe(
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            intermediate_size=config.moe_intermediate_size,
            latent_size=None,
            shared_intermediate_size=None,
            score_function="softmax",
            normalise_top_k=config.norm_topk_prob,
            scaling_factor=1.0,
            num_groups=None,
            group_topk=None,
            expert_bias=False,
        )
    return Architecture(
        model_type=config.model_type,
        layers=layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        norm_epsilon=config.rms_norm_eps,
        activation="silu",
        tied=config.tie_word_embeddings,
        qkv_bias=config.model_type == "qwen2",
        qk_norm=config.model_type in ("qwen3", "qwen3_moe"),
        rope_theta=rope["rope_theta"],
        rope_factor=rope["factor"] if kind == "llama3" else None,
        moe=moe,
        mamba=None,
    )


def _hybrid(config: Any, need: Any) -> Architecture:
    """NemotronH: Mamba-2, attention without positions, squared-ReLU MLPs, latent experts."""
    need("mlp_hidden_act", config.mlp_hidden_act, "relu2")
    need("mamba_hidden_act", config.mamba_hidden_act, "silu")
    for field in ("attention_bias", "mlp_bias", "mamba_proj_bias", "use_bias"):
        need(field, getattr(config, field), False)
    need("use_conv_bias", config.use_conv_bias, True)
    need("attention_dropout", float(config.attention_dropout), 0.0)
    need("hidden_dropout", float(config.hidden_dropout), 0.0)
    need("sliding_window", config.sliding_window, None)
    need("residual_in_fp32", config.residual_in_fp32, False)
    need("tie_word_embeddings", config.tie_word_embeddings, False)
    need("time_step_limit", [float(x) for x in config.time_step_limit], [0.0, float("inf")])
    layers = config.hybrid_override_pattern
    if "M" in layers:  # the gated norm inside megatron-core's MambaMixer knows no other
        need("layer_norm_epsilon", config.layer_norm_epsilon, 1e-5)
    grouped = config.n_group > 1
    if "E" in layers:
        need("norm_topk_prob", config.norm_topk_prob, True)
        need("n_shared_experts", config.n_shared_experts, 1)
        if config.num_experts_per_tok < 2:  # Megatron does not normalise the score of a lone expert
            need("num_experts_per_tok", config.num_experts_per_tok, "2 or more")
        if grouped:  # transformers ranks groups by their best two experts, Megatron by as many as may be chosen in one
            need("num_experts_per_tok / topk_group", config.num_experts_per_tok // config.topk_group, 2)
    return Architecture(
        model_type=config.model_type,
        layers=layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        norm_epsilon=config.layer_norm_epsilon,
        activation="relu2",
        tied=False,
        qkv_bias=False,
        qk_norm=False,
        rope_theta=None,
        rope_factor=None,
        moe=Moe(
            num_experts=config.n_routed_experts,
            top_k=config.num_experts_per_tok,
            intermediate_size=config.moe_intermediate_size,
            latent_size=config.moe_latent_size,
            shared_intermediate_size=config.moe_shared_expert_intermediate_size,
            score_function="sigmoid",
            normalise_top_k=config.norm_topk_prob,
            scaling_factor=float(config.routed_scaling_factor),
            num_groups=config.n_group if grouped else None,
            group_topk=config.topk_group if grouped else None,
            expert_bias=True,
        )
        if "E" in layers
        else None,
        mamba=Mamba(
            num_heads=config.mamba_num_heads,
            head_dim=config.mamba_head_dim,
            num_groups=config.n_groups,
            state_dim=config.ssm_state_size,
            conv_kernel=config.conv_kernel,
            chunk_size=config.chunk_size,
        )
        if "M" in layers
        else None,
    )


VOCAB_MULTIPLE = 128
"""The padded vocabulary is a multiple of this on every tensor-parallel rank, as in Megatron's own trainers."""


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """The vocabulary size with padding at its end, so that `tp` ranks get equal and well-shaped parts of it."""
    multiple = VOCAB_MULTIPLE * tp
    return -(-vocab_size // multiple) * multiple
