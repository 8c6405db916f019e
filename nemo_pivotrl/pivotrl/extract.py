"""extract: expert trajectories -> candidates, one for every assistant turn that counts.

The split into train and validation comes before anything else and goes by task, so that no state of a held-out task can
reach training. Every assistant turn is either kept or counted under the reason it was skipped for: kept + skipped =
turns, always.
"""

from __future__ import annotations

import dataclasses
import json
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_pivotrl.algorithms import pivotrl
from nemo_pivotrl.config import Extract, Recipe
from nemo_pivotrl.core.artifacts import ArtefactWriter, Header, canonical_json, digest, file_digest
from nemo_pivotrl.core.atomic import write_atomically
from nemo_pivotrl.core.errors import InputError, Problem, short
from nemo_pivotrl.core.types import Action, Candidate, Message, Split, Trajectory
from nemo_pivotrl.data import gym_rows as responses, published, trajectories as readers
from nemo_pivotrl.data.splits import split_by_task

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
LEAK_MIN_WORDS = 8
"""A shorter expert message that also stands in the prompt ("Yes, sure.") is no leak."""
SHINGLE = 5
SKETCH_SIZE = 128
SKETCH_BANDS = (16, 8)
"""16 bands of 8: states above 0.9 similarity meet with probability > 0.999, then their sketches are compared."""
_ERROR_START = re.compile(
    r"\s*(traceback \(most recent call last\)|(error|exception|invalid|unknown tool|command not found)\b)",
    re.IGNORECASE,
)


def extract(recipe: Recipe, fresh: bool = False) -> Path:
    """Write `candidates.jsonl` and its audit; returns the artefact's path. Raises InputError for bad trajectories."""
    settings = recipe.extract
    seen: Counter[str] = Counter()
    trajectories = readers.read_trajectories(
        settings.trajectories, settings.format, settings.tools, lambda record: seen.update(published.marks(record))
    )
    splits = split_by_task([t.task_id for t in trajectories], settings.validation_share, recipe.seed)
    candidates, audit = cut_all(trajectories, splits, settings)
    parent = digest(
        [[file_digest(Path(p)) for p in settings.trajectories], settings.tools and file_digest(Path(settings.tools))]
    )
    path = recipe.path("candidates.jsonl")
    audit["published"] = dict(sorted(seen.items()))
    print("\n".join(filter(None, [audit_table(audit), published.explain(seen, settings.agent_ref)])))
    if not candidates:
        remedy = "see the skip audit above; loosen extract.* or add trajectories"
        raise InputError(Problem(str(path), None, "candidates", "none kept", remedy))
    header = Header("candidates", recipe.digest("extract"), parent)
    with ArtefactWriter(path, header, fresh=True) as writer:
        writer.write(responses.candidate_to_row(c, settings.agent_ref) for c in candidates)
        writer.finish()
    write_atomically(recipe.path("candidates.audit.json"), json.dumps(audit, indent=2, sort_keys=True) + "\n")
    return path


def cut_all(
    trajectories: Sequence[Trajectory], splits: dict[str, Split], settings: Extract
) -> tuple[list[Candidate], dict[str, Any]]:
    """Candidates and the audit. Raises InputError with all invalid turns unless `on_invalid: skip`."""
    skipped: Counter[str] = Counter()
    problems: list[Problem] = []
    found: list[Candidate] = []
    turns = 0
    validators = _Validators()
    for trajectory in trajectories:
        cuts = list(pivotrl.cut(trajectory))
        turns += len(cuts)
        whole = _skip_whole(trajectory, settings)
        if whole:
            skipped[whole] += len(cuts)
            continue
        for index, depth in cuts:
            reason, problem = _skip_turn(trajectory, index, settings, validators)
            if problem is not None and settings.on_invalid == "error":
                problems.append(problem)
            if reason:
                skipped[reason] += 1
            else:
                found.append(_candidate(trajectory, index, depth, splits[trajectory.task_id]))
    if problems:
        raise InputError(problems)
    kept = _without_duplicates(found, skipped, settings.near_duplicate)
    source_of = {
        t.trajectory_id: t.trajectory_id.rpartition("@")[0] or t.trajectory_id for t in trajectories if t.last_only
    }
    # ready-made rows of one trajectory share their prefixes in training, as turns that were cut here do
    kept = [dataclasses.replace(c, trajectory_id=source_of.get(c.trajectory_id, c.trajectory_id)) for c in kept]
    assert len(kept) + skipped.total() == turns, "a turn is neither kept nor counted"
    audit = {
        "trajectories": len(trajectories),
        "tasks": {s: sum(v == s for v in splits.values()) for s in ("train", "validation")},
        "turns": turns,
        "kept": {s: sum(c.split == s for c in kept) for s in ("train", "validation")},
        "skipped": dict(sorted(skipped.items())),
        "kept_by_action": dict(Counter(c.action_name for c in kept).most_common()),
    }
    return kept, audit


