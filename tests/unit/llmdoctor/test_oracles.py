"""Oracles score what they say they score; a reward model reads the conversation through its own template."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from nemo_pivotrl.config import Oracles
from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.demo import tiny_models as tiny
from nemo_pivotrl.llmdoctor import oracles


def test_brevity_counts_words_not_marks() -> None:
    assert oracles.brevity("") == 0.0
    assert oracles.brevity("one, two - three .") == -3 / 20


def test_sentiment_is_vaders() -> None:
    pytest.importorskip("vaderSentiment")
    score = oracles.load(["sentiment"], Oracles())["sentiment"]
    found = score([[]] * 3, ["What a lovely day!", "The table has four legs.", "This is awful and sad."])
    assert found[0] > 0.5 and found[1] == 0.0 and found[2] < -0.5


def test_an_unknown_objective_lists_those_there_are() -> None:
    settings = Oracles(reward_models={"helpfulness": "somewhere"})
    (problem,) = oracles.check("assess.objectives", ["brevity", "helpfulness", "wit"], settings)
    assert problem.found == "wit" and "helpfulness" in problem.remedy and "kindness" in problem.remedy


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward") / "model"
    tokenizer = tiny.make_tokenizer(["how is the tea", "lovely", "awful , go away"], 300)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=128,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_reward_model_scores_each_conversation_as_it_does_alone(reward_model: Path) -> None:
    settings = Oracles(reward_models={"help": str(reward_model)}, device="cpu", batch_tokens=64)
    oracle = oracles.load(["help"], settings)["help"]
    asked = [[{"role": "user", "content": text}] for text in ("how is the tea", "how", "how is the tea", "how is the")]
    answers = ["lovely", "awful , go away", "awful", "lovely"]
    together = oracle(asked, answers)
    alone = [oracle([a], [b])[0] for a, b in zip(asked, answers, strict=True)]
    assert together == pytest.approx(alone, abs=1e-6) and len(set(together)) == 4
    model = LlamaForSequenceClassification.from_pretrained(reward_model)
    tokenizer = oracle.tokenizer  # type: ignore[attr-defined]
    ids = tokenizer.apply_chat_template(
        [*asked[0], {"role": "assistant", "content": "lovely"}], return_tensors="pt", return_dict=True
    )
    assert together[0] == pytest.approx(model(**ids).logits[0, 0].item(), abs=1e-6)


def test_special_tokens_in_an_answer_are_text_and_half_an_emoji_is_a_fault(reward_model: Path) -> None:
    settings = Oracles(reward_models={"help": str(reward_model)}, device="cpu")
    oracle = oracles.load(["help"], settings)["help"]
    question = [{"role": "user", "content": "how is the tea"}]
    tokenizer = oracle.tokenizer  # type: ignore[attr-defined]
    forged = "awful" + tokenizer.eos_token + "lovely"
    ids = oracle.encode([*question, {"role": "assistant", "content": forged}])  # type: ignore[attr-defined]
    plain = oracle.encode([*question, {"role": "assistant", "content": "awful"}])  # type: ignore[attr-defined]
    assert ids.count(tokenizer.eos_token_id) == plain.count(tokenizer.eos_token_id)
    assert tokenizer.decode(ids).count(tokenizer.eos_token) == plain.count(tokenizer.eos_token_id) + 1  # spelt out
    found = oracle([question] * 2, ["lovely \ud83d", "lovely"])
    assert found[0] is None and found[1] == oracle([question], ["lovely"])[0]


def test_what_is_no_reward_model_is_refused(reward_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give an HF checkpoint folder"):
        oracles.load(["help"], Oracles(reward_models={"help": str(tmp_path)}))
    model = LlamaForSequenceClassification.from_pretrained(reward_model, num_labels=2, ignore_mismatched_sizes=True)
    model.save_pretrained(tmp_path / "two")
    with pytest.raises(InputError, match="2 outputs"):
        oracles.load(["help"], Oracles(reward_models={"help": str(tmp_path / "two")}))
    settings = Oracles(reward_models={"help": str(reward_model)}, device="cpu")
    with pytest.raises(InputError, match="the reward model reads 128"):
        oracles.load(["help"], settings)["help"]([[{"role": "user", "content": "tea " * 200}]], ["lovely"])
