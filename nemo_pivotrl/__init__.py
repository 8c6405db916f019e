"""nemo_pivotrl: PivotRL and LLMdoctor for NVIDIA's NeMo/Megatron stack.

The names below are the public API. Each is imported when it is first asked for, so that `import nemo_pivotrl` needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nemo_pivotrl.core import old_names

if TYPE_CHECKING:
    from nemo_pivotrl.algorithms.llmdoctor import mix_logits, tfpo_loss, token_rewards
    from nemo_pivotrl.algorithms.pivotrl import group_advantages, grpo_loss
    from nemo_pivotrl.algorithms.selection import keep_pivot
    from nemo_pivotrl.backends.doctors import GuidedLogitsProcessor
    from nemo_pivotrl.backends.reference.guided import GuidedGenerator
    from nemo_pivotrl.config import Recipe
    from nemo_pivotrl.config.load import load_recipe
    from nemo_pivotrl.core.errors import InputError, Problem
    from nemo_pivotrl.core.types import Candidate, Verdict
    from nemo_pivotrl.integrations.nemo_aligner.registration import register
    from nemo_pivotrl.llmdoctor.assess import assess
    from nemo_pivotrl.llmdoctor.decode import decode
    from nemo_pivotrl.llmdoctor.reward import build_rewards
    from nemo_pivotrl.llmdoctor.train_doctor import train_doctor
    from nemo_pivotrl.pipeline import run
    from nemo_pivotrl.pivotrl.evaluate import evaluate
    from nemo_pivotrl.pivotrl.extract import extract
    from nemo_pivotrl.pivotrl.profile import profile
    from nemo_pivotrl.pivotrl.select import select_pivots
    from nemo_pivotrl.pivotrl.train import train
    from nemo_pivotrl.verifiers import Verifier, load_verifier

__version__ = "0.1.0"

__all__ = [
    "Candidate",
    "GuidedGenerator",
    "GuidedLogitsProcessor",
    "InputError",
    "Problem",
    "Recipe",
    "Verdict",
    "Verifier",
    "assess",
    "build_rewards",
    "decode",
    "evaluate",
    "extract",
    "group_advantages",
    "grpo_loss",
    "keep_pivot",
    "load_recipe",
    "load_verifier",
    "mix_logits",
    "profile",
    "register",
    "run",
    "select_pivots",
    "tfpo_loss",
    "token_rewards",
    "train",
    "train_doctor",
]

_HOMES = {
    "algorithms.llmdoctor": "mix_logits tfpo_loss token_rewards",
    "algorithms.pivotrl": "group_advantages grpo_loss",
    "algorithms.selection": "keep_pivot",
    "backends.doctors": "GuidedLogitsProcessor",
    "backends.reference.guided": "GuidedGenerator",
    "config": "Recipe",
    "config.load": "load_recipe",
    "core.errors": "InputError Problem",
    "core.types": "Candidate Verdict",
    "integrations.nemo_aligner.registration": "register",
    "llmdoctor.assess": "assess",
    "llmdoctor.decode": "decode",
    "llmdoctor.reward": "build_rewards",
    "llmdoctor.train_doctor": "train_doctor",
    "pipeline": "run",
    "pivotrl.evaluate": "evaluate",
    "pivotrl.extract": "extract",
    "pivotrl.profile": "profile",
    "pivotrl.select": "select_pivots",
    "pivotrl.train": "train",
    "verifiers": "Verifier load_verifier",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}

old_names.install()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return [*globals(), *(name for name in __all__ if name not in globals())]
