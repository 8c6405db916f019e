"""Guided decoding against a slow truth that recomputes everything at every token, and against the published mistakes."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.guided_models import EOS, TEXTS, TOKENIZER, VOCAB, decode_recipe, model
from support.journals import journals_kept
from support.recipes import ROOT
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
)

from nemo_pivotrl import cli
from nemo_pivotrl.backends import batching
from nemo_pivotrl.backends.reference import guided as guided_module
from nemo_pivotrl.backends.reference.guided import (
    Doctors,
    Guided,
    GuidedGenerator,
    GuidedLogitsProcessor,
    GuidedSamplingParams,
    Span,
    check_contract,
    load_guided,
)
from nemo_pivotrl.config import Doctor
from nemo_pivotrl.config.load import load_recipe
from nemo_pivotrl.core.artifacts import read_header, read_rows
from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.data.chat_template import Chat
from nemo_pivotrl.demo import tiny_models as tiny

NEVER = frozenset[int]()
PROMPTS = [TOKENIZER.encode(t) for t in ("book a flight to oslo", "fox", "cancel 12 tickets", "the")]


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {
        "patient": model(1, layers=2, extra=8),
        "kind": model(2, extra=3),
        "brief": model(3, kind="qwen3"),
        "base": model(4, extra=16),
    }


def generator(models: Mapping[str, Any], *, ratio: Sequence[str] = (), **settings: Any) -> GuidedGenerator:
    own = {"kind": models["kind"], "brief": models["brief"]}
    settings = {"stop_ids": NEVER, **settings}
    return GuidedGenerator(models["patient"], own, TOKENIZER, {name: models["base"] for name in ratio}, **settings)


# ---- the slow truth ----


def slow_logs(a_model: Any, ids: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = a_model(input_ids=torch.tensor([list(ids)])).logits[0, -1]
    return torch.log_softmax(logits[:VOCAB].double(), 0)


def slow_cut(log_p: torch.Tensor, request: GuidedSamplingParams) -> list[float]:
    """Probabilities after temperature, top-k and top-p, one token after another."""
    p = torch.softmax(log_p / request.temperature, 0).tolist()
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))[: request.top_k or len(p)]
    total, kept, mass = sum(p[i] for i in order), [], 0.0
    for i in order:
        if request.top_p < 1 and kept and mass >= request.top_p:
            break
        kept.append(i)
        mass += p[i] / total
    return [p[i] / sum(p[j] for j in kept) if i in kept else 0.0 for i in range(len(p))]


def slow_draw(log_p: torch.Tensor, request: GuidedSamplingParams, uniform: float) -> tuple[int, float]:
    if request.temperature == 0:
        return int(log_p.argmax()), float(log_p.max())
    p, reached = slow_cut(log_p, request), 0.0
    for i, probability in enumerate(p):
        reached += probability
        if uniform < reached:
            return i, math.log(probability)
    raise AssertionError("no token")


def slow(
    models: Mapping[str, Any],
    prompt: Sequence[int],
    request: GuidedSamplingParams,
    ratio: Sequence[str] = (),
    own: Mapping[str, Sequence[int]] | None = None,
    off: Callable[[Sequence[int], torch.Tensor], bool] = lambda answer, patient: False,
) -> list[tuple[int, float, float, float, float, bool, bool]]:
    """What a Guided's tokens should hold, by the definition: no cache, no padding, no batch, float64."""
    noise = guided_module.noise_of(request, prompt)
    answer: list[int] = []
    records = []
    for step in range(request.max_new_tokens):
        patient = slow_logs(models["patient"], [*prompt, *answer])
        log_p = request.alpha * patient
        for name, weight in request.beta.items():
            before = (own or {}).get(name, prompt)
            if weight:
                log_p = log_p + weight * slow_logs(models[name], [*before, *answer])
                if name in ratio:
                    log_p = log_p - weight * slow_logs(models["base"], [*before, *answer])
        log_p = patient if off(answer, patient) else torch.log_softmax(log_p, 0)
        token, log_prob = slow_draw(log_p, request, noise[step])
        alone, _ = slow_draw(patient, request, noise[step])
        distance = float((log_p.exp() * (log_p - patient)).sum())
        changed = int(log_p.argmax()) != int(patient.argmax())
        records.append((token, log_prob, float(patient[token]), float(log_p[token]), distance, changed, alone != token))
        answer.append(token)
    return records


def agrees(found: Guided, expected: list[tuple[int, float, float, float, float, bool, bool]]) -> None:
    assert [t.token_id for t in found.tokens] == [e[0] for e in expected]
    for token, wanted in zip(found.tokens, expected, strict=True):
        assert token[1:5] == pytest.approx(wanted[1:5], abs=2e-4)
        assert token[5:7] == wanted[5:]


REQUESTS = [
    GuidedSamplingParams(alpha=1.0, beta={"kind": 0.8, "brief": -0.4}, temperature=0, max_new_tokens=14),
    GuidedSamplingParams(alpha=0.6, beta={"kind": 1.5}, temperature=0.7, top_k=9, seed=3, max_new_tokens=20),
    GuidedSamplingParams(alpha=1.0, beta={"brief": 1.0}, temperature=1.3, top_p=0.8, seed=4, max_new_tokens=9),
    GuidedSamplingParams(alpha=1.0, temperature=0.9, top_k=12, top_p=0.9, seed=5, max_new_tokens=16),
]


