"""Chat messages of any dialect in our one form: roles, content blocks, calls, tool outputs, reasoning, weights.

A block, role or field that means something and is not known is refused by its name; nothing is dropped in silence. What is
known to say nothing (an id, a time stamp) is left out; what might say something is counted in `Notes.unused`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nemo_pivotrl.core.errors import short
from nemo_pivotrl.core.types import Message
from nemo_pivotrl.data.readers.markup import calls_of_text, outputs_of_text, split_reasoning
from nemo_pivotrl.data.readers.turns import UNREAD, unread_mark, untrained_reason

ROLES = ("system", "developer", "user", "assistant", "tool")
DIALECTS = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("human", "client"), "user"),
    **dict.fromkeys(("gpt", "ai", "chatgpt", "model"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
    **dict.fromkeys(("observation", "tool_response", "function", "function_response", "ipython"), "tool"),
}
"""What a message's role is called to what it is here. `call`: an assistant turn that holds calls alone."""
TEXT = {
    "text": ("text", "value"),
    "input_text": ("text",),
    "output_text": ("text",),
    "refusal": ("refusal", "text"),
    "summary_text": ("text",),
}
"""Content blocks of text, and where each keeps it."""
REASONING = {
    "thinking": ("thinking", "text", "value"),
    "reasoning": ("reasoning", "text", "value", "content", "summary"),
    "reasoning_text": ("text",),
    "think": ("think", "text"),
    "thought": ("thought", "text", "value"),
}
MEDIA = tuple("image image_url input_image audio input_audio audio_url video video_url file input_file".split())
ONLY_TEXT = "only text is trained; drop the record, or set extract.on_invalid=skip"
SILENT_FIELDS = frozenset(
    "id uuid name index type timestamp ts created created_at model usage cost turn_idx raw_data generation_time_seconds"
    " requestor error annotations cache_control refusal agent message_type is_demo thought action extra object status"
    " stop_reason stop_sequence finish_reason cutoff_date system_prompt tool_call_ids tags thinking_blocks"
    " reasoning_details signature logprobs token_ids".split()
)
"""Fields of a message that do not change what was said: not counted as unused."""


class FieldError(ValueError):
    """A record is unusable: which field, what stands there, what to do, and the reason it is counted under if left out."""

    def __init__(self, field: str, found: object, remedy: str, reason: str = "unreadable"):
        super().__init__(field)
        self.field, self.found, self.remedy, self.reason = field, short(found), remedy, reason


@dataclass
class Notes:
    """What the readers saw besides what they read, for the audit."""

    unused: Counter[str] = field(default_factory=Counter)
    """Field to the number of records that have it and whose meaning is not read."""
    said: Counter[str] = field(default_factory=Counter)
    """Things a user should know, and how often each was met."""


@dataclass
class Conversation:
    """Messages in our form, as they are collected."""

    messages: list[Message] = field(default_factory=list)
    untrained: dict[int, str] = field(default_factory=dict)
    """Index of an assistant turn that is not to be learned, and why."""
    pending: list[str] = field(default_factory=list)
    """Ids of calls whose outputs have not come."""
    numbered: int = 0
    tools: Sequence[dict[str, Any]] = ()

    def say(self, message: Message, untrained: str = "") -> None:
        """Append a message; `untrained`: why an assistant turn is not to be learned."""
        if untrained and message["role"] == "assistant":
            self.untrained[len(self.messages)] = untrained
        self.messages.append(message)

    def act(self, message: Message, untrained: str = "", merge: bool = False) -> None:
        """An assistant turn; its calls get ids where they have none. `merge`: it goes on with the turn before it."""
        calls = message.get("tool_calls", [])
        for call in calls:
            if not call["id"]:
                call["id"] = f"call_{self.numbered}"
            self.numbered += 1
        last = self.messages[-1] if self.messages else None
        if merge and last is not None and last["role"] == "assistant":
            if message["content"]:
                last["content"] = "\n\n".join(filter(None, [last["content"], message["content"]]))
            last["tool_calls"] = [*last.get("tool_calls", []), *calls]
            self.pending += [call["id"] for call in calls]
            return
        self.pending = [call["id"] for call in calls]
        self.say(message, untrained)

    def output(self, text: str, call_id: str = "") -> None:
        """A tool's output. Without an id it answers the oldest call that waits. What it follows is no talk."""
        last = self.messages[-1] if self.messages else None
        if last is not None and last["role"] == "assistant" and not last.get("tool_calls"):
            self.untrained.setdefault(len(self.messages) - 1, UNREAD)
        if not call_id and self.pending:
            call_id = self.pending[0]
        if call_id in self.pending:
            self.pending.remove(call_id)
        self.messages.append({"role": "tool", "content": text, "tool_call_id": call_id})


