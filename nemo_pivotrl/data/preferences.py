"""Outside preference formats -> `Preference`. One function a format, all errors of all files in one go.

A record that is malformed is an error. One that is well formed but prefers nothing (a tie, twice the same answer, an
empty answer) or that two answers to one prompt cannot express is skipped and counted under a reason; so are repeats.
Formats: `hh_rlhf` (transcripts, also with the prompt apart), `trl` (prompt, chosen, rejected as text or messages),
`nemo_aligner` (its DPO rows, `<extra_id_n>` markers), `ultrafeedback` (messages with scores), `helpsteer2`,
`helpsteer3`, `pku_saferlhf`.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nemo_pivotrl.config import Preferences
from nemo_pivotrl.core.artifacts import digest
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.core.types import Message, Preference
from nemo_pivotrl.data.readers import FieldError, check_messages, read_records


class Pair(NamedTuple):
    """What a record says, before it is known whether it is worth keeping."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str


class Skip(Exception):
    """The record is well formed and no preference; the message is the reason it is counted under."""


class Found(NamedTuple):
    """Everything read."""

    preferences: list[Preference]
    """All of split `train`: splitting is the stage's business."""
    records: int
    skipped: Counter[str]
    contradictions: int
    """Kept pairs that another kept pair states the other way round."""


def read_preferences(settings: Preferences) -> Found:
    """The preferences of all files, each pair once. Raises InputError listing every bad record of every file."""
    problems: list[Problem] = []
    sources = [(settings.objective, path) for path in settings.files]
    sources += [(objective, path) for objective, paths in settings.objectives.items() for path in paths]
    if not sources:
        raise InputError(Problem("recipe", None, "preferences.files", "nothing", "name at least one preference file"))
    kept: dict[str, Preference] = {}
    skipped: Counter[str] = Counter()
    records = 0
    for objective, path in sources:
        before = records + len(problems)
        for line, record in [] if _is_parquet(path, problems) else _read(path, problems):
            records += 1
            try:
                if not isinstance(record, dict):
                    raise FieldError("record", record, "each record is a JSON object")
                pair = READERS[settings.format](record, settings)
                preference = _preference(pair, objective, f"{path}:{line}")
            except FieldError as error:
                problems.append(Problem(path, line, error.field, error.found, error.remedy))
            except Skip as reason:
                skipped[str(reason)] += 1
            else:
                if kept.setdefault(preference.preference_id, preference) is not preference:
                    skipped["duplicate"] += 1
        if records + len(problems) == before:
            remedy = "the file is empty; check the path or drop it from the recipe"
            problems.append(Problem(path, None, "file", "no records", remedy))
    if problems:
        raise InputError(problems)
    found = list(kept.values())
    contradictions = sum(_identity(p.objective, Pair(p.prompt, p.rejected, p.chosen)) in kept for p in found)
    assert len(found) + skipped.total() == records, "a record is neither kept nor counted"
    return Found(found, records, skipped, contradictions)


def preference_to_row(preference: Preference) -> dict[str, Any]:
    """The preference as an artefact's row."""
    return {f.name: getattr(preference, f.name) for f in dataclasses.fields(preference)}


def preference_of_row(row: dict[str, Any]) -> Preference:
    """The preference of a row that `preference_to_row` wrote."""
    return Preference(**{**row, "prompt": tuple(row["prompt"])})


def prompt_digest(preference: Preference) -> str:
    """Equal for pairs with the same prompt: what the split goes by."""
    return digest(list(preference.prompt))


def _read(path: str, problems: list[Problem]) -> Any:
    return read_records(Path(path), problems, "preferences.files")


def _is_parquet(path: str, problems: list[Problem]) -> bool:
    if not Path(path).is_file():
        return False
    with Path(path).open("rb") as handle:
        parquet = handle.read(4) == b"PAR1"
    if parquet:
        remedy = "export it as JSON lines first (`to_json` of a datasets.Dataset)"
        problems.append(Problem(path, None, "file", "a Parquet file", remedy))
    return parquet


def _identity(objective: str, pair: Pair) -> str:
    return digest([objective, list(pair.prompt), pair.chosen, pair.rejected])


def _preference(pair: Pair, objective: str, source: str) -> Preference:
    if not pair.chosen.strip() or not pair.rejected.strip():
        raise Skip("empty_answer")
    if pair.chosen.strip() == pair.rejected.strip():
        raise Skip("identical_answers")
    return Preference(_identity(objective, pair), "train", objective, pair.prompt, pair.chosen, pair.rejected, source)


# ---- fields ----


def _field(record: dict[str, Any], *names: str) -> tuple[str, Any]:
    """The first of `names` that the record has, with its value."""
    for name in names:
        if record.get(name) is not None:
            return name, record[name]
    raise FieldError(names[0], "missing", f"a record of this format needs {' or '.join(f'`{n}`' for n in names)}")


