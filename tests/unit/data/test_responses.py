"""Chat messages as Responses items and back, and candidates as NeMo-Gym rows that follow Gym's own contract."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import assume, given, settings, strategies as st

from nemo_pivotrl.core.artifacts import json_line
from nemo_pivotrl.core.types import Action, Candidate, Message, ToolCall
from nemo_pivotrl.data.gym_rows import (
    action_of,
    candidate_to_row,
    expected_of_row,
    message_of,
    to_items,
    to_messages,
    tool_to_chat,
    tool_to_flat,
)

TEXT = st.text(st.characters(), max_size=12)
WORDS = st.text(st.characters(), min_size=1, max_size=12)
CALL = st.builds(
    lambda call_id, name, arguments: {
        "id": call_id,
        "type": "function",
        "function": {"name": name, "arguments": json.dumps(arguments)},
    },
    TEXT,
    st.sampled_from(["find", "book", "größe"]),
    st.dictionaries(TEXT, st.one_of(TEXT, st.integers(), st.none()), max_size=2),
)


@st.composite
def assistant(draw: st.DrawFn) -> Message:
    message: Message = {"role": "assistant", "content": draw(TEXT)}
    if reasoning := draw(TEXT):
        message["reasoning_content"] = reasoning
    if calls := draw(st.lists(CALL, max_size=3)):
        message["tool_calls"] = calls
    return message


@st.composite
def conversation(draw: st.DrawFn) -> list[Message]:
    """Any messages, but never two assistant ones in a row, which merge by design, and no output before another call's end.

    A tool message answers a call of the assistant turn before it: items have no other place for it.
    """
    other = st.one_of(
        st.builds(
            lambda role, text: {"role": role, "content": text}, st.sampled_from(["system", "developer", "user"]), TEXT
        ),
        st.builds(lambda call_id, text: {"role": "tool", "tool_call_id": call_id, "content": text}, TEXT, TEXT),
    )
    found: list[Message] = []
    open_calls: list[str] = []
    for turn in draw(st.lists(st.one_of(other, assistant()), min_size=1, max_size=8)):
        if found and found[-1]["role"] == turn["role"] == "assistant":
            continue
        if turn["role"] == "tool":
            if not open_calls:
                continue
            turn["tool_call_id"] = open_calls.pop(0)
        else:
            open_calls = [call["id"] for call in turn.get("tool_calls", ())]
        found.append(turn)
    assume(found)
    return found


@settings(max_examples=150, deadline=None)
@given(conversation())
def test_any_conversation_survives_the_way_to_items_and_back(messages: list[Message]) -> None:
    assert to_messages(to_items(messages)) == messages
    through_a_file = json.loads(json_line({"items": to_items(messages)}))["items"]
    assert to_messages(through_a_file) == messages


def test_items_have_the_shapes_of_the_conversion_table() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": "{}"}}
    messages: list[Message] = [
        {"role": "developer", "content": "rules"},
        {
            "role": "assistant",
            "content": "looking",
            "reasoning_content": "hm",
            "tool_calls": [call, {**call, "id": "c2"}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "here"},
    ]
    rules, thought, said, first, second, output = to_items(messages)
    assert rules == {"type": "message", "role": "developer", "content": "rules"}
    assert (
        thought["type"] == "reasoning"
        and thought["summary"] == [{"type": "summary_text", "text": "hm"}]
        and thought["status"] == "completed"
    )
    assert (
        said["role"] == "assistant"
        and said["content"][0]["type"] == "output_text"
        and said["content"][0]["text"] == "looking"
    )
    assert (first["type"], first["call_id"], first["name"], first["arguments"], first["status"]) == (
        "function_call",
        "c1",
        "find",
        "{}",
        "completed",
    )
    assert second["call_id"] == "c2" and first["id"] != second["id"]
    assert output == {"type": "function_call_output", "call_id": "c1", "output": "here"}


def test_a_turn_begins_anew_where_text_or_reasoning_follows_a_call() -> None:
    def said(text: str) -> dict[str, Any]:
        return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}

    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    thought = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]}
    assert [m["content"] for m in to_messages([said("a"), call, said("b")])] == ["a", "b"]
    assert [m.get("reasoning_content") for m in to_messages([call, thought, call])] == [None, "hm"]
    assert len(to_messages([thought, said("a"), call, call])) == 1


@pytest.mark.parametrize(
    "item", [{"type": "image_generation_call"}, {"type": "function_call", "call_id": "c"}, {"type": "message"}]
)
def test_an_item_of_another_kind_or_without_its_fields_is_refused(item: dict[str, Any]) -> None:
    with pytest.raises((KeyError, ValueError)):
        to_messages([item])


def test_tools_go_between_the_nested_and_the_flat_form() -> None:
    flat = {
        "type": "function",
        "name": "f",
        "description": "d",
        "parameters": {"type": "object", "properties": {}},
        "strict": False,
    }
    nested = {
        "type": "function",
        "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}},
    }
    assert tool_to_chat(flat) == nested == tool_to_chat(nested) and tool_to_flat(nested) == flat
    assert tool_to_flat({"type": "function", "function": {"name": "f"}})["parameters"] == {
        "type": "object",
        "properties": {},
    }


# ---- Gym rows ----


def contract_violations(row: dict[str, Any]) -> list[str]:
    """What the row contract's table forbids, read from the table alone."""
    params, expected, agent = row["responses_create_params"], row["expected_action"], row["agent_ref"]
    declared = {t["name"] for t in params["tools"]}
    item_fields = {
        "message": {"role", "content"},
        "reasoning": {"summary", "status"},
        "function_call": {"call_id", "id", "name", "arguments", "status"},
        "function_call_output": {"call_id", "output"},
    }
    calls = (
        expected["calls"]
        if expected["type"] == "function_call_batch"
        else [expected]
        if expected["type"] == "function_call"
        else []
    )
    rules = {
        "input is a non-empty list": isinstance(params["input"], list) and len(params["input"]) > 0,
        "items are known and whole": all(
            i["type"] in item_fields and item_fields[i["type"]] <= i.keys() for i in params["input"]
        ),
        "tools are flat": all(
            set(t) == {"type", "name", "description", "parameters", "strict"} and t["type"] == "function"
            for t in params["tools"]
        ),
        "parallel_tool_calls is a bool": isinstance(params["parallel_tool_calls"], bool),
        "tool_choice is auto": params["tool_choice"] == "auto",
        "metadata is left out": "metadata" not in params,
        "expected type": expected["type"] in ("function_call", "function_call_batch", "message"),
        "expected message": expected["type"] != "message" or isinstance(expected["content"], str),
        "a batch has calls": expected["type"] == "message" or len(calls) > 0,
        "arguments are JSON text": all(
            isinstance(c["arguments"], str) and json.loads(c["arguments"]) is not Ellipsis for c in calls
        ),
        "calls are function calls of declared tools": all(
            c["type"] == "function_call" and c["name"] in declared for c in calls
        ),
        "agent_ref": agent["type"] == "responses_api_agents" and isinstance(agent["name"], str) and bool(agent["name"]),
        "optional null fields are left out": None not in row.values() and None not in params.values(),
    }
    return [rule for rule, holds in rules.items() if not holds]


