"""No action of a policy makes a verdict slow, large, wrong in range or an exception: all verifiers but the judge."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from support.slowness import slowness

from nemo_pivotrl import config
from nemo_pivotrl.core.types import Action, Case, ToolCall
from nemo_pivotrl.verifiers.base import Bounded, VerifierFault
from nemo_pivotrl.verifiers.loading import VERIFIERS, load_verifier

SECONDS = 0.3
"""The aim is 0.1 s of processor time, best of three; a busy machine gets three times that, a slow one more. The number is printed."""


BYTES = 100 << 20

SETTINGS: dict[str, dict[str, Any]] = {
    "terminal_multi_harness": {"harness": "codex"},
    "swe": {"reward_mode": "continuous"},
    "single_step": {
        "parallel_tool_call_rewarding": True,
        "parallel_tool_call_reward_mode": "f1",
        "allow_superset": True,
    },
}
NAMES = [name for name in VERIFIERS if name != "judge"]
LOADED = {
    name: load_verifier(config.Verifier(name=name, message="any", settings=SETTINGS.get(name, {}))) for name in NAMES
}
LOADED["functional, all rules"] = load_verifier(
    config.Verifier(
        name="functional",
        message="any",
        settings={"rules": {"letter_case": True, "set_order": True}, "extra_calls": True},
    )
)


def test_every_verifier_but_the_judge_is_tried() -> None:
    assert NAMES == ["single_step", "swe", "terminus", "terminal_multi_harness", "functional", "exact"]


def call(arguments: Any, name: str = "exec_command") -> ToolCall:
    return ToolCall(name, arguments if isinstance(arguments, str) else json.dumps(arguments))


def calls(*made: ToolCall) -> Action:
    return Action("calls", calls=made)


def turn(keys: Any) -> Action:
    return Action("message", json.dumps({"analysis": "a", "plan": "p", "commands": [{"keystrokes": keys}]}))


def tools(name: str = "exec_command", **properties: Any) -> tuple[dict[str, Any], ...]:
    return ({"type": "function", "name": name, "parameters": {"type": "object", "properties": properties}},)


TERMINAL = {"harness": "terminus_2"}
CODEX = {"harness": "codex"}
FILES = {"files": {"a.py": "x = 1\ny = 2\n"}}


def texts(hostile: str) -> list[tuple[Case, Action]]:
    """A hostile text in every place where a policy writes text."""
    expert = {
        "cmd": "ls -la src",
        "path": "src/a.py",
        "url": "http://a.com/b",
        "code": "x = 1",
        "query": "a b",
        "d": "2024-01-01",
    }
    declared = tools(d={"format": "date"}, n={"type": "number"}, e={"enum": ["a", "b"]}, a={"type": "array"})
    expert |= {"n": 1, "e": "a", "a": [1], "thought": "some words of prose", "x": "plain text"}
    edit = {"command": "str_replace", "path": "a.py", "old_str": "x = 1\ny = 2", "new_str": "x = 2\ny = 2"}
    patch = {"patch": "--- a/f\n+++ b/f\n@@ -1,1 +1,1 @@\n-a\n+b\n"}
    found = [
        (Case(calls(call({key: value})), declared, fields=CODEX), calls(call({key: hostile})))
        for key, value in expert.items()
    ]
    found += [
        (Case(calls(call({"code": "x = 1"}, "python")), fields=CODEX), calls(call({"code": hostile}, "python"))),
        (Case(calls(call({"query": "a b"}, "web_search"))), calls(call({"query": hostile}, "web_search"))),
        (Case(calls(call({"x": 1})), declared, fields=CODEX), calls(call({hostile: 1}))),
        (Case(calls(call({"x": 1})), declared, fields=CODEX), calls(call(hostile))),
        (Case(calls(call({"x": 1}))), calls(call({"x": 1}, hostile))),
        (Case(turn("ls -la\n"), fields=TERMINAL), turn(hostile)),
        (Case(turn("ls -la\n"), fields=TERMINAL), Action("message", hostile)),
        (Case(Action("message", "Hello.")), Action("message", hostile)),
        (Case(Action("message", "Hello.")), Action("malformed", hostile, detail=hostile)),
        (Case(calls(call(edit, "edit")), fields=FILES), calls(call({**edit, "old_str": hostile}, "edit"))),
        (Case(calls(call(edit, "edit"))), calls(call({**edit, "old_str": hostile, "new_str": hostile + "x"}, "edit"))),
        (Case(calls(call(edit, "edit"))), calls(call({**edit, "path": hostile}, "edit"))),
        (Case(calls(call(patch, "apply_patch"))), calls(call({"patch": patch["patch"] + hostile}, "apply_patch"))),
        (Case(calls(call(patch, "apply_patch"))), calls(call({"patch": hostile}, "apply_patch"))),
    ]  # fmt: skip
    return found


MEGA = 10_000_000
MANY = config.Limits().max_chars - 2048
HOSTILE_TEXTS = {
    "10 MB": "a " * (MEGA // 2),
    "letters up to the limit": "a" * MANY,
    "blanks": " " * MANY,
    "newlines": "\n" * MANY,
    "combining marks": "a" + "\u0315" * 20_000 + "\u0300" * 20_000,
    "NUL": "\0" * 50_000,
    "lone surrogates": "\ud800" * 20_000 + "\udc00",
    "private use": "\ue000\ue001\ue002" * 10_000,
    "bidirectional controls": "\u202e\u2066\u2069\u200f" * 10_000,
    "wide": "\U0001f600" * 20_000,
    "casefold": "ŉΐ\ufb03" * 10_000,
    "digits": "9" * 5_000,
    "more digits": "1" * 100_000,
    "brackets": "[" * 100_000,
    "nested": "[" * 100_000 + "]" * 100_000,
    "quotes": "'" * 20_000,
    "triple quotes": '"""a ' * 4_000,
    "parentheses": "(" * 20_000,
    "operators": "+" * 19_999,
    "indents": "".join(" " * i + "if x:\n" for i in range(190)),
    "backslashes": "\\" * 20_000,
    "substitutions": "$(" * 4_000,
    "here-documents": "<<a " * 2_000,
    "pipes": "a|" * 4_000,
    "commands": "a;" * 4_000,
    "options": "ls -" + "abcdefgh" * 1_000,
    "paths": "./a/../" * 30_000,
    "words of paths": "cat " + "./a " * 2_000,
    "slashes": "/" * 100_000,
    "escapes": "http://a.com/" + "%25" * 30_000,
    "short URL": "http://a.com/?" + "a=1&" * 1_000,
    "brackets in a URL": "http://[" + ":" * 4_000,
    "marks in a URL": "http://a" + "\u0315\u0300" * 2_000 + ".com",
    "patch lines": "-a\n+b\n" * 1_999,
    "hunks": "@@ -1,999999999 +1,1 @@\n-a\n" * 1_900,
    "huge hunk": "@@ -1," + "9" * 5_000 + " +1 @@\n-a",
    "dates": "2024-01-01T" * 10_000,
    "exponent": "1e999999999",
    "NaN": "NaN",
    "think tags": "</think>" * 30_000,
}


