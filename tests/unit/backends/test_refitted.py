"""What a refit sends: an engine of this job has what training leaves alone; servers may hold anything until all was sent.

Stand-ins for both sides, so that a server can be away; real engines and servers are in tests/vllm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from nemo_pivotrl.backends.base import TokenBatch
from nemo_pivotrl.backends.vllm.refit import Fingerprint, Refitted, read_folder
from nemo_pivotrl.config import Policy, Vllm
from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.core.types import Sample


class Trainer:
    """Two tensors, of which training changes one."""

    in_one_process = True

    def weights(self, trained_only: bool = False) -> Iterator[tuple[str, Tensor]]:
        yield "adapted", torch.ones(2)
        if not trained_only:
            yield "frozen", torch.zeros(2)

    def export(self, folder: Path, trained_only: bool = False) -> None:
        folder.mkdir(parents=True)
        save_file(dict(self.weights(trained_only)), str(folder / "model.safetensors"))

    def get_inference_log_probs(self, batch: TokenBatch, reference: bool = False) -> Tensor:
        return torch.full((1, 2), -1.0)


class Engine:
    """Notes what it is sent."""

    def __init__(self, addresses: Sequence[str] = ()):
        self.in_one_process, self.well = not addresses, list(addresses)
        self.sent: list[list[str]] = []

    def refit(self, source: Any) -> list[str]:
        read = Fingerprint()
        self.sent.append(sorted(n for n, _ in read.through(read_folder(source) if isinstance(source, str) else source)))
        return [read.value]

    def infer(self, *_: Any) -> list[list[Sample]]:
        return [[Sample((1, 2), (-1.0, -1.0), "stop")]]


def refits(tmp_path: Path, engine: Engine, *addresses: str) -> Refitted:
    settings = Vllm(servers=addresses, refit_folder=str(tmp_path))
    return Refitted(Trainer(), engine, Policy(model_name="here"), settings)  # type: ignore[arg-type]


def test_an_engine_of_this_job_gets_what_training_changes(tmp_path: Path) -> None:
    engine = Engine()
    pair = refits(tmp_path, engine)
    pair.refit()
    pair.refit()
    assert engine.sent == [["adapted"], ["adapted"]]


def test_servers_get_all_weights_until_none_was_away(tmp_path: Path) -> None:
    engine = Engine(["http://one"])
    pair = refits(tmp_path, engine, "http://one", "http://two")
    pair.refit()
    pair.refit()
    engine.well.append("http://two")
    pair.refit()
    pair.refit()
    assert engine.sent == [["adapted", "frozen"]] * 3 + [["adapted"]]


def test_a_set_of_tensors_that_changes_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = refits(tmp_path, Engine())
    pair.refit()
    monkeypatch.setattr(Trainer, "weights", lambda self, trained_only=False: iter([("other", torch.ones(1))]))
    with pytest.raises(InputError, match="not those of the last refit"):
        pair.refit()
