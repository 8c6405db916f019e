"""Training state on disk: weights, log-V head, optimiser, random state and step, in megatron-core's `torch_dist` format.

Everything is stored in the model's own space: under a weight's name and shape stand its Adam moments and, where the weight
itself is rounded, its float32 master, in Megatron-LM's names for them. So a checkpoint of one layout is read by any other:
each rank asks for its own pieces, whoever wrote them, with or without the distributed optimiser.

The same layout resumes to the bit. Another one has other sums in another order, and generators as freshly seeded:
nothing random runs in training, as dropout is off. What is not stored: the start policy that a KL term refers to,
which is `policy.model_name`, and learning rate and betas, which are the recipe's.

Why not Megatron's `optimizer.sharded_state_dict` (0.16): its `fully_reshardable` format fails with torch's optimisers, which
are what it falls back to without apex and Transformer Engine, and `dp_reshardable` is tied to its buffers; both
number a chain of optimisers, which has two links with expert parallelism and one without; and both find moments by a
parameter's place among all dtypes, which is another's where bfloat16 weights stand beside a float32 head.

Not tested, for want of a GPU: weights kept in FP8 (`megatron.fp8_param`), which are stored in higher precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import FP32Optimizer
from megatron.core.utils import make_sharded_tensor_for_checkpoint
from torch import Tensor, nn

from nemo_pivotrl.backends.megatron import torch_dist
from nemo_pivotrl.backends.megatron.parallel import Groups
from nemo_pivotrl.backends.megatron.torch_dist import weights
from nemo_pivotrl.core.errors import InputError, Problem, short
from nemo_pivotrl.sizing.architecture import Architecture, read_architecture

if TYPE_CHECKING:
    from nemo_pivotrl.backends.megatron.pipeline_stage import PipelineStage
    from nemo_pivotrl.config import Megatron, Policy

FORMAT = 1
MOMENTS, MASTER = ("exp_avg", "exp_avg_sq"), "fp32_param"
TORCH_ADAMS = (torch.optim.Adam, torch.optim.AdamW)
"""They keep the step with each parameter; those of Transformer Engine and apex with each group."""


class MegatronPolicy(Protocol):
    """What is saved of a policy in training (`train.py`)."""

    settings: Policy
    megatron: Megatron
    groups: Groups
    stage: PipelineStage
    optimizer: Any
    steps: int


def save(policy: MegatronPolicy, folder: Path) -> None:
    """Write everything that `load` needs. All ranks call it; when it returns all files are on disk.

    Raises OSError on every rank when one could not write.
    """
    assert policy.optimizer is not None, "prepare_for_training first"
    tensors = weights(policy.stage.module, policy.groups)
    tensors |= _head(policy.stage.head, policy.groups)
    sharded = {id(t.data): (name, t) for name, t in tensors.items()}
    for part in _parts(policy.optimizer):
        for number, slot in enumerate(_slots(part)):
            name, like = sharded[id(slot.weight)]
            for kind in _kinds(slot.weight, policy.steps):
                whole = _gathered(part, slot, kind, owner=number)
                if whole is None:
                    continue
                if isinstance(part, DistributedOptimizer):
                    like = replace(like, replica_id=(*like.replica_id[:-1], 0))  # who gathered it is who writes it
                tensors[f"{kind}.{name}"] = make_sharded_optimizer_tensor(like, whole, f"optimizer.state.{kind}")
    tensors |= _generators(policy.groups)
    common = {
        "format": FORMAT,
        "architecture": asdict(read_architecture(policy.settings.model_name)),
        "bf16": policy.megatron.bf16,
        "layout": _layout(policy.groups),
        "steps": policy.steps,
    }
    torch_dist.write(tensors, folder, common)


@torch.no_grad()
def load(policy: MegatronPolicy, folder: Path) -> None:
    """Undo `save`, whatever the layout that wrote it. All ranks call it.

    Raises InputError for another model's state, another precision's, and for a checkpoint that is cut off or damaged.
    """
    assert policy.optimizer is not None, "prepare_for_training first"
    index = torch_dist.read_index(folder)
    common = torch_dist.read_common(folder)
    architecture = read_architecture(policy.settings.model_name)
    _check(folder, common, architecture, policy.megatron.bf16)
    torch_dist.check_sums(folder)
    tensors = weights(policy.stage.module, policy.groups)
    tensors |= _head(policy.stage.head, policy.groups)
    targets = {name: t.data for name, t in tensors.items()}
    sharded = {id(t.data): (name, t) for name, t in tensors.items()}
    slots = [(part, slot) for part in _parts(policy.optimizer) for slot in _slots(part) if slot.inner is not None]
    for _, slot in slots:
        name, like = sharded[id(slot.weight)]
        for kind in _kinds(slot.weight, common["steps"]):
            empty = torch.empty(slot.weight.shape, dtype=torch.float32)
            tensors[f"{kind}.{name}"] = make_sharded_optimizer_tensor(like, empty, f"optimizer.state.{kind}")
    same_layout = common["layout"] == _layout(policy.groups)
    if same_layout:
        tensors |= _generators(policy.groups)
    loaded = torch_dist.read(tensors, folder, index, lambda key: key.startswith("rng."), architecture.vocab_size)
    for name, target in targets.items():
        target.copy_(loaded[name])
    for part, slot in slots:
        name, _ = sharded[id(slot.weight)]
        _fill(part, slot, {kind: loaded[f"{kind}.{name}"] for kind in _kinds(slot.weight, common["steps"])})
    for part in _parts(policy.optimizer):
        _set_step(part.optimizer, common["steps"])
    if same_layout:
        _restore_generators(loaded)
    policy.steps = common["steps"]


def _check(folder: Path, common: dict[str, Any], architecture: Architecture, bf16: bool) -> None:
    problems = []
    if common["format"] != FORMAT:
        remedy = f"this version reads format {FORMAT}: go on with the version that wrote it, or start anew"
        raise InputError(Problem(str(folder), None, "format", str(common["format"]), remedy))
    mine, found = asdict(architecture), common["architecture"]
    for field in sorted(mine.keys() | found.keys()):
        if mine.get(field) != found.get(field):
            remedy = f"policy.model_name has {short(mine.get(field))}: use the model that the run began with"
            problems.append(Problem(str(folder), None, field, short(found.get(field)), remedy))
    if common["bf16"] != bf16:
        remedy = "resume in the precision that wrote it, or begin a new run from its `policy` folder"
        problems.append(Problem(str(folder), None, "megatron.bf16", str(common["bf16"]).lower(), remedy))
    if problems:
        raise InputError(problems)


def _layout(groups: Groups) -> list[int]:
    members = (groups.world, groups.tp, groups.pp, groups.cp, groups.ep, groups.expt_tp, groups.dp)
    return [group.size() for group in members]


# ---- weights ----


def _head(head: nn.Linear | None, groups: Groups) -> dict[str, Any]:
    if head is None:
        return {}
    return {
        f"head.{name}": make_sharded_tensor_for_checkpoint(
            parameter, f"head.{name}", tp_group=groups.tp, dp_cp_group=groups.dp_cp
        )
        for name, parameter in head.named_parameters()
    }


# ---- optimiser ----


@dataclass(frozen=True, slots=True)
class _Slot:
    """A trained weight and what steps it here."""

    weight: Tensor
    """[...], this rank's shard of the model."""
    inner: Tensor | None
    """What the inner optimiser steps: the weight, its float32 master, or a part of one, flat. None: another rank does."""
    span: slice | None
    """That part, where the distributed optimiser deals a weight out over ranks."""


