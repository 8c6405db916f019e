"""The Python of packages whose compiled parts need CUDA: unpacked by `make trace-sources`, never installed."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from nemo_pivotrl.core.errors import InputError, Problem

VARIABLE = "NEMO_PIVOTRL_TRACE_SOURCES"
FOLDER = ".trace"
"""In the checkout, where the variable does not name another."""
PACKAGES = ("transformer_engine", "mamba_ssm", "causal_conv1d")


def find() -> Path:
    """The folder of the sources. Raises InputError where it or a package is not there, or where a package is installed for
    real: what is installed would be half replaced."""
    folder = Path(os.environ.get(VARIABLE) or FOLDER).resolve()
    absent = [name for name in PACKAGES if not (folder / name / "__init__.py").exists()]
    if absent:
        remedy = f"`make trace-sources` in a checkout unpacks them (3 MB); or name their folder in {VARIABLE}"
        raise InputError(Problem(str(folder), None, "packages", f"without {', '.join(absent)}", remedy))
    there = [name for name in PACKAGES if name not in sys.modules and importlib.util.find_spec(name) is not None]
    if there:
        remedy = "trace in an environment without it: the compiled parts of what is installed would be replaced"
        raise InputError(Problem("environment", None, "packages", f"{', '.join(there)} installed", remedy))
    return folder


def versions(folder: Path) -> dict[str, str]:
    """Version of each package, as its own files say."""
    found = {}
    for info in folder.glob("transformer_engine-*.dist-info"):
        found["transformer_engine"] = info.name.removesuffix(".dist-info").partition("-")[2]
    for name in ("mamba_ssm", "causal_conv1d"):
        for line in (folder / name / "__init__.py").read_text(encoding="utf-8").splitlines():
            if line.startswith("__version__"):
                found[name] = line.split("=")[1].strip(" \"'")
    if missing := [name for name in PACKAGES if name not in found]:
        raise InputError(
            Problem(str(folder), None, "packages", f"no version of {', '.join(missing)}", "`make trace-sources` again")
        )
    return found
