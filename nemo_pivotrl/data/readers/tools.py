"""Tool definitions of any dialect, and the arguments of calls set right by them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.core.types import Message
from nemo_pivotrl.data.readers.messages import OBJECT, FieldError, Notes

Tools = tuple[dict[str, Any], ...]
PYTHON_TYPES = {"dict": "object", "float": "number", "int": "integer", "bool": "boolean", "str": "string"}
PYTHON_TYPES |= {"tuple": "array", "list": "array", "set": "array"}
"""Types that function-calling sets (BFCL, ToolACE, xLAM) name as Python does, in JSON schema's words."""
NO_TYPES = ("any", "union", "callable")
"""Python's names that are no type of JSON."""
JSON_TYPES = ("string", "integer", "number", "boolean", "object", "array", "null")
VALUES = ("default", "const")
"""Keywords of a schema whose value may be null."""
SERVER_TOOLS = "runs on the API's own server and is no function; drop the record, or the tool if no turn uses it"


def read_tools(path: str) -> Tools:
    """The tools of a JSON file. Raises InputError."""
    try:
        raw = json.loads(Path(path).read_bytes())
    except OSError as error:
        found = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise InputError(Problem(path, None, "extract.tools", path, found)) from None
    except (ValueError, RecursionError) as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else None
        raise InputError(Problem(path, line, "extract.tools", "broken JSON", str(error))) from None
    try:
        return tools_of(raw, "extract.tools")
    except FieldError as error:
        raise InputError(Problem(path, None, error.field, error.found, error.remedy)) from None


def tools_of(raw: Any, where: str, notes: Notes | None = None) -> Tools:
    """Tools in the nested chat form: from that form, the flat one of Responses, Anthropic's (`input_schema`), or a bare
    function; given as a list, or as the JSON text of one. Raises FieldError."""
    if isinstance(raw, str):
        try:
            raw = json.loads(raw) if raw.strip() else []
        except (ValueError, RecursionError):
            raise FieldError(where, raw, "tools given as text must be a JSON list") from None
    if isinstance(raw, dict):
        raw = [{"name": name, **tool} if isinstance(tool, dict) else tool for name, tool in raw.items()]
    if not isinstance(raw, list):
        raise FieldError(where, raw, "tools are a list of definitions")
    return tuple(_tool(tool, f"{where}[{index}]", notes) for index, tool in enumerate(raw))


def _tool(raw: Any, where: str, notes: Notes | None) -> dict[str, Any]:
    if isinstance(raw, str):
        try:
            raw = json.loads(raw)
        except (ValueError, RecursionError):
            raw = None
    function: Any = None
    if isinstance(raw, dict):
        function = (
            raw["function"]
            if raw.get("function") is not None
            else {
                k: v
                for k, v in raw.items()
                if k not in ("type", "strict", "function", "cache_control") and v is not None
            }
        )
    if isinstance(function, dict) and "input_schema" in function:
        function = {**function, "parameters": function["input_schema"]}
        del function["input_schema"]
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        kind = raw.get("type") if isinstance(raw, dict) else None
        if isinstance(kind, str) and kind not in ("function", "custom"):
            raise FieldError(where, f"tool type {kind!r}", f"a tool of this type {SERVER_TOOLS}")
        remedy = "a tool needs a name: {type: function, function: {name, parameters}}"
        raise FieldError(where, raw, remedy)
    if isinstance(raw, dict) and raw.get("type") not in (None, "function", "custom") and "parameters" not in function:
        raise FieldError(where, f"tool type {raw['type']!r}", f"a tool of this type {SERVER_TOOLS}")
    parameters = function.get("parameters")
    if isinstance(parameters, str):
        try:
            parameters = json.loads(parameters)
        except (ValueError, RecursionError):
            raise FieldError(f"{where}.parameters", parameters, "a JSON schema") from None
    if parameters is not None and not isinstance(parameters, dict):
        raise FieldError(f"{where}.parameters", parameters, "a JSON schema: an object")
    if parameters is not None:
        parameters = _as_schema(parameters)
        renamed = _json_types(parameters)
        if notes is not None and renamed != parameters:
            notes.said["tools whose schemas name Python's types or hold a table's nulls: read as JSON schema"] += 1
        function = {**function, "parameters": renamed}
    return {"type": "function", "function": function}


