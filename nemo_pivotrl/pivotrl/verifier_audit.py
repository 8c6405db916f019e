"""audit: does the verifier say what is known beforehand? Run it before GPU-hours are spent; `profile` does, on a sample.

For every candidate: the expert's own action must score 1; so should the same action written in another way; empty, garbage,
changed and other rows' actions must score 0. Candidates that nobody can win, and such that everybody wins, are listed; so
are those that a constant answer wins, with the share of all that the best one does: a policy can learn it instead of the task.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from nemo_pivotrl.algorithms import selection
from nemo_pivotrl.components.conclusions import audit_checks, conclude
from nemo_pivotrl.components.costs import spend
from nemo_pivotrl.components.lineage import check_lineage
from nemo_pivotrl.components.progress import progress
from nemo_pivotrl.components.rollout import judged_candidates, load_recipe_verifier
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.artifacts import Header, file_digest, json_line, read_header, write_artefact
from nemo_pivotrl.core.atomic import write_atomically
from nemo_pivotrl.core.errors import InputError, Problem, short
from nemo_pivotrl.core.lock import one_writer
from nemo_pivotrl.core.types import Action, Candidate, Verdict
from nemo_pivotrl.data import gym_rows as responses
from nemo_pivotrl.data.states import candidates_of
from nemo_pivotrl.pivotrl import round_trip
from nemo_pivotrl.pivotrl.constant_answers import earnings
from nemo_pivotrl.verifiers import probes
from nemo_pivotrl.verifiers.base import Bounded, Verifier, VerifierFault, verdicts

GOLD, RIGHT, WRONG = "gold", "right", "wrong"
SHOWN = 12
SHOWN_CONSTANTS = 3
MAX_JUDGE_FAULTS = 0.1
"""More of the calibration pairs without a verdict than this stop the audit."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One action that was tried on a candidate."""

    side: str
    """`gold`: the expert's; `right`: it in other words; `wrong`: another."""
    name: str
    action: Action
    reward: float | None
    """None where the verifier could not judge."""
    category: str
    detail: str
    rules: tuple[str, ...]
    seconds: float

    @property
    def failed(self) -> bool:
        """Whether the verdict is not the one known beforehand. A wrong action may score nothing at all."""
        return self.reward is None or (self.reward != 1.0 if self.side != WRONG else self.reward > 0.0)


@dataclass
class Audit:
    """What an audit found."""

    probes: dict[str, list[Probe]] = field(default_factory=dict)
    """By candidate id."""
    tools: dict[str, str] = field(default_factory=dict)
    """Expert action's name, by candidate id."""
    undeclared: list[str] = field(default_factory=list)
    """Candidates whose expert calls a tool that the state does not declare."""
    constants: dict[str, list[str]] = field(default_factory=dict)
    """Constant answer -> candidates that it wins, the best answers first; those that win in one task alone are left out."""

    def gold_failures(self) -> list[str]:
        return [c for c, tried in self.probes.items() if any(p.failed for p in tried if p.side == GOLD)]

    def unwinnable(self) -> list[str]:
        """Candidates for which nothing that was tried scores above 0, the expert's action included."""
        return [c for c, tried in self.probes.items() if not any(p.reward for p in tried if p.side != WRONG)]

    def unlosable(self) -> list[str]:
        """Candidates that every action of the right kind wins: garbage in the right tool, or any text."""
        found = []
        for candidate, tried in self.probes.items():
            alike = [p for p in tried if p.side == WRONG and p.name in CONTENT_PROBES]
            if alike and all(p.reward == 1.0 for p in alike):
                found.append(candidate)
        return found

    def won_by_constant(self) -> dict[str, str]:
        """Candidate -> the best constant answer that wins it."""
        return {candidate: answer for answer, won in reversed(self.constants.items()) for candidate in won}


CONTENT_PROBES = frozenset("garbage_message garbage_arguments garbage_keystrokes destructive_command".split())
"""Wrong probes of the right kind and tool: what they share with the expert is the form alone."""


@one_writer
def audit(recipe: Recipe, fresh: bool = False) -> Path:
    """Write `audit.jsonl` (one row a candidate) and `audit.json`, and print the tables.

    Raises InputError when more experts than `audit.max_gold_failures` do not pass their own verifier.
    """
    source = recipe.path("candidates.jsonl")
    check_lineage(recipe, source, read_header(source, "candidates"))
    verifier, verifier_id = load_recipe_verifier(recipe)
    candidates = judged_candidates(candidates_of(source), verifier, source)
    carried = round_trip.of_recipe(recipe, candidates)
    more = {"round_trip": carried.summary() if carried else None}
    found, summary = audit_candidates(recipe, candidates, verifier, verifier_id, more)
    print(tables(found, summary))
    if carried:
        print("\n".join(carried.lines(source)))
    print(f"-> {recipe.path('audit.jsonl')}, {recipe.path('audit.json')}")
    conclude(Path(recipe.run_dir), "audit", audit_checks(summary))
    stop_on_gold_failures(recipe, found)
    return recipe.path("audit.jsonl")


