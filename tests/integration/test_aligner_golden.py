"""The reference backend's numbers that NeMo-Aligner's environment is compared with (`tests/aligner/golden.json`)."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.recipes import ROOT

from nemo_pivotrl.algorithms.model_outputs import ModelOutputs
from nemo_pivotrl.algorithms.pivotrl import grpo_loss
from nemo_pivotrl.backends.base import TokenBatch
from nemo_pivotrl.backends.reference.policy import ReferencePolicy
from nemo_pivotrl.config import LossFn, Optimizer, Patient, Policy, Recipe, Tfpo
from nemo_pivotrl.core.artifacts import read_rows
from nemo_pivotrl.llmdoctor.reward import build_rewards
from nemo_pivotrl.llmdoctor.train_doctor import measure as measure_pairs

KEPT = ("ids", "importance", "rewards")
FOLDER = ROOT / "tests/aligner"


def tiny_policy() -> Any:
    spec = importlib.util.spec_from_file_location("tiny_policy", FOLDER / "tiny_policy.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measure(folder: Path) -> dict[str, Any]:
    """Log-probabilities, losses with and without a KL term, and gradient norms, of the reference backend."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny = tiny_policy()
    model = LlamaForCausalLM(LlamaConfig(**tiny.SHAPE))
    model.load_state_dict(tiny.weights(), strict=True)
    model.save_pretrained(folder)
    policy = ReferencePolicy(Policy(model_name=str(folder), device="cpu", dtype="float64"))
    policy.prepare_for_training(Optimizer(lr=0.0, max_grad_norm=0.0))
    batch = TokenBatch(tiny.PROMPTS, tiny.PROMPT_OF, tiny.RESPONSES, {})
    log_probs = policy.get_inference_log_probs(batch)
    mask = torch.tensor([[float(t < len(r)) for t in range(log_probs.shape[1])] for r in tiny.RESPONSES])
    found: dict[str, Any] = {
        "log_probs": [row[: len(r)].tolist() for row, r in zip(log_probs, tiny.RESPONSES, strict=True)]
    }
    for name, beta in (("clip", 0.0), ("kl", tiny.KL_BETA)):
        settings = LossFn(**tiny.SETTINGS, reference_policy_kl_penalty=beta)
        batch.data.update(
            old=log_probs + torch.tensor(tiny.OLD_SHIFT)[:, None],
            ref=log_probs + tiny.REF_SHIFT,
            advantages=torch.tensor(tiny.ADVANTAGES),
            mask=mask,
        )

        def loss_fn(outputs: ModelOutputs, data: dict[str, torch.Tensor], settings: LossFn = settings) -> Any:
            given = data["old"], data["advantages"], data["mask"]
            return grpo_loss(outputs.log_probs, *given, float(mask.sum()), settings, data["ref"])

        policy.prepare_for_training_step()
        metrics = policy.get_loss_and_metrics(batch, loss_fn)
        found[name] = {**metrics, **policy.finish_training_step()}
    found["token_rewards"] = measure_rewards(folder)
    for anchor in ("none", "reference"):
        found[f"tfpo_{anchor}"] = measure_tfpo(tiny, folder, anchor)
    for name in ("clip", "kl", "tfpo_none", "tfpo_reference"):
        del found[name]["token_ratio"]  # how this backend lays rows out, not what it computes
    return found


def measure_tfpo(tiny: Any, folder: Path, anchor: Any) -> dict[str, float]:
    """Metrics and gradient norm of TFPO on the pairs, with the head away from zero."""
    doctor = ReferencePolicy(Policy(model_name=str(folder), device="cpu", dtype="float64"), True, anchor == "reference")
    weight, bias = tiny.head()
    with torch.no_grad():
        doctor.head.weight.copy_(weight)
        doctor.head.bias.copy_(bias)
    doctor.prepare_for_training(Optimizer(lr=0.0, max_grad_norm=0.0))
    doctor.prepare_for_training_step()
    metrics = measure_pairs(doctor, tiny.PAIRS, Tfpo(**tiny.TFPO, anchor=anchor))
    return {**metrics, **doctor.finish_training_step()}


def measure_rewards(patient: Path) -> list[dict[str, Any]]:
    """Stage 1's importance and rewards of the tiny preferences, the policy being the patient."""
    sys.path.insert(0, str(FOLDER))
    try:
        import tiny_aligner
    finally:
        sys.path.remove(str(FOLDER))
    tiny_aligner.write_inputs(patient)
    for path in (patient / "tokenizer").iterdir():
        shutil.copy(path, patient)
    path = build_rewards(
        Recipe(run_dir=str(patient), patient=Patient(model_name=str(patient), device="cpu")), fresh=True
    )
    return [{side: {k: row[side][k] for k in KEPT} for side in ("chosen", "rejected")} for row in read_rows(path)]


def test_the_golden_file_is_what_the_reference_backend_computes(tmp_path: Path) -> None:
    golden, found = json.loads((FOLDER / "golden.json").read_text()), measure(tmp_path)
    assert golden["log_probs"] == [pytest.approx(row, abs=2e-6) for row in found["log_probs"]]
    assert len(golden["token_rewards"]) == len(found["token_rewards"]) > 3
    for pair, expected in zip(golden["token_rewards"], found["token_rewards"], strict=True):
        for side in ("chosen", "rejected"):
            assert pair[side]["ids"] == expected[side]["ids"]
            assert pair[side]["importance"] == pytest.approx(expected[side]["importance"], abs=1e-5)
            assert pair[side]["rewards"] == pytest.approx(expected[side]["rewards"], abs=1e-4)
    for name in ("clip", "kl", "tfpo_none", "tfpo_reference"):
        assert golden[name] == pytest.approx(found[name], rel=1e-5, abs=1e-7)


if __name__ == "__main__":  # writes the file anew
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        text = json.dumps(measure(Path(folder)), indent=1)
    (FOLDER / "golden.json").write_text(text + "\n")
