"""Tool calls as one JSON list behind a marker: Nemotron Nano 2, Llama-Nemotron, Jamba, Granite, Apertus, Cohere, xLAM.

Kimi K2 and Phi-4-mini stand here as well, which have markers around each call in the place of brackets and commas.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nemo_pivotrl.core.types import ToolCall
from nemo_pivotrl.data.tool_parsers.json_calls import between_tags, make_call, of_object, refuse_strays
from nemo_pivotrl.data.tool_parsers.schema_types import first_value, loads

Tools = Sequence[Mapping[str, Any]]
Read = Callable[[str, Tools], tuple[str, list[ToolCall]]]
OfItem = Callable[[Any, Tools], ToolCall]


def named(raw: Any, tools: Tools) -> ToolCall:
    """`{"name": ..., "arguments": {...}}`."""
    return of_object(raw, tools, "parameters", "arguments")


def by_name(raw: Any, tools: Tools) -> ToolCall:
    """`{NAME: {...}}` (Apertus)."""
    if not isinstance(raw, dict) or len(raw) != 1:
        raise ValueError("a tool call is an object with one name")
    ((name, arguments),) = raw.items()
    return make_call(name, arguments, tools)


def cohere(raw: Any, tools: Tools) -> ToolCall:
    """`{"tool_call_id": ..., "tool_name": ..., "parameters": {...}}` (Command R7B and later)."""
    if not isinstance(raw, dict) or "parameters" not in raw:
        raise ValueError("a tool call needs tool_name and parameters")
    return make_call(raw.get("tool_name"), raw["parameters"], tools)


def listed(
    begins: str, ends: str = "", of_item: OfItem = named, around: Sequence[str] = (), stops: bool = False
) -> Read:
    """A reader of `BEGINS[CALL, ...]ENDS`, once in an answer; without `ends` the list lasts to the turn's end.

    stops: whether the end marker may be the token that ends the turn, which is not in its text.

    The list ends where its JSON ends: an end marker inside an argument is an argument. around: markers of the text beside it.
    """

    def read(text: str, tools: Tools) -> tuple[str, list[ToolCall]]:
        content, begun, _ = text.partition(begins)
        if not begun:
            refuse_strays(text, *filter(None, [ends]))
            return _without(text, around), []
        items, place = first_value(text, len(content) + len(begins))
        rest = text[place:].lstrip()
        ended = rest.startswith(ends) if ends and (rest or not stops) else not rest
        if not isinstance(items, list) or not items or not ended:
            raise ValueError(f"{begins} is not followed by a list of calls and {ends or 'the end'}")
        rest = rest.removeprefix(ends)
        refuse_strays(rest, *filter(None, [begins, ends]))
        return _without(content + rest, around), [of_item(raw, tools) for raw in items]

    return read


def _without(text: str, markers: Sequence[str]) -> str:
    for marker in markers:
        text = text.replace(marker, "", 1)
    return text


_BARE_LIST = re.compile(r'\s*\[\s*\{\s*"name"\s*:')


def read_xlam(text: str, tools: Tools) -> tuple[str, list[ToolCall]]:
    """The whole turn is `[{"name": ..., "arguments": {...}}, ...]` (xLAM 2)."""
    if _BARE_LIST.match(text) is None:
        return text, []
    return "", [named(raw, tools) for raw in loads(text)]


def read_phi(text: str, tools: Tools) -> tuple[str, list[ToolCall]]:
    """`<|tool_call|>{"name": ..., "arguments": {...}}<|/tool_call|>` for each call (Phi-4-mini)."""
    return between_tags(text, lambda body: named(loads(body), tools), tags=("<|tool_call|>", "<|/tool_call|>"))


_KIMI = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
_KIMI_CALL = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
_KIMI_ID = re.compile(r"\s*(?:functions\.)?([^\s:]+):\d+\s*")


def read_kimi(text: str, tools: Tools) -> tuple[str, list[ToolCall]]:
    """Kimi K2: `functions.NAME:NUMBER`, which is a call's id, and its JSON, between markers."""
    (begin, end), (call_begin, arguments_begin, call_end) = _KIMI, _KIMI_CALL
    content, begun, body = text.partition(begin)
    if not begun:
        refuse_strays(text, end, *_KIMI_CALL)
        return text, []
    calls, place = [], 0
    while body[place:].lstrip().startswith(call_begin):
        start = body.index(call_begin, place) + len(call_begin)
        header, opened, _ = body[start:].partition(arguments_begin)
        found = _KIMI_ID.fullmatch(header)
        if not opened or found is None:
            raise ValueError("a call without functions.NAME:NUMBER")
        arguments, place = first_value(body, start + len(header) + len(arguments_begin))
        if not body[place:].lstrip().startswith(call_end):
            raise ValueError("a call that is not finished")
        place = body.index(call_end, place) + len(call_end)
        calls.append(make_call(found[1], arguments, tools))
    rest = body[place:].lstrip()
    if not calls or not rest.startswith(end):
        raise ValueError(f"{begin} is not followed by calls and {end}")
    rest = rest.removeprefix(end)
    refuse_strays(rest, *_KIMI, *_KIMI_CALL)
    return content + rest, calls
