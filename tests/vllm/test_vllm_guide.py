"""Doctors inside the engine against the reference backend: the same tokens, and log-probabilities within 1e-5."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL
from transformers import AutoModelForCausalLM
from vllm_models import llama, nemotron_h, qwen3, saved

from nemo_pivotrl.backends.doctors import Span
from nemo_pivotrl.backends.reference.guided import GuidedGenerator, GuidedSamplingParams, load_guided
from nemo_pivotrl.backends.vllm.decode import GuidedEngine
from nemo_pivotrl.backends.vllm.engine import Engine
from nemo_pivotrl.backends.vllm.guidance import NAMES, Guidance, GuidanceParams, drawn_by, guide_arguments, read_wish
from nemo_pivotrl.backends.vllm.row_stream import RowStream, check_streams
from nemo_pivotrl.config import Decode, Doctor, Patient, Tenant
from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.demo import tiny_models as tiny

TIGHT = 1e-5
TEXTS = ["book a flight to oslo", "cancel twelve tickets, please", "who are you", "tell me about the weather in may"]
SIZE = 300
DRAW = drawn_by(GuidedSamplingParams(max_new_tokens=4), number=7)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A patient and doctors of other widths, depths and kinds, with one tokenizer; logits wider than the vocabulary."""
    root = tmp_path_factory.mktemp("guided")
    tokenizer = tiny.make_tokenizer(TEXTS * 4, SIZE)
    vocab = len(tokenizer)
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    made = {
        "patient": llama(tied=False, seed=1, vocab_size=vocab + 8, **special),
        "kind": qwen3(seed=2, vocab_size=vocab + 3, hidden_size=32, num_hidden_layers=1, **special),
        "novice": qwen3(seed=3, vocab_size=vocab + 3, hidden_size=32, num_hidden_layers=1, **special),
        "brief": llama(tied=True, seed=4, vocab_size=vocab, num_hidden_layers=3, **special),
    }
    for name, model in made.items():
        saved(model, root / name)
        tokenizer.save_pretrained(root / name)
    adapter(root / "novice", root / "kind-lora", 4, ["q_proj", "v_proj", "down_proj"])
    adapter(root / "novice", root / "brief-lora", 3, ["q_proj", "k_proj", "o_proj"])
    return {path.name: str(path) for path in root.iterdir()}


