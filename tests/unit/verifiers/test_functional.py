"""`functional` rule by rule: what each rule accepts, what it alone accepts, and what stays different all the same."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import assume, given, settings, strategies as st

from nemo_pivotrl import config
from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.core.types import Action, Case, ToolCall, Verdict
from nemo_pivotrl.verifiers.base import Bounded, Ruling, VerifierFault
from nemo_pivotrl.verifiers.functional import RULES, Functional
from nemo_pivotrl.verifiers.loading import load_verifier
from nemo_pivotrl.verifiers.patches import read_starred

Made = tuple[str, dict[str, Any]]


def calls(*made: tuple[str, Any]) -> Action:
    """Calls of (name, arguments); arguments that are no text become their JSON."""
    return Action("calls", calls=tuple(ToolCall(n, a if isinstance(a, str) else json.dumps(a)) for n, a in made))


def load(**settings: Any) -> Bounded:
    return load_verifier(config.Verifier(name="functional", message="any", settings=settings))


def tool(name: str, properties: dict[str, Any] | None = None, required: tuple[str, ...] = ()) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties or {}, "required": list(required)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def judged(
    name: str,
    expected: dict[str, Any],
    actual: dict[str, Any],
    properties: dict[str, Any] | None = None,
    verifier: Bounded | None = None,
    required: tuple[str, ...] = (),
    **fields: Any,
) -> Verdict:
    case = Case(calls((name, expected)), (tool(name, properties, required),), fields=fields)
    return (verifier or DEFAULT).verify(case, calls((name, actual)))


DEFAULT = load()


@dataclass(frozen=True)
class Pair:
    """Two values of one argument that a rule makes the same, or that stay different under every rule."""

    expected: Any
    actual: Any
    schema: dict[str, Any] = field(default_factory=dict)
    key: str = "x"
    tool: str = "f"


def shell(expected: str, actual: str) -> Pair:
    return Pair(expected, actual, key="command", tool="bash")


NUMBER, INTEGER, SET = {"type": "number"}, {"type": "integer"}, {"type": "array", "uniqueItems": True}
COLOUR = {"type": "string", "enum": ["dark red", "DARK-BLUE", "green"]}
OLDER = "def f(x):\n    y = 1\n    return x\n"

SAME: dict[str, list[Pair]] = {
    "number_type": [
        Pair(1, 1.0),
        Pair(1.0, 1, INTEGER),
        Pair(-3, -3.0, NUMBER),
        Pair(0.1 + 0.2, 0.3),
        Pair([75], [75.0]),
        Pair(10**15, 1e15),
    ],
    "stringified": [
        Pair([1, 2], "[1, 2]", {"type": "array"}),
        Pair("5", 5, INTEGER),
        Pair(True, "true", {"type": "boolean"}),
        Pair(False, "False", {"type": "boolean"}),
        Pair({"a": 1}, ' {"a": 1} ', {"type": "object"}),
        Pair(5, "5", {"anyOf": [{"type": "integer"}, {"type": "null"}]}),
        Pair(5, "5"),
        Pair(2.5, "2.5"),
    ],
    "enum_case": [
        Pair("green", "Green", COLOUR),
        Pair("dark red", "Dark-Red", COLOUR),
        Pair("DARK-BLUE", "dark_blue", COLOUR),
    ],
    "set_order": [
        Pair([1, 2, 3], [3, 1, 2], SET),
        Pair(["a", "b"], ["b", "a"], SET),
        Pair([{"a": 1}, {"b": 2}], [{"b": 2}, {"a": 1}], SET),
        Pair([[1, 2], [3]], [[3], [2, 1]], {**SET, "items": SET}),
    ],
    "whitespace": [
        Pair("a\nb", "a\nb\n", key="content", tool="write_file"),
    ],
    "place_case": [Pair("Paris", "PARIS", key="city"), Pair("France", "france", key="country")],
    "mail_domains": [Pair("bob@x.com", "bob@X.COM", key="to")],
    "phones": [Pair("+1 555 0100", "+1-555-0100", key="phone")],
    "json_text": [Pair('{"a": 1, "b": 2}', '{"b":2,"a":1}'), Pair("[1, 2]", "[1,2]", key="body")],
    "sql": [
        Pair(
            "SELECT a FROM t WHERE x=1 AND y=2", "select a from t where y = 2 and x = 1;", key="query", tool="run_sql"
        ),
        Pair("DELETE FROM t", "delete from t -- all"),
    ],
    "letter_case": [
        Pair("Paris", "paris"),
        Pair("Straße", "STRASSE"),
        Pair("C:/Data/x.csv", "C:/DATA/X.CSV", key="path"),
        Pair("Bob@x.com", "bob@x.com", key="to"),
        Pair("ABC", "abc", key="user_id"),
    ],
    "dates": [
        Pair("2024-03-01", "20240301", {"type": "string", "format": "date"}),
        Pair("2024-03-01T10:00:00+02:00", "2024-03-01T08:00:00Z"),
        Pair("2024-03-01T10:00", "2024-03-01 10:00:00", {"format": "date-time"}),
        Pair("10:00", "10:00:00", {"format": "time"}),
        Pair("2024-03-01", "March 1, 2024", key="departure_date"),
        Pair("10:00", "10:00:00", key="time"),
    ],
    "urls": [
        Pair("http://Example.com:80/a?x=1&y=2", "http://example.com/a?y=2&x=1", key="url"),
        Pair("https://example.com", "https://example.com/", key="link"),
        Pair("https://example.com/a%20b", "https://example.com/a b", key="uri"),
        Pair("https://example.com/%7Eme", "https://example.com/~me", {"format": "uri"}),
    ],
    "paths": [
        Pair("src/a.py", "./src/a.py", key="path"),
        Pair("/a/b", "/a/.//b", key="file_path"),
        Pair("src", "src/", key="dir"),
    ],
    "python_tokens": [
        Pair("x = 'a'\nprint(x)", 'x="a"  # a comment\n\nprint( x )', key="code", tool="python"),
        Pair("if x:\n  y()\n", "if x:\n    y()", key="code", tool="run_jupyter_cell"),
    ],
    "search_tokens": [
        Pair("weather in Paris", "Paris weather", key="query", tool="web_search"),
        Pair("python asyncio tutorial", "Tutorial for Python asyncio", key="q", tool="search"),
    ],
    "shell_quoting": [shell("grep 'foo' a", 'grep "foo" a'), shell("echo a\\ b", "echo 'a b'")],
    "shell_flag_order": [
        shell("ls -l -a src", "ls -a -l src"),
        shell("rm -r build -f", "rm -f -r build"),
        shell("pytest tests -x", "pytest -x tests"),
    ],
    "shell_flag_clusters": [
        shell("ls -la", "ls -l -a"),
        shell("rm -rf build", "rm -r -f build"),
        shell("head -n5 a", "head -n 5 a"),
        shell("cat -nA a", "cat -n -A a"),
    ],
    "shell_long_options": [
        shell("head --lines=5 a", "head --lines 5 a"),
        shell("pytest --tb=short", "pytest --tb short"),
        shell("mytool --level=2", "mytool --level 2"),
        shell("git push -f", "git push --force"),
    ],
    "shell_operand_order": [shell("mkdir a b", "mkdir b a"), shell("pip install a b", "pip install b a")],
    "shell_idioms": [
        shell("test -f a", "[ -f a ]"),
        shell("kill -9 5", "kill -KILL 5"),
        shell("cat f | grep x", "grep x f"),
        shell("sed -n '1,5p' f", "head -n 5 f"),
        shell("python - <<E\nprint(1)\nE", "python -c 'print(1)'"),
    ],
    "shell_env_prefix": [
        shell("pytest -q", "NO_COLOR=1 pytest -q"),
        shell("A=1 PYTHONUNBUFFERED=1 make all", "A=1 make all"),
    ],
    "shell_paths": [shell("cat ./src/a.py", "cat src/a.py"), shell("ls src/", "ls src"), shell("x > a//b", "x > a/b")],
    "shell_separators": [
        shell("make\nmake install", "make; make install"),
        shell("for i in 1 2; do echo $i; done", "for i in 1 2\ndo\n  echo $i\ndone"),
    ],
    "shell_argv": [shell("grep  foo   a", "grep foo a"), shell("make && ls", "make&&ls")],
}
"""Rule -> pairs that are the same by it. The rules about whole calls have tables of their own below."""

DEFAULTED = {
    "unit": {"type": "string", "description": "Unit of the answer (optional, defaults to 'km')."},
    "z": {"type": "integer", "description": "Default is 0."},
    "deep": {"type": "boolean", "description": "Default value: False, as most callers want."},
    "n": {"type": "integer", "default": 10},
    "mode": {"type": ["string", "null"]},
    "k": {"type": "string"},
}
WHOLE_CALLS: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("omitted_default", "f", {"k": "a"}, {"k": "a", "n": 10}),
    ("omitted_default", "f", {"k": "a", "n": 10}, {"k": "a"}),
    ("described_default", "f", {"k": "a"}, {"k": "a", "unit": "km"}),
    ("described_default", "f", {"k": "a", "z": 0}, {"k": "a"}),
    ("described_default", "f", {"k": "a"}, {"k": "a", "deep": False}),
    ("null_optional", "f", {"k": "a"}, {"k": "a", "mode": None}),
    ("null_optional", "f", {"k": "a", "mode": None}, {"k": "a"}),
]
TABLE = [(rule, p.tool, {p.key: p.expected}, {p.key: p.actual}, {p.key: p.schema}) for rule in SAME for p in SAME[rule]]
TABLE += [(rule, name, expected, actual, DEFAULTED) for rule, name, expected, actual in WHOLE_CALLS]
FILES = {"files": {"/a.py": OLDER, "f.py": "a\nb\nd\n"}}
EDITS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (
        "str_replace_editor",
        {"command": "str_replace", "path": "/a.py", "old_str": "y = 1", "new_str": "y = 2"},
        {"command": "str_replace", "path": "/a.py", "old_str": OLDER, "new_str": OLDER.replace("1", "2")},
    ),
    (
        "edit",
        {"filePath": "/a.py", "oldString": "    y = 1\n    return x", "newString": "    return x"},
        {"filePath": "/a.py", "oldString": OLDER, "newString": OLDER.replace("    y = 1\n", "")},
    ),
    (
        "apply_patch",
        {"patch": "--- a/f.py\n+++ b/f.py\n@@ -1,3 +1,3 @@\n a\n-b\n+c\n d\n"},
        {"patch": "--- a/f.py\n+++ b/f.py\n@@ -2,1 +2,1 @@\n-b\n+c\n"},
    ),
]
"""Tool and two edits that do the same to FILES, and that nobody could call the same without them."""
SWITCHED = {rule: {rule: True} for rule, (on, _) in RULES.items() if not on}


def test_every_rule_has_an_example_and_every_example_a_rule() -> None:
    assert {row[0] for row in TABLE} == set(RULES) - {"edit_effect", "shell_cd_prefix"}  # which need the state: below


@pytest.mark.parametrize(("name", "expected", "actual"), EDITS)
def test_edits_with_one_effect_are_the_same_where_the_file_is_known_and_only_there(
    name: str, expected: dict[str, Any], actual: dict[str, Any]
) -> None:
    for left, right in ((expected, actual), (actual, expected)):
        assert judged(name, left, right, **FILES).rules == ("edit_effect",)
        assert judged(name, left, right, verifier=load(rules={"edit_effect": False}), **FILES).reward == 0.0
        assert judged(name, left, right).reward == 0.0


@pytest.mark.parametrize(("rule", "name", "expected", "actual", "properties"), TABLE)
def test_a_rule_accepts_is_named_and_is_what_accepts(
    rule: str, name: str, expected: dict[str, Any], actual: dict[str, Any], properties: dict[str, Any]
) -> None:
    if rule in SWITCHED:
        assert judged(name, expected, actual, properties).reward == 0.0, f"{rule} is off unless asked for"
    for left, right in ((expected, actual), (actual, expected)):
        verdict = judged(name, left, right, properties, load(rules=SWITCHED.get(rule, {})))
        assert (verdict.reward, verdict.category) == (1.0, "EQUIVALENT"), verdict
        assert rule in verdict.rules
        off = judged(name, left, right, properties, load(rules={rule: False}))
        assert (off.reward, off.category) == (0.0, "DIFFERENT_ARGUMENTS"), off


@pytest.mark.parametrize(("rule", "name", "expected", "actual", "properties"), TABLE)
def test_every_rule_that_a_verdict_names_was_needed(
    rule: str, name: str, expected: dict[str, Any], actual: dict[str, Any], properties: dict[str, Any]
) -> None:
    on = SWITCHED.get(rule, {})
    for named in judged(name, expected, actual, properties, load(rules=on)).rules:
        assert judged(name, expected, actual, properties, load(rules={**on, named: False})).reward == 0.0, named


def test_where_either_of_two_rules_would_do_both_must_be_off_to_reject() -> None:
    for off, reward in (
        (set(), 1.0),
        ({"whitespace"}, 1.0),
        ({"shell_argv"}, 1.0),
        ({"whitespace", "shell_argv"}, 0.0),
    ):
        strict = load(rules=dict.fromkeys(off, False))
        assert judged("bash", {"command": "ls a"}, {"command": "ls a "}, verifier=strict).reward == reward


# ---- near misses: what no rule makes the same ----

DIFFERENT = [
    Pair(1, 2),
    Pair(1, True),
    Pair(True, 1),
    Pair(0, False),
    Pair(123456789012, 123456789013),
    Pair(123456789012.0, 123456789013.0),
    Pair(2**53, float(2**53) + 2),
    Pair(1.0, 1.001),
    Pair(None, "null"),
    Pair(None, 0),
    Pair(None, ""),
    Pair({}, None),
    Pair({}, []),
    Pair("5", 5, {"type": "string"}),
    Pair(5, "5", {"type": ["string", "integer"]}),
    Pair(None, "null", {"anyOf": [{"type": "string"}, {"type": "null"}]}),
    Pair(5, "5", {"anyOf": [{"type": "integer"}, {"type": "string"}]}),
    Pair(5, "six", INTEGER),
    Pair([1], "[1", {"type": "array"}),
    Pair([1, 2], [2, 1]),
    Pair([1, 2], [2, 1], {"type": "array"}),
    Pair([1, 2], [1, 2, 2], SET),
    Pair([1, 2], [1, 3], SET),
    Pair([1, -1], [-1, -1], SET),
    Pair([1, 2], [1]),
    Pair({"a": 1}, {"a": 1, "b": None}),
    Pair("green", "red", COLOUR),
    Pair("green", "", COLOUR),
    Pair("dark red", "dark blue", COLOUR),
    Pair("Paris", "paris"),
    Pair("New York", "New Jersey"),
    Pair("a\n  b", "a\nb"),
    Pair("a b", "ab"),
    Pair("2024-03-01", "2024-03-02", {"format": "date"}),
    Pair("2024-03-01T10:00:00Z", "2024-03-01T10:00:00+02:00"),
    Pair("2024-03-01T10:00:00Z", "2024-03-01T10:00:00"),
    Pair("2024-03-01T00:00:00Z", "0001-01-01T00:00:00+23:59", {"format": "date-time"}),
    Pair("http://a.com/x", "https://a.com/x", key="url"),
    Pair("http://a.com/x", "http://a.com/X", key="url"),
    Pair("http://a.com/x?a=1&a=2", "http://a.com/x?a=2&a=1", key="url"),
    Pair("http://a.com/x%2Fy", "http://a.com/x/y", key="url"),
    Pair("http://a.com/%ff", "http://a.com/%fe", key="url"),
    Pair("http://me:1@a.com/", "http://me:2@a.com/", key="url"),
    Pair("http://a.com:8080/", "http://a.com/", key="url"),
    Pair("http://a.com/\ud800", "http://a.com/\ud801", key="url"),
    Pair("src/a.py", "src/b.py", key="path"),
    Pair("src/a.py", "/src/a.py", key="path"),
    Pair("a/../b", "a/b", key="path"),
    Pair("my  file", "my file", key="path"),
    Pair("print(7//2)", "print(7/2)", key="code", tool="python"),
    Pair("x = 'a  b'", "x = 'a b'", key="code", tool="python"),
    Pair("if x:\n  y()\nz()", "if x:\n  y()\n  z()", key="code", tool="python"),
    Pair("!rm -rf / tmp", "!rm -rf /tmp", key="code", tool="python"),
    Pair("%cd / tmp", "%cd /tmp", key="code", tool="jupyter"),
    Pair("x = 'a b", "x = 'ab", key="code", tool="python"),
    Pair("weather in Paris", "hotels in Rome", key="query", tool="web_search"),
    Pair("foo bar", "bar foo", key="pattern", tool="grep"),
    Pair("closed as test 3 passes", "closed as test 4 passes", key="summary", tool="finish"),
    Pair("the parser drops a line", "banana bread recipe", key="thought", tool="think"),
    Pair(["ls", "#a"], ["ls", "#b"], key="command", tool="bash"),
    Pair(["bash", "-lc", "ls -la"], ["bash", "-lc", "ls -l"], key="command", tool="shell"),
    Pair(["echo", "'a'"], ["echo", "a"], key="command", tool="shell"),
    shell("grep -rn foo src", "rm -rf /"),
    shell("python train.py --seed 1", "python train.py --seed 2"),
    shell("make", ""),
]


@pytest.mark.parametrize("pair", DIFFERENT, ids=lambda p: f"{p.key}: {p.expected!r:.30} {p.actual!r:.30}")
def test_near_misses_stay_different_in_both_directions(pair: Pair) -> None:
    for left, right in ((pair.expected, pair.actual), (pair.actual, pair.expected)):
        verdict = judged(pair.tool, {pair.key: left}, {pair.key: right}, {pair.key: pair.schema})
        assert (verdict.reward, verdict.category) == (0.0, "DIFFERENT_ARGUMENTS"), verdict
        assert verdict.detail and not verdict.rules


def test_the_last_word_of_a_shell_invocation_in_words_is_read_as_a_command() -> None:
    for left, right in ((["bash", "-lc", "ls -la"], ["bash", "-lc", "ls -l -a"]),):
        assert judged("shell", {"command": left}, {"command": right}).rules == ("shell_argv", "shell_flag_clusters")
    assert judged("bash", {"commands": ["ls -la"]}, {"commands": ["ls -l -a"]}).reward == 1.0


@pytest.mark.parametrize(
    ("expected", "actual", "required"),
    [
        ({"k": "a"}, {"k": "a", "n": 11}, ()),
        ({"k": "a"}, {"k": "a", "other": None}, ()),
        ({"k": "a"}, {"k": "a", "mode": "b"}, ()),
        ({"k": "a", "mode": None}, {"k": "a"}, ("mode",)),
        ({"k": "a"}, {}, ()),
        ({}, {"k": ""}, ()),
    ],
)
def test_an_argument_of_one_side_alone_counts_unless_it_is_the_default_or_an_optional_null(
    expected: dict[str, Any], actual: dict[str, Any], required: tuple[str, ...]
) -> None:
    assert judged("f", expected, actual, DEFAULTED, required=required).reward == 0.0
    assert judged("f", actual, expected, DEFAULTED, required=required).reward == 0.0


# ---- edits ----

REPLACE = {"command": "str_replace", "path": "/r/a.py"}
UNIFIED = "--- a/f.sql\n+++ b/f.sql\n@@ -1,2 +1,1 @@\n-{}\n keep\n"
PLACED = "*** Begin Patch\n*** Update File: a.py\n@@ {}\n-pass\n+return 1\n*** End Patch\n"
STARRED = "*** Begin Patch\n*** Update File: a.py\n@@\n-x\n+y\n{}*** End Patch\n"


@pytest.mark.parametrize(
    ("name", "expected", "actual"),
    [
        ("edit", {**REPLACE, "old_str": "a", "new_str": "b"}, {**REPLACE, "old_str": "a", "new_str": "c"}),
        ("edit", {**REPLACE, "old_str": "a", "new_str": "b"}, {**REPLACE, "old_str": "c", "new_str": "b"}),
        ("edit", {**REPLACE, "old_str": "a", "new_str": "b"}, {**REPLACE, "old_str": "a", "new_string": "b"}),
        ("edit", {**REPLACE, "old_str": "a", "new_str": "b"}, {"path": "/r/a.py", "old_str": "a", "new_str": "b"}),
        ("edit", {**REPLACE, "old_str": "a", "new_str": "b"}, {**REPLACE, "old_str": "a", "new_str": "b", "force": 1}),
        (
            "edit",
            {**REPLACE, "old_str": "a", "new_str": "b"},
            {**REPLACE, "path": "/r/b.py", "old_str": "a", "new_str": "b"},
        ),
        (
            "edit",
            {**REPLACE, "old_str": "a", "new_str": "b"},
            {**REPLACE, "old_str": "a", "new_str": "b", "replace_all": True},
        ),
        (
            "edit",
            {"filePath": "a", "oldString": "x", "newString": "y"},
            {"path": "b", "oldString": "x", "newString": "y"},
        ),
        ("edit", {**REPLACE, "old_str": "x=1", "new_str": "x=2"}, {**REPLACE, "old_str": "y=1", "new_str": "y=2"}),
        (
            "edit",
            {**REPLACE, "old_str": "a\n", "new_str": "a\nb\n"},
            {**REPLACE, "old_str": "c\n", "new_str": "c\nb\n"},
        ),
        (
            "edit",
            {**REPLACE, "old_str": "f()", "new_str": "  f()"},
            {**REPLACE, "old_str": "f()", "new_str": "    f()"},
        ),
        (
            "str_replace_editor",
            {"command": "insert", "path": "a", "insert_line": 3, "new_str": "b"},
            {"command": "insert", "path": "a", "insert_line": 4, "new_str": "b"},
        ),
        (
            "str_replace_editor",
            {"command": "create", "path": "a", "file_text": "b"},
            {"command": "str_replace", "path": "a", "file_text": "b"},
        ),
        (
            "str_replace_editor",
            {"command": "view", "path": "a", "view_range": [1, 9]},
            {"command": "view", "path": "a", "view_range": [1, 90]},
        ),
        ("write_file", {"path": "a.py", "content": "print(7//2)"}, {"path": "a.py", "content": "print(7/2)"}),
        ("apply_patch", {"patch": UNIFIED.format("-- one")}, {"patch": UNIFIED.format("-- two")}),
        ("apply_patch", {"patch": UNIFIED.format("a")}, {"patch": UNIFIED.format("a").replace("f.sql", "g.sql")}),
        ("apply_patch", {"patch": UNIFIED.format("a")}, {"patch": UNIFIED.format("a").replace("b/f.sql", "b/g.sql")}),
        ("apply_patch", {"patch": UNIFIED.format("a")}, {"patch": UNIFIED.format("a").replace("b/f.sql", "/dev/null")}),
        (
            "apply_patch",
            {"patch": UNIFIED.format("a").replace("b/f.sql", "/dev/null")},
            {"patch": UNIFIED.format("a").replace("b/f.sql", "/dev/null").replace("f.sql", "g.sql")},
        ),
        ("apply_patch", {"input": STARRED.format("")}, {"input": STARRED.format("*** Delete File: b.py\n")}),
        ("apply_patch", {"input": STARRED.format("--- x\n")}, {"input": STARRED.format("--- z\n")}),
        ("apply_patch", {"input": PLACED.format("class A")}, {"input": PLACED.format("class B")}),
        ("apply_patch", {"input": PLACED.format("A\n@@ f()")}, {"input": PLACED.format("B\n@@ f()")}),
        (
            "apply_patch",
            {"input": STARRED.format("")},
            {"input": STARRED.format("").replace("a.py\n", "a.py\n*** Move to: c.py\n")},
        ),
        (
            "apply_patch",
            {"input": "*** Begin Patch\n*** Add File: a\n+x\n*** End Patch"},
            {"input": "*** Begin Patch\n*** Update File: a\n+x\n*** End Patch"},
        ),
        ("apply_patch", {"path": "a", "patch": STARRED.format("")}, {"path": "b", "patch": STARRED.format("")}),
        ("apply_patch", {"patch": "no patch at all"}, {"patch": "no patch either"}),
    ],
)
def test_other_edits_stay_different(name: str, expected: dict[str, Any], actual: dict[str, Any]) -> None:
    assert judged(name, expected, expected).category == "EQUAL"
    assert judged(name, expected, actual).category == "DIFFERENT_ARGUMENTS"
    assert judged(name, actual, expected).category == "DIFFERENT_ARGUMENTS"


def test_the_place_of_a_hunk_is_its_own_and_not_the_file_befores() -> None:
    patch = "*** Begin Patch\n*** Update File: {}\n@@ {}\n-x\n+y\n*** Update File: {}\n@@ f()\n-x\n+y\n*** End Patch\n"
    read = read_starred(patch.format("./a", "g()", "b"))
    assert read == ("*** Update File: a", "@@ g()", "-x", "+y", "*** Update File: b", "@@ f()", "-x", "+y")


FILE = "a = 1\nb = 1\nc = 3\n"
KNOWN = {"/r/a.py": FILE}
INSERT = {"command": "insert", "path": "/r/a.py", "insert_line": 1, "new_str": "x = 0\n"}
EDITOR = {name: {} for name in ("command", "path", "old_str", "new_str", "insert_line", "file_text", "replace_all")}


@pytest.mark.parametrize(
    ("expected", "actual", "same"),
    [
        (INSERT, {**REPLACE, "old_str": "a = 1\n", "new_str": "a = 1\nx = 0\n"}, True),
        (INSERT, {**REPLACE, "path": "/r/./a.py", "old_str": "b = 1", "new_str": "x = 0\nb = 1"}, True),
        (INSERT, {**INSERT, "insert_line": 2}, False),
        (INSERT, {**INSERT, "new_str": "x = 0\n\n"}, False),
        (INSERT, {**INSERT, "insert_line": 99}, False),
        (INSERT, {**REPLACE, "old_str": "a = 1", "new_str": "a = 1\nx = 1"}, False),
        (INSERT, {"command": "create", "path": "/r/a.py", "file_text": FILE.replace("a = 1", "a = 1\nx = 0")}, True),
        # `= 1` is there twice: the editor refuses, so the calls do not do the same
        ({**REPLACE, "old_str": "a = 1", "new_str": "a = 2"}, {**REPLACE, "old_str": "= 1", "new_str": "= 2"}, False),
        (
            {**REPLACE, "old_str": "= 1", "new_str": "= 2", "replace_all": True},
            {**REPLACE, "old_str": "a = 1\nb = 1", "new_str": "a = 2\nb = 2"},
            True,
        ),
    ],
)
def test_edits_of_a_known_file_are_compared_by_what_becomes_of_it(
    expected: dict[str, Any], actual: dict[str, Any], same: bool
) -> None:
    verdict = judged("str_replace_editor", expected, actual, EDITOR, files=KNOWN)
    assert verdict.reward == float(same), verdict
    assert ("edit_effect" in verdict.rules) == same
    off = judged("str_replace_editor", expected, actual, EDITOR, load(rules={"edit_effect": False}), files=KNOWN)
    assert off.reward == 0.0 or not same


def test_a_file_that_the_experts_edit_does_not_fit_decides_nothing() -> None:
    expected = {**REPLACE, "old_str": "gone = 1", "new_str": "gone = 2"}
    actual = {**REPLACE, "old_str": "x\ngone = 1", "new_str": "x\ngone = 2"}
    assert judged("edit", expected, actual, files=KNOWN).reward == 0.0
    assert judged("edit", expected, {**expected, "path": "/r/./a.py"}, files=KNOWN).reward == 1.0
    assert judged("edit", expected, {**actual, "new_str": "x\ngone = 3"}, files=KNOWN).reward == 0.0


# ---- settings ----


def test_tool_name_mode_looks_at_the_name_alone() -> None:
    by_name = load(mode="tool_name")
    assert judged("bash", {"command": "ls"}, {"command": "rm -rf /"}, verifier=by_name).category == "EQUAL"
    case = Case(calls(("bash", {"command": "ls"})))
    assert by_name.verify(case, calls(("bash", "{broken"))).reward == 1.0
    assert by_name.verify(case, calls(("shell", {"command": "ls"}))).category == "DIFFERENT_TOOL"
    assert by_name.verify(case, Action("message", "ls")).category == "DIFFERENT_KIND"


def test_ignored_arguments_do_not_count_and_others_do() -> None:
    ignoring = load(ignored_arguments=["security_risk"])
    left, right = {"command": "ls", "security_risk": "LOW"}, {"command": "ls"}
    assert judged("bash", left, right).reward == 0.0
    assert judged("bash", left, right, verifier=ignoring).reward == 1.0
    assert judged("bash", left, {**left, "security_risk": "HIGH"}, verifier=ignoring).reward == 1.0
    assert judged("bash", left, {"command": "ls -a"}, verifier=ignoring).reward == 0.0


def test_the_recipe_can_say_what_an_argument_holds() -> None:
    left, right = {"line": "ls -la"}, {"line": "ls -l -a"}
    assert judged("f", left, right).reward == 0.0
    for name in ("line", "f.line"):
        assert judged("f", left, right, verifier=load(kinds={name: "shell"})).rules[0] == "shell_argv"
    assert judged("f", left, right, verifier=load(kinds={"g.line": "shell"})).reward == 0.0
    plain = load(kinds={"command": "text"})
    assert judged("bash", {"command": "ls -la"}, {"command": "ls -l -a"}, verifier=plain).reward == 0.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rules": {"shell_env_prefx": False}}, "did you mean `shell_env_prefix`"),
        ({"rules": {"zzz": True}}, "use one of number_type, stringified"),
        ({"kinds": {"x": "shel"}}, "did you mean `shell`"),
        ({"kinds": {"x": "zzz"}}, "use one of text, exact, words"),
        ({"mode": "name"}, "use one of arguments, tool_name"),
        ({"search_overlap": 0.5}, "search_overlap"),
        ({"ask_judge": ["message"]}, "use one of shell, query"),
        ({"ignored": ["x"]}, "did you mean `ignored_arguments`"),
    ],
)
def test_a_mistake_in_the_settings_is_an_input_error_that_names_the_nearest(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load(**settings)


# ---- which kind of action ----

A, B, C = ("f", {"x": 1}), ("f", {"x": 2}), ("g", {})
SAY = Action("message", "Hello.")


@pytest.mark.parametrize(
    ("expected", "actual", "reward", "category"),
    [
        (SAY, Action("message", "Something else."), 1.0, "MESSAGE"),
        (SAY, Action("message", " \n"), 0.0, "NO_ACTION"),
        (SAY, calls(A), 0.0, "DIFFERENT_KIND"),
        (calls(A), SAY, 0.0, "DIFFERENT_KIND"),
        (calls(A), Action("none"), 0.0, "NO_ACTION"),
        (calls(A), Action("malformed", detail="no end"), 0.0, "UNDECODABLE"),
        (calls(A), calls(A), 1.0, "EQUAL"),
        (calls(A), calls(("F", {"x": 1})), 0.0, "DIFFERENT_TOOL"),
        (calls(A), calls(("f", "{broken")), 0.0, "UNDECODABLE"),
        (calls(A), calls(("f", "[1]")), 0.0, "UNDECODABLE"),
        (calls(A), calls(("f", "3")), 0.0, "UNDECODABLE"),
        (calls(A), calls(("f", "")), 0.0, "DIFFERENT_ARGUMENTS"),
        (calls(C), calls(("g", "")), 1.0, "EQUAL"),
        (calls(A), calls(A, A), 0.0, "DIFFERENT_COUNT"),
        (calls(A, B), calls(A), 0.0, "DIFFERENT_COUNT"),
        (calls(A, B), calls(B, A), 1.0, "EQUAL"),
        (calls(A, B), calls(A, A), 0.0, "DIFFERENT_ARGUMENTS"),
        (calls(A, C), calls(A, B), 0.0, "DIFFERENT_TOOL"),
        (calls(A, B), calls(("f", {"x": 2.0}), A), 1.0, "EQUIVALENT"),
        (calls(A, ("f", {"x": 1.0})), calls(("f", {"x": 1.0}), A), 1.0, "EQUAL"),
        (calls(("f", {"x": 1, "y": 2})), calls(("f", '{"y":2,"x":1}')), 1.0, "EQUAL"),
        (calls(("f", {"x": 2})), calls(("f", '{"x": 1, "x": 2}')), 1.0, "EQUAL"),
        (calls(("f", '{"x": NaN}')), calls(("f", '{"x": NaN}')), 1.0, "EQUAL"),
        (calls(("f", '{"x": Infinity}')), calls(("f", '{"x": -Infinity}')), 0.0, "DIFFERENT_ARGUMENTS"),
    ],
)
def test_kind_count_name_and_decoding_decide_first(
    expected: Action, actual: Action, reward: float, category: str
) -> None:
    verdict = DEFAULT.verify(Case(expected), actual)
    assert (verdict.reward, verdict.category) == (reward, category)


def test_extra_calls_are_accepted_where_the_recipe_says_so() -> None:
    lenient = load(extra_calls=True)
    assert lenient.verify(Case(calls(A, B)), calls(C, B, A)).category == "EQUAL"
    assert lenient.verify(Case(calls(A, B)), calls(C, A)).category == "DIFFERENT_ARGUMENTS"
    assert lenient.verify(Case(calls(A, B)), calls(A)).category == "DIFFERENT_COUNT"
    assert lenient.verify(Case(calls(A, B)), calls(A, C, C)).reward == 0.0


def test_a_call_is_matched_where_it_is_needed_and_not_where_it_first_fits() -> None:
    wanted = calls(*(("bash", {"command": c}) for c in ("ls -la", "ls -l -a", "ls -R")))
    found = [("bash", {"command": c}) for c in ("ls -R", "ls -a -l", "ls -al")]
    for order in (found, found[::-1]):
        assert DEFAULT.verify(Case(wanted), calls(*order)).reward == 1.0
    assert DEFAULT.verify(Case(wanted), calls(*found[:2], found[0])).reward == 0.0


def test_an_expert_action_that_cannot_be_read_is_a_fault_and_not_a_score() -> None:
    for broken in ("{", "[1]", "[" * 100_000):
        with pytest.raises(VerifierFault, match="f: "):
            DEFAULT.verify(Case(calls(("f", broken))), calls(("f", "{}")))
    with pytest.raises(VerifierFault, match="terminus_2"):
        DEFAULT.verify(Case(Action("message", "{}"), fields={"harness": "terminus_2"}), SAY)


@pytest.mark.parametrize(
    "tools",
    [
        ({"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"type": None}}}}},),
        ({"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"type": 5}}}}},),
        ({"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"$ref": "#/$defs/a"}}}}},),
        ({"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"$ref": "#"}}}}},),
        ({"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": 3}, "required": 3}}},),
        ({"type": "function", "function": {"name": "f", "parameters": [1]}},),
        ({"type": "function", "function": {"name": "f", "parameters": None}},),
        ({"type": "function", "function": None},),
        ({"name": "f", "parameters": {"properties": {"x": {"anyOf": [3], "enum": 4}}}},),
    ],
)
def test_a_broken_schema_says_nothing_and_breaks_nothing(tools: tuple[dict[str, Any], ...]) -> None:
    for fields in ({}, {"declared_tools": list(tools)}, {"declared_tools": 3}):
        case = Case(calls(("f", {"x": "a  b", "y": [1]})), tools, fields=fields)
        assert DEFAULT.verify(case, calls(("f", {"x": "a  b", "y": [1.0]}))).rules == ("number_type",)
        assert DEFAULT.verify(case, calls(("f", {"x": "1", "y": [1]}))).reward == 0.0


def test_references_and_alternatives_of_a_schema_are_followed() -> None:
    root = {
        "type": "object",
        "properties": {"x": {"$ref": "#/$defs/ids"}, "y": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/ids"}]}},
        "$defs": {"ids": SET},
    }
    case, sets = (
        Case(calls(("f", {"x": [1, 2]})), ({"name": "f", "parameters": root},)),
        load(rules={"set_order": True}),
    )
    assert sets.verify(case, calls(("f", {"x": [2, 1]}))).rules == ("set_order",)
    assert sets.verify(case, calls(("f", {"x": [2, 1], "y": None}))).rules == ("null_optional", "set_order")
    assert DEFAULT.verify(case, calls(("f", {"x": [2, 1]}))).reward == 0.0


# ---- the judge ----


@dataclass
class Stub:
    """A judge that always answers the same, and remembers what it was asked."""

    same: bool
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    concurrency: int = 4

    def equivalent(self, kind: str, case: Case, expected: str, actual: str) -> Ruling:
        self.asked.append((kind, expected, actual))
        return Ruling(self.same, "1/1 1/1" if self.same else "0/1 0/1", "because")


@pytest.mark.parametrize("same", [True, False])
def test_the_judge_decides_the_kinds_it_is_given(same: bool) -> None:
    judge = Stub(same)
    asking = Bounded(Functional(judge=judge, ask_judge=("shell", "prose")), config.Limits())
    assert asking.asks_judge and asking.concurrency == 4
    verdict = judged("bash", {"command": "ls"}, {"command": "dir"}, verifier=asking)
    assert verdict.category == ("JUDGED_SAME" if same else "DIFFERENT_ARGUMENTS") and verdict.detail == "because"
    assert verdict.figures == {"votes": "1/1 1/1" if same else "0/1 0/1"} and verdict.reward == float(same)
    assert judge.asked == [("action", 'bash({"command": "ls"})', 'bash({"command": "dir"})')]


def test_prose_is_known_by_its_words_and_not_by_its_arguments_name() -> None:
    judge = Stub(True)
    asking = Bounded(Functional(judge=judge, ask_judge=("prose",)), config.Limits())
    for name in ("x", "summary", "body"):
        assert (
            judged("f", {name: "The test fails today."}, {name: "Today the test fails."}, verifier=asking).reward == 1.0
        )
        assert judged("f", {name: "safe"}, {name: "not safe"}, verifier=asking).reward == 0.0
        assert judged("f", {name: "The test fails today."}, {name: "Today the test fails."}).reward == 0.0
    assert len(judge.asked) == 3


def test_the_judge_is_asked_only_when_nothing_else_differs() -> None:
    judge = Stub(True)
    asking = Bounded(Functional(judge=judge, ask_judge=("shell",)), config.Limits())
    turn = Case(Action("message", turn_2("ls\n")), fields={"harness": "terminus_2"})
    unasked = [
        judged("bash", {"command": "ls", "timeout": 1}, {"command": "dir", "timeout": 2}, verifier=asking),
        judged("bash", {"command": "ls -la"}, {"command": "ls -l -a"}, verifier=asking),
        judged("f", {"x": 1}, {"x": 2}, verifier=asking),
        asking.verify(Case(calls(("bash", {"command": "ls"}))), calls(("bash", "{"))),
        asking.verify(Case(calls(("bash", {"command": "a"}), A)), calls(("bash", {"command": "b"}), A)),
        asking.verify(Case(SAY), Action("message", "Hi.")),
        asking.verify(turn, Action("message", turn_2("ls\n", task_complete=True))),
    ]
    assert [v.reward for v in unasked] == [0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0] and judge.asked == []
    assert asking.verify(turn, Action("message", turn_2("dir\n"))).category == "JUDGED_SAME"
    assert judge.asked == [("terminal", "ls\n", "dir\n")]
    assert not DEFAULT.asks_judge and DEFAULT.concurrency == 1


# ---- terminal turns ----


def turn_2(*keys: str, **more: Any) -> str:
    return json.dumps({"analysis": "a", "plan": "p", "commands": [{"keystrokes": k} for k in keys], **more})


def turn_1(keys: str, complete: bool = False) -> str:
    command = {"keystrokes": keys, "is_blocking": True, "timeout_sec": 1.0}
    return json.dumps({"state_analysis": "a", "explanation": "e", "commands": [command], "is_task_complete": complete})


@pytest.mark.parametrize(
    ("harness", "expected", "actual", "verdict"),
    [
        ("terminus_2", turn_2("ls\n"), turn_2("ls\n", task_complete=False), (1.0, "EQUAL")),
        ("terminus_2", turn_2("ls -la\n"), turn_2("ls -l -a\n"), (1.0, "EQUIVALENT")),
        ("terminus_2", turn_2("ls\n"), "<think>hm</think>" + turn_2("ls\n"), (1.0, "EQUAL")),
        ("terminus_2", turn_2("make\n", "ls\n"), turn_2("make\nls\n"), (1.0, "EQUAL")),
        ("terminus_2", turn_2("ls\n"), turn_2("ls"), (0.0, "DIFFERENT_ARGUMENTS")),
        ("terminus_2", turn_2("ls\n"), turn_2("rm -rf /\n"), (0.0, "DIFFERENT_ARGUMENTS")),
        ("terminus_2", turn_2("train --lr 0.001 --seed 1\n"), turn_2("train --lr 0.001 --seed 2\n"), (0.0, "DIFFERENT_ARGUMENTS")),
        ("terminus_2", turn_2("ls\n"), turn_2("ls\n", task_complete=True), (0.0, "DIFFERENT_ARGUMENTS")),
        ("terminus_2", turn_2(task_complete=True), turn_2(), (0.0, "DIFFERENT_ARGUMENTS")),
        ("terminus_2", turn_2(), turn_2(), (1.0, "EQUAL")),
        ("terminus_2", turn_2("ls\n"), turn_2(), (0.0, "DIFFERENT_ARGUMENTS")),
        ("terminus_2", turn_2("ls\n"), turn_2("ls\n") + " done", (0.0, "UNDECODABLE")),
        ("terminus_2", turn_2("ls\n"), turn_2("ls\n", extra=1), (0.0, "UNDECODABLE")),
        ("terminus_2", turn_2("ls\n"), turn_1("ls\n"), (0.0, "UNDECODABLE")),
        ("terminus_1", turn_1("ls\n"), turn_1("ls\n"), (1.0, "EQUAL")),
        ("terminus_1", turn_1("ls\n"), turn_1("ls\n", True), (0.0, "DIFFERENT_ARGUMENTS")),
    ],
)  # fmt: skip
def test_terminal_turns_are_compared_by_their_keystrokes_and_completion(
    harness: str, expected: str, actual: str, verdict: tuple[float, str]
) -> None:
    for fields in ({"harness": harness}, {"metadata": {"harness": harness}}):
        found = DEFAULT.verify(Case(Action("message", expected), fields=fields), Action("message", actual))
        assert (found.reward, found.category) == verdict


def test_the_rows_threshold_does_not_loosen_a_terminal_turn() -> None:
    case = Case(Action("message", turn_2("ls\n")), fields={"harness": "terminus_2", "threshold": 0.0})
    assert DEFAULT.verify(case, Action("message", turn_2("rm -rf /\n"))).reward == 0.0


# ---- the measured defects of the released verifiers ----


@pytest.mark.parametrize(
    ("name", "expected", "actual", "reward"),
    [
        ("f", {"x": "find the file"}, {"x": "find the file"}, 1.0),
        ("bash", {"command": "ls"}, {"security_risk": "LOW"}, 0.0),
        ("bash", {"command": "ls"}, {}, 0.0),
        ("bash", {"command": "FOO=1 pytest"}, {"command": "pytest"}, 0.0),
        ("str_replace_editor", {"command": "view", "path": "a"}, {}, 0.0),
        *(
            ("str_replace_editor", *[{"command": "view", "path": "a", "view_range": lines}] * 2, 1.0)
            for lines in ([1, -1], [5, 5])
        ),
        ("grep", {"pattern": "a", "path": "b"}, {"pattern": "c", "path": "b"}, 0.0),
        ("finish", {"message": "the tests pass now"}, {"message": ""}, 0.0),
        ("write_file", {"path": "a", "content": "x" * 2100 + "y"}, {"path": "a", "content": "x" * 2100 + "z"}, 0.0),
        ("f", {"x": 1}, {"x": True}, 0.0),
        ("f", {"x": 75}, {"x": 75.0}, 1.0),
    ],
)  # fmt: skip
def test_what_was_measured_to_be_wrong_elsewhere_is_right_here(
    name: str, expected: dict[str, Any], actual: dict[str, Any], reward: float
) -> None:
    assert judged(name, expected, actual).reward == reward


# ---- properties ----

TEXT = st.text(st.characters(exclude_categories=[]), max_size=12)
SCALAR = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(10**8, 10**20), st.floats(allow_nan=False), TEXT
)
VALUE = st.recursive(SCALAR, lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXT, v, max_size=3), max_leaves=8)
KEY = (
    st.sampled_from(["x", "path", "url", "command", "code", "query", "summary", "old_str", "new_str", "content"]) | TEXT
)
ARGUMENTS = st.dictionaries(KEY, VALUE, max_size=4)
TOOL = st.sampled_from(["f", "bash", "python", "web_search", "edit", "apply_patch", "think", "execute_bash"])
SCHEMA = st.sampled_from([{}, SET, NUMBER, {"type": "array"}, {"type": "string"}, COLOUR, {"format": "date"}])


@settings(max_examples=150, deadline=None)
@given(TOOL, ARGUMENTS, st.dictionaries(KEY, SCHEMA, max_size=3))
def test_any_call_equals_itself_whatever_the_order_of_keys_and_the_spacing(
    name: str, arguments: dict[str, Any], properties: dict[str, Any]
) -> None:
    case = Case(calls((name, arguments)), (tool(name, properties),))
    turned = json.dumps(dict(reversed(arguments.items())), indent=2, ensure_ascii=False)
    assert DEFAULT.verify(case, case.expected).category == "EQUAL"
    assert DEFAULT.verify(case, calls((name, turned))).category == "EQUAL"


def changed(value: Any, other: Any) -> list[Any]:
    """`value` with one of its scalars replaced by `other`, for each of them."""
    if isinstance(value, dict):
        return [{**value, k: c} for k, v in value.items() for c in changed(v, other)]
    if isinstance(value, list):
        return [[*value[:i], c, *value[i + 1 :]] for i, v in enumerate(value) for c in changed(v, other)]
    return [other]


def apart(left: Any, right: Any) -> bool:
    """Whether two scalars differ by more than the relaxations on plain text and numbers allow, by a formula of its own."""
    if isinstance(left, bool) != isinstance(right, bool):
        return True
    if isinstance(left, (int, float)) and isinstance(right, (int, float)):
        return left != right and (
            (float(left).is_integer() and float(right).is_integer()) or abs(left - right) > 1e-8 * max(abs(left), 1)
        )
    if isinstance(left, str) and isinstance(right, str):
        return left.isascii() and right.isascii() and left.split() != right.split()
    return True


@settings(max_examples=200, deadline=None)
@given(VALUE, SCALAR)
def test_no_change_of_a_single_scalar_is_accepted(value: Any, other: Any) -> None:
    for other_value in changed(value, other):
        place = [(a, b) for a, b in zip(scalars(value), scalars(other_value), strict=True) if repr(a) != repr(b)]
        assume(all(apart(a, b) for a, b in place))
        same = judged("f", {"x": value}, {"x": other_value}).reward == 1.0
        assert same == (place == [])


def scalars(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [s for v in value.values() for s in scalars(v)]
    return [s for v in value for s in scalars(v)] if isinstance(value, list) else [value]


@settings(max_examples=100, deadline=None)
@given(st.lists(SCALAR, min_size=1, max_size=5, unique_by=repr), st.randoms(use_true_random=False))
def test_a_set_is_the_same_in_any_order_and_no_set_with_another_member(values: list[Any], random: Any) -> None:
    shuffled = random.sample(values, len(values))
    sets = load(rules={"set_order": True})
    assert judged("f", {"x": values}, {"x": shuffled}, {"x": SET}, sets).reward == 1.0
    assert judged("f", {"x": values}, {"x": [*shuffled[:-1], "another member"]}, {"x": SET}, sets).reward == float(
        shuffled[-1] == "another member"
    )


@settings(max_examples=150, deadline=None)
@given(TOOL, ARGUMENTS, ARGUMENTS, st.dictionaries(KEY, SCHEMA, max_size=3))
def test_without_files_a_verdict_does_not_depend_on_which_side_is_the_experts(
    name: str, left: dict[str, Any], right: dict[str, Any], properties: dict[str, Any]
) -> None:
    assume(left.keys() == right.keys() or name not in ("edit", "apply_patch"))
    pair = judged(name, left, right, properties), judged(name, right, left, properties)
    assert pair[0].reward == pair[1].reward


@settings(max_examples=60, deadline=None)
@given(ARGUMENTS, ARGUMENTS, st.sets(st.sampled_from(sorted(RULES))))
def test_switching_a_rule_off_never_accepts_more(left: dict[str, Any], right: dict[str, Any], off: set[str]) -> None:
    strict, none = load(rules=dict.fromkeys(off, False)), load(rules=dict.fromkeys(RULES, False))
    strictest = judged("bash", left, right, verifier=none)
    assert strictest.category in ("EQUAL", "DIFFERENT_ARGUMENTS")
    assert strictest.reward <= judged("bash", left, right, verifier=strict).reward <= judged("bash", left, right).reward


def test_a_required_argument_may_not_be_left_out_though_it_has_a_default() -> None:
    properties = {"n": {"type": "integer", "default": 10}, "k": {"type": "string"}}
    tool = {"name": "f", "parameters": {"type": "object", "properties": properties, "required": ["n"]}}
    case = Case(
        Action("calls", calls=(ToolCall("f", '{"k": "a", "n": 10}'),)), ({"type": "function", "function": tool},)
    )
    for arguments, reward in (('{"k": "a"}', 0.0), ('{"k": "a", "n": 10}', 1.0), ('{"n": 10, "k": "a"}', 1.0)):
        assert Functional().verify(case, Action("calls", calls=(ToolCall("f", arguments),))).reward == reward


def test_a_patchs_last_line_end_says_nothing_by_a_rule_alone() -> None:
    patch = "--- a/f\n+++ b/f\n@@ -1 +1 @@\n-a\n+b\n"
    ended, unended = (
        Action("calls", calls=(ToolCall("apply_patch", json.dumps({"patch": text})),))
        for text in (patch, patch + "\\ No newline at end of file\n")
    )
    verdict = load_verifier(config.Verifier(name="functional")).verify(Case(ended), unended)
    assert (verdict.reward, verdict.rules) == (1.0, ("whitespace",))
    strict = load_verifier(config.Verifier(name="functional", settings={"rules": {"whitespace": False}}))
    for files in ({}, {"files": {"f": "a\n"}}):
        assert strict.verify(Case(ended, fields=files), unended).reward == 0.0
        assert strict.verify(Case(unended, fields=files), unended).reward == 1.0
