"""What the ranks run in test_megatron_lora.py, and peft's answers to the same questions on one device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from train_jobs import OPTIMIZER, Losses, bend, grpo_batch, megatron_of, pair_batch, policy_of

from nemo_pivotrl.config import Generation, Lora, Policy
from nemo_pivotrl.sizing.architecture import read_architecture

RANK = 3


def settings_of(folder: str, kind: str, modules: list[str], share: bool, budget: int = 80) -> Policy:
    lora = Lora(enabled=True, r=RANK, alpha=7, target_modules=tuple(modules))
    made = replace(policy_of(folder, budget), lora=lora, prefix_sharing=share)
    return replace(made, generation=Generation(temperature=1.0)) if kind == "tfpo" else made


def value_of(name: str, shape: Any) -> Tensor:
    """What B is, so that adapters say something: the same for a layer whoever asks."""
    generator = torch.Generator().manual_seed(sum(name.encode()) + 7)
    return 0.1 * torch.randn(*shape, generator=generator)


def layer(name: str) -> str:
    """`model.layers.0.self_attn.q_proj.lora_B`, from peft's name of a matrix."""
    return name.removeprefix("base_model.model.").removesuffix(".default.weight").removesuffix(".weight")


def reference(folder: str, kind: str, modules: list[str], start: dict[str, Tensor]) -> dict[str, Any]:
    """Metrics, gradients and a step's outcome by peft. start: A by layer."""
    from nemo_pivotrl.backends.reference.policy import ReferencePolicy

    backend = ReferencePolicy(settings_of(folder, kind, modules, False, 10**6), kind == "tfpo", reference=True)
    trained = {layer(name): p for name, p in backend.model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(start[name] if name.endswith("lora_A") else value_of(name, parameter.shape))
    batch = pair_batch() if kind == "tfpo" else grpo_batch()
    losses = Losses(float(grpo_batch().data["mask"].sum()), len(batch.prompts))
    backend.prepare_for_training(OPTIMIZER)
    backend.prepare_for_training_step()
    bend(backend.head)
    log_probs = backend.get_inference_log_probs(batch)
    metrics = backend.get_loss_and_metrics(batch, **losses.of(kind))
    gradients = {name: p.grad.clone() for name, p in trained.items()}
    weights = {name: tensor.clone() for name, tensor in backend.weights()}
    start_log_probs = backend.get_inference_log_probs(batch, reference=True)
    taken = backend.finish_training_step()
    return {
        "metrics": metrics,
        "gradients": gradients,
        "log_probs": log_probs,
        "start": start_log_probs,
        "weights": weights,
        "taken": taken,
        "after": backend.get_inference_log_probs(batch),
    }


def policy_with(folder: str, kind: str, modules: list[str], layout: dict[str, Any], share: bool, scaled: bool = True):  # type: ignore[no-untyped-def]
    from nemo_pivotrl.backends.megatron import lora
    from nemo_pivotrl.backends.megatron.parallel import initialize
    from nemo_pivotrl.backends.megatron.train import MegatronPolicy

    megatron = megatron_of(layout)
    groups = initialize(megatron, seed=1)
    settings = settings_of(folder, kind, modules, share)
    backend: Any = MegatronPolicy(settings, megatron, groups, value_head=kind == "tfpo", reference=True)
    if scaled:
        architecture = read_architecture(folder)
        entry_of = {entry.name: entry for entry in lora.adapter_entries(architecture, settings.lora)}
        hybrid = architecture.hybrid
        for name, parameter in lora.parameters(backend.stage.module, RANK).items():
            if name.endswith(".b"):
                entry = entry_of[name]
                names = [n.replace("backbone.", "model.", 1) if hybrid else n for n in entry.hf]
                whole = [value_of(layer(n), (size, RANK)) for n, size in zip(names, entry.sizes, strict=True)]
                parameter.data.copy_(lora.own_part(entry, whole, groups))
    return backend


def whole_by_layer(backend: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    from nemo_pivotrl.backends.megatron import lora

    architecture = read_architecture(backend.settings.model_name)
    found = lora.gathered(tensors, architecture, backend.settings.lora, backend.groups)
    return {
        layer(name.replace("backbone.", "model.", 1) if architecture.hybrid else name): tensor for name, tensor in found
    }


def start_of(folder: str, modules: list[str]) -> dict[str, Tensor]:
    """The adapters that every layout starts with, by layer."""
    from nemo_pivotrl.backends.megatron import lora

    backend = policy_with(folder, "grpo", modules, {}, False, scaled=False)
    return whole_by_layer(backend, lora.parameters(backend.stage.module, RANK))


@contextmanager
def harmed(harm: str) -> Iterator[None]:
    """A mistake one could make."""
    from nemo_pivotrl.backends.megatron import lora

    right = lora.Adapter.__init__

    def wrong(self: Any, *arguments: Any) -> None:
        right(self, *arguments)
        if harm == "unsummed":  # each rank keeps the gradient of its own part of the sequence
            self.a.sequence_parallel = self.b.sequence_parallel = False
        if harm == "scale":
            self.scale *= RANK
        if harm == "order":  # one HF layer's rows after another's, as fused layers do not have them
            self.order = None

    lora.Adapter.__init__ = wrong  # type: ignore[method-assign]
    try:
        yield
    finally:
        lora.Adapter.__init__ = right  # type: ignore[method-assign]


def train_harmed(harm: str, **given: Any) -> Any:
    with harmed(harm):
        return train(**given)


def train(folder: str, kind: str, modules: list[str], layout: dict[str, Any], share: bool, target: str) -> Any:
    from megatron.core.distributed import finalize_model_grads

    from nemo_pivotrl.backends.megatron import lora

    backend = policy_with(folder, kind, modules, layout, share)
    bend(backend.stage.head)
    batch = pair_batch() if kind == "tfpo" else grpo_batch()
    losses = Losses(float(grpo_batch().data["mask"].sum()), len(batch.prompts))
    backend.prepare_for_training(OPTIMIZER)
    frozen = {n: p.detach().clone() for n, p in backend.stage.named_parameters() if not p.requires_grad}
    log_probs = backend.get_inference_log_probs(batch)
    start = backend.get_inference_log_probs(batch, reference=True)
    backend.prepare_for_training_step()
    metrics = backend.get_loss_and_metrics(batch, **losses.of(kind))
    own = lora.parameters(backend.stage.module, RANK)
    held = {name: p.main_grad.clone() for name, p in own.items()}
    finalize_model_grads([backend.model], None, backend.groups.collection, force_all_reduce=True)
    gradients = whole_by_layer(backend, {name: p.main_grad for name, p in own.items()})
    for name, p in own.items():
        p.main_grad.copy_(held[name])
    if backend.stage.head is not None:  # summed above already
        for p in backend.stage.head.parameters():
            p.main_grad.div_(backend.groups.dp_cp.size())
    weights = {name: tensor.clone() for name, tensor in backend.weights()}
    backend.export(Path(target))
    backend.export(Path(f"{target}-trained"), trained_only=True)
    taken = backend.finish_training_step()
    moved = [n for n, p in backend.stage.named_parameters() if n in frozen and not torch.equal(p, frozen[n])]
    return {
        "metrics": metrics,
        "gradients": gradients,
        "log_probs": log_probs,
        "start": start,
        "weights": weights,
        "taken": taken,
        "after": backend.get_inference_log_probs(batch),
        "moved": moved,
    }


def steps(folder: str, layout: dict[str, Any], state: str, load: bool, count: int) -> Any:
    """`count` steps from the start or from what is in `state`, then a save there. Adapters and log-probabilities."""
    from nemo_pivotrl.backends.megatron import lora

    backend = policy_with(folder, "grpo", ["q_proj", "k_proj", "v_proj", "down_proj", "up_proj"], layout, False)
    backend.prepare_for_training(replace(OPTIMIZER, warmup_steps=4))
    batch = grpo_batch()
    losses = Losses(float(batch.data["mask"].sum()), len(batch.prompts))
    if load:
        backend.load_training_state(Path(state))
    for _ in range(count):
        backend.prepare_for_training_step()
        backend.get_loss_and_metrics(batch, losses.grpo)
        backend.finish_training_step()
    if not load:
        backend.save_training_state(Path(state))
    found = whole_by_layer(backend, lora.parameters(backend.stage.module, RANK))
    return {name: tensor.clone() for name, tensor in found.items()}


def other_adapters(folder: str, state: str, modules: list[str]) -> str:
    """What is said to adapters that a state is not of."""
    from nemo_pivotrl.core.errors import InputError

    backend = policy_with(folder, "grpo", modules, {}, False)
    backend.prepare_for_training(OPTIMIZER)
    try:
        backend.load_training_state(Path(state))
    except InputError as error:
        return str(error)
    return ""
