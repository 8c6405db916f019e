"""Verdicts per second, NeMo-Gym's code against ours, and what hostile output costs us. `make verifier-speed`

Both judge the same seeded random cases (`conformance_cases.py`; those on which their code raises are left out), in one process,
in interleaved rounds. Theirs is timed twice: `compare` is their comparison code alone on objects built beforehand, the least
it can cost; `verify` is the server's method on a request built beforehand. Ours is the whole verdict, limits included.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import conformance_cases as cases
from conformance import GENERATORS, row_is_faulty, verifier
from gym_release import Release, fetch
from hostile import hostile
from pydantic import TypeAdapter

from nemo_pivotrl.core.artifacts import canonical_json
from nemo_pivotrl.core.types import Action, Case, ToolCall
from nemo_pivotrl.verifiers.rows import case_of, sampled_action

Run = Callable[[], object]
FAMILIES = ("single_step", "swe", "terminus", "terminal_multi_harness")


def comparer(release: Release, family: str, config: dict[str, Any], request: Any) -> Run | None:
    """Their comparison code on what they would have built by then; None where their server answers without comparing."""
    app = release.apps[family]
    if family in ("single_step", "terminal_multi_harness"):
        action = app.extract_action(request.response)
        if action is None:
            return None
        judge = app.ActionComparator(config=app.ToolCallComparatorConfig(**config))
        if family == "single_step":
            return lambda: judge.compare_action(request.expected_action, action)
        tools = release.server(family, config).resolve_declared_tools(request)
        return lambda: judge.compare_action(
            request.expected_action, action, tools, threshold_override=request.threshold, harness=request.harness
        )
    if family == "swe":
        wanted, found = app._extract_expected_function_call(request), app._extract_rollout_function_call(request)
        return (lambda: _swe(app, config, wanted, found)) if wanted and found else None
    answer, text = app._extract_expected_answer(request), app._extract_last_assistant_text(request)
    harness = (request.metadata or {}).get("harness")
    known = isinstance(harness, str) and harness in app.SCHEMA_MAP
    return (lambda: _terminus(app, config, answer, text, harness)) if answer and text and known else None


def _swe(app: Any, config: dict[str, Any], wanted: Any, found: Any) -> object:
    """Calls swe_pivot's levels in the order of its server."""
    name, kind, arguments = app.extract_tool_info(wanted)
    own_name, own_kind, own_arguments = app.extract_tool_info(found)
    if not app.verify_tool_name_match(own_name, own_kind, name, kind):
        return None
    if config["enable_target_match"] and not app.verify_target_match(own_kind, own_arguments, kind, arguments):
        return None
    if config["enable_argument_similarity"]:
        similarity = app.compute_argument_similarity(own_kind, own_arguments, kind, arguments)
        if similarity < config["similarity_full_credit"] and config["reward_mode"] == "binary":
            return None
    if config["enable_diff_size_shaping"] and config["reward_mode"] == "continuous":
        return app.compute_diff_size_penalty(own_kind, own_arguments, config["diff_size_alpha"])
    return None


def _terminus(app: Any, config: dict[str, Any], answer: str, text: str, harness: str) -> object:
    """Calls terminus_judge's steps in the order of its server."""
    if "</think>" in text:
        text = text.split("</think>")[-1].strip()
    try:
        wanted, found = json.loads(answer), json.loads(text)
        for turn in (wanted, found):
            app.validate_against_schema_openapi(turn, app.SCHEMA_MAP[harness])
    except Exception:
        return None
    if not app.check_task_complete(found, wanted) or not config["enable_string_similarity"]:
        return None
    return app.command_similarity(wanted, found)


def prepared(
    release: Release, family: str, count: int, seed: int, runner: asyncio.Runner
) -> list[tuple[Run, Run, Run]]:
    """(their comparison, their verify, ours) of each case that both judge."""
    made: list[tuple[Run, Run, Run]] = []
    number = 0
    while len(made) < count:
        sample = GENERATORS[family](cases.Pen(f"{seed} {family} {number}"), release.version)
        number += 1
        row = json.loads(json.dumps(sample.row))
        outcome = release.verify(family, sample.config, row, runner)
        if outcome.kind != "verdict" or row_is_faulty(family, row, outcome):
            continue
        request, server = release.request(family, row), release.server(family, sample.config)
        compare = comparer(release, family, sample.config, request)
        if compare is not None:
            own = verifier(family, release.version[:3], canonical_json(sample.config))
            case, action = case_of(row, family=family), sampled_action(row, "\n" if family == "terminus" else "")
            made.append((compare, _driven(server.verify, request), _judged(own, case, action)))
    return made


def _judged(own: Any, case: Case, action: Action) -> Run:
    return lambda: own.verify(case, action)


