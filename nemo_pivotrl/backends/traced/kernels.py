"""mamba_ssm's and causal_conv1d's own Python without their kernels, and FlexAttention as its compiled form allocates."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_pivotrl.backends.traced import device
from nemo_pivotrl.backends.traced.triton_names import LAUNCHES, standing_in

assert device.CPU  # nothing of this file where CUDA is


def install(folder: Path, versions: dict[str, str]) -> None:
    """Make `mamba_ssm` and `causal_conv1d` importable from their sources."""
    extension: Any = types.ModuleType("causal_conv1d_cuda")
    extension.causal_conv1d_fwd = _convolve
    extension.causal_conv1d_bwd = _convolve_back
    extension.causal_conv1d_update = _convolve
    sys.modules["causal_conv1d_cuda"] = extension
    for name in ("mamba_ssm", "causal_conv1d"):
        package: Any = types.ModuleType(name)
        package.__path__, package.__version__ = [str(folder / name)], versions[name]
        sys.modules[name] = package
    convolution: Any = sys.modules["causal_conv1d"]
    interface = importlib.import_module("causal_conv1d.causal_conv1d_interface")
    convolution.causal_conv1d_fn = interface.causal_conv1d_fn
    convolution.causal_conv1d_update = interface.causal_conv1d_update
    with standing_in():
        for name in ("ssd_combined", "layernorm_gated", "selective_state_update"):
            importlib.import_module(f"mamba_ssm.ops.triton.{name}")
        # megatron-core's own kernels, which nothing of a training step runs
        importlib.import_module("megatron.core.transformer.custom_layers.batch_invariant_kernels")
        importlib.import_module("megatron.core.inference.contexts.dynamic_context")
        importlib.import_module("megatron.core.models.mamba.mamba_layer_specs")


def fuse_activations() -> None:
    """What torch.compile makes one kernel of: only its outputs come into being."""
    import megatron.core.fusions.fused_bias_swiglu as gated
    import megatron.core.fusions.fused_weighted_squared_relu as squared

    def weights_too(grad: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        LAUNCHES["fused activation, backward"] += 1
        return torch.empty_like(x), torch.empty_like(weights)

    def half(x: Tensor, *_: Tensor) -> Tensor:
        LAUNCHES["fused activation"] += 1
        return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)

    def same(x: Tensor, *_: Tensor) -> Tensor:
        LAUNCHES["fused activation"] += 1
        return torch.empty_like(x)

    def back(grad: Tensor, x: Tensor) -> Tensor:
        LAUNCHES["fused activation, backward"] += 1
        return torch.empty_like(x)

    gated.swiglu = gated.weighted_swiglu = half
    gated.swiglu_back, gated.weighted_swiglu_back = back, weights_too
    squared.weighted_squared_relu, squared.weighted_squared_relu_back = same, weights_too


def _convolve(x: Tensor, weight: Tensor, *_: Any) -> None:
    """The checks of causal_conv1d.cpp."""
    rows, channels, _length = x.shape
    if weight.shape[0] != channels or not 2 <= weight.shape[1] <= 4:
        raise RuntimeError(f"causal_conv1d: {tuple(x.shape)} with weights {tuple(weight.shape)}")
    if x.stride(2) != 1 and x.stride(1) != 1:
        raise RuntimeError(f"causal_conv1d: strides {x.stride()}")
    last = x.stride(1) == 1 and x.stride(2) > 1
    if last and (channels % 8 or x.stride(2) % 8 or (rows > 1 and x.stride(0) % 8)):
        raise RuntimeError(f"causal_conv1d, channels last: {tuple(x.shape)} with strides {x.stride()}")
    LAUNCHES["causal_conv1d"] += 1


def _convolve_back(x: Tensor, weight: Tensor, *_: Any) -> None:
    _convolve(x, weight)


class Flex(torch.autograd.Function):
    """One FlexAttention: keeps q, k, v, the output and a log-sum-exp; backward one number a query and three gradients."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        LAUNCHES["flex_attention"] += 1
        out = torch.empty_like(query)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        LAUNCHES["flex_attention_backward"] += 1
        query, key, value, out, sums = ctx.saved_tensors
        delta = (out * grad).sum(-1, dtype=torch.float32)
        found = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        del delta, sums
        return found
