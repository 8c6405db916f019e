"""Schema validation means what jsonschema means, at a bounded cost."""

import json
import re
import time
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from openapi_schema_validator import OAS32Validator
from support.slowness import slowness

from nemo_pivotrl import config
from nemo_pivotrl.core.types import Action, Case, ToolCall
from nemo_pivotrl.verifiers.bounds import LimitExceeded
from nemo_pivotrl.verifiers.loading import load_verifier
from nemo_pivotrl.verifiers.schema import BadSchema, bounded, difference, is_valid, matches

SECONDS = 0.3  # three times the aim: the machine may be busy
NUMBER = {"type": "number"}
NODE = {"$ref": "#/$defs/node"}
BRANCHING = {
    "properties": {"x": NODE},
    "$defs": {
        "node": {
            "anyOf": [
                {"type": "object", "properties": {"op": {"const": c}, "of": NODE}, "required": ["op"]} for c in "+-"
            ]
        }
    },
}
PATTERNS = [
    r"^\w+$",
    r"^\s",
    r"^\S+$",
    "x{e}",
    r"^file{i}$",
    r"\.py$",
    r"^\d{1,3}$",
    "a|b",
    "(?i)é",
    r"^[\w.]+@\w+$",
    r"\bé",
]


def nested(depth: int, key: str) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for _ in range(depth):
        made = {key: made}
    return made


def accepts(schema: dict[str, Any], value: Any) -> bool:
    return is_valid(bounded(OAS32Validator)(schema), value)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(PATTERNS), st.text(st.sampled_from("abxé\u0301²\x1c \n.@1{e}_ſK"), max_size=6))
def test_a_pattern_means_what_it_means_to_re(pattern: str, text: str) -> None:
    accepts({}, {})  # the time of earlier matches does not count
    assert matches(pattern, text) == bool(re.search(pattern, text))


@pytest.mark.parametrize(
    ("pattern", "text"),
    [("^(a|a)*$", "a" * 40 + "!"), ("(x+x+)+y", "x" * 40), (r"^(\w+\s?)*$", "a" * 40 + "!"), (r"(a*)*\1b", "a" * 40)],
)
def test_a_pattern_that_backtracks_for_ever_has_not_matched(pattern: str, text: str) -> None:
    accepts({}, {})
    begun = time.thread_time()
    assert not matches(pattern, text)
    assert time.thread_time() - begun < SECONDS * slowness()


def test_a_pattern_that_is_none_is_an_error() -> None:
    with pytest.raises(re.error):
        matches("[", "a")


@pytest.mark.parametrize(
    ("schema", "value", "valid"),
    [
        ({"uniqueItems": True}, [1, 1.0], False),
        ({"uniqueItems": True}, [1, True, "1", None, [1], {"a": 1}], True),
        ({"uniqueItems": True}, [{"a": 1, "b": 2}, {"b": 2, "a": 1}], False),
        ({"enum": [1, "a", None]}, 1.0, True),
        ({"enum": [1]}, True, False),
        ({"patternProperties": {"^a": {"type": "string"}}, "additionalProperties": False}, {"ab": "x"}, True),
        ({"patternProperties": {"^a": {"type": "string"}}, "additionalProperties": False}, {"b": "x"}, False),
        ({"$ref": "#/$defs/none"}, 1, "raises"),
        ({"properties": {"of": {"$ref": "#"}}}, nested(90, "of"), True),
    ],
)
def test_validity_is_jsonschemas(schema: dict[str, Any], value: Any, valid: Any) -> None:
    if valid == "raises":
        with pytest.raises(Exception, match="none"):
            accepts(schema, value)
    else:
        assert accepts(schema, value) == OAS32Validator(schema).is_valid(value) == valid


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        (BRANCHING, {"x": nested(90, "of")}),
        ({"items": {"enum": list(range(1000))}}, [999] * 4000),
        ({"items": {"anyOf": [{"type": "string"}, {"type": "null"}, {"type": "integer"}]}}, [1] * 4000),
    ],
    ids=["alternatives that refer to themselves", "enum", "anyOf"],
)
def test_a_validation_that_is_too_dear_is_given_up(schema: dict[str, Any], value: Any) -> None:
    begun = time.thread_time()
    with pytest.raises(LimitExceeded):
        accepts(schema, value)
    assert time.thread_time() - begun < SECONDS * slowness()


