"""Settings that must stand before vLLM is imported, and one engine for all tests that do not change it."""

import os

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["DO_NOT_TRACK"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from vllm_models import llama, saved

from nemo_pivotrl.backends.vllm.engine import Engine
from nemo_pivotrl.config import Generation, Policy, Vllm

SMALL = Vllm(kv_cache_gib=0.06, max_num_seqs=64)


def policy(folder: str, **more: Any) -> Policy:
    settings = {"max_total_sequence_length": 128, "generation": Generation(max_new_tokens=24), **more}
    return Policy(model_name=folder, sampler="vllm", **settings)


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A llama whose head is its embedding."""
    return saved(llama(tied=True), tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="module")  # a mixture of experts cannot be made beside it
def engine(tied: str) -> Iterator[Engine]:
    made = Engine(policy(tied), SMALL)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield
