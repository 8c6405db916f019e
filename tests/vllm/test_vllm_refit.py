"""Refits: the engine computes with the trainer's weights afterwards, tied head included, and says so when it does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, policy
from test_vllm_engine import PROMPTS, STOPS, TIGHT, apart, drawn, truth
from torch import Tensor
from vllm_models import KINDS, saved

from nemo_pivotrl.backends import loading
from nemo_pivotrl.backends.base import TokenBatch
from nemo_pivotrl.backends.vllm.engine import Engine
from nemo_pivotrl.backends.vllm.refit import Fingerprint, Refitted, checksum, read_folder
from nemo_pivotrl.config import Generation, Lora, Optimizer, Policy
from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.core.types import Sample

GENERATION = Generation(max_new_tokens=16)


@pytest.fixture(scope="module", params=["llama", "qwen3", "qwen3-moe"])  # the first tied, the others not
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = saved(KINDS[request.param](), tmp_path_factory.mktemp(request.param))
    made = loading.load(policy(folder, generation=GENERATION), vllm=SMALL)
    yield made
    made.sampler.close()


def shift(trainer: Any, seed: int) -> None:
    """Move every weight, as many training steps would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def test_after_a_step_the_engine_samples_from_the_trained_weights(pair: Any) -> None:
    assert isinstance(pair, Refitted)
    before = drawn(pair, GENERATION)
    assert apart(pair.trainer.model, before, 1.0) <= TIGHT
    for seed in (1, 2):  # twice: the second reload meets what the first one left
        shift(pair.trainer, seed)
        pair.stale = True
        after = drawn(pair, GENERATION)
        assert apart(pair.trainer.model, after, 1.0) <= TIGHT and after != before
        assert pair.mismatch <= TIGHT and not pair.stale
        scored = pair.sampler.log_probs([(PROMPTS[0], after[0][0].token_ids)])[0]
        assert float((truth(pair.trainer.model, PROMPTS[0], after[0][0].token_ids) - scored).abs().max()) <= TIGHT


def test_the_prefix_cache_of_the_old_weights_is_gone(pair: Any) -> None:
    prompt = list(range(20, 70))  # three full blocks
    pair.infer([prompt], [[1]], STOPS, GENERATION)
    shift(pair.trainer, 3)
    pair.stale = True
    ((sample,),) = pair.infer([prompt], [[1]], STOPS, GENERATION)
    assert (
        float((truth(pair.trainer.model, prompt, sample.token_ids) - torch.tensor(sample.log_probs)).abs().max())
        <= TIGHT
    )


def test_an_optimiser_step_marks_the_engine_stale_and_loading_a_state_too(pair: Any, tmp_path: Path) -> None:
    with torch.enable_grad():
        pair.prepare_for_training(Optimizer(lr=1e-3))
        pair.save_training_state(tmp_path / "state")
        pair.prepare_for_training_step()
        batch = TokenBatch(PROMPTS[:1], [0], [(5, 6, 7)], {"mask": torch.ones(1, 3)})
        pair.get_loss_and_metrics(batch, lambda outputs, data: (-(outputs.log_probs * data["mask"]).sum(), {}))
        pair.finish_training_step()
    assert pair.stale
    ((sample,),) = pair.infer(PROMPTS[:1], [[3]], STOPS, GENERATION)
    got = pair.get_inference_log_probs(TokenBatch(PROMPTS[:1], [0], [sample.token_ids], {}))[0]
    assert float((got - torch.tensor(sample.log_probs)).abs().max()) <= TIGHT
    pair.load_training_state(tmp_path / "state")
    assert pair.stale


