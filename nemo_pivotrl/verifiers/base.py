"""Verifiers: (case, sampled action) -> Verdict. One file per domain, one dict of names.

A verifier is a pure function of its inputs. What the policy wrote can at worst score 0; a fault of the verifier itself
(a judge that does not answer, say) is a `VerifierFault`: it is retried, then the sample is excluded, never scored 0.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, Literal, Protocol

from nemo_pivotrl import config
from nemo_pivotrl.core.types import Action, Case, Verdict
from nemo_pivotrl.verifiers.bounds import LimitExceeded, check_size


class VerifierFault(RuntimeError):
    """The verifier could not judge. `kind` names the fault for the failure count."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class Verifier(Protocol):
    """What a stage needs of a verifier. A class that has these parts is one; it inherits nothing.

    >>> class AnyCall:
    ...     name, version, concurrency, asks_judge = "any_call", "1", 1, False
    ...
    ...     def verify(self, case, actual):
    ...         return Verdict(float(actual.kind == "calls"), "CALLS")
    >>> AnyCall().verify(Case(Action("message", "Hello")), Action("message", "Hi")).reward
    0.0
    """

    @property
    def name(self) -> str:
        """What artefact headers call it."""
        ...

    @property
    def version(self) -> str:
        """Part of artefact headers too: raise it when a verdict changes."""
        ...

    @property
    def concurrency(self) -> int:
        """How many verdicts may be asked for at a time; 1 for what computes."""
        ...

    @property
    def asks_judge(self) -> bool:
        """Whether a verdict may need an LLM judge."""
        ...

    def verify(self, case: Case, actual: Action) -> Verdict:
        """Judge `actual` against `case.expected`. Raises VerifierFault when it cannot."""
        ...


def harness_of(fields: Mapping[str, Any]) -> str:
    """The agent harness that a row's fields name, or ''."""
    metadata = fields.get("metadata")
    return str(fields.get("harness") or (metadata.get("harness") if isinstance(metadata, dict) else "") or "")


def is_talk(expected: Action, fields: Mapping[str, Any]) -> bool:
    """Whether the expert talks. A terminal turn written as JSON is a message that acts."""
    return expected.kind == "message" and harness_of(fields) not in ("terminus_1", "terminus_2")


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


class Computing:
    """A verifier that computes: it takes one question at a time and asks no judge."""

    concurrency: ClassVar[int] = 1
    asks_judge: ClassVar[bool] = False


def talk_rule_of(verifier: Any) -> str:
    """By what rule a verifier, or its class, takes any text where the expert talks; '' where it does not."""
    return str(getattr(verifier, "talk_rule", ""))


@dataclasses.dataclass(frozen=True)
class Bounded:
    """A verifier behind the recipe's limits and its decision on talk.

    What exceeds the limits scores 0 before anything looks at it. The decision holds for verifiers that take any text
    where the expert talks (`talk_rule`): those of NeMo-Gym by a `released` rule, `functional` as `decided` here.
    """

    inner: Any
    limits: config.Limits
    message: Literal["judge", "exclude", "any"] = "any"
    talk_judge: Judging | None = None

    @property
    def name(self) -> str:
        return str(self.inner.name)

    @property
    def version(self) -> str:
        return str(self.inner.version)

    @property
    def concurrency(self) -> int:
        return max(int(self.inner.concurrency), self.talk_judge.concurrency if self.talk_judge else 1)

    @property
    def asks_judge(self) -> bool:
        """Whether a verdict may need an LLM judge."""
        return bool(self.inner.asks_judge) or self.talk_judge is not None

    @property
    def reads_state(self) -> bool:
        """Whether a verdict looks at what came before the action."""
        return self.asks_judge or bool(getattr(self.inner, "reads_state", False))

    @property
    def judge(self) -> Judging | None:
        return getattr(self.inner, "judge", None) or self.talk_judge

    def excludes(self, case: Case) -> bool:
        """Whether the expert's turn is talk that `verifier.message: exclude` leaves out: nothing is drawn for it."""
        return bool(talk_rule_of(self.inner)) and self.message == "exclude" and is_talk(case.expected, case.fields)

    def verify(self, case: Case, actual: Action) -> Verdict:
        """The verdict, in [0, 1] whatever `actual` holds. Raises VerifierFault."""
        rule = talk_rule_of(self.inner)
        decided = bool(rule) and self.message != "any" and is_talk(case.expected, case.fields)
        # what is no text differs from an expert's talk under any decision
        if decided and self.message == "exclude" and rule == "decided" and actual.kind == "message":
            remedy = "verifier.message=judge has it compared, =any takes any text"
            raise VerifierFault("message_excluded", f"the expert talks, and no judge compares it: {remedy}")
        try:
            check_size(actual, self.limits)
            verdict: Verdict = self.inner.verify(case, actual)
        except LimitExceeded as error:
            return Verdict(0.0, "LIMIT_EXCEEDED", str(error))
        if decided and self.message == "judge" and verdict.reward > 0.0:
            assert self.talk_judge is not None, "load_verifier connects the judge"
            ruling = self.talk_judge.equivalent("message", case, case.expected.content, actual.content)
            category = "JUDGED_SAME" if ruling.same else "DIFFERENT_MESSAGE"
            return Verdict(float(ruling.same), category, ruling.detail, figures={"votes": ruling.votes})
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
