"""What megatron-core needs on a machine without CUDA. Loaded only when `megatron.cpu` asks for it.

`install` replaces functions of torch.cuda, the `device="cuda"` that megatron-core writes into its calls, and a few of
its own names by CPU twins, for the whole process. Where CUDA is present this file refuses to be imported: the twins
would be wrong there.
"""

from __future__ import annotations

import functools
import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

if torch.cuda.is_available():
    raise RuntimeError("megatron.cpu is set, but this machine has a CUDA device: leave it out of the recipe")

CPU = torch.device("cpu")
FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn")
TRITON_FILES: dict[str, tuple[str, ...]] = {
    "inference.contexts.attention_context.triton.tensor_ops": (
        "tensor_get_slice_after",
        "tensor_masked_update",
        "tensor_merge",
    ),
    "transformer.moe.ops.paged_stash": ("paged_stash_copy_kernel", "paged_stash_pop_kernel", "GLOBAL_BLOCK_SIZE"),
}
"""Of megatron-core, with the functions that others import from them."""


class Stream:
    """A CUDA stream or event where everything runs in order at once."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, *_: Any) -> None: ...
    def wait_event(self, *_: Any) -> None: ...
    def wait(self, *_: Any) -> None: ...
    def record(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, *_: Any) -> Stream:
        return self

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None: ...


STREAM = Stream()


@functools.cache
def install() -> None:
    """Make megatron-core run on this process's CPU. Call it before megatron's model files are imported."""
    _torch_cuda()
    _cuda_literals()
    _kernels_that_need_triton()
    from nemo_pivotrl.backends.megatron import cpu_mamba

    cpu_mamba.install()
    _megatron()


def _torch_cuda() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: CPU
    cuda.synchronize = lambda *_: None
    cuda.manual_seed = lambda _: None
    cuda.current_stream = lambda *_: STREAM
    cuda.default_stream = lambda *_: STREAM
    cuda.stream = lambda *_: STREAM
    cuda.Stream = Stream
    cuda.Event = Stream
    torch.compiler.set_stance("force_eager")  # megatron-core's fused functions would each be compiled for seconds


def _cuda_literals() -> None:
    def on_cpu(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(make)
        def twin(*args: Any, **kwargs: Any) -> Tensor:
            device = kwargs.get("device")
            if device is not None and str(device).startswith("cuda"):
                kwargs["device"] = CPU
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
            return make(*args, **kwargs)

        return twin

    for name in FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))
    tensor: Any = Tensor
    tensor.cuda = lambda self, *_, **__: self
    tensor.pin_memory = lambda self, *_: self
    tensor_type = Tensor.type

    def type_of(self: Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        """`Tensor.type()` answers as for CUDA to the optimiser, which takes only such tensors."""
        if dtype is not None:
            return tensor_type(self, dtype, *args, **kwargs)
        name = tensor_type(self)
        asker = sys._getframe(1).f_globals.get("__name__", "")
        return name.replace("torch.", "torch.cuda.") if asker.startswith("megatron.core.optimizer") else name

    tensor.type = type_of


def _kernels_that_need_triton() -> None:
    """Files that define Triton kernels, which nothing here runs: those of dynamic inference, and from 0.17 on those that keep a
    mixture's rows in pages."""

    def absent(*_: Any, **__: Any) -> None:
        raise RuntimeError("this needs Triton kernels, which do not run on a CPU")

    for name, kernels in TRITON_FILES.items():
        stand_in: Any = types.ModuleType(f"megatron.core.{name}")
        for kernel in kernels:
            setattr(stand_in, kernel, absent)
        sys.modules.setdefault(stand_in.__name__, stand_in)


def _megatron() -> None:
    from nemo_pivotrl.backends.megatron.local_layers import DuplicatedLinear, Norm
    from nemo_pivotrl.backends.megatron.releases import stack_file

    def module(name: str) -> Any:
        return importlib.import_module(f"megatron.core.{name}")

    moe_utils, moe_layer = module("transformer.moe.moe_utils"), module("transformer.moe.moe_layer")
    as_on_cuda = moe_utils.maybe_move_tensor_to_cpu

    def to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        """The sizes of an all-to-all as numpy; megatron-core forgets the conversion where the tensor is on the CPU."""
        moved = as_on_cuda(tensor, as_numpy=as_numpy)
        return moved.numpy() if as_numpy and isinstance(moved, Tensor) else moved

    moe_utils.maybe_move_tensor_to_cpu = to_cpu
    module("transformer.moe.token_dispatcher").maybe_move_tensor_to_cpu = to_cpu
    moe_utils.te_general_gemm = None  # 0.16 reads the name without having defined it
    moe_layer.HAVE_TE = True  # asked only where the latent projections are made, from the next name
    moe_layer.TELinear = DuplicatedLinear
    stack_file.TENorm = Norm  # the hybrid's last norm, which no spec can change
    rng = module("tensor_parallel.random")  # full recomputation stores and restores the device's generator
    rng._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    rng._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
