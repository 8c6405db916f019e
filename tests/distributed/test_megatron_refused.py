"""Weights that are not the model's, at layouts of one and two ranks: every rank refuses them, for the same reason."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_hf
import torch
from safetensors.torch import load, save_file
from support.workers import Workers
from torch.distributed.checkpoint.metadata import Metadata, TensorProperties, TensorStorageMetadata

FILE = "model.safetensors"
NORM = "model.layers.1.input_layernorm.weight"
LAST = "model.layers.3.mlp.down_proj.weight"


def filled(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], Any]:
    def fill(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[-1] = value

    return fill


TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "whole": (lambda t: None, ""),
    "mtp": (lambda t: t.update({"mtp.weight": torch.ones(2)}), ""),
    "missing": (lambda t: t.pop(NORM), NORM),
    "unexpected": (lambda t: t.update({"v_head.weight": torch.ones(2)}), "v_head.weight"),
    "misshapen": (lambda t: t.update({NORM: torch.ones(3)}), NORM),
    "int8": (lambda t: t.update({NORM: t[NORM].to(torch.int8)}), "I8"),
    "float8": (lambda t: t.update({NORM: t[NORM].to(torch.float8_e4m3fn)}), "F8_E4M3"),
    "nan": (filled(NORM, float("nan")), "NaN among its values"),
    "inf in the last layer": (filled(LAST, float("inf")), f"{LAST}: found inf among its values"),
    "nan in the head": (filled("lm_head.weight", float("nan")), "lm_head.weight: found NaN"),
}


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


FILES: dict[str, Callable[[Path], Any]] = {
    "cut off": lambda f: _cut(f / FILE),
    "empty": lambda f: (f / FILE).write_bytes(b""),
    "a directory": lambda f: ((f / FILE).unlink(), (f / FILE).mkdir()),
    "a FIFO": lambda f: ((f / FILE).unlink(), os.mkfifo(f / FILE)),
    "no config": lambda f: (f / "config.json").unlink(),
    "torn config": lambda f: _cut(f / "config.json"),
    "torn index": lambda f: (f / f"{FILE}.index.json").write_text("{"),
    "another type": lambda f: (f / "config.json").write_text('{"model_type": "gpt2"}'),
    "more layers": lambda f: (f / "config.json").write_text(
        json.dumps(json.loads((f / "config.json").read_text()) | {"num_hidden_layers": 10**9})
    ),
    "code": lambda f: (
        (f / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "own.C"}}'),
        (f / "own.py").write_text("raise SystemExit('code of the folder ran')"),
    ),
}


@pytest.mark.parametrize(("ranks", "layout"), [(1, {}), (2, {"tensor_model_parallel_size": 2})])
def test_weights_that_are_not_the_models_are_refused_on_every_rank(
    workers: Workers, tmp_path: Path, ranks: int, layout: dict[str, Any]
) -> None:
    tiny_hf.make("qwen3", tmp_path / "whole")
    folders = {"whole": tmp_path / "whole"}
    for name in [*TENSORS, *FILES]:
        if name != "whole":
            folders[name] = Path(shutil.copytree(tmp_path / "whole", tmp_path / name.replace(" ", "-")))
    for name, (damage, _) in TENSORS.items():
        tensors = load((folders[name] / FILE).read_bytes())
        damage(tensors)
        save_file(tensors, folders[name] / FILE, {"format": "pt"})
    for name, break_it in FILES.items():
        break_it(folders[name])
    named = {name: str(folder) for name, folder in folders.items()}
    answers = workers.run(ranks, "refused_jobs:refusals", folders=named, layout=layout, loads={})
    assert all(answer == answers[0] for answer in answers)
    for name, (_, says) in TENSORS.items():
        assert (says in answers[0][name]) if says else answers[0][name] == "", name
    for name in FILES:
        assert named[name] in answers[0][name] and len(answers[0][name].splitlines()) < 20, name


@pytest.mark.parametrize(("value", "says"), [(0.5, ""), (float("nan"), "NaN among its values")])
def test_a_tools_checkpoint_holds_numbers(workers: Workers, tmp_path: Path, value: float, says: str) -> None:
    tiny_hf.make("qwen3", tmp_path / "hf")
    arguments = {"folder": str(tmp_path / "hf"), "target": str(tmp_path / "tool"), "value": value}
    answers = workers.run(2, "refused_jobs:refusal_of_a_tools", **arguments)
    assert answers[0] == answers[1] and (says in answers[0] if says else answers[0] == "")


@pytest.mark.filterwarnings("ignore")
def test_types_of_a_tools_checkpoint_are_read_from_its_index() -> None:
    from nemo_pivotrl.backends.megatron.pretrained import _types

    def stored(dtype: torch.dtype) -> TensorStorageMetadata:
        return TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size([2]), [])

    kinds = {"a": torch.bfloat16, "b": torch.int8, "c": torch.float8_e4m3fn, "d": torch.uint8, "e": torch.float32}
    tensors: Any = {f"decoder.{name}": stored(kind) for name, kind in kinds.items()}
    index = Metadata(tensors | {"optimizer.step": stored(torch.int64)})
    assert [p.field for p in _types(index, Path("x"), ("decoder.",))] == ["decoder.b", "decoder.c", "decoder.d"]


def test_a_head_that_the_config_ties_has_the_embeddings_values(workers: Workers, tmp_path: Path) -> None:
    tiny_hf.make("llama_tied", tmp_path / "same")
    tensors = load((tmp_path / "same" / FILE).read_bytes())
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "same" / FILE, {"format": "pt"})
    shutil.copytree(tmp_path / "same", tmp_path / "other")
    tensors["lm_head.weight"] += 1
    save_file(tensors, tmp_path / "other" / FILE, {"format": "pt"})
    folders = {name: str(tmp_path / name) for name in ("same", "other")}
    (answer,) = workers.run(1, "refused_jobs:refusals", folders=folders, layout={}, loads={})
    assert answer["same"] == "" and "tie_word_embeddings" in answer["other"]
