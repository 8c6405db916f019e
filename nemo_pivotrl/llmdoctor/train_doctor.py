"""tfpo: token rewards -> doctor, stage 2 of LLMdoctor (equation (32)). The patient is not loaded: its rewards are in the artefact.

One objective makes one doctor: where the artefact holds several, `tfpo.objective` picks one, or each gets its own.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nemo_pivotrl.algorithms import selection
from nemo_pivotrl.algorithms.llmdoctor import doctor_loss
from nemo_pivotrl.backends import loading
from nemo_pivotrl.backends.base import TokenBatch, Trainer, as_trained
from nemo_pivotrl.backends.identity import identity_of, policy_revision
from nemo_pivotrl.components.conclusions import conclude
from nemo_pivotrl.components.lineage import check_lineage
from nemo_pivotrl.components.loop import Job, Step, run
from nemo_pivotrl.components.metrics import read_metrics
from nemo_pivotrl.components.model_card import write_card
from nemo_pivotrl.components.progress import steps_of
from nemo_pivotrl.components.rollout import load_chat
from nemo_pivotrl.components.stage_checks import doctor_checks
from nemo_pivotrl.config import Recipe, Tfpo
from nemo_pivotrl.core.artifacts import digest, file_digest, read_header, read_rows
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.core.lock import one_writer
from nemo_pivotrl.data.chat_template import Chat

CARD_NUMBERS = {
    "val/loss": "loss on held-out pairs",
    "val/ordered": "share of held-out pairs in the right order",
    "val/chosen_drift": "drift of chosen answers, nats",
    "val/rejected_drift": "drift of rejected answers, nats",
}
"""Metrics that the model card shows, and what they are."""
Pair = dict[str, Any]
"""A row of the artefact: prompt_ids, and for chosen and rejected their ids, rewards and whether the answer ended."""


@one_writer
def train_doctor(recipe: Recipe, fresh: bool = False) -> Path:
    """Train the doctors; returns the (last) doctor's folder, an ordinary HF checkpoint without the head.

    Raises InputError for another tokenizer than the patient's, an unknown objective, and pairs that do not fit.

    >>> folder = train_doctor(load_recipe("llmdoctor.yaml"))
    >>> (folder / "model.safetensors").exists()
    True
    """
    settings, source = recipe.tfpo, recipe.path("token_rewards.jsonl")
    chat = load_chat(recipe.doctor)
    found = read_header(source, "token_rewards")
    check_lineage(recipe, source, found)
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
        settings=recipe.told("tfpo", "doctor", "megatron", but=[f"tfpo.{name}" for name in FREE]),
        chat=chat,
        steps=steps_of(settings.max_num_steps, settings.max_num_epochs, len(train), settings.pairs_per_step),
        steps_field="tfpo.max_num_steps",
        checkpointing=_best_by_loss(recipe),
        shown=("loss", "ordered"),
    )
    folder = run(job, lambda cost: DoctorTraining(recipe, train, held_out), fresh)
    checks = doctor_checks(read_metrics(recipe.path(settings.name) / "metrics.jsonl"))
    conclude(Path(recipe.run_dir), f"tfpo {settings.name}", checks)
    facts = [f"{len(train):,} pairs with token rewards of `{settings.objective}`", f"seed {recipe.seed}"]
    write_card(folder, recipe, "doctor", facts, CARD_NUMBERS, checks)
    print(f"doctor: {folder}")
    return folder


class DoctorTraining:
    """A doctor in training on pairs with token rewards (`components.loop.Work`)."""

    def __init__(self, recipe: Recipe, train: Sequence[Pair], held_out: Sequence[Pair]):
        self.recipe, self.train, self.held_out = recipe, train, held_out
        anchored = recipe.tfpo.anchor == "reference"
        doctor = as_trained(recipe.doctor)
        self.trainer = loading.load(doctor, recipe.megatron, value_head=True, reference=anchored, section="doctor")
        self.trainer.prepare_for_training(recipe.doctor.optimizer)

    def step(self, number: int) -> Step:
        """One update by `tfpo.pairs_per_step` pairs."""
        self.trainer.prepare_for_training_step()
        metrics = measure(self.trainer, _draw(self.train, number, self.recipe), self.recipe.tfpo)
        return Step(metrics | self.trainer.finish_training_step(), {"pairs": self.recipe.tfpo.pairs_per_step})

    def validate(self, step: int, last: bool, known: dict[str, float]) -> dict[str, float]:
        """The step's metrics on held-out pairs, under `val/`; before the first step and after the last one, too."""
        period = self.recipe.tfpo.val_period
        if not (period and self.held_out) or "val/loss" in known or (step % period and not last):
            return {}
        found = measure(self.trainer, self.held_out, self.recipe.tfpo, forward_only=True)
        return {f"val/{name}": value for name, value in found.items()}


def _best_by_loss(recipe: Recipe) -> Any:
    """Checkpoints of a doctor are ranked by held-out loss, unless the recipe names another of its metrics."""
    kept = recipe.checkpointing
    if kept.metric_name == type(kept)().metric_name:  # a policy's metric: the recipe did not say
        return dataclasses.replace(kept, metric_name="val/loss", higher_is_better=False)
    return kept


FREE = ("max_num_steps", "max_num_epochs", "val_period", "val_pairs")
"""Settings of `tfpo` that change neither data nor steps, only how long training goes on and what is measured."""


def _identity(recipe: Recipe, source: Path, chat: Chat) -> str:
    """What a checkpoint belongs to: data, start weights and every setting that changes training, not its length."""
    kept = dataclasses.asdict(recipe.tfpo) | dict.fromkeys(FREE)
    doctor = dataclasses.asdict(recipe.doctor) | {"model_name": None, "device": None}
    doctor |= {"generation": None, "sampler": "backend"}  # as when a doctor had these settings, too
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
        key=lambda row: selection.order_key(recipe.seed, row["preference_id"]),
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
    token_ids = torch.zeros(len(answers), width, dtype=torch.long)
    rewards = torch.zeros(len(answers), width, dtype=torch.float32)
    for row, answer in enumerate(answers):
        token_ids[row, : len(answer["ids"])] = torch.tensor(answer["ids"])
        rewards[row, : len(answer["rewards"])] = torch.tensor(answer["rewards"])
    data = {
        "token_ids": token_ids,
        "rewards": rewards,
        "length": torch.tensor([len(answer["ids"]) for answer in answers]),
        "ended": torch.tensor([answer["ended"] for answer in answers]),
    }
    prompt_of = [n // 2 for n in range(len(answers))]
    prompts, responses = [pair["prompt_ids"] for pair in pairs], [answer["ids"] for answer in answers]
    return TokenBatch(prompts, prompt_of, responses, data, together=2)


def measure(trainer: Trainer, pairs: Sequence[Pair], settings: Tfpo, forward_only: bool = False) -> dict[str, float]:
    """Loss and metrics over the pairs, each normalised by their number however they are cut into micro-batches."""
    loss_fn = partial(doctor_loss, settings=settings, pairs=float(len(pairs)))
    return trainer.get_loss_and_metrics(batch_of(pairs), loss_fn, forward_only, settings.anchor == "reference")
