"""Values that a tool call writes as bare text, typed by the tool's schema.

XML calls and Gemma's carry no types. The rules are those of vLLM's parsers, so that a call that is read here is the call a
vLLM server would make: the types that a schema names (in `type`, `enum`, `const`, `anyOf`, `oneOf`, `allOf`) are tried in the
order null, integer, number, boolean, object, array, string; a value that fits none is read as JSON where it is JSON, else
kept as text. Four additions let templates be read back that write Python's `str()` of a value or describe types indirectly:
`None` is null where the schema allows null or no text, Python's literal of a list or dict is one where the schema allows no text
(Qwen3-Coder's first template writes lists so), local `$ref`s are followed, and `properties` or `items` alone mean an object or
an array.
"""

from __future__ import annotations

import ast
import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

MAX_SCHEMA_DEPTH = 16
"""Nested alternatives and references that are followed; deeper ones add no type."""
_ORDER = ("null", "integer", "number", "boolean", "object", "array", "string")
_ALIASES = {
    **dict.fromkeys(("str", "text", "varchar", "char", "enum"), "string"),
    **dict.fromkeys(("int", "int32", "int64", "uint", "uint32", "uint64", "long", "short", "unsigned"), "integer"),
    **dict.fromkeys(("float", "float32", "float64", "double"), "number"),
    **dict.fromkeys(("list", "arr", "sequence"), "array"),
    "bool": "boolean",
    "dict": "object",
}
_UNREAD = object()


class Parameters:
    """The declared parameters of one tool; empty for a tool that is not declared."""

    def __init__(self, name: str, tools: Sequence[Mapping[str, Any]]):
        self.declared = False
        self.schema: Mapping[str, Any] = {}
        for tool in tools:
            function = tool.get("function", tool)
            if function.get("name") == name:
                self.declared = True
                schema = function.get("parameters")
                self.schema = schema if isinstance(schema, Mapping) else {}
        properties = self.schema.get("properties")
        self.properties: Mapping[str, Any] = properties if isinstance(properties, Mapping) else {}

    @property
    def needs_arguments(self) -> bool:
        """Whether a call without arguments is incomplete."""
        return bool(self.schema.get("required"))

    def value(self, key: str, text: str) -> Any:
        """`text` as a value of parameter `key`; text where the tool does not declare it."""
        if key not in self.properties:
            return text
        return coerce(text, schema_types(self.properties[key], self.schema))


def schema_types(schema: Any, root: Mapping[str, Any]) -> set[str]:
    """JSON types that `schema` allows; `{"string"}` where it names none. `root` holds what `$ref`s point into."""
    return _types(schema, root, 0, set()) or {"string"}


def _types(schema: Any, root: Mapping[str, Any], depth: int, followed: set[str]) -> set[str]:
    if not isinstance(schema, Mapping) or depth > MAX_SCHEMA_DEPTH:
        return set()
    found: set[str] = set()
    named = schema.get("type")
    for name in named if isinstance(named, list) else [named]:
        if isinstance(name, str):
            lower = name.strip().lower()
            found.add(_ALIASES.get(lower, lower))
    constants = schema.get("enum")
    for constant in [
        *(constants if isinstance(constants, list) else []),
        *([schema["const"]] if "const" in schema else []),
    ]:
        found.add(type_of(constant))
    for key in ("anyOf", "oneOf", "allOf"):
        choices = schema.get(key)
        for choice in choices if isinstance(choices, list) else []:
            found |= _types(choice, root, depth + 1, followed)
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference not in followed:
        followed.add(reference)
        found |= _types(_resolve(reference, root), root, depth + 1, followed)
    if not found:
        found = {name for name, key in (("object", "properties"), ("array", "items")) if key in schema}
    return found


def _resolve(reference: str, root: Mapping[str, Any]) -> Any:
    """What a local JSON pointer names; None for one that points elsewhere or nowhere."""
    if not reference.startswith("#"):
        return None
    found: Any = root
    for part in reference[1:].split("/")[1:]:
        found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
    return found


def type_of(value: Any) -> str:
    """The JSON type of a Python value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, (int, float)):
        return "integer" if isinstance(value, int) else "number"
    return "string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"


def coerce(text: str, types: set[str]) -> Any:
    """`text` as the first of `types` that it can be, in a fixed order; as JSON, or as it is, where it can be none."""
    if text.strip() == "None" and ("null" in types or "string" not in types):
        return None
    for name in _ORDER:
        if name in types and (value := _as(name, text)) is not _UNREAD:
            return value
    value = _json(text)
    if value is _UNREAD and "string" not in types and types & {"array", "object"}:
        value = _literal(text)
    return text if value is _UNREAD else value


def _literal(text: str) -> Any:
    """A list or dict as Python writes it, if JSON can hold it. Nothing is executed."""
    if text.lstrip()[:1] not in ("[", "{"):
        return _UNREAD
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python does not know
            value = ast.literal_eval(text.strip())
        return value if loads(json.dumps(value, allow_nan=False)) == value else _UNREAD
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return _UNREAD


def _as(name: str, text: str) -> Any:
    if name == "null":
        return None if text.lower() == "null" else _UNREAD
    if name == "string":
        return text
    if name == "boolean":
        return {"true": True, "1": True, "false": False, "0": False}.get(text.lower().strip(), _UNREAD)
    if name in ("object", "array"):
        return _json(text)
    try:
        return int(text)  # a number written as an integer keeps all of its digits
    except ValueError:
        if name == "integer":
            return _UNREAD
    try:
        value = float(text)
    except ValueError:
        return _UNREAD
    return value if math.isfinite(value) else _UNREAD


def _json(text: str) -> Any:
    try:
        return loads(text)
    except (ValueError, RecursionError):
        return _UNREAD


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits} is too large")
    return value


_DECODER = json.JSONDecoder(parse_constant=_refuse, parse_float=_finite)
_BLANK = re.compile(r"[ \t\n\r]*")


def loads(text: str) -> Any:
    """JSON without NaN and infinities. Raises ValueError or RecursionError."""
    return _DECODER.decode(text)


def first_value(text: str, start: int = 0) -> tuple[Any, int]:
    """(the JSON value at `start` or behind blanks there, the place behind it). Raises as `loads`."""
    blank = _BLANK.match(text, start)
    return _DECODER.raw_decode(text, blank.end() if blank else start)
