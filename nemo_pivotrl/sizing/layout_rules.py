"""Which layouts of ranks and which precisions a model allows, as pure functions: what they return stops a job before it starts.

`plan` and the pre-flight check ask before anything is installed or read; `parallel.py` and `model.py` ask again on every
rank. The rules are megatron-core 0.16's own, each found there as an assertion or as an answer that would be wrong.
"""

from __future__ import annotations

import math

from nemo_pivotrl.config import Megatron, Policy
from nemo_pivotrl.core.errors import Problem
from nemo_pivotrl.sizing.architecture import Architecture, Mamba
from nemo_pivotrl.sizing.precision import mamba_projection


def layout_problems(megatron: Megatron, world_size: int) -> list[Problem]:
    """What keeps `world_size` ranks from being laid out as the recipe says."""
    problems = []
    dense = megatron.tensor_model_parallel_size * megatron.pipeline_model_parallel_size * megatron.context_parallel_size
    sparse = (
        megatron.expert_tensor_parallel_size
        * megatron.expert_model_parallel_size
        * megatron.pipeline_model_parallel_size
    )
    for field, product, factors in (
        ("tensor_model_parallel_size", dense, "tensor x pipeline x context parallel size"),
        ("expert_model_parallel_size", sparse, "expert x expert tensor x pipeline parallel size"),
    ):
        if world_size % product:
            remedy = f"{factors} is {product}, which must divide the number of processes"
            problems.append(Problem("recipe", None, f"megatron.{field}", f"{world_size} processes", remedy))
    if megatron.sequence_parallel and megatron.tensor_model_parallel_size == 1:
        remedy = "it splits along the tensor-parallel ranks: raise tensor_model_parallel_size or leave it off"
        problems.append(Problem("recipe", None, "megatron.sequence_parallel", "true with one such rank", remedy))
    return problems


def model_problems(architecture: Architecture, megatron: Megatron) -> list[Problem]:
    """Everything in which the recipe's layout does not fit the model."""
    problems: list[Problem] = []

    def divides(field: str, what: str, number: int) -> None:
        size = getattr(megatron, field)
        if number % size:
            remedy = f"it must divide the model's {what}, {number}"
            problems.append(Problem("recipe", None, f"megatron.{field}", str(size), remedy))

    tp, etp = "tensor_model_parallel_size", "expert_tensor_parallel_size"
    divides("pipeline_model_parallel_size", "layers", len(architecture.layers))
    divides(tp, "attention heads", architecture.num_attention_heads)
    size, heads = megatron.tensor_model_parallel_size, architecture.num_key_value_heads
    if heads % size and size % heads:  # where there are fewer heads than ranks, several ranks hold the same one
        remedy = f"it must divide the model's key-value heads, {heads}, or be a multiple of them"
        problems.append(Problem("recipe", None, f"megatron.{tp}", str(size), remedy))
    divides(tp, "MLP width", architecture.intermediate_size)
    if architecture.mamba is not None:
        divides(tp, "Mamba groups", architecture.mamba.num_groups)
        divides(tp, "Mamba heads", architecture.mamba.num_heads)
        problems += _mamba_problems(architecture.mamba, megatron)
    if architecture.moe is not None:
        divides("expert_model_parallel_size", "experts", architecture.moe.num_experts)
        divides(etp, "expert width", architecture.moe.intermediate_size)
        divides(tp, "shared expert's width", architecture.moe.shared_intermediate_size or 0)
        if megatron.tensor_model_parallel_size > 1 and not megatron.sequence_parallel:
            remedy = "set it: Megatron trains experts under tensor parallelism only with it"
            problems.append(Problem("recipe", None, "megatron.sequence_parallel", "false", remedy))
        if megatron.cpu and megatron.expert_tensor_parallel_size > 1:
            remedy = "gloo has no uneven collectives: use 1 on CPUs"
            found = str(megatron.expert_tensor_parallel_size)
            problems.append(Problem("recipe", None, f"megatron.{etp}", found, remedy))
        if megatron.cpu and megatron.moe_token_dispatcher_type == "flex":
            remedy = "it needs DeepEP: use alltoall or allgather on CPUs"
            problems.append(Problem("recipe", None, "megatron.moe_token_dispatcher_type", "flex", remedy))
    elif megatron.expert_model_parallel_size > 1:
        found = str(megatron.expert_model_parallel_size)
        remedy = f"a {architecture.model_type} of this shape has no experts: use 1"
        problems.append(Problem("recipe", None, "megatron.expert_model_parallel_size", found, remedy))
    return problems


