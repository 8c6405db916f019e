"""extract: expert trajectories -> candidates, one for every assistant turn that counts; each points into `trajectories.jsonl`.

The split into train and validation comes before anything else and goes by task, so that no state of a held-out task can
reach training. Every assistant turn is either kept or counted under the reason it was skipped for: kept + skipped =
turns, always.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_pivotrl.algorithms import selection
from nemo_pivotrl.components.conclusions import conclude
from nemo_pivotrl.components.lineage import source_digest
from nemo_pivotrl.components.stage_checks import extract_checks
from nemo_pivotrl.config import Extract, Recipe
from nemo_pivotrl.core.artifacts import Header, digest, write_artefact
from nemo_pivotrl.core.atomic import write_atomically
from nemo_pivotrl.core.errors import InputError, Problem, short
from nemo_pivotrl.core.lock import one_writer
from nemo_pivotrl.core.types import Action, Candidate, Split, Trajectory
from nemo_pivotrl.data import gym_rows as responses, published, states
from nemo_pivotrl.data.readers import Reading, read_trajectories
from nemo_pivotrl.data.splits import split_by_task
from nemo_pivotrl.pivotrl.duplicates import without_duplicates
from nemo_pivotrl.pivotrl.growing_state import GrowingState
from nemo_pivotrl.verifiers.base import is_talk
from nemo_pivotrl.verifiers.loading import excludes_talk

BASH_TOOLS = frozenset(
    [
        "execute_bash",
        "run_bash",
        "bash_exec",
        "shell_run",
        "shell",
        "bash",
        "terminal",
        "shell_command",
        "shell_cmd",
        "run_shell_cmd",
        "exec_command",
        "exec_cmd",
    ]
)
SEARCH_WORDS = frozenset(
    [
        "search",
        "find",
        "open",
        "fetch",
        "browse",
        "visit",
        "lookup",
        "query",
        "retrieve",
        "read",
        "click",
        "scroll",
        "evidence",
    ]
)
NO_TOOLS = "none; name a JSON file with their definitions: extract.tools=FILE"
MAX_NAMED = 1000
"""Problems that the audit names."""
SHOWN = 5
"""Problems and unused fields that are printed."""
_ERROR_START = re.compile(
    r"\s*(traceback \(most recent call last\)|(error|exception|invalid|unknown tool|command not found)\b)",
    re.IGNORECASE,
)


@one_writer
def extract(recipe: Recipe, fresh: bool = False) -> Path:
    """Write `trajectories.jsonl`, `candidates.jsonl` and its audit; returns the candidates' path. Raises InputError for bad
    trajectories.

    >>> path = extract(load_recipe("recipe.yaml", ["run_dir=runs/mine"]))
    >>> path.name
    'candidates.jsonl'
    """
    settings, target = recipe.extract, recipe.path(states.NAME)
    if target.resolve() in (Path(path).resolve() for path in settings.trajectories):
        remedy = "extract writes a file of its own there: move yours out of run_dir"
        raise InputError(Problem("recipe", None, "extract.trajectories", str(target), remedy))
    talk_is_left_out = excludes_talk(recipe.verifier)  # first of all: it refuses a verifier that is not there
    reading = read_trajectories(
        settings.trajectories, settings.format, settings.tools, settings.on_invalid, settings.min_reward
    )
    splits = split_by_task([t.task_id for t in reading.trajectories], settings.validation_share, recipe.seed)
    candidates, audit = cut_all(reading.trajectories, splits, settings)
    parent = source_digest(recipe, "candidates")
    path = recipe.path("candidates.jsonl")
    audit = with_reading(audit, reading)
    told = published.explain(reading.published, settings.agent_ref)
    print("\n".join(filter(None, [audit_table(audit), reading_text(audit), told])))
    if not candidates:
        remedy = "see the skip audit above; loosen extract.* or add trajectories"
        raise InputError(Problem(str(path), None, "candidates", "none kept", remedy))
    talk = sum(is_talk(c.expected, c.fields) for c in candidates) if talk_is_left_out else 0
    if talk:
        print(
            f"the expert talks in {talk} of {len(candidates)} candidates: audit, profile and train leave these out "
            "(verifier.message: exclude; judge or any takes them in), sft does not"
        )
    _write(path, candidates, reading.trajectories, recipe.digest("extract"), parent)
    write_atomically(recipe.path("candidates.audit.json"), json.dumps(audit, indent=2, sort_keys=True) + "\n")
    conclude(Path(recipe.run_dir), "extract", extract_checks(audit, talk))
    return path


def cut_all(
    trajectories: Sequence[Trajectory], splits: dict[str, Split], settings: Extract
) -> tuple[list[Candidate], dict[str, Any]]:
    """Candidates and the audit. Raises InputError with all invalid turns unless `on_invalid: skip`."""
    skipped: Counter[str] = Counter()
    by_file: dict[str, Counter[str]] = {}
    problems: list[Problem] = []
    found: list[Candidate] = []
    for trajectory in trajectories:
        file = by_file.setdefault(trajectory.source.rpartition(":")[0], Counter())
        for index, depth, reason, problem in _judged(trajectory, settings):
            file["turns"] += 1
            if problem is not None:
                problems.append(problem)
            if reason:
                skipped[reason] += 1
            else:
                found.append(_candidate(trajectory, index, depth, splits[trajectory.task_id]))
    if problems and settings.on_invalid == "error":
        raise InputError(_once_a_file(problems))
    kept = without_duplicates(found, skipped, settings.near_duplicate)
    file_of = {t.trajectory_id: t.source.rpartition(":")[0] for t in trajectories}
    for c in kept:
        by_file[file_of[c.trajectory_id]]["kept"] += 1
    total = sum(count["turns"] for count in by_file.values())
    assert len(kept) + skipped.total() == total, "a turn is neither kept nor counted"
    audit = {
        "trajectories": len(trajectories),
        "tasks": {s: sum(v == s for v in splits.values()) for s in ("train", "validation")},
        "turns": total,
        "kept": {s: sum(c.split == s for c in kept) for s in ("train", "validation")},
        "skipped": dict(sorted(skipped.items())),
        "kept_by_action": dict(Counter(c.action_name for c in kept).most_common()),
        "files": {file: {"turns": n["turns"], "kept": n["kept"]} for file, n in by_file.items()},
        "named": [str(problem) for problem in problems[:MAX_NAMED]],
    }
    return kept, audit


def _write(
    path: Path, candidates: Sequence[Candidate], trajectories: Sequence[Trajectory], config_hash: str, parent: str
) -> None:
    """The trajectories that have candidates, then the candidates with pointers into them."""
    kept = {c.trajectory_id for c in candidates}
    stored = [t for t in trajectories if t.trajectory_id in kept]
    place = {t.trajectory_id: number for number, t in enumerate(stored)}
    target = path.with_name(states.NAME)
    write_artefact(target, Header("trajectories", config_hash, parent), map(states.trajectory_row, stored))
    header = Header("candidates", config_hash, parent, extra=states.reference(target, path))
    # ready-made rows of one trajectory share their prefixes in training, as turns that were cut here do
    source = {t.trajectory_id: t.trajectory_id.rpartition("@")[0] for t in stored if t.last_only}
    named = (replace(c, trajectory_id=source.get(c.trajectory_id) or c.trajectory_id) for c in candidates)
    numbers = [place[c.trajectory_id] for c in candidates]
    write_artefact(path, header, map(states.candidate_row, named, numbers))


def _once_a_file(problems: Sequence[Problem]) -> list[Problem]:
    """The problems, with one for all calls of a file whose records define no tool."""
    undefined: dict[str, list[Problem]] = {}
    for problem in problems:
        if NO_TOOLS in problem.remedy:
            undefined.setdefault(problem.file, []).append(problem)
    found = [
        replace(
            same[0],
            line=None,
            field="tools",
            found=f"no definition of the tools that {len(same)} calls use: {', '.join(dict.fromkeys(p.found for p in same))}",
            remedy="name a JSON file with their definitions (docs/formats.md has its shape): extract.tools=FILE",
        )
        for same in undefined.values()
    ]
    return found + [problem for problem in problems if NO_TOOLS not in problem.remedy]


def _judged(trajectory: Trajectory, settings: Extract) -> Iterator[tuple[int, int, str, Problem | None]]:
    """(index, depth, why it is skipped or '', what is to be reported) of every turn."""
    whole = _skip_whole(trajectory, settings)
    state, read = GrowingState(), 0
    for index, depth in selection.cut(trajectory):
        if whole:
            yield index, depth, whole, None
            continue
        for message in trajectory.messages[read:index]:
            state.add(message)
        read = index
        yield index, depth, *_skip_turn(trajectory, index, state, settings)


def audit_table(audit: dict[str, Any]) -> str:
    """The audit as text: what became of every assistant turn."""
    kept, skipped = sum(audit["kept"].values()), sum(audit["skipped"].values())
    lines = [f"{audit['trajectories']} trajectories, {audit['turns']} assistant turns"]
    lines += [f"  kept     {kept:>7}  (train {audit['kept']['train']}, validation {audit['kept']['validation']})"]
    lines += [f"  skipped  {skipped:>7}"]
    lines += [f"    {reason:<26} {count:>7}" for reason, count in audit["skipped"].items()]
    return "\n".join([*lines, f"  {kept} + {skipped} = {audit['turns']}"])


def with_reading(audit: dict[str, Any], reading: Reading) -> dict[str, Any]:
    """The audit with what became of the files' records: what they were taken for, what was left out, what was not used."""
    files = {}
    for file in reading.files:
        counts = audit["files"].get(file.path, {"turns": 0, "kept": 0})
        read = file.records - file.unreadable.total()
        files[file.path] = {
            "taken_for": dict(file.formats),
            "records": file.records,
            "read": read,
            "without_turns": sum(
                not any(m["role"] == "assistant" for m in t.messages)
                for t in reading.trajectories
                if t.source.rpartition(":")[0] == file.path
            ),
            "left_out": dict(file.unreadable),
            **counts,
            "skipped": counts["turns"] - counts["kept"],
        }
    named = [str(problem) for problem in reading.left_out] + audit["named"]
    return {
        **audit,
        "files": files,
        "named": named[:MAX_NAMED],
        "left_out": len(named),
        "unused_fields": dict(reading.notes.unused.most_common()),
        "notes": dict(reading.notes.said.most_common()),
        "published": dict(sorted(reading.published.items())),
    }


