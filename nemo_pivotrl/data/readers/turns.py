"""What a turn says besides its words: that nothing is to be learned from it, or that it holds a call that is not read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CUT = frozenset(("length", "max_tokens", "max_output_tokens", "content_filter", "model_length"))
"""Reasons for which an API ended an answer before the model did."""
CALL_MARKS = (
    "<function=",
    "<function_call>",
    "<functioncall>",
    "<invoke ",
    "<|python_tag|>",
    "[TOOL_CALLS]",
    "<|tool_call",
)
CALL_MARKS += ("<｜tool▁call▁begin｜>", "<tool_call>")
"""How families of models begin a call in their text."""
UNREAD = "unread_call"
"""Skip reason of a turn that a tool answers and in which no call was found: its text is no talk."""
TRUNCATED = "truncated_turn"


def untrained_reason(message: Mapping[str, Any]) -> str:
    """Why an assistant turn is not to be learned, '' if it is: the weight that SFT formats give to it, a demonstration, a cut."""
    if message.get("is_demo") is True or message.get("message_type") == "demonstration":
        return "given_turn"
    for key in ("weight", "loss_weight", "loss", "train", "trainable"):
        value = message.get(key)
        if isinstance(value, (int, float)) and not value:
            return "weight_zero"
    ended = (message.get(key) for key in ("finish_reason", "stop_reason"))
    return TRUNCATED if any(isinstance(reason, str) and reason in CUT for reason in ended) else ""


def unread_mark(text: str) -> str:
    """The mark of a call in a text out of which no call was read; '' where there is none."""
    return next((mark for mark in CALL_MARKS if mark in text), "")
