"""What makes two models the same to an artefact: their weights, and the settings that change what they compute."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nemo_pivotrl.config.models import Megatron, TrainedModel
from nemo_pivotrl.core.artifacts import digest
from nemo_pivotrl.core.atomic import SUMS, compare_sums, file_sums, read_sums
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.core.known_sums import known_sum
from nemo_pivotrl.core.model_folder import AGAIN, regular_file


def without_start(megatron: Megatron) -> Megatron:
    """The section for a model that is not the start policy: `megatron.load` holds the start policy's weights alone."""
    return replace(megatron, load="")


def identity_of(model: TrainedModel, megatron: Megatron) -> dict[str, Any]:
    """Settings of the `megatron` section that change what a model computes beyond rounding; its layout does not."""
    if model.backend != "megatron":
        return {}
    layout = (
        "_parallel",
        "use_distributed",
        "dispatcher",
        "grouped",
        "recompute",
        "chunk",
        "grad_reduce",
        "cpu",
        "timeout",
    )
    return {name: value for name, value in asdict(megatron).items() if not any(part in name for part in layout)}


def policy_revision(folder: str | Path) -> str:
    """Digest of a checkpoint's weights and config: equal iff the policy is the same.

    Raises InputError for a folder without weights, and for one that is not what its `SHA256SUMS` says, where it has such a file.
    """
    there = sorted(Path(folder).iterdir()) if Path(folder).is_dir() else []
    files = [p for p in there if p.suffix == ".safetensors" or p.name == "config.json"]
    if not any(p.suffix == ".safetensors" for p in files):
        raise InputError(Problem(str(folder), None, "weights", "no .safetensors file", "give an HF checkpoint folder"))
    if odd := [Problem(str(p), None, "file", why, AGAIN) for p in files if (why := regular_file(p))]:
        raise InputError(odd)
    wanted = read_sums(Path(folder))
    if bare := [p for p in files if wanted and p.name not in wanted]:
        raise InputError([Problem(str(p), None, "file", f"no line in {SUMS}", AGAIN) for p in bare])
    more = [path for name in wanted if (path := Path(folder, name)) not in files and path.is_file()]
    paths = [*files, *more]
    found = {str(p.relative_to(folder)): total for p, total in zip(paths, file_sums(paths, known_sum), strict=True)}
    compare_sums(Path(folder), wanted, found, f"{AGAIN}; if you changed it: remove {SUMS}")
    return digest([[p.name, found[p.name][:16]] for p in files])
