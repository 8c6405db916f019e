"""Both algorithms as objects that a launcher can find: entry-point group `nemo_aligner.algorithms`.

NeMo-Aligner itself has no registry. `algorithms()` gives everything of that group, ours and other packages'; naming a class
here imports nothing of NVIDIA's until it is asked for.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from nemo_pivotrl.core.plugins import load_plugin

GROUP = "nemo_aligner.algorithms"
HERE = "nemo_pivotrl.integrations.nemo_aligner"


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """What makes up a NeMo-Aligner algorithm: three classes, a config and the script that joins them.

    The names are `module:object`; the properties import them and raise InputError where NeMo-Aligner is not installed.
    """

    name: str
    """The block `trainer.NAME` and `model.NAME` of its configs."""
    trainer_name: str
    model_name: str
    dataset_builder_name: str
    conf_name: str
    """Hydra finds it by this name from any script: `defaults: [gpt_pivotrl, _self_]`."""
    script_name: str
    """`python -m SCRIPT key=value ...`."""

    @property
    def trainer(self) -> Any:
        """Trainer class; its constructor takes the keywords of NeMo-Aligner's own."""
        return load_plugin(self.trainer_name, "trainer_name")

    @property
    def model(self) -> Any:
        """Megatron model class, built from (`model` block, Lightning trainer)."""
        return load_plugin(self.model_name, "model_name")

    @property
    def dataset_builder(self) -> Any:
        """(cfg=, data_prefix=, data_impl=, splits_string=, ..., tokenizer=) to train, validation and test sets."""
        return load_plugin(self.dataset_builder_name, "dataset_builder_name")

    @property
    def conf(self) -> Path:
        """The complete YAML file."""
        return Path(__file__).parent / "conf" / f"{self.conf_name}.yaml"


PIVOTRL = Algorithm(
    name="pivotrl",
    trainer_name=f"{HERE}.trainer:PivotRLTrainer",
    model_name=f"{HERE}.actor:MegatronGPTPivotRLActorModel",
    dataset_builder_name=f"{HERE}.pivot_data:build_pivot_datasets",
    conf_name="gpt_pivotrl",
    script_name=f"{HERE}.train_gpt_pivotrl",
)
LLMDOCTOR = Algorithm(
    name="llmdoctor",
    trainer_name=f"{HERE}.doctor_trainer:LLMDoctorTrainer",
    model_name=f"{HERE}.doctor_model:MegatronGPTLLMDoctorModel",
    dataset_builder_name=f"{HERE}.doctor_data:build_token_reward_datasets",
    conf_name="gpt_llmdoctor",
    script_name=f"{HERE}.train_gpt_llmdoctor",
)


def algorithms() -> dict[str, Algorithm]:
    """Every algorithm that an installed package registers, by name."""
    return {entry.name: entry.load() for entry in importlib.metadata.entry_points(group=GROUP)}


def register() -> dict[str, Algorithm]:
    """Make both algorithms known to the NeMo that is installed here, and return them by name. May be called twice.

    A `.nemo` file names its class. NeMo from 2.3.3 on instantiates none but those of packages it trusts, so ours is added.
    Without NeMo this raises nothing; an InputError names what is missing as soon as a class is asked for.

    >>> sorted(register())
    ['llmdoctor', 'pivotrl']
    """
    if importlib.util.find_spec("nemo") is not None:
        trust("nemo_pivotrl.")
    return {algorithm.name: algorithm for algorithm in (PIVOTRL, LLMDOCTOR)}


def trust(prefix: str) -> None:
    """Let NeMo instantiate classes whose path begins with `prefix`, where it asks."""
    common = import_module("nemo.core.classes.common")
    prefixes = getattr(common, "ALLOWED_TARGET_PREFIXES", None)
    if prefixes is None or prefix in prefixes:
        return
    if isinstance(prefixes, list):
        prefixes.append(prefix)  # seen by those who imported the list itself
    else:
        common.ALLOWED_TARGET_PREFIXES = type(prefixes)([*prefixes, prefix])
