"""Checkpoints that megatron-core's own writer made as Megatron-LM and NeMo do, read at other layouts."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_hf
import torch
from safetensors.torch import load_file
from support.processes import run
from support.workers import Workers
from torch.distributed.checkpoint import FileSystemReader

HERE = Path(__file__).parent
TP, PP, EP = (f"{axis}_model_parallel_size" for axis in ("tensor", "pipeline", "expert"))
SP = {"sequence_parallel": True}
CASES = [
    ("qwen3", "megatron-lm", False, 2, {TP: 2}),
    ("qwen3_padded", "nemo", False, 2, {TP: 2}),
    ("llama_tied", "nemo", False, 2, {PP: 2}),
    ("qwen3_moe", "megatron-lm", False, 2, {EP: 2}),
    ("qwen3_moe_unnormalised", "nemo", False, 4, {TP: 2, EP: 2, **SP}),
    ("qwen3_moe", "nemo", True, 2, {PP: 2}),
    ("nemotron_h", "nemo", False, 2, {TP: 2, **SP}),
    ("nemotron_h", "megatron-lm", False, 1, {}),
]


HYBRID_NORMS = {
    "M": "mixer.in_proj.layer_norm_weight",
    "*": "self_attention.linear_qkv.layer_norm_weight",
    "-": "mlp.linear_fc1.layer_norm_weight",
    "E": "pre_mlp_layernorm.weight",
}
Key = tuple[str, str, bool]


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[Key, tuple[Path, Path]]:
    """For every case (HF folder, the same weights as a tool's checkpoint)."""
    if importlib.util.find_spec("megatron") is None or torch.cuda.is_available():
        pytest.skip("needs megatron-core, and a machine without CUDA")
    made: dict[Key, tuple[Path, Path]] = {}
    for key in {case[:3] for case in CASES}:
        folder = tmp_path_factory.mktemp("pretrained")
        tiny_hf.make(key[0], folder / "hf")
        made[key] = folder / "hf", folder / "checkpoint"
    jobs = [[str(hf), str(target), tool, single] for (_, tool, single), (hf, target) in made.items()]
    done = run("-W", "ignore", str(HERE / "megatron_writer.py"), json.dumps(jobs))
    assert done.returncode == 0, done.stderr[-3000:]
    return made


@pytest.mark.parametrize(("name", "tool", "singleton", "ranks", "layout"), CASES)
def test_weights_are_those_that_the_tool_wrote(
    workers: Workers,
    written: dict[Key, tuple[Path, Path]],
    tmp_path: Path,
    name: str,
    tool: str,
    singleton: bool,
    ranks: int,
    layout: dict[str, Any],
) -> None:
    folder, source = written[name, tool, singleton]
    config = tmp_path / "config"
    config.mkdir()
    shutil.copy(folder / "config.json", config)  # no weights: they cannot come from here
    arguments = {"layout": {**layout, "load": str(source)}, "config": str(config), "target": str(tmp_path / "policy")}
    answers = workers.run(ranks, "model_jobs:compare", folder=str(folder), **arguments)
    differences = [a["difference"] for a in answers if a["difference"] is not None]
    assert differences and max(differences) <= 1e-5
    assert [a["wrong"] for a in answers] == [[]] * ranks
    found, original = (load_file(f / "model.safetensors") for f in (tmp_path / "policy", folder))
    assert found.keys() == original.keys() and all(torch.equal(found[key], original[key]) for key in original)


def test_names_in_checkpoints_are_those_of_transformer_engines_layers(written: dict[Key, tuple[Path, Path]]) -> None:
    """Where a norm stands inside a linear layer on a GPU, it must under its name there, or a real checkpoint is not read."""

    def names(name: str, tool: str, folder: str) -> set[str]:
        return set(FileSystemReader(written[name, tool, False][1] / folder).read_metadata().state_dict_metadata)

    norms = ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight")
    assert {f"decoder.layers.{norm}" for norm in norms} <= names("qwen3", "megatron-lm", "iter_0000007")
    sparse = names("qwen3_moe", "megatron-lm", "iter_0000007")
    assert {f"decoder.layers.{i}.pre_mlp_layernorm.weight" for i in (0, 2, 3)} <= sparse
    assert "decoder.layers.1.mlp.linear_fc1.layer_norm_weight" in sparse
    stacked = names("qwen3_moe_unnormalised", "nemo", "weights")
    assert {f"module.decoder.layers.{n}" for n in ("pre_mlp_layernorm.weight", norms[0])} <= stacked
    hybrid = names("nemotron_h", "nemo", "weights")
    for layer, kind in enumerate(tiny_hf.LATENT["hybrid_override_pattern"]):
        assert f"module.decoder.layers.{layer}.{HYBRID_NORMS[kind]}" in hybrid
    assert "module.decoder.final_norm.weight" in hybrid


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nothing", "no metadata.json -> give a torch_dist checkpoint"),
        ("legacy", "Megatron-LM's `torch` format -> "),
        ("zarr", "zarr -> convert it"),
        ("other model", "this model has"),
    ],
)
def test_what_cannot_be_read_is_refused(
    workers: Workers, written: dict[Key, tuple[Path, Path]], tmp_path: Path, what: str, message: str
) -> None:
    folder, source = written["qwen3", "megatron-lm", False]
    target = tmp_path / "checkpoint"
    target.mkdir()
    if what == "legacy":
        (target / "mp_rank_00").mkdir()
    if what == "zarr":
        (target / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    if what == "other model":
        target = source
        folder = shutil.copytree(folder, tmp_path / "hf")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    for found in workers.run(2, "model_jobs:refusal", folder=str(folder), layout={TP: 2, "load": str(target)}):
        assert found and all(message in text for text in found.values()), found
