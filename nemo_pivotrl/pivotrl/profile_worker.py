"""What draws and judges a profile's rollouts, made once wherever it runs: chat template, sampler and verifier."""

from __future__ import annotations

import json
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from nemo_pivotrl.backends import loading
from nemo_pivotrl.backends.base import concurrency_of, under_way
from nemo_pivotrl.components.rollout import (
    drawn_row,
    judge_all,
    judged_row,
    load_chat,
    load_recipe_verifier,
    sample_seeds,
)
from nemo_pivotrl.config import ProfileStage, Recipe
from nemo_pivotrl.core.artifacts import json_bytes
from nemo_pivotrl.core.errors import UNRENDERABLE, UnrenderableState
from nemo_pivotrl.core.types import Action, Candidate, FailedSample, Sample
from nemo_pivotrl.data.chat_template import Chat
from nemo_pivotrl.data.gym_rows import action_of_row
from nemo_pivotrl.data.states import States, open_states
from nemo_pivotrl.verifiers.base import Bounded, VerifierFault

FAULTS = {
    "sampler_unreachable": "transport",
    "sampler_http": "transport",
    "sampler_timeout": "timeout",
    "sampler_malformed": "parser",
    "context_overflow": "context_overflow",
}
OF_THE_STATE = ("context_overflow", "message_excluded", *UNRENDERABLE)
"""Failures that are no fault of policy or machines: the state does not fit, the expert's talk is not judged, nothing renders."""
KEPT_TOKENS = 1 << 24
"""Prompt tokens that a worker keeps for the next waves of their candidates."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a candidate needs next."""

    place: int
    candidate_id: str
    line: bytes
    ks: list[int]
    """Which of its rollouts; none where only its prompt's length is wanted."""
    unjudged: dict[int, dict[str, Any]]
    """k -> rollout that was drawn and lacks its verdict alone."""


Wave = list[Asked]
"""A task: candidates that draw together."""


@dataclass(slots=True)
class State:
    """A candidate as a worker knows it."""

    candidate: Candidate
    prompt: array[int]
    failure: str | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A wave's result."""

    states: list[tuple[int, int, str | None, str]]
    """(place, tokens of its prompt, why nothing can be drawn for it, detail of that) of each candidate."""
    rollouts: list[tuple[int, int, bytes, dict[str, Any]]]
    """(place, k, JSON of the rollout as a profile keeps it, the rollout).

    One with a `fault` is tried again: its verdict is missing, or all of it, and then the JSON is empty."""