@dataclass
class _Parts:
    """One message's content, taken apart."""

    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    outputs: list[tuple[str, str]] = field(default_factory=list)
    """(call id, text) of tool results that stand in a user's message."""


OBJECT = "arguments_were_an_object"
"""Mark of a call while it is read: an object may have gone through a table, a text has not."""


def check_messages(raw: Sequence[Any]) -> tuple[Message, ...]:
    """Chat messages in our form. Raises FieldError for the first malformed one."""
    messages = conversation_of(raw).messages
    for message in messages:
        for call in message.get("tool_calls", ()):
            call.pop(OBJECT, None)
    return tuple(messages)


def conversation_of(
    raw: Sequence[Any],
    notes: Notes | None = None,
    markup: bool = False,
    where: str = "messages",
    tools: Sequence[dict[str, Any]] = (),
) -> Conversation:
    """Messages of any dialect. `markup`: calls are written into the assistant's text; `tools` give their arguments types.

    Raises FieldError for the first malformed message.
    """
    found, notes = Conversation(tools=tools), notes or Notes()
    structured = any(isinstance(m, dict) and (m.get("tool_calls") or m.get("function_call")) for m in raw)
    previous = ""
    for index, message in enumerate(raw):
        at = f"{where}[{index}]"
        if not isinstance(message, dict):
            raise FieldError(f"{at}.role", message, "a message is an object with a role and its content")
        role = _role(message, at)
        if role in ("assistant", "call"):
            _assistant(
                found, message, role, at, notes, markup=markup, loose=bool(tools) and not structured, after=previous
            )
        elif role == "tool":
            alone = previous != "tool" and _role_after(raw, index) != "tool"
            _tool(found, message, at, split=markup or "from" in message, alone=alone)
        else:
            _other(found, message, role, at)
        for key in message.keys() - SILENT_FIELDS - _READ_FIELDS:
            if message[key] not in (None, "", [], {}, False):
                notes.unused[f"{where}[].{key}"] += 1
        previous = role
    return found


def _role_after(raw: Sequence[Any], index: int) -> str | None:
    after = raw[index + 1] if index + 1 < len(raw) else None
    return DIALECTS.get(str(after.get("role") or after.get("from"))) if isinstance(after, dict) else None


_READ_FIELDS = frozenset(
    "role from content value text reasoning_content reasoning thinking tool_calls function_call tool_call_id call_id"
    " tool_use_id weight loss loss_weight train trainable images audio audios videos image tool_messages".split()
)


_SAYING = frozenset(
    "content value text tool_calls function_call reasoning_content reasoning thinking tool_messages system_prompt".split()
)


def _role(message: dict[str, Any], at: str) -> str:
    raw = message.get("role")
    raw = message.get("from") if raw is None else raw
    role = DIALECTS.get(raw) if isinstance(raw, str) else None
    if "parts" in message and not _SAYING & message.keys():
        remedy = "write them as chat messages: role and content"
        raise FieldError(f"{at}.parts", "Gemini contents (role, parts)", remedy)
    if role is None:
        found = "missing" if raw is None else raw
        key = "from" if "from" in message and "role" not in message else "role"
        raise FieldError(f"{at}.{key}", found, f"use one of {', '.join(ROLES if key == 'role' else DIALECTS)}")
    if not any(key in message for key in _SAYING):
        raise FieldError(f"{at}.content", "missing", "a message needs its content, or calls")
    for key in ("images", "audio", "audios", "videos", "image"):
        if message.get(key):
            raise FieldError(f"{at}.{key}", short(message[key], 60), ONLY_TEXT, "not_text")
    return role


