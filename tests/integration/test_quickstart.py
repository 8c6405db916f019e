"""`make quickstart` on fewer tasks: the shipped models go through all stages, and the last sentence says what came of it."""

import json
import re
from pathlib import Path

import pytest
from support.recipes import ROOT

from nemo_pivotrl.config.load import load_recipe
from nemo_pivotrl.pipeline import run

FEWER = """
num_threads=1 logger.tensorboard=false audit.before_profile=false world.train_tasks=12 world.validation_tasks=4 world.test_tasks=6
world.puzzle_test_tasks=12 world.warmup_tasks=10 world.puzzle_warmup_tasks=80
profile.num_generations=4 sft.num_steps=2 grpo.max_num_steps=2 grpo.num_prompts_per_step=2
grpo.num_generations_per_prompt=4 evaluate.one_turn_candidates=4 evaluate.num_generations=1 evaluate.trials=1
extract.validation_share=0.2
""".split()


def quick(name: str, folder: Path, *more: str) -> Path:
    return run(load_recipe(str(ROOT / f"recipes/pivotrl/{name}.yaml"), [f"run_dir={folder}", *FEWER, *more]))


def test_the_shipped_start_policy_goes_through_all_stages_and_a_sentence_says_what_came_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [f"evaluate.policies.all={tmp_path}/all/policy", "evaluate.greedy=true", "profile.curtail=none"]
    assert quick("quickstart", tmp_path, *more).exists()
    printed = capsys.readouterr().out
    said = next(line for line in printed.splitlines() if line.startswith("Against base: "))
    gained = re.findall(r"(\w+) [+-][\d.]+ \[[^]]+\](?: \(not shown\))? points of whole tasks", said)
    assert gained == ["sft", "pivotrl", "all"]
    assert said.count("points out of domain") == 3 and printed.count("is published: val/tasks") == 3
    found = json.loads((tmp_path / "evaluation.json").read_text())["policies"]
    assert {"one_turn", "multi_turn", "greedy", "retention"} == set(found["base"])
    assert found["base"]["retention"]["mean"] > 0.3  # it is the trained one: an untrained one knows no puzzle


def test_the_request_desk_goes_through_all_stages_and_tells_families_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    smaller = "world.hidden_size=16 world.layers=1 warmup.num_steps=3"
    smaller += " warmup.copy_steps=1 select.rule=all policy.generation.max_new_tokens=8"
    quick("requests", tmp_path, *smaller.split())
    families = json.loads((tmp_path / "evaluation.json").read_text())["policies"]["base"]["multi_turn"]["families"]
    assert {name: entry["items"] for name, entry in families.items()} == {"other families": 3, "seen families": 3}
    assert "other families" in capsys.readouterr().out
