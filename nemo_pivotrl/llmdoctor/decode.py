"""decode: prompts -> answers of a patient steered by doctors, with what guidance did to every token.

A line of the prompts file is a text, a list of chat messages, or an object: `prompt` or `messages` (and `tools`), and if
wanted an `id`, an `alpha`, and `beta` by doctor, which replace the recipe's. Texts go to every model as they are;
messages through each model's own chat template, without a face prompt (D17).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from nemo_pivotrl.backends.adapters import doctor_files, is_adapter
from nemo_pivotrl.backends.base import require_checkpoint
from nemo_pivotrl.backends.identity import policy_revision
from nemo_pivotrl.backends.loading import load_guided_engine
from nemo_pivotrl.backends.reference.guided import (
    Guided,
    GuidedSamplingParams,
    Span,
    Token,
    load_guided,
)
from nemo_pivotrl.components.durable_map import Found, Map, Tally, batches_of, found_rows
from nemo_pivotrl.components.rollout import sample_seed
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.artifacts import Header, digest, file_digest, read_rows
from nemo_pivotrl.core.errors import InputError, NotFiniteError, Problem, UnrenderableState, short
from nemo_pivotrl.core.lock import one_writer
from nemo_pivotrl.core.types import FailedSample
from nemo_pivotrl.data.chat_template import Chat, load_tokenizer
from nemo_pivotrl.llmdoctor.reward import load_patient_chat
from nemo_pivotrl.sizing import hf_folder

FIGURES = ("log_prob", "patient_log_prob", "mixed_log_prob", "kl")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One line of the prompts file."""

    prompt_id: str
    content: str | tuple[dict[str, Any], ...]
    """A text, or chat messages."""
    tools: tuple[dict[str, Any], ...]
    alpha: float
    beta: Mapping[str, float]
    line: int


class Generator(Protocol):
    """What decodes: the reference backend, or vLLM here or on servers."""

    def check(
        self,
        prompts: Sequence[Sequence[int]],
        requests: Sequence[GuidedSamplingParams],
        own_prompts: Sequence[OwnPrompts] | None,
    ) -> None:
        """Raises InputError for a request that cannot be decoded, naming it."""
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        requests: Sequence[GuidedSamplingParams],
        own_prompts: Sequence[OwnPrompts] | None,
    ) -> Sequence[Guided | FailedSample]:
        """One answer for each prompt (token ids), under its own request; `FailedSample` for one that no server gave."""
        ...


OwnPrompts = Mapping[str, Sequence[int]]
Rendered = tuple[list[int], dict[str, list[int]]]
"""A prompt's token ids, and those of doctors that read another prompt."""


