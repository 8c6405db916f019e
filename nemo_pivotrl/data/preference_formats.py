"""One function for each format of preferences: a record -> its `Pair`.

`hh_rlhf`: transcripts, also with the prompt apart. `trl`: prompt, chosen, rejected as text or messages; the prompt may stand in
the answers alone, apart as `conversations` (LLaMA-Factory) or in `messages` (ms-swift). `nemo_aligner`: its DPO rows with
`<extra_id_n>` markers. `nemo_rl`: ranked completions. `ultrafeedback`: binarized with scores, or as published with rated
completions. `helpsteer2` (also its rating rows, two of one prompt), `helpsteer3`, `pku_saferlhf`, `openai_dpo`, `distilabel`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from nemo_pivotrl.config import Preferences
from nemo_pivotrl.core.types import Message
from nemo_pivotrl.data.readers import FieldError, check_messages


class Pair(NamedTuple):
    """What a record says, before it is known whether it is worth keeping."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str


class Skip(Exception):
    """The record is well formed and no preference; the message is the reason it is counted under."""


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
    if isinstance(value, Mapping):  # LLaMA-Factory gives a side as one turn
        value = [value]
    if not isinstance(value, list):
        raise FieldError(field, value, "a list of chat messages")
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
    more = record.get("input") if name == "instruction" else None
    text = f"{value}\n{more}" if isinstance(more, str) and more.strip() else value
    return _prompt((*_history(record), {"role": "user", "content": text}), name)


def _history(record: Mapping[str, Any]) -> Iterator[Message]:
    """Earlier turns of an Alpaca row: pairs of a question and its answer."""
    history = record.get("history")
    for index, pair in enumerate(history if isinstance(history, list) else []):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise FieldError(f"history[{index}]", pair, "a question and its answer")
        yield {"role": "user", "content": pair[0]}
        yield {"role": "assistant", "content": pair[1]}


def _last_turn(messages: tuple[Message, ...], field: str) -> str:
    """The text of the assistant turn that ends `messages`."""
    if not messages or messages[-1]["role"] != "assistant":
        found = messages[-1] if messages else "no messages"
        raise FieldError(field, found, "the messages end with the assistant turn that is judged")
    if messages[-1].get("tool_calls") or messages[-1].get("reasoning_content"):
        raise Skip("answer_is_not_plain_text")
    return str(messages[-1]["content"])


SCORES = (
    *(("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen-rating", "rejected-rating")),
    *(("chosen_rating", "rejected_rating"), ("chosen_reward", "rejected_reward")),
)
"""Scores of both answers, as sets name them."""


def _skip_ties(record: Mapping[str, Any]) -> None:
    """Scores, where there are some, must prefer the chosen answer."""
    if record.get("status") == "tie":
        raise Skip("tie")
    for chosen, rejected in SCORES:
        if record.get(chosen) is None or record.get(rejected) is None:
            continue
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


PROMPTS = ("prompt", "question", "instruction", "input", "query", "conversations", "conversation", "messages")
"""Where a row of two answers keeps what they answer."""


def read_trl(record: dict[str, Any], settings: Preferences) -> Pair:
    """`prompt`, `chosen`, `rejected` as text or messages. Answers as messages may repeat the prompt or stand for it."""
    _skip_ties(record)
    record = _of_ms_swift(record)
    name = next((n for n in PROMPTS if record.get(n) is not None), None)
    names = ("chosen_messages", "rejected_messages") if "chosen_messages" in record else ("chosen", "rejected")
    sides: dict[str, tuple[Message, ...]] = {}
    for side in names:
        value = _field(record, side)[1]
        if isinstance(value, str):
            if name is None:
                hh = "transcripts of Human and Assistant are preferences.format=hh_rlhf"
                raise FieldError("prompt", "missing", f"answers given as text need `prompt`; {hh}")
            sides[side] = ({"role": "assistant", "content": value},)
        elif isinstance(value, list) or (isinstance(value, dict) and {"role", "from"} & value.keys()):
            sides[side] = _conversation(value, side)
        else:
            raise FieldError(side, value, f"`{side}` must be text or a list of chat messages")
    answers = [_last_turn(sides[side], side) for side in names]
    shared, other = sides[names[0]][:-1], sides[names[1]][:-1]
    if shared != other:
        raise Skip("different_prompts")
    if any(m["role"] == "user" for m in shared) or name is None:
        return Pair(_prompt(shared, names[0]), *answers)
    if shared:
        raise FieldError(
            names[0], shared[0], "turns before the answer either hold the whole prompt or stand in `prompt`"
        )
    return Pair(_prompt_field(record, name), *answers)


