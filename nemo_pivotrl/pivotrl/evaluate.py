"""evaluate: policies side by side, in domain and out of domain, with confidence intervals.

The sets: `one_turn` (held-out states, the verifier's reward), `multi_turn` (whole episodes in a simulator, where there is one;
`greedy` at temperature 0), `retention` (something unrelated that must not be lost). Every policy gets the same items and the same
seeds. Intervals are percentile bootstraps over items, because samples of one item are not independent.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from nemo_pivotrl.algorithms import selection
from nemo_pivotrl.backends import loading
from nemo_pivotrl.backends.base import Sampler
from nemo_pivotrl.backends.identity import identity_of, policy_revision, without_start
from nemo_pivotrl.components.conclusions import conclude
from nemo_pivotrl.components.costs import CountingSampler
from nemo_pivotrl.components.durable_map import Found, Map, Once, Tally, found_rows
from nemo_pivotrl.components.lineage import check_lineage
from nemo_pivotrl.components.rollout import (
    first_fitting,
    fits,
    judged_candidates,
    load_chat,
    load_recipe_verifier,
    roll_out,
    sample_seed,
)
from nemo_pivotrl.components.simulation import Episode, Simulator, Task, load_simulator
from nemo_pivotrl.components.stage_checks import evaluation_checks
from nemo_pivotrl.components.trackers import check_dashboards, log_summary
from nemo_pivotrl.config import Megatron, Policy, Recipe
from nemo_pivotrl.core.artifacts import Header, digest, file_digest, read_header, read_rows
from nemo_pivotrl.core.atomic import write_atomically
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.core.lock import one_writer
from nemo_pivotrl.core.plugins import is_import_path
from nemo_pivotrl.core.types import Action, FailedSample, Message, Sample
from nemo_pivotrl.data.chat_template import Chat
from nemo_pivotrl.data.states import candidates_of
from nemo_pivotrl.pivotrl.evaluation_tables import summarise, table, verdict

Row = dict[str, Any]


@one_writer
def evaluate(recipe: Recipe, fresh: bool = False) -> Path:
    """Write `evaluation.jsonl` (a line for each policy and set) and `evaluation.json`; print the table.

    The JSON holds means, intervals and paired differences from the first policy.

    >>> path = evaluate(load_recipe("recipe.yaml"))
    >>> path.name
    'evaluation.jsonl'
    """
    settings, source = recipe.evaluate, recipe.path("candidates.jsonl")
    check_dashboards(recipe)
    check_lineage(recipe, source, read_header(source, "candidates"))
    if not settings.policies:
        raise InputError(
            Problem(
                "recipe",
                None,
                "evaluate.policies",
                "nothing",
                "name at least one policy: {base: FOLDER, trained: FOLDER}",
            )
        )
    revisions = {}
    for label, folder in settings.policies.items():
        if not Path(folder, "config.json").exists():
            raise InputError(
                Problem(
                    "recipe",
                    None,
                    f"evaluate.policies.{label}",
                    folder,
                    _maker(recipe, folder),
                )
            )
        revisions[label] = policy_revision(folder)
    header = Header(
        stage="evaluation",
        config_hash=_settings_digest(recipe),
        parent=file_digest(source),
        verifier=load_recipe_verifier(recipe)[1],
        extra={"policies": revisions},
        settings=recipe.told("evaluate", "verifier", "world", "policy", but=("verifier.judge.cache",)),
    )
    path = recipe.path("evaluation.jsonl")
    if path.exists() and read_header(path, "evaluation") != header:
        path.unlink()  # of other policies or settings: it is made anew
    sets, tally = [name for name in SETS if _wanted(recipe, name)], Tally()
    work = [(label, name) for label in settings.policies for name in sets]
    items = [(n, partial(Once, (label, name), 1, tally)) for n, (label, name) in enumerate(work)]
    Map(recipe, "evaluate", path, header, lambda: items, partial(Evaluator, recipe), len(work), "set", tally).run(fresh)
    summary = summarise(list(read_items(path)), next(iter(settings.policies)), settings.confidence, recipe.seed)
    write_atomically(recipe.path("evaluation.json"), json.dumps(summary, indent=2) + "\n")
    print(table(summary))
    print(verdict(summary))
    conclude(Path(recipe.run_dir), "evaluate", evaluation_checks(summary))
    log_summary(recipe, "evaluate", summary["policies"])
    return path


def _maker(recipe: Recipe, folder: str) -> str:
    """What to do about a policy that is not there."""
    stages = {recipe.grpo.name: "train", recipe.sft.name: "sft", recipe.warmup.name: "warmup"}
    made = {recipe.path(name) / "policy": stage for name, stage in stages.items()}.get(Path(folder))
    return (
        f"`nemo-pivotrl {made} RECIPE` makes it"
        if made
        else "no HF checkpoint there: mend the path, or drop the policy"
    )


def _settings_digest(recipe: Recipe) -> str:
    policy, source = recipe.policy, Path(recipe.evaluate.retention)
    computed = identity_of(policy, recipe.megatron) or policy.dtype
    kept = [dataclasses.asdict(policy.generation), policy.max_total_sequence_length, computed, policy.chat_template]
    questions = file_digest(source) if source.is_file() else ""
    return digest([recipe.digest("evaluate", "verifier", "world"), kept, policy.template_kwargs, questions])


def read_items(path: Path) -> Iterator[Row]:
    """One row an item, with its policy and set."""
    for row in read_rows(path):
        for item in row["items"]:
            yield {"policy": row["policy"], "set": row["set"], **item}


class Evaluator:
    """Evaluates policies, one after the other; the last one stays loaded."""

    def __init__(self, recipe: Recipe):
        self.recipe, self.label = recipe, ""
        self.backend: Any = None

    def __call__(self, task: tuple[str, str]) -> Found:
        """One row for a whole set of a policy: it is there with all its items or not at all."""
        label, name = task
        if label != self.label:
            self._load(label)
        cost: dict[str, Any] = {}
        items = SETS[name](self.recipe, self.policy, CountingSampler(self.backend, cost), self.chat)
        return found_rows([{"policy": label, "set": name, "items": items}], **cost)

    def _load(self, label: str) -> None:
        recipe, folder = self.recipe, self.recipe.evaluate.policies[label]
        generation = dataclasses.replace(recipe.policy.generation, temperature=recipe.evaluate.temperature)
        lora = dataclasses.replace(recipe.policy.lora, enabled=False)
        self.policy = dataclasses.replace(recipe.policy, model_name=folder, generation=generation, lora=lora)
        if recipe.vllm.servers:  # they serve the policy alone, and here are several
            self.policy = dataclasses.replace(self.policy, sampler="backend")
        self.backend = None  # let go of before the next one takes its memory
        self.backend = loading.load_sampler(self.policy, _megatron(recipe, folder), recipe.vllm)
        self.chat, self.label = load_chat(self.policy, recipe.verifier.limits), label


def _megatron(recipe: Recipe, folder: str) -> Megatron:
    start = Path(folder).resolve() == Path(recipe.policy.model_name).resolve()
    return recipe.megatron if start else without_start(recipe.megatron)


def _wanted(recipe: Recipe, name: str) -> bool:
    settings = recipe.evaluate
    plays = settings.simulator != "none"
    return {
        "one_turn": True,
        "multi_turn": plays,
        "greedy": plays and settings.greedy,
        "retention": settings.retention != "none",
    }[name]


def one_turn(recipe: Recipe, policy: Policy, backend: Sampler, chat: Chat) -> list[Row]:
    """Verified reward on held-out states."""
    settings = recipe.evaluate
    found = list(candidates_of(recipe.path("candidates.jsonl"), "validation"))
    source = recipe.path("candidates.jsonl")
    verifier, _ = load_recipe_verifier(recipe)
    found = judged_candidates(found, verifier, source) if found else []
    found.sort(key=lambda c: selection.order_key(recipe.seed, c.candidate_id))
    chosen = first_fitting(found, settings.one_turn_candidates, chat, policy, source)
    if not chosen:
        raise InputError(
            Problem(
                str(recipe.path("candidates.jsonl")),
                None,
                "validation split",
                "empty",
                "raise extract.validation_share",
            )
        )
    held_out = [c for c, _ in chosen]
    seeds = [
        [sample_seed("one_turn", recipe.seed, c.candidate_id, k) for k in range(settings.num_generations)]
        for c in held_out
    ]
    groups = roll_out(
        backend,
        chat,
        verifier,
        held_out,
        [prompt for _, prompt in chosen],
        seeds,
        policy.generation,
        recipe.profile.max_retries,
    )
    return [
        {
            "item": c.candidate_id,
            "family": c.action_name,
            "scores": [r.verdict.reward for r in group if r.verdict],
            "failed": sum(r.verdict is None for r in group),
            "sample": group[0].text,
            "texts": [r.text for r in group if r.verdict],  # of the scores, for whoever has another judge
            "category": group[0].verdict.category if group[0].verdict else group[0].failure,
        }
        for c, group in zip(held_out, groups, strict=True)
    ]


def play(
    simulator: Simulator,
    tasks: Sequence[Task],
    seed_parts: Sequence[object],
    policy: Policy,
    backend: Sampler,
    chat: Chat,
    seen: Callable[[int, Sequence[int], Sample], None] | None = None,
) -> list[Episode]:
    """Play one episode of each task, all turns of a wave together. A state that outgrows the context ends unsuccessfully.

    `seen` is told every turn: (number of its task, prompt ids, sample).
    """
    episodes = [simulator.start(task) for task in tasks]
    for turn in range(simulator.max_turns):
        running = [(i, e) for i, e in enumerate(episodes) if not e.done]
        prompts = {i: chat.prompt_ids(e.messages, e.tools) for i, e in running}
        for i, episode in running:
            if not fits(len(prompts[i]), policy):
                episode.step(Action("malformed", detail="context overflow"))
        running = [(i, e) for i, e in running if not e.done]
        if not running:
            break
        seeds = [[sample_seed(*seed_parts, tasks[i].task_id, turn)] for i, _ in running]
        groups = sampled(backend.infer([prompts[i] for i, _ in running], seeds, chat.stop_ids, policy.generation))
        for (i, episode), (sample,) in zip(running, groups, strict=True):
            if seen is not None:
                seen(i, prompts[i], sample)
            whole = sample.finish_reason == "stop"
            episode.step(
                chat.parse(chat.decode(sample.token_ids), episode.tools)
                if whole
                else Action("malformed", detail="truncated")
            )
    return episodes


def sampled(groups: Sequence[Sequence[Sample | FailedSample]]) -> list[list[Sample]]:
    """All of them. Raises InputError for a lost one: an episode cannot go on without its turn, and must not fail by it."""
    lost = [s for group in groups for s in group if isinstance(s, FailedSample)]
    if lost:
        found = f"{len(lost)} turns were lost ({lost[0].kind}: {lost[0].detail})"
        raise InputError(
            Problem("sampler", None, "samples", found, "mend the sampler, then run the same command again")
        )
    return [[s for s in group if isinstance(s, Sample)] for group in groups]


def multi_turn(recipe: Recipe, policy: Policy, backend: Sampler, chat: Chat) -> list[Row]:
    """Success of whole episodes on the simulator's test tasks."""
    simulator = load_simulator(recipe, "evaluate.simulator", recipe.evaluate.simulator)
    return _played(recipe, simulator, "multi_turn", policy, backend, chat, recipe.evaluate.trials)


