"""Constant answers replayed on states: what a policy earns that says the same whatever it is asked.

The answers come from the experts (`verifiers.probes.constants`). An answer is tried where the expert does the same kind of thing,
talk or call; everywhere else it earns 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nemo_pivotrl.core.errors import short
from nemo_pivotrl.core.types import Action, Candidate, Verdict
from nemo_pivotrl.verifiers import probes
from nemo_pivotrl.verifiers.base import Verifier, verdicts

Earned = dict[str, dict[str, float]]
"""Answer as text -> candidate id -> reward above 0, the answers that earn most first."""


def said(answer: Action) -> str:
    """An answer as one line of text."""
    if answer.kind == "message":
        return f"the text {short(answer.content, 60)!r}"
    return f"{answer.calls[0].name}({short(answer.calls[0].arguments, 80)})"


def earnings(verifier: Verifier, tried: Sequence[Candidate], experts: Sequence[Action], max_retries: int) -> Earned:
    """What each constant answer, made of `experts`, earns on `tried`. An answer that wins in one task alone may be that task's
    answer, and is left out. What the verifier cannot judge earns nothing."""
    answers = probes.constants(experts)
    earned = [earned_by(verifier, answer, tried, max_retries) for answer in answers]
    return ranked(answers, earned, {c.candidate_id: c.task_id for c in tried})


def earned_by(verifier: Verifier, answer: Action, tried: Sequence[Candidate], max_retries: int) -> dict[str, float]:
    """Candidate id -> what the answer earns there, where that is above 0."""
    kind = [c for c in tried if c.expected.kind == answer.kind]
    results = verdicts(verifier, [(c.case, answer) for c in kind], max_retries)
    pairs = zip(kind, results, strict=True)
    return {c.candidate_id: r.reward for c, r in pairs if isinstance(r, Verdict) and r.reward > 0}


def ranked(answers: Sequence[Action], earned: Sequence[dict[str, float]], tasks: Mapping[str, str]) -> Earned:
    """What each answer earns, under its text and the best first. `tasks`: candidate id -> task."""
    pairs = zip(answers, earned, strict=True)
    found = {said(answer): rewards for answer, rewards in pairs if len({tasks[c] for c in rewards}) > 1}
    return dict(sorted(found.items(), key=lambda pair: -sum(pair[1].values())))


def best(earned: Earned, tried: int) -> tuple[str, float]:
    """The best constant answer and its mean reward over so many states."""
    for answer, rewards in earned.items():
        return answer, sum(rewards.values()) / max(1, tried)
    return "none wins in two tasks", 0.0


def won(earned: Earned) -> dict[str, str]:
    """Candidate -> the best constant answer that wins it whole."""
    return {c: answer for answer, rewards in reversed(earned.items()) for c, r in rewards.items() if r == 1.0}
