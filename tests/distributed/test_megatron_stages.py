"""Stages over Megatron: rank 0 runs them, all ranks hold the model, and they end with what one process ends with."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import tiny_hf
import torch
from support.processes import python
from support.recipes import ROOT, SMALL, recipe_at
from support.workers import Workers

from nemo_pivotrl.backends.identity import policy_revision
from nemo_pivotrl.components.metrics import read_metrics

HERE = Path(__file__).parent
TP2 = "megatron.tensor_model_parallel_size=2"
ON_CPU = ["policy.backend=megatron", "megatron.cpu=true", "megatron.bf16=false", "grpo.val_kl=true"]


def command(stage: str, folder: Path, *overrides: str) -> list[str]:
    recipe = str(ROOT / "recipes/pivotrl/tiny.yaml")
    return [stage, recipe, f"run_dir={folder}", *SMALL, *ON_CPU, *overrides]


@pytest.fixture(scope="module")
def start(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A copy of the trained run directory under a name that does not change: the start policy's place is in the recipe."""

    def copy(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name) / "run"
        shutil.copytree(trained, folder)
        return folder

    return copy


@pytest.fixture(scope="module")
def straight(start: Any, workers: Workers) -> tuple[Path, list[dict[str, Any]]]:
    """A run directory in which two data-parallel ranks have trained without trouble, and what each rank did."""
    folder = start("straight")
    return folder, workers.run(2, "stage_jobs:stage", arguments=command("train", folder))


def close(found: list[dict[str, Any]], want: list[dict[str, Any]]) -> None:
    assert [sorted(row) for row in found] == [sorted(row) for row in want]
    for ours, theirs in zip(found, want, strict=True):
        for key, value in theirs.items():
            if key == "token_ratio":  # a data-parallel rank runs the trunks of the rows that it has
                assert min(ours[key], value) > 1.0
                continue
            assert ours[key] == pytest.approx(value, rel=1e-3, abs=1e-4), (ours["step"], key)


def test_training_on_two_ranks_is_training_on_one_device(start: Any, straight: Any) -> None:
    from nemo_pivotrl.pivotrl.train import train

    folder, (first, second) = straight
    assert (first["code"], second["code"], second["out"]) == (0, 0, "")
    alone = start("alone")
    train(recipe_at(alone))
    found, want = read_metrics(folder / "pivotrl/metrics.jsonl"), read_metrics(alone / "pivotrl/metrics.jsonl")
    assert len(want) == 5
    close(found, want)
    for row in found[1:]:
        # the policy that samples is the policy that trains: on the first update every ratio is exactly 1
        assert row.get("ratio", 1.0) == pytest.approx(1.0, abs=1e-6) and row.get("clip_share", 0.0) == 0.0
    assert any("ratio" in row for row in found)


def test_tensor_parallel_ranks_train_alike(start: Any, straight: Any, workers: Workers) -> None:
    folder = start("tp2")
    for answer in workers.run(2, "stage_jobs:stage", arguments=command("train", folder, TP2)):
        assert answer["code"] == 0
    close(read_metrics(folder / "pivotrl/metrics.jsonl"), read_metrics(straight[0] / "pivotrl/metrics.jsonl"))


def test_profile_sft_and_evaluate(start: Any, straight: Any, workers: Workers) -> None:
    folder = start("others")
    before = (folder / "profiles.jsonl").read_text().splitlines()
    (folder / "profiles.jsonl").unlink()
    for stage in ("profile", "sft"):
        answers = workers.run(2, "stage_jobs:stage", arguments=command(stage, folder))
        assert [a["code"] for a in answers] == [0, 0] and answers[1]["out"] == "", answers[0]["err"]
    after = (folder / "profiles.jsonl").read_text().splitlines()
    texts = [[s["text"] for row in map(json.loads, rows[1:]) for s in row["samples"]] for rows in (before, after)]
    assert texts[0] == texts[1] and len(texts[0]) > 100
    start_policy = f"{folder}/start/policy"
    sets = [f"evaluate.policies.{name}={start_policy}" for name in ("pivotrl", "random")]
    sets += ["evaluate.simulator=none", "evaluate.retention=none"]
    answers = workers.run(2, "stage_jobs:stage", arguments=command("evaluate", folder, *sets))
    assert answers[0]["code"] == 0 and "sft" in answers[0]["out"], answers[0]["err"]
    evaluated = json.loads((folder / "evaluation.json").read_text())["policies"]
    assert evaluated["base"]["one_turn"]["mean"] == evaluated["random"]["one_turn"]["mean"]
    assert all(max(a["held"]) == 1 for a in answers)  # a policy is let go of before the next one is loaded


