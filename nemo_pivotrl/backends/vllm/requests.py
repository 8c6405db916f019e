"""What engines and servers are started with, what they are asked and what they may answer. Imports no vLLM: who asks servers
needs none here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_pivotrl.config import Generation, Policy, Vllm
from nemo_pivotrl.core.errors import InputError, Problem, short
from nemo_pivotrl.core.model_folder import json_object
from nemo_pivotrl.core.types import Sample

GIB = 1 << 30
IMPOSSIBLE = -9000.0
"""vLLM's servers write -9999 where a log-probability is minus infinity: of a token that was drawn or scored that is a fault."""
EXTENSION = "nemo_pivotrl.backends.vllm.refit.Refit"
"""Worker methods of ours, by which weights come in."""
OURS = {
    "model": "policy.model_name",
    "dtype": "policy.dtype",
    "max_model_len": "policy.max_total_sequence_length",
    "logprobs_mode": "nothing: log-probabilities must be those of the sampling distribution",
    "trust_remote_code": "nothing: code in a model's folder is never run",
}
"""Arguments of an engine that follow from other settings."""
LOAD_FORMATS = ("safetensors", "fastsafetensors", "runai_streamer", "runai_streamer_sharded")
"""Ways in which vLLM reads safetensors. Its others unpickle files, or make weights up."""

SEEDS = (1 << 63) - 1
"""vLLM's servers take seeds of 63 bits."""


def engine_arguments(policy: Policy, settings: Vllm) -> dict[str, Any]:
    """Arguments of `vllm.LLM` that follow from a recipe. Raises InputError for settings that contradict each other."""
    problems = []
    for name in sorted(settings.engine_args.keys() & OURS.keys()):
        found, remedy = str(settings.engine_args[name]), f"it follows from {OURS[name]}: remove it"
        problems.append(Problem("recipe", None, f"vllm.engine_args.{name}", found, remedy))
    if (way := settings.engine_args.get("load_format", LOAD_FORMATS[0])) not in LOAD_FORMATS:
        remedy = f"only safetensors are loaded: {', '.join(LOAD_FORMATS)}"
        problems.append(Problem("recipe", None, "vllm.engine_args.load_format", str(way), remedy))
    if policy.dtype == "float64":
        remedy = "vLLM computes in float32 or bfloat16"
        problems.append(Problem("recipe", None, "policy.dtype", policy.dtype, remedy))
    config = json_object(Path(policy.model_name, "config.json"))
    most = config.get("max_position_embeddings") or math.inf
    if policy.max_total_sequence_length > most:
        found, remedy = str(policy.max_total_sequence_length), f"the model reads {most}: lower it"
        problems.append(Problem("recipe", None, "policy.max_total_sequence_length", found, remedy))
    if problems:
        raise InputError(problems)
    on_cpu = not torch.cuda.is_available()
    arguments: dict[str, Any] = {
        "model": policy.model_name,
        "skip_tokenizer_init": True,  # token ids go in and come out
        "dtype": policy.dtype,
        "trust_remote_code": False,
        "load_format": LOAD_FORMATS[0],
        # scoring a sequence makes vLLM sample one token behind it, which is thrown away
        "max_model_len": min(policy.max_total_sequence_length + 1, most),
        "logprobs_mode": "processed_logprobs",
        "enforce_eager": settings.enforce_eager or on_cpu,
        "max_num_seqs": settings.max_num_seqs,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "enable_prefix_caching": True,
        "worker_extension_cls": EXTENSION,
        "generation_config": "vllm",  # the checkpoint's own settings must not cut a distribution that is trained on
        "seed": 0,
        "use_tqdm_on_load": False,
    }
    if on_cpu:
        arguments["kv_cache_memory_bytes"] = int(settings.kv_cache_gib * GIB)
        # a prompt that is read in pieces makes vLLM wind a seeded request's generator back, which a CPU's cannot do
        arguments["enable_chunked_prefill"] = False
        # states of Mamba layers are cached at the ends of such pieces only
        arguments["enable_prefix_caching"] = not any(key.startswith(("mamba", "ssm_")) for key in config)
        arguments["max_num_batched_tokens"] = max(4096, arguments["max_model_len"])
        arguments["block_size"] = 32  # the least: prompts share whole blocks only, and vLLM's own choice here is 128
    else:
        arguments["gpu_memory_utilization"] = settings.gpu_memory_utilization
        arguments["enable_sleep_mode"] = settings.sleep
    return arguments


