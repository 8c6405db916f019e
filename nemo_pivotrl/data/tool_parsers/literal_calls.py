"""Tool calls with typed literals: Python calls (LFM2, Llama 4's pythonic form) and Gemma 4's."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_pivotrl.core.types import ToolCall
from nemo_pivotrl.data.tool_parsers.json_calls import refuse_strays
from nemo_pivotrl.data.tool_parsers.schema_types import Parameters, coerce, loads, schema_types

Tools = Sequence[Mapping[str, Any]]
MAX_DEPTH = 64
"""Nested objects and lists that are read."""


def read_lfm2(text: str, tools: Tools) -> tuple[str, list[ToolCall]]:
    """`<|tool_call_start|>[NAME(key='value', ...), ...]<|tool_call_end|>` (LFM2)."""
    content, begin, body = text.partition("<|tool_call_start|>")
    if not begin:
        refuse_strays(text, "<|tool_call_end|>")
        return text, []
    body, end, rest = body.partition("<|tool_call_end|>")
    if not end:
        raise ValueError("<|tool_call_start|> without <|tool_call_end|>")
    refuse_strays(rest, "<|tool_call_start|>", "<|tool_call_end|>")
    return content + rest, _python_calls(body.strip())


def read_pythonic(text: str, tools: Tools) -> tuple[str, list[ToolCall]]:
    """The whole turn is `[NAME(key='value', ...), ...]` (Llama 3.2 and 4, ToolACE)."""
    if not re.match(r"\s*\[\s*[A-Za-z_][\w.]*\(", text):
        return text, []
    return "", _python_calls(text.strip())


def _python_calls(source: str) -> list[ToolCall]:
    """The calls of a Python list of calls with literal keyword arguments. It is parsed, never evaluated."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            body = ast.parse(source, mode="eval").body
    except (SyntaxError, MemoryError) as error:
        raise ValueError(f"no list of calls: {error}") from None
    if not isinstance(body, ast.List) or not body.elts:
        raise ValueError("no list of calls")
    calls = []
    for node in body.elts:
        if not isinstance(node, ast.Call) or node.args or any(keyword.arg is None for keyword in node.keywords):
            raise ValueError("a call has keyword arguments alone")
        arguments = {str(keyword.arg): _literal(keyword.value, 0) for keyword in node.keywords}
        if len(arguments) < len(node.keywords):
            raise ValueError("an argument is given twice")
        calls.append(ToolCall(_dotted(node.func), json.dumps(arguments, ensure_ascii=False)))
    return calls


def _dotted(node: ast.expr) -> str:
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        raise ValueError("a call of no name")
    return ".".join([node.id, *reversed(parts)])


def _literal(node: ast.expr, depth: int) -> Any:
    """The JSON value of a literal. Raises ValueError for anything else."""
    if depth > MAX_DEPTH:
        raise ValueError("arguments are nested too deeply")
    if isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, (str, int, float))):
        return node.value
    if isinstance(node, ast.Name) and node.id in ("null", "true", "false"):
        return {"null": None, "true": True, "false": False}[node.id]
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_literal(element, depth + 1) for element in node.elts]
    if isinstance(node, ast.Dict):
        keys = [key.value if isinstance(key, ast.Constant) else None for key in node.keys]
        if not all(isinstance(key, str) for key in keys):
            raise ValueError("a key that is no text")
        return dict(zip(keys, (_literal(value, depth + 1) for value in node.values), strict=True))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        operand = _literal(node.operand, depth + 1)
        if isinstance(operand, (int, float)) and not isinstance(operand, bool):
            return -operand
    raise ValueError("an argument that is no literal")


_PYTHON_NAMES = {"None": None, "True": True, "False": False}
_QUOTE = '<|"|>'
_GEMMA_BARE = re.compile(r"[^,\[\]{}]*")
_GEMMA_KEY = re.compile(r"([^\s:,\[\]{}]+):")


def read_gemma4(text: str, tools: Tools) -> tuple[str, list[ToolCall]]:
    """`<|tool_call>call:NAME{key:VALUE,...}<tool_call|>` with text between `<|"|>` (Gemma 4)."""
    content, calls, place = [], [], 0
    while (start := text.find("<|tool_call>", place)) >= 0:
        content.append(text[place:start])
        head = re.compile(r"\s*call:([\w.-]+)(?=\{)").match(text, start + len("<|tool_call>"))
        if head is None:
            raise ValueError("<|tool_call> without call:NAME{")
        reader = _Gemma(text, head.end(), Parameters(head[1], tools))
        arguments = reader.mapping(reader.parameters.properties, 0)
        calls.append(ToolCall(head[1], json.dumps(arguments, ensure_ascii=False)))
        if not text.startswith("<tool_call|>", reader.place):
            raise ValueError("a call is not followed by <tool_call|>")
        place = reader.place + len("<tool_call|>")
    content.append(text[place:])
    beside = "".join(content).removesuffix("<|tool_response>")
    refuse_strays(beside, "<tool_call|>")
    return beside, calls


class _Gemma:
    """Reads one value after another. Raises ValueError for what the template does not write."""

    def __init__(self, text: str, place: int, parameters: Parameters):
        self.text, self.place, self.parameters = text, place, parameters

    def mapping(self, properties: Any, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        self._take("{")
        while not self._took("}"):
            if found:
                self._take(",")
            key = self._quoted() if self.text.startswith(_QUOTE, self.place) else None
            if key is None:
                head = _GEMMA_KEY.match(self.text, self.place)
                if head is None:
                    raise ValueError("an argument without a name")
                key, self.place = head[1], head.end()
            else:
                self._take(":")
            if key in found:
                raise ValueError("an argument is given twice")
            found[key] = self.value(properties.get(key) if isinstance(properties, Mapping) else None, depth + 1)
        return found

    def value(self, schema: Any, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError("arguments are nested too deeply")
        schema = schema if isinstance(schema, Mapping) else {}
        if self.text.startswith(_QUOTE, self.place):
            value = self._quoted()
            types = schema_types(schema, self.parameters.schema)
            return value if "string" in types else coerce(value, types)
        if self.text.startswith("{", self.place):
            return self.mapping(schema.get("properties"), depth)
        if self._took("["):
            items: list[Any] = []
            while not self._took("]"):
                if items:
                    self._take(",")
                items.append(self.value(schema.get("items"), depth + 1))
            return items
        bare = _GEMMA_BARE.match(self.text, self.place)
        assert bare is not None, "the pattern matches nothing, too"
        self.place = bare.end()
        if bare[0].strip() in _PYTHON_NAMES:  # text stands between quotes, so this is a value
            return _PYTHON_NAMES[bare[0].strip()]
        try:
            return loads(bare[0])
        except ValueError:
            return coerce(bare[0].strip(), schema_types(schema, self.parameters.schema))

    def _quoted(self) -> str:
        start = self.place + len(_QUOTE)
        end = self.text.find(_QUOTE, start)
        if end < 0:
            raise ValueError("text that is not closed")
        self.place = end + len(_QUOTE)
        return self.text[start:end]

    def _took(self, mark: str) -> bool:
        found = self.text.startswith(mark, self.place)
        self.place += len(mark) if found else 0
        return found

    def _take(self, mark: str) -> None:
        if not self._took(mark):
            raise ValueError(f"{mark} is missing")
