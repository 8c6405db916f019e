"""Rendering and reading back through templates of the four common shapes, found by probing and not by name."""

# ruff: noqa: E501
import json
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from support.recipes import ROOT
from transformers import PreTrainedTokenizerFast

from nemo_pivotrl.config import Limits
from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.data import chat_template as chat
from nemo_pivotrl.data.chat_template import Chat
from nemo_pivotrl.data.gym_rows import action_of
from nemo_pivotrl.data.template_probes import Reasoning
from nemo_pivotrl.data.tool_parsers import PARSERS
from nemo_pivotrl.demo import tiny_models as tiny

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "find",
            "description": "d",
            "parameters": {
                "type": "object",
                "properties": {"text": {"type": "string"}, "n": {"type": "integer"}, "flag": {"type": "boolean"}},
            },
        },
    }
]
HEAD = (
    "{%- for m in messages -%}<|im_start|>{{ m.role }}\n{% if loop.first and tools %}{{ tools | tojson }}\n{% endif -%}"
)
TAIL = "<|im_end|>\n{% endfor -%}{%- if add_generation_prompt -%}<|im_start|>assistant\n"
THINK = "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif -%}"
HERMES = (
    "{{ m.content }}{%- for c in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor -%}'
)
CODER = (
    "{{ m.content }}{%- for c in m.tool_calls or [] %}\n<tool_call>\n<function={{ c.function.name }}>\n"
    "{%- for k, v in c.function.arguments.items() %}\n<parameter={{ k }}>\n{{ v if v is string else v | tojson }}\n</parameter>{% endfor %}\n"
    "</function>\n</tool_call>{% endfor -%}"
)
MISTRAL = (
    "{{ m.content }}{%- if m.tool_calls %}[TOOL_CALLS][{% for c in m.tool_calls %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}{{ ", " if not loop.last }}{% endfor %}]{% endif -%}'
)
LLAMA = (
    '{%- if m.tool_calls %}{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "{% else %}{{ m.content }}{% endif -%}"
)
TEMPLATES = {
    "hermes": HEAD + HERMES + TAIL + "{%- endif -%}",
    "qwen_coder": HEAD + CODER + TAIL + "{%- endif -%}",
    "mistral": HEAD + MISTRAL + TAIL + "{%- endif -%}",
    "llama_json": HEAD + LLAMA + TAIL + "{%- endif -%}",
}
STATE = [{"role": "system", "content": "s"}, {"role": "user", "content": "a question?"}]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    made = tiny.make_tokenizer(["some text to learn from, with words and digits 0123456789"], 400)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return made


def with_template(tokenizer: PreTrainedTokenizerFast, template: str, **settings: object) -> Chat:
    tokenizer.chat_template = template
    return Chat(tokenizer, **settings)