# ---- the loop ----


@pytest.mark.parametrize("ratio", [(), ("kind",), ("kind", "brief")])
def test_a_mixed_batch_equals_the_slow_truth_of_each_row(models: dict[str, Any], ratio: Sequence[str]) -> None:
    found = generator(models, ratio=ratio).generate(PROMPTS, REQUESTS)
    for answer, prompt, request in zip(found, PROMPTS, REQUESTS, strict=True):
        agrees(answer, slow(models, prompt, request, ratio))
        assert answer.finish_reason == "length"
    assert any(t.changed_argmax for t in found[0].tokens) and any(t.changed_token for t in found[1].tokens)
    assert all(t.kl == 0 and not t.changed_argmax and not t.changed_token for t in found[3].tokens)


def test_an_answer_is_the_same_alone_in_a_batch_and_beside_any_others(models: dict[str, Any]) -> None:
    made = generator(models)
    together = made.generate(PROMPTS, REQUESTS)
    backwards = made.generate(PROMPTS[::-1], REQUESTS[::-1])[::-1]
    small = generator(models, batch_tokens=40).generate(PROMPTS, REQUESTS)
    for i, (prompt, request) in enumerate(zip(PROMPTS, REQUESTS, strict=True)):
        (alone,) = made.generate([prompt], [request])
        for other in (together[i], backwards[i], small[i]):
            assert other.token_ids == alone.token_ids
            assert other.log_probs == pytest.approx(alone.log_probs, abs=1e-4)
    assert made.generate(PROMPTS, REQUESTS) == together


