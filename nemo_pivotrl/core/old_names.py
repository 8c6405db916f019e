"""Modules of release 0.1 under their old names: a verifier or script of a user's own that imports them goes on working."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType

MOVED = {
    "records": "core.errors core.types core.atomic core.artifacts",
    "recipe": "config.load",
    "chat": "data.chat_template",
    "responses": "data.gym_rows",
    "readers": "data.readers",
    "preferences": "data.preferences",
    "faces": "llmdoctor.contrastive_prompts",
    "oracles": "llmdoctor.oracles",
    "curtailment": "algorithms.early_stopping",
    "prefix": "algorithms.prefix_tree",
    "world": "demo.service_desk",
    "tiny": "demo.tiny_models",
    "backends.guided": "backends.reference.guided",
    "stages": "pivotrl",
    "stages.extract": "pivotrl.extract",
    "stages.audit": "pivotrl.verifier_audit",
    "stages.profile": "pivotrl.profile",
    "stages.rescore": "pivotrl.rescore",
    "stages.select": "pivotrl.select",
    "stages.export": "pivotrl.export",
    "stages.train": "pivotrl.train",
    "stages.sft": "pivotrl.sft",
    "stages.evaluate": "pivotrl.evaluate",
    "stages.rollout": "components.rollout",
    "stages.preferences": "llmdoctor.preferences",
    "stages.rank": "llmdoctor.rank",
    "stages.reward": "llmdoctor.reward",
    "stages.tfpo": "llmdoctor.train_doctor",
    "stages.decode": "llmdoctor.decode",
    "stages.assess": "llmdoctor.assess",
    "stages.quickstart": "pipeline",
}
"""Old name -> the modules that hold its names now, all below `nemo_pivotrl`."""
PACKAGE = "nemo_pivotrl."


class OldName(Loader):
    """Fills a module with the names of those that replace it."""

    def __init__(self, homes: Sequence[str]):
        self.homes = homes

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        warnings.warn(f"{module.__name__} is now {', '.join(self.homes)}", DeprecationWarning, stacklevel=2)
        for home in self.homes:
            vars(module).update({k: v for k, v in vars(import_module(home)).items() if not k.startswith("__")})


class OldNames(MetaPathFinder):
    """Finds old module names after all other finders have failed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        homes = MOVED.get(fullname.removeprefix(PACKAGE), "") if fullname.startswith(PACKAGE) else ""
        if not homes:
            return None
        loader = OldName([PACKAGE + home for home in homes.split()])
        return spec_from_loader(fullname, loader, is_package=fullname == PACKAGE + "stages")


def install() -> None:
    """Put `OldNames` behind all other finders."""
    if not any(isinstance(finder, OldNames) for finder in sys.meta_path):
        sys.meta_path.append(OldNames())
