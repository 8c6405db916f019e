"""Result files of agent harnesses: tau-bench, tau2-bench, SWE-agent, mini-swe-agent, Claude Code."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

from nemo_pivotrl.data.gym_rows import to_messages
from nemo_pivotrl.data.readers.chat import IDENTITY
from nemo_pivotrl.data.readers.drafts import Context, Draft, draft_of, note_unused
from nemo_pivotrl.data.readers.messages import FieldError

GREETING = "given_turn"
"""Skip reason of a turn that the policy did not write: a scripted greeting, a demonstration, the history of a rollout's input."""


def read_tau_bench(record: dict[str, Any], context: Context) -> Draft:
    """One result of tau-bench: `task_id`, `trial`, `reward`, `traj` (or `messages`); or one simulation of tau2-bench."""
    if is_tau2(record):
        return read_tau2_bench(record, context)
    key = "messages" if "messages" in record else "traj"
    note_unused(record, (key, "info", *IDENTITY), context.notes)
    draft = draft_of(record, record.get(key), context, where=key)
    if draft.identity.task is None:
        remedy = "tau-bench results carry task_id; without it train and validation cannot be split by task"
        raise FieldError("task_id", "missing", remedy)
    if draft.identity.run is None:
        draft.identity = draft.identity._replace(run=f"{draft.identity.task}-0")
    return draft


def is_tau2(record: Mapping[str, Any]) -> bool:
    """Whether a record is one simulation of tau2-bench."""
    marks = {"termination_reason", "reward_info", "agent_cost", "ticks", "policy"} & record.keys()
    return isinstance(record.get("messages"), list) and "task_id" in record and bool(marks)


FAILED = ("error", "max_steps", "timeout", "context")
"""Words in the termination reason of a simulation that ended without a reward because it failed."""


def read_tau2_bench(record: dict[str, Any], context: Context) -> Draft:
    """One simulation of tau2-bench: flat calls, `reward_info.reward`; the policy stands in the file's `info`.

    What the simulated user does with tools of its own is not in the agent's view and is left out; the scripted greeting is no
    turn of the policy.
    """
    if record.get("ticks"):
        raise FieldError("ticks", "a voice simulation", "only text is trained; run tau2 in its text mode")
    raw, hidden, theirs = [], 0, set()
    messages = record.get("messages")
    for message in messages if isinstance(messages, list) else []:
        inner = message.get("tool_messages") if isinstance(message, dict) else None
        for m in inner if isinstance(inner, list) else [message]:
            if isinstance(m, dict) and (_users_own(m) or (m.get("role") == "tool" and str(m.get("id")) in theirs)):
                calls = m["tool_calls"] if isinstance(m.get("tool_calls"), list) else []
                theirs |= {str(c.get("id")) for c in calls if isinstance(c, dict)}
                hidden += 1
                if isinstance(m.get("content"), str) and m["content"].strip() and m.get("role") == "user":
                    raw.append({"role": "user", "content": m["content"]})
                continue
            if isinstance(m, dict) and m.get("is_audio"):
                raise FieldError("messages[].is_audio", True, "only text is trained")
            raw.append({k: v for k, v in m.items() if k in _TAU2_SAID} if isinstance(m, dict) else m)
    if hidden:
        context.notes.said[
            "messages between a simulated user and its own tools: not in the agent's view, left out"
        ] += hidden
    known = ("messages", "policy", "reward_info", "termination_reason", *_TAU2_UNUSED, *IDENTITY)
    note_unused(record, known, context.notes)
    kept = {key: value for key, value in record.items() if key not in ("info", "seed")}
    draft = draft_of(
        kept, raw if isinstance(messages, list) else messages, context, system=str(record.get("policy") or "")
    )
    first = next((i for i, m in enumerate(draft.messages) if m["role"] == "assistant"), None)
    if first is not None and not any(m["role"] == "user" for m in draft.messages[:first]):
        draft.untrained.setdefault(first, GREETING)
    reason = str(record.get("termination_reason") or "")
    if draft.identity.reward is None and any(word in reason.lower() for word in FAILED):
        draft.identity = draft.identity._replace(reward=0.0)
    return draft


_TAU2_SAID = ("id", "role", "content", "tool_calls", "tool_call_id", "reasoning_content", "error")
_TAU2_UNUSED = (
    *("timestamp", "start_time", "end_time", "duration", "agent_cost", "user_cost", "seed", "mode", "info"),
    *("speech_environment", "user_info", "hallucination_retries_used"),
)


def _users_own(message: Mapping[str, Any]) -> bool:
    if message.get("role") == "user":
        return bool(message.get("tool_calls"))
    return message.get("role") == "tool" and message.get("requestor") == "user"


