"""BFCL's questions, schemas and gold calls as trajectories of one turn, split by function.

Read from the installed package `bfcl-eval`, nothing is copied into this project. Two rows share a group where they share the name of
a function, and a group lies on one side: `warmup` (the start policy's share), `train` (with `extract.validation_share` of it held out
by the product itself), `test`. So no schema of a test row is seen in training.

The expert's call is made of BFCL's acceptable answers: of every argument the first acceptable value, and an argument that may be left
out is left out. Other acceptable values stay BFCL's alone: its checker decides evaluation.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SPLITS = ("warmup", "train", "test")
CATEGORIES = ("simple_python", "multiple", "parallel", "parallel_multiple", "live_simple", "live_multiple")
"""Those whose gold is a list of calls, in Python's types, and whose question is one turn."""


def data_folder(checker: str) -> Path:
    """The data of the `bfcl-eval` that the Python interpreter `checker` has."""
    code = "import importlib.util as u; print(u.find_spec('bfcl_eval').submodule_search_locations[0])"
    found = subprocess.run([checker, "-c", code], capture_output=True, text=True, check=False)
    if found.returncode:
        sys.exit(
            f"{checker} has no bfcl-eval: make .venv-bfcl/.installed, or pip install --no-deps bfcl-eval==2026.3.23"
        )
    return Path(found.stdout.strip()) / "data"


def items(folder: Path, categories: Sequence[str]) -> Iterator[Row]:
    """{id, category, question, functions, gold} of every row, in BFCL's own order."""
    for category in categories:
        gold = {row["id"]: row["ground_truth"] for row in _rows(folder / f"possible_answer/BFCL_v4_{category}.json")}
        for row in _rows(folder / f"BFCL_v4_{category}.json"):
            yield {
                "id": row["id"],
                "category": category,
                "question": row["question"][0],
                "functions": row["function"],
                "gold": gold[row["id"]],
            }


def _rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def groups(rows: Sequence[Row]) -> list[str]:
    """Of each row the name of its group: the rows that are joined to it by functions in common."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    for row in rows:
        names = [f["name"] for f in row["functions"]]
        for name in names[1:]:
            first, second = sorted((root(names[0]), root(name)))
            parent[second] = first
    return [root(row["functions"][0]["name"]) for row in rows]


def assign(names: Sequence[str], shares: dict[str, float], seed: int) -> list[str]:
    """The split of each row, by its group's name: groups in random order fill the splits up to their shares of the rows."""
    sizes = {name: names.count(name) for name in names}
    order = sorted(sizes, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).hexdigest())
    bounds, reached = {}, 0.0
    for split in SPLITS:
        reached += shares[split] * len(names)
        bounds[split] = reached
    of, placed = {}, 0
    for name in order:
        middle = placed + sizes[name] / 2
        of[name] = next((split for split in SPLITS if middle < bounds[split]), SPLITS[-1])
        placed += sizes[name]
    return [of[name] for name in names]


def calls_of(row: Row) -> list[Row]:
    """The expert's calls, [{name, arguments}]."""
    required = {f["name"]: f["parameters"].get("required", []) for f in row["functions"]}
    calls = []
    for call in row["gold"]:
        ((name, arguments),) = call.items()
        calls.append({"name": name, "arguments": _first(arguments, required.get(name, []))})
    return calls


def _first(arguments: Row, required: Sequence[str]) -> Row:
    """Of each argument's acceptable values the first; one that may be left out ("" among them) is left out."""
    found = {}
    for name, values in arguments.items():
        written = [v for v in values if v != ""]
        if written and (
            "" not in values or name in required
        ):  # gold lists "" for some arguments that the schema requires
            found[name] = _value(written[0])
    return found


def _value(value: Any) -> Any:
    """A value as it is written: within most objects BFCL lists the acceptable values of every key, too."""
    if isinstance(value, dict):
        listed = all(isinstance(v, list) for v in value.values())
        return {k: _value(v[0]) for k, v in value.items() if v and "" not in v} if listed else value
    if isinstance(value, list):
        return [_value(v) for v in value]
    return value


def trajectory(row: Row, group: str) -> Row:
    """A record of `extract`, format `openai`: the question, the tools as BFCL writes them, the expert's calls."""
    calls = [
        {
            "id": f"call_{i}",
            "type": "function",
            "function": {"name": c["name"], "arguments": json.dumps(c["arguments"], ensure_ascii=False)},
        }
        for i, c in enumerate(calls_of(row))
    ]
    return {
        "id": row["id"],
        "task_id": group,
        "tools": [{"type": "function", "function": f} for f in row["functions"]],
        "messages": [*row["question"], {"role": "assistant", "content": "", "tool_calls": calls}],
    }


def write_splits(
    folder: Path,
    target: Path,
    categories: Sequence[str],
    trained: Sequence[str],
    shares: dict[str, float],
    seed: int,
    limit: int = 0,
) -> dict[str, int]:
    """Write {warmup,train,test}.jsonl under `target`; returns their numbers of rows.

    trained: the categories of `train.jsonl`; the other two have rows of all. limit: at most so many rows of each file.
    """
    rows = list(items(folder, categories))
    names = groups(rows)
    of = assign(names, shares, seed)
    counts = {}
    target.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        chosen = [(row, name) for row, name, own in zip(rows, names, of, strict=True) if own == split]
        chosen = [pair for pair in chosen if split != "train" or pair[0]["category"] in trained]
        chosen.sort(key=lambda pair: hashlib.sha256(f"{seed} {pair[0]['id']}".encode()).hexdigest())
        chosen = chosen[:limit] if limit else chosen
        lines = [json.dumps(trajectory(row, name), ensure_ascii=False) for row, name in chosen]
        (target / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        counts[split] = len(lines)
    return counts
