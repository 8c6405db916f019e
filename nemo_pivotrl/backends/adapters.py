"""Doctors that are LoRA adapters on a base which several of them share: their folders, and their tensors, checked.

A folder with `adapter_config.json` and no `config.json` is an adapter as peft writes it and as `tfpo` exports it with LoRA. What
is not plain LoRA on linear layers is refused by name: half an adapter is another doctor.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_pivotrl.backends.hf_models import not_finite
from nemo_pivotrl.backends.identity import policy_revision
from nemo_pivotrl.config import Doctor
from nemo_pivotrl.core.artifacts import digest
from nemo_pivotrl.core.errors import InputError, Problem, short
from nemo_pivotrl.core.model_folder import AGAIN, json_object, one_screen, regular_file

if TYPE_CHECKING:
    from torch import Tensor, nn

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Sizes that vLLM makes room for; an adapter's rank may not be above the last."""
PREFIX = "base_model.model."
"""What peft writes before the name of a layer."""
MERGE = "merge it into its model (peft: merge_and_unload) and name that folder"
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": ((), [], None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": ([], None),
    "target_parameters": ([], None),
    "trainable_token_indices": ([], {}, None),
}
"""Fields of `adapter_config.json` that decide what is computed, and the values that mean plain LoRA."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter: `scale * B @ A` is added to the weight of each of its layers."""

    folder: str
    scale: float
    pairs: dict[str, tuple[Tensor, Tensor]]
    """By the layer's name in the base: A [r, in] and B [out, r], as they are stored."""


@dataclass(frozen=True, slots=True)
class DoctorFiles:
    """The folders behind a doctor."""

    model: str
    """The whole model, or the base of its adapter."""
    adapter: str = ""
    reference: str = ""
    """What it is divided by; empty: nothing."""

    @property
    def tokenizer(self) -> str:
        """The folder that has the doctor's tokenizer and template: an adapter's own, where one lies beside it."""
        own = self.adapter and (Path(self.adapter) / "tokenizer_config.json").exists()
        return self.adapter if own else self.model

    @property
    def revision(self) -> str:
        """Equal iff the doctor is the same. Raises InputError as `policy_revision` does."""
        if not self.adapter:
            return policy_revision(self.model)
        config = json_object(Path(self.adapter, CONFIG))
        about = {name: config.get(name) for name in ("r", "lora_alpha", "use_rslora")}
        return digest([policy_revision(self.adapter), about, policy_revision(self.model)])


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter and no whole model."""
    return bool(str(folder)) and Path(folder, CONFIG).exists() and not Path(folder, "config.json").exists()


def doctor_files(doctor: Doctor, mode: str, where: str) -> DoctorFiles:
    """The folders of a recipe's doctor. An adapter's reference, where none is named, is its base.

    where: the recipe's field of this doctor. Raises InputError for a base that is not there or is another one than the
    adapter was trained on.
    """
    if not is_adapter(doctor.path):
        if doctor.base:
            remedy = "leave it out: `path` is a whole model"
            raise InputError(Problem("recipe", None, f"{where}.base", doctor.base, remedy))
        return DoctorFiles(doctor.path, "", doctor.reference if mode == "ratio" else "")
    base = _base(doctor, where)
    return DoctorFiles(base, doctor.path, (doctor.reference or base) if mode == "ratio" else "")


def _base(doctor: Doctor, where: str) -> str:
    file = Path(doctor.path, CONFIG)
    named = str(json_object(file).get("base_model_name_or_path") or "")
    here = bool(named) and Path(named, "config.json").exists()
    if not doctor.base:
        if here:
            return named
        remedy = f"it is no folder here: name the base in {where}.base"
        raise InputError(Problem(str(file), None, "base_model_name_or_path", named or "nothing", remedy))
    if not Path(doctor.base, "config.json").exists():
        raise InputError(Problem("recipe", None, f"{where}.base", doctor.base, "give an HF checkpoint folder"))
    if here and policy_revision(named) != policy_revision(doctor.base):
        remedy = f"the adapter was trained on {named}, which has other weights: name that, or leave the field out"
        raise InputError(Problem("recipe", None, f"{where}.base", doctor.base, remedy))
    return doctor.base


def adapter_bytes(folder: str) -> int:
    """Bytes of an adapter's file; 0 where it is not there."""
    path = Path(folder, WEIGHTS)
    return path.stat().st_size if regular_file(path) is None else 0


def read_adapter(folder: str, base: nn.Module) -> Adapter:
    """The adapter in a folder, made for the model `base`.

    Raises InputError with all that is wrong: no or damaged files, what is not plain LoRA, a rank above the largest in `RANKS`,
    layers that the base does not have or has in another shape, halves that are missing, and values that are no numbers.
    """
    settings = json_object(Path(folder, CONFIG))
    rank, scale = _scale(folder, settings)
    halves = _halves(folder)
    problems = _against(folder, settings, rank, halves, base)
    if problems:
        raise InputError(problems)
    names = sorted({name for name, _ in halves})
    return Adapter(folder, scale, {name: (halves[name, "A"], halves[name, "B"]) for name in names})


