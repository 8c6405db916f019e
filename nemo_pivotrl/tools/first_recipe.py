"""init: a commented minimal recipe for a model folder and a file of trajectories or preferences, from what stands in them.

It asks nothing and settles nothing that the data does not say: what it cannot know (tool definitions that are nowhere, a judge) is a
comment in the recipe and a line of its answer.
"""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nemo_pivotrl.backends.hf_models import check_weights
from nemo_pivotrl.backends.hub import local_copy, near_names
from nemo_pivotrl.components.rollout import load_chat
from nemo_pivotrl.config import Policy, Preferences
from nemo_pivotrl.core.atomic import write_atomically
from nemo_pivotrl.core.errors import InputError, Problem, short
from nemo_pivotrl.core.model_folder import check_config
from nemo_pivotrl.core.types import Trajectory
from nemo_pivotrl.data import gym_rows
from nemo_pivotrl.data.chat_template import Chat
from nemo_pivotrl.data.preferences import read_preferences
from nemo_pivotrl.data.readers import read_records, read_trajectories
from nemo_pivotrl.data.readers.detect import format_of

LOOKED_AT = 32
"""Trajectories, evenly spaced, whose last turn is rendered and counted in tokens."""
MIN_NEW, ROUND = 64, 32
"""Fewest new tokens of a turn that are suggested; suggestions are multiples of `ROUND`."""
THINKING = 2048
"""New tokens that are suggested for a template that reasons: experts seldom show how long the policy thinks."""
SPARE = 1.25
"""Room for longer states than were looked at."""
SHOWN_TOOLS = 8
SHOWN_REASONS = 3
"""Reasons why states cannot be rendered that are told."""
WIDTH = 110
"""Characters of a line of the recipe."""
GYM_VERIFIERS = ("terminal_multi_harness", "terminus", "swe", "single_step")
"""Verifiers that NeMo-Gym's agents are named after."""


@dataclass
class Data:
    """What stands in the file."""

    file: str
    kind: str
    """`trajectories` or `preferences`."""
    formats: Mapping[str, int]
    records: int
    calls: Counter[str] = field(default_factory=Counter)
    """Tool -> turns that call it."""
    turns: int = 0
    talk: int = 0
    """Turns without a call."""
    undefined: list[str] = field(default_factory=list)
    """Tools that are called and that no record defines."""
    trajectories: Sequence[Trajectory] = ()
    left_out: Sequence[Problem] = ()
    """What is wrong with each record that cannot be read."""
    gym_verifier: str = ""
    """The verifier after which the rows' NeMo-Gym agent is named."""

    @property
    def format(self) -> str:
        return " and ".join(self.formats)


@dataclass
class Model:
    """What stands in the model folder."""

    name: str
    kind: str
    parameters: int
    context: int
    """Positions; 0: the config says nothing."""
    chat: Chat | None
    problem: str = ""
    """Why there is no chat template."""


@dataclass
class Lengths:
    """Tokens of the turns that were looked at."""

    state: int = 0
    """Of the longest state."""
    action: int = 0
    """Of the longest expert turn."""
    turns: int = 0
    states: int = 0
    """Last states that were looked at."""
    refused: Counter[str] = field(default_factory=Counter)
    """Why a last state cannot be rendered, and what to do -> how many of them."""


def init(model: str, file: str, target: Path) -> str:
    """Write a recipe at `target` and return what was found, as text. Raises InputError for a model or file that cannot be read and
    for a recipe that is there already."""
    if target.exists():
        remedy = "name another file behind the two, or remove this one"
        raise InputError(Problem(str(target), None, "recipe", "a file is there already", remedy))
    found, data = look_at_model(model), look_at_data(file)
    if data.kind == "preferences":
        text, open_points = _llmdoctor(found, data)
    else:
        text, open_points = _pivotrl(found, data)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, text)
    lines = [f"model: {model}: {_described(found)}", f"data: {file}: {_counted(data)}"]
    lines += [f"WARN  {point}" for point in open_points]
    first = "preferences" if data.kind == "preferences" else "extract"
    lines += [f"-> {target}: look through it; `nemo-pivotrl run {target}` takes it through all stages"]
    return "\n".join([*lines, f"next: nemo-pivotrl {first} {target}"])


# ---- looking ----


