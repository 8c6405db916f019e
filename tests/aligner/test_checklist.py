"""What NeMo-Aligner asks of a new algorithm in its pull-request template, and where it is tested here."""

import ast
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PACKAGE = HERE.parents[1] / "nemo_pivotrl/integrations/nemo_aligner"
CHECKLIST = {
    "the trainer resumes and restores all state": ["test_a_killed_run_resumes_with_the_same_losses"],
    "the trainer supports TP, PP and DP": [
        "test_log_probs_loss_and_gradient_are_the_reference_backends",
        "test_tensor_and_pipeline_parallel_ranks_sample_and_train_as_one_rank_does",
        "test_data_parallel_ranks_share_the_pivots_and_agree_on_what_they_log",
        "test_two_ranks_that_share_a_model_train_as_one",
        "test_data_parallel_ranks_train_on_different_pairs_and_agree",
    ],
    "max_steps=-1 and validation": ["test_pivotrl_from_nemo_through_an_epoch_to_nemo_and_on_from_it"],
    "only APIs of alignable_interface.py": ["test_trainers_ask_models_only_for_what_the_interface_has"],
    "proper logging": ["test_metrics_have_the_prefixes_of_nemo_aligner"],
}
INTERFACE = {
    *("get_loss_and_metrics", "prepare_for_training_step", "finish_training_step"),
    *("prepare_for_validation_step", "finish_validation_step", "prepare_for_training", "finish_training"),
    *("prepare_for_inference", "finish_inference", "infer", "get_init_policy_logprobs"),
}
BESIDE_IT = {"get_inference_log_probs", "get_ref_policy_logprobs", "tokenizer", "cfg", "anchored"}
"""What NeMo-Aligner's own trainers take for granted beyond the abstract classes, and whether our loss reads a reference."""
PREFIXES = ("train/", "val/", "train_rollouts/", "train_optim/", "val_rollouts/", "timers/")


@pytest.mark.parametrize("item", CHECKLIST)
def test_every_item_has_its_tests(item: str) -> None:
    written = "\n".join(path.read_text() for path in HERE.glob("test_*.py"))
    for name in CHECKLIST[item]:
        assert re.search(rf"^def {name}\(", written, re.MULTILINE), name


@pytest.mark.parametrize("name", ["trainer.py", "doctor_trainer.py"])
def test_trainers_ask_models_only_for_what_the_interface_has(name: str) -> None:
    asked = {
        node.attr
        for node in ast.walk(ast.parse((PACKAGE / name).read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self.model"
    }
    assert asked and asked <= INTERFACE | BESIDE_IT, asked - INTERFACE - BESIDE_IT


def test_metrics_have_the_prefixes_of_nemo_aligner(run) -> None:  # type: ignore[no-untyped-def]
    settings = {
        "trainer.pivotrl.max_steps": 1,
        "trainer.pivotrl.val_check_interval": 1,
        "trainer.pivotrl.save_interval": 1,
    }
    (found,) = run("train", **settings)
    names = {name for row in found["rows"] for name in row if name not in ("step", "epoch")}
    assert all(name.startswith(PREFIXES) for name in names), sorted(names)
    assert {name.partition("/")[0] for name in names} >= {"train_rollouts", "train_optim", "val_rollouts", "timers"}
