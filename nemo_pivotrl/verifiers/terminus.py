"""`terminus`: NeMo-Gym's verifier for terminal agents that write their turn as one JSON object.

Rules of `terminus_judge`: schema, then a one-sided check of task completion, then similarity of the joined keystrokes, then
an LLM judge where one is configured. Defaults are those of Gym's string-only config, under which the released data runs.

Deviation: a judge that gives no verdict is a fault (retried, then the sample is excluded); the released code scores it 0.
Reasoning up to the last `</think>` is dropped here too, since rows may be scored without a chat template.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from nemo_pivotrl.config import Limits, ranged
from nemo_pivotrl.core.types import Action, Case, Verdict
from nemo_pivotrl.verifiers.base import Judging, VerifierFault
from nemo_pivotrl.verifiers.bounds import Ratio, decode_json, ratio

NUMBER = (int, float)
# field -> (type, required); `commands` is a list of objects with the fields of COMMAND; no other fields are allowed
TURN: dict[str, dict[str, tuple[Any, bool]]] = {
    "terminus_1": {
        "state_analysis": (str, True),
        "explanation": (str, True),
        "commands": (list, True),
        "is_task_complete": (bool, True),
    },
    "terminus_2": {
        "analysis": (str, True),
        "plan": (str, True),
        "commands": (list, True),
        "task_complete": (bool, False),
    },
}
COMMAND: dict[str, dict[str, tuple[Any, bool]]] = {
    "terminus_1": {"keystrokes": (str, True), "is_blocking": (bool, True), "timeout_sec": (NUMBER, True)},
    "terminus_2": {"keystrokes": (str, True), "duration": (NUMBER, False)},
}


def _has_fields(value: Any, fields: dict[str, tuple[Any, bool]]) -> bool:
    if not isinstance(value, dict) or not value.keys() <= fields.keys():
        return False
    for name, (kind, required) in fields.items():
        if name not in value:
            if required:
                return False
        elif not isinstance(value[name], kind) or (kind is NUMBER and isinstance(value[name], bool)):
            return False
    return True


def follows_schema(turn: Any, harness: str) -> bool:
    """Whether a decoded turn has exactly the fields and types of its harness."""
    return _has_fields(turn, TURN[harness]) and all(_has_fields(c, COMMAND[harness]) for c in turn["commands"])


def says_complete(turn: dict[str, Any]) -> bool:
    """Whether a turn declares the task complete, under either harness's name for it."""
    return bool(turn.get("task_complete") or turn.get("is_task_complete"))


def keystrokes(turn: dict[str, Any]) -> str:
    """All keystrokes of a turn, joined as they are."""
    return "".join(command["keystrokes"] for command in turn["commands"])


def text_of_action(actual: Action) -> str:
    """What the policy wrote after its reasoning."""
    text = actual.content.strip()
    return text.rpartition("</think>")[2].strip() if "</think>" in text else text


@dataclass(kw_only=True, frozen=True)
class Terminus:
    """Keystroke similarity of two JSON turns; the row's `threshold` wins over the setting."""

    name: ClassVar[str] = "terminus"
    version: ClassVar[str] = "1"
    enable_string_similarity: bool = True
    """Accept keystrokes that are similar enough; false: the judge alone decides."""
    string_similarity_threshold: float = ranged(0.9, 0.0, 1.0)
    """Similarity that is enough. Gym's configs have 0.9, and 0.95 with a judge model."""
    enable_llm_judge: bool = False
    """Ask the judge about keystrokes that are not similar enough."""
    limits: Limits = field(default_factory=Limits)
    judge: Judging | None = None

    @property
    def asks_judge(self) -> bool:
        """Whether a verdict may need the judge."""
        return self.enable_llm_judge

    @property
    def concurrency(self) -> int:
        return self.judge.concurrency if self.judge else 1

    def verify(self, case: Case, actual: Action) -> Verdict:
        """Reward and Gym's failure code (`none` on success), with the similarity where it was computed."""
        expert, text = case.expected.content, text_of_action(actual)
        if case.expected.kind != "message" or not expert:
            return Verdict(0.0, "expected_answer_invalid", "the expert's action is no text")
        if not actual.content.strip():
            return Verdict(0.0, "model_output_invalid", actual.detail or "no text")
        wanted, found = self._object(expert), self._object(text)
        if wanted is None:
            return Verdict(0.0, "expected_answer_invalid", "no JSON object")
        if found is None:
            return Verdict(0.0, "model_output_invalid", "no JSON object")
        metadata = case.fields.get("metadata")
        harness = case.fields.get("harness") or (metadata.get("harness") if isinstance(metadata, dict) else None)
        if not isinstance(harness, str) or harness not in TURN:
            return Verdict(0.0, "unknown_harness", f"{harness!r} is none of {', '.join(TURN)}")
        if not follows_schema(wanted, harness):
            return Verdict(0.0, "expected_answer_invalid", f"against the schema of {harness}")
        if not follows_schema(found, harness):
            return Verdict(0.0, "schema_check_failed")
        if says_complete(wanted) and not says_complete(found):
            return Verdict(0.0, "task_complete_check_failed")
        return self._compare(case, wanted, found, text)

    def _object(self, text: str) -> dict[str, Any] | None:
        try:
            value = decode_json(text, self.limits)
        except ValueError:
            return None
        return value if isinstance(value, dict) else None

    def _compare(self, case: Case, wanted: dict[str, Any], found: dict[str, Any], text: str) -> Verdict:
        figures: dict[str, Any] = {}
        if self.enable_string_similarity:
            threshold = case.fields.get("threshold")
            if threshold is None:
                threshold = self.string_similarity_threshold
            elif isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
                raise VerifierFault("row_threshold", f"the row's threshold is {threshold!r}, not a number")
            similarity = self._similarity(wanted, found, threshold)
            figures |= similarity.figures
            if similarity.value >= threshold:
                return Verdict(1.0, "none", figures=figures)
            if not self.enable_llm_judge:
                return Verdict(0.0, "string_similarity_below_threshold", figures=figures)
        if not self.enable_llm_judge:
            return Verdict(1.0, "none", "only schema and completion were checked", figures=figures)
        assert self.judge is not None, "load_verifier connects the judge"
        ruling = self.judge.equivalent("terminal", case, case.expected.content, text)
        figures["votes"] = ruling.votes
        return Verdict(
            float(ruling.same), "none" if ruling.same else "judge_not_equivalent", ruling.detail, figures=figures
        )

    def _similarity(self, wanted: dict[str, Any], found: dict[str, Any], threshold: float) -> Ratio:
        if not wanted["commands"] or not found["commands"]:
            return Ratio(float(bool(wanted["commands"]) == bool(found["commands"])))
        return ratio(keystrokes(wanted), keystrokes(found), self.limits.max_work, threshold)
