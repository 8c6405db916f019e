"""Training state on disk: weights, log-V head, optimiser, random state and step, in megatron-core's `torch_dist` format.

With LoRA the frozen weights are not stored, and adapters are, whole, under the names of their HF layers.

Otherwise everything is stored in the model's own space: under a weight's name and shape stand its Adam moments and, where the weight
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

from nemo_pivotrl.backends.megatron import lora, torch_dist
from nemo_pivotrl.backends.megatron.mapping import Entry
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
    tensors = _weights(policy)
    sharded = {id(t.data): (name, t) for name, t in tensors.items()}
    own = _adapters(policy)
    name_of = {id(parameter): name for name, parameter in own.items()}
    shards: dict[str, dict[str, Tensor]] = {"": dict(own)}
    for part in _parts(policy.optimizer):
        for number, slot in enumerate(_slots(part)):
            for kind in _kinds(slot.weight.dtype, policy.steps):
                if id(slot.weight) in name_of:
                    shards.setdefault(kind, {})[name_of[id(slot.weight)]] = _everywhere(part, slot, kind)
                    continue
                name, like = sharded[id(slot.weight)]
                whole = _gathered(part, slot, kind, owner=number)
                if whole is None:
                    continue
                if isinstance(part, DistributedOptimizer):
                    like = replace(like, replica_id=(*like.replica_id[:-1], 0))  # who gathered it is who writes it
                tensors[f"{kind}.{name}"] = make_sharded_optimizer_tensor(like, whole, f"optimizer.state.{kind}")
    tensors |= _whole_adapters(policy, shards, policy.steps)
    tensors |= _generators(policy.groups)
    common = {
        "format": FORMAT,
        "architecture": asdict(read_architecture(policy.settings.model_name)),
        "bf16": policy.megatron.bf16,
        "lora": _lora(policy),
        "layout": _layout(policy.groups),
        "steps": policy.steps,
    }
    torch_dist.write(tensors, folder, common)


@torch.no_grad()
def load(policy: MegatronPolicy, folder: Path) -> None:
    """Undo `save`, whatever the layout that wrote it. All ranks call it.

    Raises InputError for another model's state, another precision's, other adapters', and for a checkpoint that is cut off
    or damaged.
    """
    assert policy.optimizer is not None, "prepare_for_training first"
    index = torch_dist.read_index(folder)
    common = torch_dist.read_common(folder)
    architecture, steps = read_architecture(policy.settings.model_name), common["steps"]
    _check(folder, common, architecture, policy)
    torch_dist.check_sums(folder)
    tensors = _weights(policy)
    targets = {name: t.data for name, t in tensors.items()}
    sharded = {id(t.data): (name, t) for name, t in tensors.items()}
    own = _adapters(policy)
    entry_of = {e.name: e for e in lora.adapter_entries(architecture, policy.settings.lora)} if own else {}
    adapter_of = {id(parameter): entry_of[name] for name, parameter in own.items()}
    slots = [(part, slot) for part in _parts(policy.optimizer) for slot in _slots(part) if slot.inner is not None]
    for _, slot in slots:
        if id(slot.weight) in adapter_of:
            continue
        name, like = sharded[id(slot.weight)]
        for kind in _kinds(slot.weight.dtype, steps):
            empty = torch.empty(slot.weight.shape, dtype=torch.float32)
            tensors[f"{kind}.{name}"] = make_sharded_optimizer_tensor(like, empty, f"optimizer.state.{kind}")
    kinds = _kinds(policy.stage.config.params_dtype, steps)
    wide = {name: torch.empty(parameter.shape, dtype=torch.float32) for name, parameter in own.items()}
    tensors |= _whole_adapters(policy, {"": dict(own)} | dict.fromkeys(kinds, wide), steps)
    same_layout = common["layout"] == _layout(policy.groups)
    if same_layout:
        tensors |= _generators(policy.groups)
    loaded = torch_dist.read(tensors, folder, index, lambda key: key.startswith("rng."), architecture.vocab_size)

    def adapter(entry: Entry, kind: str) -> Tensor:
        return lora.own_part(entry, [loaded[f"{kind}.{name}".lstrip(".")] for name in entry.hf], policy.groups)

    for name, target in targets.items():
        target.copy_(loaded[name])
    for name, parameter in own.items():
        parameter.copy_(adapter(entry_of[name], ""))
    for part, slot in slots:
        entry, kinds = adapter_of.get(id(slot.weight)), _kinds(slot.weight.dtype, steps)
        if entry is not None:
            _fill(part, slot, {kind: adapter(entry, kind) for kind in kinds})
        else:
            name, _ = sharded[id(slot.weight)]
            _fill(part, slot, {kind: loaded[f"{kind}.{name}"] for kind in kinds})
    for part in _parts(policy.optimizer):
        _set_step(part.optimizer, steps)
    if same_layout:
        _restore_generators(loaded)
    policy.steps = steps


def _check(folder: Path, common: dict[str, Any], architecture: Architecture, policy: MegatronPolicy) -> None:
    problems = []
    if common["format"] != FORMAT:
        remedy = f"this version reads format {FORMAT}: go on with the version that wrote it, or start anew"
        raise InputError(Problem(str(folder), None, "format", str(common["format"]), remedy))
    mine, found = asdict(architecture), common["architecture"]
    for field in sorted(mine.keys() | found.keys()):
        if mine.get(field) != found.get(field):
            remedy = f"policy.model_name has {short(mine.get(field))}: use the model that the run began with"
            problems.append(Problem(str(folder), None, field, short(found.get(field)), remedy))
    if common.get("lora") != _lora(policy):
        remedy = f"the recipe has {_lora(policy) or 'none'}: resume with the adapters that wrote it, or begin a new run"
        problems.append(Problem(str(folder), None, "policy.lora", short(common.get("lora") or "none"), remedy))
    if common["bf16"] != policy.megatron.bf16:
        remedy = "resume in the precision that wrote it, or begin a new run from its `policy` folder"
        problems.append(Problem(str(folder), None, "megatron.bf16", str(common["bf16"]).lower(), remedy))
    if problems:
        raise InputError(problems)


def _layout(groups: Groups) -> list[int]:
    members = (groups.world, groups.tp, groups.pp, groups.cp, groups.ep, groups.expt_tp, groups.dp)
    return [group.size() for group in members]


# ---- weights ----


def _weights(policy: MegatronPolicy) -> dict[str, Any]:
    """Sharded tensors of what trains beside adapters: all weights without them, and the head for log V."""
    head = _head(policy.stage.head, policy.groups)
    return head if policy.settings.lora.enabled else weights(policy.stage.module, policy.groups) | head


def _lora(policy: MegatronPolicy) -> dict[str, Any] | None:
    """The adapters' settings as a checkpoint notes them."""
    own = policy.settings.lora
    return {"r": own.r, "alpha": own.alpha, "target_modules": sorted(own.target_modules)} if own.enabled else None


