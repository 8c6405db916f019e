"""What is read besides the messages: outcome, task, weight; bad rows, packings, tables; NeMo-Gym's and tau2-bench's own ways."""

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.core.types import Trajectory
from nemo_pivotrl.data.readers import Reading, read_trajectories

SCHEMA = {"type": "object", "properties": {"id": {"type": "string"}}, "required": ["id"]}
TOOL = {"type": "function", "function": {"name": "get_order", "parameters": SCHEMA}}
ANTHROPIC_TOOL = {"name": "get_order", "description": "d", "input_schema": SCHEMA}
CALL = '[get_order {"id": "7"}]'


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def turn(message: dict[str, Any]) -> str:
    """A message as one line: `assistant (reasoning) text [tool arguments]`."""
    thought = f"({message['reasoning_content']}) " if "reasoning_content" in message else ""
    calls = "".join(f"[{c['function']['name']} {c['function']['arguments']}]" for c in message.get("tool_calls", []))
    return f"{message['role']}: {thought}{message['content']}{calls}"


def read(folder: Path, *records: Any, name: str = "in.jsonl", **settings: Any) -> Reading:
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return read_trajectories([str(path)], min_reward=1.0, **settings)


def turns(trajectory: Trajectory) -> list[str]:
    return [turn(m) for m in trajectory.messages]


def problem_of(folder: Path, *records: Any) -> Problem:
    with pytest.raises(InputError) as caught:
        read(folder, *records)
    (problem,) = caught.value.problems
    return problem


# ---- refused by name ----

REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "image_url", "only text"),
    (
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
        "input_audio",
        "only text",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]}, "document", "known blocks"),
    ({"messages": [user("<image> q"), said("a")], "images": ["a.png"]}, "1 of them", "only text"),
    ({"messages": [{**user("q"), "images": ["a.png"]}, said("a")]}, "a.png", "only text"),
    ({"messages": [{"role": "user", "parts": [{"text": "q"}]}]}, "Gemini", "role and content"),
    ({"messages": [{"role": "narrator", "content": "q"}]}, "narrator", "use one of"),
    ({"messages": [user("q"), said("a")], "tools": [{"type": "web_search"}]}, "web_search", "the API's own server"),
    (
        {"instance_id": "x", "history": [{"id": 0, "source": "user", "action": "message", "args": {}}]},
        "openhands",
        "llm_completions",
    ),
    ({"instance_id": "x", "history": [{"kind": "MessageEvent", "source": "user"}]}, "openhands", "llm_completions"),
    ({"schema_version": "ATIF-v1.4", "steps": []}, "atif", "chat messages"),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preferences", "nemo-pivotrl preferences"),
    ({"instruction": "q", "input": "", "output": "a"}, "alpaca", "messages"),
    ({"text": "<|im_start|>user"}, "text", "rendered"),
    ({"object": "response", "output": []}, "missing", "`input`"),
    ({"input": "q", "output": [{"type": "web_search_call", "id": "w"}]}, "web_search_call", "function_call"),
    ({"custom_id": "1", "response": {"body": {"choices": [{"message": said("a")}]}}}, "missing", "custom_id"),
    (
        {"responses_create_params": {"input": "q", "previous_response_id": "r"}, "response": {"output": []}},
        "r",
        "not in the record",
    ),
    ({"responses_create_params": {"input": "q"}, "expected_answer": "42"}, "42, a reference answer", "rollouts"),
    ({"foo": 1, "bar": 2}, "foo, bar", "openai, anthropic"),
]


@pytest.mark.parametrize(("record", "found", "remedy"), REFUSED)
def test_what_is_not_read_is_refused_by_its_name_with_the_remedy(
    record: dict[str, Any], found: str, remedy: str, tmp_path: Path
) -> None:
    problem = problem_of(tmp_path, record)
    assert found in problem.found and (remedy in problem.remedy or remedy in problem.found), problem


def test_a_refused_format_is_one_problem_a_file_however_many_rows_it_has(tmp_path: Path) -> None:
    problem = problem_of(tmp_path, *[{"prompt": "q", "chosen": "a", "rejected": "b"}] * 30)
    assert problem.line == 1 and "29 more" in problem.found


