"""What of the accelerator stacks is installed here. What follows from it is arithmetic: `sizing/precision.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from nemo_pivotrl.core.errors import short
from nemo_pivotrl.sizing.precision import Probe, release


def probe() -> Probe:
    """Look at this machine. Imports torch and, where it is installed, Transformer Engine."""
    import importlib.util

    import torch

    engine, error = None, ""
    if importlib.util.find_spec("transformer_engine") is not None:
        try:
            import transformer_engine
            import transformer_engine.pytorch

            engine = str(transformer_engine.__version__)
        except Exception as raised:  # the bare PyPI package raises RuntimeError, one without cuDNN OSError
            error = short(f"{type(raised).__name__}: {raised}") or type(raised).__name__
    cuda, gpus = torch.version.cuda, torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Probe(
        transformer_engine=engine,
        transformer_engine_error=error,
        cuda=release(cuda) if cuda else None,
        capability=min((torch.cuda.get_device_capability(i) for i in range(gpus)), default=None),
        apex=which_apex(),
    )


def which_apex() -> Literal["none", "nvidia", "other"]:
    """Which `apex` is installed, without importing it: NVIDIA's has fused optimisers, PyPI's is another project."""
    import importlib.util

    found = importlib.util.find_spec("apex")
    if found is None:
        return "none"
    folders = [Path(p) for p in found.submodule_search_locations or ()]
    return "nvidia" if any((folder / "multi_tensor_apply").is_dir() for folder in folders) else "other"