def greedy(recipe: Recipe, policy: Policy, backend: Sampler, chat: Chat) -> list[Row]:
    """The same at temperature 0, once: sampling favours a policy whose entropy fell, and this does not."""
    simulator = load_simulator(recipe, "evaluate.simulator", recipe.evaluate.simulator)
    likeliest = dataclasses.replace(policy, generation=dataclasses.replace(policy.generation, temperature=0.0))
    return _played(recipe, simulator, "greedy", likeliest, backend, chat, 1)


def retention(recipe: Recipe, policy: Policy, backend: Sampler, chat: Chat) -> list[Row]:
    """Accuracy on the out-of-domain set: a simulator's tasks, or questions with answers from a file."""
    source = recipe.evaluate.retention
    if source == "world" or is_import_path(source):
        simulator = load_simulator(recipe, "evaluate.retention", source)
        return _played(recipe, simulator, "retention", policy, backend, chat, recipe.evaluate.trials)
    questions = read_questions(Path(source))
    prompts = [chat.prompt_ids(messages, ()) for messages, _ in questions]
    seeds = [
        [sample_seed("retention", recipe.seed, i, k) for k in range(recipe.evaluate.trials)]
        for i in range(len(questions))
    ]
    groups = sampled(backend.infer(prompts, seeds, chat.stop_ids, policy.generation))
    rows = []
    for number, ((_, answer), group) in enumerate(zip(questions, groups, strict=True)):
        texts = [chat.parse(chat.decode(s.token_ids)).content for s in group]
        rows.append(
            {
                "item": str(number),
                "family": "questions",
                "scores": [float(holds(t, answer)) for t in texts],
                "failed": 0,
                "sample": texts[0],
            }
        )
    return rows


