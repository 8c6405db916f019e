"""Seeded random requests for `swe` and `terminus`: what coding and terminal agents do, and what models make of it."""

from __future__ import annotations

import copy
import json
from typing import Any

from conformance_cases import HUGE_INTEGER, INF, NAN, TOO_DEEP, Item, Pen, Sample, answered, call, said, sent

# ---- swe ----

TOOL_NAMES = {
    "edit": "str_replace_editor file_editor edit_file apply_patch write create_file edit update_file apply_diff",
    "bash": "execute_bash bash shell run_shell_cmd exec_command terminal",
    "search": "grep find_files glob list_dir ls code_search",
    "read": "read_file view_file view read inspect",
    "finish": "finish submit",
    "think": "think",
    "planning": "task_tracker todo_write update_plan",
    "unknown": "browse my_tool navigate",
}
COMMANDS = [
    "ls -la /app/src", "grep -rn 'foo bar' src/x/y.py", "pytest tests/test_a.py -k name", "cd /repo && pytest -q", "cat a.txt",
    "python -m pytest tests/unit/test_b.py::test_c -x", "FOO=1 pytest", "/usr/bin/python3 run.py --out=/tmp/o.txt", "rm -rf /",
    "sed -i 's/a/b/' ./src/main.py", "git diff HEAD~1 -- src/a/b/c.py", 'echo "x" > "out/file.txt"', "find . -name '*.py'", "make",
    "python - <<'E'\nprint(1)\nE", "cd ../lib", "(cd a/b; ls)", "--x/y/z", "a/", "/", "  ", "", "\\ls", "./a", "../..//x",
]  # fmt: skip
PATHS = ["a", "b", "src", "tests", "x", "y.py", "z.py", "main.py", "repo", "foo.py"]
ALPHABET = [chr(0x4E00 + i) for i in range(110)]
"""So many letters that each stays below the one per cent from which difflib ignores it."""
CODE = [
    "for i in range(10):",
    "    print(i)",
    "def main() -> None:",
    "    return x + 1",
    "x = foo(bar)",
    "",
    "# a comment",
    "class A:",
    "if a == b:",
]


def path(pen: Pen) -> str:
    parts = [pen.choice(PATHS) for _ in range(pen.randint(1, 5))]
    return pen.pick("", "/", "./") + "/".join(parts) + pen.pick("", "", "", "/", " ")


def code(pen: Pen, lines: int | None = None) -> str:
    """Source-like text; long ones pass 200 characters (autojunk) or 2,000 (the part that is compared)."""
    if lines is None and pen.often(0.03):
        return "".join(pen.choices(ALPHABET, k=pen.pick(199, 200, 1999, 2001)))
    count = pen.pick(1, 2, 4, 12, 40, 120) if lines is None else lines
    few = pen.often(0.3)
    return "\n".join(
        pen.choice(CODE[:3] if few else CODE) + (str(pen.randint(0, 99)) if pen.often(0.2) else "")
        for _ in range(count)
    )


