"""Kernels for packed sequences over shared prefixes, as they allocate: their libraries' own Python without compiled parts."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_pivotrl.backends import tree_attention, varlen_attention
from nemo_pivotrl.backends.traced import device, engine
from nemo_pivotrl.backends.traced.triton_names import LAUNCHES

assert device.CPU  # nothing of this file where CUDA is

TILE = 128
"""Queries by which FlashAttention's backward pass pads each sequence in its float32 sums."""


def install(folder: Path) -> None:
    """Make FlashAttention importable from its sources, where they are, and count what is called of each kernel."""
    if (folder / "flash_attn").is_dir():
        sys.modules["flash_attn_2_cuda"] = types.ModuleType("flash_attn_2_cuda")  # its shapes are in its own Python
        package: Any = types.ModuleType("flash_attn")
        package.__path__ = [str(folder / "flash_attn")]
        sys.modules["flash_attn"] = package
    if (folder / "flash_attn_interface.py").exists():
        for name in ("flash_attn_3", "flash_attn_3._C"):
            sys.modules[name] = types.ModuleType(name)
        sys.path.append(str(folder))
        library: Any = importlib.import_module("flash_attn_interface")
        sys.path.remove(str(folder))
        library.flash_attn_3_cuda = types.SimpleNamespace(fwd=_forward_3, bwd=_backward_3)
    for name, kind in varlen_attention.KERNELS.items():
        _count(name, kind)
    call = tree_attention.varlen

    def varlen(*given: Any) -> Tensor:
        engine.CHOSEN[f"{given[-1]} over shared prefixes"] += 1
        return call(*given)

    tree_attention.varlen = varlen


def _forward_3(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)


def _backward_3(_grad: Tensor, query: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    made = rest[4:7]
    return *made, query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)


def _count(name: str, kind: Any) -> None:
    """Checks of the kernels' C++, and what they allocate beside their results."""
    run, back = kind.forward, kind.backward

    def forward(self: Any, query: Tensor, key: Tensor, value: Tensor, of: Any, scale: float) -> Any:
        _check(name, query, key, value, of)
        LAUNCHES[f"{name} attention"] += 1
        return run(self, query, key, value, of, scale)

    def backward(self: Any, grad: Tensor, query: Tensor, *rest: Any) -> Any:
        key, value, out, top, of, _ = rest
        _check(name, query, key, value, of)
        if top.shape != (query.shape[1], query.shape[0]) or not top.is_contiguous() or out.shape != query.shape:
            raise RuntimeError(f"{name}: queries {tuple(query.shape)}, a log-sum-exp {tuple(top.shape)}")
        LAUNCHES[f"{name} attention, backward"] += 1
        # in float32: the sums of the queries' gradient, which Transformer Engine's stand-in has itself
        tokens = 0 if name == "transformer_engine" else len(query) + TILE * (len(of.queries) - 1)
        sums = query.new_empty(tokens, *query.shape[1:], dtype=torch.float32)
        found = back(self, grad, query, *rest)
        del sums
        return found

    kind.forward, kind.backward = forward, backward


def _check(name: str, query: Tensor, key: Tensor, value: Tensor, of: Any) -> None:
    bounds = of.queries, of.keys
    if any(
        x.dim() != 3 or x.stride(2) != 1 or x.dtype not in (torch.bfloat16, torch.float16) for x in (query, key, value)
    ):
        raise RuntimeError(f"{name}: {[(tuple(x.shape), x.stride(), x.dtype) for x in (query, key, value)]}")
    if query.shape[1] % key.shape[1] or query.shape[2] % 8 or key.shape != value.shape:
        raise RuntimeError(f"{name}: queries {tuple(query.shape)}, keys {tuple(key.shape)}")
    if (
        any(x.dtype != torch.int32 or not x.is_contiguous() or x.dim() != 1 for x in bounds)
        or len({*map(len, bounds)}) > 1
    ):
        raise RuntimeError(f"{name}: bounds {[(tuple(x.shape), x.dtype) for x in bounds]}")