def training_problems(policy: Policy, megatron: Megatron, with_reference: bool) -> list[Problem]:
    """What the trainer cannot do. with_reference: the start policy's weights are kept beside those that train."""
    problems = []
    if with_reference and not policy.lora.enabled and megatron.fp8 != "none" and megatron.fp8_param:
        remedy = "weights in FP8 cannot be swapped for the start policy's and come back unrounded: unset it"
        problems.append(Problem("recipe", None, "megatron.fp8_param", "true, with a KL reference", remedy))
    unequal = megatron.pipeline_model_parallel_size > 1 or megatron.expert_model_parallel_size > 1
    if megatron.moe_token_dispatcher_type == "allgather" and unequal:
        remedy = "micro-batches differ in length between ranks, which only alltoall allows"
        problems.append(Problem("recipe", None, "megatron.moe_token_dispatcher_type", "allgather", remedy))
    return problems


def _mamba_problems(mamba: Mamba, megatron: Megatron) -> list[Problem]:
    """Context parallelism gives each rank some heads and groups of the whole sequence; packing knows no state's end."""
    problems, tp, cp = [], megatron.tensor_model_parallel_size, megatron.context_parallel_size
    field = "megatron.context_parallel_size"
    if megatron.sequence_packing:
        remedy = "megatron-core 0.16 would carry a Mamba state from one sequence into the next: leave it off"
        problems.append(Problem("recipe", None, "megatron.sequence_packing", "true, with Mamba layers", remedy))
    if mamba.num_heads % tp == 0 and mamba.num_heads // tp % cp:
        remedy = f"it must divide a rank's Mamba heads, {mamba.num_heads} / {tp}"
        problems.append(Problem("recipe", None, field, str(cp), remedy))
    groups = mamba.num_groups // tp if mamba.num_groups % tp == 0 else 0
    if groups and groups % cp and cp % groups:
        remedy = f"it must divide a rank's Mamba groups, {mamba.num_groups} / {tp}, or be a multiple of them"
        problems.append(Problem("recipe", None, field, str(cp), remedy))
    return problems


def fp8_dimensions(architecture: Architecture, megatron: Megatron) -> dict[str, int]:
    """Name to size, on one rank, of the dimensions that FP8 needs to be multiples of 16."""
    tp, a = megatron.tensor_model_parallel_size, architecture
    found = {
        "hidden_size": a.hidden_size,
        "queries": a.num_attention_heads * a.head_dim // tp,
        "keys": a.num_key_value_heads * a.head_dim // tp,
        "intermediate_size": a.intermediate_size // tp,
    }
    if a.mamba is not None:
        m = a.mamba
        whole = mamba_projection(m.num_heads, m.head_dim, m.num_groups, m.state_dim)
        found |= {"Mamba projection": whole // tp, "Mamba width": m.num_heads * m.head_dim // tp}
    if a.moe is not None:
        found["moe_intermediate_size"] = a.moe.intermediate_size // megatron.expert_tensor_parallel_size
        found["moe_latent_size"] = a.moe.latent_size or 0
        found["moe_shared_expert_intermediate_size"] = (a.moe.shared_intermediate_size or 0) // tp
    return found


def multiple_of(tp: int, cp: int, sequence_parallel: bool, precision: int = 1) -> int:
    """What a sequence's padded length must be a multiple of.

    Context parallelism cuts it into 2 * cp pieces, sequence parallelism each rank's part over tp, and one rank's part of
    that must be a multiple of `precision` tokens (`precision.token_multiple`).
    """
    pieces = 2 * cp if cp > 1 else 1
    ranks = cp * (tp if sequence_parallel else 1)
    return math.lcm(pieces, ranks * precision)


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
