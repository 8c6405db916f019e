"""HF checkpoints in Megatron: transformers' own logits under every layout, and every tensor back bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_hf
import torch
from safetensors.torch import load_file, save_file
from support.workers import RankFailed, Workers

TP, PP, EP = (f"{axis}_model_parallel_size" for axis in ("tensor", "pipeline", "expert"))
CP = "context_parallel_size"
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "w1": (1, {}),
    "tp2": (2, {TP: 2}),
    "tp2+sp": (2, {TP: 2, "sequence_parallel": True}),
    "tp4+sp": (4, {TP: 4, "sequence_parallel": True}),
    "pp2": (2, {PP: 2}),
    "cp2": (2, {CP: 2}),
    "ep2 allgather": (2, {EP: 2, "moe_token_dispatcher_type": "allgather"}),
    "ep2 alltoall": (2, {EP: 2}),
    "tp2 x pp2": (4, {TP: 2, PP: 2, "sequence_parallel": True}),
    "tp2 x cp2": (4, {TP: 2, CP: 2, "sequence_parallel": True}),
    "pp2 x ep2": (4, {PP: 2, EP: 2}),
    "tp2 x ep2": (4, {TP: 2, EP: 2, "sequence_parallel": True}),
}
DENSE = ["w1", "tp2", "tp2+sp", "pp2", "cp2", "tp2 x pp2"]
SPARSE = ["w1", "tp2+sp", "pp2", "cp2", "ep2 allgather", "ep2 alltoall", "tp2 x pp2", "pp2 x ep2", "tp2 x ep2"]
CASES = [
    *((name, layout) for name in ("llama", "llama_tied", "qwen3") for layout in DENSE),
    ("llama", "tp2 x cp2"),
    ("qwen2", "tp2"),
    *((name, "tp4+sp") for name in ("qwen2", "qwen3", "qwen3_moe")),  # more ranks than key-value heads
    *(("qwen3_moe", layout) for layout in SPARSE),
    ("qwen3_moe_unnormalised", "ep2 alltoall"),
    *(("nemotron_h", layout) for layout in SPARSE),
    ("nemotron_h_groups", "tp2 x ep2"),
]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoint folders, made when first asked for."""

    class Made(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            self[name] = tmp_path_factory.mktemp("hf") / name
            tiny_hf.make(name, self[name])
            return self[name]

    return Made()


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_logits_are_those_of_transformers_and_every_tensor_comes_back(
    workers: Workers, checkpoints: dict[str, Path], name: str, layout: str
) -> None:
    ranks, settings = LAYOUTS[layout]
    answers = workers.run(ranks, "model_jobs:compare", folder=str(checkpoints[name]), layout=settings)
    differences = [a["difference"] for a in answers if a["difference"] is not None]
    assert differences and max(differences) <= 1e-5
    assert [a["wrong"] for a in answers] == [[]] * ranks and answers[0]["tensors"] > 10
    print(f"\n{name:24}{layout:16}{max(differences):.1e}")


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("name", ["llama_tied", "qwen3_moe", "nemotron_h"])
def test_gradients_are_those_of_transformers(
    workers: Workers, checkpoints: dict[str, Path], name: str, recompute: str
) -> None:
    layout = {"recompute": recompute}
    (found,) = workers.run(1, "model_jobs:gradients", folder=str(checkpoints[name]), layout=layout)
    assert len(found) > 10 and max(found.values()) <= 1e-5
    print(f"\n{name:24}{recompute:16}{max(found.items(), key=lambda f: f[1])}")


def test_a_saved_folder_is_an_hf_checkpoint_with_what_is_not_the_policys_carried_over(
    workers: Workers, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    source = shutil.copytree(checkpoints["nemotron_h"], tmp_path / "source")
    tensors = load_file(source / "model.safetensors") | {"mtp.layers.0.norm.weight": torch.arange(3.0)}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    layout = {TP: 2, PP: 2, "sequence_parallel": True}
    target = tmp_path / "saved"
    workers.run(4, "model_jobs:save", folder=str(source), layout=layout, target=str(target), max_shard_bytes=20_000)
    shards = sorted(target.glob("model-*.safetensors"))
    assert len(shards) > 2 and not list(target.glob(".part*"))
    index = json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
    found = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert index.keys() == found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(target, attn_implementation="eager", experts_implementation="eager")
    tokens = torch.load(source / "tokens.pt")
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens, use_cache=False).logits, torch.load(source / "logits.pt"))


