"""Tool calls that are JSON objects: Hermes and Qwen, Llama, Mistral, DeepSeek, gpt-oss."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nemo_pivotrl.core.errors import short
from nemo_pivotrl.core.types import ToolCall
from nemo_pivotrl.data.tool_parsers.schema_types import Parameters, first_value, loads

Tools = Sequence[Mapping[str, Any]]
MAX_OBJECTS = 256
"""JSON objects that are looked for in one answer."""


def make_call(name: Any, arguments: Any, tools: Tools) -> ToolCall:
    """A call of `arguments`: an object, its JSON text, or nothing ("", null) where the tool needs no argument.

    Raises ValueError for any other.
    """
    if not isinstance(name, str) or not name.strip():
        raise ValueError("a tool call needs a name")
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        if Parameters(name, tools).needs_arguments:
            raise ValueError(f"{short(name, 40)} is called without its arguments")
        return ToolCall(name, "{}")
    if isinstance(arguments, str):
        if not isinstance(loads(arguments), dict):
            raise ValueError("arguments are no object")
        return ToolCall(name, arguments)
    if not isinstance(arguments, dict):
        raise ValueError("arguments are no object")
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False))


def of_object(raw: Any, tools: Tools, *keys: str) -> ToolCall:
    """The call that an object describes: its `name`, and the arguments under the first of `keys`. Raises ValueError."""
    if not isinstance(raw, dict):
        raise ValueError("a tool call is an object")
    if not any(key in raw for key in keys) and set(raw) != {"name"}:
        raise ValueError(f"a tool call needs name and {keys[-1]}")
    return make_call(raw.get("name"), next((raw[key] for key in keys if key in raw), None), tools)


def refuse_strays(content: str, *markers: str) -> None:
    """Raises ValueError where text beside the calls holds a marker of a call."""
    for marker in markers:
        if marker in content:
            raise ValueError(f"{marker} outside a tool call")


def between_tags(
    text: str,
    read: Callable[[str], ToolCall],
    *markers: str,
    tags: tuple[str, str] = ("<tool_call>", "</tool_call>"),
) -> tuple[str, list[ToolCall]]:
    """(text beside the calls, calls) where each call is what `read` makes of what stands between two tags.

    Raises ValueError for a block that is not closed, and for `markers` of a call outside of one.
    """
    begin, close = tags
    content, calls, place = [], [], 0
    while (start := text.find(begin, place)) >= 0:
        content.append(text[place:start])
        end = text.find(close, start)
        if end < 0:
            raise ValueError(f"{begin} without {close}")
        calls.append(read(text[start + len(begin) : end]))
        place = end + len(close)
    beside = "".join([*content, text[place:]])
    refuse_strays(beside, close, *markers)
    return beside, calls


def read_hermes(text: str, tools: Tools) -> tuple[str, list[ToolCall]]:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of them (Hermes, Qwen2.5, Qwen3)."""
    return between_tags(text, lambda body: of_object(loads(body), tools, "arguments"))


def read_llama_json(text: str, tools: Tools) -> tuple[str, list[ToolCall]]:
    """The whole turn is `{"name": ..., "parameters": {...}}` (Llama 3.x and 4), `<|python_tag|>` before it, `;` between several.

    vLLM reads calls out of any text; text around a call is malformed here, and JSON that is no call is text.
    """
    before, begun, rest = text.partition("<|python_start|>")
    content, ended, after = rest.partition("<|python_end|>")
    if begun and not ended:
        raise ValueError("<|python_start|> without <|python_end|>")
    body = (before + after).replace("<|python_tag|>", "", 1)
    place = 0
    calls: list[ToolCall] = []
    around: list[str] = []
    begins_as_call = re.match(r'\s*\{\s*"name"\s*:\s*"[^"]*"\s*,\s*"(parameters|arguments)"\s*:', body) is not None
    for _ in range(MAX_OBJECTS):
        if (start := body.find("{", place)) < 0:
            break
        around.append(body[place:start])
        try:
            raw, place = first_value(body, start)
        except (ValueError, RecursionError):
            if calls or begins_as_call:
                raise ValueError("a call that is no JSON object") from None
            return text, []
        named = isinstance(raw.get("name"), str)
        known = named and Parameters(raw["name"], tools).declared
        if not named or not ({"arguments", "parameters"} & set(raw) or (known and set(raw) == {"name"})):
            if calls:
                raise ValueError("an object beside a call")
            return text, []
        calls.append(of_object(raw, tools, "arguments", "parameters"))
    if calls and "".join([*around, body[place:]]).strip(" \t\r\n;,"):
        raise ValueError("text around a call")
    return (content, calls) if calls else (text, [])


