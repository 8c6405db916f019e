"""audit: does the verifier say what is known beforehand? Run it before GPU-hours are spent; `profile` does, on a sample.

For every candidate: the expert's own action must score 1; so should the same action written in another way; empty, garbage,
changed and other rows' actions must score 0. Candidates that nobody can win, and such that everybody wins, are listed; so
are those that a constant answer wins, with the share of all that the best one does: a policy can learn it instead of the task.
"""

from __future__ import annotations

import json
import time
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

from nemo_pivotrl.components.conclusions import audit_checks, conclude
from nemo_pivotrl.components.costs import spend
from nemo_pivotrl.components.durable_map import Found, Map, Tally, batches_of, found_rows, make_way
from nemo_pivotrl.components.lineage import check_lineage
from nemo_pivotrl.components.rollout import load_recipe_verifier
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.artifacts import Header, file_digest, json_line, read_header, read_rows, write_artefact
from nemo_pivotrl.core.atomic import read_json, write_atomically
from nemo_pivotrl.core.errors import InputError, Problem, short
from nemo_pivotrl.core.lock import one_writer
from nemo_pivotrl.core.types import Action, Candidate
from nemo_pivotrl.data.gym_rows import action_to_row
from nemo_pivotrl.pivotrl import round_trip
from nemo_pivotrl.pivotrl.audit_sample import GOLD, RIGHT, WRONG, Judged, Question, Tried
from nemo_pivotrl.pivotrl.constant_answers import earned_by, ranked
from nemo_pivotrl.verifiers.base import Bounded, Verifier, VerifierFault, verdicts

SHOWN = 12
SHOWN_CONSTANTS = 3
CHUNK = 16
"""Candidates of a worker's task."""
MAX_JUDGE_FAULTS = 0.1
"""More of the calibration pairs without a verdict than this stop the audit."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One action that was tried on a candidate."""

    side: str
    """`gold`: the expert's; `right`: it in other words; `wrong`: another."""
    name: str
    reward: float | None
    """None where the verifier could not judge."""
    category: str
    detail: str
    rules: Sequence[str]
    seconds: float
    action: dict[str, Any] | None = None
    """As a row holds it, where the verdict is not the one known beforehand."""

    @property
    def failed(self) -> bool:
        """Whether the verdict is not the one known beforehand. A wrong action may score nothing at all."""
        return self.reward is None or (self.reward != 1.0 if self.side != WRONG else self.reward > 0.0)


class Audit:
    """What an audit found, added up candidate by candidate.

    With `keep` the probes stay as they are, too, in `probes`: not for a million candidates.
    """

    def __init__(self, constants: Sequence[Action], keep: bool = False):
        self.probes: dict[str, list[Probe]] | None = {} if keep else None
        """By candidate id."""
        self.candidates, self.verdicts = 0, 0
        self.undeclared: list[str] = []
        """Candidates whose expert calls a tool that the state does not declare."""
        self.gold_failures: list[str] = []
        self.unwinnable: list[str] = []
        """Candidates for which nothing that was tried scores above 0, the expert's action included."""
        self.unlosable: list[str] = []
        """Candidates that every action of the right kind wins: garbage in the right tool, or any text."""
        self.faults, self.rules, self.wrongly = Counter[str](), Counter[str](), Counter[str]()
        self.by_tool: dict[str, dict[str, int]] = {}
        self.by_probe: dict[str, dict[str, int]] = {}
        self.times = array("f")
        """Seconds of each verdict."""
        self._answers = constants
        self._earned: list[dict[str, float]] = [{} for _ in constants]
        self._tasks: dict[str, str] = {}

    def add(self, told: Mapping[str, Any]) -> None:
        """Take in what a `Prober` told of a candidate."""
        candidate, tried = told["candidate_id"], [Probe(*fields) for fields in told["probes"]]
        if self.probes is not None:
            self.probes[candidate] = tried
        self.candidates += 1
        self.verdicts += len(tried)
        about = told_of(told["undeclared"], tried)
        for name, flagged in (
            ("undeclared", about["undeclared_tool"]),
            ("unwinnable", about["unwinnable"]),
            ("unlosable", about["unlosable"]),
            ("gold_failures", any(p.failed for p in tried if p.side == GOLD)),
        ):
            if flagged:
                getattr(self, name).append(candidate)
        for p in tried:
            self.times.append(p.seconds)
            _count(self.by_tool, told["tool"], p)
            _count(self.by_probe, p.name, p)
            self.faults.update([p.category] if p.reward is None else ())
            self.rules.update(p.rules if p.reward else ())
            self.wrongly.update(p.rules if p.reward and p.side == WRONG else ())
        for number, reward in told["earned"]:
            self._earned[number][candidate] = reward
            self._tasks[candidate] = told["task_id"]

    @cached_property
    def constants(self) -> dict[str, list[str]]:
        """Constant answer -> candidates that it wins, the best answers first; those that win in one task alone are left out: of one
        it may be the answer."""
        won = {
            answer: [c for c, reward in rewards.items() if reward == 1.0]
            for answer, rewards in ranked(self._answers, self._earned, self._tasks).items()
        }
        won = {answer: wins for answer, wins in won.items() if len({self._tasks[c] for c in wins}) > 1}
        return dict(sorted(won.items(), key=lambda pair: -len(pair[1])))

    @cached_property
    def won_by_constant(self) -> dict[str, str]:
        """Candidate -> the best constant answer that wins it."""
        return {candidate: answer for answer, won in reversed(self.constants.items()) for candidate in won}