def audit_table(audit: dict[str, Any]) -> str:
    """The audit as text: what became of every assistant turn."""
    kept, skipped = sum(audit["kept"].values()), sum(audit["skipped"].values())
    lines = [f"{audit['trajectories']} trajectories, {audit['turns']} assistant turns"]
    lines += [f"  kept     {kept:>7}  (train {audit['kept']['train']}, validation {audit['kept']['validation']})"]
    lines += [f"  skipped  {skipped:>7}"]
    lines += [f"    {reason:<26} {count:>7}" for reason, count in audit["skipped"].items()]
    return "\n".join([*lines, f"  {kept} + {skipped} = {audit['turns']}"])


def _skip_whole(trajectory: Trajectory, settings: Extract) -> str:
    if trajectory.reward is None:
        return "trajectory_unrewarded" if settings.unrewarded == "skip" and not trajectory.last_only else ""
    return "trajectory_below_min_reward" if trajectory.reward < settings.min_reward else ""


def _skip_turn(
    trajectory: Trajectory, index: int, settings: Extract, validators: _Validators
) -> tuple[str, Problem | None]:
    """Why this turn is no candidate ('' if it is one), and the problem to report if it is invalid rather than unwanted."""
    state, message = trajectory.messages[:index], trajectory.messages[index]
    action = responses.action_of(message)
    unwanted = _unwanted(trajectory, index, action, settings)
    if unwanted:
        return unwanted, None
    file, _, line = trajectory.source.rpartition(":")
    where = f"messages[{index}]"
    dangling = dangling_call(state)
    if dangling:
        return "dangling_call", Problem(
            file,
            int(line),
            where,
            dangling,
            "every call needs its output before the next turn; mend it or set extract.on_invalid=skip",
        )
    for number, call in enumerate(action.calls):
        reason, found, remedy = validators.check(call.name, call.arguments, trajectory.tools)
        if reason:
            at = f"{where}.tool_calls[{number}].function." + ("name" if reason == "unknown_tool" else "arguments")
            return reason, Problem(file, int(line), at, found, f"{remedy}; mend it or set extract.on_invalid=skip")
    return ("answer_leak", None) if leaks(state, action) else ("", None)


def _unwanted(trajectory: Trajectory, index: int, action: Action, settings: Extract) -> str:
    if action.kind == "message" and not action.content.strip():
        return "empty_turn"
    if index == 0:
        return "no_state"
    if len(action.calls) > 1 and settings.parallel_calls == "skip":
        return "parallel_calls"
    if settings.turns == "all":
        return ""
    if not action.calls:
        return "not_a_tool_call"
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


def dangling_call(state: Sequence[Message]) -> str:
    """What is wrong with the pairing of calls and outputs in a state, '' if nothing."""
    pending: list[str] = []
    for index, message in enumerate(state):
        if message["role"] == "tool":
            call_id = message.get("tool_call_id", "")
            if not pending:
                return f"messages[{index}] is an output without a call"
            if call_id and call_id in pending:
                pending.remove(call_id)
            elif call_id and all(pending):
                return f"messages[{index}] answers call {call_id!r}, which nobody made"
            else:
                pending.pop(0)
            continue
        if pending:
            return f"call {pending[0]!r} has no output before messages[{index}]"
        pending = [call["id"] for call in message.get("tool_calls") or []]
    return f"call {pending[0]!r} has no output" if pending else ""


def leaks(state: Sequence[Message], action: Action) -> bool:
    """Whether the state already contains the expert's answer.

    It does when it ends with an assistant turn, when the very call (id, name and arguments) occurs in it, when a system
    or user message holds a call's arguments verbatim (two or more keys) with the tool's name, or a long message's text.
    A reused id alone is no leak: real traces reuse them.
    """
    if state[-1]["role"] == "assistant":
        return True
    made = {
        (c["id"], c["function"]["name"], c["function"]["arguments"]) for m in state for c in m.get("tool_calls") or []
    }
    if any(call.call_id and (call.call_id, call.name, call.arguments) in made for call in action.calls):
        return True
    told = "\n".join(m["content"] for m in state if m["role"] in ("system", "developer", "user"))
    for call in action.calls:
        if call.arguments.count(":") >= 2 and call.arguments in told and call.name in told:
            return True
    return not action.calls and len(action.content.split()) >= LEAK_MIN_WORDS and action.content.strip() in told