def test_missing_unexpected_and_misshapen_tensors_are_all_named(
    workers: Workers, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    broken = shutil.copytree(checkpoints["llama"], tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.2.self_attn.k_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    tensors["model.layers.1.mlp.down_proj.weight"] = tensors["model.layers.1.mlp.down_proj.weight"].T.contiguous()
    tensors["model.rotary_emb.inv_freq"] = torch.zeros(8)  # old checkpoints carry it; it follows from the config
    save_file(tensors, broken / "model.safetensors")
    for layout, ranks in (({}, 1), ({TP: 2}, 2)):
        for found in workers.run(ranks, "model_jobs:refusal", folder=str(broken), layout=layout):
            assert found == {
                "model.layers.2.self_attn.k_proj.weight": "nothing -> the config asks for it",
                "model.layers.0.self_attn.q_proj.bias": "a tensor -> the config has no place for it",
                "model.layers.1.mlp.down_proj.weight": "(48, 32) -> the config makes it (32, 48)",
            }


def test_a_config_with_another_number_of_experts_is_refused(
    workers: Workers, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    for number in (2, 8):
        folder = shutil.copytree(checkpoints["qwen3_moe"], tmp_path / str(number))
        config = json.loads((folder / "config.json").read_text())
        config |= {name: number for name in ("num_experts", "num_local_experts") if name in config}
        (folder / "config.json").write_text(json.dumps(config))
        (found,) = workers.run(1, "model_jobs:refusal", folder=str(folder), layout={})
        assert found["experts"].startswith(f"4 of them -> config.json says {number}")


@pytest.mark.parametrize(
    ("name", "ranks", "layout", "field", "remedy"),
    [
        ("llama", 2, {TP: 4}, TP, "is 4, which must divide the number of processes"),
        ("llama", 3, {TP: 3}, TP, "must divide the model's key-value heads, 2, or be a multiple of them"),
        ("llama", 1, {"sequence_parallel": True}, "sequence_parallel", "raise tensor_model_parallel_size"),
        ("llama", 2, {EP: 2}, EP, "has no experts"),
        ("qwen3_moe", 2, {TP: 2}, "sequence_parallel", "only with it"),
        ("qwen3_moe", 1, {"moe_token_dispatcher_type": "flex"}, "moe_token_dispatcher_type", "DeepEP"),
        ("llama", 1, {"fp8": "hybrid"}, "fp8", "CPUs have no FP8"),
        ("llama", 1, {"cpu": False}, "cpu", "on a machine with GPUs"),
    ],
)
def test_what_recipe_model_and_machine_do_not_have_in_common_is_refused(
    workers: Workers,
    checkpoints: dict[str, Path],
    name: str,
    ranks: int,
    layout: dict[str, Any],
    field: str,
    remedy: str,
) -> None:
    for found in workers.run(ranks, "model_jobs:refusal", folder=str(checkpoints[name]), layout=layout):
        assert remedy in found[f"megatron.{field}"]


def test_routers_are_frozen_unless_told_otherwise(workers: Workers, checkpoints: dict[str, Path]) -> None:
    folder = str(checkpoints["qwen3_moe"])
    assert workers.run(1, "model_jobs:routers", folder=folder, layout={}) == [[False] * 3]
    assert workers.run(1, "model_jobs:routers", folder=folder, layout={"moe_freeze_router": False}) == [[True] * 3]


def test_a_rank_that_fails_is_named_with_its_traceback_and_the_next_job_runs(
    workers: Workers, checkpoints: dict[str, Path]
) -> None:
    with pytest.raises(RankFailed, match=r"rank \d failed(.|\n)*TypeError.*tensr_model_parallel_size"):
        workers.run(2, "model_jobs:compare", folder=str(checkpoints["llama"]), layout={"tensr_model_parallel_size": 2})
    (answer,) = workers.run(1, "model_jobs:compare", folder=str(checkpoints["llama"]), layout={})
    assert answer["wrong"] == []


def test_threads_do_not_grow_with_the_number_of_layouts(workers: Workers, checkpoints: dict[str, Path]) -> None:
    """A gloo group has three; megatron-core makes 17 groups for every layout, and something refers to them for long."""
    layouts = [{TP: 2, "sequence_parallel": True}, {PP: 2}, {CP: 2}, {}] * 2
    for found in workers.run(2, "model_jobs:relaid", folder=str(checkpoints["llama"]), layouts=layouts):
        assert max(found[4:]) == max(found[:4]) <= 24, found
