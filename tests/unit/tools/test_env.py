"""What `nemo-pivotrl env` says of this machine, and of machines and recipes made up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.recipes import ROOT

from nemo_pivotrl import cli
from nemo_pivotrl.config import Logger, Lora, Megatron, Patient, Policy, Recipe, TrainedModel, Vllm
from nemo_pivotrl.sizing.precision import Probe
from nemo_pivotrl.tools import environment as env
from nemo_pivotrl.tools.environment import (
    MODULES,
    Machine,
    Package,
    as_text,
    find,
    obstacles,
    survey,
    why_not_importable,
)

CPU = Machine("3.11.7", dict.fromkeys(MODULES, Package("1.0")), None, (), Probe())
HOPPER = replace(CPU, gpus=("H100 (9.0)",) * 8, driver="570", probe=Probe("2.8.0", "", (12, 9), (9, 0), "nvidia"))
MEGATRON = Recipe(policy=Policy(backend="megatron"))


def without(machine: Machine, **packages: Package) -> Machine:
    return replace(machine, packages=machine.packages | packages)


def test_the_reference_backend_needs_transformers_alone() -> None:
    assert obstacles(Recipe(), CPU) == []
    (line,) = obstacles(Recipe(), without(CPU, transformers=Package(None)))
    assert line == "transformers is not installed -> pip install 'nemo-pivotrl[reference]'"
    (line,) = obstacles(Recipe(policy=Policy(device="cuda")), CPU)
    assert "no GPU" in line and obstacles(Recipe(policy=Policy(device="cuda")), HOPPER) == []


def test_dashboards_that_are_on_are_needed() -> None:
    bare = without(CPU, tensorboard=Package(None), wandb=Package(None))
    (line,) = obstacles(Recipe(), bare)
    assert (
        line
        == "tensorboard is not installed -> pip install 'nemo-pivotrl[tensorboard]' or set logger.tensorboard=false"
    )
    (line,) = obstacles(Recipe(logger=Logger(tensorboard=False, wandb=True)), bare)
    assert line.startswith("wandb is not installed")


def test_the_doctor_of_llmdoctor_is_looked_at_and_not_the_policy() -> None:
    doctor = TrainedModel(lora=Lora(enabled=True))
    (line,) = obstacles(Recipe(algorithm="llmdoctor", doctor=doctor), without(CPU, peft=Package(None)))
    assert line.startswith("peft is not installed")
    assert obstacles(Recipe(policy=Policy(device="cuda"), algorithm="llmdoctor"), CPU) == []


def test_megatron_needs_gpus_or_cpu_and_a_layout_that_fits() -> None:
    assert obstacles(MEGATRON, HOPPER) == []
    (line,) = obstacles(MEGATRON, CPU)
    assert "set megatron.cpu" in line
    assert obstacles(replace(MEGATRON, megatron=Megatron(cpu=True)), CPU) == []
    large = replace(MEGATRON, megatron=Megatron(tensor_model_parallel_size=8, expert_model_parallel_size=8))
    (line,) = obstacles(large, HOPPER)
    assert "at least 64 GPUs, and here are 8" in line
    broken = without(HOPPER, **{"megatron-core": Package("0.16.1", "RuntimeError: Found empty meta package")})
    (line,) = obstacles(MEGATRON, broken)
    assert "cannot be imported: RuntimeError" in line


def test_a_patient_over_megatron_is_looked_at_where_there_is_one() -> None:
    patient = replace(Recipe(), patient=Patient(backend="megatron"))
    assert obstacles(patient, CPU) == [] and obstacles(replace(patient, algorithm="llmdoctor"), CPU) != []


def test_fp8_is_checked_with_its_reasons() -> None:
    recipe = replace(MEGATRON, megatron=Megatron(fp8="hybrid"))
    assert obstacles(recipe, HOPPER) == []
    reasons = " ".join(obstacles(recipe, CPU))
    assert "Transformer Engine is not installed" in reasons and "CPU build" in reasons


def test_a_model_that_is_not_there_is_an_obstacle_unless_a_stage_makes_it(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("run_dir: runs/mine\npolicy: {model_name: models/none}\n")
    (line,) = survey(tmp_path, CPU)[str(recipe)]
    assert line.startswith("policy.model_name: no model in models/none")
    recipe.write_text("run_dir: runs/mine\npolicy: {model_name: runs/mine/start/policy}\n")
    assert survey(tmp_path, CPU)[str(recipe)] == []


def test_a_recipe_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("polcy: {}\n")
    (tmp_path / "b.yaml").write_text("policy: {model_name: runs/default/start/policy}\n")
    (tmp_path / "c.yaml").write_text("policy: {backend: megatron, model_name: runs/default/start/policy}\n")
    found = survey(tmp_path, CPU)
    assert "polcy" in found[str(tmp_path / "a.yaml")][0] and found[str(tmp_path / "b.yaml")] == []
    assert survey(tmp_path, HOPPER)[str(tmp_path / "c.yaml")] == []
    text = as_text(CPU, found)
    assert f"no   {tmp_path}/a.yaml" in text and f"yes  {tmp_path}/b.yaml" in text


def test_a_package_is_found_by_its_module_and_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name in ("vllm", "apex"):
        (tmp_path / name).mkdir()
    (tmp_path / "vllm/__init__.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    (tmp_path / "apex/__init__.py").write_text("")
    assert find("vllm", {}, True) == Package("", "OSError: libcudart.so.13: cannot open shared object file")
    assert find("vllm", {}, False) == Package("") and find("flash-attn", {}, True) == Package(None)
    assert "another project" in find("apex", {}, True).problem
    assert find("transformers", {"transformers": ["omegaconf"]}, False).note == "from omegaconf"


def test_an_import_that_dies_or_hangs_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "dies.py").write_text("import os\nos.abort()")
    (tmp_path / "hangs.py").write_text("import time\ntime.sleep(60)")
    assert why_not_importable("dies") == "its import was killed by signal 6"
    monkeypatch.setattr(env, "IMPORT_SECONDS", 1)
    assert why_not_importable("hangs") == "its import took longer than 1 s"


def test_a_shared_namespace_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nemo_somewhere").mkdir()
    monkeypatch.setitem(MODULES, "megatron-core", "nemo_somewhere.core")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find("megatron-core", {}, False) == Package(None)


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env", "--json", "--no-imports", str(ROOT / "recipes")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["packages"]) == set(MODULES) and found["packages"]["torch"]["version"]
    assert found["recipes"][str(ROOT / "recipes/pivotrl/tiny.yaml")] == {"runs": True, "obstacles": []}


def test_a_recipe_for_vllm_needs_it_or_servers() -> None:
    machine, sampled = without(CPU, vllm=Package(None)), Policy(sampler="vllm")
    (line,) = obstacles(Recipe(policy=sampled), machine)
    assert line.startswith("vllm is not installed") and "nemo-pivotrl[vllm]" in line
    assert obstacles(Recipe(policy=sampled, vllm=Vllm(servers=("http://127.0.0.1:8000",))), machine) == []
    (line,) = obstacles(Recipe(algorithm="llmdoctor", patient=Patient(backend="vllm")), machine)
    assert line.startswith("vllm is not installed")
