"""A recipe's verifier: by name, with its settings checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from nemo_pivotrl import config
from nemo_pivotrl.config.build import build
from nemo_pivotrl.core.artifacts import digest
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.verifiers.base import Bounded, Judging, Verifier

VERIFIERS = {
    "single_step": "nemo_pivotrl.verifiers.single_step:SingleStep",
    "swe": "nemo_pivotrl.verifiers.swe:Swe",
    "terminus": "nemo_pivotrl.verifiers.terminus:Terminus",
    "terminal_multi_harness": "nemo_pivotrl.verifiers.terminal_multi_harness:TerminalMultiHarness",
    "functional": "nemo_pivotrl.verifiers.functional:Functional",
    "judge": "nemo_pivotrl.verifiers.judge:JudgeVerifier",
    "exact": "nemo_pivotrl.verifiers.single_step:Exact",
}


ALIASES = {
    "tool_call": "single_step",
    "single_step_tool_use_with_argument_comparison": "single_step",
    "swe_pivot": "swe",
    "terminus_judge": "terminus",
}
"""Names of NeMo-Gym's servers, and the one name of version 0.1."""


SHARED = {"compat", "limits", "judge"}
"""Fields that a verifier gets from the recipe's sections of the same name, not from its own settings."""


def load_verifier(
    settings: config.Verifier, judge_factory: Callable[[config.Judge], Judging] | None = None, where: str = "recipe"
) -> Bounded:
    """The verifier that `settings` describe. Raises InputError for an unknown name or setting.

    `judge_factory` makes the judge of a verifier that asks one; the default connects to `settings.judge`.
    """
    name = ALIASES.get(settings.name, settings.name)
    if name not in VERIFIERS:
        raise InputError(Problem(where, None, "verifier.name", settings.name, f"use one of {', '.join(VERIFIERS)}"))
    module, _, cls_name = VERIFIERS[name].partition(":")
    try:
        cls = getattr(import_module(module), cls_name)
    except ModuleNotFoundError as error:
        raise InputError(
            Problem(
                "environment",
                None,
                f"verifier {name}",
                f"no module {error.name}",
                "pip install 'nemo-pivotrl[verifiers]'",
            )
        ) from None
    given = {f.name for f in dataclasses.fields(cls)} & SHARED
    misplaced = [
        Problem(where, None, f"verifier.settings.{key}", str(value), f"this is a section of its own: verifier.{key}")
        for key, value in settings.settings.items()
        if key in SHARED
    ]
    if misplaced:
        raise InputError(misplaced)
    shared: dict[str, Any] = {"compat": settings.compat, "limits": settings.limits}
    checked = build(cls, settings.settings, where, "verifier.settings.")
    made = dataclasses.replace(checked, **{k: v for k, v in shared.items() if k in given})
    if "judge" in given and made.asks_judge:
        from nemo_pivotrl.verifiers.judge import connect

        made = dataclasses.replace(made, judge=(judge_factory or connect)(settings.judge))
    return Bounded(made, settings.limits)


def identity(verifier: Verifier, settings: config.Verifier) -> str:
    """`name version digest-of-settings`: what artefact headers carry. How a judge is reached is not part of it."""
    judge = dataclasses.asdict(settings.judge) if verifier.asks_judge else {}
    for transport in ("base_url", "api_key_env", "timeout_s", "max_retries", "backoff_s", "concurrency", "cache"):
        judge.pop(transport, None)
    if judge:
        from nemo_pivotrl.verifiers.judge_prompt import RUBRIC_VERSION

        judge["rubric"] = RUBRIC_VERSION
    decides = [settings.compat, dict(settings.settings), dataclasses.asdict(settings.limits), judge]
    return f"{verifier.name} {verifier.version} {digest(decides, 8)}"


def settings_with(verifier: config.Verifier, values: Mapping[str, Any]) -> config.Verifier:
    """`verifier` with further settings of its own: a row's `config` wins over the command's."""
    return dataclasses.replace(verifier, settings={**verifier.settings, **values})
