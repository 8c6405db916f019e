"""LLMdoctor inside an engine, without the engine's own classes: guidance of requests, and logits of their rows.

A request carries `guidance.alpha`, `guidance.beta.NAME` and `guidance.spans` (markers in pairs: where one begins and where it ends,
the patient decodes alone) in SamplingParams' `extra_args`, over HTTP in `vllm_xargs`. One without any of them has the engine's
defaults. With `guidance.tenant` it has that tenant's weights, but for those that it names itself. A request whose weights leave
the patient as it is never has its logits touched.

`guidance.draw`, which only this package sends, has the token drawn here as the reference backend draws it, from the request's
own random numbers, and its record kept: the engine then finds one token with all the probability.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_pivotrl.algorithms.llmdoctor import kl
from nemo_pivotrl.backends.adapters import DoctorFiles, doctor_files, is_adapter, read_adapter
from nemo_pivotrl.backends.doctors import Doctors, Mixed, Span, SpanTracker, check_contract, mix_rows
from nemo_pivotrl.backends.hf_models import check_weights, load_model
from nemo_pivotrl.backends.identity import policy_revision
from nemo_pivotrl.backends.reference.guided import DTYPES, GuidedSamplingParams, Shape, Token, draw, noise_of
from nemo_pivotrl.backends.vllm.row_stream import RowStream, check_streams
from nemo_pivotrl.backends.vllm.shared_base import SharedBase
from nemo_pivotrl.config import Decode, Patient, Tenant
from nemo_pivotrl.core.errors import InputError, Problem, short
from nemo_pivotrl.sizing.hf_folder import load_config, load_tokenizer

CLASS = "nemo_pivotrl.backends.vllm.guide:Guide"
SECTION = "nemo_pivotrl"
"""Ours in the engine's `additional_config`."""
NAMES, TENANTS = "NEMO_PIVOTRL_DOCTORS", "NEMO_PIVOTRL_TENANTS"
"""Environment variables with the doctors' and the tenants' names: requests are checked in a process that does not see the engine's
config."""
PREFIX = "guidance."
RECORDS: dict[int, list[Token]] = {}
"""What was drawn here, by the number that the request gave in `guidance.draw`."""
MAX_RECORDS = 1 << 17
"""So many requests' records are kept for who asks for them; a client that died asks for none."""
IDENTITY: dict[str, Any] = {}
"""`identity_of` the doctors in this process."""
DRAWN = ("temperature", "top_k", "top_p", "max_new_tokens", "seed")
"""What of GuidedSamplingParams a draw depends on."""
LONGEST = 1 << 20
"""Tokens of an answer that is drawn here: its random numbers are made beforehand."""


# ---- what an engine is started with ----