@pytest.mark.parametrize(
    ("schema", "category"),
    [
        ({"$ref": "#"}, "TOOL_SCHEMA_VALIDATION_FAILED"),  # recursion may end inside jsonschema's Rust part
        (BRANCHING, "LIMIT_EXCEEDED"),
    ],
)
def test_no_schema_ends_the_run(schema: dict[str, Any], category: str) -> None:
    verifier = load_verifier(config.Verifier(name="terminal_multi_harness"))
    call = ToolCall("t", json.dumps({"x": nested(90, "of")}))
    case = Case(Action("calls", calls=(call,)), ({"name": "t", "parameters": schema},))
    verdict = verifier.verify(case, Action("calls", calls=(call,)))
    assert (verdict.reward, verdict.category) == (0.0, category)


def test_a_reference_is_not_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[Any] = []
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: fetched.append(a))
    verifier = load_verifier(config.Verifier(name="terminal_multi_harness"))
    call = ToolCall("t", '{"x": 1}')
    schema = {"type": "object", "properties": {"x": {"$ref": "http://127.0.0.1:9/x.json"}}}
    case = Case(Action("calls", calls=(call,)), ({"name": "t", "parameters": schema},))
    assert verifier.verify(case, Action("calls", calls=(call,))).category == "TOOL_SCHEMA_VALIDATION_FAILED"
    assert fetched == []


def test_a_thousand_patterns_share_their_time() -> None:
    schema = {"items": {"anyOf": [{"pattern": "^(a|a)*$"}, {}]}}
    begun = time.thread_time()
    assert accepts(schema, ["a" * 40 + f"!{i}" for i in range(1000)])
    assert time.thread_time() - begun < SECONDS * slowness()


# ---- schemas as data ----


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"x": schema}}
    return schema


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        ({"$ref": "http://127.0.0.1:9/leak"}, "none is fetched"),
        ({"$ref": "file:///etc/hostname"}, "none is fetched"),
        ({"$ref": "other.json"}, "none is fetched"),
        ({"$ref": "#/$defs/absent"}, "none is fetched"),
        ({"$dynamicRef": "http://127.0.0.1:9/leak"}, "none is fetched"),
        ({"$ref": "#/properties/x"}, "refers to itself|schema checks"),
        ({"anyOf": [{"$ref": "#/properties/x"}, {"$ref": "#/properties/x"}]}, "refers to itself|schema checks"),
        ({"pattern": "("}, "is not a 'regex'|error"),
        ({"pattern": "((a{1000}){1000}){1000}"}, "too large"),
        ({"pattern": "a" * 5000}, "too large"),
        ({"type": "nothing"}, "is not valid"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_schema_by_which_nothing_can_be_checked_is_told_apart_and_fetches_nothing(
    x: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetched(*_: object, **__: object) -> None:
        raise AssertionError("a reference was fetched")

    monkeypatch.setattr("urllib.request.urlopen", fetched)
    begun = time.perf_counter()
    with pytest.raises(BadSchema, match=reason):
        difference({"type": "object", "properties": {"x": x}}, {"x": "a"})
    assert time.perf_counter() - begun < 10 * SECONDS


def test_a_pattern_that_backtracks_ends_and_a_recursive_schema_that_ends_is_followed() -> None:
    begun = time.perf_counter()
    slow = {"properties": {"x": {"pattern": "^(a+)+$"}}}
    try:
        assert difference(slow, {"x": "a" * 60 + "b"}) == "does not match the pattern"
    except BadSchema as error:
        assert "takes too long to match" in str(error)
    assert time.perf_counter() - begun < 10
    tree = {
        "properties": {"x": {"$ref": "#/$defs/t"}},
        "$defs": {"t": {"properties": {"of": {"$ref": "#/$defs/t"}, "n": NUMBER}}},
    }
    assert difference(tree, {"x": {"of": {"of": {"n": 1}}}}) == ""
    assert "is not of type 'number'" in difference(tree, {"x": {"of": {"of": {"n": "1"}}}})


def test_a_schema_that_is_nested_without_measure_is_refused_and_no_crash() -> None:
    for levels in (200, 5000):
        value: Any = "a"
        for _ in range(levels):
            value = {"x": value}
        try:
            difference(deep(levels), value)
        except BadSchema as error:
            assert "itself" in str(error) or "deep" in str(error)


def test_large_arguments_of_an_expert_are_checked_in_full() -> None:
    schema = {"properties": {"x": {"type": "array", "items": {"type": "integer", "minimum": 0}}}}
    assert difference(schema, {"x": list(range(20_000))}) == ""
    assert "less than the minimum" in difference(schema, {"x": [*range(20_000), -1]})
