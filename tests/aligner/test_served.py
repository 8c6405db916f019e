"""Turns from a real vLLM server, in vLLM's own environment, which gets the weights in training after every step."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_served
import torch
from conftest import Run
from safetensors.torch import load_file
from test_pivotrl_train import series

WANTED = pytest.mark.skipif("VENV_VLLM" not in os.environ, reason="VENV_VLLM names no environment of vLLM: make test-aligner")


@pytest.fixture(scope="module")
def hf_folder(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "start"
    tiny_served.write_folder(folder, inputs / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def server(hf_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tiny_served.Server]:
    python = str(Path(os.environ["VENV_VLLM"]) / "bin/python")
    made = tiny_served.Server(python, tmp_path_factory.mktemp("server"), hf_folder)
    try:
        made.wait()
        yield made
    finally:
        made.kill()


@pytest.mark.parametrize(
    ("tp", "pp", "dp", "multiple", "rename"),
    [(1, 1, 1, 128, False), (2, 1, 1, 512, False), (1, 2, 1, 128, True), (1, 1, 2, 512, False)],
)
def test_an_export_is_what_the_model_was_loaded_from(
    run: Run, hf_folder: Path, tmp_path: Path, tp: int, pp: int, dp: int, multiple: int, rename: bool
) -> None:
    layout = {"tp": tp, "pp": pp, "dp": dp, "multiple": multiple, "rename": rename}
    run("export", tp * pp * dp, hf_folder=str(hf_folder), **layout)
    found: dict[str, Any] = {}
    for path in sorted((tmp_path / "there").glob("*.safetensors")):
        found |= load_file(path)
    wanted = load_file(hf_folder / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert len(list((tmp_path / "there").glob("*.safetensors"))) == pp
    assert {p.name for p in hf_folder.iterdir()} - {p.name for p in (tmp_path / "there").iterdir()} == {"model.safetensors"}


@WANTED
@pytest.mark.parametrize(("tp", "dp"), [(1, 1), (2, 1), (1, 2)])
def test_a_step_samples_from_the_weights_that_the_last_one_made(
    run: Run, hf_folder: Path, server: tiny_served.Server, tp: int, dp: int
) -> None:
    steps = {"trainer.pivotrl.max_steps": 3}
    ranks = run("train_served", tp * dp, hf_folder=str(hf_folder), url=server.url, tp=tp, dp=dp, **steps)
    for found in ranks:
        assert not found["error"] and found["state"]["step"] == 3
        assert series(found, "train_optim/policy_kl") == [0.0] * 3
        assert series(found, "train_rollouts/failed") == [0.0] * 3
        assert min(series(found, "train_optim/grad_norm")) > 0.01
        assert max(found["mismatch"]) < 1e-5 and len(found["own"]) == 3
        for theirs, own in zip(found["theirs"], found["own"], strict=False):
            assert theirs == pytest.approx(own, abs=1e-5)
        # the weights have moved by far more than both sides differ
        assert max(abs(a - b) for a, b in zip(found["own"][0], found["own"][1], strict=True)) > 1e-3
    assert (ranks[0]["tokens"] == ranks[-1]["tokens"]) == (dp == 1)
    assert len({str(rows) for rows in ranks[0]["tokens"]}) == len(ranks[0]["tokens"])  # every turn has its own seed


@WANTED
def test_a_lost_turn_is_left_out_and_counted(run: Run, hf_folder: Path, server: tiny_served.Server) -> None:
    settings = {"trainer.pivotrl.max_failure_share": 0.6, "model.pivotrl.rollout_micro_batch_size": 2}
    (found,) = run("train_served", hf_folder=str(hf_folder), url=server.url, lose=True, **settings)
    assert not found["error"]
    assert series(found, "train_rollouts/failed") == [8.0] * 2  # of 16: each call's first of two
    for step, lost in enumerate((found["lost"][:8], found["lost"][8:])):
        assert lost == [[True, False]] * 8
        rewards = found["rewards"][step]
        kept = [value for value in rewards if not math.isnan(value)]
        assert len(kept) == 8
        assert series(found, "train_rollouts/rewards")[step] == pytest.approx(sum(kept) / 8)
    settings["trainer.pivotrl.max_failure_share"] = 0.1
    (found,) = run("train_served", hf_folder=str(hf_folder), url=server.url, lose=True, **settings)
    assert "the servers lost 8 of them" in found["error"] and not series(found, "train_optim/loss")


@WANTED
@pytest.mark.parametrize("dp", [2])
def test_a_server_that_dies_ends_the_run_on_all_ranks_with_no_reward(
    run: Run, hf_folder: Path, server: tiny_served.Server, dp: int
) -> None:
    impatient = {"max_retries": 1, "timeout_s": 3.0, "backoff_s": 0.05}
    arguments = {"url": server.url, "kill": server.process.pid, "servers": impatient}
    for found in run("train_served", dp, hf_folder=str(hf_folder), dp=dp, **arguments):
        assert "servers" in found["error"] and server.url in found["error"]
        assert found["state"]["step"] == 1
        assert len(series(found, "train_rollouts/rewards")) == 1 and len(found["rewards"]) == 1
        lost = [flag for call in found["lost"][-1:] for flag in call]
        assert all(lost)
