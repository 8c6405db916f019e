"""Transformer Engine's own Python over a stand-in for its compiled extension `transformer_engine_torch`.

Shapes, allocations, signatures and assertions are Transformer Engine's. The stand-in answers what its C++ answers: outputs of
the right shape and precision that hold nothing. A function that it does not know is refused by name.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import importlib
import importlib.machinery
import importlib.metadata
import os
import re
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_pivotrl.backends.traced import device
from nemo_pivotrl.backends.traced.triton_names import standing_in

assert device.CPU  # nothing of this file where CUDA is

CALLS: Counter[str] = Counter()
"""How often each function of the extension was called."""
BROKEN: list[str] = []
"""FP8 products that cuBLAS would refuse."""
WORKSPACES: list[Tensor] = []
"""cuBLAS's workspaces, in the order in which they were made."""
CHOSEN: Counter[str] = Counter()
"""What was run for attention: as Transformer Engine's own selector chose, or over shared prefixes."""


class NotTraced(RuntimeError):
    """The extension has a function that the stand-in does not know."""


class DType(enum.IntEnum):
    """The extension's numbers for precisions: those that it binds. Releases of 2026 compare them with their own."""

    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


PRECISIONS = {
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
    DType.kInt32: torch.int32,
    DType.kByte: torch.uint8,
}
SLOTS = {
    "FP8FwdTensors": [f"GEMM{i}_{kind}" for i in (1, 2, 3) for kind in ("INPUT", "WEIGHT", "OUTPUT")],
    "FP8BwdTensors": [f"{kind}{i}" for i in (1, 2, 3) for kind in ("GRAD_OUTPUT", "GRAD_INPUT")],
}
ANSWERS: dict[str, Any] = {
    "get_cublasLt_version": 130000,
    "get_cudnn_version": 91500,
    "get_num_cublas_streams": 4,
    "device_supports_multicast": False,
    "get_stream_priority_range": (0, -5),
}


class Name:
    """An enum's member or a class of which only the name matters."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = Name(f"{self._name}.{name}")
        setattr(self, name, found)
        return found

    def __call__(self, *args: Any, **_: Any) -> Any:
        shapes = [tuple(a.shape) if isinstance(a, Tensor) else type(a).__name__ for a in args]
        raise NotTraced(f"transformer_engine_torch.{self._name}({shapes}) is not known to the trace")

    def __repr__(self) -> str:
        return self._name

    def __hash__(self) -> int:
        return hash(self._name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Name) and other._name == self._name

    def __int__(self) -> int:
        return sum(map(ord, self._name))

    def __or__(self, _: object) -> type:
        return object

    __index__, __ror__ = __int__, __or__


class Extension(types.ModuleType):
    """`transformer_engine_torch`."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = Name(name)
        setattr(self, name, found)
        return found


def _plain(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and type(tensor).__name__ in ("FakeTensor", "Tensor", "Parameter")


def _shape(tensor: Any) -> torch.Size:
    """Of a tensor, or of what a quantised one stands for."""
    if _plain(tensor):
        return torch.Size(tensor.shape)
    for along in ("_data", "_rowwise_data"):
        if getattr(tensor, along, None) is not None:
            return torch.Size(getattr(tensor, along).shape)
    for across in ("_transpose", "_columnwise_data"):
        if getattr(tensor, across, None) is not None:
            shape = getattr(tensor, across).shape
            return torch.Size([shape[1:].numel(), shape[0]])
    raise NotTraced(f"a {type(tensor).__name__} without data")


def _product(a: Any, across_a: bool, b: Any, across_b: bool) -> torch.Size:
    """Shape of a product in cuBLAS's column-major words, and FP8's rules for it."""
    one, two = _shape(a), _shape(b)
    rows_a, rows_b = one[:-1].numel(), two[:-1].numel()
    if across_a and not across_b:
        common, found, fits = one[-1], torch.Size([*two[:-1], rows_a]), one[-1] == two[-1]
    elif not across_a and not across_b:
        common, found, fits = rows_a, torch.Size([*two[:-1], one[-1]]), two[-1] == rows_a
    else:
        common, found, fits = rows_a, torch.Size([two[-1], one[-1]]), rows_a == rows_b
    if not fits:
        raise RuntimeError(f"a matrix product of {tuple(one)} and {tuple(two)}")
    if not _plain(a):
        _check_fp8(type(a).__name__, common, found[-1], found[:-1].numel())
    return found


def _check_fp8(kind: str, common: int, columns: int, rows: int) -> None:
    """cuBLAS's alignment: 16 along what is summed, 8 along both others for block scaling, 16 for the rest."""
    other = 8 if "Block" in kind else 16
    wrong = [
        f"{name} {size} % {by}"
        for name, size, by in (("inner", common, 16), ("columns", columns, other), ("rows", rows, other))
        if size % by and (name != "rows" or other == 8)
    ]
    if wrong:
        BROKEN.append(f"{kind}: {', '.join(wrong)}")


def generic_gemm(
    a: Any,
    across_a: bool,
    b: Any,
    across_b: bool,
    out: Tensor | None,
    quantizer: Any,
    precision: Any,
    bias: Any,
    *rest: Any,
    **more: Any,
) -> tuple[Any, ...]:
    shape = _product(a, across_a, b, across_b)
    if out is None:
        made = PRECISIONS[precision] if precision is not None else torch.bfloat16
        out = torch.empty(shape, dtype=made)
    elif out.numel() != shape.numel():
        raise RuntimeError(f"a product of {tuple(shape)} into {tuple(out.shape)}")
    backward = rest[3]
    bias_grad = torch.empty_like(bias) if backward and bias is not None else None
    return out, bias_grad, None, more.get("extra_output")


def te_general_grouped_gemm(
    a: list[Any], across_a: bool, b: list[Any], across_b: bool, out: list[Tensor], *rest: Any
) -> Any:
    rows, bias, single = rest[1], rest[2], rest[4]
    if single and out[0].shape[0] != sum(rows):
        raise RuntimeError(f"experts of {sum(rows)} rows into {tuple(out[0].shape)}")
    for i, (one, two) in enumerate(zip(a, b, strict=True)):
        if _shape(two)[:-1].numel():
            shape = _product(one, across_a, two, across_b)
            if not single and out[i].numel() != shape.numel():
                raise RuntimeError(f"a product of {tuple(shape)} into {tuple(out[i].shape)}")
    return bias


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Any = None) -> Any:
    if output is not None:
        return output
    return quantizer.make_empty(tensor.shape, dtype=tensor.dtype, device=device.CPU)


