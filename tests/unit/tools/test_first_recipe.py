"""init: the recipe that it writes loads, says what was found, and leaves open what the data does not say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.recipes import ROOT

from nemo_pivotrl import cli
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.config.load import load_recipe

MODEL = str(ROOT / "nemo_pivotrl/demo/models/start-policy")
PARAMETERS = {"type": "object", "properties": {"user": {"type": "string"}}, "required": ["user"]}
FUNCTION = {"name": "find_orders", "description": "Orders of a customer.", "parameters": PARAMETERS}
TOOL = {"type": "function", "function": FUNCTION}


def called(name: str = "find_orders") -> list[dict[str, Any]]:
    """An episode in words that the shipped model's small vocabulary has."""
    call = {"id": "a", "type": "function", "function": {"name": name, "arguments": json.dumps({"user": "eva"})}}
    return [
        {"role": "system", "content": "Shop desk. Ask before changes. Shipped orders go to a human."},
        {"role": "user", "content": "i am eva . where is my lamp ?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "shipped"},
    ]


def written(folder: Path, records: list[dict[str, Any]], name: str = "mine.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(folder / name)


def init(folder: Path, file: str, capsys: pytest.CaptureFixture[str]) -> tuple[Recipe, str, str]:
    """(the recipe, its text, what was printed)."""
    target = folder / "recipe.yaml"
    assert cli.main(["init", MODEL, file, str(target)]) == 0
    return load_recipe(str(target)), target.read_text(), capsys.readouterr().out


def test_tool_calls_get_the_functional_verifier_and_lengths_that_fit(tmp_path: Path, capsys: Any) -> None:
    talk = {"role": "assistant", "content": "shipped it is !"}
    file = written(tmp_path, [{"messages": [*called(), talk], "tools": [TOOL]} for _ in range(3)])
    recipe, text, said = init(tmp_path, file, capsys)
    assert recipe.verifier.name == "functional" and recipe.extract.trajectories == (file,)
    assert recipe.policy.model_name == recipe.evaluate.policies["base"] == MODEL
    assert recipe.policy.generation.max_new_tokens == 64 and 64 < recipe.policy.max_total_sequence_length <= 1024
    assert recipe.run_dir == "runs/mine" and recipe.path("pivotrl/policy") == Path(recipe.evaluate.policies["pivotrl"])
    assert "format openai, 3 trajectories, 6 assistant turns, 3 of them talk; tools: find_orders" in text.replace(
        "\n  # ", " "
    )
    assert "the expert talks in 3 of 6 turns" in text and "WARN" not in said
    assert said.endswith(f"next: nemo-pivotrl extract {tmp_path / 'recipe.yaml'}\n")
    assert all(len(line) < 134 for line in text.splitlines() if str(tmp_path) not in line and MODEL not in line)


def test_what_the_data_does_not_say_is_left_open(tmp_path: Path, capsys: Any) -> None:
    recipe, text, said = init(tmp_path, written(tmp_path, [{"messages": called("fly")}]), capsys)
    assert recipe.extract.tools is None and "# tools: tools.json" in text
    assert "WARN  no record defines fly" in said


def test_states_that_the_template_cannot_render_are_told(tmp_path: Path, capsys: Any) -> None:
    bare = called()[1:]  # the shipped template writes tools behind a system message alone
    recipe, _, said = init(tmp_path, written(tmp_path, [{"messages": bare, "tools": [TOOL]}]), capsys)
    assert "WARN  none of 1 states looked at can be rendered: tools: tools, left out of the prompt" in said
    assert recipe.policy.max_total_sequence_length == 1024  # the model's


def model_that(folder: Path, template: str) -> str:
    """The shipped model with another chat template."""
    shutil.copytree(MODEL, folder / "model")
    (folder / "model/chat_template.jinja").write_text(template)
    return str(folder / "model")


def test_a_template_that_refuses_the_role_developer_is_told_with_what_mends_it(tmp_path: Path, capsys: Any) -> None:
    template = (ROOT / "nemo_pivotrl/demo/models/start-policy/chat_template.jinja").read_text()
    refuse = "{% for m in messages %}{% if m.role == 'developer' %}{{ raise_exception('unknown role developer') }}"
    model = model_that(tmp_path, f"{refuse}{{% endif %}}{{% endfor %}}{template}")
    said = [{**called()[0], "role": "developer"}, *called()[1:], {"role": "assistant", "content": "shipped it is !"}]
    file, target = written(tmp_path, [{"messages": said, "tools": [TOOL]}]), tmp_path / "recipe.yaml"
    assert cli.main(["init", model, file, str(target)]) == 0
    out, text = capsys.readouterr().out, target.read_text()
    why = "tools: tools, left out of the prompt by the template -> set 'policy.chat.roles={developer: system}'"
    assert f"WARN  none of 1 states looked at can be rendered: {why}" in out  # it writes tools behind a system message
    assert "nothing was rendered: tools: tools, left out" in " ".join(text.replace("#", " ").split())
    target.write_text(text.replace("# chat: {roles", "chat: {roles"))
    assert load_recipe(str(target)).policy.chat.roles == {"developer": "system"}
    bare = written(tmp_path, [{"messages": said}], "bare.jsonl")
    assert cli.main(["init", model, bare, str(tmp_path / "second.yaml")]) == 0
    out = capsys.readouterr().out
    assert "rendered: template_refuses_state: TemplateError: unknown role developer -> it is excluded" in out
    assert "'policy.chat.roles={developer: system}'" in out


def test_a_model_that_is_not_here_is_guessed_and_hub_ids_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    file = written(tmp_path, [{"messages": called(), "tools": [TOOL]}])
    (tmp_path / "my-model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", "my-modle", file, "recipe.yaml"]) == cli.BAD_INPUT
    said = capsys.readouterr().err
    assert "did you mean my-model?" in said and "the id of a model on the Hugging Face hub, as OWNER/NAME" in said


def test_half_an_emoji_in_an_experts_turn_is_told_and_no_traceback(tmp_path: Path, capsys: Any) -> None:
    talk = {"role": "assistant", "content": "shipped \ud83d !"}
    _, _, said = init(tmp_path, written(tmp_path, [{"messages": [*called(), talk], "tools": [TOOL]}]), capsys)
    assert "not_encodable: a lone surrogate" in said


def test_records_that_cannot_be_read_are_told_with_the_line_that_leaves_them_out(tmp_path: Path, capsys: Any) -> None:
    file = written(
        tmp_path, [{"messages": called(), "tools": [TOOL]}, {"messages": [{"role": "narrator", "content": "x"}]}]
    )
    _, text, said = init(tmp_path, file, capsys)
    assert (
        "WARN  1 records cannot be read, and extract stops there" in said
        and "line 2: messages[0].role: narrator" in said
    )
    (tmp_path / "recipe.yaml").write_text(text.replace("# on_invalid", "on_invalid"))
    assert load_recipe(str(tmp_path / "recipe.yaml")).extract.on_invalid == "skip"
    rows = [{"prompt": "hi", "chosen": "hello", "rejected": "no"}, {"prompt": "hi", "chosen": 3, "rejected": "no"}]
    target = tmp_path / "llmdoctor.yaml"
    assert cli.main(["init", MODEL, written(tmp_path, rows, "pairs.jsonl"), str(target)]) == 0
    assert "1 records cannot be read, and preferences stops there" in capsys.readouterr().out
    assert "# on_invalid: skip" in target.read_text()


def test_an_expert_who_only_talks_needs_a_judge(tmp_path: Path, capsys: Any) -> None:
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    recipe, _, said = init(tmp_path, written(tmp_path, [{"conversations": turns}]), capsys)
    assert recipe.verifier.name == "judge" and recipe.verifier.judge.base_url and "WARN  the expert only talks" in said


def test_preferences_make_a_recipe_for_llmdoctor(tmp_path: Path, capsys: Any) -> None:
    rows = [{"prompt": f"hi {n}", "chosen": "hello", "rejected": "no"} for n in range(2)]
    recipe, text, said = init(tmp_path, written(tmp_path, rows), capsys)
    assert recipe.algorithm == "llmdoctor" and recipe.patient.model_name == recipe.doctor.model_name == MODEL
    assert recipe.preferences.files and recipe.tfpo.anchor == "reference" and "2 preferences" in text
    assert recipe.decode.doctors["helpfulness"].path == str(recipe.path("doctor/policy"))
    assert "next: nemo-pivotrl preferences" in said


def test_bad_input_writes_nothing_and_a_recipe_is_never_overwritten(tmp_path: Path, capsys: Any) -> None:
    file, target = written(tmp_path, [{"messages": called(), "tools": [TOOL]}]), str(tmp_path / "recipe.yaml")
    for model, data, expected in (
        ("nowhere", file, "give a folder with an HF checkpoint"),
        (MODEL, str(tmp_path / "none.jsonl"), "no such file"),
        (MODEL, written(tmp_path, [{"odd": 1}], "odd.jsonl"), "no known format"),
    ):
        assert cli.main(["init", model, data, target]) == cli.BAD_INPUT
        assert expected in capsys.readouterr().err and not Path(target).exists()
    Path(target).write_text("seed: 1\n")
    assert cli.main(["init", MODEL, file, target]) == cli.BAD_INPUT
    assert "a file is there already" in capsys.readouterr().err and Path(target).read_text() == "seed: 1\n"
