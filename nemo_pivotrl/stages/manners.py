"""manners: the embedded world of LLMdoctor made whole: a tiny patient, a smaller doctor to start from, preferences.

The patient learns to obey system prompts; the doctor sees none, so that it starts with the language and without a manner.
Preferences are the patient's own answers, sampled without a system prompt and ranked by the oracle.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_pivotrl import backends, manners, tiny
from nemo_pivotrl.chat import Chat
from nemo_pivotrl.config import Generation, Policy, Recipe, Sft
from nemo_pivotrl.records import digest, write_atomically
from nemo_pivotrl.stages.rollout import load_chat, sample_seed
from nemo_pivotrl.stages.sft import Sequence_, conversation, epochs, fit

MAX_ANSWER = 48
"""Tokens; the longest answer of a lesson has about 30."""


def make_manners(recipe: Recipe, fresh: bool = False) -> Path:
    """Write `patient/policy`, `novice/policy` (the doctor's start) and `manners/OBJECTIVE.jsonl`; returns that folder."""
    shape = recipe.manners
    rng = random.Random(f"lessons {recipe.seed}")
    lessons = [manners.lesson(rng) for _ in range(shape.lessons)]
    plain = [lesson for lesson in lessons if lesson[0]["role"] != "system"]
    texts = [message["content"] for lesson in lessons for message in lesson]
    tokenizer = tiny.make_tokenizer(texts, shape.vocab_size)
    for name, hidden, layers, taught in (
        ("patient", shape.hidden_size, shape.layers, lessons),
        ("novice", shape.doctor_hidden_size, shape.doctor_layers, plain),
    ):
        init = recipe.path(f"{name}.init-{digest([recipe.seed, dataclasses.asdict(shape)], 8)}")
        if not init.exists():
            part = init.with_name(init.name + ".part")
            tiny.save(tiny.make_model(tokenizer, hidden, layers, shape.heads, recipe.seed), tokenizer, part)
            os.replace(part, init)
        _teach(recipe, name, init, taught, fresh)
    folder = recipe.path("manners")
    policy = Policy(model_name=str(recipe.path("patient/policy")))
    backend, chat = backends.load(policy), load_chat(policy)
    for objective in manners.OBJECTIVES:
        target = folder / f"{objective}.jsonl"
        if fresh or not target.exists():
            rows = _preferences(recipe, backend, chat, objective)
            write_atomically(target, "".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _teach(recipe: Recipe, name: str, init: Path, lessons: Sequence[list[dict[str, Any]]], fresh: bool) -> Path:
    shape = recipe.manners
    policy = Policy(model_name=str(init))
    chat = load_chat(policy)
    sequences = [conversation({"messages": lesson, "tools": ()}, chat) for lesson in lessons]
    settings = Sft(
        name=name, num_steps=shape.num_steps, batch_size=shape.batch_size, optimizer=shape.optimizer, decay_from=0.6
    )

    def draw(step: int) -> list[list[Sequence_]]:
        return [epochs(sequences, shape.batch_size, step, recipe.seed)]

    identity = digest([recipe.seed, name, dataclasses.asdict(shape), backends.policy_revision(init)])
    return fit(recipe, settings, policy, chat, draw, identity, fresh)


def _preferences(recipe: Recipe, backend: backends.Backend, chat: Chat, objective: str) -> list[dict[str, str]]:
    """Best and worst of the patient's answers to each prompt, as prompt/chosen/rejected records."""
    shape = recipe.manners
    rows: list[dict[str, str]] = []
    asked = manners.prompts(recipe.seed, "train", 4 * shape.pairs)
    generation = Generation(max_new_tokens=MAX_ANSWER)
    for start in range(0, len(asked), 64):
        wave = asked[start : start + 64]
        prompts = [chat.prompt_ids([{"role": "user", "content": text}], ()) for text in wave]
        seeds = [
            [sample_seed("manners", recipe.seed, objective, start + i, k) for k in range(shape.answers_per_prompt)]
            for i in range(len(wave))
        ]
        for text, samples in zip(wave, backend.infer(prompts, seeds, chat.stop_ids, generation), strict=True):
            answers = [chat.decode(s.token_ids).strip() for s in samples if s.finish_reason == "stop"]
            ranked = sorted(answers, key=lambda answer: manners.score(objective, answer))
            row = manners.preference(objective, text, ranked[-1], ranked[0]) if len(ranked) > 1 else None
            if row is not None and row not in rows:
                rows.append(row)
        if len(rows) >= shape.pairs:
            break
    return rows[: shape.pairs]
