"""Guided decoding through transformers on one device: a patient steered by doctors, token by token (equation (34)).

`GuidedGenerator` owns the loop; `GuidedLogitsProcessor` does the same inside transformers' `generate()`. Both mix, gate and
switch off guidance by `doctors.Guide`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nemo_pivotrl.algorithms.llmdoctor import kl
from nemo_pivotrl.backends.adapters import doctor_files, is_adapter, merged
from nemo_pivotrl.backends.batching import Decoder, batches
from nemo_pivotrl.backends.doctors import (
    Doctors,
    Guide,
    GuidedLogitsProcessor,
    Span,
    check_contract,
    logits_width,
)
from nemo_pivotrl.backends.hf_models import load_model
from nemo_pivotrl.backends.sampling import truncate
from nemo_pivotrl.config import Doctor
from nemo_pivotrl.core.errors import InputError, NotFiniteError, Problem
from nemo_pivotrl.core.types import FinishReason
from nemo_pivotrl.sizing.hf_folder import load_tokenizer

__all__ = [
    "Decoding",
    "Doctors",
    "Guided",
    "GuidedGenerator",
    "GuidedLogitsProcessor",
    "GuidedSamplingParams",
    "Span",
    "Step",
    "Token",
    "check_contract",
    "load_guided",
]

transformers.utils.logging.disable_progress_bar()  # of loading: seconds

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True, slots=True, kw_only=True)
class GuidedSamplingParams:
    """What one request decides for itself."""

    alpha: float = 1.0
    """The patient's exponent."""
    beta: Mapping[str, float] = field(default_factory=dict)
    """Each doctor's exponent, any sign; a doctor that is not named has 0 and does not run."""
    temperature: float = 1.0
    """Applied to the mixture, as top_k and top_p are (D16); 0 takes the likeliest token."""
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 128
    seed: int = 0
    """With the prompt, all that decides the request's random numbers."""
    stop_ids: frozenset[int] | None = None
    """Tokens that end the answer, and belong to it; None: the generator's."""
    top: int = 0
    """How many of the mixture's likeliest tokens each record lists."""

    def __post_init__(self) -> None:
        weights = [self.alpha, *self.beta.values()]
        if not all(math.isfinite(w) for w in weights):
            raise ValueError(f"alpha and beta must be finite: got alpha {self.alpha}, beta {dict(self.beta)}")
        if not (0 <= self.temperature < math.inf and 0 < self.top_p <= 1 and self.top_k >= 0 and self.top >= 0):
            raise ValueError(
                f"temperature and top_k must be >= 0, top_p in (0, 1]: got {self.temperature}, {self.top_k}, {self.top_p}"
            )
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")


class Token(NamedTuple):
    """One generated token and what guidance did to it. Logs in nats."""

    token_id: int
    log_prob: float
    """Under the distribution it was drawn from (after temperature and truncation); at temperature 0 the mixture's."""
    patient_log_prob: float
    mixed_log_prob: float
    kl: float
    """KL of the mixture from the patient in this state, before temperature and truncation."""
    changed_argmax: bool
    """The mixture's likeliest token is not the patient's."""
    changed_token: bool
    """The patient alone, with the same settings and the same random number, would have taken another token."""
    top: tuple[tuple[int, float], ...] = ()
    """The mixture's likeliest tokens with their log-probabilities, as many as were asked for."""


@dataclass(frozen=True, slots=True)
class Guided:
    """One finished answer."""

    tokens: tuple[Token, ...]
    finish_reason: FinishReason

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Ids of the answer's tokens."""
        return tuple(t.token_id for t in self.tokens)

    @property
    def log_probs(self) -> tuple[float, ...]:
        """Nats, under the sampling distribution."""
        return tuple(t.log_prob for t in self.tokens)