def told_of(undeclared: bool, tried: Sequence[Probe]) -> dict[str, bool]:
    """What a row of the audit says of a candidate as a whole."""
    alike = [p for p in tried if p.side == WRONG and p.name in CONTENT_PROBES]
    return {
        "unwinnable": not any(p.reward for p in tried if p.side != WRONG),
        "unlosable": bool(alike) and all(p.reward == 1.0 for p in alike),
        "undeclared_tool": undeclared,
    }


CONTENT_PROBES = frozenset("garbage_message garbage_arguments garbage_keystrokes destructive_command".split())
"""Wrong probes of the right kind and tool: what they share with the expert is the form alone."""


@one_writer
def audit(recipe: Recipe, fresh: bool = False) -> Path:
    """Write `audit.jsonl` (one row a candidate) and `audit.json`, and print the tables.

    Raises InputError when more experts than `audit.max_gold_failures` do not pass their own verifier.
    """
    source, path = recipe.path("candidates.jsonl"), recipe.path("audit.jsonl")
    check_lineage(recipe, source, read_header(source, "candidates"))
    verifier, verifier_id = load_recipe_verifier(recipe)
    candidates = Judged(source, verifier)
    header, tried, tally = _header(recipe, verifier_id), Tried(recipe, candidates, verifier.asks_judge), Tally()
    candidates.tell(tried.judged)
    carried = round_trip.of_recipe(recipe, candidates)

    def write(parts: Iterable[tuple[bytes, int]]) -> None:
        found = Audit(tried.constants)
        for told in told_in(parts):
            found.add(told)
        _store(recipe, header, found, told_in(parts))
        print("milliseconds a verdict: p50 {:.3f}, p99 {:.3f}, longest {:.3f}".format(*times_of(found)))

    make_way(path, header)
    if path.exists() and not recipe.path("audit.json").exists():
        path.unlink()
    Map(
        recipe,
        "audit",
        path,
        header,
        lambda: batches_of(tried.questions(), CHUNK, tally),
        partial(Prober, recipe, tried.constants, verifier if recipe.executor == "here" else None),
        tried.count,
        "cand",
        tally,
        write=write,
    ).run(fresh)
    remedy = "remove it, then run audit again"
    summary = read_json(recipe.path("audit.json"), {"gold_failures": list, "candidates": int}, remedy)
    summary["round_trip"] = carried.summary() if carried else None
    _add_judge(recipe, verifier, summary)
    print(tables(summary))
    if carried:
        print("\n".join(carried.lines(source)))
    print(f"-> {path}, {recipe.path('audit.json')}")
    conclude(Path(recipe.run_dir), "audit", audit_checks(summary))
    stop_on_gold_failures(recipe, summary)
    return path


