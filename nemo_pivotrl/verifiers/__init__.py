"""Verifiers: (state's tools, expert action, sampled action) -> Verdict. One file per domain, one dict of names.

A verifier is a pure function of its inputs. What the policy wrote can at worst score 0; a fault of the verifier itself
(a judge that does not answer, say) is a `VerifierFault`: it is retried, then the sample is excluded, never scored 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from nemo_pivotrl.records import Action, InputError, Problem, Verdict, digest


class VerifierFault(RuntimeError):
    """The verifier could not judge. `kind` names the fault for the failure count."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class Verifier(Protocol):
    """What a stage needs of a verifier."""

    name: str
    version: str

    def verify(self, tools: tuple[dict[str, Any], ...], expected: Action, actual: Action) -> Verdict:
        """Judge `actual` against `expected`. Raises VerifierFault when it cannot."""
        ...


def load_verifier(name: str, settings: Mapping[str, Any]) -> Verifier:
    """The verifier called `name` with its recipe settings. Raises InputError for an unknown name or setting."""
    from nemo_pivotrl.verifiers.tool_call import ExactVerifier, ToolCallVerifier

    known: dict[str, type[Verifier]] = {"tool_call": ToolCallVerifier, "exact": ExactVerifier}
    if name not in known:
        raise InputError(Problem("recipe", None, "verifier.name", name, f"use one of {', '.join(known)}"))
    try:
        return known[name](**settings)
    except TypeError as error:
        raise InputError(Problem("recipe", None, "verifier", str(dict(settings)), f"{name}: {error}")) from None


def identity(verifier: Verifier, settings: Mapping[str, Any]) -> str:
    """`name version settings-digest`: what artefact headers carry."""
    return f"{verifier.name} {verifier.version} {digest(dict(settings), 8)}"