def measured(verifier: Bounded, case: Case, actual: Action) -> float:
    """Seconds of the fastest of three verdicts, after checking one of them."""
    fastest = float("inf")
    for _ in range(3):
        begun = time.thread_time()
        verdict = verifier.verify(case, actual)
        fastest = min(fastest, time.thread_time() - begun)
        assert 0.0 <= verdict.reward <= 1.0 and verdict.category
        if fastest < SECONDS / 6:
            break
    return fastest


def check(questions: list[tuple[Case, Action]], names: list[str] | None = None) -> None:
    """Every verifier's verdict on every question: in range, in time, in little memory."""
    slowest = max(
        (measured(LOADED[name], *question), name, index)
        for name in names or LOADED
        for index, question in enumerate(questions)
    )
    print(f"slowest verdict {1000 * slowest[0]:.1f} ms: {slowest[1]}, question {slowest[2]}")
    assert slowest[0] < SECONDS * slowness(), slowest


def peak(question: tuple[Case, Action]) -> int:
    """Bytes that a verdict needs at its height, the largest of all verifiers."""
    tracemalloc.start()
    try:
        for verifier in LOADED.values():
            verifier.verify(*question)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("what", HOSTILE_TEXTS)
def test_a_hostile_text_in_any_place_is_judged_at_once(what: str) -> None:
    check(texts(HOSTILE_TEXTS[what]))


# ---- shapes of JSON ----


def nested(opening: str, closing: str, depth: int) -> str:
    return opening * depth + "1" + closing * depth


def quoted(times: int, leaf: int = 1) -> str:
    """A list as text in a list as text, and so on."""
    text = f"[{leaf}]"
    for _ in range(times):
        text = json.dumps([text])
    return text


def parameters(**schema: Any) -> tuple[dict[str, Any], ...]:
    return ({"name": "exec_command", "parameters": schema},)


