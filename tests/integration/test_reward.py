"""Stage 1 on a tiny model with a real tokenizer and template: numbers by hand, ids, batches, resume, diagnostics."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.journals import journals_kept
from support.processes import kill_when, python
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM

from nemo_pivotrl import cli
from nemo_pivotrl.backends import loading
from nemo_pivotrl.backends.base import Scorer
from nemo_pivotrl.backends.identity import policy_revision
from nemo_pivotrl.backends.reference import logits
from nemo_pivotrl.components.costs import read_ledger
from nemo_pivotrl.config import ChatSettings, Patient, Policy, Preferences, Recipe, Reward, Tfpo
from nemo_pivotrl.core.artifacts import read_header, read_rows
from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.core.types import Preference
from nemo_pivotrl.data.preferences import preference_of_row
from nemo_pivotrl.demo import tiny_models as tiny
from nemo_pivotrl.llmdoctor import reward as stage
from nemo_pivotrl.llmdoctor.contrastive_prompts import FacePrompts, placed
from nemo_pivotrl.llmdoctor.preferences import preferences
from nemo_pivotrl.llmdoctor.reward import build_rewards, faces_of, load_patient_chat
from nemo_pivotrl.llmdoctor.train_doctor import train_doctor

POSITIVE, NEGATIVE = "help the customer well", "never mind, be vague about it"
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + tiny.CHAT_TEMPLATE
)
PLAIN_BORDER = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""Its generation prompt ends in plain text, which can merge with an answer's beginning."""
ROWS = [
    {"prompt": "Where is my order 1042?", "chosen": "Order 1042 left on Monday.", "rejected": "No idea."},
    {"prompt": "Where is my order 1042?", "chosen": "It was sent on Monday; it comes tomorrow.", "rejected": "..."},
    {"prompt": "Cancel it", "chosen": "Done, it is cancelled and the money is on its way back.", "rejected": "Later"},
    {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}], "chosen": "Hello!",
     "rejected": "What do you want from me now, and why should I care about any of it at all?"},
    {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
     "chosen": '"quoted" answer', "rejected": " (indeed)"},
    *[{"prompt": f"question {i}", "chosen": "yes " * (1 + i % 4), "rejected": f"no {i}"} for i in range(9)],
]  # fmt: skip


@pytest.fixture(scope="session")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose weights are large enough for prompts to matter."""
    folder = tmp_path_factory.mktemp("patient") / "hf"
    texts = (
        [str(row[k]) for row in ROWS for k in ("chosen", "rejected")]
        + [POSITIVE, NEGATIVE]
        + [": ...", ': "', ":  ("] * 9
    )
    tokenizer = tiny.make_tokenizer(texts, 400)
    model = tiny.make_model(tokenizer, hidden_size=32, layers=2, heads=2, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    tiny.save(model, tokenizer, folder)
    return folder


def recipe_for(folder: Path, patient: Path, rows: Sequence[Any] = ROWS, **changes: Any) -> Recipe:
    """A recipe in `folder` whose preferences are written; `changes` go to reward, or to patient as `patient_KEY`."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    to_patient = {k.removeprefix("patient_"): v for k, v in changes.items() if k.startswith("patient_")}
    to_reward = {k: v for k, v in changes.items() if not k.startswith("patient_")}
    recipe = Recipe(
        run_dir=str(folder),
        patient=Patient(
            **{"model_name": str(patient), "max_total_sequence_length": 256, "batch_tokens": 600, **to_patient}
        ),
        preferences=Preferences(files=(str(source),)),
        reward=Reward(**{"positive": POSITIVE, "negative": NEGATIVE, "pairs_per_wave": 4, **to_reward}),
    )
    if not recipe.path("preferences.jsonl").exists():
        preferences(recipe)
    return recipe


