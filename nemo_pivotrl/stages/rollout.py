"""One-turn rollouts: sample, read the action, verify. Profiling, training and evaluation all come through here."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nemo_pivotrl import pivotrl
from nemo_pivotrl.backends import Sampler
from nemo_pivotrl.chat import Chat, load_tokenizer
from nemo_pivotrl.config import Generation, Policy, Recipe
from nemo_pivotrl.records import Action, Candidate, InputError, Problem, Sample, Verdict
from nemo_pivotrl.verifiers import Verifier, VerifierFault, identity, load_verifier

SUSPICIOUS_GROUPS = 3
"""So many groups of improbably identical samples in one wave are a shared seed, not chance."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled turn, judged. `failure` names the fault when it could not be judged; then there is no verdict."""

    sample: Sample
    text: str
    action: Action
    verdict: Verdict | None
    failure: str | None = None


def load_chat(policy: Policy) -> Chat:
    """The recipe's tokenizer and template."""
    return Chat(load_tokenizer(policy.model_name, policy.chat_template), policy.tool_parser, policy.template_kwargs)


def load_recipe_verifier(recipe: Recipe) -> tuple[Verifier, str]:
    """The recipe's verifier and its identity for headers."""
    verifier = load_verifier(recipe.verifier.name, recipe.verifier.settings)
    return verifier, identity(verifier, recipe.verifier.settings)


def sample_seed(*parts: object) -> int:
    """A 64-bit seed that depends on its parts alone: the same rollout is drawn whatever ran before it."""
    return int.from_bytes(hashlib.sha256(" ".join(map(str, parts)).encode()).digest()[:8], "big")


def sampling(generation: Generation) -> dict[str, float]:
    """The settings that decide what a state's samples look like; profiling and training must agree on them."""
    return {
        "temperature": generation.temperature,
        "top_p": generation.top_p,
        "max_new_tokens": generation.max_new_tokens,
    }


def fits(prompt: Sequence[int], policy: Policy) -> bool:
    """Whether a state leaves room for a whole turn."""
    return len(prompt) + policy.generation.max_new_tokens <= policy.max_total_sequence_length


def roll_out(
    sampler: Sampler,
    chat: Chat,
    verifier: Verifier,
    candidates: Sequence[Candidate],
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    generation: Generation,
    max_retries: int,
) -> list[list[Rollout]]:
    """Rollouts of each candidate, one for each of its seeds.

    A truncated turn and one without a readable action score 0 (A.15 6). A verifier fault is retried `max_retries`
    times, then the rollout carries the failure and no reward. Raises InputError when samples repeat as if seeds did.
    """
    samples = sampler.infer(prompts, seeds, chat.stop_ids, generation)
    if generation.temperature > 0:
        groups = [[(s.token_ids, sum(s.log_probs)) for s in group] for group in samples]
        repeated = pivotrl.identical_groups(groups)
        if len(repeated) >= min(SUSPICIOUS_GROUPS, len(groups)) and repeated:
            raise InputError(
                Problem(
                    "sampler",
                    None,
                    "samples",
                    f"{len(repeated)} of {len(groups)} groups hold the same improbable completion in every sample",
                    "the sampler ignores the per-sample seed; drop request seeds from the rows and check the backend",
                )
            )
    return [
        [_judge(chat, verifier, candidate, sample, max_retries) for sample in group]
        for candidate, group in zip(candidates, samples, strict=True)
    ]


def _judge(chat: Chat, verifier: Verifier, candidate: Candidate, sample: Sample, max_retries: int) -> Rollout:
    text = chat.decode(sample.token_ids)
    action = chat.parse(text, candidate.tools)
    if sample.finish_reason == "length":
        return Rollout(sample, text, action, Verdict(0.0, "TRUNCATED"))
    for attempt in range(max_retries + 1):
        try:
            return Rollout(sample, text, action, verifier.verify(candidate.tools, candidate.expected, action))
        except VerifierFault as fault:
            if attempt == max_retries:
                return Rollout(sample, text, action, None, fault.kind)
    raise AssertionError("unreachable")


def rollout_row(rollout: Rollout) -> dict[str, Any]:
    """What a profile stores of a rollout."""
    assert rollout.verdict is not None, "a failed rollout has no row"
    return {
        "text": rollout.text,
        "tokens": len(rollout.sample.token_ids),
        "log_prob": round(sum(rollout.sample.log_probs), 6),
        "finish_reason": rollout.sample.finish_reason,
        "reward": rollout.verdict.reward,
        "category": rollout.verdict.category,
    }
