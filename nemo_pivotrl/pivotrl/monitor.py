"""What training measures on the way: its rollouts, held-out states, the out-of-domain set, and what all of that cost."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nemo_pivotrl.algorithms import pivotrl, round_rules as rounds, selection
from nemo_pivotrl.backends.base import Backend, Sampler, TokenBatch
from nemo_pivotrl.components.rollout import Rollout, first_fitting, roll_out, sample_seed
from nemo_pivotrl.components.statistics import bootstrap
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.artifacts import (
    Header,
    digest,
    file_digest,
    header_difference,
    read_header,
    read_rows,
    write_artefact,
)
from nemo_pivotrl.core.errors import InputError, Problem, UnrenderableState
from nemo_pivotrl.core.types import Candidate
from nemo_pivotrl.data.chat_template import Chat
from nemo_pivotrl.data.states import Row, States, candidates_of
from nemo_pivotrl.pivotrl import evaluate
from nemo_pivotrl.pivotrl.validation import whole_tasks
from nemo_pivotrl.verifiers.base import Bounded, Verifier

BASELINE = "retention.jsonl"
"""The start policy's out-of-domain scores, in the run directory; a later round's folder has it too."""


@dataclasses.dataclass(frozen=True, slots=True)
class State:
    """A candidate with its rendered prompt."""

    candidate: Candidate
    prompt: list[int]


def rendered_state(states: States, chat: Chat, row: Row) -> State:
    """A row's state, rendered. Raises InputError where the template refuses what it rendered for the profile."""
    candidate = states.candidate(row)
    try:
        return State(candidate, chat.prompt_ids(candidate.messages, candidate.tools))
    except UnrenderableState as error:
        place, found = f"candidate {candidate.candidate_id}", f"{error.kind}: {error.found}"
        remedy = "train with the profile's policy.chat, or run profile and select again"
        raise InputError(Problem(str(states.artefact), None, place, found, remedy)) from error


def held_out_states(recipe: Recipe, source: Path, chat: Chat, verifier: Bounded) -> list[State]:
    """`grpo.val_candidates` of the held-out states in `source`, by hash, for a fine-tuning that validates on them.

    Those that cannot be rendered are counted and left out, as those that do not fit the context.
    """
    found = [c for c in candidates_of(source, "validation") if not verifier.excludes(c.case)]
    found.sort(key=lambda c: selection.order_key(recipe.seed, c.candidate_id))
    chosen = first_fitting(found, recipe.grpo.val_candidates, chat, recipe.policy, source)
    return [State(candidate, prompt) for candidate, prompt in chosen]


@dataclasses.dataclass(frozen=True, slots=True)
class Monitor:
    """What is measured at a step besides its own rollouts."""

    recipe: Recipe
    backend: Backend
    chat: Chat
    verifier: Verifier
    held_out: Sequence[State]

    def measure(self, sampler: Sampler, step: int, last: bool, known: rounds.Row) -> dict[str, float]:
        """The metrics that are due after `step` and not `known` yet: all of them after the last step and before the first."""
        grpo, loop = self.recipe.grpo, self.recipe.loop
        ends = last or step == 0
        retains = loop.retention_period > 0 and (ends or step % loop.retention_period == 0)
        found: dict[str, float] = {}
        validates = grpo.val_period > 0 and bool(self.held_out) and (ends or retains or step % grpo.val_period == 0)
        if validates and "val/accuracy" not in known:
            found |= validate(self.recipe, self.backend, sampler, self.chat, self.verifier, self.held_out)
        if retains and "retention/change" not in known:
            found |= retention(self.recipe, sampler, self.chat, step)
        return found | whole_tasks(self.recipe, sampler, self.chat, step, last, known)


def rollout_metrics(
    drawn: Sequence[State], groups: Sequence[Sequence[Rollout]], rewards: Tensor, valid: Tensor, tolerance: float
) -> dict[str, float]:
    """What a batch of rollouts shows: reward, signal, lengths, failures. Failed samples count nowhere but in `failed`."""
    flat = [r for group in groups for r in group]
    judged = [r for r in flat if r.verdict is not None]
    spans, stds = [], []
    for row, ok in zip(rewards, valid, strict=True):
        kept = row[ok].tolist()
        spans.append(max(kept) - min(kept) if len(kept) > 1 else 0.0)
        stds.append(statistics.pstdev(kept) if kept else 0.0)
    talking = [
        r
        for s, group in zip(drawn, groups, strict=True)
        if s.candidate.expected.kind == "message"
        for r in group
        if r.verdict
    ]
    tokens = [len(r.sample.token_ids) for r in judged]
    mean = statistics.fmean
    metrics = {
        "reward": mean([r.verdict.reward for r in judged if r.verdict]) if judged else 0.0,
        "reward_std": mean(stds),
        "mixed_group_share": mean([float(span > tolerance) for span in spans]),
        "entropy": -sum(sum(r.sample.log_probs) for r in judged) / max(1, sum(tokens)),
        "response_tokens": mean(tokens) if tokens else 0.0,
        "truncated_share": mean([float(r.sample.finish_reason == "length") for r in flat]),
        "malformed_share": mean([float(r.action.kind == "malformed") for r in flat]),
        "failed": float(len(flat) - len(judged)),
        "message_share": mean([float(s.candidate.expected.kind == "message") for s in drawn]),
    }
    if talking:
        metrics["message_reward"] = mean([r.verdict.reward for r in talking if r.verdict])
    return metrics


