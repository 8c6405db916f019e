"""A verifier for the embedded desks that also judges talk, by what it does: what an LLM judge would be asked elsewhere.

`functional` and the paper's tau-bench rule take any text where the expert talks. Here the text must ask where the expert asks,
tell the status and the change that the expert tells, and name no other record than the expert, who may name none. It plugs in by
import path, as a verifier of your own does: `verifier.name: nemo_pivotrl.demo.talk_judge:DeskTalk`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from nemo_pivotrl.config import Limits
from nemo_pivotrl.core.types import Action, Case, Verdict
from nemo_pivotrl.demo import request_desk, service_desk
from nemo_pivotrl.verifiers.functional import Functional

TOLD = frozenset({"pending", "shipped", *request_desk.FAMILIES})
"""Words that must be the same: a status, and what is to be done with a record."""


RECORDS = frozenset(service_desk.CODES)


def same_act(expected: str, actual: str) -> bool:
    """Whether two texts do the same at the desk."""
    wanted, found = set(expected.split()), set(actual.split())
    right, named = wanted & RECORDS, found & RECORDS
    return ("?" in expected) == ("?" in actual) and wanted & TOLD == found & TOLD and (named <= right or not right)


@dataclass(kw_only=True, frozen=True)
class DeskTalk:
    """`functional`, and `same_act` for talking turns."""

    name: ClassVar[str] = "desk_talk"
    version: ClassVar[str] = "2"
    concurrency: ClassVar[int] = 1
    asks_judge: ClassVar[bool] = False
    limits: Limits = field(default_factory=Limits)

    def verify(self, case: Case, actual: Action) -> Verdict:
        """1.0 or 0.0; categories as `functional`'s."""
        verdict = Functional(limits=self.limits).verify(case, actual)
        if verdict.category == "MESSAGE" and not same_act(case.expected.content, actual.content):
            return Verdict(0.0, "DIFFERENT_MESSAGE", "it talks, and does something else")
        return verdict