def rewarded(folder: Path, patient: Path, **changes: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows and summary of a run."""
    path = build_rewards(recipe_for(folder, patient, **changes))
    return list(read_rows(path)), json.loads((folder / "token_rewards.json").read_text())


def slow_log_probs(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
    """One sequence, no padding, no chunks, float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].double()
    steps = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return [float(steps[t, token]) for t, token in enumerate(answer)]


def prompts_of(recipe: Recipe) -> FacePrompts:
    chat = load_patient_chat(recipe.patient)
    return FacePrompts(chat, faces_of(recipe.reward, ["helpfulness"]), recipe.patient.max_total_sequence_length)


# ---- numbers ----


def test_rewards_equal_a_hand_computation_from_one_float64_forward_a_sequence(tmp_path: Path, patient: Path) -> None:
    rows, summary = rewarded(tmp_path, patient, tau=0.8, theta=0.6, eps=1e-5)
    recipe = recipe_for(tmp_path, patient)
    prompts, model = prompts_of(recipe), AutoModelForCausalLM.from_pretrained(patient, dtype=torch.float64)
    by_id = {p.preference_id: p for p in map(preference_of_row, read_rows(recipe.path("preferences.jsonl")))}
    assert [row["preference_id"] for row in rows] == list(by_id)
    kept = tokens = 0
    for row in rows:
        p = by_id[row["preference_id"]]
        for side, text, sign in (("chosen", p.chosen, 1), ("rejected", p.rejected, -1)):
            ids = prompts.chat.action_ids(p.prompt, (), {"role": "assistant", "content": text})
            faces = [prompts.chat.prompt_ids(placed(p.prompt, f, "system"), ()) for f in (POSITIVE, NEGATIVE)]
            pos, neg = (slow_log_probs(model, face, ids) for face in faces)
            delta = [abs(a - b) for a, b in zip(pos, neg, strict=True)]
            smooth = [math.tanh(d / (sum(delta) / len(delta) + 1e-5) / 0.8) for d in delta]
            agreed = sum(d for d, a, b in zip(delta, pos, neg, strict=True) if (a - b) * sign > 0)
            assert row[side]["ids"] == ids and row[side]["ended"]
            assert row[side]["importance"] == pytest.approx(delta, abs=2e-5)
            assert row[side]["rewards"] == pytest.approx([sign * s if s > 0.6 else 0.0 for s in smooth], abs=1e-4)
            assert row[side]["agreement"] == pytest.approx(agreed / sum(delta), abs=1e-4)
            kept, tokens = kept + sum(s > 0.6 for s in smooth), tokens + len(ids)
    found = summary["objectives"]["helpfulness"]
    assert 0.2 < kept / tokens < 0.8 and found["kept_share"] == pytest.approx(kept / tokens, abs=1e-4)
    assert found["delta_mean"] > 0.1 and found["weak_share"] == 0.0


def test_the_scorer_gives_the_same_numbers_for_many_at_once_as_one_by_one(patient: Path) -> None:
    generator = torch.Generator().manual_seed(0)

    def ids(low: int, high: int) -> list[int]:
        size = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(8, 300, (size,), generator=generator).tolist()

    sequences = [(ids(1, 40), ids(1, 30)) for _ in range(25)]
    model = AutoModelForCausalLM.from_pretrained(patient, dtype=torch.float64)
    for budget in (16, 300, 10_000):
        found = loading.load_scorer(Patient(model_name=str(patient), device="cpu", batch_tokens=budget)).log_probs(
            sequences
        )
        for (prompt, answer), row in zip(sequences, found, strict=True):
            assert row.dtype is torch.float32 and row.shape == (len(answer),)
            assert row.tolist() == pytest.approx(slow_log_probs(model, prompt, answer), abs=1e-5)
    with pytest.raises(ValueError, match="at least one prompt token"):
        loading.load_scorer(Patient(model_name=str(patient), device="cpu")).log_probs([([1], [])])


