"""Which HF tensors make up which Megatron parameter, and how they are split over ranks.

A rank's shard of a parameter is a row of pieces of HF tensors, one after the other along one dimension. That one rule
covers everything: query-key-value interleaved by group, gate beside up, the five parts of a Mamba projection, experts,
a padded vocabulary. Reading follows the pieces forwards, exporting follows them backwards. Pure index arithmetic: no
weights, no ranks, no megatron.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from nemo_pivotrl.sizing.architecture import Architecture, Mamba, Moe, padded_vocab_size

FUSED = (
    (".self_attention.linear_qkv.layer_norm_weight", ".input_layernorm.weight"),
    (".mlp.linear_fc1.layer_norm_weight", ".pre_mlp_layernorm.weight"),
    (".mixer.in_proj.layer_norm_weight", ".norm.weight"),
    (".mixer.conv1d_weight", ".mixer.conv1d.weight"),
    (".mixer.conv1d_bias", ".mixer.conv1d.bias"),
)
"""Where Transformer Engine's layers keep a norm and megatron-core from 0.17 on a convolution, and their names here."""

Piece = tuple[int, int, int]
"""(index into `Entry.hf`, start, stop) along `Entry.dim` of that tensor."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One Megatron parameter and where it comes from."""

    name: str
    """Megatron's, as in its plain-torch layers, with layers and experts counted over the whole model."""
    hf: tuple[str, ...]
    """The HF tensors that it is made of."""
    sizes: tuple[int, ...]
    """Their lengths along `dim`; all other dimensions are the parameter's own."""
    cut: Callable[[int, int], list[Piece]]
    """(rank, number of ranks) to the pieces of that rank's shard, in order. Ranks are tensor-parallel ones, or
    expert-tensor-parallel ones of an expert."""
    dim: int = 0
    expert: int | None = None
    """The expert's number, for a parameter of one."""
    copy: bool = False
    """A second place for tensors that another entry exports."""
    padded: bool = False
    """The shard may be longer than its pieces; what is missing is zero."""


def plain_name(name: str, layers: Mapping[str, int]) -> str:
    """A parameter's name as an `Entry` has it; `layers` are the numbers that a chunk gives its layers to those they have in
    the whole model. Experts keep the numbers that the rank gives them."""
    name = re.sub(r"^(decoder\.layers\.)(\d+)", lambda m: f"{m[1]}{layers[m[2]]}", name)
    for fused, plain in FUSED:
        if name.endswith(fused):
            name = name.removesuffix(fused) + plain
    return name


def entries(a: Architecture) -> list[Entry]:
    """Every parameter of a model, in the order of its HF export."""
    root, norm = ("backbone", "norm_f") if a.hybrid else ("model", "norm")
    embedding = f"{root}.embeddings.weight" if a.hybrid else f"{root}.embed_tokens.weight"
    final = "decoder.final_norm.weight" if a.hybrid else "decoder.final_layernorm.weight"
    found = [_vocab("embedding.word_embeddings.weight", embedding, a.vocab_size)]
    for i, kind in enumerate(a.layers):
        mega, hf = f"decoder.layers.{i}.", f"{root}.layers.{i}."
        found += _hybrid_layer(a, kind, mega, hf) if a.hybrid else _gpt_layer(a, kind, mega, hf)
    found.append(_whole(final, f"{root}.{norm}.weight", a.hidden_size))
    found.append(_vocab("output_layer.weight", embedding if a.tied else "lm_head.weight", a.vocab_size, copy=a.tied))
    return found


def _gpt_layer(a: Architecture, kind: str, mega: str, hf: str) -> Iterator[Entry]:
    yield _whole(f"{mega}input_layernorm.weight", f"{hf}input_layernorm.weight", a.hidden_size)
    yield from _attention(a, f"{mega}self_attention.", f"{hf}self_attn.")
    yield _whole(f"{mega}pre_mlp_layernorm.weight", f"{hf}post_attention_layernorm.weight", a.hidden_size)
    if kind == "D":
        yield from _mlp(f"{mega}mlp.", f"{hf}mlp.", a.intermediate_size, a.gated)
    else:
        assert a.moe is not None
        yield from _experts(a.moe, f"{mega}mlp.", f"{hf}mlp.", a.gated)


def _hybrid_layer(a: Architecture, kind: str, mega: str, hf: str) -> Iterator[Entry]:
    norm = {"M": "norm", "*": "input_layernorm", "-": "pre_mlp_layernorm", "E": "pre_mlp_layernorm"}[kind]
    yield _whole(f"{mega}{norm}.weight", f"{hf}norm.weight", a.hidden_size)
    hf = f"{hf}mixer."
    if kind == "M":
        assert a.mamba is not None
        yield from _mamba(a.mamba, f"{mega}mixer.", hf)
    elif kind == "*":
        yield from _attention(a, f"{mega}self_attention.", hf)
    elif kind == "-":
        yield from _mlp(f"{mega}mlp.", hf, a.intermediate_size, a.gated)
    else:
        moe = a.moe
        assert moe is not None
        yield from _experts(moe, f"{mega}mlp.", hf, a.gated)
        if moe.latent_size is not None:
            yield _whole(f"{mega}mlp.fc1_latent_proj.weight", f"{hf}fc1_latent_proj.weight", moe.latent_size)
            yield _whole(f"{mega}mlp.fc2_latent_proj.weight", f"{hf}fc2_latent_proj.weight", a.hidden_size)
        if moe.shared_intermediate_size is not None:
            yield from _mlp(f"{mega}mlp.shared_experts.", f"{hf}shared_experts.", moe.shared_intermediate_size, a.gated)


