"""Chat templates as they ship in installed packages, a tokenizer for any of them, and calls of every shape of schema.

The templates are read where they are installed (`trl/chat_templates`, transformers), never copied. Shared by the tests of both
environments.
"""

import importlib.util
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nemo_pivotrl.core.types import Action, ToolCall
from support import own_templates

SPECIAL = (
    "<|im_start|> <|im_end|> <s> </s> <|eot_id|> <|start_header_id|> <|end_header_id|> <|python_tag|> <|eot|> <|user|> "
    "<|assistant|> <|observation|> <|system|> <|end|> <start_of_turn> <end_of_turn> <|start|> <|message|> <|channel|> <|call|> "
    "<|return|> <｜User｜> <｜Assistant｜> <｜end▁of▁sentence｜> <|turn> <turn|> <|END_OF_TURN_TOKEN|>"
).split()
ADDED = (
    "<think> </think> <tool_call> </tool_call> [TOOL_CALLS] <｜tool▁calls▁begin｜> <｜tool▁calls▁end｜> <｜tool▁call▁begin｜> "
    "<｜tool▁call▁end｜> <｜tool▁sep｜> <|tool_call> <tool_call|> <|tool_response> <|channel> <channel|> <|tool_call_start|> "
    "<|tool_call_end|> <TOOLCALL> </TOOLCALL> <|tool_calls_section_begin|> <|tool_calls_section_end|> <|tool_call_begin|> "
    "<|tool_call_argument_begin|> <minimax:tool_call> </minimax:tool_call> <｜DSML｜function_calls> </｜DSML｜function_calls> "
    "<｜DSML｜tool_calls> </｜DSML｜tool_calls> <tool_calls> </tool_calls> <|tool_call|> <|/tool_call|> <|tools_prefix|> "
    "<|tools_suffix|> <|START_ACTION|> <|END_ACTION|>"
).split()
USER = {"role": "user", "content": "where is order 7"}


def template(name: str) -> str:
    """A chat template by its file name in TRL, `llama4` of transformers, `mistral_vN` of mistral-common, or one of ours."""
    if name in own_templates.OWN:
        return own_templates.OWN[name]
    if name.startswith("mistral_v"):
        from mistral_common.integrations.chat_templates.chat_templates import generate_chat_template
        from mistral_common.tokens.tokenizers.base import TokenizerVersion

        version = TokenizerVersion(name.removeprefix("mistral_"))
        media = {"image_support": False, "audio_support": False, "use_special_token_variables": True}
        effort = {"model_settings_fields": None, "reasoning_effort_values": None, "reasoning_effort_default": None}
        thinking = {"thinking_support": version >= TokenizerVersion.v13, "plain_thinking_support": False}
        return generate_chat_template(
            spm=version <= TokenizerVersion.v3,
            tokenizer_version=version,
            default_system_prompt=None,
            **media,
            **effort,
            **thinking,
        )
    if name == "llama4":
        from transformers.models.llama4.processing_llama4 import chat_template

        return chat_template
    spec = importlib.util.find_spec("trl")
    assert spec and spec.submodule_search_locations, "pip install --no-deps trl: its chat templates are what is tested"
    return Path(spec.submodule_search_locations[0], "chat_templates", f"{name}.jinja").read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def _base() -> str:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["the order of the user has shipped to the user"] * 4, trainer)
    return bpe.to_str()


def tokenizer_with(chat_template: str, *more: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer in which the markers of every family are tokens, and `more` of them."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_base()), eos_token="</s>", bos_token="<s>", pad_token="</s>"
    )
    made.add_tokens([AddedToken(text, special=False, normalized=False) for text in [*ADDED, *more]])
    made.chat_template = chat_template
    return made


def optional(kind: str) -> dict[str, Any]:
    """What pydantic writes of Optional[kind]."""
    return {"anyOf": [{"type": kind}, {"type": "null"}]}