def _content(message: dict[str, Any], at: str) -> tuple[str, Any]:
    for key in ("content", "value", "text"):
        if message.get(key) is not None:
            return f"{at}.{key}", message[key]
    return f"{at}.content", None


def _parts(content: Any, where: str) -> _Parts:
    """A message's content taken apart. Raises FieldError for a block that is not known, by its name."""
    parts = _Parts()
    if content is None:
        return parts
    if isinstance(content, dict) and ("type" in content or "text" in content):
        content = [content]
    if not isinstance(content, (str, list)):
        raise FieldError(where, content, "text, a list of text parts, or null")
    for index, block in enumerate([content] if isinstance(content, str) else content):
        at = f"{where}[{index}]"
        if isinstance(block, str):
            parts.text.append(block)
        elif isinstance(block, dict):
            _block(parts, block, at)
        else:
            raise FieldError(where, content, "text, a list of text parts, or null")
    return parts


def _block(parts: _Parts, block: dict[str, Any], at: str) -> None:
    kind = block.get("type")
    if kind is not None and not isinstance(kind, str):
        raise FieldError(f"{at}.type", kind, "the block's kind as text")
    if kind is None:
        kind = next((k for k in ("text", "thinking", "tool_use", "value") if block.get(k) is not None), None)
        kind = "text" if kind == "value" else kind
    if kind in TEXT:
        parts.text.append(_first_text(block, TEXT[kind], at))
    elif kind in REASONING:
        parts.reasoning.append(_first_text(block, REASONING[kind], at))
    elif kind in ("tool_use", "tool_call", "function_call"):
        parts.calls += _block_calls(block, at)
    elif kind in ("tool_result", "function_call_output"):
        output = block.get("output") if block.get("content") is None else block["content"]
        call_id = str(block.get("tool_use_id") or block.get("call_id") or block.get("tool_call_id") or "")
        parts.outputs.append((call_id, output_text(output, f"{at}.content")))
    elif kind == "redacted_thinking":
        pass  # encrypted: there is nothing to read, and nothing that the policy could learn
    elif kind in MEDIA:
        raise FieldError(f"{at}.type", f"content block {kind!r}", ONLY_TEXT, "not_text")
    else:
        known = ", ".join([*TEXT, *REASONING, "tool_use", "tool_call", "tool_result"])
        raise FieldError(f"{at}.type", f"content block {kind!r}", f"known blocks: {known}; mend it or drop the record")


def _first_text(block: dict[str, Any], keys: Sequence[str], at: str) -> str:
    for key in keys:
        value = block.get(key)
        if isinstance(value, str):
            return value
        if isinstance(value, list):
            return "".join(_parts(value, f"{at}.{key}").text)
        if value is not None:
            raise FieldError(f"{at}.{key}", value, "text")
    if any(key in block for key in keys):
        return ""
    raise FieldError(at, block, f"a {block.get('type')} block needs {' or '.join(keys)}")


def _block_calls(block: dict[str, Any], at: str) -> list[dict[str, Any]]:
    """Calls of an Anthropic `tool_use`, a Responses `function_call` or a LLaMA-Factory `tool_call` block."""
    if "value" in block and "name" not in block:
        return _written_calls(block["value"], f"{at}.value")
    raw = block.get("function") if isinstance(block.get("function"), dict) else block
    arguments = next((raw[key] for key in ("input", "arguments", "args") if raw.get(key) is not None), None)
    call_id = block.get("id") or block.get("call_id") or ""
    return [made_call(raw.get("name"), arguments, call_id, at)]