def reading_text(audit: dict[str, Any]) -> str:
    """What became of each file's records, as text."""
    lines = []
    for path, file in audit["files"].items():
        taken = ", ".join(
            f"{name} ({n})" if len(file["taken_for"]) > 1 else name for name, n in file["taken_for"].items()
        )
        left = "".join(f" - {n} {reason}" for reason, n in file["left_out"].items())
        crashed = f" ({file['without_turns']} without any turn)" if file["without_turns"] else ""
        counts = f"{file['records']} records{left} = {file['read']} trajectories{crashed}"
        turns = f"{file['turns']} turns = {file['kept']} kept + {file['skipped']} skipped"
        lines.append(f"{path}: taken for {taken or 'nothing'}: {counts}; {turns}")
    lines += [f"  {count:>7} {note}" for note, count in audit["notes"].items()]
    if audit["unused_fields"]:
        shown = [f"{name} ({n})" for name, n in list(audit["unused_fields"].items())[: 3 * SHOWN]]
        more = len(audit["unused_fields"]) - len(shown)
        lines.append("seen and not used: " + ", ".join(shown) + (f", and {more} more fields" if more > 0 else ""))
    if audit["left_out"]:
        lines.append(
            f"left out by extract.on_invalid=skip: {audit['left_out']}; all are named in candidates.audit.json"
        )
        lines += [f"  {problem}" for problem in audit["named"][:SHOWN]]
    if audit["trajectories"] > 1 and sum(audit["tasks"].values()) == 1:
        lines.append(
            "all trajectories are of one task, or open alike: nothing is held out; give each record its task_id"
        )
    near = audit["skipped"].get("near_duplicate_state", 0)
    if near > 0.2 * max(audit["turns"], 1):
        lines.append(f"{near} of {audit['turns']} turns fell to extract.near_duplicate; 1.0 turns it off")
    return "\n".join(lines)