UNIQUE = tools(x={"type": "array", "uniqueItems": True})
SETS = tools(x={"$ref": "#/properties/x", "type": "array", "uniqueItems": True, "items": {"uniqueItems": True}})
FREE = tools(x={})
RECURSIVE = parameters(
    type="object",
    properties={"x": {"$ref": "#/$defs/l"}},
    **{"$defs": {"l": {"type": "array", "uniqueItems": True, "items": {"$ref": "#/$defs/l"}}}},
)
BOMB = "^(a+)+$"
LETTERS = "a" * 40 + "!"


def wrapped(value: Any) -> str:
    return json.dumps({"x": value})


def deep(depth: int, leaf: str = "1") -> str:
    """Text of one argument with lists in lists, `leaf` in the innermost."""
    return '{"x": ' + "[" * depth + leaf + "]" * depth + "}"


WIDE = "1," * 3900
SHAPES: dict[str, tuple[tuple[dict[str, Any], ...], str, str]] = {
    "deep": (FREE, wrapped(1), deep(99_999)),
    "deep objects": (FREE, wrapped(1), nested('{"x":', "}", 40_000)),
    "as deep as allowed": (FREE, deep(97), deep(98)),
    "as deep as allowed, a set": (RECURSIVE, deep(97), deep(97, "2")),
    "deep and wide": (FREE, deep(90, WIDE + "1"), deep(90, WIDE + "2")),
    "deep and wide sets": (RECURSIVE, deep(90, WIDE + "1"), deep(90, WIDE + "2")),
    "deep in strings": (RECURSIVE, wrapped([[1]]), wrapped(json.dumps([nested("[", "]", 90)]))),
    "strings in strings": (RECURSIVE, wrapped([quoted(10)]), wrapped([quoted(11)])),
    "strings in strings, as deep": (RECURSIVE, wrapped([quoted(12)]), wrapped([quoted(12, 2)])),
    "huge integer": (FREE, wrapped(1), '{"x": ' + "9" * 100_000 + "}"),
    "large integers": (FREE, wrapped(10**4000), wrapped([1e308, 10**4200])),
    "large integer and float": (FREE, wrapped(1.5), wrapped(10**4200)),
    "not a number": (FREE, wrapped(1.0), '{"x": NaN, "x": Infinity, "x": -Infinity, "x": 1e999}'),
    "NaN": (FREE, wrapped(float("nan")), wrapped(float("nan"))),
    "duplicate keys": (FREE, wrapped(1), "{" + ",".join('"x": 1' for _ in range(30_000)) + "}"),
    "80,000 items": (FREE, wrapped([1]), wrapped([0] * 80_000)),
    "21,000 items in a string": (UNIQUE, wrapped([1]), wrapped(json.dumps([0] * 21_000))),
    "100,000 items": (UNIQUE, wrapped([1]), '{"x": [' + "1," * 100_000 + "1]}"),
    "4,000 items reversed": (UNIQUE, wrapped(list(range(4000))), wrapped(list(range(4000))[::-1])),
    "4,000 items nearly alike": (
        UNIQUE,
        wrapped([f"a{i}" for i in range(4000)]),
        wrapped([f"a{i} " for i in range(4000)][::-1]),
    ),
    "objects in a set": (
        UNIQUE,
        wrapped([{"a": i} for i in range(1300)]),
        wrapped([{"a": -i - 1} for i in range(1300)]),
    ),
    "sets in a set": (SETS, wrapped([[i] * 60 for i in range(60)]), wrapped([[-i] * 59 + [0.5] for i in range(60)])),
    "4,000 arguments": (
        FREE,
        json.dumps({f"k{i}": i for i in range(4000)}),
        json.dumps({f"k{i}": i + 1 for i in range(4000)}),
    ),
    "long keys": (FREE, json.dumps({"k" * 60_000: 1}), json.dumps({"k" * 60_000 + "path": 1, "filePath" * 10_000: 2})),
    "camel case key": (FREE, wrapped(1), json.dumps({"aA" * 60_000: 1})),
    "pattern": (tools(x={"pattern": BOMB}), wrapped("a"), wrapped(LETTERS)),
    "patterns": (tools(x={"items": {"pattern": BOMB}}), wrapped(["a"]), wrapped([LETTERS] * 3000)),
    "pattern of names": (
        parameters(patternProperties={BOMB: {}}, additionalProperties=False),
        '{"a": 1}',
        json.dumps({LETTERS: 1}),
    ),
    "pattern of a name": (parameters(propertyNames={"pattern": BOMB}), '{"a": 1}', json.dumps({LETTERS: 1})),
}


