"""Bytes that one rank needs, by component, from a model's shape, a layout and a micro-batch: arithmetic, nothing is built.

Weights, gradients and optimiser state follow megatron-core 0.16's buffers: gradients in one buffer of float32 (or of the
weights' precision), Adam's two moments and a float32 copy of weights in bfloat16, cut over the ranks that hold the same
weights by the distributed optimiser. Activations are what autograd keeps for the backward pass, layer by layer, in the
manner of Korthikanti et al. 2022 (arXiv 2205.05198, section 4), but for these layers: grouped queries, gated or squared
MLPs that are not fused, experts, Mamba-2, no dropout. `tests/distributed/test_megatron_memory.py` holds all of it against
training steps that count every living byte.

Two sorts of layers. `te`: Transformer Engine's norms, fused attention and mamba_ssm's fused scan, which keep their inputs,
outputs and one number a row, as read in their sources. `local`: the plain-torch twins that run on CPUs, as counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nemo_pivotrl.config import Megatron
from nemo_pivotrl.sizing.architecture import Architecture, Mamba, padded_vocab_size

Engine = Literal["te", "local"]
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Layout:
    """How many ranks share what."""

    tp: int
    pp: int
    cp: int
    dp: int
    """Ranks with the same dense weights and other sequences."""
    ep: int
    etp: int
    expert_dp: int
    """Ranks with the same experts."""
    sp: int
    """Ranks over which norms, residuals and routers are cut."""


def layout_of(megatron: Megatron, world: int) -> Layout:
    """The layout of `world` ranks, for which `legality.layout_problems` has no complaint."""
    tp, pp, cp = (
        megatron.tensor_model_parallel_size,
        megatron.pipeline_model_parallel_size,
        megatron.context_parallel_size,
    )
    ep, etp = megatron.expert_model_parallel_size, megatron.expert_tensor_parallel_size
    dp, expert_dp = world // (tp * pp * cp), world // (ep * etp * pp)
    return Layout(tp, pp, cp, dp, ep, etp, expert_dp, tp if megatron.sequence_parallel else 1)


@dataclass(frozen=True, slots=True)
class Count:
    """Parameters of one rank."""

    dense: int = 0
    """Trained, on every rank that shares the layer's tensor-parallel place."""
    experts: int = 0
    """Trained, of this rank's experts."""
    wide: int = 0
    """Trained, and in float32 whatever the model is in; beside `dense`."""
    frozen: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(
            self.dense + other.dense,
            self.experts + other.experts,
            self.wide + other.wide,
            self.frozen + other.frozen,
        )

    @property
    def all(self) -> int:
        return self.dense + self.experts + self.wide + self.frozen


def stages_of(a: Architecture, pp: int) -> list[str]:
    """The layers of each pipeline stage."""
    share = len(a.layers) // pp
    return [a.layers[i * share : (i + 1) * share] for i in range(pp)]


def stage_parameters(a: Architecture, m: Megatron, layout: Layout, stage: int, head: bool = False) -> Count:
    """One rank's parameters on pipeline stage `stage`, counted from 0. head: of a doctor, with its value head."""
    layers = stages_of(a, layout.pp)[stage]
    last, table = stage == layout.pp - 1, padded_vocab_size(a.vocab_size, layout.tp) // layout.tp * a.hidden_size
    found = sum((layer_parameters(a, kind, m, layout) for kind in layers), Count())
    if stage == 0:
        found += Count(dense=table)
    if last:
        found += Count(dense=a.hidden_size + (0 if a.tied and layout.pp == 1 else table))
    return found + Count(wide=a.hidden_size + 1) if head and last else found


