"""What `plan` says of a recipe's tokens, operations and GPU-hours, stage by stage, and of what they rest on.

Training counts every GPU of the recipe for as long as it lasts, those that wait included: rollouts and training take turns.
Profiling counts those that generate, for it can be a job of its own. Speeds are the hardware's peaks times the shares in the
recipe's `plan` section, until that holds a measured one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.atomic import open_input
from nemo_pivotrl.sizing.architecture import Architecture
from nemo_pivotrl.sizing.flops import active_parameters, cache_bytes, forward_flops, model_bytes

PUBLIC_SWEEP = 351.0
"""Rollouts a GPU-hour of the one pivot sweep whose rate is public (NVIDIA-NeMo/Gym, benchmarks, RATES.md): 16,540 GPU-hours
by its own estimate, which it calls optimistic."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, from NVIDIA's data sheets; the memory is what torch reports of it."""

    memory_gib: float
    tflops: float
    """Dense bfloat16, peak."""
    bandwidth: float
    """Bytes of memory a second, peak."""
    capability: tuple[int, int]


GPUS = {
    "a100": Gpu(79.1, 312, 2.0e12, (8, 0)),
    "h100": Gpu(79.1, 989, 3.35e12, (9, 0)),
    "h200": Gpu(139.8, 989, 4.8e12, (9, 0)),
    "b200": Gpu(178.4, 2250, 8.0e12, (10, 0)),
}


@dataclass(frozen=True, slots=True)
class Cost:
    """One stage. Counts are totals, or a step's where the number of steps is not known."""

    stage: str
    unit: str
    """What `figures` are of: `in all`, or `a step`."""
    gpu_hours: float
    figures: dict[str, float] = field(default_factory=dict)
    """By name, with its unit."""
    price: float | None = None


def trainers(recipe: Recipe, backend: str) -> int:
    """GPUs that train or score together."""
    cluster = recipe.cluster
    return max(cluster.num_nodes - cluster.generation_nodes, 0) * cluster.gpus_per_node if backend == "megatron" else 1


def all_gpus(recipe: Recipe) -> int:
    """GPUs that the recipe occupies."""
    if (
        recipe.policy.backend == "reference"
        and recipe.doctor.backend == "reference"
        and not recipe.cluster.generation_nodes
    ):
        megatron = recipe.patient.backend == "megatron" and recipe.algorithm == "llmdoctor"
        return recipe.cluster.num_nodes * recipe.cluster.gpus_per_node if megatron else 1
    return recipe.cluster.num_nodes * recipe.cluster.gpus_per_node


def generators(recipe: Recipe) -> int:
    """GPUs that make rollouts."""
    cluster = recipe.cluster
    if cluster.generation_nodes:
        return cluster.generation_nodes * cluster.gpus_per_node
    return trainers(recipe, recipe.policy.backend)


def lengths(recipe: Recipe) -> tuple[int, int]:
    """Mean tokens of a prompt and of an answer."""
    pivotrl = recipe.algorithm == "pivotrl"
    longest = (recipe.policy if pivotrl else recipe.patient).max_total_sequence_length
    answer = recipe.policy.generation.max_new_tokens if pivotrl else longest
    return recipe.plan.mean_prompt_tokens or longest // 4, recipe.plan.mean_response_tokens or answer // 4


def rollout_gpu_seconds(recipe: Recipe, a: Architecture, samples: float) -> float:
    """GPU-seconds of one rollout, where `samples` of them share a prompt that is read once.

    Reading is bound by operations, writing by the bytes that a step reads: weights (those of the experts that a batch
    meets) and caches of all rows.
    """
    plan, gpu = recipe.plan, GPUS[recipe.cluster.gpu]
    if plan.rollouts_per_gpu_hour:
        return 3600.0 / plan.rollouts_per_gpu_hour
    prompt, response = lengths(recipe)
    read = forward_flops(a, prompt, prompt / 2, 1) / (gpu.tflops * 1e12 * plan.prefill_mfu) / samples
    tp = recipe.vllm.tensor_parallel_size if recipe.policy.sampler == "vllm" else 1
    token, sequence = cache_bytes(a, tp)
    each = token * (prompt + response / 2) + sequence
    room = recipe.vllm.gpu_memory_utilization * gpu.memory_gib * 2**30 - model_bytes(a, tp)
    rows = max(1.0, min(recipe.vllm.max_num_seqs, room / (token * (prompt + response) + sequence)))
    whole, active = model_bytes(a, 1, 1), active_parameters(a)
    met = whole
    if a.moe is not None:
        met = active + (whole - active) * (1 - (1 - a.moe.top_k / a.moe.num_experts) ** rows)
    step = (2 * met / tp + rows * each) / (gpu.bandwidth * plan.decode_efficiency)
    return read + response * step * tp / rows


