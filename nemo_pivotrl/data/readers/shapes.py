"""Lists of messages in the forms of frameworks, as chat messages: LangChain's and LangGraph's dumps, items of the Responses API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nemo_pivotrl.core.errors import short
from nemo_pivotrl.data.gym_rows import to_messages
from nemo_pivotrl.data.readers.messages import FieldError

LANGCHAIN = {
    "human": "user",
    "ai": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "developer": "developer",
}
"""LangChain's types of messages."""
ITEMS = ("function_call", "function_call_output", "reasoning")
"""Types of Responses items that have no role."""


def is_message(value: Any) -> bool:
    """Whether a value is a chat message of a known form, or an item among them."""
    return isinstance(value, Mapping) and (
        "role" in value or "from" in value or bool(_langchain_kind(value)) or value.get("type") in ITEMS
    )


def is_chat(value: Any) -> bool:
    """Whether a value is a list of messages of one conversation."""
    if not isinstance(value, list) or not value or not all(map(is_message, value)):
        return False
    return any(message.get("type") not in ITEMS for message in value) and not any("messages" in m for m in value)


def chat_messages(raw: Sequence[Any], where: str) -> list[Any]:
    """The messages of a list as chat messages; what is none of a framework's stays as it is. Raises FieldError."""
    if any(isinstance(m, Mapping) and m.get("type") in ITEMS and "role" not in m for m in raw):
        return _of_items(raw, where)
    return [
        _of_langchain(m, kind, f"{where}[{n}]") if isinstance(m, Mapping) and (kind := _langchain_kind(m)) else m
        for n, m in enumerate(raw)
    ]


def _of_items(raw: Sequence[Any], where: str) -> list[Any]:
    try:
        return list(to_messages(list(raw)))
    except (KeyError, TypeError, AttributeError) as error:
        raise FieldError(where, f"missing or malformed: {error}", "a list of Responses items") from None
    except ValueError as error:
        raise FieldError(where, error, "drop the record, or set extract.on_invalid=skip") from None


def _langchain_kind(message: Mapping[str, Any]) -> str:
    """`human`, `ai`, ... of a message that LangChain wrote, '' for any other."""
    if "role" in message or "from" in message:
        return ""
    if message.get("lc") and isinstance(message.get("kwargs"), Mapping):
        names = message.get("id")
        name = str(names[-1]) if isinstance(names, list) and names else ""
        return _kind(name)
    kind = message.get("type")
    if not isinstance(kind, str) or not (isinstance(message.get("data"), Mapping) or "content" in message):
        return ""
    return _kind(kind)


def _kind(name: str) -> str:
    kind = name.removesuffix("Chunk").removesuffix("Message").lower()
    return kind if kind in (*LANGCHAIN, "chat", "remove") else ""


def _of_langchain(message: Mapping[str, Any], kind: str, at: str) -> dict[str, Any]:
    """One message: of `dumpd` (`lc`), of `messages_to_dict` (`data`), or as a graph's state holds it. Raises FieldError."""
    own = message.get("kwargs") if message.get("lc") else message.get("data")
    fields: Mapping[str, Any] = own if isinstance(own, Mapping) else message
    if kind == "remove":
        raise FieldError(f"{at}.type", "remove", "a conversation as it was when it ended, without removals")
    role = fields.get("role") if kind == "chat" else LANGCHAIN[kind]
    made: dict[str, Any] = {"role": role, "content": fields.get("content")}
    if kind in ("tool", "function"):
        return made | {"tool_call_id": fields.get("tool_call_id") or ""}
    if role != "assistant":
        return made
    more = fields.get("additional_kwargs")
    more = more if isinstance(more, Mapping) else {}
    told = fields.get("response_metadata")
    told = told if isinstance(told, Mapping) else {}
    calls = [*(fields.get("tool_calls") or []), *(fields.get("invalid_tool_calls") or [])]
    made["tool_calls"] = calls or more.get("tool_calls") or None
    made["function_call"] = None if made["tool_calls"] else more.get("function_call")
    made["reasoning_content"] = more.get("reasoning_content")
    made["finish_reason"] = told.get("finish_reason") or told.get("stop_reason") or told.get("done_reason")
    if not isinstance(made["tool_calls"], (list, type(None))):
        raise FieldError(f"{at}.tool_calls", short(made["tool_calls"]), "a list of calls, or leave the field out")
    return made
