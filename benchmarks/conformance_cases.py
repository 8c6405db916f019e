"""Seeded random `/verify` requests for each verifier family: (config, row) as NeMo-Gym's servers take them.

What the policy did is mostly an edited copy of what the expert did, because two unrelated actions agree in nothing and test
little. Left out on purpose, since a bound of ours decides there and not a rule: JSON nested 100 to about 1,000 deep, more
than 4,096 JSON values in one call, and actions of more than 262,144 characters (`config.Limits`).
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Item = dict[str, Any]
NAN, INF = float("nan"), float("inf")
HUGE_INTEGER = "9" * 5000
"""More digits than Python reads: ValueError, and not the JSONDecodeError that the released code expects."""
TOO_DEEP = "[" * 5000
SPACES = [" ", "  ", "\n", "\t", "\r\n", "\u00a0", "\u2003", "\x0b", "\x1c", "\u200b"]
WORDS = "ls -la grep -rn foo src New York new york Paris paris book a flight to Ünïcode straße STRASSE İ ı é e\u0301 \U0001f600".split()
STRINGS = [
    "",
    " ",
    "a",
    "a b",
    "a c",
    "b d",
    "c a",
    "A B",
    "a\x00b",
    "\ud83d",
    "\ud83d \udc00 x",
    "\ufeffx",
    "9" * 30,
    "1",
    "true",
    "null",
]
NUMBERS = [0, 1, -1, 2, 75, 10**20, 10**400, 0.5, 0.5000005, 0.500002, 1.0, 75.0, -0.0, 1e-7, 1e300, NAN, INF, -INF]
KEYS = ["query", "path", "limit", "items", "x", "", "ключ", "a b"]
BROKEN = [
    "",
    " ",
    "{",
    "{}}",
    "nul",
    "{'x': 1}",
    '{"x": 1,}',
    '{"x": }',
    "\ufeff{}",
    "```json\n{}\n```",
    '{"x": 01}',
    '{"x": "\n"}',
    '{"x": "\\q"}',
]
UNEXPECTED = [
    "null",
    "3",
    "[]",
    "[1]",
    '"text"',
    '"path command old_str"',
    "true",
    "NaN",
    '["path"]',
    '["command", "cmd"]',
    "1e999",
]


class Pen(random.Random):
    """A seeded source of choices."""

    def often(self, probability: float) -> bool:
        return self.random() < probability

    def pick(self, *options: Any) -> Any:
        return self.choice(options)

    def words(self, low: int = 1, high: int = 7) -> str:
        text = ""
        for _ in range(self.randint(low, high)):
            text += self.choice(WORDS) + (self.choice(SPACES) if self.often(0.1) else " ")
        return text if self.often(0.2) else text.strip()

    def value(self, depth: int = 2) -> Any:
        """Any JSON value, with the numbers and texts that comparisons trip over."""
        if depth and self.often(0.3):
            if self.often(0.5):
                return [self.value(depth - 1) for _ in range(self.randint(0, 3))]
            return {self.choice(KEYS): self.value(depth - 1) for _ in range(self.randint(0, 3))}
        kind = self.random()
        if kind < 0.45:
            return self.words()
        if kind < 0.6:
            return self.choice(STRINGS)
        return self.choice(NUMBERS) if kind < 0.85 else self.pick(None, True, False, [], {})

    def text_edit(self, text: str) -> str:
        """A text that is nearly the same."""
        at = self.randint(0, len(text))
        words = text.split(" ")
        edits: list[Callable[[], str]] = [
            lambda: text + self.pick(" ", "\n", "x", ";", " --seed 2"),
            lambda: text[:at] + self.pick("x", "_", "\n", "é", "") + text[at + self.randint(0, 2) :],
            lambda: text[:at],
            lambda: text.swapcase(),
            lambda: self.choice(SPACES) + text.replace(" ", self.choice(SPACES)),
            lambda: " ".join(words[:-1]),
            lambda: " ".join([*words, self.choice(WORDS)]),
            lambda: " ".join(self.sample(words, len(words))),
            lambda: text.replace("\n", "\r\n"),
            lambda: self.words(),
        ]
        return self.choice(edits)()

    def confused(self, value: Any) -> Any:
        """A value that looks like another: 1 and true, 1 and 1.0, null and {}, a number and its text."""
        if isinstance(value, str):
            return self.text_edit(value) if self.often(0.85) else self.value(1)
        if isinstance(value, bool):
            return self.pick(not value, int(value), str(value))
        if isinstance(value, int) and abs(value) < 10**15:
            return self.pick(value + 1, float(value), str(value), bool(value), value + 10**-7)
        if isinstance(value, float):
            return self.pick(value + 5e-7, value + 1e-6, value + 0.25, str(value), 1, NAN)
        return self.pick(None, {}, [], 0, self.value(1))

    def edited(self, value: Any) -> Any:
        """A copy with one place changed."""
        if isinstance(value, dict):
            made, change = dict(value), self.random()
            if change < 0.1 or not made:
                made[self.choice(KEYS)] = self.value(1)
            elif change < 0.2:
                del made[self.choice(list(made))]
            elif change < 0.3:
                made = {key: made[key] for key in self.sample(list(made), len(made))}
            else:
                key = self.choice(list(made))
                made[key] = self.edited(made[key])
            return made
        if isinstance(value, list) and value:
            made_list, at = list(value), self.randrange(len(value))
            return self.pick(
                self.sample(made_list, len(made_list)),
                [*made_list, copy.deepcopy(made_list[at])],
                made_list[:at] + made_list[at + 1 :],
                [*made_list[:at], self.edited(made_list[at]), *made_list[at + 1 :]],
            )
        return self.confused(value)

    def variant(self, value: Any, same: float = 0.4) -> Any:
        """`value` itself or a copy with one or two places changed."""
        if self.often(same):
            return value
        return self.edited(self.edited(value)) if self.often(0.3) else self.edited(value)

    def dumps(self, value: Any) -> str:
        """`value` as a model might write it."""
        text = json.dumps(
            value, ensure_ascii=self.often(0.5) or _has_surrogates(value), indent=self.pick(None, None, 1)
        )
        if isinstance(value, dict) and value and self.often(0.05):  # duplicate keys: the last one counts
            key = self.choice(list(value))
            text = "{" + json.dumps(key) + ": " + json.dumps(self.value(1)) + ", " + text[1:]
        return self.choice(SPACES[:5]) + text + "\n" if self.often(0.05) else text

    def arguments(self, value: Any, broken: float = 0.06) -> str:
        """The arguments of a sampled call as text, now and then undecodable."""
        if self.often(broken):
            return self.pick(
                *BROKEN,
                *UNEXPECTED,
                *UNEXPECTED,
                self.dumps(value)[:-1],
                self.dumps(value) + "}",
                HUGE_INTEGER,
                TOO_DEEP,
            )
        return self.dumps(value)


def _has_surrogates(value: Any) -> bool:
    return any("\ud800" <= c <= "\udfff" for c in json.dumps(value, ensure_ascii=False))


@dataclass(frozen=True)
class Sample:
    """One request and the settings of the server it is sent to."""

    config: dict[str, Any]
    row: dict[str, Any]


def call(name: str, arguments: str) -> Item:
    return {"type": "function_call", "name": name, "arguments": arguments}


def said(pen: Pen, text: str, plain: bool = True) -> Item:
    """An assistant message, its text in one part or several, or refused; or bare, which single_step's server does not read."""
    at = pen.randint(0, len(text)) if pen.often(0.1) else len(text)
    parts = [{"type": "output_text", "text": t, "annotations": []} for t in (text[:at], text[at:]) if t or not at]
    if pen.often(0.03):
        parts = pen.pick([], [{"type": "refusal", "refusal": text}], [{"type": "refusal", "refusal": "no"}, *parts])
    if plain and pen.often(0.03):
        return {"type": "message", "role": "assistant", "content": text}
    return {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": parts}


def thought(pen: Pen) -> Item:
    return {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": pen.words()}]}


def sent(pen: Pen, items: Sequence[Item], tools: Sequence[Item] = ()) -> dict[str, Any]:
    """The parts of a request that every server shares."""
    output = [{"call_id": f"c{i}", **item} if item["type"] == "function_call" else item for i, item in enumerate(items)]
    if pen.often(0.2):
        output.insert(0, thought(pen))
    if pen.often(0.02):
        output.append({"type": "function_call_output", "call_id": "c0", "output": pen.words()})
        output.insert(0, {"type": "message", "role": "user", "content": pen.words()})
    response = {
        "id": "r", "created_at": 0, "model": "m", "object": "response", "output": output,
        "parallel_tool_calls": True, "tool_choice": "auto", "tools": [],
    }  # fmt: skip
    return {"responses_create_params": {"input": pen.words(), "tools": list(tools)}, "response": response}


def expected_action(pen: Pen, calls: Sequence[Item], text: str) -> Item:
    """A row's expert action: calls where there are any, else the text."""
    if not calls:
        return {"type": "message", "content": text}
    if len(calls) == 1 and pen.often(0.97):
        return calls[0]
    return {"type": "function_call_batch", "calls": list(calls)}


def answered(pen: Pen, calls: Sequence[Item], text: str, silent: float = 0.3, plain: bool = True) -> list[Item]:
    """A sampled turn: the calls, sometimes with text before or after them, or text alone, or nothing."""
    items: list[Item] = list(calls)
    if not calls and pen.often(silent):
        return []
    if not calls or pen.often(0.15):
        items.insert(pen.pick(0, len(items)), said(pen, text, plain))
    if pen.often(0.03):
        items.append(said(pen, pen.words(), plain))
    return items


def rearranged(pen: Pen, calls: list[Item], another: Callable[[], Item]) -> list[Item]:
    """Parallel calls in another order, with one missing, repeated or added."""
    made = list(calls)
    for _ in range(pen.pick(0, 1, 1, 2)):
        at = pen.randrange(len(made)) if made else 0
        change = pen.random()
        if change < 0.4:
            pen.shuffle(made)
        elif change < 0.6 and made:
            made.pop(at)
        elif change < 0.8 and made:
            made.insert(pen.randint(0, len(made)), dict(made[at]))
        else:
            made.insert(at, another())
    return made


# ---- single_step ----


def single_step(pen: Pen, release: str) -> Sample:
    """Tool calls with any arguments; from 0.6 on batches under every parallel setting."""
    batches = release != "0.5.0"
    config: dict[str, Any] = {"word_count_similarity_threshold": pen.pick(0.0, 0.1, 0.1, 0.25, 0.3, 1 / 3, 0.5, 0.51)}
    if pen.often(0.2):
        config["floating_point_comparison_threshold"] = pen.pick(0.0, 1e-6, 0.25, 0.5)
    if batches and pen.often(0.65):
        config["parallel_tool_call_rewarding"] = pen.often(0.85)
        config["allow_subset"], config["allow_superset"] = pen.often(0.5), pen.often(0.5)
        config["parallel_tool_call_reward_mode"] = pen.pick("binary_strict", "fractional", "f1")
    few = [{"x": pen.pick("a b", "a c", "b d", "c a", 1, 1.0, True)} for _ in range(3)]
    crowd = batches and pen.often(0.45)

    def arguments() -> Any:
        if crowd and pen.often(0.8):
            return pen.choice(few)
        return pen.value(2) if pen.often(0.05) else {pen.choice(KEYS): pen.value() for _ in range(pen.randint(0, 4))}

    def made() -> Item:
        return call(pen.pick("f", "f", "f", "g", "F", "search"), pen.arguments(arguments(), 0.02))

    count = pen.pick(2, 2, 3, 4, pen.randint(5, 12)) if crowd else 0 if pen.often(0.12) else 1
    wanted = [call(pen.pick("f", "f", "g"), pen.dumps(arguments())) for _ in range(count)]
    if wanted and pen.often(0.01):
        wanted[0]["arguments"] = pen.pick(*BROKEN, HUGE_INTEGER)
    found = [
        call(
            pen.pick(c["name"], c["name"], c["name"].upper()) if pen.often(0.2) else c["name"],
            _near(pen, c["arguments"]),
        )
        for c in wanted
    ]
    found = rearranged(pen, found, made) if crowd or pen.often(0.2) else found
    if pen.often(0.06):
        found = [] if found else [made() for _ in range(pen.pick(1, 2))]
    row = {
        "expected_action": expected_action(pen, wanted, pen.words())
        if batches
        else (wanted or [{"type": "message", "content": "hello"}])[0]
    }
    return Sample(config, row | sent(pen, answered(pen, found, pen.pick("", " ", pen.words()), plain=False)))


def _near(pen: Pen, arguments: str) -> str:
    try:
        value = json.loads(arguments)
    except ValueError:
        return pen.arguments({})
    return pen.arguments(pen.variant(value))


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