def _string(record: dict[str, Any], *names: str) -> str:
    name, value = _field(record, *names)
    if not isinstance(value, str):
        raise FieldError(name, value, f"`{name}` must be text")
    return value


def _prompt(messages: Sequence[Message], field: str) -> tuple[Message, ...]:
    """The prompt as a state that an assistant turn can follow."""
    kept = tuple(m for m in messages if not (m["role"] in ("system", "developer") and not m["content"].strip()))
    if not any(m["role"] == "user" and m["content"].strip() for m in kept):
        raise FieldError(field, list(messages), "a prompt needs a user turn with text")
    if kept[-1]["role"] not in ("user", "tool"):
        raise FieldError(field, kept[-1], "a prompt ends with the turn that is answered: a user or tool turn")
    return kept


def _conversation(value: Any, field: str) -> tuple[Message, ...]:
    try:
        return check_messages(value)
    except FieldError as error:
        raise FieldError(error.field.replace("messages", field, 1), error.found, error.remedy) from None


def _prompt_field(record: dict[str, Any], *names: str) -> tuple[Message, ...]:
    """A prompt given as messages, as text with `<extra_id_n>` markers, or as the text of one user turn."""
    name, value = _field(record, *names)
    if isinstance(value, list):
        return _prompt(_conversation(value, name), name)
    if not isinstance(value, str):
        raise FieldError(name, value, f"`{name}` must be text or a list of chat messages")
    if "<extra_id_" in value:
        return _prompt(_extra_id_turns(value, name), name)
    if value.lstrip().startswith("Human:"):
        raise FieldError(name, value, "a Human/Assistant transcript; set preferences.format=hh_rlhf")
    return _prompt(({"role": "user", "content": value},), name)


def _last_turn(messages: tuple[Message, ...], field: str) -> str:
    """The text of the assistant turn that ends `messages`."""
    if not messages or messages[-1]["role"] != "assistant":
        found = messages[-1] if messages else "no messages"
        raise FieldError(field, found, "the messages end with the assistant turn that is judged")
    if messages[-1].get("tool_calls") or messages[-1].get("reasoning_content"):
        raise Skip("answer_is_not_plain_text")
    return str(messages[-1]["content"])


def _skip_tie(record: dict[str, Any], chosen: str, rejected: str) -> None:
    """Scores, where there are some, must prefer the chosen answer."""
    if record.get(chosen) is None or record.get(rejected) is None:
        return
    for name in (chosen, rejected):
        if isinstance(record[name], bool) or not isinstance(record[name], (int, float)):
            raise FieldError(name, record[name], "a number, or leave both scores out")
    if record[chosen] == record[rejected]:
        raise Skip("tie")
    if not record[chosen] > record[rejected]:
        found = f"{record[chosen]}, below {rejected} {record[rejected]}"
        raise FieldError(chosen, found, "the scores contradict the label; mend the row, or leave both scores out")


# ---- formats ----

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def _hh_turns(text: str, field: str) -> tuple[Message, ...]:
    start, *rest = _HH_TURN.split("\n\n" + text.lstrip())
    if start or not rest:
        raise FieldError(field, text, 'a transcript begins with "\\n\\nHuman: "')
    roles = ["user" if speaker == "Human" else "assistant" for speaker in rest[::2]]
    return tuple({"role": r, "content": c.strip()} for r, c in zip(roles, rest[1::2], strict=True))


def read_hh_rlhf(record: dict[str, Any], settings: Preferences) -> Pair:
    """Transcripts `chosen` and `rejected` that share all turns but the last; `prompt` may hold the shared part."""
    prefix = _string(record, "prompt") if record.get("prompt") is not None else ""
    sides: dict[str, tuple[Message, ...]] = {}
    for name in ("chosen", "rejected"):
        text = _string(record, name)
        sides[name] = _hh_turns(text if text.startswith(prefix) else prefix + text, name)
    if sides["chosen"][:-1] != sides["rejected"][:-1]:
        raise Skip("different_prompts")
    if any(side[-1]["role"] != "assistant" for side in sides.values()):
        raise Skip("no_answer")
    prompt = sides["chosen"][:-1]
    if not prompt or prompt[-1]["role"] != "user":
        raise Skip("answer_to_no_question")
    return Pair(_prompt(prompt, "chosen"), sides["chosen"][-1]["content"], sides["rejected"][-1]["content"])


