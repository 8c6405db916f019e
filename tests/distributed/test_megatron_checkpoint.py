"""Training that stops and goes on, in the same layout of ranks to the bit and in others to rounding."""

from __future__ import annotations

import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_hf
import torch
import train_jobs
from safetensors.torch import load_file, save_file
from support.workers import Workers

from nemo_pivotrl.core.errors import InputError

TP, PP, EP = (f"{axis}_model_parallel_size" for axis in ("tensor", "pipeline", "expert"))
PLAIN = {"use_distributed_optimizer": False}
EXPERT = re.compile(r"\.experts\.(\d+)\.")
SP = {"sequence_parallel": True}
BF16 = {"bf16": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "w1": (1, PLAIN),
    "tp2": (2, {TP: 2, **SP, **PLAIN}),
    "pp2": (2, {PP: 2, **PLAIN}),
    "cp2": (2, {"context_parallel_size": 2}),
    "dp2": (2, PLAIN),
    "dp2 distributed": (2, {}),
    "ep2": (2, {EP: 2, **PLAIN}),
    "ep2 distributed": (2, {EP: 2}),
    "tp2 x pp2": (4, {TP: 2, PP: 2, **SP}),
    "tp2 x ep2": (4, {TP: 2, EP: 2, **SP}),
    "pp2 x dp2 distributed": (4, {PP: 2}),
    "bf16 w1": (1, BF16 | PLAIN),
    "bf16 dp2": (2, BF16 | PLAIN),
    "bf16 dp2 distributed": (2, BF16),
    "bf16 tp2": (2, {TP: 2, **SP, **BF16}),
}
MOVES = [
    *(("grpo", "qwen3", a, b) for a, b in (("tp2", "pp2"), ("pp2", "tp2"), ("tp2", "w1"), ("w1", "tp2"))),
    # in these two the distributed optimiser's border between ranks runs through a weight, with qwen3 between two
    ("grpo", "llama_tied", "w1", "dp2 distributed"),
    ("grpo", "nemotron_h", "dp2 distributed", "tp2"),
    ("grpo", "qwen3", "dp2 distributed", "w1"),
    ("grpo", "qwen3", "dp2 distributed", "tp2 x pp2"),
    ("grpo", "qwen3", "pp2 x dp2 distributed", "cp2"),
    ("grpo", "llama_tied", "pp2", "tp2"),
    ("grpo", "llama_tied", "w1", "pp2"),
    *(("grpo", "qwen3_padded", a, b) for a, b in (("w1", "tp2"), ("tp2", "w1"))),
    *(("grpo", "qwen3_moe", a, b) for a, b in (("ep2", "w1"), ("w1", "ep2"), ("ep2 distributed", "tp2"))),
    *(("grpo", "qwen3_moe", a, b) for a, b in (("tp2", "ep2 distributed"), ("tp2 x ep2", "pp2"))),
    *(("grpo", "nemotron_h", a, b) for a, b in (("tp2", "pp2"), ("pp2", "tp2"), ("ep2", "w1"), ("w1", "tp2 x ep2"))),
    *(("tfpo", "qwen3", a, b) for a, b in (("tp2", "pp2"), ("pp2", "dp2 distributed"), ("dp2 distributed", "w1"))),
    ("tfpo", "qwen3_moe", "ep2 distributed", "w1"),
    ("tfpo", "nemotron_h", "tp2", "pp2"),
    ("grpo", "qwen3", "bf16 dp2 distributed", "bf16 w1"),
    ("grpo", "qwen3", "bf16 w1", "bf16 tp2"),
    ("tfpo", "qwen3", "bf16 dp2 distributed", "bf16 dp2"),
]
STAYS = [
    *(("grpo", "qwen3", layout) for layout in ("w1", "tp2", "pp2", "dp2 distributed", "bf16 dp2", "tp2 x pp2")),
    ("grpo", "llama_tied", "bf16 dp2 distributed"),
    ("tfpo", "qwen3", "bf16 dp2 distributed"),
    *(("tfpo", "qwen3", layout) for layout in ("tp2", "pp2")),
    ("grpo", "qwen3_moe", "ep2 distributed"),
    ("grpo", "nemotron_h", "tp2"),
]

ROUNDED = ("bf16 tp2",)
"""Where another layout adds bfloat16 numbers in another order; data parallelism does not."""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder of a start policy, made when first asked for."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("hf") / name
            tiny_hf.make(name, made[name])
        return made[name]

    return get


