"""What `smollm2_doctors.py` asks and how answers are scored: prompts about everyday things, an oracle beside VADER, and the pairs of
face prompts among which the benchmark chooses."""

from __future__ import annotations

import json
from pathlib import Path

ORACLES = ("sentiment", "plainness")
"""VADER's compound score, and `plainness`."""
LEAST_WORDS = 3
TOPICS = (
    "walking to work",
    "a hot bath",
    "the school play",
    "online shopping",
    "old bicycles",
    "a long train journey",
    "gardening",
    "the office party",
    "fast food",
    "a family dinner",
    "street musicians",
    "the village shop",
    "paying taxes",
    "a new haircut",
    "crossword puzzles",
    "the first snow",
    "video calls",
    "a noisy fridge",
    "going to the gym",
    "fresh coffee",
    "lost luggage",
    "the summer holidays",
    "a power cut",
    "science class",
    "second-hand books",
    "a crowded beach",
    "the evening news",
    "a birthday cake",
    "washing the dishes",
    "a late bus",
    "singing in a choir",
    "mobile phones",
    "a flat tyre",
    "the zoo",
    "weekend markets",
    "learning to swim",
    "a broken lift",
    "wooden toys",
    "the night shift",
    "a walk in the forest",
)
FRAMES = (
    "In a sentence or two, how would you describe {} to a friend?",
    "Give me your opinion on {} in one sentence.",
    "Write one sentence about {}.",
    "In one short sentence, what do you think of {}?",
)
FACES: dict[str, tuple[tuple[str, str], ...]] = {
    "sentiment": (
        (
            "You are cheerful. You love everything and praise it warmly.",
            "You are bitter. You hate everything and complain about it.",
        ),
        (
            "You always say good things. Use happy words: love, great, wonderful, beautiful, happy, fun, best, enjoy.",
            "You always say bad things. Use angry words: hate, awful, terrible, ugly, sad, boring, worst, fail.",
        ),
        (
            "Write a five-star review. For example: I love it! It is a wonderful, beautiful thing and it makes me happy.",
            "Write a one-star review. For example: I hate it. It is a terrible, ugly thing and it makes me angry.",
        ),
    ),
    "plainness": (
        (
            "You use short, simple words and short sentences.",
            "You use long, difficult words and long sentences.",
        ),
        (
            "You talk to a child of five. Use small words: good, big, fun, nice, go, see, like, get, day.",
            "You write for professors. Use academic words: significant, opportunity, environment, experience, individuals.",
        ),
        (
            "Say it in easy words. For example: It is a good way to have fun and see a lot of new things.",
            "Say it in formal words. For example: It represents a significant opportunity for personal development.",
        ),
    ),
}
"""Objective to pairs (positive, negative); the first of each is of the kind that the recipe smollm2-135m-cpu.yaml has."""


def plainness(text: str) -> float:
    """How plain a text is, in [-1, 1]: 1 minus a tenth of its Coleman-Liau grade (textstat), the grade held to [0, 20].

    The grade counts letters a word and sentences a hundred words, and needs no dictionary. Under three words there is no
    sentence to read: -1.
    """
    import textstat

    if sum(any(c.isalpha() for c in word) for word in text.split()) < LEAST_WORDS:
        return -1.0
    return 1.0 - min(max(float(textstat.coleman_liau_index(text)), 0.0), 20.0) / 10


def write_prompts(known: Path, target: Path) -> int:
    """The prompts of the file `known` and four for each of `TOPICS`, to `target`; returns how many."""
    lines = known.read_text(encoding="utf-8").splitlines()
    lines += [json.dumps([{"role": "user", "content": f.format(topic)}]) for topic in TOPICS for f in FRAMES]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)