SHAPES: list[tuple[dict[str, Any], Any]] = [
    ({"type": "boolean"}, True),
    ({"type": "boolean"}, False),
    ({"type": "integer"}, 4),
    ({"type": "integer"}, -7),
    ({"type": "number"}, 2.5),
    ({"type": "number"}, 3),
    ({"type": "number"}, 1e-7),
    ({"type": "string"}, "two words"),
    ({"type": "string"}, ""),
    ({"type": "string"}, "94105"),
    ({"type": "string"}, "true"),
    ({"type": "string"}, "null"),
    ({"type": "string"}, "größe 😀"),
    ({"type": "string"}, '{"a": 1}'),
    ({"type": "string"}, "a </think> b"),
    ({"type": "string"}, "<think>"),
    ({"type": "string"}, "<tool_call> x"),
    ({"type": "string"}, "a<|im_end|>b</s>"),
    ({"type": "null"}, None),
    ({"type": ["string", "null"]}, "94105"),
    ({"type": ["string", "null"]}, None),
    ({"type": ["integer", "null"]}, None),
    ({"enum": [1, 2]}, 1),
    ({"enum": ["a", "b"]}, "a"),
    ({"type": "string", "enum": ["1", "2"]}, "1"),
    ({"const": 5}, 5),
    (optional("integer"), 3),
    (optional("integer"), None),
    (optional("number"), 2.5),
    (optional("boolean"), False),
    (optional("string"), "x"),
    (optional("string"), None),
    (optional("array"), ["a"]),
    (optional("array"), None),
    ({"$ref": "#/$defs/o"}, {"a": 1, "b": [True, None]}),
    ({"allOf": [{"$ref": "#/$defs/o"}]}, {"a": 2}),
    ({"type": "object", "properties": {"a": {"type": "integer"}}}, {"a": 1}),
    ({"type": "object"}, {}),
    ({"type": "object"}, {"x": {"y": [{"z": None}]}}),
    ({"properties": {"a": {}}}, {"a": 1}),
    ({"type": "array", "items": {"type": "integer"}}, [1, 2]),
    ({"type": "array"}, []),
    ({"type": "array", "items": {"type": "object"}}, [{"a": "b"}, {}]),
    ({"type": "array", "items": {"type": "string"}}, ["a", "1"]),
    ({}, "text"),
]
"""(schema of parameter x, its value)."""
LINES: list[tuple[dict[str, Any], Any]] = [
    ({"type": "string"}, "a\nb\n"),
    ({"type": "string"}, "\n x \n"),
    ({"type": "string"}, 'it\'s "so" \\n'),
]
"""Texts of several lines and quotes, which LFM2.5's first template writes as they are into Python literals."""


def tool(schema: dict[str, Any]) -> dict[str, Any]:
    """A tool `f` with the parameter x."""
    parameters = {
        "type": "object",
        "properties": {"x": schema, "y": {"type": "string"}},
        "$defs": {"o": {"type": "object"}},
    }
    return {"type": "function", "function": {"name": "f", "description": "does f", "parameters": parameters}}


def calling(value: Any, count: int = 1, reasoning: str = "") -> Action:
    """`count` calls f(x=value)."""
    return Action("calls", "", (ToolCall("f", json.dumps({"x": value})),) * count, reasoning=reasoning)


