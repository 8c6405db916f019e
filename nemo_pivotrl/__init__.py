"""nemo_pivotrl: PivotRL and LLMdoctor for NVIDIA's NeMo/Megatron stack."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemo_pivotrl.integrations.nemo_aligner.registration import Algorithm

__version__ = "0.1.0"


def register() -> dict[str, Algorithm]:
    """Make both algorithms known to the NeMo and NeMo-Aligner installed here (`integrations/nemo_aligner/registration.py`)."""
    from nemo_pivotrl.integrations.nemo_aligner.registration import register

    return register()
