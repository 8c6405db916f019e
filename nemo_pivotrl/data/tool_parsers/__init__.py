"""Readers of the ways in which models write tool calls. One name each, which is a chat template's `policy.tool_parser`.

A reader is given an answer without its reasoning and returns the text beside the calls and the calls. It reads what the
vLLM parser of that family reads, and raises ValueError for what is malformed: what begins as a call and is none, also where
a server would mend it, because a mended call is not what the policy wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from nemo_pivotrl.core.types import ToolCall
from nemo_pivotrl.data.tool_parsers.json_calls import (
    harmony_reasoning,
    read_deepseek,
    read_harmony,
    read_hermes,
    read_llama_json,
    read_mistral,
)
from nemo_pivotrl.data.tool_parsers.listed_calls import by_name, cohere, listed, read_kimi, read_phi, read_xlam
from nemo_pivotrl.data.tool_parsers.literal_calls import read_gemma4, read_lfm2, read_pythonic
from nemo_pivotrl.data.tool_parsers.xml_calls import invoked, read_glm, read_qwen_coder

Read = Callable[[str, Sequence[Mapping[str, Any]]], tuple[str, list[ToolCall]]]


class ToolParser(NamedTuple):
    """One way of writing tool calls."""

    read: Read
    begins: str
    """Text that begins a call, or the first of several."""
    ends: str
    """Text that ends them; '' where they last to the turn's end."""
    vllm: tuple[str, ...]
    """Names of vLLM's parsers of this family; they are accepted as names of this one."""
    reasoning: Callable[[str], str] | None = None
    """The reasoning in an answer, where calls and reasoning are channels of one syntax and the reader itself drops it."""


COHERE_TEXT = ("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>")
"""Markers around the words of an answer of Cohere's models."""
PARSERS: dict[str, ToolParser] = {
    "hermes": ToolParser(read_hermes, "<tool_call>", "</tool_call>", ("qwen3_json",)),
    "qwen_coder": ToolParser(read_qwen_coder, "<tool_call>", "</tool_call>", ("qwen3_coder", "qwen3_xml")),
    "glm": ToolParser(read_glm, "<tool_call>", "</tool_call>", ("glm45", "glm47")),
    "mistral": ToolParser(read_mistral, "[TOOL_CALLS]", "", ()),
    "deepseek": ToolParser(
        read_deepseek, "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", ("deepseek_v3", "deepseek_v31")
    ),
    "gemma4": ToolParser(read_gemma4, "<|tool_call>", "<tool_call|>", ()),
    "lfm2": ToolParser(read_lfm2, "<|tool_call_start|>", "<|tool_call_end|>", ()),
    "harmony": ToolParser(
        read_harmony, "<|start|>assistant to=functions.", "<|call|>", ("openai",), reasoning=harmony_reasoning
    ),
    "nemotron_json": ToolParser(listed("<TOOLCALL>", "</TOOLCALL>"), "<TOOLCALL>", "</TOOLCALL>", ()),
    "kimi_k2": ToolParser(read_kimi, "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", ()),
    "minimax_m2": ToolParser(invoked("", "minimax:tool_call"), "<minimax:tool_call>", "</minimax:tool_call>", ()),
    "deepseek_v32": ToolParser(
        invoked("｜DSML｜", "｜DSML｜function_calls", "｜DSML｜tool_calls"),
        "<｜DSML｜",
        "_calls>",
        ("deepseek_v4",),
    ),
    "jamba": ToolParser(
        listed("<tool_calls>", "</tool_calls>", stops=True), "<tool_calls>", "</tool_calls>", ("hunyuan_a13b",)
    ),
    "phi4_mini": ToolParser(read_phi, "<|tool_call|>", "<|/tool_call|>", ()),
    "granite": ToolParser(listed("<|tool_call|>"), "<|tool_call|>", "", ()),
    "functools": ToolParser(listed("functools"), "functools", "", ("phi4_mini_json",)),
    "apertus": ToolParser(
        listed("<|tools_prefix|>", "<|tools_suffix|>", by_name, stops=True), "<|tools_prefix|>", "<|tools_suffix|>", ()
    ),
    "cohere": ToolParser(
        listed("<|START_ACTION|>", "<|END_ACTION|>", cohere, COHERE_TEXT, stops=True),
        "<|START_ACTION|>",
        "<|END_ACTION|>",
        ("cohere_command3", "cohere_command4"),
    ),
    "llama_json": ToolParser(read_llama_json, '{"name":', "", ("llama3_json", "llama4_json")),
    "xlam": ToolParser(read_xlam, '[{"name":', "", ()),
    "pythonic": ToolParser(read_pythonic, "[", "", ("llama4_pythonic",)),
}
"""By name, in the order in which a template's own call is tried on them."""

NAMES = {**{name: name for name in PARSERS}, **{other: name for name, p in PARSERS.items() for other in p.vllm}}
"""Every name that a recipe may give to the parser it means."""
