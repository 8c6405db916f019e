"""Gym's single-step comparison rule by rule, the exact verifier, and that no action of a policy can stop a run."""

import json
import time
from typing import Any

import pytest
from hypothesis import example, given, settings, strategies as st
from support.recipes import ROOT

from nemo_pivotrl import config
from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.core.types import Action, Case, ToolCall
from nemo_pivotrl.verifiers.base import Bounded, Verifier, VerifierFault
from nemo_pivotrl.verifiers.loading import identity, load_verifier
from nemo_pivotrl.verifiers.single_step import max_matching, word_overlap

GOLDEN = ROOT.parent / "shared/golden/single_step.jsonl"


def calls(*made: tuple[str, Any]) -> Action:
    """Calls of (name, arguments); arguments that are no text become their JSON."""
    return Action("calls", calls=tuple(ToolCall(n, a if isinstance(a, str) else json.dumps(a)) for n, a in made))


def value(argument: Any) -> Action:
    return calls(("f", {"x": argument}))


def load(name: str, **settings: Any) -> Bounded:
    return load_verifier(config.Verifier(name=name, settings=settings))


def judge(expected: Action, actual: Action, **settings: Any) -> tuple[float, str]:
    verdict = load("single_step", **settings).verify(Case(expected), actual)
    return verdict.reward, verdict.category


SAY = Action("message", "hello")
OK = (1.0, "EXPECTED_TOOL_CALL")
VALUE, TYPE = (0.0, "ARGUMENT_VALUE_DIFFERENT"), (0.0, "ARGUMENT_VALUE_TYPE_DIFFERENT")
KEYS, LENGTH = (0.0, "ARGUMENT_OBJECT_KEYS_DIFFERENT"), (0.0, "ARGUMENT_LIST_LENGTH_DIFFERENT")
UNDECODABLE = (0.0, "ARGUMENTS_DECODE_ERROR")


# ---- which kind of action ----


@pytest.mark.parametrize(
    ("expected", "actual", "verdict"),
    [
        (SAY, Action("message", "something else entirely"), (1.0, "EXPECTED_CHAT_MESSAGE_FOUND")),
        (SAY, Action("message", ""), (1.0, "EXPECTED_CHAT_MESSAGE_FOUND")),
        (SAY, calls(("f", {})), (0.0, "NO_EXPECTED_CHAT_MESSAGE")),
        (SAY, calls(("f", {}), ("f", {})), (0.0, "NO_EXPECTED_CHAT_MESSAGE")),
        (calls(("f", {})), SAY, (0.0, "NO_EXPECTED_TOOL_CALL")),
        (calls(("f", {}), ("g", {})), SAY, (0.0, "NO_EXPECTED_TOOL_CALL")),
        (SAY, Action("none"), (0.0, "NO_ACTION_FOUND")),
        (calls(("f", {})), Action("none"), (0.0, "NO_ACTION_FOUND")),
        (calls(("f", {})), Action("malformed", detail="no end"), UNDECODABLE),
        (calls(("f", {})), calls(("f", {})), OK),
        (calls(("f", {})), calls(("F", {})), (0.0, "UNEXPECTED_TOOL")),
        (calls(("f", {"x": 1})), calls(("g", "{broken")), (0.0, "UNEXPECTED_TOOL")),
        (calls(("f", {"x": 1})), calls(("f", "{broken")), UNDECODABLE),
        (calls(("f", {"x": 1})), calls(("f", "")), UNDECODABLE),
    ],
)
def test_kinds_names_and_decoding_follow_the_top_level_table(
    expected: Action, actual: Action, verdict: tuple[float, str]
) -> None:
    assert judge(expected, actual) == verdict


# ---- argument values ----


@pytest.mark.parametrize(
    ("expected", "actual", "verdict"),
    [
        (1, True, OK),
        (True, 1, TYPE),
        (75, 75.0, TYPE),
        (1.0, 1, TYPE),
        (None, None, OK),
        (None, 0, TYPE),
        (0, None, TYPE),
        ({}, None, TYPE),
        ({}, {}, OK),
        ({"a": 1}, {"a": 1, "b": None}, KEYS),
        ({"a": 1, "b": 2}, {"a": 1}, KEYS),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, OK),
        ({"a": 1, "b": 2}, {"b": "x", "a": 3}, VALUE),  # `a` is compared first: the expected order decides
        ([1, 2], [2, 1], VALUE),
        ([1, 2], [1, 2, 3], LENGTH),
        ([1, "a", None], [1, "a", None], OK),
        (0.5, 0.5000005, OK),
        (0.5, 0.500002, VALUE),
        (float("nan"), float("nan"), VALUE),
        (float("inf"), float("inf"), VALUE),
        (10**50, 10**50, OK),
        ("Paris", "Paris", OK),
        ("Paris", "paris", VALUE),
        ("Paris", "Paris ", VALUE),
        ("New York", "new york", OK),
        ("New York", "  new \n YORK ", OK),
        ("New York", "York", VALUE),  # one side has a single word: the raw strings must be equal
        ("", "", OK),
        ("book a flight", "cancel a hotel", OK),  # 1 shared of 6: 0.167 >= 0.1
        ("one two three four five six", "six seven eight nine ten eleven", VALUE),  # 1 of 12: 0.083 < 0.1
        ("a b", "c d", VALUE),
    ],
)
def test_argument_values_compare_by_the_recursive_rules_at_the_base_thresholds(
    expected: Any, actual: Any, verdict: tuple[float, str]
) -> None:
    assert judge(value(expected), value(actual)) == verdict