def look_at_model(name: str) -> Model:
    """The model's size, context and chat template. Raises InputError for a folder that is no checkpoint."""
    folder = local_copy(name, "MODEL", fetch=True)
    checkpoint = "a folder with an HF checkpoint (config.json, *.safetensors, tokenizer)"
    hub = "the id of a model on the Hugging Face hub, as OWNER/NAME"
    config = check_config(folder, "MODEL", f"{near_names(name)}give {checkpoint}, or {hub}")
    inner = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    parameters = sum(math.prod(tensor.shape) for tensor in check_weights(folder, "MODEL").values())
    context = inner.get("max_position_embeddings") if isinstance(inner, dict) else 0
    model = Model(name, str(config["model_type"]), parameters, context if isinstance(context, int) else 0, None)
    try:
        model.chat = load_chat(Policy(model_name=folder))
    except InputError as error:
        model.problem = f"{error.problems[0].found}: {error.problems[0].remedy}"
    return model


def look_at_data(file: str) -> Data:
    """The file's records. Raises InputError where not a single one can be read."""
    broken: list[Problem] = []
    first = next(iter(read_records(Path(file), broken, "FILE")), None)
    if first is None:
        raise InputError(
            broken or Problem(file, None, "FILE", "no records", "give a file of trajectories or preferences")
        )
    if format_of(first[1]) == "preferences":
        found = read_preferences(Preferences(files=(file,), on_invalid="skip"))
        return Data(file, "preferences", found.files[file], len(found.preferences), left_out=found.left_out)
    reading = read_trajectories([file], on_invalid="skip")
    if not reading.trajectories:
        raise InputError(reading.left_out)
    data = Data(file, "trajectories", reading.files[0].formats, len(reading.trajectories))
    data.trajectories, data.left_out = reading.trajectories, reading.left_out
    agents = " ".join(mark for mark in reading.published if mark.startswith("agent "))
    data.gym_verifier = next((name for name in GYM_VERIFIERS if name in agents), "")
    undefined: Counter[str] = Counter()
    for trajectory in reading.trajectories:
        defined = {tool["function"]["name"] for tool in trajectory.tools}
        for message in trajectory.messages:
            if message["role"] == "assistant":
                names = {call.name for call in gym_rows.action_of(message).calls}
                data.turns, data.talk = data.turns + 1, data.talk + (not names)
                data.calls.update(names)
                undefined.update(names - defined)
    data.undefined = list(undefined)
    return data


def measure(chat: Chat, trajectories: Sequence[Trajectory]) -> Lengths:
    """Tokens of the last state of some trajectories and of all their experts' turns. What cannot be rendered is told."""
    found = Lengths()
    for trajectory in trajectories[:: math.ceil(len(trajectories) / LOOKED_AT)]:
        turns = [n for n, m in enumerate(trajectory.messages) if m["role"] == "assistant" and n > 0]
        for n in turns:
            action = trajectory.messages[n]
            written = "".join(
                [action.get("content") or "", *(f"{c.name}{c.arguments}" for c in gym_rows.action_of(action).calls)]
            )
            found.turns += 1
            try:
                found.action = max(found.action, len(chat.encode(written)))
                if n == turns[-1]:
                    found.states += 1
                    ids = chat.action_ids(trajectory.messages[:n], trajectory.tools, action)
                    found.action = max(found.action, len(ids))
                    found.state = max(found.state, len(chat.prompt_ids(trajectory.messages[:n], trajectory.tools)))
            except InputError as error:
                told = "; ".join(f"{p.field}: {p.found}" for p in error.problems)
                found.refused[f"{told} -> {error.problems[0].remedy}"] += 1
    return found


def _renames_mend(chat: Chat, trajectories: Sequence[Trajectory]) -> bool:
    """Whether every state that was looked at can be rendered once its developer is called system."""
    if "developer" in chat.settings.roles or not any(
        m["role"] == "developer" for t in trajectories for m in t.messages
    ):
        return False
    settings = replace(chat.settings, roles={**chat.settings.roles, "developer": "system"})
    renaming = Chat(chat.tokenizer, chat.parser, chat.template_kwargs, chat.limits, settings)
    return not measure(renaming, trajectories).refused


# ---- writing ----


