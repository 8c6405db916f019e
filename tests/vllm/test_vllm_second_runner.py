"""The class under vLLM's second model runner, which needs a GPU: its calls, made by hand with the runner's own data classes.

What the runner would hold on the device (token ids, lengths) is held in plain tensors here.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_vllm_guide import TEXTS, doctors_of, folders
from vllm.v1.sample.logits_processor import _load_custom_logitsprocs
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState
from vllm.v1.worker.gpu.sample.logits_processor.loader import _load_v2_logitsprocs_by_fqcns

from nemo_pivotrl.backends.reference.guided import GuidedSamplingParams, load_guided
from nemo_pivotrl.backends.vllm import guide as vllm_guide
from nemo_pivotrl.backends.vllm.guidance import CLASS, guide_arguments
from nemo_pivotrl.config import Decode, Patient

__all__ = ["folders"]
SLOTS, LENGTH = 4, 64


class Runner:
    """The second runner's side: slots with their tokens, and a step over some of them in any order."""

    def __init__(self, config: Any, width: int):
        self.ids = torch.zeros(SLOTS, LENGTH, dtype=torch.int64)
        self.prompt, self.total = np.zeros(SLOTS, dtype=np.int64), np.zeros(SLOTS, dtype=np.int64)
        held = SimpleNamespace(gpu=self.ids)
        lengths = SimpleNamespace(np=self.prompt)
        self.states = LogitsProcRequestState(
            torch.device("cpu"),
            SLOTS,
            width,
            held,
            lengths,
            lengths,
            SimpleNamespace(gpu=torch.from_numpy(self.total)),  # type: ignore[arg-type]
        )
        self.guide = vllm_guide.Guide(config, self.states)

    def add(self, slot: int, prompt: list[int], extra: dict[str, Any] | None) -> bool:
        self.ids[slot] = 0
        self.ids[slot, : len(prompt)] = torch.tensor(prompt)
        self.prompt[slot] = self.total[slot] = len(prompt)
        return bool(self.guide.add_request(slot, SimpleNamespace(extra_args=extra)))

    def step(self, slots: list[int], logits: torch.Tensor, computed: dict[int, int] | None = None) -> torch.Tensor:
        """computed: where a slot is still in its prompt, how far."""
        self.guide.apply_staged_writes()
        length = [(computed or {}).get(s, int(self.total[s])) for s in slots]
        index = torch.tensor(slots)
        last = torch.tensor([int(self.ids[s, n - 1]) for s, n in zip(slots, length, strict=True)])
        context = LogitsContext(
            index, index, np.array(slots), torch.zeros_like(index), last, torch.tensor(length) - 1, np.array(length)
        )
        return self.guide.apply(logits.clone(), context)

    def take(self, slot: int, token: int) -> None:
        self.ids[slot, self.total[slot]] = token
        self.total[slot] += 1


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor-parallel rank, without an engine that would have made the group."""
    monkeypatch.setattr(vllm_guide, "get_tp_group", lambda: SimpleNamespace(rank_in_group=0, world_size=1))


def test_one_class_is_taken_by_the_loaders_of_both_runners() -> None:
    assert _load_custom_logitsprocs([CLASS]) == [vllm_guide.Guide] == _load_v2_logitsprocs_by_fqcns([CLASS])


@pytest.mark.parametrize("adapters", [False, True])
def test_rows_that_come_go_and_change_places_get_the_mixture(
    folders: dict[str, str], alone: None, adapters: bool
) -> None:
    doctors = doctors_of(folders, True, adapters)
    truth = load_guided(folders["patient"], doctors, "ratio", device="cpu")
    patient = Patient(model_name=folders["patient"])
    arguments, _ = guide_arguments(patient, Decode(doctors=doctors, mode="ratio"))
    width = truth.vocab_size + 8
    runner = Runner(SimpleNamespace(additional_config=arguments["additional_config"]), width)
    wishes: list[tuple[float, dict[str, float]]] = [
        (1.0, {"kind": 0.8}),
        (0.7, {"brief": -0.5}),
        (1.0, {}),
        (1.0, {"kind": 2.0}),
    ]
    prompts = [truth.tokenizer.encode(text) for text in TEXTS]
    decodings: dict[int, Any] = {}

    def begin(slot: int, which: int) -> None:
        alpha, beta = wishes[which]
        extra = {"guidance.alpha": alpha, **{f"guidance.beta.{n}": b for n, b in beta.items()}}
        assert runner.add(slot, prompts[which], extra) == bool(beta)
        decodings[slot] = truth.start(
            [prompts[which]], [GuidedSamplingParams(alpha=alpha, beta=beta, max_new_tokens=30)]
        )

    def step(slots: list[int]) -> None:
        logits = torch.cat([decodings[s].stream.logits() for s in slots])
        found = runner.step(slots, logits)
        for row, slot in enumerate(slots):
            mixed = decodings[slot].guide.mix(logits[row : row + 1])
            if bool(mixed.guided[0]):
                assert float((found[row].log_softmax(0) - mixed.log_probs[0]).nan_to_num(0.0).abs().max()) <= 1e-5
            else:
                assert torch.equal(found[row], logits[row])
            token = int(found[row].argmax())
            runner.take(slot, token)
            decodings[slot].stream.feed(torch.tensor([token]))
            decodings[slot].guide.feed(torch.tensor([token]))

    begin(0, 0)
    begin(2, 1)
    step([0, 2])
    begin(1, 2)
    # a prompt in the middle: its logits are nobody's, and stay
    begin(3, 3)
    part = torch.randn(1, width)
    assert torch.equal(runner.step([3], part, {3: len(prompts[3]) - 2}), part)
    for order in ([2, 0, 1], [0, 1, 2, 3], [3, 1, 0, 2]):
        step(order)
    begin(0, 1)  # the slot's next request
    for order in ([0, 3, 2], [2, 3, 0]):
        step(order)


def test_unconfigured_it_does_nothing(alone: None) -> None:
    runner = Runner(SimpleNamespace(additional_config=None), 16)
    assert not runner.add(0, [1, 2], None)
    logits = torch.randn(1, 16)
    assert torch.equal(runner.step([0], logits), logits)