_MISTRAL_CALL = re.compile(r"\s*+([^\s\[{]++)\s*+(?:\[CALL_ID\]\w*+)?(?:\[ARGS\])?\s*+(?=\{)")


def read_mistral(text: str, tools: Tools) -> tuple[str, list[ToolCall]]:
    """`[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`, or `[TOOL_CALLS]NAME[ARGS]{...}` for each call (Mistral)."""
    content, *blocks = text.split("[TOOL_CALLS]")
    if not blocks:
        refuse_strays(content, "[ARGS]")
        return text, []
    if len(blocks) == 1 and blocks[0].lstrip().startswith("["):
        listed = loads(blocks[0].strip())
        if not isinstance(listed, list) or not listed:
            raise ValueError("[TOOL_CALLS] is not followed by calls")
        return content, [of_object(raw, tools, "arguments") for raw in listed]
    calls = []
    for block in blocks:
        head = _MISTRAL_CALL.match(block)
        if head is None:
            raise ValueError("[TOOL_CALLS] without a name and arguments")
        calls.append(make_call(head[1], loads(block[head.end() :].strip()), tools))
    return content, calls


_DEEPSEEK_FENCED = re.compile(r"function<｜tool▁sep｜>([^\s<]+)\n```json\n([^\n]*)\n```")
_DEEPSEEK_PLAIN = re.compile(r"([^\s<]+)<｜tool▁sep｜>([^\n]*)")
_DEEPSEEK_MARKS = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>")


def read_deepseek(text: str, tools: Tools) -> tuple[str, list[ToolCall]]:
    """DeepSeek V3 (a fenced JSON block for each call) and V3.1 (bare JSON), between `<｜tool▁calls▁begin｜>` and its end."""
    begin, end, call_begin, call_end = _DEEPSEEK_MARKS
    content, marker, body = text.partition(begin)
    if not marker:
        refuse_strays(text, *_DEEPSEEK_MARKS)
        return text, []
    body, closed, rest = body.partition(end)
    if not closed:
        raise ValueError(f"{begin} without {end}")
    refuse_strays(rest, *_DEEPSEEK_MARKS)
    calls = []
    for block in body.split(call_end)[:-1]:
        before, opened, inner = block.partition(call_begin)
        found = _DEEPSEEK_FENCED.fullmatch(inner) or _DEEPSEEK_PLAIN.fullmatch(inner)
        if before.strip() or not opened or found is None:
            raise ValueError("a call that is not begun, or text beside it")
        calls.append(make_call(found[1].strip(), loads(found[2]), tools))
    if not calls or body.rpartition(call_end)[2].strip():
        raise ValueError("a call that is not finished")
    return content + rest, calls


_HARMONY_MESSAGE = re.compile(
    r"(?:<\|start\|>assistant)?(?P<header>[^<]*(?:<\|channel\|>[^<]*)?(?:<\|constrain\|>[^<]*)?)<\|message\|>(?P<body>.*?)"
    r"(?P<end><\|end\|>|<\|call\|>|<\|return\|>|\Z)",
    re.DOTALL,
)
_HARMONY_ANALYSIS = re.compile(r"<\|channel\|>analysis<\|message\|>([^<]*+(?:<(?!\|end\|>)[^<]*+)*+)")
_HARMONY_CALL = re.compile(r"\bto=functions\.([^\s<]+)")


def read_harmony(text: str, tools: Tools) -> tuple[str, list[ToolCall]]:
    """gpt-oss: messages of the channels analysis (reasoning, dropped), commentary (calls `to=functions.NAME`) and final."""
    content, calls, place, finished = [], [], 0, True
    if "<|message|>" not in text and "<|channel|>" not in text:
        return text, []
    while place < len(text):
        found = _HARMONY_MESSAGE.match(text, place)
        if found is None:
            if text[place:].strip():
                raise ValueError("text outside the channels")
            break
        place, header = found.end(), found["header"]
        recipient, channel = _HARMONY_CALL.search(header), header.partition("<|channel|>")[2].split()
        if recipient:
            calls.append(make_call(recipient[1], loads(found["body"]), tools))
        elif not channel or channel[0] not in ("analysis", "commentary", "final"):
            raise ValueError(f"channel {short(header, 40)}")
        elif channel[0] != "analysis":
            content.append(found["body"])
        finished = channel[:1] != ["analysis"] or bool(found["end"])
    if not finished or not (calls or content):
        raise ValueError("reasoning never ended")
    return "".join(content), calls


def harmony_reasoning(text: str) -> str:
    """What an answer of gpt-oss says in its analysis channel."""
    return "\n".join(found.strip() for found in _HARMONY_ANALYSIS.findall(text))
