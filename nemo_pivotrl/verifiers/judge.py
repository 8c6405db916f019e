"""`judge`: an LLM says whether two actions amount to the same, over any OpenAI-compatible endpoint.

Both orders are asked, so that a liking for one place cannot pass; text of an action cannot speak for the judge
(`judge_prompt`); answers are kept by content; a judge without an answer is a `VerifierFault`, so that the sample is excluded
and never scores 0; and how far to trust a judge is measured (`judge_calibration`).

Deviations from NeMo-Gym's terminus_judge: its labels can be quoted from an action, it scores an answer without a label 0,
it asks one order unless told, and one of its shipped configs lets the policy judge itself; this refuses.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from nemo_pivotrl import config
from nemo_pivotrl.core.artifacts import digest
from nemo_pivotrl.core.errors import InputError, Problem, short
from nemo_pivotrl.core.types import Action, Case, Verdict
from nemo_pivotrl.verifiers.base import Judging, Ruling, VerifierFault
from nemo_pivotrl.verifiers.bounds import decode_json
from nemo_pivotrl.verifiers.judge_asking import Asking, Cache, judge_problems
from nemo_pivotrl.verifiers.judge_calibration import Calibration, calibrate
from nemo_pivotrl.verifiers.judge_prompt import RUBRIC_VERSION, equivalence, shown, shown_context
from nemo_pivotrl.verifiers.swe import category_of

__all__ = ["Calibration", "Judge", "JudgeVerifier", "calibrate", "connect"]

SECTION = "verifier.judge"
ORDERS_DISAGREE = "the orders disagree"


def _ruling(row: Mapping[str, Any]) -> Ruling:
    """A ruling of a cache's line. Raises KeyError and TypeError for what is none."""
    ruling = Ruling(row["same"], row["votes"], row["detail"])
    if not (isinstance(ruling.same, bool) and isinstance(ruling.votes, str) and isinstance(ruling.detail, str)):
        raise TypeError("no ruling")
    return ruling


class Judge:
    """A judge of equivalence. Threads may share it."""

    def __init__(self, settings: config.Judge):
        self.settings = settings
        self.concurrency = settings.concurrency
        self._asking = Asking(settings, SECTION, Cache(settings.cache, _ruling))

    def __repr__(self) -> str:
        return f"Judge({self.settings.model!r} at {self.settings.base_url!r})"

    def close(self) -> None:
        """Give the connections back; the end of the object does so too."""
        self._asking.close()

    def equivalent(self, kind: str, case: Case, expected: str, actual: str) -> Ruling:
        """Whether two actions do the same in `case`. Raises VerifierFault where the judge gives no answer."""
        if expected.strip() == actual.strip():
            return Ruling(True, "", "equal texts")
        s = self.settings
        context, *texts = (
            shown_context(case.messages, s.max_context_chars),
            *(shown(t, s.max_action_chars) for t in (expected, actual)),
        )
        if texts[0] == texts[1]:
            return Ruling(False, "", "they differ in invisible characters only, which the judge is not shown")
        key = digest([kind, RUBRIC_VERSION, self._asking.asked(), [context, *texts]], 32)
        return self._asking.once(key, lambda: self._rule(kind, context, *texts))

    def _rule(self, kind: str, context: str, expected: str, actual: str) -> Ruling:
        votes = self.settings.votes
        counts = [said["SAME"] for said in self._asking.votes(equivalence(kind), context, expected, actual)]
        same = [2 * count > votes for count in counts]
        tally = " ".join(f"{count}/{votes}" for count in counts)
        return Ruling(all(same), tally, "" if len(set(same)) == 1 else ORDERS_DISAGREE)


def connect(settings: config.Judge) -> Judge:
    """A judge behind `settings.base_url`. Raises InputError for settings that no request could be made with."""
    if problems := judge_problems(settings, SECTION):
        raise InputError(problems)
    try:
        return Judge(settings)
    except OSError as error:
        remedy = "give a file that can be written, or none"
        raise InputError(Problem("recipe", None, f"{SECTION}.cache", short(str(error)), remedy)) from None


@dataclass(kw_only=True, frozen=True)
class JudgeVerifier:
    """Asks the judge about every action that is not plainly equal to the expert's, or plainly no answer to it."""

    name: ClassVar[str] = "judge"
    version: ClassVar[str] = "1"
    kind: Literal["auto", "terminal", "search", "message", "action"] = "auto"
    """The rubric; `auto` takes `terminal` for shells and Terminus turns, `search` for search engines, else the action's own."""
    limits: config.Limits = field(default_factory=config.Limits)
    judge: Judging | None = None

    @property
    def asks_judge(self) -> bool:
        """Whether a verdict may need the judge."""
        return True

    @property
    def concurrency(self) -> int:
        return self.judge.concurrency if self.judge else 1

    def verify(self, case: Case, actual: Action) -> Verdict:
        """1.0 or 0.0. Categories: EQUAL, JUDGE_SAME; JUDGE_DIFFERENT, JUDGE_ORDERS_DISAGREE, ACTION_TYPE_MISMATCH,
        UNDECODABLE, NO_ACTION. Calls of one turn have no order."""
        if actual.kind in ("none", "malformed"):
            return Verdict(0.0, "NO_ACTION" if actual.kind == "none" else "UNDECODABLE", actual.detail)
        if actual.kind != case.expected.kind:
            return Verdict(0.0, "ACTION_TYPE_MISMATCH", f"the expert {'calls' if case.expected.calls else 'talks'}")
        try:
            expected = self._text(case.expected)
        except ValueError as error:  # the row is at fault, not the policy: the candidate is excluded
            raise VerifierFault("expected_arguments", str(error)) from None
        try:
            found = self._text(actual)
        except ValueError as error:
            return Verdict(0.0, "UNDECODABLE", str(error))
        if found == expected:
            return Verdict(1.0, "EQUAL")
        if not found:
            return Verdict(0.0, "NO_ACTION", "an empty message")
        assert self.judge is not None, "load_verifier connects the judge"
        ruling = self.judge.equivalent(self._kind(case), case, expected, found)
        disagree = ruling.detail == ORDERS_DISAGREE
        category = "JUDGE_SAME" if ruling.same else "JUDGE_ORDERS_DISAGREE" if disagree else "JUDGE_DIFFERENT"
        return Verdict(float(ruling.same), category, ruling.detail, figures={"votes": ruling.votes})

    def _text(self, action: Action) -> str:
        """What is compared. Raises ValueError for a call whose arguments are no JSON."""
        if action.kind == "message":
            return action.content.strip()
        made = ((c.name, decode_json(c.arguments or "{}", self.limits)) for c in action.calls)
        return "\n".join(
            sorted(f"{name} {json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False)}" for name, value in made)
        )

    def _kind(self, case: Case) -> str:
        if self.kind != "auto":
            return self.kind
        metadata = case.fields.get("metadata")
        harness = case.fields.get("harness") or (metadata.get("harness") if isinstance(metadata, dict) else "")
        if case.expected.kind == "message":
            return "terminal" if str(harness).startswith("terminus") else "message"
        names = [call.name for call in case.expected.calls]
        if all(category_of(name) == "bash" for name in names):
            return "terminal"
        return "search" if all("search" in n.lower() and category_of(n) == "unknown" for n in names) else "action"