def _of_ms_swift(record: dict[str, Any]) -> dict[str, Any]:
    """ms-swift: `messages` end with the chosen answer; the other one stands in `rejected_response` or `rejected_messages`."""
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages or "chosen" in record:
        return record
    for name in ("rejected_response", "rejected_messages"):
        rejected = record.get(name)
        if isinstance(rejected, list) and len(rejected) > 1 and all(isinstance(text, str) for text in rejected):
            raise FieldError(name, f"{len(rejected)} answers", "one rejected answer a record; write a record for each")
        if isinstance(rejected, list) and rejected and isinstance(rejected[0], str):
            rejected = rejected[0]
        if rejected is not None:
            rest = {k: v for k, v in record.items() if k not in ("messages", name)}
            prompt = {} if name == "rejected_messages" else {"prompt": messages[:-1]}
            chosen = messages if name == "rejected_messages" else messages[-1:]
            return {**rest, **prompt, "chosen": chosen, "rejected": rejected}
    return record


def read_openai_dpo(record: dict[str, Any], settings: Preferences) -> Pair:
    """OpenAI's: `input.messages`, `preferred_output`, `non_preferred_output`."""
    request = _field(record, "input")[1]
    if not isinstance(request, dict):
        raise FieldError("input", request, "an object with `messages`")
    refuse_columns(request, "input.")
    prompt = _prompt(_conversation(_field(request, "messages")[1], "input.messages"), "input.messages")
    names = ("preferred_output", "non_preferred_output")
    answers = [_last_turn(_conversation(_field(record, n)[1], n), n) for n in names]
    return Pair(prompt, *answers)


def read_ultrafeedback(record: dict[str, Any], settings: Preferences) -> Pair:
    """`chosen` and `rejected` as whole conversations, with scores; or as published: `instruction` and rated `completions`, of
    which the best and the worst make the pair."""
    if isinstance(record.get("completions"), list) and "chosen" not in record:
        rated = [(_rating(c, f"completions[{i}]"), c) for i, c in enumerate(record["completions"])]
        return _best_and_worst(record, [(score, _string(c, "response")) for score, c in rated])
    return read_trl(record, settings)


ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")


def _rating(completion: Any, field: str) -> float:
    """The mean of the four aspects' ratings, as the binarized sets take it; else the published total."""
    if not isinstance(completion, dict):
        raise FieldError(field, completion, "a completion: response and ratings")
    annotations = completion.get("annotations")
    if isinstance(annotations, dict):
        ratings = [_float(a.get("Rating")) for a in map(annotations.get, ASPECTS) if isinstance(a, dict)]
        known = [r for r in ratings if r is not None]
        if known and len(known) == len(ratings):
            return sum(known) / len(known)
    for name in ("fine-grained_score", "overall_score"):
        value = _float(completion.get(name))
        if value is not None:
            return value
    raise FieldError(
        field, list(completion), "a completion needs ratings: annotations, fine-grained_score or overall_score"
    )


def _float(value: Any) -> float | None:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300  # not nan, not inf
    return float(value) if known else None


def _best_and_worst(record: Mapping[str, Any], scored: Sequence[tuple[float, str]]) -> Pair:
    if len(scored) < 2:
        raise Skip("one_answer")
    best, worst = max(scored, key=lambda s: s[0]), min(scored, key=lambda s: s[0])
    if best[0] == worst[0]:
        raise Skip("tie")
    return Pair(_prompt_field(dict(record), *PROMPTS), best[1], worst[1])


