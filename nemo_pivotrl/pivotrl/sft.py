"""sft and warmup: supervised fine-tuning on expert actions.

`warmup` makes the start policy: a tiny model from nothing on the embedded world, or an HF model warmed on the train
candidates. `sft` is the arm PivotRL is compared with: the same data, ordinary SFT.

Turns of one trajectory share their prefix: where one turn's prompt and action begin the next turn's prompt, they make
one sequence with several trained spans, which costs a pass over the trajectory instead of one for every turn.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import random
from array import array
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from nemo_pivotrl.algorithms import pivotrl
from nemo_pivotrl.backends import loading
from nemo_pivotrl.backends.base import TokenBatch
from nemo_pivotrl.backends.executors import Executor, Here, Processes, in_order
from nemo_pivotrl.backends.identity import identity_of, policy_revision, without_start
from nemo_pivotrl.components.conclusions import conclude
from nemo_pivotrl.components.costs import CountingSampler
from nemo_pivotrl.components.lineage import check_lineage
from nemo_pivotrl.components.loop import Job, Step, run
from nemo_pivotrl.components.metrics import read_metrics
from nemo_pivotrl.components.progress import progress
from nemo_pivotrl.components.rollout import load_chat, load_recipe_verifier, tell_refused
from nemo_pivotrl.components.stage_checks import sft_checks
from nemo_pivotrl.config import Policy, Recipe, Sft
from nemo_pivotrl.core.artifacts import digest, file_digest, read_header, read_rows
from nemo_pivotrl.core.errors import InputError, Problem, UnrenderableState
from nemo_pivotrl.core.lock import one_writer
from nemo_pivotrl.core.plugins import load_plugin
from nemo_pivotrl.core.told_settings import leaves
from nemo_pivotrl.data import gym_rows as responses
from nemo_pivotrl.data.chat_template import Chat
from nemo_pivotrl.data.states import Row, States, open_states
from nemo_pivotrl.pivotrl.monitor import Monitor, held_out_states
from nemo_pivotrl.pivotrl.validation import METRIC, whole_tasks

EMBEDDED = {
    "world": "nemo_pivotrl.demo.start_policy:make_start_policy",
    "shipped": "nemo_pivotrl.demo.start_policy:shipped_start_policy",
}
"""What runs for `warmup.source`."""
RENDERED_AT_ONCE = 64
"""Turns that a process renders as one task."""


@dataclasses.dataclass(frozen=True, slots=True)
class Sequence_:
    """Token ids with 1 where the token is an expert's."""

    ids: tuple[int, ...]
    trained: tuple[int, ...]


def merge(examples: Iterable[tuple[Sequence[int], Sequence[int]]]) -> list[Sequence_]:
    """Sequences that train every (prompt ids, action ids) once, prefixes merged. Order: longest first.

    The beginnings of what is kept are known by their digests, so the cost is one pass over each sequence, also where a template
    rewrites earlier turns and nothing merges.
    """
    ordered = sorted(examples, key=lambda e: -len(e[0]) - len(e[1]))
    lengths = sorted({len(prompt) + len(action) for prompt, action in ordered})
    homes: dict[bytes, list[int]] = {}
    merged: list[tuple[tuple[int, ...], list[int]]] = []
    for prompt, action in ordered:
        ids = (*prompt, *action)
        beginnings = _beginnings(ids, lengths)
        home = homes.get(beginnings[-1])
        if home is None:
            home = [0] * len(ids)
            merged.append((ids, home))
            for beginning in beginnings:
                homes.setdefault(beginning, home)
        home[len(prompt) : len(ids)] = [1] * len(action)
    return [Sequence_(ids, tuple(trained)) for ids, trained in merged]


