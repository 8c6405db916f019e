"""What models write into their text: reasoning between tags, calls and tool outputs in Hermes' markup, calls as Python text."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

MAX_CALL_CHARS = 1_000_000
THINK = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))


def split_reasoning(text: str) -> tuple[str | None, str]:
    """(reasoning, the rest) of an assistant's text that begins with reasoning; None where it does not.

    A text that ends before its reasoning does is reasoning alone. The opening tag may be missing, since some templates write
    it into the prompt.
    """
    for start, end in THINK:
        body = text.lstrip()
        if body.startswith(start):
            inside, closed, rest = body[len(start) :].partition(end)
            return inside.strip("\n"), rest.lstrip("\n") if closed else ""
        if end in text and start not in text and "<tool_call>" not in text.partition(end)[0]:
            inside, _, rest = text.partition(end)
            return inside.strip("\n"), rest.lstrip("\n")
    return None, text


def calls_of_text(text: str, tools: Sequence[Mapping[str, Any]] = ()) -> tuple[str, list[tuple[str, Any]]]:
    """(text without the calls, [(name, arguments)]) of `<tool_call>` blocks: JSON, a Python dict, Qwen's or GLM's XML.

    A tag within a JSON text is text. Raises ValueError for a block that is none of them.
    """
    said, calls, at = "", list[tuple[str, Any]](), 0
    while (begin := text.find("<tool_call>", at)) >= 0:
        said += text[at:begin]
        at, found = _block(text, begin + len("<tool_call>"), tools)
        calls += found
    return (said + text[at:]).strip(), calls


def _block(text: str, start: int, tools: Sequence[Mapping[str, Any]]) -> tuple[int, list[tuple[str, Any]]]:
    """(where the block ends, its calls). Raises ValueError."""
    begin = start + len(text[start:]) - len(text[start:].lstrip())
    if text[begin : begin + 1] in ("{", "["):
        try:
            value, end = json.JSONDecoder().raw_decode(text, begin)
        except (ValueError, RecursionError):
            pass  # Python's quotes
        else:
            close = _CLOSE.match(text, end)
            if close is not None:
                return close.end(), _named_calls(value)
    body, closed, _ = text[start:].partition("</tool_call>")
    if not closed and not body.rstrip().endswith("}"):
        raise ValueError("<tool_call> without </tool_call>")
    end = start + len(body) + len(closed)
    if body.lstrip().startswith("<function="):
        return end, [_xml_call(body, tools)]
    return end, [_glm_call(body, tools)] if _GLM_HEAD.match(body) else _json_calls(body)


_CLOSE = re.compile(r"\s*(?:</tool_call>|(?=<tool_call>)|$)")
"""What may follow a call's JSON text: models leave the last tag out."""
_GLM_HEAD = re.compile(r"\s*([\w.:-]+)\s*(?=<arg_key>|$)")
_GLM_ARGUMENT = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)


def _glm_call(body: str, tools: Sequence[Mapping[str, Any]]) -> tuple[str, Any]:
    head = _GLM_HEAD.match(body)
    assert head is not None
    texts = _text_keys(head[1], tools)
    found = [(key.strip(), value) for key, value in _GLM_ARGUMENT.findall(body)]
    return head[1], {key: value if key in texts else _typed(value) for key, value in found}


def _json_calls(body: str) -> list[tuple[str, Any]]:
    return _named_calls(json_or_python(body.strip()))


def _named_calls(value: Any) -> list[tuple[str, Any]]:
    found = []
    for raw in value if isinstance(value, list) else [value]:
        if not isinstance(raw, dict) or not isinstance(raw.get("name"), str):
            raise ValueError("a tool call needs name and arguments")
        found.append((raw["name"], next((raw[k] for k in ("arguments", "parameters") if raw.get(k) is not None), None)))
    return found


_XML_HEAD = re.compile(r"\s*<function=([^>\n]+)>")
_XML_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


