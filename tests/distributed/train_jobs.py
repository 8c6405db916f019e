"""What the ranks run in test_megatron_train.py, and the reference backend's answers to the same questions."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_pivotrl.algorithms import llmdoctor, pivotrl
from nemo_pivotrl.algorithms.model_outputs import ModelOutputs
from nemo_pivotrl.backends.base import TokenBatch
from nemo_pivotrl.config import Generation, LossFn, Megatron, Optimizer, Policy, TfpoLoss

VOCABULARY = 131
OPTIMIZER = Optimizer(lr=1e-3, max_grad_norm=1.0)
GRPO = LossFn(reference_policy_kl_penalty=0.1)
TFPO = TfpoLoss(decay=0.9, anchor="reference", value_weight=0.5, gamma=0.3)


def policy_of(folder: str, budget: int = 80) -> Policy:
    return Policy(
        model_name=folder,
        backend="megatron",
        train_micro_batch_tokens=budget,
        prefix_sharing=False,
        device="cpu",
        generation=Generation(temperature=0.8),
    )


def megatron_of(layout: dict[str, Any]) -> Megatron:
    return Megatron(**{"cpu": True, "bf16": False, "recompute": "none", "logprob_chunk_tokens": 7, **layout})


def grpo_batch(rows: int = 7) -> TokenBatch:
    """Rows of unequal length over three prompts."""
    maker = torch.Generator().manual_seed(3)

    def ids(length: int) -> list[int]:
        return torch.randint(1, VOCABULARY, (length,), generator=maker).tolist()

    responses = [ids(2 + 3 * i % 8) for i in range(rows)]
    batch = TokenBatch([ids(5), ids(9), ids(14)], [i % 3 for i in range(rows)], responses, {})
    width = max(map(len, responses))
    batch.data["mask"] = torch.tensor([[1.0] * len(r) + [0.0] * (width - len(r)) for r in responses])
    batch.data["advantages"] = torch.randn(rows, generator=maker)
    return batch


def pair_batch(pairs: int = 3) -> TokenBatch:
    """Pairs of answers with token rewards."""
    plain = grpo_batch(2 * pairs)
    maker = torch.Generator().manual_seed(4)
    ids = [torch.nn.functional.pad(torch.tensor(r), (0, plain.data["mask"].shape[1] - len(r))) for r in plain.responses]
    data = {
        "token_ids": torch.stack(ids),
        "rewards": torch.randn(plain.data["mask"].shape, generator=maker) * plain.data["mask"],
        "length": torch.tensor([len(r) for r in plain.responses]),
        "ended": torch.tensor([i % 3 > 0 for i in range(2 * pairs)]),
    }
    return TokenBatch(plain.prompts[:pairs], [i // 2 for i in range(2 * pairs)], plain.responses, data, together=2)


@dataclass
class Losses:
    """The two algorithms' losses, which note what they see."""

    tokens: float
    pairs: int
    ratios: list[float] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)

    def grpo(self, outputs: ModelOutputs, data: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        log_probs = outputs.log_probs
        advantages = data["advantages"].to(log_probs.dtype)
        old = data["old"] if "old" in data else log_probs.detach()
        self.ratios.append(float(((log_probs.detach() - old).abs() * data["mask"]).max()))
        self.seen += [round(float(a), 6) for a in data["advantages"]]
        start = data.get("start", old - 0.1)
        return pivotrl.grpo_loss(log_probs, old, advantages, data["mask"], self.tokens, GRPO, ref_log_probs=start)

    def tfpo(self, outputs: ModelOutputs, data: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return llmdoctor.doctor_loss(outputs, data, TFPO, float(self.pairs))

    def of(self, kind: str) -> dict[str, Any]:
        """The arguments of `get_loss_and_metrics` that are the algorithm's."""
        return {"loss_fn": self.tfpo, "reference": True} if kind == "tfpo" else {"loss_fn": self.grpo}


def bend(head: torch.nn.Linear | None) -> None:
    """A head that says something: at zero, half of its gradient's errors could not show."""
    if head is not None:
        with torch.no_grad():
            head.weight.copy_(torch.linspace(-0.5, 0.5, head.weight.numel())[None])
            head.bias.fill_(0.2)


def reference(folder: str, kind: str) -> dict[str, Any]:
    """Metrics, gradients by HF name and gradient norm from the reference backend, on one device."""
    from nemo_pivotrl.backends.reference.policy import ReferencePolicy

    settings = policy_of(folder, 10**6)
    if kind == "tfpo":
        settings = replace(settings, generation=Generation(temperature=1.0))
    backend = ReferencePolicy(settings, value_head=kind == "tfpo", reference=kind == "tfpo")
    batch = pair_batch() if kind == "tfpo" else grpo_batch()
    losses = Losses(float(grpo_batch().data["mask"].sum()), len(batch.prompts))
    backend.prepare_for_training(OPTIMIZER)
    backend.prepare_for_training_step()
    bend(backend.head)
    metrics = backend.get_loss_and_metrics(batch, **losses.of(kind))
    gradients: dict[str, Tensor] = {}
    hybrid = backend.model.config.model_type == "nemotron_h"
    for key, p in backend.model.named_parameters():
        name = key.replace("model.", "backbone.", 1) if hybrid else key  # as its checkpoints have it
        if p.dim() == 3 and name.endswith("_proj"):  # all experts in one; checkpoints have each
            for expert, grad in enumerate(p.grad):
                stem = f"{name.rpartition('.')[0]}.{expert}"
                parts = {"gate_proj": grad.chunk(2)[0], "up_proj": grad.chunk(2)[1]}
                parts = parts if name.endswith("gate_up_proj") else {name.rpartition(".")[2]: grad}
                gradients |= {f"{stem}.{part}.weight": value.clone() for part, value in parts.items()}
        elif not name.endswith(("mlp.gate.weight", "mixer.gate.weight")):  # routers are frozen
            gradients[name] = p.grad.clone()
    if kind == "tfpo":
        gradients |= {"head.weight": backend.head.weight.grad.clone(), "head.bias": backend.head.bias.grad.clone()}
    log_probs = backend.get_inference_log_probs(batch)
    return {"metrics": metrics, "gradients": gradients, "log_probs": log_probs}


def train(folder: str, kind: str, layout: dict[str, Any], budget: int = 80) -> dict[str, Any]:
    """On one rank: the same from Megatron, the step taken twice, and what this rank saw."""
    from nemo_pivotrl.backends.megatron.parallel import initialize
    from nemo_pivotrl.backends.megatron.train import MegatronPolicy
    from nemo_pivotrl.sizing.architecture import read_architecture

    megatron = megatron_of(layout)
    groups = initialize(megatron, seed=1)
    settings = policy_of(folder, budget)
    if kind == "tfpo":
        settings = replace(settings, generation=Generation(temperature=1.0))
    backend: Any = MegatronPolicy(settings, megatron, groups, value_head=kind == "tfpo", reference=True)
    bend(backend.stage.head)
    batch = pair_batch() if kind == "tfpo" else grpo_batch()
    losses = Losses(float(grpo_batch().data["mask"].sum()), len(batch.prompts))
    backend.prepare_for_training(OPTIMIZER)
    log_probs = backend.get_inference_log_probs(batch)
    backend.prepare_for_training_step()
    metrics = backend.get_loss_and_metrics(batch, **losses.of(kind))
    gradients = gradients_of(backend, read_architecture(folder))
    seen, ratio = list(losses.seen), None
    if kind == "grpo":
        batch.data["old"] = log_probs
        backend.get_loss_and_metrics(batch, losses.grpo, forward_only=True)
        ratio = losses.ratios[-1] if losses.ratios else 0.0
    taken = backend.finish_training_step()
    after = backend.get_inference_log_probs(batch)
    start = backend.get_inference_log_probs(batch, reference=True)
    return {
        "metrics": metrics,
        "gradients": gradients if groups.world.rank() == 0 else None,
        "head": head_gradients(backend),
        "log_probs": log_probs,
        "after": after,
        "start": start,
        "ratio": ratio,
        "taken": taken,
        "seen": seen,
        "last_stage": groups.last_stage,
        "first_of_replicas": groups.tp.rank() == 0 and groups.cp.rank() == 0 and groups.last_stage,
    }


def gradients_of(backend: Any, architecture: Any) -> dict[str, Tensor]:
    """Summed gradients under their HF names: the export of a model whose weights are its gradients."""
    from megatron.core.distributed import finalize_model_grads

    from nemo_pivotrl.backends.megatron.weights import export_hf

    held = {name: p.main_grad.clone() for name, p in backend.stage.named_parameters() if p.requires_grad}
    finalize_model_grads([backend.model], None, backend.groups.collection, force_all_reduce=True)
    parameters = list(backend.stage.module.parameters())
    weights = [p.data.clone() for p in parameters]
    with torch.no_grad():
        for p in parameters:
            p.copy_(p.main_grad if p.requires_grad else torch.zeros_like(p))
    found = {
        name: tensor.clone() for name, tensor in export_hf([backend.stage.module], architecture, backend.groups, True)
    }
    backend.head_gradients = (
        {}
        if backend.stage.head is None
        else {f"head.{name}": p.main_grad.clone() for name, p in backend.stage.head.named_parameters()}
    )
    with torch.no_grad():
        for p, value in zip(parameters, weights, strict=True):
            p.copy_(value)
        for name, p in backend.stage.named_parameters():
            if p.requires_grad:
                p.main_grad.copy_(held[name])
    return found


def head_gradients(backend: Any) -> dict[str, Tensor]:
    return backend.head_gradients


def resume(folder: str, target: str, layout: dict[str, Any]) -> dict[str, Any]:
    """Two steps in one go and with a stop between them; an export of what came of them."""
    from nemo_pivotrl.backends.megatron.parallel import initialize
    from nemo_pivotrl.backends.megatron.train import MegatronPolicy

    megatron = megatron_of(layout)
    groups = initialize(megatron, seed=1)
    batch = grpo_batch()
    losses = Losses(float(batch.data["mask"].sum()), len(batch.prompts))

    def start() -> Any:
        made = MegatronPolicy(policy_of(folder), megatron, groups)
        made.prepare_for_training(replace(OPTIMIZER, warmup_steps=4))
        return made

    def step(backend: Any) -> None:
        backend.prepare_for_training_step()
        backend.get_loss_and_metrics(batch, losses.grpo)
        backend.finish_training_step()

    straight, first, second = start(), start(), start()
    step(straight)
    step(straight)
    step(first)
    first.save_training_state(Path(target, "state"))
    second.load_training_state(Path(target, "state"))
    step(second)
    second.export(Path(target, "policy"))
    found = second.get_inference_log_probs(batch)
    return {"equal": torch.equal(found, straight.get_inference_log_probs(batch)), "found": found}


def few_rows(folder: str, layout: dict[str, Any], rows: int, calls: int) -> dict[str, Any]:
    """Gradient norm of a batch with fewer rows than ranks, handed over in `calls` parts."""
    from nemo_pivotrl.backends.megatron.parallel import initialize
    from nemo_pivotrl.backends.megatron.train import MegatronPolicy

    megatron = megatron_of(layout)
    groups = initialize(megatron, seed=1)
    backend = MegatronPolicy(policy_of(folder), megatron, groups)
    backend.prepare_for_training(OPTIMIZER)
    backend.prepare_for_training_step()
    batch = grpo_batch(rows)
    losses = Losses(float(batch.data["mask"].sum()), rows)
    total = 0.0
    for part in torch.arange(rows).chunk(calls):
        at = part.tolist()
        data = {key: value[at] for key, value in batch.data.items()}
        piece = TokenBatch(batch.prompts, [batch.prompt_of[i] for i in at], [batch.responses[i] for i in at], data)
        total += backend.get_loss_and_metrics(piece, losses.grpo)["loss"]
    return {"loss": total, **backend.finish_training_step()}


def explode(folder: str, layout: dict[str, Any]) -> dict[str, Any]:
    """What a loss that is not finite does."""
    from nemo_pivotrl.backends.megatron.parallel import initialize
    from nemo_pivotrl.backends.megatron.train import MegatronPolicy

    megatron = megatron_of(layout)
    groups = initialize(megatron, seed=1)
    backend = MegatronPolicy(policy_of(folder), megatron, groups)
    backend.prepare_for_training(OPTIMIZER)
    backend.prepare_for_training_step()
    before = [p.detach().clone() for p in backend.stage.parameters()]
    batch = grpo_batch()
    backend.get_loss_and_metrics(batch, lambda outputs, data: ((outputs.log_probs * float("inf")).sum(), {}))
    try:
        backend.finish_training_step()
        raised = ""
    except FloatingPointError as error:
        raised = str(error)
    same = all(torch.equal(a, b) for a, b in zip(before, backend.stage.parameters(), strict=True))
    return {"raised": raised, "same": same}