def _pivotrl(model: Model, data: Data) -> tuple[str, list[str]]:
    """(a recipe for PivotRL, what the user has to settle)."""
    open_points: list[str] = []
    lengths = measure(model.chat, data.trajectories) if model.chat else Lengths()
    total, new, longest, why = _lengths(model, lengths, open_points)
    lines = [
        *_head("PivotRL", model, data),
        "policy:",
        *_noted(f"  model_name: {_scalar(model.name)}", _described(model)),
    ]
    if model.problem:
        open_points.append(f"policy.chat_template: {model.problem}")
        lines += _noted("  # chat_template: template.jinja", "the tokenizer has none: name a Jinja file")
    if model.chat and lengths.refused and _renames_mend(model.chat, data.trajectories):
        lines += _noted(
            "  # chat: {roles: {developer: system}}", "with this line every state that was looked at can be rendered"
        )
    lines += _noted(f"  max_total_sequence_length: {total}", f"prompt and turn, in tokens; {longest}")
    lines += _noted(f"  generation: {{max_new_tokens: {new}}}", f"{why}; a turn that is cut there scores 0")
    lines += ["", "extract:", *_noted(f"  trajectories: [{_scalar(data.file)}]", _counted(data))]
    lines += _unreadable(data, "extract", open_points)
    if data.undefined:
        names = ", ".join(data.undefined[:SHOWN_TOOLS]) + (" ..." if len(data.undefined) > SHOWN_TOOLS else "")
        open_points.append(
            f"no record defines {names}: write their definitions into a JSON file and set extract.tools to it"
        )
        lines += _noted("  # tools: tools.json", f"needed: definitions of {_line(names)} (docs/formats.md)")
    lines += ["", *_verifier(data, open_points), "", "grpo:"]
    lines += _noted("  num_prompts_per_step: 64", "pivots a step; with fewer pivots, or little memory, take fewer")
    lines += ["  num_generations_per_prompt: 16", "  max_num_steps: 100", ""]
    lines += ["evaluate:  # on held-out tasks, before and after", "  policies:"]
    lines += [f"    base: {_scalar(model.name)}", "    pivotrl: ${run_dir}/pivotrl/policy"]
    return "\n".join(lines) + "\n", open_points


def _unreadable(data: Data, section: str, open_points: list[str]) -> list[str]:
    """The line that leaves bad records out; nothing where there are none."""
    if not data.left_out:
        return []
    first, count = data.left_out[0], len(data.left_out)
    told = f"line {first.line}: {first.field}: {first.found} -> {first.remedy}"
    open_points.append(
        f"{count:,} records cannot be read, and {section} stops there: mend them, or set {section}.on_invalid=skip; the first, {told}"
    )
    return _noted(
        "  # on_invalid: skip", f"{count:,} records cannot be read: with this line they are left out and named"
    )