def validate(
    recipe: Recipe,
    backend: Backend,
    sampler: Sampler,
    chat: Chat,
    verifier: Verifier,
    held_out: Sequence[State],
) -> dict[str, float]:
    """Mean verified reward on held-out states, with the same seeds every time so that only the policy changes."""
    seeds = [
        [
            sample_seed("validation", recipe.seed, s.candidate.candidate_id, k)
            for k in range(recipe.grpo.val_generations)
        ]
        for s in held_out
    ]
    groups = roll_out(
        sampler,
        chat,
        verifier,
        [s.candidate for s in held_out],
        [s.prompt for s in held_out],
        seeds,
        recipe.policy.generation,
        recipe.grpo.max_retries,
    )
    scored = [r.verdict.reward for group in groups for r in group if r.verdict]
    if not scored:
        raise InputError(
            Problem(
                "validation", None, "verifier", "every held-out sample failed", "mend the verifier before training on"
            )
        )
    failed = sum(r.verdict is None for group in groups for r in group)
    metrics = {"val/accuracy": statistics.fmean(scored), "val/failed": float(failed)}
    if recipe.grpo.val_kl:
        samples = [r.sample for group in groups for r in group if r.sample.token_ids]  # a lost turn has none
        prompt_of = [i for i, group in enumerate(groups) for r in group if r.sample.token_ids]
        batch = TokenBatch([s.prompt for s in held_out], prompt_of, [s.token_ids for s in samples], {})
        start = backend.get_inference_log_probs(batch, reference=True)
        apart = pivotrl.kl_k3(padded([s.log_probs for s in samples]), start)
        metrics["val/kl"] = float(apart.sum()) / sum(len(s.token_ids) for s in samples)
    return metrics


def padded(rows: Sequence[Sequence[float]]) -> Tensor:
    """Rows of any length as [N, longest], 0 behind their ends."""
    width = max(len(r) for r in rows)
    return torch.tensor([[*r, *[0.0] * (width - len(r))] for r in rows])


def retention(recipe: Recipe, sampler: Sampler, chat: Chat, step: int) -> dict[str, float]:
    """The out-of-domain score of the policy in training, and its paired difference from the run's start policy.

    At step 0 of a run that has no start scores yet these are them. Raises InputError where they are missing later, or belong
    to other settings.
    """
    warm = dataclasses.replace(recipe.policy.generation, temperature=recipe.evaluate.temperature)
    policy = dataclasses.replace(recipe.policy, generation=warm)
    rows = evaluate.retention(recipe, policy, sampler, chat)
    now = {row["item"]: float(np.mean(row["scores"])) for row in rows}
    start = _baseline(recipe, now, step)
    apart = np.array([now[item] - start[item] for item in sorted(start)])
    low, high = bootstrap(apart, recipe.evaluate.confidence, recipe.seed)
    change = float(apart.mean())
    return {
        "retention/accuracy": float(np.mean([now[item] for item in sorted(now)])),
        "retention/change": change,
        "retention/low": low,
        "retention/high": high,
        "retention/held": float(rounds.held(change, high, recipe.loop)),
    }


def _baseline(recipe: Recipe, now: dict[str, float], step: int) -> dict[str, float]:
    path = recipe.path(BASELINE)
    names = ("world", "evaluate.retention", "evaluate.trials", "evaluate.temperature", "policy.generation")
    told = recipe.told(*names, "policy.max_total_sequence_length")
    header = Header("retention", _retention_digest(recipe), settings=told)
    if not path.exists():
        if step > 0:
            remedy = "set it from the run's first step on, or add fresh=true"
            raise InputError(Problem("recipe", None, "loop.retention_period", "no scores of the start policy", remedy))
        write_artefact(path, header, ({"item": item, "score": score} for item, score in now.items()))
    if (found := read_header(path, "retention")) != header:
        remedy = "evaluate.retention, trials or sampling changed within the run; change them back, or add fresh=true"
        raise InputError(Problem(str(path), 1, "header", header_difference(found, header), remedy))
    return {str(row["item"]): float(row["score"]) for row in read_rows(path)}


def _retention_digest(recipe: Recipe) -> str:
    settings, source = recipe.evaluate, Path(recipe.evaluate.retention)
    questions = file_digest(source) if source.is_file() else ""
    sampled = [dataclasses.asdict(recipe.policy.generation), recipe.policy.max_total_sequence_length]
    return digest(
        [recipe.digest("world"), settings.retention, settings.trials, settings.temperature, questions, *sampled]
    )
