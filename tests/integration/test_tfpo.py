"""The tfpo stage and the reference doctor: flows equal a slow forward, preferences are learnt in the right direction."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from nemo_pivotrl.backends.base import TokenBatch
from nemo_pivotrl.backends.loading import load
from nemo_pivotrl.backends.reference.policy import ReferencePolicy
from nemo_pivotrl.components.metrics import read_metrics
from nemo_pivotrl.config import Lora, Optimizer, Policy, Recipe, Tfpo
from nemo_pivotrl.config.build import build
from nemo_pivotrl.core.artifacts import ArtefactWriter, Header, seal
from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.data.chat_template import Chat, load_tokenizer
from nemo_pivotrl.demo import tiny_models as tiny
from nemo_pivotrl.llmdoctor.train_doctor import batch_of, measure, train_doctor

PROMPTS, RESPONSES = [[5, 6, 7, 8], [9, 10]], [[11, 12, 13, 0], [11, 14, 0], [15, 0], [16, 17, 18, 19, 0]]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random Llama with its tokenizer."""
    tokenizer = tiny.make_tokenizer(["say something nice or something rude about the weather today"] * 4, 300)
    folder = tmp_path_factory.mktemp("doctor")
    tiny.save(tiny.make_model(tokenizer, 32, 2, 2, seed=1), tokenizer, folder)
    return str(folder)


def doctor(start: str, dtype: str = "float64", lora: bool = False, **more: Any) -> ReferencePolicy:
    policy = Policy(model_name=start, dtype=dtype, lora=Lora(enabled=lora, r=8, alpha=16), **more)  # type: ignore[arg-type]
    made = ReferencePolicy(policy, value_head=True, reference=True, section="doctor")
    made.prepare_for_training(Optimizer(lr=1e-3))
    return made


ANSWERS = TokenBatch(PROMPTS, [0, 0, 1, 1], RESPONSES, {}, together=2)


def slow_flow(model: Any, head: torch.nn.Linear, prompt: list[int], response: list[int]) -> tuple[Tensor, Tensor]:
    """log pi and log V of one answer by one plain forward pass over prompt and answer."""
    out = model(input_ids=torch.tensor([[*prompt, *response]]), output_hidden_states=True)
    first, last = len(prompt) - 1, len(prompt) + len(response)
    log_p = out.logits[0].log_softmax(-1)[first : last - 1]
    chosen = log_p[torch.arange(len(response)), torch.tensor(response)]
    return chosen, head(out.hidden_states[-1][0, first:last].to(head.weight.dtype))[:, 0]


# ---- the backend ----


