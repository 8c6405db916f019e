"""Every example file of every environment of a NeMo-Gym wheel through `extract`, and the pivot rows through `audit`.

    python benchmarks/gym_examples.py extract    the project's environment: the table, and rows for the second step
    python benchmarks/gym_examples.py verify     the environment of `make conformance`: NeMo-Gym's own reward of the same rows

The first step reads each file alone and prints: records = trajectories + left out by reason, turns = kept + skipped. Of the four
pivot environments it audits every row (the expert's action must score 1) and writes the rows with our reward. The second step asks
the environments' own servers for their reward of the expert's action, and of the recorded rollouts, which must agree with ours.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gym_release import BUILD, SERVERS, Release, fetch

RELEASE = "0.7.0"
EXAMPLES = BUILD / "examples"
SETTINGS: dict[str, dict[str, Any]] = {
    "single_step": {"word_count_similarity_threshold": 0.1},
    "swe": {},
    "terminus": {"enable_string_similarity": True, "string_similarity_threshold": 0.9},
    "terminal_multi_harness": {"string_similarity_threshold": 0.9},
}
"""As the shipped configs of the environments have them."""
OPEN_SCHEMA = {"type": "object", "properties": {}, "additionalProperties": True}


def example_files(release: str) -> Iterator[tuple[str, Path]]:
    """(name in the wheel, unpacked file) of every JSON lines file under an environment's `data`."""
    fetch(release)
    with zipfile.ZipFile(BUILD / "wheels" / f"nemo_gym-{release}-py3-none-any.whl") as wheel:
        for name in sorted(wheel.namelist()):
            if name.endswith(".jsonl") and "/data/" in name:
                path = EXAMPLES / "files" / name
                if not path.exists():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(wheel.read(name))
                yield name, path


def family_of(name: str) -> str:
    """The verifier family of a file's environment, '' for an environment of another kind."""
    return next((f for f, (folder, _) in SERVERS.items() if name.startswith(f"resources_servers/{folder}/data/")), "")


def extract() -> int:
    """Print the table. 1 where a turn is neither kept nor counted, or an audit finds an expert that does not score 1."""
    from nemo_pivotrl.data.gym_rows import candidate_to_row

    total: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    print("| file | records = read + left out | turns = kept + skipped |\n|---|---|---|")
    rows: list[dict[str, Any]] = []
    for name, path in example_files(RELEASE):
        left, counts, kept = extracted(path, open_tools=bool(family_of(name)))
        total.update(counts)
        reasons.update(left)
        told = "".join(f" + {n} {reason}" for reason, n in sorted(left.items()))
        print(
            f"| {name} | {counts['records']} = {counts['read']}{told} | {counts['turns']} = {counts['kept']} + {counts['skipped']} |"
        )
        if family := family_of(name):
            rows += [{"family": family, "file": name, "candidate": candidate} for candidate in kept]
    print(
        f"\n{total['files']} files: {total['records']} records = {total['read']} read + {reasons.total()} left out {dict(reasons)}"
    )
    print(f"{total['turns']} turns = {total['kept']} kept + {total['skipped']} skipped")
    failed = audited(rows)
    EXAMPLES.mkdir(parents=True, exist_ok=True)
    written = (row | candidate_to_row(row.pop("candidate"), "agent") for row in rows)
    (EXAMPLES / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written), encoding="utf-8")
    return int(
        failed
        or total["records"] != total["read"] + reasons.total()
        or total["turns"] != total["kept"] + total["skipped"]
    )


def extracted(path: Path, open_tools: bool) -> tuple[Counter[str], Counter[str], list[Any]]:
    """(records left out by reason, counts, kept candidates) of one file. `open_tools`: rows that declare none get the tools that
    their experts call, with schemas that take anything."""
    from nemo_pivotrl.config import Extract
    from nemo_pivotrl.core.errors import InputError
    from nemo_pivotrl.data.readers import read_trajectories
    from nemo_pivotrl.pivotrl.extract import cut_all

    tools = _called_tools(path) if open_tools else None
    try:
        reading = read_trajectories([str(path)], tools_file=tools, on_invalid="skip", min_reward=0.0)
    except InputError as error:
        lines = sum(bool(line.strip()) for line in path.read_bytes().splitlines())
        return Counter({error.problems[0].found: lines}), Counter(files=1, records=lines), []
    settings = Extract(near_duplicate=1.0, on_invalid="skip", min_reward=0.0)
    kept, audit = cut_all(reading.trajectories, {t.task_id: "train" for t in reading.trajectories}, settings)
    file = reading.files[0]
    counts = Counter(
        files=1, records=file.records, read=len(reading.trajectories), turns=audit["turns"], kept=len(kept)
    )
    counts["skipped"] = sum(audit["skipped"].values())
    ready = {t.trajectory_id for t in reading.trajectories if t.last_only}
    return file.unreadable, counts, [c for c in kept if c.trajectory_id in ready]