def audit_first(recipe: Recipe, candidates: Sequence[Candidate], verifier: Bounded, verifier_id: str) -> None:
    """The audit that `profile` runs before it: one line said, and InputError where the experts do not pass."""
    with spend(Path(recipe.run_dir), "audit") as cost:
        found, told = _tried_here(recipe, candidates, verifier)
        summary = _store(recipe, _header(recipe, verifier_id), found, told)
        cost["verdicts"] = summary["verdicts"]
    _add_judge(recipe, verifier, summary)
    wrong = summary["by_tool"].values()
    print(
        f"audit of {summary['candidates']} candidates: {len(summary['gold_failures'])} experts rejected, "
        f"{sum(row['false_accept'] for row in wrong)} of {sum(row[WRONG] for row in wrong)} wrong actions accepted, "
        f"{len(summary['unlosable'])} candidates that any content wins, the best constant answer wins "
        f"{max(summary['constants'].values(), default=0.0):.1%} (`nemo-pivotrl audit` says which)"
    )
    stop_on_gold_failures(recipe, summary)


def _header(recipe: Recipe, verifier_id: str) -> Header:
    source = recipe.path("candidates.jsonl")
    # of 1 a journal has no tasks, and where all were tried other places
    return Header(
        "audit", recipe.digest("audit"), parent=file_digest(source), verifier=verifier_id, extra={"journal": 2}
    )


def told_in(parts: Iterable[tuple[bytes, int]]) -> Iterator[dict[str, Any]]:
    """What `Prober`s told of candidates, from a map's lines."""
    return (json.loads(line) for lines, _ in parts for line in lines.splitlines())


