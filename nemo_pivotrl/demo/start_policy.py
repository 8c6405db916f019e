"""The demo's start policy: a tiny model that learns the desk and the puzzles from nothing."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from nemo_pivotrl.components.rollout import load_chat
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.artifacts import digest
from nemo_pivotrl.core.atomic import replacing_folder
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.demo import request_desk, service_desk, shipped, simulators, tiny_models
from nemo_pivotrl.pivotrl.sft import Sequence_, conversation, epochs, fit, identity_for

COPY_BATCH = 128
"""Copying puzzles a step at the beginning of a tiny model's life; they are short."""
PUZZLE_BATCH = 32
"""Puzzles a step afterwards, beside the desk's conversations."""


def make_start_policy(recipe: Recipe, fresh: bool) -> Path:
    """A tiny model from nothing: first copying puzzles, then the desk and all puzzles side by side."""
    shape, settings = recipe.world, recipe.warmup
    desk, puzzles = warmup_trajectories(recipe)
    init = recipe.path(f"{settings.name}.init-{digest([recipe.seed, dataclasses.asdict(shape)], 8)}")
    if not init.exists():
        tokenizer = tiny_models.make_tokenizer(
            (text for t in [*desk, *puzzles] for text in _texts(t)), shape.vocab_size
        )
        with replacing_folder(init) as part:
            tiny_models.save(
                tiny_models.make_model(tokenizer, shape.hidden_size, shape.layers, shape.heads, recipe.seed),
                tokenizer,
                part,
            )
    policy = dataclasses.replace(recipe.policy, model_name=str(init))
    chat = load_chat(policy)
    desk_sequences, puzzle_sequences = (
        [conversation(t, chat, own) for t in some if (own := own_turns(t))] for some in (desk, puzzles)
    )
    looks_back = ("repeat", "recall")
    copying = [s for s, t in zip(puzzle_sequences, puzzles, strict=True) if t["family"] in looks_back]
    identity = identity_for(recipe, settings, policy, chat, digest(dataclasses.asdict(shape)))

    def draw(step: int) -> list[list[Sequence_]]:
        if step <= settings.copy_steps:
            return [epochs(copying, COPY_BATCH, step, recipe.seed)]
        desk_batch = epochs(desk_sequences, settings.batch_size, step, recipe.seed)
        return [desk_batch, epochs(puzzle_sequences, PUZZLE_BATCH, step, recipe.seed)]

    return fit(recipe, settings, policy, chat, draw, identity, fresh)


def shipped_start_policy(recipe: Recipe, fresh: bool) -> Path:
    """The shop's start policy as the package has it; returns its folder. Raises InputError for another desk."""
    if recipe.world.desk != "shop":
        remedy = "set world.desk: shop, or warmup.source: world, which trains one"
        raise InputError(Problem("recipe", None, "warmup.source", "shipped, for another desk", remedy))
    return shipped.unpack("start-policy", recipe.path(recipe.warmup.name) / "policy")


def warmup_trajectories(recipe: Recipe) -> tuple[list[dict], list[dict]]:
    """Conversations the tiny start policy learns from; their tasks are shared with no other split."""
    rng = random.Random(f"experts {recipe.seed}")
    desk = simulators.service_desk(recipe, "warmup").tasks()
    puzzles = simulators.puzzles(recipe, "warmup").tasks()
    with_family = [{**service_desk.expert_trajectory(t, rng), "family": t.family} for t in puzzles]
    draws, rate = random.Random(f"slips {recipe.seed}"), recipe.world.expert_error_rate
    if recipe.world.desk == "requests":
        return _request_clerks(desk, draws, rate), with_family
    clerks = [service_desk.expert_trajectory(t, rng, errors=service_desk.draw_errors(draws, rate)) for t in desk]
    return clerks, with_family


def _request_clerks(tasks: Sequence[service_desk.Task], rng: random.Random, error_rate: float) -> list[dict]:
    """Every second conversation has turns of clerks with another wording, which the start policy reads and does not learn to say."""
    return [
        request_desk.conversation(task, rng, request_desk.mixed(rng), error_rate)
        if number % 2
        else request_desk.conversation(task, rng, error_rate=error_rate)
        for number, task in enumerate(tasks)
    ]


def own_turns(trajectory: dict) -> Sequence[int]:
    """The turns, counted from 0, that are in the start policy's own wording; all where the trajectory does not say."""
    turns = sum(m["role"] == "assistant" for m in trajectory["messages"])
    wording = trajectory.get("wording", ["house"] * turns)
    return [number for number, teacher in enumerate(wording) if teacher == "house"]


def _texts(trajectory: dict) -> Iterable[str]:
    for message in trajectory["messages"]:
        yield message["content"]
        for call in message.get("tool_calls", []):
            yield f'{{"name": "{call["function"]["name"]}", "arguments": {call["function"]["arguments"]}}}'