def split_quantize(tensor: Tensor, rows: Any, quantizers: Any, *_: Any, **__: Any) -> list[Any]:
    return [quantize(part, q) for part, q in zip(torch.split(tensor, list(rows)), quantizers, strict=True)]


def bgrad_quantize(tensor: Tensor, quantizer: Any, *_: Any) -> tuple[Tensor, Any]:
    return tensor.new_empty(tensor.shape[-1]), quantize(tensor, quantizer)


def fp8_transpose(data: Tensor, _precision: Any, out: Tensor | None = None) -> Tensor:
    return data.new_empty(data.shape[-1], *data.shape[:-1]) if out is None else out


def swap_first_dims(x: Tensor, out: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape[1], x.shape[0], *x.shape[2:]) if out is None else out


def rmsnorm_fwd(x: Tensor, weight: Tensor, eps: float, out: Any, quantizer: Any, *_: Any) -> tuple[Any, None, Tensor]:
    if out is None:
        out = torch.empty_like(x) if quantizer is None else quantize(x, quantizer)
    return out, None, x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


def rmsnorm_bwd(_grad: Tensor, x: Tensor, _rsigma: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def rmsnorm_bwd_add(
    _grad: Tensor, x: Tensor, _add: Tensor, _rsigma: Tensor, weight: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _tensors(args: Any, number: int) -> list[Tensor]:
    """The first tensors of three dimensions and more: queries, keys, values, and backward output and its gradient."""
    return [a for a in args if isinstance(a, Tensor) and a.dim() >= 3][:number]


def fused_attn_fwd(*args: Any) -> list[Tensor]:
    query, _, value = _tensors(args, 3)
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    if query.dim() == 4:
        length, rows, heads, _ = query.shape
        sums = query.new_empty(rows, heads, length, 1, dtype=torch.float32)
    else:
        sums = query.new_empty(*query.shape[:2], 1, dtype=torch.float32)
    return [out, sums, query.new_empty(2, dtype=torch.int64)]


def fused_attn_bwd(*args: Any) -> list[Tensor | None]:
    """cuDNN's workspace for it holds float32 sums of the queries' gradient, as its Python graph says."""
    query, key, value, out, grad = _tensors(args, 5)
    if out.numel() != grad.numel():
        raise RuntimeError(f"attention of {tuple(out.shape)}, a gradient of {tuple(grad.shape)}")
    sums = torch.empty_like(query, dtype=torch.float32)
    found = [torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None]
    del sums
    return found


def fused_rope_forward(x: Tensor, angles: Tensor, *rest: Any) -> Tensor:
    """The checks of fused_rope.cpp, for formats whose first dimension is tokens."""
    bounds = rest[3]
    if angles.dim() != 4 or angles.shape[1:3] != (1, 1) or angles.dtype != torch.float32 or not angles.is_contiguous():
        raise RuntimeError(
            f"rotary embedding with angles {tuple(angles.shape)}, {angles.dtype}: not [S, 1, 1, D] in float32"
        )
    if angles.shape[-1] > x.shape[-1] or (bounds is None and angles.shape[0] < x.shape[0]):
        raise RuntimeError(f"rotary embedding of {tuple(x.shape)} with angles {tuple(angles.shape)}")
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def fused_rope_backward(grad: Tensor, angles: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


def fused_multi_row_padding(*_: Any) -> None: ...
def fused_multi_row_unpadding(*_: Any) -> None: ...
def fused_amax_and_scale_update_after_reduction(*_: Any) -> None: ...
def get_fused_attn_backend(*_: Any) -> Any:
    return sys.modules["transformer_engine_torch"].NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen


FUNCTIONS = (
    generic_gemm,
    te_general_grouped_gemm,
    quantize,
    split_quantize,
    bgrad_quantize,
    fp8_transpose,
    swap_first_dims,
    rmsnorm_fwd,
    rmsnorm_bwd,
    rmsnorm_bwd_add,
    fused_attn_fwd,
    fused_attn_bwd,
    fused_rope_forward,
    fused_rope_backward,
    fused_multi_row_padding,
    fused_multi_row_unpadding,
    fused_amax_and_scale_update_after_reduction,
    get_fused_attn_backend,
)


def _counted(function: Any) -> Any:
    def call(*args: Any, **more: Any) -> Any:
        CALLS[function.__name__] += 1
        return function(*args, **more)

    return call


def _optimizer(name: str) -> Any:
    """What Adam and the norms do to tensors that are there; a norm is one number."""

    def call(*_: Any, **__: Any) -> Any:
        CALLS[name] += 1
        return (torch.zeros(1), torch.zeros(1)) if "norm" in name else None

    return call


def _extension(folder: Path) -> Extension:
    made: Any = Extension("transformer_engine_torch")
    made.DType = DType
    for name, value in ANSWERS.items():
        setattr(made, name, lambda *_, _value=value, **__: _value)
    for name, names in SLOTS.items():
        setattr(made, name, enum.IntEnum(name, {n: i for i, n in enumerate(names)}))
    for name in ("CommOverlapHelper", "CommOverlap", "CommOverlapP2P"):
        setattr(made, name, type(name, (), {}))
    for function in FUNCTIONS:
        setattr(made, function.__name__, _counted(function))
    texts = [path.read_text(encoding="utf-8") for path in (folder / "transformer_engine/pytorch").rglob("*.py")]
    members = {name for text in texts for name in re.findall(r"\bNVTE_Fused_Attn_Backend\.(NVTE_\w+)", text)}
    made.NVTE_Fused_Attn_Backend = enum.IntEnum("NVTE_Fused_Attn_Backend", sorted(members))
    for text in texts:
        for name in re.findall(r"\bmulti_tensor_\w+", text):
            setattr(made, name, _optimizer(name))
        for name in re.findall(r"\btex\.([A-Za-z]\w*)", text):
            getattr(made, name)  # `import *` finds what is there
    return made  # type: ignore[no-any-return]


def install(folder: Path, version: str) -> None:
    """Make `transformer_engine` importable from its sources."""
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # its own word for: load no library
    made = _extension(folder)
    sys.modules["transformer_engine_torch"] = made
    names = "transformer_engine.pytorch.onnx_extensions"  # needs onnxscript, which no training step does
    sys.modules[names] = Extension(names)
    place = folder / "transformer_engine"
    package: Any = types.ModuleType("transformer_engine")
    package.__path__, package.__file__, package.__version__ = [str(place)], str(place / "__init__.py"), version
    spec = importlib.machinery.ModuleSpec("transformer_engine", None, origin=package.__file__, is_package=True)
    spec.submodule_search_locations = package.__path__
    package.__spec__ = spec
    sys.modules["transformer_engine"] = package
    known = importlib.metadata.version

    def version_of(name: str) -> str:
        return version if name.replace("_", "-").startswith("transformer-engine") else known(name)

    importlib.metadata.version = version_of
    with standing_in():
        package.common = importlib.import_module("transformer_engine.common")
        package.common.load_framework_extension = lambda *_: None
        package.pytorch = importlib.import_module("transformer_engine.pytorch")
    checkpoints: Any = importlib.import_module("transformer_engine.pytorch.distributed")
    checkpoints._get_cuda_rng_state = lambda *_, **__: torch.zeros(16, dtype=torch.uint8)
    checkpoints._set_cuda_rng_state = lambda *_, **__: None
    _note_attention()
    _note_workspaces()


def _note_workspaces() -> None:
    """cuBLAS's workspaces, which Transformer Engine makes once and keeps."""
    gemm: Any = importlib.import_module("transformer_engine.pytorch.cpp_extensions.gemm")
    make = gemm.get_cublas_workspace.__wrapped__

    @functools.cache
    def noted(*asked: Any) -> Any:
        found = make(*asked)
        WORKSPACES.extend(found if isinstance(found, list) else [found])
        return found

    gemm.get_cublas_workspace = noted


def _note_attention() -> None:
    chooser: Any = importlib.import_module("transformer_engine.pytorch.attention.dot_product_attention.utils")
    choose = chooser.get_attention_backend

    def chosen(asked: Any, *args: Any, **more: Any) -> Any:
        found = choose(dataclasses.replace(asked, qkv_type=Tensor), *args, **more)
        flash, fused = found[0], found[2]
        name = "FlashAttention" if flash else f"FusedAttention {found[3]!r}" if fused else "none that is fused"
        CHOSEN[name] += 1
        return found

    chooser.get_attention_backend = chosen
