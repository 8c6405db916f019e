"""FlexAttention's own kernels for the mask of shared prefixes, on a machine without a GPU: compiled to machine code, or interpreted.

    python tests/trace/flex.py compile CAPABILITY,CAPABILITY FOLDER
    TRITON_INTERPRET=1 python tests/trace/flex.py numbers FOLDER TREES

Inductor writes the kernels, forward and backward, from its templates and the project's mask (`tree_attention._masks`), as on a
Hopper GPU: its operators are lowered one by one, without autograd, which would want a device. The first command prints a line of
JSON for each kernel, the second how far the interpreted ones are from dense attention. Triton comes from a folder on PYTHONPATH;
FOLDER keeps what is made.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import random
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

import torch
from torch import Tensor

SHARED, REGISTERS, PROCESSORS = 227 * 1024, 65536, 132
"""Of a Hopper GPU: bytes of shared memory that a block may have, registers of a multiprocessor, multiprocessors."""
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>); }
"""
"""A build of torch for CPUs has no guard of CUDA devices, and asks for one even where tensors are fake."""


def as_hopper(folder: Path) -> None:
    """torch.cuda and Triton's driver answer as a Hopper GPU would."""
    cuda: Any = torch.cuda
    sizes = {
        "major": 9,
        "minor": 0,
        "multi_processor_count": PROCESSORS,
        "warp_size": 32,
        "total_memory": 80 << 30,
        "regs_per_multiprocessor": REGISTERS,
        "max_threads_per_multi_processor": 2048,
        "max_threads_per_block": 1024,
        "shared_memory_per_block_optin": SHARED,
        "name": "Hopper",
        "gcnArchName": "",
    }
    found = types.SimpleNamespace(**sizes)
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "is_initialized": False,
        "synchronize": None,
    }
    answers |= {
        "get_device_properties": found,
        "get_device_capability": (9, 0),
        "get_device_name": "Hopper",
        "_lazy_init": None,
    }
    for name, answer in answers.items():
        setattr(cuda, name, lambda *_, answer=answer: answer)
    cuda.device = lambda *_: contextlib.nullcontext()
    cuda.get_rng_state = lambda *_: torch.zeros(16, dtype=torch.uint8)
    cuda.set_rng_state = lambda *_, **__: None
    torch.version.cuda = "13.0"
    torch._C._cuda_getCurrentRawStream = lambda *_: 0  # type: ignore[attr-defined]
    library, headers = folder / "guard.so", Path(torch.__file__).parent
    (folder / "guard.cpp").write_text(GUARD)
    words = ["g++", "-O0", "-std=c++20", "-shared", "-fPIC", f"-I{headers / 'include'}", str(folder / "guard.cpp")]
    subprocess.run([*words, "-o", str(library), f"-L{headers / 'lib'}", "-lc10"], check=True)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    _drive()


def _drive() -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class Hopper(DriverBase):
        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cuda", 0)

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        @classmethod
        def is_active(cls) -> bool:
            return True

        def get_benchmarker(self) -> Any:
            raise NotImplementedError

    triton.runtime.driver.set_active(Hopper())


# ---- Inductor's kernels ----


