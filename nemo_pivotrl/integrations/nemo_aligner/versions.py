"""What must be installed before NeMo-Aligner is imported, and its import without TensorRT-LLM.

Imports nothing of NVIDIA's: the answer to "why can this not be imported" must not itself need the import.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any

from nemo_pivotrl.core.errors import InputError, Problem

# Versions above which NeMo-Aligner 0.7.0 does not train a step, one run each; see the README's table. The pairs with
# megatron-core are narrower than these ranges, so `_pair` names them.
NEWEST = {"nemo-aligner": (0, 7), "nemo-toolkit": (2, 4), "megatron-core": (0, 12)}
OLDEST = {"nemo-aligner": (0, 7), "nemo-toolkit": (2, 1), "megatron-core": (0, 9)}
PAIRS = {(2, 1): ((0, 9), (0, 10)), (2, 2): ((0, 11), (0, 12)), (2, 3): ((0, 12),), (2, 4): ((0, 12),)}
"""nemo-toolkit release to the megatron-core releases it trains with."""
REMEDY = "pip install 'nemo-pivotrl[aligner]' in an environment of its own, or use NVIDIA's NeMo container 25.02"


def require() -> None:
    """Raise InputError, naming every module that is missing or too new, unless NeMo-Aligner can be used here."""
    problems = []
    found: dict[str, tuple[int, int]] = {}
    for name in NEWEST:
        try:
            text = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(Problem("environment", None, name, "not installed", REMEDY))
            continue
        found[name] = version = _release(text)
        if not OLDEST[name] <= version <= NEWEST[name]:
            wanted = f"{_dotted(OLDEST[name])} to {_dotted(NEWEST[name])}"
            remedy = f"the NeMo-Aligner backend runs with {wanted}; newer models: policy.backend megatron"
            problems.append(Problem("environment", None, name, text, remedy))
    if not problems and found["megatron-core"] not in PAIRS[found["nemo-toolkit"]]:
        fitting = " or ".join(_dotted(v) for v in PAIRS[found["nemo-toolkit"]])
        shown = f"{_dotted(found['megatron-core'])} with nemo-toolkit {_dotted(found['nemo-toolkit'])}"
        problems.append(Problem("environment", None, "megatron-core", shown, f"that toolkit needs {fitting}"))
    if importlib.util.find_spec("apex") is not None and importlib.util.find_spec("apex.optimizers") is None:
        remedy = "PyPI's apex is another project: uninstall it, and build NVIDIA's from its repository"
        problems.append(Problem("environment", None, "apex", "no apex.optimizers", remedy))
    if problems:
        raise InputError(problems)


def _release(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


TRT_LLM = "nemo_aligner.utils.trt_llm"


@contextlib.contextmanager
def without_tensorrt_llm() -> Iterator[None]:
    """Import NeMo-Aligner's actors and trainers where TensorRT-LLM is not installed.

    Their modules import it through one module that fails before its own guard. While the context lasts a stand-in takes
    that module's place; afterwards it is gone again, so that whoever asks for TensorRT-LLM still hears that it is missing.
    Where it is installed nothing is replaced.
    """
    if TRT_LLM in sys.modules or importlib.util.find_spec("tensorrt_llm") is not None:
        yield
        return
    stand_in: Any = types.ModuleType(TRT_LLM)
    stand_in.GPTGenerateTRTLLM = _no_tensorrt_llm
    sys.modules[TRT_LLM] = stand_in
    try:
        yield
    finally:
        del sys.modules[TRT_LLM]


def _no_tensorrt_llm(*args: Any, **kwargs: Any) -> None:
    """In place of the class: turning TensorRT-LLM on without having it is an error, not a fall-back."""
    raise InputError(Problem("environment", None, "tensorrt_llm", "not installed", "set trt_llm.enable to false"))
