"""trace: one rank of a recipe's training step, run on a CPU without numbers, beside what `plan` says of the same micro-batch.

`plan` is arithmetic; a trace runs the Python of megatron-core, Transformer Engine and mamba_ssm on the whole model at the
recipe's layout, and counts. It shows shapes, bytes, collectives and assertions. It shows no number, no time and nothing of what
compiled kernels do inside.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from nemo_pivotrl.backends.base import as_trained
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.sizing.architecture import Architecture
from nemo_pivotrl.sizing.engine_buffers import fp8_copy_bytes, workspace_bytes
from nemo_pivotrl.sizing.memory import (
    GIB,
    activation_bytes,
    layout_of,
    stages_of,
    state_bytes,
)
from nemo_pivotrl.tools.plan import layout_text, micro_batch, trained_parameters, training_legality
from nemo_pivotrl.tools.plan_costs import GPUS, lengths, trainers
from nemo_pivotrl.tools.plan_models import shape_of

if TYPE_CHECKING:
    from nemo_pivotrl.backends.traced.step import Asked, Traced

TOLERANCE = 0.1
"""Of a traced figure, by which `plan` may differ."""
SMALL = 0.05
"""GiB that no comparison is made of."""


@dataclass(frozen=True, slots=True)
class Line:
    """One figure, GiB."""

    name: str
    traced: float
    planned: float | None

    @property
    def off(self) -> float | None:
        """Planned over traced, less 1; None where there is nothing to compare."""
        if self.planned is None or max(self.traced, self.planned) < SMALL:
            return None
        return self.planned / self.traced - 1 if self.traced else float("inf")

    @property
    def close(self) -> bool:
        return self.off is None or abs(self.off) <= TOLERANCE


def asked_of(recipe: Recipe, rank: int = 0, layers: str = "", optimizer: bool = False) -> Asked:
    """The step that the recipe's training asks of a rank, in the largest micro-batch that it may meet.

    layers: a pattern in place of the model's own (letters of `Architecture.layers`). Raises InputError for what cannot be traced.
    """
    from nemo_pivotrl.backends.traced.step import Asked

    pivotrl = recipe.algorithm == "pivotrl"
    role, model = ("policy", recipe.policy) if pivotrl else ("doctor", as_trained(recipe.doctor))
    shape, _ = shape_of(model.model_name, recipe)
    if problems := refused(recipe, role, shape, rank, layers):
        raise InputError(problems)
    shape = replace(shape, layers=layers) if layers else shape
    m = recipe.megatron
    if problems := training_legality(recipe, role, model, shape, False):
        raise InputError(problems)
    batch = micro_batch(model, m)
    prompt, responses = _rows(recipe, model, batch.tokens, batch.length)
    gpu = GPUS[recipe.cluster.gpu]
    return Asked(
        policy=model,
        megatron=m,
        architecture=shape,
        world=trainers(recipe, "megatron"),
        rank=rank,
        capability=gpu.capability,
        memory_gib=gpu.memory_gib,
        imbalance=recipe.plan.expert_imbalance,
        head=not pivotrl,
        optimizer=optimizer,
        prompt=range(1, prompt + 1),
        responses=responses,
    )


def _rows(recipe: Recipe, model: Any, tokens: int, length: int) -> tuple[int, list[int]]:
    """Tokens of a prompt and of its responses that fill a micro-batch of `tokens`: rows of `length`, or one prompt of the mean
    length with as many responses as there is room for."""
    longest = min(model.generation.max_new_tokens, length // 2)
    if not model.prefix_sharing:
        rows = max(tokens // length, 1)
        return length - longest, [longest] * rows
    mean, _ = lengths(recipe)
    prompt = min(int(mean), length - longest)
    samples = recipe.grpo.num_generations_per_prompt if recipe.algorithm == "pivotrl" else 2
    each = max(min((tokens - prompt) // samples, longest), 1)
    number = max((tokens - prompt) // each, 1)
    return prompt, [each] * number


def refused(recipe: Recipe, role: str, shape: Architecture, rank: int, layers: str) -> list[Problem]:
    """What a trace cannot do, each by name."""
    model, m = getattr(recipe, role), recipe.megatron
    problems = []

    def no(field: str, found: object, remedy: str) -> None:
        problems.append(Problem("recipe", None, field, str(found), remedy))

    if model.backend != "megatron":
        no(f"{role}.backend", model.backend, "a trace runs megatron-core's training step: there is none here")
        return problems
    if m.cpu:
        no("megatron.cpu", "true", "such a step runs on this machine: no trace is needed")
    if shape.moe is not None and m.moe_token_dispatcher_type != "alltoall":
        no("megatron.moe_token_dispatcher_type", m.moe_token_dispatcher_type, "alltoall alone is traced")
    if shape.moe is not None and not m.moe_grouped_gemm:
        no("megatron.moe_grouped_gemm", "false", "experts one by one need numbers: true alone is traced")
    if m.fp8 != "none" and m.fp8_recipe == "mxfp8":
        no("megatron.fp8_recipe", "mxfp8", "tensorwise, blockwise and delayed are traced")
    if m.fp8 != "none" and m.fp8_param:
        no("megatron.fp8_param", "true", "weights kept in FP8 are not traced")
    world = trainers(recipe, "megatron")
    if not 0 <= rank < world:
        no("--rank", rank, f"the recipe trains on ranks 0 to {world - 1}")
    known = set("ME*-" if shape.hybrid else "DE")
    if wrong := sorted(set(layers) - known):
        no("--layers", layers, f"{''.join(wrong)} is no layer of such a model: use {' '.join(sorted(known))}")
    return problems


def compared(asked: Asked, found: Traced) -> list[Line]:
    """Each figure of the trace beside the arithmetic of the same micro-batch."""
    m, a = asked.megatron, asked.architecture
    layout = layout_of(m, asked.world)
    count = trained_parameters(a, asked.policy, m, layout, found.stage, asked.head)
    state = state_bytes(count, m, layout)
    running = activation_bytes(
        a,
        m,
        layout,
        found.stage,
        found.micro_batches[0],
        "te",
        layout.pp,
        asked.imbalance,
        head=asked.head,
        adapters=asked.policy.lora.enabled,
    )
    copies = fp8_copy_bytes(a, m, layout, found.stage)
    workspace = workspace_bytes(a, m, asked.capability)
    lines = [
        Line("weights", found.weights / GIB, state.weights / GIB),
        Line("gradients", found.gradients / GIB, state.gradients / GIB),
        Line("FP8 copies of weights", found.copies / GIB, copies / GIB),
        Line("workspaces", found.workspace / GIB, workspace / GIB),
        Line("activations kept", found.held / GIB, running.held / GIB),
        Line("activations at most", found.peak / GIB, running.peak / GIB),
    ]
    planned = state.weights + state.gradients + copies + workspace
    moment = running.peak
    if asked.optimizer:
        lines.insert(2, Line("optimizer state", found.optimizer / GIB, state.optimizer / GIB))
        lines.append(Line("optimizer's step", found.step / GIB, state.step / GIB))
        planned, moment = planned + state.optimizer, max(moment, state.step)
    lines.append(Line("at most, all together", found.total / GIB, (planned + moment) / GIB))
    return lines


def as_text(path: str, asked: Asked, found: Traced, lines: list[Line]) -> str:
    """A table, and what ran."""
    layout = layout_of(asked.megatron, asked.world)
    where = f"rank {asked.rank} of {asked.world}, {layout_text(asked.megatron, layout)}"
    stage = f", pipeline stage {found.stage} of 0 to {layout.pp - 1}" if layout.pp > 1 else ""
    batch = found.micro_batches[0]
    out = [
        f"{path}: {where}{stage}, {len(asked.architecture.layers)} layers",
        f"  {len(found.micro_batches)} micro-batches of {batch.tokens:,} tokens, {batch.predicted:,} of them predicted"
        + (", prefixes shared" if batch.shared else ""),
        "  " + ", ".join(f"{name} {version}" for name, version in found.versions.items()),
        "",
        f"  {'GiB':<28}{'traced':>10}{'planned':>10}{'off':>8}",
    ]
    for line in lines:
        planned = "" if line.planned is None else f"{line.planned:10.3f}"
        off = "" if line.off is None else f"{line.off:+8.1%}" + ("" if line.close else "  <- off")
        out.append(f"  {line.name:<28}{line.traced:10.3f}{planned}{off}")
    out += ["", f"  {found.parameters:,} parameters; {found.left / GIB:.3f} GiB of activations left after the step"]
    out += ["", "  collectives of forward and backward passes: calls, GiB of the largest tensor of each"]
    out += [f"  {name:<60}{calls:8,}{size / GIB:10.3f}" for name, (calls, size) in found.collectives.items()]
    for title, counted in (("kernels", found.kernels), ("attention", found.attention), ("modules", found.modules)):
        out += ["", f"  {title}: " + (", ".join(f"{name} x {n}" for name, n in counted.most_common()) or "none")]
    out += ["", *(f"  fusion of {name}: {state}" for name, state in fusions(asked, found))]
    out += [f"  FP8 REFUSED: {text}" for text in found.broken_fp8]
    out += [f"  NOT IN CHECKPOINTS: {text}" for text in found.unmapped]
    spent = ", ".join(f"{name} {seconds:.1f}" for name, seconds in found.seconds.items())
    return "\n".join([*out, "", f"  seconds: {spent}"])


def as_json(path: str, asked: Asked, found: Traced, lines: list[Line]) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "recipe": path,
        "rank": asked.rank,
        "world": asked.world,
        "layers": asked.architecture.layers,
        "good": good(asked, found, lines),
        "fusions": dict(fusions(asked, found)),
        "lines": [asdict(line) | {"off": line.off, "close": line.close} for line in lines],
        "traced": {field.name: getattr(found, field.name) for field in fields(found)}
        | {"micro_batches": [asdict(batch) for batch in found.micro_batches]},
    }


MISSING = "OFF"
PERMUTES = ("te_moe::permute_mask_map_fwd", "_permute_kernel")
UNPERMUTES = ("te_moe::unpermute_mask_map_fwd", "_unpermute_kernel")
"""By releases of Transformer Engine: an operator, or a Triton kernel."""


def fusions(asked: Asked, found: Traced) -> list[tuple[str, str]]:
    """What NVIDIA's recipes fuse: `on` where its kernel ran, `OFF` where it did not, or why there is nothing to fuse."""
    a, pipelined = asked.architecture, asked.megatron.pipeline_model_parallel_size
    layers = set(stages_of(a, pipelined)[found.stage])
    mixture, dense = "E" in layers, layers & set("D-")
    rotated, experts = "the model has no rotary embedding", "this stage has no experts"
    rows: list[tuple[str, tuple[str, ...], str]] = [
        ("rotary embedding", ("fused_rope_forward",), "" if a.rope_theta is not None else rotated),
        ("permutation", PERMUTES, "" if mixture else experts),
        ("unpermutation", UNPERMUTES, "" if mixture else experts),
    ]
    if a.gated:
        rows.append(("SwiGLU", ("fused activation",), "" if mixture or dense else "this stage has no MLP"))
    else:
        rows.append(("squared ReLU and routing weights", ("fused activation",), "" if mixture else experts))
    stated = [
        (name, why or ("on" if any(found.kernels[k] for k in kernels) else MISSING)) for name, kernels, why in rows
    ]
    why = "no loss of Megatron's runs: the LM head's log-probabilities are made a chunk of tokens at a time"
    return [*stated, ("cross-entropy", why)]


def good(asked: Asked, found: Traced, lines: list[Line]) -> bool:
    """Figures are close, cuBLAS takes every FP8 product, checkpoints have every parameter, and what can be fused is."""
    fused = all(state != MISSING for _, state in fusions(asked, found))
    return fused and not found.broken_fp8 and not found.unmapped and all(line.close for line in lines)