@pytest.mark.parametrize(
    ("expected", "actual", "threshold", "verdict"),
    [
        ("grep -rn foo src", "rm -rf /", 0.0, OK),
        ("ls", "ls -la", 0.0, VALUE),
        ("find the file", "find the file", 0.5, OK),
        ("find the file", "find the file", 0.51, VALUE),
        ("a b c", "a x y", 0.3, VALUE),  # 1 of 6
        ("a b c", "a b y", 0.3, OK),  # 2 of 6
    ],
)
def test_the_word_overlap_threshold_decides_strings_of_two_words_or_more(
    expected: str, actual: str, threshold: float, verdict: tuple[float, str]
) -> None:
    assert judge(value(expected), value(actual), word_count_similarity_threshold=threshold) == verdict


def test_words_are_shared_as_multisets_and_equal_strings_overlap_by_a_half() -> None:
    assert word_overlap(["a", "a", "b"], ["a", "b", "b"]) == 2 / 6
    assert word_overlap(["x", "y", "z"], ["z", "y", "x"]) == 0.5


def test_the_last_of_duplicate_json_keys_counts_and_arguments_need_not_be_an_object() -> None:
    assert judge(calls(("f", {"x": 2})), calls(("f", '{"x": 1, "x": 2}'))) == OK
    assert judge(calls(("f", {"x": 1})), calls(("f", '{"x": 1, "x": 2}'))) == VALUE
    assert judge(calls(("f", {"x": 1})), calls(("f", "[1]"))) == TYPE
    assert judge(calls(("f", "3")), calls(("f", "3"))) == OK


def test_the_float_threshold_is_a_setting_and_strict() -> None:
    assert judge(value(1.0), value(1.5), floating_point_comparison_threshold=0.5) == VALUE
    assert judge(value(1.0), value(1.25), floating_point_comparison_threshold=0.5) == OK


# ---- parallel calls ----

A, B, C = ("f", {"x": 1}), ("f", {"x": 2}), ("g", {})
BATCH_OK, COUNT, OTHER_TOOL = (
    (1.0, "EXPECTED_TOOL_CALL_BATCH"),
    "FUNCTION_CALL_BATCH_LENGTH_DIFFERENT",
    "UNEXPECTED_TOOL",
)
ON = {"parallel_tool_call_rewarding": True}
BOTH = {**ON, "allow_subset": True, "allow_superset": True}


@pytest.mark.parametrize(
    ("expected", "actual", "config", "verdict"),
    [
        ([A, B], [B, A], {}, BATCH_OK),
        ([A], [C, B, A], {}, OK),
        ([A, B], [A], {}, (0.0, COUNT)),
        ([A, B], [B], {}, (0.0, COUNT)),  # all of the policy's calls are matched
        ([A, B], [C], {}, (0.0, OTHER_TOOL)),
        ([A, B], [A, A], {}, (0.0, "ARGUMENT_VALUE_DIFFERENT")),
        ([A, B], [A, C], {}, (0.0, "ARGUMENT_VALUE_DIFFERENT")),  # B met A first, by value
        ([A, C], [A, B], {}, (0.0, OTHER_TOOL)),
        ([A, B], [C, ("f", "{")], {}, (0.0, "ARGUMENTS_DECODE_ERROR")),
        ([A, B], [A], ON, (0.0, COUNT)),
        ([A], [A, B], ON, (0.0, COUNT)),
        ([A, B], [B, A], ON, BATCH_OK),
        ([A, B], [A], {**ON, "allow_subset": True}, BATCH_OK),
        ([A, B], [C], {**ON, "allow_subset": True}, (0.0, OTHER_TOOL)),
        ([A], [A, B], {**ON, "allow_superset": True}, OK),
        ([A, B], [A, C], {**ON, "parallel_tool_call_reward_mode": "fractional"}, (0.5, "ARGUMENT_VALUE_DIFFERENT")),
        ([A, B, C], [A], {**BOTH, "parallel_tool_call_reward_mode": "fractional"}, BATCH_OK),
        ([A, B, C], [A, B], {**BOTH, "parallel_tool_call_reward_mode": "f1"}, (2 * 2 / 5, COUNT)),
        ([A], [A, B, C], {**BOTH, "parallel_tool_call_reward_mode": "f1"}, (2 * 1 / 4, COUNT)),
        ([A, B], [A, C], {**BOTH, "parallel_tool_call_reward_mode": "f1"}, (2 * 1 / 4, "ARGUMENT_VALUE_DIFFERENT")),
    ],
)
def test_parallel_calls_are_matched_as_sets(
    expected: list[Any], actual: list[Any], config: dict[str, Any], verdict: tuple[float, str]
) -> None:
    assert judge(calls(*expected), calls(*actual), **config) == verdict