def layer_parameters(a: Architecture, kind: str, m: Megatron, layout: Layout) -> Count:
    """One layer's parameters on one rank; `kind` is a letter of `Architecture.layers`."""
    h, tp = a.hidden_size, layout.tp
    if kind == "M":
        assert a.mamba is not None
        inner, states = a.mamba.num_heads * a.mamba.head_dim, a.mamba.num_groups * a.mamba.state_dim
        projected = h * (3 * inner + 2 * states + a.mamba.num_heads)
        convolved = (inner + 2 * states) * (a.mamba.conv_kernel + 1)
        return Count(
            dense=h + (projected + convolved + inner + a.mamba.num_heads) // tp, wide=2 * a.mamba.num_heads // tp
        )
    query, key = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    attention = h * (2 * query + 2 * key) + (query + 2 * key if a.qkv_bias else 0)
    attention = h + attention // tp + (2 * a.head_dim if a.qk_norm else 0)
    matrices = 3 if a.gated else 2
    if kind == "*":
        return Count(dense=attention)
    mixed = Count(dense=attention if not a.hybrid else 0)
    if kind in "D-":
        return mixed + Count(dense=h + matrices * h * a.intermediate_size // tp)
    assert a.moe is not None
    moe = a.moe
    width, shared = moe.latent_size or h, moe.shared_intermediate_size or 0
    router = Count(frozen=moe.num_experts * h) if m.moe_freeze_router else Count(dense=moe.num_experts * h)
    return (
        mixed
        + router
        + Count(
            dense=h + (2 * h * moe.latent_size if moe.latent_size else 0) + matrices * h * shared // tp,
            experts=moe.num_experts // layout.ep * matrices * width * moe.intermediate_size // layout.etp,
        )
    )


@dataclass(frozen=True, slots=True)
class State:
    """Bytes that a rank holds throughout training."""

    weights: int
    gradients: int
    optimizer: int
    step: int
    """For a moment, in the optimiser's step: float32 copies of gradients that are kept in less."""


def state_bytes(count: Count, m: Megatron, layout: Layout) -> State:
    """Weights, gradient buffer and Adam's state of a rank."""
    half = 2 if m.bf16 else 4
    narrow = 1 if m.fp8 != "none" and m.fp8_param else half
    gradient = 4 if m.grad_reduce_in_fp32 or not m.bf16 else 2
    dense, experts = (layout.dp * layout.cp, layout.expert_dp) if m.use_distributed_optimizer else (1, 1)
    state = 12 if m.bf16 else 8
    return State(
        weights=narrow * (count.dense + count.experts) + 4 * count.wide + half * count.frozen,
        gradients=gradient * (count.dense + count.experts) + 4 * count.wide,
        optimizer=state * count.dense // dense + state * count.experts // experts + 8 * count.wide // dense,
        step=4 * (count.dense // dense + count.experts // experts) if gradient == 2 else 0,
    )


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward and backward pass."""

    tokens: int
    """Of all its rows, padding included."""
    length: int
    """Of its longest row."""
    predicted: int
    """Tokens whose log-probability is asked of one context-parallel rank."""
    shared: bool = False
    """A stream that shares prefixes."""
    form: str = "auto"
    """What computes attention over them (`policy.prefix_attention`)."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes that one layer keeps for its backward pass."""

    along: float = 0.0
    """A token, cut over `Layout.sp`."""
    across: float = 0.0
    """A token, cut over `Layout.tp`."""
    whole: float = 0.0
    """A token, on every rank."""
    row: float = 0.0
    """A token sent to an expert, of its full width."""
    row_across: float = 0.0
    """The same, cut over `Layout.etp`."""

    def __add__(self, other: Kept) -> Kept:
        return Kept(
            self.along + other.along,
            self.across + other.across,
            self.whole + other.whole,
            self.row + other.row,
            self.row_across + other.row_across,
        )

    def bytes(self, tokens: int, top_k: int, layout: Layout, imbalance: float) -> int:
        """Of `tokens` tokens of a context-parallel rank. imbalance: rows of the busiest rank over the mean."""
        rows = tokens / layout.sp * top_k * layout.etp * imbalance
        dense = self.along / layout.sp + self.across / layout.tp + self.whole
        return int(tokens * dense + rows * (self.row + self.row_across / layout.etp))


def layer_kept(
    a: Architecture, kind: str, m: Megatron, engine: Engine, batch: MicroBatch, scores: bool, adapters: bool = False
) -> Kept:
    """What a layer keeps for its backward pass where it is not recomputed. scores: with the attention scores, where attention
    is not fused. adapters: they alone train, and experts, which have none, keep no inputs for gradients of their weights."""
    e, h = 2 if m.bf16 else 4, a.hidden_size
    norm = Kept(along=_norm(h, e, engine))
    if kind == "M":
        return norm + _mamba(a, m, e, engine, batch.shared)
    attention = norm + _attention(a, engine, e, batch.length if scores else 0)
    if batch.shared:  # every context-parallel rank keeps the keys and values of the whole stream
        own = a.head_dim * max(1, a.num_key_value_heads // m.tensor_model_parallel_size)
        attention += Kept(whole=2 * e * own * (m.context_parallel_size - 1))
    if kind == "*":
        return attention
    mixed = attention if not a.hybrid else Kept()
    if kind in "D-":
        return mixed + norm + Kept(across=_act(a.gated, engine) * a.intermediate_size * e)
    assert a.moe is not None
    moe = a.moe
    # router: logits, scores, probabilities and masks over all experts; the chosen ones' numbers and places, which Transformer
    # Engine's permutation keeps as two numbers an expert
    places = 7 if engine == "te" else 0
    router = moe.num_experts * ((14 if moe.score_function == "sigmoid" else 10) + places) + 16 * moe.top_k
    # without fusion the weight of an expert multiplies its hidden state: one copy more than an MLP
    hidden = (_act(a.gated, engine) + (engine == "local")) * moe.intermediate_size * e
    inputs = 0 if adapters and engine == "te" else (moe.latent_size or h) * e
    rows = Kept(row=inputs + 16, row_across=hidden)
    latent = (moe.latent_size or 0) * e
    shared = Kept(across=_act(a.gated, engine) * (moe.shared_intermediate_size or 0) * e)
    return mixed + norm + Kept(along=router + latent) + rows + shared


def _act(gated: bool, engine: Engine) -> int:
    """Tensors of an MLP's width: gate and up, the gate's activation, a copy of up and their product, where they are fused gate,
    up and product; or relu and its square."""
    return (3 if engine == "te" else 5) if gated else 2


def _norm(width: int, e: int, engine: Engine) -> float:
    """A norm's input and output. torch's own keeps the input and the normalised values in float32."""
    return width * (2 * e if engine == "te" else 8 + e if e == 2 else 3 * e)


def _attention(a: Architecture, engine: Engine, e: int, length: int) -> Kept:
    """The projection's output, of which the values are a view; queries as they are rotated or copied, rotated keys, and
    the context. Without fused attention also the scores with `length` keys; 0: they are recomputed."""
    query, key = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    across = e * (3.0 * query + 2 * key)
    whole = 0.0
    if a.rope_theta is not None:
        across += e * key
        # sines and cosines, of queries and of keys; Transformer Engine keeps angles, which are one tensor for all layers
        whole += 4 * a.head_dim * e if engine == "local" else 0
    if a.qk_norm:
        across += (query + key) * (e if engine == "te" else 8)
    if engine == "te":
        across += 4 * a.num_attention_heads
    elif length:
        across += length * a.num_attention_heads * (4 + e) + (2 * query * e if query != key else 0)
        whole += length
    return Kept(across=across, whole=whole)


def _mamba(a: Architecture, m: Megatron, e: int, engine: Engine, shared: bool) -> Kept:
    """mamba_ssm's fused convolution and scan keep the projection, their output before the gate and the gated output. Over
    shared prefixes the convolution, the scan and the gate run one after another, the gate in float32. The plain-torch scan
    keeps what a chunk's matrix products are made of."""
    assert a.mamba is not None
    mamba = a.mamba
    inner, states = mamba.num_heads * mamba.head_dim, mamba.num_groups * mamba.state_dim
    if engine == "te":
        own = replicated_states(mamba, m)
        fused = Kept(across=e * (4 * inner + mamba.num_heads), whole=2 * e * own)
        apart = Kept(across=e * (4 * inner + mamba.num_heads) + 12 * inner, whole=6 * e * own)
        return fused + apart if shared else fused
    scan = 9.0 * inner + 6 * mamba.num_heads * mamba.state_dim + 4 * mamba.num_heads
    chunks = 3.0 * mamba.num_heads * mamba.chunk_size + 2 * inner * mamba.state_dim / mamba.chunk_size
    return Kept(across=4 * (scan + chunks) + e * (2 * (inner + 2 * states) + inner))


def replicated_states(mamba: Mamba, m: Megatron) -> int:
    """Elements of B, and of C, for a token of a rank: with more context-parallel ranks than groups, several ranks make the
    same group's for the whole sequence."""
    groups = max(mamba.num_groups // m.tensor_model_parallel_size, m.context_parallel_size)
    return mamba.state_dim * groups


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes of activations on one rank."""

    held: int
    """Kept by all layers of all micro-batches under way, when the last backward pass begins."""
    backward: int
    """Beside them at the worst moment of it: what is computed again, gradients of about half of what the layer keeps, those of
    the residual, and that of the largest matrix before it is added to the buffer; less what later layers have let go."""
    logits: int
    """Beside `held`, while the last stage makes logits a chunk at a time."""

    @property
    def peak(self) -> int:
        return self.held + max(self.backward, self.logits)


def activation_bytes(
    a: Architecture,
    m: Megatron,
    layout: Layout,
    stage: int,
    batch: MicroBatch,
    engine: Engine,
    num_microbatches: int,
    imbalance: float = 1.0,
    head: bool = False,
    adapters: bool = False,
) -> Activations:
    """Activations of one rank on pipeline stage `stage` (1F1B: the first stage has as many micro-batches under way as there
    are stages, the last has one). adapters: they alone train."""
    e, h = 2 if m.bf16 else 4, a.hidden_size
    layers, last = stages_of(a, layout.pp)[stage], stage == layout.pp - 1
    tokens = batch.tokens // layout.cp
    top_k = a.moe.top_k if a.moe else 0

    def kept(kind: str, scores: bool) -> int:
        return layer_kept(a, kind, m, engine, batch, scores, adapters).bytes(tokens, top_k, layout, imbalance)

    kinds = set(layers)
    each = {kind: kept(kind, scores=m.recompute == "none") for kind in kinds}
    whole = {kind: kept(kind, scores=True) for kind in kinds}
    boundary = tokens * h * e // layout.sp
    under_way = min(layout.pp - stage, num_microbatches)
    full = m.recompute == "full"
    keeps = {kind: boundary if full else each[kind] for kind in kinds}
    held = sum(keeps[kind] for kind in layers) * under_way
    logits = chosen = 0
    if last:
        chosen = batch.predicted * h * (e + (4 if head else 0))  # a value head reads them in float32
        held += int(tokens * (_norm(h, e, engine) - h * e) / layout.sp) + chosen
        logits = _logits_bytes(a, m, layout, batch, tokens * h * e if layout.sp > 1 else 0)
    elif engine == "te":
        held += boundary * under_way  # what it sent of each micro-batch
    if layout.pp > 1 and engine == "te":
        held += boundary  # what the next pass is given
    if a.rope_theta is not None and engine == "te":
        held += 4 * a.head_dim * (tokens if batch.shared else batch.length // layout.cp) * under_way  # angles
    backward, left = 0, chosen  # what the head kept is gone when the layers' turn comes
    for kind in reversed(layers):
        again = whole[kind] if full else whole[kind] - each[kind]
        if engine == "te":
            gradients = transient_bytes(a, kind, m, layout, batch, imbalance, adapters) + 3 * boundary
        else:
            gradients = max(whole[kind] // 2, whole[kind] - kept(kind, scores=False))
            if kind == "M":
                gradients //= 5  # many small steps, whose gradients live one at a time
            gradients += 2 * boundary + _largest(a, kind, layout) * e
        backward = max(backward, again + gradients - left)
        left += keeps[kind]
    return Activations(held, backward, logits)


def _logits_bytes(a: Architecture, m: Megatron, layout: Layout, batch: MicroBatch, gathered: int) -> int:
    """Beside what is held, while log-probabilities are made a chunk of positions at a time: forward with the gathered hidden
    states, of which they are some; backward with the gradients of the chosen ones and of the LM head."""
    e, h = 2 if m.bf16 else 4, a.hidden_size
    columns = padded_vocab_size(a.vocab_size, layout.tp) // layout.tp
    chunk = min(m.logprob_chunk_tokens, max(batch.predicted, 1))
    forward = gathered + chunk * columns * (e + 4)
    backward = batch.predicted * h * e + columns * h * 4 + max(chunk * columns * (3 * e + 4), columns * h * e)
    return max(forward, backward)


def transient_bytes(
    a: Architecture, kind: str, m: Megatron, layout: Layout, batch: MicroBatch, imbalance: float, adapters: bool = False
) -> int:
    """What a layer of Transformer Engine's has beside what it keeps, at its worst moment: computed again, or backward."""
    e, h, tokens = 2 if m.bf16 else 4, a.hidden_size, batch.tokens // layout.cp
    output = h * e  # whole on every rank before it is cut over the sequence

    def mlp(width: float) -> float:
        """Backward the output's gradient and the activation's, or the activation's and those of what it is made of."""
        return max(output + width * e, (2 if a.gated else 3) * width * e)

    if kind == "M":
        assert a.mamba is not None
        inner, chunk = a.mamba.num_heads * a.mamba.head_dim / layout.tp, a.mamba.chunk_size
        if batch.shared:
            return int(tokens * max(output, 8 * inner))
        states, groups = replicated_states(a.mamba, m), replicated_states(a.mamba, m) / a.mamba.state_dim
        heads = a.mamba.num_heads / layout.tp
        # gradients of the projection, of B and C in float32 and of a chunk's products, and the convolution's input and output
        projection, convolved = 2 * inner + 2 * states + heads, inner + 2 * states
        return int(tokens * max(output, e * (projection + 2 * convolved + inner) + 8 * states + 12 * chunk * groups))
    query, key = a.num_attention_heads * a.head_dim / layout.tp, a.num_key_value_heads * a.head_dim / layout.tp
    attention = output + e * (2 * query + 4 * key)
    if batch.shared and batch.form not in ("auto", "flex"):
        attention = output + e * query + calls_bytes(query, key, layout.cp)
    if adapters:  # their norm of what the layer is given, worked out in float32, and what they add to the projection
        attention += h * (e + 8) / layout.sp + 2 * e * (query + 2 * key)
    if kind == "*":
        return int(tokens * attention)
    if kind in "D-":
        return int(tokens * max(mlp(a.intermediate_size / layout.tp), 0 if a.hybrid else attention))
    assert a.moe is not None
    # computed again: the rows as they are sent, those received, the experts' answers, and these as they go back; or backward,
    # where all experts' gradients of one matrix are there before they are added to the buffer
    row, hidden = (a.moe.latent_size or h) * e, a.moe.intermediate_size * e / layout.etp
    sent = tokens / layout.sp * a.moe.top_k
    rows = sent * layout.etp * imbalance
    matrix = 0 if adapters else _largest(a, kind, layout) * e / (2 if a.gated else 1)
    copies = 3 if m.fp8 == "none" else 4  # and these padded
    return int(max(sent * row + rows * copies * row, rows * (row + hidden) + matrix))


def calls_bytes(query: float, key: float, cp: int) -> float:
    """A token's, at most, in the backward pass of attention over shared prefixes by kernels for packed sequences, beside what is
    kept and the output's gradient: float32 sums of all gradients, of keys and values of the whole stream, and what one call adds to
    them with the kernel's own float32 sums. query, key: elements of a token on this rank."""
    return 9 * query + 10 * key * cp


def forward_bytes(
    a: Architecture, m: Megatron, layout: Layout, stage: int, batch: MicroBatch, engine: Engine, imbalance: float = 1.0
) -> int:
    """Activations of a forward pass that keeps nothing: the widest layer's, its input and output, and a chunk of logits."""
    e, h, tokens = 2 if m.bf16 else 4, a.hidden_size, batch.tokens // layout.cp
    top_k = a.moe.top_k if a.moe else 0
    widest = max(
        layer_kept(a, kind, m, engine, batch, True).bytes(tokens, top_k, layout, imbalance)
        for kind in set(stages_of(a, layout.pp)[stage])
    )
    columns = padded_vocab_size(a.vocab_size, layout.tp) // layout.tp
    logits = min(m.logprob_chunk_tokens, max(batch.predicted, 1)) * columns * (e + 8) + batch.predicted * h * e
    return 2 * tokens * h * e // layout.sp + max(widest, logits if stage == layout.pp - 1 else 0)


def _largest(a: Architecture, kind: str, layout: Layout) -> int:
    """Elements of the layer's largest matrix on one rank; all experts of a rank count as one."""
    h = a.hidden_size
    if kind == "M":
        assert a.mamba is not None
        inner, states = a.mamba.num_heads * a.mamba.head_dim, a.mamba.num_groups * a.mamba.state_dim
        return h * (2 * inner + 2 * states + a.mamba.num_heads) // layout.tp
    query, key = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    if kind == "*":
        return h * (query + 2 * key) // layout.tp
    gate = 2 if a.gated else 1
    if kind in "D-":
        return gate * h * a.intermediate_size // layout.tp
    assert a.moe is not None
    width = a.moe.latent_size or h
    return a.moe.num_experts // layout.ep * gate * width * a.moe.intermediate_size // layout.etp