def check_answers(answers: list[Guided]) -> list[Guided]:
    """The answers as they are. Raises NotFiniteError where the patient's, a doctor's or the mixture's logits gave none."""
    wrong = [
        n
        for n, answer in enumerate(answers)
        for t in answer.tokens
        if not all(map(math.isfinite, (t.log_prob, t.patient_log_prob, t.mixed_log_prob, t.kl)))
    ]
    if wrong:
        found = f"NaN or infinity in {len(set(wrong))} of {len(answers)} answers, first in answer {wrong[0]}"
        remedy = (
            "the patient's or a doctor's logits overflow: use float32, smaller alpha and beta, or another checkpoint"
        )
        raise NotFiniteError(Problem("model", None, "log-probabilities", found, remedy))
    return answers


class Step(NamedTuple):
    """What one step did to one row."""

    row: int
    token: Token
    finish_reason: FinishReason | None


class Shape(NamedTuple):
    """Sampling settings of the running rows, [R] each."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor

    def at(self, rows: Tensor) -> Shape:
        """The settings of these rows."""
        return Shape(self.temperature[rows], self.top_k[rows], self.top_p[rows])


def draw(scores: Tensor, settings: Shape, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Token [R] by inverse CDF of `uniform` [R], and its log-probability [R] in float64, so that seeds decide, not
    rounding. Temperature 0 takes the argmax; its log-probability is then that of `scores`."""
    token = scores.argmax(1)
    shaped = torch.log_softmax(scores.double(), 1)
    rows = (settings.temperature > 0).nonzero()[:, 0]
    if len(rows):
        own, s = shaped[rows], settings.at(rows)
        plain = bool((s.temperature == 1).all())  # normalised already
        drawn = own if plain else torch.log_softmax(own / s.temperature[:, None], 1)
        cut = ((s.top_k > 0) | (s.top_p < 1)).nonzero()[:, 0]
        if len(cut):  # sorting the vocabulary costs more than all the rest
            drawn[cut] = truncate(own[cut], *s.at(cut))
        cumulative = drawn.exp().cumsum(1)
        total = cumulative[:, -1:]
        found = torch.searchsorted(cumulative, uniform[rows, None] * total, right=True)
        # rounding must not lead past the last token that has any probability
        token[rows] = torch.minimum(found, (cumulative < total).sum(1, keepdim=True))[:, 0]
        shaped[rows] = drawn
    return token, shaped.gather(1, token[:, None])[:, 0]


