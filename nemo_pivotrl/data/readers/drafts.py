"""What a reader is given and what it gives back, and the parts that every reader shares."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemo_pivotrl.core.types import Message
from nemo_pivotrl.data.readers.fields import WEIGHT, Identity, identity_of, whole_weight
from nemo_pivotrl.data.readers.messages import ONLY_TEXT, Conversation, FieldError, Notes, conversation_of
from nemo_pivotrl.data.readers.shapes import chat_messages
from nemo_pivotrl.data.readers.tools import Tools, tools_of, without_table_nulls

SYSTEM = ("system", "system_prompt", "instructions")
TOOLS = ("tools", "functions", "available_tools", "tool_definitions", "tool_defs", "tool_schemas")
MEDIA = ("images", "image", "audios", "audio", "videos", "video")


@dataclass(frozen=True)
class Context:
    """What a reader may use besides the record."""

    tools: Tools
    """Of `extract.tools`."""
    source: str
    """`file:line`."""
    notes: Notes


@dataclass
class Draft:
    """A trajectory before its ids are settled."""

    identity: Identity
    messages: tuple[Message, ...]
    tools: Tools
    untrained: dict[int, str] = field(default_factory=dict)
    last_only: bool = False
    fields: Mapping[str, Any] = field(default_factory=dict)


def draft_of(
    record: Mapping[str, Any],
    raw: Any,
    context: Context,
    *,
    markup: bool = False,
    where: str = "messages",
    system: str = "",
) -> Draft:
    """The trajectory of a record whose messages are `raw`; its tools, system prompt, weight and identity are read here.

    Raises FieldError.
    """
    refuse_media(record)
    tools = tools_in(record, context)
    conversation = conversation_of(messages_list(raw, where), context.notes, markup=markup, where=where, tools=tools)
    system = "\n\n".join(filter(None, [system, system_of(record)]))
    put_system(conversation, system)
    return finished(record, conversation, tools, context)


def finished(record: Mapping[str, Any], conversation: Conversation, tools: Tools, context: Context) -> Draft:
    """The draft of a conversation; a record's weight of zero counts for all its turns."""
    untrained = dict(conversation.untrained)
    if reason := whole_weight(record):
        turns = [i for i, m in enumerate(conversation.messages) if m["role"] == "assistant"]
        untrained |= dict.fromkeys(turns, reason)
    messages = without_table_nulls(conversation.messages, tools, context.notes)
    return Draft(identity_of(record, context.notes), messages, tools, untrained)


def messages_list(raw: Any, where: str) -> list[Any]:
    """The list of messages, which a table may hold as JSON text. Raises FieldError where it is none."""
    if isinstance(raw, str):
        try:
            raw = json.loads(raw)
        except (ValueError, RecursionError):
            raise FieldError(where, raw, "messages given as text must be a JSON list") from None
    if not isinstance(raw, list):
        raise FieldError(where, "missing" if raw is None else raw, f"`{where}` must be a non-empty list")
    return chat_messages(raw, where)


def tools_in(record: Mapping[str, Any], context: Context) -> Tools:
    """The record's own tools, or those of `extract.tools` where it has none."""
    for place in (record, record.get("metadata"), record.get("kwargs"), record.get("params")):
        for name in TOOLS:
            raw = place.get(name) if isinstance(place, Mapping) else None
            if raw and (place is record or isinstance(raw, list)):
                own = tools_of(raw, name, context.notes)
                if own:
                    return own
    return context.tools


def system_of(record: Mapping[str, Any]) -> str:
    """The system prompt that stands beside the messages, '' where there is none. Raises FieldError."""
    texts = []
    for name in SYSTEM:
        value = record.get(name)
        if isinstance(value, (str, list)) and value:
            texts.append(conversation_of([{"role": "system", "content": value}], where=name).messages[0]["content"])
        elif value:
            raise FieldError(name, value, "the system prompt as text, or as text blocks")
    return "\n\n".join(text for text in dict.fromkeys(texts) if text.strip())


def put_system(conversation: Conversation, system: str) -> None:
    """Begin the conversation with `system`, once: what stands there already is not said again."""
    messages = conversation.messages
    if not system.strip():
        return
    first = messages[0] if messages else None
    if first is not None and first["role"] in ("system", "developer"):
        if system.strip() not in first["content"]:
            messages[0] = {**first, "content": f"{system}\n\n{first['content']}".strip()}
        return
    messages.insert(0, {"role": "system", "content": system})
    conversation.untrained = {index + 1: reason for index, reason in conversation.untrained.items()}


def refuse_media(record: Mapping[str, Any]) -> None:
    """Raises FieldError for a record with pictures or sound beside its messages."""
    for name in MEDIA:
        value = record.get(name)
        if value and not (isinstance(value, Sequence) and not any(value)):
            raise FieldError(name, f"{len(value)} of them" if isinstance(value, list) else value, ONLY_TEXT, "not_text")


def note_unused(record: Mapping[str, Any], used: Sequence[str], notes: Notes) -> None:
    """Count the fields of a record that nothing reads."""
    known = {*used, *SYSTEM, *TOOLS, *MEDIA, *WEIGHT}
    for key, value in record.items():
        if key not in known and value not in (None, "", [], {}):
            notes.unused[key] += 1