def forest_of(seed: int, tokens: int) -> Any:
    """A random prefix tree of about so many tokens."""
    from nemo_pivotrl.algorithms.prefix_tree import lay_out

    maker = random.Random(seed)
    trunk = [maker.randrange(2) for _ in range(tokens // 3)]
    prompts = [[*trunk[: maker.randrange(1, len(trunk))], maker.randrange(3)] for _ in range(4)]
    responses = [[maker.randrange(3) for _ in range(maker.randrange(1, tokens // 8))] for _ in range(4)]
    return lay_out(range(4), prompts, responses, 4)


def kernels(leave: Tensor, heads: tuple[int, int], width: int, dtype: torch.dtype) -> dict[str, str]:
    """Source of the kernels `forward` and `backward` for queries [1, H, S, D] and keys [1, K, S, D] as the project lays them out."""
    from torch._higher_order_ops.flex_attention import flex_attention, flex_attention_backward
    from torch._inductor import async_compile
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.nn.attention.flex_attention import _apply_kernel_options

    from nemo_pivotrl.backends.tree_attention import _masks

    mask, length, scale = _masks(leave), len(leave), width**-0.5
    seen: Any = mask.mask_mod

    def lifted(
        b: Any, h: Any, q: Any, k: Any, leave: Any
    ) -> Any:  # the project's mask, which has `leave` in its closure
        return types.FunctionType(seen.__code__, seen.__globals__, closure=(types.CellType(leave),))(b, h, q, k)

    def same(score: Tensor, *_: Any) -> Tensor:
        return score

    def joint(score: Tensor, b: Any, h: Any, q: Any, k: Any, grad: Tensor) -> list[Tensor | None]:
        return [grad, None, None, None, None]

    fields = mask.as_tuple()[:-1]

    def masked(lists: tuple[Tensor, ...]) -> tuple[Any, ...]:
        left = iter(lists)
        return (*(next(left) if isinstance(field, Tensor) else field for field in fields), lifted)

    with FakeTensorMode() as mode:

        def made(*shape: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.empty(*shape, dtype=kind, device="cuda")

        query, key, value = (made(length, 1, h, width).permute(1, 2, 0, 3) for h in (heads[0], heads[1], heads[1]))
        ends = made(length, kind=torch.int64)
        lists = tuple(made(*f.shape, kind=f.dtype) for f in fields if isinstance(f, Tensor))
        sums, grad, out = (
            made(1, heads[0], length, kind=torch.float32),
            torch.empty_like(query),
            torch.empty_like(query),
        )
    options: Any = dict(_apply_kernel_options(query, key, value, True, None))

    def forward(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, *lists: Tensor) -> Any:
        return flex_attention(q, k, v, same, masked(lists), scale, options, (), (ends,))

    def backward(
        q: Tensor, k: Tensor, v: Tensor, o: Tensor, sums: Tensor, do: Tensor, ends: Tensor, *lists: Tensor
    ) -> Any:
        graphs = (same, joint, masked(lists), scale, options, (), (ends,))
        return flex_attention_backward(q, k, v, o, sums, do, None, *graphs)[:3]

    written: dict[str, str] = {}
    async_compile.AsyncCompile.triton = lambda self, name, source, device_str="cuda": written.update({name: source})
    found = {}
    for name, function, given in (
        ("forward", forward, (query, key, value, ends, *lists)),
        ("backward", backward, (query, key, value, out, sums, grad, ends, *lists)),
    ):
        written.clear()
        with mode:
            compile_fx_inner(make_fx(function)(*given), list(given))
        (found[name],) = (source for kernel, source in written.items() if "_tem_" in kernel)
    return found


def loaded(source: str, file: Path) -> tuple[Any, dict[str, Any]]:
    """(the kernel, what its decorator is told)."""
    from torch._inductor.runtime import triton_heuristics

    told: dict[str, Any] = {"source": source}

    def template(**options: Any) -> Any:
        told.update(options)
        return lambda kernel: told.setdefault("kernel", kernel)

    triton_heuristics.template = template
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec and spec.loader
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    return told["kernel"], told


# ---- what the commands print ----


def compile_all(capabilities: list[int], folder: Path) -> None:
    """At the width and heads of Nemotron 3 Super on one of 8 tensor-parallel ranks, in bfloat16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    leave = forest_of(0, 6000).leave
    for name, source in kernels(leave, (4, 1), 128, torch.bfloat16).items():
        kernel, told = loaded(source, folder / f"flex_{name}.py")
        meta = told["triton_meta"]
        for capability in capabilities:
            start = time.monotonic()
            made = triton.compile(
                ASTSource(kernel, signature=meta["signature"], constexprs=meta["constants"]),
                target=GPUTarget("cuda", capability, 32),
                options={"num_warps": told["num_warps"], "num_stages": told["num_stages"]},
            )
            ptx = made.asm["ptx"]
            row = {
                "kernel": f"flex_attention {name}",
                "capability": capability,
                "shared": made.metadata.shared,
                "bytes": len(made.asm["cubin"]),
                "target": next(line for line in ptx.splitlines() if line.startswith(".target")),
                "tensor cores": [word for word in ("wgmma.mma_async", "tcgen05.mma") if word in ptx],
                "seconds": round(time.monotonic() - start, 1),
            }
            print(json.dumps(row), flush=True)


def numbers(folder: Path, trees: int) -> None:
    """A line of JSON for each random tree: largest differences over the largest number."""
    from nemo_pivotrl.backends.tree_attention import _masks, dense

    for seed in range(trees):
        forest, (heads, groups), width = forest_of(seed, 640), ((4, 2), (2, 1), (3, 3))[seed % 3], 16
        torch.manual_seed(seed)
        q, k, v = (
            torch.randn(len(forest.leave), 1, h, width).permute(1, 2, 0, 3).requires_grad_()
            for h in (heads, groups, groups)
        )
        truth = dense(*(x.double() for x in (q, k, v)), forest, width**-0.5)
        push = torch.randn_like(q)
        grads = torch.autograd.grad((truth * push).sum(), (q, k, v))
        sources = kernels(forest.leave, (heads, groups), width, torch.float32)
        lists = [f for f in _masks(forest.leave).as_tuple()[:-1] if isinstance(f, Tensor)]
        run = {name: loaded(source, folder / f"flex_{seed}_{name}.py") for name, source in sources.items()}
        length = len(forest.leave)
        found = interpreted(run, [x.detach() for x in (q, k, v)], lists, forest.leave, push, length, heads // groups)
        wanted = dict(zip(("out", "of q", "of k", "of v"), (truth.detach(), *grads), strict=True))
        off = {n: float((found[n] - w).abs().max() / w.abs().max()) for n, w in wanted.items()}
        full = int(_masks(forest.leave).full_kv_num_blocks.sum())
        print(
            json.dumps({"tree": seed, "tokens": length, "heads": [heads, groups], "full": full, "off": off}), flush=True
        )


def interpreted(
    run: dict[str, Any], given: list[Tensor], lists: list[Tensor], leave: Tensor, push: Tensor, length: int, shared: int
) -> dict[str, Tensor]:
    """Output and gradients of both kernels, launched as Inductor launches them."""
    q, k, v = given
    out, sums = torch.empty_like(q), torch.empty(q.shape[:-1])
    kernel, told = run["forward"]
    blocks = _constants(told)
    kn, ki, fn, fi, qn, qi, fqn, fqi = lists[:8]
    grid = (-(-length // blocks["BLOCK_M"]), 1, q.shape[1])
    kernel[grid](q, k, v, sums, torch.empty_like(sums), kn, ki, fn, fi, leave, out)
    kernel, told = run["backward"]
    blocks = _constants(told)
    delta = (out * push).sum(-1)
    of_q, of_k, of_v = (torch.zeros_like(x) for x in given)
    grid = (-(-length // blocks["BLOCK_M2"]) * shared + -(-length // blocks["BLOCK_N1"]), 1, k.shape[1])
    kernel[grid](q, k, v, sums, delta, push, of_q, of_v, kn, ki, qn, qi, fn, fi, fqn, fqi, leave, of_k)
    return {"out": out, "of q": of_q, "of k": of_k, "of v": of_v}


def _constants(told: dict[str, Any]) -> dict[str, int]:
    lines = (line.strip().partition(" : tl.constexpr = ") for line in told["source"].splitlines())
    return {name: int(value) for name, _, value in lines if value.isdigit()}


if __name__ == "__main__":
    if sys.argv[1] == "compile":
        as_hopper(Path(sys.argv[3]))
        compile_all([int(word) for word in sys.argv[2].split(",")], Path(sys.argv[3]))
    else:
        as_hopper(Path(sys.argv[2]))
        numbers(Path(sys.argv[2]), int(sys.argv[3]))
