"""NaN and infinity that a model computes are faults: drawn or scored again, then left out and counted; in training an error."""

import dataclasses
import math
import pickle
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_pivotrl.algorithms.model_outputs import ModelOutputs
from nemo_pivotrl.backends.base import TokenBatch
from nemo_pivotrl.backends.reference.guided import Guided, GuidedSamplingParams, Token, check_answers
from nemo_pivotrl.backends.reference.policy import ReferencePolicy
from nemo_pivotrl.backends.reference.reward_model import RewardModel
from nemo_pivotrl.backends.sampling import Turns, check_finite, check_log_probs
from nemo_pivotrl.backends.vllm.requests import checked
from nemo_pivotrl.config import Generation, Optimizer, Policy, Rank, Reward
from nemo_pivotrl.core.errors import InputError, NotFiniteError, Problem
from nemo_pivotrl.core.types import FailedSample, Preference, Sample
from nemo_pivotrl.llmdoctor.contrastive_prompts import Prepared
from nemo_pivotrl.llmdoctor.decode import Prompt, _answers, _lost_row
from nemo_pivotrl.llmdoctor.rank import ranked
from nemo_pivotrl.llmdoctor.reward import reward_wave

NAN, POISON = float("nan"), 5
GENERATION = Generation(max_new_tokens=4, temperature=1.0)
BATCH = TokenBatch([[2, 3], [2, POISON]], [0, 1], [[4, 6], [7, 8]], {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    made = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(made)
    return str(made)


@pytest.fixture
def policy(folder: str) -> ReferencePolicy:
    """A policy that goes wrong at run time: states with one token give NaN."""
    made = ReferencePolicy(Policy(model_name=folder, device="cpu", prefix_sharing=False))
    with torch.no_grad():
        made.model.model.embed_tokens.weight[POISON] = NAN
    return made


# ---- samples ----


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
def test_a_turn_drawn_from_no_numbers_is_lost_and_the_others_are_not(value: float) -> None:
    turns = Turns([1, 2], frozenset(), dataclasses.replace(GENERATION, max_new_tokens=2))
    for _ in range(2):
        logits = torch.zeros(2, 6)
        if turns.step == 1:
            logits[1] = value
        token, log_prob = turns.draw(logits)
        turns.note(token.tolist(), log_prob.tolist())
    first, second = turns.samples()
    assert isinstance(first, Sample) and all(map(math.isfinite, first.log_probs))
    assert isinstance(second, FailedSample) and second.kind == "sampler_not_finite" and "token 1" in second.detail


def test_a_lost_turn_is_drawn_again_alone(policy: ReferencePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    whole = policy._sample_rows

    def counted(prompts: Any, seeds: Any, rows: Sequence[Any], *rest: Any) -> Any:
        sizes.append(len(rows))
        return whole(prompts, seeds, rows, *rest)

    monkeypatch.setattr(policy, "_sample_rows", counted)
    # a turn that draws the poison itself is lost, too
    alone = {n: policy.infer([[2, 3]], [[n]], frozenset(), GENERATION)[0][0] for n in range(6)}
    seeds = [n for n, sample in alone.items() if isinstance(sample, Sample)][:2]
    sizes.clear()
    good, bad = policy.infer([[2, 3], [2, POISON]], [seeds, [3]], frozenset(), GENERATION)
    assert [type(s) for s in good] == [Sample, Sample] and isinstance(bad[0], FailedSample)
    assert sizes == [3, 1]
    assert [s.token_ids for s in good] == [alone[n].token_ids for n in seeds]  # type: ignore[union-attr]


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf, -1e5, -9999.0, 0.5])
def test_what_servers_say_is_held_to_the_same(value: float) -> None:
    with pytest.raises(ValueError, match="log-probability"):
        checked([4, 6], [-0.5, value], "length", frozenset(), 2)


# ---- training ----


def test_log_probabilities_that_are_none_stop_training(policy: ReferencePolicy) -> None:
    with pytest.raises(NotFiniteError, match="1 of 2 rows, first in row 1"):
        policy.get_inference_log_probs(BATCH)


def test_a_scorer_gives_them_to_its_caller_who_leaves_out_the_sequence(policy: ReferencePolicy) -> None:
    good, bad = policy.log_probs([(p, r) for p, r in zip(BATCH.prompts, BATCH.responses, strict=True)])
    assert bool(good.isfinite().all()) and bool(bad.isnan().any())


def test_a_loss_that_is_none_stops_training(policy: ReferencePolicy, folder: str) -> None:
    policy.prepare_for_training(Optimizer())
    policy.prepare_for_training_step()
    with pytest.raises(NotFiniteError, match=r"training: loss: found nan"):
        policy.get_loss_and_metrics(BATCH, lambda o, _: (o.log_probs.sum(), {"loss": o.log_probs.sum().detach()}))
    doctor = ReferencePolicy(Policy(model_name=folder, device="cpu"), value_head=True)

    def loss(outputs: ModelOutputs, _: Any) -> Any:
        return outputs.log_probs.sum() * NAN, {"loss": outputs.log_probs.sum() * NAN}

    with pytest.raises(NotFiniteError, match=r"training: loss: found nan"):
        pair = TokenBatch([[2, 3]], [0, 0], [[4, 6], [7, 8]], {}, together=2)
        doctor.get_loss_and_metrics(pair, loss, forward_only=True)


def test_a_gradient_that_is_none_is_one_screen_and_moves_nothing(policy: ReferencePolicy) -> None:
    policy.prepare_for_training(Optimizer())
    policy.prepare_for_training_step()
    before = policy.model.lm_head.weight.clone()
    policy.model.lm_head.weight.grad[0, 0] = math.inf
    with pytest.raises(InputError, match=r"step 1: found gradient norm (inf|nan)[\s\S]*policy\.optimizer\.lr"):
        policy.finish_training_step()
    assert torch.equal(policy.model.lm_head.weight, before)


def test_the_checks_pass_numbers_and_name_the_others() -> None:
    assert check_finite({"a": 1.0, "b": 0.0}) == {"a": 1.0, "b": 0.0}
    with pytest.raises(NotFiniteError) as caught:
        check_finite({"a": NAN, "b": 1.0, "c": -math.inf})
    assert [p.field for p in caught.value.problems] == ["a", "c"]
    again = pickle.loads(pickle.dumps(caught.value))
    assert isinstance(again, NotFiniteError) and again.problems == caught.value.problems
    assert check_log_probs(torch.zeros(2, 3)).shape == (2, 3)


# ---- scores ----


class Scorer:
    """Log-probabilities of -1, and NaN for answers with one token; `mends`: only while several are asked for."""

    def __init__(self, mends: bool):
        self.mends, self.calls = mends, 0

    def log_probs(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[torch.Tensor]:
        self.calls += 1
        wrong = len(sequences) > 4 or not self.mends
        return [torch.full((len(r),), NAN if wrong and POISON in r else -1.0 - 0.1 * len(p)) for p, r in sequences]


@pytest.mark.parametrize("mends", [False, True])
def test_a_pair_without_numbers_has_no_row(mends: bool) -> None:
    def prepared(name: str, chosen: tuple[int, ...]) -> Prepared:
        preference = Preference(name, "train", "kind", ({"role": "user", "content": "q"},), "a", "b", "file:1")
        return Prepared(
            preference=preference, neutral=[1], positive=[1, 2], negative=[1], chosen=chosen, rejected=[6, 7]
        )

    recipe: Any = SimpleNamespace(reward=Reward(noise_pairs=0), patient=SimpleNamespace(batch_tokens=1000))
    pairs = [prepared("x", (3, 4)), prepared("y", (3, POISON)), prepared("z", (8, 9))]
    scorer = Scorer(mends)
    rows = reward_wave(pairs, recipe, scorer)
    assert [row["preference_id"] for row in rows] == (["x", "y", "z"] if mends else ["x", "z"])
    assert scorer.calls == 2 and "NaN" not in str(rows)


def test_a_score_that_is_none_is_asked_for_again_and_then_left_out() -> None:
    model = RewardModel.__new__(RewardModel)
    model.encode = lambda messages: [*messages[-1]["content"]]  # type: ignore[assignment, misc]
    asked: list[int] = []

    def forward(input_ids: list[list[str]]) -> Any:
        asked.append(len(input_ids))
        bad = [("n" in row) or ("t" in row and len(input_ids) > 1) for row in input_ids]
        return SimpleNamespace(logits=torch.tensor([[NAN if b else 1.0] for b in bad]))

    model._scores = lambda rows: forward(rows).logits[:, 0].tolist()  # type: ignore[method-assign]
    model.model = SimpleNamespace(config=SimpleNamespace(to_dict=dict))
    model.batch_tokens, model.objective = 100, "kind"
    assert model([[]] * 3, ["ab", "nb", "tb"]) == [1.0, None, 1.0]
    assert asked == [3, 1, 1]


def test_rank_leaves_out_what_failed() -> None:
    rows = [{"id": "a", "sample": k, "text": t, "finish_reason": r} for k, (t, r) in enumerate(
        [("b", "stop"), ("a", "stop"), ("c", "stop"), ("", "failed"), ("d", "length")]
    )]  # fmt: skip
    records, left_out = ranked(rows, [1.0, None, 0.0, 3.0, 9.0], {"a": []}, Rank(answers_per_pair=2))
    assert [(r["score_chosen"], r["score_rejected"]) for r in records] == [(1.0, 0.0)]
    assert left_out == {"failed": 2, "unfinished": 1}


# ---- guided answers ----


def token(**changes: float) -> Token:
    good = {"log_prob": -1.0, "patient_log_prob": -1.0, "mixed_log_prob": -1.0, "kl": 0.0}
    return Token(token_id=4, changed_argmax=False, changed_token=False, **(good | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("figure", ["log_prob", "patient_log_prob", "mixed_log_prob", "kl"])
def test_an_answer_with_a_figure_that_is_none_is_refused(figure: str) -> None:
    good = Guided((token(),), "stop")
    assert check_answers([good]) == [good]
    with pytest.raises(NotFiniteError, match="1 of 2 answers, first in answer 1"):
        check_answers([good, Guided((token(), token(**{figure: NAN})), "stop")])


def test_decode_asks_again_alone_and_writes_a_row_without_figures() -> None:
    asked: list[int] = []

    class Generator:
        def generate(self, prompts: Sequence[Sequence[int]], requests: Any, own: Any) -> list[Guided]:
            asked.append(len(prompts))
            if any(POISON in p for p in prompts):
                raise NotFiniteError(Problem("model", None, "log-probabilities", "NaN", "mend it"))
            return [Guided((token(),), "stop") for _ in prompts]

    generator: Any = Generator()
    texts: Any = [([2], {}), ([POISON], {}), ([3], {})]
    first, lost, last = _answers(generator, texts, [GuidedSamplingParams(seed=n) for n in range(3)])
    assert isinstance(first, Guided) and isinstance(last, Guided) and asked == [3, 1, 1, 1]
    assert isinstance(lost, FailedSample)
    row = _lost_row(Prompt("p", "text", (), 1.0, {}, 1), 0, GuidedSamplingParams(), lost)
    assert row["finish_reason"] == "failed" and row["failure"] == "sampler_not_finite"
    assert not row.keys() & {"log_prob", "kl", "changed", "tokens"}
