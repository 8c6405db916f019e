"""FP8: from the recipe to TransformerConfig fields, or a refusal before the model is built.

Megatron accepts an FP8 request on any machine. Without Transformer Engine it then trains in bf16 and says nothing, and
what Transformer Engine itself cannot do it says at the first forward pass. So everything is checked here, at start-up, as
a pure function of a `Probe` of the machine. Figures of Transformer Engine and CUDA are those of its `quantization.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from nemo_pivotrl.core.errors import InputError, Problem

if TYPE_CHECKING:
    from nemo_pivotrl.config import Megatron, Policy

CONTAINER = "use NVIDIA's NeMo or PyTorch container, which brings it built for its CUDA"
DIMENSION_MULTIPLE = 16
"""Both inner dimensions of an FP8 matrix product must be multiples of this, on every rank."""
ENGINE_SINCE = {"delayed": (2, 1), "tensorwise": (2, 2), "blockwise": (2, 3), "mxfp8": (2, 1)}
"""Transformer Engine release from which Megatron can choose the scaling recipe."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What precision depends on, as found on a machine."""

    transformer_engine: str | None = None
    """Version; None where it is not installed or cannot be imported."""
    transformer_engine_error: str = ""
    """Why it cannot be imported; empty where it is not installed at all."""
    cuda: tuple[int, int] | None = None
    """CUDA release torch was built for; None: a CPU build."""
    capability: tuple[int, int] | None = None
    """Lowest compute capability among the visible GPUs, e.g. (9, 0) for Hopper; None: no GPU."""
    apex: Literal["none", "nvidia", "other"] = "none"
    """`other`: PyPI's package of that name, which is a web framework's and not NVIDIA's."""


def mamba_projection(heads: int, head_dim: int, groups: int, state: int) -> int:
    """Outputs of a Mamba-2 layer's input projection, which FP8 needs to be a multiple of 16."""
    return 2 * heads * head_dim + 2 * groups * state + heads


def check_fp8(megatron: Megatron, found: Probe, dimensions: Mapping[str, int] | None = None) -> list[Problem]:
    """Everything that stands between the recipe's FP8 request and this machine; empty without a request.

    dimensions: name -> size on one rank, of the matrices that are multiplied in FP8 (`mamba_projection` makes one).
    """
    if megatron.fp8 == "none":
        return (
            [_problem("fp8_param", "true", "weights in FP8 need FP8: set megatron.fp8")] if megatron.fp8_param else []
        )
    return [*_machine(megatron, found), *_settings(megatron, dimensions or {})]


def require_fp8(megatron: Megatron, found: Probe, dimensions: Mapping[str, int] | None = None) -> None:
    """Raise InputError with all of `check_fp8`'s problems, if there are any."""
    problems = check_fp8(megatron, found, dimensions)
    if problems:
        raise InputError(problems)


def _machine(megatron: Megatron, found: Probe) -> list[Problem]:
    """What the machine lacks."""
    recipe, problems = megatron.fp8_recipe, []
    if found.transformer_engine is None:
        why = found.transformer_engine_error
        state = f"Transformer Engine cannot be imported ({why})" if why else "Transformer Engine is not installed"
        problems.append(_problem("fp8", state, f"without it Megatron would silently train in bf16; {CONTAINER}"))
    elif release(found.transformer_engine) < ENGINE_SINCE[recipe]:
        since = ".".join(map(str, ENGINE_SINCE[recipe]))
        state = f"Transformer Engine {found.transformer_engine}"
        problems.append(_problem("fp8_recipe", state, f"`{recipe}` needs {since} or newer"))
    if found.cuda is None or found.capability is None:
        state = "a CPU build of torch" if found.cuda is None else "no visible GPU"
        problems.append(_problem("fp8", state, "FP8 runs on NVIDIA GPUs from Hopper on; set megatron.fp8=none here"))
        return problems
    has = f"compute capability {found.capability[0]}.{found.capability[1]}"
    if found.capability < (9, 0):
        problems.append(_problem("fp8", has, "FP8 training needs Hopper (9.0) or newer; set megatron.fp8=none"))
    elif recipe == "mxfp8" and not (10, 0) <= found.capability < (12, 0):
        remedy = "`mxfp8` is Blackwell's (10.0 to 11.x); on Hopper use tensorwise, delayed or blockwise"
        problems.append(_problem("fp8_recipe", has, remedy))
    if recipe == "blockwise" and found.cuda < (12, 9):
        state = f"CUDA {found.cuda[0]}.{found.cuda[1]}"
        problems.append(_problem("fp8_recipe", state, "`blockwise` needs CUDA 12.9; use tensorwise"))
    return problems


