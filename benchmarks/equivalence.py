"""How often is `functional` wrong, and is being the same an equivalence? Rates on labelled pairs, triples, and natural calls.

    python benchmarks/equivalence.py pairs [FILE ...]      false accepts and false rejects by domain
    python benchmarks/equivalence.py triples [--count N]   reflexive, symmetric, transitive on calls made from the pairs' parts
    python benchmarks/equivalence.py natural --tau FOLDER --bfcl FOLDER --shell FOLDER [--out FILE]

`natural` asks three verifiers about pairs of calls that were made for one purpose: calls of one tool by different trials of a
tau-bench task; BFCL's alternative answers, and another row's call of the same function; nl2bash's commands for one English
sentence. Nobody has labelled them: where `functional` and `exact` or `single_step` disagree they are written to FILE, to be read.
FOLDERs hold tau-bench's trajectories.jsonl and tools.json, bfcl_eval's data, and nl2bash's all.cm and all.nl.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

from nemo_pivotrl import config
from nemo_pivotrl.core.types import Action, Case, ToolCall
from nemo_pivotrl.verifiers.base import VerifierFault
from nemo_pivotrl.verifiers.loading import load_verifier
from nemo_pivotrl.verifiers.rows import case_of, sampled_action

ROOT = Path(__file__).resolve().parents[1]
PAIRS = ROOT / "tests/unit/verifiers/equivalence_pairs.jsonl"
FUNCTIONAL = load_verifier(config.Verifier(name="functional"))
Pair = tuple[Case, Action]


def rows(path: Path) -> list[dict[str, Any]]:
    """A JSONL file's rows."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def reward(case: Case, expected: Action, actual: Action, verifier: Any = FUNCTIONAL) -> float:
    """The verdict on `actual` where `expected` is the expert's."""
    return float(verifier.verify(Case(expected, case.tools, fields=case.fields), actual).reward)


def pairs(paths: list[Path]) -> None:
    """Print the rates on labelled pairs, messages left out."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in (row for path in paths for row in rows(path) if row["domain"] != "message"):
        case, actual = case_of(row), sampled_action(row)
        accepted = reward(case, case.expected, actual) == 1.0
        assert accepted == (reward(case, actual, case.expected) == 1.0), f"not symmetric: {row}"
        for domain in (row["domain"], "all"):
            counts[domain]["agree" if row["same"] else "differ"] += 1
            counts[domain]["wrong accept" if accepted else "right reject"] += not row["same"]
            counts[domain]["false reject"] += row["same"] and not accepted
    print("domain | differ | false accepts | agree | false rejects\n--- | --- | --- | --- | ---")
    for domain, n in counts.items():
        accepts, rejects = n["wrong accept"], n["false reject"]
        print(
            f"{domain} | {n['differ']} | {accepts} ({accepts / max(1, n['differ']):.1%}) "
            f"| {n['agree']} | {rejects} ({rejects / max(1, n['agree']):.1%})"
        )


def triples(count: int, seed: int) -> None:
    """Try `count` triples; AssertionError for one that breaks the relation."""
    draw = random.Random(seed)
    pools: dict[str, list[Pair]] = defaultdict(list)
    for row in rows(PAIRS):
        case, actual = case_of(row), sampled_action(row)
        pools[row["expected"]["name"]] += [(case, case.expected), (case, actual)]
    related = 0
    for number in range(count):
        pool = pools[draw.choice(sorted(pools))]
        case, a = draw.choice(pool)
        b, c = (spliced(draw, a, draw.choice(pool)[1]) if draw.random() < 0.5 else a for _ in "bc")
        b, c = varied(draw, b), varied(draw, c)
        try:
            assert reward(case, a, a) == 1.0, a
            ab, ba, bc, ac = (reward(case, *two) for two in ((a, b), (b, a), (b, c), (a, c)))
        except VerifierFault:
            continue
        assert ab == ba, (a, b)
        assert not (ab and bc) or ac, (a, b, c)
        assert not (ab and ac) or bc, (a, b, c)
        related += bool(ab)
        if number % 10_000 == 9_999:
            print(f"{number + 1} triples, {related} with a related pair", flush=True)


def spliced(draw: random.Random, left: Action, right: Action) -> Action:
    """The first call with an argument of the other, or with words of it."""
    call, other = left.calls[0], right.calls[0]
    ours, theirs = json.loads(call.arguments), json.loads(other.arguments)
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        return left
    key = draw.choice(shared)
    value = theirs[key]
    if isinstance(ours[key], str) and isinstance(value, str):
        ours_words, their_words = re.split(r"(\s+)", ours[key]), re.split(r"(\s+)", value)
        value = "".join(
            ours_words[: draw.randrange(len(ours_words) + 1)] + their_words[draw.randrange(len(their_words)) :]
        )
    return Action("calls", calls=(ToolCall(call.name, json.dumps({**ours, key: value})),))


def varied(draw: random.Random, action: Action) -> Action:
    """The call with its texts written a little differently: often the same, sometimes not."""
    call = action.calls[0]
    changes = [
        ("  ", " "), (" ", "  "), ("'", '"'), ('"', "'"), ("-l -a", "-la"), ("-la", "-l -a"), ("=", " "), ("./", ""),
        (";", "\n"), (" && ", "; "), ("--force", "-f"), ("AND", "and"), ("/ ", " "), ("a", "b"), ("1", "1.0"), ("{}", "'{}'"),
    ]  # fmt: skip
    text = json.dumps(json.loads(call.arguments), ensure_ascii=False)
    old, new = (json.dumps(part)[1:-1] for part in draw.choice(changes))
    changed = text.replace(old, new, draw.choice((1, 9)))
    try:
        kept = changed if isinstance(json.loads(changed), dict) else text
    except ValueError:
        kept = text
    return Action("calls", calls=(ToolCall(call.name, kept),))


# ---- natural calls ----


def call(name: str, arguments: Any) -> Action:
    return Action("calls", calls=(ToolCall(name, arguments if isinstance(arguments, str) else json.dumps(arguments)),))


def of_tau(folder: Path) -> Iterator[tuple[str, Case, Action]]:
    """The k-th call of one tool in two trials of one task."""
    tools = tuple(json.loads((folder / "tools.json").read_text(encoding="utf-8")))
    made: dict[tuple[str, str, int], list[str]] = defaultdict(list)
    for row in rows(folder / "trajectories.jsonl"):
        seen: Counter[str] = Counter()
        for message in row["messages"]:
            for tool in message.get("tool_calls") or ():
                name = tool["function"]["name"]
                made[row["task_id"], name, seen[name]].append(tool["function"]["arguments"])
                seen[name] += 1
    for (_, name, _), texts in made.items():
        for left, right in combinations(texts, 2):
            yield "trials", Case(call(name, left), tools), call(name, right)


def of_bfcl(folder: Path) -> Iterator[tuple[str, Case, Action]]:
    """One answer and its alternatives; one answer and another row's call of the same function."""
    last: dict[str, Action] = {}
    for name in ("simple_python", "live_simple", "multiple", "live_multiple"):
        schemas = {row["id"]: row["function"] for row in rows(folder / f"BFCL_v4_{name}.json")}
        for row in rows(folder / f"possible_answer/BFCL_v4_{name}.json"):
            (function, options), *_ = row["ground_truth"][0].items()
            text = (
                json.dumps(schemas[row["id"]])
                .replace('"type": "dict"', '"type": "object"')
                .replace('"float"', '"number"')
            )
            tools = tuple({"type": "function", "function": made} for made in json.loads(text))
            given = {key: values[0] for key, values in options.items() if values and values[0] != ""}
            case = Case(call(function, given), tools)
            for key, values in options.items():
                for value in values[1:]:
                    other = {k: v for k, v in given.items() if k != key} | ({} if value == "" else {key: value})
                    yield "alternative", case, call(function, other)
            if function in last:
                yield "other row", case, last[function]
            last[function] = case.expected


