"""From messages to token ids and back, always through the model's own chat template.

Nothing here knows a template's markers. Where an assistant turn begins and ends, where its reasoning ends and how it
writes tool calls are found by rendering probes with the template and looking at what comes out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_pivotrl.config import Limits
from nemo_pivotrl.core import model_folder
from nemo_pivotrl.core.artifacts import digest
from nemo_pivotrl.core.errors import InputError, Problem, short
from nemo_pivotrl.core.types import Action, Message, ToolCall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "probe",
        "parameters": {"type": "object", "properties": {"key": {"type": "string"}, "number": {"type": "integer"}}},
    },
}
_PROBE_ARGUMENTS = {"key": "two words", "number": 7}


def load_tokenizer(path: str, chat_template: str | None = None, section: str = "policy") -> PreTrainedTokenizerBase:
    """The tokenizer at `path` (an HF folder); `chat_template` is a Jinja file that replaces its template.
    `section` is the recipe's section that names both, for errors.

    Raises InputError when there is no tokenizer or it has no chat template.
    """
    remedy = "give an HF checkpoint folder" + (", or run the warmup stage first" if section == "policy" else "")
    tokenizer = model_folder.load_tokenizer(path, f"{section}.model_name", remedy)
    if chat_template is not None:
        tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
    if not tokenizer.chat_template:
        raise InputError(
            Problem(
                path,
                None,
                f"{section}.chat_template",
                "a tokenizer without a chat template",
                f"set {section}.chat_template to a Jinja file",
            )
        )
    return tokenizer


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of vocabulary, merges, normaliser and special tokens: equal iff token ids mean the same."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = json.loads(backend.to_str()) if backend is not None else sorted(tokenizer.get_vocab().items())
    if isinstance(content, dict):
        content.pop("padding", None)
        content.pop("truncation", None)
    return digest(content)


def _template_calls(message: Message) -> Message:
    """Templates want a call's arguments as a mapping; records keep the text the model wrote."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = dict(call["function"])
        try:
            parsed = json.loads(function["arguments"])
        except ValueError:
            parsed = None
        if isinstance(parsed, dict):
            function["arguments"] = parsed
        calls.append({**call, "function": function})
    return {**message, "content": message.get("content") or "", "tool_calls": calls}