def noise_of(request: GuidedSamplingParams, prompt: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The request's random numbers, from its seed and its prompt alone."""
    key = hashlib.sha256(repr((request.seed, list(prompt))).encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(int.from_bytes(key, "big"))).random(request.max_new_tokens)


def check_requests(
    prompts: Sequence[Sequence[int]],
    requests: Sequence[GuidedSamplingParams],
    own_prompts: Sequence[Mapping[str, Sequence[int]]] | None,
    doctors: Sequence[str],
    vocab_size: int,
    context: float,
) -> None:
    """InputError for a request that cannot be decoded, naming it."""
    problems = []
    for i, (prompt, request) in enumerate(zip(prompts, requests, strict=True)):
        texts = [prompt, *(own_prompts[i].values() if own_prompts else [])]
        longest = max(map(len, texts))
        foreign = [t for text in texts for t in text if not 0 <= t < vocab_size]
        strangers = sorted(set(request.beta) - set(doctors))
        if not all(texts):
            problems.append(("prompt", "no token", "give at least one"))
        elif longest + request.max_new_tokens > context:
            found = f"{longest} tokens and {request.max_new_tokens} new ones"
            problems.append(("prompt", found, f"the models read {context}: shorten it or ask for fewer"))
        elif foreign:
            problems.append(("prompt", f"token id {foreign[0]}", f"ids run from 0 to {vocab_size - 1}"))
        elif strangers:
            known = ", ".join(sorted(doctors)) or "none"
            problems.append(("beta", ", ".join(strangers), f"the doctors here are {known}"))
    if problems:
        raise InputError([Problem("request", None, *problem) for problem in problems])


class Checks:
    """The check that everything which decodes makes first."""

    names: list[str]
    """Of the doctors."""
    vocab_size: int
    context: float
    """Tokens of prompt and answer together that can be read."""

    def check(
        self,
        prompts: Sequence[Sequence[int]],
        requests: Sequence[GuidedSamplingParams],
        own_prompts: Sequence[Mapping[str, Sequence[int]]] | None = None,
    ) -> None:
        """InputError for a request that cannot be decoded, naming it."""
        check_requests(prompts, requests, own_prompts, self.names, self.vocab_size, self.context)


class Decoding:
    """A batch that is being decoded. `step` until `done`; `stop` a row whenever its caller has enough."""

    def __init__(
        self,
        generator: GuidedGenerator,
        prompts: Sequence[Sequence[int]],
        requests: Sequence[GuidedSamplingParams],
        own_prompts: Sequence[Mapping[str, Sequence[int]]] | None = None,
    ):
        generator.check(prompts, requests, own_prompts)
        device = generator.patient.device
        self.generator, self.requests = generator, list(requests)
        self.noise = [noise_of(r, p) for r, p in zip(requests, prompts, strict=True)]
        self.counts = [0] * len(prompts)
        self.alive = list(range(len(prompts)))
        """The request of each row that still runs; a finished one stays until enough have finished."""
        self.finished: set[int] = set()
        self.stream = Decoder(generator.patient, prompts)
        alpha = torch.tensor([float(r.alpha) for r in requests], device=device)
        beta = generator.doctors.weights([r.beta for r in requests], device)
        self.guide = Guide(generator.doctors, prompts, alpha, beta, own_prompts, generator.patient)
        self.settings = Shape(
            torch.tensor([float(r.temperature) for r in requests], device=device),
            torch.tensor([r.top_k for r in requests], device=device),
            torch.tensor([float(r.top_p) for r in requests], device=device),
        )

    @property
    def done(self) -> bool:
        """Whether every request has its answer."""
        return len(self.finished) == len(self.requests)

    def stop(self, row: int) -> None:
        """Take no more tokens for the request at `row`."""
        self.finished.add(row)

    @torch.no_grad()
    def step(self) -> list[Step]:
        """The next token of every row that still runs."""
        self._shrink()
        mixed = self.guide.mix(self.stream.logits())
        uniform = [self.noise[r][self.counts[r]] if r not in self.finished else 0.5 for r in self.alive]
        chance = torch.tensor(uniform, dtype=torch.float64, device=mixed.scores.device)
        token, log_prob = draw(mixed.scores, self.settings, chance)
        own, apart = token.clone(), mixed.log_probs.new_zeros(len(token))
        rows = mixed.guided.nonzero()[:, 0]
        if len(
            rows
        ):  # elsewhere the mixture is the patient, and what reads the vocabulary costs as much as a small model
            own[rows] = draw(mixed.alone[rows], self.settings.at(rows), chance[rows])[0]
            apart[rows] = kl(mixed.log_probs[rows], mixed.alone[rows]).clamp(min=0)  # rounding may leave less
        columns = (
            token,
            log_prob,
            mixed.alone.gather(1, token[:, None])[:, 0],
            mixed.log_probs.gather(1, token[:, None])[:, 0],
            apart,
            (mixed.log_probs.argmax(1) != mixed.alone.argmax(1)) & mixed.guided,
            own != token,
        )
        most = max(self.requests[r].top for r in self.alive)
        top = mixed.log_probs.topk(min(most, self.generator.vocab_size), 1)
        likeliest = [
            list(zip(*pair, strict=True)) for pair in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]
        steps = []
        for row, values, listed in zip(
            self.alive, zip(*(c.tolist() for c in columns), strict=True), likeliest, strict=True
        ):
            if row not in self.finished:
                steps.append(self._record(row, Token(*values, tuple(listed[: self.requests[row].top]))))
        if not self.done:
            self.stream.feed(token)
            self.guide.feed(token)
        return steps

    def _record(self, row: int, token: Token) -> Step:
        request = self.requests[row]
        self.counts[row] += 1
        reason: FinishReason | None = None
        if token.token_id in (self.generator.stop_ids if request.stop_ids is None else request.stop_ids):
            reason = "stop"
        elif self.counts[row] == request.max_new_tokens:
            reason = "length"
        if reason:
            self.finished.add(row)
        return Step(row, token, reason)

    def _shrink(self) -> None:
        """Drop finished rows; it copies the caches, so only when they are half of the batch."""
        running = [i for i, row in enumerate(self.alive) if row not in self.finished]
        if len(running) > len(self.alive) // 2:
            return
        index = torch.tensor(running, device=self.settings.temperature.device)
        self.stream.select(index)
        self.guide.select(index)
        self.settings = self.settings.at(index)
        self.alive = [self.alive[i] for i in running]


class GuidedGenerator(Checks):
    """Samples from patient^alpha * prod_i (doctor_i / reference_i)^beta_i, request by request (equation (34), D16).

    patient, doctors, references: HF causal models on one device. A doctor with a reference is mixed as their ratio.
    doctor_tokenizers: where given, the contract is checked; without them only the widths can be.

    >>> guided = GuidedGenerator(patient, {"kind": doctor}, patient_tokenizer)
    >>> (answer,) = guided.generate([patient_tokenizer.encode("how is the tea")], GuidedSamplingParams(beta={"kind": 1.0}))
    >>> 0 < len(answer.token_ids) <= 128
    True
    """

    def __init__(
        self,
        patient: Any,
        doctors: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        references: Mapping[str, Any] | None = None,
        stop_ids: frozenset[int] | None = None,
        spans: Sequence[Span] = (),
        min_entropy: float = 0.0,
        batch_tokens: int = 16384,
        doctor_tokenizers: Mapping[str, PreTrainedTokenizerBase] | None = None,
    ):
        for name, own in (doctor_tokenizers or {}).items():
            check_contract(patient, doctors[name], (tokenizer, own), name)
        self.patient, self.tokenizer, self.batch_tokens = patient, tokenizer, batch_tokens
        self.doctors = Doctors(doctors, tokenizer, references or {}, tuple(spans), min_entropy)
        self.names, self.vocab_size = list(doctors), self.doctors.vocab_size
        self.stop_ids = _stop_ids(patient, tokenizer) if stop_ids is None else stop_ids
        if logits_width(patient) < self.vocab_size:
            found = f"{logits_width(patient)} columns for {self.vocab_size} token ids"
            raise InputError(Problem("patient", None, "logits", found, "give the tokenizer it was trained with"))
        models = [patient, *doctors.values(), *(references or {}).values()]
        self.context = min(_context(model) for model in models)

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        requests: Sequence[GuidedSamplingParams],
        own_prompts: Sequence[Mapping[str, Sequence[int]]] | None = None,
    ) -> Decoding:
        """One batch, to be stepped by the caller: for streaming."""
        return Decoding(self, prompts, requests, own_prompts)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        requests: GuidedSamplingParams | Sequence[GuidedSamplingParams],
        own_prompts: Sequence[Mapping[str, Sequence[int]]] | None = None,
    ) -> list[Guided]:
        """One answer for each prompt (token ids), under its own request or the one of all.

        own_prompts: for each request the doctors that read another prompt than the patient, with that prompt (D17).
        An answer depends on its prompt and request only, up to floating-point noise of the batch it is in, and exactly
        when the call is repeated as it was.
        """
        if isinstance(requests, GuidedSamplingParams):
            requests = [requests] * len(prompts)
        self.check(prompts, requests, own_prompts)
        tokens: list[list[Token]] = [[] for _ in prompts]
        reasons: list[FinishReason] = ["length"] * len(prompts)
        for batch in self._batches(prompts, requests):
            own = [own_prompts[i] for i in batch] if own_prompts else None
            decoding = self.start([prompts[i] for i in batch], [requests[i] for i in batch], own)
            while not decoding.done:
                for row, token, reason in decoding.step():
                    tokens[batch[row]].append(token)
                    reasons[batch[row]] = reason or reasons[batch[row]]
        return check_answers([Guided(tuple(t), r) for t, r in zip(tokens, reasons, strict=True)])

    def _batches(
        self, prompts: Sequence[Sequence[int]], requests: Sequence[GuidedSamplingParams]
    ) -> Iterator[list[int]]:
        """Requests by length, in batches of at most `batch_tokens` padded tokens."""
        sizes = [len(p) + r.max_new_tokens for p, r in zip(prompts, requests, strict=True)]
        return batches(sizes, self.batch_tokens, sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i)))