def test_a_greedy_matching_would_fail_where_the_maximum_one_succeeds() -> None:
    # "a b" shares a word with "c a" and with "b d", "a c" only with "c a": that one must be left to it
    wide, narrow = value("a b").calls[0], value("a c").calls[0]
    first, second = value("c a").calls[0], value("b d").calls[0]
    assert judge(Action("calls", calls=(wide, narrow)), Action("calls", calls=(first, second))) == BATCH_OK
    assert judge(Action("calls", calls=(narrow, wide)), Action("calls", calls=(second, first))) == BATCH_OK


@settings(max_examples=60, deadline=None)
@example([[0, 1], [1, 2], [0, 1]])  # first come, first served strands the last one; moving the second helps
@example([[0, 1], [1, 2], [2, 3], [0, 1], [4, 0]])
@given(st.lists(st.lists(st.integers(0, 4), unique=True, max_size=4), max_size=5))
def test_the_matching_is_as_large_as_exhaustive_search_finds(edges: list[list[int]]) -> None:
    def best(left: int, used: frozenset[int]) -> int:
        if left == len(edges):
            return 0
        return max([best(left + 1, used), *(1 + best(left + 1, used | {r}) for r in edges[left] if r not in used)])

    assert len(max_matching(edges, range(len(edges)), [1] * 5)) == best(0, frozenset())


# ---- against the released verifier's own verdicts ----


def action_of(raw: dict[str, Any]) -> Action:
    if raw["type"] == "message":
        return Action("message", raw["content"])
    return calls(*((c["name"], c["arguments"]) for c in raw.get("calls", [raw])))


@pytest.mark.skipif(
    not GOLDEN.exists(), reason="the recorded verdicts of the released verifier are not on this machine"
)
def test_every_recorded_verdict_of_the_released_verifier_is_reproduced() -> None:
    lines = [json.loads(line) for line in GOLDEN.read_text(encoding="utf-8").splitlines()]
    wrong = [
        (number, line["verdict"], found)
        for number, line in enumerate(lines, start=1)
        if (found := judge(action_of(line["expected"]), action_of(line["actual"]), **line["config"]))
        != tuple(line["verdict"])
    ]
    assert lines and wrong == []


# ---- hostile actions ----

NESTED = '{"x":' * 500 + "1" + "}" * 500
ODD = [
    "",
    "{",
    "null",
    "NaN",
    "[]",
    "{}",
    '{"x": NaN}',
    '{"x": "\\ud800"}',
    "\ud800",
    '{"x": 1e999}',
    "9" * 5000,
    "[" * 5000,
    NESTED,
]
LEAF = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8))
JSON = st.recursive(
    LEAF, lambda c: st.lists(c, max_size=3) | st.dictionaries(st.text(max_size=3), c, max_size=3), max_leaves=8
)
ARGUMENTS = st.one_of(st.sampled_from(ODD), JSON.map(json.dumps), st.text(max_size=10))
CALLS = st.lists(
    st.builds(ToolCall, st.sampled_from(["f", "g", "", "\ud800"]), ARGUMENTS, st.text(max_size=2)), max_size=4
).map(tuple)
ANY_ACTION = st.builds(
    Action, st.sampled_from(["message", "calls", "malformed", "none"]), st.text(st.characters(), max_size=8), CALLS
)
EXPERT = st.one_of(
    st.builds(Action, st.just("message"), st.text(max_size=8)),
    st.lists(st.builds(ToolCall, st.just("f"), JSON.map(json.dumps)), min_size=1, max_size=3).map(
        lambda c: Action("calls", calls=tuple(c))
    ),
)
JUDGES = [
    load("single_step"),
    load("single_step", **BOTH, parallel_tool_call_reward_mode="f1"),
    load("exact"),
]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(JUDGES), EXPERT, ANY_ACTION)
def test_no_action_of_a_policy_makes_a_verifier_raise_or_leave_0_to_1(
    verifier: Verifier, expected: Action, actual: Action
) -> None:
    verdict = verifier.verify(Case(expected), actual)
    assert 0.0 <= verdict.reward <= 1.0 and verdict.category