# ---- one bad row never ends a stage ----


def test_with_skip_bad_records_are_counted_and_named_in_every_format(tmp_path: Path) -> None:
    bad = {"messages": [{"role": "narrator", "content": "x"}]}
    shapes = (
        {"messages": [user("q"), said("a")]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"task_id": 1, "traj": [user("q"), said("a")]},
        {**GYM, "response": {"output": [spoken("a")]}},
        simulation(),
    )
    for good in shapes:
        reading = read(tmp_path, good, bad, 3, {"foo": 1}, on_invalid="skip")
        assert len(reading.trajectories) == 1
        (file,) = reading.files
        assert file.records == 4 and dict(file.unreadable) == {"unreadable": 3}
        assert [p.line for p in reading.left_out] == [2, 3, 4]


def test_an_excluded_trajectory_is_never_an_error_and_a_crashed_one_is_a_row(tmp_path: Path) -> None:
    crashed = {"task_id": 1, "trial": 0, "reward": 0.0, "traj": [], "info": {"error": "APIError"}}
    good = {"task_id": 0, "trial": 0, "reward": 1.0, "traj": [user("q"), said("a")]}
    broken = {"task_id": 2, "trial": 0, "reward": 0.0, "traj": [{"role": "robot"}]}
    reading = read(tmp_path, good, crashed, broken)
    assert [(t.task_id, t.reward, len(t.messages)) for t in reading.trajectories] == [("0", 1.0, 2), ("1", 0.0, 0)]
    assert dict(reading.files[0].unreadable) == {"below_min_reward": 1}
    with pytest.raises(InputError, match="there is no turn in it"):
        read(tmp_path, {**crashed, "reward": 1.0})


# ---- outcome, task, weight ----


@pytest.mark.parametrize(
    ("fields", "reward"),
    [
        ({"reward": 0.5}, 0.5),
        ({"resolved": True}, 1.0),
        ({"success": False}, 0.0),
        ({"is_correct": "false"}, 0.0),
        ({"passed": 1}, 1.0),
        ({"score": 0.25}, 0.25),
        ({"reward_info": {"reward": 0.0}}, 0.0),
        ({"info": {"resolved": False}}, 0.0),
        ({"test_result": {"report": {"resolved": True}}}, 1.0),
        ({"reward": None, "resolved": False}, 0.0),
        ({"score": 87}, None),
        ({"target": True}, None),
        ({}, None),
    ],
)
def test_an_outcome_is_read_under_its_usual_names(fields: dict[str, Any], reward: float | None, tmp_path: Path) -> None:
    reading = read(tmp_path, {"messages": [user("q"), said("a")], **fields})
    assert reading.trajectories[0].reward == reward
    if "score" in fields and reward is None:
        assert reading.notes.unused["score"] == 1  # on a scale that nobody told


def test_outcomes_that_disagree_are_told(tmp_path: Path) -> None:
    reading = read(tmp_path, {"messages": [user("q"), said("a")], "reward": 1, "resolved": False})
    assert reading.trajectories[0].reward == 1.0
    assert list(reading.notes.said) == ["resolved says something else than reward, which counts"]


