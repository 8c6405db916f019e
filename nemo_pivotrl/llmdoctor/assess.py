"""assess: how good are steered answers, what do they cost, and how far from the patient are they? (LLMdoctor)

Every arm answers the same prompts with the same seeds. An oracle scores each answer; arms are compared pair by pair with
the first: win, tie, lose. An oracle sees one answer at a time, so there is no order to swap. A judge (`assess.judge`) sees both, in
both orders (`head_to_head`).
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from nemo_pivotrl.backends.adapters import doctor_files
from nemo_pivotrl.backends.identity import policy_revision
from nemo_pivotrl.backends.reference.guided import Guided, GuidedGenerator, GuidedSamplingParams
from nemo_pivotrl.components.conclusions import conclude
from nemo_pivotrl.components.durable_map import Found, Map, Once, Tally, found_rows
from nemo_pivotrl.components.rollout import sample_seed
from nemo_pivotrl.components.stage_checks import assessment_checks
from nemo_pivotrl.components.statistics import bootstrap
from nemo_pivotrl.config import Arm, Recipe
from nemo_pivotrl.core.artifacts import Header, digest, file_digest, json_line, read_rows
from nemo_pivotrl.core.atomic import write_atomically
from nemo_pivotrl.core.errors import InputError, NotFiniteError, Problem
from nemo_pivotrl.core.lock import one_writer
from nemo_pivotrl.core.types import FailedSample
from nemo_pivotrl.data.chat_template import Chat
from nemo_pivotrl.llmdoctor import head_to_head, oracles
from nemo_pivotrl.llmdoctor.decode import Generator, Prompt, Rendered, load, prompt_ids, read_prompts

Row = dict[str, Any]


@one_writer
def assess(recipe: Recipe, fresh: bool = False) -> Path:
    """Write `assessment.jsonl` (one row an answer) and `assessment.json`, and print the table. Resumes after kill -9 to the
    same bytes; times stand in the ledger alone.

    >>> path = assess(load_recipe("llmdoctor.yaml"))
    >>> path.name
    'assessment.jsonl'
    """
    _check(recipe)
    settings, path = recipe.assess, recipe.path("assessment.jsonl")
    told = recipe.told("assess", "decode", "patient.dtype", "oracles")
    header = Header("assessment", _digest(recipe), policy=policy_revision(recipe.patient.model_name), settings=told)
    each, tally = len(_prompts(recipe)) * settings.samples, Tally()
    arms = [(n * each, partial(Once, label, each, tally)) for n, label in enumerate(settings.arms)]
    make = partial(_exam, recipe)
    Map(recipe, "assess", path, header, lambda: arms, make, each * len(arms), "answer", tally).run(fresh)
    rows = list(read_rows(path))
    summary = summarise(rows, recipe)
    if settings.judge.base_url:
        _judge(summary, rows, recipe)
    write_atomically(recipe.path("assessment.json"), json_line(summary).decode())
    print(table(summary))
    print(verdict(summary))
    conclude(Path(recipe.run_dir), "assess", assessment_checks(summary))
    return path


def _judge(summary: dict[str, Any], rows: Sequence[Row], recipe: Recipe) -> None:
    """Add to the summary what a judge says of each arm's answers beside the first arm's."""
    settings = recipe.assess
    found = head_to_head.compare(rows, [_messages(prompt) for prompt in _prompts(recipe)], recipe)
    for label, arm in found.items():
        summary["arms"][label]["judge"] = head_to_head.shares(**arm, confidence=settings.confidence, seed=recipe.seed)
    summary["judge"] = {"model": settings.judge.model, "criterion": settings.criterion}


def _check(recipe: Recipe) -> None:
    settings, problems = recipe.assess, []
    if not settings.arms:
        problems.append(Problem("recipe", None, "assess.arms", "none", "name at least one way of answering"))
    for label, arm in settings.arms.items():
        for name in arm.beta:
            if name not in recipe.decode.doctors:
                remedy = f"use one of decode.doctors: {', '.join(recipe.decode.doctors) or 'none'}"
                problems.append(Problem("recipe", None, f"assess.arms.{label}.beta", name, remedy))
    if not settings.objectives:
        remedy = f"name some of {', '.join(oracles.known(recipe.oracles))}"
        problems.append(Problem("recipe", None, "assess.objectives", "none", remedy))
    problems += oracles.check("assess.objectives", settings.objectives, recipe.oracles)
    problems += head_to_head.check(recipe)
    if not settings.prompts:
        problems.append(Problem("recipe", None, "assess.prompts", "nothing", "give a JSONL file, one prompt a line"))
    if problems:
        raise InputError(problems)


def _digest(recipe: Recipe) -> str:
    doctors = {}
    for name, doctor in recipe.decode.doctors.items():
        files = doctor_files(doctor, recipe.decode.mode, f"decode.doctors.{name}")
        reference = doctor.reference or files.reference
        doctors[name] = [files.revision, policy_revision(reference) if reference else ""]
    kept = {k: v for k, v in dataclasses.asdict(recipe.decode).items() if k not in ("prompts", "output", "doctors")}
    asked = dataclasses.asdict(recipe.assess) | {
        "prompts": file_digest(Path(recipe.assess.prompts)),
        "confidence": None,
    }
    del asked["judge"], asked["criterion"]  # they decide nothing of the answers
    models = {
        name: policy_revision(folder)
        for name, folder in recipe.oracles.reward_models.items()
        if name in recipe.assess.objectives
    }
    return digest([recipe.seed, asked, kept, doctors, recipe.patient.dtype, models, recipe.oracles.dtype])


def _prompts(recipe: Recipe) -> list[Prompt]:
    found = read_prompts(Path(recipe.assess.prompts), recipe)
    return found[: recipe.assess.limit or None]


def _exam(recipe: Recipe) -> _Exam:
    judges = oracles.load(recipe.assess.objectives, recipe.oracles)
    chat, generator, own = load(recipe)
    asked = _prompts(recipe)
    return _Exam(recipe, asked, [prompt_ids(p.content, p.tools, chat, own) for p in asked], chat, generator, judges)


@dataclasses.dataclass
class _Exam:
    """The prompts and everything that answers and scores them."""

    recipe: Recipe
    asked: Sequence[Prompt]
    rendered: Sequence[Rendered]
    chat: Chat
    generator: Generator
    judges: Mapping[str, oracles.Oracle]

    def __call__(self, label: str) -> Found:
        """An arm's answers."""
        answers, seconds = self.answers(label, self.recipe.assess.arms[label])
        found = found_rows(answers, answers=len(answers))
        found.notes["seconds_per_token"] = {label: seconds / sum(row["tokens"] for row in answers)}
        return found

    def answers(self, label: str, arm: Arm) -> tuple[list[Row], float]:
        """(The arm's answers, the best of each lot where it samples several, seconds that all of them took)."""
        settings = self.recipe.assess
        work = [(p, k, n) for p in range(len(self.asked)) for k in range(settings.samples) for n in range(arm.best_of)]
        requests = [
            GuidedSamplingParams(
                alpha=arm.alpha,
                beta=arm.beta,
                temperature=arm.temperature,
                top_p=arm.top_p,
                max_new_tokens=self.recipe.decode.max_new_tokens,
                seed=sample_seed("assess", self.recipe.seed, self.asked[p].prompt_id, k, n),
            )
            for p, k, n in work
        ]
        begun = time.perf_counter()
        prompts, own = [self.rendered[p][0] for p, _, _ in work], [self.rendered[p][1] for p, _, _ in work]
        if isinstance(self.generator, GuidedGenerator):
            with _forwards(self.generator) as forwards:
                answers = self.generator.generate(prompts, requests, own)
        else:
            answers = _whole(self.generator.generate(prompts, requests, own), label)
            forwards = engine_forwards(self.recipe, arm, answers)
        seconds = time.perf_counter() - begun
        spent = sum(len(answer.tokens) for answer in answers)
        texts = [self.chat.decode(answer.token_ids).strip() for answer in answers]
        asked = [_messages(self.asked[p]) for p, _, _ in work]
        scores = {objective: judge(asked, texts) for objective, judge in self.judges.items()}
        if lost := {objective: list(found).count(None) for objective, found in scores.items() if None in found}:
            remedy = "arms are compared answer by answer: use a reward model that scores all of them, or float32"
            faults = [
                Problem("oracle", None, o, f"NaN for {n} of {len(texts)} answers", remedy) for o, n in lost.items()
            ]
            raise NotFiniteError(faults)
        rows = [
            self._row(label, p, k, text, answer) | {"scores": {o: found[i] for o, found in scores.items()}}
            for i, ((p, k, _), text, answer) in enumerate(zip(work, texts, answers, strict=True))
        ]
        lots = [rows[i : i + arm.best_of] for i in range(0, len(rows), arm.best_of)]
        best = [max(lot, key=lambda row: row["scores"][settings.objectives[0]]) for lot in lots]
        kept = sum(row["tokens"] for row in best)
        cost = {
            "forwards_per_token": {name: count / kept for name, count in forwards.items()},
            "tokens_spent": spent / len(best),
        }
        return [row | cost for row in best], seconds

    def _row(self, label: str, p: int, k: int, text: str, answer: Guided) -> Row:
        row = {
            "arm": label,
            "prompt": p,
            "sample": k,
            "asked": _messages(self.asked[p])[-1]["content"],
            "text": text,
            "tokens": len(answer.tokens),
            "kl": float(np.mean([t.kl for t in answer.tokens])),
            "changed": float(np.mean([t.changed_token for t in answer.tokens])),
        }
        if p < self.recipe.assess.shown and k == 0:
            row["trace"] = [
                [
                    self.chat.tokenizer.decode([t.token_id]),
                    *(round(x, 4) for x in (t.patient_log_prob, t.mixed_log_prob, t.kl)),
                    t.changed_token,
                ]
                for t in answer.tokens
            ]
        return row


