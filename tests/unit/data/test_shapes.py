"""Files as frameworks and public sets write them, each with the one right reading: nothing is misread, nothing good is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_pivotrl.core.types import Trajectory
from nemo_pivotrl.data.readers import Reading, read_trajectories
from nemo_pivotrl.data.readers.tools import tools_of
from nemo_pivotrl.data.readers.turns import TRUNCATED, UNREAD

SCHEMA = {"type": "object", "properties": {"id": {"type": "string"}}, "required": ["id"]}
TOOL = {"type": "function", "function": {"name": "get_order", "parameters": SCHEMA}}
ASK = {"role": "user", "content": "where is 7"}
CALL = {"id": "c1", "type": "function", "function": {"name": "get_order", "arguments": '{"id": "7"}'}}
ACT = {"role": "assistant", "content": "", "tool_calls": [CALL]}
OUT = {"role": "tool", "tool_call_id": "c1", "content": "shipped"}
END = {"role": "assistant", "content": "It is shipped"}
EPISODE = [ASK, ACT, OUT, END]
WHOLE = ["user: where is 7", 'get_order({"id": "7"})', "tool: shipped", "assistant: It is shipped"]
LC_CALL = {"name": "get_order", "args": {"id": "7"}, "id": "c1", "type": "tool_call"}


def turn(message: dict[str, Any]) -> str:
    thought = f"[{message['reasoning_content']}] " if message.get("reasoning_content") else ""
    calls = [f"{c['function']['name']}({c['function']['arguments']})" for c in message.get("tool_calls", ())]
    said = [f"{message['role']}: {message['content']}"] if message["content"] or not calls else []
    return thought + " + ".join([*said, *calls])


def turns(trajectory: Trajectory) -> list[str]:
    return [turn(m) for m in trajectory.messages]


def read(folder: Path, *records: Any, **settings: Any) -> Reading:
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return read_trajectories([str(path)], min_reward=1.0, **settings)


def dumped(kind: str, **fields: Any) -> dict[str, Any]:
    return {"lc": 1, "type": "constructor", "id": ["langchain", "schema", "messages", kind], "kwargs": fields}


def state(kind: str, content: Any, **fields: Any) -> dict[str, Any]:
    rest = {"additional_kwargs": {}, "response_metadata": {}, "name": None, "id": "x"}
    return {"content": content, "type": kind, **rest, **fields}


GRAPH = [
    state("human", "where is 7", example=False),
    state("ai", "", tool_calls=[LC_CALL], invalid_tool_calls=[], usage_metadata=None),
    state("tool", "shipped", tool_call_id="c1", artifact=None, status="success"),
    state("ai", [{"type": "text", "text": "It is shipped", "annotations": []}], tool_calls=[]),
]
ITEMS = [
    ASK,
    {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "look"}]},
    {"type": "function_call", "call_id": "c1", "name": "get_order", "arguments": '{"id": "7"}', "status": "completed"},
    {"type": "function_call_output", "call_id": "c1", "output": "shipped"},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "It is shipped"}]},
]
THOUGHT = [WHOLE[0], f"[look] {WHOLE[1]}", *WHOLE[2:]]
HERMES = f"You call functions. <tools> {json.dumps(TOOL)} </tools>"


def hermes(said: str, output: str = "<tool_response>\nshipped\n</tool_response>") -> dict[str, Any]:
    told = [("system", HERMES), ("human", "where is 7"), ("gpt", said), ("tool", output), ("gpt", "It is shipped")]
    return {"conversations": [{"from": speaker, "value": text} for speaker, text in told]}


SHAPES: dict[str, tuple[Any, list[str]]] = {
    "LangChain dumpd": (
        {
            "messages": [
                dumped("HumanMessage", content="where is 7", type="human"),
                dumped("AIMessageChunk", content="", tool_calls=[LC_CALL], invalid_tool_calls=[]),
                dumped("ToolMessage", content="shipped", tool_call_id="c1", status="success"),
                dumped("AIMessage", content="It is shipped", tool_calls=[]),
            ]
        },
        WHOLE,
    ),
    "LangChain messages_to_dict": (
        {
            "messages": [
                {"type": "human", "data": {"content": "where is 7", "type": "human"}},
                {"type": "ai", "data": {"content": "", "tool_calls": [LC_CALL]}},
                {"type": "tool", "data": {"content": "shipped", "tool_call_id": "c1"}},
                {"type": "ai", "data": {"content": "It is shipped"}},
            ]
        },
        WHOLE,
    ),
    "LangGraph state": ({"messages": GRAPH}, WHOLE),
    "LangGraph checkpoint": ({"values": {"messages": GRAPH}, "next": [], "metadata": {"thread_id": "t"}}, WHOLE),
    "LangChain's older calls": (
        {"messages": [GRAPH[0], state("ai", "", additional_kwargs={"tool_calls": [CALL]}), *GRAPH[2:]]},
        WHOLE,
    ),
    "LangChain with Anthropic's blocks beside its own calls": (
        {
            "messages": [
                GRAPH[0],
                state(
                    "ai",
                    [
                        {"type": "text", "text": "So."},
                        {"type": "tool_use", "id": "c1", "name": "get_order", "input": {"id": "7"}},
                    ],
                    tool_calls=[LC_CALL],
                ),
                *GRAPH[2:],
            ]
        },
        [WHOLE[0], f"assistant: So. + {WHOLE[1]}", *WHOLE[2:]],
    ),
    "LangChain's reasoning": (
        {"messages": [GRAPH[0], {**GRAPH[1], "additional_kwargs": {"reasoning_content": "look"}}, *GRAPH[2:]]},
        THOUGHT,
    ),
    "Agents SDK items": ({"items": ITEMS}, THOUGHT),
    "Responses items as messages": ({"messages": ITEMS, "tools": [TOOL]}, THOUGHT),
    "TRL and verifiers, prompt and completion": ({"prompt": [ASK], "completion": EPISODE[1:], "reward": 1.0}, WHOLE),
    "xLAM": (
        {
            "id": 3,
            "query": "where is 7",
            "answers": '[{"name": "get_order", "arguments": {"id": "7"}}]',
            "tools": '[{"name": "get_order", "parameters": {"id": {"type": "str"}}}]',
        },
        WHOLE[:2],
    ),
    "Hermes, a tag within the arguments": (
        hermes('<tool_call>{"name": "get_order", "arguments": {"id": "<tool_call> </tool_call>"}}</tool_call>'),
        [
            f"system: {HERMES}",
            WHOLE[0],
            'get_order({"id": "<tool_call> </tool_call>"})',
            *WHOLE[2:],
        ],
    ),
    "Hermes, Python's quotes": (
        hermes("<think>\nlook\n</think>\n<tool_call>\n{'name': 'get_order', 'arguments': {'id': '7'}}\n</tool_call>"),
        [f"system: {HERMES}", *THOUGHT],
    ),
    "Hermes, the last tag left out": (
        hermes('<tool_call>{"name": "get_order", "arguments": {"id": "7"}}'),
        [f"system: {HERMES}", *WHOLE],
    ),
    "GLM's calls": (
        hermes("<tool_call>get_order\n<arg_key>id</arg_key>\n<arg_value>7</arg_value>\n</tool_call>"),
        [f"system: {HERMES}", *WHOLE],
    ),
    "one tool turn for several calls": (
        {
            "messages": [
                ASK,
                {**ACT, "tool_calls": [CALL, {**CALL, "id": "c2"}]},
                {"role": "tool", "content": '["a", "b"]'},
                END,
            ]
        },
        [WHOLE[0], f"{WHOLE[1]} + {WHOLE[1]}", "tool: a", "tool: b", WHOLE[3]],
    ),
    "tool turns of their own, the first a list": (
        {
            "messages": [
                ASK,
                {**ACT, "tool_calls": [CALL, {**CALL, "id": "c2"}]},
                {"role": "tool", "content": "[1, 2]"},
                {"role": "tool", "content": "b"},
                END,
            ]
        },
        [WHOLE[0], f"{WHOLE[1]} + {WHOLE[1]}", "tool: [1, 2]", "tool: b", WHOLE[3]],
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_of_others_has_one_right_reading(name: str, tmp_path: Path) -> None:
    record, expected = SHAPES[name]
    reading = read(tmp_path, record)
    (found,) = reading.trajectories
    assert turns(found) == expected and not found.untrained
    ids = [call["id"] for m in found.messages for call in m.get("tool_calls", ())]
    assert [m["tool_call_id"] for m in found.messages if m["role"] == "tool"] == ids or name == "xLAM"


def test_a_whole_file_may_be_one_conversation_or_hold_records_under_any_name(tmp_path: Path) -> None:
    record = {"messages": EPISODE, "tools": [TOOL]}
    files = {
        "graph": (GRAPH, 1),
        "items": (ITEMS, 1),
        "runs": ({"version": 1, "runs": [record, record]}, 2),
        "by name": ({"task-1": record, "task-2": record}, 2),
    }
    for name, (value, count) in files.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(value, indent=2))
        found = read_trajectories([str(path)]).trajectories
        assert [turns(t)[-1] for t in found] == [WHOLE[3]] * count, name


@pytest.mark.parametrize("record", [{"input": {"messages": [ASK]}, "output": {"messages": EPISODE}}])
def test_the_two_sides_of_a_models_call_are_no_records(record: dict[str, Any], tmp_path: Path) -> None:
    reading = read(tmp_path, record, {"messages": EPISODE}, on_invalid="skip")
    assert len(reading.trajectories) == 1 and "no known format" in reading.left_out[0].remedy


def test_every_encoding_and_table_that_people_export_is_read(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    ipc = pytest.importorskip("pyarrow.ipc")
    record = {"messages": json.dumps(EPISODE), "tools": [json.dumps(TOOL)], "instance_id": "a"}
    table = pyarrow.Table.from_pylist([record, record])
    for name, write in (("stream.arrow", ipc.new_stream), ("file.arrow", ipc.new_file)):
        with pyarrow.OSFile(str(tmp_path / name), "wb") as file, write(file, table.schema) as writer:
            writer.write_table(table)
    lines = json.dumps(record) + "\n"
    (tmp_path / "shell.jsonl").write_bytes((lines + lines).encode("utf-16"))
    (tmp_path / "bom.jsonl").write_bytes((lines + lines).encode("utf-8-sig"))
    for path in sorted(tmp_path.iterdir()):
        assert [turns(t) for t in read_trajectories([str(path)]).trajectories] == [WHOLE] * 2, path.name
    (tmp_path / "stream.arrow").write_bytes((tmp_path / "stream.arrow").read_bytes()[:100])
    with pytest.raises(Exception, match="broken Arrow"):
        read_trajectories([str(tmp_path / "stream.arrow")])


@pytest.mark.parametrize(
    ("record", "untrained", "told"),
    [
        (
            {"messages": [ASK], "response": {"choices": [{"finish_reason": "length", "message": END}]}},
            {1: TRUNCATED},
            "",
        ),
        (
            {
                "messages": [ASK],
                "response": {
                    "role": "assistant",
                    "content": [{"type": "text", "text": "It"}],
                    "stop_reason": "max_tokens",
                },
            },
            {1: TRUNCATED},
            "",
        ),
        ({"messages": [ASK], "response": {"choices": [{"finish_reason": "stop", "message": END}]}}, {}, ""),
        ({"input": [ASK], "output": ITEMS[1:], "status": "incomplete", "object": "response"}, {3: TRUNCATED}, ""),
        ({"input": [ASK], "output": ITEMS[1:], "status": "completed", "object": "response"}, {}, ""),
        (
            {
                "messages": [
                    ASK,
                    {"role": "assistant", "content": '<function_call>{"name": "f"}</function_call>'},
                    {"role": "tool", "content": "x"},
                    END,
                ]
            },
            {1: UNREAD},
            "<function_call>",
        ),
        (
            {"messages": [ASK, {"role": "assistant", "content": "<function=ls>\n</function>"}, ASK, END]},
            {},
            "<function=",
        ),
        (
            {
                "history": [
                    ASK,
                    END,
                    ASK,
                    {"role": "assistant", "content": "Exit due to cost limit", "action": "exit_cost"},
                ]
            },
            {3: "given_turn"},
            "",
        ),
        ({"prompt": [ASK, END, ASK], "completion": [END], "reward": 1.0}, {1: "given_turn"}, ""),
    ],
)
def test_a_turn_that_no_expert_chose_so_is_not_learned(
    record: dict[str, Any], untrained: dict[int, str], told: str, tmp_path: Path
) -> None:
    reading = read(tmp_path, record)
    (found,) = reading.trajectories
    assert found.untrained == untrained
    assert (f"{told} in an assistant's text out of which no call is read: left as text" in reading.notes.said) == bool(
        told
    )


def test_a_call_that_langchain_could_not_parse_is_the_call_as_it_was_written(tmp_path: Path) -> None:
    broken = {"name": "get_order", "args": '{"id": ', "id": "c9", "error": "x", "type": "invalid_tool_call"}
    record = {"messages": [GRAPH[0], state("ai", "", tool_calls=[], invalid_tool_calls=[broken]), *GRAPH[2:]]}
    (found,) = read(tmp_path, record).trajectories
    assert turns(found)[1] == 'get_order({"id": )'  # extract skips it as invalid_arguments


@pytest.mark.parametrize("value", ["0.0", " false ", 0, False])
@pytest.mark.parametrize("name", ["reward", "is_resolved", "resolved"])
def test_a_failure_that_a_table_holds_as_text_is_one(name: str, value: Any, tmp_path: Path) -> None:
    (found,) = read(tmp_path, {"messages": EPISODE, name: value}).trajectories
    assert found.reward == 0.0


def test_parameters_of_xlam_are_an_objects_properties(tmp_path: Path) -> None:
    types = {"a": "str", "b": "int, optional", "c": "List[str]", "d": "Union[int, str]", "e": "Optional[float]"}
    raw = {key: {"type": name, "description": "x"} for key, name in types.items()}
    raw["f"] = {"type": "bool", "description": "x", "default": None}
    (tool,) = tools_of([{"name": "t", "parameters": raw}], "tools")
    found = tool["function"]["parameters"]
    assert found["required"] == ["a", "c", "d"] and found["type"] == "object"
    kinds = {key: schema.get("type") for key, schema in found["properties"].items()}
    assert kinds == {"a": "string", "b": "integer", "c": "array", "d": None, "e": "number", "f": "boolean"}
    assert "default" in found["properties"]["f"]


def test_nulls_that_a_table_put_into_schemas_are_absent(tmp_path: Path) -> None:
    tabled = {
        "type": "object",
        "properties": {"id": {"type": "string", "enum": None}, "city": None},
        "required": ["id"],
    }
    (tool,) = tools_of([{"name": "t", "parameters": tabled}], "tools")
    assert tool["function"]["parameters"] == SCHEMA
    kept = {"type": "object", "properties": {"a": {"enum": ["x", None], "default": None}}}
    assert tools_of([{"name": "t", "parameters": kept}], "tools")[0]["function"]["parameters"] == kept