def adapter(base: Path, folder: Path, r: int, layers: list[str]) -> None:
    """An adapter as peft writes it, large enough to be seen."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(r)
    model = AutoModelForCausalLM.from_pretrained(base)
    made = get_peft_model(model, LoraConfig(r=r, lora_alpha=8, target_modules=layers, task_type="CAUSAL_LM"))
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3)
    made.save_pretrained(folder)


def doctors_of(folders: dict[str, str], ratio: bool, adapters: bool) -> dict[str, Doctor]:
    """adapters: both on one base, which is their reference where they are divided by one."""
    end = "-lora" if adapters else ""
    doctors = {name: Doctor(path=folders[f"{name}{end}"]) for name in ("kind", "brief")}
    if not ratio or adapters:
        return doctors
    beside = {"kind": "novice", "brief": "patient"}
    return {name: replace(doctor, reference=folders[beside[name]]) for name, doctor in doctors.items()}


def both(
    folders: dict[str, str], ratio: bool, adapters: bool, spans: Sequence[Span] = (), **more: Any
) -> tuple[GuidedGenerator, GuidedEngine]:
    mode = "ratio" if ratio else "product"
    doctors = doctors_of(folders, ratio, adapters)
    truth = load_guided(folders["patient"], doctors, mode, device="cpu", spans=spans, **more)
    patient = Patient(model_name=folders["patient"], backend="vllm", max_total_sequence_length=128, device="cpu")
    decode = Decode(doctors=doctors, mode=mode, **more)
    return truth, GuidedEngine(patient, decode, SMALL, truth.tokenizer, truth.stop_ids, spans)


@pytest.fixture(
    scope="module", params=["ratio", "adapters"]
)  # the others stand below: an engine takes seconds to start
def pair(request: pytest.FixtureRequest, folders: dict[str, str]) -> Iterator[tuple[GuidedGenerator, GuidedEngine]]:
    truth, engine = both(folders, request.param == "ratio", request.param == "adapters")
    yield truth, engine
    engine.close()


def asked(truth: GuidedGenerator, count: int = 12) -> tuple[list[list[int]], list[GuidedSamplingParams]]:
    """Requests that differ in everything, of different lengths: rows come, go and move."""
    weights: list[tuple[float, dict[str, float]]] = [
        (1.0, {}),
        (1.0, {"kind": 0.8, "brief": 0.5}),
        (0.7, {"brief": -0.6}),
        (1.0, {"kind": 0.0, "brief": 0.0}),
        (0.0, {"kind": 1.0}),
        (1.3, {"kind": 0.4}),
    ]
    prompts = [truth.tokenizer.encode(TEXTS[i % 4] + " " + "x" * (i % 3)) for i in range(count)]
    requests = [
        GuidedSamplingParams(
            alpha=weights[i % 6][0],
            beta=weights[i % 6][1],
            temperature=(1.0, 0.7, 0.0)[i % 3],
            top_p=(1.0, 0.9)[i % 2],
            top_k=(0, 0, 20)[i % 3],
            max_new_tokens=(30, 7, 18)[i % 3],
            seed=i,
        )
        for i in range(count)
    ]
    return prompts, requests


def same(ours: Any, theirs: Any) -> None:
    assert ours.token_ids == theirs.token_ids and ours.finish_reason == theirs.finish_reason
    for a, b in zip(ours.tokens, theirs.tokens, strict=True):
        for name in ("log_prob", "patient_log_prob", "mixed_log_prob", "kl"):
            assert getattr(a, name) == pytest.approx(getattr(b, name), abs=TIGHT), name
        assert (a.changed_argmax, a.changed_token) == (b.changed_argmax, b.changed_token)


def test_answers_and_records_are_the_reference_backends(pair: tuple[GuidedGenerator, GuidedEngine]) -> None:
    truth, engine = pair
    prompts, requests = asked(truth)
    for ours, theirs in zip(engine.generate(prompts, requests), truth.generate(prompts, requests), strict=True):
        same(ours, theirs)


def test_an_answer_does_not_depend_on_what_is_decoded_beside_it(pair: tuple[GuidedGenerator, GuidedEngine]) -> None:
    truth, engine = pair
    prompts, requests = asked(truth)
    together = engine.generate(prompts, requests)
    backwards = engine.generate(prompts[::-1], requests[::-1])[::-1]
    for i, (one, other) in enumerate(zip(together, backwards, strict=True)):
        same(one, other)
        if i % 4 == 1:
            same(engine.generate([prompts[i]], [requests[i]])[0], one)


def test_doctors_can_read_prompts_of_their_own(pair: tuple[GuidedGenerator, GuidedEngine]) -> None:
    truth, engine = pair
    prompts, requests = asked(truth, 6)
    own = [{"kind": [*prompt, 9, 10]} if i % 2 else {} for i, prompt in enumerate(prompts)]
    for ours, theirs in zip(
        engine.generate(prompts, requests, own), truth.generate(prompts, requests, own), strict=True
    ):
        same(ours, theirs)


def test_what_cannot_be_decoded_is_refused_before_it_reaches_the_engine(
    pair: tuple[GuidedGenerator, GuidedEngine],
) -> None:
    _, engine = pair
    for prompt, request in (
        ([], GuidedSamplingParams()),
        ([5], GuidedSamplingParams(beta={"nobody": 1.0})),
        ([5], GuidedSamplingParams(max_new_tokens=200)),
        ([100000], GuidedSamplingParams()),
    ):
        with pytest.raises(InputError):
            engine.generate([prompt], [request])


# ---- the engine's own sampler ----


def sampled(engine: GuidedEngine, prompts: Sequence[Sequence[int]], **more: Any) -> list[Any]:
    import vllm

    settings = {"max_tokens": 16, "logprobs": 0, "detokenize": False, "seed": 5, **more}
    return [a.outputs[0] for a in engine.engine._generate(prompts, [vllm.SamplingParams(**settings)] * len(prompts))]


def logs(choice: Any) -> list[float]:
    return [at[token].logprob for at, token in zip(choice.logprobs, choice.token_ids, strict=True)]


def test_log_probs_of_vllms_sampler_are_those_of_the_mixture(pair: tuple[GuidedGenerator, GuidedEngine]) -> None:
    truth, engine = pair
    prompts = [truth.tokenizer.encode(text) for text in TEXTS]
    for weights in ({"kind": 1.0}, {"kind": 0.8, "brief": 0.5}, {"brief": -0.5}):
        extra = {"guidance.alpha": 0.9, **{f"guidance.beta.{n}": w for n, w in weights.items()}}
        for prompt, choice in zip(prompts, sampled(engine, prompts, extra_args=extra, ignore_eos=True), strict=True):
            decoding = truth.start([prompt], [GuidedSamplingParams(alpha=0.9, beta=weights, max_new_tokens=16)])
            for token, got in zip(choice.token_ids, logs(choice), strict=True):
                mixed = decoding.guide.mix(decoding.stream.logits())
                assert float(mixed.log_probs[0, token]) == pytest.approx(got, abs=TIGHT)
                decoding.stream.feed(torch.tensor([token]))
                decoding.guide.feed(torch.tensor([token]))


def test_weight_0_and_no_weights_are_the_patient_to_the_bit(
    pair: tuple[GuidedGenerator, GuidedEngine], folders: dict[str, str]
) -> None:
    truth, engine = pair
    prompts = [truth.tokenizer.encode(text) for text in TEXTS]
    zero = {"guidance.alpha": 1.0, "guidance.beta.kind": 0.0}
    off = {"guidance.beta.kind": 2.0, "guidance.spans": ["", ""]}
    guided = [(t.token_ids, logs(t)) for t in sampled(engine, prompts, extra_args={"guidance.beta.kind": 1.0})]
    silent = [(t.token_ids, logs(t)) for t in sampled(engine, prompts, extra_args=zero)]
    from nemo_pivotrl.backends.base import as_policy

    plain = Engine(as_policy(Patient(model_name=folders["patient"], max_total_sequence_length=128)), SMALL)
    try:
        import vllm

        params = [vllm.SamplingParams(max_tokens=16, logprobs=0, detokenize=False, seed=5)] * len(prompts)
        alone = [(a.outputs[0].token_ids, logs(a.outputs[0])) for a in plain._generate(prompts, params)]
    finally:
        plain.close()
    assert silent == alone and guided != alone
    with pytest.raises(Exception, match="no start empty"):
        sampled(engine, prompts, extra_args=off)


def test_an_engine_without_a_section_of_ours_does_nothing(folders: dict[str, str]) -> None:
    """The class given to an engine that nobody configured, as an entry point would: no crash, no change."""
    from nemo_pivotrl.backends.base import as_policy
    from nemo_pivotrl.backends.vllm.guide import Guide

    policy = as_policy(Patient(model_name=folders["patient"], max_total_sequence_length=64))
    engines = [Engine(policy, SMALL, **extra) for extra in ({}, {"logits_processors": [Guide]})]
    try:
        from nemo_pivotrl.config import Generation

        found = [e.infer([[5, 6, 7]], [[1, 2, 3]], frozenset({1}), Generation(max_new_tokens=12)) for e in engines]
        assert found[0] == found[1]
    finally:
        for engine in engines:
            engine.close()


# ---- spans and the gate ----


def test_spans_and_the_entropy_gate_switch_as_in_the_reference(folders: dict[str, str]) -> None:
    tokenizer = load_guided(folders["patient"], {}, device="cpu").tokenizer
    spans = [Span(tokenizer.decode([start]), tokenizer.decode([end])) for start, end in ((70, 80), (90, 100))]
    truth, engine = both(folders, True, True, spans, min_entropy=1.5)
    try:
        prompts, requests = asked(truth)
        prompts = [p if i % 3 else [*p, 70] for i, p in enumerate(prompts)]
        found = engine.generate(prompts, requests)
        for ours, theirs in zip(found, truth.generate(prompts, requests), strict=True):
            same(ours, theirs)
        kls = [t.kl for answer, r in zip(found, requests, strict=True) if r.beta for t in answer.tokens]
        assert any(k == 0 for k in kls) and any(k > 0 for k in kls), "guidance was on and off"
    finally:
        engine.close()


# ---- the doctors' cache ----


def test_a_stream_reads_every_token_once_however_rows_come_and_go(folders: dict[str, str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["brief"]).eval()
    stream, generator = RowStream(model), torch.Generator().manual_seed(0)
    texts: dict[int, list[int]] = {}

    def some(count: int) -> list[int]:
        return torch.randint(0, 250, (count,), generator=generator).tolist()

    shared = some(9)
    given = 0
    for step in range(60):
        for _ in range(int(step % 5 == 0) * 3):
            prompt = list(shared) if len(texts) % 2 else some(3 + step % 7)
            texts[given] = prompt
            stream.add(given, prompt)
            given += 1
        if step % 4 == 3 and len(texts) > 4:
            gone = list(texts)[step % len(texts)]
            del texts[gone]
            stream.drop(gone)
        for key in texts:
            new = some(1 if (key + step) % 3 else 2)
            texts[key] += new
            stream.extend(key, new)
        read = [key for key in texts if (key + step) % 4]  # the others wait
        found = stream.logits(read)
        for key, logits in zip(read, found, strict=True):
            truth = model(input_ids=torch.tensor([texts[key]])).logits[0, -1]
            assert float((truth - logits).abs().max()) <= 2e-4 * float(truth.abs().max())
    assert stream.table.rows >= 16, "the table has grown"


def test_the_cost_of_a_doctor_is_linear_in_length(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not timed: tokens that go through the doctor are those of prompt and answer, once; twins share a prompt."""
    made: list[Guidance] = []
    real = Guidance.__init__
    monkeypatch.setattr(Guidance, "__init__", lambda self, *a, **k: (made.append(self), real(self, *a, **k))[1])
    truth, engine = both(folders, False, False)
    try:
        prompt = truth.tokenizer.encode(TEXTS[3])
        engine.generate([prompt], GuidedSamplingParams(beta={"kind": 1.0}, max_new_tokens=1))
        stream = made[0].streams[folders["kind"]]
        before = stream.tokens_read
        requests = [
            GuidedSamplingParams(beta={"kind": 1.0}, max_new_tokens=40, seed=i, stop_ids=frozenset()) for i in range(8)
        ]
        engine.generate([prompt] * 8, requests)
        # 39 of an answer's 40 tokens are read; of a twin's prompt only the last
        assert stream.tokens_read - before == len(prompt) + 7 + 8 * 39
        assert not stream.slot or len(stream.slot) <= 8
        prompts, asking = asked(truth)
        for ours, theirs in zip(engine.generate(prompts, asking), truth.generate(prompts, asking), strict=True):
            same(ours, theirs)
    finally:
        engine.close()