def _beginnings(ids: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
    """Digests of the first n ids for every n of `lengths` that there is; ascending."""
    running, found, start = hashlib.sha256(), [], 0
    for end in lengths[: bisect.bisect_right(lengths, len(ids))]:
        running.update(array("q", ids[start:end]).tobytes())
        found.append(running.digest())
        start = end
    return found


def token_batch(sequences: Sequence[Sequence_]) -> tuple[TokenBatch, float]:
    """The batch and its number of trained tokens. What precedes the first trained token is the prompt."""
    starts = [s.trained.index(1) for s in sequences]
    rest = [s.trained[start:] for s, start in zip(sequences, starts, strict=True)]
    width = max(len(r) for r in rest)
    mask = torch.tensor([[*r, *[0] * (width - len(r))] for r in rest], dtype=torch.float32)
    batch = TokenBatch(
        [s.ids[:start] for s, start in zip(sequences, starts, strict=True)],
        range(len(sequences)),
        [s.ids[start:] for s, start in zip(sequences, starts, strict=True)],
        {"mask": mask},
        asked=mask.bool(),  # the language model's head is most of a step where tools said much and the vocabulary is large
    )
    return batch, float(mask.sum())


@one_writer
def sft(recipe: Recipe, fresh: bool = False) -> Path:
    """Fine-tune the start policy on the expert actions of `sft.source`; returns the policy's folder."""
    if (source := recipe.sft.source) in EMBEDDED:
        remedy = "only warmup starts from the world; use candidates or pivots"
        raise InputError(Problem("recipe", None, "sft.source", source, remedy))
    return _fine_tune(recipe, recipe.sft, fresh)


@one_writer
def warmup(recipe: Recipe, fresh: bool = False) -> Path:
    """Make the start policy at policy.model_name."""
    if not makes_start_policy(recipe):
        found, target = recipe.policy.model_name, recipe.path(recipe.warmup.name) / "policy"
        remedy = f"the warmup would write {target}; point policy.model_name there, or leave the warmup out"
        raise InputError(Problem("recipe", None, "policy.model_name", found, remedy))
    if recipe.warmup.source in EMBEDDED:
        return cast("Path", load_plugin(EMBEDDED[recipe.warmup.source], "warmup.source")(recipe, fresh))
    return _fine_tune(recipe, recipe.warmup, fresh)


def makes_start_policy(recipe: Recipe) -> bool:
    """Whether policy.model_name is what the warmup writes, rather than a checkpoint the user brought."""
    return recipe.maker("policy") == "warmup"


def _fine_tune(recipe: Recipe, settings: Sft, fresh: bool) -> Path:
    source = recipe.path("candidates.jsonl" if settings.source == "candidates" else recipe.grpo.pivots)
    check_lineage(recipe, source, read_header(source, ("candidates", "pivots")))
    policy = dataclasses.replace(recipe.policy, model_name=settings.init or recipe.policy.model_name)
    chat = load_chat(policy)
    sequences = _sequences(recipe, policy, chat, source)
    if not sequences:
        raise InputError(
            Problem(
                str(source), None, "train split", "no turn fits the context", "raise policy.max_total_sequence_length"
            )
        )
    identity = identity_for(recipe, settings, policy, chat, file_digest(source))

    def draw(step: int) -> list[list[Sequence_]]:
        return [epochs(sequences, settings.batch_size, step, recipe.seed)]

    return fit(recipe, settings, policy, chat, draw, identity, fresh, source if settings is recipe.sft else None)


def identity_for(recipe: Recipe, settings: Sft, policy: Policy, chat: Chat, data: str) -> str:
    """What a checkpoint belongs to: start weights, data and every setting that changes fine-tuning."""
    kept = [
        identity_of(policy, recipe.megatron) or policy.dtype,
        policy.max_total_sequence_length,
        policy.train_micro_batch_tokens,
        dataclasses.asdict(policy.lora),
    ]
    start = policy_revision(policy.model_name)
    return digest(
        [recipe.seed, dataclasses.asdict(settings), kept, start, chat.fingerprint, chat.template_digest, data]
    )


DECIDING = (
    *("policy.dtype", "policy.backend", "policy.max_total_sequence_length", "policy.train_micro_batch_tokens"),
    *("policy.lora", "policy.chat_template", "policy.template_kwargs", "policy.chat", "megatron"),
)
"""Settings beside its own section that decide what fine-tuning makes: its checkpoints tell them."""
Turn = tuple[Sequence[int], Sequence[int], bool]
"""Ids of a turn's prompt and of its action, and whether the expert's reasoning is there."""


class TurnRenderer:
    """Renders rows' turns (`backends.executors.Worker`). Of one that cannot be rendered: kind and reason."""

    def __init__(self, chat: Chat, states: States):
        self.chat, self.states = chat, states

    def __call__(self, rows: Sequence[Row]) -> list[Turn | str]:
        return list(map(self.turn, rows))

    def turn(self, row: Row) -> Turn | str:
        """One row's turn."""
        c = self.states.candidate(row)
        try:
            prompt, action = self.chat.example_ids(c.messages, c.tools, responses.message_of(c.expected))
        except UnrenderableState as error:
            return f"{error.kind}: {error.found}"
        return array("i", prompt), array("i", action), bool(c.expected.reasoning)


def _renderer(policy: Policy, source: Path) -> TurnRenderer:
    return TurnRenderer(load_chat(policy), open_states(source))


def _sequences(recipe: Recipe, policy: Policy, chat: Chat, source: Path) -> list[Sequence_]:
    """The train turns of an artefact, merged; rendered in as many processes as the recipe has."""
    rows = [row for row in read_rows(source) if row["split"] == "train"]
    parts = [rows[i : i + RENDERED_AT_ONCE] for i in range(0, len(rows), RENDERED_AT_ONCE)]
    executor: Executor
    if recipe.executor == "processes":
        executor = Processes(partial(_renderer, policy, source), recipe.workers)
    else:
        executor = Here(TurnRenderer(chat, open_states(source)))
    found: list[tuple[Row, Turn]] = []
    refused = []
    with progress(len(rows), 0, "render", "turn") as bar:
        for part, turns in zip(parts, in_order(executor, parts), strict=True):
            for row, turn in zip(part, turns, strict=True):
                if isinstance(turn, str):
                    refused.append((row["candidate_id"], turn))
                else:
                    found.append((row, turn))
            bar.update(len(part))
    tell_refused(refused, len(rows), source, "turns")
    kept = [(row, turn) for row, turn in found if len(turn[0]) + len(turn[1]) <= policy.max_total_sequence_length]
    if len(kept) < len(found):
        print(f"excluded: {len(found) - len(kept)} of {len(found)} turns, context_overflow")
    if told := _about_reasoning([thought for _, (_, _, thought) in kept], chat):
        print(told)
    by_trajectory: dict[str, list[tuple[Sequence[int], Sequence[int]]]] = {}
    for row, (prompt, action, _) in kept:
        by_trajectory.setdefault(row["trajectory_id"], []).append((prompt, action))
    return [s for of_one in by_trajectory.values() for s in merge(of_one)]


def _about_reasoning(thoughts: Sequence[bool], chat: Chat) -> str:
    """What is to be said of the reasoning in the trained turns; '' where all is trained as it is."""
    thought, turns = sum(thoughts), len(thoughts)
    if thought and not chat.writes_reasoning:
        return f"{thought} of {turns} turns have reasoning, which the chat template does not write: they are trained without it"
    if thought < turns and chat.reasoning.opened:
        return (
            f"{turns - thought} of {turns} turns have no reasoning: the chat template's prompt opens it, so they are "
            "trained to end it at once; policy.template_kwargs may turn it off"
        )
    return ""


def epochs(sequences: Sequence[Sequence_], size: int, step: int, seed: int) -> list[Sequence_]:
    """Batch of a 1-based step out of an endless run of shuffled epochs."""
    places = range((step - 1) * size, step * size)
    orders = {
        epoch: random.Random(f"{seed} {epoch}").sample(range(len(sequences)), len(sequences))
        for epoch in {p // len(sequences) for p in places}
    }
    return [sequences[orders[p // len(sequences)][p % len(sequences)]] for p in places]


def conversation(trajectory: dict, chat: Chat, own: Sequence[int] | None = None) -> Sequence_:
    """A whole conversation as one sequence. own: the assistant turns, counted from 0, that are trained; None: all of them.

    What follows the last trained turn is left out.
    """
    messages, tools = trajectory["messages"], trajectory["tools"]
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    trained = turns if own is None else [turns[number] for number in own]
    return merge(chat.example_ids(messages[:i], tools, messages[i]) for i in trained)[0]


def fit(
    recipe: Recipe,
    settings: Sft,
    policy: Policy,
    chat: Chat,
    draw: Callable[[int], list[list[Sequence_]]],
    identity: str,
    fresh: bool,
    validated: Path | None = None,
) -> Path:
    """Fine-tune `policy`; returns the policy's folder.

    draw: the parts of a step, each of which has its own token mean. validated: the artefact with the held-out turns; then validate
    and publish as `checkpointing` says. None for a start policy, which is what its last step made.
    """
    kept = recipe.checkpointing if validated is not None else dataclasses.replace(recipe.checkpointing, publish="last")
    job = Job(
        recipe=recipe,
        stage="sft",
        name=settings.name,
        cost_name=settings.name,
        identity=identity,
        settings=recipe.told(*DECIDING) | leaves(settings, "warmup" if settings is recipe.warmup else settings.name),
        chat=chat,
        steps=settings.num_steps,
        steps_field="num_steps",
        checkpointing=dataclasses.replace(kept, save_period=max(kept.save_period, settings.num_steps // 5)),
    )
    folder = run(job, lambda cost: FineTuning(recipe, settings, policy, draw, chat, validated, cost), fresh)
    conclude(
        Path(recipe.run_dir), settings.name, sft_checks(read_metrics(recipe.path(settings.name) / "metrics.jsonl"))
    )
    return folder


class FineTuning:
    """A policy in training on expert actions (`components.loop.Work`)."""

    def __init__(
        self,
        recipe: Recipe,
        settings: Sft,
        policy: Policy,
        draw: Callable[[int], list[list[Sequence_]]],
        chat: Chat,
        validated: Path | None,
        cost: dict[str, Any],
    ):
        """validated: the artefact with the held-out turns, or None."""
        plain = dataclasses.replace(policy.generation, temperature=1.0)  # the likelihood itself, not a tempered one
        own = policy.model_name == recipe.policy.model_name
        megatron = recipe.megatron if own else without_start(recipe.megatron)
        trained = dataclasses.replace(policy, prefix_sharing=False, generation=plain, sampler="backend")
        turns = validated is not None and recipe.checkpointing.publish == "best" and _is_of_turns(recipe)
        self.recipe, self.settings, self.draw, self.chat = recipe, settings, draw, chat
        self.trainer = loading.load(trained, megatron, reference=turns and recipe.grpo.val_kl)
        self.trainer.prepare_for_training(settings.optimizer)
        self.meter = CountingSampler(self.trainer, cost)
        self.monitor: Monitor | None = None
        self.plays = validated is not None
        if turns and validated is not None:
            verifier, _ = load_recipe_verifier(recipe)
            self.monitor = Monitor(
                recipe, self.trainer, chat, verifier, held_out_states(recipe, validated, chat, verifier)
            )

    def step(self, number: int) -> Step:
        """One update by all parts of the draw."""
        self.trainer.decay = decay(number, self.settings)
        self.trainer.prepare_for_training_step()
        losses, tokens = [], 0.0
        for part in self.draw(number):
            batch, count = token_batch(part)
            losses.append(self.trainer.get_loss_and_metrics(batch, partial(pivotrl.sft_loss, normaliser=count))["loss"])
            tokens += count
        metrics = {"loss": sum(losses), **self.trainer.finish_training_step()}
        return Step(metrics, {"tokens_trained": int(tokens)})

    def validate(self, step: int, last: bool, known: dict[str, float]) -> dict[str, float]:
        """Held-out turns where the checkpoint is chosen by them, else whole tasks as `checkpointing.simulator` says."""
        if self.monitor is not None:
            return self.monitor.measure(self.meter, step, last, known)
        return whole_tasks(self.recipe, self.trainer, self.chat, step, last, known) if self.plays else {}


def _is_of_turns(recipe: Recipe) -> bool:
    """Whether the checkpoint is chosen by what validation on held-out turns measures."""
    metric = recipe.checkpointing.metric_name
    return metric.startswith(("val/", "retention/")) and metric != METRIC


def decay(step: int, settings: Sft) -> float:
    """Factor on the learning rate: 1 until `decay_from` of the steps, then linear to 0.1."""
    start = settings.decay_from * settings.num_steps
    return 1.0 if step <= start else 1.0 - 0.9 * (step - start) / (settings.num_steps - start)