@pytest.mark.parametrize("field", ["task_id", "instance_id", "_ng_task_index", "problem_id", "metadata"])
def test_repeats_of_a_task_share_it(field: str, tmp_path: Path) -> None:
    def named(task: int) -> dict[str, Any]:
        return {"metadata": {"task_id": task}} if field == "metadata" else {field: task}

    rows = [{"messages": [user(f"q{i}"), said("a")], **named(i // 2)} for i in range(4)]
    reading = read(tmp_path, *rows)
    assert [t.task_id for t in reading.trajectories] == ["0", "0", "1", "1"]
    assert len({t.trajectory_id for t in reading.trajectories}) == 4


def test_repeats_without_a_task_are_known_by_their_id_or_by_how_they_open(tmp_path: Path) -> None:
    by_id = [{"id": f"q{i // 2}", "messages": [user(f"asked {i}"), said(f"a{i}")]} for i in range(4)]
    assert [t.task_id for t in read(tmp_path, *by_id).trajectories] == ["q0", "q0", "q1", "q1"]
    opening = [{"id": f"run{i}", "messages": [user(f"q{i // 2}"), said(f"a{i}")]} for i in range(4)]
    reading = read(tmp_path, *opening)
    assert [t.task_id for t in reading.trajectories] == ["run0", "run0", "run2", "run2"]
    assert [t.trajectory_id for t in reading.trajectories] == ["run0", "run1", "run2", "run3"]


def test_two_runs_of_the_same_tasks_are_read_together(tmp_path: Path) -> None:
    for run in "ab":
        rows = [{"task_id": i, "trial": 0, "reward": 1.0, "traj": [user("q"), said(run)]} for i in range(2)]
        (tmp_path / f"{run}.json").write_text(json.dumps(rows))
    reading = read_trajectories([str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert [t.task_id for t in reading.trajectories] == ["0", "1", "0", "1"]
    assert len({t.trajectory_id for t in reading.trajectories}) == 4


@pytest.mark.parametrize("field", [{"weight": 0}, {"loss": False}, {"loss_weight": 0.0}, {"train": False}])
def test_a_turn_of_weight_zero_is_not_learned(field: dict[str, Any], tmp_path: Path) -> None:
    messages = [user("q"), {**said("a"), **field}, user("r"), said("b")]
    (found,) = read(tmp_path, {"messages": messages}).trajectories
    assert dict(found.untrained) == {1: "weight_zero"}
    (whole,) = read(tmp_path, {"messages": [user("q"), said("a")], **field}).trajectories
    assert dict(whole.untrained) == {1: "weight_zero"}


def test_a_demonstration_of_swe_agent_was_given(tmp_path: Path) -> None:
    demo = [{**user("shown"), "is_demo": True}, {**said("shown"), "is_demo": True}]
    record = {"history": [*demo, user("q"), said("a")], "trajectory": [], "info": {}, "system": "s"}
    (found,) = read(tmp_path, record, name="django__1.traj").trajectories
    assert dict(found.untrained) == {2: "given_turn"} and found.task_id == "django__1"


def test_fields_that_nothing_reads_are_listed(tmp_path: Path) -> None:
    record = {"messages": [{**user("q"), "mood": "sad"}, said("a")], "difficulty": 3, "patch": "d", "empty": None}
    assert dict(read(tmp_path, record).notes.unused) == {"messages[].mood": 1, "difficulty": 1, "patch": 1}


# ---- NeMo-Gym ----

GYM = {"responses_create_params": {"input": [user("q")], "tools": []}}


def spoken(text: str) -> dict[str, Any]:
    return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}


def test_a_record_with_an_output_is_a_rollout_whatever_else_it_holds(tmp_path: Path) -> None:
    action = {"type": "message", "content": "gold"}
    row = {
        **GYM,
        "response": {"output": [spoken("mine")]},
        "reward": 0.0,
        "expected_answer": "42",
        "expected_action": action,
    }
    (found,) = read(tmp_path, row).trajectories
    assert turns(found) == ["user: q", "assistant: mine"] and found.reward == 0.0 and not found.last_only


def test_turns_of_a_rollouts_input_were_given(tmp_path: Path) -> None:
    row = {
        "responses_create_params": {"input": [user("q"), spoken("given"), user("r")]},
        "response": {"output": [spoken("made")]},
    }
    (found,) = read(tmp_path, row).trajectories
    assert dict(found.untrained) == {1: "given_turn"}


def test_an_agent_that_logs_its_whole_state_after_each_step_is_read_once(tmp_path: Path) -> None:
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "c", "output": "o"}
    steps = [[user("q"), call, output], [user("q"), call, output, spoken("done")]]
    row = {"responses_create_params": {"input": []}, "response": {"output": steps}, "reward": 1.0}
    assert turns(read(tmp_path, row).trajectories[0]) == ["user: q", "assistant: [f {}]", "tool: o", "assistant: done"]
    row["response"] = {"output": [steps[0], [user("other"), spoken("x")]]}
    assert "goes on with the one before" in problem_of(tmp_path, row).remedy


def test_a_rollout_whose_prompt_is_elsewhere_is_refused(tmp_path: Path) -> None:
    row = {"responses_create_params": {"input": []}, "response": {"output": [spoken("x")]}, "reward": 1.0}
    assert "own prompt is not in the record" in problem_of(tmp_path, row).remedy


@pytest.mark.parametrize(
    "between", [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]}, spoken("wait")]
)
def test_what_stands_between_calls_and_their_outputs_belongs_to_the_turn(
    between: dict[str, Any], tmp_path: Path
) -> None:
    calls = [{"type": "function_call", "call_id": f"c{i}", "name": "f", "arguments": "{}"} for i in range(2)]
    outputs = [{"type": "function_call_output", "call_id": f"c{i}", "output": f"o{i}"} for i in range(2)]
    for order in ([calls[0], between, calls[1], *outputs], [*calls, outputs[0], between, outputs[1]]):
        row = {**GYM, "response": {"output": [*order, spoken("done")]}, "reward": 1.0}
        found = turns(read(tmp_path, row).trajectories[0])
        said_or_thought = "(hm) " if between["type"] == "reasoning" else "wait"
        assert found == [
            "user: q",
            f"assistant: {said_or_thought}[f {{}}][f {{}}]",
            "tool: o0",
            "tool: o1",
            "assistant: done",
        ]


# ---- tau2-bench ----


def simulation(**change: Any) -> dict[str, Any]:
    call = {"id": "c1", "name": "get_order", "arguments": {"id": "7"}, "requestor": "assistant"}
    return {
        "id": "sim0",
        "task_id": "7",
        "trial": 0,
        "reward_info": {"reward": 1.0},
        "termination_reason": "user_stop",
        "messages": [
            {"role": "assistant", "content": "Hi! How can I help?", "tool_calls": None},
            {**user("where is 7"), "tool_calls": None},
            {"role": "user", "content": None, "tool_calls": [{**call, "id": "u1", "requestor": "user"}]},
            {"id": "u1", "role": "tool", "content": "screen", "requestor": "user"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"id": "c1", "role": "tool", "content": "here", "requestor": "assistant", "error": False},
            said("Here."),
        ],
        **change,
    }


def test_a_tau2_file_gives_its_simulations_with_the_policy_and_without_what_the_agent_did_not_see(
    tmp_path: Path,
) -> None:
    world = {
        "domain_name": "retail",
        "policy": "POLICY",
        "tool_defs": {"get_order": {"name": "get_order", "doc": "d", "params": SCHEMA}},
    }
    file = {"info": {"environment_info": world}, "tasks": [{"id": "7"}]}
    file["simulations"] = [simulation(), simulation(id="sim1", trial=1, reward_info={"reward": 0.0})]
    (tmp_path / "results.json").write_text(json.dumps(file, indent=1))
    reading = read_trajectories([str(tmp_path / "results.json")])
    first = reading.trajectories[0]
    assert turns(first) == [
        "system: POLICY",
        "assistant: Hi! How can I help?",
        "user: where is 7",
        f"assistant: {CALL}",
        "tool: here",
        "assistant: Here.",
    ]
    assert dict(first.untrained) == {1: "given_turn"} and first.tools[0]["function"]["parameters"] == SCHEMA
    assert [(t.task_id, t.reward) for t in reading.trajectories] == [("7", 1.0), ("7", 0.0)]
    assert dict(reading.files[0].formats) == {"tau2_bench": 2}


def test_a_tau2_simulation_that_failed_without_a_reward_is_no_expert(tmp_path: Path) -> None:
    (found,) = read(tmp_path, simulation(reward_info=None, termination_reason="too_many_errors")).trajectories
    assert found.reward == 0.0


# ---- files ----


def test_every_packing_holds_the_same_records(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"task_id": f"k{i}", "messages": [user(f"q{i}"), said("a")]} for i in range(3)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "crlf.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n") + b"\r\n")
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=2))
    (tmp_path / "several.json").write_text("\n".join(json.dumps(row, indent=2) for row in rows))
    (tmp_path / "wrapped.json").write_text(json.dumps({"version": 1, "data": rows}))
    (tmp_path / "rows.json").write_text(
        json.dumps({"features": [], "rows": [{"row_idx": 0, "row": row} for row in rows]})
    )
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    for codec, end in (("gzip", "gz"), ("zstd", "zst")):
        with pyarrow.output_stream(str(tmp_path / f"t.jsonl.{end}"), compression=codec) as stream:
            stream.write(lines)
    (tmp_path / "named_wrongly.jsonl").write_bytes((tmp_path / "t.jsonl.gz").read_bytes())
    for path in sorted(tmp_path.iterdir()):
        found = read_trajectories([str(path)]).trajectories
        assert [(t.task_id, turns(t)) for t in found] == [
            (f"k{i}", [f"user: q{i}", "assistant: a"]) for i in range(3)
        ], path


