"""Where our verifier and BFCL's checker differ, without a model: BFCL's own alternatives, and calls changed on purpose.

    python benchmarks/bfcl_agree.py calls DATA CALLS
    python benchmarks/bfcl_check.py DATA CALLS VERDICTS                      (where bfcl-eval is installed)
    python benchmarks/bfcl_agree.py judge DATA VERDICTS [--set KEY=VALUE ...] [--show N]

`calls` writes, of every row of the one-turn categories, the expert's call and variants that differ in one argument of the first:
`accepted` (another value of BFCL's list), `left_out`, `text` (a number as text, or a text as a number), `integer` (3.0 for 3),
`case`, `other` (another row's value of that type), `more` (an argument that the tool does not have). `judge` reads BFCL's verdicts
and counts ours beside them, by kind of variant; --set changes the verifier as `nemo-pivotrl verify --set` does.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bfcl_data import CATEGORIES, Row, _value, calls_of, items, trajectory

RECIPE_RULES = ("rules.sql=false", "rules.letter_case=true", "rules.stringified=false")
"""What recipes/pivotrl/smollm2-135m-cpu-bfcl.yaml sets."""


def variants(row: Row, pool: dict[str, list[Any]], rng: random.Random) -> Iterator[tuple[str, list[Row]]]:
    """(kind, calls)."""
    expert = calls_of(row)
    yield "expert", expert
    ((_, listed),) = row["gold"][0].items()

    def changed(name: str, value: Any) -> list[Row]:
        calls = copy.deepcopy(expert)
        calls[0]["arguments"][name] = value
        return calls

    for name, values in listed.items():
        for value in values:
            if value != "" and _value(value) != expert[0]["arguments"].get(name):
                yield "accepted", changed(name, _value(value))
    for name, value in expert[0]["arguments"].items():
        without = copy.deepcopy(expert)
        del without[0]["arguments"][name]
        yield "left_out", without
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield "text", changed(name, str(value))
            yield "integer", changed(name, float(value) if isinstance(value, int) else int(value))
        elif isinstance(value, str):
            yield "case", changed(name, value.upper() if value != value.upper() else value.lower())
            if value.isdigit():
                yield "text", changed(name, int(value))
        yield "other", changed(name, rng.choice(pool[type(value).__name__]))
    yield "more", changed("not_declared", 1)


def write_calls(folder: Path, target: Path) -> None:
    rows, rng = list(items(folder, CATEGORIES)), random.Random(0)
    pool: dict[str, list[Any]] = defaultdict(list)
    for row in rows:
        for value in calls_of(row)[0]["arguments"].values():
            pool[type(value).__name__].append(value)
    lines = [
        json.dumps({"id": row["id"], "category": row["category"], "kind": kind, "calls": calls})
        for row in rows
        for kind, calls in variants(row, pool, rng)
    ]
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} calls of {len(rows)} rows -> {target}")


def judge(folder: Path, verdicts: Path, settings: list[str], show: int) -> None:
    from nemo_pivotrl.config.load import verifier_settings
    from nemo_pivotrl.core.types import Action, Case, ToolCall
    from nemo_pivotrl.data.gym_rows import action_of
    from nemo_pivotrl.data.readers.tools import tools_of
    from nemo_pivotrl.verifiers.loading import load_verifier

    verifier = load_verifier(verifier_settings("functional", None, settings))
    cases = {}
    for row in items(folder, CATEGORIES):
        record = trajectory(row, "")
        messages = record["messages"]
        cases[row["id"]] = Case(action_of(messages[-1]), tools_of(record["tools"], "tools"), tuple(messages[:-1]))
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    shown: Counter[tuple[str, str]] = Counter()
    for line in verdicts.read_text(encoding="utf-8").splitlines():
        answer = json.loads(line)
        calls = tuple(ToolCall(c["name"], json.dumps(c["arguments"], ensure_ascii=False)) for c in answer["calls"])
        found = verifier.verify(cases[answer["id"]], Action("calls", calls=calls))
        ours, theirs = found.reward == 1.0, answer["valid"]
        what = "same" if ours == theirs else "false accept" if ours else "false reject"
        counts[answer["kind"]][what] += 1
        shown[answer["kind"], what] += 1
        if what != "same" and shown[answer["kind"], what] <= show:
            wanted = cases[answer["id"]].expected.calls[0].arguments
            got = calls[0].arguments if calls else ""
            why = f"{found.detail[:80]}; {answer['error'][:120]}"
            print(f"{what}, {answer['kind']}, {answer['id']}: expert {wanted[:160]} got {got[:160]} ({why})")
    print(f"{'variant':<10}{'calls':>7}{'agree':>8}{'false accepts':>15}{'false rejects':>15}")
    for kind, found in counts.items():
        row = (found.total(), found["same"], found["false accept"], found["false reject"])
        print(f"{kind:<10}" + "".join(f"{n:>{w}}" for n, w in zip(row, (7, 8, 15, 15), strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("calls", "judge"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--set", nargs="*", default=list(RECIPE_RULES))
    parser.add_argument("--show", type=int, default=0)
    options = parser.parse_args()
    if options.what == "calls":
        write_calls(options.folder, options.file)
    else:
        judge(options.folder, options.file, options.set, options.show)


if __name__ == "__main__":
    main()
