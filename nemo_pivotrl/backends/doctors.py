"""Doctors beside a patient: their contract, their KV caches, and what they make of a batch's next-token logits.

Every model has its own cache and its own prompt (D17); prompts are padded on the left and each row counts its positions
from its first real token. A doctor runs for the rows that give it a weight, and only when one of them needs it now:
tokens it has not seen wait and are read in one piece.

Shapes: `R` rows of the running batch, `V` columns of the patient's logits, `D` doctors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from nemo_pivotrl.algorithms.llmdoctor import entropy_gate, guided_logits, mix_logits, unguided
from nemo_pivotrl.backends.batching import Decoder
from nemo_pivotrl.core.errors import InputError, Problem, short


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of the answer in which the patient decodes alone, from after `start` until `end` is complete.

    Markers are text, looked for in the decoded answer: a tokenizer may cut the same marker in several ways. An empty
    `end` never comes. A prompt that ends with `start` (white space aside) begins inside.
    """

    start: str
    end: str


# ---- contract ----


def check_contract(
    patient: Any,
    doctor: Any,
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
    name: str = "doctor",
) -> int:
    """The number of token ids that both models know; InputError naming every way in which they differ (D15).

    Logits may be of different width: columns past the vocabulary are padding and are never sampled (D18).
    """
    ours, theirs = tokenizers
    problems = []

    def refuse(what: str, found: str, remedy: str) -> None:
        problems.append(Problem(f"doctor {name}" if name != "doctor" else name, None, what, found, remedy))

    same_words = "the mixture adds log-probabilities id by id: train the doctor with the patient's own tokenizer"
    words = {"vocabulary": (ours.get_vocab(), theirs.get_vocab())}
    words["added tokens"] = (ours.get_added_vocab(), theirs.get_added_vocab())
    for what, (a, b) in words.items():
        if a != b:
            differing = sorted(t for t in a.keys() | b.keys() if a.get(t) != b.get(t))
            shown = ", ".join(f"{short(t, 24)!r}: {a.get(t)} against {b.get(t)}" for t in differing[:3])
            refuse(what, f"{len(a)} against {len(b)} entries, {len(differing)} differ: {shown}", same_words)
    if ours.eos_token_id != theirs.eos_token_id:
        found = f"{ours.eos_token_id} ({ours.eos_token}) against {theirs.eos_token_id} ({theirs.eos_token})"
        refuse("eos token", found, "a doctor that ends its answers otherwise never learnt when to stop; retrain it")
    size = vocabulary_size(ours)
    for owner, model in (("patient", patient), ("doctor", doctor)):
        width = logits_width(model)
        if width < size:
            found = f"{width} columns of the {owner} for {size} token ids"
            refuse("logits", found, "resize its embeddings to the tokenizer, or give the tokenizer it was trained with")
    if problems:
        raise InputError(problems)
    return size


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the highest token id."""
    return max(tokenizer.get_vocab().values()) + 1


def logits_width(model: Any) -> int:
    """Columns of a causal model's logits."""
    head = model.get_output_embeddings()
    return int(head.weight.shape[0] if head is not None else model.config.get_text_config().vocab_size)


@dataclass
class SpanTracker:
    """Whether an answer is inside a span, token by token."""

    tokenizer: PreTrainedTokenizerBase
    spans: tuple[Span, ...]
    inside: Span | None = None
    tail: tuple[int, ...] = ()
    """The latest tokens since the last marker: enough to hold any marker."""

    @classmethod
    def after(cls, tokenizer: PreTrainedTokenizerBase, spans: tuple[Span, ...], prompt: Sequence[int]) -> SpanTracker:
        """A tracker of the answer that follows `prompt`, which may end inside a span."""
        watch = cls(tokenizer, spans)
        if spans:
            reach = max(len(s.start.encode()) for s in spans) + 8
            text = tokenizer.decode(list(prompt[-reach:])).rstrip()
            watch.inside = next((s for s in spans if text.endswith(s.start.rstrip())), None)
        return watch

    def read(self, token: int) -> None:
        """Take the answer's next token in."""
        if not self.spans:
            return
        # a token that is more than part of a character has at least one byte
        reach = max(len(m.encode()) for s in self.spans for m in (s.start, s.end))
        self.tail = (*self.tail, token)[-reach:]
        text = self.tokenizer.decode(list(self.tail))
        if self.inside is None:
            self.inside = next((s for s in self.spans if s.start in text), None)
            self.tail = () if self.inside is not None else self.tail
        elif self.inside.end and self.inside.end in text:
            self.inside, self.tail = None, ()


