"""Records of chat messages: OpenAI and Anthropic, logs of requests with their responses, ShareGPT's dialects, glaive's text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from nemo_pivotrl.data.readers.drafts import (
    Context,
    Draft,
    draft_of,
    messages_list,
    note_unused,
    refuse_media,
)
from nemo_pivotrl.data.readers.fields import MASKED, OUTCOME, REPEAT, ROW, RUN, TASK, WITHIN
from nemo_pivotrl.data.readers.markup import json_or_python, python_calls
from nemo_pivotrl.data.readers.messages import FieldError

MESSAGES = (
    "messages",
    "conversations",
    "conversation",
    "trajectory",
    "traj",
    "dialogue",
    "dialog",
    "turns",
    "chat_history",
)
"""Where a record may keep its messages."""
IDENTITY = (*RUN, *ROW, *TASK, *REPEAT, *OUTCOME, *WITHIN, *MASKED)


def read_openai(record: dict[str, Any], context: Context) -> Draft:
    """`messages` with roles and content (text or blocks), `tools` or `functions`, task, outcome and weight under usual names."""
    key = messages_key(record)
    note_unused(record, (key, *IDENTITY), context.notes)
    return draft_of(record, record[key], context, where=key)


def read_prompt_completion(record: dict[str, Any], context: Context) -> Draft:
    """`prompt` (messages, or one question) and `completion` (messages), as TRL and verifiers write them. Turns of the prompt
    were given."""
    prompt = record["prompt"]
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else messages_list(prompt, "prompt")
    before = [{**m, "is_demo": True} if isinstance(m, dict) else m for m in before]
    note_unused(record, ("prompt", "completion", "answer", *IDENTITY), context.notes)
    return draft_of(record, [*before, *messages_list(record["completion"], "completion")], context, where="completion")


def read_xlam(record: dict[str, Any], context: Context) -> Draft:
    """xLAM and APIGen: a `query`, the calls of one turn in `answers`, `tools`; lists may be JSON texts."""
    answers = messages_list(record["answers"], "answers")
    if not answers:
        raise FieldError("answers", record["answers"], "the calls of the turn, at least one", "no_turns")
    note_unused(record, ("query", "answers", *IDENTITY), context.notes)
    turn = {"role": "assistant", "content": "", "tool_calls": answers}
    return draft_of(record, [{"role": "user", "content": record["query"]}, turn], context, where="answers")


def messages_key(record: Mapping[str, Any]) -> str:
    """The field that holds the messages. Raises FieldError."""
    for key in MESSAGES:
        if isinstance(record.get(key), (list, str)):
            return key
    if record.get("messages") is not None:
        raise FieldError("messages", record["messages"], "`messages` must be a non-empty list")
    shown = ", ".join(list(record)[:12]) or "nothing"
    raise FieldError("messages", "missing", f"a record needs `messages`; this one has {shown}")


def read_sharegpt(record: dict[str, Any], context: Context) -> Draft:
    """`conversations` of from/value. Calls as `function_call` turns, as Hermes' `<tool_call>` text or as ToolACE's Python lists."""
    key = next((k for k in ("conversations", "conversation") if k in record), None) or messages_key(record)
    turns = messages_list(record.get(key), key)
    turns = [turn for pair in turns for turn in _paired(pair)]
    note_unused(record, (key, *IDENTITY), context.notes)
    toolace = _toolace(record, turns, context)
    if toolace is not None:
        return toolace
    return draft_of(_with_hermes_tools(record, turns), turns, context, markup=True, where=key)


def _paired(turn: Any) -> list[Any]:
    """ms-swift writes a question and its answer as one object."""
    if isinstance(turn, dict) and "from" not in turn and "role" not in turn and "human" in turn:
        said = [("user", turn["human"]), ("assistant", turn.get("assistant", turn.get("gpt")))]
        return [{"role": role, "content": text} for role, text in said if text is not None]
    return [turn]


def _with_hermes_tools(record: dict[str, Any], turns: list[Any]) -> dict[str, Any]:
    """A Hermes system prompt lists the tools between tags; they are the record's where it has no other."""
    if record.get("tools") or not turns or not isinstance(turns[0], dict):
        return record
    text = turns[0].get("value", turns[0].get("content"))
    for listed in re.findall(r"<tools>(.*?)</tools>", text, re.DOTALL) if isinstance(text, str) else ():
        try:
            lines = [json_or_python(line) for line in listed.strip().splitlines() if line.strip()]
            tools = lines[0] if len(lines) == 1 and isinstance(lines[0], list) else lines
        except ValueError:
            try:
                tools = json_or_python(listed.strip())
            except ValueError:
                continue
        if tools:
            return {**record, "tools": tools if isinstance(tools, list) else [tools]}
    return record


def _toolace(record: dict[str, Any], turns: list[Any], context: Context) -> Draft | None:
    """ToolACE: tools as a JSON list within the system prompt, calls as `[Name(key="value")]`; None for another dialect.

    The list becomes the record's tools; what stands after it, the order to write calls in that form, is left out.
    """
    system = record.get("system")
    found = _json_list_in(system) if isinstance(system, str) and not record.get("tools") else None
    if found is None:
        return None
    begin, tools = found
    raw: list[Any] = []
    called = 0
    for index, turn in enumerate(turns):
        speaker = (turn.get("from") or turn.get("role")) if isinstance(turn, dict) else None
        value = turn.get("value", turn.get("content")) if isinstance(turn, dict) else None
        if speaker in ("assistant", "gpt") and isinstance(value, str):
            try:
                calls = python_calls(value)
            except ValueError as error:
                raise FieldError(
                    f"conversations[{index}].value", value, f"the tool call cannot be read: {error}"
                ) from None
            if calls:
                called += len(calls)
                turn = {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"name": n, "arguments": a} for n, a in calls],
                }
        raw.append(turn)
    if not called:
        return None
    context.notes.said[
        "system prompts that list tools as text: the list became tools, the order how to write calls is left out"
    ] += 1
    kept = re.sub(r"\n[^\n]*$", "", system[:begin].rstrip()) if "\n" in system[:begin].rstrip() else system[:begin]
    return draft_of(
        {**record, "system": kept.strip(), "tools": tools}, raw, context, markup=True, where="conversations"
    )


