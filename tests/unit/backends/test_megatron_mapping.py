"""HF <-> Megatron, as index arithmetic: nothing is lost, nothing is doubled, and what Megatron cannot do is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, NemotronHConfig, Qwen3Config, Qwen3MoeConfig

from nemo_pivotrl.backends.megatron.mapping import entries
from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.sizing.architecture import padded_vocab_size, read_architecture

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "intermediate_size": 48,
}
CONFIGS = [
    LlamaConfig(**SIZES, num_hidden_layers=2),
    Qwen3MoeConfig(**SIZES, num_hidden_layers=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    NemotronHConfig(
        **SIZES,
        hybrid_override_pattern="ME*-",
        mamba_num_heads=8,
        mamba_head_dim=4,
        n_groups=4,
        ssm_state_size=8,
        n_routed_experts=4,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=24,
        moe_latent_size=12,
    ),
]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.model_type)
def test_the_shards_of_all_ranks_hold_every_row_of_every_hf_tensor(config: Any, ranks: int, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    table = entries(read_architecture(tmp_path))
    assert len({entry.name for entry in table}) == len(table)
    assert max(Counter(name for entry in table if not entry.copy for name in entry.hf).values()) == 1
    for entry in table:
        rows = Counter(
            (source, row)
            for rank in range(ranks)
            for source, start, stop in entry.cut(rank, ranks)
            for row in range(start, stop)
        )
        assert rows.keys() == {(source, row) for source, size in enumerate(entry.sizes) for row in range(size)}
        assert set(rows.values()) in ({1}, {ranks})  # split, or the same on every rank


def test_queries_stand_before_the_keys_and_values_of_their_group(tmp_path: Path) -> None:
    CONFIGS[0].save_pretrained(tmp_path)
    (qkv,) = [
        e for e in entries(read_architecture(tmp_path)) if e.name == "decoder.layers.1.self_attention.linear_qkv.weight"
    ]
    assert [name.split(".")[-2] for name in qkv.hf] == ["q_proj", "k_proj", "v_proj"]
    # 8 query heads and 4 key-value heads of 4 channels: two queries, a key and a value a group; rank 1 of 2 has groups 2, 3
    assert qkv.cut(1, 2) == [(0, 16, 24), (1, 8, 12), (2, 8, 12), (0, 24, 32), (1, 12, 16), (2, 12, 16)]


def test_a_mamba_projection_is_split_within_each_of_its_five_parts(tmp_path: Path) -> None:
    CONFIGS[2].save_pretrained(tmp_path)
    (projection,) = [e for e in entries(read_architecture(tmp_path)) if e.name.endswith("mixer.in_proj.weight")]
    # z 32, x 32, B 32, C 32, dt 8
    assert projection.cut(1, 2) == [(0, 16, 32), (0, 48, 64), (0, 80, 96), (0, 112, 128), (0, 132, 136)]


def test_padding_falls_on_the_last_ranks(tmp_path: Path) -> None:
    CONFIGS[0].save_pretrained(tmp_path)
    embedding = entries(read_architecture(tmp_path))[0]
    assert [padded_vocab_size(300, tp) for tp in (1, 2, 4)] == [384, 512, 512]
    assert [embedding.cut(rank, 4) for rank in range(4)] == [
        [(0, 0, 128)],
        [(0, 128, 256)],
        [(0, 256, 300)],
        [(0, 300, 300)],
    ]


@pytest.mark.parametrize(
    ("config", "changes", "fields"),
    [
        (CONFIGS[0], {"attention_bias": True, "mlp_bias": True}, {"attention_bias", "mlp_bias"}),
        (CONFIGS[0], {"hidden_act": "gelu"}, {"hidden_act"}),
        (
            CONFIGS[0],
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            {"rope_parameters.rope_type"},
        ),
        (Qwen3Config(**SIZES, num_hidden_layers=2), {"use_sliding_window": True}, {"use_sliding_window"}),
        (CONFIGS[2], {"layer_norm_epsilon": 1e-6, "use_bias": True}, {"layer_norm_epsilon", "use_bias"}),
        (CONFIGS[2], {"norm_topk_prob": False}, {"norm_topk_prob"}),
        (CONFIGS[2], {"n_group": 2, "topk_group": 2, "num_experts_per_tok": 2}, {"num_experts_per_tok / topk_group"}),
        (CONFIGS[0], {"model_type": "gpt2"}, {"model_type"}),
    ],
)
def test_what_megatron_would_compute_differently_is_refused_by_name(
    config: Any, changes: dict[str, Any], fields: set[str], tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InputError) as caught:
        read_architecture(tmp_path)
    assert {problem.field for problem in caught.value.problems} == fields