def _scale(folder: str, settings: Mapping[str, Any]) -> tuple[int, float]:
    """(rank, alpha / rank; rank-stabilised: alpha / sqrt(rank))."""
    file = str(Path(folder, CONFIG))
    problems = [
        Problem(file, None, field, short(json.dumps(settings.get(field))), f"plain LoRA alone is taken: {MERGE}")
        for field, plain in PLAIN.items()
        if settings.get(field) not in plain
    ]
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        problems.append(Problem(file, None, "r", short(json.dumps(rank)), AGAIN))
    elif rank > RANKS[-1]:
        problems.append(Problem(file, None, "r", str(rank), f"ranks up to {RANKS[-1]} are taken: {MERGE}"))
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        problems.append(Problem(file, None, "lora_alpha", short(json.dumps(alpha)), AGAIN))
    if problems:
        raise InputError(problems)
    assert isinstance(rank, int) and isinstance(alpha, (int, float))
    return rank, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _halves(folder: str) -> dict[tuple[str, str], Tensor]:
    """Every tensor of the file, by layer and half (A or B)."""
    from safetensors import safe_open

    path = Path(folder, WEIGHTS)
    if why := regular_file(path):
        there = ", ".join(sorted(p.name for p in path.parent.iterdir() if p.suffix in (".bin", ".pt", ".pth")))
        remedy = "save it as safetensors: pickles run code" if there else AGAIN
        raise InputError(Problem(str(path), None, "adapter", f"{why}{', but ' + there if there else ''}", remedy))
    found: dict[tuple[str, str], Tensor] = {}
    problems = []
    with one_screen(path, "adapter"), safe_open(str(path), "pt") as opened:
        for name in opened.keys():  # noqa: SIM118
            layer, _, rest = name.removeprefix(PREFIX).rpartition(".lora_")
            if not name.startswith(PREFIX) or not layer or rest not in ("A.weight", "B.weight"):
                problems.append(Problem(str(path), None, name, "a tensor", f"plain LoRA has none such: {MERGE}"))
                continue
            found[layer, rest[0]] = tensor = opened.get_tensor(name)
            if not tensor.dtype.is_floating_point:
                problems.append(Problem(str(path), None, name, str(tensor.dtype), MERGE))
            elif what := not_finite(tensor):
                remedy = (
                    "the adapter is damaged or its training diverged: use an earlier checkpoint, or copy the file again"
                )
                problems.append(Problem(str(path), None, name, f"{what} among its values", remedy))
    if problems or not found:
        raise InputError(problems or Problem(str(path), None, "adapter", "no tensors", AGAIN))
    return found


def _against(
    folder: str, settings: Mapping[str, Any], rank: int, halves: Mapping[tuple[str, str], Tensor], base: nn.Module
) -> list[Problem]:
    """How the adapter's tensors differ from what its config and the base's layers ask for."""
    from torch import nn

    file, modules = str(Path(folder, WEIGHTS)), dict(base.named_modules())
    linear = {name for name, module in modules.items() if isinstance(module, nn.Linear)}
    layers = {name for name, _ in halves}
    embedding = base.get_input_embeddings().weight  # type: ignore[operator]
    remedy = "the adapter belongs to another base: name the model it was trained on (`base`, or adapter_config.json)"
    problems = []
    for layer in sorted(layers):
        if layer not in linear:
            found = f"a {type(modules[layer]).__name__}" if layer in modules else "no such layer in the base"
            problems.append(Problem(file, None, layer, found, remedy))
            continue
        weight: Tensor = modules[layer].weight  # type: ignore[assignment]
        if weight is embedding:
            problems.append(Problem(file, None, layer, "a head that is tied to the embedding", MERGE))
        wanted = {"A": (rank, weight.shape[1]), "B": (weight.shape[0], rank)}
        for half, shape in wanted.items():
            name, tensor = f"{layer}.lora_{half}.weight", halves.get((layer, half))
            if tensor is None:
                problems.append(Problem(file, None, name, "nothing", AGAIN))
            elif tuple(tensor.shape) != shape:
                found = f"shape {tuple(tensor.shape)}, and the base and rank {rank} make it {shape}"
                problems.append(Problem(file, None, name, found, remedy))
    listed = settings.get("target_modules")
    if isinstance(listed, list) and not any(settings.get(k) for k in ("layers_to_transform", "exclude_modules")):
        lacking = {n for n in linear - layers for t in listed if n == t or n.endswith(f".{t}")}
        problems += [Problem(file, None, f"{name}.lora_A.weight", "nothing", AGAIN) for name in sorted(lacking)]
    return problems


def merge(model: nn.Module, adapter: Adapter) -> None:
    """Add the adapter to the model's weights, in float32 or wider."""
    import torch

    modules = dict(model.named_modules())
    for name, (a, b) in adapter.pairs.items():
        weight: Tensor = modules[name].weight  # type: ignore[assignment]
        wide = torch.promote_types(weight.dtype, torch.float32)
        delta = adapter.scale * (b.to(weight.device, wide) @ a.to(weight.device, wide))
        weight.data.copy_((weight.to(wide) + delta).to(weight.dtype))


def merged(files: DoctorFiles, base: Any) -> Any:
    """The model of a doctor: a copy of its base with the adapter merged into it, or the whole one that was loaded.

    Raises InputError as `read_adapter`.
    """
    if not files.adapter:
        return base
    adapter, model = read_adapter(files.adapter, base), copy.deepcopy(base)
    merge(model, adapter)
    return model