def _written_calls(value: Any, at: str) -> list[dict[str, Any]]:
    """Calls written as a JSON text: one, or a list of them."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise FieldError(at, value, f"the tool call cannot be read: {error}") from None
    listed = value if isinstance(value, list) else [value]
    if not listed:
        raise FieldError(at, value, "the tool call cannot be read: an empty list")
    calls = []
    for raw in listed:
        if not isinstance(raw, dict):
            raise FieldError(at, value, "the tool call cannot be read: it needs name and arguments")
        inner = raw.get("function") if isinstance(raw.get("function"), dict) else raw
        arguments = next((inner[k] for k in ("arguments", "parameters", "args") if inner.get(k) is not None), None)
        calls.append(made_call(inner.get("name"), arguments, raw.get("id") or "", at, "the tool call cannot be read: "))
    return calls


def made_call(name: Any, arguments: Any, call_id: Any, at: str, why: str = "") -> dict[str, Any]:
    """A call in our form. Nothing given as arguments is the empty object. Raises FieldError."""
    if not isinstance(name, str) or not name:
        raise FieldError(
            at if why else f"{at}.function.name", name, f"{why}a call needs function.name and function.arguments"
        )
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        arguments = "{}"
    as_object = isinstance(arguments, dict)
    if as_object:
        arguments = json.dumps(arguments, ensure_ascii=False)
    if not isinstance(arguments, str):
        raise FieldError(
            at if why else f"{at}.function.arguments", arguments, f"{why}arguments are a JSON text or an object"
        )
    call = {"id": str(call_id or ""), "type": "function", "function": {"name": name, "arguments": arguments}}
    return {**call, OBJECT: True} if as_object else call


def call_of(raw: Any, where: str) -> dict[str, Any]:
    """A call of `tool_calls`: nested under `function`, or flat (name, arguments). Raises FieldError."""
    if not isinstance(raw, dict):
        raise FieldError(f"{where}.function.name", raw, "a call needs function.name and function.arguments")
    function = raw.get("function")
    if function is None and isinstance(raw.get("custom"), dict):
        raise FieldError(f"{where}.type", "a custom tool's call", "only function calls are read; drop the record")
    inner = function if isinstance(function, dict) else raw
    name = inner.get("name") if inner.get("name") is not None else inner.get("function_name")
    if not isinstance(name, str) or (isinstance(function, str) and name is None):
        raise FieldError(f"{where}.function.name", raw, "a call needs function.name and function.arguments")
    arguments = next(
        (inner[key] for key in ("arguments", "args", "input", "parameters") if inner.get(key) is not None), None
    )
    return made_call(name, arguments, raw.get("id") or raw.get("tool_call_id") or raw.get("call_id"), where)


def output_text(output: Any, where: str) -> str:
    """A tool's output as the policy reads it: text, blocks of text, or the JSON text of any other value."""
    if output is None:
        return ""
    if isinstance(output, str):
        return output
    typed = isinstance(output, list) and all(
        isinstance(b, str) or (isinstance(b, dict) and "type" in b) for b in output
    )
    if typed or (isinstance(output, dict) and output.get("type") in (*TEXT, *MEDIA)):
        parts = _parts(output, where)
        if parts.calls or parts.outputs:
            raise FieldError(where, output, "a tool's output is text")
        return "".join(parts.text)
    return json.dumps(output, ensure_ascii=False)


def _reasoning(message: dict[str, Any], at: str) -> list[str]:
    for key in ("reasoning_content", "reasoning", "thinking"):
        value = message.get(key)
        if isinstance(value, str):
            if value:
                return [value]
        elif value:
            where = f"{at}.{'reasoning_content' if key == 'reasoning' else key}"
            if not isinstance(value, list):
                raise FieldError(where, value, "text, a list of text parts, or null")
            parts = _parts(value, where)
            return [*parts.text, *parts.reasoning]
    for key in ("thinking_blocks", "reasoning_details"):
        if isinstance(message.get(key), list):
            blocks = [b for b in message[key] if isinstance(b, dict)]
            found = [b.get(k) for b in blocks for k in ("thinking", "text", "summary") if isinstance(b.get(k), str)]
            return [text for text in found if text]
    return []


