"""The BFCL benchmark's own arithmetic: splits by function, the expert's calls, what the commands are, and where verdicts differ."""

import json
import random
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from support.recipes import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import bfcl
import bfcl_agree
import bfcl_data
import bfcl_tables

from nemo_pivotrl import extract
from nemo_pivotrl.config.load import load_recipe
from nemo_pivotrl.core.artifacts import read_rows


def function(name: str, **properties: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "parameters": {"type": "dict", "properties": properties, "required": ["n"]}}


def row(number: int, functions: list[dict[str, Any]], arguments: dict[str, list[Any]]) -> tuple[dict, dict]:
    name = f"simple_python_{number}"
    question = [[{"role": "user", "content": f"question {number}"}]]
    return (
        {"id": name, "question": question, "function": functions},
        {"id": name, "ground_truth": [{functions[0]["name"]: arguments}]},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty rows; every function has two of them, and rows 0 to 3 are joined by a function beside their own."""
    rows = []
    for i in range(40):
        functions = [function(f"f{i // 2}", n={"type": "integer"}, unit={"type": "string", "default": "m"})]
        rows.append(row(i, functions + ([function("shared")] if i < 4 else []), {"n": [i], "unit": ["", "cm"]}))
    (tmp_path / "possible_answer").mkdir()
    for place, part in ((tmp_path, 0), (tmp_path / "possible_answer", 1)):
        (place / "BFCL_v4_simple_python.json").write_text("\n".join(json.dumps(pair[part]) for pair in rows))
    return tmp_path


def test_no_function_is_on_two_sides_and_the_shares_are_kept(folder: Path) -> None:
    given = folder, folder / "out", ["simple_python"], ["simple_python"], bfcl.SHARES
    counts = bfcl_data.write_splits(*given, seed=0)
    assert sum(counts.values()) == 40 and all(abs(counts[s] - 40 * bfcl.SHARES[s]) <= 4 for s in counts)
    of = defaultdict(set)
    for split in counts:
        for line in (folder / f"out/{split}.jsonl").read_text().splitlines():
            for tool in json.loads(line)["tools"]:
                of[tool["function"]["name"]].add(split)
    assert len(of) == 21 and all(len(splits) == 1 for splits in of.values())
    assert bfcl_data.write_splits(*given, seed=0, limit=3) == dict.fromkeys(counts, 3)


def test_the_experts_call_has_the_first_value_and_only_what_must_be_written() -> None:
    asked, gold = row(0, [function("f")], {"n": ["", 3, 4], "unit": ["", "m"], "where": [{"a": [1, 2], "b": ["", 5]}]})
    calls = bfcl_data.calls_of({"functions": asked["function"], "gold": gold["ground_truth"]})
    assert calls == [{"name": "f", "arguments": {"n": 3, "where": {"a": 1}}}]
    assert bfcl_data._value({"a": {"b": 1}}) == {"a": {"b": 1}}  # BFCL writes some objects as they are


def test_the_rows_are_read_by_extract_and_a_test_set_is_held_out_whole(folder: Path) -> None:
    bfcl_data.write_splits(folder, folder / "out", ["simple_python"], ["simple_python"], bfcl.SHARES, 0)
    own = [f"run_dir={folder}/run", f"extract.trajectories=[{folder}/out/test.jsonl]", "extract.validation_share=1"]
    rows = list(read_rows(extract(load_recipe(bfcl.RECIPE, own))))
    assert len(rows) == 14 and {r["split"] for r in rows} == {"validation"}


def test_every_arm_is_trained_and_tested_and_ends_in_its_own_folder() -> None:
    steps = dict(bfcl.steps(3, bfcl.ARMS))
    assert {f"test-{label}" for label in ("base", "start", *bfcl.ARMS)} <= set(steps)
    for name, words in steps.items():
        load_recipe(words[1], words[2:])  # every setting exists
        assert name != "strict" or words[0] == "train"


def test_variants_are_labelled_by_what_was_changed(folder: Path) -> None:
    (first, *_) = bfcl_data.items(folder, ["simple_python"])
    made = dict(bfcl_agree.variants(first, {"int": [7]}, random.Random(0)))
    arguments = {kind: calls[0]["arguments"] for kind, calls in made.items()}
    assert arguments["expert"] == {"n": 0} and arguments["accepted"] == {"n": 0, "unit": "cm"}
    assert arguments["text"] == {"n": "0"} and arguments["other"] == {"n": 7} and arguments["left_out"] == {}


def test_an_arm_pays_for_its_own_selection_and_not_for_what_all_share() -> None:
    spent = {
        "warm": 9,
        "profile": 9,
        "select-adv": 36,
        "adv": 360,
        "test-adv": 9,
        "rescore": 72,
        "select-strict": 36,
        "sft": 720,
    }
    steps = [{"step": name, "cpu_s": seconds} for name, seconds in spent.items()]
    assert bfcl_tables.processor_hours(steps) == {"adv": pytest.approx(0.11), "sft": pytest.approx(0.2)}
    strict = bfcl_tables.processor_hours([*steps, {"step": "strict", "cpu_s": 252}])["strict"]
    assert strict == pytest.approx(0.1)  # rescoring is strict match's own