def audit_first(recipe: Recipe, candidates: Sequence[Candidate], verifier: Bounded, verifier_id: str) -> None:
    """The audit that `profile` runs before it: one line said, and InputError where the experts do not pass."""
    found, summary = audit_candidates(recipe, candidates, verifier, verifier_id)
    wrong = [p for tried in found.probes.values() for p in tried if p.side == WRONG]
    print(
        f"audit of {len(found.probes)} candidates: {len(summary['gold_failures'])} experts rejected, "
        f"{sum(bool(p.reward) for p in wrong)} of {len(wrong)} wrong actions accepted, {len(summary['unlosable'])} candidates "
        f"that any content wins, the best constant answer wins {best_share(found):.1%} (`nemo-pivotrl audit` says which)"
    )
    stop_on_gold_failures(recipe, found)


def audit_candidates(
    recipe: Recipe,
    candidates: Sequence[Candidate],
    verifier: Bounded,
    verifier_id: str,
    more: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[Audit, dict[str, Any]]:
    """Run the audit and write its files; `more` is for the summary, too."""
    with spend(Path(recipe.run_dir), "audit") as cost:
        found = run_audit(recipe, candidates, verifier)
        cost.update(times_of(found))
    summary = summarise(found) | {"verifier": verifier_id, **more}
    if verifier.asks_judge:
        summary["judge"] = judge_agreement(recipe, verifier)
    source = recipe.path("candidates.jsonl")
    header = Header("audit", recipe.digest("audit"), parent=file_digest(source), verifier=verifier_id)
    write_artefact(recipe.path("audit.jsonl"), header, _rows(found))
    write_atomically(recipe.path("audit.json"), json_line(summary).decode())
    return found, summary


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


def run_audit(recipe: Recipe, candidates: Sequence[Candidate], verifier: Verifier) -> Audit:
    """Probe a sample of the candidates. Other rows' actions come from the whole set."""
    settings = recipe.audit
    size = settings.judged_sample if verifier.asks_judge else settings.sample
    by_hash = sorted(candidates, key=lambda c: selection.order_key(recipe.seed, c.candidate_id))
    chosen = by_hash[:size] if size else by_hash
    by_tool: dict[str, list[Candidate]] = defaultdict(list)
    for candidate in by_hash:
        by_tool[candidate.action_name].append(candidate)
    found = Audit()
    with progress(len(chosen), 0, "audit", "cand") as bar:
        for candidate in chosen:
            tried = [
                _probe(verifier, candidate, side, name, action, recipe.profile.max_retries)
                for side, name, action in _actions(candidate, by_tool, settings.foreign_actions)
            ]
            found.probes[candidate.candidate_id] = tried
            found.tools[candidate.candidate_id] = candidate.action_name
            declared = {t.get("function", t).get("name") for t in candidate.tools}
            if any(call.name not in declared for call in candidate.expected.calls):
                found.undeclared.append(candidate.candidate_id)
            bar.update(1)
    found.constants = _constants(verifier, chosen, candidates, recipe.profile.max_retries)
    return found


def _constants(
    verifier: Verifier, chosen: Sequence[Candidate], candidates: Sequence[Candidate], max_retries: int
) -> dict[str, list[str]]:
    """Constant answers, made from all candidates, and which of the chosen ones each wins."""
    tasks = {c.candidate_id: c.task_id for c in chosen}
    earned = earnings(verifier, chosen, [c.expected for c in candidates], max_retries)
    won = {answer: [c for c, reward in rewards.items() if reward == 1.0] for answer, rewards in earned.items()}
    won = {
        answer: wins for answer, wins in won.items() if len({tasks[c] for c in wins}) > 1
    }  # of one it may be the answer
    return dict(sorted(won.items(), key=lambda pair: -len(pair[1])))


def best_share(found: Audit) -> float:
    """Share of the audited candidates that the best constant answer wins."""
    return max(map(len, found.constants.values()), default=0) / max(1, len(found.probes))


def _actions(
    candidate: Candidate, by_tool: dict[str, list[Candidate]], foreign: int
) -> Iterator[tuple[str, str, Action]]:
    case = candidate.case
    yield GOLD, "expert", candidate.expected
    for name, action in probes.right(case):
        yield RIGHT, name, action
    for name, action in probes.wrong(case):
        if not probes.same_action(action, candidate.expected):
            yield WRONG, name, action
    others = [c for c in by_tool[candidate.action_name] if not probes.same_action(c.expected, candidate.expected)]
    for other in others[:foreign]:
        if candidate.expected.kind == "calls":  # any talk is as good as another to most verifiers; see garbage_message
            yield WRONG, "other_row", other.expected
    another = next((rows[0] for name, rows in sorted(by_tool.items()) if name != candidate.action_name), None)
    if another is not None and foreign:
        yield WRONG, "other_tool", another.expected


def _probe(verifier: Verifier, candidate: Candidate, side: str, name: str, action: Action, max_retries: int) -> Probe:
    begun = time.perf_counter()
    (result,) = verdicts(verifier, [(candidate.case, action)], max_retries)
    seconds = time.perf_counter() - begun
    if isinstance(result, VerifierFault):
        return Probe(side, name, action, None, f"FAULT {result.kind}", str(result), (), seconds)
    assert isinstance(result, Verdict)
    return Probe(side, name, action, result.reward, result.category, result.detail, result.rules, seconds)


def stop_on_gold_failures(recipe: Recipe, found: Audit) -> None:
    """Raises InputError when the verifier rejects too many experts: training on it would teach nothing."""
    failures = found.gold_failures()
    if len(failures) <= recipe.audit.max_gold_failures * len(found.probes):
        return
    problems = []
    for candidate in failures[:SHOWN]:
        gold = next(p for p in found.probes[candidate] if p.side == GOLD)
        said = f"{gold.category} {gold.detail}".strip()
        remedy = "mend the row, or use a verifier or compat version that accepts it"
        problems.append(
            Problem(str(recipe.path("candidates.jsonl")), None, f"candidate {candidate}", short(said), remedy)
        )
    count = f"{len(failures)} of {len(found.probes)} experts do not score 1 under {recipe.verifier.name}"
    problems.append(
        Problem("recipe", None, "audit.max_gold_failures", count, "see audit.jsonl; accept it with a larger share")
    )
    raise InputError(problems)


def _rows(found: Audit) -> Iterator[dict[str, Any]]:
    unwinnable, unlosable, undeclared = set(found.unwinnable()), set(found.unlosable()), set(found.undeclared)
    won = found.won_by_constant()
    for candidate, tried in found.probes.items():
        yield {
            "candidate_id": candidate,
            "tool": found.tools[candidate],
            "unwinnable": candidate in unwinnable,
            "unlosable": candidate in unlosable,
            "undeclared_tool": candidate in undeclared,
            "won_by_constant": won.get(candidate),
            "probes": [
                {
                    "side": p.side,
                    "probe": p.name,
                    "reward": p.reward,
                    "category": p.category,
                    "detail": p.detail,
                    "failed": p.failed,
                    "action": responses.action_to_row(p.action) if p.failed else None,
                }
                for p in tried
            ],
        }


def summarise(found: Audit) -> dict[str, Any]:
    """The audit's numbers: rates by tool and by probe, rules that accepted, and the flagged candidates."""
    every = [(found.tools[c], p) for c, tried in found.probes.items() for p in tried]
    rules = Counter(rule for _, p in every for rule in p.rules if p.reward)
    wrongly = Counter(rule for _, p in every if p.side == WRONG and p.reward for rule in p.rules)
    return {
        "candidates": len(found.probes),
        "verdicts": len(every),
        "gold_failures": found.gold_failures(),
        "unwinnable": found.unwinnable(),
        "unlosable": found.unlosable(),
        "undeclared_tools": found.undeclared,
        "won_by_a_constant": sorted(found.won_by_constant()),
        "constants": {answer: len(won) / len(found.probes) for answer, won in found.constants.items()},
        "faults": dict(Counter(p.category for _, p in every if p.reward is None)),
        "by_tool": _rates((tool, p) for tool, p in every),
        "by_probe": _rates((p.name, p) for _, p in every),
        "by_rule": {rule: {"accepted": n, "accepted_wrongly": wrongly[rule]} for rule, n in sorted(rules.items())},
    }


def times_of(found: Audit) -> dict[str, float]:
    """Milliseconds a verdict: median, 99th percentile, longest. They differ between runs, so they are in the ledger alone."""
    times = sorted(1e3 * p.seconds for tried in found.probes.values() for p in tried) or [0.0]
    places = {"ms_p50": len(times) // 2, "ms_p99": min(len(times) - 1, int(0.99 * len(times))), "ms_max": -1}
    return {name: round(times[place], 3) for name, place in places.items()}


def _rates(tried: Iterator[tuple[str, Probe]]) -> dict[str, dict[str, int]]:
    table: dict[str, dict[str, int]] = {}
    for key, probe in tried:
        row = table.setdefault(key, dict.fromkeys(COUNTS, 0))
        row[probe.side] += 1
        if probe.failed:
            row["false_accept" if probe.side == WRONG and probe.reward else f"{probe.side}_failed"] += 1
    return dict(sorted(table.items()))


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


def tables(found: Audit, summary: dict[str, Any]) -> str:
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
    times = "p50 {ms_p50:.3f}, p99 {ms_p99:.3f}, longest {ms_max:.3f}".format(**times_of(found))
    lines.append(f"{summary['verdicts']} verdicts; milliseconds each: {times}")
    return "\n".join(lines)
