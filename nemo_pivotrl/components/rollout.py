"""One-turn rollouts: sample, read the action, verify. Profiling, training and evaluation all come through here."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from nemo_pivotrl.algorithms import selection
from nemo_pivotrl.backends.base import Sampler
from nemo_pivotrl.config import Generation, Limits, Policy, Recipe, TrainedModel
from nemo_pivotrl.core.errors import InputError, Problem, UnrenderableState
from nemo_pivotrl.core.types import Action, Candidate, Case, FailedSample, Sample, Verdict
from nemo_pivotrl.data.chat_template import Chat, generation_stop_ids, load_tokenizer
from nemo_pivotrl.data.gym_rows import action_to_row
from nemo_pivotrl.verifiers.base import Bounded, Verifier, VerifierFault, verdicts
from nemo_pivotrl.verifiers.loading import identity, load_verifier

T = TypeVar("T")
UNRENDERABLE_SHOWN = 8
"""States that cannot be rendered are named one by one up to this many."""
SUSPICIOUS_GROUPS = 3
"""So many groups of improbably identical samples in one wave are a shared seed, not chance."""

MAX_DETAIL = 500
"""Characters of a verdict's reason that are kept: a judge's may be long."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled turn, judged. `failure` names the fault when it could not be judged; then there is no verdict."""

    sample: Sample
    text: str
    action: Action
    verdict: Verdict | None
    failure: str | None = None


def load_chat(policy: TrainedModel, limits: Limits | None = None) -> Chat:
    """The recipe's tokenizer and template."""
    tokenizer = load_tokenizer(policy.model_name, policy.chat_template)
    stop_ids = generation_stop_ids(policy.model_name)
    return Chat(tokenizer, policy.tool_parser, policy.template_kwargs, limits, policy.chat, stop_ids)


def judged_candidates(candidates: Iterable[Candidate], verifier: Bounded, source: Path) -> list[Candidate]:
    """Those that the verifier judges; the others are counted. Raises InputError where there is none."""
    held = list(candidates)
    kept = [c for c in held if not verifier.excludes(c.case)]
    tell_left_out(len(held), len(kept), source)
    return kept


def tell_left_out(held: int, judged: int, source: Path) -> None:
    """Print how many candidates are not judged. Raises InputError where none is."""
    if judged < held:
        print(f"left out: {held - judged} of {held} candidates, in which the expert talks (verifier.message: exclude)")
    if not judged:
        remedy = "name a judge (verifier.judge.base_url), or take any text with verifier.message=any"
        raise InputError(Problem(str(source), None, "verifier.message", "exclude, and the expert only talks", remedy))


def rendered(
    candidates: Iterable[Candidate], render: Callable[[Candidate], T], source: Path, what: str = "states"
) -> list[tuple[Candidate, T]]:
    """What `render` makes of each candidate. Those that cannot be rendered are left out, counted and named by line of `source`."""
    made, refused = [], []
    for candidate in candidates:
        try:
            made.append((candidate, render(candidate)))
        except UnrenderableState as error:
            refused.append((candidate.candidate_id, f"{error.kind}: {error.found}"))
    tell_refused(refused, len(made) + len(refused), source, what)
    return made


def tell_refused(refused: Sequence[tuple[str, str]], of: int, source: Path, what: str) -> None:
    """Print how many of all cannot be rendered, and the first of them: (candidate id, kind and reason)."""
    if refused:
        counts = Counter(reason.partition(":")[0] for _, reason in refused)
        print(f"excluded: {len(refused)} of {of} {what}, {', '.join(f'{n} {k}' for k, n in counts.items())}")
        print("\n".join(unrenderable_lines(refused, source)))


def unrenderable_lines(refused: Sequence[tuple[str, str]], source: Path) -> list[str]:
    """(candidate id, reason) as lines of text, each with its line in `source`; the first few of them."""
    shown = dict(refused[:UNRENDERABLE_SHOWN])
    marks = {b'"candidate_id":' + json.dumps(candidate).encode(): candidate for candidate in shown}
    places: dict[str, int] = {}
    with source.open("rb") as file:
        for number, line in enumerate(file, start=1):
            places.update((candidate, number) for mark, candidate in marks.items() if mark in line)
    lines = [f"  {source}:{places.get(c, '?')}: candidate {c}: {reason}" for c, reason in shown.items()]
    more = len(refused) - len(shown)
    return [*lines, f"  ... and {more} more"] if more > 0 else lines


def load_recipe_verifier(recipe: Recipe) -> tuple[Bounded, str]:
    """The recipe's verifier and its identity for headers. Raises InputError where the policy would judge itself."""
    settings = recipe.verifier
    if not settings.judge.cache:
        cache = str(recipe.path("judge_cache.jsonl"))
        settings = dataclasses.replace(settings, judge=dataclasses.replace(settings.judge, cache=cache))
    verifier = load_verifier(settings)
    if verifier.asks_judge:
        from nemo_pivotrl.verifiers.judge_asking import refuse_self_judge

        refuse_self_judge(settings.judge, recipe.policy.model_name, "verifier.judge", "policy")
    return verifier, identity(verifier, settings)