def _adapters(policy: MegatronPolicy) -> dict[str, nn.Parameter]:
    own = policy.settings.lora
    return lora.parameters(policy.stage.module, own.r) if own.enabled else {}


def _whole_adapters(policy: MegatronPolicy, shards: dict[str, dict[str, Tensor]], steps: int) -> dict[str, Any]:
    """Sharded tensors of adapters (kind "") and of what Adam holds of them, whole by HF layer: they are small, and no layout's."""
    if not policy.settings.lora.enabled:
        return {}
    architecture, found = read_architecture(policy.settings.model_name), {}
    for kind in ("", *_kinds(policy.stage.config.params_dtype, steps)):
        own = shards.get(kind, {})
        for name, whole in lora.gathered(own, architecture, policy.settings.lora, policy.groups):
            key = f"{kind}.{name}".lstrip(".")
            rank = policy.groups.world.rank()
            found[key] = ShardedTensor.from_rank_offsets(key, whole.cpu(), replica_id=rank)
    return found


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


def _kinds(dtype: torch.dtype, steps: int) -> tuple[str, ...]:
    """What is stored of a weight of a type beside itself. Adam has no moments before its first step."""
    master = () if dtype is torch.float32 else (MASTER,)
    return (*master, *(MOMENTS if steps else ()))


def _gathered(part: Any, slot: _Slot, kind: str, owner: int) -> Tensor | None:
    """A moment or a master in its weight's shape, in float32. The distributed optimiser's is put together on one of the
    ranks that share the weight, each in turn, and is None on the others."""
    if not isinstance(part, DistributedOptimizer):
        return _held(part, slot, kind)
    group = part.data_parallel_group
    owner %= group.size()
    whole = _spread(part, slot, kind)
    if group.size() > 1:  # each number is one rank's and 0 elsewhere: their sum is exact
        dist.reduce(whole, dist.get_global_rank(group, owner), group=group)
    return whole.view(slot.weight.shape).cpu() if group.rank() == owner else None


def _everywhere(part: Any, slot: _Slot, kind: str) -> Tensor:
    """The same on all of those ranks."""
    if not isinstance(part, DistributedOptimizer):
        return _held(part, slot, kind)
    whole = _spread(part, slot, kind)
    dist.all_reduce(whole, group=part.data_parallel_group)
    return whole.view(slot.weight.shape)


def _held(part: Any, slot: _Slot, kind: str) -> Tensor:
    """What the inner optimiser has of a moment or a master."""
    assert slot.inner is not None
    found: Tensor = slot.inner if kind == MASTER else part.optimizer.state[slot.inner][kind]
    return found.detach()


def _spread(part: Any, slot: _Slot, kind: str) -> Tensor:
    """[numbers of the weight] with this rank's part of them, and 0 elsewhere."""
    whole = torch.zeros(slot.weight.numel(), dtype=torch.float32, device=slot.weight.device)
    if slot.inner is not None:
        whole[slot.span] = _held(part, slot, kind).flatten()
    return whole


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
