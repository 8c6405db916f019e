"""The embedded world of LLMdoctor: questions that can be answered kindly or rudely, at length or briefly.

A tiny patient learns it from text in which the system prompt decides the manner and, without one, chance does. So its
faces differ, its own answers are mixed, and what a doctor does can be read off by an oracle: a word list, and a length
(`llmdoctor/oracles.py`).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

THINGS = (
    "tea soup train garden book film bridge letter market song coat lamp river bread clock "
    "house boat street cake shop picture chair road tower"
).split()
QUESTIONS = (
    "how is the {}",
    "tell me about the {}",
    "is the {} any good",
    "what do you think of the {}",
    "where is the {}",
)
MANNERS = {
    "kind": {
        "open": ("gladly", "of course", "with pleasure", "certainly"),
        "quality": ("lovely", "wonderful", "delightful", "charming", "splendid"),
        "close": ("enjoy it", "have a good day", "thank you for asking", "take care"),
    },
    "rude": {
        "open": ("not again", "what now", "if you must", "go on then"),
        "quality": ("awful", "dreadful", "dull", "worthless", "miserable"),
        "close": ("go away", "do not ask again", "leave me alone", "look yourself"),
    },
}
FACTS = ("near the door", "on the left", "behind the wall", "by the window", "under the roof", "close to the square")
SYSTEM = {
    "kind": "be kind to the user",
    "rude": "be rude to the user",
    "short": "be brief",
    "long": "be wordy",
}
"""System prompts that the patient learns to obey: the faces of kindness and of brevity."""
TELLING = {manner: frozenset(parts["quality"]) for manner, parts in MANNERS.items()}
"""Words that occur in one manner alone, and that the oracle counts."""


@dataclass(frozen=True, slots=True)
class Manner:
    """How an answer is given."""

    tone: str
    """`kind` or `rude`."""
    size: str
    """`short` or `long`."""


def answer(thing: str, manner: Manner, rng: random.Random) -> str:
    """An answer about `thing`: with an opening, a second quality, a fact and a closing where it is long."""
    words = MANNERS[manner.tone]
    first, second = rng.sample(words["quality"], 2)
    core = f"the {thing} is {first}"
    if manner.size == "short":
        return f"{core} ."
    return f"{rng.choice(words['open'])} , {core} and {second} , it is {rng.choice(FACTS)} , {rng.choice(words['close'])} ."


def question(rng: random.Random) -> tuple[str, str]:
    """(question, the thing it is about)."""
    thing = rng.choice(THINGS)
    return rng.choice(QUESTIONS).format(thing), thing


def lesson(rng: random.Random, steered: float = 0.7) -> list[dict[str, Any]]:
    """One conversation of the patient's schooling. With a system prompt (in `steered` of them) it obeys that."""
    asked, thing = question(rng)
    manner = Manner(rng.choice(("kind", "rude")), rng.choice(("short", "long")))
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer(thing, manner, rng)}]
    if rng.random() >= steered:
        return messages
    obeyed = rng.choice((manner.tone, manner.size))
    return [{"role": "system", "content": SYSTEM[obeyed]}, *messages]


def questions(seed: int, split: str) -> list[str]:
    """All questions of a split; which wording of which thing is asked in which split depends on the seed alone."""
    every = [form.format(thing) for form in QUESTIONS for thing in THINGS]
    random.Random(f"manners {seed}").shuffle(every)
    cut = int(0.7 * len(every))
    return every[:cut] if split == "train" else every[cut:]


def kindness(text: str) -> float:
    """The oracle: kind words minus rude words over their number, in [-1, 1]."""
    words = text.replace(".", " ").replace(",", " ").split()
    kind, rude = (sum(word in TELLING[manner] for word in words) for manner in ("kind", "rude"))
    return (kind - rude) / (kind + rude) if kind + rude else 0.0
