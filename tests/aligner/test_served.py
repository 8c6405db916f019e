"""Turns from a real vLLM server, in vLLM's own environment, which gets the weights in training after every step."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny_served
import torch
from conftest import Run
from safetensors.torch import load_file
from test_pivotrl_train import series

WANTED = pytest.mark.skipif(
    "VENV_VLLM" not in os.environ, reason="VENV_VLLM names no environment of vLLM: make test-aligner"
)


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
    assert not any(found["error"] for found in run("export", tp * pp * dp, hf_folder=str(hf_folder), **layout))
    found: dict[str, Any] = {}
    for path in sorted((tmp_path / "there").glob("*.safetensors")):
        found |= load_file(path)
    wanted = load_file(hf_folder / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert len(list((tmp_path / "there").glob("*.safetensors"))) == pp
    assert {p.name for p in hf_folder.iterdir()} - {p.name for p in (tmp_path / "there").iterdir()} == {
        "model.safetensors"
    }


def test_a_config_of_another_model_ends_the_export_on_all_ranks(run: Run, hf_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(hf_folder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "intermediate_size": 256, "num_hidden_layers": 3}))
    layout = {"tp": 2, "pp": 1, "dp": 1, "multiple": 128, "rename": False}
    for found in run("export", 2, hf_folder=str(other), **layout):
        assert "decoder.layers.0.mlp.linear_fc1.weight: found 128 of dimension 0" in found["error"]
    assert not (tmp_path / "there").exists()


def test_what_cannot_be_served_is_refused_by_name(run: Run, hf_folder: Path) -> None:
    cases: dict[str, dict[str, Any]] = {
        "model.pivotrl.hf_folder": {"model.pivotrl.hf_folder": ""},
        "model.pivotrl.servers.servers": {"model.pivotrl.servers": {}},
        "min_length": {"model.pivotrl.length_params.min_length": 2},
        "model.peft.peft_scheme": {"model.peft.peft_scheme": "lora"},
        "overlap_param_sync": {"model.optim.overlap_param_sync": True},
        "config.json": {"model.pivotrl.hf_folder": str(hf_folder.parent)},
    }
    (found,) = run("refusals", hf_folder=str(hf_folder), cases=[*cases.values(), {}], without_httpx=False)
    assert [name for name, said in zip(cases, found["said"], strict=False) if name not in said] == []
    assert found["said"][-1] == ""
    (found,) = run("refusals", hf_folder=str(hf_folder), cases=[{}], without_httpx=True)
    assert "httpx" in found["said"][0] and "nemo-pivotrl[aligner]" in found["said"][0]


def test_servers_that_are_not_there_end_the_run_on_all_ranks(run: Run, hf_folder: Path) -> None:
    for found in run("train_served", 2, hf_folder=str(hf_folder), url="http://127.0.0.1:9", dp=2):
        assert "http://127.0.0.1:9" in found["error"] and found["rows"] == []


@WANTED
@pytest.mark.parametrize(("tp", "pp", "dp"), [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)])
def test_a_step_samples_from_the_weights_that_the_last_one_made(
    run: Run, hf_folder: Path, server: tiny_served.Server, tp: int, pp: int, dp: int
) -> None:
    steps = {"trainer.pivotrl.max_steps": 3, "trainer.pivotrl.val_check_interval": 3}
    steps |= {"model.optim": {"name": "sgd", "lr": 0.02, "weight_decay": 0.0}}
    place = {"tp": tp, "pp": pp, "dp": dp}
    ranks = run("train_served", tp * pp * dp, hf_folder=str(hf_folder), url=server.url, **place, **steps)
    for found in ranks:
        assert not found["error"] and found["state"]["step"] == 3
        assert series(found, "train_optim/policy_kl") == [0.0] * 3
        assert series(found, "train_rollouts/failed") == [0.0] * 3 and series(found, "val_rollouts/failed") == [0.0]
        assert min(series(found, "train_optim/grad_norm")) > 0.01
        assert len(found["mismatch"]) == 4 and max(found["mismatch"]) < 1e-5  # before every step and the validation
        # what a server computes is what is trained, and that moves by far more than both differ
        for theirs, own in zip(found["theirs"], found["own"], strict=False):
            assert theirs == pytest.approx(own, abs=1e-5)
        for before, after in pairwise(found["own"]):
            assert max(abs(a - b) for a, b in zip(before, after, strict=True)) > 1e-3
    assert len(ranks[0]["theirs"]) == 4
    assert (ranks[0]["tokens"] == ranks[-1]["tokens"]) == (dp == 1)


@WANTED
def test_servers_that_compute_something_else_end_the_run_on_all_ranks(
    run: Run, hf_folder: Path, server: tiny_served.Server
) -> None:
    """At a tolerance that rounding alone exceeds."""
    strict = {"refit_tolerance": 0.0}
    for found in run("train_served", 2, hf_folder=str(hf_folder), url=server.url, dp=2, servers=strict):
        assert "log-probabilities of the probe" in found["error"] and found["rows"] == []


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
        assert "model.pivotrl.servers.servers" in found["error"] and server.url in found["error"]
        assert found["state"]["step"] == 1
        assert len(series(found, "train_rollouts/rewards")) == 1
        without = [math.isnan(reward) for rewards in found["rewards"] for reward in rewards]
        assert 0 < sum(without) == sum(flag for call in found["lost"] for flag in call)
        lost = [flag for call in found["lost"][-1:] for flag in call]
        assert all(lost)