def _settings(megatron: Megatron, dimensions: Mapping[str, int]) -> list[Problem]:
    """What in the recipe or the model contradicts FP8."""
    problems = []
    if megatron.cpu:
        problems.append(
            _problem("fp8", f"{megatron.fp8}, with megatron.cpu", "CPUs have no FP8: set megatron.fp8=none")
        )
    if not megatron.bf16:
        problems.append(_problem("bf16", "false", "FP8 matrix products take bf16 inputs: set megatron.bf16"))
    if megatron.fp8_recipe == "delayed" and megatron.first_last_layers_bf16:
        remedy = "delayed scaling cannot leave layers in bf16: unset it, or use tensorwise"
        problems.append(_problem("first_last_layers_bf16", "true, with fp8_recipe delayed", remedy))
    if megatron.fp8_param and not megatron.use_distributed_optimizer:
        remedy = "FP8 weights are gathered by the distributed optimizer: set use_distributed_optimizer"
        problems.append(_problem("fp8_param", "true, without the distributed optimizer", remedy))
    for name, size in dimensions.items():
        if size % DIMENSION_MULTIPLE:
            remedy = f"FP8 needs a multiple of {DIMENSION_MULTIPLE} on every rank: change the tensor-parallel size"
            problems.append(_problem("fp8", f"{name} of {size}", f"{remedy} or set megatron.fp8=none"))
    return problems


def fp8_fields(megatron: Megatron) -> dict[str, Any]:
    """TransformerConfig fields of a request that passed `require_fp8`; empty without a request."""
    if megatron.fp8 == "none":
        return {}
    outer = megatron.first_last_layers_bf16
    fields = {
        "fp8": megatron.fp8,
        "fp8_recipe": megatron.fp8_recipe,
        "fp8_param": megatron.fp8_param,
        "first_last_layers_bf16": outer,
        "num_layers_at_start_in_bf16": megatron.num_layers_at_start_in_bf16 if outer else 0,
        "num_layers_at_end_in_bf16": megatron.num_layers_at_end_in_bf16 if outer else 0,
    }
    if megatron.fp8_recipe == "delayed":  # one step's maximum says little of the next's: NVIDIA's presets keep 1024
        fields |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
    return fields


def engine_dtype(policy: Policy, megatron: Megatron) -> str:
    """Precision in which vLLM serves the policy: that in which it trains. vLLM's fast attention takes no float32."""
    trained_in_bf16 = policy.backend == "megatron" and megatron.bf16 and not megatron.cpu
    return "bfloat16" if trained_in_bf16 else policy.dtype


def token_multiple(megatron: Megatron) -> int:
    """What the tokens of one rank's matrix products must be a multiple of in this precision."""
    if megatron.fp8 == "none":
        return 1
    return {"blockwise": 128, "mxfp8": 32}.get(megatron.fp8_recipe, DIMENSION_MULTIPLE)


def _problem(field: str, found: str, remedy: str) -> Problem:
    return Problem("recipe", None, f"megatron.{field}", found, remedy)


def release(version: str) -> tuple[int, int]:
    """(major, minor) of a version like 2.3.0.dev0+abc."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