def read_distilabel(record: dict[str, Any], settings: Preferences) -> Pair:
    """`generations` with `ratings`: the best and the worst make the pair."""
    texts, ratings = _field(record, "generations")[1], _field(record, "ratings", "rating")[1]
    if not isinstance(texts, list) or not isinstance(ratings, list) or len(texts) != len(ratings):
        raise FieldError("ratings", ratings, "a rating for each of `generations`")
    scores = [_float(r) for r in ratings]
    known = [(s, t) for s, t in zip(scores, texts, strict=True) if s is not None and isinstance(t, str)]
    if len(known) < len(texts):
        raise Skip("unrated_answer")
    return _best_and_worst(record, known)


def read_nemo_rl(record: dict[str, Any], settings: Preferences) -> Pair:
    """`context` as messages and `completions` with a `rank`, the lowest of which is best."""
    scored = []
    completions = _field(record, "completions")[1]
    if not isinstance(completions, list):
        raise FieldError("completions", completions, "a list of {rank, completion}")
    for index, completion in enumerate(completions):
        at = f"completions[{index}]"
        rank = completion.get("rank") if isinstance(completion, dict) else None
        if isinstance(rank, str) or _float(rank) is None:
            raise FieldError(f"{at}.rank", rank, "a number; the lowest is best")
        said = _conversation(_field(completion, "completion")[1], f"{at}.completion")
        scored.append((-float(rank), _last_turn(said, f"{at}.completion")))
    return _best_and_worst({"prompt": _field(record, "context")[1]}, scored)


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
    _skip_ties(record)
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
    """`prompt`, `response_1`, `response_2`, `preference_strength`; several turns of a prompt carry `<extra_id_1>`.

    Rating rows come in twos of one prompt (`with_rating_rows`): the more helpful answer is chosen.
    """
    if "helpfulness" in record and "response_1" not in record:
        raise Skip("rating_without_another")
    answers = _string(record, "response_1"), _string(record, "response_2")
    return _by_strength(record, "preference_strength", _prompt_field(record, "prompt"), *answers)


ROWS = "rows of the file that this record was made of"


