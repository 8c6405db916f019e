"""What a record says about its trajectory: which task, which run of it, how it ended, whether to learn from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from nemo_pivotrl.data.readers.messages import FieldError, Notes

RUN = ("trajectory_id", "traj_id")
"""Fields that name one run of a task."""
ROW = ("id", "uuid", "conversation_id", "conv_id", "session_id", "sessionId")
"""Fields that name a row of some data set: one run, or the task where several rows carry the same."""
TASK = (
    *("task_id", "instance_id", "_ng_task_id", "_ng_task_index", "problem_id", "question_id", "prompt_id", "task_name"),
    *("task_idx", "example_id", "scenario_id"),
)
REPEAT = ("trial", "_ng_rollout_index", "rollout_index", "rollout_id", "attempt", "sample_index", "seed")
"""Fields that tell the repeats of a task apart."""
OUTCOME = (
    *("reward", "resolved", "success", "is_success", "passed", "is_correct", "correct", "solved", "is_solved"),
    *("is_resolved",),
    *("target", "score"),
)
WITHIN = (
    "reward_info",
    "info",
    "metadata",
    "extra_info",
    "report",
    "result",
    "evaluation",
    "eval",
    "test_result",
    "metrics",
)
"""Objects of a record in which tasks and outcomes are looked for after the record itself."""
WEIGHT = ("weight", "loss_weight", "loss", "train", "trainable")
MASKED = ("mask_sample", "masked")
MAX_REWARD = 1e300


class Identity(NamedTuple):
    """What a record says about its trajectory. None: it does not say."""

    run: str | None
    row: str | None
    task: str | None
    reward: float | None


def identity_of(record: Mapping[str, Any], notes: Notes) -> Identity:
    """Raises FieldError for a reward that is no number."""
    run, row = _name(record, RUN), _name(record, ROW)
    task = next((name for place, _ in _places(record) if (name := _name(place, TASK)) is not None), None)
    if task is None and isinstance(record.get("task"), Mapping):
        task = _name(record["task"], ("id", *TASK))
    repeat = _name(record, REPEAT)
    if run is None and task is not None and repeat is not None:
        run = f"{task}-{repeat}"
    return Identity(run, row, task, outcome_of(record, notes))


def outcome_of(record: Mapping[str, Any], notes: Notes) -> float | None:
    """The outcome of the whole trajectory under its usual names, None where there is none.

    The first of OUTCOME that is found counts; others that say something else are noted.
    """
    found: list[tuple[str, float]] = []
    for place, prefix in _places(record):
        for name in OUTCOME:
            if name == "target" and "trajectory" not in record:
                continue  # an outcome in the SWE-agent sets alone; elsewhere a reference answer
            value = place.get(name)
            if value is None:
                continue
            number = _number(value)
            if name == "reward" and number is None and not isinstance(value, Mapping):
                raise FieldError(prefix + name, value, "a number, or leave the field out")
            if number is None or (name == "score" and not 0.0 <= number <= 1.0):
                notes.unused[prefix + name] += 1
                continue
            found.append((prefix + name, number))
    for name, number in found[1:]:
        if number != found[0][1]:
            notes.said[f"{name} says something else than {found[0][0]}, which counts"] += 1
    return found[0][1] if found else None


def whole_weight(record: Mapping[str, Any]) -> str:
    """Why nothing of the record is to be learned, '' if it is."""
    zero = any(isinstance(record.get(k), (int, float)) and not record[k] for k in WEIGHT)
    return "weight_zero" if zero or any(record.get(k) is True for k in MASKED) else ""


def _places(record: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], str]]:
    yield record, ""
    for name in WITHIN:
        inner = record.get(name)
        if isinstance(inner, Mapping):
            yield inner, f"{name}."
            for deeper in ("report", "reward_info", "metadata"):
                if isinstance(inner.get(deeper), Mapping):
                    yield inner[deeper], f"{name}.{deeper}."


def _name(place: Mapping[str, Any], keys: tuple[str, ...]) -> str | None:
    for key in keys:
        value = place.get(key)
        if isinstance(value, (str, int)) and not isinstance(value, bool) and value != "":
            return str(value)
    return None


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return float(value)
    if isinstance(value, str):
        text = value.strip().lower()
        try:  # a table of text columns
            value = {"true": 1.0, "false": 0.0}[text] if text in ("true", "false") else float(text)
        except ValueError:
            return None
    if isinstance(value, (int, float)) and abs(value) < MAX_REWARD:  # not nan, not inf
        return float(value)
    return None
