"""Rollouts and log-probabilities by vLLM: an engine in this process, or one that is spread over a job's ranks.

Token ids go in and come out; a turn is what stands between the prompt and its stop token, that token included, and text is
never tokenised again. Log-probabilities are those of the distribution a token was drawn from (temperature and top-p
applied), so they can be compared with the trainer's.

Equal seeds give equal turns here too, but not the turns of the other backends: vLLM draws by its own rule.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

# before vLLM is imported, which reads them then: the scheduler runs in this process unless somebody wants it elsewhere
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import torch
import vllm
import vllm.distributed
from torch import Tensor
from vllm.platforms import current_platform
from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

from nemo_pivotrl.backends.hf_models import check_engine_model
from nemo_pivotrl.backends.vllm.requests import checked, engine_arguments, in_order, request
from nemo_pivotrl.config import Generation, Policy, Vllm
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.core.types import FailedSample, Sample


def _meet_without_shared_memory(_: ExecutorWithExternalLauncher) -> tuple[str, int, int]:
    """Address, rank and local rank of an engine in a job's ranks, which have met already.

    On CPUs vLLM names its shared memory by the address's end. That of `env://` is every job's, so what a killed job left would
    stop the next one; ends that differ by rank make vLLM use torch.distributed instead.
    """
    rank = int(os.environ["RANK"])
    return f"env://:{rank}", rank, int(os.environ["LOCAL_RANK"])


if current_platform.is_cpu():
    ExecutorWithExternalLauncher._distributed_args = _meet_without_shared_memory


class Engine:
    """A model inside vLLM: `backends.base.Sampler` and `backends.base.Scorer`, whose weights can be replaced.

    Raises InputError for what vLLM or this machine cannot do with the model.
    """

    def __init__(self, policy: Policy, settings: Vllm, **extra: Any):
        self.settings = settings
        self.in_one_process = settings.tensor_parallel_size == 1 and not extra.get("distributed_executor_backend")
        self.max_tokens = policy.max_total_sequence_length
        # on CPUs vLLM packs weights where no worker finds them again; elsewhere the workers look (`_check_finite`)
        check_engine_model(policy.model_name, "policy.model_name", values=current_platform.is_cpu())
        arguments = {**engine_arguments(policy, settings), **settings.engine_args, **extra}
        if arguments.get("speculative_config") and arguments.get("logits_processors"):
            remedy = "leave it out: vLLM refuses processors beside speculative decoding"
            raise InputError(Problem("recipe", None, "vllm.engine_args.speculative_config", "given", remedy))
        _free()
        guest = torch.distributed.is_initialized() and not _engines
        try:
            self.llm = vllm.LLM(**arguments)
            # kernels are chosen when they are first needed: what this machine has none for is found now
            self.llm.generate(
                [{"prompt_token_ids": [0]}], vllm.SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False
            )
            self._check_finite(policy.model_name)
        except (ValueError, NotImplementedError, RuntimeError) as error:
            remedy = "mend the setting, or let policy.sampler be backend (for a patient: patient.backend reference)"
            found = str(error).strip().splitlines()[0][:300] if str(error).strip() else repr(error)
            if not guest and not _engines:
                vllm.distributed.cleanup_dist_env_and_memory()  # its groups would not fit the next model
            if isinstance(error, InputError):
                raise
            raise InputError(Problem("vLLM", None, policy.model_name, found, remedy)) from error
        self.asleep = False
        _engines.append((weakref.ref(self), self.llm, guest))
        weakref.finalize(self, _free).atexit = False
        atexit.unregister(shut_down)
        atexit.register(shut_down)  # before a trainer that is already there takes its process groups down

    def _check_finite(self, folder: str) -> None:
        """Raise InputError for weights that are no numbers: vLLM samples from NaN without a word."""
        wrong = sorted({tuple(found) for worker in self.llm.collective_rpc("weights_not_finite") for found in worker})
        remedy = "the weights are damaged or training diverged: use an earlier checkpoint, or copy the file again"
        if wrong:
            raise InputError([Problem(folder, None, name, f"{what} among its values", remedy) for name, what in wrong])

    # ---- sampling ----

    def infer(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        stop_ids: frozenset[int],
        generation: Generation,
    ) -> list[list[Sample | FailedSample]]:
        """One sample for every seed of every prompt; see `backends.base.Sampler`. A sample depends on its prompt and seed only, up
        to floating-point noise of what else is decoded with it."""
        order = in_order(prompts, seeds)
        asked = [vllm.SamplingParams(**request(seeds[p][k], stop_ids, generation)) for p, k in order]
        for params in asked:
            params.detokenize = False
        found = self._generate([prompts[p] for p, _ in order], asked)
        out: list[list[Sample | FailedSample]] = [[FailedSample("sampler_lost", "")] * len(own) for own in seeds]
        for (p, k), answer in zip(order, found, strict=True):
            (choice,) = answer.outputs
            ids = list(choice.token_ids)
            logs = [at[token].logprob for at, token in zip(choice.logprobs or (), ids, strict=True)]
            try:
                out[p][k] = checked(ids, logs, choice.finish_reason, stop_ids, generation.max_new_tokens)
            except ValueError as error:
                out[p][k] = FailedSample("sampler_malformed", str(error))
        return out

    def _generate(self, prompts: Sequence[Sequence[int]], params: Sequence[Any]) -> list[Any]:
        with self._awake():
            return list(
                self.llm.generate([{"prompt_token_ids": list(p)} for p in prompts], list(params), use_tqdm=False)
            )

    def log_probs(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Tensor]:
        """For each (prompt ids, response ids): log-probability [T] (nats, at temperature 1) of every response token."""
        if any(not prompt or not response for prompt, response in sequences):
            raise ValueError("a sequence needs at least one prompt token and one response token")
        order = sorted(range(len(sequences)), key=lambda n: (list(sequences[n][0]), n))
        params = [vllm.SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False) for _ in order]
        found = self._generate([[*sequences[n][0], *sequences[n][1]] for n in order], params)
        out = [torch.empty(0)] * len(sequences)
        for n, answer in zip(order, found, strict=True):
            prompt, response = sequences[n]
            at = answer.prompt_logprobs[len(prompt) :]
            out[n] = torch.tensor([place[token].logprob for place, token in zip(at, response, strict=True)])
        return out

    # ---- weights ----

    def refit(self, weights: Iterable[tuple[str, Tensor]] | str) -> list[str]:
        """Replace the weights by HF tensors: given one at a time, or as a folder of safetensors that every worker sees.

        Returns each worker's fingerprint of what it loaded. Everything that was computed from the old weights is dropped.
        """
        if not isinstance(weights, str) and not self.in_one_process:
            raise ValueError("an engine of several processes is refitted from a folder")
        with self._awake():
            found: list[str] = self.llm.collective_rpc("refit", args=(weights,))
            if not self.llm.reset_prefix_cache():
                raise RuntimeError("vLLM did not reset its prefix cache: requests are still running")
        return found

    # ---- memory ----

    @contextlib.contextmanager
    def _awake(self) -> Iterator[None]:
        """Wake the engine, and with `sleep` let it sleep again: its weights wait in host memory and its cache is gone."""
        if self.asleep:
            self.llm.wake_up()
            self.asleep = False
        yield
        if self.settings.sleep:
            self.llm.sleep(level=1)
            self.asleep = True

    def close(self) -> None:
        """Give the engine's memory back, when no other one of this process is in use."""
        del self.llm
        _free()


_engines: list[tuple[weakref.ref[Engine], Any, bool]] = []
"""Every engine of this process with its LLM, until it is freed here and not by Python at a time of its own choice: an LLM takes
vLLM's process groups down with it, and torch's. Last: a guest, made where those groups were another's before."""


def _free() -> None:
    """Free unreferenced engines, if no engine is referenced. Colocated engines stay: their end would destroy the trainer's groups."""
    if any(hasattr(engine(), "llm") or guest for engine, _, guest in _engines):
        return
    shut_down()


def shut_down() -> None:
    """Free all engines. The process groups are gone afterwards, whoever made them."""
    while _engines:
        _engines.pop()[1].llm_engine.engine_core.shutdown()
    gc.collect()
