"""tfpo: token rewards -> doctor, stage 2 of LLMdoctor (equation (32)). The patient is not loaded: its rewards are in the artefact.

One objective makes one doctor: where the artefact holds several, `tfpo.objective` picks one, or each gets its own.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nemo_pivotrl.algorithms import pivotrl
from nemo_pivotrl.algorithms.llmdoctor import TfpoSettings, plan, tfpo_loss
from nemo_pivotrl.backends import loading
from nemo_pivotrl.backends.base import TokenBatch
from nemo_pivotrl.backends.identity import identity_of, policy_revision
from nemo_pivotrl.components.loop import Job, Step, run
from nemo_pivotrl.components.progress import steps_of
from nemo_pivotrl.components.rollout import load_chat
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.artifacts import digest, file_digest, read_header, read_rows
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.data.chat_template import Chat

if TYPE_CHECKING:
    from nemo_pivotrl.backends.reference.doctor import DoctorModel

Pair = dict[str, Any]
"""A row of the artefact: prompt_ids, and for chosen and rejected their ids, rewards and whether the answer ended."""


def tfpo(recipe: Recipe, fresh: bool = False) -> Path:
    """Train the doctors; returns the (last) doctor's folder, an ordinary HF checkpoint without the head.

    Raises InputError for another tokenizer than the patient's, an unknown objective, and pairs that do not fit.
    """
    settings, source = recipe.tfpo, recipe.path("token_rewards.jsonl")
    chat = load_chat(recipe.doctor)
    found = read_header(source, "token_rewards")
    if found.tokenizer != chat.fingerprint:
        remedy = "a doctor must share the patient's tokenizer: start from a model with the same vocabulary"
        raise InputError(
            Problem(str(source), 1, "tokenizer", found.tokenizer, f"{remedy} (doctor: {chat.fingerprint})")
        )
    objectives = sorted({row["objective"] for row in read_rows(source)})
    if settings.objective and settings.objective not in objectives:
        remedy = f"set it to one of {', '.join(objectives)}, or leave it out to train a doctor for each"
        raise InputError(Problem("recipe", None, "tfpo.objective", settings.objective, remedy))
    for objective in [settings.objective] if settings.objective else objectives:
        name = settings.name if len(objectives) == 1 else f"{settings.name}-{objective}"
        own = dataclasses.replace(recipe, tfpo=dataclasses.replace(settings, name=name, objective=objective))
        path = _train(own, source, chat, fresh)
    return path


def _train(recipe: Recipe, source: Path, chat: Chat, fresh: bool) -> Path:
    """Train the doctor of `tfpo.objective` in the folder `tfpo.name`."""
    settings = recipe.tfpo
    train, held_out = _pairs(recipe, source)
    job = Job(
        recipe=recipe,
        stage="tfpo",
        name=settings.name,
        cost_name=f"tfpo {settings.name}",
        identity=_identity(recipe, source, chat),
        chat=chat,
        steps=steps_of(settings.max_num_steps, settings.max_num_epochs, len(train), settings.pairs_per_step),
        steps_field="tfpo.max_num_steps",
        checkpointing=_best_by_loss(recipe),
        shown=("loss", "ordered"),
    )
    return run(job, lambda cost: DoctorTraining(recipe, train, held_out), fresh)


class DoctorTraining:
    """A doctor in training on pairs with token rewards (`components.loop.Work`)."""

    def __init__(self, recipe: Recipe, train: Sequence[Pair], held_out: Sequence[Pair]):
        self.recipe, self.train, self.held_out = recipe, train, held_out
        self.settings = tfpo_settings(recipe)
        anchored = recipe.tfpo.anchor == "reference"
        self.trainer = loading.load_doctor(recipe.doctor, anchored=anchored, megatron=recipe.megatron)
        self.trainer.prepare_for_training(recipe.doctor.optimizer)

    def step(self, number: int) -> Step:
        """One update by `tfpo.pairs_per_step` pairs."""
        self.trainer.prepare_for_training_step()
        metrics = _run(self.trainer, _draw(self.train, number, self.recipe), self.settings)
        return Step(metrics | self.trainer.finish_training_step(), {"pairs": self.recipe.tfpo.pairs_per_step})

    def validate(self, step: int, last: bool, known: dict[str, float]) -> dict[str, float]:
        """The step's metrics on held-out pairs, under `val/`; before the first step and after the last one, too."""
        period = self.recipe.tfpo.val_period
        if not (period and self.held_out) or "val/loss" in known or (step % period and not last):
            return {}
        found = _run(self.trainer, self.held_out, self.settings, forward_only=True)
        return {f"val/{name}": value for name, value in found.items()}


def tfpo_settings(recipe: Recipe) -> TfpoSettings:
    """The loss's settings out of the recipe's section."""
    names = {f.name for f in dataclasses.fields(TfpoSettings)}
    return TfpoSettings(**{name: value for name, value in dataclasses.asdict(recipe.tfpo).items() if name in names})


