"""manners: the embedded world of LLMdoctor made whole: a tiny patient, a smaller doctor to start from, questions to ask.

The patient learns to obey system prompts; the doctor sees none, so that it starts with the language and without a manner.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_pivotrl.backends.identity import policy_revision
from nemo_pivotrl.components.rollout import load_chat
from nemo_pivotrl.config import Policy, Recipe, Sft
from nemo_pivotrl.core.artifacts import digest
from nemo_pivotrl.core.atomic import replacing_folder, write_atomically
from nemo_pivotrl.core.lock import one_writer
from nemo_pivotrl.demo import answer_styles as manners, shipped, tiny_models as tiny
from nemo_pivotrl.pivotrl.sft import Sequence_, conversation, epochs, fit


@one_writer
def make_manners(recipe: Recipe, fresh: bool = False) -> Path:
    """Write `patient/policy`, `novice/policy` (the doctor's start) and the questions of both splits; returns their folder."""
    if recipe.manners.source == "shipped":
        for name in ("patient", "novice"):
            shipped.unpack(name, recipe.path(name) / "policy")
    else:
        _make_models(recipe, fresh)
    folder = recipe.path("manners")
    for split in ("train", "test"):
        asked = [[{"role": "user", "content": text}] for text in manners.questions(recipe.seed, split)]
        write_atomically(folder / f"{split}.jsonl", "".join(json.dumps(messages) + "\n" for messages in asked))
    return folder


def _make_models(recipe: Recipe, fresh: bool) -> None:
    shape = recipe.manners
    lessons = lessons_of(recipe)
    plain = [lesson for lesson in lessons if lesson[0]["role"] != "system"]
    texts = [message["content"] for lesson in lessons for message in lesson]
    tokenizer = tiny.make_tokenizer(texts, shape.vocab_size)
    for name, hidden, layers, taught in (
        ("patient", shape.hidden_size, shape.layers, lessons),
        ("novice", shape.doctor_hidden_size, shape.doctor_layers, plain),
    ):
        init = recipe.path(f"{name}.init-{digest([recipe.seed, dataclasses.asdict(shape)], 8)}")
        if not init.exists():
            with replacing_folder(init) as part:
                tiny.save(tiny.make_model(tokenizer, hidden, layers, shape.heads, recipe.seed), tokenizer, part)
        teach(recipe, name, init, taught, fresh)


def lessons_of(recipe: Recipe) -> list[list[dict[str, Any]]]:
    """What the patient is taught: one conversation each."""
    rng = random.Random(f"lessons {recipe.seed}")
    return [manners.lesson(rng) for _ in range(recipe.manners.lessons)]


def teach(recipe: Recipe, name: str, init: Path, lessons: Sequence[list[dict[str, Any]]], fresh: bool) -> Path:
    """Fine-tune the model in `init` on the lessons; returns the folder of the checkpoint NAME/policy."""
    shape = recipe.manners
    policy = Policy(model_name=str(init))
    chat = load_chat(policy)
    sequences = [conversation({"messages": lesson, "tools": ()}, chat) for lesson in lessons]
    settings = Sft(
        name=name, num_steps=shape.num_steps, batch_size=shape.batch_size, optimizer=shape.optimizer, decay_from=0.6
    )

    def draw(step: int) -> list[list[Sequence_]]:
        return [epochs(sequences, shape.batch_size, step, recipe.seed)]

    identity = digest([recipe.seed, name, dataclasses.asdict(shape), policy_revision(init)])
    return fit(recipe, settings, policy, chat, draw, identity, fresh)