@one_writer
def decode(recipe: Recipe, fresh: bool = False) -> Path:
    """Write the decoded artefact and print what guidance changed. Raises InputError for what cannot be decoded.

    >>> path = decode(load_recipe("llmdoctor.yaml", ["decode.prompts=prompts.jsonl", "decode.max_new_tokens=8"]))
    >>> path.name
    'decoded.jsonl'
    """
    settings = recipe.decode
    if not settings.prompts:
        problem = Problem("recipe", None, "decode.prompts", "nothing", "give a JSONL file, one prompt a line")
        raise InputError(problem)
    prompts = read_prompts(Path(settings.prompts), recipe)
    header, path, tally = _header(recipe, load_patient_chat(recipe.patient)), recipe.path(settings.output), Tally()
    size = max(1, settings.answers_per_wave // settings.num_samples)
    waves = partial(batches_of, range(len(prompts)), size, tally)
    make = partial(Decoder, recipe, prompts)
    Map(recipe, "decode", path, header, waves, make, len(prompts), "prompt", tally).run(fresh)
    rows = list(read_rows(path))
    tokens = sum(len(r["token_ids"]) for r in rows)
    if tokens:
        kl, changed = (sum(r[key] * len(r["token_ids"]) for r in rows) / tokens for key in ("kl", "changed"))
        print(f"{len(rows)} answers, {tokens} tokens: KL {kl:.4f} nats a token, {changed:.1%} of the tokens changed")
    return path


def load(recipe: Recipe) -> tuple[Chat, Generator, dict[str, Chat]]:
    """The patient's template, what decodes, and the templates of doctors whose own is another.

    `patient.backend: vllm` puts the patient into vLLM and the doctors into its sampler; raises InputError where it is missing.
    """
    chat, settings = load_patient_chat(recipe.patient), recipe.decode
    if recipe.patient.backend == "vllm":
        rest = chat.tokenizer, chat.stop_ids, _spans(recipe, chat)
        return chat, load_guided_engine(recipe.patient, settings, recipe.vllm, *rest), _own_chats(recipe, chat)
    generator = load_guided(
        recipe.patient.model_name,
        settings.doctors,
        settings.mode,
        recipe.patient.dtype,
        recipe.patient.device,
        tokenizer=chat.tokenizer,
        stop_ids=chat.stop_ids,
        spans=_spans(recipe, chat),
        min_entropy=settings.min_entropy,
        batch_tokens=settings.batch_tokens,
        where="decode",
    )
    return chat, generator, _own_chats(recipe, chat)


def _spans(recipe: Recipe, chat: Chat) -> list[Span]:
    named = [Span(*chat.markers(piece)) for piece in recipe.decode.guidance_off]
    return named + [Span(start, end) for start, end in recipe.decode.off_markers.items()]


def _own_chats(recipe: Recipe, chat: Chat) -> dict[str, Chat]:
    own = {}
    for name, doctor in recipe.decode.doctors.items():
        folder = doctor_files(doctor, recipe.decode.mode, f"decode.doctors.{name}").tokenizer
        if _template(folder) not in (None, chat.tokenizer.chat_template):
            tokenizer, patient = load_tokenizer(folder), recipe.patient
            own[name] = Chat(tokenizer, "hermes", patient.template_kwargs, settings=patient.chat, section="patient")
    return own


def _template(folder: str) -> str | None:
    return hf_folder.load_tokenizer(folder, "decode.doctors").chat_template


def prompt_ids(
    content: str | Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], chat: Chat, own_chats: Mapping[str, Chat]
) -> Rendered:
    """Token ids for the patient, and for each doctor whose prompt is another one.

    Raises InputError for what no template renders or no tokenizer encodes.
    """
    if isinstance(content, str):
        chat.encode(content)  # refuses what cannot be encoded; the tokenizer's own first token is wanted, too
        return chat.tokenizer.encode(content), {}
    own = {name: other.prompt_ids(content, tools) for name, other in own_chats.items()}
    return chat.prompt_ids(content, tools), own


def _header(recipe: Recipe, chat: Chat) -> Header:
    settings = asdict(recipe.decode)
    kept = {k: v for k, v in settings.items() if k not in ("prompts", "output", "doctors")}
    doctors = {}
    for name, doctor in recipe.decode.doctors.items():
        field, mode = f"decode.doctors.{name}", recipe.decode.mode
        if not is_adapter(doctor.path):
            require_checkpoint(f"{field}.path", doctor.path, "give the folder of a trained doctor")
        files = doctor_files(doctor, mode, field)
        reference = policy_revision(files.reference) if mode == "ratio" else ""
        doctors[name] = {"beta": doctor.beta, "revision": files.revision, "reference": reference}
    return Header(
        stage="decoded",
        config_hash=digest([recipe.seed, recipe.patient.dtype, kept]),
        parent=file_digest(Path(recipe.decode.prompts)),
        tokenizer=chat.fingerprint,
        chat_template=chat.template_digest,
        policy=policy_revision(recipe.patient.model_name),
        extra={"doctors": doctors},
        settings=recipe.told("decode", "patient.dtype", "patient.chat_template", "patient.template_kwargs"),
    )


