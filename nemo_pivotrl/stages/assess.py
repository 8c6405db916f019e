"""assess: how good are steered answers, what do they cost, and how far from the patient are they? (LLMdoctor)

Every arm answers the same prompts with the same seeds. An oracle scores each answer; arms are compared pair by pair with
the first: win, tie, lose. An oracle sees one answer at a time, so there is no order to swap.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from nemo_pivotrl import backends, manners
from nemo_pivotrl.backends.guided import Guided, GuidedGenerator, Steering
from nemo_pivotrl.chat import Chat
from nemo_pivotrl.config import Arm, Recipe
from nemo_pivotrl.records import (
    ArtefactWriter,
    Header,
    InputError,
    Problem,
    digest,
    is_complete,
    json_line,
    read_rows,
    write_atomically,
)
from nemo_pivotrl.stages.decode import load, prompt_ids
from nemo_pivotrl.stages.evaluate import bootstrap
from nemo_pivotrl.stages.ledger import spend
from nemo_pivotrl.stages.progress import progress
from nemo_pivotrl.stages.rollout import sample_seed

Row = dict[str, Any]


def assess(recipe: Recipe, fresh: bool = False) -> Path:
    """Write `assessment.jsonl` (one row an answer) and `assessment.json`, and print the table. Resumes after kill -9 to the
    same answers; times differ."""
    _check(recipe)
    settings, path = recipe.assess, recipe.path("assessment.jsonl")
    header = Header("assessment", _digest(recipe), policy=backends.policy_revision(recipe.patient.model_name))
    if not is_complete(path, header, fresh):
        chat, generator, own = load(recipe)
        asked = manners.prompts(recipe.seed, "test", settings.prompts)
        prompts = [prompt_ids([{"role": "user", "content": text}], (), chat, own) for text in asked]
        with ArtefactWriter(path, header, fresh) as writer, spend(Path(recipe.run_dir), "assess") as cost:
            each = settings.prompts * settings.samples
            done, skip = divmod(writer.rows_done, each)
            arms = list(settings.arms.items())
            with progress(len(arms), done, "assess", "arm") as bar:
                for label, arm in arms[done:]:
                    # a torn arm is answered again, and only what is missing of it is written
                    writer.write(_answers(recipe, label, arm, asked, prompts, chat, generator)[skip:])
                    skip = 0
                    bar.update(1)
            writer.finish()
            cost.update(answers=each * len(arms))
    rows = list(read_rows(path))
    summary = summarise(rows, recipe)
    write_atomically(recipe.path("assessment.json"), json_line(summary).decode())
    print(table(summary))
    return path


def _check(recipe: Recipe) -> None:
    settings, problems = recipe.assess, []
    if not settings.arms:
        problems.append(Problem("recipe", None, "assess.arms", "none", "name at least one way of answering"))
    for label, arm in settings.arms.items():
        for name in arm.beta:
            if name not in recipe.decode.doctors:
                remedy = f"use one of decode.doctors: {', '.join(recipe.decode.doctors) or 'none'}"
                problems.append(Problem("recipe", None, f"assess.arms.{label}.beta", name, remedy))
    for objective in settings.objectives:
        if objective not in manners.OBJECTIVES:
            remedy = f"the oracle knows {', '.join(manners.OBJECTIVES)}"
            problems.append(Problem("recipe", None, "assess.objectives", objective, remedy))
    if problems:
        raise InputError(problems)


def _digest(recipe: Recipe) -> str:
    doctors = {
        name: [backends.policy_revision(d.path), backends.policy_revision(d.reference) if d.reference else ""]
        for name, d in recipe.decode.doctors.items()
    }
    kept = {k: v for k, v in dataclasses.asdict(recipe.decode).items() if k not in ("prompts", "output", "doctors")}
    return digest([recipe.seed, dataclasses.asdict(recipe.assess), kept, doctors, recipe.patient.dtype])


def _answers(
    recipe: Recipe,
    label: str,
    arm: Arm,
    asked: Sequence[str],
    prompts: Sequence[Any],
    chat: Chat,
    generator: GuidedGenerator,
) -> list[Row]:
    """The arm's answers, the best of each lot where it samples several."""
    settings = recipe.assess
    work = [(p, k, n) for p in range(len(asked)) for k in range(settings.samples) for n in range(arm.best_of)]
    requests = [
        Steering(
            alpha=arm.alpha,
            beta=arm.beta,
            temperature=arm.temperature,
            top_p=arm.top_p,
            max_new_tokens=recipe.decode.max_new_tokens,
            seed=sample_seed("assess", recipe.seed, asked[p], k, n),
        )
        for p, k, n in work
    ]
    begun = time.perf_counter()
    answers = generator.generate([prompts[p][0] for p, _, _ in work], requests, [prompts[p][1] for p, _, _ in work])
    seconds = time.perf_counter() - begun
    spent = sum(len(answer.tokens) for answer in answers)
    rows = [
        _row(label, asked[p], p, k, answer, chat, settings.objectives)
        for (p, k, _), answer in zip(work, answers, strict=True)
    ]
    lots = [rows[i : i + arm.best_of] for i in range(0, len(rows), arm.best_of)]
    best = [max(lot, key=lambda row: row["scores"][settings.objectives[0]]) for lot in lots]
    return [row | {"seconds_per_token": seconds / spent, "tokens_spent": spent / len(best)} for row in best]


