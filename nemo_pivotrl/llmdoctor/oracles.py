"""Oracles: what scores an answer, to rank a patient's own answers and to compare ways of answering.

An oracle sees one answer at a time, so that there is no order to swap: `kindness` knows the words of the embedded world,
`brevity` counts words, `sentiment` is VADER's, and any Hugging Face reward model can be one (`oracles.reward_models`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from nemo_pivotrl import config
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.demo import answer_styles as manners

Oracle = Callable[[Sequence[Sequence[dict[str, Any]]], Sequence[str]], list[float]]
"""(the messages before each answer, the answers) -> scores; more is better."""


def brevity(text: str) -> float:
    """Minus the number of words, in twenties."""
    return -sum(any(c.isalnum() for c in word) for word in text.split()) / 20.0


@cache
def _vader() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        remedy = "pip install 'nemo-pivotrl[oracles]'"
        raise InputError(Problem("environment", None, "oracle sentiment", str(error), remedy)) from None
    return SentimentIntensityAnalyzer()


def sentiment(text: str) -> float:
    """VADER's compound score (Hutto and Gilbert 2014), in [-1, 1]. Raises InputError where VADER is not installed."""
    return float(_vader().polarity_scores(text)["compound"])


ORACLES: dict[str, Callable[[str], float]] = {
    "kindness": manners.kindness,
    "brevity": brevity,
    "sentiment": sentiment,
}
"""Those that need no model: they read the answer alone."""


def known(settings: config.Oracles) -> list[str]:
    """Every objective that can be scored."""
    return [*ORACLES, *(name for name in settings.reward_models if name not in ORACLES)]


def check(field: str, objectives: Sequence[str], settings: config.Oracles) -> list[Problem]:
    """What is wrong with the objectives that the recipe names at `field`."""
    remedy = f"use one of {', '.join(known(settings))}, or add it to oracles.reward_models"
    return [Problem("recipe", None, field, name, remedy) for name in objectives if name not in known(settings)]


def load(objectives: Sequence[str], settings: config.Oracles) -> dict[str, Oracle]:
    """The oracles of these objectives. A reward model goes before a built-in oracle of its name. Raises InputError."""
    found: dict[str, Oracle] = {}
    for name in objectives:
        if name in settings.reward_models:
            from nemo_pivotrl.backends.reference.reward_model import RewardModel

            found[name] = RewardModel(name, settings)
        else:
            ORACLES[name]("one answer")  # what is missing is said before anything is decoded
            found[name] = _each(ORACLES[name])
    return found


def _each(score: Callable[[str], float]) -> Oracle:
    return lambda _, answers: [score(answer) for answer in answers]