def test_a_doctor_with_other_layers_is_refused_by_name() -> None:
    check_streams("plain", qwen3())
    with pytest.raises(InputError, match="hybrid"):
        check_streams("hybrid", nemotron_h())
    sliding = qwen3(num_hidden_layers=2, use_sliding_window=True, sliding_window=4, max_window_layers=0)
    with pytest.raises(InputError, match="sliding"):
        check_streams("windows", sliding)


def test_adapters_on_one_base_are_read_together_and_the_base_is_there_once(folders: dict[str, str]) -> None:
    """Counted: two adapters and their base, which divides both, are one pass a step; a mutant that reads each alone makes three."""
    doctors = doctors_of(folders, True, True)
    patient = Patient(model_name=folders["patient"], backend="vllm", device="cpu")
    made, _ = guide_arguments(
        patient, Decode(doctors=doctors, mode="ratio"), tenants={"acme": Tenant(beta={"kind": 0.5})}
    )
    guidance = Guidance(made["additional_config"]["nemo_pivotrl"], torch.device("cpu"))
    assert list(guidance.models) == [folders["novice"]]
    passes = []
    guidance.models[folders["novice"]].register_forward_hook(lambda *_: passes.append(1))
    rows: list[Any] = [
        guidance.row({"guidance.beta.kind": 1.0, "guidance.beta.brief": b}, [5, 6, 7], []) for b in (0.5, -1.0)
    ]
    vocab = guidance.doctors.vocab_size + 8
    alone = torch.randn(2, vocab, generator=torch.Generator().manual_seed(0))
    guidance.scores(alone, rows)  # the prompts: three of two rows, and their twins' last tokens
    del passes[:]
    for row in rows:
        row.output = [9]
    guidance.scores(alone, rows)
    assert len(passes) == 1
    for row in rows:
        guidance.drop(row)
    assert not guidance.streams[folders["novice"]].slot
    # what a tenant has where a request says nothing else
    by_tenant = guidance.row({"guidance.tenant": "acme"}, [5], [])
    changed = guidance.row({"guidance.tenant": "acme", "guidance.beta.brief": 2.0, "guidance.alpha": 0.0}, [5], [])
    assert by_tenant is not None and (by_tenant.alpha, by_tenant.beta) == (1.0, [0.5, 0.0])
    assert changed is not None and (changed.alpha, changed.beta) == (0.0, [0.5, 2.0])
    assert guidance.row({"guidance.tenant": "acme", "guidance.beta.kind": 0.0}, [5], []) is None
    with pytest.raises(InputError, match=r"serve\.tenants\.acme\.beta"):
        guide_arguments(patient, Decode(), tenants={"acme": Tenant(beta={"kind": 0.5})})