def _row(label: str, asked: str, p: int, k: int, answer: Guided, chat: Chat, objectives: Sequence[str]) -> Row:
    text = chat.decode(answer.token_ids).strip()
    return {
        "arm": label,
        "prompt": p,
        "sample": k,
        "asked": asked,
        "text": text,
        "tokens": len(answer.tokens),
        "kl": float(np.mean([t.kl for t in answer.tokens])),
        "changed": float(np.mean([t.changed_token for t in answer.tokens])),
        "scores": {objective: manners.score(objective, text) for objective in objectives},
    }


def distinct(texts: Sequence[str], n: int) -> float:
    """Different word n-grams over all of them, between the answers to one prompt; 0 where there are none."""
    grams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition_diversity(text: str) -> float:
    """The field's diversity of one answer: the product over n = 2, 3, 4 of its share of different word n-grams."""
    return float(np.prod([distinct([text], n) or 1.0 for n in (2, 3, 4)]))


def summarise(rows: Sequence[Row], recipe: Recipe) -> dict[str, Any]:
    """Per arm and objective: mean score and, against the first arm, win, tie and lose shares with bootstrap intervals
    over prompts; KL and changed tokens; diversity; cost."""
    settings = recipe.assess
    by_arm: dict[str, list[Row]] = {label: [r for r in rows if r["arm"] == label] for label in settings.arms}
    first = by_arm[next(iter(settings.arms))]
    arms = {}
    for label, mine in by_arm.items():
        texts: dict[int, list[str]] = {}
        for row in mine:
            texts.setdefault(row["prompt"], []).append(row["text"])
        several = [group for group in texts.values() if len(group) > 1]
        arms[label] = {
            "objectives": {o: _against(mine, first, o, recipe) for o in settings.objectives},
            "kl": float(np.mean([r["kl"] for r in mine])),
            "changed": float(np.mean([r["changed"] for r in mine])),
            "distinct_2": float(np.mean([distinct(group, 2) for group in several])) if several else None,
            "different_answers": float(np.mean([a != b for g in several for a, b in combinations(g, 2)]))
            if several
            else None,
            "diversity": float(np.mean([repetition_diversity(r["text"]) for r in mine])),
            "tokens": float(np.mean([r["tokens"] for r in mine])),
            "tokens_spent": mine[0]["tokens_spent"],
            "seconds_per_token": mine[0]["seconds_per_token"],
        }
    return {"arms": arms, "confidence": settings.confidence, "prompts": settings.prompts, "samples": settings.samples}


def _against(mine: Sequence[Row], first: Sequence[Row], objective: str, recipe: Recipe) -> dict[str, Any]:
    prompts = sorted({row["prompt"] for row in mine})

    def interval(values: dict[int, list[float]]) -> list[float]:
        means = np.array([np.mean(values[p]) for p in prompts])
        return [float(means.mean()), *bootstrap(means, recipe.assess.confidence, recipe.seed)]

    score: dict[int, list[float]] = {}
    compared: dict[str, dict[int, list[float]]] = {"win": {}, "tie": {}, "lose": {}}
    for row, other in zip(mine, first, strict=True):
        a, b = row["scores"][objective], other["scores"][objective]
        score.setdefault(row["prompt"], []).append(a)
        for name, holds in (("win", a > b), ("tie", a == b), ("lose", a < b)):
            compared[name].setdefault(row["prompt"], []).append(float(holds))
    return {"score": interval(score)} | {name: interval(values) for name, values in compared.items()}


def table(summary: dict[str, Any]) -> str:
    """The summary as text."""
    lines = []
    for objective in next(iter(summary["arms"].values()))["objectives"]:
        lines.append(
            f"{objective:<16}{'score':>24}{'win %':>22}{'tie %':>8}{'lose %':>8}{'KL':>9}{'changed':>9}{'tokens':>8}{'spent':>8}"
        )
        for label, arm in summary["arms"].items():
            o = arm["objectives"][objective]
            score = "{:.3f} [{:.3f}, {:.3f}]".format(*o["score"])
            win = "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * x for x in o["win"]))
            lines.append(
                f"{label:<16}{score:>24}{win:>22}{100 * o['tie'][0]:>8.1f}{100 * o['lose'][0]:>8.1f}{arm['kl']:>9.4f}"
                f"{arm['changed']:>9.3f}{arm['tokens']:>8.1f}{arm['tokens_spent']:>8.1f}"
            )
    size = f"{summary['prompts']} prompts x {summary['samples']} answers"
    lines.append(f"{size}; {summary['confidence']:.0%} intervals over prompts; KL in nats a token")
    return "\n".join(lines)
