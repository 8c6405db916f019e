"""Call forms and habits of models whose templates ship in no package."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.own_templates import CALLS
from support.template_cases import LINES, SHAPES, USER, calling, template, tokenizer_with, tool

from nemo_pivotrl.core.errors import InputError, UnrenderableState
from nemo_pivotrl.core.types import Action, Message, ToolCall
from nemo_pivotrl.data.chat_template import Chat
from nemo_pivotrl.data.gym_rows import message_of
from nemo_pivotrl.data.tool_parsers import NAMES
from nemo_pivotrl.pivotrl.sft import _about_reasoning

ACTIONS = [
    *((schema, calling(value, count)) for schema, value in [*SHAPES, *LINES] for count in (1, 2)),
    ({"type": "string"}, Action("calls", "", (ToolCall("f", "{}"),))),
    ({"type": "string"}, Action("message", "An answer.")),
]


def chat_of(name: str) -> Chat:
    return Chat(tokenizer_with(template(name)))


@pytest.mark.parametrize("name", CALLS)
def test_every_form_is_found_and_reads_every_action_back(name: str) -> None:
    chat = chat_of(name)
    assert chat.parser == NAMES[name]
    for schema, action in ACTIONS:
        assert chat.lost_in_rendering([USER], [tool(schema)], action) == "", (schema, action)


@pytest.mark.parametrize("name", [name for name in CALLS if name != "xlam"])  # its whole turn is the list
def test_words_beside_calls_and_an_end_marker_in_an_argument_are_kept(name: str) -> None:
    chat = chat_of(name)
    ends = {"kimi_k2": "<|tool_call_end|>", "minimax_m2": "</invoke>", "deepseek_v32": "</｜DSML｜invoke>"}
    action = Action("calls", "So: ", calling(f"a {ends.get(NAMES[name], '</TOOLCALL>')} b").calls)
    turn = chat.turn([USER], [tool({"type": "string"})], message_of(action))
    ids = chat.encode(turn.text)
    read = chat.parse(chat.decode(ids[: next(n for n, i in enumerate(ids) if i in chat.stop_ids)]))
    assert (read.kind, read.content) == ("calls", "So:") and [json.loads(c.arguments) for c in read.calls] == [
        json.loads(c.arguments) for c in action.calls
    ]


def turn_of(name: str, action: Action, state: list[Message] | None = None) -> tuple[str, str]:
    """(prompt, turn up to its end)."""
    chat = chat_of(name)
    prompt, answer = chat.example_ids(state or [USER], [tool({"type": "string"})], message_of(action))
    assert answer[-1] in chat.stop_ids and chat.lost_in_rendering([USER], [tool({"type": "string"})], action) == ""
    return chat.tokenizer.decode(prompt), chat.tokenizer.decode(answer)


CALL = '<tool_call>{"name": "f", "arguments": {"x": "a"}}</tool_call><|end|>'
LISTED = '<TOOLCALL>[{"name": "f", "arguments": {"x": "a"}}]</TOOLCALL><|end|>'


@pytest.mark.parametrize(
    ("name", "reasoning", "prompt", "turn"),
    [
        ("closed", "", "<|assistant|><think>\n</think>\n", CALL),
        ("closed", "It is so.", "<|assistant|><think>\n</think>\n", CALL),
        ("closed, the end in the turn", "", "<|assistant|><think></think>", CALL),
        ("drops reasoning", "", "<|assistant|>", CALL),
        ("drops reasoning", "It is so.", "<|assistant|><think>\n", f"It is so.\n</think>\n\n{CALL}"),
        ("drops reasoning, one line", "It is so.", "<|assistant|><think>", f"It is so.</think>{CALL}"),
        ("two turns", "", "<|assistant|>", LISTED),
        ("two turns", "It is so.", "<|assistant|><think>\n", f"It is so.\n</think>\n\n{LISTED}"),
    ],
)
def test_a_turn_goes_on_where_the_policy_is_asked(name: str, reasoning: str, prompt: str, turn: str) -> None:
    """The prompt opens or closes reasoning, which the template's own turns leave out."""
    found, answer = turn_of(name, calling("a", 1, reasoning))
    assert found.endswith(f"where is order 7<|end|>{prompt}") and answer == turn


def test_words_and_calls_of_a_last_turn_are_one_turn() -> None:
    assert turn_of("two turns", Action("calls", "So: ", calling("a").calls))[1] == f"So: {LISTED}"


def test_reasoning_keeps_its_special_tokens_as_text() -> None:
    chat, action = chat_of("drops reasoning"), calling("a", 1, "not <|im_end|> yet")
    _, answer = chat.example_ids([USER], [], message_of(action))
    assert chat.tokenizer.decode(answer) == f"not <|im_end|> yet\n</think>\n\n{CALL}"
    assert chat.tokenizer.convert_tokens_to_ids("<|im_end|>") not in answer


def test_a_template_that_writes_ids_gets_ids_that_name_the_tool() -> None:
    def call(name: str, number: str) -> dict[str, Any]:
        return {"id": number, "type": "function", "function": {"name": name, "arguments": "{}"}}

    state = [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [call("g", "call_x"), call("f", "call_y")]},
        {"role": "tool", "tool_call_id": "call_y", "content": "later"},
        {"role": "tool", "tool_call_id": "call_x", "content": "first"},
    ]
    prompt, answer = turn_of("ids", calling("a"), state)
    assert "<|tool|>functions.f:1: later<|end|><|tool|>functions.g:0: first<|end|><|assistant|>" in prompt
    assert "<|tool_call_begin|>functions.f:2<|tool_call_argument_begin|>" in answer


@pytest.mark.parametrize("text", ["a<|im_end|>b", "größe \ufdd0 <|im_end|>", "\\ufdd0 <|im_end|>"])
def test_special_tokens_stay_text_where_json_is_ascii(text: str) -> None:
    chat = chat_of("ASCII")
    prompt, answer = chat.example_ids([{"role": "user", "content": text}], [], message_of(calling(text)))
    assert chat.lost_in_rendering([USER], [tool({"type": "string"})], calling(text)) == ""
    end = chat.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end not in prompt and end not in answer
    assert text in chat.tokenizer.decode(prompt)


def test_a_template_that_never_ends_on_a_schema_refuses_that_state_alone() -> None:
    chat = chat_of("endless")
    chat.render([USER], [tool({"type": "string"})], True)
    with pytest.raises(UnrenderableState, match="calls itself without an end"):
        chat.render([USER], [tool({"$ref": "#/$defs/o"})], True)


def test_a_template_without_calls_is_told_apart_from_one_that_nobody_reads() -> None:
    with pytest.raises(InputError, match="tool calls, left out by the template"):
        chat_of("no calls")
    with pytest.raises(InputError, match="no parser reads"):
        Chat(tokenizer_with(template("closed").replace("<tool_call>", "<unknown>")))


@pytest.mark.parametrize(("name", "told"), [("drops reasoning", ""), ("closed", "1 of 1 turns have reasoning, which")])
def test_training_tells_whether_reasoning_is_in_its_turns(name: str, told: str) -> None:
    found = _about_reasoning([True], chat_of(name))
    assert found.startswith(told) and bool(found) == bool(told)