def step_tokens(recipe: Recipe) -> tuple[float, float]:
    """Tokens of one training step: every sample with its whole prompt, and with shared prefixes.

    Pivots of one trajectory have prompts that grow evenly, so that the longest is 2v / (v + 1) times their mean. A trunk
    runs once in each micro-batch that its branches need.
    """
    plan, grpo, policy = recipe.plan, recipe.grpo, recipe.policy
    prompt, response = lengths(recipe)
    naive = float(grpo.num_prompts_per_step * grpo.num_generations_per_prompt * (prompt + response))
    if not policy.prefix_sharing:
        return naive, naive
    together = min(plan.pivots_per_trajectory, grpo.num_prompts_per_step) if grpo.keep_together < 1 else 1
    trunk = min(prompt * 2 * together / (together + 1), policy.max_total_sequence_length)
    branches = together * grpo.num_generations_per_prompt * response
    room = max(policy.train_micro_batch_tokens - trunk, response)
    passes = math.ceil(branches / room)
    return naive, grpo.num_prompts_per_step / together * (passes * trunk + branches)


def pivotrl_costs(recipe: Recipe, a: Architecture) -> list[Cost]:
    """Profiling and training."""
    return [profiling(recipe, a), training_cost(recipe, a)]


def candidates(recipe: Recipe, artefact: str) -> int:
    """Rows of the run folder's artefact, or as many as the recipe says; 0: not known."""
    path = recipe.path(artefact)
    if recipe.plan.candidates or not path.exists():
        return recipe.plan.candidates
    with open_input(path) as rows:
        return max(sum(1 for _ in rows) - 1, 0)  # less the header


def rollout_share(recipe: Recipe) -> float:
    """Rollouts that profiling is expected to draw, over K a candidate."""
    settings = recipe.profile
    if recipe.plan.rollout_share or settings.curtail == "none":
        return recipe.plan.rollout_share or 1.0
    from nemo_pivotrl.algorithms.early_stopping import (
        expected_rollouts,  # brings torch: a second that a told share saves
        plan_of,
    )

    plan = plan_of(recipe.profile, recipe.select)
    share = expected_rollouts(plan, plan.prior) / settings.num_generations
    return share + settings.control_share * (1 - share)


def profiling(recipe: Recipe, a: Architecture) -> Cost:
    """K rollouts a candidate, or the share of them that is run until its fate is known."""
    k, (prompt, response) = recipe.profile.num_generations, lengths(recipe)
    number = candidates(recipe, "candidates.jsonl")
    if recipe.profile.limit and number:
        number = min(number, recipe.profile.limit)
    unit, number = ("in all", number) if number else ("of 1,000 candidates", 1000)
    most = number * k
    share = rollout_share(recipe)
    rollouts = most * share
    hours = rollouts * rollout_gpu_seconds(recipe, a, k * share) / 3600
    return Cost(
        "profile",
        unit,
        hours,
        {
            "candidates": number,
            "rollouts at most": most,
            "rollouts expected": rollouts,
            "prompt tokens, each prompt once": float(number * prompt),
            "prompt tokens, once a rollout": rollouts * prompt,
            "tokens generated": rollouts * response,
            "rollouts a GPU-hour": rollouts / hours if hours else math.inf,
            f"GPU-hours at the public sweep's {PUBLIC_SWEEP:.0f} rollouts a GPU-hour": rollouts / PUBLIC_SWEEP,
        },
        priced(recipe, hours),
    )


