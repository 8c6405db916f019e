"""preflight: all problems of a stage in one list, before a model is loaded, and none where there is none."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.recipes import ROOT, SMALL, recipe_at

from nemo_pivotrl import cli
from nemo_pivotrl.backends import loading
from nemo_pivotrl.config import Megatron, Recipe
from nemo_pivotrl.core.artifacts import read_header, read_rows, write_artefact
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.data.states import moved_reference
from nemo_pivotrl.demo.tiny_models import CHAT_TEMPLATE
from nemo_pivotrl.sizing.precision import Probe
from nemo_pivotrl.tools.checks import port_problems, preflight

HOPPER = Probe(transformer_engine="2.3", cuda=(12, 9), capability=(9, 0))
BARE = Probe()


def problems_of(recipe: Recipe, stage: str, world: int = 1, found: Probe = BARE) -> dict[str, Problem]:
    """By field."""
    try:
        preflight(recipe, stage, world, lambda: found)
    except InputError as error:
        assert len(error.problems) == len(set(error.problems))
        return {p.field: p for p in error.problems}
    return {}


def on_megatron(recipe: Recipe, **settings: Any) -> Recipe:
    policy = replace(recipe.policy, backend="megatron")
    return replace(recipe, policy=policy, megatron=Megatron(**{"cpu": True, "bf16": False, **settings}))


@pytest.mark.parametrize("stage", ["profile", "train", "sft"])
def test_nothing_stands_in_the_way_of_a_whole_run(trained: Path, stage: str) -> None:
    recipe = recipe_at(trained)
    problems_of(recipe, stage)  # imports
    begun = time.process_time()
    assert problems_of(recipe, stage) == {}
    assert time.process_time() - begun < 2.0
    assert problems_of(on_megatron(recipe), stage, 2) == {}


@pytest.mark.parametrize("stage", ["reward", "tfpo", "rank", "decode", "assess"])
def test_nor_of_a_steered_one(steered: Path, stage: str) -> None:
    path = ROOT / "recipes/llmdoctor/tiny.yaml"
    prompts = f"decode.prompts={steered}/manners/test.jsonl"
    assert cli.main(["preflight", str(path), stage, f"run_dir={steered}", prompts]) == 0


def test_everything_that_is_wrong_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
    monkeypatch.setattr(loading, "load_sampler", lambda *_: pytest.fail("a model was loaded"))
    arguments = [str(ROOT / "recipes/pivotrl/tiny.yaml"), f"run_dir={tmp_path}", *SMALL, "policy.sampler=vllm"]
    arguments += ["policy.model_name=nowhere", "vllm.servers=[rollouts]", "verifier.settings={no_such: 1}"]
    assert cli.main(["profile", *arguments]) == cli.BAD_INPUT
    said = capsys.readouterr().err
    assert "5 problems" in said
    for part in ("vllm.servers", "run_dir", "0.0 GiB free", "policy.model_name", "candidates.jsonl", "no_such"):
        assert part in said
    assert cli.main(["preflight", *arguments]) == cli.BAD_INPUT
    assert "pivots.jsonl" not in capsys.readouterr().err  # select makes them in time
    assert cli.main(["preflight", *arguments, "train"]) == cli.BAD_INPUT
    assert f"`nemo-pivotrl select {arguments[0]}` makes it" in capsys.readouterr().err
    assert cli.main(["preflight", arguments[0], "trian"]) == cli.BAD_INPUT
    assert "use one of profile, sft, train" in capsys.readouterr().err


def test_a_fresh_recipe_is_told_what_is_not_made_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(ROOT / "recipes/pivotrl/tiny.yaml")
    assert cli.main(["preflight", path, f"run_dir={tmp_path}"]) == 0
    said = capsys.readouterr().out
    for made, stage in (("start/policy", "warmup"), ("candidates.jsonl", "extract"), ("pivots.jsonl", "select")):
        assert f"not made yet: {tmp_path / made}; nemo-pivotrl {stage} {path}" in said
    assert "nothing else stands in the way of profile, train" in said
    assert cli.main(["preflight", path, f"run_dir={tmp_path}", "extract.trajectories=[none.jsonl]"]) == cli.BAD_INPUT
    assert "extract.trajectories: found none.jsonl" in capsys.readouterr().err


def test_a_layout_that_the_ranks_or_the_model_do_not_allow(trained: Path) -> None:
    recipe = on_megatron(recipe_at(trained), tensor_model_parallel_size=3, context_parallel_size=2)
    found = problems_of(recipe, "train", 4)
    assert set(found) == {"megatron.tensor_model_parallel_size"}
    world = problems_of(on_megatron(recipe_at(trained), tensor_model_parallel_size=2), "train", 3)
    assert world["megatron.tensor_model_parallel_size"].found == "3 processes"


def test_fp8_needs_what_the_machine_has_not(trained: Path) -> None:
    recipe = on_megatron(recipe_at(trained), fp8="hybrid", cpu=False, bf16=True)
    assert {"megatron.fp8", "megatron.cpu"} <= set(problems_of(recipe, "profile"))
    cuda = replace(recipe, policy=replace(recipe.policy, backend="reference", device="cuda"))
    assert set(problems_of(cuda, "profile")) == {"policy.device"}


def test_a_context_longer_than_the_models(trained: Path) -> None:
    recipe = on_megatron(recipe_at(trained, "policy.max_total_sequence_length=4096"))
    assert (
        problems_of(recipe, "profile")["policy.max_total_sequence_length"].remedy
        == "the model has positions up to 1024"
    )


def test_lora_on_megatron_stands_in_nobodys_way(trained: Path) -> None:
    recipe = on_megatron(recipe_at(trained, "policy.lora.enabled=true"))
    assert problems_of(recipe, "train") == {} and problems_of(recipe, "profile") == {}


def test_memory_that_this_machines_gpus_do_not_have(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    told = ["policy.train_micro_batch_tokens=1000000", "plan.reserve_gib=1"]
    recipe = on_megatron(recipe_at(trained, *told), cpu=False, bf16=True)
    for gib, fits in ((80, True), (2, False)):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, n=gib: SimpleNamespace(total_memory=n << 30))
        found = problems_of(recipe, "train", found=HOPPER)
        assert found == {} if fits else set(found) == {"memory"}
    assert "on GPUs with 1.0" in found["memory"].found and found["memory"].remedy.startswith("policy.train_micro")


def test_pivots_of_another_template_or_another_kind(trained: Path, tmp_path: Path) -> None:
    template = tmp_path / "other.jinja"
    template.write_text(CHAT_TEMPLATE.replace("tools:", "functions:"))
    found = problems_of(recipe_at(trained, f"policy.chat_template={template}"), "train")
    assert set(found) == {"chat_template"}
    assert set(problems_of(recipe_at(trained, "grpo.pivots=profiles.jsonl"), "train")) == {"stage"}


def test_a_verifier_that_rejects_the_experts(trained: Path) -> None:
    found = problems_of(recipe_at(trained, "verifier.name=terminus"), "profile")
    assert set(found) == {"verifier"} and found["verifier"].found.startswith("16 of the first 16 experts")


def test_turns_that_the_verifier_leaves_out_are_not_its_failures(trained: Path, tmp_path: Path) -> None:
    recipe = recipe_at(trained, "verifier.message=exclude")
    assert problems_of(recipe, "profile") == {}
    source, path = trained / "candidates.jsonl", tmp_path / "candidates.jsonl"
    header = read_header(source, "candidates")
    talk = [row for row in read_rows(source) if not row["calls"]]
    write_artefact(path, replace(header, extra=header.extra | moved_reference(header, source, path)), talk)
    problem = problems_of(replace(recipe, run_dir=str(tmp_path)), "profile")["verifier.message"]
    assert "the expert only talks" in problem.found and "name a judge" in problem.remedy


def test_room_for_checkpoints(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = sum(p.stat().st_size for p in (trained / "start/policy").glob("*.safetensors"))
    usage = namedtuple("usage", "total used free")
    recipe = recipe_at(trained, "checkpointing.keep_top_k=3")
    need = (1 << 28) + weights * (1 + 3 * 5)
    for free, fits in ((need, True), (need - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, n=free: usage(n, 0, n))
        assert (problems_of(recipe, "train") == {}) == fits
    assert problems_of(recipe, "profile") == {}


def test_packages_that_are_not_installed(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "vllm" else real(name, *a))
    recipe = recipe_at(trained, "policy.sampler=vllm")
    found = problems_of(recipe, "train")
    assert found["policy.sampler"].remedy == "pip install 'nemo-pivotrl[vllm]'"
    assert problems_of(replace(recipe, vllm=replace(recipe.vllm, servers=("http://a:1",))), "train") == {}


def test_a_port_that_is_taken() -> None:
    with socket.socket() as held:
        held.bind(("", 0))
        held.listen()
        port = str(held.getsockname()[1])
        (problem,) = port_problems({"MASTER_PORT": port})
        assert problem.field == "MASTER_PORT" and port in problem.found
        assert port_problems({"MASTER_PORT": port, "RANK": "1"}) == []
        assert port_problems({"MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "x"}) == []
    assert port_problems({"MASTER_PORT": port}) == [] and port_problems({}) == []
