"""An environment in which Slurm's programs are `slurm_stub.py`."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from support.recipes import ROOT

SCRIPTS = ROOT / "deploy/slurm"


def environment(folder: Path, **settings: str) -> dict[str, str]:
    """One in which Slurm's programs are the stub."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    for name in ("sbatch", "srun", "scontrol"):
        path = programs / name
        path.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/support/slurm_stub.py {name} "$@"\n')
        path.chmod(0o755)
    told = re.findall(r"^(\w+)=", (SCRIPTS / "cluster.env").read_text(), flags=re.MULTILINE)
    base = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_") and key not in told}
    return base | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "STUB_DIR": str(folder),
        "COMMAND_PREFIX": f"{sys.executable} -m nemo_pivotrl.cli",
        "EXP_NAME": "test",
        "CONFIG_PATH": str(ROOT / "recipes/pivotrl/tiny.yaml"),
        "SLURM_PARTITION": "batch",
        "GPUS_PER_NODE": "8",
        "NO_GRES": "1",
        **settings,
    }
