"""Our parsers beside vLLM's own, on texts of real chat templates and on damaged ones."""

import json
import logging
import random
from collections.abc import Iterator
from typing import Any

import pytest
from support.own_templates import CALLS
from support.template_cases import LINES, MALFORMED, SHAPES, USER, calling, template, tokenizer_with, tool
from transformers import PreTrainedTokenizerFast
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest, ChatCompletionToolsParam
from vllm.tool_parsers import ToolParserManager

from nemo_pivotrl.core.errors import UnrenderableState
from nemo_pivotrl.data.chat_template import Chat
from nemo_pivotrl.data.gym_rows import message_of

FAMILIES = {
    "qwen3": "hermes",
    "nemotron_3_super": "qwen3_coder",
    "qwen3_5_think": "qwen3_coder",
    "glm4moe": "glm47",
    "llama3_1": "llama3_json",
    "deepseekv3": "deepseek_v3",
    "gemma4_v5": "gemma4",
    "lfm2_v2": "lfm2",
    "mistral_v3": "mistral",
    "mistral_v7": "mistral",
    "mistral_v13": "mistral",
    **{name: name for name in CALLS if name not in ("nemotron_json", "phi4_mini", "phi4_mini_json", "cohere_command3")},
}
"""Template -> vLLM's parser for the model. Of the forms in `CALLS` two have none there, that of `functools` ends a list at the first
bracket inside it, and Cohere's reads tokens."""
OURS_ALONE = ("$ref", "allOf", "const", "properties")
"""Schemas whose types vLLM does not see at the top; it makes text of every value of theirs."""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)  # vLLM tells of every malformed call with a traceback
    yield
    logging.disable(logging.NOTSET)


def chat_of(name: str) -> Chat:
    """The template on a tokenizer with the tokens by which vLLM tells Mistral's versions apart."""
    marks = {"mistral_v11": ("[ARGS]",), "mistral_v13": ("[ARGS]", "[THINK]", "[/THINK]")}
    return Chat(tokenizer_with(template(name), *marks.get(name, ())))


def theirs(
    name: str, tokenizer: PreTrainedTokenizerFast, text: str, tools: list[dict[str, Any]]
) -> list[tuple[str, Any]]:
    """The calls that vLLM reads; arguments that are no JSON as text."""
    parser = ToolParserManager.get_tool_parser(name)(tokenizer, [ChatCompletionToolsParam(**t) for t in tools])
    request = ChatCompletionRequest(
        messages=[USER], tools=tools, model="m", chat_template_kwargs={"enable_thinking": False}
    )
    found = parser.extract_tool_calls(text, request)
    return [(call.function.name, _json(call.function.arguments)) for call in found.tool_calls]


def _apart(text: str) -> bool:
    """Whether vLLM reads it otherwise by design: it takes `None` and nested nulls for text, and end markers out of any text."""
    return any(piece in text for piece in ("None", "</think>", "</s>", "{z:null}"))


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def texts_of(chat: Chat) -> Iterator[tuple[str, list[dict[str, Any]], str]]:
    """(text of an answer without reasoning, tools, kind of schema) for every shape that the template writes."""
    for schema, value in [*SHAPES, *LINES]:
        for count in (1, 2):
            try:
                turn = chat.turn(
                    [USER], [tool(schema)] if chat.parser != "deepseek" else [], message_of(calling(value, count))
                )
            except UnrenderableState:
                continue
            ids = chat.template.encode(turn.text)
            end = next((n for n, token in enumerate(ids) if token in chat.stop_ids), len(ids))
            text = chat.decode(ids[:end])
            yield (
                text.rpartition(chat.reasoning.ends)[2] if chat.reasoning.ends and value != "a </think> b" else text,
                [tool(schema)],
                next((key for key in OURS_ALONE if key in schema and schema.get("type") != "object"), ""),
            )


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_template_writes_is_read_as_vllm_reads_it(name: str) -> None:
    chat = chat_of(name)
    compared = 0
    for text, tools, kind in texts_of(chat):
        if kind or _apart(text):
            continue
        ours = chat.parse(text, tools, opened=False)
        read = [(call.name, json.loads(call.arguments)) for call in ours.calls]
        expected = theirs(FAMILIES[name], chat.tokenizer, text, tools)
        assert read == expected, text
        compared += 1
    assert compared > 30


@pytest.mark.parametrize("name", FAMILIES)
def test_a_damaged_call_is_malformed_or_what_vllm_reads(name: str) -> None:
    """And where we read talk, vLLM reads no call: an answer that a server acts on never passes as words."""
    chat, rng = chat_of(name), random.Random(name)
    texts = [(text, tools) for text, tools, kind in texts_of(chat) if not kind and not _apart(text)]
    damaged = [(text, [tool({"type": "integer"})]) for text in MALFORMED[chat.parser]]
    for _ in range(400):
        text, tools = rng.choice(texts)
        start = rng.randrange(len(text))
        damaged.append((text[:start] + rng.choice(["", "x", " ", "\n"]) + text[start + rng.randrange(12) :], tools))
    kinds = {"calls": 0, "message": 0, "malformed": 0, "none": 0}
    for text, tools in damaged:
        ours = chat.parse(text, tools, opened=False)
        kinds[ours.kind] += 1
        if ours.kind in ("calls", "message"):
            read = [(call.name, json.loads(call.arguments)) for call in ours.calls]
            assert read == theirs(FAMILIES[name], chat.tokenizer, text, tools), (ours.kind, text)
    assert kinds["malformed"] > 20 and kinds["calls"] > 5, kinds


@pytest.mark.parametrize("name", ["mistral_v2", "mistral_v3", "mistral_v7", "mistral_v11", "mistral_v13"])
def test_the_templates_of_mistral_read_every_action_back(name: str) -> None:
    chat, tried = chat_of(name), 0
    for schema, value in [*SHAPES, *LINES]:
        for action in (calling(value), calling(value, 2), calling(value, 1, "It is so.")):
            assert chat.lost_in_rendering([USER], [tool(schema)], action) == ""
            tried += 1
    assert tried == 3 * len([*SHAPES, *LINES]) and bool(chat.reasoning.begins) == (name == "mistral_v13")