def _driven(verify: Any, request: Any) -> Run:
    def run() -> object:
        try:  # without a judge it never waits, so one step runs it to its end and no event loop is timed
            verify(request).send(None)
        except StopIteration as end:
            return end.value
        raise AssertionError("their verify waited for something")

    return run


def seconds(runs: Sequence[Run]) -> float:
    """Time of one pass."""
    gc.collect()
    begun = time.perf_counter()
    for run in runs:
        run()
    return time.perf_counter() - begun


def speed(release: Release, count: int, seed: int, rounds: int) -> bool:
    """Print verdicts per second and ratios; whether ours is at least as fast in every family."""
    print(
        f"verdicts per second, {count} cases, median of {rounds} rounds; ratio: ours to theirs (lowest and highest round)\n"
    )
    print(
        "family | theirs, compare | theirs, verify | ours | ratio to compare | ratio to verify\n"
        + " | ".join(["---"] * 6)
    )
    fast = True
    with asyncio.Runner() as runner:
        for family in FAMILIES:
            columns = list(zip(*prepared(release, family, count, seed, runner), strict=True))
            for runs in columns:
                seconds(runs)  # caches of both sides
            times: list[list[float]] = [[], [], []]
            for turn in range(rounds):
                for i in (0, 1, 2) if turn % 2 else (2, 1, 0):
                    times[i].append(seconds(columns[i]))
            rates = [f"{count / statistics.median(t):,.0f}" for t in times]
            ratios = [[a / b for a, b in zip(theirs, times[2], strict=True)] for theirs in times[:2]]
            shown = [f"{statistics.median(r):.2f} ({min(r):.2f}-{max(r):.2f})" for r in ratios]
            print(" | ".join([family, *rates, *shown]), flush=True)
            fast = fast and statistics.median(ratios[0]) >= 1.0
    return fast


# ---- parallel calls ----


def parallel(release: Release, cap: float) -> None:
    """Many parallel calls in one turn."""
    print("\nparallel calls | theirs | ours\n--- | --- | ---")
    app = release.apps["single_step"]
    judge = app.ActionComparator(config=app.ToolCallComparatorConfig(word_count_similarity_threshold=0.1))
    read = TypeAdapter(app.ExpectedAction)
    own = verifier("single_step", "0.7", '{"word_count_similarity_threshold":0.1}')
    same = '{"city": "Paris", "unit": "degrees celsius"}'
    sets = {
        "500 identical": [same] * 500,
        "1,500 identical": [same] * 1500,
        "200 x 200 distinct": [json.dumps({"city": f"city number {i}", "n": i}) for i in range(200)],
    }
    for label, texts in sets.items():
        calls = [{"type": "function_call", "name": "f", "arguments": text} for text in texts]
        batch, turned = (
            read.validate_python({"type": "function_call_batch", "calls": made}) for made in (calls, calls[::-1])
        )
        theirs = _capped(lambda b=batch, t=turned: judge.compare_action(b, t), cap)  # type: ignore[misc]
        made = tuple(ToolCall("f", text) for text in texts)
        case, action = Case(Action("calls", calls=made)), Action("calls", calls=made[::-1])
        verdict = own.verify(case, action)
        ours = statistics.median(seconds([lambda c=case, a=action: own.verify(c, a)]) for _ in range(7))  # type: ignore[misc]
        print(f"{label} | {theirs} | {ours * 1000:.1f} ms, {verdict.reward} {verdict.category}", flush=True)


def _capped(run: Run, cap: float) -> str:
    """What `run` took, in a process of its own that is ended after `cap` seconds."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def work() -> None:
        begun = time.perf_counter()
        try:
            run()
            outcome = ""
        except RecursionError:
            outcome = ", then RecursionError"
        sender.send(f"{time.perf_counter() - begun:.1f} s{outcome}")

    process = context.Process(target=work)
    process.start()
    done = receiver.poll(cap)
    text = str(receiver.recv()) if done else f"not done after {cap:.0f} s"
    process.kill()
    process.join()
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000, help="of each family")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cap", type=float, default=120.0, help="seconds that their code may take for parallel calls")
    parser.add_argument("--only", choices=("speed", "parallel", "hostile"))
    parser.add_argument("--profile", action="store_true", help="where the time of hostile cases above the bound goes")
    options = parser.parse_args()
    passed = True
    if options.only != "hostile":
        release = Release("0.7.0", fetch("0.7.0"))
        if options.only != "parallel":
            passed = speed(release, options.cases, options.seed, options.rounds)
        if options.only != "speed":
            parallel(release, options.cap)
    if options.only in (None, "hostile"):
        passed = hostile(options.profile) and passed
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