def recoded(pen: Pen, text: str) -> str:
    """An edited copy of a text of several lines: indented, cut, with changed, moved or repeated lines."""
    lines, change = text.split("\n"), pen.random()
    if "\n" not in text and change < 0.5:
        return "".join(pen.sample(text, len(text)))
    if change < 0.15:
        return "\n".join("    " + line for line in lines)
    if change < 0.3:
        return text[: len(text) * pen.pick(5, 8, 9) // 10]
    if change < 0.45:
        return text[:2000] + code(pen)
    for _ in range(pen.pick(1, 2, max(1, len(lines) // 4))):
        lines[pen.randrange(len(lines))] = pen.pick(code(pen, 1), pen.words(), "")
    return "\n".join(pen.sample(lines, len(lines)) if pen.often(0.1) else lines)


def line_range(pen: Pen) -> Any:
    start = pen.randint(1, 20)
    span = [start, start + pen.pick(-1, 0, 1, 5, 10, 100)]
    odd = [
        [1, -1],
        [5, 5],
        [1.0, "7"],
        ["a", 2],
        [1],
        None,
        "x",
        [INF, 2],
        "[1, Infinity]",
        "[1",
        "[1]",
        "[null, 2]",
        "{}",
        {},
        [None, 1],
        [True, 9],
        HUGE_INTEGER,
        TOO_DEEP,
        [],
    ]
    return pen.pick(*odd) if pen.often(0.3) else str(span) if pen.often(0.2) else span


def tool_arguments(pen: Pen, kind: str) -> dict[str, Any]:
    """Arguments as coding agents write them; keys of other tools creep in."""
    made: dict[str, Any] = {}
    if kind in ("edit", "read", "search") and pen.often(0.85):
        made[pen.pick("path", "path", "file_path", "file", "filename", "file_name", "filePath")] = path(pen)
    if kind == "edit":
        style = pen.pick("replace", "replace", "view", "create", "patch", "diff", "undo", "bare")
        if style != "bare" and pen.often(0.8):
            made["command"] = {"replace": "str_replace", "undo": "undo_edit"}.get(style, style)
        if style == "view" and pen.often(0.85):
            made["view_range"] = line_range(pen)
        if style == "replace":
            made |= {key: code(pen) for key in ("old_str", "new_str") if pen.often(0.85)}
        if style in ("create", "patch", "diff"):
            made[{"create": pen.pick("content", "file_text")}.get(style, style)] = code(pen)
    elif kind == "bash" and pen.often(0.9):
        long = pen.often(0.1)
        made[pen.pick("command", "command", "cmd")] = (
            f"cat > a/b.py <<'E'\n{code(pen)}\nE" if long else pen.choice(COMMANDS)
        )
    elif kind == "search":
        made["pattern"] = pen.words()
    elif kind not in ("read", "edit", "bash"):
        made = {pen.pick("message", "thought", "plan", "command"): pen.value(1)}
    if pen.often(0.1):
        made[pen.pick("security_risk", "timeout", "command", "path", "new_str", "insert_line")] = pen.pick(
            "LOW", 5, None, "", True
        )
    return made


def _similar_arguments(pen: Pen, kind: str, wanted: dict[str, Any]) -> Any:
    made = dict(wanted)
    if pen.often(0.12):
        return pen.variant(tool_arguments(pen, kind))
    for key in [k for k in made if pen.often(0.35)]:
        value, change = made[key], pen.random()
        if change < 0.08:
            del made[key]
        elif change < 0.14:
            made[key] = pen.confused(value)
        elif key == "view_range":
            made[key] = (
                [n + pen.pick(0, 0, 1, 2, -1) if isinstance(n, int) else n for n in value]
                if isinstance(value, list)
                else line_range(pen)
            )
        elif key.startswith(("path", "file")) and isinstance(value, str) and key != "file_text":
            made[key] = pen.pick(
                path(pen), "/repo/" + value.strip("/"), value.rpartition("/")[2], value.strip(), value + "/"
            )
        elif isinstance(value, str) and ("\n" in value or len(value) > 198):
            made[key] = recoded(pen, value)
        elif isinstance(value, str):
            verb = value.partition(" ")[0]
            other = f"{verb} {pen.words(1, 12)}"
            made[key] = pen.pick(
                pen.choice(COMMANDS), other, pen.text_edit(value), pen.text_edit(value), value + " ", "\n" + value
            )
    return made


def respelt(pen: Pen, name: str) -> str:
    camel = "".join(word.capitalize() for word in name.split("_"))
    return (
        name.replace("_", "-")
        if pen.often(0.02)
        else pen.pick(name, name, name, camel, name.upper(), camel[0].lower() + camel[1:])
    )


def swe(pen: Pen, release: str) -> Sample:
    """Calls of coding agents' tools, with the expert's call in any of the three places a row may keep it."""
    config = {
        "reward_mode": pen.pick("binary", "continuous"),
        "enable_target_match": pen.often(0.85),
        "enable_argument_similarity": pen.often(0.85),
        "similarity_threshold": pen.pick(0.4, 0.4, 0.0, 0.8, 0.9),
        "similarity_full_credit": pen.pick(0.8, 0.8, 0.5, 0.99, 1.0),
        "enable_diff_size_shaping": pen.often(0.7),
        "diff_size_alpha": pen.pick(0.1, 0.1, 0.5, 1.0),
    }
    kind = pen.choice(["edit"] * 8 + ["bash"] * 7 + ["search", "read"] * 2 + ["finish", "think", "planning", "unknown"])
    other = kind
    if pen.often(0.05) or (kind in ("search", "read") and pen.often(0.3)):
        other = pen.pick("search", "read") if kind in ("search", "read") else pen.choice(list(TOOL_NAMES))
    name = pen.choice(TOOL_NAMES[kind].split())
    wanted = tool_arguments(pen, kind)
    found = _similar_arguments(pen, other, wanted) if pen.often(0.8) else wanted
    found_name = name if other == kind and pen.often(0.6) else pen.choice(TOOL_NAMES[other].split())
    expert = call(respelt(pen, name), pen.arguments(wanted, 0.02))
    calls = [call(respelt(pen, found_name), pen.arguments(found, 0.05))]
    if pen.often(0.08):
        calls.insert(pen.pick(0, 1), call(expert["name"], expert["arguments"]))
    if pen.often(0.04):
        calls = []
    return Sample(config, _swe_row(pen, expert) | sent(pen, answered(pen, calls, pen.words())))


def _swe_row(pen: Pen, expert: Item) -> dict[str, Any]:
    if pen.often(0.85):
        return {"expected_action": expert}
    untyped = {"name": expert["name"], "arguments": expert["arguments"]}
    message = {"type": "message", "content": "hello"}
    batch = {"type": "function_call_batch", "calls": [expert]}
    return pen.pick(
        {"expected_answer": json.dumps(expert)},
        {"metadata": {"expected_action": expert}},
        {"expected_action": {}, "expected_answer": json.dumps(expert)},
        {"expected_action": pen.pick(message, batch), "expected_answer": json.dumps(expert)},
        {
            "expected_answer": pen.pick("", "text", "[]", "{", json.dumps(untyped)),
            "metadata": {"expected_action": expert},
        },
        {"expected_action": {**expert, "arguments": _decoded(expert["arguments"])}},
        {"expected_action": {**expert, "arguments": pen.pick(None, 3, [])}},
        {"expected_action": {"type": "function_call", "name": expert["name"]}},
        pen.pick(
            {},
            {"expected_action": untyped},
            {"expected_action": message},
            {"expected_answer": "text"},
            {"metadata": {"a": 1}},
        ),
    )


def _decoded(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return {}


# ---- terminus ----


def turn(pen: Pen, harness: str) -> dict[str, Any]:
    """A terminal agent's turn; the keystrokes are one command, several, none, or a long text."""
    commands = []
    for _ in range(pen.pick(0, 1, 1, 1, 2, 3)):
        keys = pen.choice(COMMANDS) if pen.often(0.8) else f"cat > a.py <<'E'\n{code(pen)}\nE"
        command: dict[str, Any] = {"keystrokes": keys + pen.pick("", "\n", "\n", "C-c")}
        if harness == "terminus_1":
            command |= {"is_blocking": pen.often(0.5), "timeout_sec": pen.pick(1, 5.0, 0)}
        elif pen.often(0.7):
            command["duration"] = pen.pick(0.1, 1, 60.0)
        commands.append(command)
    if harness == "terminus_1":
        return {
            "state_analysis": pen.words(),
            "explanation": "e",
            "commands": commands,
            "is_task_complete": pen.often(0.2),
        }
    made: dict[str, Any] = {"analysis": pen.words(), "plan": "p", "commands": commands}
    return made | {"task_complete": pen.often(0.4)} if pen.often(0.5) else made


def spoilt(pen: Pen, turn: dict[str, Any]) -> Any:
    """A turn that breaks its schema, or nearly does."""
    made = copy.deepcopy(turn)
    where = pen.choice(made["commands"]) if made["commands"] and pen.often(0.6) else made
    change = pen.random()
    if change < 0.3:
        where[pen.pick("duration", "extra", "task_complete", "is_task_complete", "timeout_sec")] = pen.pick(
            1, True, "1", None, NAN, 10**400
        )
    elif change < 0.55:
        del where[pen.choice(list(where))]
    elif change < 0.9:
        key = pen.choice(list(where))
        where[key] = pen.pick(None, 1, 1.0, True, "x", [], {}, NAN, [None], [[]], ["ls\n"], -INF)
    else:
        return pen.pick([made], "text", 3, None, {}, {"commands": []})
    return made


def retyped(pen: Pen, turn: dict[str, Any]) -> dict[str, Any]:
    """A turn with nearly the same keystrokes, and perhaps another word on completion."""
    made = copy.deepcopy(turn)
    for command in made["commands"]:
        keys = command["keystrokes"]
        if pen.often(0.5):
            command["keystrokes"] = (
                recoded(pen, keys) if keys.count("\n") > 2 or len(keys) > 198 else pen.text_edit(keys)
            )
    if made["commands"] and pen.often(0.25):
        at = pen.randrange(len(made["commands"]))
        keys = made["commands"][at]["keystrokes"]
        split = [
            dict(made["commands"][at], keystrokes=part) for part in (keys[: len(keys) // 2], keys[len(keys) // 2 :])
        ]
        made["commands"][at : at + 1] = pen.pick(split, [], [*split, split[0]])
    for key in ("task_complete", "is_task_complete"):
        if key in made and pen.often(0.3):
            made[key] = not made[key]
    return made


def wrapped(pen: Pen, text: str) -> str:
    """What models put around their JSON."""
    if pen.often(0.75):
        return text
    return pen.pick(
        f"<think>plan</think>\n{text}", f"a</think>b</think> {text} ", f"{text}</think>", f"```json\n{text}\n```", f"{text} done",
        f"\n\u00a0{text}\u2003", text[:-1], "", "  ", "</think>", f"<think>{text}", HUGE_INTEGER, TOO_DEEP,
    )  # fmt: skip


def terminus(pen: Pen, release: str) -> Sample:
    """Turns as JSON text, string similarity only: the judge needs a model."""
    config = {
        "enable_string_similarity": pen.often(0.9),
        "string_similarity_threshold": pen.pick(0.9, 0.9, 0.95, 0.5, 0.0, 1.0),
    }
    harness = pen.pick("terminus_1", "terminus_2", "terminus_2")
    wanted = turn(pen, harness)
    found = (
        wanted
        if pen.often(0.25)
        else retyped(pen, wanted)
        if pen.often(0.85)
        else turn(pen, pen.pick(harness, "terminus_1"))
    )
    text = wrapped(pen, pen.dumps(spoilt(pen, found) if pen.often(0.15) else found))
    answer = pen.dumps(spoilt(pen, wanted) if pen.often(0.04) else wanted)
    if pen.often(0.03):
        answer = pen.pick(
            "", "  ", "text", "3", f"\u00a0{answer}", answer[:-1], json.dumps(call("f", answer)), HUGE_INTEGER
        )
    metadata: dict[str, Any] = {"harness": harness}
    if pen.often(0.04):
        metadata = pen.pick({}, {"harness": "terminus_3"}, {"harness": None}, {"harness": ["terminus_1"]}, {"other": 1})
    row: dict[str, Any] = {"expected_answer": answer, "metadata": metadata}
    if pen.often(0.05):
        metadata["expected_answer"] = row.pop("expected_answer")
    elif pen.often(0.02):
        row.pop(pen.pick("expected_answer", "metadata"))
    if pen.often(0.3):
        row["threshold"] = pen.pick(None, 0, 0.0, 0.5, 0.9, 0.95, 1, 1.0, 1.1, -1, NAN)
    items = answered(pen, [], text, 0.02)
    if items and pen.often(0.05):
        at = pen.randint(0, len(text))
        items = [said(pen, text[:at]), said(pen, text[at:])]
    if pen.often(0.03):
        items.append(call("bash", "{}"))
    return Sample(config, row | sent(pen, items))