class Decoder:
    """A generator with everything that it is asked. Raises InputError naming every line that no model can read."""

    def __init__(self, recipe: Recipe, prompts: Sequence[Prompt]):
        self.recipe, self.prompts = recipe, prompts
        self.chat, self.generator, own_chats = load(recipe)
        self.rendered = _render_all(recipe, prompts, self.chat, self.generator, own_chats)

    def __call__(self, places: Sequence[int]) -> Found:
        """The answers to a wave of prompts. Waves begin at fixed places, so one that is done again is the same."""
        wave = [(self.prompts[place], self.rendered[place]) for place in places]
        rows = _decode_wave(self.recipe, wave, self.chat, self.generator)
        return found_rows(rows, answers=len(rows), tokens_generated=sum(len(row["token_ids"]) for row in rows))


def _decode_wave(
    recipe: Recipe, wave: Sequence[tuple[Prompt, Rendered]], chat: Chat, generator: Generator
) -> list[dict[str, Any]]:
    samples = [(prompt, k, text) for prompt, text in wave for k in range(recipe.decode.num_samples)]
    requests = [_steering(recipe, prompt, k) for prompt, k, _ in samples]
    answers = _answers(generator, [text for *_, text in samples], requests)
    return [
        _row(prompt, k, request, answer, chat, recipe.decode.token_records)
        if isinstance(answer, Guided)
        else _lost_row(prompt, k, request, answer)
        for (prompt, k, _), request, answer in zip(samples, requests, answers, strict=True)
    ]


def _answers(
    generator: Generator, texts: Sequence[Rendered], requests: Sequence[GuidedSamplingParams]
) -> list[Guided | FailedSample]:
    """An answer to each text. Where logits are no numbers each is asked for again alone, and then it is `FailedSample`."""
    try:
        return list(generator.generate([own for own, _ in texts], requests, [others for _, others in texts]))
    except NotFiniteError as error:
        if len(texts) == 1:
            return [FailedSample("sampler_not_finite", short(error.problems[0].found))]
    return [
        answer
        for text, request in zip(texts, requests, strict=True)
        for answer in _answers(generator, [text], [request])
    ]


def _lost_row(prompt: Prompt, sample: int, request: GuidedSamplingParams, lost: FailedSample) -> dict[str, Any]:
    """What stands for an answer that could not be computed: it has no text and no figures."""
    row = {"id": prompt.prompt_id, "sample": sample, "text": "", "finish_reason": "failed", "failure": lost.kind}
    return row | {"token_ids": [], "alpha": request.alpha, "beta": dict(request.beta), "seed": request.seed}


def _steering(recipe: Recipe, prompt: Prompt, sample: int) -> GuidedSamplingParams:
    s = recipe.decode
    return GuidedSamplingParams(
        alpha=prompt.alpha,
        beta=prompt.beta,
        temperature=s.temperature,
        top_k=s.top_k,
        top_p=s.top_p,
        max_new_tokens=s.max_new_tokens,
        seed=sample_seed("decode", recipe.seed, prompt.prompt_id, sample),
    )


def _render_all(
    recipe: Recipe,
    prompts: Sequence[Prompt],
    chat: Chat,
    generator: Generator,
    own_chats: Mapping[str, Chat],
) -> list[Rendered]:
    """Every prompt's token ids. Raises InputError naming every line that no model can read, before anything is decoded."""
    rendered, problems = [], []
    for prompt in prompts:
        try:
            text = prompt_ids(prompt.content, prompt.tools, chat, own_chats)
            generator.check([text[0]], [_steering(recipe, prompt, 0)], [text[1]])
            rendered.append(text)
        except UnrenderableState as error:
            told = f"{error.found}: {error.kind}"
            problems += [
                Problem(recipe.decode.prompts, prompt.line, "messages", told, p.remedy) for p in error.problems
            ]
        except InputError as error:
            problems += [replace(p, file=recipe.decode.prompts, line=prompt.line) for p in error.problems]
    if problems:
        raise InputError(problems)
    return rendered


