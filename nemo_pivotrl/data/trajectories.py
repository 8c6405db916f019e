"""Outside trajectory formats -> `Trajectory`. One function a format, all errors of all files in one go.

Formats: `openai` (chat messages, JSON or JSONL), `responses` (Responses items: NeMo-Gym pivot rows and Gym rollouts),
`sharegpt` (`conversations` of from/value, with ShareGPT, LLaMA-Factory or Hermes tool markup), `tau_bench` (result
files of tau-bench: a JSON list with `traj`).
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nemo_pivotrl.core.errors import InputError, Problem, short
from nemo_pivotrl.core.types import Message, Trajectory
from nemo_pivotrl.data.gym_rows import (
    expected_of_row,
    message_of,
    text_of,
    to_messages,
    tool_to_chat,
    verifier_fields,
)

ROLES = ("system", "developer", "user", "assistant", "tool")


class FieldError(ValueError):
    """A record is unusable: which field, what stands there, what to do."""

    def __init__(self, field: str, found: object, remedy: str):
        super().__init__(field)
        self.field, self.found, self.remedy = field, short(found), remedy


def read_trajectories(
    paths: Sequence[str],
    format: str,
    tools_file: str | None,
    watch: Callable[[dict[str, Any]], None] | None = None,
) -> list[Trajectory]:
    """All trajectories of `paths`; `watch` sees every record as it is. Raises InputError listing every bad line of every file."""
    problems: list[Problem] = []
    tools = _read_tools(tools_file) if tools_file else ()
    if not paths:
        raise InputError(
            Problem("recipe", None, "extract.trajectories", "nothing", "name at least one trajectory file")
        )
    found: list[Trajectory] = []
    for path in paths:
        before = len(found) + len(problems)
        for line, record in read_records(Path(path), problems, "extract.trajectories"):
            try:
                if not isinstance(record, dict):
                    raise FieldError("record", record, "each record is a JSON object")
                if watch is not None:
                    watch(record)
                found.append(READERS[format](record, tools, f"{path}:{line}"))
            except FieldError as error:
                problems.append(Problem(path, line, error.field, error.found, error.remedy))
        if len(found) + len(problems) == before:
            problems.append(
                Problem(
                    path, None, "file", "no records", "the file is empty; check the path or drop it from the recipe"
                )
            )
    seen: dict[str, Trajectory] = {}
    for trajectory in found:
        first = seen.setdefault(trajectory.trajectory_id, trajectory)
        if first is not trajectory:
            file, _, line = trajectory.source.rpartition(":")
            problems.append(
                Problem(
                    file,
                    int(line),
                    "trajectory_id",
                    trajectory.trajectory_id,
                    f"already used at {first.source}; ids are unique",
                )
            )
    if problems:
        raise InputError(problems)
    return found


def read_records(path: Path, problems: list[Problem], setting: str) -> Iterator[tuple[int, Any]]:
    """(line or element number, record) of a JSONL file or a JSON list, either of them gzipped where it is named `.gz`.

    What cannot be read goes to `problems`; `setting` is the recipe's name for the path.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as handle:
            start = handle.read(64).lstrip()
            handle.seek(0)
            if start.startswith(b"["):
                listed = json.load(handle)
                yield from enumerate(listed, start=1)
                return
            for number, line in enumerate(handle, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    problems.append(
                        Problem(
                            str(path),
                            number,
                            "line",
                            short(line.decode("utf-8", "replace")),
                            f"broken JSON ({error}); mend or drop it",
                        )
                    )
                    continue
                if isinstance(record, dict) and "nemo_pivotrl" in record:
                    continue
                yield number, record
    except FileNotFoundError:
        problems.append(Problem(str(path), None, setting, str(path), "no such file"))
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        problems.append(Problem(str(path), None, "file", "broken gzip", f"{error}; fetch it again"))
    except (ValueError, RecursionError) as error:
        problems.append(Problem(str(path), getattr(error, "lineno", None), "file", "broken JSON", str(error)))


def _read_tools(path: str) -> tuple[dict[str, Any], ...]:
    try:
        raw = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise InputError(Problem(path, None, "extract.tools", path, "no such file")) from None
    except (ValueError, RecursionError) as error:
        raise InputError(
            Problem(path, getattr(error, "lineno", None), "extract.tools", "broken JSON", str(error))
        ) from None
    try:
        return _tools(raw, "extract.tools")
    except FieldError as error:
        raise InputError(Problem(path, None, error.field, error.found, error.remedy)) from None


def _tools(raw: Any, where: str) -> tuple[dict[str, Any], ...]:
    if isinstance(raw, str):
        try:
            raw = json.loads(raw)
        except (ValueError, RecursionError):
            raise FieldError(where, raw, "tools given as text must be a JSON list") from None
    if not isinstance(raw, list):
        raise FieldError(where, raw, "tools are a list of definitions")
    tools = []
    for index, tool in enumerate(raw):
        chat = tool_to_chat(tool) if isinstance(tool, dict) else {"function": None}
        function = chat["function"]
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise FieldError(
                f"{where}[{index}]", tool, "a tool needs a name: {type: function, function: {name, parameters}}"
            )
        tools.append(chat)
    return tuple(tools)


def _required(record: dict[str, Any], key: str, kind: type) -> Any:
    if key not in record:
        raise FieldError(key, "missing", f"a record needs `{key}`")
    if not isinstance(record[key], kind) or not record[key]:
        raise FieldError(key, record[key], f"`{key}` must be a non-empty {kind.__name__}")
    return record[key]


def _identity(record: dict[str, Any], source: str) -> tuple[str, str, float | None]:
    trajectory_id = next((str(record[k]) for k in ("trajectory_id", "id", "uuid") if record.get(k) is not None), source)
    task_id = str(record["task_id"]) if record.get("task_id") is not None else trajectory_id
    reward = record.get("reward")
    if reward is not None and (
        isinstance(reward, bool) or not isinstance(reward, (int, float)) or not abs(reward) < 1e300
    ):  # not nan, not inf
        raise FieldError("reward", reward, "a number, or leave the field out")
    return trajectory_id, task_id, None if reward is None else float(reward)


def check_messages(raw: Sequence[Any]) -> tuple[Message, ...]:
    """Chat messages in our form. Raises FieldError for the first malformed one."""
    messages = []
    for index, message in enumerate(raw):
        where = f"messages[{index}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            found = message.get("role", "missing") if isinstance(message, dict) else message
            raise FieldError(f"{where}.role", found, f"use one of {', '.join(ROLES)}")
        clean: Message = {"role": message["role"], "content": _text(message.get("content"), f"{where}.content")}
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        if message["role"] == "assistant" and reasoning:
            clean["reasoning_content"] = _text(reasoning, f"{where}.reasoning_content")
        if message.get("tool_calls"):
            if not isinstance(message["tool_calls"], list):
                raise FieldError(
                    f"{where}.tool_calls", message["tool_calls"], "a list of calls, or leave the field out"
                )
            clean["tool_calls"] = [
                _call(call, f"{where}.tool_calls[{k}]") for k, call in enumerate(message["tool_calls"])
            ]
        if message["role"] == "tool":
            clean["tool_call_id"] = str(message.get("tool_call_id") or "")
        messages.append(clean)
    return tuple(messages)


def _text(content: Any, where: str) -> str:
    parts = isinstance(content, list) and all(isinstance(part, (str, dict)) for part in content)
    if content is not None and not isinstance(content, str) and not parts:
        raise FieldError(where, content, "text, a list of text parts, or null")
    return text_of(content)


def _call(raw: Any, where: str) -> dict[str, Any]:
    function = raw.get("function") if isinstance(raw, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise FieldError(f"{where}.function.name", raw, "a call needs function.name and function.arguments")
    arguments = function.get("arguments")
    if isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if not isinstance(arguments, str):
        raise FieldError(f"{where}.function.arguments", arguments, "arguments are a JSON text or an object")
    return {
        "id": str(raw.get("id") or ""),
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def read_openai(record: dict[str, Any], tools: tuple[dict[str, Any], ...], source: str) -> Trajectory:
    """`{"messages": [...], "tools": [...], "task_id", "trajectory_id", "reward"}`; tools may come from extract.tools."""
    messages = check_messages(_required(record, "messages", list))
    own = _tools(record["tools"], "tools") if record.get("tools") else tools
    return Trajectory(*_identity(record, source)[:2], messages, own, _identity(record, source)[2], source)


def read_tau_bench(record: dict[str, Any], tools: tuple[dict[str, Any], ...], source: str) -> Trajectory:
    """One result of tau-bench: `task_id`, `trial`, `reward`, `traj` (or `messages`)."""
    key = "messages" if "messages" in record else "traj"
    messages = check_messages(_required(record, key, list))
    if record.get("task_id") is None:
        raise FieldError(
            "task_id",
            "missing",
            "tau-bench results carry task_id; without it train and validation cannot be split by task",
        )
    trial = record.get("trial", 0)
    named = {"trajectory_id": f"{record['task_id']}-{trial}", **record}
    trajectory_id, task_id, reward = _identity(named, source)
    return Trajectory(trajectory_id, task_id, messages, tools, reward, source)


def read_responses(record: dict[str, Any], tools: tuple[dict[str, Any], ...], source: str) -> Trajectory:
    """A Gym pivot row (`expected_action`) or a Gym rollout (`response.output` after `responses_create_params.input`)."""
    params = _required(record, "responses_create_params", dict)
    items = params.get("input")
    if isinstance(items, str):
        items = [{"role": "user", "content": items}]
    if not isinstance(items, list) or not items:
        raise FieldError("responses_create_params.input", items, "a non-empty list of Responses items")
    pivot_row = record.get("expected_action") is not None or record.get("expected_answer") is not None
    field = "expected_action"
    try:
        if record.get("expected_action") is not None:
            last = [message_of(expected_of_row(record["expected_action"]))]
        elif pivot_row:  # a terminus row: the expert's turn is a JSON text
            last = [{"role": "assistant", "content": _required(record, "expected_answer", str)}]
        else:
            field = "response.output"
            last = to_messages(record["response"]["output"])
        field = "responses_create_params.input"
        messages = check_messages([*to_messages(items), *last])
    except (KeyError, TypeError, AttributeError) as error:
        raise FieldError(
            field,
            f"missing or malformed: {error}",
            "see the Gym row contract: message, reasoning, function_call, function_call_output",
        ) from None
    except FieldError:
        raise
    except ValueError as error:
        raise FieldError(
            field, error, "see the Gym row contract: message, reasoning, function_call, function_call_output"
        ) from None
    own = _tools(params["tools"], "responses_create_params.tools") if params.get("tools") else tools
    trajectory_id, task_id, reward = _identity(_of_source(record) if pivot_row else record, source)
    if pivot_row:  # the id names the source trajectory, of which this row is one turn
        if record.get("task_id") is None and isinstance(record.get("provenance"), dict):  # a row of ours
            task_id = str(record["provenance"].get("task_id") or task_id)
        trajectory_id = f"{trajectory_id}@{source.rpartition(':')[2]}"
    return Trajectory(
        trajectory_id,
        task_id,
        messages,
        own,
        None if pivot_row else reward,
        source,
        last_only=pivot_row,
        fields=verifier_fields(record),
    )


def _of_source(row: dict[str, Any]) -> dict[str, Any]:
    """A pivot row named after its source trajectory: a terminal row's own `uuid` names the row alone."""
    metadata = row.get("metadata")
    uid = metadata.get("source_trajectory_uid") if isinstance(metadata, dict) else None
    return row if uid is None or row.get("trajectory_id") is not None else {**row, "trajectory_id": uid}


_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "system": "system",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "call",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


def read_sharegpt(record: dict[str, Any], tools: tuple[dict[str, Any], ...], source: str) -> Trajectory:
    """`conversations` of {from, value}. Calls as `function_call` turns or Hermes `<tool_call>` text in gpt turns."""
    from nemo_pivotrl.data.chat_template import parse_hermes

    raw, numbered = [], 0
    if record.get("system"):
        raw.append({"role": "system", "content": record["system"]})
    pending: list[str] = []
    for index, turn in enumerate(_required(record, "conversations", list)):
        where = f"conversations[{index}]"
        role = _SHAREGPT_ROLES.get(str(turn.get("from"))) if isinstance(turn, dict) else None
        if role is None or not isinstance(turn.get("value"), str):
            raise FieldError(where, turn, f"a turn needs `value` and `from`, one of {', '.join(_SHAREGPT_ROLES)}")
        value = turn["value"]
        if role == "tool":
            value = value.replace("<tool_response>", "").replace("</tool_response>", "").strip()
            raw.append({"role": "tool", "content": value, "tool_call_id": pending.pop(0) if pending else ""})
            continue
        if role not in ("assistant", "call"):
            raw.append({"role": role, "content": value})
            continue
        try:
            content, calls = parse_hermes(f"<tool_call>{value}</tool_call>" if role == "call" else value, ())
        except (ValueError, RecursionError) as error:
            raise FieldError(f"{where}.value", value, f"the tool call cannot be read: {error}") from None
        message: Message = {"role": "assistant", "content": content.strip() if calls else value}
        if calls:
            ids = [f"call_{numbered + k}" for k in range(len(calls))]
            numbered, pending = numbered + len(calls), ids
            message["tool_calls"] = [
                {"id": i, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
                for i, c in zip(ids, calls, strict=True)
            ]
        raw.append(message)
    own = _tools(record["tools"], "tools") if record.get("tools") else tools
    trajectory_id, task_id, reward = _identity(record, source)
    return Trajectory(trajectory_id, task_id, check_messages(raw), own, reward, source)


READERS: dict[str, Callable[[dict[str, Any], tuple[dict[str, Any], ...], str], Trajectory]] = {
    "openai": read_openai,
    "responses": read_responses,
    "sharegpt": read_sharegpt,
    "tau_bench": read_tau_bench,
}
