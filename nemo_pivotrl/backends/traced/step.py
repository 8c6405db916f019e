"""One rank's training step over tensors without numbers: the project's own trainer, counted.

The trainer, megatron-core, Transformer Engine's and mamba_ssm's Python run as on the rank's GPU. Replaced is what is compiled,
what sends, and what reads numbers out of tensors: routing (balanced), the gradient's norm (1), metrics (none) and the shapes that
pipeline stages tell each other (those of the same micro-batch).
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor

from nemo_pivotrl.backends.traced import device, engine, kernels, routing, sources, triton_names, varlen
from nemo_pivotrl.backends.traced.ledger import Ledger
from nemo_pivotrl.backends.varlen_attention import KERNELS
from nemo_pivotrl.config import Megatron, Optimizer, Policy
from nemo_pivotrl.sizing.architecture import Architecture
from nemo_pivotrl.sizing.memory import GIB, MicroBatch

MOVES = "te_moe::"
"""Prefix of Transformer Engine's operators that move rows to experts and back."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What to trace."""

    policy: Policy
    megatron: Megatron
    architecture: Architecture
    world: int
    rank: int
    capability: tuple[int, int]
    memory_gib: float
    imbalance: float
    head: bool
    """With a doctor's value head."""
    optimizer: bool
    """With an optimiser's step."""
    prompt: Sequence[int]
    responses: Sequence[int]
    """Tokens of the micro-batch's one prompt, and of each of its responses."""


@dataclass(slots=True)
class Traced:
    """Bytes of one rank, and what ran."""

    versions: dict[str, str]
    stage: int
    parameters: int = 0
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    held: int = 0
    """Activations when the first backward pass begins: at most."""
    peak: int = 0
    """Activations at most, forward or backward."""
    step: int = 0
    """Beside the state, for a moment in the optimiser's step."""
    left: int = 0
    """Of activations, after the last backward pass."""
    copies: int = 0
    """FP8 copies of weights that stay from step to step."""
    workspace: int = 0
    micro_batches: list[MicroBatch] = field(default_factory=list)
    collectives: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Calls and bytes of the forward and backward passes, by collective and group."""
    kernels: Counter[str] = field(default_factory=Counter)
    modules: Counter[str] = field(default_factory=Counter)
    attention: Counter[str] = field(default_factory=Counter)
    broken_fp8: list[str] = field(default_factory=list)
    """FP8 products that cuBLAS would refuse."""
    unmapped: list[str] = field(default_factory=list)
    """Parameters that have no place in the name map of checkpoints, or another size there."""
    living: list[tuple[int, int, str]] = field(default_factory=list)
    """(bytes, how many, what) when the first backward pass begins."""
    at_peak: list[tuple[int, int, str]] = field(default_factory=list)
    """The same when most activations are alive."""
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes at the worst moment."""
        state = self.weights + self.gradients + self.optimizer + self.copies + self.workspace
        return state + max(self.peak, self.step)


def megatron_version() -> str:
    """Release of megatron-core, from its own file: installed or beside. Not before Transformer Engine's stand-in is there."""
    import megatron.core.package_info

    return str(megatron.core.package_info.__version__)


def trace(asked: Asked) -> Traced:
    """Run the step. Raises InputError for what cannot be traced here. Once a process: torch is replaced in part."""
    folder = sources.find()
    found = Traced(sources.versions(folder), 0)
    device.install(asked.capability, asked.memory_gib)
    engine.install(folder, found.versions["transformer_engine"])
    kernels.install(folder, found.versions)
    found.versions["megatron_core"] = megatron_version()
    kernels.fuse_activations()
    if asked.policy.prefix_sharing and asked.policy.prefix_attention in KERNELS:
        varlen.install(folder)
    routing.install(asked.imbalance)
    with _clock(found, "groups"):
        groups = _join(asked)
    found.stage = groups.pp.rank()
    fake = _fake_mode()
    ledger = Ledger()
    ledger.names = _names(groups)
    _without_numbers(asked, found)
    with fake, ledger:
        _run(asked, groups, fake, ledger, found)
    found.kernels += Counter(engine.CALLS) + Counter(triton_names.LAUNCHES)
    found.attention, found.broken_fp8 = Counter(engine.CHOSEN), sorted(set(engine.BROKEN))
    return found