@pytest.mark.parametrize(
    "arguments",
    [
        "[" * 100_000,
        "[" * 100_000 + "]" * 100_000,
        '{"x":' * 100_000 + "1" + "}" * 100_000,
        '{"x": [' + "[" * 300 + "]" * 300 + "]}",
        '{"x": ' + "9" * 5000 + "}",
    ],
    ids=["open", "deep list", "deep object", "deeper than the limit", "huge integer"],
)
def test_arguments_that_python_cannot_read_are_a_decode_error_and_score_0(arguments: str) -> None:
    limit = config.Limits().max_chars
    expected = UNDECODABLE if len(arguments) < limit else (0.0, "LIMIT_EXCEEDED")
    assert judge(value(1), calls(("f", arguments))) == expected
    assert load("exact").verify(Case(value(1)), calls(("f", arguments))).reward == 0.0


def test_nan_and_lone_surrogates_are_data() -> None:
    assert judge(calls(("f", '{"x": NaN}')), calls(("f", '{"x": NaN}'))) == VALUE
    assert judge(value("\ud83d"), calls(("f", '{"x": "\\ud83d"}'))) == OK
    assert judge(value("\ud83d a"), calls(("f", '{"x": "\\ud83d b"}'))) == OK


@pytest.mark.parametrize("config", [{}, {**BOTH, "parallel_tool_call_reward_mode": "f1"}], ids=["switch off", "f1"])
def test_sixty_four_parallel_calls_take_less_than_a_second(config: dict[str, Any]) -> None:
    same, other = calls(*[A] * 64), calls(*[("f", {"x": 1, "pad": f"{i} {'word ' * 40}"}) for i in range(64)])
    for expected, actual in ((same, same), (other, Action("calls", calls=other.calls[::-1]))):
        begun = time.process_time()
        assert judge(expected, actual, **config) == BATCH_OK
        assert time.process_time() - begun < 1.0


def test_an_expert_action_that_cannot_be_read_is_a_fault_and_not_a_score() -> None:
    for broken in ("{", "[" * 100_000):
        with pytest.raises(VerifierFault):
            judge(calls(("f", broken)), calls(("f", "{}")))


# ---- exact ----


@pytest.mark.parametrize(
    ("expected", "actual", "equal"),
    [
        (Action("message", " hello "), Action("message", "hello"), True),
        (SAY, Action("message", "Hello"), False),
        (SAY, Action("none"), False),
        (SAY, calls(("f", {})), False),
        (calls(("f", '{"a": 1, "b": 2}')), calls(("f", '{"b":2,"a":1}')), True),
        (value(1), value(1.0), False),
        (value(1), value(True), False),
        (value("New York"), value("new york"), False),
        (calls(A, B), calls(A, B), True),
        (calls(A, B), calls(B, A), False),
        (calls(A), calls(A, B), False),
        (calls(A), Action("malformed"), False),
    ],
)
def test_exact_wants_the_same_calls_in_order_and_the_same_text(expected: Action, actual: Action, equal: bool) -> None:
    verdict = load("exact").verify(Case(expected), actual)
    assert (verdict.reward, verdict.category) == ((1.0, "EQUAL") if equal else (0.0, "DIFFERENT"))


# ---- loading ----


def test_an_unknown_verifier_or_setting_is_an_input_error_that_names_the_choices() -> None:
    with pytest.raises(
        InputError, match="single_step, swe, terminus, terminal_multi_harness, functional, judge, exact"
    ):
        load("toolcall")
    with pytest.raises(InputError, match="did you mean `word_count_similarity_threshold`"):
        load("single_step", word_count_similarity_treshold=0.1)
    with pytest.raises(
        InputError, match=r"verifier\.settings\.parallel_tool_call_reward_mode.*\n.*use one of binary_strict"
    ):
        load("single_step", parallel_tool_call_reward_mode="f2")
    with pytest.raises(InputError, match=r"from 0\.0 to 1\.0"):
        load("terminus", string_similarity_threshold=1.5)
    with pytest.raises(InputError, match=r"a section of its own: verifier\.compat"):
        load("swe", compat="0.5")


def test_a_verifiers_identity_follows_what_decides_its_verdicts() -> None:
    base = config.Verifier()
    verifier = load_verifier(base)
    assert identity(verifier, base).startswith("single_step 2 ")
    others = [
        config.Verifier(settings={"word_count_similarity_threshold": 0.0}),
        config.Verifier(compat="0.5"),
        config.Verifier(limits=config.Limits(max_chars=999)),
    ]
    assert len({identity(verifier, s) for s in (base, *others)}) == 4
    assert identity(verifier, config.Verifier(judge=config.Judge(model="x"))) == identity(
        verifier, base
    )  # it asks none