def _lengths(model: Model, lengths: Lengths, open_points: list[str]) -> tuple[int, int, str, str]:
    """(max_total_sequence_length, max_new_tokens, why the one, why the other)."""
    reasons = bool(model.chat and model.chat.reasoning.ends)
    new = max(THINKING if reasons else MIN_NEW, _rounded(2 * lengths.action))
    why = (
        "the template thinks first"
        if reasons
        else f"twice the longest of {lengths.turns:,} expert turns ({lengths.action:,})"
    )
    for reason, count in lengths.refused.most_common(SHOWN_REASONS):
        which = f"{count:,} of {lengths.states:,} states" if lengths.state else f"none of {lengths.states:,} states"
        open_points.append(f"{which} looked at can{'not' if lengths.state else ''} be rendered: {reason}")
    if not lengths.state:
        usual = Policy().max_total_sequence_length
        first = next(iter(lengths.refused), "no chat template")
        return min(usual, model.context or usual), new, f"nothing was rendered: {_line(first)}", why
    total = _rounded(SPARE * lengths.state + new)
    if model.context and total > model.context:
        open_points.append(
            f"states of up to {lengths.state:,} tokens with turns of {new:,} do not fit the model's {model.context:,} positions: "
            "what is longer is left out and counted"
        )
        total, new = model.context, min(new, max(MIN_NEW, model.context // 4))
        why = f"the longest of {lengths.turns:,} expert turns has {lengths.action:,} tokens"
    return total, new, f"the longest state looked at has {lengths.state:,}", why


def _verifier(data: Data, open_points: list[str]) -> list[str]:
    """The lines of the section `verifier`: the one that fits what the experts do."""
    judge = 'judge: {base_url: "http://127.0.0.1:8001/v1", model: NAME}'
    if any(gym_rows.is_terminus(t.fields) for t in data.trajectories):
        lines = _noted("  name: terminus", "the rows are a Terminus agent's")
    elif data.gym_verifier:
        lines = _noted(f"  name: {data.gym_verifier}", "the rows' agent is NeMo-Gym's of this name")
    elif data.calls:
        lines = _noted(
            "  name: functional",
            "a call is right that does the same: arguments by their schema, shell and SQL as parsed",
        )
    else:
        open_points.append(
            "the expert only talks, so a judge has to compare texts: set verifier.judge.base_url and .model"
        )
        lines = _noted("  name: judge", "the expert never calls a tool: an LLM compares the texts")
        return ["verifier:", *lines, *_noted(f"  {judge}", "any OpenAI-compatible endpoint")]
    if data.talk:
        told = (
            f"the expert talks in {data.talk:,} of {data.turns:,} turns: they are left out unless a judge compares them"
        )
        lines += _noted(f"  # {judge}", told)
    return ["verifier:", *lines]


def _llmdoctor(model: Model, data: Data) -> tuple[str, list[str]]:
    """(a recipe for LLMdoctor, what the user has to settle)."""
    open_points = [
        "doctor.model_name is the patient itself: a smaller model with its tokenizer is cheaper to train and to run"
    ]
    total, name = min(model.context or 4096, 4096), _scalar(model.name)
    lines = [*_head("LLMdoctor", model, data), "algorithm: llmdoctor", ""]
    lines += ["patient:  # stays as it is", *_noted(f"  model_name: {name}", _described(model))]
    if model.problem:
        open_points.append(f"patient.chat_template: {model.problem}")
    lines += [f"  max_total_sequence_length: {total}", "", "doctor:  # learns"]
    lines += _noted(f"  model_name: {name}", "better: a smaller model with the same tokenizer")
    lines += [f"  max_total_sequence_length: {total}", "", "preferences:"]
    lines += _noted(f"  files: [{_scalar(data.file)}]", _counted(data))
    lines += _unreadable(data, "preferences", open_points)
    lines += _noted("  objective: helpfulness", "what it is about; reward.positive and reward.negative say it in words")
    lines += [
        "",
        *_noted("tfpo: {anchor: reference}", "keeps the doctor's language"),
        "",
        "decode:",
        "  mode: ratio",
        "  doctors:",
    ]
    lines += [f'    helpfulness: {{path: "${{run_dir}}/doctor/policy", reference: {name}}}']
    lines += _noted("  # prompts: prompts.jsonl", "for `nemo-pivotrl decode`: one prompt a line")
    return "\n".join(lines) + "\n", open_points


def _head(algorithm: str, model: Model, data: Data) -> list[str]:
    told = (
        f"{algorithm} with {_line(model.name)} on {_line(data.file)}, as `nemo-pivotrl init` found them. Every other setting has its "
        "default: `nemo-pivotrl select THIS_FILE --print-config` shows them all with explanations."
    )
    return [*_noted("", told), f"run_dir: runs/{_scalar(Path(data.file).name.partition('.')[0] or 'mine')}", ""]


def _noted(line: str, note: str) -> list[str]:
    """A line of the recipe with its comment: behind it where both fit, else above it."""
    if line and len(line) + len(note) < WIDTH:
        return [f"{line}  # {note}"]
    indent = line[: len(line) - len(line.lstrip(" "))]
    above = textwrap.wrap(note, WIDTH - len(indent), break_long_words=False, break_on_hyphens=False)
    return [*(f"{indent}# {part}" for part in above), *([line] if line else [])]


def _described(model: Model) -> str:
    size = f"{model.parameters / 1e9:.1f} B" if model.parameters >= 1e9 else f"{model.parameters / 1e6:.1f} M"
    parts = [model.kind, f"{size} parameters"] + ([f"{model.context:,} positions"] if model.context else [])
    parts += [f"writes calls as {model.chat.parser}"] if model.chat else ["no chat template"]
    return ", ".join(parts)


def _counted(data: Data) -> str:
    if data.kind == "preferences":
        return f"format {data.format}, {data.records:,} preferences"
    tools = ", ".join(name for name, _ in data.calls.most_common(SHOWN_TOOLS)) or "none"
    more = f" and {len(data.calls) - SHOWN_TOOLS} more" if len(data.calls) > SHOWN_TOOLS else ""
    turns = f"{data.turns:,} assistant turns, {data.talk:,} of them talk"
    return f"format {data.format}, {data.records:,} trajectories, {turns}; tools: {_line(tools)}{more}"


def _rounded(tokens: float) -> int:
    return ROUND * math.ceil(tokens / ROUND)


def _line(text: str) -> str:
    """A text of the data in a comment: one line, without what ends it."""
    return short(text, 200)


def _scalar(text: str) -> str:
    """A text as a YAML value on one line."""
    import yaml

    dumped: Any = yaml.safe_dump(text, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return str(dumped).removesuffix("\n").removesuffix("\n...")
