"""Verifiers: (case, sampled action) -> Verdict. One file per domain, one dict of names.

A verifier is a pure function of its inputs. What the policy wrote can at worst score 0; a fault of the verifier itself
(a judge that does not answer, say) is a `VerifierFault`: it is retried, then the sample is excluded, never scored 0.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from nemo_pivotrl import config
from nemo_pivotrl.core.types import Action, Case, Verdict
from nemo_pivotrl.verifiers.bounds import LimitExceeded, check_size


class VerifierFault(RuntimeError):
    """The verifier could not judge. `kind` names the fault for the failure count."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class Verifier(Protocol):
    """What a stage needs of a verifier."""

    name: str
    version: str
    concurrency: int
    """How many verdicts may be asked for at a time; 1 for what computes."""
    asks_judge: bool
    """Whether a verdict may need an LLM judge."""

    def verify(self, case: Case, actual: Action) -> Verdict:
        """Judge `actual` against `case.expected`. Raises VerifierFault when it cannot."""
        ...


@dataclasses.dataclass(frozen=True)
class Ruling:
    """What a judge said of two actions."""

    same: bool
    votes: str
    """Answers in favour over answers given, for each order, e.g. `1/1 0/1`."""
    detail: str = ""


class Judging(Protocol):
    """What a verifier needs of a judge."""

    concurrency: int

    def equivalent(self, kind: str, case: Case, expected: str, actual: str) -> Ruling:
        """Whether two actions do the same in `case`. Raises VerifierFault when the judge gives no answer."""
        ...


@dataclasses.dataclass(frozen=True)
class Bounded:
    """A verifier behind the recipe's limits: what exceeds them scores 0 before anything looks at it."""

    inner: Any
    limits: config.Limits

    @property
    def name(self) -> str:
        return str(self.inner.name)

    @property
    def version(self) -> str:
        return str(self.inner.version)

    @property
    def concurrency(self) -> int:
        return int(getattr(self.inner, "concurrency", 1))

    @property
    def asks_judge(self) -> bool:
        """Whether a verdict may need an LLM judge."""
        return bool(getattr(self.inner, "asks_judge", False))

    @property
    def judge(self) -> Judging | None:
        return getattr(self.inner, "judge", None)

    def verify(self, case: Case, actual: Action) -> Verdict:
        """The verdict, in [0, 1] whatever `actual` holds. Raises VerifierFault."""
        try:
            check_size(actual, self.limits)
            verdict: Verdict = self.inner.verify(case, actual)
        except LimitExceeded as error:
            return Verdict(0.0, "LIMIT_EXCEEDED", str(error))
        return verdict


def verdicts(
    verifier: Verifier, questions: Sequence[tuple[Case, Action]], max_retries: int | Callable[[str], int] = 0
) -> list[Verdict | VerifierFault]:
    """Verdicts in the order of the questions, as many at a time as the verifier takes; faults are retried, then returned.

    `max_retries` may depend on the kind of fault.
    """
    retries = max_retries if callable(max_retries) else lambda kind: max_retries

    def one(question: tuple[Case, Action]) -> Verdict | VerifierFault:
        for attempt in itertools.count():
            try:
                return verifier.verify(*question)
            except VerifierFault as fault:
                if attempt >= retries(fault.kind):
                    return fault
        raise AssertionError("unreachable")

    if verifier.concurrency == 1 or len(questions) < 2:
        return [one(question) for question in questions]
    with ThreadPoolExecutor(min(verifier.concurrency, len(questions))) as pool:
        return list(pool.map(one, questions))