def holds(text: str, answer: str) -> bool:
    """Whether the answer's words stand together in the text, case and punctuation aside."""
    words = ["".join(ch for ch in w if ch.isalnum()) for w in text.lower().split()]
    wanted = ["".join(ch for ch in w if ch.isalnum()) for w in answer.lower().split()]
    return any(words[i : i + len(wanted)] == wanted for i in range(len(words) - len(wanted) + 1))


def read_questions(path: Path) -> list[tuple[list[Message], str]]:
    """`{"messages": [...], "answer": "..."}` a line. Raises InputError with every bad line."""
    if not path.exists():
        raise InputError(
            Problem(
                str(path),
                None,
                "evaluate.retention",
                str(path),
                "no such file; use world, none, package.module:function or JSONL",
            )
        )
    questions, problems = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            questions.append((list(row["messages"]), str(row["answer"])))
        except (ValueError, KeyError, TypeError) as error:
            problems.append(Problem(str(path), number, "line", line[:80], f"needs messages and answer ({error!r})"))
    if problems or not questions:
        raise InputError(problems or Problem(str(path), None, "file", "no questions", "the file is empty"))
    return questions


def _played(
    recipe: Recipe, simulator: Simulator, name: str, policy: Policy, backend: Sampler, chat: Chat, times: int
) -> list[Row]:
    tasks = simulator.tasks()
    trials = [play(simulator, tasks, (name, recipe.seed, trial), policy, backend, chat) for trial in range(times)]
    rows = []
    for number, task in enumerate(tasks):
        episodes = [trial[number] for trial in trials]
        rows.append(
            {
                "item": task.task_id,
                "family": task.family,
                "scores": [float(e.success) for e in episodes],
                "turns": sum(e.turns for e in episodes),
                "failed": 0,
            }
        )
    return rows


SETS: dict[str, Callable[[Recipe, Policy, Sampler, Chat], list[Row]]] = {
    "one_turn": one_turn,
    "multi_turn": multi_turn,
    "greedy": greedy,
    "retention": retention,
}
