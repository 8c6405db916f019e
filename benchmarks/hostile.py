"""What a verdict on hostile output costs: time and memory of the worst inputs we can think of, through every family."""

from __future__ import annotations

import cProfile
import json
import pstats
import random
import signal
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

from nemo_pivotrl import config
from nemo_pivotrl.core.types import Action, Case, ToolCall
from nemo_pivotrl.verifiers.base import Bounded, VerifierFault
from nemo_pivotrl.verifiers.loading import load_verifier

BOUND_MS = 100.0
CAP_S = 3.0
FULL = 240_000
"""Characters that stay below `Limits.max_chars`, with room for what stands around them."""
Question = tuple[Case, Action]


def shuffled(text: str, seed: int = 1) -> str:
    characters = list(text)
    random.Random(seed).shuffle(characters)
    return "".join(characters)


def dear(length: int, first: int = 0x4E00) -> str:
    """A text that difflib's search takes longest for: every character just rare enough not to be ignored."""
    kinds = min(max(101, length // 90), length)
    return shuffled("".join(chr(first + i % kinds) for i in range(length)), length)


def texts() -> dict[str, tuple[str, str]]:
    """Name -> (what the policy wrote, what the expert wrote)."""
    sequence, repeated = dear(2000), "ab" * 99
    return {
        "10 MB of words": ("rm -rf / " * 1_200_000, "ls -la src"),
        "10 MB, one word": ("a" * 10_000_000, "ls -la src"),
        "240,000 characters of words": ("rm -rf / " * (FULL // 9), "ls -la src"),
        "240,000 words of one letter": ("a " * (FULL // 2), "b " * (FULL // 2)),
        "difflib, 2,000 dear characters": (sequence, shuffled(sequence)),
        "difflib, 198 characters": (repeated, shuffled(repeated)),
        "difflib, 20,000 dear characters": (dear(20_000), shuffled(dear(20_000))),
        "difflib, 200,000 dear characters": (dear(200_000), shuffled(dear(200_000))),
        "difflib, 200,000 characters, nearly equal": (
            dear(200_000),
            dear(200_000)[7:100_000] + "x" + dear(200_000)[100_000:],
        ),
        "difflib, 200,000 characters, periodic": ("abcdefghij" * 20_000, "jihgfedcba" * 20_000),
        "NUL, lone surrogates, controls": ("\x00\ud800\udfff\x1b[2J\r\x0b" * 20_000, "\ud800 \x00"),
        "100,000 lines": ("x\n" * 100_000, "y\n" * 100_000),
        "100,000 quotes": ("'\"`\\$(" * 40_000, "echo 'a'"),
        "100,000 semicolons": ("a;" * 100_000, "a; b"),
        "40,000 options": ("ls" + " -a --b=c" * 24_000, "ls -la"),
        "deep substitutions": ("$(" * 60_000 + "x" + ")" * 60_000, "echo $(x)"),
        "60,000 path components": ("cat " + "a/../" * 40_000 + "b", "cat b"),
        "a patch of 20,000 hunks": ("@@ -1 +1 @@\n-a\n+b\n" * 12_000, "@@ -1 +1 @@\n-b\n+a\n" * 12_000),
        "digits": ("9" * FULL, "1"),
    }


def raw_arguments() -> dict[str, str]:
    """Name -> arguments as the policy wrote them, whole."""
    return {
        "10 MB of text": "x" * 10_000_000,
        "100,000-deep list": "[" * 100_000 + "]" * 100_000,
        "100,000-deep object": '{"x":' * 30_000 + "1" + "}" * 30_000,
        "open brackets": "[" * 200_000,
        "100 deep": '{"command":' * 99 + "1" + "}" * 99,
        "80,000 values": '{"command": [' + "1," * 80_000 + "1]}",
        "4,000 values": '{"command": [' + "1," * 4_000 + "1]}",
        "4,000 keys": json.dumps({f"k{i}": i for i in range(2_000)} | {"command": "ls"}),
        "20,000 duplicate keys": "{" + '"command": "a",' * 15_000 + '"command": "ls -la"}',
        "integer of 240,000 digits": '{"command": ' + "9" * FULL + "}",
        "50 integers of 4,300 digits": '{"command": [' + ",".join(["9" * 4_300] * 50) + "]}",
        "1e999999999": '{"command": 1e999999999, "timeout": -1e999999999}',
        "NaN and Infinity": '{"command": NaN, "timeout": -Infinity}',
        "lone surrogates": '{"command": "' + "\\ud800" * 40_000 + '"}',
        "NUL": '{"command": "' + "\\u0000" * 40_000 + '"}',
        "escapes": '{"command": "' + "\\\\" * 100_000 + '"}',
    }


STRING, NODE = {"type": "string"}, {"$ref": "#/$defs/node"}
BRANCHING = {
    "type": "object",
    "properties": {"x": NODE},
    "$defs": {
        "node": {
            "anyOf": [
                {"type": "object", "properties": {"op": {"const": op}, "of": NODE}, "required": ["op"]} for op in "+-"
            ]
        }
    },
}


def _nested(depth: int, key: str) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for _ in range(depth):
        made = {key: made}
    return made


def schemas() -> dict[str, tuple[Any, Any]]:
    """Name -> (a tool's schema, arguments that are dear to validate under it)."""
    bombs = {
        "^(a+)+$": "a" * 40 + "b",
        r"^(a|a)*$": "a" * 40 + "b",
        r"^(\w+\s?)*$": "word " * 12 + "!",
        "(x+x+)+y": "x" * 40,
    }
    made: dict[str, tuple[Any, Any]] = {}
    for pattern, text in bombs.items():
        bounded = {"type": "string", "pattern": pattern}
        made[f"pattern {pattern}"] = ({"properties": {"x": bounded}}, {"x": text})
        made[f"pattern {pattern}, 1,000 strings"] = ({"properties": {"x": {"items": bounded}}}, {"x": [text] * 1_000})
        made[f"pattern {pattern}, anyOf, 1,000 strings"] = (
            {"properties": {"x": {"items": {"anyOf": [bounded, {}]}}}},
            {"x": [text + str(i) for i in range(1_000)]},
        )
        made[f"patternProperties {pattern}"] = ({"patternProperties": {pattern: {}}}, {text: 1})
        made[f"additionalProperties beside {pattern}"] = (
            {"patternProperties": {pattern: {}}, "additionalProperties": False},
            {text: 1},
        )
        made[f"propertyNames {pattern}"] = ({"propertyNames": bounded}, {f"{text}{i}": 1 for i in range(100)})
    made |= {
        "pattern x*y, 200,000 x": ({"properties": {"x": {"pattern": "x*y"}}}, {"x": "x" * 200_000}),
        "uniqueItems, 1,300 objects": (
            {"properties": {"x": {"uniqueItems": True}}},
            {"x": [{"k": i} for i in range(1_300)]},
        ),
        "uniqueItems, 4,000 of two types": (
            {"properties": {"x": {"uniqueItems": True}}},
            {"x": [i if i % 2 else str(i) for i in range(4_000)]},
        ),
        "enum of 1,000, 4,000 values": (
            {"properties": {"x": {"items": {"enum": list(range(1_000))}}}},
            {"x": [999] * 4_000},
        ),
        "anyOf, 4,000 values": (
            {"properties": {"x": {"items": {"anyOf": [STRING, {"type": "null"}, {"type": "integer"}]}}}},
            {"x": [1] * 4_000},
        ),
        "recursive schema, 95 deep": ({"properties": {"of": {"$ref": "#"}}}, _nested(95, "of")),
        "branching recursive schema, 90 deep": (BRANCHING, {"x": _nested(90, "of")}),
        "schema that refers to itself": ({"$ref": "#"}, {"x": 1}),
        "unevaluatedProperties, 4,000 keys": (
            {"allOf": [{}], "unevaluatedProperties": False},
            {f"k{i}": 1 for i in range(4_000)},
        ),
        "array of 80,000 as a string": ({"properties": {"x": {"type": "array"}}}, {"x": "[" + "1," * 80_000 + "1]"}),
        "20,000 objects as a string, uniqueItems": (
            {"properties": {"x": {"type": "array", "uniqueItems": True}}},
            {"x": json.dumps([{"k": i} for i in range(20_000)])},
        ),
        "900 deep as a string": (
            {"properties": {"x": {"type": "array", "items": {"$ref": "#/properties/x"}}}},
            {"x": "[" * 900 + "]" * 900},
        ),
    }
    return made


def calls(*made: tuple[str, str]) -> Action:
    return Action("calls", calls=tuple(ToolCall(*call) for call in made))


CARRIERS: dict[str, list[tuple[str, str, dict[str, Any], dict[str, Any]]]] = {
    # family -> (tool, argument that holds the text, the other arguments, the row's fields)
    "single_step": [("f", "command", {}, {})],
    "exact": [("f", "command", {}, {})],
    "swe": [
        ("bash", "command", {}, {}),
        ("edit", "new_str", {"path": "a/b.py", "old_str": "x"}, {}),
        ("edit", "path", {"old_str": "x"}, {}),
        ("edit", "view_range", {"command": "view"}, {}),
        ("grep", "path", {}, {}),
    ],
    "terminal_multi_harness": [
        ("exec_command", "cmd", {}, {"harness": "codex"}),
        ("execute_python", "code", {}, {"harness": "agent006"}),
        ("return_result", "result", {}, {"harness": "agent006"}),
        ("finish", "reason", {"paths": ["/a"]}, {"harness": "stirrup"}),
        ("web_search", "query", {}, {"harness": "stirrup"}),
    ],
    "functional": [
        ("bash", "command", {}, {}),
        ("str_replace_editor", "new_str", {"path": "a/b.py", "old_str": "x", "command": "str_replace"}, {}),
        ("apply_patch", "patch", {}, {}),
        ("web_search", "query", {}, {}),
        ("finish", "reason", {}, {}),
        ("python", "code", {}, {}),
        ("read_file", "path", {}, {}),
        ("fetch", "url", {}, {}),
        ("f", "items", {}, {}),
    ],
}


def questions(family: str) -> Iterator[tuple[str, Callable[[], Question]]]:
    """(name, maker of the question) of every hostile case of a family."""
    if family == "terminus":
        yield from _turns()
        return
    for tool, key, rest, fields in CARRIERS[family]:
        for name, (written, expected) in texts().items():
            yield (
                f"{tool}.{key}: {name}",
                lambda w=written, e=expected, t=tool, k=key, r=rest, f=fields: _call(t, {k: w, **r}, {k: e, **r}, f),
            )
    tool, key, rest, fields = CARRIERS[family][0]
    gold = json.dumps({key: "ls -la", **rest})
    for name, text in raw_arguments().items():
        yield name, lambda text=text: (_case(calls((tool, gold)), fields), calls((tool, text)))
    for label, made, wanted in (
        ("100,000 identical calls", [gold] * 100_000, [gold]),
        ("4,000 identical calls", [gold] * 4_000, [gold] * 4_000),
        ("4,000 distinct calls against 3", [f'{{"{key}": "a {i}"}}' for i in range(4_000)], [gold] * 3),
        (
            "200 x 200 distinct calls",
            [f'{{"{key}": "a b {i}"}}' for i in range(200)],
            [f'{{"{key}": "b a {i}"}}' for i in range(200)],
        ),
        (
            "2,000 x 2,000 distinct calls",
            [f'{{"{key}": "a {i}"}}' for i in range(2_000)],
            [f'{{"{key}": "b {i}"}}' for i in range(2_000)],
        ),
    ):
        yield (
            label,
            lambda m=made, w=wanted: (_case(calls(*((tool, x) for x in w)), fields), calls(*((tool, x) for x in m))),
        )
    yield "10 MB message", lambda: (_case(Action("message", "hi"), fields), Action("message", "x" * 10_000_000))
    if family in ("terminal_multi_harness", "functional"):
        for name, (schema, arguments) in schemas().items():
            yield f"schema: {name}", lambda s=schema, a=arguments: _under(s, a)


def _under(schema: Any, arguments: Any) -> Question:
    gold = json.dumps({key: "text" for key in arguments} if len(arguments) < 200 else arguments)
    tools = ({"type": "function", "name": "t", "parameters": {"type": "object", **schema}},)
    return Case(calls(("t", gold)), tools), calls(("t", json.dumps(arguments)))


def _case(expected: Action, fields: dict[str, Any]) -> Case:
    names = {call.name for call in expected.calls}
    return Case(expected, tuple({"name": name, "parameters": {"type": "object"}} for name in names), (), fields)


def _call(tool: str, written: dict[str, Any], expected: dict[str, Any], fields: dict[str, Any]) -> Question:
    return _case(calls((tool, json.dumps(expected))), fields), calls((tool, json.dumps(written, ensure_ascii=False)))


def _turns() -> Iterator[tuple[str, Callable[[], Question]]]:
    def turn(keys: str) -> str:
        return json.dumps({"analysis": "a", "plan": "p", "commands": [{"keystrokes": keys}]}, ensure_ascii=False)

    fields = {"metadata": {"harness": "terminus_2"}}
    for name, (written, expected) in texts().items():
        yield (
            f"keystrokes: {name}",
            lambda w=written, e=expected: (
                Case(Action("message", turn(e)), (), (), fields),
                Action("message", turn(w)),
            ),
        )
    gold = turn("ls -la\n")
    commands = json.dumps({"analysis": "a", "plan": "p", "commands": [{"keystrokes": "a"}] * 2_000})
    for name, text in {**raw_arguments(), "2,000 commands": commands, "</think>": "</think>" * 30_000 + gold}.items():
        yield name, lambda text=text: (Case(Action("message", gold), (), (), fields), Action("message", text))


class Overtime(BaseException):
    """A verdict took longer than CAP_S. No Exception, so that nothing under test takes it for one of its own."""


def _stop(number: int, frame: object) -> None:
    raise Overtime


def milliseconds(verifier: Bounded, question: Question) -> tuple[float, str]:
    """Processor time of a verdict (the machine may be busy with other things), and the verdict."""
    signal.signal(signal.SIGALRM, _stop)
    signal.setitimer(signal.ITIMER_REAL, CAP_S)
    begun = time.thread_time()
    try:
        verdict = verifier.verify(*question)
        answer = f"{verdict.reward:.2f} {verdict.category}"
    except VerifierFault as fault:
        answer = f"fault {fault.kind}"
    except Overtime:
        answer = "no verdict"
    signal.setitimer(signal.ITIMER_REAL, 0)
    return (time.thread_time() - begun) * 1000, answer


def hostile(profile: bool) -> bool:
    """Print the worst cases of every family; whether all stay below the bound."""
    print(
        f"\nhostile output: processor time of a verdict in ms, median of five (bound {BOUND_MS:.0f}), and peak memory of one in MiB\n"
    )
    print("family | cases | longest | its case | most memory | its case\n" + " | ".join(["---"] * 6))
    slow: list[tuple[str, str, float, str, Bounded, Callable[[], Question]]] = []
    for family in (*CARRIERS, "terminus"):
        verifier = load_verifier(config.Verifier(name=family))
        results = []
        for name, make in questions(family):
            question = make()
            runs = [milliseconds(verifier, question)]
            if runs[0][0] < 1_000:
                runs += [milliseconds(verifier, question) for _ in range(4)]
            longest = statistics.median(ms for ms, _ in runs)
            tracemalloc.start()
            if runs[0][0] < 500:
                milliseconds(verifier, question)
            peak = tracemalloc.get_traced_memory()[1] / 2**20
            tracemalloc.stop()
            results.append((longest, peak, name))
            if longest > BOUND_MS:
                slow.append((family, name, longest, runs[0][1], verifier, make))
        (longest, _, name), (_, peak, dearest) = max(results), max(results, key=lambda r: r[1])
        print(f"{family} | {len(results)} | {longest:.1f} | {name} | {peak:.1f} | {dearest}", flush=True)
    for family, name, longest, answer, verifier, make in sorted(slow, key=lambda s: -s[2]):
        print(f"  above {BOUND_MS:.0f} ms: {family}, {name}: {longest:.0f} ms, {answer}")
        if profile:
            _profile(verifier, make())
    return not slow


def _profile(verifier: Bounded, question: Question) -> None:
    profiler = cProfile.Profile()
    profiler.runcall(milliseconds, verifier, question)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(6)
