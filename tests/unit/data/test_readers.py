"""Outside formats: what a good record becomes, and that every bad one is named, all of them at once."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.core.types import Trajectory
from nemo_pivotrl.data.readers import read_trajectories

TOOL = {
    "type": "function",
    "function": {"name": "find", "description": "d", "parameters": {"type": "object", "properties": {}}},
}
FLAT = {
    "type": "function",
    "name": "find",
    "description": "d",
    "parameters": {"type": "object", "properties": {}},
    "strict": True,
}


def call(call_id: str, arguments: str = '{"q": 1}') -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": "find", "arguments": arguments}}


OPENAI = {
    "trajectory_id": "t1",
    "task_id": "k1",
    "reward": 1,
    "tools": [TOOL],
    "messages": [
        {"role": "system", "content": "rules"},
        {"role": "user", "content": [{"type": "text", "text": "find "}, {"type": "text", "text": "it"}]},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "two places",
            "tool_calls": [call("a"), call("b", '{"q": 2}')],
        },
        {"role": "tool", "tool_call_id": "a", "content": "no"},
        {"role": "tool", "tool_call_id": "b", "content": "yes"},
        {"role": "assistant", "content": "found"},
    ],
}
CLEAN = (
    {"role": "system", "content": "rules"},
    {"role": "user", "content": "find it"},
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "two places",
        "tool_calls": [call("a"), call("b", '{"q": 2}')],
    },
    {"role": "tool", "tool_call_id": "a", "content": "no"},
    {"role": "tool", "tool_call_id": "b", "content": "yes"},
    {"role": "assistant", "content": "found"},
)
ITEMS: list[dict[str, Any]] = [
    {"role": "system", "content": "rules"},
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "find it"}]},
    {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "two places"}]},
    {"type": "function_call", "call_id": "a", "name": "find", "arguments": '{"q": 1}'},
    {"type": "function_call", "call_id": "b", "name": "find", "arguments": '{"q": 2}'},
    {"type": "function_call_output", "call_id": "a", "output": "no"},
    {"type": "function_call_output", "call_id": "b", "output": "yes"},
]
FOUND = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "found"}]}
PIVOT_ROW = {
    "responses_create_params": {"input": ITEMS, "tools": [FLAT]},
    "expected_action": {"type": "message", "content": "found"},
    "trajectory_id": "t1",
}
ROLLOUT = {
    "responses_create_params": {"input": ITEMS[:2], "tools": [FLAT]},
    "response": {"output": [*ITEMS[2:], FOUND]},
    "reward": 1.0,
    "id": "t1",
}
SHAREGPT = {
    "id": "t1",
    "tools": json.dumps([TOOL]),
    "conversations": [
        {"from": "system", "value": "rules"},
        {"from": "human", "value": "find it"},
        {
            "from": "gpt",
            "value": 'Both.<tool_call>{"name": "find", "arguments": {"q": 1}}</tool_call>\n'
            '<tool_call>{"name": "find", "arguments": {"q": 2}}</tool_call>',
        },
        {"from": "tool", "value": "<tool_response>\nno\n</tool_response>"},
        {"from": "tool", "value": "yes"},
        {"from": "function_call", "value": '{"name": "find", "arguments": {"q": 3}}'},
        {"from": "observation", "value": "more"},
        {"from": "gpt", "value": "found"},
    ],
}
TAU = {"task_id": 7, "trial": 2, "reward": 0.0, "info": {}, "traj": OPENAI["messages"]}


def read(folder: Path, format: str, *lines: Any, tools: str | None = None) -> list[Trajectory]:
    path = folder / "in.jsonl"
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8")
    return read_trajectories([str(path)], format, tools).trajectories


def problems_of(folder: Path, format: str, *lines: Any) -> list[Problem]:
    with pytest.raises(InputError) as caught:
        read(folder, format, *lines)
    assert all(p.file == str(folder / "in.jsonl") and p.remedy for p in caught.value.problems)
    return caught.value.problems


# ---- good records ----


def test_openai_messages_keep_parallel_calls_and_reasoning_and_join_text_parts(tmp_path: Path) -> None:
    (found,) = read(tmp_path, "openai", OPENAI)
    assert found == Trajectory("t1", "k1", CLEAN, (TOOL,), 1.0, f"{tmp_path / 'in.jsonl'}:1")


def test_openai_arguments_given_as_an_object_become_their_json_text(tmp_path: Path) -> None:
    record = copy.deepcopy(OPENAI)
    record["messages"][2]["tool_calls"][0]["function"]["arguments"] = {"q": "ü"}  # type: ignore[index]
    arguments = read(tmp_path, "openai", record)[0].messages[2]["tool_calls"][0]["function"]["arguments"]
    assert json.loads(arguments) == {"q": "ü"}


def test_a_record_without_ids_reward_or_tools_is_named_after_its_line_and_takes_the_tools_file(tmp_path: Path) -> None:
    (tmp_path / "tools.json").write_text(json.dumps([FLAT]))
    bare = {"messages": OPENAI["messages"]}
    first, second = read(tmp_path, "openai", bare, "", bare, tools=str(tmp_path / "tools.json"))
    assert (first.trajectory_id, first.task_id, first.reward, first.tools) == (
        f"{tmp_path}/in.jsonl:1",
        f"{tmp_path}/in.jsonl:1",
        None,
        (TOOL,),
    )
    assert second.source.endswith("in.jsonl:3")


def test_a_gym_pivot_row_gives_its_state_and_only_its_last_turn_as_action(tmp_path: Path) -> None:
    (found,) = read(tmp_path, "responses", PIVOT_ROW)
    assert found.messages == CLEAN and found.tools == (TOOL,)
    assert found.last_only and found.reward is None and found.task_id == "t1"


def test_gym_rows_of_one_trajectory_share_its_task_and_keep_their_own_ids(tmp_path: Path) -> None:
    named = {**PIVOT_ROW, "task_id": "k1"}
    ours = {**PIVOT_ROW, "provenance": {"task_id": "k2"}}
    found = read(tmp_path, "responses", PIVOT_ROW, PIVOT_ROW, named, ours)
    assert [t.task_id for t in found] == ["t1", "t1", "k1", "k2"]
    assert len({t.trajectory_id for t in found}) == 4


def test_a_gym_function_call_batch_is_one_turn_with_several_calls(tmp_path: Path) -> None:
    batch = {
        "type": "function_call_batch",
        "calls": [{"type": "function_call", "name": "find", "arguments": f'{{"q": {q}}}'} for q in (1, 2)],
    }
    (found,) = read(tmp_path, "responses", {**PIVOT_ROW, "expected_action": batch})
    assert [c["function"]["arguments"] for c in found.messages[-1]["tool_calls"]] == ['{"q": 1}', '{"q": 2}']


def test_a_gym_rollout_gives_the_whole_conversation_with_its_reward(tmp_path: Path) -> None:
    (found,) = read(tmp_path, "responses", ROLLOUT)
    assert found.messages == CLEAN and found.reward == 1.0 and not found.last_only
    text_input = {**ROLLOUT, "responses_create_params": {"input": "find it"}}
    assert read(tmp_path, "responses", text_input)[0].messages == CLEAN[1:]


def test_sharegpt_reads_hermes_markup_and_llama_factory_function_calls(tmp_path: Path) -> None:
    (found,) = read(tmp_path, "sharegpt", SHAREGPT)
    roles = [m["role"] for m in found.messages]
    assert roles == ["system", "user", "assistant", "tool", "tool", "assistant", "tool", "assistant"]
    both, third = found.messages[2], found.messages[5]
    assert both["content"] == "Both."
    assert [json.loads(c["function"]["arguments"])["q"] for c in [*both["tool_calls"], *third["tool_calls"]]] == [
        1,
        2,
        3,
    ]
    ids = [c["id"] for c in [*both["tool_calls"], *third["tool_calls"]]]
    assert [found.messages[i]["tool_call_id"] for i in (3, 4, 6)] == ids and len(set(ids)) == 3
    assert [found.messages[i]["content"] for i in (3, 4, 6)] == ["no", "yes", "more"]
    assert found.tools == (TOOL,)


def test_tau_bench_results_are_a_json_list_whose_trials_share_a_task(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps([TAU, {**TAU, "trial": 3, "reward": 1.0}], indent=1))
    first, second = read_trajectories([str(path)], "tau_bench").trajectories
    assert first == Trajectory("7-2", "7", CLEAN, (), 0.0, f"{path}:1")
    assert (second.trajectory_id, second.task_id, second.reward, second.source) == ("7-3", "7", 1.0, f"{path}:2")


# ---- bad records ----


def test_every_problem_of_every_line_comes_in_one_error_with_line_field_found_and_remedy(tmp_path: Path) -> None:
    def spoilt(**change: Any) -> dict[str, Any]:
        return {**copy.deepcopy(OPENAI), "trajectory_id": None, **change}

    wrong_role = spoilt(messages=[{"role": "robot", "content": "x"}])
    wrong_arguments = spoilt(
        messages=[CLEAN[1], {"role": "assistant", "content": "", "tool_calls": [call("a", arguments=3)]}]
    )  # type: ignore[arg-type]
    lines = [
        '{"messages": [',
        {"task_id": "k"},
        wrong_role,
        wrong_arguments,
        spoilt(messages=[]),
        spoilt(reward="high"),
        spoilt(tools=[{"type": "function"}]),
        "[1]" * 2,
        "3",
        OPENAI,
        OPENAI,
    ]
    found = {p.line: p for p in problems_of(tmp_path, "openai", *lines)}
    assert sorted(found, key=lambda n: n or 0) == [1, 2, 3, 4, 5, 6, 7, 8, 9, 11]
    expected = {
        1: ("line", '{"messages": [', "broken JSON"),
        2: ("messages", "missing", "needs `messages`"),
        3: ("messages[0].role", "robot", "system, developer, user, assistant, tool"),
        4: ("messages[1].tool_calls[0].function.arguments", "3", "a JSON text or an object"),
        5: ("messages", "[]", "non-empty list"),
        6: ("reward", "high", "a number"),
        7: ("tools[0]", "{'type': 'function'}", "needs a name"),
        8: ("line", "[1][1]", "broken JSON"),
        9: ("record", "3", "a JSON object"),
        11: ("trajectory_id", "t1", "in.jsonl:10"),
    }
    for line, (field, value, remedy) in expected.items():
        p = found[line]
        assert (p.field, p.found) == (field, value) and remedy in p.remedy, line


def test_empty_and_missing_files_and_no_files_at_all_are_named_together_with_other_problems(tmp_path: Path) -> None:
    empty, missing, bad = tmp_path / "empty.jsonl", tmp_path / "missing.jsonl", tmp_path / "bad.json"
    empty.write_text("\n\n")
    bad.write_text('[{"messages": 3},\n oops]')
    with pytest.raises(InputError) as caught:
        read_trajectories([str(empty), str(missing), str(bad)], "openai", None)
    found = [(p.file, p.line, p.found, p.remedy) for p in caught.value.problems]
    assert [f[0] for f in found] == [str(empty), str(missing), str(bad)]
    assert found[0][2] == "no records" and found[1][3] == "no such file" and found[2][1:3] == (2, "broken JSON")
    with pytest.raises(InputError, match=r"extract\.trajectories"):
        read_trajectories([], "openai", None)


def test_the_same_file_named_twice_is_a_duplicate(tmp_path: Path) -> None:
    read(tmp_path, "openai", OPENAI)
    with pytest.raises(InputError, match="ids are unique"):
        read_trajectories([str(tmp_path / "in.jsonl")] * 2, "openai", None)


def test_a_json_list_nested_too_deeply_is_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "deep.json"
    path.write_text("[" * 100_000)
    with pytest.raises(InputError):
        read_trajectories([str(path)], "openai", None)


@pytest.mark.parametrize(
    ("format", "record", "field"),
    [
        ("openai", {"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ("openai", {"messages": [{"role": "user", "content": [1]}]}, "messages[0].content"),
        ("openai", {"messages": [{"role": "assistant", "tool_calls": 5}]}, "messages[0].tool_calls"),
        (
            "openai",
            {"messages": [{"role": "assistant", "content": "", "reasoning_content": 5}]},
            "messages[0].reasoning_content",
        ),
        (
            "openai",
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "f"}]}]},
            "messages[0].tool_calls[0].function.name",
        ),
        ("openai", {"messages": CLEAN, "tools": 3}, "tools"),
        ("responses", {"expected_action": {"type": "message", "content": "x"}}, "responses_create_params"),
        ("responses", {**PIVOT_ROW, "responses_create_params": {"input": []}}, "responses_create_params.input"),
        (
            "responses",
            {**PIVOT_ROW, "responses_create_params": {"input": [{"type": "web_search_call"}]}},
            "responses_create_params.input",
        ),
        ("responses", {**PIVOT_ROW, "expected_action": {"type": "dance"}}, "expected_action"),
        (
            "responses",
            {**PIVOT_ROW, "expected_action": {"type": "function_call_batch", "calls": []}},
            "expected_action",
        ),
        ("responses", {**PIVOT_ROW, "expected_action": {"type": "function_call", "name": "find"}}, "expected_action"),
        ("responses", {"responses_create_params": {"input": ITEMS}}, "response.output"),
        ("sharegpt", {"conversations": [{"from": "alien", "value": "x"}]}, "conversations[0].from"),
        ("sharegpt", {"conversations": [{"from": ["gpt"], "value": "x"}]}, "conversations[0].from"),
        ("sharegpt", {"conversations": [{"from": "gpt"}]}, "conversations[0].content"),
        ("sharegpt", {"conversations": [{"from": "gpt", "value": "<tool_call>{"}]}, "conversations[0].value"),
        (
            "sharegpt",
            {"conversations": [{"from": "function_call", "value": '{"arguments": {}}'}]},
            "conversations[0].value",
        ),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "[" * 100_000}]}, "conversations[0].value"),
        ("tau_bench", {"traj": CLEAN}, "task_id"),
        ("tau_bench", {"traj": CLEAN, "task_id": None}, "task_id"),
        ("tau_bench", {"task_id": 1}, "traj"),
    ],
)
def test_each_format_names_the_field_that_is_wrong(
    tmp_path: Path, format: str, record: dict[str, Any], field: str
) -> None:
    (problem,) = problems_of(tmp_path, format, record)
    assert problem.line == 1 and problem.field == field


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [p for key, child in children for p in paths_of(child, (*path, key))]


GOOD = {"openai": [OPENAI], "responses": [PIVOT_ROW, ROLLOUT], "sharegpt": [SHAREGPT], "tau_bench": [TAU]}
PLACES = [
    (f, i, path)
    for f, records in GOOD.items()
    for i, record in enumerate(records)
    for path in paths_of(json.loads(json.dumps(record)))
]
JSON = st.sampled_from(
    [None, True, 0, 3, 1.5, "", "x", "\ud83d", [], [1], ["x"], [None], [{}], {}, {"x": 1}, {"name": 3}, [[1]], 10**400]
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from(PLACES), value=JSON)
def test_any_json_value_at_any_place_of_a_record_is_read_or_is_an_input_error(
    tmp_path: Path, place: Any, value: Any
) -> None:
    format, index, path = place
    record = copy.deepcopy(GOOD[format][index])
    node: Any = record
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    try:
        (found,) = read(tmp_path, format, record)
    except InputError:
        return
    assert all(isinstance(m["content"], str) for m in found.messages)
    calls = [c["function"] for m in found.messages for c in m.get("tool_calls", [])]
    assert all(isinstance(c["name"], str) and isinstance(c["arguments"], str) for c in calls)
