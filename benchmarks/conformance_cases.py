"""Seeded random `/verify` requests for each verifier family: (config, row) as NeMo-Gym's servers take them.

What the policy did is mostly an edited copy of what the expert did, because two unrelated actions agree in nothing and test
little. Left out on purpose, since a bound of ours decides there and not a rule: JSON nested 100 to about 1,000 deep, more
than 4,096 JSON values in one call, and actions of more than 262,144 characters (`config.Limits`).
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Item = dict[str, Any]
NAN, INF = float("nan"), float("inf")
HUGE_INTEGER = "9" * 5000
"""More digits than Python reads: ValueError, and not the JSONDecodeError that the released code expects."""
TOO_DEEP = "[" * 5000
SPACES = [" ", "  ", "\n", "\t", "\r\n", "\u00a0", "\u2003", "\x0b", "\x1c", "\u200b"]
WORDS = "ls -la grep -rn foo src New York new york Paris paris book a flight to Ünïcode straße STRASSE İ ı é e\u0301 \U0001f600".split()
STRINGS = [
    "",
    " ",
    "a",
    "a b",
    "a c",
    "b d",
    "c a",
    "A B",
    "a\x00b",
    "\ud83d",
    "\ud83d \udc00 x",
    "\ufeffx",
    "9" * 30,
    "1",
    "true",
    "null",
]
NUMBERS = [0, 1, -1, 2, 75, 10**20, 10**400, 0.5, 0.5000005, 0.500002, 1.0, 75.0, -0.0, 1e-7, 1e300, NAN, INF, -INF]
KEYS = ["query", "path", "limit", "items", "x", "", "ключ", "a b"]
BROKEN = [
    "",
    " ",
    "{",
    "{}}",
    "nul",
    "{'x': 1}",
    '{"x": 1,}',
    '{"x": }',
    "\ufeff{}",
    "```json\n{}\n```",
    '{"x": 01}',
    '{"x": "\n"}',
    '{"x": "\\q"}',
]
UNEXPECTED = [
    "null",
    "3",
    "[]",
    "[1]",
    '"text"',
    '"path command old_str"',
    "true",
    "NaN",
    '["path"]',
    '["command", "cmd"]',
    "1e999",
]


class Pen(random.Random):
    """A seeded source of choices."""

    def often(self, probability: float) -> bool:
        return self.random() < probability

    def pick(self, *options: Any) -> Any:
        return self.choice(options)

    def words(self, low: int = 1, high: int = 7) -> str:
        text = ""
        for _ in range(self.randint(low, high)):
            text += self.choice(WORDS) + (self.choice(SPACES) if self.often(0.1) else " ")
        return text if self.often(0.2) else text.strip()

    def value(self, depth: int = 2) -> Any:
        """Any JSON value, with the numbers and texts that comparisons trip over."""
        if depth and self.often(0.3):
            if self.often(0.5):
                return [self.value(depth - 1) for _ in range(self.randint(0, 3))]
            return {self.choice(KEYS): self.value(depth - 1) for _ in range(self.randint(0, 3))}
        kind = self.random()
        if kind < 0.45:
            return self.words()
        if kind < 0.6:
            return self.choice(STRINGS)
        return self.choice(NUMBERS) if kind < 0.85 else self.pick(None, True, False, [], {})

    def text_edit(self, text: str) -> str:
        """A text that is nearly the same."""
        at = self.randint(0, len(text))
        words = text.split(" ")
        edits: list[Callable[[], str]] = [
            lambda: text + self.pick(" ", "\n", "x", ";", " --seed 2"),
            lambda: text[:at] + self.pick("x", "_", "\n", "é", "") + text[at + self.randint(0, 2) :],
            lambda: text[:at],
            lambda: text.swapcase(),
            lambda: self.choice(SPACES) + text.replace(" ", self.choice(SPACES)),
            lambda: " ".join(words[:-1]),
            lambda: " ".join([*words, self.choice(WORDS)]),
            lambda: " ".join(self.sample(words, len(words))),
            lambda: text.replace("\n", "\r\n"),
            lambda: self.words(),
        ]
        return self.choice(edits)()

    def confused(self, value: Any) -> Any:
        """A value that looks like another: 1 and true, 1 and 1.0, null and {}, a number and its text."""
        if isinstance(value, str):
            return self.text_edit(value) if self.often(0.85) else self.value(1)
        if isinstance(value, bool):
            return self.pick(not value, int(value), str(value))
        if isinstance(value, int) and abs(value) < 10**15:
            return self.pick(value + 1, float(value), str(value), bool(value), value + 10**-7)
        if isinstance(value, float):
            return self.pick(value + 5e-7, value + 1e-6, value + 0.25, str(value), 1, NAN)
        return self.pick(None, {}, [], 0, self.value(1))

    def edited(self, value: Any) -> Any:
        """A copy with one place changed."""
        if isinstance(value, dict):
            made, change = dict(value), self.random()
            if change < 0.1 or not made:
                made[self.choice(KEYS)] = self.value(1)
            elif change < 0.2:
                del made[self.choice(list(made))]
            elif change < 0.3:
                made = {key: made[key] for key in self.sample(list(made), len(made))}
            else:
                key = self.choice(list(made))
                made[key] = self.edited(made[key])
            return made
        if isinstance(value, list) and value:
            made_list, at = list(value), self.randrange(len(value))
            return self.pick(
                self.sample(made_list, len(made_list)),
                [*made_list, copy.deepcopy(made_list[at])],
                made_list[:at] + made_list[at + 1 :],
                [*made_list[:at], self.edited(made_list[at]), *made_list[at + 1 :]],
            )
        return self.confused(value)

    def variant(self, value: Any, same: float = 0.4) -> Any:
        """`value` itself or a copy with one or two places changed."""
        if self.often(same):
            return value
        return self.edited(self.edited(value)) if self.often(0.3) else self.edited(value)

    def dumps(self, value: Any) -> str:
        """`value` as a model might write it."""
        text = json.dumps(
            value, ensure_ascii=self.often(0.5) or _has_surrogates(value), indent=self.pick(None, None, 1)
        )
        if isinstance(value, dict) and value and self.often(0.05):  # duplicate keys: the last one counts
            key = self.choice(list(value))
            text = "{" + json.dumps(key) + ": " + json.dumps(self.value(1)) + ", " + text[1:]
        return self.choice(SPACES[:5]) + text + "\n" if self.often(0.05) else text

    def arguments(self, value: Any, broken: float = 0.06) -> str:
        """The arguments of a sampled call as text, now and then undecodable."""
        if self.often(broken):
            return self.pick(
                *BROKEN,
                *UNEXPECTED,
                *UNEXPECTED,
                self.dumps(value)[:-1],
                self.dumps(value) + "}",
                HUGE_INTEGER,
                TOO_DEEP,
            )
        return self.dumps(value)


def _has_surrogates(value: Any) -> bool:
    return any("\ud800" <= c <= "\udfff" for c in json.dumps(value, ensure_ascii=False))


@dataclass(frozen=True)
class Sample:
    """One request and the settings of the server it is sent to."""

    config: dict[str, Any]
    row: dict[str, Any]


def call(name: str, arguments: str) -> Item:
    return {"type": "function_call", "name": name, "arguments": arguments}


def said(pen: Pen, text: str, plain: bool = True) -> Item:
    """An assistant message, its text in one part or several, or refused; or bare, which single_step's server does not read."""
    at = pen.randint(0, len(text)) if pen.often(0.1) else len(text)
    parts = [{"type": "output_text", "text": t, "annotations": []} for t in (text[:at], text[at:]) if t or not at]
    if pen.often(0.03):
        parts = pen.pick([], [{"type": "refusal", "refusal": text}], [{"type": "refusal", "refusal": "no"}, *parts])
    if plain and pen.often(0.03):
        return {"type": "message", "role": "assistant", "content": text}
    return {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": parts}


def thought(pen: Pen) -> Item:
    return {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": pen.words()}]}


def sent(pen: Pen, items: Sequence[Item], tools: Sequence[Item] = ()) -> dict[str, Any]:
    """The parts of a request that every server shares."""
    output = [{"call_id": f"c{i}", **item} if item["type"] == "function_call" else item for i, item in enumerate(items)]
    if pen.often(0.2):
        output.insert(0, thought(pen))
    if pen.often(0.02):
        output.append({"type": "function_call_output", "call_id": "c0", "output": pen.words()})
        output.insert(0, {"type": "message", "role": "user", "content": pen.words()})
    response = {
        "id": "r", "created_at": 0, "model": "m", "object": "response", "output": output,
        "parallel_tool_calls": True, "tool_choice": "auto", "tools": [],
    }  # fmt: skip
    return {"responses_create_params": {"input": pen.words(), "tools": list(tools)}, "response": response}


def expected_action(pen: Pen, calls: Sequence[Item], text: str) -> Item:
    """A row's expert action: calls where there are any, else the text."""
    if not calls:
        return {"type": "message", "content": text}
    if len(calls) == 1 and pen.often(0.97):
        return calls[0]
    return {"type": "function_call_batch", "calls": list(calls)}


def answered(pen: Pen, calls: Sequence[Item], text: str, silent: float = 0.3, plain: bool = True) -> list[Item]:
    """A sampled turn: the calls, sometimes with text before or after them, or text alone, or nothing."""
    items: list[Item] = list(calls)
    if not calls and pen.often(silent):
        return []
    if not calls or pen.often(0.15):
        items.insert(pen.pick(0, len(items)), said(pen, text, plain))
    if pen.often(0.03):
        items.append(said(pen, pen.words(), plain))
    return items


def rearranged(pen: Pen, calls: list[Item], another: Callable[[], Item]) -> list[Item]:
    """Parallel calls in another order, with one missing, repeated or added."""
    made = list(calls)
    for _ in range(pen.pick(0, 1, 1, 2)):
        at = pen.randrange(len(made)) if made else 0
        change = pen.random()
        if change < 0.4:
            pen.shuffle(made)
        elif change < 0.6 and made:
            made.pop(at)
        elif change < 0.8 and made:
            made.insert(pen.randint(0, len(made)), dict(made[at]))
        else:
            made.insert(at, another())
    return made


# ---- single_step ----


def single_step(pen: Pen, release: str) -> Sample:
    """Tool calls with any arguments; from 0.6 on batches under every parallel setting."""
    batches = release != "0.5.0"
    config: dict[str, Any] = {"word_count_similarity_threshold": pen.pick(0.0, 0.1, 0.1, 0.25, 0.3, 1 / 3, 0.5, 0.51)}
    if pen.often(0.2):
        config["floating_point_comparison_threshold"] = pen.pick(0.0, 1e-6, 0.25, 0.5)
    if batches and pen.often(0.65):
        config["parallel_tool_call_rewarding"] = pen.often(0.85)
        config["allow_subset"], config["allow_superset"] = pen.often(0.5), pen.often(0.5)
        config["parallel_tool_call_reward_mode"] = pen.pick("binary_strict", "fractional", "f1")
    few = [{"x": pen.pick("a b", "a c", "b d", "c a", 1, 1.0, True)} for _ in range(3)]
    crowd = batches and pen.often(0.45)

    def arguments() -> Any:
        if crowd and pen.often(0.8):
            return pen.choice(few)
        return pen.value(2) if pen.often(0.05) else {pen.choice(KEYS): pen.value() for _ in range(pen.randint(0, 4))}

    def made() -> Item:
        return call(pen.pick("f", "f", "f", "g", "F", "search"), pen.arguments(arguments(), 0.02))

    count = pen.pick(2, 2, 3, 4, pen.randint(5, 12)) if crowd else 0 if pen.often(0.12) else 1
    wanted = [call(pen.pick("f", "f", "g"), pen.dumps(arguments())) for _ in range(count)]
    if wanted and pen.often(0.01):
        wanted[0]["arguments"] = pen.pick(*BROKEN, HUGE_INTEGER)
    found = [
        call(
            pen.pick(c["name"], c["name"], c["name"].upper()) if pen.often(0.2) else c["name"],
            _near(pen, c["arguments"]),
        )
        for c in wanted
    ]
    found = rearranged(pen, found, made) if crowd or pen.often(0.2) else found
    if pen.often(0.06):
        found = [] if found else [made() for _ in range(pen.pick(1, 2))]
    row = {
        "expected_action": expected_action(pen, wanted, pen.words())
        if batches
        else (wanted or [{"type": "message", "content": "hello"}])[0]
    }
    return Sample(config, row | sent(pen, answered(pen, found, pen.pick("", " ", pen.words()), plain=False)))


def _near(pen: Pen, arguments: str) -> str:
    try:
        value = json.loads(arguments)
    except ValueError:
        return pen.arguments({})
    return pen.arguments(pen.variant(value))
