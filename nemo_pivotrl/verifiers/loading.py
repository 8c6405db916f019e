"""A recipe's verifier: by name, with its settings checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, cast

from nemo_pivotrl import config
from nemo_pivotrl.config.build import build
from nemo_pivotrl.core.artifacts import digest
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.core.plugins import is_import_path, load_plugin
from nemo_pivotrl.verifiers.base import Bounded, Judging, Verifier, talk_rule_of

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


PARTS = ("name", "version", "concurrency", "asks_judge", "verify")
"""What `Verifier` asks of a class."""


SHARED = {"compat", "limits", "judge", "message"}
"""Fields that a verifier gets from the recipe's sections of the same name, not from its own settings."""


def load_verifier(
    settings: config.Verifier, judge_factory: Callable[[config.Judge], Judging] | None = None, where: str = "recipe"
) -> Bounded:
    """The verifier that `settings` describe: one of VERIFIERS, or `package.module:Class` of the user's own.

    Raises InputError for an unknown name or setting and for a class that lacks a part of `Verifier`.
    `judge_factory` makes the judge of a verifier that asks one; the default connects to `settings.judge`.

    >>> verifier = load_verifier(nemo_pivotrl.config.Verifier(name="exact"))
    >>> verifier.verify(Case(Action("message", "Hello")), Action("message", "Hello")).reward
    1.0
    """
    cls = _class_of(settings.name, where)
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
    asks = "judge" in given and made.asks_judge
    judged_talk = bool(talk_rule_of(cls)) and settings.talk == "judge"
    judge = None
    if asks or judged_talk:
        from nemo_pivotrl.verifiers.judge import connect

        judge = (judge_factory or connect)(settings.judge)
    made = dataclasses.replace(made, judge=judge) if asks else made
    return Bounded(made, settings.limits, settings.talk, judge if judged_talk else None)


def excludes_talk(settings: config.Verifier) -> bool:
    """Whether turns in which the expert talks are left out. Raises InputError for an unknown verifier, whatever it does with talk."""
    return bool(talk_rule_of(_class_of(settings.name, "recipe"))) and settings.talk == "exclude"


def _class_of(named: str, where: str) -> type[Any]:
    """The dataclass of a verifier; its fields are the verifier's settings."""
    name = ALIASES.get(named, named)
    if is_import_path(name):
        found = load_plugin(name, "verifier.name", where)
        if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
            remedy = "give a dataclass whose fields are the verifier's settings"
            raise InputError(Problem(where, None, "verifier.name", name, remedy))
        if missing := [n for n in PARTS if not hasattr(found, n)]:
            remedy = f"add {', '.join(missing)} (nemo_pivotrl.verifiers.Verifier says what they are)"
            raise InputError(Problem(where, None, "verifier.name", name, remedy))
        return found
    if name not in VERIFIERS:
        near = get_close_matches(name, [*VERIFIERS, *ALIASES], n=1)
        hint = f"did you mean {near[0]}? known" if near else "use one of"
        remedy = f"{hint}: {', '.join(VERIFIERS)}, or package.module:Class of your own"
        raise InputError(Problem(where, None, "verifier.name", named, remedy))
    try:
        return cast("type[Any]", load_plugin(VERIFIERS[name], "verifier.name", where))
    except ModuleNotFoundError as error:
        remedy = "pip install 'nemo-pivotrl[verifiers]'"
        raise InputError(Problem("environment", None, f"verifier {name}", f"no module {error.name}", remedy)) from None


def identity(verifier: Verifier, settings: config.Verifier) -> str:
    """`name version digest-of-settings`: what artefact headers carry. How a judge is reached is not part of it."""
    judge = dataclasses.asdict(settings.judge) if verifier.asks_judge else {}
    for transport in (
        "base_url",
        "api_key_env",
        "api_key_host",
        "timeout_s",
        "max_retries",
        "backoff_s",
        "concurrency",
        "cache",
    ):
        judge.pop(transport, None)
    if judge:
        from nemo_pivotrl.verifiers.judge_prompt import RUBRIC_VERSION

        judge["rubric"] = RUBRIC_VERSION
    decides: list[Any] = [settings.compat, dict(settings.settings), dataclasses.asdict(settings.limits), judge]
    if talk_rule_of(_class_of(settings.name, "recipe")):
        decides.append(settings.talk)
    return f"{verifier.name} {verifier.version} {digest(decides, 8)}"


def settings_with(verifier: config.Verifier, values: Mapping[str, Any]) -> config.Verifier:
    """`verifier` with further settings of its own: a row's `config` wins over the command's."""
    return dataclasses.replace(verifier, settings={**verifier.settings, **values})
