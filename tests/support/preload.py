"""What the fork server has imported before it forks: what takes seconds and is the same for every process."""

import gc
import importlib.util
import os

import datasketch
import jsonschema
import safetensors.torch
import scipy.stats
import torch
import torch.distributed
import torch.utils.tensorboard
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.generation import utils
from transformers.models.llama import modeling_llama

import nemo_pivotrl.cli

__all__ = [
    "AutoConfig", "AutoModelForCausalLM", "AutoTokenizer", "PreTrainedTokenizerFast", "datasketch", "jsonschema", "modeling_llama",
    "nemo_pivotrl", "safetensors", "scipy", "torch", "transformers", "utils",
]  # fmt: skip

if importlib.util.find_spec("megatron") and importlib.util.find_spec("megatron.core"):
    from nemo_pivotrl.backends.megatron import parallel, train  # noqa: F401  in this order

torch.set_num_threads(1)
gc.collect()
gc.freeze()  # collections in the forks pass over what is imported here: three quarters of the work of a small job otherwise
# a fork has one thread; a lock that another of them held would never be released in it
assert len(os.listdir("/proc/self/task")) == 1, "an import of the fork server has started a thread"
