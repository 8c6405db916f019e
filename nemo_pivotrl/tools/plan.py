"""plan: will a recipe fit its machines, may its layout be, and what will its stages cost? Arithmetic, before any GPU-second.

Nothing is loaded: a model is its shape, read from the config.json of its folder or, where there is none yet, known by the
folder's name. Memory and operations are those of `sizing/memory.py` and `flops.py`; what no file can tell
(lengths, speeds) stands in the recipe's `plan` section and is printed beside the figures that rest on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from nemo_pivotrl.backends.adapters import adapter_bytes, doctor_files
from nemo_pivotrl.backends.base import as_trained
from nemo_pivotrl.backends.megatron.lora_mapping import lora_problems, stage_adapters
from nemo_pivotrl.config import Megatron, Policy, Recipe
from nemo_pivotrl.core.errors import Problem
from nemo_pivotrl.sizing.architecture import Architecture
from nemo_pivotrl.sizing.engine_buffers import fp8_copy_bytes, workspace_bytes
from nemo_pivotrl.sizing.flops import cache_bytes, model_bytes
from nemo_pivotrl.sizing.layout_rules import (
    fp8_dimensions,
    layout_problems,
    model_problems,
    multiple_of,
    round_up,
    training_problems,
)
from nemo_pivotrl.sizing.memory import (
    GIB,
    Activations,
    Count,
    Engine,
    Layout,
    MicroBatch,
    activation_bytes,
    forward_bytes,
    layout_of,
    stage_parameters,
    state_bytes,
)
from nemo_pivotrl.sizing.precision import Probe, check_fp8, engine_dtype, token_multiple
from nemo_pivotrl.tools.plan_costs import GPUS, Cost, llmdoctor_costs, pivotrl_costs, step_tokens, trainers
from nemo_pivotrl.tools.plan_models import Model, models_of

WIDTH = {"float32": 4, "bfloat16": 2, "float64": 8}
"""Bytes of a number."""


@dataclass(frozen=True, slots=True)
class Memory:
    """GiB on the GPU that needs most in one phase."""

    phase: str
    layout: str
    parts: dict[str, float]
    """By component. Those whose name begins with `or` are never there together: the largest of them counts."""
    peak: float
    limit: float
    """Of the GPU, less the reserve."""
    note: str = ""
    remedies: tuple[str, ...] = ()
    """Changes of the recipe that would make it fit, each alone, with the peak they lead to."""

    @property
    def fits(self) -> bool:
        return self.peak <= self.limit


@dataclass(frozen=True, slots=True)
class Verdict:
    """All that `plan` has to say."""

    models: list[Model]
    memory: list[Memory]
    problems: list[Problem]
    costs: list[Cost] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not self.problems and all(m.fits for m in self.memory)


def plan(recipe: Recipe) -> Verdict:
    """The recipe's models, memory and layout. Raises InputError for a model whose shape is not to be had."""
    models = models_of(recipe)
    shapes = {m.role: m.shape for m in models}
    if recipe.algorithm == "pivotrl":
        policy = recipe.policy
        anchored = recipe.loss_fn.reference_policy_kl_penalty > 0 or (recipe.grpo.val_kl and recipe.grpo.val_period > 0)
        problems = training_legality(recipe, "policy", policy, shapes["policy"], anchored)
        problems += batch_problems(recipe)
        memory = [] if problems else [training(recipe, "train", policy, shapes["policy"], anchored)]
        memory += [] if problems else [rollouts(recipe, shapes["policy"])]
        spent = [] if problems else pivotrl_costs(recipe, shapes["policy"])
        return Verdict(models, memory, problems, spent, notes_of(recipe, shapes["policy"]))
    anchored, doctor = recipe.tfpo.anchor == "reference", as_trained(recipe.doctor)
    problems = training_legality(recipe, "doctor", doctor, shapes["doctor"], anchored)
    if recipe.patient.backend == "megatron":
        world = trainers(recipe, "megatron")
        problems += [p for p in layout_problems(recipe.megatron, world) if p not in problems]
        problems += [p for p in model_problems(shapes["patient"], recipe.megatron) if p not in problems]
    if shapes["patient"].vocab_size != shapes["doctor"].vocab_size:
        found = f"{shapes['doctor'].vocab_size} tokens, and the patient has {shapes['patient'].vocab_size}"
        problems.append(
            Problem("recipe", None, "doctor.model_name", found, "take a doctor with the patient's tokenizer")
        )
    if problems:
        return Verdict(models, [], problems)
    memory = [
        scoring(recipe, shapes["patient"]),
        training(recipe, "tfpo", doctor, shapes["doctor"], anchored, head=True),
        steering(recipe, shapes["patient"], shapes["doctor"]),
    ]
    return Verdict(models, memory, [], llmdoctor_costs(recipe, shapes["patient"], shapes["doctor"]))