def _run(asked: Asked, groups: Any, fake: Any, ledger: Ledger, found: Traced) -> None:
    from nemo_pivotrl.backends.megatron.train import MegatronPolicy

    with _clock(found, "build"):
        backend = MegatronPolicy(asked.policy, asked.megatron, groups, value_head=asked.head)
    found.unmapped += _unsharded(backend)
    found.weights = ledger.now
    found.parameters = sum(p.numel() for p in backend.stage.parameters())
    found.modules = Counter(_kind(module) for module in backend.stage.modules())
    with _clock(found, "buffers and optimiser"):
        backend.prepare_for_training(Optimizer(lr=1e-6))
    buffers = [*backend.model.buffers, *backend.model.expert_parallel_buffers]
    found.gradients = sum(b.grad_data.untyped_storage().nbytes() for b in buffers)
    found.optimizer = ledger.now - found.weights - found.gradients if asked.optimizer else 0
    with _real():
        layouts, found.micro_batches = _micro_batches(asked, backend)
    backend._layouts = lambda _: layouts  # type: ignore[method-assign]
    backend._totals = lambda _: {}  # type: ignore[method-assign]
    backend._token_ratio = lambda _: {}  # type: ignore[method-assign]
    backend.prepare_for_training_step()
    before = ledger.now
    if asked.megatron.fp8 != "none":  # as from the second step on, when the weights' FP8 copies are there
        with _clock(found, "first step"), _watched(ledger, before, found, groups, layouts):
            backend._run(_batch(layouts), _loss, forward_only=False)
        gc.collect()
        found.workspace, found.held = sum(w.numel() for w in engine.WORKSPACES), 0
        # with pipeline stages a micro-batch's hidden states stay, too, until the next one's take their place
        found.copies = ledger.living_of("uint8") - found.workspace
        before += found.copies
    state = before
    ledger.restart()
    with _clock(found, "forward and backward"), _watched(ledger, state, found, groups, layouts):
        backend._run(_batch(layouts), _loss, forward_only=False)
    moved = {name: n for name, n in ledger.operators.items() if name.startswith(MOVES)}
    found.kernels = Counter(moved)
    found.workspace = sum(w.numel() for w in engine.WORKSPACES)
    found.peak -= found.workspace
    found.held -= found.workspace
    gc.collect()
    found.left = ledger.now - state - found.workspace
    found.collectives = {key: (ledger.calls[key], size) for key, size in ledger.collectives.most_common()}
    if asked.optimizer:
        before = ledger.now
        ledger.restart()
        with _clock(found, "optimiser's step"):
            backend.finish_training_step()
            backend.prepare_for_training_step()  # lets go of the gradients' float32 copies
        grown = ledger.now - before
        found.optimizer += grown
        found.step = ledger.peak - before - grown