def with_rating_rows(records: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    """The records, two rating rows of HelpSteer2 that follow each other and share their prompt made one."""
    waiting: tuple[int, Any] | None = None
    for line, record in records:
        rated = isinstance(record, dict) and "response" in record and _float(record.get("helpfulness")) is not None
        if waiting is not None:
            if rated and record.get("prompt") == waiting[1].get("prompt"):
                yield waiting[0], _joined(waiting[1], record)
                waiting = None
                continue
            yield waiting
            waiting = None
        if rated:
            waiting = (line, record)
        else:
            yield line, record
    if waiting is not None:
        yield waiting


def _joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    difference = float(second["helpfulness"]) - float(first["helpfulness"])
    strength = int(max(-3.0, min(3.0, difference)))
    return {
        "prompt": first["prompt"],
        "response_1": first["response"],
        "response_2": second["response"],
        "preference_strength": strength if strength or not difference else (1 if difference > 0 else -1),
        ROWS: 2,
    }


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


PLAIN = (
    "a preference has a prompt and two answers as text; drop the column if it does not matter, or leave the rows out"
)


def refuse_columns(record: Mapping[str, Any], within: str = "") -> None:
    """Raises FieldError for a column that changes the prompt and that no preference can hold."""
    for name in ("tools", "functions", "images", "image", "videos", "audios", "documents", "chat_template_kwargs"):
        value = record.get(name)
        if value and not (isinstance(value, (list, dict)) and not any(value)) and value not in ("[]", "{}"):
            raise FieldError(within + name, value, PLAIN)


def with_system(record: Mapping[str, Any], pair: Pair) -> Pair:
    """The pair with the `system` column as its first turn. Raises FieldError for one that is no text."""
    system = next((record[n] for n in ("system", "system_prompt") if record.get(n)), None)
    if system is None:
        return pair
    if not isinstance(system, str):
        raise FieldError("system", system, "the system prompt as text")
    first = pair.prompt[0]
    if first["role"] in ("system", "developer"):
        if system.strip() in first["content"]:
            return pair
        return pair._replace(prompt=({**first, "content": f"{system}\n\n{first['content']}"}, *pair.prompt[1:]))
    return pair._replace(prompt=({"role": "system", "content": system}, *pair.prompt)) if system.strip() else pair


READERS: dict[str, Callable[[dict[str, Any], Preferences], Pair]] = {
    "hh_rlhf": read_hh_rlhf,
    "trl": read_trl,
    "nemo_aligner": read_nemo_aligner,
    "nemo_rl": read_nemo_rl,
    "ultrafeedback": read_ultrafeedback,
    "helpsteer2": read_helpsteer2,
    "helpsteer3": read_helpsteer3,
    "pku_saferlhf": read_pku_saferlhf,
    "openai_dpo": read_openai_dpo,
    "distilabel": read_distilabel,
}
REFUSED = {
    "kto": "a KTO row: one answer with a label; it has no other to compare with. Pair the answers of one prompt first",
    "reward_model": "a row of a reward model's training (text, label); give pairs: prompt, chosen, rejected",
    "trajectory": "an agent's trajectory; `nemo-pivotrl extract` reads it (extract.trajectories)",
    "prompts": "a prompt without answers; `nemo-pivotrl rank` makes and ranks answers",
}
"""Formats that are known and not read, and what to do."""


def format_of(record: Any) -> str:
    """The name of a record's format: a key of READERS or of REFUSED, '' for an unknown one."""
    if not isinstance(record, Mapping):
        return ""
    return next((name for name, fits in _LOOKS if fits(record)), "")


def _has(*names: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda record: all(name in record for name in names)


def _transcripts(record: Mapping[str, Any]) -> bool:
    sides = [record.get(n) for n in ("chosen", "rejected")]
    prompt = record.get("prompt")
    if not all(isinstance(side, str) for side in sides):
        return False
    if isinstance(prompt, str):
        return prompt.lstrip().startswith("Human:")
    return prompt is None and all(
        "Human:" in side[:40] and "Assistant:" in side for side in sides if isinstance(side, str)
    )


_LOOKS: tuple[tuple[str, Callable[[Mapping[str, Any]], bool]], ...] = (
    ("openai_dpo", _has("preferred_output", "non_preferred_output")),
    ("nemo_rl", _has("context", "completions")),
    ("nemo_aligner", _has("chosen_response", "rejected_response")),
    ("helpsteer2", _has("response_1", "response_2", "preference_strength")),
    ("helpsteer2", _has("prompt", "response", "helpfulness")),
    ("helpsteer3", _has("response1", "response2", "overall_preference")),
    ("pku_saferlhf", _has("response_0", "response_1", "better_response_id")),
    ("pku_saferlhf", _has("response_0", "response_1", "safer_response_id")),
    ("hh_rlhf", _transcripts),
    ("ultrafeedback", lambda r: isinstance(r.get("completions"), list) and "instruction" in r),
    ("ultrafeedback", _has("chosen", "rejected", "score_chosen", "score_rejected")),
    ("trl", _has("chosen", "rejected")),
    ("trl", _has("chosen_messages", "rejected_messages")),
    ("trl", lambda r: "messages" in r and ("rejected_response" in r or "rejected_messages" in r)),
    ("distilabel", lambda r: "generations" in r and ("ratings" in r or "rating" in r)),
    ("kto", _has("prompt", "completion", "label")),
    ("reward_model", _has("text", "label")),
    ("trajectory", lambda r: any(key in r for key in ("messages", "conversations", "responses_create_params", "traj"))),
    ("prompts", lambda r: list(r) == ["prompt"]),
)
"""In this order: the first that fits is the format."""