def training_cost(recipe: Recipe, a: Architecture) -> Cost:
    """A step's rollouts and its passes over their tokens, and as many steps as the recipe says."""
    plan, grpo, loss, gpu = recipe.plan, recipe.grpo, recipe.loss_fn, GPUS[recipe.cluster.gpu]
    (naive, shared), (prompt, response) = step_tokens(recipe), lengths(recipe)
    rows = grpo.num_prompts_per_step * grpo.num_generations_per_prompt
    forward = forward_flops(a, shared, prompt / 2, rows * response)
    old = grpo.num_minibatches > 1 or loss.use_importance_sampling_correction or loss.seq_logprob_error_threshold
    again = recipe.policy.backend == "megatron" and recipe.megatron.recompute == "full"
    passes = 3 + bool(again) + bool(old or loss.max_sampler_mismatch) + (loss.reference_policy_kl_penalty > 0)
    world = trainers(recipe, recipe.policy.backend)
    seconds = passes * forward / (world * gpu.tflops * 1e12 * plan.train_mfu)
    sampled = rows * rollout_gpu_seconds(recipe, a, grpo.num_generations_per_prompt) / generators(recipe)
    steps = grpo.max_num_steps if grpo.max_num_steps > 0 else 1
    hours = steps * (seconds + sampled) * all_gpus(recipe) / 3600
    unit = f"in all {steps} steps" if grpo.max_num_steps > 0 else "a step"
    return Cost(
        "train",
        unit,
        hours,
        {
            "samples a step": rows,
            "tokens a step, every sample whole": naive,
            "tokens a step, prefixes shared": shared,
            "times fewer": naive / shared,
            "PFLOP a step": passes * forward / 1e15,
            "seconds a step of training": seconds,
            "seconds a step of rollouts": sampled,
        },
        priced(recipe, hours),
    )


def llmdoctor_costs(recipe: Recipe, patient: Architecture, doctor: Architecture) -> list[Cost]:
    """Scoring both answers of every pair under two faces, and training the doctor on them."""
    plan, gpu = recipe.plan, GPUS[recipe.cluster.gpu]
    pairs = candidates(recipe, "preferences.jsonl")
    unit, pairs = ("in all", pairs) if pairs else ("of 1,000 pairs", 1000)
    prompt, response = lengths(recipe)
    once = prompt + 2 * response if recipe.patient.prefix_sharing else 2 * (prompt + response)
    keys = (prompt + response) / 2
    scored = forward_flops(patient, 2 * pairs * once, keys, 4 * pairs * response)
    hours = scored / (gpu.tflops * 1e12 * plan.prefill_mfu) / 3600
    reward = Cost(
        "reward",
        unit,
        hours,
        {"pairs": pairs, "tokens": float(2 * pairs * once), "PFLOP": scored / 1e15},
        priced(recipe, hours),
    )
    t = recipe.tfpo
    drawn = t.max_num_steps * t.pairs_per_step if t.max_num_steps > 0 else t.max_num_epochs * pairs
    once = prompt + 2 * response if recipe.doctor.prefix_sharing else 2 * (prompt + response)
    forward = forward_flops(doctor, drawn * once, keys, 2 * drawn * response)
    again = recipe.doctor.backend == "megatron" and recipe.megatron.recompute == "full"
    work = (3 + (t.anchor == "reference") + again) * forward
    doctors = max(len(recipe.preferences.objectives), 1)
    hours = doctors * work / (gpu.tflops * 1e12 * plan.train_mfu) / 3600
    figures = {"doctors": doctors, "pairs each": drawn, "tokens each": float(drawn * once), "PFLOP each": work / 1e15}
    return [reward, Cost("tfpo", "in all" if t.max_num_steps > 0 else unit, hours, figures, priced(recipe, hours))]


def priced(recipe: Recipe, hours: float) -> float | None:
    """What so many GPU-hours cost; None: the recipe names no price."""
    return hours * recipe.plan.gpu_hour_price if recipe.plan.gpu_hour_price else None


def assumptions(recipe: Recipe) -> dict[str, float]:
    """What the figures rest on, by the setting that changes it."""
    p = recipe.plan
    prompt, response = lengths(recipe)
    named = ("pivots_per_trajectory", "expert_imbalance", "reserve_gib", "train_mfu", "prefill_mfu")
    named += ("decode_efficiency", "rollouts_per_gpu_hour")
    found = {"plan.mean_prompt_tokens": prompt, "plan.mean_response_tokens": response}
    found |= {f"plan.{name}": getattr(p, name) for name in named}
    return found | ({"plan.rollout_share": rollout_share(recipe)} if recipe.algorithm == "pivotrl" else {})