def _parts(optimizer: Any) -> list[Any]:
    """The optimisers of dense and of expert weights, where this rank has any."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if part.optimizer is not None]


def _slots(part: Any) -> Iterator[_Slot]:
    """A part's weights, in the same order on all ranks that share them."""
    if isinstance(part, FP32Optimizer):
        for group in part.optimizer.param_groups:
            yield from (_Slot(weight, weight, None) for weight in group["params"])
    elif isinstance(part, DistributedOptimizer):
        own = _paired(part.model_float16_groups, part.shard_fp32_from_float16_groups)
        own |= _paired(part.model_fp32_groups, part.shard_fp32_groups)
        for buffer in part.buffers:
            for weight in buffer.param_index_map:
                if weight in own:
                    span = part._get_model_param_range_map(weight)["param"]
                    yield _Slot(weight, own[weight], slice(span.start, span.end))
                else:
                    yield _Slot(weight, None, None)
    else:
        own = _paired(part.float16_groups, part.fp32_from_float16_groups)
        own |= _paired(part.fp32_from_fp32_groups, part.fp32_from_fp32_groups)
        yield from (_Slot(weight, inner, None) for weight, inner in own.items())


def _paired(weights_of: Any, inner_of: Any) -> dict[Tensor, Tensor]:
    return {w: i for ws, inners in zip(weights_of, inner_of, strict=True) for w, i in zip(ws, inners, strict=True)}


