"""End-to-end GRPO: what PivotRL spares. Whole episodes of the embedded world, one terminal reward for all turns of an episode.

The baseline of `pivotrl_claims.py`, and nothing that the package offers: it needs an environment at training time. Loss,
advantages and optimiser are PivotRL's own; what differs is what is sampled (episodes), what is rewarded (their end) and what
an advantage is given to (every turn of the episode).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from nemo_pivotrl.algorithms import pivotrl, selection
from nemo_pivotrl.backends import loading
from nemo_pivotrl.backends.base import Backend, TokenBatch
from nemo_pivotrl.components.rollout import load_chat
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.types import Sample
from nemo_pivotrl.data.chat_template import Chat
from nemo_pivotrl.demo import service_desk as world, simulators
from nemo_pivotrl.pivotrl.evaluate import play
from nemo_pivotrl.pivotrl.monitor import padded

Turn = tuple[Sequence[int], Sample]


def drawn(tasks: Sequence[world.Task], step: int, size: int, seed: int) -> list[world.Task]:
    """The tasks of a 1-based step out of an endless run of shuffled epochs."""
    places = range((step - 1) * size, step * size)

    def order(epoch: int) -> list[world.Task]:
        return sorted(tasks, key=lambda task: selection.order_key(seed, f"{epoch} {task.task_id}"))

    orders = {epoch: order(epoch) for epoch in {place // len(tasks) for place in places}}
    return [orders[place // len(tasks)][place % len(tasks)] for place in places]


def batch_of(episodes: Sequence[Sequence[Turn]], advantages: Sequence[float]) -> tuple[TokenBatch | None, float]:
    """(the turns of the episodes whose advantage is not 0, tokens of all turns); None where no episode has a gradient."""
    total = sum(len(sample.token_ids) for turns in episodes for _, sample in turns)
    rows = [(turn, a) for turns, a in zip(episodes, advantages, strict=True) if a for turn in turns]
    if not rows:
        return None, float(total)
    samples = [sample for (_, sample), _ in rows]
    data = {
        "advantages": torch.tensor([a for _, a in rows]),
        "mask": padded([[1.0] * len(s.token_ids) for s in samples]),
        "sampler": padded([s.log_probs for s in samples]),
    }
    prompts = [prompt for (prompt, _), _ in rows]
    return TokenBatch(prompts, range(len(rows)), [s.token_ids for s in samples], data), float(total)


def train(
    recipe: Recipe, seen: Callable[[int, Backend, Chat, int], None], folder: Path
) -> tuple[list[dict[str, float]], float]:
    """Train on the recipe's train tasks; returns (metrics of each step, seconds without `seen`). The policy is in `folder`.

    A step takes `grpo.num_prompts_per_step` tasks and plays each `grpo.num_generations_per_prompt` times. `seen(step, backend,
    chat, turns so far)` is called before the first step (0) and after each.
    """
    chat, settings = load_chat(recipe.policy), recipe.grpo
    backend = loading.load(recipe.policy)
    backend.prepare_for_training(recipe.policy.optimizer)
    simulator = simulators.service_desk(recipe, "train")
    tasks = simulator.tasks()
    rows, turns, seconds = [], 0, 0.0
    seen(0, backend, chat, 0)
    for step in range(1, settings.max_num_steps + 1):
        begun = time.perf_counter()
        chosen = drawn(tasks, step, settings.num_prompts_per_step, recipe.seed)
        copies = [
            dataclasses.replace(task, task_id=f"{task.task_id} {k}")  # the id is part of the seed
            for task in chosen
            for k in range(settings.num_generations_per_prompt)
        ]
        taken: list[list[Turn]] = [[] for _ in copies]
        episodes = play(
            simulator,
            copies,
            ("e2e", recipe.seed, step),
            recipe.policy,
            backend,
            chat,
            lambda i, prompt, sample, taken=taken: taken[i].append((prompt, sample)),
        )
        rewards = torch.tensor([float(e.success) for e in episodes]).view(len(chosen), -1)
        advantages = pivotrl.group_advantages(rewards, torch.ones_like(rewards, dtype=torch.bool))
        batch, tokens = batch_of(taken, advantages.flatten().tolist())
        backend.prepare_for_training_step()
        if batch is not None:
            loss = partial(pivotrl.policy_loss, settings=recipe.loss_fn, normaliser=tokens)
            backend.get_loss_and_metrics(batch, loss)
        backend.finish_training_step()
        seconds += time.perf_counter() - begun
        turns += sum(map(len, taken))
        std = rewards.std(1, correction=0)
        rows.append(
            {
                "step": step,
                "reward": float(rewards.mean()),
                "reward_std": float(std.mean()),
                "mixed_group_share": float((std > 0).float().mean()),
                "turns": turns,
            }
        )
        seen(step, backend, chat, turns)
    backend.export(folder)
    chat.tokenizer.save_pretrained(folder)
    return rows, seconds