@pytest.mark.parametrize("what", SHAPES)
def test_a_hostile_shape_of_json_is_judged_at_once(what: str) -> None:
    declared, expected, actual = SHAPES[what]
    cases = [Case(calls(call(expected)), declared, fields=fields) for fields in (CODEX, {"harness": "generic"})]
    check([(case, calls(call(actual))) for case in cases])


# ---- many calls ----


def batch(count: int, make: Callable[[int], ToolCall]) -> Callable[[], Action]:
    """To be made when its test runs: a hundred thousand calls are seconds of every start otherwise."""
    return lambda: calls(*map(make, range(count)))


BATCHES: dict[str, tuple[Callable[[], Action], Callable[[], Action]]] = {
    "100,000 calls": (batch(2, lambda i: call({"x": i})), batch(100_000, lambda i: call("{}"))),
    "1,500 equal calls": (batch(1500, lambda i: call("{}")), batch(1500, lambda i: call("{}"))),
    "4,096 calls for 2": (batch(2, lambda i: call({"x": i})), batch(4096, lambda i: call({"x": -i}))),
    "4,096 calls for one of them": (batch(1, lambda i: call({"x": i})), batch(4096, lambda i: call({"x": 4095 - i}))),
    "1,500 other calls": (batch(1500, lambda i: call({"x": i})), batch(1500, lambda i: call({"x": i + 1}))),
    "60 other calls": (batch(60, lambda i: call({"x": i})), batch(60, lambda i: call({"x": -i - 1}))),
    "60 long calls": (
        batch(60, lambda i: call({"cmd": f"{i} " + "a;" * 500})),
        batch(60, lambda i: call({"cmd": f"{i + 60} " + "a;" * 500})),
    ),
    "30 sets": (
        batch(30, lambda i: call({"x": [i, *range(100)]})),
        batch(30, lambda i: call({"x": [i + 0.5, *range(100)]})),
    ),
    "4,096 undecodable calls": (batch(64, lambda i: call({"x": i})), batch(4096, lambda i: call("{" * (i % 60)))),
}


@pytest.mark.parametrize("what", BATCHES)
def test_many_parallel_calls_are_judged_at_once(what: str) -> None:
    expected, actual = (make() for make in BATCHES[what])
    check([(Case(expected, UNIQUE, fields=CODEX), actual)])


# ---- what difflib is slow on ----