MALFORMED = {
    "qwen_coder": [
        "<tool_call>",
        "<tool_call></tool_call>",
        "<tool_call>\n<function>f\n</function>\n</tool_call>",
        "<tool_call>\n<function f>\n</function>\n</tool_call>",
        "<tool_call>\n<function=>\n</function>\n</tool_call>",
        "<tool_call>\n<function=f\n</function>\n</tool_call>",
        "<tool_call>\nso: <function=f>\n</function>\n</tool_call>",
        "<tool_call>\n<function=f>\n</function>\nso\n</tool_call>",
        "<tool_call>\n<function=f>\n</function>\n<function=f>\n</function>\n</tool_call>",
        "<tool_call>\n<function=f>\nso\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>",
        "<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\nso\n</function>\n</tool_call>",
        "<tool_call>\n<function=f>\n<parameter x>\n1\n</parameter>\n</function>\n</tool_call>",
        "<tool_call>\n<function=f>\n<parameter=x>\n1\n</function>\n</tool_call>",
        "<tool_call>\n<function=f>\n<parameter=x>\n1\n<parameter=y>\n2\n</parameter>\n</function>\n</tool_call>",
        "<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n<parameter=x>\n2\n</parameter>\n</function>\n</tool_call>",
        "<tool_call>\n<function=f>\n</function>",
        "<function=f>\n<parameter=x>\n1\n</parameter>",
        "text </tool_call>",
        '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
    ],
    "hermes": [
        "<tool_call>",
        "<tool_call>{}</tool_call>",
        "<tool_call>[1]</tool_call>",
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "x"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {}}',
        '<tool_call>so {"name": "f", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {}} {"name": "f", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": 1e999}}</tool_call>',
        "<tool_call>\n<function=f>\n</function>\n</tool_call>",
        "text </tool_call>",
    ],
    "glm": [
        "<tool_call></tool_call>",
        "<tool_call>f g\n</tool_call>",
        "<tool_call>f\n<arg_key>x</arg_key>\n</tool_call>",
        "<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>1\n</tool_call>",
        "<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>1</arg_value>\nso</tool_call>",
        "<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>1</arg_value>",
        "text </arg_value>",
    ],
    "llama_json": [
        '{"name": "f", "parameters": {"x": 1}',
        '{"name": "f", "parameters": [1]}',
        'Sure. {"name": "f", "parameters": {"x": 1}}',
        '{"name": "f", "parameters": {"x": 1}} Done.',
        '{"name": "f", "parameters": {}}; {"x": 1}',
    ],
    "mistral": [
        "[TOOL_CALLS]",
        "[TOOL_CALLS][]",
        "[TOOL_CALLS]f",
        '[TOOL_CALLS]{"x": 1}',
        '[TOOL_CALLS][{"name": "f", "arguments": {}}] so',
        '[TOOL_CALLS][{"arguments": {}}]',
        "[TOOL_CALLS]f[ARGS]{} so",
    ],
    "deepseek": [
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁begin｜><｜tool▁calls▁end｜>",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{}\n```<｜tool▁call▁end｜>",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "<｜tool▁calls▁begin｜>so<｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ],
    "gemma4": [
        "<|tool_call>f{x:1}<tool_call|>",
        "<|tool_call>call:f{x:1}",
        "<|tool_call>call:f{x:1<tool_call|>",
        '<|tool_call>call:f{x:<|"|>a}<tool_call|>',
        "<|tool_call>call:f{x:1}so<tool_call|>",
        "text <tool_call|>",
    ],
    "lfm2": [
        "<|tool_call_start|>[f(x=1)]",
        "<|tool_call_start|>f(x=1)<|tool_call_end|>",
        "<|tool_call_start|>[]<|tool_call_end|>",
        "<|tool_call_start|>[f(1)]<|tool_call_end|>",
        "<|tool_call_start|>[f(x=g())]<|tool_call_end|>",
        "<|tool_call_start|>[f(x=__import__('os'))]<|tool_call_end|>",
    ],
    "harmony": [
        "<|channel|>analysis<|message|>thinking",
        "<|channel|>analysis<|message|>thinking<|end|>",
        "<|channel|>elsewhere<|message|>text",
        " to=functions.f<|channel|>commentary json<|message|>{",
        " to=functions.f<|channel|>commentary json<|message|>[1]",
    ],
    "pythonic": ["[f(x=1)", "[f(1)]", "[f(x=y)]"],
    **own_templates.MALFORMED,
}
"""Answers that begin as a call or as reasoning and are none, by parser."""
