"""A verifier for the embedded world that also judges talk, by what it does: what an LLM judge would be asked elsewhere.

`functional` and the paper's tau-bench rule take any text where the expert talks. Here the text must ask where the expert asks,
tell the status that the expert tells, and name no other order or item. Not part of the package: it knows this world's words.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from nemo_pivotrl.config import Limits
from nemo_pivotrl.core.types import Action, Case, Verdict
from nemo_pivotrl.demo import service_desk as world
from nemo_pivotrl.verifiers.functional import Functional
from nemo_pivotrl.verifiers.loading import VERIFIERS

STATUS = frozenset({"pending", "shipped"})


def register() -> None:
    """Let recipes of this process name it."""
    VERIFIERS["desk_talk"] = "pivotrl_desk:DeskTalk"


def same_act(expected: str, actual: str) -> bool:
    """Whether two texts do the same at the desk."""
    wanted, found = set(expected.split()), set(actual.split())
    named = found & set(world.CODES)
    return ("?" in expected) == ("?" in actual) and wanted & STATUS == found & STATUS and named <= wanted


@dataclass(kw_only=True, frozen=True)
class DeskTalk:
    """`functional`, and `same_act` for talking turns."""

    name: ClassVar[str] = "desk_talk"
    version: ClassVar[str] = "1"
    concurrency: ClassVar[int] = 1
    asks_judge: ClassVar[bool] = False
    limits: Limits = field(default_factory=Limits)

    def verify(self, case: Case, actual: Action) -> Verdict:
        """1.0 or 0.0; categories as `functional`'s."""
        verdict = Functional(limits=self.limits).verify(case, actual)
        if verdict.category == "MESSAGE" and not same_act(case.expected.content, actual.content):
            return Verdict(0.0, "DIFFERENT_MESSAGE", "it talks, and does something else")
        return verdict