def _row(
    prompt: Prompt, sample: int, request: GuidedSamplingParams, answer: Guided, chat: Chat, token_records: bool
) -> dict[str, Any]:
    tokens = answer.tokens
    row: dict[str, Any] = {
        "id": prompt.prompt_id,
        "sample": sample,
        "text": chat.decode(answer.token_ids),
        "finish_reason": answer.finish_reason,
        "token_ids": list(answer.token_ids),
        "alpha": request.alpha,
        "beta": dict(request.beta),
        "seed": request.seed,
        "log_prob": round(sum(answer.log_probs), 6),
        "kl": round(fmean(t.kl for t in tokens), 6),
        "changed": round(fmean(t.changed_token for t in tokens), 6),
    }
    if token_records:
        columns = dict(zip(Token._fields, zip(*tokens, strict=True), strict=True))
        figures: dict[str, Any] = {key: [round(value, 6) for value in columns[key]] for key in FIGURES}
        row["tokens"] = figures | {key: list(map(int, columns[key])) for key in ("changed_argmax", "changed_token")}
    return row


# ---- the prompts file ----


def read_prompts(path: Path, recipe: Recipe) -> list[Prompt]:
    """All prompts of the file. Raises InputError naming every line that is none."""
    if not path.exists():
        raise InputError(Problem("recipe", None, "decode.prompts", str(path), "no such file"))
    prompts: list[Prompt] = []
    problems: list[Problem] = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            prompts.append(_prompt(json.loads(line), number, recipe))
        except _LineError as error:
            problems.append(Problem(str(path), number, *error.args))
        except (ValueError, RecursionError) as error:
            problems.append(
                Problem(str(path), number, "line", short(line.decode("utf-8", "replace")), f"not JSON ({error})")
            )
    if not prompts and not problems:
        problems.append(Problem(str(path), None, "file", "no prompt", "one JSON value a line"))
    if problems:
        raise InputError(problems)
    return prompts


class _LineError(Exception):
    """Field, what stands there, remedy."""


def _prompt(value: Any, number: int, recipe: Recipe) -> Prompt:
    row = {"prompt": value} if isinstance(value, str) else {"messages": value} if isinstance(value, list) else value
    if not isinstance(row, dict):
        raise _LineError("line", short(value), "a text, a list of messages, or an object")
    if "messages" in row:
        content: Any = row["messages"]
        if not (isinstance(content, list) and content and all(isinstance(m, dict) and "role" in m for m in content)):
            raise _LineError("messages", short(content), "a list of {role, content}")
        content = tuple(content)
    else:
        content = row.get("prompt")
        if not isinstance(content, str) or not content:
            raise _LineError("prompt", short(content), "give `prompt`, a text, or `messages`")
    beta = row.get("beta", {})
    if not isinstance(beta, dict):
        raise _LineError("beta", short(beta), "a mapping from doctor to number")
    strangers = sorted(set(beta) - set(recipe.decode.doctors))
    if strangers:
        known = ", ".join(recipe.decode.doctors) or "none"
        raise _LineError("beta", ", ".join(strangers), f"the recipe's doctors are {known}")
    weights = {name: _number(f"beta.{name}", beta.get(name, d.beta)) for name, d in recipe.decode.doctors.items()}
    alpha = _number("alpha", row.get("alpha", recipe.decode.alpha))
    tools = row.get("tools") or []
    if not (isinstance(tools, list) and all(isinstance(t, dict) for t in tools)):
        raise _LineError("tools", short(tools), "a list of tool definitions")
    return Prompt(str(row.get("id", number)), content, tuple(tools), alpha, weights, number)


def _number(field: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise _LineError(field, short(value), "a finite number")
    return float(value)