def _whole(answers: Sequence[Guided | FailedSample], label: str) -> list[Guided]:
    """All of an arm's answers. Raises InputError where a server gave none: arms are compared answer by answer."""
    lost = [answer for answer in answers if isinstance(answer, FailedSample)]
    if lost:
        found = f"no answer to {len(lost)} of {len(answers)} requests: {lost[0].detail}"
        raise InputError(
            Problem("servers", None, f"assess.arms.{label}", found, "mend the servers and run the same command")
        )
    return [answer for answer in answers if isinstance(answer, Guided)]


def _messages(prompt: Prompt) -> list[dict[str, Any]]:
    """The prompt as a reward model reads it."""
    return [{"role": "user", "content": prompt.content}] if isinstance(prompt.content, str) else list(prompt.content)


@contextmanager
def _forwards(generator: GuidedGenerator) -> Iterator[Counter[str]]:
    """Counts the tokens that each model reads after the prompts, rows that wait for their batch to end included."""
    counts: Counter[str] = Counter()
    names: dict[int, tuple[str, Any]] = {id(generator.patient): ("patient", generator.patient)}
    for name, model in generator.doctors.models.items():
        names.setdefault(id(model), (name, model))
    for name, model in generator.doctors.references.items():
        names.setdefault(id(model), (f"{name} reference", model))

    def count(name: str) -> Any:
        def hook(_: Any, __: Any, given: dict[str, Any]) -> None:
            if given["past_key_values"].get_seq_length():
                counts[name] += given["input_ids"].numel()

        return hook

    hooks = [model.register_forward_pre_hook(count(name), with_kwargs=True) for name, model in names.values()]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def engine_forwards(recipe: Recipe, arm: Arm, answers: Sequence[Guided]) -> Counter[str]:
    """The same count where no row waits for another: every model reads each token of an answer but the last."""
    read = sum(max(len(answer.tokens) - 1, 0) for answer in answers)
    used = [name for name, weight in arm.beta.items() if weight]
    names = ["patient", *used]
    if recipe.decode.mode == "ratio":
        apart = recipe.patient.model_name
        files = {n: doctor_files(recipe.decode.doctors[n], "ratio", f"decode.doctors.{n}") for n in used}
        names += [f"{name} reference" for name in used if files[name].reference != apart]
    return Counter(dict.fromkeys(names, read))


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
            "setting": dataclasses.asdict(settings.arms[label]),
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
            "forwards_per_token": mine[0]["forwards_per_token"],
        }
    prompts = len({row["prompt"] for row in rows})
    return {"arms": arms, "confidence": settings.confidence, "prompts": prompts, "samples": settings.samples}


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
        figures = "".join(f"{name:>9}" for name in ("KL", "changed", "tokens", "spent", "forwards"))
        lines.append(f"{objective:<22}{'score':>24}{'win %':>22}{'tie %':>8}{'lose %':>8}{figures}")
        for label, arm in summary["arms"].items():
            o = arm["objectives"][objective]
            score = "{:.3f} [{:.3f}, {:.3f}]".format(*o["score"])
            win = "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * x for x in o["win"]))
            lines.append(
                f"{label:<22}{score:>24}{win:>22}{100 * o['tie'][0]:>8.1f}{100 * o['lose'][0]:>8.1f}{arm['kl']:>9.4f}"
                f"{arm['changed']:>9.3f}{arm['tokens']:>9.1f}{arm['tokens_spent']:>9.1f}"
                f"{sum(arm['forwards_per_token'].values()):>9.2f}"
            )
    if "judge" in summary:
        lines += head_to_head.table(summary["arms"], summary["judge"]["model"])
    size = f"{summary['prompts']} prompts x {summary['samples']} answers"
    lines.append(f"{size}; {summary['confidence']:.0%} intervals over prompts; KL in nats a token")
    lines.append("forwards: tokens that all models read after the prompt, for a token of the answer")
    return "\n".join(lines)


def verdict(summary: dict[str, Any]) -> str:
    """One sentence: how often each arm that doctors steer wins and loses against the first arm, by the first objective.

    An arm whose interval of wins reaches its losses is called not shown.
    """
    first, *others = summary["arms"].items()
    objective = next(iter(first[1]["objectives"]))
    parts = []
    for label, arm in others:
        if arm["setting"]["beta"]:
            found = arm["objectives"][objective]
            (win, low, _), (lose, _, high) = found["win"], found["lose"]
            shown = "" if low > high or found["win"][2] < found["lose"][1] else " (not shown)"
            parts.append(
                f"{label} wins {100 * win:.1f} % and loses {100 * lose:.1f} %{shown} at {arm['kl']:.3f} nats a token"
            )
    return (
        f"Against {first[0]}, by {objective}: {'; '.join(parts)}."
        if parts
        else f"No arm is steered against {first[0]}."
    )