def _called_tools(path: Path) -> str:
    names = set()
    for line in path.read_text(encoding="utf-8").splitlines():
        action = json.loads(line).get("expected_action")
        for call in action.get("calls", [action]) if isinstance(action, dict) else []:
            names.add(call.get("name"))
    listed = [{"name": name, "parameters": OPEN_SCHEMA} for name in sorted(names - {None})]
    target = path.with_suffix(".tools.json")
    target.write_text(json.dumps(listed), encoding="utf-8")
    return str(target)


def audited(rows: list[dict[str, Any]]) -> int:
    """Give every row our reward of its expert's action, and print how the audit's other probes fare. How many do not score 1."""
    from nemo_pivotrl import config
    from nemo_pivotrl.pivotrl.verifier_audit import run_audit, summarise
    from nemo_pivotrl.verifiers import load_verifier

    failed = 0
    for family in SERVERS:
        own = [row for row in rows if row["family"] == family]
        if not own:
            continue
        settings = config.Verifier(name=family, settings=SETTINGS[family])
        verifier = load_verifier(settings)
        candidates = [row["candidate"] for row in own]
        for row, candidate in zip(own, candidates, strict=True):
            row["ours"] = verifier.verify(candidate.case, candidate.expected).reward
        found = run_audit(config.Recipe(verifier=settings, audit=config.Audit(sample=0)), candidates, verifier)
        golds = [row["ours"] for row in own]
        failed += sum(reward != 1.0 for reward in golds)
        summary = summarise(found)
        wrong = sum(row["false_accept"] for row in summary["by_probe"].values())
        tried = sum(row["wrong"] for row in summary["by_probe"].values())
        print(
            f"audit {family}: {len(own)} rows, the expert scores 1 in {sum(reward == 1.0 for reward in golds)}; "
            f"{wrong} of {tried} wrong actions score; unwinnable {len(summary['unwinnable'])}, unlosable {len(summary['unlosable'])}"
        )
    return failed


def verify() -> int:
    """Print whether NeMo-Gym's own reward is ours. 1 where it is not."""
    from conformance import ours

    from nemo_pivotrl.data.gym_rows import expected_of_row, message_of, to_items

    release = Release(RELEASE, fetch(RELEASE))
    judged: Counter[str] = Counter()
    with asyncio.Runner() as runner:
        for line in (EXAMPLES / "rows.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            family, reward = row.pop("family"), row.pop("ours")
            row["response"] = answered(to_items([message_of(expected_of_row(row["expected_action"]))]))
            theirs = release.verify(family, SETTINGS[family], row, runner)
            same = theirs.kind == "verdict" and theirs.reward == reward
            judged[f"{family} expert {'agrees' if same else 'DIFFERS'}"] += 1
            if not same:
                print(
                    f"{row['file']}: ours {reward}, theirs {theirs.kind} {theirs.reward} {theirs.category} {theirs.detail}"
                )
        for name, path in example_files(RELEASE):
            family = family_of(name)
            for line in path.read_text(encoding="utf-8").splitlines() if family and "rollouts" in name else []:
                row = json.loads(line)
                recorded, own = row["reward"], ours(family, RELEASE, SETTINGS[family], row)
                same = own.kind == "verdict" and own.reward == recorded
                judged[f"{family} rollout {'agrees' if same else 'DIFFERS'}"] += 1
                if not same:
                    print(f"{name}: recorded {recorded}, ours {own.kind} {own.reward} {own.category} {own.detail}")
    print("\n".join(f"{what}: {count}" for what, count in sorted(judged.items())))
    return int(any("DIFFERS" in what for what in judged))


def answered(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A Responses object that holds `items`, with what the servers' request model asks for."""
    fixed = {"id": "r", "created_at": 0.0, "model": "m", "object": "response", "parallel_tool_calls": True}
    return {**fixed, "tool_choice": "auto", "tools": [], "output": items}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=["extract", "verify"])
    return {"extract": extract, "verify": verify}[parser.parse_args().step]()


if __name__ == "__main__":
    sys.exit(main())
