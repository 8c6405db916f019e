"""Seeded random requests for `terminal_multi_harness`: every harness's tools, under tool schemas of every kind."""

from __future__ import annotations

import json
from typing import Any

from conformance_agents import COMMANDS, code, path, recoded
from conformance_cases import (
    HUGE_INTEGER,
    NAN,
    TOO_DEEP,
    Item,
    Pen,
    Sample,
    answered,
    call,
    expected_action,
    rearranged,
    sent,
)

TEXT, LIST, OBJECT = {"type": "string"}, {"type": "array"}, {"type": "object"}
HARNESSES: dict[str, dict[str, dict[str, Any]]] = {  # tools of a harness, with their arguments' schemas
    "codex": {
        "exec_command": {"cmd": TEXT, "workdir": TEXT, "timeout": {"type": "integer"}},
        "update_plan": {"plan": LIST, "explanation": TEXT},
        "apply_patch": {"patch": TEXT},
    },
    "opencode": {
        "bash": {"command": TEXT, "description": TEXT},
        "todowrite": {"todos": LIST},
        "read": {"filePath": TEXT, "limit": {"type": "number"}},
        "write": {"filePath": TEXT, "content": TEXT},
        "edit": {"filePath": TEXT, "oldString": TEXT, "newString": TEXT, "replaceAll": {"type": "boolean"}},
        "glob": {"pattern": TEXT, "path": TEXT},
        "grep": {"pattern": TEXT, "path": TEXT, "include": TEXT},
        "webfetch": {"url": TEXT, "format": {"enum": ["text", "html", "markdown"]}},
        "skill": {"name": TEXT},
        "task": {"subagent_type": TEXT, "prompt": TEXT},
        "list": {"path": TEXT},
    },
    "agent006": {"execute_python": {"code": TEXT}, "return_result": {"result": {}}, "other": {"x": {}}},
    "stirrup": {
        "code_exec": {"cmd": TEXT},
        "web_search": {"query": TEXT},
        "fetch_web_page": {"url": TEXT},
        "finish": {"reason": TEXT, "paths": {"type": "array", "items": TEXT}},
        "view_image": {"path": TEXT},
    },
    "generic": {"exec_command": {"cmd": TEXT}, "bash": {"command": TEXT, "options": OBJECT}},
}
PATTERNS = [
    "^ls",
    "^[a-z ]+$",
    r"\.py$",
    r"^\w+$",
    r"^\S+$",
    "[",
    r"^\s",
    "(?i)LS",
    r"^\d{1,3}$",
    "x{e}",
    r"^[^\x00]*$",
    r"\p{L}",
    "^(a+)+$",
    "",
]
OF_ANY = [
    {"const": 1},
    {"not": {}},
    {},
    {"$ref": "#/$defs/T"},
    {"$ref": "#/$defs/none"},
    {"enum": [True, 1.0, None]},
    {"nullable": True},
]
OF_TEXT = [
    {"minLength": 3},
    {"maxLength": 5},
    {"format": "date"},
    {"format": "uri"},
    {"format": "byte"},
    {"type": ["string", "null"]},
]
OF_LIST = [
    {"type": "array", "minItems": 1},
    {"type": "array", "uniqueItems": True},
    {"type": ["array", "null"]},
    {"type": "array", "items": TEXT},
]
INVALID = [
    {"type": "strng"},
    {"type": 3},
    {"properties": []},
    {"required": "cmd"},
    {"required": {}},
    {"minProperties": "x"},
    {"minProperties": True},
    {"properties": {"cmd": 3}},
    {"$ref": "#/$defs/none"},
    {"$ref": "http://127.0.0.1:9/none.json"},
    {"$ref": "#"},
    {"allOf": []},
    {"patternProperties": {"[": {}}},
    {"$schema": "http://127.0.0.1:9/"},
    {"$id": "urn:x"},
    {"$dynamicRef": "#none"},
]
OF_OBJECT = [
    {"additionalProperties": False},
    {"additionalProperties": TEXT},
    {"minProperties": 2},
    {"maxProperties": 1},
    {"propertyNames": {"pattern": "^[a-z]"}},
    {"unevaluatedProperties": False},
    {"patternProperties": {"^c": TEXT}},
    {"anyOf": [{"required": ["cmd"]}, {"required": ["command"]}]},
    {"oneOf": [TEXT, OBJECT]},
    {"not": OBJECT},
    {"if": {"required": ["cmd"]}, "then": {"required": ["workdir"]}},
    {"dependentRequired": {"cmd": ["timeout"]}},
    {"type": ["object", "null"]},
    {"discriminator": {"propertyName": "cmd"}},
    {"discriminator": {"propertyName": "cmd"}, "oneOf": [OBJECT]},
    {"required": []},
]


