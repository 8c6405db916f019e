"""torch.distributed and the process groups, from the recipe.

megatron-core keeps its groups in module globals. They are read here, once, into a `Groups` that everything else of the
backend takes as an argument.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch.distributed import ProcessGroup

from nemo_pivotrl.config import Megatron
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.sizing.layout_rules import layout_problems


@dataclass(frozen=True, slots=True)
class Groups:
    """This rank's process groups. A rank's place in one is `group.rank()`, the group's size `group.size()`."""

    world: ProcessGroup
    tp: ProcessGroup
    """Ranks that share this rank's matrices."""
    pp: ProcessGroup
    """The stages, first to last, that this rank's activations pass through."""
    cp: ProcessGroup
    """Ranks that share this rank's sequences."""
    dp: ProcessGroup
    """Ranks with the same shard of the model and other sequences."""
    dp_cp: ProcessGroup
    """`dp` and `cp` together: ranks over which gradients of dense weights are summed."""
    ep: ProcessGroup
    """Ranks that share a layer's experts."""
    expt_tp: ProcessGroup
    """Ranks that share an expert's matrices."""
    expt_dp: ProcessGroup
    """Ranks with the same shard of the same experts."""
    collection: ProcessGroupCollection
    """All of it in megatron-core's own form, for its modules."""
    device: torch.device

    @property
    def first_stage(self) -> bool:
        """This rank holds the embedding."""
        return self.pp.rank() == 0

    @property
    def last_stage(self) -> bool:
        """This rank computes the logits."""
        return self.pp.rank() == self.pp.size() - 1


def initialize(megatron: Megatron, seed: int) -> Groups:
    """Join the job and lay its ranks out. torchrun's variables RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and LOCAL_RANK
    say who this process is. A job that has been joined already is laid out anew.

    Raises InputError when the ranks do not fit the recipe or when there is no device for them.
    """
    if megatron.cpu:
        from nemo_pivotrl.backends.megatron import cpu

        cpu.install()
    elif not torch.cuda.is_available():
        remedy = "start it on a machine with GPUs, or set megatron.cpu to run small models on CPUs"
        raise InputError(Problem("recipe", None, "megatron.cpu", "false, and no CUDA device", remedy))
    if problems := layout_problems(megatron, int(os.environ.get("WORLD_SIZE", "1"))):
        raise InputError(problems)
    timeout = timedelta(minutes=megatron.distributed_timeout_minutes)
    if not dist.is_initialized():
        if not megatron.cpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("gloo" if megatron.cpu else "nccl", timeout=timeout)
    leave_layout()
    with _one_group_per_set_of_ranks() if megatron.cpu else contextlib.nullcontext():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=megatron.tensor_model_parallel_size,
            pipeline_model_parallel_size=megatron.pipeline_model_parallel_size,
            context_parallel_size=megatron.context_parallel_size,
            expert_model_parallel_size=megatron.expert_model_parallel_size,
            expert_tensor_parallel_size=megatron.expert_tensor_parallel_size,
            distributed_timeout_minutes=megatron.distributed_timeout_minutes,
            create_gloo_process_groups=not megatron.cpu,
        )
    groups = _groups(torch.device("cpu") if megatron.cpu else torch.device("cuda", torch.cuda.current_device()))
    seed_everything(seed, groups)
    return groups


def _groups(device: torch.device) -> Groups:
    collection = ProcessGroupCollection.use_mpu_process_groups()
    assert dist.group.WORLD is not None
    return Groups(
        world=dist.group.WORLD,
        tp=collection.tp,
        pp=collection.pp,
        cp=collection.cp,
        dp=collection.dp,
        dp_cp=collection.dp_cp,
        ep=collection.ep,
        expt_tp=collection.expt_tp,
        expt_dp=collection.expt_dp,
        collection=collection,
        device=device,
    )


def seed_everything(seed: int, groups: Groups) -> None:
    """Seed this rank's generators: alike on ranks that hold the same weights, apart on other pipeline stages."""
    own = seed + 100 * groups.pp.rank()
    random.seed(own)
    np.random.seed(own % 2**32)
    torch.manual_seed(own)
    # on a CPU the tracker forks nothing: nothing random runs after the weights are read, dropout being off throughout
    model_parallel_cuda_manual_seed(own, inference_rng_tracker=groups.device.type == "cpu", force_reset_rng=True)


_gloo_groups: WeakKeyDictionary[ProcessGroup, dict[Any, Any]] = WeakKeyDictionary()
"""Of a job, which its world stands for: the gloo groups by ranks, timeout and backend. They live as long as the job."""


@contextlib.contextmanager
def _one_group_per_set_of_ranks() -> Iterator[None]:
    """Within it, megatron-core gets the same gloo group for the same ranks.

    A gloo group has three threads, which end when nothing refers to the group, and megatron-core makes 17 groups for every layout.
    Their number is that of different sets of ranks instead, whatever the number of layouts. NCCL's groups stay apart, since
    collectives of two groups overlap on a GPU.
    """
    make, made = parallel_state.create_group, _gloo_groups.setdefault(dist.group.WORLD, {})

    def shared(ranks: list[int], timeout: timedelta | None = None, backend: str | None = None, **rest: Any) -> Any:
        key = (tuple(ranks), timeout, backend)
        if key not in made:  # on every rank alike: all of them ask for the same groups in the same order
            made[key] = make(ranks, timeout=timeout, backend=backend, **rest)
        return made[key]

    parallel_state.create_group = shared
    try:
        yield
    finally:
        parallel_state.create_group = make


def leave_layout() -> None:
    """Give up the process groups, so that `initialize` can make others. The job goes on."""
    if not parallel_state.is_initialized():
        return
    # megatron-core forgets its groups without closing them, and each holds sockets or NCCL buffers
    made = [group for group in parallel_state._global_process_group_list or () if group is not None]
    parallel_state.destroy_model_parallel()
    job = dist.group.WORLD  # None where somebody has ended it already
    kept = [job, *(_gloo_groups.get(job, {}).values() if job is not None else ())]
    for group in made:
        if group not in kept and group in dist.distributed_c10d._world.pg_map:
            dist.destroy_process_group(group)
    _forget_models()


def leave() -> None:
    """Leave the job."""
    leave_layout()
    _gloo_groups.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def _forget_models() -> None:
    """Collect unreferenced models as garbage: a group's threads end only when no module refers to the group."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    for kind in (RotaryEmbedding, *RotaryEmbedding.__subclasses__()):
        kind.forward.cache_clear()  # keeps the modules that were called
    gc.collect()  # modules and their hooks hold each other