def _as_schema(parameters: dict[str, Any]) -> dict[str, Any]:
    """The schema of an object. xLAM and APIGen write its properties alone, each with a type in Python's words."""
    bare = parameters and all(isinstance(v, dict) and {"type", "description"} & v.keys() for v in parameters.values())
    if not bare:
        return parameters
    needed = [
        k for k, v in parameters.items() if "default" not in v and "optional" not in str(v.get("type", "")).lower()
    ]
    return {"type": "object", "properties": parameters, **({"required": needed} if needed else {})}


def _python_type(name: str) -> str:
    """A JSON type for `str, optional`, `List[int]` and the like; '' where Python's name says none."""
    word = name.partition(",")[0].strip()
    if word.startswith("Optional[") and word.endswith("]"):
        word = word[len("Optional[") : -1]
    word = word.partition("[")[0]
    if word in JSON_TYPES:
        return word
    return PYTHON_TYPES.get(word.lower(), "" if word != name.strip() or word.lower() in NO_TYPES else name)


def _json_types(schema: Any, depth: int = 0) -> Any:
    """The schema with Python's names of types replaced, and without the nulls of a table's other rows. Only where a schema
    stands, never in an enum or a default."""
    if not isinstance(schema, dict) or depth > 20:
        return schema
    found = {}
    for key, value in schema.items():
        if value is None and key not in VALUES:
            continue
        if key == "type" and isinstance(value, str):
            if named := _python_type(value):
                found[key] = named
        elif key in ("properties", "$defs", "definitions") and isinstance(value, dict):
            found[key] = {k: _json_types(v, depth + 1) for k, v in value.items() if v is not None}
        elif key in ("items", "additionalProperties"):
            found[key] = _json_types(value, depth + 1)
        elif key in ("anyOf", "oneOf", "allOf") and isinstance(value, list):
            found[key] = [_json_types(v, depth + 1) for v in value]
        else:
            found[key] = value
    return found


def without_table_nulls(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], notes: Notes
) -> tuple[Message, ...]:
    """Messages whose calls' arguments hold no null that only a table put there.

    An Arrow table gives every row all columns, so a call carries the arguments of other tools as null. A null goes where the
    tool does not declare its key. Where the arguments came as an object, it also goes where the tool declares the key as
    optional and of a type that is not null.
    """
    schemas = {t["function"]["name"]: t["function"].get("parameters") for t in tools}
    for message in messages:
        for call in message.get("tool_calls", ()):
            function, tabled = call["function"], call.pop(OBJECT, False)
            if "null" not in function["arguments"] or function["name"] not in schemas:
                continue
            cleaned = _cleaned(function["arguments"], schemas[function["name"]], tabled)
            if cleaned is not None:
                notes.said["calls with null arguments of a table's other rows: read as absent"] += 1
                function["arguments"] = cleaned
    return tuple(messages)


def _cleaned(text: str, schema: Any, tabled: bool) -> str | None:
    """The arguments without a table's nulls, None where there are none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    declared = isinstance(schema, dict) and isinstance(schema.get("properties"), dict)
    if not declared and not tabled and schema:
        return None
    cleaned = _strip(value, schema if isinstance(schema, dict) else {}, tabled)
    return None if cleaned == value else json.dumps(cleaned, ensure_ascii=False)


def _strip(value: Any, schema: Mapping[str, Any], tabled: bool, depth: int = 0) -> Any:
    if depth > 20:
        return value
    if isinstance(value, list):
        items = schema.get("items")
        return [_strip(v, items if isinstance(items, dict) else {"properties": None}, tabled, depth + 1) for v in value]
    if not isinstance(value, dict):
        return value
    properties = schema.get("properties", {})
    if not isinstance(properties, dict):
        return value  # an object of which nothing is declared keeps what it has
    kept = {}
    for key, inner in value.items():
        declared = properties.get(key)
        if inner is None:
            optional = key not in (schema.get("required") or [])
            if declared is None or (tabled and optional and isinstance(declared, dict) and not _takes_null(declared)):
                continue
        kept[key] = _strip(inner, declared if isinstance(declared, dict) else {"properties": None}, tabled, depth + 1)
    return kept


def _takes_null(schema: Mapping[str, Any]) -> bool:
    if "$ref" in schema or "const" in schema:
        return True
    if isinstance(schema.get("enum"), list):
        return None in schema["enum"]
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            return any(isinstance(s, dict) and _takes_null(s) for s in schema[key])
    kind = schema.get("type")
    return kind is None or kind == "null" or (isinstance(kind, list) and "null" in kind) or bool(schema.get("nullable"))