TOOLS = tuple(
    {"type": "function", "function": {"name": n, "parameters": {"type": "object"}}} for n in ("find", "book", "größe")
)


def candidate(state: Sequence[Message], expected: Action) -> Candidate:
    return Candidate("id", "t", "k", "train", len(state), 2, tuple(state), TOOLS, expected, num_unique_actions=3)


@settings(max_examples=100, deadline=None)
@given(conversation(), assistant())
def test_every_candidate_becomes_a_row_that_keeps_the_contract_and_comes_back(
    state: list[Message], action: Message
) -> None:
    expected = action_of(action)
    row = json.loads(json_line(candidate_to_row(candidate(state, expected), "agent")))
    assert contract_violations(row) == []
    assert row["responses_create_params"]["parallel_tool_calls"] == (len(expected.calls) > 1)
    params, source = row["responses_create_params"], row["provenance"]
    assert to_messages(params["input"]) == state
    back = expected_of_row(row["expected_action"])
    assert (back.kind, source["content"] or back.content) == (expected.kind, expected.content)
    assert [(c.name, c.arguments) for c in back.calls] == [(c.name, c.arguments) for c in expected.calls]
    ids = {"candidate_id": "id", "task_id": "k", "split": "train", "turn": len(state), "depth": 2}
    assert row["trajectory_id"] == "t" and source.items() >= ids.items()
    names = [tool_to_chat(t)["function"]["name"] for t in params["tools"]]
    assert row["num_unique_actions"] == 3 and names == ["find", "book", "größe"]