@dataclass(frozen=True)
class Doctors:
    """The doctors with all that decides what they add to a patient's logits; checked once, shared by many batches."""

    models: Mapping[str, Any]
    tokenizer: PreTrainedTokenizerBase
    references: Mapping[str, Any] = field(default_factory=dict)
    """For a doctor named here its probabilities are divided by this model's (`ratio`)."""
    spans: tuple[Span, ...] = ()
    min_entropy: float = 0.0
    """Nats; where the patient's next-token entropy is below, it decodes alone. 0: off."""

    def __post_init__(self) -> None:
        strangers = sorted(set(self.references) - set(self.models))
        if strangers:
            raise ValueError(f"references for {strangers}, but the doctors are {sorted(self.models)}")
        if any(not span.start for span in self.spans):
            raise ValueError("a span without a start marker would be everywhere")
        for kind, models in (("doctor", self.models), ("reference of doctor", self.references)):
            for name, model in models.items():
                if logits_width(model) < self.vocab_size:
                    found = f"{logits_width(model)} columns for {self.vocab_size} token ids"
                    raise InputError(
                        Problem(
                            f"{kind} {name}", None, "logits", found, "another tokenizer: see docs/algorithms.md, D15"
                        )
                    )

    @functools.cached_property
    def vocab_size(self) -> int:
        return vocabulary_size(self.tokenizer)

    @functools.cached_property
    def absent(self) -> list[int]:
        """Ids below `vocab_size` that no token has."""
        return sorted(set(range(self.vocab_size)) - set(self.tokenizer.get_vocab().values()))

    def weights(self, betas: Sequence[Mapping[str, float]], device: torch.device) -> Tensor:
        """beta [R, D]; InputError for a doctor that is not there."""
        strangers = sorted({name for beta in betas for name in beta} - set(self.models))
        if strangers:
            remedy = f"the doctors here are {', '.join(sorted(self.models)) or 'none'}"
            raise InputError(Problem("request", None, "beta", ", ".join(strangers), remedy))
        rows = [[float(beta.get(name, 0.0)) for name in self.models] for beta in betas]
        return torch.tensor(rows, device=device).reshape(len(betas), len(self.models))


class Mixed(NamedTuple):
    """What guidance makes of one step's logits."""

    log_probs: Tensor
    """[R, V] of the mixture."""
    alone: Tensor
    """[R, V] log-probabilities of the patient."""
    scores: Tensor
    """[R, V] to draw from: the mixture, or the patient's own logits where it decodes alone; -inf on padding."""
    guided: Tensor
    """[R] bool: rows that are not the patient as it is."""


def mix_rows(
    doctors: Doctors,
    patient: Tensor,
    alpha: Tensor,
    beta: Tensor,
    off: Tensor,
    read: Callable[[Mapping[str, Tensor]], Mapping[str, list[Tensor]]],
) -> Mixed:
    """The next token's distribution of rows with patient's logits [R, V] and weights alpha [R], beta [R, D].

    off [R] bool: rows in which the patient decodes alone now; the entropy gate adds others. read: the doctors' names with the rows
    [R] bool that need each, to its logits [R, V] with its reference's behind them if it has one; other rows may hold anything.
    It is called once, so that doctors which share a model can be read together.
    """
    size = doctors.vocab_size
    absent = torch.tensor(doctors.absent, dtype=torch.long, device=patient.device)

    def known(logits: Tensor) -> Tensor:  # ids that no token has are no tokens
        return logits.index_fill(1, absent, -torch.inf) if len(absent) else logits

    patient = known(patient)
    if doctors.min_entropy > 0 and bool((beta != 0).any()):
        gated = entropy_gate(patient, beta, torch.full_like(alpha, doctors.min_entropy), size)
        off = off | ((beta != 0) & (gated == 0)).any(1)
    alpha, beta = alpha.masked_fill(off, 1.0), beta.masked_fill(off[:, None], 0.0)
    used = [d for d in range(beta.shape[1]) if bool((beta[:, d] != 0).any())]
    names = list(doctors.models)
    given = read({names[d]: beta[:, d] != 0 for d in used}) if used else {}
    logits = [[known(found) for found in given[names[d]]] for d in used]
    first, second = [own[0] for own in logits], [own[1] if len(own) > 1 else None for own in logits]
    alone = mix_logits(patient, [], torch.ones_like(alpha), beta[:, :0], size)
    guided = ~unguided(alpha, beta)
    mixed = mix_logits(patient, first, alpha, beta[:, used], size, second) if bool(guided.any()) else alone
    scores = guided_logits(patient, mixed, alpha, beta)
    scores = torch.cat([scores[:, :size], torch.full_like(scores[:, size:], -torch.inf)], 1)
    return Mixed(mixed, alone, scores, guided)