def _assistant(
    found: Conversation,
    message: dict[str, Any],
    role: str,
    at: str,
    notes: Notes,
    *,
    markup: bool,
    loose: bool,
    after: str,
) -> None:
    where, content = _content(message, at)
    untrained = untrained_reason(message)
    if role == "call":
        calls = _written_calls(content, where)
        turn: Message = {"role": "assistant", "content": "", "tool_calls": calls}
        found.act(turn, untrained, merge=after in ("assistant", "call"))
        return
    parts = _parts(content, where)
    if parts.outputs:
        raise FieldError(where, "a tool result in an assistant's turn", "tool results stand in a user's or tool's turn")
    reasoning, text = [*_reasoning(message, at), *parts.reasoning], "".join(parts.text)
    inline, rest = split_reasoning(text)
    if inline is not None:
        reasoning, text = [*reasoning, inline], rest
    told = {call["id"] for call in parts.calls if call["id"]}  # LangChain writes Anthropic's calls twice
    calls = [*parts.calls, *(call for call in _structured_calls(message, at) if call["id"] not in told)]
    if not calls and (markup or loose) and "<tool_call>" in text:
        try:
            spoken, written = calls_of_text(text, found.tools)
            calls = [
                made_call(name, arguments, "", where, "the tool call cannot be read: ") for name, arguments in written
            ]
            text = spoken
        except (ValueError, RecursionError) as error:
            if markup:
                raise FieldError(where, text, f"the tool call cannot be read: {error}") from None
    if not calls and (mark := unread_mark(text)):
        notes.said[f"{mark} in an assistant's text out of which no call is read: left as text"] += 1
    turn = {"role": "assistant", "content": text}
    if kept := [piece for piece in reasoning if piece.strip()]:
        turn["reasoning_content"] = "\n\n".join(dict.fromkeys(kept))
    if calls:
        turn["tool_calls"] = calls
    found.act(turn, untrained)


def _structured_calls(message: dict[str, Any], at: str) -> list[dict[str, Any]]:
    raw = message.get("tool_calls")
    if isinstance(raw, str) and raw.strip():
        try:
            raw = json.loads(raw)
        except (ValueError, RecursionError):
            raise FieldError(f"{at}.tool_calls", raw, "calls given as text must be a JSON list") from None
    if raw:
        if not isinstance(raw, list):
            raise FieldError(f"{at}.tool_calls", raw, "a list of calls, or leave the field out")
        return [call_of(call, f"{at}.tool_calls[{k}]") for k, call in enumerate(raw)]
    legacy = message.get("function_call")
    return [call_of({"function": legacy}, f"{at}.function_call")] if legacy else []


def _tool(found: Conversation, message: dict[str, Any], at: str, split: bool, alone: bool = False) -> None:
    """alone: the only one between two turns, so that it has the outputs of all calls that wait."""
    if isinstance(message.get("tool_messages"), list):
        for index, inner in enumerate(message["tool_messages"]):
            if not isinstance(inner, dict):
                raise FieldError(f"{at}.tool_messages[{index}]", inner, "a tool message")
            _tool(found, inner, f"{at}.tool_messages[{index}]", split)
        return
    where, content = _content(message, at)
    blocks = content if isinstance(content, list) else []
    if any(isinstance(b, dict) and b.get("type") in ("tool_result", "function_call_output") for b in blocks):
        for call_id, text in _parts(content, where).outputs:
            found.output(text, call_id)
        return
    text = output_text(content, where)
    call_ids = message.get("tool_call_ids")
    call_id = next((str(message[k]) for k in ("tool_call_id", "call_id", "tool_use_id") if message.get(k)), "")
    if not call_id and isinstance(call_ids, list) and len(call_ids) == 1:
        call_id = str(call_ids[0] or "")
    if not call_id and str(message.get("id") or "") in found.pending:
        call_id = str(message["id"])
    if call_id or not (split or (alone and len(found.pending) > 1)):
        found.output(text, call_id)
        return
    for piece in outputs_of_text(text, len(found.pending)):
        found.output(piece)


def _other(found: Conversation, message: dict[str, Any], role: str, at: str) -> None:
    where, content = _content(message, at)
    if content is None and role == "system" and isinstance(message.get("system_prompt"), str):
        content = message["system_prompt"]
    parts = _parts(content, where)
    if parts.calls or parts.reasoning or message.get("tool_calls"):
        raise FieldError(where, "a call or reasoning in a turn that is not the assistant's", f"a {role} turn is text")
    text = "".join(parts.text)
    if role == "user" and found.pending and not parts.outputs and _RESPONSES.fullmatch(text):
        parts.outputs, text = [("", piece) for piece in outputs_of_text(text, 0)], ""
        parts.text = []
    for call_id, output in parts.outputs:
        found.output(output, call_id)
    if parts.text or not parts.outputs:
        found.say({"role": role, "content": text})


_RESPONSES = re.compile(r"\s*<tool_response>.*</tool_response>\s*", re.DOTALL)