def test_flows_equal_a_plain_forward_pass_and_both_answers_share_the_value_at_the_prompt(start: str) -> None:
    made = doctor(start)
    torch.nn.init.normal_(made.head.weight)
    log_probs, log_values, _ = made.outputs(ANSWERS)
    for n, response in enumerate(RESPONSES):
        expected_p, expected_v = slow_flow(made.model, made.head, PROMPTS[n // 2], response)
        size = len(response)
        # 1e-6: the library's norms and rotary angles are float32 inside a float64 model
        torch.testing.assert_close(log_probs[n, :size], expected_p, rtol=0, atol=1e-6)
        torch.testing.assert_close(log_values[n, : size + 1], expected_v, rtol=0, atol=1e-5)
        assert (log_probs[n, size:] == 0).all() and (log_values[n, size + 1 :] == 0).all()
    assert log_values[0, 0] == log_values[1, 0] and log_values[2, 0] == log_values[3, 0] != log_values[0, 0]
    with pytest.raises(AssertionError):  # read one state late, as a head on the answer's tokens alone would
        torch.testing.assert_close(
            log_values[0, 1:4], slow_flow(made.model, made.head, PROMPTS[0], RESPONSES[0])[1][:3]
        )


def test_a_new_head_says_nothing_and_trains_in_float32_beside_a_float32_model(start: str) -> None:
    made = doctor(start, dtype="float32")
    assert (made.outputs(ANSWERS).values == 0).all()
    assert made.head.weight.dtype is torch.float32
    groups = made.optimizer.param_groups if made.optimizer else []
    assert any(p is made.head.weight for group in groups for p in group["params"])


def pairs_of(signs: tuple[float, float] = (1.0, -1.0)) -> list[dict[str, Any]]:
    return [
        {
            "prompt_ids": PROMPTS[p],
            **{
                side: {"ids": RESPONSES[2 * p + k], "rewards": [signs[k]] * len(RESPONSES[2 * p + k]), "ended": True}
                for k, side in enumerate(("chosen", "rejected"))
            },
        }
        for p in range(2)
    ]


@pytest.mark.parametrize("anchor", ["none", "reference"])
def test_micro_batches_give_the_loss_and_the_gradient_of_the_whole_batch(start: str, anchor: str) -> None:
    settings = Tfpo(anchor=anchor)  # type: ignore[arg-type]
    found = []
    for tokens in (16, 100_000):
        made = doctor(start, train_micro_batch_tokens=tokens)
        torch.manual_seed(0)
        torch.nn.init.normal_(made.head.weight)
        made.prepare_for_training_step()
        metrics = measure(made, pairs_of(), settings)
        found.append((metrics, [p.grad.clone() for p in made._trainable() if p.grad is not None]))
        assert len(made._micro_batches(batch_of(pairs_of()), with_states=True)) == (2 if tokens == 16 else 1)
    (one, grads), (other, other_grads) = found
    assert one == pytest.approx(other, abs=1e-6) and one["loss"] > 0
    for a, b in zip(grads, other_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_stage_counts_every_token_of_an_answer_and_none_of_its_padding(start: str) -> None:
    settings = Tfpo(anchor="reference", kappa=2.0)
    metrics = measure(doctor(start), pairs_of((1.0, -1.0)), settings, forward_only=True)
    # untrained and anchored: twice the variance of log Q, which runs from 0 to +-2 L in equal steps (equation (30))
    states = [len(answer) + 1 for answer in RESPONSES]
    assert metrics["subtb"] == pytest.approx(sum(4 * n * (n + 1) / 6 for n in states) / 4, abs=1e-5)
    lengths = [n - 1 for n in states]
    assert metrics["target_margin"] == pytest.approx(2 * sum(lengths) / 2)
    assert metrics["chosen_drift"] == pytest.approx(0.0, abs=1e-5)


def test_the_reference_is_the_start_model_whatever_has_been_trained(start: str) -> None:
    for lora in (False, True):
        made = doctor(start, dtype="float32", lora=lora)
        plain = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32).eval()
        before = made.get_inference_log_probs(ANSWERS, reference=True)
        for _ in range(3):
            made.prepare_for_training_step()
            measure(made, pairs_of(), Tfpo(anchor="reference"))
            made.finish_training_step()
        after = made.get_inference_log_probs(ANSWERS, reference=True)
        assert torch.equal(before, after)
        head = torch.nn.Linear(32, 1)
        expected = slow_flow(plain, head, PROMPTS[0], RESPONSES[0])[0]
        torch.testing.assert_close(before[0, :4], expected, rtol=0, atol=1e-5)
        trained = made.outputs(ANSWERS).log_probs
        assert not torch.allclose(trained[0, :4], expected, atol=1e-4)


# ---- the stage ----

WORDS = ("nice", "rude")


def write_rewards(folder: Path, chat: Chat, sign: float = 1.0, objective: str = "kindness", pairs: int = 24) -> Path:
    """Pairs in which the chosen answer says `nice`, the rejected one `rude`, to prompts that differ."""
    path = folder / "token_rewards.jsonl"
    path.unlink(missing_ok=True)
    header = Header("token_rewards", "c", tokenizer=chat.fingerprint)
    with ArtefactWriter(path, header) as writer:
        for i in range(pairs):
            prompt = chat.encode(f"say something about the weather {i} ")
            row: dict[str, Any] = {
                "preference_id": f"p{i}",
                "split": "validation" if i % 4 == 0 else "train",
                "objective": objective,
                "prompt_ids": prompt,
            }
            for side, word, reward in zip(("chosen", "rejected"), WORDS, (sign, -sign), strict=True):
                ids = [*chat.encode(f"something {word} today"), chat.tokenizer.eos_token_id]
                parted = [reward if k else 0.0 for k in range(len(ids))]
                row[side] = {"ids": ids, "rewards": parted, "ended": True}
            writer.write([row])
        writer.finish()
    return path


def recipe(folder: Path, start: str, **tfpo_section: Any) -> Recipe:
    values = {
        "run_dir": str(folder),
        "doctor": {"model_name": start, "optimizer": {"lr": 5e-3}},
        "checkpointing": {"save_period": 2},
        "tfpo": {"pairs_per_step": 6, "max_num_steps": 12, "val_period": 4, **tfpo_section},
    }
    found = build(Recipe, values, "test")
    assert isinstance(found, Recipe)
    return found


@pytest.fixture
def chat(start: str) -> Chat:
    return Chat(load_tokenizer(start))


def margin(folder: str | Path, chat: Chat) -> float:
    """log pi(nice) - log pi(rude) of an exported doctor on a new prompt, through transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = chat.encode("say something about the weather 99 ")
    totals = []
    for word in WORDS:
        ids = [*chat.encode(f"something {word} today"), chat.tokenizer.eos_token_id]
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0].log_softmax(-1)
        totals.append(sum(float(log_p[len(prompt) - 1 + k, t]) for k, t in enumerate(ids)))
    return totals[0] - totals[1]


@pytest.mark.parametrize("anchor", ["none", "reference"])
def test_a_doctor_learns_the_preference_in_its_direction_and_the_export_is_an_ordinary_model(
    start: str, chat: Chat, tmp_path: Path, anchor: str
) -> None:
    start_margin = margin(start, chat)
    learnt = {}
    for sign in (1.0, -1.0):
        folder = tmp_path / str(sign)
        folder.mkdir()
        write_rewards(folder, chat, sign)
        # without an anchor the doctor first has to lose the language prior it starts with (D10): more steps
        out = train_doctor(recipe(folder, start, anchor=anchor, max_num_steps=80 if anchor == "none" else 12))
        assert {p.name for p in out.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
        learnt[sign] = margin(out, chat)
        metrics = read_metrics(folder / "doctor/metrics.jsonl")
        assert metrics[-1]["val/loss"] < metrics[0]["val/loss"]
    # the rewards' sign alone decides: a flipped sign anywhere would swap these two
    assert learnt[1.0] > start_margin + 0.5 and learnt[-1.0] < start_margin - 0.5


def test_lora_trains_and_is_merged_into_the_export(start: str, chat: Chat, tmp_path: Path) -> None:
    write_rewards(tmp_path, chat)
    settings = recipe(tmp_path, start, anchor="reference")
    doctor_section = {"model_name": start, "optimizer": {"lr": 2e-2}, "lora": {"enabled": True}}
    out = train_doctor(
        build(
            Recipe,
            {
                "run_dir": str(tmp_path),
                "doctor": doctor_section,
                "tfpo": {"max_num_steps": 30, "pairs_per_step": 6, "anchor": "reference"},
            },
            "test",
        )
    )
    assert settings.doctor.lora.r == 8 and settings.doctor.lora.alpha == 16
    assert margin(out, chat) > margin(start, chat) + 0.5 and [path.name for path in out.glob("adapter*")] == ["adapter"]


def test_a_run_cut_after_a_checkpoint_ends_with_the_same_bytes(start: str, chat: Chat, tmp_path: Path) -> None:
    write_rewards(tmp_path, chat)
    whole = train_doctor(recipe(tmp_path, start))
    expected = (whole / "model.safetensors").read_bytes(), (tmp_path / "doctor/metrics.jsonl").read_text()
    shutil.rmtree(tmp_path / "doctor")
    train_doctor(recipe(tmp_path, start, max_num_steps=6))
    resumed = train_doctor(recipe(tmp_path, start))
    assert (resumed / "model.safetensors").read_bytes() == expected[0]

    def steps(text: str) -> list[tuple[Any, Any]]:
        return [(row["step"], row.get("loss")) for row in map(json.loads, text.splitlines())]

    assert steps((tmp_path / "doctor/metrics.jsonl").read_text()) == steps(expected[1])


def test_other_data_settings_or_start_weights_are_another_run(start: str, chat: Chat, tmp_path: Path) -> None:
    write_rewards(tmp_path, chat)
    train_doctor(recipe(tmp_path, start, max_num_steps=2))
    with pytest.raises(InputError, match=r"settings: found tfpo\.gamma=0\.1 \(now 0\.2\)"):
        train_doctor(recipe(tmp_path, start, max_num_steps=4, gamma=0.2))
    write_rewards(tmp_path, chat, pairs=20)
    with pytest.raises(InputError, match="identity"):
        train_doctor(recipe(tmp_path, start, max_num_steps=4))


def test_what_does_not_fit_together_is_refused_with_the_remedy(start: str, chat: Chat, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        train_doctor(recipe(tmp_path, start))
    path = write_rewards(tmp_path, chat)
    with pytest.raises(InputError, match="set it to one of kindness"):
        train_doctor(recipe(tmp_path, start, objective="rudeness"))
    with pytest.raises(InputError, match=r"doctor\.max_total_sequence_length"):
        short = {"model_name": start, "max_total_sequence_length": 16}
        train_doctor(build(Recipe, {"run_dir": str(tmp_path), "doctor": short}, "test"))
    path.write_text(path.read_text().replace(chat.fingerprint, "another"))
    seal(path)
    with pytest.raises(InputError, match="share the patient's tokenizer"):
        train_doctor(recipe(tmp_path, start))
    with pytest.raises(InputError, match="small model with the patient's tokenizer"):
        load(Policy(model_name=str(tmp_path / "nowhere")), value_head=True, section="doctor")


def test_the_batch_of_pairs_keeps_ids_rewards_and_ends_apart() -> None:
    pairs = pairs_of()
    pairs[1]["rejected"]["ended"] = False
    batch = batch_of(pairs)
    assert isinstance(batch, TokenBatch) and batch.prompts == PROMPTS and batch.responses == RESPONSES
    assert (
        batch.prompt_of == [0, 0, 1, 1]
        and batch.units == [(0, 1), (2, 3)]
        and batch.data["ended"].tolist() == [True, True, True, False]
    )
    assert batch.data["rewards"][1].tolist() == [-1.0, -1.0, -1.0, 0.0, 0.0]
