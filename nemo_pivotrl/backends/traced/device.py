"""torch.cuda answering as one rank's GPU, for tensors that are in truth fake ones on the CPU."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

if torch.cuda.is_available():
    raise RuntimeError("tracing replaces torch.cuda, and this machine has a CUDA device: run it where there is none")

CPU = torch.device("cpu")
FACTORIES = (
    "tensor as_tensor zeros ones empty full arange rand randn randint linspace eye tril triu empty_strided "
    "empty_like zeros_like ones_like full_like rand_like randn_like"
).split()
METHODS = "new_empty new_zeros new_ones new_full new_tensor".split()
GIB = 2**30


class Stream:
    """A CUDA stream, event or device context where everything runs in order at once."""

    device, cuda_stream, stream_id, device_index, device_type = torch.device("cuda", 0), 0, 0, 0, 1

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: self

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None: ...


def install(capability: tuple[int, int], memory_gib: float, gpus: int = 8) -> None:
    """Make torch.cuda answer as a GPU of this compute capability, and whatever asks for CUDA tensors get CPU ones that say
    they are on CUDA. For the whole process."""
    cuda: Any = torch.cuda
    properties = types.SimpleNamespace(
        major=capability[0],
        minor=capability[1],
        multi_processor_count=132,
        total_memory=int(memory_gib * GIB),
        name="a traced GPU",
        gcnArchName="",
        warp_size=32,
    )
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": False,
        "device_count": gpus,
        "current_device": CPU,
        "get_device_capability": capability,
        "get_device_name": properties.name,
        "get_device_properties": properties,
        "is_current_stream_capturing": False,
        "memory_allocated": 0,
        "current_stream": Stream(),
        "default_stream": Stream(),
        "stream": Stream(),
        "device": Stream(),
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
    }
    for name, value in answers.items():
        setattr(cuda, name, lambda *_, _value=value, **__: _value)
    for name in "synchronize set_device manual_seed manual_seed_all set_rng_state empty_cache".split():
        setattr(cuda, name, lambda *_, **__: None)
    cuda.Stream = cuda.Event = Stream
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *_, **__: None
    cuda.IntTensor = lambda values: torch.tensor(values, dtype=torch.int32)
    cuda.FloatTensor = lambda values: torch.tensor(values, dtype=torch.float32)
    torch.version.cuda = "13.0"
    torch.compile = lambda model=None, *_, **__: (lambda function: function) if model is None else model
    _literals()


def _literals() -> None:
    def on_cpu(make: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(make)
        def twin(*args: Any, **kwargs: Any) -> Any:
            if "device" in kwargs:
                kwargs["device"] = _place(kwargs["device"])
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
            return make(*args, **kwargs)

        return twin

    for name in FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))
    tensor: Any = Tensor
    for name in METHODS:
        setattr(tensor, name, on_cpu(getattr(tensor, name)))
    move, kind = Tensor.to, Tensor.type

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if "device" in kwargs:
            kwargs["device"] = _place(kwargs["device"])
        found: Tensor = move(
            self, *(_place(a) if isinstance(a, str | torch.device) or type(a) is int else a for a in args), **kwargs
        )
        return found

    def type_of(self: Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        return kind(self).replace("torch.", "torch.cuda.") if dtype is None else kind(self, dtype, *args, **kwargs)

    module: Any = torch.nn.Module
    move_module = module.to

    def module_to(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Modules are on the one device there is; parameters that hold nothing cannot be swapped."""
        only_device = len(args) == 1 and not kwargs and isinstance(args[0], str | torch.device)
        return self if only_device else move_module(self, *args, **kwargs)

    module.to = module_to
    tensor.to, tensor.type = to, type_of
    tensor.cuda = lambda self, *_, **__: self
    tensor.pin_memory = lambda self, *_: self
    tensor.record_stream = lambda self, *_: None
    FakeTensor.is_cuda = property(lambda self: True)  # type: ignore[method-assign, assignment]


def _place(device: Any) -> Any:
    """The CPU for anything on CUDA."""
    return CPU if device is not None and str(device).partition(":")[0] in ("cuda", "0") else device
