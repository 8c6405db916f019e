"""Turns of one trajectory as few sequences."""

from __future__ import annotations

import random

from nemo_pivotrl.pivotrl.sft import merge


def test_merging_is_what_comparing_every_beginning_gives() -> None:
    draw = random.Random(0)
    for _ in range(300):
        stems = [[draw.randrange(2) for _ in range(12)] for _ in range(2)]
        examples = []
        for _ in range(draw.randint(1, 8)):
            stem, cut = draw.choice(stems), draw.randint(0, 10)
            end = draw.randint(cut + 1, 12)
            examples.append((stem[:cut], stem[cut:end]))
        slow: list[tuple[list[int], list[int]]] = []
        for prompt, action in sorted(examples, key=lambda e: -len(e[0]) - len(e[1])):
            ids = prompt + action
            home = next((t for held, t in slow if held[: len(ids)] == ids), None)
            if home is None:
                slow.append((ids, home := [0] * len(ids)))
            home[len(prompt) : len(ids)] = [1] * len(action)
        assert [(list(s.ids), list(s.trained)) for s in merge(examples)] == slow


def test_long_and_negative_ids_are_not_confused() -> None:
    """A digest of bytes must tell (1, 256) from (256, 1) and from what is cut elsewhere."""
    merged = merge([([1], [256]), ([256], [1]), ([], [1, 256, 7]), ([-1], [5])])
    assert [(s.ids, s.trained) for s in merged] == [((1, 256, 7), (1, 1, 1)), ((256, 1), (0, 1)), ((-1, 5), (0, 1))]
