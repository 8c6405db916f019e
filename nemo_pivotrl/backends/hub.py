"""Models named by their id on the Hugging Face hub: the folder of a copy on this machine, downloaded once."""

from __future__ import annotations

import re
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.errors import InputError, Problem, short
from nemo_pivotrl.core.model_folder import one_screen

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILES = ["*.json", "*.jinja", "*.safetensors", "*.model", "*.tiktoken", "merges.txt", "vocab.txt"]
"""Weights as safetensors, config and tokenizer. A pickle or Python code is not even downloaded."""


PLACES = frozenset("models model runs run checkpoints ckpts data out output outputs results weights tmp".split())
"""Names of folders on people's disks: a path below one is a path that is not there, and no id."""


def is_hub_id(name: str) -> bool:
    """Whether `name` reads as `owner/model` and is no path: neither it nor the folder above it is here."""
    owner = Path(name).parent
    return bool(HUB_ID.fullmatch(name)) and not owner.exists() and str(owner).lower() not in PLACES


def id_of_snapshot(folder: str) -> str:
    """The hub id of a folder in the hub's cache, or the id itself; '' for another folder."""
    cached = re.search(r"models--([^/]+?)--([^/]+)/snapshots/", folder)
    return f"{cached[1]}/{cached[2]}" if cached else folder if is_hub_id(folder) else ""


def remedy_for(name: str) -> str:
    """How to have a model of the hub as a folder."""
    folder = f"models/{name.rpartition('/')[2]}"
    return f"where there is a network: `hf download {name} --local-dir {folder}`, then name {folder} here"


def near_names(name: str) -> str:
    """Folders beside the one that is not here whose names are like its own, as a question; '' where there is none."""
    above = Path(name).parent
    there = sorted(p.name for p in above.iterdir() if p.is_dir()) if above.is_dir() else []
    near = get_close_matches(Path(name).name, there, 2, 0.7)
    return f"did you mean {' or '.join(str(above / n) for n in near)}? " if near else ""


def local_copy(name: str, field: str, fetch: bool) -> str:
    """The folder of a model's snapshot in the hub's cache; with `fetch` it is downloaded where it is not there. A path stays.

    Raises InputError where it can be had neither way.
    """
    if not is_hub_id(name):
        return name
    with one_screen("environment", field, "pip install 'nemo-pivotrl[reference]'"):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError
    try:
        return snapshot_download(name, local_files_only=True, allow_patterns=FILES)
    except LocalEntryNotFoundError:
        if not fetch:
            return name
    print(f"{field}: {name} is no folder here: downloading it from the Hugging Face hub", flush=True)
    try:
        return snapshot_download(name, allow_patterns=FILES)
    except Exception as error:  # its client raises whatever its transport does
        found = f"{name}, no folder here, and the hub did not give it: {short(f'{type(error).__name__}: {error}')}"
        raise InputError(Problem("recipe", None, field, found, remedy_for(name))) from None


def with_local_models(recipe: Recipe, fetch: bool) -> Recipe:
    """The recipe with folders in the place of hub ids: of the algorithm's models, and of the policies that `evaluate` compares."""
    if recipe.algorithm == "llmdoctor":
        patient = replace(recipe.patient, model_name=local_copy(recipe.patient.model_name, "patient.model_name", fetch))
        doctor = replace(recipe.doctor, model_name=local_copy(recipe.doctor.model_name, "doctor.model_name", fetch))
        return replace(recipe, patient=patient, doctor=doctor)
    policy = replace(recipe.policy, model_name=local_copy(recipe.policy.model_name, "policy.model_name", fetch))
    policies = {
        label: local_copy(name, f"evaluate.policies.{label}", fetch) for label, name in recipe.evaluate.policies.items()
    }
    return replace(recipe, policy=policy, evaluate=replace(recipe.evaluate, policies=policies))
