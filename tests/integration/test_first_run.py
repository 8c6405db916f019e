"""docs/first-run.md, command by command, on a tiny model and a tiny file: from two files to an answer of the trained policy."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.recipes import ROOT

from nemo_pivotrl import cli
from nemo_pivotrl.config.load import load_recipe
from nemo_pivotrl.report.view_server import create_app

PAGE = (ROOT / "docs/first-run.md").read_text(encoding="utf-8")
COMMANDS = [line.strip().split()[1:] for line in PAGE.splitlines() if line.startswith("    nemo-pivotrl ")]
ELSEWHERE = {"serve": "tests/vllm/test_vllm_serve.py", "view": "tests/view/test_page.py"}
"""Commands that serve until they are stopped, and the tests that run them."""
SMALL = [
    *("profile.limit=24", "profile.num_generations=4", "select.rule=mixed", "logger.tensorboard=false"),
    *(
        "grpo.num_prompts_per_step=4",
        "grpo.num_generations_per_prompt=4",
        "grpo.max_num_steps=2",
        "grpo.val_candidates=4",
    ),
    *("evaluate.one_turn_candidates=6", "evaluate.num_generations=2"),
]


@pytest.fixture
def two_files(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a newcomer: a model and a file of trajectories."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").symlink_to(ROOT / "nemo_pivotrl/demo/models/start-policy")
    (tmp_path / "my-trajectories.jsonl").write_bytes((trained / "world/trajectories.jsonl").read_bytes())
    return tmp_path


def test_from_two_files_to_an_answer(two_files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = [words for words in COMMANDS if words[0] not in ELSEWHERE and words[0] != "run"]
    assert [words[0] for words in ran] == (
        ["init", "preflight", "extract", "audit", "profile", "select", "train", "evaluate", "report"]
    )
    for number, words in enumerate(ran):
        more = SMALL if words[0] != "init" else []
        assert cli.main([*words, *more]) == 0, words
        said = capsys.readouterr().out
        if words[0] in cli.STAGES and words[0] not in ("audit", "evaluate", "report"):
            then = ran[number + 1][0] if words[0] != "extract" else "profile"
            assert f"next: nemo-pivotrl {then} recipe.yaml" in said and "verdict\n" in said
    assert said.endswith("next: nemo-pivotrl view runs/my-trajectories\n")
    assert create_app(Path("runs/my-trajectories"))
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    exec(code.replace("where is my order ?", "i am eva . where is my lamp ?"), {})
    assert "'role': 'assistant'" in capsys.readouterr().out
    card = Path("runs/my-trajectories/pivotrl/policy/README.md").read_text()
    assert "Trained from `my-model` by PivotRL" in card


def test_the_page_names_tests_and_settings_that_are_there() -> None:
    assert {words[0] for words in COMMANDS} >= {*ELSEWHERE, "run"}
    for test in ELSEWHERE.values():
        assert (ROOT / test).exists()
    for words in COMMANDS:
        overrides = [word for word in words if "=" in word and not word.startswith("fresh=")]
        load_recipe(str(ROOT / "recipes/pivotrl/tiny.yaml"), overrides)
