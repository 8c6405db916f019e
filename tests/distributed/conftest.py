"""Worker processes for the session."""

import importlib.util
from collections.abc import Iterator

import pytest
import torch
from distributed_harness import Workers


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    """Ranks on this machine's CPUs, over gloo. Skips where megatron-core is not installed."""
    if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
        pytest.skip("megatron-core is not installed: pip install 'nemo-pivotrl[megatron]'")
    if torch.cuda.is_available():
        pytest.skip("these tests run Megatron on CPUs, which it refuses where there is a CUDA device")
    pool = Workers()
    yield pool
    pool.stop()
