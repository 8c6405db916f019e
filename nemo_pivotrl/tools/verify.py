"""verify: rows in, verdicts out, without a model. `nemo-pivotrl verify --verifier NAME IN.jsonl OUT.jsonl`.

Rows may be NeMo-Gym rollouts, recorded verdicts (with a `config` of their own), or a profile, whose samples are scored one
by one. One line comes out for each action, in order: `{reward, category, detail}`. A fault of the verifier has no reward.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from nemo_pivotrl import config
from nemo_pivotrl.components.progress import progress
from nemo_pivotrl.core.artifacts import HEADER_KEY, canonical_json, json_line
from nemo_pivotrl.core.atomic import open_input, replacing
from nemo_pivotrl.core.errors import InputError, Problem, short
from nemo_pivotrl.core.lock import only_writer
from nemo_pivotrl.core.types import Action, Case, Verdict
from nemo_pivotrl.data.gym_rows import action_of_row
from nemo_pivotrl.data.states import States, open_states
from nemo_pivotrl.verifiers.base import Verifier, VerifierFault, verdicts
from nemo_pivotrl.verifiers.loading import ALIASES, load_verifier, settings_with
from nemo_pivotrl.verifiers.rows import RowError, case_of, sampled_action

CHUNK = 2048
MAX_PROBLEMS = 100


def verify(settings: config.Verifier, source: Path, target: Path) -> Counter[str]:
    """Score every action of `source` into `target`; the counts of accepted, rejected and faults.

    Raises InputError naming the lines that cannot be read; then nothing is written.
    """
    counts: Counter[str] = Counter()
    problems: list[Problem] = []
    loaded: dict[str, Verifier] = {}
    with (
        only_writer(target.parent, f"verify into {target.name}", name=f".{target.name}.lock"),
        replacing(target) as out,
    ):
        with progress(None, 0, "verify", "verdict") as bar:
            rows = questions(source, settings, loaded, problems)
            while chunk := list(islice(rows, CHUNK)):
                out.writelines(_score(chunk, counts))
                bar.update(len(chunk))
        if problems:
            raise InputError(problems)
    return counts


Question = tuple[Verifier, Case, Action | Verdict, dict[str, Any]]


def questions(
    source: Path, settings: config.Verifier, loaded: dict[str, Verifier], problems: list[Problem]
) -> Iterator[Question]:
    """(verifier, case, action, columns to repeat in the output) of each action in the file."""
    if not source.exists():
        raise InputError(Problem(str(source), None, "file", "no such file", "give a JSONL file of rows"))
    states: States | None = None
    with open_input(source) as handle:
        for number, line in enumerate(handle, start=1):
            if len(problems) >= MAX_PROBLEMS:
                return
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise RowError("line", row, "a JSON object")
                if HEADER_KEY in row and number == 1:
                    states = open_states(source) if row[HEADER_KEY].get("stage") == "profiles" else None
                    continue
                found = list(_questions_of(row, settings, loaded, states))
            except RowError as error:
                problems.append(Problem(str(source), number, error.field, short(repr(error.found)), error.remedy))
            except (ValueError, RecursionError) as error:
                if isinstance(error, InputError):
                    raise
                problems.append(
                    Problem(str(source), number, "line", short(line.decode("utf-8", "replace")), f"not JSON ({error})")
                )
            else:
                if not problems:
                    yield from found


def _questions_of(
    row: dict[str, Any], settings: config.Verifier, loaded: dict[str, Verifier], states: States | None
) -> Iterator[Question]:
    name = ALIASES.get(settings.name, settings.name)
    # a recorded verdict's config is that of the verifier it is of; another one is not asked to understand it
    of = row.get("verifier", name)
    own = row.get("config") if isinstance(of, str) and ALIASES.get(of, of) == name else None
    chosen = settings_with(settings, own) if isinstance(own, dict) else settings
    key = canonical_json(own)
    if key not in loaded:
        loaded[key] = load_verifier(chosen, where="row config" if own else "command line")
    verifier = loaded[key]
    if states is not None:
        case = states.candidate(row).case
        for index, sample in enumerate(row["samples"]):
            columns = {"candidate_id": row["candidate_id"], "sample": index}
            truncated = sample.get("finish_reason") == "length"
            action = Verdict(0.0, "TRUNCATED") if truncated else action_of_row(sample["action"])
            yield verifier, case, action, columns
        return
    case = case_of(row, with_messages=verifier.reads_state, family=name)
    yield verifier, case, sampled_action(row, "\n" if name == "terminus" else ""), {}


def _score(chunk: list[Question], counts: Counter[str]) -> Iterator[bytes]:
    results: list[Verdict | VerifierFault] = [Verdict(0.0, "")] * len(chunk)
    for verifier in {id(q[0]): q[0] for q in chunk}.values():
        mine = [i for i, q in enumerate(chunk) if q[0] is verifier and isinstance(q[2], Action)]
        pairs = [(chunk[i][1], action) for i in mine if isinstance(action := chunk[i][2], Action)]
        for i, result in zip(mine, verdicts(verifier, pairs), strict=True):
            results[i] = result
    for (_, _, action, columns), result in zip(chunk, results, strict=True):
        verdict = action if isinstance(action, Verdict) else result
        if isinstance(verdict, VerifierFault):
            counts["faults"] += 1
        else:
            counts[
                "accepted" if verdict.reward == 1.0 else "rejected" if verdict.reward == 0.0 else "partly accepted"
            ] += 1
        yield json_line(columns | verdict_row(verdict))


def verdict_row(result: Verdict | VerifierFault) -> dict[str, Any]:
    """`{reward, category, detail}`; the detail holds what there is of reason, rules and figures."""
    if isinstance(result, VerifierFault):
        return {"reward": None, "category": "VERIFIER_FAULT", "detail": {"kind": result.kind, "reason": str(result)}}
    detail: dict[str, Any] = {"reason": result.detail} if result.detail else {}
    if result.rules:
        detail["rules"] = list(result.rules)
    return {"reward": result.reward, "category": result.category, "detail": detail | dict(result.figures)}