class Guide:
    """The doctors of one running batch: their streams, the rows' weights, and where guidance is off."""

    def __init__(
        self,
        doctors: Doctors,
        prompts: Sequence[Sequence[int]],
        alpha: Tensor,
        beta: Tensor,
        own_prompts: Sequence[Mapping[str, Sequence[int]]] | None = None,
        patient: Any = None,
    ):
        self.doctors, self.alpha, self.beta, self.patient = doctors, alpha, beta, patient
        self.watches = [SpanTracker.after(doctors.tokenizer, doctors.spans, prompt) for prompt in prompts]
        self.streams: dict[tuple[int, str], tuple[Decoder, Tensor]] = {}
        """By model and prompts; with the rows that it reads, since each row costs a forward."""
        own_prompts = own_prompts or [{}] * len(prompts)
        own = {name for given in own_prompts for name in given}
        self.keys: dict[str, list[tuple[int, str]]] = {}
        wanted: dict[tuple[int, str], tuple[Any, str, Tensor]] = {}
        for d, name in enumerate(doctors.models):
            models = [doctors.models[name], *([doctors.references[name]] if name in doctors.references else [])]
            self.keys[name] = [(id(model), name if name in own else "") for model in models]
            for key, model in zip(self.keys[name], models, strict=True):
                before = wanted[key][2] if key in wanted else torch.zeros_like(beta[:, d], dtype=torch.bool)
                wanted[key] = (model, name, before | (beta[:, d] != 0))
        for key, (model, name, rows) in wanted.items():
            if bool(rows.any()) and key != (id(patient), ""):
                index = rows.nonzero()[:, 0]
                texts = [own_prompts[i].get(name, prompts[i]) for i in index.tolist()]
                self.streams[key] = (Decoder(model, texts), index)

    def mix(self, patient: Tensor) -> Mixed:
        """The next token's distribution, from the patient's logits [R, V]. Runs the doctors that are needed now."""
        off = torch.tensor([w.inside is not None for w in self.watches], device=self.beta.device)

        def read(needed: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
            return {name: [self._logits(key, patient) for key in self.keys[name]] for name in needed}

        return mix_rows(self.doctors, patient, self.alpha, self.beta, off, read)

    def _logits(self, key: tuple[int, str], patient: Tensor) -> Tensor:
        """[R, V] with anything in rows that give the model no weight."""
        if key not in self.streams:
            return patient
        stream, rows = self.streams[key]
        found = stream.logits()
        if len(rows) < len(self.alpha):
            found = found.new_zeros(len(self.alpha), found.shape[1]).index_copy(0, rows, found)
        return found

    def feed(self, tokens: Tensor) -> None:
        """The tokens [R] that were taken."""
        for stream, rows in self.streams.values():
            stream.feed(tokens[rows])
        for watch, token in zip(self.watches, tokens.tolist(), strict=True):
            watch.read(token)

    def select(self, index: Tensor) -> None:
        """Keep the rows at `index`, in its order; a row may stand there more than once."""
        kept = index.tolist()
        self.watches = [replace(self.watches[i]) for i in kept]
        self.alpha, self.beta = self.alpha[index], self.beta[index]
        for key, (stream, rows) in list(self.streams.items()):
            place = {row: i for i, row in enumerate(rows.tolist())}
            held = [(new, place[old]) for new, old in enumerate(kept) if old in place]
            if not held:
                del self.streams[key]
                continue
            new, old = (torch.tensor(column, device=index.device) for column in zip(*held, strict=True))
            stream.select(old)
            self.streams[key] = (stream, new)


# ---- inside transformers' generate() ----


class GuidedLogitsProcessor(LogitsProcessor):
    """The doctors as a processor of `patient.generate(..., logits_processor=LogitsProcessorList([it]))`.

    attention_mask: the one `generate()` is given, since padding cannot be told from tokens otherwise. alpha, beta: for
    all rows, or one for each prompt. Padding columns come out as -inf; where the patient decodes alone its logits pass
    to the bit. Rows may be repeated and reordered (several samples, beams): a row's past says which caches are its own.
    One object serves one call of generate(); another past is refused with ValueError.

    >>> asked = patient_tokenizer("how is the tea", return_tensors="pt")
    >>> steer = GuidedLogitsProcessor(guided.doctors, asked["attention_mask"], beta={"kind": 1.0})
    >>> given = {"input_ids": asked["input_ids"], "attention_mask": asked["attention_mask"]}
    >>> guided.patient.generate(**given, logits_processor=LogitsProcessorList([steer]), max_new_tokens=4).shape[0]
    1
    """

    def __init__(
        self,
        doctors: Doctors,
        attention_mask: Tensor,
        alpha: float | Sequence[float] = 1.0,
        beta: Mapping[str, float] | Sequence[Mapping[str, float]] = (),
    ):
        prompts = len(attention_mask)
        self.doctors, self.mask = doctors, attention_mask.bool()
        self.alpha = [float(alpha)] * prompts if isinstance(alpha, (int, float)) else [float(a) for a in alpha]
        self.beta = [dict(beta)] * prompts if isinstance(beta, Mapping) else [dict(b) for b in beta] or [{}] * prompts
        if not len(self.alpha) == len(self.beta) == prompts:
            raise ValueError(f"{len(self.alpha)} alphas and {len(self.beta)} betas for {prompts} prompts")
        self.guide: Guide | None = None
        self.seen = torch.empty(0)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.guide is None:
            self._begin(input_ids)
        else:
            self._follow(input_ids)
        assert self.guide is not None
        self.seen = input_ids
        return self.guide.mix(scores).scores.to(scores.dtype)

    def _begin(self, input_ids: Tensor) -> None:
        rows, prompts = len(input_ids), len(self.mask)
        if input_ids.shape[1] != self.mask.shape[1] or rows % prompts:
            raise ValueError(
                f"generate() brought prompts of shape {tuple(input_ids.shape)}, the attention mask is "
                f"{tuple(self.mask.shape)}: give the processor generate()'s own attention_mask"
            )
        self.each = rows // prompts  # generate() repeats a prompt in place, for samples or beams
        of = [i // self.each for i in range(rows)]
        self.mask = self.mask[of].to(input_ids.device)
        if not bool(self.mask[:, -1].all()):
            raise ValueError("a prompt ends with padding: pad on the left (tokenizer.padding_side)")
        texts = [ids[mask].tolist() for ids, mask in zip(input_ids, self.mask, strict=True)]
        alpha = torch.tensor([self.alpha[i] for i in of], device=input_ids.device)
        beta = self.doctors.weights([self.beta[i] for i in of], input_ids.device)
        self.guide = Guide(self.doctors, texts, alpha, beta)

    def _follow(self, input_ids: Tensor) -> None:
        """Give every row the caches of its past, then its newest token."""
        assert self.guide is not None
        past = input_ids[:, :-1]
        if past.shape != self.seen.shape or not bool((past == self.seen).all()):
            index = [self._parent(row, ids) for row, ids in enumerate(past)]
            chosen = torch.tensor(index, device=input_ids.device)
            self.guide.select(chosen)
        self.guide.feed(input_ids[:, -1])

    def _parent(self, row: int, past: Tensor) -> int:
        """The earlier row of the same prompt that `past` goes on from."""
        first = row // self.each * self.each
        for other in range(first, first + self.each):
            if self.seen.shape[1] == len(past) and other < len(self.seen) and bool((self.seen[other] == past).all()):
                return other
        raise ValueError(
            f"row {row} does not go on from any row of the step before: make a new GuidedLogitsProcessor for each call of "
            "generate(), and use neither assisted decoding nor prompt lookup with it"
        )