def adversarial(length: int) -> dict[str, tuple[str, str]]:
    a, b = "a" * (length // 2), "b" * (length // 2)
    odd = [chr(300 + i % 97) for i in range(length // 3)]
    return {
        "one letter": (a + a, a + a[:-1]),
        "two letters": ("ab" * (length // 2), "ba" * (length // 2)),
        "no popular one": tuple("".join(chr(200 + i * k % 199) for i in range(length)) for k in (1, 7)),
        "half alike": (a + b, b + a),
        "interleaved": ("".join("ab" + c for c in odd), "".join("a" + c + "b" for c in odd)),
        "just below popular": (("a" + "b" * 90) * (length // 91), ("a" + "c" * 90) * (length // 91)),
    }  # type: ignore[dict-item]


@pytest.mark.parametrize("length", [190, 2_000, 20_000, 200_000])
@pytest.mark.parametrize("what", adversarial(200))
def test_adversarial_texts_for_difflib_are_judged_at_once(length: int, what: str) -> None:
    left, right = adversarial(length)[what]
    questions = [
        (Case(calls(call({"cmd": left})), tools(cmd={}), fields=CODEX), calls(call({"cmd": right}))),
        (Case(calls(call({"command": left}, "bash"))), calls(call({"command": right}, "bash"))),
        (Case(turn(left), fields=TERMINAL), turn(right)),
        (
            Case(calls(call({"old_str": left, "new_str": "x"}, "edit"))),
            calls(call({"old_str": right, "new_str": "x"}, "edit")),
        ),
    ]
    check(questions)


# ---- memory ----


@pytest.mark.parametrize("what", ["10 MB", "letters up to the limit", "wide", "combining marks", "paths", "commands"])
def test_a_hostile_text_takes_little_memory(what: str) -> None:
    for question in texts(HOSTILE_TEXTS[what])[::4]:
        assert peak(question) < BYTES


@pytest.mark.parametrize("what", ["deep", "as deep as allowed", "100,000 items", "4,000 items nearly alike"])
def test_a_hostile_shape_takes_little_memory(what: str) -> None:
    declared, expected, actual = SHAPES[what]
    assert peak((Case(calls(call(expected)), declared, fields=CODEX), calls(call(actual)))) < BYTES


@pytest.mark.parametrize("what", ["100,000 calls", "4,096 calls for 2", "60 other calls"])
def test_many_calls_take_little_memory(what: str) -> None:
    expected, actual = (make() for make in BATCHES[what])
    assert peak((Case(expected, fields=CODEX), actual)) < BYTES


# ---- anything at all ----

ODD_TEXT = st.sampled_from(
    [
        *("", " ", "\0", "\ud800", "\ue000*\ue001", "NaN", "[1]", '"', "'", "2024-01-01", "0001-01-01T00:00:00+23:59"),
        *("http://a/\ud800", "http://[", "a/../b", "$(", "ls -la", "<<E\na\nE", "x = 1", "--- a\n+++ b\n@@\n-a\n+b"),
        *("\u202e", "9" * 400, "True"),
    ]
)
TEXT = ODD_TEXT | st.text(st.characters(), max_size=10)
SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([10**400, -1, 1e308]) | TEXT
JSON = st.recursive(SCALAR, lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXT, v, max_size=3), max_leaves=8)
KEY = st.sampled_from(
    ["x", "cmd", "command", "path", "url", "code", "query", "old_str", "new_str", "patch", "view_range"]
)
KEY |= st.sampled_from(
    ["insert_line", "thought", "todos", "plan", "result", "paths", "reason", "filePath", "replace_all"]
)
OBJECT = st.dictionaries(KEY | TEXT, JSON, max_size=4)
TOOL = st.sampled_from(
    ["exec_command", "bash", "edit", "str_replace_editor", "apply_patch", "python", "web_search", "finish"]
)
TOOL |= st.sampled_from(["return_result", "todowrite", "read", "view", "think", "f", "", "\ud800"])
RAW = OBJECT.map(json.dumps) | JSON.map(json.dumps) | TEXT
TURN = st.builds(
    lambda keys, more: json.dumps({"analysis": "", "plan": "", "commands": [{"keystrokes": k} for k in keys], **more}),
    st.lists(TEXT, max_size=3),
    st.sampled_from([{}, {"task_complete": True}, {"task_complete": None}, {"x": 1}]),
)
CALLS = st.lists(st.builds(ToolCall, TOOL, RAW), max_size=3).map(tuple)
ACTION = st.builds(Action, st.sampled_from(["message", "calls", "malformed", "none"]), TEXT | TURN, CALLS, TEXT)
EXPERT = ACTION.filter(lambda action: action.kind != "calls" or action.calls)  # a row's batch has a call at least
SCHEMA = st.sampled_from(
    [
        *({}, {"type": "array", "uniqueItems": True}, {"type": ["string", "null"]}, {"enum": ["a", 1, None]}),
        *({"type": None}, {"type": 3}, {"pattern": "("}, {"pattern": BOMB}, {"$ref": "#"}, {"$ref": "#/nowhere"}),
        *({"anyOf": [{"type": "number"}, 3]}, {"default": [1]}, {"format": "date-time"}, {"items": 3}, True, None, 3),
        *({"properties": {"x": 3}}, "text"),
    ]
)


def declared_tool(name: str, properties: dict[str, Any], required: list[str], flat: bool) -> dict[str, Any]:
    function = {"name": name, "parameters": {"type": "object", "properties": properties, "required": required}}
    return function if flat else {"type": "function", "function": function}


PROPERTIES = st.dictionaries(KEY, SCHEMA, max_size=3)
DECLARED = st.builds(declared_tool, TOOL, PROPERTIES, st.sampled_from([[], ["x"]]), st.booleans())
TOOLS = st.lists(DECLARED, max_size=2).map(tuple)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "harness": st.sampled_from(["codex", "opencode", "agent006", "stirrup", "terminus_1", "terminus_2", "zzz"]),
        "threshold": st.sampled_from([0.0, 0.5, 1.0, 7]),
        "files": st.dictionaries(TEXT, TEXT, max_size=2),
        "metadata": st.sampled_from([None, {}, {"harness": "terminus_2"}]),
    },
)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(LOADED)), EXPERT, ACTION, TOOLS, FIELDS, st.booleans())
def test_anything_is_judged_and_only_the_experts_side_can_be_at_fault(
    name: str,
    expected: Action,
    actual: Action,
    declared: tuple[dict[str, Any], ...],
    fields: dict[str, Any],
    same: bool,
) -> None:
    case = Case(expected, declared, fields=fields)
    try:
        verdict = LOADED[name].verify(case, expected if same else actual)
    except VerifierFault as fault:
        assert fault.kind in ("expected_arguments", "expected_answer", "expected_action", "row_threshold")
        return
    assert 0.0 <= verdict.reward <= 1.0 and verdict.category
    if name.startswith("functional") and same and expected.kind == "calls":
        assert verdict.reward == 1.0