def _json_list_in(text: str) -> tuple[int, list[Any]] | None:
    for match in re.finditer(r"\[\s*\{", text):
        try:
            value, _ = json.JSONDecoder().raw_decode(text, match.start())
        except (ValueError, RecursionError):
            continue
        if isinstance(value, list) and all(isinstance(tool, dict) and "name" in tool for tool in value):
            return match.start(), value
    return None


def read_glaive(record: dict[str, Any], context: Context) -> Draft:
    """glaive: `system` with the functions as JSON objects, `chat` of USER, ASSISTANT and FUNCTION RESPONSE turns."""
    chat = record.get("chat")
    if not isinstance(chat, str) or not chat.strip():
        raise FieldError("chat", chat, "the conversation as text: USER: ... ASSISTANT: ...")
    system = str(record.get("system") or "").strip().removeprefix("SYSTEM:").strip()
    begin = system.find("{")
    tools = _json_objects(system[begin:]) if begin >= 0 else []
    start, *pieces = re.split(r"(?:^|\n+)\s*(USER|ASSISTANT|FUNCTION RESPONSE):", "\n" + chat)
    if start.strip() or not pieces:
        raise FieldError("chat", chat, "turns begin with USER:, ASSISTANT: or FUNCTION RESPONSE:")
    raw = []
    for speaker, text in zip(pieces[::2], pieces[1::2], strict=True):
        text = text.replace("<|endoftext|>", "").strip()
        if speaker == "ASSISTANT" and "<functioncall>" in text:
            said, _, call = text.partition("<functioncall>")
            raw.append({"role": "assistant", "content": said.strip(), "tool_calls": [_glaive_call(call.strip())]})
        else:
            role = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}[speaker]
            raw.append({"role": role, "content": text})
    note_unused(record, ("chat", *IDENTITY), context.notes)
    kept = system[:begin].rstrip().removesuffix("Use them if required -").strip() if tools else system
    return draft_of({**record, "system": kept, **({"tools": tools} if tools else {})}, raw, context, where="chat")


def _glaive_call(text: str) -> dict[str, Any]:
    """`{"name": "f", "arguments": '{"key": "value"}'}`: the arguments are quoted once more, in single quotes."""
    quoted = re.fullmatch(r"\{\s*\"name\":\s*\"([^\"]+)\"\s*(?:,\s*\"arguments\":\s*'(.*)'\s*)?\}", text, re.DOTALL)
    if quoted:
        return {"name": quoted[1], "arguments": (quoted[2] or "{}").replace("\\'", "'")}
    try:
        value = json_or_python(text)
    except ValueError as error:
        raise FieldError("chat", text, f"the function call cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise FieldError("chat", text, "the function call cannot be read: it needs name and arguments")
    return value


def _json_objects(text: str) -> list[Any]:
    decoder, at, found = json.JSONDecoder(), 0, []
    while (at := text.find("{", at)) >= 0:
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            break
        found.append(value)
    return found


def read_chat_log(record: dict[str, Any], context: Context) -> Draft:
    """A logged request with its response: OpenAI chat (`choices`), Anthropic (`content`), as proxies and OpenHands write them.

    The request's messages and the response make the conversation.
    """
    request = _request_of(record)
    answer = _answer_of(record.get("response"))
    key = messages_key(request)
    messages = messages_list(request[key], f"request.{key}")
    note_unused(record, ("request", "response", "body", "kwargs", "args", key, *IDENTITY), context.notes)
    refuse_media(request)
    merged = {**record, **{k: request[k] for k in ("system", "tools", "functions", "instructions") if request.get(k)}}
    return draft_of(merged, [*messages, *([answer] if answer else [])], context, where="messages")


def _request_of(record: Mapping[str, Any]) -> Mapping[str, Any]:
    for place in (record, *(record.get(k) for k in ("request", "body", "kwargs", "args"))):
        if isinstance(place, Mapping):
            inner = place.get("body") if isinstance(place.get("body"), Mapping) else place
            if any(isinstance(inner.get(k), (list, str)) for k in MESSAGES):
                kwargs = record.get("kwargs")
                return {**(kwargs if isinstance(kwargs, Mapping) else {}), **inner}
    remedy = (
        "a log needs the request beside the response (OpenAI batch outputs: join them with the input file by custom_id)"
    )
    raise FieldError("request.messages", "missing", remedy)


def _answer_of(response: Any) -> Any:
    if isinstance(response, Mapping) and isinstance(response.get("body"), Mapping):
        response = response["body"]
    if isinstance(response, list) and response:
        response = response[0]
    if not isinstance(response, Mapping):
        return None
    choices = response.get("choices")
    if isinstance(choices, list) and choices:
        if len(choices) > 1:
            raise FieldError(
                "response.choices", f"{len(choices)} choices", "one answer a record; write a record for each"
            )
        message = choices[0].get("message") if isinstance(choices[0], Mapping) else None
        if not isinstance(message, Mapping):
            raise FieldError("response.choices[0].message", message, "the assistant's message")
        return {"finish_reason": choices[0].get("finish_reason"), **message}
    if response.get("content") is not None or response.get("tool_calls"):
        return {"role": response.get("role") or "assistant", **{k: v for k, v in response.items() if k != "role"}}
    return None
