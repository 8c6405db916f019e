"""Stand-ins that let NeMo-Aligner 0.7.0 train on a CPU without apex, Transformer Engine, TensorRT-LLM and CUDA.

For these tests only: the package never imports this file. `install` replaces CUDA calls by CPU calls and apex's names by
their plain twins. Nothing here touches what is tested: models, trainers, losses and schedules stay NVIDIA's own.
"""

from __future__ import annotations

import contextlib
import os
import types
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

os.environ.setdefault("NVIDIA_PYTORCH_VERSION", "none")  # NeMo takes it apart without looking whether it is there
os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # Lightning 2.4's checkpoints hold more than tensors
os.environ.setdefault("HF_HUB_OFFLINE", "1")


class OnCpu(TorchFunctionMode):
    """`device="cuda"` and `pin_memory=True` in torch's own calls mean the CPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if "cuda" in str(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if function is torch.device and args and "cuda" in str(args[0]):
            args = ("cpu",)
        return function(*args, **kwargs)


def install() -> None:
    """Replace what is not there. Call it before anything of NeMo is imported, once a process."""
    if torch.cuda.is_available():
        raise RuntimeError("these stand-ins are for machines without a CUDA device")
    _cuda()
    OnCpu().__enter__()
    warnings.filterwarnings("ignore")
    _megatron()
    _nemo()
    _aligner()


def _cuda() -> None:
    """torch.cuda's calls as CPU calls."""
    here = torch.cuda
    here.current_device = lambda: "cpu"
    here.device_count = lambda: 1
    for name in ("set_device", "synchronize", "empty_cache", "manual_seed", "manual_seed_all", "ipc_collect"):
        setattr(here, name, lambda *args, **kwargs: None)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "mem_get_info"):
        setattr(here, name, lambda *args, **kwargs: 0)
    here.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    here.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    for name in ("Long", "Float", "Byte", "Int", "Half", "BFloat16"):
        setattr(here, f"{name}Tensor", getattr(torch, f"{name}Tensor"))
    here.Stream = lambda *args, **kwargs: None
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self


def _megatron() -> None:
    """megatron-core's random states live on the device; dropout is off in these tests, so that none is needed."""
    from megatron.core.tensor_parallel import random

    @contextlib.contextmanager
    def fork(self: Any, name: str = "") -> Iterator[None]:
        yield

    random.CudaRNGStatesTracker.fork = fork
    random.CudaRNGStatesTracker.add = lambda self, name, seed: None
    random._set_cuda_rng_state = lambda *args, **kwargs: None


def _nemo() -> None:
    """apex's and Transformer Engine's names in NeMo 2.1.0."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.layers import set_defaults_if_not_set_tensor_model_parallel_attributes
    from nemo.collections.nlp.models import nlp_model
    from nemo.collections.nlp.models.language_modeling import megatron_gpt_model
    from nemo.collections.nlp.modules.common.megatron import build_model, clip_grads, utils
    from nemo.collections.nlp.parts import nlp_overrides
    from nemo.core.classes import modelPT

    nlp_overrides.HAVE_APEX = True
    nlp_overrides.McoreDistributedOptimizer = type("McoreDistributedOptimizer", (), {})
    nlp_overrides.MegatronDistributedFusedAdam = type("MegatronDistributedFusedAdam", (), {})
    nlp_model.get_megatron_pretrained_bert_models = lambda: []
    megatron_gpt_model.get_specs = lambda name, config=None, *args, **kwargs: get_gpt_layer_local_spec(
        config.num_moe_experts if config else None
    )
    build_model.set_defaults_if_not_set_tensor_model_parallel_attributes = (
        set_defaults_if_not_set_tensor_model_parallel_attributes
    )
    utils.listify_model = lambda model: model if isinstance(model, list) else [model]
    for name in ("MixedFusedRMSNorm", "FusedLayerNorm", "FastLayerNorm"):
        setattr(utils, name, type(name, (torch.nn.Module,), {}))  # only asked for by isinstance
    clip_grads.amp_C = types.SimpleNamespace(multi_tensor_l2norm=None)
    clip_grads.multi_tensor_applier = lambda function, overflow, lists, per_tensor: (
        torch.stack([g.float().norm() for g in lists[0]]).norm(),
        None,
    )
    modelPT.ModelPT.cuda = lambda self, *args, **kwargs: self


def _aligner() -> None:
    """gloo refuses to gather a 0-d tensor, which `rebalance_nd_tensor` does; NCCL does not mind."""
    gather = torch.distributed.all_gather_into_tensor

    def gather_flat(output: torch.Tensor, piece: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return gather(output, piece.reshape(-1) if piece.dim() == 0 else piece, *args, **kwargs)

    torch.distributed.all_gather_into_tensor = gather_flat