def _skip_whole(trajectory: Trajectory, settings: Extract) -> str:
    if trajectory.reward is None:
        return "trajectory_unrewarded" if settings.unrewarded == "skip" and not trajectory.last_only else ""
    return "trajectory_below_min_reward" if trajectory.reward < settings.min_reward else ""


def _skip_turn(
    trajectory: Trajectory, index: int, state: GrowingState, settings: Extract
) -> tuple[str, Problem | None]:
    """Why this turn is no candidate ('' if it is one), and the problem to report if it is invalid rather than unwanted."""
    action = responses.action_of(trajectory.messages[index])
    unwanted = _unwanted(trajectory, index, action, settings)
    if unwanted:
        return unwanted, None
    file, _, line = trajectory.source.rpartition(":")
    where = f"messages[{index}]"
    dangling = state.dangling_call()
    if dangling:
        return "dangling_call", Problem(
            file,
            int(line),
            where,
            dangling,
            "every call needs its output before the next turn; mend it or set extract.on_invalid=skip",
        )
    for number, call in enumerate(action.calls):
        reason, found, remedy = check_call(call.name, call.arguments, trajectory.tools)
        if reason:
            at = f"{where}.tool_calls[{number}].function." + ("name" if reason == "unknown_tool" else "arguments")
            return reason, Problem(file, int(line), at, found, f"{remedy}; mend it or set extract.on_invalid=skip")
    return ("answer_leak", None) if state.leaks(action) else ("", None)


def _unwanted(trajectory: Trajectory, index: int, action: Action, settings: Extract) -> str:
    if index in trajectory.untrained:
        return trajectory.untrained[index]
    if action.kind == "message" and not action.content.strip():
        return "empty_turn"
    if index == 0:
        return "no_state"
    if index > settings.max_state_messages:
        return "state_too_long"
    if len(action.calls) > 1 and settings.parallel_calls == "skip":
        return "parallel_calls"
    if settings.turns == "all":
        return ""
    if not action.calls:
        commands = settings.turns == "bash" and responses.is_terminus(trajectory.fields)
        return "" if commands else "not_a_tool_call"
    names = [c.name.lower() for c in action.calls]
    if settings.turns == "bash":
        return "" if all(name in BASH_TOOLS for name in names) else "not_a_bash_action"
    if settings.turns == "search":
        return "" if all(SEARCH_WORDS & set(re.split(r"[^a-z]+", name)) for name in names) else "not_a_search_step"
    outputs = trajectory.messages[index + 1 : index + 1 + len(names)]
    return "tool_error" if any(m["role"] == "tool" and is_error(m["content"]) for m in outputs) else ""


def is_error(output: str) -> bool:
    """Whether a tool's output reports an error: it begins like one, or is a JSON object with a truthy `error`."""
    if output.lstrip()[:1] == "{":
        try:
            parsed = json.loads(output)
        except (ValueError, RecursionError):
            parsed = {}
        if isinstance(parsed, dict) and (
            parsed.get("error") or parsed.get("is_error") or parsed.get("exit_code") not in (None, 0, "0")
        ):
            return True
    return bool(_ERROR_START.match(output[:200]))


def check_call(name: str, arguments: str, tools: Sequence[dict[str, Any]]) -> tuple[str, str, str]:
    """(reason, found, remedy), all '' for a call that its tool's schema allows."""
    from nemo_pivotrl.verifiers.schema import BadSchema, difference

    schema = next((t["function"].get("parameters") or {} for t in tools if t["function"]["name"] == name), None)
    if schema is None:
        declared = ", ".join(t["function"]["name"] for t in tools) or NO_TOOLS
        return "unknown_tool", repr(name), f"declared tools: {declared}"
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError) as error:
        return "invalid_arguments", short(arguments), f"not JSON ({short(str(error), 60)})"
    try:
        message = difference(schema, value)
    except BadSchema as error:
        return "invalid_schema", short(str(error)), f"the schema of tool {name!r} is itself invalid"
    if not message and isinstance(value, dict):
        return "", "", ""
    message = message or f"{type(value).__name__} instead of an object"
    return "invalid_arguments", short(arguments), f"against the schema of {name!r}: {short(message)}"


def _candidate(trajectory: Trajectory, index: int, depth: int, split: Split) -> Candidate:
    return Candidate(
        candidate_id=digest([trajectory.trajectory_id, index]),
        trajectory_id=trajectory.trajectory_id,
        task_id=trajectory.task_id,
        split=split,
        turn=index,
        depth=depth,
        messages=trajectory.messages[:index],
        tools=trajectory.tools,
        expected=responses.action_of(trajectory.messages[index]),
        fields=trajectory.fields,
    )
