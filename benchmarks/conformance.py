"""NeMo-Gym's verifiers against ours: same seeded random requests, same rewards and categories. `make conformance`

Each request goes to the released server's own `verify` and, through the reader that `verify` and `serve-verifier` use, to our
verifier under the same settings. Reward, category and what was measured on the way must be equal. Apart from that:

- raises: their code raises (an HTTP 500 when served). Ours must give reward 0 as a decode error, or call the row faulty.
- row faults: the row breaks its contract (`row_is_faulty`), whatever the policy does. Ours excludes it, theirs scores it.
- refused: not a valid request for their server, which answers HTTP 422.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import conformance_cases as cases
from conformance_agents import swe, terminus
from conformance_harness import terminal_multi_harness
from gym_release import BUILD, Outcome, Release, fetch

from nemo_pivotrl import config
from nemo_pivotrl.core.artifacts import canonical_json
from nemo_pivotrl.core.errors import short
from nemo_pivotrl.verifiers.base import Bounded, VerifierFault
from nemo_pivotrl.verifiers.loading import load_verifier
from nemo_pivotrl.verifiers.rows import RowError, case_of, sampled_action

GENERATORS = {
    "single_step": cases.single_step,
    "swe": swe,
    "terminus": terminus,
    "terminal_multi_harness": terminal_multi_harness,
}
RELEASES = ("0.7.0", "0.6.0", "0.5.0")
DECODE_ERRORS = {
    "single_step": {"ARGUMENTS_DECODE_ERROR"},
    "terminal_multi_harness": {"ARGUMENTS_DECODE_ERROR"},
    "terminus": {"model_output_invalid", "expected_answer_invalid"},
    "swe": {"unknown_error"},
}
"""What ours must say, with reward 0, where theirs raises."""
UNREACHABLE = {
    "swe": {},
    "single_step": {},
    "terminus": dict.fromkeys(
        ("judge_not_equivalent", "judge_parsing_failed", "judge_swap_parsing_failed"), "needs the judge"
    )
    | {"unknown_error": "no input reaches it with the judge off"},
    "terminal_multi_harness": dict.fromkeys(
        ("ARGUMENTS_DECODE_ERROR", "ARGUMENTS_NOT_OBJECT"), "their code raises before it can answer with it"
    ),
}
SHOWN = 3


@cache
def verifier(family: str, compat: str, settings: str) -> Bounded:
    """Our verifier of a family under settings given as JSON."""
    return load_verifier(config.Verifier(name=family, compat=compat, settings=json.loads(settings)))  # type: ignore[arg-type]


def ours(family: str, release: str, settings: Mapping[str, Any], row: Mapping[str, Any]) -> Outcome:
    """What our verifier makes of a row."""
    try:
        case, action = case_of(row, family=family), sampled_action(row, "\n" if family == "terminus" else "")
        verdict = verifier(family, release[:3], canonical_json(settings)).verify(case, action)
    except RowError as error:
        return Outcome("refused", category=error.field, detail=str(error))
    except VerifierFault as fault:
        return Outcome("fault", category=fault.kind, detail=str(fault))
    return Outcome("verdict", verdict.reward, verdict.category, verdict.figures, verdict.detail)


def row_is_faulty(family: str, row: Mapping[str, Any], theirs: Outcome) -> bool:
    """Whether the row breaks its contract: no readable expert action, a batch of fewer than two calls, a threshold NaN."""
    threshold = row.get("threshold")
    if threshold is not None and threshold != threshold:
        return True
    if family in ("swe", "terminus"):
        return theirs.reward == 0.0 and theirs.category in ("expected_action_invalid", "unknown_error")
    gold = row["expected_action"]
    calls = gold.get("calls", [gold] if gold["type"] == "function_call" else [])
    for call in calls:
        try:
            value = json.loads(call["arguments"])
        except (ValueError, RecursionError):
            return True
        if family == "terminal_multi_harness" and not isinstance(value, dict):
            return True
    return family == "terminal_multi_harness" and gold["type"] == "function_call_batch" and len(calls) < 2


def judgement(family: str, row: Mapping[str, Any], theirs: Outcome, own: Outcome) -> str:
    """`same`, `raises`, `row fault`, `refused` or `mismatch`."""
    if theirs.kind == "refused":
        return "refused"
    if own.kind in ("fault", "refused"):
        return "row fault" if row_is_faulty(family, row, theirs) else "mismatch"
    if theirs.kind == "raises":
        said = {"TOOL_SCHEMA_VALIDATION_FAILED"} if theirs.category == "PanicException" else DECODE_ERRORS[family]
        return "raises" if own.reward == 0.0 and own.category in said else "mismatch"
    if (theirs.reward, theirs.category) != (own.reward, own.category):
        return "mismatch"
    return "same" if same_figures(theirs, own) else "mismatch"


def same_figures(theirs: Outcome, own: Outcome) -> bool:
    """Whether both measured the same, as far as ours worked it out to the end (`similarity_bound` where it did not)."""
    return all(theirs.figures[name] == value for name, value in own.figures.items() if name in theirs.figures)


@dataclass
class Tally:
    """Results of one family under one release."""

    family: str
    release: str
    judgements: Counter[str] = field(default_factory=Counter)
    categories: Counter[str] = field(default_factory=Counter)
    mismatches: list[str] = field(default_factory=list)


def compare(release: Release, family: str, count: int, seed: int, runner: asyncio.Runner) -> Tally:
    """Run `count` cases. A case depends on the seed, the family and its number alone."""
    tally = Tally(family, release.version)
    for number in range(count):
        sample = GENERATORS[family](cases.Pen(f"{seed} {family} {number}"), release.version)
        row = json.loads(json.dumps(sample.row))  # as it arrives over HTTP; nothing is shared between the two
        theirs = release.verify(family, sample.config, row, runner)
        own = ours(family, release.version, sample.config, json.loads(json.dumps(sample.row)))
        judged = judgement(family, row, theirs, own)
        tally.judgements[judged] += 1
        if theirs.kind == "verdict":
            tally.categories[theirs.category] += 1
            partial = theirs.reward is not None and 0.0 < theirs.reward < 1.0
            tally.categories["(partial reward)"] += partial
        elif theirs.kind == "raises":
            tally.categories[f"(raises {theirs.category})"] += 1
        if judged == "mismatch":
            tally.mismatches.append(report(number, sample, theirs, own))
    return tally


def report(number: int, sample: cases.Sample, theirs: Outcome, own: Outcome) -> str:
    """A mismatch in full."""
    rows = {"config": sample.config} | {
        k: v for k, v in sample.row.items() if k not in ("response", "responses_create_params")
    }
    rows |= {"tools": sample.row["responses_create_params"]["tools"], "output": sample.row["response"]["output"]}
    lines = [f"    {key}: {short(json.dumps(value), 4000)}" for key, value in rows.items()]
    verdicts = [
        f"    {who}: {o.kind} {o.reward} {o.category} {dict(o.figures)} {o.detail}"
        for who, o in (("theirs", theirs), ("ours", own))
    ]
    return "\n".join([f"  case {number}", *lines, *verdicts])


def table(tallies: list[Tally], releases: dict[str, Release]) -> None:
    """Print what was compared, which categories were met, and the first mismatches."""
    head = ("family", "release", "cases", "mismatches", "raises", "row faults", "refused")
    print("\n" + " | ".join(head) + "\n" + " | ".join("-" * len(h) for h in head))
    for t in tallies:
        counts = [t.judgements[k] for k in ("mismatch", "raises", "row fault", "refused")]
        print(" | ".join(map(str, (t.family, t.release, t.judgements.total(), *counts))))
    for t in tallies:
        print(
            f"\n{t.family} {t.release}: "
            + ", ".join(f"{c} {n}" for c, n in sorted(t.categories.items(), key=lambda i: -i[1]))
        )
        declared = releases[t.release].categories(t.family)
        for name in (c for c in declared if not t.categories[c]):
            print(f"  never: {name} ({UNREACHABLE[t.family].get(name, 'NOT REACHED BY THESE CASES')})")
        if t.mismatches:
            print("\n".join([f"  {len(t.mismatches)} mismatches, the first {SHOWN}:", *t.mismatches[:SHOWN]]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=5000, help="of each family and release")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--families", nargs="+", choices=GENERATORS, default=list(GENERATORS))
    parser.add_argument("--releases", nargs="+", choices=RELEASES, default=list(RELEASES))
    parser.add_argument("--coverage", action="store_true", help="which branches of their code the cases take (slower)")
    options = parser.parse_args()
    releases = {version: Release(version, fetch(version)) for version in options.releases}
    tracer = start_coverage() if options.coverage else None
    tallies = []
    with asyncio.Runner() as runner:
        for version, release in releases.items():
            for family in options.families:
                begun = time.perf_counter()
                tallies.append(compare(release, family, options.cases, options.seed, runner))
                found = tallies[-1].judgements["mismatch"]
                print(f"{family} {version}: {found} mismatches, {time.perf_counter() - begun:.0f} s", flush=True)
    table(tallies, releases)
    if tracer:
        tracer.stop()
        tracer.report(show_missing=True, file=sys.stdout)
    return int(any(t.mismatches for t in tallies))


def start_coverage() -> Any:
    """Branch coverage of their code."""
    import coverage

    theirs = [f"{BUILD}/*/resources_servers/*/app.py", f"{BUILD}/*/resources_servers/*/common/*.py"]
    tracer = coverage.Coverage(branch=True, data_file=None, include=theirs)
    tracer.start()
    return tracer


if __name__ == "__main__":
    sys.exit(main())
