"""All trajectories of all files in one go: every bad record named, ids and tasks settled over all of them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from nemo_pivotrl.core.artifacts import digest
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.core.plugins import load_plugin
from nemo_pivotrl.core.types import Message, Trajectory
from nemo_pivotrl.data import published
from nemo_pivotrl.data.readers.agents import claude_code_sessions, is_claude_code, tau2_simulations
from nemo_pivotrl.data.readers.chat import MESSAGES
from nemo_pivotrl.data.readers.detect import READERS, REFUSED, format_of
from nemo_pivotrl.data.readers.drafts import Context, Draft
from nemo_pivotrl.data.readers.fields import outcome_of
from nemo_pivotrl.data.readers.files import read_records
from nemo_pivotrl.data.readers.messages import FieldError, Notes
from nemo_pivotrl.data.readers.shapes import is_chat
from nemo_pivotrl.data.readers.tools import read_tools

ASKED = frozenset(("input", "inputs", "request", "output", "outputs", "response"))
"""Fields of one call of a model, whose two sides are no records."""


@dataclass
class FileReading:
    """What became of one file."""

    path: str
    formats: Counter[str] = field(default_factory=Counter)
    """What its records were taken for."""
    records: int = 0
    unreadable: Counter[str] = field(default_factory=Counter)
    """Records left out, by reason."""
    empty: int = 0
    """Trajectories without any turn that their reward excludes: crashed episodes."""


@dataclass
class Reading:
    """All trajectories, and what became of every record."""

    trajectories: list[Trajectory] = field(default_factory=list)
    files: list[FileReading] = field(default_factory=list)
    left_out: list[Problem] = field(default_factory=list)
    """With `on_invalid: skip`: what was wrong with each record that was left out."""
    notes: Notes = field(default_factory=Notes)
    published: Counter[str] = field(default_factory=Counter)
    """Marks of published pivot rows."""


def read_trajectories(
    paths: Sequence[str],
    format: str = "auto",
    tools_file: str | None = None,
    on_invalid: str = "error",
    min_reward: float | None = None,
) -> Reading:
    """All trajectories of `paths`. Raises InputError listing every bad record of every file, or, with `on_invalid: skip`,
    leaves them out and names them in the result.

    A record whose outcome is below `min_reward` is never an error: it would not be used, whatever its messages are.
    """
    reader = _reader(format)
    tools = read_tools(tools_file) if tools_file else ()
    if not paths:
        nothing = Problem("recipe", None, "extract.trajectories", "nothing", "name at least one trajectory file")
        raise InputError(nothing)
    reading, problems = Reading(), []
    drafts: list[tuple[Draft | Trajectory, str]] = []
    for path in paths:
        broken: list[Problem] = []
        file = FileReading(path)
        reading.files.append(file)
        records = list(read_records(Path(path), broken, "extract.trajectories"))
        file.records = sum(p.field == "line" for p in broken)
        file.unreadable.update("broken_json" for p in broken if p.field == "line")
        bad: list[tuple[str, Problem]] = [("broken_json" if p.field == "line" else "file", p) for p in broken]
        for line, record in _gathered(records):
            file.records += 1
            source = f"{path}:{line}"
            context = Context(tools, source, reading.notes)
            if isinstance(record, dict):
                reading.published.update(published.marks(record))
            name = format if reader is not None else format_of(record) or "unknown"
            file.formats[name] += 1
            try:
                drafts.append((_read(record, name, reader, context, min_reward), source))
            except FieldError as error:
                if _excluded(record, min_reward):
                    file.empty += 1
                    file.unreadable["below_min_reward"] += 1
                    continue
                reason = f"refused: {name}" if name in REFUSED else error.reason
                file.unreadable[reason] += 1
                bad.append((reason, Problem(path, line, error.field, error.found, error.remedy)))
        if not file.records and not broken:
            remedy = "the file is empty; check the path or drop it from the recipe"
            bad.append(("file", Problem(path, None, "file", "no records", remedy)))
        _judge(bad, on_invalid, problems, reading)
    problems += _settle(drafts, reading, on_invalid)
    if problems:
        raise InputError(problems)
    return reading


def _judge(bad: list[tuple[str, Problem]], on_invalid: str, problems: list[Problem], reading: Reading) -> None:
    """Bad records are errors, one for each refused format of a file; with `skip` they are left out, but not whole files."""
    refused: dict[str, list[Problem]] = {}
    for reason, problem in bad:
        if on_invalid == "skip" and reason != "file":
            reading.left_out.append(problem)
        elif reason.startswith("refused"):
            refused.setdefault(reason, []).append(problem)
        else:
            problems.append(problem)
    for same in refused.values():
        first, more = same[0], len(same) - 1
        found = f"{first.found}, and {more} more of its kind" if more else first.found
        problems.append(Problem(first.file, first.line, first.field, found, first.remedy))


def _reader(format: str) -> Callable[..., Any] | None:
    """The reader of a format's name, None for `auto`. `module:function` is a user's own."""
    if format == "auto":
        return None
    if format in READERS:
        return READERS[format]
    if ":" in format:
        return cast(Callable[..., Any], load_plugin(format, "extract.format"))
    known = f"use one of auto, {', '.join(READERS)}, or module:function"
    raise InputError(Problem("recipe", None, "extract.format", format, known))


def _gathered(records: list[tuple[int, Any]]) -> list[tuple[int, Any]]:
    """The records of a file as one trajectory each: sessions put together, result files taken apart."""
    if any(is_claude_code(record) for _, record in records[:50]):
        return list(claude_code_sessions(records))
    found: list[tuple[int, Any]] = []
    for line, record in records:
        if is_chat(record):
            record = {"messages": record}
        inner = _inner(record)
        found += [(line, record)] if inner is None else enumerate(inner, start=1)
    return found


def _inner(record: Any) -> list[Any] | None:
    """The records that a record holds as a list, None where it is one itself."""
    if not isinstance(record, Mapping):
        return None
    if isinstance(record.get("simulations"), list):
        return tau2_simulations(record)
    if format_of(record):
        return None
    state = record.get("values")  # a graph's state, as LangGraph gives it
    if isinstance(state, Mapping) and is_chat(state.get("messages")):
        return [{**record, "values": None, "messages": state["messages"]}]
    if is_chat(record.get("items")):
        return [{**record, "items": None, "messages": record["items"]}]
    held = [rows for value in record.values() if (rows := _records_in(value))]
    if len(held) == 1:
        return held[0]
    formats = {format_of(value) for value in record.values()}
    keyed = len(record) > 1 and len(formats) == 1 and formats <= READERS.keys()  # by the name of their task
    return list(record.values()) if keyed and not ASKED & record.keys() else None


def _records_in(value: Any) -> list[Any]:
    """The records of a list, as a dataset's viewer or a harness wraps them; nothing where it holds others."""
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        return []
    rows = [item["row"] if isinstance(item.get("row"), dict) else item for item in value]
    return rows if any(format_of(row) for row in rows) else []


