"""rank: prompts -> preference files, LLMdoctor's own data where there is none: the patient's answers, ranked by oracles.

The patient answers each prompt several times (`answers.jsonl`, through the decode stage, hence resumable); of each lot of
answers the best and the worst make a prompt/chosen/rejected record. Every objective ranks the same answers.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_pivotrl.config import Rank, Recipe
from nemo_pivotrl.core.artifacts import read_rows
from nemo_pivotrl.core.atomic import write_atomically
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.core.lock import one_writer
from nemo_pivotrl.llmdoctor import oracles
from nemo_pivotrl.llmdoctor.decode import decode, read_prompts

Record = dict[str, Any]


@one_writer
def rank(recipe: Recipe, fresh: bool = False) -> Path:
    """Write `ranked/OBJECTIVE.jsonl` for each objective; returns the folder. Raises InputError for what cannot be asked."""
    settings = recipe.rank
    problems = oracles.check("rank.objectives", settings.objectives, recipe.oracles)
    if not settings.objectives:
        remedy = f"name some of {', '.join(oracles.known(recipe.oracles))}"
        problems.append(Problem("recipe", None, "rank.objectives", "none", remedy))
    if not settings.prompts:
        problems.append(Problem("recipe", None, "rank.prompts", "nothing", "give a JSONL file, one prompt a line"))
    if settings.answers_per_prompt < settings.answers_per_pair:
        found = f"{settings.answers_per_prompt} < answers_per_pair {settings.answers_per_pair}"
        problems.append(Problem("recipe", None, "rank.answers_per_prompt", found, "a pair needs so many answers"))
    if problems:
        raise InputError(problems)
    alone = dataclasses.replace(
        recipe.decode,
        prompts=settings.prompts,
        output="answers.jsonl",
        doctors={},
        alpha=1.0,
        temperature=settings.temperature,
        top_k=0,
        top_p=1.0,
        num_samples=settings.answers_per_prompt,
        token_records=False,
    )
    recipe = dataclasses.replace(recipe, decode=alone)
    asked = _messages(recipe)
    judges = oracles.load(settings.objectives, recipe.oracles)
    rows = list(read_rows(decode(recipe, fresh)))
    folder = recipe.path("ranked")
    for objective, oracle in judges.items():
        scores = oracle([asked[row["id"]] for row in rows], [row["text"].strip() for row in rows])
        records, left_out = ranked(rows, scores, asked, settings)
        path = folder / f"{objective}.jsonl"
        if not records:
            remedy = "ask more prompts, lower rank.min_gap, or raise decode.max_new_tokens"
            raise InputError(Problem("recipe", None, f"rank.objectives.{objective}", f"no pair: {left_out}", remedy))
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in records))
        why = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items())) or "none"
        print(f"{path}: {len(records)} pairs of {len(rows)} answers; left out: {why}")
    return folder


def _messages(recipe: Recipe) -> dict[str, list[dict[str, Any]]]:
    """Each prompt's messages by its id. Raises InputError naming every line that is a text, or an id that is there twice."""
    path = recipe.decode.prompts
    prompts = read_prompts(Path(path), recipe)
    remedy = "write it as messages: the doctor and the faces read the patient's chat template"
    problems = [Problem(path, p.line, "prompt", p.content[:60], remedy) for p in prompts if isinstance(p.content, str)]
    seen = Counter(p.prompt_id for p in prompts)
    problems += [
        Problem(path, p.line, "id", p.prompt_id, "give every prompt an id of its own")
        for p in prompts
        if seen[p.prompt_id] > 1
    ]
    if problems:
        raise InputError(problems)
    return {p.prompt_id: list(p.content) for p in prompts if not isinstance(p.content, str)}


def ranked(
    rows: Sequence[Record], scores: Sequence[float | None], asked: Mapping[str, list[dict[str, Any]]], settings: Rank
) -> tuple[list[Record], Counter[str]]:
    """(records, what was left out): best and worst of each lot of a prompt's finished answers, in their order.

    Answers that were cut off are `unfinished`, those that the patient or the oracle could not compute `failed`; lots whose ends
    differ by no more than `min_gap` are `ties`; a pair that another lot made already is a `repeat`.
    """
    left_out: Counter[str] = Counter()
    answers: dict[str, list[tuple[float, str]]] = {}
    for row, score in zip(rows, scores, strict=True):
        if row["finish_reason"] == "failed" or score is None:
            left_out["failed"] += 1
        elif row["finish_reason"] == "stop":
            answers.setdefault(row["id"], []).append((score, row["text"].strip()))
        else:
            left_out["unfinished"] += 1
    records: list[Record] = []
    for prompt_id, found in answers.items():
        made = set()
        for start in range(0, len(found) - settings.answers_per_pair + 1, settings.answers_per_pair):
            lot = found[start : start + settings.answers_per_pair]
            (low, worst), (high, best) = (pick(lot, key=lambda answer: answer[0]) for pick in (min, max))
            if high - low <= settings.min_gap:
                left_out["ties"] += 1
            elif (best, worst) in made:
                left_out["repeats"] += 1
            else:
                made.add((best, worst))
                chosen, rejected = ([{"role": "assistant", "content": text}] for text in (best, worst))
                record = {"prompt": asked[prompt_id], "chosen": chosen, "rejected": rejected}
                records.append(record | {"score_chosen": high, "score_rejected": low})
    return records, left_out