def calling(**arguments: object) -> dict[str, object]:
    call = {"id": "call_1", "type": "function", "function": {"name": "find", "arguments": json.dumps(arguments)}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_parser_and_the_end_of_turn_are_found_and_a_call_comes_back(
    tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    made = with_template(tokenizer, TEMPLATES[name])
    assert made.parser == name
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in made.stop_ids
    message = calling(text="two words", n=3, flag=True)
    ids = made.action_ids(STATE, TOOLS, message)
    assert ids[-1] in made.stop_ids and not any(i in made.stop_ids for i in ids[:-1])
    found = made.parse(made.decode(ids), TOOLS)
    assert [(c.name, json.loads(c.arguments)) for c in found.calls] == [
        ("find", {"text": "two words", "n": 3, "flag": True})
    ]


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_and_action_ids_join_to_the_rendering_of_the_whole(
    tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    made = with_template(tokenizer, TEMPLATES[name])
    message = {"role": "assistant", "content": "an answer."}
    joined = [*made.prompt_ids(STATE, TOOLS), *made.action_ids(STATE, TOOLS, message)]
    whole = made.render([*STATE, message], TOOLS, add_generation_prompt=False)
    assert tokenizer.decode(joined) == whole.rstrip("\n")


def test_reasoning_is_dropped_before_the_verifier_and_unfinished_reasoning_is_no_action(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    made = with_template(tokenizer, HEAD + THINK + HERMES + TAIL + "{%- endif -%}")
    assert made.reasoning.ends == "</think>" and not made.reasoning.opened
    text = '<think>\n<tool_call>{"name": "wrong", "arguments": {}}</tool_call>\n</think>\n\nhello'
    assert made.parse(text) == action_of({"role": "assistant", "content": "hello"})
    always = "{% if m.role == 'assistant' %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif -%}"
    opened = with_template(tokenizer, HEAD + always + HERMES + TAIL + "<think>\n{%- endif -%}")
    assert opened.reasoning.opened
    assert opened.parse("still thinking").kind == "none"
    assert opened.parse("done</think>\n\nhello").content == "hello"


def test_a_template_without_tool_calls_is_refused_with_the_remedy(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match=r"(?s)policy\.tool_parser.*policy\.chat_template"):
        with_template(tokenizer, HEAD + "{{ m.content }}" + TAIL + "{%- endif -%}")


def test_a_template_whose_turn_does_not_begin_with_its_own_prompt_is_refused(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    made = with_template(tokenizer, TEMPLATES["hermes"])
    tokenizer.chat_template = HEAD + HERMES + TAIL + "EXTRA{%- endif -%}"
    with pytest.raises(InputError, match="template_kwargs"):
        made.turn(STATE, TOOLS, {"role": "assistant", "content": "x"})


def test_fingerprint_changes_with_the_vocabulary_and_not_with_the_template(tokenizer: PreTrainedTokenizerFast) -> None:
    first = with_template(tokenizer, TEMPLATES["hermes"])
    second = with_template(tokenizer, TEMPLATES["mistral"])
    assert first.fingerprint == second.fingerprint and first.template_digest != second.template_digest
    assert chat.fingerprint(tiny.make_tokenizer(["other words"], 400)) != first.fingerprint


def test_a_turn_that_ends_with_a_line_break_before_its_marker_does_not_stop_at_line_breaks(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    made = with_template(tokenizer, HEAD + HERMES + "\n" + TAIL + "{%- endif -%}")
    ids = made.action_ids(STATE, TOOLS, {"role": "assistant", "content": "one\ntwo"})
    assert made.decode(ids).strip() == "one\ntwo"
    assert not any(tokenizer.decode([i]).isspace() for i in made.stop_ids)


def test_parallel_calls_and_text_before_them(tokenizer: PreTrainedTokenizerFast) -> None:
    made = with_template(tokenizer, TEMPLATES["hermes"])
    found = made.parse(
        'first <tool_call>{"name": "a", "arguments": {}}</tool_call><tool_call>{"name": "b", "arguments": "{}"}</tool_call>'
    )
    assert found.content == "first" and [c.name for c in found.calls] == ["a", "b"]


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>",
        "<tool_call>{}</tool_call>",
        "<tool_call>[1]</tool_call>",
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {}}',
        "<tool_call>" + "[" * 100_000 + "</tool_call>",
        '<tool_call>{"name": "f", "arguments": {}}</tool_call>' * (Limits().max_calls + 1),
        "x" * (Limits().max_chars + 1),
    ],
)
def test_unreadable_calls_are_malformed(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert with_template(tokenizer, TEMPLATES["hermes"]).parse(text).kind == "malformed"


@given(
    st.text(max_size=80),
    st.sampled_from(["", "<tool_call>", "<function=f>", "[TOOL_CALLS][", '{"name": "f", "parameters": ']),
    st.sampled_from(list(PARSERS)),
)
@settings(max_examples=300, deadline=None)
def test_parsing_never_raises(text: str, start: str, name: str) -> None:
    reader = Chat.__new__(Chat)
    reader.limits = Limits()
    reader.parser, reader.reasoning = name, Reasoning("<think>", "</think>", False)
    assert reader.parse(start + text + "</tool_call>", TOOLS).kind in ("message", "calls", "malformed", "none")


def test_the_recipes_template_renders_tools_and_reads_calls_back(tokenizer: PreTrainedTokenizerFast) -> None:
    made = with_template(tokenizer, Path(ROOT, "recipes/pivotrl/templates/chatml-tools.jinja").read_text())
    assert made.parser == "hermes"
    assert "find(text: string, n: integer, flag: boolean)" in made.render(STATE, TOOLS, add_generation_prompt=True)
    ids = made.action_ids(STATE, TOOLS, calling(n=1))
    assert json.loads(made.parse(made.decode(ids)).calls[0].arguments) == {"n": 1}
