"""The embedded world of LLMdoctor: its oracle knows its own answers, and its splits do not meet."""

import random

import pytest

from nemo_pivotrl.demo import answer_styles as manners
from nemo_pivotrl.demo.answer_styles import Manner, answer, kindness, lesson, questions
from nemo_pivotrl.llmdoctor.oracles import brevity


@pytest.mark.parametrize("seed", range(5))
def test_the_oracle_knows_the_manner_of_every_answer(seed: int) -> None:
    rng = random.Random(seed)
    for size in ("short", "long"):
        assert kindness(answer("tea", Manner("kind", size), rng)) == 1.0
        assert kindness(answer("tea", Manner("rude", size), rng)) == -1.0
    for tone in ("kind", "rude"):
        short, long = (brevity(answer("tea", Manner(tone, size), rng)) for size in ("short", "long"))
        assert short == -4 / 20 and long < -10 / 20


def test_scores_of_what_no_manner_says_are_middling_and_empty_text_is_brief() -> None:
    assert kindness("the tea is near the door .") == 0.0 and kindness("") == 0.0
    assert kindness("lovely awful wonderful") == pytest.approx(1 / 3)
    assert brevity("") == 0.0


def test_lessons_obey_their_system_prompt_and_show_every_manner_without_one() -> None:
    rng = random.Random(0)
    free = []
    for _ in range(400):
        messages = lesson(rng)
        text = messages[-1]["content"]
        if messages[0]["role"] != "system":
            free.append((kindness(text), brevity(text) > -0.5))
            continue
        obeyed = {v: k for k, v in manners.SYSTEM.items()}[messages[0]["content"]]
        assert {
            "kind": kindness(text) == 1.0,
            "rude": kindness(text) == -1.0,
            "short": brevity(text) > -0.5,
            "long": brevity(text) < -0.5,
        }[obeyed]
    assert set(free) == {(1.0, True), (1.0, False), (-1.0, True), (-1.0, False)} and 60 < len(free) < 180


def test_the_splits_share_no_question_and_depend_on_the_seed_alone() -> None:
    train, test = questions(0, "train"), questions(0, "test")
    assert len(train) == len(set(train)) == 84 and len(set(test)) == 36 and not set(train) & set(test)
    assert questions(0, "train") == train != questions(1, "train")