def _read(
    record: Any, name: str, reader: Callable[..., Any] | None, context: Context, min_reward: float | None
) -> Draft | Trajectory:
    """Raises FieldError."""
    if not isinstance(record, dict):
        raise FieldError("record", record, "each record is a JSON object")
    if reader is None and name in REFUSED:
        raise FieldError("record", name, REFUSED[name])
    if reader is None and name not in READERS:
        shown = ", ".join(list(record)[:12]) or "an empty object"
        remedy = f"no known format; known are {', '.join(READERS)}; `messages` with role and content is always read"
        raise FieldError("record", f"fields {shown}", remedy)
    try:
        if reader is not None and name not in READERS:  # a user's own
            return reader(record, context.tools, context.source)
        draft = READERS[name](record, context)
    except (TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise FieldError("record", f"{type(error).__name__}: {error}", f"its shape is not the one of {name}") from error
    except FieldError as error:
        other = format_of(record)
        if reader is not None and other in READERS and READERS[other] is not READERS[name]:
            error.remedy += f"; the record looks like {other}: set extract.format=auto"
        raise
    reward = draft.identity.reward
    if not draft.messages and not (reward is not None and min_reward is not None and reward < min_reward):
        key = next((k for k in ("response", *MESSAGES) if k in record), "messages")
        raise FieldError(key, record.get(key), f"`{key}` must be a non-empty list: there is no turn in it", "no_turns")
    return draft


def _excluded(record: Any, min_reward: float | None) -> bool:
    """Whether a record's outcome excludes it, whatever else it holds."""
    if min_reward is None or not isinstance(record, dict):
        return False
    try:
        reward = outcome_of(record, Notes())
    except FieldError:
        return False
    return reward is not None and reward < min_reward


# ---- ids and tasks, over all files ----


def _settle(drafts: Iterable[tuple[Draft | Trajectory, str]], reading: Reading, on_invalid: str) -> list[Problem]:
    """Give every draft its ids and its task. Returns what is wrong: a trajectory id that two records give to themselves."""
    problems: list[Problem] = []
    seen: dict[str, str] = {}
    made: list[tuple[Trajectory, bool]] = []
    rows = Counter(d.identity.row for d, _ in drafts if isinstance(d, Draft) and d.identity.run is None)
    for draft, source in drafts:
        trajectory, own_task = _trajectory(draft, source, rows)
        file, _, line = source.rpartition(":")
        first = seen.get(trajectory.trajectory_id)
        if first is not None:
            named = not isinstance(draft, Draft) or draft.identity.run is not None
            derived = not named or _derived(draft)
            if not derived:
                found, remedy = trajectory.trajectory_id, f"already used at {first}; ids are unique"
                problem = Problem(file, int(line), "trajectory_id", found, remedy)
                if on_invalid == "skip":
                    reading.left_out.append(problem)
                    next(f for f in reading.files if f.path == file).unreadable["repeated_id"] += 1
                else:
                    problems.append(problem)
                continue
            trajectory = _replace(trajectory, trajectory_id=f"{trajectory.trajectory_id}#{file}:{line}")
        seen[trajectory.trajectory_id] = source
        made.append((trajectory, own_task))
    reading.trajectories = _tasks(made)
    return problems


def _derived(draft: Draft | Trajectory) -> bool:
    """Whether the id of a run was put together here, from its task and the number of its repeat."""
    identity = draft.identity if isinstance(draft, Draft) else None
    return identity is not None and identity.task is not None and str(identity.run).startswith(f"{identity.task}-")


def _trajectory(draft: Draft | Trajectory, source: str, rows: Counter[str | None]) -> tuple[Trajectory, bool]:
    """The trajectory, and whether it knows its task. Rows that carry one id are repeats of one task."""
    if isinstance(draft, Trajectory):
        return draft, draft.task_id != draft.trajectory_id
    run, row, task, reward = draft.identity
    name = run or row or source
    if draft.last_only:
        name = f"{name}@{source.rpartition(':')[2]}" if run else source
    if task is None and row is not None and rows[row] > 1:
        task = row
    trajectory = Trajectory(
        trajectory_id=name,
        task_id=task or run or row or source,
        messages=draft.messages,
        tools=draft.tools,
        reward=None if draft.last_only else reward,
        source=source,
        last_only=draft.last_only,
        fields=draft.fields,
        untrained=draft.untrained,
    )
    return trajectory, task is not None or (draft.last_only and run is not None)


def _tasks(made: list[tuple[Trajectory, bool]]) -> list[Trajectory]:
    """Trajectories that do not say their task and open alike are repeats of one, named after the first."""
    first: dict[str, str] = {}
    found = []
    for trajectory, own_task in made:
        if not own_task:
            task = first.setdefault(_opening(trajectory.messages), trajectory.task_id)
            trajectory = _replace(trajectory, task_id=task)
        found.append(trajectory)
    return found


def _opening(messages: Sequence[Message]) -> str:
    """Digest of what comes before the first answer to a user."""
    asked = next((i for i, m in enumerate(messages) if m["role"] == "user"), len(messages))
    end = next((i for i, m in enumerate(messages) if m["role"] == "assistant" and i > asked), len(messages))
    return digest([[m["role"], m["content"]] for m in messages[:end]], 32)


def _replace(trajectory: Trajectory, **changes: Any) -> Trajectory:
    return dataclasses.replace(trajectory, **changes)