def test_logits_exist_for_answer_tokens_only_and_a_chunk_at_a_time(
    patient: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences = [(list(range(8, 60)), [9] * 11), (list(range(8, 20)), [10] * 6)]
    for sharing in (True, False):
        scorer: Any = loading.load_scorer(Patient(model_name=str(patient), device="cpu", prefix_sharing=sharing))
        expected = scorer.log_probs(sequences)
        sizes: list[int] = []
        whole = logits.logits_of

        def counted(model: Any, hidden: torch.Tensor, whole: Any = whole, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(len(hidden))
            return whole(model, hidden)

        with monkeypatch.context() as patched:
            patched.setattr(logits, "CHUNK_LOGITS", 4 * scorer.model.config.vocab_size)
            patched.setattr(logits, "logits_of", counted)
            found = scorer.log_probs(sequences)
        assert sizes == [4, 4, 4, 4, 1], sharing
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(expected, found, strict=True))


def test_a_soft_cap_behind_the_head_is_part_of_the_chunked_logits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Gemma2Config(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.5)  # fmt: skip
    model = Gemma2ForCausalLM(config).double().eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(50)
    model.save_pretrained(tmp_path)
    scorer = loading.load_scorer(Patient(model_name=str(tmp_path), device="cpu", dtype="float64", prefix_sharing=False))
    (found,) = scorer.log_probs([([3, 4, 5], [6, 7])])
    assert found.tolist() == pytest.approx(slow_log_probs(model, [3, 4, 5], [6, 7]), abs=1e-9)


def test_a_model_whose_logits_do_not_follow_from_its_last_hidden_state_is_scored_by_its_whole_logits(
    patient: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = LlamaForCausalLM.forward

    def shifted(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        output = whole(self, input_ids, **kwargs)
        output.logits = output.logits * (2.0 if input_ids.shape[1] > 1 else 1.0)
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", shifted)
    scorer: Any = loading.load_scorer(Patient(model_name=str(patient), device="cpu", prefix_sharing=False))
    model = AutoModelForCausalLM.from_pretrained(patient, dtype=torch.float64)
    assert not scorer.chunked
    (found,) = scorer.log_probs([([9, 10, 11], [12, 13])])
    assert found.tolist() == pytest.approx(slow_log_probs(model, [9, 10, 11], [12, 13]), abs=1e-5)


def test_pickled_weights_and_a_missing_checkpoint_are_refused(tmp_path: Path, patient: Path) -> None:
    with pytest.raises(InputError, match="HF checkpoint folder"):
        loading.load_scorer(Patient(model_name=str(tmp_path)))
    (tmp_path / "config.json").write_text((patient / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(InputError, match=r"no \.safetensors file"):
        loading.load_scorer(Patient(model_name=str(tmp_path)))


# ---- ids and prompts ----


class Recording:
    """A scorer that keeps what it was asked."""

    def __init__(self, scorer: Scorer):
        self.scorer, self.calls = scorer, []  # type: ignore[var-annotated]

    def log_probs(self, sequences: Any) -> list[torch.Tensor]:
        self.calls.append(list(sequences))
        return self.scorer.log_probs(sequences)


def recorded(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[list[int], list[int]]]]:
    spy = Recording(loading.load_scorer(recipe.patient))
    with monkeypatch.context() as patched:
        patched.setattr(loading, "load_scorer", lambda *_: spy)
        build_rewards(recipe, fresh=True)
    return spy.calls


def test_both_faces_of_both_answers_go_through_one_batch_with_the_same_answer_ids(
    tmp_path: Path, patient: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for(tmp_path, patient, noise_pairs=0)
    calls = recorded(recipe, monkeypatch)
    chat = load_patient_chat(recipe.patient)
    for call in calls:
        assert len(call) % 4 == 0
        assert max(len(p) + len(r) for p, r in call) * len(call) <= recipe.patient.batch_tokens
        for (pos, a), (neg, b), (pos2, c), (neg2, d) in zip(*[iter(call)] * 4, strict=True):
            assert (pos, neg) == (pos2, neg2) and pos != neg and a == b and c == d and a != c
            assert a[-1] == chat.tokenizer.eos_token_id == c[-1]
            assert POSITIVE in chat.tokenizer.decode(pos) and NEGATIVE in chat.tokenizer.decode(neg)
    assert max(map(len, calls)) > 4 and sum(map(len, calls)) == 4 * len(ROWS)


def test_ids_are_the_answers_own_where_tokenising_the_whole_text_would_merge_across_the_border(
    tmp_path: Path, patient: Path
) -> None:
    template = tmp_path / "plain.jinja"
    template.write_text(PLAIN_BORDER)
    recipe = recipe_for(tmp_path / "run", patient, patient_chat_template=str(template))
    rows = {r["preference_id"]: r for r in read_rows(build_rewards(recipe))}
    chat = load_patient_chat(recipe.patient)
    merged = 0
    for p in map(preference_of_row, read_rows(recipe.path("preferences.jsonl"))):
        row = rows[p.preference_id]
        assert row["prompt_ids"] == chat.prompt_ids(p.prompt, ())
        for side, text in (("chosen", p.chosen), ("rejected", p.rejected)):
            own = row[side]["ids"]
            assert chat.tokenizer.decode(own) == text + "<|end|>" and own == chat.encode(text + "<|end|>")
            # the wrong variant: prompt and answer tokenised as one text, cut where the prompt alone would end
            whole = chat.encode(chat.render([*p.prompt, {"role": "assistant", "content": text}], (), False))
            merged += (
                whole[: len(row["prompt_ids"])] != row["prompt_ids"] or whole[len(row["prompt_ids"]) :][:-1] != own
            )
    assert merged > 0


def test_the_neutral_prompt_has_no_face_and_a_face_comes_before_a_system_message(tmp_path: Path, patient: Path) -> None:
    rows, _ = rewarded(tmp_path, patient)
    recipe = recipe_for(tmp_path, patient)
    decode = load_patient_chat(recipe.patient).tokenizer.decode
    assert decode(rows[3]["prompt_ids"]) == "<|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>"
    assert not any(POSITIVE in decode(r["prompt_ids"]) or NEGATIVE in decode(r["prompt_ids"]) for r in rows)
    prepared = prompts_of(recipe).prepare(preference_of_row(list(read_rows(recipe.path("preferences.jsonl")))[3]))
    assert not isinstance(prepared, str)
    assert decode(prepared.positive).startswith(f"<|system|>{POSITIVE}\n\nBe brief.<|end|><|user|>Hi<|end|>")


def test_a_template_that_refuses_or_drops_a_system_role_gets_the_face_in_the_first_user_turn(
    tmp_path: Path, patient: Path
) -> None:
    drops = tiny.CHAT_TEMPLATE.replace("in messages -%}", "in messages if m.role != 'system' -%}", 1)
    for name, text in {"refuses": NO_SYSTEM, "drops": drops}.items():
        template = tmp_path / f"{name}.jinja"
        template.write_text(text)
        recipe = recipe_for(tmp_path / name, patient, patient_chat_template=str(template))
        path = build_rewards(recipe)
        header, rows = read_header(path, "token_rewards"), list(read_rows(path))
        assert header.extra["face_placement"] == "first_user_turn" and len(rows) == len(ROWS)
        decode = load_patient_chat(recipe.patient).tokenizer.decode
        assert decode(rows[3]["prompt_ids"]) == "<|user|>Be brief.\n\nHi<|end|><|assistant|>"
        prepared = prompts_of(recipe).prepare(preference_of_row(list(read_rows(recipe.path("preferences.jsonl")))[4]))
        assert not isinstance(prepared, str)
        assert decode(prepared.negative).startswith(
            f"<|user|>{NEGATIVE}\n\na<|end|><|assistant|>b<|end|><|user|>c<|end|>"
        )
    assert (
        read_header(build_rewards(recipe_for(tmp_path / "takes", patient)), "token_rewards").extra["face_placement"]
        == "system"
    )


def test_pairs_that_cannot_be_scored_are_excluded_and_counted(
    tmp_path: Path, patient: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*ROWS[:2], {"prompt": "long", "chosen": "word " * 300, "rejected": "x"}]
    rows += [{"prompt": "ends early", "chosen": "a <|end|> b", "rejected": "x"}, ROWS[2]]
    path = build_rewards(recipe_for(tmp_path, patient, rows))
    kept = list(read_rows(path))
    assert len(kept) == 4
    summary = json.loads((tmp_path / "token_rewards.json").read_text())
    assert summary["excluded"] == {"too_long": 1} and summary["pairs"] == 4
    ends = prompts_of(recipe_for(tmp_path, patient, rows)).chat.stop_ids
    assert all(sum(i in ends for i in row["chosen"]["ids"]) == 1 for row in kept), "an end of turn in text is text"
    refusing = recipe_for(tmp_path / "refusing", patient, rows, patient_chat=ChatSettings(special_tokens="refuse"))
    build_rewards(refusing)
    summary = json.loads((tmp_path / "refusing/token_rewards.json").read_text())
    assert summary["excluded"] == {"special_token_in_answer": 1, "too_long": 1} and summary["pairs"] == 3
    assert "too_long" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"none usable: \{'too_long': 14\}"):
        build_rewards(recipe_for(tmp_path / "none", patient, patient_max_total_sequence_length=16))


def test_a_template_that_rewrites_or_refuses_a_turn_excludes_that_pair_only(tmp_path: Path, patient: Path) -> None:
    template = tmp_path / "t.jinja"
    strict = "{% for m in messages %}{% if 'boo' in m.content %}{{ raise_exception('no') }}{% endif %}{% endfor %}"
    template.write_text(strict + tiny.CHAT_TEMPLATE.replace("m.content or ''", "(m.content or '').split('cut')[-1]"))
    prompts = prompts_of(recipe_for(tmp_path / "run", patient, patient_chat_template=str(template)))

    def prepared(prompt: str, chosen: str) -> Any:
        message = {"role": "user", "content": prompt}
        return prompts.prepare(Preference("i", "train", "helpfulness", (message,), chosen, "no", "f:1"))

    assert prepared("boo", "x") == "template_refuses_prompt"
    assert prepared("q", "a cut b") == "template_changes_answer"
    assert prepared("q", "no ") != "same_tokens" and prepared("q", "no") == "same_tokens"


# ---- the artefact ----


def test_the_header_names_patient_tokenizer_template_both_faces_and_every_number_that_decides(
    tmp_path: Path, patient: Path
) -> None:
    base = read_header(build_rewards(recipe_for(tmp_path / "a", patient)), "token_rewards")
    recipe = recipe_for(tmp_path / "a", patient)
    assert base.policy == policy_revision(patient) and base.parent and base.tokenizer and base.chat_template
    assert base.extra["tau"] == 1.0 and base.extra["theta"] == 0.5 and base.extra["eps"] == 1e-6
    faces = base.extra["faces"]["helpfulness"]
    assert set(faces) == {"positive", "negative"} and faces["positive"] != faces["negative"]
    prompts, source = prompts_of(recipe), recipe.path("preferences.jsonl")
    assert stage.make_header(recipe, source, prompts, base.policy) == base
    for changes in ({"tau": 2.0}, {"theta": 0.1}, {"eps": 1e-3}, {"positive": "other"}):
        other = recipe_for(tmp_path / "a", patient, **changes)
        assert stage.make_header(other, source, prompts_of(other), base.policy) != base
        with pytest.raises(InputError, match="finished work of another recipe"):
            build_rewards(other)
    cheaper = recipe_for(tmp_path / "a", patient, patient_batch_tokens=64)
    assert stage.make_header(cheaper, source, prompts_of(cheaper), base.policy) == base
    assert stage.make_header(recipe, source, prompts, "another") != base


def test_resuming_after_a_cut_at_any_byte_writes_the_same_bytes_and_diagnostics(
    tmp_path: Path, patient: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*ROWS[:3], {"prompt": "long", "chosen": "word " * 300, "rejected": "x"}, *ROWS[3:]]
    recipe = recipe_for(tmp_path, patient, rows)
    with journals_kept() as kept:
        path = build_rewards(recipe)
    (journal,), whole, summary = kept, path.read_bytes(), (tmp_path / "token_rewards.json").read_bytes()
    scorer = loading.load_scorer(recipe.patient)
    monkeypatch.setattr(loading, "load_scorer", lambda *_: scorer)
    ends = [i + 1 for i, byte in enumerate(journal) if byte == 10]
    cuts = {0, 1, 50, *ends[::3], *(end - 1 for end in ends[::4]), *range(77, len(journal), len(journal) // 8)}
    for cut in sorted(cuts):
        path.unlink()
        path.with_name("token_rewards.jsonl.journal").write_bytes(journal[:cut])
        assert build_rewards(recipe).read_bytes() == whole, cut
        assert (tmp_path / "token_rewards.json").read_bytes() == summary, cut
    calls = Recording(scorer)
    monkeypatch.setattr(loading, "load_scorer", lambda *_: calls)
    build_rewards(recipe)
    assert calls.calls == []  # complete: nothing is scored again


def test_reward_killed_with_9_and_resumed_writes_the_same_bytes(tmp_path: Path, patient: Path) -> None:
    rows = [{"prompt": f"question {i}", "chosen": "yes " * 20, "rejected": f"no {i}"} for i in range(160)]
    recipe = recipe_for(tmp_path, patient, rows)
    (tmp_path / "r.yaml").write_text(
        f"run_dir: {tmp_path}\npatient: {{model_name: {patient}, max_total_sequence_length: 256, batch_tokens: 600}}\n"
        f"reward: {{positive: '{POSITIVE}', negative: '{NEGATIVE}', pairs_per_wave: 4}}\nnum_threads: 1\n"
    )
    part = tmp_path / "token_rewards.jsonl.journal"
    process = python("-m", "nemo_pivotrl.cli", "reward", str(tmp_path / "r.yaml"))
    assert kill_when(process, lambda: part.exists() and part.read_bytes().count(b"\n") > 20), process.printed()
    assert cli.main(["reward", str(tmp_path / "r.yaml")]) == 0
    resumed = (tmp_path / "token_rewards.jsonl").read_bytes()
    assert build_rewards(recipe, fresh=True).read_bytes() == resumed and resumed.count(b"\n") == 161
    assert {entry["stage"] for entry in read_ledger(tmp_path)} == {"reward"}


# ---- what the rewards mean ----


def test_swapping_the_faces_changes_no_reward_and_turns_agreement_round(tmp_path: Path, patient: Path) -> None:
    """Importance is |Delta|: which face prefers a token never reaches the reward, the label alone gives the sign. Only
    the diagnostics (and the hashes in the header) can tell a swapped pair of faces; this is what they are for."""
    as_is, first = rewarded(tmp_path / "a", patient)
    swapped, second = rewarded(tmp_path / "b", patient, positive=NEGATIVE, negative=POSITIVE)
    for a, b in zip(as_is, swapped, strict=True):
        for side, sign in (("chosen", 1), ("rejected", -1)):
            assert a[side]["rewards"] == pytest.approx(b[side]["rewards"], abs=1e-4)
            assert a[side]["importance"] == pytest.approx(b[side]["importance"], abs=2e-5)
            assert a[side]["agreement"] + b[side]["agreement"] == pytest.approx(1.0, abs=1e-4)
            assert all(r * sign >= 0 for r in a[side]["rewards"]) and any(r != 0 for r in a[side]["rewards"])
    one, two = (s["objectives"]["helpfulness"]["agreement"] for s in (first, second))
    assert one["chosen"] + two["chosen"] == pytest.approx(1.0, abs=1e-3)
    headers = [read_header(tmp_path / name / "token_rewards.jsonl", "token_rewards").extra["faces"] for name in "ab"]
    assert headers[0]["helpfulness"]["positive"] == headers[1]["helpfulness"]["negative"]


def test_the_diagnostics_count_what_the_rows_hold_and_warn_where_faces_hardly_differ(
    tmp_path: Path, patient: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, summary = rewarded(tmp_path / "a", patient, noise_pairs=2)
    found, shown = summary["objectives"]["helpfulness"], capsys.readouterr().out
    rewards = [r for row in rows for side in ("chosen", "rejected") for r in row[side]["rewards"]]
    assert found["tokens"] == len(rewards) and found["kept_share"] == round(
        sum(r != 0 for r in rewards) / len(rewards), 4
    )
    assert found["noise_pairs"] == sum("noise" in row for row in rows) == 8  # two of each of the four waves
    assert 0 <= found["noise_floor"] < 1e-4 < found["delta_mean"]
    assert "theta 0.1 keeps 80-90 %" in shown and "noise floor" in shown and "WARNING" not in shown
    _, summary = rewarded(tmp_path / "b", patient, weak_importance=50.0)
    assert summary["objectives"]["helpfulness"]["weak_share"] == 1.0
    assert "WARNING: the faces hardly differ: 100% of the pairs" in capsys.readouterr().out
    kept = {
        t: rewarded(tmp_path / f"t{t}", patient, theta=t)[1]["objectives"]["helpfulness"]["kept_share"]
        for t in (0.1, 0.9)
    }
    assert kept[0.1] > 0.75 > 0.45 > kept[0.9]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"faces": {"helpfulnes": {"positive": "a", "negative": "b"}}}, "no faces for 'helpfulness'"),
        ({"faces": {"helpfulness": {"positive": "a"}}}, "give positive and negative"),
        ({"faces": {"helpfulness": {"positive": "a", "negative": "a"}}}, "two different prompts"),
        ({"positive": " "}, "two different prompts"),
    ],
)
def test_faces_that_cannot_work_are_refused_before_the_patient_is_loaded(
    tmp_path: Path, patient: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        build_rewards(recipe_for(tmp_path, patient, **changes))


def test_each_objective_has_its_own_faces_and_its_own_diagnostics(tmp_path: Path, patient: Path) -> None:
    faces = {
        "helpfulness": {"positive": "a", "negative": "b"},
        "brevity": {"positive": "be brief", "negative": "go on"},
    }
    recipe = recipe_for(tmp_path, patient, faces=faces)
    recipe = dataclasses.replace(recipe, preferences=dataclasses.replace(recipe.preferences, objective="brevity"))
    preferences(recipe)
    path = build_rewards(recipe)
    assert set(read_header(path, "token_rewards").extra["faces"]) == {"brevity"}
    assert set(json.loads((tmp_path / "token_rewards.json").read_text())["objectives"]) == {"brevity"}


def test_stage_2_trains_a_doctor_on_the_artefact_as_it_is(tmp_path: Path, patient: Path) -> None:
    recipe = recipe_for(tmp_path, patient)
    build_rewards(recipe)
    small = Policy(model_name=str(patient), device="cpu", max_total_sequence_length=256)
    doctor = train_doctor(
        dataclasses.replace(recipe, doctor=small, tfpo=Tfpo(max_num_steps=1, pairs_per_step=4, val_period=1))
    )
    assert (doctor / "model.safetensors").read_bytes() != (patient / "model.safetensors").read_bytes()
