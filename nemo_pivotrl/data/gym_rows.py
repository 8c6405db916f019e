"""Chat messages to OpenAI Responses items and back, and candidates to NeMo-Gym pivot rows.

The row contract: `responses_create_params` holds everything before the action (`input`, `tools`,
`parallel_tool_calls`, `tool_choice: auto`), `expected_action` the expert's action, `agent_ref` the Gym agent. What we
add (ids, split, depth) lives under `provenance`, which Gym passes through.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_pivotrl.core.types import Action, Candidate, Message, ToolCall

Item = dict[str, Any]
VERIFIER_FIELDS = ("harness", "threshold", "declared_tools", "metadata", "files")
"""Fields of a Gym row that are meant for its verifier."""


def text_of(content: Any) -> str:
    """Text of a message's content: a string, a list of text parts, or None."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(part if isinstance(part, str) else str(part.get("text") or "") for part in content)


def to_items(messages: Sequence[Message]) -> list[Item]:
    """Responses items of chat messages, in order."""
    items: list[Item] = []
    for message in messages:
        role = message["role"]
        if role == "tool":
            items.append(
                {
                    "type": "function_call_output",
                    "call_id": message.get("tool_call_id") or "",
                    "output": text_of(message.get("content")),
                }
            )
            continue
        if role != "assistant":
            items.append({"type": "message", "role": role, "content": text_of(message.get("content"))})
            continue
        if message.get("reasoning_content"):
            summary = [{"type": "summary_text", "text": message["reasoning_content"]}]
            items.append({"type": "reasoning", "id": f"rs_{len(items)}", "summary": summary, "status": "completed"})
        if text_of(message.get("content")) or not message.get("tool_calls"):
            part = {"type": "output_text", "text": text_of(message.get("content")), "annotations": []}
            items.append(
                {
                    "type": "message",
                    "role": "assistant",
                    "id": f"msg_{len(items)}",
                    "content": [part],
                    "status": "completed",
                }
            )
        for call in message.get("tool_calls") or []:
            function, call_id = call["function"], call.get("id") or ""
            items.append(
                {
                    "type": "function_call",
                    "id": f"fc_{len(items)}",
                    "call_id": call_id,
                    "name": function["name"],
                    "arguments": function["arguments"],
                    "status": "completed",
                }
            )
    return items


def to_messages(items: Sequence[Item]) -> list[Message]:
    """Chat messages of Responses items. Reasoning, text and calls of one model response become one assistant message.

    A response ends where its outputs begin. Reasoning and text that stand between a call and its output belong to the turn
    that made the call; after a call without any output a new turn begins. Raises KeyError or ValueError for an item that is
    none of message, reasoning, function_call, function_call_output, and for content that is not text.
    """
    answered = {item["call_id"]: i for i, item in enumerate(items) if item.get("type") == "function_call_output"}
    messages: list[Message] = []
    turn: Message | None = None
    acting: Message | None = None
    waiting: set[str] = set()
    for index, item in enumerate(items):
        kind = item.get("type") or "message"  # a column of a table is null where a row has no such field
        if kind not in ("reasoning", "function_call") and not (kind == "message" and item["role"] == "assistant"):
            plain = _plain_message(kind, item)
            waiting = waiting - {plain["tool_call_id"]} if plain["role"] == "tool" else set()
            turn = None
            messages.append(plain)
            continue
        if kind != "function_call" and waiting:
            turn = acting if any(answered.get(call_id, -1) > index for call_id in waiting) else None
        if turn is None:
            turn, waiting = {"role": "assistant", "content": ""}, set()
            messages.append(turn)
        if kind == "reasoning":
            _append(turn, "reasoning_content", _strict_text(item.get("summary") or item.get("content") or []))
        elif kind == "message":
            _append(turn, "content", _strict_text(item.get("content")))
        else:
            if acting is not turn:
                acting, waiting = turn, set()
            call_id, arguments = item.get("call_id") or "", item.get("arguments")
            arguments = "{}" if arguments is None or arguments == "" else arguments
            function = {"name": item["name"], "arguments": arguments}
            turn.setdefault("tool_calls", []).append({"id": call_id, "type": "function", "function": function})
            waiting.add(call_id)
    return messages


def _append(turn: Message, key: str, text: str) -> None:
    if text:
        turn[key] = f"{turn[key]}\n\n{text}" if turn.get(key) else text


TEXT_PARTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "summary_text": "text",
    "reasoning_text": "text",
}
TEXT_PARTS |= {"refusal": "refusal"}
"""Content parts of text, and the field that holds it."""


def _strict_text(content: Any) -> str:
    """Text of a Responses item. Raises ValueError for a part that is not text, by its name."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") or "text"
        if kind not in TEXT_PARTS:
            raise ValueError(f"content part {kind!r}: only text is read")
        texts.append(str(part.get(TEXT_PARTS[kind]) or ""))
    return "".join(texts)


def _plain_message(kind: str, item: Item) -> Message:
    if kind == "function_call_output":
        output = item["output"]
        parts = isinstance(output, list) and all(
            isinstance(p, str) or (isinstance(p, dict) and "type" in p) for p in output
        )
        text = _strict_text(output) if output is None or isinstance(output, str) or parts else json.dumps(output)
        return {"role": "tool", "tool_call_id": item["call_id"] or "", "content": text}
    if kind != "message":
        raise ValueError(f"item type {kind!r}: known are message, reasoning, function_call, function_call_output")
    if item["role"] == "tool":
        call_id = item.get("tool_call_id") or item.get("call_id") or ""
        return {"role": "tool", "tool_call_id": call_id, "content": _strict_text(item["content"])}
    return {"role": item["role"], "content": _strict_text(item["content"])}


def tool_to_chat(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool definition in the nested chat form, from either form."""
    if "function" in tool:
        return {"type": "function", "function": tool["function"]}
    return {
        "type": "function",
        "function": {k: v for k, v in tool.items() if k not in ("type", "strict") and v is not None},
    }


