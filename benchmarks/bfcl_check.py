"""BFCL's own checker over calls that were read out of answers: python benchmarks/bfcl_check.py DATA CALLS VERDICTS

It runs where `bfcl-eval` is installed (benchmarks/bfcl-requirements.txt) and imports nothing of this project's package. CALLS has a
line for each answer, {"id", "category", "calls": [{"name", "arguments"}] or null}; VERDICTS gets the same lines with "valid" and
"error". An answer out of which no calls could be read (null) is invalid, as BFCL counts an answer that its handler cannot decode.

BFCL's handlers for models that write calls as text hand its checker [{name: arguments}]; so does this.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bfcl_data import items
from bfcl_eval.constants.enums import Language
from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker

MODEL = "gorilla-openfunctions-v2"
"""A model of BFCL's list whose function names keep their dots; the checker asks its list for nothing else."""


def main(folder: str, calls: str, verdicts: str) -> None:
    answers = [json.loads(line) for line in Path(calls).read_text(encoding="utf-8").splitlines()]
    rows = {row["id"]: row for row in items(Path(folder), sorted({a["category"] for a in answers}))}
    lines = [json.dumps(answer | _verdict(answer["calls"], rows[answer["id"]])) for answer in answers]
    Path(verdicts).write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{sum(json.loads(line)['valid'] for line in lines)} of {len(lines)} answers are valid -> {verdicts}")


def _verdict(calls: list[dict[str, Any]] | None, row: dict[str, Any]) -> dict[str, Any]:
    if calls is None:
        return {"valid": False, "error": "no calls could be read"}
    written = [{call["name"]: call["arguments"]} for call in calls]
    found = ast_checker(row["functions"], written, row["gold"], Language.PYTHON, row["category"], MODEL)
    return {"valid": bool(found["valid"]), "error": "" if found["valid"] else json.dumps(found["error"])[:300]}


if __name__ == "__main__":
    main(*sys.argv[1:])