def schema(pen: Pen, properties: dict[str, Any]) -> Any:
    """A tool's parameter schema, mostly as harnesses declare them, else with rarer keywords, or none at all."""
    made: dict[str, Any] = {"type": "object", "properties": {key: dict(value) for key, value in properties.items()}}
    if pen.often(0.5):
        made["required"] = pen.sample(list(properties), pen.randint(1, len(properties))) + (
            ["extra"] if pen.often(0.03) else []
        )
    if pen.often(0.3):
        made["additionalProperties"] = False
    if pen.often(0.2):
        key = pen.choice(list(properties))
        declared = made["properties"][key]
        kind = declared.get("type")
        if pen.often(0.2):
            declared.clear()
        elif kind == "string":
            declared |= pen.pick(
                {"pattern": pen.choice(PATTERNS)}, {"pattern": pen.choice(PATTERNS)}, {"enum": ["ls", "text"]}, *OF_TEXT
            )
        elif kind == "array":
            declared |= pen.choice(OF_LIST)
        else:
            declared |= pen.choice(OF_ANY)
        made["$defs"] = {"T": pen.pick(TEXT, LIST, {"$ref": "#/$defs/T"}, {})}
    if pen.often(0.12):
        made |= pen.choice(OF_OBJECT)
    if pen.often(0.05):
        made |= pen.choice(INVALID)
    return made if pen.often(0.98) else pen.pick({}, None, {"type": "null"}, {"properties": None})


def argument(pen: Pen, key: str) -> Any:
    """A value as the tool that has an argument of this name expects it."""
    if key in ("cmd", "command"):
        return pen.choice(COMMANDS) if pen.often(0.85) else f"cat > a.py <<'E'\n{code(pen)}\nE"
    if key in ("code", "content", "oldString", "newString", "patch"):
        return code(pen)
    if key in ("filePath", "path", "workdir"):
        return path(pen)
    if key == "paths":
        return pen.pick([path(pen)], [path(pen), path(pen)], [" /tmp/a", "/tmp/b "], [])
    if key == "todos":
        item = lambda: {"content": pen.words(), "status": pen.pick("pending", "done"), "priority": pen.pick("high", 1)}  # noqa: E731
        return [item() for _ in range(pen.pick(0, 1, 2))]
    if key == "plan":
        return pen.pick([], [{"step": "a"}], "text", " ", "", None, {}, 0, [""])
    if key in ("timeout", "limit"):
        return pen.pick(1, 1.0, 2.5, True, "1")
    if key == "replaceAll":
        return pen.often(0.5)
    if key in ("url", "format"):
        return (
            pen.pick("https://a.b/C", " https://A.b/c", "http://x", "")
            if key == "url"
            else pen.pick("text", "html", "pdf")
        )
    return pen.value() if key in ("result", "x", "options") else pen.words(1, pen.pick(1, 7))


def near(pen: Pen, name: str, value: Any) -> Any:
    """The expert's value again, edited, confused, or written as a string although it is a list or an object."""
    if pen.often(0.65):
        return value
    if name == "todos" and isinstance(value, list) and value:
        change = pen.pick(
            {"status": "open"}, {"priority": 1.0}, {"content": "text"}, {"status": "pending", "priority": 1}
        )
        return pen.pick(
            [{**value[0], **change} if isinstance(value[0], dict) else change, *value[1:]],
            [None, *value[1:]],
            value[:-1],
        )
    if isinstance(value, (list, dict)) and pen.often(0.5):
        return pen.pick(
            json.dumps(value), json.dumps(value)[:-1], json.dumps(json.dumps(value)), f" {json.dumps(value)}\n"
        )
    if pen.often(0.01):
        return pen.pick(HUGE_INTEGER, TOO_DEEP)  # texts that are read as JSON wherever the schema knows the argument
    if isinstance(value, str) and len(value) > 198:
        return recoded(pen, value)
    return argument(pen, name) if pen.often(0.25) else pen.edited(value)