def tool_to_flat(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool definition in the flat Responses form."""
    function = tool["function"]
    return {
        "type": "function",
        "name": function["name"],
        "description": function.get("description", ""),
        "parameters": function.get("parameters") or {"type": "object", "properties": {}},
        "strict": False,
    }


def action_of(message: Message) -> Action:
    """The action of an assistant chat message."""
    calls = tuple(
        ToolCall(c["function"]["name"], c["function"]["arguments"], c.get("id") or "")
        for c in message.get("tool_calls") or []
    )
    content, reasoning = text_of(message.get("content")), str(message.get("reasoning_content") or "")
    return Action("calls" if calls else "message", content, calls, reasoning=reasoning)


def message_of(action: Action) -> Message:
    """The assistant chat message of an action, with its reasoning where it has any."""
    thought = {"reasoning_content": action.reasoning} if action.reasoning else {}
    if action.kind != "calls":
        return {"role": "assistant", "content": action.content, **thought}
    calls = [
        {"id": c.call_id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
        for c in action.calls
    ]
    return {"role": "assistant", "content": action.content, **thought, "tool_calls": calls}


def expected_to_row(action: Action) -> dict[str, Any]:
    """`expected_action` of a Gym row."""
    if action.kind == "message":
        return {"type": "message", "content": action.content}
    calls = [{"type": "function_call", "name": c.name, "arguments": c.arguments} for c in action.calls]
    return calls[0] if len(calls) == 1 else {"type": "function_call_batch", "calls": calls}


def expected_of_row(row: dict[str, Any]) -> Action:
    """The expert action of a Gym row's `expected_action`. Raises KeyError or ValueError for a malformed one."""
    kind = row["type"]
    if kind == "message":
        return Action("message", text_of(row["content"]))
    if kind not in ("function_call", "function_call_batch"):
        raise ValueError(f"expected_action type {kind!r}")
    raw = row["calls"] if kind == "function_call_batch" else [row]
    if not raw:
        raise ValueError("an empty function_call_batch")
    return Action("calls", calls=tuple(ToolCall(c["name"], c["arguments"], c.get("call_id") or "") for c in raw))


def action_to_row(action: Action) -> dict[str, Any]:
    """A sampled action as a profile keeps it, so that another verifier can judge it later."""
    if action.kind in ("malformed", "none"):
        return {"type": action.kind, "content": action.content, "detail": action.detail}
    row = expected_to_row(action)
    return row | {"content": action.content} if action.kind == "calls" else row


def action_of_row(row: dict[str, Any]) -> Action:
    """The action of a row that `action_to_row` wrote. Raises KeyError or ValueError for another."""
    if row["type"] in ("malformed", "none"):
        return Action(row["type"], row["content"], detail=row["detail"])
    action = expected_of_row(row)
    return Action("calls", row["content"], action.calls) if action.kind == "calls" else action


def candidate_to_row(candidate: Candidate, agent_ref: str) -> dict[str, Any]:
    """A valid NeMo-Gym pivot row with provenance."""
    return {
        "responses_create_params": {
            "input": to_items(candidate.messages),
            "tools": [tool_to_flat(t) for t in candidate.tools],
            "parallel_tool_calls": len(candidate.expected.calls) > 1,
            "tool_choice": "auto",
        },
        "expected_action": expected_to_row(candidate.expected),
        "agent_ref": {"type": "responses_api_agents", "name": agent_ref},
        "trajectory_id": candidate.trajectory_id,
        "num_unique_actions": candidate.num_unique_actions,
        "provenance": {
            "candidate_id": candidate.candidate_id,
            "task_id": candidate.task_id,
            "split": candidate.split,
            "turn": candidate.turn,
            "depth": candidate.depth,
            "content": candidate.expected.content if candidate.expected.kind == "calls" else "",
            **({"reasoning": candidate.expected.reasoning} if candidate.expected.reasoning else {}),
        },
        **candidate.fields,
        **_terminus_answer(candidate),
    }


def _terminus_answer(candidate: Candidate) -> dict[str, str]:
    """The terminus server reads the expert's JSON answer from a field of its own."""
    own = is_terminus(candidate.fields) and candidate.expected.kind == "message"
    return {"expected_answer": candidate.expected.content} if own else {}


def is_terminus(fields: Mapping[str, Any]) -> bool:
    """Whether a row's agent writes its shell commands as a JSON text in place of tool calls."""
    metadata = fields.get("metadata")
    return isinstance(metadata, dict) and str(metadata.get("harness")).startswith("terminus")


def verifier_fields(row: dict[str, Any]) -> dict[str, Any]:
    """The fields of `row` that are meant for its verifier."""
    return {key: row[key] for key in VERIFIER_FIELDS if row.get(key) is not None}
