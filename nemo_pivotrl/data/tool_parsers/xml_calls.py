"""Tool calls whose arguments stand between tags: Qwen3-Coder, Qwen3.5, Nemotron 3, GLM, MiniMax M2, DeepSeek V3.2."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nemo_pivotrl.core.errors import short
from nemo_pivotrl.core.types import ToolCall
from nemo_pivotrl.data.tool_parsers.json_calls import between_tags, refuse_strays
from nemo_pivotrl.data.tool_parsers.schema_types import Parameters, loads

Tools = Sequence[Mapping[str, Any]]

_CALL = re.compile(r"<tool_call>|<function=")
_HEAD = re.compile(r"\s*<function=([^>\n]*)>")
_CLOSE = re.compile(r"\s*</tool_call>")
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>(.*?)</parameter>", re.DOTALL)


def read_qwen_coder(text: str, tools: Tools) -> tuple[str, list[ToolCall]]:
    """`<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>` (Qwen3-Coder, Qwen3.5, Nemotron 3).

    As vLLM does, a function without `<tool_call>` around it is a call. What vLLM mends (a header without `=`, text or a
    second function inside a block, tags that are not closed) is malformed.
    """
    content, calls, place = [], [], 0
    while (found := _CALL.search(text, place)) is not None:
        content.append(text[place : found.start()])
        wrapped = found[0] == "<tool_call>"
        head = _HEAD.match(text, found.end() if wrapped else found.start())
        if head is None or not head[1].strip():
            raise ValueError("<tool_call> without <function=NAME>")
        end = text.find("</function>", head.end())
        if end < 0:
            raise ValueError("<function=...> without </function>")
        name = head[1].strip()
        calls.append(ToolCall(name, _xml_arguments(text[head.end() : end], Parameters(name, tools))))
        place = end + len("</function>")
        if wrapped:
            close = _CLOSE.match(text, place)
            if close is None:
                raise ValueError("</function> is not followed by </tool_call>")
            place = close.end()
    content.append(text[place:])
    beside = "".join(content)
    refuse_strays(beside, "</tool_call>", "</function>", "<parameter=", "</parameter>")
    return beside, calls


def _xml_arguments(body: str, parameters: Parameters) -> str:
    arguments: dict[str, Any] = {}
    place = 0
    while (found := _PARAMETER.match(body, place)) is not None:
        key, value = found[1], found[2]
        if "<parameter=" in value or key != key.strip():
            raise ValueError(f"parameter {short(key, 40)} is not closed, or no name")
        if key in arguments:
            raise ValueError(f"parameter {short(key, 40)} is given twice")
        arguments[key] = parameters.value(key, value.removeprefix("\n").removesuffix("\n"))
        place = found.end()
    if body[place:].strip():
        raise ValueError(f"{short(body[place:], 40)} between parameters")
    return json.dumps(arguments, ensure_ascii=False)


_GLM_ARGUMENT = re.compile(r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)


def read_glm(text: str, tools: Tools) -> tuple[str, list[ToolCall]]:
    """`<tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>...</tool_call>` (GLM 4.5 and later)."""
    markers = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
    return between_tags(text, lambda body: _glm_call(body, tools), *markers)


def _glm_call(block: str, tools: Tools) -> ToolCall:
    written = block.partition("<arg_key>")[0]
    name, body = written.strip(), block[len(written) :]
    if not name or re.search(r"[\s<>]", name):
        raise ValueError(f"{short(written, 40)} is no name of a tool")
    if tools and not Parameters(name, tools).declared:
        raise ValueError(f"{short(written, 40)} is not declared")  # vLLM reads no call of such a tool
    parameters, arguments, place = Parameters(name, tools), {}, 0
    while (found := _GLM_ARGUMENT.match(body, place)) is not None:
        key, value = found[1].strip(), found[2]
        if key in arguments or "<arg_key>" in value or "<arg_value>" in value:
            raise ValueError(f"argument {short(key, 40)} is given twice or not closed")
        arguments[key] = parameters.value(key, value)
        place = found.end()
    if body[place:].strip():
        raise ValueError(f"{short(body[place:], 40)} between arguments")
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False))


_INVOKE = re.compile(r'\s*<(?P<mark>｜DSML｜)?invoke name="(?P<name>[^"]*)">')
_NAMED = re.compile(
    r'\s*<(?P<mark>｜DSML｜)?parameter name="(?P<key>[^"]*)"(?: string="(?P<text>true|false)")?>(?P<value>.*?)'
    r"</(?(mark)｜DSML｜)parameter>",
    re.DOTALL,
)


def invoked(mark: str, *blocks: str) -> Callable[[str, Tools], tuple[str, list[ToolCall]]]:
    """A reader of `<BLOCK><invoke name="NAME"><parameter name="KEY">VALUE</parameter>...</invoke>...</BLOCK>`.

    MiniMax M2 writes values bare, and the tool's schema types them. DeepSeek V3.2 and V4 put a mark before each tag and say
    of each value whether it is text; another is JSON.
    """
    tags = [(f"<{block}>", f"</{block}>") for block in blocks]
    strays = [marker for pair in tags for marker in pair]
    strays += [f"<{mark}invoke", f"</{mark}invoke>", f"<{mark}parameter", f"</{mark}parameter>"]

    def read(text: str, tools: Tools) -> tuple[str, list[ToolCall]]:
        begin, end = next((pair for pair in tags if pair[0] in text), tags[0])
        content, begun, body = text.partition(begin)
        if not begun:
            refuse_strays(text, *strays)
            return text, []
        calls, place = [], 0
        while (head := _INVOKE.match(body, place)) is not None:
            name, close = head["name"].strip(), f"</{mark}invoke>"
            if not name or (head["mark"] or "") != mark:
                raise ValueError("<invoke> without a name")
            arguments, place = _invoked_arguments(body, head.end(), Parameters(name, tools), mark)
            if not body[place:].lstrip().startswith(close):
                raise ValueError(f"<invoke> without {close}, or text between parameters")
            place = body.index(close, place) + len(close)
            calls.append(ToolCall(name, json.dumps(arguments, ensure_ascii=False)))
        rest = body[place:].lstrip()
        if not calls or not rest.startswith(end):
            raise ValueError(f"{begin} is not followed by calls and {end}")
        rest = rest.removeprefix(end)
        refuse_strays(content + rest, *strays)
        return content + rest, calls

    return read


def _invoked_arguments(body: str, place: int, parameters: Parameters, mark: str) -> tuple[dict[str, Any], int]:
    arguments: dict[str, Any] = {}
    while (found := _NAMED.match(body, place)) is not None:
        key, value = found["key"], found["value"]
        if f"<{mark}parameter name=" in value or (found["mark"] or "") != mark or bool(mark) != bool(found["text"]):
            raise ValueError(f"parameter {short(key, 40)} is not closed, or not typed")
        if key in arguments:
            raise ValueError(f"parameter {short(key, 40)} is given twice")
        arguments[key] = (
            parameters.value(key, value) if not mark else value if found["text"] == "true" else loads(value)
        )
        place = found.end()
    return arguments, place