def tool_call(pen: Pen, name: str, properties: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    keys = [key for key in properties if pen.often(0.88)]
    return name, {key: pen.value(1) if pen.often(0.05) else argument(pen, key) for key in keys}


def sampled(pen: Pen, name: str, wanted: dict[str, Any]) -> Item:
    found = {key: near(pen, key, value) for key, value in wanted.items() if pen.often(0.97)}
    if "newString" in found and pen.often(0.1):
        found["oldString"] = found["newString"]
    if pen.often(0.04):
        found[pen.pick("extra", "timeout", "cmd")] = pen.value(1)
    return call(pen.pick(name, name.upper(), "bash", "read") if pen.often(0.06) else name, pen.arguments(found, 0.03))


def declared(pen: Pen, tools: dict[str, dict[str, Any]]) -> tuple[list[Item], Any]:
    """The tools of the request, which are flat, and its `declared_tools`, flat or nested, sometimes with holes."""
    functions = [{"name": name, "parameters": schema(pen, properties)} for name, properties in tools.items()]
    functions = [f for f in functions if pen.often(0.97)]
    flat = [{"type": "function", "strict": pen.pick(True, False), **f} for f in functions]
    if pen.often(0.4):
        return flat, None
    nested = [{"type": "function", "function": f} for f in functions]
    odd = [
        {"type": "function", "function": None, "name": "bash", "parameters": TEXT},
        {"name": 3},
        {"function": {"name": "bash"}},
        {"function": "x"},
    ]
    own = pen.pick(flat, nested, functions) + ([pen.choice(odd)] if pen.often(0.05) else [])
    return pen.pick([], flat), [] if pen.often(0.02) else own


def terminal_multi_harness(pen: Pen, release: str) -> Sample:
    """Calls of every harness's tools, alone or in batches, judged under any harness's rules."""
    harness = pen.choice(list(HARNESSES))
    tools = HARNESSES[harness]

    def made() -> tuple[str, dict[str, Any]]:
        return tool_call(pen, *pen.choice(list(tools.items())))

    wanted = [made() for _ in range(pen.pick(1, 1, 1, 1, 1, 1, 0, 2, 2, 3))]
    experts = [call(name, pen.dumps(arguments)) for name, arguments in wanted]
    found = [sampled(pen, name, pen.variant(args, 0.9)) for name, args in wanted]
    if pen.often(0.5 if len(wanted) > 1 else 0.05):
        found = rearranged(pen, found, lambda: sampled(pen, *made()))
    if pen.often(0.05):
        found = [] if found else [sampled(pen, *made())]
    if experts and pen.often(0.01):
        experts[0]["arguments"] = pen.pick("{", "[]", "3", HUGE_INTEGER)
    text = pen.pick("", " ", "\u00a0") if pen.often(0.3) else pen.words()
    request_tools, own_tools = declared(pen, tools)
    row: dict[str, Any] = {"expected_action": expected_action(pen, experts, text)}
    if pen.often(0.004):
        row["expected_action"] = {"type": "function_call_batch", "calls": []}
    if pen.often(0.95):
        row["harness"] = harness if pen.often(0.93) else pen.pick(*HARNESSES, "", "Codex", "other")
    if own_tools is not None:
        row["declared_tools"] = own_tools
    if pen.often(0.3):
        row["threshold"] = pen.pick(None, 0.0, 0.3, 0.5, 0.9, 0.99, 1, 1.1, -1, NAN)
    config = {"string_similarity_threshold": pen.pick(0.9, 0.9, 0.9, 0.5, 0.0, 1.0)}
    return Sample(config, row | sent(pen, answered(pen, found, text), request_tools))