class Chat:
    """One tokenizer with its template: renders states, actions, and reads sampled actions back.

    `parser` names how the template writes tool calls (`PARSERS`); `auto` finds out by rendering a probe call and taking
    the parser that reads it back. A template that cannot render a tool call gets an error, not a guess.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        parser: str = "auto",
        template_kwargs: dict[str, Any] | None = None,
        limits: Limits | None = None,
    ):
        self.limits = limits or Limits()
        self.tokenizer = tokenizer
        self.template_kwargs = template_kwargs or {}
        self.fingerprint = fingerprint(tokenizer)
        self.template_digest = digest([tokenizer.chat_template, self.template_kwargs])
        self.reasoning_start, self.reasoning_end, self.opens_reasoning = self._probe_reasoning()
        self.stop_ids = self._probe_stop_ids()
        self.parser = self._probe_parser() if parser == "auto" else parser
        if self.parser not in PARSERS:
            raise InputError(
                Problem("recipe", None, "policy.tool_parser", self.parser, f"use one of auto, {', '.join(PARSERS)}")
            )

    def render(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], add_generation_prompt: bool) -> str:
        """The template's text for `messages`."""
        return self.tokenizer.apply_chat_template(
            [_template_calls(m) for m in messages],
            tools=list(tools) or None,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **self.template_kwargs,
        )

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> list[int]:
        """Token ids of the state, up to where the policy starts to write."""
        return self.encode(self.render(messages, tools, add_generation_prompt=True))

    def action_text(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], action: Message) -> str:
        """What the template writes for assistant message `action` after the state, end-of-turn marker included."""
        prompt = self.render(messages, tools, add_generation_prompt=True)
        full = self.render([*messages, action], tools, add_generation_prompt=False)
        if not full.startswith(prompt):
            raise InputError(
                Problem(
                    "chat template",
                    None,
                    "assistant turn",
                    short(full[len(prompt) - 40 :]),
                    "the template writes an assistant turn that does not begin with its own generation prompt; "
                    "set policy.template_kwargs (for example enable_thinking: false) or policy.chat_template",
                )
            )
        return full[len(prompt) :]

    def action_ids(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], action: Message) -> list[int]:
        """Token ids of an expert action: from the first token the policy would write to its end-of-turn token."""
        ids = self.encode(self.action_text(messages, tools, action))
        for index, token in enumerate(ids):
            if token in self.stop_ids:
                return ids[: index + 1]
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a sampled action without its end-of-turn token."""
        ids = list(token_ids)
        if ids and ids[-1] in self.stop_ids:
            ids.pop()
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def parse(self, text: str, tools: Sequence[dict[str, Any]] = ()) -> Action:
        """The action in generated `text`: reasoning dropped, tool calls read. Never raises: text is data."""
        if len(text) > self.limits.max_chars:
            return Action("malformed", detail=f"longer than {self.limits.max_chars} characters")
        if self.reasoning_end and self.reasoning_end in text:
            text = text.rpartition(self.reasoning_end)[2]
        elif self.opens_reasoning:
            return Action("none", detail="reasoning never ended")
        try:
            content, calls = PARSERS[self.parser](text, tools)
        except (ValueError, RecursionError) as error:
            return Action("malformed", content=text, detail=short(str(error)))
        if len(calls) > self.limits.max_calls:
            return Action(
                "malformed", content=text, detail=f"{len(calls)} calls, at most {self.limits.max_calls} are read"
            )
        if calls:
            return Action("calls", content=content.strip(), calls=tuple(calls))
        return Action("message", content=content.strip()) if content.strip() else Action("none")

    def markers(self, piece: str) -> tuple[str, str]:
        """Text that begins and that ends a `reasoning` or `tool_calls` piece of an answer; '' for an end: the turn's end.

        Raises InputError where the template has no such piece.
        """
        found = (self.reasoning_start, self.reasoning_end) if piece == "reasoning" else CALL_MARKERS[self.parser]
        if not found[0]:
            problem = Problem("chat template", None, piece, "no marker", "drop it, or name the markers in off_markers")
            raise InputError(problem)
        return found

    def _probe(self, **fields: Any) -> str:
        user: Message = {"role": "user", "content": "probe question"}
        return self.render(
            [user, {"role": "assistant", "content": "", **fields}], [_PROBE_TOOL], add_generation_prompt=False
        )

    def _probe_stop_ids(self) -> frozenset[int]:
        """End of an assistant turn: the first marker after the content, and the tokenizer's own end of text."""
        suffix = self.encode(self._probe(content="PROBECONTENT").rpartition("PROBECONTENT")[2])
        special = [i for i in suffix if i in self.tokenizer.all_special_ids or i in self.tokenizer.added_tokens_decoder]
        # a template without a marker of its own ends a turn with text: its first token that is more than white space
        found = special[:1] or [i for i in suffix if self.tokenizer.decode([i]).strip()][:1]
        eos = [self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else []
        if not found and not eos:
            raise InputError(
                Problem(
                    "chat template",
                    None,
                    "end of turn",
                    "neither a marker nor an eos token",
                    "use a template that ends assistant turns",
                )
            )
        return frozenset([*found, *eos])

    def _probe_reasoning(self) -> tuple[str, str, bool]:
        """The markers around reasoning ('' where the template has none) and whether the generation prompt opens it."""
        text = self._probe(content="PROBECONTENT", reasoning_content="PROBEREASON")
        if "PROBEREASON" not in text:
            return "", "", False
        between = text.partition("PROBEREASON")[2].partition("PROBECONTENT")[0].strip()
        prompt = self.render([{"role": "user", "content": "q"}], [_PROBE_TOOL], add_generation_prompt=True)
        bare = self._probe(content="PROBECONTENT")
        start = text.partition("PROBEREASON")[0].rstrip()
        marker = start[len(bare.partition("PROBECONTENT")[0].rstrip()) :].strip() or start.rsplit(None, 1)[-1]
        return marker, between, prompt.rstrip().endswith(marker) and marker != ""

    def _probe_parser(self) -> str:
        call = {
            "id": "call00000",
            "type": "function",
            "function": {"name": "probe_tool", "arguments": json.dumps(_PROBE_ARGUMENTS)},
        }
        user: Message = {"role": "user", "content": "probe question"}
        from jinja2 import TemplateError

        try:
            text = self.action_text([user], [_PROBE_TOOL], {"role": "assistant", "content": "", "tool_calls": [call]})
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(
                Problem(
                    "chat template",
                    None,
                    "tool calls",
                    short(str(error)),
                    "the template cannot render a tool call; set policy.chat_template",
                )
            ) from error
        text = self.decode(self.encode(text))
        for name, parser in PARSERS.items():
            for end in ("", *(self.tokenizer.decode([i]) for i in sorted(self.stop_ids))):
                body = text.split(end)[0] if end else text
                if self.reasoning_end:
                    body = body.rpartition(self.reasoning_end)[2]
                try:
                    _, calls = parser(body, [_PROBE_TOOL])
                except ValueError:
                    continue
                if [(c.name, json.loads(c.arguments)) for c in calls] == [("probe_tool", _PROBE_ARGUMENTS)]:
                    return name
        raise InputError(
            Problem(
                "chat template",
                None,
                "policy.tool_parser",
                short(text),
                f"no parser reads the template's tool calls back; name one of {', '.join(PARSERS)} or set policy.chat_template",
            )
        )


Parser = Callable[[str, Sequence[dict[str, Any]]], tuple[str, list[ToolCall]]]


def _one_call(raw: object, arguments_key: str) -> ToolCall:
    if not isinstance(raw, dict) or not isinstance(raw.get("name"), str) or arguments_key not in raw:
        raise ValueError(f"a tool call needs name and {arguments_key}")
    arguments = raw[arguments_key]
    return ToolCall(raw["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False))


def parse_hermes(text: str, tools: Sequence[dict[str, Any]]) -> tuple[str, list[ToolCall]]:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of them (Hermes, Qwen2.5/3)."""
    content, *blocks = text.split("<tool_call>")
    calls = []
    for block in blocks:
        body, end, rest = block.partition("</tool_call>")
        if not end:
            raise ValueError("<tool_call> without </tool_call>")
        calls.append(_one_call(json.loads(body), "arguments"))
        content += rest
    return content, calls


def parse_qwen_coder(text: str, tools: Sequence[dict[str, Any]]) -> tuple[str, list[ToolCall]]:
    """`<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>` (Qwen3-Coder, Nemotron 3).

    Values carry no type, so the tool's schema decides: a string stays text, anything else is read as JSON.
    """
    content, *blocks = text.split("<tool_call>")
    calls = []
    for block in blocks:
        body, end, rest = block.partition("</tool_call>")
        head = re.match(r"\s*<function=([^>\n]+)>", body)
        if not end or head is None or "</function>" not in body:
            raise ValueError("unfinished <tool_call>")
        types = _parameter_types(head[1], tools)
        arguments: dict[str, Any] = {}
        for part in body[head.end() :].split("<parameter=")[1:]:
            key, _, value = part.partition(">")
            value, closed, _ = value.partition("</parameter>")
            if not closed:
                raise ValueError(f"parameter {short(key, 40)} is not closed")
            value = value.removeprefix("\n").removesuffix("\n")
            arguments[key] = value if types.get(key, "string") == "string" else _json_or_text(value)
        calls.append(ToolCall(head[1], json.dumps(arguments, ensure_ascii=False)))
        content += rest
    return content, calls


def parse_llama_json(text: str, tools: Sequence[dict[str, Any]]) -> tuple[str, list[ToolCall]]:
    """The whole turn is `{"name": ..., "parameters": {...}}` (Llama 3.x), an optional `<|python_tag|>` before it."""
    body = text.replace("<|python_tag|>", "", 1).strip()
    if not (body.startswith("{") and '"name"' in body and '"parameters"' in body):
        return text, []
    return "", [_one_call(json.loads(body), "parameters")]


def parse_mistral(text: str, tools: Sequence[dict[str, Any]]) -> tuple[str, list[ToolCall]]:
    """`[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]` (Mistral)."""
    content, marker, body = text.partition("[TOOL_CALLS]")
    if not marker:
        return text, []
    listed = json.loads(body.strip())
    if not isinstance(listed, list):
        raise ValueError("[TOOL_CALLS] is not followed by a list")
    return content, [_one_call(raw, "arguments") for raw in listed]


def _parameter_types(name: str, tools: Sequence[dict[str, Any]]) -> dict[str, str]:
    for tool in tools:
        if tool["function"]["name"] == name:
            properties = tool["function"].get("parameters", {}).get("properties", {})
            return {key: value.get("type", "string") for key, value in properties.items() if isinstance(value, dict)}
    return {}


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


PARSERS: dict[str, Parser] = {
    "hermes": parse_hermes,
    "qwen_coder": parse_qwen_coder,
    "mistral": parse_mistral,
    "llama_json": parse_llama_json,
}

CALL_MARKERS = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "qwen_coder": ("<tool_call>", "</tool_call>"),
    "mistral": ("[TOOL_CALLS]", ""),
    "llama_json": ('{"name":', ""),
}
"""Where each parser's tool calls begin and end."""
