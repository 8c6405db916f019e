"""Enough of Triton's names to import files that define kernels. A launch writes down the kernel's name and does nothing.

Real Triton is a gigabyte, and a trace needs no number of a kernel. The stand-in is there while those files are imported and
gone afterwards, since torch itself looks for Triton.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections import Counter
from collections.abc import Iterator
from typing import Any

LAUNCHES: Counter[str] = Counter()
"""How often each kernel was launched."""


class Anything:
    """A name of `triton.language`, of which only that it exists matters."""

    def __init__(self, name: str = "") -> None:
        self.name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(f"{self.name}.{name}")

    def __call__(self, *args: Any, **_: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) else Anything(self.name)

    def __mul__(self, _: object) -> Anything:
        return self


class Kernel:
    """A Triton function."""

    def __init__(self, function: Any) -> None:
        self.fn = self.function = function
        self.name = self.__name__ = getattr(function, "__name__", None) or function.name
        self.configs: list[Any] = []

    @property
    def best_config(self) -> Any:
        """The first of those that a GPU would choose from."""
        return self.configs[0]

    def __getitem__(self, _: object) -> Any:
        return self.launch

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError(f"{self.name} runs on GPUs alone")

    def launch(self, *_: Any, **__: Any) -> None:
        LAUNCHES[self.name] += 1


def _kernel(*args: Any, **_: Any) -> Any:
    """`@jit`, with arguments or without."""
    return _wrap(args[0]) if args else _wrap


def _tuned(configs: Any = (), *_: Any, **__: Any) -> Any:
    """`@autotune(configs=..., key=...)`."""

    def wrap(function: Any) -> Kernel:
        kernel = _wrap(function)
        kernel.configs = list(configs)
        return kernel

    return wrap


def _wrap(function: Any) -> Kernel:
    return function if isinstance(function, Kernel) else Kernel(function)


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(f"{self.__name__}.{name}")


@contextlib.contextmanager
def standing_in() -> Iterator[None]:
    """`import triton` finds the stand-in within it. torch's compiler is imported before, since it looks for Triton."""
    import torch._dynamo
    import torch._inductor.utils

    assert torch._inductor.utils and torch._dynamo
    names = "triton triton.language triton.language.core triton.language.standard triton.language.extra "
    names += "triton.language.extra.cuda triton.language.math triton.runtime triton.testing triton.tools"
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "triton"}
    modules = {name: _Module(name) for name in names.split()}
    for name, module in modules.items():
        module.__path__ = []  # type: ignore[attr-defined]
        above, _, own = name.rpartition(".")
        if above:
            setattr(modules[above], own, module)
    top: Any = modules["triton"]
    top.__version__ = "3.5.0"
    top.jit, top.autotune, top.heuristics = _kernel, _tuned, lambda *_, **__: _wrap
    top.Config = lambda chosen, **more: types.SimpleNamespace(kwargs=chosen, **more)
    top.cdiv = lambda a, b: -(-a // b)
    top.next_power_of_2 = lambda n: 1 << (n - 1).bit_length()
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
            del sys.modules[name]
        sys.modules.update(before)