def _best_by_loss(recipe: Recipe) -> Any:
    """Checkpoints of a doctor are ranked by held-out loss, unless the recipe names another of its metrics."""
    kept = recipe.checkpointing
    if kept.metric_name == type(kept)().metric_name:  # a policy's metric: the recipe did not say
        return dataclasses.replace(kept, metric_name="val/loss", higher_is_better=False)
    return kept


def _identity(recipe: Recipe, source: Path, chat: Chat) -> str:
    """What a checkpoint belongs to: data, start weights and every setting that changes training, not its length."""
    free = ("max_num_steps", "max_num_epochs", "val_period", "val_pairs")
    kept = dataclasses.asdict(recipe.tfpo) | dict.fromkeys(free)
    doctor = dataclasses.asdict(recipe.doctor) | {"model_name": None, "device": None, "generation": None}
    doctor |= identity_of(recipe.doctor, recipe.megatron)
    start = policy_revision(recipe.doctor.model_name)
    return digest([recipe.seed, kept, doctor, start, chat.fingerprint, file_digest(source)])


def _pairs(recipe: Recipe, source: Path) -> tuple[list[Pair], list[Pair]]:
    """(train pairs, held-out pairs) of the objective that fit the doctor's context."""
    settings, limit = recipe.tfpo, recipe.doctor.max_total_sequence_length
    mine = [row for row in read_rows(source) if row["objective"] == settings.objective]
    fits = [
        row
        for row in mine
        if len(row["prompt_ids"]) + max(len(row[side]["ids"]) for side in ("chosen", "rejected")) <= limit
    ]
    if len(fits) < len(mine):
        print(f"excluded: {len(mine) - len(fits)} of {len(mine)} pairs, longer than doctor.max_total_sequence_length")
    train = [row for row in fits if row["split"] == "train"]
    held_out = sorted(
        (row for row in fits if row["split"] == "validation"),
        key=lambda row: pivotrl.order_key(recipe.seed, row["preference_id"]),
    )
    if not train:
        remedy = "raise doctor.max_total_sequence_length, or read more preferences"
        raise InputError(Problem(str(source), None, "train split", f"no pair of {settings.objective} fits", remedy))
    return train, held_out[: settings.val_pairs]


def _draw(pairs: Sequence[Pair], step: int, recipe: Recipe) -> list[Pair]:
    """Batch of a 1-based step out of an endless run of shuffled epochs: it depends on seed and step alone."""
    size = recipe.tfpo.pairs_per_step
    places = range((step - 1) * size, step * size)
    orders = {
        epoch: random.Random(f"tfpo {recipe.seed} {epoch}").sample(range(len(pairs)), len(pairs))
        for epoch in {place // len(pairs) for place in places}
    }
    return [pairs[orders[place // len(pairs)][place % len(pairs)]] for place in places]


def batch_of(pairs: Sequence[Pair]) -> TokenBatch:
    """Pairs as a batch: rows 2p and 2p+1 are the chosen and the rejected answer of pair p."""
    answers = [pair[side] for pair in pairs for side in ("chosen", "rejected")]
    width = max(len(answer["ids"]) for answer in answers)
    rewards = torch.zeros(len(answers), width, dtype=torch.float32)
    for row, answer in zip(rewards, answers, strict=True):
        row[: len(answer["rewards"])] = torch.tensor(answer["rewards"])
    data = {
        "rewards": rewards,
        "length": torch.tensor([len(answer["ids"]) for answer in answers]),
        "ended": torch.tensor([answer["ended"] for answer in answers]),
    }
    prompt_of = [n // 2 for n in range(len(answers))]
    return TokenBatch([pair["prompt_ids"] for pair in pairs], prompt_of, [answer["ids"] for answer in answers], data)


def _run(
    backend: DoctorModel, pairs: Sequence[Pair], settings: TfpoSettings, forward_only: bool = False
) -> dict[str, float]:
    """Loss and metrics over the pairs, each normalised by their number however they are cut into micro-batches."""
    loss_fn = partial(_loss, settings=settings, pairs=float(len(pairs)))
    return backend.get_pair_loss_and_metrics(batch_of(pairs), loss_fn, forward_only)


def _loss(
    log_probs: Tensor,
    log_values: Tensor,
    reference: Tensor | None,
    token_ids: Tensor,
    data: dict[str, Tensor],
    settings: TfpoSettings,
    pairs: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Hand a micro-batch to the paper's objective."""
    mask = torch.arange(log_probs.shape[1], device=log_probs.device) < data["length"][:, None]
    rows = torch.arange(len(mask), device=log_probs.device).view(-1, 2)
    layout = plan(token_ids, data["rewards"], mask, data["ended"], rows, settings)
    return tfpo_loss(log_probs, log_values, layout, pairs, settings, reference)
