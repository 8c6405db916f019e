"""What the ranks run in test_megatron_checkpoint.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from train_jobs import Losses, bend, grpo_batch, megatron_of, pair_batch, policy_of

from nemo_pivotrl.config import Generation, Optimizer

OPTIMIZER = Optimizer(lr=3e-3, max_grad_norm=1.0, warmup_steps=4)
STEPS = 2


class Run:
    """A policy or a doctor on its way."""

    def __init__(self, folder: str, kind: str, layout: dict[str, Any]):
        from nemo_pivotrl.backends.megatron.parallel import initialize
        from nemo_pivotrl.backends.megatron.train import MegatronPolicy

        megatron = megatron_of(layout)
        self.groups = initialize(megatron, seed=1)
        self.kind = kind
        temperature = 1.0 if kind == "tfpo" else 0.8
        policy = replace(policy_of(folder), generation=Generation(temperature=temperature))
        self.backend = MegatronPolicy(policy, megatron, self.groups, value_head=kind == "tfpo", reference=True)
        self.batch = pair_batch() if kind == "tfpo" else grpo_batch()
        self.losses = Losses(float(grpo_batch().data["mask"].sum()), len(self.batch.prompts))
        if kind == "grpo":
            start = self.backend.get_inference_log_probs(self.batch, reference=True)
            self.batch.data.update(old=start + 0.05, start=start)
        self.backend.prepare_for_training(OPTIMIZER)

    def step(self) -> dict[str, float]:
        """One training step: its loss and gradient norm."""
        backend = self.backend
        backend.prepare_for_training_step()
        metrics = backend.get_loss_and_metrics(self.batch, **self.losses.of(self.kind))
        return {"loss": metrics["loss"], **backend.finish_training_step()}

    def go_on(self) -> dict[str, Any]:
        """The next steps, of which the first shows the weights and those after it the optimiser; and a random number."""
        steps = [self.step() for _ in range(3)]
        head = self.backend.stage.head
        return {
            "steps": steps,
            "log_probs": self.backend.get_inference_log_probs(self.batch),
            "head": None if head is None else head.weight.detach().clone(),
            "random": float(torch.rand(())),
        }


def begin(folder: str, kind: str, layout: dict[str, Any], target: str, steps: int = STEPS) -> dict[str, Any]:
    """A few steps, a checkpoint, and how it goes on without a stop."""
    run = Run(folder, kind, layout)
    bend(run.backend.stage.head)
    for _ in range(steps):
        run.step()
    torch.rand(3)  # the generator is not as seeded
    run.backend.save_training_state(Path(target))
    return run.go_on()


def resume(folder: str, kind: str, layout: dict[str, Any], source: str, export: str = "") -> dict[str, Any]:
    """How it goes on from a checkpoint."""
    run = Run(folder, kind, layout)
    run.backend.load_training_state(Path(source))
    found = run.go_on()
    if export:
        run.backend.export(Path(export))
    return found


def refusal(folder: str, kind: str, layout: dict[str, Any], source: str) -> dict[str, Any]:
    """Why a checkpoint is not loaded, and whether the weights were left as they were."""
    from nemo_pivotrl.core.errors import InputError

    run = Run(folder, kind, layout)
    before = [p.detach().clone() for p in run.backend.stage.parameters()]
    try:
        run.backend.load_training_state(Path(source))
        reason = "none"
    except InputError as error:
        reason = str(error)
    same = all(torch.equal(a, b) for a, b in zip(before, run.backend.stage.parameters(), strict=True))
    return {"reason": reason, "same": same}


def unwritable(folder: str, layout: dict[str, Any], target: str, rank: int, file: str) -> str:
    """What every rank says when one of them cannot write a file."""
    run = Run(folder, "grpo", layout)
    if run.groups.world.rank() == rank:
        Path(target, file).mkdir(parents=True)  # a folder where it should be
    torch.distributed.barrier()
    try:
        run.backend.save_training_state(Path(target))
    except OSError as error:
        return str(error)
    return "none"
