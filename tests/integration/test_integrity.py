"""What is damaged, foreign, unfinished or at work is refused by every stage that would read or write it."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.recipes import ROOT, SMALL, recipe_at

from nemo_pivotrl import cli
from nemo_pivotrl.backends.identity import policy_revision
from nemo_pivotrl.components import checkpoint
from nemo_pivotrl.core.artifacts import read_header, read_rows, write_artefact
from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.pivotrl.evaluate import evaluate
from nemo_pivotrl.pivotrl.export import export
from nemo_pivotrl.pivotrl.profile import profile
from nemo_pivotrl.pivotrl.select import select_pivots
from nemo_pivotrl.pivotrl.sft import sft
from nemo_pivotrl.pivotrl.train import train
from nemo_pivotrl.pivotrl.verifier_audit import audit

sys.path.insert(0, str(ROOT / "tests/nightly"))
import torture

RECIPE = str(ROOT / "recipes/pivotrl/tiny.yaml")


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def half(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: len(lines) // 2]))


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-40] ^= 4
    path.write_bytes(data)


READERS = {
    "candidates.jsonl": ["profile", "audit", "sft", "evaluate"],
    "profiles.jsonl": ["select", "rescore", "profile"],
    "pivots.jsonl": ["train", "sft", "export"],
}


@pytest.mark.parametrize("damage", [half, pipe, flipped])
@pytest.mark.parametrize("name", READERS)
def test_every_stage_refuses_a_damaged_artefact_that_it_reads(
    run_dir: Path, name: str, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    damage(run_dir / name)
    for stage in READERS[name]:
        source = f"sft.source={name.partition('.')[0]}" if stage == "sft" else "seed=0"
        assert cli.main([stage, RECIPE, *SMALL, f"run_dir={run_dir}", source]) == 2, stage
        told = capsys.readouterr().err
        assert str(run_dir / name) in told and "Traceback" not in told, stage


def test_parents_are_compared_up_to_the_users_own_files(run_dir: Path) -> None:
    source = Path(recipe_at(run_dir).extract.trajectories[0])
    for stage in (profile, audit, evaluate):
        before = source.read_bytes()
        source.write_bytes(before + before.splitlines(keepends=True)[0])
        with pytest.raises(InputError, match=r"candidates\.jsonl:1: parent"):
            stage(recipe_at(run_dir))
        source.write_bytes(before)
    path = run_dir / "candidates.jsonl"
    write_artefact(path, read_header(path, "candidates"), list(read_rows(path))[:-1])
    for stage in (select_pivots, train, sft, export):
        with pytest.raises(InputError, match=r"profiles\.jsonl:1: parent"):
            stage(recipe_at(run_dir, "sft.source=pivots"))


def test_export_refuses_what_no_trainer_can_use_and_sums_what_it_writes(run_dir: Path) -> None:
    recipe, path = recipe_at(run_dir), run_dir / "pivots.jsonl"
    folder = export(recipe)
    assert set(checkpoint.read_sums(folder)) == {"train.jsonl", "validation.jsonl"}
    header, rows = read_header(path, "pivots"), list(read_rows(path))
    bare = {key: value for key, value in rows[0].items() if key != "turn"}
    held_out = [row for row in rows if row["split"] == "validation"]
    for odd, told in (
        ([], "no pivot of the train split"),
        (held_out, "no pivot of the train split"),
        ([*rows[1:], bare], "trajectory, turn: found (?s:.*) points to no turn of"),
        ([{**rows[0], "trajectory": 10**6}], "trajectory, turn: found (?s:.*) points to no turn of"),
    ):
        write_artefact(path, header, odd)
        with pytest.raises(InputError, match=told):
            export(recipe)


def test_a_flipped_bit_in_a_checkpoint_or_a_published_policy_is_refused(run_dir: Path) -> None:
    policy = train(recipe_at(run_dir))
    folder, weights = policy.parent, policy / "model.safetensors"
    whole = weights.read_bytes()
    flipped(weights)
    with pytest.raises(InputError, match=r"model\.safetensors: file: found other bytes"):
        train(recipe_at(run_dir))
    with pytest.raises(InputError, match=r"model\.safetensors: file: found other bytes"):
        policy_revision(policy)  # what every stage asks that reads a policy
    weights.write_bytes(whole)
    (folder / "published.json").unlink()
    last = checkpoint.steps(folder)[-1]
    flipped(last / "state/state.pt")
    with pytest.raises(InputError, match=r"state/state\.pt(?s:.*)remove this checkpoint"):
        train(recipe_at(run_dir))
    shutil.rmtree(last)
    assert (train(recipe_at(run_dir)) / "model.safetensors").read_bytes() == whole


def test_two_audits_write_the_same_bytes(run_dir: Path) -> None:
    found = []
    for _ in range(2):
        audit(recipe_at(run_dir))
        found.append([(run_dir / name).read_bytes() for name in ("audit.json", "audit.jsonl")])
    assert found[0] == found[1] and "ms_" not in json.dumps(json.loads(found[0][0]))


def test_a_stage_that_is_killed_starved_and_started_twice_ends_with_the_same_bytes(
    trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "pivotrl")
    (tmp_path / "pivotrl/report.html").touch()  # the run is there
    counts, wrong = torture.torture("select", tmp_path, kills=2, fulls=1, doubles=1, tmpfs=0, seed=1)
    assert wrong == [] and (counts["kill"], counts["full"], counts["double"]) == (2, 1, 1)
