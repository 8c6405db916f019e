"""The step `rl/pivotrl` of NVIDIA-NeMo/Nemotron's pipeline: its config files are recipes with a `run` section beside.

`${manifest:FOLDER,KEY}` is an entry of FOLDER/manifest.json, which Nemotron's data preparation and `export nemotron` write;
`${art:NAME,FIELD}` is resolved by Nemotron's own code, where that is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from nemo_pivotrl.cli import guarded, leave_together, run_stage
from nemo_pivotrl.config.load import load_recipe
from nemo_pivotrl.core.errors import InputError, Problem


def main(default: Path, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the step with `--config FILE` (or `default`) and `key=value` overrides, and end the process."""
    parser = argparse.ArgumentParser(
        description="PivotRL: trajectories and a policy in, pivots and a better policy out."
    )
    parser.add_argument("--config", default=str(default), metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)

    def run() -> int:
        register_resolvers(options.config)
        return run_stage("nemotron", load_recipe(options.config, options.overrides, beside=("run",)), fresh=False)

    leave_together(guarded("nemotron", run))


def register_resolvers(config: str) -> None:
    """Make `${manifest:...}` and, where Nemotron is installed, `${art:...}` known to OmegaConf."""
    from nemo_pivotrl.config.nemo_aligner import register_resolver

    if importlib.util.find_spec("nemo_runspec") is not None:
        import_module("nemo_runspec.config.resolvers").register_resolvers_from_config(config)
    register_resolver("manifest", manifest_entry)


def manifest_entry(folder: str, key: str) -> str:
    """The path that FOLDER/manifest.json has under `key`; a relative one is from FOLDER on.

    Raises InputError for a folder or a key that is not there.
    """
    path = Path(folder) / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(Problem(str(path), None, "manifest", "no such file", "run data preparation first")) from None
    if not manifest.get(key):
        raise InputError(Problem(str(path), None, key, "missing or empty", f"it has {', '.join(sorted(manifest))}"))
    return str(path.parent / str(manifest[key]))


if __name__ == "__main__":
    sys.exit("run step.py of the step, or nemo-pivotrl nemotron RECIPE")
