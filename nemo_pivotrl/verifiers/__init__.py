"""Verifiers: (case, sampled action) -> Verdict. One file per domain; `load_verifier` gives one by name or import path."""

from nemo_pivotrl.verifiers.base import Verifier, VerifierFault
from nemo_pivotrl.verifiers.loading import load_verifier

__all__ = ["Verifier", "VerifierFault", "load_verifier"]
