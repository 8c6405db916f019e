"""The report's part about a profile says what its statistics say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.recipes import recipe_at

from nemo_pivotrl.algorithms import selection
from nemo_pivotrl.core.artifacts import Header, read_header, read_rows, write_artefact
from nemo_pivotrl.pivotrl.profile_rows import light_of_row, plan_in
from nemo_pivotrl.pivotrl.profile_statistics import summarise
from nemo_pivotrl.report.page import report


def test_the_page_shows_what_was_saved_the_control_set_repeats_failures_and_tokens(
    trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    path = tmp_path / "run/profiles.jsonl"
    header, rows = read_header(path, "profiles"), list(read_rows(path))
    broken = next(row for row in rows if row["split"] == "train" and not row["profile"]["control"])
    broken["samples"], broken["profile"]["failure"] = [], "judge_<b>timeout"
    write_artefact(path, header, rows)
    written = report(recipe_at(tmp_path / "run"))
    numbers, page = json.loads(written.with_suffix(".json").read_text()), written.read_text()
    summary = summarise(path, plan_in(header))
    assert numbers["profiling"] == summary | {"curtailed": True} and summary["rollouts_saved"] > 0
    for name, entry in summary["classes"].items():
        cells = (
            f"<td>{name}</td><td>{entry['candidates']}</td><td>{entry['train']}</td><td>{entry['rollouts']}</td>"
            if entry
            else ""
        )
        assert cells in page
    assert "judge_&lt;b&gt;timeout</td><td>1</td>" in page and numbers["profile"]["failed"] == 1
    assert f"{summary['repeated_samples']} samples" in page
    assert f"{summary['tokens_generated']} tokens generated" in page
    control = [p for p in map(light_of_row, rows) if p.control and p.candidate.split == "train"]
    rates = [selection.statistics(p.rewards).mean for p in control]
    assert numbers["profile"]["control_mean_reward"] == pytest.approx(sum(rates) / len(rates))
    assert sum(numbers["profile"]["control_hit_rate_counts"].values()) == len(control) > 0
    assert f"Control set: {summary['control']['candidates']} candidates" in page
    train = sum(row["split"] == "train" for row in rows)
    assert set(numbers["survival"]) == {"depth", "prompt", "action", "task"}
    for table in numbers["survival"].values():
        assert sum(sum(row.values()) for row in table.values()) == train
    assert page.count("<svg") == 6


def test_a_profile_drawn_in_full_needs_no_control_set(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    path = tmp_path / "run/profiles.jsonl"
    told = json.loads(path.read_bytes().partition(b"\n")[0])
    told["nemo_pivotrl"]["extra"]["plan"]["curtailed"] = False
    rows = list(read_rows(path))
    for row in rows:
        row["profile"]["control"] = False
        row["samples"] = (row["samples"] * 8)[:8]
    write_artefact(path, Header(**told["nemo_pivotrl"]), rows)
    page = report(recipe_at(tmp_path / "run")).read_text()
    assert "Control set" not in page and "control set" not in page and "stopped where" not in page
    assert page.count("<svg") == 5 and "at most 8" not in page