def of_shell(folder: Path) -> Iterator[tuple[str, Case, Action]]:
    """Two commands that people wrote for one sentence."""
    commands: dict[str, list[str]] = defaultdict(list)
    texts = [
        (folder / name).read_text(encoding="utf-8", errors="replace").splitlines() for name in ("all.nl", "all.cm")
    ]
    for sentence, command in zip(*texts, strict=True):
        if command.strip() not in commands[sentence.strip().casefold()]:
            commands[sentence.strip().casefold()].append(command.strip())
    for made in commands.values():
        for left, right in pairwise(made):
            yield "one sentence", Case(call("bash", {"command": left})), call("bash", {"command": right})


def natural(folders: dict[str, Path | None], count: int, seed: int, out: Path | None) -> None:
    """Print how often each verifier accepts, and write where they disagree."""
    verifiers = {name: load_verifier(config.Verifier(name=name)) for name in ("exact", "single_step", "functional")}
    readers = {"tau": of_tau, "bfcl": of_bfcl, "shell": of_shell}
    written = []
    print("source | pairs | equal as JSON | single_step | functional | functional alone | single_step alone")
    print(" | ".join(["---"] * 7))
    for name, reader in readers.items():
        folder = folders[name]
        if folder is None:
            continue
        every = list(reader(folder))
        random.Random(seed).shuffle(every)
        counts: Counter[str] = Counter()
        for kind, case, actual in every[:count]:
            found = {v: reward(case, case.expected, actual, verifier) == 1.0 for v, verifier in verifiers.items()}
            counts.update({v: int(yes) for v, yes in found.items()})
            counts["functional alone"] += found["functional"] and not found["single_step"]
            counts["single_step alone"] += found["single_step"] and not found["functional"]
            if len(set(found.values())) > 1:
                made = (case.expected.calls[0].arguments, actual.calls[0].arguments)
                written.append(
                    {"source": name, "kind": kind, "tool": case.expected.calls[0].name, "pair": made, **found}
                )
        n = min(count, len(every))
        shown = (counts[k] for k in ("exact", "single_step", "functional", "functional alone", "single_step alone"))
        print(" | ".join([name, str(n), *(f"{k} ({k / max(1, n):.1%})" for k in shown)]), flush=True)
    if out is not None:
        out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("pairs", "triples", "natural"))
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--count", type=int, default=0, help="triples (100,000), or pairs of each source (1,000)")
    parser.add_argument("--seed", type=int, default=0)
    for name in ("tau", "bfcl", "shell", "out"):
        parser.add_argument(f"--{name}", type=Path)
    options = parser.parse_args()
    if options.what == "pairs":
        pairs(options.files or [PAIRS])
    elif options.what == "triples":
        triples(options.count or 100_000, options.seed)
    else:
        folders = {name: getattr(options, name) for name in ("tau", "bfcl", "shell")}
        natural(folders, options.count or 1000, options.seed, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