def _attention(a: Architecture, mega: str, hf: str) -> Iterator[Entry]:
    query, key = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    per_group = query // a.num_key_value_heads

    def cut(rank: int, size: int) -> list[Piece]:
        """Each key-value head with the queries that look at it, cut evenly: with more ranks than heads, inside of one."""
        whole: list[Piece] = []
        for g in range(a.num_key_value_heads):
            whole.append((0, g * per_group, (g + 1) * per_group))
            whole += [(source, g * a.head_dim, (g + 1) * a.head_dim) for source in (1, 2)]
        share = (query + 2 * key) // size
        return _between(whole, rank * share, (rank + 1) * share)

    for kind in ("weight", "bias") if a.qkv_bias else ("weight",):
        names = tuple(f"{hf}{letter}_proj.{kind}" for letter in "qkv")
        yield Entry(f"{mega}linear_qkv.{kind}", names, (query, key, key), cut)
    if a.qk_norm:
        yield _whole(f"{mega}q_layernorm.weight", f"{hf}q_norm.weight", a.head_dim)
        yield _whole(f"{mega}k_layernorm.weight", f"{hf}k_norm.weight", a.head_dim)
    yield _even(f"{mega}linear_proj.weight", (f"{hf}o_proj.weight",), [(0, 0, query)], dim=1)


def _mlp(mega: str, hf: str, width: int, gated: bool, expert: int | None = None) -> Iterator[Entry]:
    names = (f"{hf}gate_proj.weight", f"{hf}up_proj.weight") if gated else (f"{hf}up_proj.weight",)
    sections = [(source, 0, width) for source in range(len(names))]
    yield _even(f"{mega}linear_fc1.weight", names, sections, expert=expert)
    yield _even(f"{mega}linear_fc2.weight", (f"{hf}down_proj.weight",), [(0, 0, width)], dim=1, expert=expert)


def _experts(moe: Moe, mega: str, hf: str, gated: bool) -> Iterator[Entry]:
    yield _whole(f"{mega}router.weight", f"{hf}gate.weight", moe.num_experts)
    if moe.expert_bias:
        yield _whole(f"{mega}router.expert_bias", f"{hf}gate.e_score_correction_bias", moe.num_experts)
    for e in range(moe.num_experts):
        local = f"{mega}experts.local_experts.{e}."
        yield from _mlp(local, f"{hf}experts.{e}.", moe.intermediate_size, gated, expert=e)


def _mamba(m: Mamba, mega: str, hf: str) -> Iterator[Entry]:
    inner, states = m.num_heads * m.head_dim, m.num_groups * m.state_dim
    convolved = _consecutive(inner, states, states)  # x B C
    projected = _consecutive(inner, inner, states, states, m.num_heads)  # z x B C dt
    for name, sections in (
        ("in_proj.weight", projected),
        ("conv1d.weight", convolved),
        ("conv1d.bias", convolved),
        ("A_log", _consecutive(m.num_heads)),
        ("D", _consecutive(m.num_heads)),
        ("dt_bias", _consecutive(m.num_heads)),
        ("norm.weight", _consecutive(inner)),
    ):
        yield _even(f"{mega}{name}", (f"{hf}{name}",), sections)
    yield _even(f"{mega}out_proj.weight", (f"{hf}out_proj.weight",), [(0, 0, inner)], dim=1)


def _between(pieces: list[Piece], first: int, last: int) -> list[Piece]:
    """What of the row of `pieces` lies in [first, last) of it."""
    found, begin = [], 0
    for source, start, stop in pieces:
        low, high = max(first, begin), min(last, begin + stop - start)
        if low < high:
            found.append((source, start + low - begin, start + high - begin))
        begin += stop - start
    return found


def _consecutive(*lengths: int) -> list[Piece]:
    """Sections of one tensor that follow each other."""
    stops = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return [(0, stop - length, stop) for stop, length in zip(stops, lengths, strict=True)]


def _whole(name: str, hf: str, size: int) -> Entry:
    """The same on every rank."""
    return Entry(name, (hf,), (size,), lambda rank, ranks: [(0, 0, size)])


def _even(name: str, hf: tuple[str, ...], sections: list[Piece], dim: int = 0, expert: int | None = None) -> Entry:
    """Every section split evenly, each rank's parts of them one after the other."""
    sizes = tuple(max(stop for source, _, stop in sections if source == i) for i in range(len(hf)))

    def cut(rank: int, ranks: int) -> list[Piece]:
        pieces = []
        for source, start, stop in sections:
            part = (stop - start) // ranks
            pieces.append((source, start + rank * part, start + (rank + 1) * part))
        return pieces

    return Entry(name, hf, sizes, cut, dim=dim, expert=expert)


def _vocab(name: str, hf: str, size: int, copy: bool = False) -> Entry:
    def cut(rank: int, ranks: int) -> list[Piece]:
        part = padded_vocab_size(size, ranks) // ranks
        return [(0, min(rank * part, size), min((rank + 1) * part, size))]

    return Entry(name, (hf,), (size,), cut, copy=copy, padded=True)
