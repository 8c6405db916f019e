"""`checkpointing.publish: best`: the policy is the checkpoint that does most of a simulator's validation tasks."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from support.recipes import ROOT, recipe_at

from nemo_pivotrl.components import simulation
from nemo_pivotrl.components.metrics import read_metrics
from nemo_pivotrl.config import Lora, Recipe
from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.core.types import Action, Message
from nemo_pivotrl.pivotrl.sft import sft
from nemo_pivotrl.pivotrl.train import train


@dataclass(frozen=True)
class Question:
    task_id: str
    family: str = "question"


class OneTurn:
    """An episode that ends at once, well in the share of them that `Rigged` wants next."""

    tools: Sequence[dict[str, Any]] = ()

    def __init__(self, succeeds: bool):
        self.messages: list[Message] = [{"role": "user", "content": "hi"}]
        self.done, self.turns, self.succeeds = False, 0, succeeds

    @property
    def success(self) -> bool:
        return self.succeeds

    def step(self, action: Action) -> None:
        self.done, self.turns = True, 1


class Rigged:
    """Four tasks; how many of them end well was settled beforehand, play by play."""

    max_turns = 1
    wanted: ClassVar[list[int]] = []

    def tasks(self) -> list[Question]:
        self.now = Rigged.wanted.pop(0)
        return [Question(str(i)) for i in range(4)]

    def start(self, task: Question) -> OneTurn:
        return OneTurn(int(task.task_id) < self.now)


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture
def rigged(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    shutil.copytree(trained, tmp_path / "run")
    monkeypatch.setattr(simulation, "load_plugin", lambda path, field: lambda recipe: Rigged())
    chosen = ["checkpointing.simulator=world", "checkpointing.metric_name=val/tasks", "checkpointing.publish=best"]
    own = ["checkpointing.keep_top_k=1", "checkpointing.save_period=100", "checkpointing.simulator_period=1"]
    return recipe_at(tmp_path / "run", *chosen, *own, "grpo.val_period=0", "sft.source=candidates", "sft.num_steps=4")


@pytest.mark.parametrize("stage", [sft, train])
def test_the_best_checkpoint_is_published_and_the_first_of_equals(stage: Any, rigged: Recipe) -> None:
    Rigged.wanted = [0, 1, 3, 3, 2]  # before the first step, then after each of four
    folder = stage(rigged).parent
    assert [row["val/tasks"] for row in read_metrics(folder / "metrics.jsonl")] == [0.0, 0.25, 0.75, 0.75, 0.5]
    assert sorted(p.name for p in folder.glob("step_*")) == ["step_00002", "step_00004"]  # the best and the latest
    assert weights(folder / "policy") == weights(folder / "step_00002/policy") != weights(folder / "step_00004/policy")
    assert stage(rigged) == folder / "policy" and not Rigged.wanted  # complete: nothing is played again


def test_fine_tuning_that_is_chosen_by_held_out_turns_measures_them(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    recipe = recipe_at(tmp_path / "run", "checkpointing.publish=best", "sft.source=candidates", "sft.num_steps=4")
    folder = sft(recipe).parent
    rows = list(read_metrics(folder / "metrics.jsonl"))
    measured = {row["step"]: row["val/accuracy"] for row in rows if "val/accuracy" in row}
    assert list(measured) == [0, 2, 4] and abs(rows[0]["val/kl"]) < 1e-6 < rows[-1]["val/kl"]
    best = max((2, 4), key=lambda step: measured[step])
    assert weights(folder / "policy") == weights(folder / f"step_{best:05d}/policy")


def test_adapters_are_published_beside_the_merged_policy_and_checked_with_it(rigged: Recipe) -> None:
    adapted = replace(rigged.policy, lora=Lora(enabled=True, r=2))
    Rigged.wanted = [0, 1, 3, 3, 2]
    policy = train(replace(rigged, policy=adapted))
    assert {p.name for p in (policy / "adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    (policy / "adapter/adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"adapter/adapter_config\.json"):
        train(replace(rigged, policy=adapted))


def test_a_run_without_the_metric_says_so(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    recipe = recipe_at(tmp_path / "run", "checkpointing.metric_name=val/tasks", "checkpointing.publish=best")
    with pytest.raises(InputError, match=r"checkpointing\.simulator"):
        sft(recipe)


def test_the_worlds_validation_tasks_are_no_train_or_test_tasks() -> None:
    from nemo_pivotrl.config.load import load_recipe
    from nemo_pivotrl.demo.simulators import service_desk, validation

    for name in ("tiny", "quickstart"):
        recipe = load_recipe(str(ROOT / f"recipes/pivotrl/{name}.yaml"), [])
        kept = {json.dumps([t.opening, t.database]) for t in validation(recipe).tasks()}
        assert len(kept) == recipe.world.validation_tasks
        for split in ("train", "test"):
            assert not kept & {json.dumps([t.opening, t.database]) for t in service_desk(recipe, split).tasks()}
