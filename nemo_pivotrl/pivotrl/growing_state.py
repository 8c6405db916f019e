"""The state before a turn, read as it grows: calls without outputs, and answers that the prompt already holds.

A trajectory is read once: the cost of all its turns together grows with its length, not with its square.
"""

from __future__ import annotations

from collections.abc import Sequence

from nemo_pivotrl.core.types import Action, Message

LEAK_MIN_WORDS = 8
"""A shorter expert message that also stands in the prompt ("Yes, sure.") is no leak."""


class GrowingState:
    """What the rules need to know of the messages so far."""

    def __init__(self, messages: Sequence[Message] = ()) -> None:
        self._length = 0
        self._pending: list[str] = []
        self._wrong = ""
        self._last_role = ""
        self._made: set[tuple[str, str, str]] = set()
        self._asked: list[str] = []
        """Texts of user messages."""
        self._told: list[str] = []
        """Those, and texts of system and developer messages, as far as they may hold a call's arguments."""
        self._names_told: list[str] = []
        self._windows: set[tuple[str, ...]] = set()
        """Runs of words of the user's texts, without which a long answer cannot stand in them."""
        for message in messages:
            self.add(message)

    def add(self, message: Message) -> None:
        """Take in the next message."""
        index, role = self._length, message["role"]
        if not self._wrong:
            self._pair(index, message)
        for call in message.get("tool_calls") or []:
            self._made.add((call["id"], call["function"]["name"], call["function"]["arguments"]))
        if role in ("system", "developer", "user"):
            self._names_told.append(message["content"])
            if "{" in message["content"]:
                self._told.append(message["content"])
        if role == "user":
            self._asked.append(message["content"])
            words = message["content"].split()
            self._windows.update(tuple(words[i : i + _INNER]) for i in range(len(words) - _INNER + 1))
        self._length, self._last_role = index + 1, role

    def _pair(self, index: int, message: Message) -> None:
        if message["role"] != "tool":
            if self._pending:
                self._wrong = f"call {self._pending[0]!r} has no output before messages[{index}]"
            self._pending = [call["id"] for call in message.get("tool_calls") or []]
            return
        call_id = message.get("tool_call_id", "")
        if not self._pending:
            self._wrong = f"messages[{index}] is an output without a call"
        elif call_id and call_id in self._pending:
            self._pending.remove(call_id)
        elif call_id and all(self._pending):
            self._wrong = f"messages[{index}] answers call {call_id!r}, which nobody made"
        else:
            self._pending.pop(0)

    def dangling_call(self) -> str:
        """What is wrong with the pairing of calls and outputs, '' if nothing."""
        return self._wrong or (f"call {self._pending[0]!r} has no output" if self._pending else "")

    def leaks(self, action: Action) -> bool:
        """Whether the state already contains the expert's answer.

        It does when it ends with an assistant turn, when the very call (id, name and arguments) occurs in it, when a system
        or user message holds a call's arguments verbatim (two or more keys) with the tool's name, or a user message a long
        answer's text. A reused id alone is no leak: real traces reuse them. Nor is a sentence of the policy's text (system,
        developer), which orders what to say.
        """
        if self._last_role == "assistant":
            return True
        if any(call.call_id and (call.call_id, call.name, call.arguments) in self._made for call in action.calls):
            return True
        for call in action.calls:
            told = call.arguments.count(":") >= 2 and any(call.arguments in text for text in self._told)
            if told and any(call.name in text for text in self._names_told):
                return True
        words = action.content.split()
        if action.calls or len(words) < LEAK_MIN_WORDS or tuple(words[1 : 1 + _INNER]) not in self._windows:
            return False
        return any(action.content.strip() in text for text in self._asked)


_INNER = LEAK_MIN_WORDS - 2
"""Words of a long answer that surely stand alone where it is quoted: its first and last may touch a quotation mark."""


def dangling_call(state: Sequence[Message]) -> str:
    """What is wrong with the pairing of calls and outputs in a state, '' if nothing."""
    return GrowingState(state).dangling_call()


def leaks(state: Sequence[Message], action: Action) -> bool:
    """Whether a state already contains the expert's answer (`GrowingState.leaks`)."""
    return GrowingState(state).leaks(action)
