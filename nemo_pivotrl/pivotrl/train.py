"""train: pivots -> a better policy, by single-turn GRPO (Algorithm 1, step 3).

A step: draw pivots, sample G turns of each from the current policy, verify, group advantages, one optimiser step.
Which pivots and which seeds a step uses follows from its number alone, so a run that was killed resumes from its last
checkpoint and ends with the same bytes.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_pivotrl.algorithms import pivotrl, round_rules as rounds, selection
from nemo_pivotrl.algorithms.prefix_tree import prompt_saving
from nemo_pivotrl.backends import loading
from nemo_pivotrl.backends.base import Backend, Sampler, TokenBatch
from nemo_pivotrl.backends.identity import identity_of, policy_revision
from nemo_pivotrl.components.conclusions import conclude, training_checks
from nemo_pivotrl.components.costs import CountingSampler
from nemo_pivotrl.components.lineage import check_headers, check_lineage
from nemo_pivotrl.components.loop import Job, Step, run
from nemo_pivotrl.components.metrics import read_metrics
from nemo_pivotrl.components.model_card import write_card
from nemo_pivotrl.components.progress import steps_of
from nemo_pivotrl.components.rollout import (
    Rollout,
    fits,
    load_chat,
    load_recipe_verifier,
    roll_out,
    sample_seed,
    sampling,
)
from nemo_pivotrl.components.stage_checks import held_out_checks
from nemo_pivotrl.config import Grpo, LossFn, Policy, Recipe
from nemo_pivotrl.core.artifacts import digest, file_digest, read_header, read_rows
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.core.lock import one_writer
from nemo_pivotrl.core.told_settings import difference
from nemo_pivotrl.core.types import Split
from nemo_pivotrl.data.chat_template import Chat
from nemo_pivotrl.data.states import Row, open_states
from nemo_pivotrl.pivotrl.monitor import Monitor, State, padded, rendered_state, rollout_metrics
from nemo_pivotrl.verifiers.base import Bounded, Verifier

Until = Callable[[Sequence[rounds.Row]], rounds.Ending | None]
"""Asked after every step: may training go on? It is given all metrics of the round, step 0 included."""
DECIDING = ("grpo", "policy", "loss_fn", "verifier", "checkpointing.save_period", "megatron")
"""Settings that decide what training makes: its checkpoints tell them."""
CARD_NUMBERS = {
    "val/accuracy": "accuracy on held-out turns",
    "val/kl": "KL to the start policy, nats a token",
    "reward": "mean reward on pivots",
    "retention/accuracy": "out of domain",
}
"""Metrics that the model card shows, and what they are."""
FLAT_STEPS = 3
"""After so many steps without a gradient a training warns at once, and not at its end alone."""
MEASURED = 8
"""Trajectories of which it is measured how far their prompts begin alike."""


@one_writer
def train(recipe: Recipe, fresh: bool = False, until: Until | None = None) -> Path:
    """Train on the pivot set; returns the final policy's folder (HF). Raises InputError for headers that do not match.

    `until` ends the training before its last step; without it the out-of-domain score does, where it is measured.

    >>> folder = train(load_recipe("recipe.yaml", ["grpo.max_num_steps=1"]))
    >>> (folder / "model.safetensors").exists()
    True
    """
    settings, source = recipe.grpo, recipe.path(recipe.grpo.pivots)
    chat = load_chat(recipe.policy, recipe.verifier.limits)
    verifier, verifier_id = load_recipe_verifier(recipe)
    _check(recipe, source, chat, verifier_id)
    pivots = _fitting(source, "train", recipe.policy)
    if not pivots:
        raise InputError(
            Problem(str(source), None, "pivots", "none fits the context", "raise policy.max_total_sequence_length")
        )
    job = Job(
        recipe=recipe,
        stage="train",
        name=settings.name,
        cost_name=f"train {settings.name}",
        identity=_identity(recipe, source),
        settings=recipe.told(*DECIDING, but=("grpo.max_num_steps", "grpo.max_num_epochs", "verifier.judge.cache")),
        chat=chat,
        steps=steps_of(settings.max_num_steps, settings.max_num_epochs, len(pivots), settings.num_prompts_per_step),
        steps_field="grpo.max_num_steps",
        checkpointing=recipe.checkpointing,
        shown=("reward", "mixed_group_share"),
        ended=until or partial(rounds.retention_lost, loop=recipe.loop),
    )
    folder = run(job, lambda cost: PolicyTraining(recipe, chat, verifier, pivots, cost), fresh)
    rows = read_metrics(recipe.path(settings.name) / "metrics.jsonl")
    checks = training_checks(rows) + held_out_checks(rows)
    conclude(Path(recipe.run_dir), f"train {settings.name}", checks)
    facts = [f"{len(pivots):,} pivots of the start policy, judged by `{verifier_id}`", f"seed {recipe.seed}"]
    write_card(folder, recipe, "policy", facts, CARD_NUMBERS, checks)
    print(f"policy: {folder}")
    return folder


class PolicyTraining:
    """A policy in training on pivots (`components.loop.Work`)."""

    def __init__(self, recipe: Recipe, chat: Chat, verifier: Bounded, pivots: Sequence[Row], cost: dict[str, Any]):
        settings = recipe.grpo
        source = recipe.path(settings.pivots)
        states = open_states(source)
        self.render = partial(rendered_state, states, chat)
        rows = _fitting(source, "validation", recipe.policy)
        rows.sort(key=lambda row: selection.order_key(recipe.seed, row["candidate_id"]))
        judged = (row for row in rows if not verifier.excludes(states.candidate(row).case))
        held_out = [self.render(row) for row in islice(judged, settings.val_candidates)]
        anchored = recipe.loss_fn.reference_policy_kl_penalty > 0 or settings.val_kl
        self.recipe, self.chat, self.verifier, self.pivots, self.cost = recipe, chat, verifier, pivots, cost
        share = settings.keep_together if recipe.policy.prefix_sharing else 1.0
        self.units = together(pivots, share, self.render, recipe.seed)
        self.trainer = loading.load(recipe.policy, recipe.megatron, recipe.vllm, reference=anchored)
        self.trainer.prepare_for_training(recipe.policy.optimizer)
        self.monitor = Monitor(recipe, self.trainer, chat, verifier, held_out)
        self.meter = CountingSampler(self.trainer, cost)
        """Of the step that runs."""
        self.flat = 0
        """Steps without any gradient, one after another."""

    def step(self, number: int) -> Step:
        """Sample, judge and update. Every sample of the step is counted in its row, those of its validations too."""
        self.meter = CountingSampler(self.trainer, self.cost)
        drawn = [self.render(row) for row in _draw(self.pivots, self.units, number, self.recipe)]
        metrics, timing = _step(self.recipe, number, drawn, self.trainer, self.meter, self.chat, self.verifier)
        self.flat = 0 if metrics["mixed_group_share"] else self.flat + 1
        if self.flat == FLAT_STEPS:
            print(
                f"WARN  step {number}: {FLAT_STEPS} steps without a group of unequal rewards: nothing is learned (mean reward "
                f"{metrics['reward']:.3f}, truncated {metrics['truncated_share']:.0%}, malformed {metrics['malformed_share']:.0%})"
            )
        return Step(metrics | self.meter.costs(), {"tokens_trained": round(metrics["tokens_trained"])}, timing)

    def validate(self, step: int, last: bool, known: rounds.Row) -> dict[str, float]:
        """What `Monitor` finds due, with what the step has cost by then."""
        found = self.monitor.measure(self.meter, step, last, known)
        return found | self.meter.costs() if found else {}


def _check(recipe: Recipe, source: Path, chat: Chat, verifier_id: str) -> None:
    """Pivots must come from this policy, tokenizer, template and verifier (R1, R6, R7; P11)."""
    found = read_header(source, "pivots")
    check_headers(
        source,
        found,
        recipe.told("policy", "verifier"),
        policy=policy_revision(recipe.policy.model_name),
        tokenizer=chat.fingerprint,
        chat_template=chat.template_digest,
        verifier=verifier_id,
    )
    check_lineage(recipe, source, found)
    generation = recipe.policy.generation
    problems = []
    if found.extra["sampling"] != sampling(generation):
        named = difference(found.extra["sampling"], sampling(generation))
        profiled = f"profiled with others: {named}"
        problems.append(
            (
                "policy.generation",
                sampling(generation),
                f"{profiled}; a pivot is one only as it was sampled (docs/algorithms.md, P5)",
            )
        )
    if generation.top_p < 1.0:
        problems.append(
            (
                "policy.generation.top_p",
                generation.top_p,
                "training samples with top_p 1.0: a cut distribution biases the ratio",
            )
        )
    if generation.temperature == 0.0:
        problems.append(
            ("policy.generation.temperature", 0.0, "training needs temperature > 0: equal samples have no advantage")
        )
    if recipe.grpo.num_minibatches > recipe.grpo.num_prompts_per_step:
        problems.append(("grpo.num_minibatches", recipe.grpo.num_minibatches, "use at most grpo.num_prompts_per_step"))
    if recipe.loop.retention_period and recipe.evaluate.retention == "none":
        remedy = "name an out-of-domain set in evaluate.retention"
        problems.append(("loop.retention_period", recipe.loop.retention_period, remedy))
    if problems:
        raise InputError([Problem("recipe", None, name, str(value), remedy) for name, value, remedy in problems])


def _identity(recipe: Recipe, source: Path) -> str:
    """What a checkpoint belongs to: pivots and every setting that changes training, but not how long it runs."""
    grpo = dataclasses.asdict(recipe.grpo) | {"max_num_steps": None, "max_num_epochs": None}
    policy = dataclasses.asdict(recipe.policy) | {
        "model_name": policy_revision(recipe.policy.model_name)
    }  # wherever it lies
    verifier = dataclasses.asdict(recipe.verifier)
    verifier["judge"]["cache"] = ""  # so that a run may be moved
    parts = [policy, dataclasses.asdict(recipe.loss_fn), verifier]
    computed = identity_of(recipe.policy, recipe.megatron)
    parts += [computed] if computed else []
    return digest([recipe.seed, grpo, parts, recipe.checkpointing.save_period, file_digest(source)])


def _fitting(source: Path, split: Split, policy: Policy) -> list[Row]:
    """The rows of a split whose prompt, as it was profiled, leaves room for a turn; the others are counted."""
    rows = [row for row in read_rows(source) if row["split"] == split]
    kept = [row for row in rows if fits(row["tokens_prompt"], policy)]
    if len(kept) < len(rows):
        print(f"excluded: {len(rows) - len(kept)} of {len(rows)} states, context_overflow")
    return kept


def _draw(pivots: Sequence[Row], units: Sequence[str], step: int, recipe: Recipe) -> list[Row]:
    """The pivots of a step: consecutive places in an endless run of epochs, each in its own random order.

    units: of each pivot what it is drawn with (`together`); a trajectory's pivots may follow each other. Every pivot is drawn once
    an epoch either way; what changes is which ones share a step: fewer trajectories a step, hence a noisier gradient.
    """
    size = recipe.grpo.num_prompts_per_step
    members = _units(tuple(row["candidate_id"] for row in pivots), tuple(units))
    return [
        pivots[_epoch(members, recipe.seed, place // len(pivots))[place % len(pivots)]]
        for place in range((step - 1) * size, step * size)
    ]


def together(pivots: Sequence[Row], share: float, render: Callable[[Row], State], seed: int) -> list[str]:
    """Of each pivot, what it is drawn with: its trajectory where that saves more than `share` of the tokens, else itself.

    Prompts of a trajectory begin alike, unless the template rewrites earlier turns: how far they do is measured on the two longest
    of a few trajectories, and what a trajectory saves follows from its prompts' lengths.
    """
    of: dict[str, list[Row]] = {}
    for row in pivots if share < 1.0 else ():
        of.setdefault(row["trajectory_id"], []).append(row)
    several = {name: sorted(rows, key=_tokens) for name, rows in of.items() if len(rows) > 1}
    alike = []
    for name in sorted(several, key=lambda name: selection.order_key(seed, name))[:MEASURED]:
        prompts = [render(row).prompt for row in several[name][-2:]]
        alike.append(prompt_saving(prompts) * sum(map(len, prompts)) / min(map(len, prompts)))
    saved = {
        name: statistics.fmean(alike) * (1 - _tokens(rows[-1]) / sum(map(_tokens, rows)))
        for name, rows in several.items()
    }
    return [
        f"trajectory {name}" if saved.get(name := row["trajectory_id"], 0.0) > share else row["candidate_id"]
        for row in pivots
    ]


def _tokens(row: Row) -> int:
    return int(row["tokens_prompt"])


@lru_cache(maxsize=4)
def _units(ids: tuple[str, ...], units: tuple[str, ...]) -> tuple[tuple[str, tuple[tuple[str, int], ...]], ...]:
    """(name, its pivots' ids and numbers) of each unit that is drawn whole."""
    of: dict[str, list[tuple[str, int]]] = {}
    for number, (own, unit) in enumerate(zip(ids, units, strict=True)):
        of.setdefault(unit, []).append((own, number))
    return tuple((name, tuple(members)) for name, members in of.items())


@lru_cache(maxsize=4)
def _epoch(units: tuple[tuple[str, tuple[tuple[str, int], ...]], ...], seed: int, epoch: int) -> list[int]:
    def key(named: tuple[str, object]) -> str:
        return selection.order_key(seed, f"{epoch} {named[0]}")

    return [number for _, members in sorted(units, key=key) for _, number in sorted(members, key=key)]


def _step(
    recipe: Recipe,
    step: int,
    drawn: Sequence[State],
    backend: Backend,
    sampler: Sampler,
    chat: Chat,
    verifier: Verifier,
) -> tuple[dict[str, float], dict[str, float]]:
    """One training step: (metrics, timing)."""
    settings, started = recipe.grpo, time.perf_counter()
    seeds = [
        [sample_seed("train", recipe.rollout_seed, step, i, k) for k in range(settings.num_generations_per_prompt)]
        for i in range(len(drawn))
    ]
    groups = roll_out(
        sampler,
        chat,
        verifier,
        [s.candidate for s in drawn],
        [s.prompt for s in drawn],
        seeds,
        recipe.policy.generation,
        settings.max_retries,
    )
    sampled = time.perf_counter()
    rewards = torch.tensor([[r.verdict.reward if r.verdict else 0.0 for r in group] for group in groups])
    valid = torch.tensor([[_counts(r, settings) for r in group] for group in groups])
    advantages = pivotrl.group_advantages(
        rewards,
        valid,
        settings.use_leave_one_out_baseline,
        settings.normalize_rewards,
        settings.zero_variance_tolerance,
        clip=settings.advantage_clip,
    )
    if settings.malformed_action_advantage is not None:
        malformed = torch.tensor([[r.action.kind == "malformed" for r in group] for group in groups])
        advantages = torch.where(
            malformed & valid, torch.full_like(advantages, settings.malformed_action_advantage), advantages
        )
    metrics = rollout_metrics(drawn, groups, rewards, valid, settings.zero_variance_tolerance)
    _check_failures(metrics["failed"] / rewards.numel(), step, settings)
    cuts = [round(i * len(drawn) / settings.num_minibatches) for i in range(settings.num_minibatches + 1)]
    # old log-probabilities belong to the policy that sampled, so all of them precede the first update
    minibatches = [
        _minibatch(recipe, drawn[i:j], groups[i:j], advantages[i:j], valid[i:j], backend) for i, j in pairwise(cuts)
    ]
    metrics["tokens_trained"] = float(sum(sum(map(len, m.batch.responses)) for m in minibatches if m.batch))
    apart = [m.apart for m in minibatches if m.apart is not None]
    metrics |= {"sampler_masked": float(sum(m.masked for m in minibatches))} if apart else {}
    _check_mismatch(apart, step, recipe.loss_fn)
    parts = [_update(recipe, minibatch, backend) for minibatch in minibatches]
    metrics |= {
        key: statistics.fmean(p[key] for p in parts if key in p) for key in sorted({key for p in parts for key in p})
    }
    tokens = sum(len(r.sample.token_ids) for group in groups for r in group)
    ended = time.perf_counter()
    timing = {
        "seconds": ended - started,
        "seconds_sampling": sampled - started,
        "tokens_per_second": tokens / (ended - started),
    }
    return metrics, timing


def _check_failures(share: float, step: int, settings: Grpo) -> None:
    """Stop when too many samples could not be judged; the last checkpoint remains, and the step repeats on resume."""
    if share > settings.max_failure_share:
        found = f"{share:.1%} of the samples of step {step} could not be judged"
        raise InputError(
            Problem(
                "verifier", None, "grpo.max_failure_share", found, "mend the verifier, then run the same command again"
            )
        )


def _counts(rollout: Rollout, settings: Grpo) -> bool:
    """Whether a sample takes part in statistics and loss."""
    return rollout.verdict is not None and not (
        settings.overlong_filtering and rollout.sample.finish_reason == "length"
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Minibatch:
    """What one optimiser step is given."""

    batch: TokenBatch | None
    """None when no row has a gradient."""
    normaliser: float
    """Global: of all rows that count."""
    share: float
    """Of the rows that count, those in the batch."""
    masked: int = 0
    """Rows that do not count, since trainer and sampler disagree on them."""
    apart: tuple[float, float] | None = None
    """Sum of |old-policy minus sampler log-probability| (nats), and tokens; None where nobody asked."""


def _check_mismatch(apart: Sequence[tuple[float, float]], step: int, loss_fn: LossFn) -> None:
    """Stop before an update by samples of another policy."""
    mean = sum(total for total, _ in apart) / max(1.0, sum(tokens for _, tokens in apart))
    if loss_fn.max_sampler_mismatch is not None and not mean <= loss_fn.max_sampler_mismatch:
        found = f"{mean:.4f} nats a token between trainer and sampler at step {step}"
        remedy = f"at most {loss_fn.max_sampler_mismatch} is allowed: look at the refit, the precisions and the sampling settings"
        raise InputError(Problem("sampler", None, "loss_fn.max_sampler_mismatch", found, remedy))


def _minibatch(
    recipe: Recipe,
    drawn: Sequence[State],
    groups: Sequence[Sequence[Rollout]],
    advantages: Tensor,
    valid: Tensor,
    backend: Backend,
) -> Minibatch:
    """Everything of one optimiser step that belongs to the policy that sampled.

    Rows without gradient (advantage 0, no KL) are counted in the normaliser and not computed: their gradient is exactly
    zero (Proposition 3.1), and on random turns they are most of the batch. Rows on which the sampler disagrees with the trainer
    are not counted; their rewards took part in the group's statistics.
    """
    loss_fn = recipe.loss_fn
    beta, threshold = loss_fn.reference_policy_kl_penalty, loss_fn.seq_logprob_error_threshold
    counted = [(i, k) for i, group in enumerate(groups) for k in range(len(group)) if valid[i, k]]
    rows = [(i, k) for i, k in counted if beta > 0 or advantages[i, k] != 0]
    batch = _token_batch(drawn, groups, advantages, rows) if rows else None
    gated = threshold is not None or loss_fn.max_sampler_mismatch is not None
    apart, masked = None, 0
    if batch is not None and (recipe.grpo.num_minibatches > 1 or loss_fn.use_importance_sampling_correction or gated):
        batch.data["old"] = backend.get_inference_log_probs(batch)
    if batch is not None and gated:
        old, sampler, mask = (batch.data[key] for key in ("old", "sampler", "mask"))
        apart = (float(((old - sampler).abs() * mask).sum()), float(mask.sum()))
        bad = pivotrl.sequence_error(old, sampler, mask) > (math.inf if threshold is None else threshold)
        dropped = {row for row, is_bad in zip(rows, bad.tolist(), strict=True) if is_bad}
        masked, counted = len(dropped), [row for row in counted if row not in dropped]
        batch = _kept(batch, (~bad).nonzero()[:, 0].tolist())
        rows = [row for row in rows if row not in dropped]
    tokens = sum(len(groups[i][k].sample.token_ids) for i, k in counted)
    normaliser = float(max(1, tokens if loss_fn.token_level_loss else len(counted)))
    return Minibatch(batch, normaliser, len(rows) / len(counted) if rows else 0.0, masked, apart)


def _token_batch(
    drawn: Sequence[State], groups: Sequence[Sequence[Rollout]], advantages: Tensor, rows: Sequence[tuple[int, int]]
) -> TokenBatch:
    samples = [groups[i][k].sample for i, k in rows]
    data = {
        "advantages": torch.stack([advantages[i, k] for i, k in rows]),
        "mask": padded([[1.0] * len(s.token_ids) for s in samples]),
        "sampler": padded([s.log_probs for s in samples]),
    }
    return TokenBatch([s.prompt for s in drawn], [i for i, _ in rows], [s.token_ids for s in samples], data)


def _kept(batch: TokenBatch, rows: Sequence[int]) -> TokenBatch | None:
    """The batch's rows at these places; None when there are none."""
    if not rows:
        return None
    responses = [batch.responses[n] for n in rows]
    width = max(map(len, responses))
    data = {k: v[list(rows)][:, :width] if v.dim() > 1 else v[list(rows)] for k, v in batch.data.items()}
    return TokenBatch(batch.prompts, [batch.prompt_of[n] for n in rows], responses, data)


def _update(recipe: Recipe, minibatch: Minibatch, backend: Backend) -> dict[str, float]:
    """One optimiser step."""
    batch, normaliser, settings = minibatch.batch, minibatch.normaliser, recipe.loss_fn
    backend.prepare_for_training_step()
    totals: dict[str, float] = {}
    if batch is not None:
        loss_fn = partial(pivotrl.policy_loss, settings=settings, normaliser=normaliser)
        anchored = settings.reference_policy_kl_penalty > 0
        totals = backend.get_loss_and_metrics(batch, loss_fn, reference=anchored)
        # the loss is a mean over all counted tokens; what is measured on computed rows is a mean over those
        computed = float(batch.data["mask"].sum()) if settings.token_level_loss else float(len(batch.responses))
        whole = ("loss", "token_ratio")
        totals = {k: v if k in whole else v * normaliser / computed for k, v in totals.items()}
    return {"trained_share": minibatch.share} | totals | backend.finish_training_step()