def test_a_table_fills_rows_with_nulls_that_are_read_as_absent(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    other = {
        "name": "find",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "limit": {"type": "integer"}}},
    }
    nullable = {
        "name": "note",
        "parameters": {"type": "object", "properties": {"text": {"type": ["string", "null"]}}, "required": ["text"]},
    }

    def row(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        call = {"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}}
        tools = json.dumps([TOOL["function"], other, nullable, {"name": "list_all"}])
        return {
            "messages": [
                user(name),
                {**said(""), "tool_calls": [call]},
                {"role": "tool", "content": "o", "tool_call_id": "c"},
            ],
            "tools": tools,
        }

    rows = [
        row("get_order", {"id": "7"}),
        row("find", {"city": "Bonn"}),
        row("note", {"text": None}),
        row("list_all", {}),
    ]
    rows.append(row("find", {"city": "Bonn", "limit": 3}))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    found = read_trajectories([str(tmp_path / "t.parquet")])
    arguments = [json.loads(t.messages[1]["tool_calls"][0]["function"]["arguments"]) for t in found.trajectories]
    assert arguments == [{"id": "7"}, {"city": "Bonn"}, {"text": None}, {}, {"city": "Bonn", "limit": 3}]
    assert all(set(t.messages[0]) == {"role", "content"} for t in found.trajectories)


def test_calls_without_arguments_are_calls_of_the_empty_object(tmp_path: Path) -> None:
    calls = [
        {"id": str(i), "function": {"name": "f", **given}}
        for i, given in enumerate([{}, {"arguments": ""}, {"arguments": None}])
    ]
    (found,) = read(tmp_path, {"messages": [user("q"), {"role": "assistant", "tool_calls": calls}]}).trajectories
    assert [c["function"]["arguments"] for c in found.messages[1]["tool_calls"]] == ["{}"] * 3


def test_a_git_lfs_pointer_and_a_folder_are_named(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 3\n")
    with pytest.raises(InputError) as caught:
        read_trajectories([str(tmp_path / "in.jsonl"), str(tmp_path)])
    first, second = caught.value.problems
    assert "git lfs pull" in first.remedy and "one by one" in second.remedy


def test_a_readers_own_format_is_named_by_its_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "from nemo_pivotrl.core.types import Trajectory\n\n\ndef read(record, tools, source):\n"
        "    messages = ({'role': 'user', 'content': record['ask']}, {'role': 'assistant', 'content': record['say']})\n"
        "    return Trajectory(source, record['ask'], messages, tools, None, source)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (found,) = read(tmp_path, {"ask": "q", "say": "a"}, format="mine:read").trajectories
    assert turns(found) == ["user: q", "assistant: a"]
    with pytest.raises(InputError, match="mine has no nothing"):
        read(tmp_path, {"ask": "q"}, format="mine:nothing")
    with pytest.raises(InputError, match="use one of auto, openai"):
        read(tmp_path, {"ask": "q"}, format="opena")