def read_trl(record: dict[str, Any], settings: Preferences) -> Pair:
    """`prompt`, `chosen`, `rejected` as text or messages. Answers as messages may repeat the prompt or stand for it."""
    sides: dict[str, tuple[Message, ...]] = {}
    for name in ("chosen", "rejected"):
        value = _field(record, name)[1]
        if isinstance(value, str):
            if record.get("prompt") is None:
                hh = "transcripts of Human and Assistant are preferences.format=hh_rlhf"
                raise FieldError("prompt", "missing", f"answers given as text need `prompt`; {hh}")
            sides[name] = ({"role": "assistant", "content": value},)
        elif isinstance(value, list):
            sides[name] = _conversation(value, name)
        else:
            raise FieldError(name, value, f"`{name}` must be text or a list of chat messages")
    answers = [_last_turn(sides[name], name) for name in ("chosen", "rejected")]
    shared, other = sides["chosen"][:-1], sides["rejected"][:-1]
    if shared != other:
        raise Skip("different_prompts")
    if record.get("prompt") is None or any(m["role"] == "user" for m in shared):
        return Pair(_prompt(shared, "chosen"), *answers)
    if shared:
        raise FieldError(
            "chosen", shared[0], "turns before the answer either hold the whole prompt or stand in `prompt`"
        )
    return Pair(_prompt_field(record, "prompt"), *answers)


def read_ultrafeedback(record: dict[str, Any], settings: Preferences) -> Pair:
    """`chosen` and `rejected` as whole conversations, with `score_chosen` and `score_rejected`."""
    _skip_tie(record, "score_chosen", "score_rejected")
    return read_trl(record, settings)


_EXTRA_ID = re.compile(r"<extra_id_(\d+)>")


def _extra_id_turns(text: str, field: str) -> tuple[Message, ...]:
    """Turns of NVIDIA's marker form. Text before the first marker is a user turn; an opened, empty answer is dropped."""
    start, *rest = _EXTRA_ID.split(text)
    turns: list[Message] = [{"role": "user", "content": start.strip()}] if start.strip() else []
    for number, body in zip(rest[::2], rest[1::2], strict=True):
        name, _, content = body.partition("\n")
        role = {"0System": "system", "1User": "user", "1Assistant": "assistant"}.get(number + name.strip())
        if role is None:
            remedy = (
                "known are <extra_id_0>System, <extra_id_1>User and <extra_id_1>Assistant, each before a line break"
            )
            raise FieldError(field, f"<extra_id_{number}>{body}", remedy)
        turns.append({"role": role, "content": content.strip()})
    if turns and turns[-1] == {"role": "assistant", "content": ""}:
        turns.pop()
    return tuple(turns)


def read_nemo_aligner(record: dict[str, Any], settings: Preferences) -> Pair:
    """`prompt`, `chosen_response`, `rejected_response`, the answers ending with `<extra_id_1>`; rewards are optional."""
    _skip_tie(record, "chosen_reward", "rejected_reward")
    answers = [_EXTRA_ID.split(_string(record, name))[0] for name in ("chosen_response", "rejected_response")]
    return Pair(_prompt_field(record, "prompt"), answers[0].strip(), answers[1].strip())


def _by_strength(record: dict[str, Any], name: str, prompt: tuple[Message, ...], first: str, second: str) -> Pair:
    """Negative: the first answer is better; positive: the second; 0: a tie."""
    strength = _field(record, name)[1]
    if isinstance(strength, bool) or strength not in (-3, -2, -1, 0, 1, 2, 3):
        raise FieldError(name, strength, "a whole number from -3 (first answer much better) to 3 (second much better)")
    if strength == 0:
        raise Skip("tie")
    return Pair(prompt, first, second) if strength < 0 else Pair(prompt, second, first)


def read_helpsteer2(record: dict[str, Any], settings: Preferences) -> Pair:
    """`prompt`, `response_1`, `response_2`, `preference_strength`; several turns of a prompt carry `<extra_id_1>`."""
    answers = _string(record, "response_1"), _string(record, "response_2")
    return _by_strength(record, "preference_strength", _prompt_field(record, "prompt"), *answers)


def read_helpsteer3(record: dict[str, Any], settings: Preferences) -> Pair:
    """`context`, `response1`, `response2`, `overall_preference`."""
    answers = _string(record, "response1"), _string(record, "response2")
    return _by_strength(record, "overall_preference", _prompt_field(record, "context"), *answers)


def read_pku_saferlhf(record: dict[str, Any], settings: Preferences) -> Pair:
    """`prompt`, `response_0`, `response_1`; `preferences.better_by` names the label that decides."""
    better = _field(record, settings.better_by)[1]
    if isinstance(better, bool) or better not in (0, 1):
        raise FieldError(settings.better_by, better, "0 or 1: the number of the better answer")
    answers = _string(record, "response_0"), _string(record, "response_1")
    return Pair(_prompt_field(record, "prompt"), answers[int(better)], answers[1 - int(better)])


READERS: dict[str, Callable[[dict[str, Any], Preferences], Pair]] = {
    "hh_rlhf": read_hh_rlhf,
    "trl": read_trl,
    "nemo_aligner": read_nemo_aligner,
    "ultrafeedback": read_ultrafeedback,
    "helpsteer2": read_helpsteer2,
    "helpsteer3": read_helpsteer3,
    "pku_saferlhf": read_pku_saferlhf,
}