# ---- what is allowed ----


def training_legality(recipe: Recipe, role: str, model: Policy, shape: Architecture, anchored: bool) -> list[Problem]:
    """What keeps the model from being trained on the recipe's machines, whatever its size."""
    problems = []
    cluster, gpu = recipe.cluster, GPUS[recipe.cluster.gpu]
    if cluster.generation_nodes >= cluster.num_nodes:
        found = f"{cluster.generation_nodes} of {cluster.num_nodes}"
        problems.append(Problem("recipe", None, "cluster.generation_nodes", found, "leave nodes that train"))
        return problems
    if model.max_total_sequence_length > shape.max_position_embeddings and shape.rope_theta is not None:
        remedy = f"the model has positions up to {shape.max_position_embeddings}"
        found = str(model.max_total_sequence_length)
        problems.append(Problem("recipe", None, f"{role}.max_total_sequence_length", found, remedy))
    if model.backend != "megatron":
        return problems
    m = recipe.megatron
    problems += layout_problems(m, trainers(recipe, "megatron"))
    problems += model_problems(shape, m)
    problems += training_problems(model, m, anchored)
    problems += lora_problems(shape, model.lora, m.tensor_model_parallel_size)
    ideal = Probe(transformer_engine="2.3", cuda=(12, 9), capability=gpu.capability)
    problems += check_fp8(m, ideal, fp8_dimensions(shape, m))
    return problems


def batch_problems(recipe: Recipe) -> list[Problem]:
    """Batches that cannot be divided as the recipe says."""
    problems, g, p = [], recipe.grpo, recipe.policy
    if g.num_minibatches > g.num_prompts_per_step:
        found, remedy = str(g.num_minibatches), "use at most grpo.num_prompts_per_step"
        problems.append(Problem("recipe", None, "grpo.num_minibatches", found, remedy))
    if p.backend == "megatron" and (layout := layout_of(recipe.megatron, trainers(recipe, "megatron"))).dp > 1:
        rows = g.num_prompts_per_step * g.num_generations_per_prompt // g.num_minibatches
        if rows < layout.dp:
            remedy = f"fewer samples an optimiser step than data-parallel ranks ({layout.dp}): most would idle"
            problems.append(Problem("recipe", None, "grpo.num_prompts_per_step", f"{rows} samples", remedy))
    if p.generation.max_new_tokens >= p.max_total_sequence_length:
        found = f"{p.generation.max_new_tokens} of {p.max_total_sequence_length}"
        remedy = "leave room for a prompt: lower it or raise policy.max_total_sequence_length"
        problems.append(Problem("recipe", None, "policy.generation.max_new_tokens", found, remedy))
    return problems


def notes_of(recipe: Recipe, shape: Architecture) -> list[str]:
    """What is allowed, and worth knowing."""
    notes, g = [], recipe.grpo
    rows = g.num_prompts_per_step * g.num_generations_per_prompt // g.num_minibatches
    if recipe.policy.backend == "megatron":
        dp = layout_of(recipe.megatron, trainers(recipe, "megatron")).dp
        if dp and rows % dp:
            notes.append(
                f"{rows} samples an optimiser step over {dp} data-parallel ranks: some run a filler at the end"
            )
        tp = recipe.megatron.tensor_model_parallel_size
        if tp > shape.num_key_value_heads:
            copies = tp // shape.num_key_value_heads
            notes.append(f"{shape.num_key_value_heads} key-value heads over {tp} ranks: {copies} ranks hold each head")
    if not recipe.policy.prefix_sharing:
        naive, shared = step_tokens(replace(recipe, policy=replace(recipe.policy, prefix_sharing=True)))
        notes.append(f"policy.prefix_sharing is off: on, a step would run {naive / shared:.1f} times fewer tokens")
    if recipe.policy.backend == "megatron" and recipe.megatron.fp8 != "none":
        notes.append("operations in FP8 are counted at the speed of bfloat16: put a measured share in plan.train_mfu")
    return notes