def tau2_simulations(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The simulations of a tau2-bench result file, each with the policy and the tools that the file holds for all."""
    info = record.get("info")
    world = info.get("environment_info") if isinstance(info, Mapping) else None
    shared: dict[str, Any] = {}
    if isinstance(world, Mapping):
        shared["policy"] = world.get("policy")
        tools = world.get("tool_defs")
        if isinstance(tools, Mapping):
            shared["tools"] = [
                {"name": name, "description": tool.get("doc") or "", "parameters": tool.get("params")}
                for name, tool in tools.items()
                if isinstance(tool, Mapping)
            ]
    return [{**shared, **s} if isinstance(s, dict) else s for s in record["simulations"]]


def read_swe_agent(record: dict[str, Any], context: Context) -> Draft:
    """A `.traj` file of SWE-agent: its `history`. Demonstrations are given turns; the outcome is not in such a file."""
    history = record.get("history")
    raw = [_by_harness(m) for m in history if not _ended(m)] if isinstance(history, list) else history
    note_unused(record, ("history", "trajectory", "info", "environment", "replay_config", *IDENTITY), context.notes)
    draft = _named_by_file(draft_of(record, raw, context, where="history"), context)
    steps = [s for s in record.get("trajectory") or [] if isinstance(s, dict) and isinstance(s.get("query"), list)]
    cut = sum("lines omitted)" in str(m.get("content")) for s in steps[-1:] for m in s["query"] if isinstance(m, dict))
    if cut:
        context.notes.said["SWE-agent outputs that were shortened when the model was asked: given in full"] += cut
    return draft


def _by_harness(message: Any) -> Any:
    """SWE-agent ends an episode that ran out of money, context or format errors with a turn of its own."""
    if not isinstance(message, dict) or message.get("role") != "assistant":
        return message
    own = str(message.get("action") or "").startswith("exit_") or str(message.get("content")).startswith("Exit due to ")
    return {**message, "is_demo": True} if own else message


def _ended(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") == "exit"


def read_mini_swe_agent(record: dict[str, Any], context: Context) -> Draft:
    """A `.traj.json` file of mini-swe-agent: chat messages, or Responses objects and their outputs; `exit` is no turn."""
    messages = record.get("messages")
    raw: list[Any] = []
    for index, message in enumerate(messages if isinstance(messages, list) else []):
        if _ended(message):
            continue
        if isinstance(message, dict) and message.get("object") == "response":
            try:
                raw += [{k: v for k, v in m.items()} for m in to_messages(message.get("output") or [])]
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise FieldError(
                    f"messages[{index}].output", error, "Responses items: message, reasoning, function_call"
                ) from None
        elif isinstance(message, dict) and message.get("type") == "function_call_output":
            raw.append({"role": "tool", "tool_call_id": message.get("call_id"), "content": message.get("output")})
        else:
            raw.append(message)
    note_unused(record, ("messages", "info", "trajectory_format", *IDENTITY), context.notes)
    return _named_by_file(draft_of(record, raw if isinstance(messages, list) else messages, context), context)


def _named_by_file(draft: Draft, context: Context) -> Draft:
    """The harnesses name a result file after its task."""
    if draft.identity.task is None:
        name = PurePath(context.source.rpartition(":")[0]).name
        draft.identity = draft.identity._replace(task=re.sub(r"(\.traj|\.jsonl?|\.gz|\.zst)+$", "", name))
    return draft


# ---- Claude Code ----


def is_claude_code(record: Any) -> bool:
    """Whether a record is one line of a Claude Code session."""
    if not isinstance(record, dict) or "type" not in record:
        return False
    return "sessionId" in record and ("uuid" in record or "leafUuid" in record or "messageId" in record)


def claude_code_sessions(lines: Iterable[tuple[int, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """(first line, record) of every conversation in the lines of Claude Code session files.

    A conversation ends where the history was compacted. Side chains are conversations of their own. A prompt that goes back
    to an earlier message drops what came after it, as the program does.
    """
    open_: dict[tuple[str, str], list[dict[str, Any]]] = {}
    found: list[tuple[int, dict[str, Any]]] = []
    for number, line in lines:
        if not isinstance(line, dict) or ("type" not in line and "sessionId" not in line):
            found.append((number, line))  # no line of a session: judged on its own
            continue
        key = (str(line.get("sessionId")), str(line.get("agentId") or "") if line.get("isSidechain") else "")
        if line.get("type") == "system" and line.get("subtype") == "compact_boundary":
            open_.pop(key, None)
        if (
            line.get("type") not in ("user", "assistant")
            or line.get("isMeta")
            or not isinstance(line.get("message"), dict)
        ):
            continue
        if line.get("isSidechain") and not line.get("agentId") and line.get("parentUuid") is None:
            open_.pop(key, None)
        if key not in open_:
            open_[key] = []
            found.append((number, {"type": "claude_code", "session_id": key[0], "side": key[1], "lines": open_[key]}))
        _continue(open_[key], line)
    return found


def _continue(chain: list[dict[str, Any]], line: dict[str, Any]) -> None:
    parent, message = line.get("parentUuid"), line["message"]
    content = message.get("content")
    result = isinstance(content, list) and any(isinstance(b, dict) and b.get("type") == "tool_result" for b in content)
    if line["type"] == "user" and not result:
        places = [i for i, kept in enumerate(chain) if kept.get("uuid") == parent]
        if places:
            follows = places[-1] + 1
            while follows < len(chain) and chain[follows]["type"] == "user" and _result(chain[follows]):
                follows += 1
            del chain[follows:]
    if line["type"] == "assistant" and message.get("id"):
        for kept in reversed(chain):
            if kept["type"] == "assistant" and kept["message"].get("id") == message["id"]:
                kept["message"] = {**kept["message"], "content": [*_blocks(kept["message"]), *_blocks(message)]}
                return
            if kept["type"] == "user" and not _result(kept):
                break
    chain.append(line)


def _result(line: Mapping[str, Any]) -> bool:
    return any(isinstance(b, dict) and b.get("type") == "tool_result" for b in _blocks(line["message"]))


def _blocks(message: Mapping[str, Any]) -> list[Any]:
    content = message.get("content")
    return content if isinstance(content, list) else [{"type": "text", "text": content or ""}]


def read_claude_code(record: dict[str, Any], context: Context) -> Draft:
    """One conversation of a Claude Code session, as `claude_code_sessions` gives it. The log has neither system prompt nor tools."""
    context.notes.said[
        "Claude Code sessions: the log holds no system prompt and no tools; name the tools in extract.tools"
    ] += 1
    raw = [line["message"] for line in record["lines"]]
    named = {"session_id": record["session_id"], "task_id": record["session_id"]}
    return draft_of(named, raw, context)
