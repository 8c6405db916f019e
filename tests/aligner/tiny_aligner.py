"""A tiny `MegatronGPTModel` of NeMo, its config, tokenizer and pivots, for one rank of a test job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny_policy
import torch
from omegaconf import OmegaConf, open_dict

from nemo_pivotrl.backends.megatron.mapping import entries
from nemo_pivotrl.config import Verifier
from nemo_pivotrl.core.artifacts import Header, write_artefact
from nemo_pivotrl.core.types import Action, Candidate, Preference, Trajectory
from nemo_pivotrl.data.chat_template import Chat
from nemo_pivotrl.data.preferences import preference_to_row
from nemo_pivotrl.data.states import candidate_row, reference, trajectory_row
from nemo_pivotrl.demo.tiny_models import make_tokenizer
from nemo_pivotrl.sizing.architecture import Architecture
from nemo_pivotrl.verifiers.loading import identity, load_verifier

CONF = Path(__file__).resolve().parents[2] / "nemo_pivotrl/integrations/nemo_aligner/conf"
WORDS = (
    "alpha bravo charlie delta echo foxtrot golf hotel india juliet kilo lima mike november oscar papa quebec".split()
)
MAX_LENGTH = 8

MODEL: dict[str, Any] = {
    "mcore_gpt": True,
    "transformer_engine": False,
    "name": "",
    "num_layers": tiny_policy.SHAPE["num_hidden_layers"],
    "hidden_size": tiny_policy.SHAPE["hidden_size"],
    "ffn_hidden_size": tiny_policy.SHAPE["intermediate_size"],
    "num_attention_heads": tiny_policy.SHAPE["num_attention_heads"],
    "num_query_groups": tiny_policy.SHAPE["num_key_value_heads"],
    "encoder_seq_length": 128,
    "max_position_embeddings": 128,
    "position_embedding_type": "rope",
    "rotary_base": 10000,
    "rotary_percentage": 1.0,
    "normalization": "rmsnorm",
    "layernorm_epsilon": tiny_policy.SHAPE["rms_norm_eps"],
    "activation": "fast-swiglu",
    "bias": False,
    "init_method_std": 0.02,
    "use_cpu_initialization": True,
    "share_embeddings_and_output_weights": False,
    "make_vocab_size_divisible_by": 128,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "ffn_dropout": 0.0,
    "apply_rope_fusion": False,
    "masked_softmax_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_add_fusion": False,
    "bias_dropout_fusion": False,
    "gradient_accumulation_fusion": False,
    "persist_layer_norm": False,
    "grad_div_ar_fusion": False,
    "gradient_as_bucket_view": True,
    "megatron_amp_O2": False,
    "apply_query_key_layer_scaling": False,
    "attention_softmax_in_fp32": True,
    "native_amp_init_scale": 1.0,
    "native_amp_growth_interval": 1000,
    "hysteresis": 2,
    "fp16_lm_cross_entropy": False,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "sequence_parallel": False,
    "activations_checkpoint_granularity": None,
    "activations_checkpoint_method": None,
    "activations_checkpoint_num_layers": None,
    "activations_checkpoint_layers_per_pipeline": None,
    "nsys_profile": {"enabled": False},
    "dist_ckpt_format": "zarr",
}

ARCHITECTURE = Architecture(
    model_type="llama",
    layers="D" * tiny_policy.SHAPE["num_hidden_layers"],
    hidden_size=tiny_policy.SHAPE["hidden_size"],
    intermediate_size=tiny_policy.SHAPE["intermediate_size"],
    num_attention_heads=tiny_policy.SHAPE["num_attention_heads"],
    num_key_value_heads=tiny_policy.SHAPE["num_key_value_heads"],
    head_dim=tiny_policy.HEAD,
    vocab_size=tiny_policy.VOCAB,
    max_position_embeddings=128,
    norm_epsilon=tiny_policy.SHAPE["rms_norm_eps"],
    activation="silu",
    tied=False,
    qkv_bias=False,
    qk_norm=False,
    rope_theta=10000.0,
    rope_factor=None,
    moe=None,
    mamba=None,
)


def write_inputs(folder: Path, train: int = 12, validation: int = 4) -> None:
    """`tokenizer/` and `pivots.jsonl` in `folder`: talking turns after short questions."""
    tokenizer = make_tokenizer([f"{a} {b}ing {b}" for a in WORDS for b in WORDS] * 3, tiny_policy.VOCAB)
    assert len(tokenizer) == tiny_policy.VOCAB, len(tokenizer)
    tokenizer.save_pretrained(folder / "tokenizer")
    settings = Verifier()
    chat = Chat(tokenizer)
    trajectories, rows = [], []
    for i in range(train + validation):
        split = "train" if i < train else "validation"
        asked = {"role": "user", "content": " ".join([WORDS[i % len(WORDS)]] * (1 + i % 3))}
        messages = (asked, {"role": "assistant", "content": "kilo lima"})
        trajectories.append(trajectory_row(Trajectory(f"t{i}", f"t{i}", messages, (), None, "")))
        own = Candidate(f"c{i}", f"t{i}", f"t{i}", split, 1, 0, (asked,), (), Action("message", "kilo lima"))
        rows.append(candidate_row(own, i) | {"tokens_prompt": len(chat.prompt_ids([asked], []))})
    write_artefact(folder / "trajectories.jsonl", Header("trajectories", ""), trajectories)
    pivots = folder / "pivots.jsonl"
    sampled = {"sampling": {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": MAX_LENGTH}}
    header = Header(
        stage="pivots",
        config_hash="",
        tokenizer=chat.fingerprint,
        chat_template=chat.template_digest,
        verifier=identity(load_verifier(settings), settings),
        extra=sampled | reference(folder / "trajectories.jsonl", pivots),
    )
    write_artefact(pivots, header, rows)
    header = Header(stage="token_rewards", config_hash="", tokenizer=chat.fingerprint)
    pairs = [
        {"preference_id": f"p{i}", "split": split, "objective": "kindness", **tiny_policy.PAIRS[i % 4]}
        for split, count in (("train", 10), ("validation", 4))
        for i in range(count)
    ]
    write_artefact(folder / "token_rewards.jsonl", header, pairs)
    write_preferences(folder)


def write_preferences(folder: Path) -> None:
    """`preferences.jsonl` in `folder`: what stage 1 reads."""
    rows = [
        Preference(f"p{i}", "train", "helpfulness", ({"role": "user", "content": prompt},), chosen, rejected, f"f:{i}")
        for i, (prompt, chosen, rejected) in enumerate(tiny_policy.PREFERENCES)
    ]
    write_artefact(folder / "preferences.jsonl", Header("preferences", "", ""), map(preference_to_row, rows))


def config(algorithm: str, folder: Path, overrides: dict[str, Any]) -> Any:
    """The package's own YAML with what a tiny model on CPUs needs."""
    from nemo_pivotrl.integrations.nemo_aligner import launch

    launch.prepare()
    cfg = OmegaConf.load(CONF / f"gpt_{algorithm}.yaml")
    with open_dict(cfg):
        cfg.pop("defaults")
        cfg.model = OmegaConf.merge(MODEL, cfg.model)
        cfg.model.pop("overwrite_base_config")
    small: dict[str, Any] = {
        "trainer.devices": 1,
        "trainer.accelerator": "cpu",
        "trainer.precision": 32,
        "exp_manager.explicit_log_dir": str(folder / "logs"),
        "exp_manager.create_checkpoint_callback": False,
        "exp_manager.resume_if_exists": False,
        "model.tokenizer": {"library": "huggingface", "type": str(folder / "tokenizer"), "use_fast": True},
        "model.megatron_amp_O2": False,
        "model.encoder_seq_length": 128,
        "model.optim": {"name": "sgd", "lr": 0.1, "weight_decay": 0.0},
    }
    data = str(folder / ("pivots.jsonl" if algorithm == "pivotrl" else "token_rewards.jsonl"))
    small |= {f"model.data.data_prefix.{split}": [data] for split in ("train", "validation", "test")}
    for key, value in (small | overrides).items():
        OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    return cfg