# ---- memory ----


def training(
    recipe: Recipe,
    phase: str,
    model: Policy,
    shape: Architecture,
    anchored: bool,
    head: bool = False,
    limit: float | None = None,
) -> Memory:
    """Memory of the rank that needs most in training, and what to change where it does not fit.

    limit: GiB of the GPU less the reserve; None: those of the recipe's.
    """
    found = _training(recipe, phase, model, shape, anchored, head)
    found = found if limit is None else replace(found, limit=limit)
    if found.fits or model.backend != "megatron":
        return found
    tried = []
    for text, changed, other_model in alternatives(recipe, "doctor" if head else "policy", model):
        forbidden = layout_problems(changed.megatron, trainers(changed, "megatron"))
        forbidden += model_problems(shape, changed.megatron)
        forbidden += training_problems(other_model, changed.megatron, anchored)
        forbidden += lora_problems(shape, other_model.lora, changed.megatron.tensor_model_parallel_size)
        if forbidden:
            continue
        other = _training(changed, phase, other_model, shape, anchored, head)
        if other.peak <= (other.limit if limit is None else limit):
            tried.append(f"{text}: {other.peak:.1f} GiB")
    return replace(found, remedies=tuple(tried))


def alternatives(recipe: Recipe, role: str, model: Policy) -> Iterator[tuple[str, Recipe, Policy]]:
    """Recipes that need less memory for training the model of section `role`, each with the change that leads there, the
    gentlest first."""
    m, cluster = recipe.megatron, recipe.cluster

    def having(**changes: Any) -> tuple[Recipe, Policy]:
        return replace(recipe, megatron=replace(m, **changes)), model

    for tokens in sorted({model.train_micro_batch_tokens // 4, model.max_total_sequence_length}, reverse=True):
        if model.max_total_sequence_length <= tokens < model.train_micro_batch_tokens:
            smaller = replace(model, train_micro_batch_tokens=tokens)
            yield f"{role}.train_micro_batch_tokens={tokens}", recipe, smaller
    if m.recompute != "full":
        yield "megatron.recompute=full", *having(recompute="full")
    if not m.use_distributed_optimizer:
        yield "megatron.use_distributed_optimizer=true", *having(use_distributed_optimizer=True)
    if m.bf16 and m.grad_reduce_in_fp32:
        yield "megatron.grad_reduce_in_fp32=false", *having(grad_reduce_in_fp32=False)
    for name in ("expert_model", "context", "tensor_model", "pipeline_model"):
        field = f"{name}_parallel_size"
        for factor in (2, 4):
            size = getattr(m, field) * factor
            more = {"sequence_parallel": True} if name == "tensor_model" else {}
            yield f"megatron.{field}={size}", *having(**{field: size}, **more)
    for factor in (2, 4):
        nodes = (cluster.num_nodes - cluster.generation_nodes) * factor + cluster.generation_nodes
        yield f"cluster.num_nodes={nodes}", replace(recipe, cluster=replace(cluster, num_nodes=nodes)), model
    if cluster.gpu != "b200":
        yield "cluster.gpu=b200", replace(recipe, cluster=replace(cluster, gpu="b200")), model


def micro_batch(model: Policy, m: Megatron) -> MicroBatch:
    """The largest micro-batch that training may meet: a row longer than the budget runs alone."""
    multiple = multiple_of(
        m.tensor_model_parallel_size, m.context_parallel_size, m.sequence_parallel, token_multiple(m)
    )
    length = round_up(model.max_total_sequence_length, multiple)
    tokens = max(round_up(model.train_micro_batch_tokens, multiple), length)
    rows = tokens // length
    cp = m.context_parallel_size
    asked = tokens // cp if model.prefix_sharing else min(tokens // cp, rows * model.generation.max_new_tokens)
    return MicroBatch(tokens, length, asked, model.prefix_sharing, model.prefix_attention)


def one_device(model: Policy) -> Megatron:
    """The reference backend in Megatron's words: no parallelism, nothing recomputed, everything in the weights' precision."""
    return Megatron(
        bf16=False,
        recompute="none",
        use_distributed_optimizer=False,
        cpu=model.device == "cpu",
        moe_freeze_router=False,
    )


def _training(recipe: Recipe, phase: str, model: Policy, shape: Architecture, anchored: bool, head: bool) -> Memory:
    m = recipe.megatron if model.backend == "megatron" else one_device(model)
    layout = layout_of(m, trainers(recipe, model.backend))
    batch, worst = micro_batch(model, m), None
    engine: Engine = "local" if m.cpu or model.backend != "megatron" else "te"
    capability = GPUS[recipe.cluster.gpu].capability
    for stage in range(layout.pp):
        count = trained_parameters(shape, model, m, layout, stage, head)
        state = state_bytes(count, m, layout)
        running = activation_bytes(
            shape,
            m,
            layout,
            stage,
            batch,
            engine,
            layout.pp,
            recipe.plan.expert_imbalance,
            head=head,
            adapters=model.lora.enabled,
        )
        scored = forward_bytes(shape, m, layout, stage, batch, engine, recipe.plan.expert_imbalance)
        parts = {
            "weights": state.weights,
            "gradients": state.gradients,
            "optimizer state": state.optimizer,
            "FP8 copies of weights": fp8_copy_bytes(shape, m, layout, stage) if engine == "te" else 0,
            "workspaces of matrix products": workspace_bytes(shape, m, capability) if engine == "te" else 0,
            "or backward pass: activations kept": running.held,
            "or backward pass: one layer's, or logits": max(running.backward, running.logits),
            "or optimiser step": state.step,
            "or scoring": scored + (state.weights if anchored and not model.lora.enabled else 0),
        }
        if model.backend != "megatron":
            parts = _on_one_device(shape, model, parts, count.all, anchored, running)
        peak = _peak(parts)
        if worst is None or peak > worst[0]:
            worst = peak, parts, stage
    assert worst is not None
    peak, parts, stage = worst
    colocated = recipe.vllm.colocated and model.sampler == "vllm" and not recipe.vllm.sleep
    if colocated:
        share = recipe.vllm.gpu_memory_utilization * GPUS[recipe.cluster.gpu].memory_gib * GIB
        parts, peak = parts | {"vLLM beside it": int(share)}, peak + int(share)
    note = f"{batch.tokens:,} tokens a micro-batch"
    if layout.pp > 1:
        note += f"; pipeline stage {stage} of 0 to {layout.pp - 1}"
    return _memory(
        recipe, phase, layout_text(m, layout) if model.backend == "megatron" else "one GPU", parts, peak, note
    )


def trained_parameters(
    shape: Architecture, model: Policy, m: Megatron, layout: Layout, stage: int, head: bool
) -> Count:
    """One rank's parameters; with LoRA its weights are frozen, and adapters train."""
    count = stage_parameters(shape, m, layout, stage, head)
    if not model.lora.enabled or model.backend != "megatron":
        return count
    share = len(shape.layers) // layout.pp
    adapters = stage_adapters(shape, model.lora, layout.tp, range(stage * share, (stage + 1) * share))
    wide = shape.hidden_size + 1 if head and stage == layout.pp - 1 else 0
    return Count(dense=adapters, wide=wide, frozen=count.all - wide)


def _on_one_device(
    shape: Architecture, model: Policy, parts: dict[str, int], parameters: int, anchored: bool, running: Activations
) -> dict[str, int]:
    """The reference backend: weights, gradients and moments of one precision; adapters train alone where there are any."""
    size = WIDTH[model.dtype]
    trained = stage_adapters(shape, model.lora, 1, range(len(shape.layers))) if model.lora.enabled else parameters
    copies = 2 if anchored and not model.lora.enabled else 1
    return parts | {
        "weights": copies * size * parameters + (size * trained if model.lora.enabled else 0),
        "gradients": size * trained,
        "optimizer state": 2 * size * trained,
        "or backward pass: activations kept": running.held * size // 4,
        "or backward pass: one layer's, or logits": max(running.backward, running.logits) * size // 4,
        "or scoring": 0,
    }


def _peak(parts: dict[str, int]) -> int:
    """Of parts, those that begin with `or NAME` are moments; the parts of one moment are there together."""
    moments: dict[str, int] = {}
    for name, size in parts.items():
        if name.startswith("or "):
            moment = name.partition(":")[0]
            moments[moment] = moments.get(moment, 0) + size
    return sum(size for name, size in parts.items() if not name.startswith("or ")) + max(moments.values(), default=0)


def _memory(recipe: Recipe, phase: str, layout: str, parts: dict[str, int], peak: int, note: str) -> Memory:
    limit = GPUS[recipe.cluster.gpu].memory_gib - recipe.plan.reserve_gib
    return Memory(phase, layout, {k: v / GIB for k, v in parts.items() if v}, peak / GIB, limit, note)


def layout_text(m: Megatron, layout: Any) -> str:
    """`TP 8 SP CP 16 EP 8 DP 2`, without what is 1."""
    names = (("TP", layout.tp), ("PP", layout.pp), ("CP", layout.cp), ("EP", layout.ep), ("ETP", layout.etp))
    shown = [f"{name} {size}" for name, size in names if size > 1]
    shown += ["SP"] if m.sequence_parallel else []
    return " ".join([*shown, f"DP {layout.dp}"])


def rollouts(recipe: Recipe, shape: Architecture) -> Memory:
    """Memory of a GPU that generates."""
    policy, vllm = recipe.policy, recipe.vllm
    length = policy.max_total_sequence_length
    if policy.sampler == "backend":
        megatron = policy.backend == "megatron"
        tp = recipe.megatron.tensor_model_parallel_size if megatron else 1
        pp = recipe.megatron.pipeline_model_parallel_size if megatron else 1
        token, sequence = cache_bytes(shape, tp, 2 if policy.dtype == "bfloat16" or megatron else 4)
        rows = max(policy.generation.batch_tokens // length, 1)
        cache = (token * max(policy.generation.batch_tokens, length) + sequence * rows) // pp
        parts = trainer_state(recipe, policy, shape) | {"caches": cache}
        return _memory(recipe, "rollouts", "in the trainer", parts, _peak(parts), f"{rows} rows of {length:,} tokens")
    tp = vllm.tensor_parallel_size if not vllm.colocated else trainers(recipe, "megatron")
    found = engine(recipe, "rollouts", shape, tp, length, {}, WIDTH[engine_dtype(policy, recipe.megatron)])
    return (
        beside_trainer(found, recipe, sum(trainer_state(recipe, policy, shape).values())) if vllm.colocated else found
    )


def trainer_state(recipe: Recipe, policy: Policy, shape: Architecture) -> dict[str, int]:
    """Bytes of what the trainer keeps while rollouts run."""
    train = _training(recipe, "rollouts", policy, shape, False, False)
    return {k: int(v * GIB) for k, v in train.parts.items() if k in ("weights", "gradients", "optimizer state")}


def beside_trainer(found: Memory, recipe: Recipe, state: int) -> Memory:
    """A colocated engine takes its whole share of the GPU, also while the trainer's state lies in it."""
    memory = GPUS[recipe.cluster.gpu].memory_gib
    share, held = recipe.vllm.gpu_memory_utilization * memory, state / GIB
    parts = found.parts | {"vLLM's share beyond that": max(share - sum(found.parts.values()), 0.0)}
    found = replace(found, parts=parts | {"the trainer beside it": held}, peak=max(found.peak, share) + held)
    room = int(20 * (found.limit - held) / memory) / 20
    if found.fits or room <= 0:
        return found
    remedies = (*found.remedies, f"vllm.gpu_memory_utilization={room:g}: {room * memory + held:.1f} GiB")
    return replace(found, remedies=remedies)


def engine(
    recipe: Recipe, phase: str, shape: Architecture, tp: int, length: int, beside: dict[str, int], element: int
) -> Memory:
    """Memory of a GPU under vLLM, which takes all that it is given; what matters is how many sequences that holds. element: bytes
    of a weight and of a cached number."""
    share = recipe.vllm.gpu_memory_utilization * GPUS[recipe.cluster.gpu].memory_gib * GIB
    weights = model_bytes(shape, tp, element)
    token, sequence = cache_bytes(shape, tp, element)
    room = int(share) - weights - sum(beside.values()) - int(recipe.plan.reserve_gib * GIB / 2)
    whole = token * length + sequence
    fit = max(room, 0) // whole
    parts = {"weights": weights, **beside, "caches": max(min(room, whole * recipe.vllm.max_num_seqs), whole)}
    text = f"{fit} sequences of {length:,} tokens at a time on {tp} GPU{'s' if tp > 1 else ''}"
    found = _memory(recipe, phase, f"vLLM TP {tp}", parts, sum(parts.values()), text)
    if fit < 1:
        need = (weights + sum(beside.values()) + whole) / GIB + recipe.plan.reserve_gib / 2
        remedies = (
            f"vllm.tensor_parallel_size={2 * tp}, or vllm.gpu_memory_utilization up: one sequence needs {need:.1f} GiB",
        )
        return replace(found, peak=need, limit=share / GIB, remedies=remedies)
    return found


def scoring(recipe: Recipe, shape: Architecture) -> Memory:
    """The patient under its two faces: a forward pass, nothing kept."""
    patient, length = recipe.patient, recipe.patient.max_total_sequence_length
    if patient.backend == "vllm":
        return engine(recipe, "reward", shape, recipe.vllm.tensor_parallel_size, length, {}, WIDTH[patient.dtype])
    m = (
        recipe.megatron
        if patient.backend == "megatron"
        else replace(one_device(recipe.policy), bf16=patient.dtype == "bfloat16")
    )
    layout = layout_of(m, trainers(recipe, patient.backend))
    tokens = max(patient.batch_tokens, length)
    batch, worst = MicroBatch(tokens, length, tokens, patient.prefix_sharing), (0, {})
    for stage in range(layout.pp):
        weights = state_bytes(stage_parameters(shape, m, layout, stage), m, layout).weights
        running = forward_bytes(
            shape, m, layout, stage, batch, "local" if m.cpu else "te", recipe.plan.expert_imbalance
        )
        if weights + running > worst[0]:
            worst = weights + running, {"weights": weights, "forward pass": running}
    text = layout_text(m, layout) if patient.backend == "megatron" else "one GPU"
    found = _memory(recipe, "reward", text, worst[1], worst[0], f"{tokens:,} tokens a pass")
    remedy = "patient.backend=megatron or vllm over more GPUs"
    return found if found.fits else replace(found, remedies=(remedy,))


def steering(recipe: Recipe, patient: Architecture, doctor: Architecture) -> Memory:
    """The patient, its doctors and their references while they decode. In vLLM the first rank alone holds the doctors."""
    decode, length = recipe.decode, recipe.patient.max_total_sequence_length
    files = [doctor_files(d, decode.mode, f"decode.doctors.{name}") for name, d in decode.doctors.items()]
    adapters = {f.adapter for f in files if f.adapter}
    read = {(f.model, f.adapter) for f in files} | {(f.reference, "") for f in files if f.reference}
    read -= {(recipe.patient.model_name, "")}
    # a folder named twice is loaded once; the reference backend has each adapter in a copy of its base
    bases = {(f.model, "") for f in files if f.adapter} - {(recipe.patient.model_name, "")}
    models = len({folder for folder, _ in read} if recipe.patient.backend == "vllm" else read | bases)
    token, sequence = cache_bytes(doctor, 1)
    beside = {
        "doctors and references": models * model_bytes(doctor, 1) + sum(map(adapter_bytes, adapters)),
        "their caches": len(read) * (token * decode.batch_tokens + sequence * max(decode.batch_tokens // length, 1)),
    }
    if recipe.patient.backend == "vllm":
        return engine(
            recipe, "decode", patient, recipe.vllm.tensor_parallel_size, length, beside, WIDTH[recipe.patient.dtype]
        )
    size = 2 if recipe.patient.dtype == "bfloat16" else 4
    token, sequence = cache_bytes(patient, 1, size)
    rows = max(decode.batch_tokens // length, 1)
    parts = {"weights": model_bytes(patient, 1, size), **{k: v * size // 2 for k, v in beside.items()}}
    parts["caches"] = token * max(decode.batch_tokens, length) + sequence * rows
    found = _memory(recipe, "decode", "one GPU", parts, sum(parts.values()), f"{rows} rows of {length:,} tokens")
    return found if found.fits else replace(found, remedies=("patient.backend=vllm with vllm.tensor_parallel_size",))
