"""An engine inside the processes of a training job."""

from __future__ import annotations

import sys
from dataclasses import replace

from nemo_pivotrl.backends.base import Sampler, extra_of
from nemo_pivotrl.config.models import Policy, Vllm


def load_colocated(policy: Policy, vllm: Vllm, ranks: int) -> Sampler:
    """One engine over all ranks of a job, in whose processes it runs; every rank calls this and its verbs together."""
    with extra_of("vllm.colocated", "vllm"):
        from nemo_pivotrl.backends.vllm.engine import Engine
    if ranks == 1:
        return Engine(policy, vllm)
    return Engine(policy, replace(vllm, tensor_parallel_size=ranks), distributed_executor_backend="external_launcher")


def shut_down_engines() -> None:
    """End vLLM's engines in this process, if there are any."""
    if "nemo_pivotrl.backends.vllm.engine" in sys.modules:
        sys.modules["nemo_pivotrl.backends.vllm.engine"].shut_down()