def _store(recipe: Recipe, header: Header, found: Audit, told: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Write what was found, and a row of each candidate that was told of; the summary.

    Where `audit.jsonl` is, `audit.json` is the one that belongs to it.
    """
    summary, path = summarise(found) | {"verifier": header.verifier}, recipe.path("audit.jsonl")
    path.unlink(missing_ok=True)
    write_atomically(recipe.path("audit.json"), json_line(summary).decode())
    write_artefact(path, header, (_row(found, of) for of in told))
    return summary


def _add_judge(recipe: Recipe, verifier: Bounded, summary: dict[str, Any]) -> None:
    """Write the summary with what the judge is worth. Raises InputError where that is too little."""
    if verifier.asks_judge:
        summary["judge"] = judge_agreement(recipe, verifier)
    write_atomically(recipe.path("audit.json"), json_line(summary).decode())


def judge_agreement(recipe: Recipe, verifier: Bounded) -> dict[str, Any]:
    """Agreement of the judge with its calibration set. Raises InputError below `verifier.judge.min_agreement`."""
    from nemo_pivotrl.verifiers.judge import calibrate

    settings = recipe.verifier.judge
    assert verifier.judge is not None, "load_verifier connects the judge"
    found = calibrate(verifier.judge, settings.calibration)
    if found.faults > MAX_JUDGE_FAULTS * (found.n + found.faults):
        remedy = "see that the endpoint is up and that the model ends its answers as it is told to"
        asked = f"no verdict on {found.faults} of {found.n + found.faults} calibration pairs"
        raise InputError(Problem("recipe", None, "verifier.judge", asked, remedy))
    if found.agreement < settings.min_agreement:
        raise InputError(
            Problem(
                settings.calibration or "the packaged calibration set",
                None,
                "verifier.judge.min_agreement",
                f"the judge agrees on {found.agreement:.1%} of {found.n} pairs",
                "use a stronger judge or more votes, or accept it with a lower bound",
            )
        )
    return asdict(found)


class Prober:
    """A map's worker: tries the verifier on each candidate's actions, and on the constant answers."""

    def __init__(self, recipe: Recipe, constants: Sequence[Action], verifier: Verifier | None = None):
        self.verifier = verifier or load_recipe_verifier(recipe)[0]
        self.constants, self.retries = constants, recipe.profile.max_retries

    def __call__(self, questions: Sequence[Question]) -> Found:
        """What `Audit.add` reads."""
        with ThreadPoolExecutor(self.verifier.concurrency) as pool:
            tried = list(pool.map(self._probes, questions))
        chosen = [candidate for candidate, _ in questions]
        earned = [earned_by(self.verifier, answer, chosen, self.retries) for answer in self.constants]
        rows = []
        for candidate, found in zip(chosen, tried, strict=True):
            name, declared = candidate.candidate_id, {t.get("function", t).get("name") for t in candidate.tools}
            rows.append(
                {
                    "candidate_id": name,
                    "task_id": candidate.task_id,
                    "tool": candidate.action_name,
                    "undeclared": any(call.name not in declared for call in candidate.expected.calls),
                    "earned": [(number, rewards[name]) for number, rewards in enumerate(earned) if name in rewards],
                    "probes": found,
                }
            )
        return found_rows(rows, verdicts=sum(map(len, tried)))

    def _probes(self, question: Question) -> list[tuple[Any, ...]]:
        candidate, actions = question
        return [astuple(self._probe(candidate, *tried)) for tried in actions]

    def _probe(self, candidate: Candidate, side: str, name: str, action: Action) -> Probe:
        begun = time.perf_counter()
        (result,) = verdicts(self.verifier, [(candidate.case, action)], self.retries)
        seconds = time.perf_counter() - begun
        if isinstance(result, VerifierFault):
            found = Probe(side, name, None, f"FAULT {result.kind}", str(result), (), seconds)
        else:
            found = Probe(side, name, result.reward, result.category, result.detail, result.rules, seconds)
        return replace(found, action=action_to_row(action)) if found.failed else found


def run_audit(recipe: Recipe, candidates: Sequence[Candidate], verifier: Verifier) -> Audit:
    """Probe a sample of the candidates in this process, without files; the probes are kept."""
    return _tried_here(recipe, candidates, verifier)[0]


def _tried_here(
    recipe: Recipe, candidates: Sequence[Candidate], verifier: Verifier
) -> tuple[Audit, list[dict[str, Any]]]:
    tried = Tried(recipe, candidates, verifier.asks_judge)
    probe, rest = Prober(recipe, tried.constants, verifier), tried.questions()
    chunks = iter(lambda: list(islice(rest, CHUNK)), [])
    told = [json.loads(line) for chunk in chunks for line in probe(chunk).lines]
    found = Audit(tried.constants, keep=True)
    for of in told:
        found.add(of)
    return found, told


def stop_on_gold_failures(recipe: Recipe, summary: dict[str, Any]) -> None:
    """Raises InputError when the verifier rejects too many experts: training on it would teach nothing."""
    failures = summary["gold_failures"]
    if len(failures) <= recipe.audit.max_gold_failures * summary["candidates"]:
        return
    rejected = (row for row in read_rows(recipe.path("audit.jsonl")) if row["candidate_id"] in set(failures[:SHOWN]))
    problems = []
    for row in rejected:
        gold = next(p for p in row["probes"] if p["side"] == GOLD)
        said = f"{gold['category']} {gold['detail']}".strip()
        remedy = "mend the row, or use a verifier or compat version that accepts it"
        problems.append(
            Problem(str(recipe.path("candidates.jsonl")), None, f"candidate {row['candidate_id']}", short(said), remedy)
        )
    count = f"{len(failures)} of {summary['candidates']} experts do not score 1 under {recipe.verifier.name}"
    problems.append(
        Problem("recipe", None, "audit.max_gold_failures", count, "see audit.jsonl; accept it with a larger share")
    )
    raise InputError(problems)


def _row(found: Audit, told: Mapping[str, Any]) -> dict[str, Any]:
    tried = [Probe(*fields) for fields in told["probes"]]
    return {
        "candidate_id": told["candidate_id"],
        "tool": told["tool"],
        **told_of(told["undeclared"], tried),
        "won_by_constant": found.won_by_constant.get(told["candidate_id"]),
        "probes": [
            {
                "side": p.side,
                "probe": p.name,
                "reward": p.reward,
                "category": p.category,
                "detail": p.detail,
                "failed": p.failed,
                "action": p.action,
            }
            for p in tried
        ],
    }


def summarise(found: Audit) -> dict[str, Any]:
    """The audit's numbers: rates by tool and by probe, rules that accepted, and the flagged candidates."""
    return {
        "candidates": found.candidates,
        "verdicts": found.verdicts,
        "gold_failures": found.gold_failures,
        "unwinnable": found.unwinnable,
        "unlosable": found.unlosable,
        "undeclared_tools": found.undeclared,
        "won_by_a_constant": sorted(found.won_by_constant),
        "constants": {answer: len(won) / found.candidates for answer, won in found.constants.items()},
        "faults": dict(found.faults),
        "by_tool": dict(sorted(found.by_tool.items())),
        "by_probe": dict(sorted(found.by_probe.items())),
        "by_rule": {
            rule: {"accepted": n, "accepted_wrongly": found.wrongly[rule]} for rule, n in sorted(found.rules.items())
        },
    }


def times_of(found: Audit) -> tuple[float, float, float]:
    """Milliseconds a verdict: median, 99th percentile, longest. They differ between runs, so they are told and not kept."""
    times = sorted(found.times) or [0.0]
    return 1e3 * times[len(times) // 2], 1e3 * times[min(len(times) - 1, int(0.99 * len(times)))], 1e3 * times[-1]


def _count(table: dict[str, dict[str, int]], key: str, probe: Probe) -> None:
    row = table.setdefault(key, dict.fromkeys(COUNTS, 0))
    row[probe.side] += 1
    if probe.failed:
        row["false_accept" if probe.side == WRONG and probe.reward else f"{probe.side}_failed"] += 1


MOST_ROWS = 40
"""Tools or probes that are printed; a benchmark of tool calls can have a tool for every row."""
COUNTS = (GOLD, "gold_failed", RIGHT, "right_failed", WRONG, "wrong_failed", "false_accept")


def _most_telling(rates: dict[str, dict[str, int]]) -> tuple[list[tuple[str, dict[str, int]]], int]:
    """The rows that are printed, and how many are not: where there are many, those with the most failures, then the most experts."""
    if len(rates) <= MOST_ROWS:
        return list(rates.items()), 0

    def weight(pair: tuple[str, dict[str, int]]) -> tuple[int, int, str]:
        row = pair[1]
        return -(row["gold_failed"] + row["right_failed"] + row["false_accept"]), -row[GOLD], pair[0]

    return sorted(rates.items(), key=weight)[:MOST_ROWS], len(rates) - MOST_ROWS


def tables(summary: dict[str, Any]) -> str:
    """The summary as text."""
    lines = []
    for title, key in (("tool", "by_tool"), ("probe", "by_probe")):
        lines.append(
            f"{title:<30}{'experts':>9}{'rejected':>10}{'reworded':>10}{'rejected':>10}{'wrong':>8}{'accepted':>10}"
        )
        shown, folded = _most_telling(summary[key])
        for name, row in shown:
            counts = (row[GOLD], row["gold_failed"], row[RIGHT], row["right_failed"], row[WRONG], row["false_accept"])
            lines.append(
                f"{short(name, 29):<30}"
                + "".join(f"{n:>{w}}" for n, w in zip(counts, (9, 10, 10, 10, 8, 10), strict=True))
            )
        if folded:
            lines.append(f"... and {folded} more {title}s: all are in audit.json")
    for name in ("gold_failures", "unwinnable", "unlosable", "undeclared_tools", "won_by_a_constant"):
        ids = summary[name]
        if ids:
            shown = ", ".join(short(name) for name in ids[:SHOWN]) + (
                f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
            )
            lines.append(f"{name.replace('_', ' ')}: {len(ids)} of {summary['candidates']}: {shown}")
    for answer, share in list(summary["constants"].items())[:SHOWN_CONSTANTS]:
        lines.append(f"constant answer: {answer} wins {share:.1%} of the candidates")
    for kind, count in summary["faults"].items():
        lines.append(f"faults: {count} verdicts, {kind}")
    if "judge" in summary:
        lines.append(
            f"judge agrees with {summary['judge']['agreement']:.1%} of {summary['judge']['n']} calibration pairs"
        )
    lines.append(f"{summary['verdicts']} verdicts")
    return "\n".join(lines)
