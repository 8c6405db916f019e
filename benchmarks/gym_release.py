"""NeMo-Gym's own pivot verifiers, taken from the public wheels, beside ours in one process.

Nothing of theirs is copied or stubbed: the servers' modules, request models and `nemo_gym` itself are imported as released.
Three releases fit into one process because each is imported from its own folder and then forgotten by `sys.modules`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

from omegaconf import OmegaConf

BUILD = Path(__file__).resolve().parents[1] / "build" / "conformance"
SERVERS = {  # our name -> (folder under resources_servers, prefix of the server's classes)
    "single_step": ("single_step_tool_use_with_argument_comparison", "SingleStepToolUseArgumentComparison"),
    "swe": ("swe_pivot", "SwePivot"),
    "terminus": ("terminus_judge", "TerminusJudge"),
    "terminal_multi_harness": ("terminal_multi_harness", "TerminalMultiHarness"),
}
PREFIXES = ("nemo_gym/", *(f"resources_servers/{folder}/" for folder, _ in SERVERS.values()))
FIGURES = {"similarity": "similarity_score", "target_match": "target_match", "diff_penalty": "diff_size_penalty"}
"""Our names of what their responses carry besides reward and category."""


def fetch(release: str) -> Path:
    """The folder with a release's verifiers; downloads the wheel and unzips what is needed where it is not there yet."""
    folder = BUILD / f"nemo-gym-{release}"
    if folder.exists():
        return folder
    wheels = BUILD / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    wheel = wheels / f"nemo_gym-{release}-py3-none-any.whl"
    if not wheel.exists():
        command = "pip download -q --no-deps --python-version 3.13.14 --only-binary=:all:".split()
        subprocess.run([sys.executable, "-m", *command, "-d", str(wheels), f"nemo-gym=={release}"], check=True)
    part = folder.with_name(folder.name + ".part")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(part, [name for name in archive.namelist() if name.startswith(PREFIXES)])
    part.rename(folder)
    return folder


@contextmanager
def _imported_from(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in [m for m in sys.modules if m.partition(".")[0] in ("nemo_gym", "resources_servers")]:
            del sys.modules[name]
        OmegaConf.clear_resolvers()  # each release registers its own, under the same names


@dataclass(frozen=True)
class Outcome:
    """What a verifier made of a row."""

    kind: str
    """`verdict`; `raises`: an exception, an HTTP 500 when served; `refused`: no valid request; `fault`: ours, the row's."""
    reward: float | None = None
    category: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)
    detail: str = ""


@dataclass(frozen=True)
class Release:
    """One release's four servers."""

    version: str
    folder: Path

    @cached_property
    def apps(self) -> dict[str, Any]:
        """The servers' `app` modules by family, and `client`: the class of what a server calls other servers with."""
        with _imported_from(self.folder):
            apps = {name: import_module(f"resources_servers.{folder}.app") for name, (folder, _) in SERVERS.items()}
            apps["client"] = import_module("nemo_gym.server_utils").ServerClient
        logging.disable(logging.CRITICAL)  # every exception of theirs is logged; here they are counted
        return apps

    @cached_property
    def _made(self) -> dict[str, Any]:
        return {}

    def categories(self, family: str) -> list[str]:
        """Every category or failure code that the family declares."""
        app = self.apps[family]
        declared = getattr(app, "StepRewardCategory", None)
        return [c.name for c in declared] if declared else [c.value for c in app.FailureCode]

    def server(self, family: str, config: Mapping[str, Any]) -> Any:
        """The family's server under a config, as its own tests make it."""
        key = family + json.dumps(config, sort_keys=True)
        if key not in self._made:
            app, prefix = self.apps[family], SERVERS[family][1]
            flat = family in ("swe", "terminus")
            own = dict(config) if flat else {"tool_call_comparator_config": dict(config)}
            if family == "terminus":
                own["enable_llm_judge"] = False
            settings = getattr(app, f"{prefix}ResourcesServerConfig")(
                host="127.0.0.1", port=1, entrypoint="", name=family, **own
            )
            client = MagicMock(spec=self.apps["client"])
            self._made[key] = getattr(app, f"{prefix}ResourcesServer")(config=settings, server_client=client)
        return self._made[key]

    def request(self, family: str, row: Mapping[str, Any]) -> Any:
        """The row as the family's `/verify` request. Raises pydantic's ValidationError."""
        return getattr(self.apps[family], f"{SERVERS[family][1]}VerifyRequest").model_validate(row)

    def verify(self, family: str, config: Mapping[str, Any], row: Mapping[str, Any], runner: asyncio.Runner) -> Outcome:
        """What the family's own `verify` answers."""
        try:
            request = self.request(family, row)
        except (ValueError, RecursionError) as error:
            return Outcome("refused", detail=str(error)[:300])
        server = self.server(family, config)
        try:
            response = runner.run(server.verify(request))
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # pyo3's is no Exception
                raise
            return Outcome("raises", category=type(error).__name__, detail=str(error)[:300])
        category = response.failure_reason.value if family in ("swe", "terminus") else response.category.name
        figures = {ours: getattr(response, theirs, None) for ours, theirs in FIGURES.items()}
        return Outcome("verdict", float(response.reward), category, figures)