# ---- what a request may say ----


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"guidance.beta.nobody": 1.0}, "the doctors are brief, kind"),
        ({"guidance.beta.kind": "a lot"}, "a finite number"),
        ({"guidance.beta.kind": math.inf}, "a finite number"),
        ({"guidance.beta.kind": True}, "a finite number"),
        ({"guidance.alpha": [1]}, "a finite number"),
        ({"guidance.spans": ["<a>"]}, "in pairs"),
        ({"guidance.spans": ["", "x"]}, "no start empty"),
        ({"guidance.prompt.kind": "text"}, "token ids"),
        ({"guidance.gamma": 1}, "unknown; known after"),
        ({"guidance.tenant": "globex"}, "the tenants are acme"),
        *(
            ({"guidance.draw": draw}, "what nemo_pivotrl sends")
            for draw in (
                1,
                "{",
                "[" * 10_000,
                {},
                {**DRAW, "extra": 1},
                {**DRAW, "seed": 0.5},
                {**DRAW, "top_p": 2.0},
                {**DRAW, "max_new_tokens": 1 << 40},
            )
        ),
    ],
)
def test_a_bad_wish_is_refused_with_what_may_stand_there(extra: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_wish(extra, ["brief", "kind"], ["acme"])


def test_wishes_are_read_and_strangers_arguments_left_alone() -> None:
    assert read_wish({"other": 1}, ["kind"]) == GuidanceParams() == read_wish(None, None)
    wish = read_wish({"guidance.beta.kind": "0.5", "guidance.spans": ["<a>", "</a>", "<b>", ""], "k": 1}, ["kind"])
    assert wish.beta == {"kind": 0.5} and wish.alpha is None and wish.given
    assert wish.spans == (Span("<a>", "</a>"), Span("<b>", ""))
    assert (
        read_wish({"guidance.draw": json.dumps(DRAW)}, []).draw == read_wish({"guidance.draw": DRAW}, []).draw == DRAW
    )
    with pytest.raises(ValueError, match="nemo-pivotrl serve"):
        read_wish({"guidance.alpha": 1.0}, None)


def test_the_engine_refuses_a_bad_wish_and_goes_on(pair: tuple[GuidedGenerator, GuidedEngine]) -> None:
    _, engine = pair
    import os

    assert set(os.environ[NAMES].strip('[]"').replace('"', "").split(", ")) == {"brief", "kind"}
    with pytest.raises(Exception, match="the doctors are"):
        sampled(engine, [[5, 6]], extra_args={"guidance.beta.nobody": 1.0})
    assert len(sampled(engine, [[5, 6]], extra_args={"guidance.beta.kind": 1.0})) == 1
