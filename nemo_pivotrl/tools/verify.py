"""verify: rows in, verdicts out, without a model. `nemo-pivotrl verify --verifier NAME IN.jsonl OUT.jsonl`.

Rows may be NeMo-Gym rollouts, recorded verdicts (with a `config` of their own), or a profile, whose samples are scored one
by one. One line comes out for each action, in order: `{reward, category, detail}`. A fault of the verifier has no reward.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from nemo_pivotrl import config
from nemo_pivotrl.components.durable_map import Found, Map, Tally, batches_of
from nemo_pivotrl.core.artifacts import HEADER_KEY, Header, canonical_json, digest, file_digest, json_line
from nemo_pivotrl.core.atomic import open_input, replacing
from nemo_pivotrl.core.errors import InputError, Problem, short
from nemo_pivotrl.core.lock import only_writer
from nemo_pivotrl.core.types import Action, Case, Verdict
from nemo_pivotrl.data.gym_rows import action_of_row
from nemo_pivotrl.data.states import States, open_states
from nemo_pivotrl.verifiers.base import Verifier, VerifierFault, verdicts
from nemo_pivotrl.verifiers.loading import ALIASES, identity, load_verifier, settings_with
from nemo_pivotrl.verifiers.rows import RowError, case_of, sampled_action

CHUNK = 256
"""Lines of a worker's task."""
MAX_PROBLEMS = 100
Line = tuple[int, bytes]
"""A line with its number, from 1 on."""
Question = tuple[Verifier, Case, Action | Verdict, dict[str, Any]]
"""Verifier, case, action, columns to repeat in the output."""


class UnreadableRows(InputError):
    """Lines that no verifier was asked about."""


def verify(
    settings: config.Verifier,
    source: Path,
    target: Path,
    executor: Literal["here", "processes", "ray"] = "here",
    workers: int = 1,
) -> Counter[str]:
    """Score every action of `source` into `target`, as a map; the counts of accepted, rejected and faults.

    Raises InputError naming the lines that cannot be read; then nothing is written.
    """
    if not source.exists():
        raise InputError(Problem(str(source), None, "file", "no such file", "give a JSONL file of rows"))
    counts, tally = Counter[str](), Tally()

    def write(parts: Iterable[tuple[bytes, int]]) -> None:
        with replacing(target) as out:
            for lines, _ in parts:
                counts.update(map(_kind_of, lines.splitlines()))
                out.write(lines)

    scorer = Scorer(settings, source)
    with only_writer(target.parent, f"verify into {target.name}", name=f".{target.name}.lock"):
        work = Map(
            config.Recipe(run_dir=str(target.parent), executor=executor, workers=workers),
            "verify",
            target,
            Header("verify", digest(settings), parent=file_digest(source), verifier=scorer.identity()),
            lambda: batches_of(lines_of(source), CHUNK, tally),
            (lambda: scorer) if executor == "here" else partial(Scorer, settings, source),
            tally=tally,
            write=write,
            costs=False,
        )
        try:
            work.work()
        except UnreadableRows:
            work.journal.unlink()  # the rows will be others
            raise InputError(list(islice(scorer.problems(), MAX_PROBLEMS))) from None
    return counts


def lines_of(source: Path) -> Iterator[Line]:
    """The lines of a file that are rows."""
    with open_input(source) as handle:
        for number, line in enumerate(handle, start=1):
            if line.strip() and not (number == 1 and _is_header(line)):
                yield number, line


def _is_header(line: bytes) -> bool:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and HEADER_KEY in row


class Scorer:
    """A map's worker: reads lines and judges what stands there, by a verifier for every `config` that rows bring along."""

    def __init__(self, settings: config.Verifier, source: Path):
        self.settings, self.source = settings, source
        self.loaded: dict[str, Verifier] = {}
        with open_input(source) as handle:
            first = handle.readline()
        of_profile = _is_header(first) and json.loads(first)[HEADER_KEY].get("stage") == "profiles"
        self.states = open_states(source) if of_profile else None

    def identity(self) -> str:
        """Of the verifier that judges rows without a `config`. Raises InputError for settings that it does not know."""
        self.loaded[canonical_json(None)] = verifier = load_verifier(self.settings, where="command line")
        return identity(verifier, self.settings)

    def __call__(self, lines: Sequence[Line]) -> Found:
        """A line for each verdict. Raises UnreadableRows."""
        read = [self.read(*line) for line in lines]
        if problems := [found for found in read if isinstance(found, Problem)]:
            raise UnreadableRows(problems)
        return Found(list(_score([question for found in read if not isinstance(found, Problem) for question in found])))

    def problems(self) -> Iterator[Problem]:
        """Of all lines of the file."""
        return (found for line in lines_of(self.source) if isinstance(found := self.read(*line), Problem))

    def read(self, number: int, line: bytes) -> list[Question] | Problem:
        """What a line asks, or what is wrong with it."""
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise RowError("line", row, "a JSON object")
            return list(_questions_of(row, self.settings, self.loaded, self.states))
        except RowError as error:
            return Problem(str(self.source), number, error.field, short(repr(error.found)), error.remedy)
        except (ValueError, RecursionError) as error:
            if isinstance(error, InputError):
                raise
            text = short(line.decode("utf-8", "replace"))
            return Problem(str(self.source), number, "line", text, f"not JSON ({error})")


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


def _score(chunk: list[Question]) -> Iterator[bytes]:
    results: list[Verdict | VerifierFault] = [Verdict(0.0, "")] * len(chunk)
    for verifier in {id(q[0]): q[0] for q in chunk}.values():
        mine = [i for i, q in enumerate(chunk) if q[0] is verifier and isinstance(q[2], Action)]
        pairs = [(chunk[i][1], action) for i in mine if isinstance(action := chunk[i][2], Action)]
        for i, result in zip(mine, verdicts(verifier, pairs), strict=True):
            results[i] = result
    for (_, _, action, columns), result in zip(chunk, results, strict=True):
        yield json_line(columns | verdict_row(action if isinstance(action, Verdict) else result))


def _kind_of(line: bytes) -> str:
    """What the counts call a verdict."""
    return {None: "faults", 1.0: "accepted", 0.0: "rejected"}.get(json.loads(line)["reward"], "partly accepted")


def verdict_row(result: Verdict | VerifierFault) -> dict[str, Any]:
    """`{reward, category, detail}`; the detail holds what there is of reason, rules and figures."""
    if isinstance(result, VerifierFault):
        return {"reward": None, "category": "VERIFIER_FAULT", "detail": {"kind": result.kind, "reason": str(result)}}
    detail: dict[str, Any] = {"reason": result.detail} if result.detail else {}
    if result.rules:
        detail["rules"] = list(result.rules)
    return {"reward": result.reward, "category": result.category, "detail": detail | dict(result.figures)}