@pytest.fixture(scope="session")
def begun(workers: Workers, model: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(checkpoint, how it went on) of a run, made when first asked for."""
    made: dict[tuple[str, str, str], tuple[Path, list[dict[str, Any]]]] = {}

    def get(kind: str, name: str, layout: str) -> tuple[Path, list[dict[str, Any]]]:
        if (kind, name, layout) not in made:
            target = tmp_path_factory.mktemp("run") / "state"
            ranks, settings = LAYOUTS[layout]
            arguments = {"folder": str(model(name)), "kind": kind, "layout": settings, "target": str(target)}
            made[kind, name, layout] = target, workers.run(ranks, "checkpoint_jobs:begin", **arguments)
        return made[kind, name, layout]

    return get


@pytest.mark.parametrize(("kind", "name", "layout"), STAYS)
def test_the_same_layout_goes_on_to_the_bit(
    workers: Workers, model: Any, begun: Any, kind: str, name: str, layout: str
) -> None:
    source, straight = begun(kind, name, layout)
    ranks, settings = LAYOUTS[layout]
    arguments = {"folder": str(model(name)), "kind": kind, "layout": settings, "source": str(source)}
    for answer, want in zip(workers.run(ranks, "checkpoint_jobs:resume", **arguments), straight, strict=True):
        assert answer["steps"] == want["steps"] and answer["random"] == want["random"]
        assert torch.equal(answer["log_probs"], want["log_probs"])
        assert (answer["head"] is None) == (want["head"] is None)
        assert answer["head"] is None or torch.equal(answer["head"], want["head"])


@pytest.mark.parametrize(("kind", "name", "source", "target"), MOVES)
def test_another_layout_goes_on_with_the_same_loss(
    workers: Workers, model: Any, begun: Any, kind: str, name: str, source: str, target: str
) -> None:
    state, straight = begun(kind, name, source)
    ranks, settings = LAYOUTS[target]
    arguments = {"folder": str(model(name)), "kind": kind, "layout": settings, "source": str(state)}
    answers = workers.run(ranks, "checkpoint_jobs:resume", **arguments)
    off = {key: max(difference(a, straight[0], key) for a in answers) for key in ("loss", "grad_norm", "lr")}
    off["log_probs"] = max(float((a["log_probs"] - straight[0]["log_probs"]).abs().max()) for a in answers)
    print(f"\n{kind:6}{name:13}{source:24}{target:24}" + "  ".join(f"{k} {v:.1e}" for k, v in off.items()))
    assert off["lr"] == 0.0 and max(off.values()) < (0.1 if target in ROUNDED else 2e-5)


def difference(answer: dict[str, Any], want: dict[str, Any], key: str) -> float:
    """The largest relative difference over the steps."""
    pairs = zip(answer["steps"], want["steps"], strict=True)
    return max(abs(a[key] / b[key] - 1) for a, b in pairs)


def test_a_checkpoint_before_the_first_step(workers: Workers, model: Any, tmp_path: Path) -> None:
    """Adam has no moments yet, and none are invented."""
    common = {"folder": str(model("qwen3")), "kind": "grpo"}
    target = str(tmp_path / "state")
    straight = workers.run(2, "checkpoint_jobs:begin", layout={}, target=target, steps=0, **common)[0]
    (answer,) = workers.run(1, "checkpoint_jobs:resume", layout=PLAIN, source=target, **common)
    assert difference(answer, straight, "loss") < 2e-5 and difference(answer, straight, "lr") == 0.0


def cut_shard(folder: Path) -> None:
    path = sorted(folder.glob("*.distcp"))[-1]
    path.write_bytes(path.read_bytes()[:-100])


def drop_shard(folder: Path) -> None:
    sorted(folder.glob("*.distcp"))[0].unlink()


def cut_index(folder: Path) -> None:
    path = folder / ".metadata"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def drop_index(folder: Path) -> None:
    (folder / ".metadata").unlink()


def garble_shard(folder: Path) -> None:
    for path in folder.glob("*.distcp"):
        path.write_bytes(b"\0" * path.stat().st_size)


def flip_a_bit(folder: Path) -> None:
    path = sorted(folder.glob("*.distcp"))[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_common(folder: Path) -> None:
    (folder / "common.pt").write_bytes((folder / "common.pt").read_bytes()[:50])


class Hostile:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def plant_in_index(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Hostile(folder / "was here")))


def plant_in_common(folder: Path) -> None:
    torch.save({"common": Hostile(folder / "was here")}, folder / "common.pt")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_shard, "bytes\n    -> it was cut off or damaged"),
        (drop_shard, "__0_0.distcp: checkpoint: found nothing"),
        (garble_shard, "other bytes than were written"),
        (flip_a_bit, "__0_0.distcp: checkpoint: found other bytes than were written"),
        (cut_index, ".metadata: checkpoint: found"),
        (drop_index, "found no metadata.json and .metadata, which are written last"),
        (cut_common, "common.pt: checkpoint: found"),
        (plant_in_index, "posix.mkdir\n    -> no index refers to this"),
        (plant_in_common, "Weights only load failed"),
    ],
)
def test_a_damaged_or_hostile_checkpoint_is_refused_on_every_rank(
    workers: Workers, model: Any, begun: Any, tmp_path: Path, damage: Any, message: str
) -> None:
    source = shutil.copytree(begun("grpo", "qwen3", "tp2")[0], tmp_path / "state")
    damage(source)
    arguments = {"folder": str(model("qwen3")), "kind": "grpo", "layout": {PP: 2}, "source": str(source)}
    answers = workers.run(2, "checkpoint_jobs:refusal", **arguments)
    for answer in answers:
        assert message in answer["reason"] and str(source) in answer["reason"]
        assert answer["reason"] == answers[0]["reason"] and answer["same"]
    assert not (source / "was here").exists()


@pytest.mark.parametrize(
    ("name", "kind", "layout", "message"),
    [
        ("qwen3_padded", "grpo", {TP: 2}, "vocab_size: found 131\n    -> policy.model_name has 300"),
        ("qwen3", "tfpo", {PP: 2}, "head.weight: found nothing"),
        ("qwen3", "grpo", {"bf16": True}, "megatron.bf16: found false"),
    ],
)
def test_another_models_checkpoint_is_refused(
    workers: Workers, model: Any, begun: Any, name: str, kind: str, layout: dict[str, Any], message: str
) -> None:
    source, _ = begun("grpo", "qwen3", "tp2")
    arguments = {"folder": str(model(name)), "kind": kind, "layout": layout, "source": str(source)}
    for answer in workers.run(2, "checkpoint_jobs:refusal", **arguments):
        assert message in answer["reason"] and answer["same"]


def test_a_doctors_checkpoint_is_no_policys(workers: Workers, model: Any, begun: Any) -> None:
    source, _ = begun("tfpo", "qwen3", "tp2")
    arguments = {"folder": str(model("qwen3")), "kind": "grpo", "layout": {PP: 2}, "source": str(source)}
    for answer in workers.run(2, "checkpoint_jobs:refusal", **arguments):
        assert "head.weight: found a tensor (1, 32)" in answer["reason"] and answer["same"]


@pytest.mark.parametrize(("rank", "file"), [(1, "__1_0.distcp"), (0, "common.pt"), (0, "metadata.json")])
def test_a_rank_that_cannot_write_is_named_by_all(
    workers: Workers, model: Any, tmp_path: Path, rank: int, file: str
) -> None:
    arguments = {"folder": str(model("qwen3")), "layout": {TP: 2}, "target": str(tmp_path / "state")}
    answers = workers.run(2, "checkpoint_jobs:unwritable", rank=rank, file=file, **arguments)
    assert all(f"could not be written, by rank: {{{rank}: " in answer for answer in answers), answers


@pytest.mark.parametrize(("name", "source", "target"), [("qwen3_moe", "ep2", "w1"), ("nemotron_h", "tp2", "pp2")])
def test_an_export_after_resharding_is_the_policy_in_transformers(
    workers: Workers, model: Any, begun: Any, tmp_path: Path, name: str, source: str, target: str
) -> None:
    from nemo_pivotrl.backends.reference.policy import ReferencePolicy

    ranks, layout = LAYOUTS[target]
    arguments = {"folder": str(model(name)), "kind": "grpo", "layout": layout, "export": str(tmp_path / "policy")}
    state, _ = begun("grpo", name, source)
    answers = workers.run(ranks, "checkpoint_jobs:resume", source=str(state), **arguments)
    exported = ReferencePolicy(train_jobs.policy_of(str(tmp_path / "policy"), 10**6))
    found = exported.get_inference_log_probs(train_jobs.grpo_batch())
    torch.testing.assert_close(found, answers[0]["log_probs"], rtol=0, atol=2e-4)
    experts = [
        {int(m[1]) for k in keys if (m := EXPERT.search(k))}
        for keys in (tensors(tmp_path / "policy"), tensors(model(name)))
    ]
    assert experts[0] == experts[1] == {0, 1, 2, 3}


def tensors(folder: Path) -> list[str]:
    return list(load_file(folder / "model.safetensors"))


def test_an_export_that_lacks_a_tensor_or_has_it_in_another_shape_is_refused(model: Any, tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    from nemo_pivotrl.backends.megatron.weights import check_export
    from nemo_pivotrl.sizing.architecture import read_architecture

    source = model("qwen3_moe")
    architecture = read_architecture(source)
    check_export(source, source, architecture)
    whole = load_file(source / "model.safetensors")
    lacks = {k: t for k, t in whole.items() if not (m := EXPERT.search(k)) or int(m[1]) < 3}
    name = "model.layers.1.mlp.down_proj.weight"
    for part, message in ((lacks, "experts: found 3 of them"), (whole | {name: whole[name].T.contiguous()}, name)):
        save_file(part, tmp_path / "model.safetensors")
        with pytest.raises(InputError, match=message):
            check_export(tmp_path, source, architecture)
