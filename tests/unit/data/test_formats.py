"""The forms that people bring: each is found by looking, and read as what was said, or refused by its name with the remedy."""

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_pivotrl.config import Extract
from nemo_pivotrl.core.types import Split, Trajectory
from nemo_pivotrl.data.readers import Reading, read_trajectories
from nemo_pivotrl.pivotrl.extract import cut_all

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


def session(kind: str, uuid: str, parent: str | None, message: dict[str, Any], **more: Any) -> dict[str, Any]:
    line = {"type": kind, "uuid": uuid, "parentUuid": parent, "sessionId": "s1", "isSidechain": False, "cwd": "/"}
    return {**line, "message": {"role": kind, **message}, **more}


def part(message_id: str, block: dict[str, Any]) -> dict[str, Any]:
    return {"id": message_id, "content": [block]}


def result(call_id: str, text: str) -> dict[str, Any]:
    return {"content": [{"type": "tool_result", "tool_use_id": call_id, "content": text}]}


def bash(call_id: str, command: str) -> dict[str, Any]:
    return {"type": "tool_use", "id": call_id, "name": "Bash", "input": {"command": command}}


GLAIVE = (
    'USER: where is 7?\n\n\nASSISTANT: <functioncall> {"name": "get_order", "arguments": \'{"id": "7"}\'} <|endoftext|>'
    '\n\n\nFUNCTION RESPONSE: {"status": "shipped"}\n\n\nASSISTANT: It\'s shipped. <|endoftext|>\n'
)
TOOLACE = (
    "You compose functions.\nHere is a list of functions in JSON format that you can invoke:\n"
    '[{"name": "Market API", "parameters": {"type": "dict", "properties": {"q": {"type": "string"}, "n": {"type": "int"}}}}]. \n'
    "Put it in the format of [f(a=b)]\n"
)
READ: dict[str, tuple[str, list[dict[str, Any]], list[str]]] = {
    "Anthropic blocks": (
        "anthropic",
        [
            {
                "system": [{"type": "text", "text": "rules", "cache_control": {"type": "ephemeral"}}],
                "tools": [ANTHROPIC_TOOL],
                "messages": [
                    user("where are 7 and 8"),
                    {
                        "role": "assistant",
                        "content": [
                            {"type": "thinking", "thinking": "look", "signature": "x"},
                            {"type": "redacted_thinking", "data": "x"},
                            {"type": "text", "text": "I look."},
                            {"type": "tool_use", "id": "t1", "name": "get_order", "input": {"id": "7"}},
                            {"type": "tool_use", "id": "t2", "name": "get_order", "input": {"id": "8"}},
                        ],
                    },
                    {
                        "role": "user",
                        "content": [
                            {"type": "tool_result", "tool_use_id": "t2", "content": "lost", "is_error": True},
                            {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "here"}]},
                            {"type": "text", "text": "hurry"},
                        ],
                    },
                    said("7 is here."),
                ],
            }
        ],
        [
            "system: rules",
            "user: where are 7 and 8",
            'assistant: (look) I look.[get_order {"id": "7"}][get_order {"id": "8"}]',
            "tool: lost",
            "tool: here",
            "user: hurry",
            "assistant: 7 is here.",
        ],
    ),
    "Anthropic request with response": (
        "chat_log",
        [
            {
                "request": {"system": "rules", "tools": [ANTHROPIC_TOOL], "messages": [user("where is 7")]},
                "response": {
                    "role": "assistant",
                    "content": [{"type": "tool_use", "id": "t", "name": "get_order", "input": {"id": "7"}}],
                },
            }
        ],
        ["system: rules", "user: where is 7", f"assistant: {CALL}"],
    ),
    "OpenAI request with response, as OpenHands logs it": (
        "chat_log",
        [
            {
                "messages": [{"role": "system", "content": [{"type": "text", "text": "s"}]}, user("where is 7")],
                "kwargs": {"tools": [TOOL]},
                "response": {
                    "choices": [
                        {
                            "index": 0,
                            "message": {
                                "role": "assistant",
                                "content": None,
                                "tool_calls": [
                                    {
                                        "id": "c",
                                        "type": "function",
                                        "function": {"name": "get_order", "arguments": '{"id": "7"}'},
                                    }
                                ],
                            },
                        }
                    ]
                },
            }
        ],
        ["system: s", "user: where is 7", f"assistant: {CALL}"],
    ),
    "legacy function_call": (
        "openai",
        [
            {
                "functions": [TOOL["function"]],
                "messages": [
                    user("where is 7"),
                    {
                        "role": "assistant",
                        "content": None,
                        "function_call": {"name": "get_order", "arguments": '{"id": "7"}'},
                    },
                    {"role": "function", "name": "get_order", "content": "here"},
                    said("Here."),
                ],
            }
        ],
        ["user: where is 7", f"assistant: {CALL}", "tool: here", "assistant: Here."],
    ),
    "LLaMA-Factory v1": (
        "llama_factory_v1",
        [
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "value": "where is 7"}], "loss_weight": 0.0},
                    {
                        "role": "assistant",
                        "content": [
                            {"type": "reasoning", "value": "look"},
                            {"type": "tool_call", "value": '{"name": "get_order", "arguments": {"id": "7"}}'},
                        ],
                        "loss_weight": 1.0,
                    },
                    {"role": "tool", "content": [{"type": "text", "value": "here"}], "loss_weight": 0.0},
                    {"role": "assistant", "content": [{"type": "text", "value": "Here."}], "loss_weight": 1.0},
                ],
                "tools": json.dumps([TOOL]),
            }
        ],
        ["user: where is 7", f"assistant: (look) {CALL}", "tool: here", "assistant: Here."],
    ),
    "ms-swift roles": (
        "openai",
        [
            {
                "tools": json.dumps([TOOL]),
                "messages": [
                    user("both"),
                    said("I look."),
                    {"role": "tool_call", "content": '{"name": "get_order", "arguments": {"id": "7"}}'},
                    {"role": "tool_call", "content": '{"name": "get_order", "arguments": {"id": "8"}}'},
                    {"role": "tool_response", "content": "here"},
                    {"role": "tool_response", "content": "lost"},
                    said("Done."),
                ],
            }
        ],
        [
            "user: both",
            'assistant: I look.[get_order {"id": "7"}][get_order {"id": "8"}]',
            "tool: here",
            "tool: lost",
            "assistant: Done.",
        ],
    ),
    "ms-swift pairs": (
        "sharegpt",
        [
            {
                "system": "s",
                "conversation": [{"human": "hi", "assistant": "hello"}, {"human": "bye", "assistant": "see you"}],
            }
        ],
        ["system: s", "user: hi", "assistant: hello", "user: bye", "assistant: see you"],
    ),
    "Hermes with several responses and the tag within its reasoning": (
        "sharegpt",
        [
            {
                "conversations": [
                    {"from": "human", "value": "both"},
                    {
                        "from": "gpt",
                        "value": "<think>\na <tool_call> block\n</think>\n<tool_call>\n"
                        '{"name": "get_order", "arguments": {"id": "7"}}\n'
                        "</tool_call>\n<tool_call>\n{'name': 'get_order', 'arguments': {'id': '8'}}\n</tool_call>",
                    },
                    {
                        "from": "tool",
                        "value": "<tool_response>\nhere\n</tool_response>\n<tool_response>\nlost\n</tool_response>",
                    },
                    {"from": "gpt", "value": "Done."},
                ],
                "tools": json.dumps([TOOL]),
            }
        ],
        [
            "user: both",
            'assistant: (a <tool_call> block) [get_order {"id": "7"}][get_order {"id": "8"}]',
            "tool: here",
            "tool: lost",
            "assistant: Done.",
        ],
    ),
    "Hermes with its tools in the system prompt": (
        "sharegpt",
        [
            {
                "conversations": [
                    {
                        "from": "system",
                        "value": "<tools> [{'type': 'function', 'function': {'name': 'get_order'}}] </tools>",
                    },
                    {"from": "human", "value": "where is 7"},
                    {
                        "from": "gpt",
                        "value": "<tool_call>\n{'name': 'get_order', 'arguments': {'id': '7'}}\n</tool_call>",
                    },
                ],
            }
        ],
        [
            "system: <tools> [{'type': 'function', 'function': {'name': 'get_order'}}] </tools>",
            "user: where is 7",
            f"assistant: {CALL}",
        ],
    ),
    "a list in function_call": (
        "sharegpt",
        [
            {
                "conversations": [
                    {"from": "human", "value": "both"},
                    {
                        "from": "function_call",
                        "value": '[{"name": "get_order", "arguments": {"id": "7"}}, {"name": "get_order", "arguments": {"id": "8"}}]',
                    },
                    {"from": "observation", "value": '["here", {"s": "lost"}]'},
                    {"from": "gpt", "value": "Done."},
                ],
                "tools": json.dumps([TOOL["function"]]),
            }
        ],
        [
            "user: both",
            'assistant: [get_order {"id": "7"}][get_order {"id": "8"}]',
            "tool: here",
            'tool: {"s": "lost"}',
            "assistant: Done.",
        ],
    ),
    "ToolACE": (
        "sharegpt",
        [
            {
                "system": TOOLACE,
                "conversations": [
                    {"from": "user", "value": "trends"},
                    {"from": "assistant", "value": "[Market API(q=\"a, b (c)\", n=3), Market API(q='x')]"},
                    {"from": "tool", "value": '[{"results": 1}, {"results": 2}]'},
                    {"from": "assistant", "value": "Here [they] are."},
                ],
            }
        ],
        [
            "system: You compose functions.",
            "user: trends",
            'assistant: [Market API {"q": "a, b (c)", "n": 3}][Market API {"q": "x"}]',
            'tool: {"results": 1}',
            'tool: {"results": 2}',
            "assistant: Here [they] are.",
        ],
    ),
    "glaive": (
        "glaive",
        [
            {
                "system": 'SYSTEM: You may call. Use them if required -\n{"name": "get_order", "parameters": {"type": "object"}}\n',
                "chat": GLAIVE,
            }
        ],
        [
            "system: You may call.",
            "user: where is 7?",
            f"assistant: {CALL}",
            'tool: {"status": "shipped"}',
            "assistant: It's shipped.",
        ],
    ),
    "a served model's own text": (
        "openai",
        [
            {
                "tools": [TOOL],
                "messages": [
                    user("where is 7"),
                    said(
                        "<think>\nhm\n</think>\n\nOk.\n<tool_call>\n<function=get_order>\n<parameter=id>\n7\n</parameter>\n</function>\n</tool_call>"
                    ),
                    user("<tool_response>\nhere\n</tool_response>"),
                    said("no opening tag\n</think>\n\nHere."),
                ],
            }
        ],
        ["user: where is 7", f"assistant: (hm) Ok.{CALL}", "tool: here", "assistant: (no opening tag) Here."],
    ),
    "SWE-agent": (
        "swe_agent",
        [
            {
                "environment": "swe_main",
                "trajectory": [{"action": "ls", "observation": "a", "response": "I list.", "query": []}],
                "history": [
                    {"role": "system", "content": "s", "message_type": "system_prompt"},
                    {"role": "user", "content": [{"type": "text", "text": "issue"}], "message_type": "observation"},
                    {
                        "role": "assistant",
                        "content": "I list.",
                        "thought": "I list.",
                        "action": "ls",
                        "tool_calls": [
                            {
                                "id": "c1",
                                "type": "function",
                                "function": {"name": "bash", "arguments": '{"command":"ls"}'},
                            }
                        ],
                    },
                    {"role": "tool", "content": [{"type": "text", "text": "a"}], "tool_call_ids": ["c1"]},
                    {"role": "assistant", "content": "done"},
                ],
                "info": {"exit_status": "submitted"},
                "replay_config": "{}",
            }
        ],
        ["system: s", "user: issue", 'assistant: I list.[bash {"command":"ls"}]', "tool: a", "assistant: done"],
    ),
    "mini-swe-agent": (
        "mini_swe_agent",
        [
            {
                "info": {"exit_status": "Submitted", "model_stats": {}},
                "messages": [
                    {"role": "system", "content": "s"},
                    user("issue"),
                    {
                        "object": "response",
                        "output": [{"type": "function_call", "call_id": "c", "name": "bash", "arguments": "{}"}],
                    },
                    {"type": "function_call_output", "call_id": "c", "output": "a"},
                    said("THOUGHT\n```bash\nls\n```"),
                    {"role": "exit", "content": "patch", "extra": {}},
                ],
                "trajectory_format": "mini-swe-agent-1.1",
            }
        ],
        ["system: s", "user: issue", "assistant: [bash {}]", "tool: a", "assistant: THOUGHT\n```bash\nls\n```"],
    ),
    "SWE-smith, messages as JSON text": (
        "openai",
        [
            {
                "messages": json.dumps(
                    [{"role": "system", "content": "s"}, user("issue"), {**said("ls"), "thought": "t", "action": "ls"}]
                ),
                "instance_id": "x__1",
                "resolved": True,
                "traj_id": "x__1.a",
            }
        ],
        ["system: s", "user: issue", "assistant: ls"],
    ),
    "SWE-agent rows of a data set": (
        "openai",
        [
            {
                "instance_id": "x__1",
                "target": True,
                "trajectory": [
                    {"role": "system", "system_prompt": "s", "text": None, "mask": False},
                    {"role": "user", "system_prompt": None, "text": "issue", "mask": False},
                    {"role": "ai", "system_prompt": None, "text": "ls", "mask": False},
                ],
            }
        ],
        ["system: s", "user: issue", "assistant: ls"],
    ),
    "Claude Code": (
        "claude_code",
        [
            {"type": "summary", "summary": "x", "leafUuid": "z", "sessionId": "s1"},
            session("user", "m", None, {"content": "<command>"}, isMeta=True),
            session("user", "u1", None, {"content": "fix it"}),
            session("assistant", "a1", "u1", part("m1", {"type": "thinking", "thinking": "hm"})),
            session("assistant", "a2", "a1", part("m1", {"type": "text", "text": "I look."})),
            session("assistant", "a3", "a2", part("m1", bash("t1", "ls"))),
            session("user", "r1", "a3", result("t1", "a")),
            session("assistant", "a4", "a3", part("m1", bash("t2", "pwd"))),
            session("user", "r2", "a4", result("t2", "/")),
            session("assistant", "a5", "r2", part("m2", {"type": "text", "text": "Done."})),
            session("user", "u2", "a5", {"content": "a prompt that is taken back"}),
            session("assistant", "a6", "u2", part("m3", {"type": "text", "text": "never mind"})),
            session("user", "u3", "a5", {"content": "again"}),
            session("assistant", "a7", "u3", part("m4", {"type": "text", "text": "Again."})),
        ],
        [
            "user: fix it",
            'assistant: (hm) I look.[Bash {"command": "ls"}][Bash {"command": "pwd"}]',
            "tool: a",
            "tool: /",
            "assistant: Done.",
            "user: again",
            "assistant: Again.",
        ],
    ),
    "Responses object with its input": (
        "responses",
        [
            {
                "object": "response",
                "instructions": "s",
                "input": "where is 7",
                "tools": [{"type": "function", "name": "get_order", "parameters": SCHEMA}],
                "output": [
                    {"type": "reasoning", "summary": [{"type": "summary_text", "text": "look"}]},
                    {"type": "function_call", "call_id": "c", "name": "get_order", "arguments": '{"id": "7"}'},
                ],
            }
        ],
        ["system: s", "user: where is 7", f"assistant: (look) {CALL}"],
    ),
}


