"""LoRA over megatron-core: adapters beside attention's, dense MLPs', shared experts' and Mamba's linear layers, on any layout.

Each HF linear layer has the two matrices that peft gives it, A [r, in] and B [out, r], whatever Megatron fuses it into: a
query-key-value projection has three of each. What is added to a layer's output is alpha / r * B A x. A column-parallel layer has
its rows of B and all of A, a row-parallel one its columns of A and all of B: ranks exchange r numbers a token and HF layer.

Routed experts have no adapters: on GPUs they are one grouped product. Their weights stay those of the start policy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from nemo_pivotrl.backends.megatron.lora_mapping import ADAPTER, Place, adapter_entries, lora_problems, places
from nemo_pivotrl.backends.megatron.mapping import Entry
from nemo_pivotrl.backends.megatron.parallel import Groups
from nemo_pivotrl.backends.megatron.weights import export_entries, local_names, mark_entry
from nemo_pivotrl.config import Lora
from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.sizing.architecture import Architecture


class Adapter(nn.Module):
    """A [r * sources, in / ...] and B [rows, r] beside one linear layer, of which it is the submodule `adapter`."""

    def __init__(self, place: Place, linear: nn.Module, lora: Lora, config: Any, groups: Groups):
        super().__init__()
        self.place, self.scale, self.enabled = place, lora.alpha / lora.r, True
        self.group, self.epsilon = groups.tp, config.layernorm_epsilon
        self.sequence_parallel = config.sequence_parallel and groups.tp.size() > 1
        rank, ranks = groups.tp.rank(), groups.tp.size()
        of_a, of_b = place.entries(lora.r)
        width, like = linear.weight.shape[1], {"device": linear.weight.device, "dtype": config.params_dtype}
        rows = sum(stop - start for _, start, stop in of_b.cut(rank, ranks))
        self.a = nn.Parameter(torch.empty(lora.r * len(place.sources), width, **like))
        self.b = nn.Parameter(torch.zeros(rows, lora.r, **like))
        for entry, parameter in ((of_a, self.a), (of_b, self.b)):
            mark_entry(entry, parameter, groups)
        # its gradient is that of this rank's part of the sequence: Megatron sums it over tensor-parallel ranks
        (self.b if place.row_parallel else self.a).sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
        lengths = [0] * len(place.sources)
        for source, start, stop in place.pieces(rank, ranks):
            lengths[place.sources.index(source)] += stop - start
        self.lengths = lengths
        order = [] if place.row_parallel else place.order(rank, ranks)
        sorted_already = order == list(range(len(order)))
        self.order = None if sorted_already else torch.tensor(order, device=linear.weight.device)

    @torch.no_grad()
    def start(self, r: int) -> None:
        """B zero and A uniform in +-1 / sqrt(in), as peft begins; the same numbers on every layout, by the HF layer's name."""
        of_a, _ = self.place.entries(r)
        width = of_a.sizes[0] if self.place.row_parallel else self.a.shape[1]
        drawn = []
        for name in of_a.hf:
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1
            whole = torch.rand(r, width, generator=torch.Generator().manual_seed(seed))
            drawn.append((2 * whole - 1) / width**0.5)
        if self.place.row_parallel:
            cut = self.place.pieces(self.group.rank(), self.group.size())
            drawn = [drawn[0][:, start:stop] for _, start, stop in cut]
        self.a.copy_(torch.cat(drawn, 1 if self.place.row_parallel else 0))
        self.b.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """[S, B, in] as the linear layer gets it to what is added to [S, B, out] as the layer returns it."""
        hidden = functional.linear(x, self.a)
        if self.place.row_parallel:
            if self.sequence_parallel:
                hidden = reduce_scatter_to_sequence_parallel_region(hidden, group=self.group)
            else:
                hidden = reduce_from_tensor_model_parallel_region(hidden, group=self.group)
            return functional.linear(hidden, self.b) * self.scale
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=self.group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=self.group)
        parts = zip(hidden.chunk(len(self.lengths), -1), self.b.split(self.lengths), strict=True)
        found = torch.cat([functional.linear(own, rows) for own, rows in parts], -1)
        return self._rows(found, -1) * self.scale

    def delta(self) -> Tensor:
        """What is added to this rank's shard of the weight, in float32."""
        a, b = self.a.float(), self.b.float()
        if self.place.row_parallel:
            return self.scale * b @ a
        parts = zip(b.split(self.lengths), a.chunk(len(self.lengths)), strict=True)
        return self.scale * self._rows(torch.cat([rows @ own for rows, own in parts]), 0)

    def _rows(self, found: Tensor, dim: int) -> Tensor:
        """Rows that stand one HF layer's after another's, in the order of the linear layer; its rows without an adapter are 0."""
        if self.order is None:
            return found
        return functional.pad(found.movedim(dim, -1), (0, 1))[..., self.order].movedim(-1, dim)