def test_a_tensor_that_is_lost_on_the_way_stops_the_run(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An injected fault: the worker does not get what the trainer sent."""
    real = pair.sampler.refit
    monkeypatch.setattr(pair.sampler, "refit", lambda weights: real(itertools_less_one(weights)))
    with pytest.raises(InputError) as caught:
        pair.refit()
    assert caught.value.problems[0].field == "fingerprint of the weights"


def itertools_less_one(weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """All but the last, which the sender has counted."""
    held = list(weights)
    yield from held[:-1]


def test_an_engine_that_ignores_its_new_weights_stops_the_run(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An injected fault: right tensors, which end nowhere. Only the probe can see it."""
    shift(pair.trainer, 4)

    def swallow(weights: Iterator[tuple[str, Tensor]]) -> list[str]:
        read = Fingerprint()
        for _ in read.through(weights):
            pass
        return [read.value]

    with monkeypatch.context() as patched:
        patched.setattr(pair.sampler, "refit", swallow)
        with pytest.raises(InputError) as caught:
            pair.refit()
    assert caught.value.problems[0].field == "log-probabilities of the probe"
    pair.refit()
    assert pair.mismatch <= TIGHT


def test_from_a_folder_and_tensor_by_tensor_is_the_same(pair: Any, tmp_path: Path) -> None:
    shift(pair.trainer, 5)
    pair.export(tmp_path / "there")
    sent = Fingerprint()
    for _ in sent.through(pair.weights()):
        pass
    assert pair.sampler.refit(str(tmp_path / "there")) == [sent.value]
    pair.stale = False
    assert apart(pair.trainer.model, drawn(pair, GENERATION), 1.0) <= TIGHT


@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen3-moe"])
@pytest.mark.parametrize(
    "modules", [("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")]
)
def test_adapters_arrive_merged_and_what_they_leave_alone_is_not_sent(
    tmp_path: Path, kind: str, modules: tuple[str, ...]
) -> None:
    folder = saved(KINDS[kind](), tmp_path / "start")
    lora = Lora(enabled=True, r=4, alpha=8, target_modules=modules)
    made: Any = loading.load(policy(folder, lora=lora, generation=GENERATION), vllm=SMALL)
    try:
        for step in (1, 2):
            with torch.no_grad():
                for name, parameter in made.trainer.model.named_parameters():
                    if "lora_B" in name:
                        parameter += 0.05 * step
            made.stale = True
            ((sample,),) = made.infer(PROMPTS[:1], [[3]], STOPS, GENERATION)
            own = made.get_inference_log_probs(TokenBatch(PROMPTS[:1], [0], [sample.token_ids], {}))[0]
            assert isinstance(sample, Sample) and float((own - torch.tensor(sample.log_probs)).abs().max()) <= TIGHT
        everything = {name for name, _ in made.weights()}
        assert made.names < everything and not any("embed" in name or "lm_head" in name for name in made.names)
        made.export(tmp_path / "sent", trained_only=True)
        assert {name for name, _ in read_folder(tmp_path / "sent")} == made.names
    finally:
        made.sampler.close()


def test_a_fingerprint_sees_every_bit_name_and_shape_and_no_order(tmp_path: Path) -> None:
    def value(weights: dict[str, Tensor]) -> str:
        read = Fingerprint()
        assert [name for name, _ in read.through(weights.items())] == list(weights)
        return read.value

    base = {"a": torch.arange(101.0), "b": torch.ones(3, 5, dtype=torch.bfloat16)}
    same = value(base)
    assert value(dict(reversed(base.items()))) == same
    swapped = base["a"].clone()
    swapped[[3, 70]] = swapped[[70, 3]]
    nearly = base["a"].clone()
    nearly[100] = torch.nextafter(nearly[100], torch.tensor(1e9))
    for changed in (
        {"a": swapped},
        {"a": nearly},
        {"b": torch.ones(5, 3, dtype=torch.bfloat16)},
        {"b": torch.ones(3, 5)},
    ):
        assert value(base | changed) != same
    assert value({"c": base["a"], "b": base["b"]}) != same and value({"a": base["a"]}) != same
    with pytest.raises(ValueError, match="twice"):
        list(Fingerprint().through([("a", base["a"])] * 2))
    assert checksum(torch.empty(0)) == (0, 0)
    with pytest.raises(InputError):
        list(read_folder(tmp_path))


def test_an_engine_of_several_processes_takes_no_tensors(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair.sampler, "in_one_process", False)
    with pytest.raises(ValueError, match="from a folder"):
        pair.sampler.refit(iter([]))
    real = Engine.refit
    monkeypatch.setattr(Engine, "refit", lambda self, weights: real(self, weights) if isinstance(weights, str) else [])
    shift(pair.trainer, 6)
    pair.refit()  # goes through the folder
    assert pair.mismatch <= TIGHT and (pair.folder / "weights" / "model.safetensors").exists()


def test_policies_without_vllm_are_what_they_were(tied: str) -> None:
    from nemo_pivotrl.backends.reference.policy import ReferencePolicy

    assert isinstance(loading.load(Policy(model_name=tied)), ReferencePolicy)
    assert isinstance(loading.load_sampler(Policy(model_name=tied)), ReferencePolicy)
