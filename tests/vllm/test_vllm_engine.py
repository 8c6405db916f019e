"""The in-process engine against transformers in float32: samples, log-probabilities, spans, refits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, policy
from safetensors.torch import load, save_file
from torch import Tensor
from vllm_models import KINDS, VOCAB, llama, saved

from nemo_pivotrl.backends.vllm.engine import Engine
from nemo_pivotrl.backends.vllm.requests import checked, in_order
from nemo_pivotrl.config import Generation, Vllm
from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.core.types import FailedSample, Sample

PROMPTS = [[7, 8, 9, 10, 11], [7, 8, 9, 10, 11, 12, 13], [200, 3, 40, 5], [9]]
STOPS = frozenset({1, 17, 90})
TIGHT = 1e-5


def truth(model: Any, prompt: Sequence[int], response: Sequence[int], temperature: float = 1.0) -> Tensor:
    """log-softmax [T] of each response token, by one forward pass of transformers."""
    ids = torch.tensor([[*prompt, *response]])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double() / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]


def drawn(engine: Engine, generation: Generation, count: int = 3, stops: frozenset[int] = STOPS) -> list[list[Sample]]:
    seeds = [[1000 * p + k for k in range(count)] for p in range(len(PROMPTS))]
    groups = engine.infer(PROMPTS, seeds, stops, generation)
    assert not any(isinstance(s, FailedSample) for group in groups for s in group)
    return groups  # type: ignore[return-value]


def apart(model: Any, groups: Sequence[Sequence[Sample]], temperature: float) -> float:
    return max(
        float((truth(model, prompt, s.token_ids, temperature) - torch.tensor(s.log_probs)).abs().max())
        for prompt, group in zip(PROMPTS, groups, strict=True)
        for s in group
    )


@pytest.mark.parametrize("kind", KINDS)
def test_generation_and_prompt_log_probs_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    model = KINDS[kind]()
    engine = Engine(policy(saved(model, tmp_path / kind)), SMALL)
    try:
        for temperature in (1.0, 0.7):
            groups = drawn(engine, Generation(max_new_tokens=24, temperature=temperature))
            assert apart(model, groups, temperature) <= TIGHT
        whole = [(p, s.token_ids) for p, group in zip(PROMPTS, groups, strict=True) for s in group]
        scored = engine.log_probs(whole)
        assert (
            max(float((truth(model, p, r) - got).abs().max()) for (p, r), got in zip(whole, scored, strict=True))
            <= TIGHT
        )
    finally:
        engine.close()


def test_a_turn_is_exactly_the_action_span(engine: Engine) -> None:
    """Stop tokens are ours alone (the checkpoint's end of text, id 1, is none here), and belong to the turn."""
    stops = frozenset(range(20, 32))
    groups = drawn(engine, Generation(max_new_tokens=24), 8, stops)
    flat = [s for group in groups for s in group]
    assert {s.finish_reason for s in flat} == {"stop", "length"}
    for sample in flat:
        ended = [i for i, token in enumerate(sample.token_ids) if token in stops]
        assert ended == ([len(sample.token_ids) - 1] if sample.finish_reason == "stop" else [])
        assert len(sample.log_probs) == len(sample.token_ids) <= 24
    unstopped = drawn(engine, Generation(max_new_tokens=24), 8, frozenset())
    assert any(1 in s.token_ids[:-1] for group in unstopped for s in group)


def test_seeds_are_distinct_and_decide_and_the_batch_does_not(engine: Engine) -> None:
    generation = Generation(max_new_tokens=24)
    together = drawn(engine, generation, 8)
    assert all(len({s.token_ids for s in group}) == 8 for group in together)
    for p, prompt in enumerate(PROMPTS):
        for k in (0, 5):
            ((alone,),) = engine.infer([prompt], [[1000 * p + k]], STOPS, generation)
            assert isinstance(alone, Sample) and alone.token_ids == together[p][k].token_ids
            assert max(abs(a - b) for a, b in zip(alone.log_probs, together[p][k].log_probs, strict=True)) <= TIGHT


def test_top_p_and_temperature_0_report_the_distribution_that_was_sampled(engine: Engine, tied: str) -> None:
    model = llama(tied=True)
    for sample, prompt in zip(drawn(engine, Generation(max_new_tokens=6, temperature=0.0), 1), PROMPTS, strict=True):
        logits = model(input_ids=torch.tensor([[*prompt, *sample[0].token_ids]])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == list(sample[0].token_ids)
    assert apart(model, drawn(engine, Generation(max_new_tokens=6, temperature=0.0), 1), 1.0) <= TIGHT
    for group, prompt in zip(drawn(engine, Generation(max_new_tokens=6, top_p=0.5)), PROMPTS, strict=True):
        for s in group:
            whole = truth(model, prompt, s.token_ids)
            # of half of the mass at least every token is up to twice as likely
            assert bool((torch.tensor(s.log_probs) >= whole - TIGHT).all())
            assert bool((torch.tensor(s.log_probs) <= whole + 0.6932).all())


def test_states_of_one_trajectory_follow_each_other_and_hit_the_prefix_cache(engine: Engine) -> None:
    long = [int(x) for x in torch.randint(20, VOCAB, (100,), generator=torch.Generator().manual_seed(5))]
    prompts = [long[:70], [5, 6, 7], long[:20], long[:100], long[:45]]
    order = in_order(prompts, [[0, 1]] * 5)
    assert [p for p, _ in order[::2]] == [1, 2, 4, 0, 3] and [k for _, k in order] == [0, 1] * 5
    asked = [prompts[p] for p, _ in order]
    from vllm import SamplingParams

    params = [SamplingParams(max_tokens=1, detokenize=False) for _ in asked]
    engine.llm.reset_prefix_cache()
    cached = [o.num_cached_tokens for o in engine._generate(asked, params)]
    # whole blocks: a prompt's second sample finds all but its last token, a longer state what the shorter ones had
    assert cached == [0, 0, 0, 0, 0, 32, 32, 64, 64, 96]


def test_more_prompt_tokens_than_one_step_takes_do_not_disturb_seeded_samples(engine: Engine) -> None:
    """Read in pieces, a seeded request ends vLLM on CPUs."""
    generator = torch.Generator().manual_seed(6)
    prompts = [torch.randint(20, VOCAB, (100,), generator=generator).tolist() for _ in range(60)]
    assert sum(map(len, prompts)) > engine.llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
    groups = engine.infer(prompts, [[i] for i in range(60)], STOPS, Generation(max_new_tokens=4))
    ((alone,),) = engine.infer([prompts[37]], [[37]], STOPS, Generation(max_new_tokens=4))
    assert isinstance(alone, Sample) and alone.token_ids == groups[37][0].token_ids  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("ids", "logs", "reason", "why"),
    [
        ([5, 6], [-1.0], "length", "2 tokens with 1"),
        ([], [], "stop", "0 tokens"),
        ([5, 6, 7], [-1.0, -1.0, float("nan")], "length", "nan"),
        ([5, 6, 7], [-1.0, -9999.0, -1.0], "abort", "abort"),
        ([5, 6, 7], [-1.0, -1e9, -1.0], "length", "-1000000000.0"),
        ([5, 6, 7], [-1.0, 0.5, -1.0], "length", "0.5"),
        ([5, 6, 7], [-1.0, -1.0, -1.0], "stop", "stop tokens are"),
        ([17, 6, 7], [-1.0, -1.0, -1.0], "length", "stop tokens are"),
        ([5, 6, 17], [-1.0, -1.0, -1.0], "length", "stop tokens are"),
        ([5, 6], [-1.0, -1.0], "length", "at 3"),
        ([5, 6, 7, 8], [-1.0] * 4, "length", "4 tokens"),
        ([5, 6], [-1.0, -1.0], None, "None"),
    ],
)
def test_what_is_not_an_actions_span_is_refused(ids: list[int], logs: list[float], reason: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        checked(ids, logs, reason, STOPS, 3)


def test_it_sleeps_between_rollouts_and_wakes_to_the_same_turns(engine: Engine) -> None:
    """On CPUs nothing is given back, but a sleeping scheduler blocks for ever unless it is woken."""
    generation = Generation(max_new_tokens=12)
    awake = drawn(engine, generation)
    settings = engine.settings
    engine.settings = Vllm(sleep=True)
    try:
        assert [drawn(engine, generation) for _ in range(2)] == [awake, awake] and engine.asleep
        engine.settings = settings
        assert drawn(engine, generation) == awake and not engine.asleep
    finally:
        engine.settings = settings


@pytest.mark.parametrize(
    ("field", "change", "settings"),
    [
        ("vllm.engine_args.model", {}, {"engine_args": {"model": "other"}}),
        ("vllm.engine_args.logprobs_mode", {}, {"engine_args": {"logprobs_mode": "raw_logprobs"}}),
        ("vllm.engine_args.trust_remote_code", {}, {"engine_args": {"trust_remote_code": True}}),
        ("vllm.engine_args.load_format", {}, {"engine_args": {"load_format": "pt"}}),
        ("vllm.engine_args.load_format", {}, {"engine_args": {"load_format": "dummy"}}),
        ("policy.dtype", {"dtype": "float64"}, {}),
        ("policy.max_total_sequence_length", {"max_total_sequence_length": 300}, {}),
    ],
)
def test_settings_that_no_engine_can_have_are_named(tied: str, field: str, change: Any, settings: Any) -> None:
    with pytest.raises(InputError) as caught:
        Engine(policy(tied, **change), Vllm(**settings))
    assert [p.field for p in caught.value.problems] == [field]


@pytest.mark.parametrize("damage", ["NaN", "inf", "missing", "unexpected", "int8", "pickle"])
def test_weights_that_are_not_the_models_are_refused(damage: str, tmp_path: Path) -> None:
    folder = Path(saved(llama(tied=False), tmp_path / "damaged"))
    name, file = "model.layers.1.mlp.down_proj.weight", folder / "model.safetensors"
    tensors = load(file.read_bytes())
    if damage in ("NaN", "inf"):
        tensors[name][3, 5] = float(damage)
    elif damage == "missing":
        del tensors[name]
    elif damage == "unexpected":
        tensors["model.layers.1.mlp.more.weight"] = torch.ones(2, 2)
    elif damage == "int8":
        tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, file, {"format": "pt"})
    if damage == "pickle":
        file.unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(InputError) as caught:
        Engine(policy(str(folder)), SMALL)
    assert str(folder) in str(caught.value) and len(str(caught.value).splitlines()) < 10
    if damage in ("NaN", "inf"):
        assert f"{damage} among its values" in str(caught.value)


def test_a_model_that_vllm_cannot_run_is_named_with_what_it_said(tmp_path: Path) -> None:
    folder = saved(llama(tied=True, head_dim=20), tmp_path / "narrow")  # no attention kernel on CPUs
    with pytest.raises(InputError) as caught:
        broken = Engine(policy(folder), SMALL)
        broken.infer([[5, 6]], [[1]], STOPS, Generation(max_new_tokens=2))
    assert "backend" in caught.value.problems[0].remedy