def _loss(rows: Any, log_probs: Tensor, values: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    """A sum of everything that a loss is given. A loss's own tensors are one number a response token."""
    total = (log_probs * log_probs.detach().exp()).sum()
    return (total if values is None else total + values.sum()), {}


def _batch(layouts: Sequence[Any]) -> Any:
    from nemo_pivotrl.backends.base import TokenBatch

    return TokenBatch([[1]], [0], [[1]], {})


def _micro_batches(asked: Asked, backend: Any) -> tuple[list[Any], list[MicroBatch]]:
    """As many micro-batches as there are stages, and with several stages a shorter one, whose length they must learn."""
    from nemo_pivotrl.algorithms import prefix_tree
    from nemo_pivotrl.backends.megatron.microbatches import lay_out
    from nemo_pivotrl.backends.megatron.pipeline_stage import own_places

    multiple, stages = backend._multiple(), asked.megatron.pipeline_model_parallel_size
    packed = asked.megatron.sequence_packing

    def made(prompt: Sequence[int], responses: Sequence[int]) -> Any:
        rows = range(len(responses))
        given = [list(prompt)] * len(rows), [[i + 2] * length for i, length in enumerate(responses)]
        if asked.policy.prefix_sharing:
            return backend._shared(prefix_tree.lay_out(rows, *given, multiple, asked.head))
        return lay_out(rows, *given, multiple, packed)

    layouts = [made(asked.prompt, asked.responses) for _ in range(stages)]
    if stages > 1:
        layouts.append(made(asked.prompt[: len(asked.prompt) // 2], asked.responses))
    sizes = []
    for rows in layouts:
        length = rows.tokens.shape[1] if not packed else max(asked.responses) + len(asked.prompt)
        cp = backend.groups.cp
        mine, _ = own_places(rows.places, rows.held(cp.rank(), cp.size()), *rows.tokens.shape)
        form = asked.policy.prefix_attention
        sizes.append(MicroBatch(rows.tokens.numel(), length, len(mine), asked.policy.prefix_sharing, form))
    return layouts, sizes


@contextlib.contextmanager
def _watched(ledger: Ledger, state: int, found: Traced, groups: Any, layouts: Sequence[Any]) -> Iterator[None]:
    """Note the bytes between passes, and tell stages the shapes of what they receive."""
    import megatron.core.pipeline_parallel.p2p_communication as p2p
    import megatron.core.pipeline_parallel.schedules as schedules

    step, exchange = schedules.backward_step, p2p.P2PCommunicator._communicate_shapes
    first = True

    def backward_step(*args: Any, **more: Any) -> Any:
        nonlocal first
        found.held = max(found.held, ledger.now - state)
        if first:
            found.living, first = ledger.living(), False
        return step(*args, **more)

    arrivals, returns = iter(layouts), iter(layouts)

    def communicate_shapes(self: Any, to_next: Any, to_before: Any, from_before: bool, from_next: bool) -> Any:
        """Each stage's answer, which is the shape of this stage's own hidden states of the same micro-batch."""
        cut = groups.cp.size() * (groups.tp.size() if self.config.sequence_parallel else 1)

        def shape(rows: Any) -> list[int]:
            return [rows.tokens.shape[1] // cut, rows.tokens.shape[0], self.config.hidden_size]

        nothing = [0, 0, 0]
        return shape(next(arrivals)) if from_before else nothing, shape(next(returns)) if from_next else nothing

    schedules.backward_step = backward_step
    p2p.P2PCommunicator._communicate_shapes = communicate_shapes
    try:
        yield
    finally:
        schedules.backward_step, p2p.P2PCommunicator._communicate_shapes = step, exchange
    found.peak, found.at_peak = ledger.peak - state, ledger.at_peak


def _kind(module: Any) -> str:
    kind = type(module)
    return f"{kind.__module__.partition('.')[0]}.{kind.__name__}"


def _fake_mode() -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def _real() -> Any:
    """Within it tensors have numbers."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    return unset_fake_temporarily()


def _really(function: Any) -> Any:
    """The function with numbers: for what turns places of tokens into places of tokens."""

    def call(*args: Any, **more: Any) -> Any:
        with _real():
            return function(*args, **more)

    return call


def _join(asked: Asked) -> Any:
    """The job of `world` ranks, of which this process is one; nothing is sent."""
    import os

    import torch.distributed._tools.fake_collectives
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=asked.rank, world_size=asked.world)
    make = dist.new_group

    def new_group(ranks: Any = None, *_: Any, **more: Any) -> Any:
        kept = {k: v for k, v in more.items() if k in ("use_local_synchronization", "group_desc")}
        return make(ranks, backend="fake", **kept)

    dist.new_group = new_group

    def all_gather_object(out: list[Any], value: Any, group: Any = None) -> None:
        out[:] = [value] * len(out)

    dist.all_gather_object = all_gather_object
    import megatron.core.tensor_parallel.random as generators

    generators._get_cuda_rng_state = lambda *_, **__: torch.zeros(16, dtype=torch.uint8)
    generators._set_cuda_rng_state = lambda *_, **__: None
    generators.CudaRNGStatesTracker.fork = lambda *_, **__: contextlib.nullcontext()
    from nemo_pivotrl.backends.megatron.parallel import initialize

    answer: Any = torch.cuda.current_device
    torch.cuda.current_device = lambda: 0  # here it is asked for a number, and elsewhere for a device
    os.environ["WORLD_SIZE"] = str(asked.world)  # the rest of a launcher's variables is only read to join a job
    try:
        return initialize(asked.megatron, seed=1)
    finally:
        del os.environ["WORLD_SIZE"]
        torch.cuda.current_device = answer


def _names(groups: Any) -> dict[str, str]:
    names: dict[str, str] = {}
    for name in ("tp", "pp", "cp", "dp", "dp_cp", "ep", "expt_tp", "expt_dp", "world"):
        names.setdefault(getattr(groups, name).group_name, name)
    return names


def _without_numbers(asked: Asked, found: Traced) -> None:
    """Replace what of the project and megatron-core reads weights or numbers of tensors."""
    import megatron.core.optimizer.optimizer as optimizers

    import nemo_pivotrl.backends.megatron.microbatches as microbatches
    import nemo_pivotrl.backends.megatron.model as model
    import nemo_pivotrl.backends.megatron.pipeline_stage as stage
    import nemo_pivotrl.backends.megatron.train as train
    import nemo_pivotrl.backends.tree_attention as attention

    model.check_weights = lambda *_: None
    model.load_hf = lambda chunks, _, shape, groups: found.unmapped.extend(_unmapped(chunks, shape, groups))
    model.read_architecture = train.read_architecture = lambda _: asked.architecture
    rows: Any = microbatches.Rows
    rows.held = _really(rows.held)
    stage.own_places, stage._packed = _really(stage.own_places), _really(stage._packed)
    masks, attention._calls = _really(attention._masks), _really(attention._calls)

    def flex(query: Tensor, key: Tensor, value: Tensor, forest: Any, scale: float, held: Any = None) -> Tensor:
        told, given = masks(forest.leave, held).seq_lengths, (query.shape[2], key.shape[2])
        if told != given:
            raise RuntimeError(
                f"attention of {given[0]} queries and {given[1]} keys, its mask of {told[0]} and {told[1]}"
            )
        engine.CHOSEN["FlexAttention over shared prefixes"] += 1
        return kernels.Flex.apply(query, key, value)

    attention.flex = flex
    optimizers.get_grad_norm_fp32 = lambda *_, **__: 1.0


def _unmapped(chunks: Any, shape: Architecture, groups: Any) -> list[str]:
    """Parameters that a checkpoint could not be read into."""
    from nemo_pivotrl.backends.megatron import weights

    table = {entry.name: entry for entry in weights.entries(shape)}
    wrong = []
    for name, tensor in weights.local_tensors(chunks, shape, groups).items():
        entry = table.get(name)
        if entry is None:
            wrong.append(f"{name}: not in the map")
        elif not entry.padded:
            ranks = weights._ranks_of(entry, groups)
            size = sum(stop - start for _, start, stop in entry.cut(ranks.rank(), ranks.size()))
            if size != tensor.shape[entry.dim]:
                wrong.append(f"{name}: {tuple(tensor.shape)}, in the map {size} along {entry.dim}")
    return wrong


def _unsharded(backend: Any) -> list[str]:
    """Parameters that megatron-core's sharded state does not have as they are, or in another size than the model's."""
    from nemo_pivotrl.backends.megatron import torch_dist, weights

    chunk, groups, shape = backend.stage.module, backend.groups, backend.architecture
    table = {entry.name: entry for entry in weights.entries(shape)}
    state = {id(part.data): part for part in torch_dist.weights(chunk, groups).values()}
    wrong = []
    for name, tensor in weights.local_tensors([chunk], shape, groups).items():
        part, entry = state.get(id(tensor)), table.get(name)
        if part is None:
            wrong.append(f"{name}: no sharded tensor")
        elif entry is not None and not entry.padded and hasattr(part, "global_shape"):
            whole, size = part.global_shape[entry.dim - tensor.dim()], sum(entry.sizes)
            if whole != size:
                wrong.append(f"{name}: sharded as {part.global_shape}, in the map {size} along {entry.dim}")
    return wrong


@contextlib.contextmanager
def _clock(found: Traced, name: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    found.seconds[name] = time.monotonic() - start


def gib(size: int) -> float:
    return size / GIB