def sample_seed(*parts: object) -> int:
    """A 64-bit seed that depends on its parts alone: the same rollout is drawn whatever ran before it."""
    return int.from_bytes(hashlib.sha256(" ".join(map(str, parts)).encode()).digest()[:8], "big")


def sample_seeds(parts: Sequence[object], last: Iterable[int]) -> list[int]:
    """`sample_seed(*parts, k)` of every k in `last`, with the parts hashed once."""
    begun, seeds = hashlib.sha256((" ".join(map(str, parts)) + " ").encode()), []
    for k in last:
        whole = begun.copy()
        whole.update(b"%d" % k)
        seeds.append(int.from_bytes(whole.digest()[:8], "big"))
    return seeds


def sampling(generation: Generation) -> dict[str, float]:
    """The settings that decide what a state's samples look like; profiling and training must agree on them."""
    return {
        "temperature": generation.temperature,
        "top_p": generation.top_p,
        "max_new_tokens": generation.max_new_tokens,
    }


def fits(tokens: int, policy: Policy) -> bool:
    """Whether a prompt of so many tokens leaves room for a whole turn."""
    return tokens + policy.generation.max_new_tokens <= policy.max_total_sequence_length


def first_fitting(
    candidates: Iterable[Candidate], size: int, chat: Chat, policy: Policy, source: Path
) -> list[tuple[Candidate, list[int]]]:
    """The first `size` candidates that can be rendered and fit, with their prompts; hardly more are rendered."""
    made: list[tuple[Candidate, list[int]]] = []
    rest = iter(candidates)
    while part := list(islice(rest, size - len(made))):
        prompts = rendered(part, lambda c: chat.prompt_ids(c.messages, c.tools), source, "held-out states")
        made += [(c, prompt) for c, prompt in prompts if fits(len(prompt), policy)]
    return made


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

    A truncated turn and one without a readable action score 0 (P6). A verifier fault is retried `max_retries`
    times, then the rollout carries the failure and no reward, as one does whose turn the sampler has lost. Raises
    InputError when samples repeat as if seeds did.
    """
    samples = sampler.infer(prompts, seeds, chat.stop_ids, generation)
    if generation.temperature > 0:
        groups = [[(s.token_ids, sum(s.log_probs)) for s in group if isinstance(s, Sample)] for group in samples]
        repeated = selection.identical_groups(groups)
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
    turns = [
        (candidate, sample, text, chat.parse(text, candidate.tools))
        for candidate, group in zip(candidates, samples, strict=True)
        for sample, text in ((s, chat.decode(s.token_ids)) for s in group if isinstance(s, Sample))
    ]
    judged = judge_all(
        verifier, [(c.case, action, sample.finish_reason) for c, sample, _, action in turns], max_retries
    )
    rollouts = iter(
        Rollout(sample, text, action, *_outcome(result))
        for (_, sample, text, action), result in zip(turns, judged, strict=True)
    )
    return [[_without(s) if isinstance(s, FailedSample) else next(rollouts) for s in group] for group in samples]


def _without(lost: FailedSample) -> Rollout:
    """What stands for a turn that was never generated: no tokens, no action, no verdict."""
    return Rollout(Sample((), (), "stop"), "", Action("none"), None, lost.kind)


def judge_all(
    verifier: Verifier, turns: Sequence[tuple[Case, Action, str]], max_retries: int | Callable[[str], int]
) -> list[Verdict | VerifierFault]:
    """Verdicts of (case, action, finish reason); a truncated turn scores 0 whatever it says (P6)."""
    whole = [i for i, (_, _, finish_reason) in enumerate(turns) if finish_reason != "length"]
    found: list[Verdict | VerifierFault] = [Verdict(0.0, "TRUNCATED")] * len(turns)
    for i, result in zip(whole, verdicts(verifier, [turns[i][:2] for i in whole], max_retries), strict=True):
        found[i] = result
    return found


def _outcome(result: Verdict | VerifierFault) -> tuple[Verdict | None, str | None]:
    return (None, result.kind) if isinstance(result, VerifierFault) else (result, None)


def drawn_row(sample: Sample, text: str, action: Action) -> dict[str, Any]:
    """What a profile stores of a sampled turn; `judged_row` adds what the verifier said."""
    return {
        "text": text,
        "tokens": len(sample.token_ids),
        "log_prob": round(sum(sample.log_probs), 6),
        "finish_reason": sample.finish_reason,
        "action": action_to_row(action),
    }


def judged_row(drawn: dict[str, Any], verdict: Verdict) -> dict[str, Any]:
    """A stored turn with its verdict, in the place of one that it may have had. `detail` and `rules` say why, where they do."""
    kept = {key: value for key, value in drawn.items() if key not in ("action", "fault", "detail", "rules")}
    why: dict[str, Any] = {"detail": verdict.detail[:MAX_DETAIL]} if verdict.detail else {}
    why |= {"rules": list(verdict.rules)} if verdict.rules else {}
    return {**kept, "reward": verdict.reward, "category": verdict.category, **why, "action": drawn["action"]}