class ProfileWorker:
    """Draws a wave, then judges it while the next one is drawn."""

    def __init__(
        self, recipe: Recipe, chat: Chat | None = None, verifier: Bounded | None = None, states: States | None = None
    ):
        self.recipe = recipe
        self.chat = chat or load_chat(recipe.policy, recipe.verifier.limits)
        self.verifier = verifier or load_recipe_verifier(recipe)[0]
        self.states = states or open_states(recipe.path("candidates.jsonl"))
        self.sampler = loading.load_sampler(recipe.policy, recipe.megatron, recipe.vllm)
        self.concurrency = concurrency_of(self.sampler)
        self._read_already: OrderedDict[str, State] = OrderedDict()
        self._kept = 0

    def under_way(self) -> int:
        """Rollouts that were asked for and have not come."""
        return under_way(self.sampler)

    def close(self) -> None:
        """End a sampler that has threads."""
        if self.concurrency > 1:
            self.sampler.close()  # type: ignore[attr-defined]

    def __call__(self, wave: Wave) -> Callable[[], Drawn]:
        """Draw the wave; the function that is returned judges it."""
        states = [self.state(asked) for asked in wave]
        todo = [
            [k for k in a.ks if k not in a.unjudged] if not s.failure else [] for a, s in zip(wave, states, strict=True)
        ]
        inside = [(a, s, ks) for a, s, ks in zip(wave, states, todo, strict=True) if ks]
        seeds = [sample_seeds(("profile", self.recipe.rollout_seed, a.candidate_id), ks) for a, _, ks in inside]
        prompts = [list(s.prompt) for _, s, _ in inside]
        generation = self.recipe.policy.generation
        drawn = iter(self.sampler.infer(prompts, seeds, self.chat.stop_ids, generation) if inside else [])
        return partial(self.judge, wave, states, [next(drawn) if ks else [] for ks in todo])

    def state(self, asked: Asked) -> State:
        """The candidate with its prompt's ids; one that nothing can be drawn for has a failure."""
        if (found := self._read_already.get(asked.candidate_id)) is None:
            found = self._read_already[asked.candidate_id] = self._read(asked.line)
            self._kept += len(found.prompt)
            while self._kept > KEPT_TOKENS and len(self._read_already) > 1:
                self._kept -= len(self._read_already.popitem(last=False)[1].prompt)
        return found

    def _read(self, line: bytes) -> State:
        candidate = self.states.candidate(json.loads(line))
        try:
            state = State(candidate, array("i", self.chat.prompt_ids(candidate.messages, candidate.tools)))
        except UnrenderableState as error:
            state = State(candidate, array("i"), error.kind, error.found)
        policy = self.recipe.policy
        if self.verifier.excludes(candidate.case):
            state.failure = "message_excluded"
        elif len(state.prompt) + policy.generation.max_new_tokens > policy.max_total_sequence_length:
            state.failure = "context_overflow"
        return state

    def judge(self, wave: Wave, states: Sequence[State], samples: Sequence[Sequence[Sample | FailedSample]]) -> Drawn:
        """Verdicts on a wave's samples, and on earlier ones that lack theirs; faults are retried as often as their kind allows."""
        rollouts: list[tuple[int, int, bytes, dict[str, Any]]] = []
        turns: list[tuple[Asked, State, int, dict[str, Any], Action]] = []
        for asked, state, group in zip(wave, states, samples, strict=True):
            drawn = iter(group)
            for k in () if state.failure else asked.ks:
                if k in asked.unjudged:
                    row = {key: value for key, value in asked.unjudged[k].items() if key != "fault"}
                    turns.append((asked, state, k, row, action_of_row(row["action"])))
                elif isinstance(sample := next(drawn), FailedSample):
                    rollouts.append((asked.place, k, b"", {"fault": sample.kind}))
                else:
                    text = self.chat.decode(sample.token_ids)
                    action = self.chat.parse(text, state.candidate.tools)
                    turns.append((asked, state, k, drawn_row(sample, text, action), action))
        cases = [(s.candidate.case, action, row["finish_reason"]) for _, s, _, row, action in turns]
        results = judge_all(self.verifier, cases, partial(retries_of, self.recipe.profile))
        for (asked, _, k, row, _), result in zip(turns, results, strict=True):
            row = row | {"fault": result.kind} if isinstance(result, VerifierFault) else judged_row(row, result)
            rollouts.append((asked.place, k, json_bytes(row), row))
        told = [(a.place, len(s.prompt), s.failure, s.detail) for a, s in zip(wave, states, strict=True)]
        return Drawn(told, rollouts)


def fault_class(kind: str) -> str:
    """The class of a named fault: transport, timeout, parser, judge, sandbox, row, context_overflow or other.

    `row` is a fault of the data (an expert action that cannot be read), which no retry mends. A verifier of one's own names its
    faults `judge_...`, `sandbox_...` or by a class.
    """
    if kind in FAULTS or kind in FAULTS.values():
        return FAULTS.get(kind, kind)
    first = kind.partition("_")[0]
    return first if first in ("judge", "sandbox", "row") else "row" if first == "expected" else "other"


def retries_of(settings: ProfileStage, kind: str) -> int:
    """How often a fault of some kind is tried again; one of the data never."""
    name = fault_class(kind)
    return 0 if name == "row" else settings.retries.get(name, settings.max_retries)


def transient(failure: str | None) -> bool:
    """Whether a candidate that failed so may be profiled some other time: the fault was not its state's own."""
    return failure is not None and failure not in OF_THE_STATE