def test_the_contract_checker_itself_rejects_broken_rows() -> None:
    good = candidate_to_row(
        candidate([{"role": "user", "content": "q"}], Action("calls", calls=(ToolCall("find", "{}"),))), "agent"
    )
    assert contract_violations(good) == []
    params = good["responses_create_params"]
    for change in (
        {"input": []},
        {"tool_choice": "required"},
        {"metadata": None},
        {"parallel_tool_calls": 0},
        {"tools": []},
    ):
        assert contract_violations({**good, "responses_create_params": {**params, **change}}) != []
    for wrong in (
        {"type": "function_call_batch", "calls": []},
        {"type": "function_call", "name": "unknown", "arguments": "{}"},
    ):
        assert contract_violations({**good, "expected_action": wrong}) != []


def test_one_call_is_a_function_call_and_several_are_a_batch() -> None:
    one = Action("calls", calls=(ToolCall("find", "{}"),))
    two = Action("calls", calls=(ToolCall("find", "{}"), ToolCall("book", '{"a":1}')))
    state: list[Message] = [{"role": "user", "content": "q"}]
    assert candidate_to_row(candidate(state, one), "a")["expected_action"] == {
        "type": "function_call",
        "name": "find",
        "arguments": "{}",
    }
    assert [c["name"] for c in candidate_to_row(candidate(state, two), "a")["expected_action"]["calls"]] == [
        "find",
        "book",
    ]
    assert candidate_to_row(candidate(state, Action("message", "hi")), "a")["expected_action"] == {
        "type": "message",
        "content": "hi",
    }


def test_an_action_and_its_message_are_each_others_inverse() -> None:
    for action in (
        Action("message", "hi"),
        Action("calls", "so:", (ToolCall("f", "{}", "c1"), ToolCall("g", "[", "c2"))),
    ):
        assert action_of(message_of(action)) == action


@pytest.mark.parametrize(
    "row",
    [
        {"type": "dance"},
        {"type": "message"},
        {"type": "function_call_batch", "calls": []},
        {"type": "function_call"},
        {},
    ],
)
def test_a_malformed_expected_action_is_refused(row: dict[str, Any]) -> None:
    with pytest.raises((KeyError, ValueError)):
        expected_of_row(row)


def test_an_experts_reasoning_is_kept_beside_the_expected_action_and_never_in_it() -> None:
    message = {"role": "assistant", "content": "It has shipped.", "reasoning_content": "It is gone."}
    candidate = Candidate("c", "t", "t", "train", 1, 0, ({"role": "user", "content": "q"},), (), action_of(message))
    row = candidate_to_row(candidate, "agent")
    assert "gone" not in json.dumps([row["expected_action"], row["responses_create_params"]])
    assert row["provenance"]["reasoning"] == "It is gone." and message_of(candidate.expected) == message
    assert candidate.expected == Action("message", "It has shipped."), "reasoning is no part of what is compared"