@pytest.mark.parametrize("name", READ)
def test_each_form_is_found_by_looking_and_says_what_was_said(name: str, tmp_path: Path) -> None:
    format, records, expected = READ[name]
    reading = read(tmp_path, *records)
    (found,) = reading.trajectories
    assert turns(found) == expected
    assert dict(reading.files[0].formats) == {format: 1}
    called = {c["function"]["name"] for m in found.messages for c in m.get("tool_calls", [])}
    if called and format not in ("claude_code", "swe_agent", "mini_swe_agent"):  # whose files hold no tools
        assert called <= {t["function"]["name"] for t in found.tools}
    outputs = [m["tool_call_id"] for m in found.messages if m["role"] == "tool"]
    made = [c["id"] for m in found.messages for c in m.get("tool_calls", [])]
    assert set(outputs) <= set(made) and len(set(made)) == len(made)


# ---- the table of docs/formats.md ----

DOCS = Path(__file__).resolve().parents[3] / "docs/formats.md"
CALLED = ("get_order", "bash", "Bash", "Market API")
BAD = {"messages": [{"role": "narrator", "content": "q"}]}


def table_row(name: str, folder: Path) -> str:
    """What becomes of a file that holds the form's records, a second run that failed, a bad record and a broken line."""
    format, records, _ = READ[name]
    failed = [] if format == "claude_code" else [{**records[0], "reward": 0.0, "traj_id": None}]
    tools = folder / "tools.json"
    tools.write_text(json.dumps([{"name": called, "parameters": {"type": "object"}} for called in CALLED]))
    path = folder / "in.jsonl"
    lines = [json.dumps(record) for record in (*records, *failed, BAD)]
    path.write_text("\n".join([*lines, '{"messages": [', ""]), encoding="utf-8")
    reading = read_trajectories([str(path)], "auto", str(tools), "skip", 1.0)
    splits: dict[str, Split] = {t.task_id: "train" for t in reading.trajectories}
    kept, audit = cut_all(reading.trajectories, splits, Extract(on_invalid="skip"))
    (file,) = reading.files
    left = sum(file.unreadable.values())
    assert file.records == len(reading.trajectories) + left
    skipped = "".join(f" + {n} {reason}" for reason, n in audit["skipped"].items())
    counts = f"{file.records} = {len(reading.trajectories)} + {left}"
    return f"| {name} | `{format}` | {counts} | {audit['turns']} = {len(kept)}{skipped} |"


@pytest.mark.parametrize("name", READ)
def test_the_documented_table_says_what_becomes_of_each_form(name: str, tmp_path: Path) -> None:
    assert table_row(name, tmp_path) in DOCS.read_text(encoding="utf-8").splitlines()