class _Validators:
    """JSON-schema validators of tools, compiled once each."""

    def __init__(self) -> None:
        self._compiled: dict[str, Any] = {}

    def check(self, name: str, arguments: str, tools: Sequence[dict[str, Any]]) -> tuple[str, str, str]:
        """(reason, found, remedy), all '' for a valid call."""
        from jsonschema import Draft202012Validator, SchemaError

        schema = next((t["function"].get("parameters") or {} for t in tools if t["function"]["name"] == name), None)
        if schema is None:
            return (
                "unknown_tool",
                repr(name),
                f"declared tools: {', '.join(t['function']['name'] for t in tools) or 'none'}",
            )
        try:
            value = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            return "invalid_arguments", short(arguments), f"not JSON ({short(str(error), 60)})"
        key = canonical_json(schema)
        if key not in self._compiled:
            try:
                Draft202012Validator.check_schema(schema)
            except SchemaError as error:
                return "invalid_schema", short(error.message), f"the schema of tool {name!r} is itself invalid"
            self._compiled[key] = Draft202012Validator(schema)
        error = next(self._compiled[key].iter_errors(value), None)
        if error is None and isinstance(value, dict):
            return "", "", ""
        message = error.message if error else f"{type(value).__name__} instead of an object"
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


def _without_duplicates(candidates: list[Candidate], skipped: Counter[str], threshold: float) -> list[Candidate]:
    """One candidate for each state: exact repeats (call ids aside) first, then near repeats of other trajectories.

    Held-out states are seen first, so that a state which occurs in both splits leaves the train split.
    """
    actions: dict[str, set[str]] = {}
    first: dict[str, Candidate] = {}
    for c in sorted(candidates, key=lambda c: c.split == "train"):
        key = digest([[{**m, "tool_call_id": "", "tool_calls": _without_ids(m)} for m in c.messages], c.tools], 32)
        actions.setdefault(key, set()).add(
            canonical_json([c.expected.content, [(call.name, call.arguments) for call in c.expected.calls]])
        )
        if first.setdefault(key, c) is not c:
            skipped["duplicate_state"] += 1
    near = _NearDuplicates(threshold) if threshold < 1.0 else None
    kept = {}
    for key, c in first.items():
        if near is not None and near.seen(c):
            skipped["near_duplicate_state"] += 1
        else:
            kept[c.candidate_id] = dataclasses.replace(c, num_unique_actions=len(actions[key]))
    return [kept[c.candidate_id] for c in candidates if c.candidate_id in kept]


def _without_ids(message: Message) -> list[Any]:
    return [call["function"] for call in message.get("tool_calls") or []]


class _NearDuplicates:
    """MinHash over word 5-grams of the conversation (system message aside), within depth and expert's tool.

    The states of a trajectory grow out of one another, so its sketch grows with it: the cost is one pass over the text.
    """

    def __init__(self, threshold: float):
        self.threshold = threshold
        self._indexes: dict[tuple[int, str], Any] = {}
        self._trajectory = ""
        self._read = 0
        self._tail: list[str] = []
        self._sketch: Any = None

    def seen(self, candidate: Candidate) -> bool:
        """Whether a state of another trajectory is this similar; remembers the candidate if not."""
        from datasketch import MinHashLSH

        self._advance(candidate)
        group = (candidate.depth, candidate.action_name)
        if group not in self._indexes:
            self._indexes[group] = (MinHashLSH(num_perm=SKETCH_SIZE, params=SKETCH_BANDS), {})
        index, kept = self._indexes[group]
        for key in index.query(self._sketch):
            if kept[key][0] != candidate.trajectory_id and kept[key][1].jaccard(self._sketch) >= self.threshold:
                return True
        sketch = self._sketch.copy()
        index.insert(candidate.candidate_id, sketch)
        kept[candidate.candidate_id] = (candidate.trajectory_id, sketch)
        return False

    def _advance(self, candidate: Candidate) -> None:
        from datasketch import MinHash

        if candidate.trajectory_id != self._trajectory:
            self._trajectory, self._read, self._tail = candidate.trajectory_id, 0, []
            self._sketch = MinHash(num_perm=SKETCH_SIZE, seed=1, hashfunc=zlib.crc32)
        new = [_spoken(m) for m in candidate.messages[self._read :] if m["role"] != "system"]
        words = [*self._tail, *" ".join(new).lower().split()]
        shingles = [" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))]
        self._sketch.update_batch([shingle.encode("utf-8", "replace") for shingle in shingles])
        self._read, self._tail = len(candidate.messages), words[-SHINGLE + 1 :]


def _spoken(message: Message) -> str:
    return message["content"] + " " + " ".join(f["name"] + " " + f["arguments"] for f in _without_ids(message))
