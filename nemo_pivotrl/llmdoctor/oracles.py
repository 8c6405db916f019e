"""Oracles: what scores an answer, to rank a patient's own answers and to compare ways of answering.

An oracle sees one answer at a time, so that there is no order to swap: `kindness` knows the words of the demo, `brevity`
counts words, `sentiment` is VADER's. A recipe adds functions of the user's own by import path (`oracles.functions`) and
Hugging Face reward models (`oracles.reward_models`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from nemo_pivotrl import config
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.core.plugins import load_plugin
from nemo_pivotrl.data.template_rendering import Template

Oracle = Callable[[Sequence[Sequence[dict[str, Any]]], Sequence[str]], Sequence[float | None]]
"""(the messages before each answer, the answers) -> scores; more is better. None: the oracle has failed, and has none."""


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


HERE = "nemo_pivotrl.llmdoctor.oracles"
FUNCTIONS = {
    "kindness": "nemo_pivotrl.demo.answer_styles:kindness",
    "brevity": f"{HERE}:brevity",
    "sentiment": f"{HERE}:sentiment",
}
"""Built in: objective -> import path of a function of the answer alone."""


def known(settings: config.Oracles) -> list[str]:
    """Every objective that can be scored."""
    return list(FUNCTIONS | settings.functions | settings.reward_models)


def check(field: str, objectives: Sequence[str], settings: config.Oracles) -> list[Problem]:
    """What is wrong with the objectives that the recipe names at `field`."""
    remedy = f"use one of {', '.join(known(settings))}, or add it to oracles.functions or oracles.reward_models"
    return [Problem("recipe", None, field, name, remedy) for name in objectives if name not in known(settings)]


def load(objectives: Sequence[str], settings: config.Oracles) -> dict[str, Oracle]:
    """The oracles of these objectives. What the recipe adds goes before a built-in oracle of its name. Raises InputError."""
    found: dict[str, Oracle] = {}
    for name in objectives:
        if name in settings.reward_models:
            from nemo_pivotrl.backends.reference.reward_model import RewardModel

            found[name] = RewardModel(name, settings, _encoder)
        else:
            found[name] = _each(_function(name, settings))
    return found


def _encoder(tokenizer: Any, where: str) -> Callable[[Sequence[dict[str, Any]]], list[int]]:
    """Messages to token ids by a tokenizer's chat template. Special tokens in their text are text: an answer cannot end its own
    turn and praise itself in another."""
    template = Template(tokenizer, {}, config.ChatSettings(), where)
    return lambda messages: template.encode(template.render(messages, [], prompt=False))


def _function(name: str, settings: config.Oracles) -> Callable[[str], float]:
    """A function (answer) -> score, tried once: what is missing is said before anything is decoded."""
    field = f"oracles.functions.{name}"
    score: Callable[[str], float] = load_plugin((FUNCTIONS | settings.functions)[name], field)
    value = score("one answer")
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(Problem("recipe", None, field, f"{value!r} for an answer", "return a finite number"))
    return score


def _each(score: Callable[[str], float]) -> Oracle:
    return lambda _, answers: [score(answer) for answer in answers]
