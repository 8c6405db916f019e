"""States that a template refuses or a tokenizer cannot encode end no stage: they are left out, counted and named."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.recipes import recipe_at

from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.artifacts import read_rows
from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.data.gym_rows import candidate_to_row
from nemo_pivotrl.data.states import candidates_of
from nemo_pivotrl.demo import tiny_models as tiny
from nemo_pivotrl.pivotrl import sft as sft_stage
from nemo_pivotrl.pivotrl.extract import extract
from nemo_pivotrl.pivotrl.profile import profile
from nemo_pivotrl.pivotrl.verifier_audit import audit
from nemo_pivotrl.tools.checks import preflight

STRICT = "{% for m in messages %}{% if 'boo' in m.content %}{{ raise_exception('no boo here') }}{% endif %}{% endfor %}"
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"properties": {"key": {"type": "string"}}}}}]
QUESTIONS = [
    "where is it",
    "who knows",
    "half an emoji \ud83d",
    "when does it go",
    "boo",
    "what <|end|> is it",
    "how far",
]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy") / "model"
    tokenizer = tiny.make_tokenizer([*QUESTIONS[:2], "find key it"], 400)
    tokenizer.chat_template = STRICT + tiny.CHAT_TEMPLATE
    tiny.save(tiny.make_model(tokenizer, 16, 1, 2, 0), tokenizer, folder)
    return folder


def extracted(folder: Path, policy: Path, *changes: str, **message: Any) -> Recipe:
    """A recipe in `folder` with a candidate for every question; `message` is added to the expert's turns."""
    source = folder / "in.jsonl"
    with source.open("w", encoding="utf-8") as file:
        for n, question in enumerate(QUESTIONS):
            call = {
                "id": f"c{n}",
                "type": "function",
                "function": {"name": "find", "arguments": f'{{"key": "it {n}"}}'},
            }
            messages = [{"role": "system", "content": "Find things."}, {"role": "user", "content": f"{question} {n}"}]
            messages.append({"role": "assistant", "content": "", "tool_calls": [call], **message})
            file.write(json.dumps({"task_id": f"t{n}", "messages": messages, "tools": TOOLS}) + "\n")
    small = [
        "extract.validation_share=0.15",
        "extract.near_duplicate=1.0",
        "profile.num_generations=4",
        "sft.num_steps=1",
    ]
    small += ["policy.generation.max_new_tokens=4", "policy.max_total_sequence_length=256", "audit.sample=0"]
    where = [f"policy.model_name={policy}", f"extract.trajectories=[{source}]"]
    recipe = recipe_at(folder / "run", *small, *where, *changes)
    extract(recipe)
    return recipe


def test_profile_audit_and_sft_go_on_without_them(
    tmp_path: Path, policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = extracted(tmp_path, policy)
    capsys.readouterr()
    rows = list(read_rows(path := profile(recipe)))
    told = (candidate.messages[1]["content"][:4] for candidate in candidates_of(path))
    failures = {said: row["profile"]["failure"] for said, row in zip(told, rows, strict=True)}
    assert len(rows) == len(QUESTIONS)
    assert {k: v for k, v in failures.items() if v} == {"half": "not_encodable", "boo ": "template_refuses_state"}
    told = capsys.readouterr().out
    source = recipe.path("candidates.jsonl")
    lines = {n for n, (said, why) in enumerate(failures.items(), 2) if why}
    assert "excluded: 1 candidates, not_encodable" in told and "no boo here" in told
    assert all(f"{source}:{n}: candidate" in told for n in lines) and len(lines) == 2
    assert all(len(r["samples"]) for r in rows if r["profile"]["failure"] is None)
    audit(recipe)
    found = json.loads(recipe.path("audit.json").read_text())["round_trip"]
    assert found["tried"] == len(QUESTIONS) and found["lost"] == {} and len(found["refused"]) == 2
    preflight(recipe, "profile", 1)
    assert "2 of the first 7 states cannot be rendered" in capsys.readouterr().out
    sft_stage.sft(recipe)
    assert "turns, " in capsys.readouterr().out


def test_special_tokens_in_text_can_be_refused(tmp_path: Path, policy: Path) -> None:
    rows = list(read_rows(profile(extracted(tmp_path, policy, "policy.chat.special_tokens=refuse"))))
    assert sum(r["profile"]["failure"] == "special_token_in_text" for r in rows) == 1


def test_a_template_without_tools_ends_the_profile_once_with_its_remedy(tmp_path: Path, policy: Path) -> None:
    template = tmp_path / "plain.jinja"
    template.write_text("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>")
    recipe = extracted(tmp_path, policy, f"policy.chat_template={template}", "policy.tool_parser=hermes")
    for stage in (lambda: profile(recipe), lambda: preflight(recipe, "profile", 1)):
        with pytest.raises(InputError, match="tools, left out of the prompt") as caught:
            stage()
        assert len(caught.value.problems) == 1


def test_profile_refuses_a_parser_that_does_not_read_the_templates_calls(tmp_path: Path, policy: Path) -> None:
    recipe = extracted(tmp_path, policy, "policy.tool_parser=qwen_coder")
    with pytest.raises(InputError, match=r"5 of 7 expert actions are read back as others"):
        profile(recipe)


def test_sft_trains_the_experts_reasoning_or_says_that_it_does_not(
    tmp_path: Path, policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = extracted(tmp_path, policy, reasoning_content="SECRETREASON")
    rows = [candidate_to_row(c, "agent") for c in candidates_of(recipe.path("candidates.jsonl"))]
    assert all("SECRETREASON" not in json.dumps(r["expected_action"]) for r in rows)
    sft_stage.sft(recipe)
    assert "turns have reasoning, which the chat template does not write" in capsys.readouterr().out
