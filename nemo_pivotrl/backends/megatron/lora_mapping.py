"""Which linear layers get LoRA adapters, and how the adapters' two matrices are split over ranks: index arithmetic like `mapping`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nemo_pivotrl.backends.megatron.mapping import Entry, Piece, entries
from nemo_pivotrl.config import Lora
from nemo_pivotrl.core.errors import Problem
from nemo_pivotrl.sizing.architecture import Architecture

ADAPTER = "adapter"
"""The name of adapters beside a linear layer, and of the folder beside an exported policy's weights that holds them alone."""


@dataclass(frozen=True, slots=True)
class Place:
    """A Megatron linear layer that has adapters."""

    entry: Entry
    """Its weight's."""
    sources: tuple[int, ...]
    """Which of `entry.hf` have them."""
    outputs: int
    """Length of what a row-parallel layer returns; of no use elsewhere."""

    @property
    def row_parallel(self) -> bool:
        """Ranks hold columns of the weight."""
        return self.entry.dim == 1

    def pieces(self, rank: int, ranks: int) -> list[Piece]:
        """The rows of B that a rank has, or the columns of A where the layer is row-parallel: one HF layer's, then the next's."""
        own = [piece for piece in self.entry.cut(rank, ranks) if piece[0] in self.sources]
        return sorted(own, key=lambda piece: piece[0])

    def order(self, rank: int, ranks: int) -> list[int]:
        """For every row of a layer's shard: which row of B it has, or -1, which is a row of zeros put behind them."""
        first, at = {}, 0
        for piece in self.pieces(rank, ranks):
            first[piece] = at
            at += piece[2] - piece[1]
        found: list[int] = []
        for piece in self.entry.cut(rank, ranks):
            length = piece[2] - piece[1]
            found += range(first[piece], first[piece] + length) if piece in first else [-1] * length
        return found

    def entries(self, r: int) -> tuple[Entry, Entry]:
        """A and B as entries of the mapping: they are read, gathered and written as weights are."""
        stem = self.entry.name.removesuffix("weight") + ADAPTER
        hf = [self.entry.hf[source].removesuffix("weight") for source in self.sources]
        a, b = (tuple(f"{name}lora_{letter}.weight" for name in hf) for letter in "AB")
        number = {source: i for i, source in enumerate(self.sources)}
        sizes = tuple(self.entry.sizes[source] for source in self.sources)

        def cut(rank: int, ranks: int) -> list[Piece]:
            return [(number[source], start, stop) for source, start, stop in self.pieces(rank, ranks)]

        if self.row_parallel:
            whole_b = [(0, 0, self.outputs)]
            return (
                Entry(f"{stem}.a", a, sizes, cut, dim=1),
                Entry(f"{stem}.b", b, (self.outputs,), lambda rank, ranks: whole_b),
            )
        whole_a = [(i, 0, r) for i in range(len(a))]
        return Entry(f"{stem}.a", a, (r,) * len(a), lambda rank, ranks: whole_a), Entry(f"{stem}.b", b, sizes, cut)


def places(architecture: Architecture, lora: Lora) -> dict[str, Place]:
    """Every linear layer of the whole model that gets adapters, by its weight's name in the mapping."""
    found = {}
    for entry in entries(architecture):
        named = [name.split(".")[-2] for name in entry.hf] if entry.name.endswith(".weight") else []
        sources = tuple(i for i, name in enumerate(named) if name in lora.target_modules)
        if sources and entry.expert is None:
            found[entry.name] = Place(entry, sources, architecture.hidden_size)
    return found


def lora_problems(architecture: Architecture, lora: Lora, tp: int) -> list[Problem]:
    """What adapters cannot be put beside: nothing named, Mamba's `out_proj`, and a layout that leaves a rank without a row."""
    problems: list[Problem] = []
    if not lora.enabled:
        return problems
    found = places(architecture, lora)
    if not found:
        remedy = "name linear layers outside the routed experts, such as q_proj, o_proj or Mamba's in_proj"
        problems.append(Problem("recipe", None, "lora.target_modules", str(list(lora.target_modules)), remedy))
    if architecture.hybrid and "out_proj" in lora.target_modules:
        remedy = (
            "leave it out: peft refuses it in models with Mamba, whose fused kernels read that weight past an adapter"
        )
        problems.append(Problem("recipe", None, "lora.target_modules", "out_proj", remedy))
    bare = sorted(name for name, place in found.items() if not all(place.pieces(rank, tp) for rank in range(tp)))
    if bare:
        remedy = (
            f"{bare[0]} leaves a tensor-parallel rank without a row of its adapters: lower it, or adapt q_proj, too"
        )
        problems.append(Problem("recipe", None, "megatron.tensor_model_parallel_size", str(tp), remedy))
    return problems


def adapter_entries(architecture: Architecture, lora: Lora) -> list[Entry]:
    """A and B of every adapted layer of the whole model."""
    return [entry for place in places(architecture, lora).values() for entry in place.entries(lora.r)]


def stage_adapters(architecture: Architecture, lora: Lora, tp: int, layers: Iterable[int]) -> int:
    """Numbers in one rank's adapters of some layers, counted from 0."""
    numbers, hidden, found = {str(layer) for layer in layers}, architecture.hidden_size, 0
    for name, place in places(architecture, lora).items():
        if name.split(".")[2] in numbers:
            cut = sum(place.entry.sizes[source] for source in place.sources) // tp
            found += lora.r * (cut + hidden * (1 if place.row_parallel else len(place.sources)))
    return found
