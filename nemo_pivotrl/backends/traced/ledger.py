"""Every living byte and every collective of what runs under it."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COALESCED = tuple(
    f"c10d::{name}_"
    for name in ("allgather_into_tensor_coalesced", "reduce_scatter_tensor_coalesced", "allreduce_coalesced")
)
"""Collectives that torch's fake process group cannot run on fake tensors: they only write into tensors that are there."""


STEP = 1.01
"""Growth of the peak after which the ledger looks again at what is alive."""


class Ledger(TorchDispatchMode):
    """Bytes of all storages that came into being under it and still exist, now and at most; bytes sent by collective and
    group, as those of a call's largest tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.looked = 0
        self.at_peak: list[tuple[int, int, str]] = []
        """What was alive at the peak, or up to 1 % below it."""
        self.collectives: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.operators: Counter[str] = Counter()
        self.names: dict[str, str] = {}
        """What to call the process groups, by torch's name for them."""
        self._known: weakref.WeakKeyDictionary[Any, tuple[int, str]] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name()
        self.operators[name] += 1
        if name.startswith("c10d::"):
            self._collective(name, args)
            if name in COALESCED:
                work: Any = FakeWork()
                work.seq_id = 0
                return work.boxed()
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._add(tensor, name)
        return found

    def _add(self, tensor: Tensor, by: str) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size, f"{by} {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        self.now += size
        if self.now > self.peak:
            self.peak = self.now
            if self.now > STEP * self.looked:
                self.looked, self.at_peak = self.now, self.living()
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.now -= size

    def _collective(self, name: str, args: Any) -> None:
        sizes = [t.numel() * t.element_size() for t in tree_leaves(args) if isinstance(t, Tensor)]
        group = next((a for a in args if isinstance(a, torch.ScriptObject)), None)
        try:
            found = dist.ProcessGroup.unbox(group)
            where = f"{self.names.get(found.group_name, found.group_name)} of {found.size()}"
        except (RuntimeError, TypeError):
            where = "?"
        key = f"{name.removeprefix('c10d::').rstrip('_')}, {where}"
        self.collectives[key] += max(sizes, default=0)
        self.calls[key] += 1

    def living(self, least: int = 2**20) -> list[tuple[int, int, str]]:
        """(bytes together, how many, what) of the living storages of at least `least` bytes, by what made them."""
        made: Counter[str] = Counter()
        number: Counter[str] = Counter()
        for size, text in self._known.values():
            if size >= least:
                made[text] += size
                number[text] += 1
        return [(size, number[text], text) for text, size in made.most_common()]

    def living_of(self, dtype: str) -> int:
        """Bytes of the living storages of a type."""
        return sum(size for size, text in self._known.values() if text.endswith(f" {dtype}"))

    def restart(self) -> None:
        """Forget the peak and the collectives so far."""
        self.peak = self.looked = self.now
        self.collectives.clear()
        self.calls.clear()
        self.operators.clear()