def _xml_call(body: str, tools: Sequence[Mapping[str, Any]]) -> tuple[str, Any]:
    """Values keep no type in this markup: one is text where the tool declares a string, else the JSON value that it spells."""
    head = _XML_HEAD.match(body)
    if head is None or "</function>" not in body:
        raise ValueError("unfinished <function=...>")
    name = head[1].strip()
    texts = _text_keys(name, tools)
    found = [(key.strip(), value) for key, value in _XML_PARAMETER.findall(body)]
    return name, {key: value if key in texts else _typed(value) for key, value in found}


def _text_keys(name: str, tools: Sequence[Mapping[str, Any]]) -> set[str]:
    """The arguments of a tool that are declared as text."""
    declared = next((t["function"].get("parameters") for t in tools if t["function"]["name"] == name), None)
    properties = declared.get("properties") if isinstance(declared, dict) else None
    return {k for k, v in (properties or {}).items() if isinstance(v, dict) and v.get("type") == "string"}


def _typed(value: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def json_or_python(text: str) -> Any:
    """The value of a JSON text, or of a Python literal (single quotes, None, True). Raises ValueError. Nothing is executed."""
    if len(text) > MAX_CALL_CHARS:
        raise ValueError(f"longer than {MAX_CALL_CHARS} characters")
    try:
        return json.loads(text)
    except ValueError as error:
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            raise error from None
        if not isinstance(value, (dict, list)):
            raise error from None
        return value


def outputs_of_text(text: str, waiting: int) -> list[str]:
    """The outputs in a tool turn: each `<tool_response>` block, or each element of a JSON list as long as the calls that wait."""
    blocks = re.findall(r"<tool_response>(.*?)</tool_response>", text, re.DOTALL)
    if len(blocks) > 1 or (blocks and text.strip().startswith("<tool_response>") and waiting <= 1):
        return [block.strip() for block in blocks]
    text = text.replace("<tool_response>", "").replace("</tool_response>", "").strip()
    if waiting > 1:
        try:
            listed = json.loads(text)
        except (ValueError, RecursionError):
            listed = None
        if isinstance(listed, list) and len(listed) == waiting:
            return [item if isinstance(item, str) else json.dumps(item, ensure_ascii=False) for item in listed]
    return [text]


_PYTHON_CALLS = re.compile(r"\s*\[.*\)\s*\]\s*", re.DOTALL)


def python_calls(text: str) -> list[tuple[str, dict[str, Any]]] | None:
    """Calls written as `[Name With Blanks(key="value", n=1), other()]`, None for a text that is no such list.

    Arguments are Python or JSON literals. Raises ValueError where the text is such a list and an argument cannot be read.
    """
    if not _PYTHON_CALLS.fullmatch(text) or len(text) > MAX_CALL_CHARS:
        return None
    calls = []
    for piece in _split_outside(text.strip()[1:-1]):
        name, opened, rest = piece.strip().partition("(")
        if not opened or not rest.endswith(")") or not name.strip():
            return None
        calls.append((name.strip(), dict(_keyword(part) for part in _split_outside(rest[:-1]) if part.strip())))
    return calls or None


def _keyword(part: str) -> tuple[str, Any]:
    key, equals, value = part.partition("=")
    if not equals:
        raise ValueError(f"argument {part.strip()[:40]!r} has no name")
    value = value.strip()
    try:
        return key.strip(), json.loads(value)
    except ValueError:
        try:
            return key.strip(), ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            raise ValueError(f"the value of {key.strip()[:40]!r} is no literal") from None


def _split_outside(text: str) -> list[str]:
    """`text` cut at the commas that stand outside brackets and quotes."""
    pieces, depth, quote, start, escaped = [], 0, "", 0, False
    for at, char in enumerate(text):
        if quote:
            if escaped:
                escaped = False
            elif char == "\\":
                escaped = True
            elif char == quote:
                quote = ""
        elif char in "\"'" and (char == '"' or not text[at - 1 : at].isalnum()):
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char == "," and depth == 0:
            pieces.append(text[start:at])
            start = at + 1
    return [*pieces, text[start:]]