def _stop_ids(patient: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokenizer's end of text and what the checkpoint's generation settings add to it."""
    given = getattr(patient.generation_config, "eos_token_id", None)
    listed = given if isinstance(given, list) else [given]
    return frozenset(t for t in (*listed, tokenizer.eos_token_id) if t is not None)


def _context(model: Any) -> float:
    return model.config.get_text_config().to_dict().get("max_position_embeddings") or math.inf


# ---- loading ----


def load_guided(
    patient: str,
    doctors: Mapping[str, Doctor],
    mode: str = "product",
    dtype: str = "float32",
    device: str = "auto",
    where: str = "guided",
    **settings: Any,
) -> GuidedGenerator:
    """A generator from HF folders (safetensors only), every doctor's contract checked.

    mode `ratio` wants a reference for each doctor, `product` uses none. settings go to GuidedGenerator. A folder named
    twice is loaded once: the patient is often the reference. where: the recipe's section, for errors.
    """
    lacking = [n for n, d in doctors.items() if mode == "ratio" and not d.reference and not is_adapter(d.path)]
    if lacking:
        remedy = "mode: ratio divides each doctor by the model it was trained from; name its folder"
        raise InputError(
            [Problem("recipe", None, f"{where}.doctors.{n}.reference", "nothing", remedy) for n in lacking]
        )
    files = {name: doctor_files(doctor, mode, f"{where}.doctors.{name}") for name, doctor in doctors.items()}
    folders = {"patient.model_name": patient}
    folders |= {f"{where}.doctors.{n}.{'base' if f.adapter else 'path'}": f.model for n, f in files.items()}
    folders |= {f"{where}.doctors.{n}.reference": f.reference for n, f in files.items() if f.reference}
    problems = [p for named, folder in folders.items() if (p := _unloadable(named, folder))]
    if problems:
        raise InputError(problems)
    place = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    loaded: dict[Path, Any] = {}
    for named, folder in folders.items():
        if Path(folder).resolve() not in loaded:
            model = load_model(folder, named, DTYPES[dtype], place)
            loaded[Path(folder).resolve()] = model.requires_grad_(False)
    models = {name: merged(own, loaded[Path(own.model).resolve()]) for name, own in files.items()}
    patient_model = loaded[Path(patient).resolve()]
    tokenizer = settings.pop("tokenizer", None) or load_tokenizer(patient, "patient.model_name")
    tokenizers = {n: load_tokenizer(f.tokenizer, f"{where}.doctors.{n}.path") for n, f in files.items()}
    references = {n: loaded[Path(f.reference).resolve()] for n, f in files.items() if f.reference}
    for name, model in references.items():
        own = load_tokenizer(files[name].reference, f"{where}.doctors.{name}.reference")
        check_contract(patient_model, model, (tokenizer, own), f"{name}.reference")
    return GuidedGenerator(
        patient_model,
        models,
        tokenizer,
        references,
        doctor_tokenizers=tokenizers,
        **settings,
    )


def _unloadable(field_name: str, folder: str) -> Problem | None:
    """Why `folder` is no checkpoint that can be loaded."""
    where = Path(folder)
    if not folder or not (where / "config.json").exists():
        return Problem("recipe", None, field_name, folder or "nothing", "give an HF checkpoint folder")
    if not list(where.glob("*.safetensors")):
        return Problem("recipe", None, field_name, found_weights(where), "save it as safetensors: pickles run code")
    return None


def found_weights(folder: Path) -> str:
    """What lies in `folder` in place of safetensors."""
    return ", ".join(sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))) or "no weights"