@torch.no_grad()
def load_weights(
    model: Any, weights: dict[str, torch.Tensor] | None = None, architecture: Architecture = ARCHITECTURE
) -> None:
    """Fill this rank's part of a NeMo model from HF tensors. A doctor's head stays as it is."""
    from megatron.core import parallel_state

    weights = weights or tiny_policy.weights()
    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    first = parallel_state.get_pipeline_model_parallel_rank() * len(architecture.layers) // stages
    parameters = dict(model.model.named_parameters())
    filled = set()
    for entry in entries(architecture):
        name = entry.name
        if name.startswith("decoder.layers."):
            number, _, rest = name.removeprefix("decoder.layers.").partition(".")
            name = f"decoder.layers.{int(number) - first}.{rest}"
        if name not in parameters:
            continue
        parameter, cut = parameters[name], entry.cut(rank, size)
        if entry.padded:  # by as much as the config says
            whole, part = entry.sizes[0], parameter.shape[0]
            cut = [(0, min(rank * part, whole), min((rank + 1) * part, whole))]
        pieces = [weights[entry.hf[source]].narrow(entry.dim, start, stop - start) for source, start, stop in cut]
        shard = torch.cat(pieces, entry.dim)
        parameter.zero_()
        parameter.narrow(entry.dim, 0, shard.shape[entry.dim]).copy_(shard)
        filled.add(name)
    missing = set(parameters) - filled - {"doctor_head.weight", "doctor_head.bias"}
    assert not missing, f"no weights for {sorted(missing)}"


def talkative_weights(folder: Path, shape: dict[str, Any] = tiny_policy.SHAPE) -> dict[str, torch.Tensor]:
    """The tiny weights, changed so that a turn is some of twelve letters and then its end, in any context."""
    vocabulary = json.loads((folder / "tokenizer/tokenizer.json").read_text())["model"]["vocab"]
    found = tiny_policy.weights(shape)
    favoured = [0, *(vocabulary[letter] for letter in "abcdefnopqrs")]
    found["model.embed_tokens.weight"] += 0.5
    found["lm_head.weight"][favoured] += 0.2
    return found


def layout(tp: int = 1, pp: int = 1, dp: int = 1) -> dict[str, Any]:
    """Overrides for so many ranks."""
    return {
        "trainer.devices": tp * pp * dp,
        "model.tensor_model_parallel_size": tp,
        "model.pipeline_model_parallel_size": pp,
    }


class JsonLines:
    """A logger that keeps what it is given."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None, prefix: str = "") -> None:
        self.rows.append({"step": step, **{f"{prefix}{k}": v for k, v in metrics.items()}})

    def log_table(self, *args: Any, **kwargs: Any) -> None:
        """Tables are for people."""

    def finalize(self) -> None:
        """Nothing is buffered."""

    def series(self, name: str) -> list[Any]:
        """The values logged as `name`."""
        return [row[name] for row in self.rows if name in row]


def golden() -> dict[str, Any]:
    """The reference backend's numbers."""
    text = (Path(__file__).parent / "golden.json").read_text()
    found: dict[str, Any] = json.loads(text)
    return found
