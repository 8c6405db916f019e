"""What the ranks run in test_megatron_memory.py: a training step, with every byte that is alive counted."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from nemo_pivotrl.algorithms import pivotrl
from nemo_pivotrl.algorithms.model_outputs import ModelOutputs
from nemo_pivotrl.backends.base import TokenBatch
from nemo_pivotrl.backends.megatron.parallel import initialize
from nemo_pivotrl.config import LossFn, Megatron, Optimizer, Policy

LOSS = LossFn()


class Alive(TorchDispatchMode):
    """Bytes of all storages that came into being under it and still exist, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, Any] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(t.untyped_storage()) for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        found = function(*args, **(kwargs or {}))
        for tensor in tree_iter(found):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in given and id(storage) not in self.known and storage.nbytes():
                    self._add(storage)
        return found

    def _add(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone(_: Any) -> None:
            del self.known[key]
            self.now -= size

        self.known[key] = weakref.ref(storage, gone)


def step(folder: str, settings: dict[str, Any], prompt: int, response: int, rows: int) -> dict[str, int]:
    """Bytes of this rank: weights, gradient buffer, optimiser state; activations after the last forward pass (0 on a rank
    without the last stage) and at most. Each row is a micro-batch."""
    megatron = Megatron(cpu=True, **settings)
    groups = initialize(megatron, seed=1)
    from nemo_pivotrl.backends.megatron.train import MegatronPolicy

    policy = Policy(model_name=folder, train_micro_batch_tokens=prompt + response, prefix_sharing=False)
    backend = MegatronPolicy(policy, megatron, groups)
    backend.prepare_for_training(Optimizer(lr=1e-4))
    maker = torch.Generator().manual_seed(3)

    def ids(length: int) -> list[int]:
        return torch.randint(1, 100, (length,), generator=maker).tolist()

    batch = TokenBatch([ids(prompt)], [0] * rows, [ids(response) for _ in range(rows)], {})
    batch.data["mask"] = torch.ones(rows, response)
    batch.data["advantages"] = torch.randn(rows, generator=maker)
    alive, held = Alive(), [0]

    def loss(outputs: ModelOutputs, data: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        log_probs = outputs.log_probs
        held.append(alive.now)
        number = float(rows * response)
        return pivotrl.grpo_loss(log_probs, log_probs.detach(), data["advantages"], data["mask"], number, LOSS)

    for watched in (False, True):  # the first step makes what stays
        backend.prepare_for_training_step()
        with alive if watched else nullcontext():
            backend.get_loss_and_metrics(batch, loss)
        backend.finish_training_step()
    parameters = list(backend.stage.parameters())
    buffers = [*backend.model.buffers, *backend.model.expert_parallel_buffers]
    return {
        "parameters": sum(p.numel() for p in parameters),
        "tensors": len(parameters),
        "weights": sum(p.numel() * p.element_size() for p in parameters),
        "gradients": sum(b.grad_data.numel() * b.grad_data.element_size() for b in buffers),
        "optimizer": state_bytes(backend.optimizer),
        "held": max(held),
        "peak": alive.peak,
    }


def kept(**arguments: Any) -> int:
    """How many models are still in memory after a `step` whose objects nobody uses."""
    from nemo_pivotrl.backends.megatron.parallel import leave_layout
    from nemo_pivotrl.backends.megatron.pipeline_stage import PipelineStage

    step(**arguments)
    leave_layout()
    return sum(isinstance(one, PipelineStage) for one in gc.get_objects())


def state_bytes(optimizer: Any) -> int:
    """Bytes of the optimiser's own tensors: moments, and master weights that are no view of the model's."""
    found: dict[int, int] = {}
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(one, "optimizer", one)
        tensors = [t for state in inner.state.values() for t in state.values() if isinstance(t, Tensor) and t.dim()]
        for group in getattr(one, "shard_fp32_from_float16_groups", []):
            tensors += [t for t in group if t is not None]
        for group in getattr(one, "fp32_from_float16_groups", []):
            tensors += list(group)
        found |= {id(t): t.numel() * t.element_size() for t in tensors}
    return sum(found.values())
