"""Adapters as doctors: what is not whole, plain or made for the base is refused by name; merged they are peft's model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_pivotrl.backends.adapters import doctor_files, is_adapter, merge, read_adapter
from nemo_pivotrl.backends.reference.guided import GuidedSamplingParams, load_guided
from nemo_pivotrl.config import Doctor
from nemo_pivotrl.core.errors import InputError
from tests.support.guided_models import TOKENIZER, model

LAYERS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A patient, a base, the same base with other weights, and an adapter of the base."""
    root = tmp_path_factory.mktemp("adapters")
    for name, seed in (("patient", 1), ("base", 2), ("other", 3)):
        model(seed).save_pretrained(root / name)
        TOKENIZER.save_pretrained(root / name)
    trained(root).save_pretrained(root / "adapter")
    return root


def trained(root: Path, **more: Any) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(root / "base")
    settings = {"r": 3, "lora_alpha": 7, "target_modules": LAYERS, "task_type": "CAUSAL_LM", **more}
    made = get_peft_model(base, LoraConfig(**settings))
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3)
    return made.eval()


@pytest.mark.parametrize("more", [{}, {"use_rslora": True}])
def test_merged_it_is_pefts_model(world: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    truth = trained(world, **more)
    truth.save_pretrained(tmp_path / "adapter")
    ours = model(2)
    merge(ours, read_adapter(str(tmp_path / "adapter"), ours))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert float((ours(input_ids=ids).logits - truth(input_ids=ids).logits).abs().max()) <= 2e-5
        assert float((ours(input_ids=ids).logits - model(2)(input_ids=ids).logits).abs().max()) > 0.1


def test_a_doctor_may_be_an_adapter_and_its_base_is_its_reference(world: Path, tmp_path: Path) -> None:
    """Against a whole folder of the same weights."""
    whole = trained(world).merge_and_unload()
    whole.save_pretrained(tmp_path / "whole")
    TOKENIZER.save_pretrained(tmp_path / "whole")
    request = GuidedSamplingParams(beta={"kind": 1.0}, temperature=0, max_new_tokens=8)
    for mode in ("product", "ratio"):
        answers = []
        for doctor in (
            Doctor(path=str(world / "adapter")),
            Doctor(path=str(tmp_path / "whole"), reference=str(world / "base")),
        ):
            made = load_guided(str(world / "patient"), {"kind": doctor}, mode, device="cpu")
            answers.append(made.generate([[5, 6, 7], [9]], request))
        for one, other in zip(*answers, strict=True):
            assert one.token_ids == other.token_ids
            assert one.log_probs == pytest.approx(other.log_probs, abs=1e-5)


def test_a_revision_knows_the_adapter_its_scale_and_its_base(world: Path, tmp_path: Path) -> None:
    def revision(folder: Path, base: str = "") -> str:
        return doctor_files(Doctor(path=str(folder), base=base), "product", "d").revision

    shutil.copytree(world / "adapter", tmp_path / "copy")
    shutil.copytree(world / "base", tmp_path / "moved")
    first = revision(world / "adapter")
    assert revision(tmp_path / "copy") == first == revision(tmp_path / "copy", str(tmp_path / "moved"))
    changed(tmp_path / "copy", lora_alpha=8)
    assert revision(tmp_path / "copy") != first
    changed(tmp_path / "copy", lora_alpha=7, base_model_name_or_path=str(world / "other"))
    assert revision(tmp_path / "copy") != first


def changed(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def rewritten(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda f: changed(f, r=1024), r"adapter_config.json[\s\S]*1024[\s\S]*up to 512"),
        (lambda f: changed(f, r=4), r"q_proj.lora_A.weight[\s\S]*rank 4 make it"),
        (lambda f: changed(f, use_dora=True), "use_dora"),
        (lambda f: changed(f, modules_to_save=["lm_head"]), "modules_to_save"),
        (lambda f: changed(f, lora_alpha="a"), "lora_alpha"),
        (lambda f: rewritten(f, lambda t: t.pop(A)), r"q_proj.lora_A.weight[\s\S]*nothing"),
        (
            lambda f: rewritten(f, lambda t: [t.pop(A), t.pop(A.replace("_A", "_B"))]),
            r"q_proj.lora_A.weight[\s\S]*nothing",
        ),
        (lambda f: rewritten(f, lambda t: t[A].__setitem__((0, 0), torch.nan)), r"q_proj.lora_A.weight[\s\S]*NaN"),
        (
            lambda f: rewritten(f, lambda t: t.update({"base_model.model.x.lora_A.weight": t[A].clone()})),
            "no such layer",
        ),
        (
            lambda f: rewritten(f, lambda t: t.update({"base_model.model.lm_head.weight": t[A].clone()})),
            "plain LoRA has none",
        ),
        (lambda f: (f / "adapter_model.safetensors").unlink(), r"adapter_model.safetensors[\s\S]*nothing"),
        (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "pickles run code"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"12345678"), "adapter_model.safetensors"),
    ],
)
def test_what_is_wrong_with_an_adapter_is_said_by_name(world: Path, tmp_path: Path, break_it: Any, said: str) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(world / "adapter", folder)
    break_it(folder)
    with pytest.raises(InputError, match=said):
        read_adapter(str(folder), model(2))


def test_another_base_is_refused(world: Path, tmp_path: Path) -> None:
    adapter = str(world / "adapter")
    assert is_adapter(adapter) and not is_adapter(world / "base") and not is_adapter("")
    assert doctor_files(Doctor(path=adapter), "ratio", "d").reference == str(world / "base")
    with pytest.raises(InputError, match=r"d\.base[\s\S]*other weights"):
        doctor_files(Doctor(path=adapter, base=str(world / "other")), "product", "d")
    with pytest.raises(InputError, match=r"d\.base[\s\S]*a whole model"):
        doctor_files(Doctor(path=str(world / "base"), base=str(world / "base")), "product", "d")
    shutil.copytree(adapter, tmp_path / "lost")
    changed(tmp_path / "lost", base_model_name_or_path="someone/their-model")
    with pytest.raises(InputError, match=r"someone/their-model[\s\S]*d\.base"):
        doctor_files(Doctor(path=str(tmp_path / "lost")), "product", "d")
    with pytest.raises(InputError, match=r"shape \(3, 16\), and the base"):
        read_adapter(adapter, _wider())


def _wider() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = model(2).config.to_dict() | {"hidden_size": 32, "intermediate_size": 24, "head_dim": 4}
    return LlamaForCausalLM(LlamaConfig(**config))
