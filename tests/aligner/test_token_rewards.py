"""Stage 1 from a `.nemo` patient: importance and rewards are the reference backend's, over any layout of ranks."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_aligner
from conftest import Run

ARGUMENTS = [
    "trainer.accelerator=cpu",
    "trainer.precision=32",
    "model.megatron_amp_O2=false",
    "model.encoder_seq_length=128",
    "exp_manager.explicit_log_dir=logs",
    "exp_manager.create_checkpoint_callback=false",
    "exp_manager.resume_if_exists=false",
    "pretrained_checkpoint.restore_from_path=start.nemo",
    "model.llmdoctor.patient.run_dir=stage1",
    "model.llmdoctor.patient.batch_tokens=256",
]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def equal_golden(rows: list[dict[str, Any]]) -> None:
    expected = tiny_aligner.golden()["token_rewards"]
    assert len(rows) == len(expected)
    for row, pair in zip(rows, expected, strict=True):
        for side in ("chosen", "rejected"):
            assert row[side]["ids"] == pair[side]["ids"]
            assert row[side]["importance"] == pytest.approx(pair[side]["importance"], abs=2e-5)
            assert row[side]["rewards"] == pytest.approx(pair[side]["rewards"], abs=1e-3)


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"pp": 2}, {"dp": 2}], ids=["alone", "TP=2", "PP=2", "DP=2"])
def test_token_rewards_of_a_nemo_patient_are_the_reference_backends(
    run: Run, tmp_path: Path, layout: dict[str, int]
) -> None:
    run("save_nemo", golden=True)
    (tmp_path / "stage1").mkdir()
    shutil.copy(tmp_path / "preferences.jsonl", tmp_path / "stage1")
    ranks = sum(layout.values()) or 1
    sizes = [f"trainer.devices={ranks}"]
    sizes += [f"++model.tensor_model_parallel_size={layout.get('tp', 1)}"]
    sizes += [f"++model.pipeline_model_parallel_size={layout.get('pp', 1)}"]
    run("extract", ranks, arguments=[*ARGUMENTS, *sizes])
    path = tmp_path / "stage1/token_rewards.jsonl"
    equal_golden(rows_of(path))
    if not layout:  # a killed run goes on where it was, and a finished one is left alone
        whole = path.read_bytes()
        run("extract", arguments=[*ARGUMENTS, *sizes])
        assert path.read_bytes() == whole
