"""select: in two passes and little memory, the rows, order and tables that one pass over whole profiles gives."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.pointers import profile_row, whole_profiles
from support.recipes import SMALL, TINY, recipe_at

from nemo_pivotrl.algorithms import selection
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.artifacts import json_line, placed_rows, read_rows, rows_at
from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.core.types import Action, Candidate, Profile, ToolCall
from nemo_pivotrl.pivotrl.profile_rows import light_of_row
from nemo_pivotrl.pivotrl.select import FATES, fate, length_band, select_pivots, survival_tables, survivals


def whole(recipe: Recipe) -> bytes:
    """The rows of the pivots file as they were written when profiles were read whole."""
    profiles = whole_profiles(recipe.path("profiles.jsonl"))
    rows = {row["candidate_id"]: row for row in read_rows(recipe.path("profiles.jsonl"))}
    s = recipe.select
    train = [p for p in profiles if p.candidate.split == "train"]
    held_out = [p for p in profiles if p.candidate.split == "validation" and p.failure is None]
    pivots = selection.select(train, s.rule, s.lambda_diff, recipe.seed, s.inclusive, s.limit, s.max_message_ratio)
    found = (rows[p.candidate.candidate_id] for p in [*pivots, *held_out])
    own = ({k: v for k, v in row.items() if k not in ("samples", "profile")} for row in found)
    prompts = (rows[p.candidate.candidate_id]["profile"]["tokens_prompt"] for p in [*pivots, *held_out])
    return b"".join(json_line(row | {"tokens_prompt": n}) for row, n in zip(own, prompts, strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["select.rule=adv", "select.lambda_diff=0.6", "select.limit=7", "select.undecided=by_rate"],
        ["select.rule=random", "select.limit=9", "select.max_message_ratio=0.5", "select.undecided=by_rate"],
    ],
)
def test_two_passes_write_the_bytes_of_one_over_whole_profiles(
    trained: Path, tmp_path: Path, settings: list[str]
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    recipe = recipe_at(tmp_path / "run", *settings)
    written = select_pivots(recipe, True).read_bytes().partition(b"\n")[2]
    assert written == whole(recipe) and written.count(b"\n") > 7
    if not settings:
        assert (tmp_path / "run/pivots.jsonl").read_bytes() == (trained / "pivots.jsonl").read_bytes()


def test_a_light_profile_selects_and_counts_as_the_whole_one_and_rows_are_found_again_by_their_place(
    trained: Path,
) -> None:
    path = trained / "profiles.jsonl"
    for (place, row), full in zip(placed_rows(path), whole_profiles(path), strict=True):
        light = light_of_row(row)
        assert list(rows_at(path, [place])) == [row]
        assert light.rewards == full.rewards and light.failure == full.failure and light.control == full.control
        assert light.tokens_prompt == full.tokens_prompt > 0
        for name in ("candidate_id", "trajectory_id", "task_id", "split", "depth", "action_name"):
            assert getattr(light.candidate, name) == getattr(full.candidate, name), name
        assert light.candidate.expected.kind == full.candidate.expected.kind
        assert not light.candidate.messages and not light.candidate.tools
    assert len(list(placed_rows(path))) > 20


def test_a_batch_of_calls_keeps_its_names_in_a_light_profile() -> None:
    expected = Action("calls", calls=(ToolCall("a", "{}"), ToolCall("b", '{"x":1}')))
    made = profile("c", [1.0, 0.0], expected=expected)
    assert light_of_row(json.loads(json.dumps(profile_row(made)))).candidate.action_name == "a+b"


def profile(name: str, rewards: list[float], **more: Any) -> Profile:
    expected = more.pop("expected", Action("message", "hello"))
    task, depth, tokens = more.pop("task", "t"), more.pop("depth", 0), more.pop("tokens", 100)
    candidate = Candidate(name, "tr-" + task, task, "train", 1, depth, (), (), expected)
    samples = tuple({"reward": r, "text": ""} for r in rewards)
    return Profile(candidate, samples, 1, tokens, **more)


@pytest.mark.parametrize(
    ("tokens", "band"),
    [(0, "0-64"), (64, "0-64"), (65, "65-128"), (128, "65-128"), (129, "129-256"), (131072, "65537-131072")],
)
def test_bands_of_prompt_length_end_at_powers_of_two(tokens: int, band: str) -> None:
    assert length_band(tokens) == band


def test_survival_by_task_and_length_counts_every_candidate_once_by_its_fate() -> None:
    profiles = [
        profile("a", [1.0, 0.0, 0.0, 0.0], task="big", tokens=70),
        profile("b", [0.0] * 4, task="big", tokens=1000),
        profile("c", [1.0] * 4, task="big", tokens=90),
        profile("d", [1.0, 1.0, 1.0, 0.0], task="other", tokens=70),
        profile("e", [], task="other", tokens=70, failure="judge"),
        profile("f", [1.0, 0.0, 0.0, 0.0], task="other", tokens=70),
        profile("g", [], task="other", tokens=70, failure="message_excluded"),
    ]
    fates = [fate(p, {"a"}, 0.6) for p in profiles]
    assert fates == ["pivot", "all 0", "all 1", "too easy", "failed", "not drawn", "left out"]
    tables = survivals(profiles, fates)
    none = dict.fromkeys(FATES, 0)
    assert tables["task"] == {
        "big": none | {"pivot": 1, "all 0": 1, "all 1": 1},
        "other": none | {"too easy": 1, "failed": 1, "not drawn": 1, "left out": 1},
    }
    assert list(tables["prompt"]) == ["65-128", "513-1024"]
    assert tables["prompt"]["513-1024"] == none | {"all 0": 1}
    text = survival_tables(profiles, fates)
    assert text.startswith("what became of the 7 candidates of the train split (held-out states pass unfiltered)\n")
    assert "pivots per trajectory (pivots: trajectories): 0: 1, 1: 1" in text
    assert any(line.split() == ["513-1024", "1", "0", "1", "0", "0", "0", "0", "0"] for line in text.splitlines())


def test_tasks_beyond_the_twelve_most_frequent_are_added_up() -> None:
    sizes = [*range(15, 2, -1), 1, 1]  # 15 tasks
    profiles = [profile(f"{t}-{i}", [0.0, 1.0], task=f"task{t}") for t, n in enumerate(sizes) for i in range(n)]
    table = survivals(profiles, ["pivot"] * len(profiles))["task"]
    assert list(table) == [*(f"task{t}" for t in range(12)), "(3 others)"]
    assert table["(3 others)"]["pivot"] == 3 + 1 + 1 and table["task0"]["pivot"] == 15


def test_pivots_that_a_constant_answer_wins_are_named_and_can_be_left_out(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    drawn = ["select.rule=random", "select.limit=40"]
    path = select_pivots(recipe_at(tmp_path / "run", *drawn), True)
    drawn_ids = {row["candidate_id"] for row in read_rows(path) if row["split"] == "train"}
    assert re.search(r"best constant answer +the text 'ok': mean reward 0\.[1-9]", capsys.readouterr().out)
    select_pivots(recipe_at(tmp_path / "run", *drawn, "select.drop_constant_wins=true"), True)
    kept = [row for row in read_rows(path) if row["split"] == "train"]
    assert kept and {row["candidate_id"] for row in kept} < drawn_ids
    assert all(row["calls"] for row in kept)
    assert "mean reward 0.000" in capsys.readouterr().out


def test_a_pivot_set_that_a_constant_answer_wins_whole_is_refused_where_such_pivots_are_dropped(
    trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    with pytest.raises(InputError, match=r"a constant answer wins all 24 pivots"):
        select_pivots(recipe_at(tmp_path / "run", "select.drop_constant_wins=true"), True)


def test_constant_answers_are_not_replayed_by_a_verifier_that_did_not_judge_the_profile(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    select_pivots(recipe_at(tmp_path / "run", "verifier.name=exact"), True)
    assert "constant answers are not tried: the profile was judged by single_step" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"select\.drop_constant_wins"):
        select_pivots(recipe_at(tmp_path / "run", "verifier.name=exact", "select.drop_constant_wins=true"), True)


@pytest.mark.parametrize("stage", ["select", "extract"])
def test_stages_without_a_model_start_without_torch(trained: Path, tmp_path: Path, stage: str) -> None:
    """Trying thresholds is a second a time, not four."""
    shutil.copytree(trained, tmp_path / "run")
    words = [stage, TINY, f"run_dir={tmp_path}/run", *SMALL, f"policy.model_name={trained}/start/policy", "fresh=true"]
    code = f"import sys; from nemo_pivotrl import cli; sys.exit(cli.main({words!r}) or 3 * ('torch' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