def add_adapters(chunk: nn.Module, architecture: Architecture, lora: Lora, groups: Groups) -> None:
    """Freeze a chunk's weights and put adapters beside its linear layers.

    Raises InputError for what `lora_problems` finds.
    """
    if problems := lora_problems(architecture, lora, groups.tp.size()):
        raise InputError(problems)
    wanted = places(architecture, lora)
    chunk.requires_grad_(False)
    names = local_names(chunk, architecture, groups)
    for name, linear in list(chunk.named_modules()):
        place = wanted.get(names.get(f"{name}.weight", ""))
        if place is not None:
            adapter = Adapter(place, linear, lora, chunk.config, groups)
            adapter.start(lora.r)
            linear.add_module(ADAPTER, adapter)
            linear.register_forward_hook(_added)
    if getattr(chunk, "pre_process", False):
        # a layer that is run again in the backward pass gives no gradient where its input asks for none
        chunk.embedding.register_forward_hook(lambda _, __, found: found.requires_grad_(torch.is_grad_enabled()))  # type: ignore[union-attr]


def _added(linear: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> Any:
    adapter, x = linear.adapter, inputs[0]
    if not adapter.enabled:
        return None
    weight = getattr(
        linear, "layer_norm_weight", None
    )  # Transformer Engine's layers that have the norm before them inside
    if weight is not None:
        x = functional.rms_norm(x, weight.shape, weight, adapter.epsilon)
    return output[0] + adapter(x), output[1]


def adapters(chunk: nn.Module) -> list[Adapter]:
    """A chunk's."""
    return [module for module in chunk.modules() if isinstance(module, Adapter)]


@contextmanager
def without_adapters(chunk: nn.Module) -> Iterator[None]:
    """The start policy: the weights alone."""
    found = adapters(chunk)
    for adapter in found:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter in found:
            adapter.enabled = True


def merged(chunk: nn.Module) -> dict[str, Adapter]:
    """This rank's adapters by the names in the mapping of the weights that they change."""
    return {adapter.place.entry.name: adapter for adapter in adapters(chunk)}


def parameters(chunk: nn.Module, r: int) -> dict[str, nn.Parameter]:
    """This rank's A and B by their names in the mapping."""
    found = {}
    for adapter in adapters(chunk):
        of_a, of_b = adapter.place.entries(r)
        found |= {of_a.name: adapter.a, of_b.name: adapter.b}
    return found


def gathered(
    tensors: Mapping[str, Tensor], architecture: Architecture, lora: Lora, groups: Groups
) -> Iterator[tuple[str, Tensor]]:
    """What has the shapes of this rank's A and B (`parameters`), whole, by HF layer, on all ranks, which iterate together."""
    for name, tensor in export_entries(adapter_entries(architecture, lora), tensors, groups, all_ranks=True):
        assert tensor is not None, "all ranks asked"
        yield name, tensor


def own_part(entry: Entry, whole: Sequence[Tensor], groups: Groups) -> Tensor:
    """This rank's shard of what `gathered` gave for an entry."""
    cut = entry.cut(groups.tp.rank(), groups.tp.size())
    return torch.cat([whole[source].narrow(entry.dim, start, stop - start) for source, start, stop in cut], entry.dim)


def save_adapters(
    chunk: nn.Module, folder: Path, architecture: Architecture, lora: Lora, base: str, groups: Groups
) -> None:
    """Write `folder` as peft's `save_pretrained` does. All ranks call it; rank 0 writes. Raises OSError on every rank."""
    root = ("backbone.", "model.") if architecture.hybrid else ("", "")  # checkpoints' name, and transformers'
    found = {
        f"base_model.model.{name.replace(*root, 1)}": tensor.cpu().contiguous()
        for name, tensor in gathered(parameters(chunk, lora.r), architecture, lora, groups)
    }
    error: list[str | None] = [None]
    if groups.world.rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(found, str(folder / "adapter_model.safetensors"), {"format": "pt"})
            text = json.dumps(adapter_config(found, lora, base), indent=2, sort_keys=True) + "\n"
            (folder / "adapter_config.json").write_text(text, encoding="utf-8")
        except OSError as caught:
            error[0] = str(caught)
    dist.broadcast_object_list(error, 0, group=groups.world, device=groups.device)
    if error[0] is not None:
        raise OSError(f"could not write {folder}: {error[0]}")


def adapter_config(names: Sequence[str] | Mapping[str, Any], lora: Lora, base: str) -> dict[str, Any]:
    """peft's `adapter_config.json`. Layers are named in full: a short name would also mean experts."""
    suffix = ".lora_A.weight"
    layers = sorted(n.removeprefix("base_model.model.").removesuffix(suffix) for n in names if n.endswith(suffix))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": layers,
        "inference_mode": True,
    }