def test_bad_input_is_told_once_and_ends_all_with_its_code(start: Any, workers: Workers) -> None:
    folder = start("bad")
    for overrides, words in (
        (["megatron.tensor_model_parallel_size=3"], "tensor_model_parallel_size"),  # every rank finds it
        (["grpo.pivots=nowhere.jsonl"], "nowhere.jsonl"),  # rank 0 finds it, outside any verb
        (["policy.backend=reference"], "in 2 processes"),
    ):
        first, second = workers.run(2, "stage_jobs:stage", arguments=command("train", folder, *overrides))
        assert (first["code"], second["code"], second["err"]) == (2, 2, ""), overrides
        assert words in first["err"] and first["err"].count("nemo-pivotrl train:") == 1
    assert not (folder / "pivotrl").exists()


def test_a_second_model_an_attribute_and_what_cannot_be_sent(tmp_path: Path, workers: Workers) -> None:
    tiny_hf.make("qwen3", tmp_path / "hf")
    layout = {"use_distributed_optimizer": False}
    answers = workers.run(2, "stage_jobs:spread", folder=str(tmp_path / "hf"), layout=layout)
    assert [sizes for _, sizes in answers] == [[[1.0], [1.0, 1.0], [0.5, 1.0], [0.5]]] * 2
    seen = answers[0][0]
    assert seen["rows"] == 7.0  # every row once, on whichever rank
    assert "get_loss_and_metrics cannot be sent" in seen["lambda_error"] and "nonsense" in seen["verb_error"]


def test_the_scorer_is_the_reference_scorer(tmp_path: Path, workers: Workers) -> None:
    from nemo_pivotrl.backends import loading
    from nemo_pivotrl.config import Patient

    tiny_hf.make("qwen3", tmp_path / "hf")
    maker = torch.Generator().manual_seed(1)
    sequences = [
        tuple(torch.randint(1, 131, (length,), generator=maker).tolist() for length in (3 + 2 * n, 1 + n))
        for n in range(7)
    ]
    want = loading.load_scorer(Patient(model_name=str(tmp_path / "hf"))).log_probs(sequences)
    for layout in ({"tensor_model_parallel_size": 2}, {}):
        found, nothing = workers.run(
            2, "stage_jobs:scores", folder=str(tmp_path / "hf"), layout=layout, sequences=sequences
        )
        assert nothing == []
        for ours, theirs in zip(found, want, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def processes(kind: str, arguments: list[str]) -> tuple[list[int], list[str]]:
    """(exit codes, our lines on stderr) of a job of two processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    started = [
        python(
            *("-W", "ignore", str(HERE / "stage_jobs.py"), kind, *arguments),
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        for process in started:
            process.wait()
    finally:
        for process in started:
            process.kill()
    errors = [process.err.read_text() for process in started]
    # a progress bar may stand before it on the same line
    lines = [
        "nemo-pivotrl" + line.split("nemo-pivotrl")[1]
        for e in errors
        for line in e.splitlines()
        if "nemo-pivotrl:" in line
    ]
    return [process.returncode for process in started], lines


def test_a_killed_rank_ends_the_job_and_the_same_command_goes_on(start: Any, straight: Any, workers: Workers) -> None:
    folder = start("killed")
    arguments = command("train", folder)
    codes, lines = processes("kill", arguments)
    assert codes == [1, -9] and lines == ["nemo-pivotrl: rank 1 died: no sign of life for 4 s"]
    assert [path.name for path in sorted((folder / "pivotrl").glob("step_*"))] == ["step_00002"]
    assert [a["code"] for a in workers.run(2, "stage_jobs:stage", arguments=arguments)] == [0, 0]
    assert (folder / "pivotrl/metrics.jsonl").read_bytes() == (straight[0] / "pivotrl/metrics.jsonl").read_bytes()
    assert policy_revision(folder / "pivotrl/policy") == policy_revision(straight[0] / "pivotrl/policy")


def test_what_only_one_rank_refuses_ends_the_job_with_its_words(start: Any) -> None:
    folder = start("refused")
    codes, lines = processes("refuse", command("train", folder))
    assert codes == [1, 2] and lines == ["nemo-pivotrl: rank 1 failed: 1 problem:"], lines


def test_a_run_that_stops_at_its_deadline_ends_every_rank_with_its_code(workers: Workers) -> None:
    assert workers.run(2, "stage_jobs:paused") == [75, 75]