def guide_arguments(
    patient: Patient, decode: Decode, where: str = "decode", tenants: Mapping[str, Tenant] | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Arguments of an engine with the recipe's doctors, and what its environment must have. Raises InputError."""
    remedy = "mode: ratio divides each doctor by the model it was trained from; name its folder"
    problems = [
        Problem("recipe", None, f"{where}.doctors.{n}.reference", "nothing", remedy)
        for n, d in decode.doctors.items()
        if decode.mode == "ratio" and not d.reference and not is_adapter(d.path)
    ]
    files: dict[str, DoctorFiles] = {}
    for name, doctor in decode.doctors.items():
        field_name = f"{where}.doctors.{name}"
        try:
            files[name] = found = doctor_files(doctor, decode.mode, field_name)
            check_weights(found.model, f"{field_name}.{'base' if found.adapter else 'path'}")
            if found.reference:
                check_weights(found.reference, f"{field_name}.reference")
        except InputError as error:
            problems += error.problems
    for name, tenant in (tenants or {}).items():
        if strangers := sorted(tenant.beta.keys() - decode.doctors.keys()):
            remedy = f"the doctors are {', '.join(decode.doctors) or 'none'}"
            problems.append(Problem("recipe", None, f"serve.tenants.{name}.beta", ", ".join(strangers), remedy))
    if problems:
        raise InputError(problems)
    settings = {
        "patient": patient.model_name,
        "dtype": patient.dtype,
        "doctors": {n: f.model for n, f in files.items()},
        "adapters": {n: f.adapter for n, f in files.items() if f.adapter},
        "references": {n: f.reference for n, f in files.items() if f.reference},
        "alpha": decode.alpha,
        "beta": {n: d.beta for n, d in decode.doctors.items()},
        "tenants": {n: asdict(tenant) for n, tenant in (tenants or {}).items()},
        "spans": [[start, end] for start, end in decode.off_markers.items()],
        "min_entropy": decode.min_entropy,
    }
    arguments = {"logits_processors": [CLASS], "additional_config": {SECTION: settings}}
    return arguments, {NAMES: json.dumps(sorted(decode.doctors)), TENANTS: json.dumps(sorted(tenants or {}))}


def files_of(settings: Mapping[str, Any], name: str) -> DoctorFiles:
    """A doctor's folders, as `guide_arguments` put them into the settings."""
    return DoctorFiles(
        settings["doctors"][name], settings["adapters"].get(name, ""), settings["references"].get(name, "")
    )


def identity_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What decides how an engine with these settings steers, whatever its folders are called."""
    files = {name: files_of(settings, name) for name in settings["doctors"]}
    doctors = {
        name: {"revision": own.revision, "reference": policy_revision(own.reference) if own.reference else ""}
        for name, own in files.items()
    }
    return {"doctors": doctors, "min_entropy": settings["min_entropy"]}


# ---- what a request asks ----


def drawn_by(request: GuidedSamplingParams, number: int) -> dict[str, Any]:
    """`guidance.draw` of a request."""
    return {name: getattr(request, name) for name in DRAWN} | {"number": number}


def _draw(value: Any) -> Mapping[str, Any]:
    """What `drawn_by` made, as it is or as JSON. Raises ValueError for anything else: the engine would die of it."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
        number = found["number"]
        asked = GuidedSamplingParams(**{name: found[name] for name in DRAWN})
        good = found.keys() == {*DRAWN, "number"} and type(number) is int and asked.max_new_tokens <= LONGEST
        good = good and type(asked.seed) is int and type(asked.top_k) is int and type(asked.max_new_tokens) is int
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        good = False
    if not good:
        raise ValueError(f"{PREFIX}draw: what nemo_pivotrl sends, not {short(value, 60)}")
    return found  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class GuidanceParams:
    """A request's guidance. None: the engine's default."""

    alpha: float | None = None
    beta: Mapping[str, float] = field(default_factory=dict)
    spans: tuple[Span, ...] | None = None
    own_prompts: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Doctors that read another prompt than the patient."""
    draw: Mapping[str, Any] | None = None
    """Arguments of GuidedSamplingParams, and `number`."""
    tenant: str = ""
    """Whose defaults it has."""
    given: bool = False


def read_wish(
    extra: Mapping[str, Any] | None, names: Sequence[str] | None, tenants: Collection[str] = ()
) -> GuidanceParams:
    """The guidance in a request's extra arguments; names: the engine's doctors, None where there is no engine of ours.

    Raises ValueError that says which field is wrong, what stands there and what may.
    """
    asked = {key[len(PREFIX) :]: value for key, value in (extra or {}).items() if key.startswith(PREFIX)}
    if not asked:
        return GuidanceParams()
    if names is None:
        raise ValueError(f"{PREFIX}{next(iter(asked))}: no doctors here; start the server with `nemo-pivotrl serve`")
    beta: dict[str, float] = {}
    own: dict[str, list[int]] = {}
    alpha, spans, drawn, tenant = None, None, None, ""
    for key, value in asked.items():
        kind, _, name = key.partition(".")
        if kind in ("beta", "prompt") and name not in names:
            raise ValueError(
                f"{PREFIX}{key}: no doctor {short(name, 60)!r}; the doctors are {', '.join(names) or 'none'}"
            )
        if key == "alpha":
            alpha = _number(key, value)
        elif kind == "beta":
            beta[name] = _number(key, value)
        elif key == "spans":
            spans = _spans(value)
        elif kind == "prompt":
            if not isinstance(value, list) or not value or not all(type(i) is int and i >= 0 for i in value):
                raise ValueError(f"{PREFIX}{key}: a list of token ids, not {short(value, 60)}")
            own[name] = value
        elif key == "draw":
            drawn = _draw(value)
        elif key == "tenant":
            if not isinstance(value, str) or value not in tenants:
                known = ", ".join(sorted(tenants)) or "none"
                raise ValueError(f"{PREFIX}tenant: no tenant {short(value, 60)}; the tenants are {known}")
            tenant = value
        else:
            known = "alpha, beta.NAME, spans, prompt.NAME, tenant"
            raise ValueError(f"{PREFIX}{short(key, 60)}: unknown; known after {PREFIX!r}: {known}")
    return GuidanceParams(alpha, beta, spans, own, drawn, tenant, True)


def _number(key: str, value: Any) -> float:
    try:
        found = float(value) if not isinstance(value, (bool, list, dict)) else math.nan
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found) or abs(found) > 1e6:
        raise ValueError(f"{PREFIX}{key}: a finite number, not {short(value, 60)}")
    return found


def _spans(value: Any) -> tuple[Span, ...]:
    texts = value if isinstance(value, list) else [value]
    if len(texts) % 2 or not all(isinstance(t, str) for t in texts) or not all(texts[::2]):
        raise ValueError(f"{PREFIX}spans: markers in pairs, [start, end, ...], no start empty, not {short(value, 60)}")
    return tuple(Span(start, end) for start, end in zip(texts[::2], texts[1::2], strict=True))


def names_here(variable: str = NAMES) -> list[str] | None:
    """The names of doctors (or of `TENANTS`) that requests may use, from the process's environment."""
    given = os.environ.get(variable)
    return None if given is None else list(json.loads(given))


# ---- a batch ----


@dataclass(eq=False)
class Row:
    """One request in the engine's batch that is guided or recorded."""

    prompt: Sequence[int]
    output: Sequence[int]
    """All that was sampled; the engine's own list where it keeps one."""
    alpha: float
    beta: list[float]
    watch: SpanTracker
    own_prompts: Mapping[str, Sequence[int]]
    streams: dict[tuple[str, str, str], tuple[RowStream, Hashable]] = field(default_factory=dict)
    """What reads it, by folder, adapter and the doctor that has a prompt of its own; with the row's key there."""
    steering: GuidedSamplingParams | None = None
    noise: Any = None
    records: list[Token] = field(default_factory=list)
    read: int = 0
    """Tokens of `output` that doctors and watch have been given."""


class Guidance:
    """The doctors of an engine. On a rank that does not `compute` it knows the requests and none of the models."""

    def __init__(self, settings: Mapping[str, Any], device: torch.device, compute: bool = True):
        self.settings, self.device = settings, device
        self.names = list(settings["doctors"])
        self.tokenizer = load_tokenizer(settings["patient"], "patient.model_name")
        self.spans = tuple(Span(*pair) for pair in settings["spans"])
        self.doctors: Doctors | None = None
        self.streams: dict[str, RowStream] = {}
        """By folder: whatever is read of one model is read in one pass."""
        self.shared: dict[str, SharedBase] = {}
        self.parts = {name: self._parts(name) for name in self.names}
        if compute:
            self.models = self._load()
            IDENTITY.update(identity_of(settings))

    def _load(self) -> dict[str, Any]:
        """Every folder once; the contract, the layers and the adapters checked."""
        models: dict[str, Any] = {}
        patient, known = _Width(self.settings["patient"]), {}
        for name in self.names:
            files = files_of(self.settings, name)
            for folder, kind in ((files.model, "doctors"), (files.reference, "references")):
                if not any(folder == part for part, _ in self.parts[name]):
                    continue
                if folder not in models:
                    made = load_model(folder, f"{kind}.{name}", DTYPES[self.settings["dtype"]], self.device)
                    models[folder] = made.requires_grad_(False)
                    check_streams(name, models[folder])
                tokenizer = load_tokenizer(files.tokenizer if kind == "doctors" else folder, f"{kind}.{name}")
                check_contract(patient, models[folder], (self.tokenizer, tokenizer), name)
            known[name] = models.get(files.model, patient)
        for folder, model in models.items():
            own = [n for n in self.settings["adapters"] if self.settings["doctors"][n] == folder]
            if own:
                found = {n: read_adapter(self.settings["adapters"][n], model) for n in own}
                self.shared[folder] = SharedBase(model, found)
        self.doctors = Doctors(known, self.tokenizer, {}, (), self.settings["min_entropy"])
        return models

    def _parts(self, name: str) -> list[tuple[str, str]]:
        """(folder, adapter) of a doctor and, where it is divided by one, of its reference; ("", "") for the patient, whose own logits
        stand for it."""
        files = files_of(self.settings, name)
        found = [(files.model, name if files.adapter else ""), *([(files.reference, "")] if files.reference else [])]
        return [
            ("", "") if not adapter and _same(f, self.settings["patient"]) else (f, adapter) for f, adapter in found
        ]

    def row(self, extra: Mapping[str, Any] | None, prompt: Sequence[int], output: Sequence[int]) -> Row | None:
        """The row of a request that enters the batch; None if the request is neither guided nor recorded."""
        tenants = self.settings["tenants"]
        wish = read_wish(extra, self.names, tenants)
        own = tenants[wish.tenant] if wish.tenant else {"alpha": 1.0, "beta": {}} if wish.given else self.settings
        alpha = float(own["alpha"] if wish.alpha is None else wish.alpha)
        beta = [float(wish.beta.get(n, own["beta"].get(n, 0.0))) for n in self.names]
        if alpha == 1.0 and not any(beta) and wish.draw is None:
            return None
        spans = self.spans if wish.spans is None else wish.spans
        watch = SpanTracker.after(self.tokenizer, spans, prompt)
        made = Row(prompt, output, alpha, beta, watch, wish.own_prompts)
        if wish.draw is not None:
            made.steering = GuidedSamplingParams(**{k: v for k, v in wish.draw.items() if k != "number"})
            made.noise = noise_of(made.steering, prompt)
            RECORDS[wish.draw["number"]] = made.records  # of the last request with this number
            while len(RECORDS) > MAX_RECORDS:
                RECORDS.pop(next(iter(RECORDS)))
        return made

    def drop(self, row: Row) -> None:
        """A request has left the batch."""
        for stream, key in row.streams.values():
            stream.drop(key)
        row.streams.clear()

    @torch.no_grad()
    def scores(self, logits: Tensor, rows: Sequence[Row]) -> Tensor:
        """What the engine's sampler gets [n, V] for rows with the patient's logits [n, V]."""
        assert self.doctors is not None, "this rank has no models"
        for row in rows:
            self._follow(row)
        alpha = torch.tensor([row.alpha for row in rows], device=logits.device)
        beta = torch.tensor([row.beta for row in rows], device=logits.device).reshape(len(rows), len(self.names))
        off = torch.tensor([row.watch.inside is not None for row in rows], device=logits.device)
        mixed = mix_rows(self.doctors, logits, alpha, beta, off, lambda needed: self._read(needed, rows, logits))
        drawn = [i for i, row in enumerate(rows) if row.steering is not None]
        # an unguided row that is not drawn here passes to the bit, padding columns included
        scores = torch.where(mixed.guided[:, None], mixed.scores, logits)
        return self._drawn(mixed, scores, rows, drawn) if drawn else scores

    def _follow(self, row: Row) -> None:
        """Hand on what was sampled since the last step."""
        new = list(row.output[row.read :])
        if any(token < 0 for token in new):
            raise RuntimeError("the engine schedules ahead of its samples: pass the processor as `logits_processors`")
        for stream, key in row.streams.values():
            stream.extend(key, new)
        for token in new:
            row.watch.read(token)
        row.read += len(new)

    def _read(self, needed: Mapping[str, Tensor], rows: Sequence[Row], patient: Tensor) -> Mapping[str, list[Tensor]]:
        """Each doctor's logits [n, V], its reference's behind them; anything in rows that do not need it."""
        wanted: dict[str, dict[tuple[int, str, str], int]] = {}
        """By folder: row, adapter, and the doctor if the row has another prompt for it; numbered."""
        index = {name: own.nonzero()[:, 0] for name, own in needed.items()}
        places: dict[tuple[str, str, str], list[int]] = {}
        for name, own in index.items():
            for folder, adapter in self.parts[name]:
                if folder:
                    asked = wanted.setdefault(folder, {})
                    each = [(i, adapter, name if name in rows[i].own_prompts else "") for i in own.tolist()]
                    places[name, folder, adapter] = [asked.setdefault(one, len(asked)) for one in each]
        found = {folder: self._logits(folder, list(asked), rows) for folder, asked in wanted.items()}

        def spread(name: str, folder: str, adapter: str) -> Tensor:
            own = found[folder][places[name, folder, adapter]]
            return own.new_zeros(len(rows), own.shape[1]).index_copy_(0, index[name], own)

        return {name: [spread(name, *part) if part[0] else patient for part in self.parts[name]] for name in needed}

    def _logits(self, folder: str, asked: Sequence[tuple[int, str, str]], rows: Sequence[Row]) -> Tensor:
        """One model's logits [k, V] of all that is asked of it, in one pass where it can be one."""
        stream = self.streams.setdefault(folder, RowStream(self.models[folder], self.shared.get(folder)))
        keys = []
        for i, adapter, label in asked:
            row, key = rows[i], (rows[i], adapter, label)
            if (folder, adapter, label) not in row.streams:  # its first step with this doctor
                row.streams[folder, adapter, label] = stream, key
                stream.add(key, [*(row.own_prompts[label] if label else row.prompt), *row.output[: row.read]], adapter)
            keys.append(key)
        return stream.logits(keys)

    def _drawn(self, mixed: Mixed, scores: Tensor, rows: Sequence[Row], drawn: Sequence[int]) -> Tensor:
        """Draw these rows' tokens and note what guidance did to them; all other tokens are excluded."""
        index = torch.tensor(list(drawn), device=scores.device)
        asked: list[GuidedSamplingParams] = [rows[i].steering for i in drawn]  # type: ignore[misc]
        shape = Shape(
            torch.tensor([float(s.temperature) for s in asked], device=scores.device),
            torch.tensor([s.top_k for s in asked], device=scores.device),
            torch.tensor([float(s.top_p) for s in asked], device=scores.device),
        )
        chance = [rows[i].noise[min(len(rows[i].output), len(rows[i].noise) - 1)] for i in drawn]
        uniform = torch.tensor(chance, dtype=torch.float64, device=scores.device)
        log_probs, alone = mixed.log_probs[index], mixed.alone[index]
        token, log_prob = draw(mixed.scores[index], shape, uniform)
        own, _ = draw(torch.where(mixed.guided[index, None], alone, mixed.scores[index]), shape, uniform)
        columns = (
            token,
            log_prob,
            alone.gather(1, token[:, None])[:, 0],
            log_probs.gather(1, token[:, None])[:, 0],
            kl(log_probs, alone).clamp(min=0),
            (log_probs.argmax(1) != alone.argmax(1)) & mixed.guided[index],
            own != token,
        )
        for i, values in zip(drawn, zip(*(c.tolist() for c in columns), strict=True), strict=True):
            # a step may be thrown away and repeated (a chunk of a prompt, a request put back into the queue)
            records = rows[i].records
            del records[len(rows[i].output) :]
            records.append(Token(*values))
        forced = torch.full_like(scores[index], -torch.inf).scatter(1, token[:, None], 0.0)
        return scores.index_copy(0, index, forced)


class _Width:
    """The patient as the contract sees it, whose weights are the engine's."""

    def __init__(self, folder: str):
        self.config = load_config(folder, "patient.model_name")

    def get_output_embeddings(self) -> None:
        return None


def _same(first: str, second: str) -> bool:
    return Path(first).resolve() == Path(second).resolve()