def request(seed: int, stop_ids: frozenset[int], generation: Generation) -> dict[str, Any]:
    """One turn's sampling settings, in the words that SamplingParams and the servers' completions share.

    Nothing is left to the other side's defaults: a server takes its own from the checkpoint's generation settings.
    """
    return {
        "n": 1,
        "seed": seed & SEEDS,
        "temperature": generation.temperature,
        "top_p": generation.top_p,
        "top_k": 0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "max_tokens": generation.max_new_tokens,
        "min_tokens": 0,
        "stop": [],
        "stop_token_ids": sorted(stop_ids),
        "ignore_eos": True,  # the tokens that end a turn are those in stop_ids, and no others
        "skip_special_tokens": False,
        "logprobs": 0,  # of the sampled token alone
    }


WANTED = {"return_token_ids": True, "return_tokens_as_token_ids": True, "stream": False}
"""What a completion is asked for beside that: token ids, never text."""


def choice_of(answer: Any) -> Any:
    """The one choice of a completion. Raises LookupError, TypeError or ValueError for what is none."""
    (choice,) = answer["choices"]
    return choice


def sample_of(answer: Any, stop_ids: frozenset[int], most: int) -> Sample:
    """The turn in a server's completion. Raises as `choice_of` and `checked`."""
    choice = choice_of(answer)
    ids, listed = choice["token_ids"], choice["logprobs"]
    if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError(f"token_ids {short(ids)}")
    if [f"token_id:{i}" for i in ids] != listed["tokens"]:
        raise ValueError("log-probabilities of other tokens than token_ids")
    return checked(ids, [float(v) for v in listed["token_logprobs"]], choice.get("finish_reason"), stop_ids, most)


def in_order(prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """(prompt, seed) numbers such that prompts which begin alike follow each other, and a prompt's samples stand together.

    States of one trajectory are prefixes of each other: in this order each finds its beginning in the prefix cache.
    """
    by_text = sorted(range(len(prompts)), key=lambda p: (list(prompts[p]), p))
    return [(p, k) for p in by_text for k in range(len(seeds[p]))]


def families(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Of each prompt a number that it shares with those that begin alike: one server should have them all, for its prefix cache."""
    of, last = [0] * len(prompts), -1
    for p in sorted(range(len(prompts)), key=lambda p: (list(prompts[p]), p)):
        of[p] = of[last] if last >= 0 and _alike(prompts[last], prompts[p]) else p
        last = p
    return of


def _alike(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether at least half of the shorter prompt stands in both."""
    half = min(len(one), len(other)) // 2
    return half > 0 and list(one[:half]) == list(other[:half])


def checked(
    token_ids: Sequence[int], log_probs: Sequence[float], finish_reason: str | None, stop_ids: frozenset[int], most: int
) -> Sample:
    """A turn that is exactly an action's span. Raises ValueError saying why it is not one."""
    if finish_reason not in ("stop", "length"):
        raise ValueError(f"finish reason {finish_reason}")
    if len(token_ids) != len(log_probs):
        raise ValueError(f"{len(token_ids)} tokens with {len(log_probs)} log-probabilities")
    if not 0 < len(token_ids) <= most:
        raise ValueError(f"{len(token_ids)} tokens, of 1 to {most}")
    wrong = [value for value in log_probs if not IMPOSSIBLE < value <= 1e-4]
    if wrong:
        raise ValueError(f"log-probability {wrong[0]} of a token that was drawn")
    early = [token for token in token_ids[:-1] if token in stop_ids]
    if early or (finish_reason == "stop") != (token_ids[-1] in stop_ids):
        raise ValueError(f"finish reason {finish_reason}, and the stop tokens are {sorted(stop_ids)}: {token_ids[-4:]}")
    if finish_reason == "length" and len(token_ids) != most:
        raise ValueError(f"{len(token_ids)} tokens and finish reason length, at {most}")
    return Sample(tuple(token_ids), tuple(min(0.0, value) for value in log_probs), finish_reason)  # type: ignore[arg-type]