def _kinds(weight: Tensor, steps: int) -> tuple[str, ...]:
    """What is stored of a weight beside itself. Adam has no moments before its first step."""
    master = () if weight.dtype is torch.float32 else (MASTER,)
    return (*master, *(MOMENTS if steps else ()))


def _gathered(part: Any, slot: _Slot, kind: str, owner: int) -> Tensor | None:
    """A moment or a master in its weight's shape, in float32. The distributed optimiser's is put together on one of the
    ranks that share the weight, each in turn, and is None on the others."""
    own = None
    if slot.inner is not None:
        own = slot.inner if kind == MASTER else part.optimizer.state[slot.inner][kind]
        own = own.detach()
    if not isinstance(part, DistributedOptimizer):
        assert own is not None
        return own
    group = part.data_parallel_group
    owner %= group.size()
    whole = torch.zeros(slot.weight.numel(), dtype=torch.float32, device=slot.weight.device)
    if own is not None:
        whole[slot.span] = own.flatten()
    if group.size() > 1:  # each number is one rank's and 0 elsewhere: their sum is exact
        dist.reduce(whole, dist.get_global_rank(group, owner), group=group)
    return whole.view(slot.weight.shape).cpu() if group.rank() == owner else None


def _fill(part: Any, slot: _Slot, loaded: dict[str, Tensor]) -> None:
    """Put what was loaded, in the weight's shape, into the inner optimiser."""
    inner = slot.inner
    assert inner is not None
    held = {}
    for kind, whole in loaded.items():
        own = whole.flatten()[slot.span] if slot.span is not None else whole
        held[kind] = own.reshape(inner.shape).to(inner.device, copy=True)
    if MASTER in held:
        inner.copy_(held.pop(MASTER))
    part.optimizer.state[inner] = held


def _set_step(inner: Any, steps: int) -> None:
    if not steps:
        inner.state.clear()
    elif isinstance(inner, TORCH_ADAMS):
        for state in inner.state.values():
            state["step"] = torch.tensor(float(steps))  # one each: torch counts every one of them up
    else:
        for group in inner.param_groups:
            group["step"] = steps


# ---- random state ----


def _generators(groups: Groups) -> dict[str, Any]:
    """Every rank's generators, as bytes."""
    states = {"rng.cpu": torch.get_rng_state()}
    if groups.device.type == "cuda":
        states["rng.cuda"] = torch.cuda.get_rng_state()
    rank = (0, groups.world.rank(), groups.world.size())
    return {name: ShardedTensor.from_rank_offsets(name, state[None].clone(), rank) for name, state in states.items()}


def _restore_generators(loaded: dict[str, Tensor]) -> None:
    torch.set_rng_state(loaded["rng.cpu"][0])
    if "rng.cuda" in loaded:
        torch.cuda.set_rng_state(loaded["rng.cuda"][0])