def test_left_padding_that_is_ignored_would_show(models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions counted from the padding, or an all-ones mask, the pattern of other code: the slow truth tells.

    With learned positions, since rotary ones forgive a row that is shifted as a whole."""
    learned = dict(models, patient=model(6, layers=2, kind="gpt2"), kind=model(7, kind="gpt2"))
    request = GuidedSamplingParams(beta={"kind": 1.0}, temperature=0, max_new_tokens=12)
    expected = [[r[0] for r in slow(learned, p, request)] for p in PROMPTS]
    forward = batching.Decoder._forward

    def positions_from_padding(self: Any, ids: Any, mask: Any, new: int) -> Any:
        positions = torch.arange(mask.shape[1])[None, -new:].expand(len(ids), -1)
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        with torch.no_grad():
            return self.model(**given, past_key_values=self.cache, use_cache=True).logits[:, -1]

    def mask_of_ones(self: Any, ids: Any, mask: Any, new: int) -> Any:
        return forward(self, ids, torch.ones_like(mask), new)

    assert [list(a.token_ids) for a in generator(learned).generate(PROMPTS, request)] == expected
    for wrong in (positions_from_padding, mask_of_ones):
        monkeypatch.setattr(batching.Decoder, "_forward", wrong)
        assert [list(a.token_ids) for a in generator(learned).generate(PROMPTS, request)] != expected


def test_beta_0_is_plain_greedy_to_the_bit_and_runs_no_doctor(
    models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = dict(models, patient=model(1, layers=2))  # without padding columns, which plain greedy would emit
    made = generator(plain)
    for doctor in ("kind", "brief"):
        monkeypatch.setattr(plain[doctor], "forward", lambda **_: pytest.fail("a doctor ran"))
    zero = GuidedSamplingParams(beta={"kind": 0.0, "brief": 0.0}, temperature=0, max_new_tokens=16)
    answers = made.generate(PROMPTS, zero)
    ids, mask = padded(PROMPTS)
    settings = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "output_logits": True}
    out = plain["patient"].generate(
        input_ids=ids, attention_mask=mask, pad_token_id=0, return_dict_in_generate=True, **settings
    )
    assert [list(a.token_ids) for a in answers] == out.sequences[:, ids.shape[1] :].tolist()
    decoding = made.start(PROMPTS, [zero] * 4)
    mixed = decoding.guide.mix(decoding.stream.logits())
    assert torch.equal(mixed.scores, out.logits[0]) and torch.equal(mixed.log_probs, out.logits[0].log_softmax(1))


def padded(prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[TOKENIZER.pad_token_id] * (width - len(p)) + list(p) for p in prompts])
    return ids, torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])


def test_a_doctor_runs_for_the_rows_that_weigh_it_only(models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    forward = models["kind"].forward
    monkeypatch.setattr(
        models["kind"], "forward", lambda **given: (rows.append(len(given["input_ids"])), forward(**given))[1]
    )
    generator(models).generate(PROMPTS, [dataclasses.replace(r, max_new_tokens=3) for r in REQUESTS])
    assert rows == [2, 2, 2]  # of four: prompt and two more tokens; the last token is never read


def test_the_distance_from_the_patient_is_computed_for_guided_rows_only(
    models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    compute = guided_module.kl
    monkeypatch.setattr(guided_module, "kl", lambda one, other: (rows.append(len(one)), compute(one, other))[1])
    beta = ({"kind": 1.0}, {}, {"brief": 1.0}, {})
    requests = [GuidedSamplingParams(beta=own, seed=3, max_new_tokens=3) for own in beta]
    answers = GuidedGenerator(
        models["patient"], {n: models[n] for n in ("kind", "brief")}, TOKENIZER, stop_ids=NEVER
    ).generate(PROMPTS, requests)
    assert rows == [2, 2, 2]
    assert [all(t.kl > 0 for t in a.tokens) for a in answers] == [True, False, True, False]
    assert all(t.kl == 0 for n in (1, 3) for t in answers[n].tokens)


def test_temperature_1_beside_others_draws_from_the_same_distribution() -> None:
    scores, chance = torch.randn(2, 50, dtype=torch.float64), torch.tensor([0.3, 0.7], dtype=torch.float64)

    def at(*temperatures: float) -> tuple[torch.Tensor, torch.Tensor]:
        ones = torch.ones(2, dtype=torch.float64)
        return guided_module.draw(
            scores, guided_module.Shape(torch.tensor(temperatures), ones.long() * 0, ones), chance
        )

    plain, mixed = at(1.0, 1.0), at(1.0, 0.5)
    assert plain[0][0] == mixed[0][0] and float(plain[1][0]) == pytest.approx(float(mixed[1][0]), abs=1e-12)
    expected = torch.log_softmax(scores[1], 0)[plain[0][1]]
    assert float(plain[1][1]) == pytest.approx(float(expected), abs=1e-12)


def test_alpha_0_beta_1_is_the_doctor_and_two_objectives_commute(models: dict[str, Any]) -> None:
    doctor_alone = GuidedSamplingParams(alpha=0.0, beta={"kind": 1.0}, temperature=0.8, seed=2, max_new_tokens=10)
    as_patient = GuidedGenerator(models["kind"], {}, TOKENIZER, stop_ids=NEVER)
    found = generator(models).generate(PROMPTS, doctor_alone)
    expected = as_patient.generate(PROMPTS, dataclasses.replace(doctor_alone, alpha=1.0, beta={}))
    assert [a.token_ids for a in found] == [a.token_ids for a in expected]
    both = {"kind": 0.7, "brief": 0.9}
    forth = GuidedGenerator(models["patient"], {n: models[n] for n in both}, TOKENIZER, stop_ids=NEVER)
    back = GuidedGenerator(models["patient"], {n: models[n] for n in reversed(both)}, TOKENIZER, stop_ids=NEVER)
    request = GuidedSamplingParams(beta=both, seed=1, max_new_tokens=10)
    for a, b in zip(forth.generate(PROMPTS, request), back.generate(PROMPTS, request), strict=True):
        assert a.token_ids == b.token_ids and a.log_probs == pytest.approx(b.log_probs, abs=1e-5)


def test_the_patient_as_reference_is_not_run_twice_and_changes_nothing(
    models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = GuidedSamplingParams(beta={"kind": 0.9}, seed=8, max_new_tokens=8)
    doubled = GuidedGenerator(
        models["patient"], {"kind": models["kind"]}, TOKENIZER, {"kind": model(1, layers=2, extra=8)}, stop_ids=NEVER
    )
    shared = GuidedGenerator(
        models["patient"], {"kind": models["kind"]}, TOKENIZER, {"kind": models["patient"]}, stop_ids=NEVER
    )
    expected = [a.token_ids for a in doubled.generate(PROMPTS, request)]
    calls, forward = [], models["patient"].forward
    monkeypatch.setattr(models["patient"], "forward", lambda **given: (calls.append(1), forward(**given))[1])
    assert [a.token_ids for a in shared.generate(PROMPTS, request)] == expected and len(calls) == 8


def test_every_model_may_read_its_own_prompt(models: dict[str, Any]) -> None:
    own = [{"kind": TOKENIZER.encode("the quick brown")}, {}, {"brief": PROMPTS[0]}, {}]
    requests = [dataclasses.replace(REQUESTS[i % 2], max_new_tokens=10) for i in range(4)]
    found = generator(models, ratio=("kind",)).generate(PROMPTS, requests, own)
    for answer, prompt, request, texts in zip(found, PROMPTS, requests, own, strict=True):
        agrees(answer, slow(models, prompt, request, ("kind",), texts))
    assert found[0] != generator(models, ratio=("kind",)).generate(PROMPTS, requests)[0]


def test_float64_models_agree_with_the_slow_truth_to_1e_6(models: dict[str, Any]) -> None:
    exact = {name: model(*made) for name, made in {"patient": (1, 2, 8), "kind": (2, 1, 3), "brief": (3,)}.items()}
    exact = {name: made.double() for name, made in exact.items()}
    request = GuidedSamplingParams(
        alpha=0.5, beta={"kind": 1.5, "brief": 0.25}, temperature=0.7, seed=9, max_new_tokens=12
    )
    for answer, prompt in zip(generator(exact).generate(PROMPTS, request), PROMPTS, strict=True):
        expected = slow(exact, prompt, request)
        assert answer.token_ids == tuple(e[0] for e in expected)
        assert answer.log_probs == pytest.approx([e[1] for e in expected], abs=1e-6)


# ---- wrong variants ----


def test_padding_columns_are_never_sampled_and_would_be(models: dict[str, Any]) -> None:
    hot = GuidedSamplingParams(beta={"kind": 1.0}, temperature=5.0, max_new_tokens=40)
    for request in (hot, dataclasses.replace(hot, beta={}), dataclasses.replace(hot, temperature=0.0, beta={})):
        for answer in generator(models).generate(PROMPTS, [dataclasses.replace(request, seed=i) for i in range(4)]):
            assert max(answer.token_ids) < VOCAB
    with torch.no_grad():
        logits = models["patient"](input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1]
    assert int(logits.argmax()) >= VOCAB  # the wrong variant


def test_top_p_before_mixing_gives_another_answer(models: dict[str, Any]) -> None:
    request = GuidedSamplingParams(beta={"kind": 1.5}, top_p=0.08, max_new_tokens=1)
    patient, doctor = (slow_logs(models[m], PROMPTS[0]) for m in ("patient", "kind"))
    after = slow_cut(torch.log_softmax(patient + 1.5 * doctor, 0), request)
    kept = torch.tensor(slow_cut(patient, request)).log()
    before = torch.softmax(kept + 1.5 * doctor, 0)
    assert (torch.tensor(after) - before).abs().sum() / 2 > 0.3
    requests = [dataclasses.replace(request, seed=s) for s in range(200)]
    drawn = {a.token_ids[0] for a in generator(models).generate([PROMPTS[0]] * 200, requests)}
    assert drawn == {i for i, p in enumerate(after) if p > 0} != {i for i, p in enumerate(before.tolist()) if p > 0}


def test_log_softmax_omitted_would_show_in_what_is_reported(models: dict[str, Any]) -> None:
    request = GuidedSamplingParams(beta={"kind": 1.0}, temperature=0, max_new_tokens=1, top=VOCAB)
    (answer,) = generator(models).generate([PROMPTS[0]], request)
    token = answer.tokens[0]
    assert sum(math.exp(lp) for _, lp in token.top) == pytest.approx(1, abs=1e-5)
    assert token.top[0] == (token.token_id, token.mixed_log_prob)
    with torch.no_grad():
        raw = [models[m](input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1, :VOCAB] for m in ("patient", "kind")]
    assert abs(float((raw[0] + raw[1])[token.token_id]) - token.mixed_log_prob) > 0.1


def test_ids_without_a_token_are_never_sampled(models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    request = GuidedSamplingParams(beta={"kind": 1.0}, temperature=0, max_new_tokens=6)
    (plain,) = generator(models).generate([PROMPTS[0]], request)
    words = dict(TOKENIZER.get_vocab())
    hole = plain.token_ids[0]
    monkeypatch.setattr(type(TOKENIZER), "get_vocab", lambda self: {w: i for w, i in words.items() if i != hole})
    made = generator(models)
    assert made.doctors.absent == [hole]
    for beta in ({"kind": 1.0}, {}):
        (answer,) = made.generate([PROMPTS[0]], dataclasses.replace(request, beta=beta))
        assert hole not in answer.token_ids


def test_frequencies_are_those_of_the_mixture(models: dict[str, Any]) -> None:
    request = GuidedSamplingParams(
        alpha=0.5, beta={"kind": 1.2}, temperature=0.8, top_k=6, top_p=0.95, max_new_tokens=1
    )
    patient, doctor = (slow_logs(models[m], PROMPTS[1]) for m in ("patient", "kind"))
    expected = torch.tensor(slow_cut(torch.log_softmax(0.5 * patient + 1.2 * doctor, 0), request))
    draws = 3000
    requests = [dataclasses.replace(request, seed=s) for s in range(draws)]
    answers = generator(models, batch_tokens=10**6).generate([PROMPTS[1]] * draws, requests)
    counts = torch.bincount(torch.tensor([a.token_ids[0] for a in answers]), minlength=VOCAB) / draws
    assert (counts - expected).abs().max() < 4 * math.sqrt(0.25 / draws)
    assert not counts[expected == 0].any()


# ---- where guidance is off ----


def test_guidance_is_off_between_the_markers_and_on_again_after_them(models: dict[str, Any]) -> None:
    request = GuidedSamplingParams(alpha=0.8, beta={"kind": 1.0, "brief": 0.6}, temperature=0, max_new_tokens=24)
    free = [t[0] for t in slow(models, PROMPTS[0], request)]
    start = TOKENIZER.decode(free[4:6])
    inside = slow(models, PROMPTS[0], request, off=lambda answer, _: start in TOKENIZER.decode(answer))
    end = TOKENIZER.decode([inside[10][0], inside[11][0]])

    def off(answer: Sequence[int], _: Any) -> bool:
        text, where = TOKENIZER.decode(list(answer)), False
        while (marker := end if where else start) in text:
            text, where = text.partition(marker)[2], not where
        return where

    expected = slow(models, PROMPTS[0], request, off=off)
    spans = [Span(start, end)]
    alone, *_ = generator(models, spans=spans).generate([PROMPTS[0]], request)
    agrees(alone, expected)
    batch = generator(models, spans=spans).generate(PROMPTS, request)
    assert batch[0].token_ids == alone.token_ids
    kinds = [t.kl == 0 for t in alone.tokens]
    assert not kinds[0] and kinds[6] and kinds[11] and len(set(kinds[12:])) >= 1
    assert alone.token_ids != tuple(free)


def test_a_row_keeps_its_own_span_when_others_leave_the_batch(models: dict[str, Any]) -> None:
    inside = [*PROMPTS[3], *TOKENIZER.encode("<tool_call>")]
    prompts, steps = [PROMPTS[0], PROMPTS[1], inside, PROMPTS[2]], [2, 3, 14, 14]
    requests = [GuidedSamplingParams(beta={"kind": 1.0}, temperature=0, max_new_tokens=n) for n in steps]
    found = generator(models, spans=[Span("<tool_call>", "</tool_call>")]).generate(prompts, requests)
    agrees(found[2], slow(models, inside, requests[2], off=lambda *_: True))
    agrees(found[3], slow(models, PROMPTS[2], requests[3]))


def test_a_doctor_that_nobody_needs_waits_and_reads_what_it_missed_in_one_piece(
    models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: list[int] = []
    forward = models["kind"].forward
    monkeypatch.setattr(
        models["kind"], "forward", lambda **given: (widths.append(given["input_ids"].shape[1]), forward(**given))[1]
    )
    request = GuidedSamplingParams(beta={"kind": 1.0}, temperature=0, max_new_tokens=12)
    prompt = [*PROMPTS[0], *TOKENIZER.encode("<tool_call>")]
    alone = [t[0] for t in slow(models, prompt, dataclasses.replace(request, beta={}))]
    spans = [Span("<tool_call>", TOKENIZER.decode(alone[3:5]))]
    generator(models, spans=spans).generate([prompt], request)
    assert widths[:2] == [len(prompt), 5] and set(widths[2:]) == {1} and len(widths) == 12 - 5 + 1


def test_the_entropy_gate_leaves_sure_states_to_the_patient(models: dict[str, Any]) -> None:
    request = GuidedSamplingParams(alpha=0.8, beta={"kind": 1.0}, temperature=0, max_new_tokens=14)
    found = [slow_logs(models["patient"], p) for p in PROMPTS]
    minimum = sorted(float(-(log_p.exp() * log_p).sum()) for log_p in found)[1] + 1e-3

    def off(_: Any, patient: torch.Tensor) -> bool:
        return float(-(patient.exp() * patient).sum()) < minimum

    answers = generator(models, min_entropy=minimum).generate(PROMPTS, request)
    for answer, prompt in zip(answers, PROMPTS, strict=True):
        agrees(answer, slow(models, prompt, request, off=off))
    alone = {t.kl == 0 for a in answers for t in a.tokens}
    assert alone == {True, False}


def test_the_markers_of_a_template_are_found() -> None:
    chat = Chat(TOKENIZER)
    assert chat.markers("tool_calls") == ("<tool_call>", "</tool_call>")
    with pytest.raises(InputError, match="off_markers"):
        chat.markers("reasoning")
    thinking = tiny.make_tokenizer(TEXTS, 320)
    thinking.chat_template = tiny.CHAT_TEMPLATE.replace(
        "<|{{ m.role }}|>",
        "<|{{ m.role }}|>{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}",
    )
    assert Chat(thinking).markers("reasoning") == ("<think>", "</think>")


# ---- stopping, seeds, requests ----


def test_stop_tokens_end_answers_and_belong_to_them(models: dict[str, Any]) -> None:
    request = GuidedSamplingParams(beta={"kind": 0.8}, temperature=0, max_new_tokens=14)
    free = [a.token_ids for a in generator(models).generate(PROMPTS, request)]
    stop = frozenset({free[0][5]})
    for answer, whole in zip(generator(models, stop_ids=stop).generate(PROMPTS, request), free, strict=True):
        cut = next((i + 1 for i, t in enumerate(whole) if t in stop), len(whole))
        assert answer.token_ids == whole[:cut]
        assert answer.finish_reason == ("stop" if whole[cut - 1] in stop else "length")
    mine = dataclasses.replace(request, stop_ids=frozenset({free[1][3]}))
    assert generator(models, stop_ids=stop).generate([PROMPTS[1]], mine)[0].token_ids[-1] == free[1][3]
    assert GuidedGenerator(models["patient"], {}, TOKENIZER).stop_ids == {EOS}


def test_a_stopped_row_costs_nothing_more_and_the_others_go_on(models: dict[str, Any]) -> None:
    request = GuidedSamplingParams(beta={"kind": 0.8}, temperature=0, max_new_tokens=8)
    made = generator(models)
    whole = made.generate(PROMPTS, request)
    decoding = made.start(PROMPTS, [request] * 4)
    taken: dict[int, list[int]] = {i: [] for i in range(4)}
    while not decoding.done:
        for row, token, _ in decoding.step():
            taken[row].append(token.token_id)
            if row != 2 and len(taken[row]) == 3:
                decoding.stop(row)
    assert [len(taken[i]) for i in range(4)] == [3, 3, 8, 3] and decoding.alive == [2]
    assert tuple(taken[2]) == whole[2].token_ids


def test_a_seed_repeats_itself_and_others_differ(models: dict[str, Any]) -> None:
    request = GuidedSamplingParams(beta={"kind": 0.5}, max_new_tokens=10)
    requests = [dataclasses.replace(request, seed=s) for s in (1, 1, 2)]
    one, again, other = generator(models).generate([PROMPTS[0]] * 3, requests)
    assert one == again and one.token_ids != other.token_ids


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"alpha": math.nan}, "finite"),
        ({"beta": {"kind": math.inf}}, "finite"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"max_new_tokens": 0}, "at least 1"),
    ],
)
def test_a_request_out_of_range_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        GuidedSamplingParams(**change)


def test_requests_that_cannot_be_decoded_are_named_all_at_once(models: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        generator(models).generate(
            [[], [VOCAB], PROMPTS[0] * 40, PROMPTS[0]], GuidedSamplingParams(beta={"kindness": 1.0}, max_new_tokens=4)
        )
    text = str(caught.value)
    assert len(caught.value.problems) == 4
    assert "no token" in text and f"id {VOCAB}" in text and "the models read 96" in text and "brief, kind" in text


# ---- contract ----


def other_tokenizer(**changes: Any) -> Any:
    return tiny.make_tokenizer(changes.get("texts", TEXTS), changes.get("vocab", 320))


def test_equal_vocabularies_pass_whatever_the_padded_width(models: dict[str, Any]) -> None:
    assert check_contract(models["patient"], models["kind"], (TOKENIZER, other_tokenizer())) == VOCAB
    assert check_contract(models["patient"], models["brief"], (TOKENIZER, other_tokenizer())) == VOCAB


def test_every_difference_of_the_contract_is_named_with_what_to_do(models: dict[str, Any]) -> None:
    def refusal(tokenizer: Any, doctor: Any = None) -> str:
        with pytest.raises(InputError) as caught:
            check_contract(models["patient"], doctor or models["kind"], (TOKENIZER, tokenizer), "brevity")
        return str(caught.value)

    swapped = refusal(other_tokenizer(texts=["zebra zebra zebra", "yak yak"]))
    assert "doctor brevity: vocabulary" in swapped and "differ" in swapped and "patient's own tokenizer" in swapped
    added = other_tokenizer()
    added.add_tokens(["<think>"])
    assert "added tokens" in refusal(added) and "'<think>': None against" in refusal(added)
    ended = other_tokenizer()
    ended.eos_token = "<|pad|>"
    assert "eos token: found" in refusal(ended) and "(<|pad|>)" in refusal(ended)
    narrow = model(5)
    narrow.resize_token_embeddings(VOCAB - 1)
    assert f"{VOCAB - 1} columns of the doctor for {VOCAB}" in refusal(other_tokenizer(), narrow)
    with pytest.raises(InputError, match="doctor kind: logits"):
        GuidedGenerator(models["patient"], {"kind": narrow}, TOKENIZER)
    with pytest.raises(InputError, match="patient: logits"):
        GuidedGenerator(narrow, {}, TOKENIZER)
    with pytest.raises(InputError, match="added tokens"):
        GuidedGenerator(models["patient"], {"a": models["kind"]}, TOKENIZER, doctor_tokenizers={"a": added})


# ---- inside generate() ----


def processed(
    models: Mapping[str, Any],
    made: GuidedGenerator,
    alpha: Any,
    beta: Any,
    prompts: Sequence[Sequence[int]],
    **how: Any,
) -> list[list[int]]:
    ids, mask = padded(prompts)
    processor = GuidedLogitsProcessor(made.doctors, mask, alpha, beta)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **how}
    out = models["patient"].generate(
        input_ids=ids, attention_mask=mask, logits_processor=LogitsProcessorList([processor]), **settings
    )
    return out[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("ratio", [(), ("brief",)])
def test_the_processor_equals_the_generator_token_by_token(models: dict[str, Any], ratio: Sequence[str]) -> None:
    alpha = [1.0, 0.7, 1.0, 1.0]
    beta = [{"kind": 1.0}, {"kind": -0.5, "brief": 1.0}, {}, {"brief": 0.8}]
    made = generator(models, ratio=ratio, spans=[Span("e", "t")], min_entropy=0.5)
    requests = [
        GuidedSamplingParams(alpha=a, beta=b, temperature=0, max_new_tokens=12)
        for a, b in zip(alpha, beta, strict=True)
    ]
    expected = [list(a.token_ids) for a in made.generate(PROMPTS, requests)]
    assert processed(models, made, alpha, beta, PROMPTS) == expected
    same = made.generate(PROMPTS, GuidedSamplingParams(beta={"kind": 1.0}, temperature=0, max_new_tokens=12))
    assert processed(models, made, 1.0, {"kind": 1.0}, PROMPTS) == [list(a.token_ids) for a in same]


class SlowProcessor(LogitsProcessor):
    """The mixture from whole forwards without a cache."""

    def __init__(self, models: Mapping[str, Any], mask: torch.Tensor):
        self.models, self.mask = models, mask

    def __call__(self, ids: Any, scores: Any) -> Any:
        mask = self.mask.repeat_interleave(len(ids) // len(self.mask), 0).bool()
        mask = torch.cat([mask, mask.new_ones(len(ids), ids.shape[1] - mask.shape[1])], 1)
        doctor = torch.stack(
            [slow_logs(self.models["kind"], row[m].tolist()) for row, m in zip(ids, mask, strict=True)]
        )
        mixed = torch.log_softmax(scores[:, :VOCAB].log_softmax(1) + 1.2 * doctor, 1).float()
        return torch.cat([mixed, torch.full_like(scores[:, VOCAB:], -torch.inf)], 1)


@pytest.mark.parametrize(
    "how",
    [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 3}],
)
def test_the_processor_follows_beams_and_repeated_prompts(models: dict[str, Any], how: dict[str, Any]) -> None:
    made = generator(models)
    ids, mask = padded(PROMPTS)
    torch.manual_seed(0)
    found = processed(models, made, 1.0, {"kind": 1.2}, PROMPTS, max_new_tokens=8, **how)
    torch.manual_seed(0)
    slow_one = LogitsProcessorList([SlowProcessor(models, mask)])
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **how}
    out = models["patient"].generate(input_ids=ids, attention_mask=mask, logits_processor=slow_one, **settings)
    assert found == out[:, ids.shape[1] :].tolist()


def test_a_processor_refuses_a_second_call_other_padding_and_speculation(models: dict[str, Any]) -> None:
    made = generator(models)
    ids, mask = padded(PROMPTS)
    processor = GuidedLogitsProcessor(made.doctors, mask, 1.0, {"kind": 1.0})
    scores = torch.zeros(4, VOCAB + 8)
    processor(ids, scores)
    with pytest.raises(ValueError, match="new GuidedLogitsProcessor for each call"):
        processor(ids, scores)
    with pytest.raises(ValueError, match="does not go on"):
        processor(torch.cat([ids, ids[:, :2]], 1), scores)
    right = GuidedLogitsProcessor(made.doctors, mask.flip(1), 1.0, {"kind": 1.0})
    with pytest.raises(ValueError, match="pad on the left"):
        right(ids.flip(1), scores)
    with pytest.raises(ValueError, match="own attention_mask"):
        GuidedLogitsProcessor(made.doctors, mask[:, 1:], 1.0, {"kind": 1.0})(ids, scores)
    with pytest.raises(ValueError, match="2 alphas"):
        GuidedLogitsProcessor(made.doctors, mask, [1.0, 1.0], {"kind": 1.0})
    with pytest.raises(InputError, match="brief, kind"):
        GuidedLogitsProcessor(made.doctors, mask, 1.0, {"kindly": 1.0})(ids, scores)


# ---- loading and the stage ----


@pytest.fixture(scope="module")
def folders(models: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, made in models.items():
        made.save_pretrained(root / name)
        TOKENIZER.save_pretrained(root / name)
    return root


def test_loaded_folders_decode_as_the_models_do_and_pickles_are_refused(models: dict[str, Any], folders: Path) -> None:
    chosen = {"kind": Doctor(path=str(folders / "kind"), reference=str(folders / "base"))}
    request = GuidedSamplingParams(beta={"kind": 1.0}, temperature=0, max_new_tokens=6)
    for mode, ratio in (("product", ()), ("ratio", ("kind",))):
        made = load_guided(str(folders / "patient"), chosen, mode, device="cpu", stop_ids=NEVER)
        expected = generator(models, ratio=ratio).generate(PROMPTS, request)
        assert [a.token_ids for a in made.generate(PROMPTS, request)] == [a.token_ids for a in expected]
    pickled = folders / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text("{}")
    (pickled / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(InputError, match=r"pytorch_model.bin[\s\S]*pickles run code"):
        load_guided(str(folders / "patient"), {"kind": Doctor(path=str(pickled))})
    with pytest.raises(InputError, match=r"doctors\.kind\.reference"):
        load_guided(str(folders / "patient"), {"kind": Doctor(path=str(folders / "kind"))}, "ratio")
    with pytest.raises(InputError, match=r"doctors\.kind\.path"):
        load_guided(str(folders / "patient"), {"kind": Doctor()})


def test_a_doctor_with_a_template_of_its_own_reads_its_own_prompt(folders: Path, tmp_path: Path) -> None:
    from nemo_pivotrl.llmdoctor.decode import load, prompt_ids

    other = tiny.make_tokenizer(TEXTS, 320)
    other.chat_template = tiny.CHAT_TEMPLATE.replace("<|{{ m.role }}|>", "<|{{ m.role }}|> ")
    shutil.copytree(folders / "kind", tmp_path / "kind")
    other.save_pretrained(tmp_path / "kind")
    recipe = load_recipe(decode_recipe(folders, tmp_path), [f"decode.doctors.kind.path={tmp_path}/kind"])
    chat, _, own = load(recipe)
    messages = [{"role": "user", "content": "fox"}]
    assert set(own) == {"kind"} and prompt_ids("fox", [], chat, own)[1] == {}
    ids, others = prompt_ids(messages, [], chat, own)
    assert TOKENIZER.decode(ids).startswith("<|user|>fox") and TOKENIZER.decode(others["kind"]).startswith(
        "<|user|> fox"
    )


def test_the_stage_decodes_prompts_of_every_shape_with_their_own_weights(
    models: dict[str, Any], folders: Path, tmp_path: Path
) -> None:
    assert cli.main(["decode", decode_recipe(folders, tmp_path)]) == 0
    path = tmp_path / "run/decoded.jsonl"
    header, rows = read_header(path, "decoded"), list(read_rows(path))
    assert set(header.extra["doctors"]) == {"kind", "brief"} and header.policy and header.tokenizer
    assert [(r["id"], r["sample"]) for r in rows] == [(i, s) for i in ("a", "2", "3", "4", "7") for s in (0, 1)]
    assert rows[0]["token_ids"] != rows[1]["token_ids"] and rows[0]["seed"] != rows[1]["seed"]
    assert (rows[6]["alpha"], rows[6]["beta"]) == (0.5, {"kind": 0.8, "brief": 0.0})
    assert rows[8]["kl"] == 0 and rows[0]["kl"] > 0 and len(rows[0]["tokens"]["kl"]) == len(rows[0]["token_ids"])
    made = generator(models, stop_ids=None, spans=[Span("<tool_call>", "</tool_call>")])
    prompt = TOKENIZER.encode("oslo")
    request = GuidedSamplingParams(alpha=0.5, beta=rows[6]["beta"], seed=rows[6]["seed"], max_new_tokens=8)
    assert list(made.generate([prompt], request)[0].token_ids) == rows[6]["token_ids"]
    shown = Chat(TOKENIZER).prompt_ids([{"role": "user", "content": "book a flight"}], [])
    request = GuidedSamplingParams(beta={"kind": 0.8, "brief": 0.5}, seed=rows[0]["seed"], max_new_tokens=8)
    (answer,) = made.generate([shown], request)
    assert list(answer.token_ids) == rows[0]["token_ids"]
    assert rows[0]["log_prob"] == pytest.approx(sum(answer.log_probs), abs=1e-4)


def test_the_stage_resumes_to_the_same_bytes_from_any_row(folders: Path, tmp_path: Path) -> None:
    recipe = decode_recipe(folders, tmp_path)
    with journals_kept() as kept:
        assert cli.main(["decode", recipe]) == 0
    path = tmp_path / "run/decoded.jsonl"
    (journal,), whole = kept, path.read_bytes()
    for share in (0.4, 0.7, 1.0):
        path.unlink()
        path.with_name("decoded.jsonl.journal").write_bytes(journal[: int(share * len(journal))])
        assert cli.main(["decode", recipe]) == 0
        assert path.read_bytes() == whole
    assert cli.main(["decode", recipe]) == 0 and path.read_bytes() == whole
    assert cli.main(["decode", recipe, "decode.alpha=0.5"]) == 2  # finished work of other settings


def test_bad_prompts_and_doctors_of_the_stage_are_named(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = decode_recipe(folders, tmp_path)
    (tmp_path / "prompts.jsonl").write_text(
        '{"text": "x"}\n[1]\n{"prompt": "a", "beta": {"kin": 1}}\n{broken\n{"prompt": "a", "alpha": "b"}\n{"prompt": ""}\n'
        '{"prompt": "a", "tools": "b"}\n'
    )
    assert cli.main(["decode", recipe]) == 2
    shown = capsys.readouterr().err
    for line, said in (
        (1, "prompt"),
        (2, "messages"),
        (3, "kin"),
        (4, "line"),
        (5, "alpha"),
        (6, "prompt"),
        (7, "tools"),
    ):
        assert f"prompts.jsonl:{line}: " in shown and said in shown
    (tmp_path / "prompts.jsonl").write_text(
        json.dumps("fox " * 100) + '\n"fox"\n[{"role": "user", "tool_calls": [{}]}]\n'
    )
    assert cli.main(["decode", recipe]) == 2
    assert "prompts.jsonl:1: prompt: found" in (shown := capsys.readouterr().err) and "the models read 96" in shown
    assert "prompts.jsonl:3: messages" in shown and not (tmp_path / "run/decoded.jsonl").exists()
    assert cli.main(["decode", recipe, "decode.doctors={kind: {path: nowhere}}"]) == 2
    assert "decode.doctors.kind.path" in capsys.readouterr().err
    assert cli.main(["decode", recipe, "decode.prompts=''"]) == 2
    assert "decode.prompts" in capsys.readouterr().err


def test_doctors_are_sections_with_names_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("decode: {doctors: {kind: {path: x, beta: 2}}}")
    assert load_recipe(str(path)).decode.doctors == {"kind": Doctor(path="x", beta=2.0)}
    for text, field_name in (
        ("{kind: {pth: x}}", "decode.doctors.kind.pth"),
        ("{kind: x}", "decode.doctors.kind"),
        ("{kind: {beta: .nan}}", "decode.doctors.kind.beta"),
        ("3", "decode.doctors"),
    ):
        path.write_text(f"decode: {{doctors: {text}}}")
        with pytest.raises(InputError) as caught:
            load_recipe(str(path))
        assert caught.value.problems[0].field == field_name
    assert (ROOT / "recipes").exists() and Doctors({}, TOKENIZER).vocab_size == VOCAB
