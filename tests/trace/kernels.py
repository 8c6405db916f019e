"""mamba_ssm's Triton kernels on a machine without a GPU: compiled to machine code, or interpreted.

    python tests/trace/kernels.py compile SOURCES CAPABILITY,CAPABILITY [KERNEL ...]
    TRITON_INTERPRET=1 python tests/trace/kernels.py numbers SOURCES TREES LENGTH ...

The first prints a line of JSON for each kernel of a scan with states in and out, forward and backward, at the sizes of Nemotron 3
Super on one of 8 tensor-parallel ranks; the second, for scans of some lengths and over random prefix trees, how far they are from
the project's plain-torch twin. Triton comes from a folder on PYTHONPATH.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import random
import sys
import time
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HEADS, CHANNELS, GROUPS, STATES, CHUNK, LENGTH = 16, 64, 1, 128, 128, 1024
INPUTS = ("x", "dt", "B", "C", "states", "A", "D", "bias")


def scan_of(folder: Path) -> Any:
    """mamba_ssm's own scan, whose package file would import compiled parts."""
    package: Any = types.ModuleType("mamba_ssm")
    package.__path__ = [str(folder / "mamba_ssm")]
    sys.modules["mamba_ssm"] = package
    cuda: Any = torch.cuda
    cuda.device = lambda *_: contextlib.nullcontext()
    cuda.get_device_properties = lambda *_: types.SimpleNamespace(multi_processor_count=132, major=9, minor=0)
    cuda.get_device_capability = lambda *_: (9, 0)
    return importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined


def given(rows: int, length: int, sizes: tuple[int, int, int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    """A scan's inputs with gradients."""
    heads, channels, groups, states = sizes
    made = {
        "x": torch.randn(rows, length, heads, channels) * 0.5,
        "dt": torch.randn(rows, length, heads) * 0.5 - 1,
        "B": torch.randn(rows, length, groups, states) * 0.5,
        "C": torch.randn(rows, length, groups, states) * 0.5,
    }
    made = {name: tensor.to(dtype) for name, tensor in made.items()}
    made["states"] = torch.randn(rows, heads, channels, states) * 0.3
    made["A"] = -torch.rand(heads) - 0.5
    made["D"], made["bias"] = torch.ones(heads), torch.zeros(heads)
    return {name: tensor.requires_grad_() for name, tensor in made.items()}


def scanned(run: Any, t: dict[str, Tensor], chunk: int) -> tuple[Tensor, Tensor]:
    """(outputs, final states)."""
    fixed = {"D": t["D"], "dt_bias": t["bias"], "dt_softplus": True}
    found: tuple[Tensor, Tensor] = run(
        t["x"], t["dt"], t["A"], t["B"], t["C"], chunk, initial_states=t["states"], return_final_states=True, **fixed
    )
    return found


# ---- machine code ----


def launches(scan: Any) -> dict[str, tuple[Any, list[Any], list[Any], dict[str, Any]]]:
    """Every kernel that a scan launches, forward and backward: (function, configurations, heuristics, arguments)."""
    from triton.runtime import autotuner, jit

    found: dict[str, Any] = {}

    def note(self: Any, *args: Any, **more: Any) -> None:
        kernel, configs, heuristics = self, [None], []
        while not isinstance(kernel, jit.JITFunction):
            if isinstance(kernel, autotuner.Autotuner):
                configs = kernel.configs
                kernel.best_config = configs[0]  # the caller reads it
            else:
                heuristics.append(kernel.values)
            kernel = kernel.fn
        named = dict(zip(kernel.arg_names, args, strict=False)) | {
            k: v for k, v in more.items() if k in kernel.arg_names
        }
        found.setdefault(kernel.__name__, (kernel, configs, heuristics, named))

    for kind in (jit.JITFunction, autotuner.Autotuner, autotuner.Heuristics):
        kind.run = note
    t = given(1, LENGTH, (HEADS, CHANNELS, GROUPS, STATES), torch.bfloat16)
    y, last = scanned(scan, t, CHUNK)
    (y.float().sum() + last.sum()).backward()
    return found


def compiled(kernel: Any, config: Any, heuristics: list[Any], named: dict[str, Any], capability: int) -> Any:
    """A kernel's machine code with these arguments."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    values = {**named, **(config.kwargs if config else {})}
    for rules in heuristics:
        values |= {name: rule(values) for name, rule in rules.items()}
    fixed = {
        p.name: values[p.name]
        for p in kernel.params
        if p.is_constexpr or values.get(p.name) is None or (type(values[p.name]) is int and values[p.name] == 1)
    }
    signature = {p.name: "constexpr" if p.name in fixed else kind(values[p.name]) for p in kernel.params}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages} if config else {}
    source = ASTSource(kernel, signature=signature, constexprs=fixed)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def kind(value: Any) -> str:
    """Triton's name of an argument's type."""
    if isinstance(value, Tensor):
        names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64"}
        return f"*{names[value.dtype]}"
    if isinstance(value, bool):
        return "i1"
    return ("i32" if abs(value) < 2**31 else "i64") if isinstance(value, int) else "fp32"


def compile_all(folder: Path, capabilities: list[int], only: list[str]) -> None:
    found = launches(scan_of(folder))
    for capability, name in itertools.product(capabilities, only or found):
        kernel, configs, heuristics, named = found[name]
        start = time.monotonic()
        made = compiled(kernel, configs[0], heuristics, named, capability)
        row = {
            "kernel": name,
            "capability": capability,
            "shared": made.metadata.shared,
            "bytes": len(made.asm["cubin"]),
            "target": next(line for line in made.asm["ptx"].splitlines() if line.startswith(".target")),
            "seconds": round(time.monotonic() - start, 1),
        }
        print(json.dumps(row), flush=True)


# ---- numbers ----


def smallest_tiles() -> None:
    """Interpreted, a kernel takes its smallest tiles: they are the fewest operations here, and all give the same numbers."""
    from triton.runtime import autotuner

    def run(self: Any, *args: Any, **more: Any) -> Any:
        def size(config: Any) -> int:
            found = 1
            for name, value in config.kwargs.items():
                found *= value if name.startswith("BLOCK") else 1
            return found

        self.best_config = chosen = min(self.configs, key=size)
        if chosen.pre_hook is not None:
            chosen.pre_hook({**dict(zip(self.arg_names, args, strict=False)), **more, **chosen.kwargs})
        return self.fn.run(*args, **more, **chosen.kwargs)

    autotuner.Autotuner.run = run


def apart(one: Tensor, two: Tensor) -> float:
    """Largest difference over the largest number."""
    return float((one.detach() - two.detach()).abs().max() / two.detach().abs().max().clamp(min=1e-9))


def numbers(folder: Path, trees: int, lengths: list[int]) -> None:
    """A line of JSON for scans of several lengths, and one for each random prefix tree."""
    from nemo_pivotrl.backends.megatron.cpu_mamba import mamba_chunk_scan_combined as twin

    real, sizes, chunk = scan_of(folder), (2, 16, 1, 16), 16
    smallest_tiles()
    torch.manual_seed(0)
    for length in lengths:
        t = given(2, length, sizes, torch.float32)
        push, push_last, found = torch.randn(2, length, 2, 16), torch.randn(2, 2, 16, 16), {}
        for name, run in (("real", real), ("twin", twin)):
            y, last = scanned(run, t, chunk)
            grads = torch.autograd.grad((y * push).sum() + (last * push_last).sum(), [t[n] for n in INPUTS])
            found[name] = [y, last, *grads]
        names = ("y", "last", *(f"of {name}" for name in INPUTS))
        off = {n: apart(a, b) for n, a, b in zip(names, found["real"], found["twin"], strict=True)}
        # a bias has the sum of the steps' gradients, which nearly cancel: it is as exact as its terms are large
        terms = found["twin"][names.index("of dt")].abs().sum((0, 1)).max()
        bias = names.index("of bias")
        off["of bias"] = float((found["real"][bias] - found["twin"][bias]).abs().max() / terms)
        print(json.dumps({"length": length, "off": off}), flush=True)
    for seed in range(trees):
        print(json.dumps({"tree": seed, **over_a_tree(real, twin, seed, sizes, chunk)}), flush=True)


def over_a_tree(real: Any, twin: Any, seed: int, sizes: tuple[int, int, int, int], chunk: int) -> dict[str, Any]:
    """The project's scan over a prefix tree with the real kernels, against it with the twin, and against the twin row by row."""
    from nemo_pivotrl.algorithms.prefix_tree import lay_out
    from nemo_pivotrl.backends.tree_mamba import pieces, scan

    maker = random.Random(seed)
    trunk = [maker.randrange(2) for _ in range(24)]
    prompts = [[*trunk[: maker.randrange(1, 24)], maker.randrange(3)] for _ in range(4)]
    responses = [[maker.randrange(3) for _ in range(maker.randrange(1, 7))] for _ in range(4)]
    forest = lay_out(range(4), prompts, responses, 4)
    heads, channels, groups, states = sizes
    widths = [heads * channels, heads, groups * states, groups * states]
    table = torch.randn(3, sum(widths), generator=torch.Generator().manual_seed(seed)) * 0.5
    t = given(1, 1, sizes, torch.float32)
    fixed = {"D": t["D"].detach(), "dt_bias": t["bias"].detach(), "dt_softplus": True, "A": t["A"].detach()}

    def parts(tokens: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, dt, b, c = table_of_use[torch.as_tensor(tokens)][None].split(widths, -1)
        return x.unflatten(-1, (heads, -1)), dt - 1, b.unflatten(-1, (groups, -1)), c.unflatten(-1, (groups, -1))

    found = {}
    for name, run in (("real", real), ("twin", twin)):
        table_of_use = table.clone().requires_grad_()
        y = scan(run, *parts(forest.tokens), forest, chunk_size=chunk, **fixed)[0][forest.places]
        found[name] = (y.detach(), torch.autograd.grad(y.square().sum(), table_of_use)[0])
    table_of_use, rows = table, 0.0
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        x, dt, b, c = parts(prompt + response)
        alone = twin(x, dt, fixed["A"], b, c, chunk, D=fixed["D"], dt_bias=fixed["dt_bias"], dt_softplus=True)[0]
        want = alone[len(prompt) - 1 : len(prompt) + len(response) - 1]
        rows = max(rows, apart(found["real"][0][forest.predicts[i][: len(response)]], want))
    off = {"y": apart(found["real"][0], found["twin"][0]), "gradient": apart(found["real"][1], found["twin"][1])}
    return {"tokens": len(forest.tokens), "pieces": len(pieces(forest)), "off": off | {"rows one by one": rows}}


if __name__ == "__main__":
    place = Path(sys.argv[2])
    if sys.argv[1] == "compile":
        compile_all(place, [int(word) for word in sys.argv[3].split(",")], sys.argv[4:])
    else:
        numbers(place, int(sys.argv[3]), [int(word) for word in sys.argv[4:]])
