"""Verifiers: (case, sampled action) -> Verdict. One file per domain, one dict of names.

A verifier is a pure function of its inputs. What the policy wrote can at worst score 0; a fault of the verifier itself
(a judge that does not answer, say) is a `VerifierFault`: it is retried, then the sample is excluded, never scored 0.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any, Protocol

from nemo_pivotrl import config
from nemo_pivotrl.config.load import build
from nemo_pivotrl.core.artifacts import digest
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.core.types import Action, Case, Verdict
from nemo_pivotrl.verifiers.bounds import LimitExceeded, check_size

VERIFIERS = {
    "single_step": "nemo_pivotrl.verifiers.single_step:SingleStep",
    "swe": "nemo_pivotrl.verifiers.swe:Swe",
    "terminus": "nemo_pivotrl.verifiers.terminus:Terminus",
    "terminal_multi_harness": "nemo_pivotrl.verifiers.terminal_multi_harness:TerminalMultiHarness",
    "functional": "nemo_pivotrl.verifiers.functional:Functional",
    "judge": "nemo_pivotrl.verifiers.judge:JudgeVerifier",
    "exact": "nemo_pivotrl.verifiers.single_step:Exact",
}
ALIASES = {
    "tool_call": "single_step",
    "single_step_tool_use_with_argument_comparison": "single_step",
    "swe_pivot": "swe",
    "terminus_judge": "terminus",
}
"""Names of NeMo-Gym's servers, and the one name of version 0.1."""


SHARED = {"compat", "limits", "judge"}
"""Fields that a verifier gets from the recipe's sections of the same name, not from its own settings."""


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


def harness_of(fields: Mapping[str, Any]) -> str:
    """The agent harness that a row's fields name, or ''."""
    metadata = fields.get("metadata")
    return str(fields.get("harness") or (metadata.get("harness") if isinstance(metadata, dict) else "") or "")


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


def load_verifier(
    settings: config.Verifier, judge_factory: Callable[[config.Judge], Judging] | None = None, where: str = "recipe"
) -> Bounded:
    """The verifier that `settings` describe. Raises InputError for an unknown name or setting.

    `judge_factory` makes the judge of a verifier that asks one; the default connects to `settings.judge`.
    """
    name = ALIASES.get(settings.name, settings.name)
    if name not in VERIFIERS:
        raise InputError(Problem(where, None, "verifier.name", settings.name, f"use one of {', '.join(VERIFIERS)}"))
    module, _, cls_name = VERIFIERS[name].partition(":")
    try:
        cls = getattr(import_module(module), cls_name)
    except ModuleNotFoundError as error:
        raise InputError(
            Problem(
                "environment",
                None,
                f"verifier {name}",
                f"no module {error.name}",
                "pip install 'nemo-pivotrl[verifiers]'",
            )
        ) from None
    given = {f.name for f in dataclasses.fields(cls)} & SHARED
    misplaced = [
        Problem(where, None, f"verifier.settings.{key}", str(value), f"this is a section of its own: verifier.{key}")
        for key, value in settings.settings.items()
        if key in SHARED
    ]
    if misplaced:
        raise InputError(misplaced)
    shared: dict[str, Any] = {"compat": settings.compat, "limits": settings.limits}
    checked = build(cls, settings.settings, where, "verifier.settings.")
    made = dataclasses.replace(checked, **{k: v for k, v in shared.items() if k in given})
    if "judge" in given and made.asks_judge:
        from nemo_pivotrl.verifiers.judge import connect

        made = dataclasses.replace(made, judge=(judge_factory or connect)(settings.judge))
    return Bounded(made, settings.limits)


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


def identity(verifier: Verifier, settings: config.Verifier) -> str:
    """`name version digest-of-settings`: what artefact headers carry. How a judge is reached is not part of it."""
    judge = dataclasses.asdict(settings.judge) if verifier.asks_judge else {}
    for transport in ("base_url", "api_key_env", "timeout_s", "max_retries", "backoff_s", "concurrency", "cache"):
        judge.pop(transport, None)
    if judge:
        from nemo_pivotrl.verifiers.judge_prompt import RUBRIC_VERSION

        judge["rubric"] = RUBRIC_VERSION
    decides = [settings.compat, dict(settings.settings), dataclasses.asdict(settings.limits), judge]
    return f"{verifier.name} {verifier.version} {digest(decides, 8)}"


def settings_with(verifier: config.Verifier, values: Mapping[str, Any]) -> config.Verifier:
    """`verifier` with further settings of its own: a row's `config` wins over the command's."""
    return dataclasses.replace(verifier, settings={**verifier.settings, **values})
