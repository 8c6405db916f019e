"""What a talking turn is worth is decided: a judge compares it, it is no candidate, or any text passes because someone said so."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nemo_pivotrl import config
from nemo_pivotrl.components.rollout import judged_candidates
from nemo_pivotrl.config import Extract, Recipe
from nemo_pivotrl.core.artifacts import read_rows
from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.core.types import Action, Case, ToolCall
from nemo_pivotrl.data.states import candidates_of
from nemo_pivotrl.pivotrl.extract import extract
from nemo_pivotrl.verifiers.base import Ruling, VerifierFault, is_talk
from nemo_pivotrl.verifiers.loading import excludes_talk, identity, load_verifier

SAY = Case(Action("message", "Which day do you mean?"))
OTHER = Action("message", "ok")
NAMED = config.Judge(base_url="http://127.0.0.1:9/v1", model="m")


@dataclass
class Stub:
    """A judge that always answers the same."""

    same: bool
    concurrency: int = 2

    def equivalent(self, kind: str, case: Case, expected: str, actual: str) -> Ruling:
        assert (kind, expected, actual) == ("message", SAY.expected.content, OTHER.content)
        return Ruling(self.same, "1/1 1/1" if self.same else "0/1 0/1", "because")


def load(name: str, same: bool = True, **section: Any) -> Any:
    return load_verifier(config.Verifier(name=name, **section), lambda settings: Stub(same))


def test_unset_it_is_the_judge_where_one_is_named_and_else_exclude() -> None:
    assert config.Verifier().talk == "exclude" and config.Verifier(judge=NAMED).talk == "judge"
    assert config.Verifier(judge=NAMED, message="any").talk == "any"
    assert config.Verifier(message="judge").talk == "judge"


@pytest.mark.parametrize("name", ["single_step", "functional", "terminal_multi_harness"])
@pytest.mark.parametrize("same", [True, False])
def test_a_judge_compares_talk_for_every_verifier_that_would_take_any(name: str, same: bool) -> None:
    verifier = load(name, same, judge=NAMED)
    verdict = verifier.verify(SAY, OTHER)
    assert (verdict.reward, verdict.category) == (float(same), "JUDGED_SAME" if same else "DIFFERENT_MESSAGE")
    assert verifier.asks_judge and verifier.concurrency == 2
    assert verifier.verify(SAY, Action("none")).reward == 0.0, "which no judge is asked about"
    assert verifier.verify(SAY, Action("calls", calls=(ToolCall("f", "{}"),))).reward == 0.0


def test_any_must_be_asked_for_by_name_and_excluded_talk_is_a_fault_and_no_reward() -> None:
    assert load("functional", message="any").verify(SAY, OTHER).category == "MESSAGE"
    with pytest.raises(VerifierFault, match=r"verifier\.message=judge") as caught:
        load("functional").verify(SAY, OTHER)
    assert caught.value.kind == "message_excluded"


@pytest.mark.parametrize("message", [None, "exclude", "any"])
def test_the_released_rules_keep_their_verdict_whatever_is_decided(message: Any) -> None:
    for name in ("single_step", "terminal_multi_harness"):
        verdict = load(name, message=message).verify(SAY, OTHER)
        assert (verdict.reward, verdict.category) == (1.0, "EXPECTED_CHAT_MESSAGE_FOUND")


def test_verifiers_that_compare_talk_themselves_exclude_none_and_terminal_turns_are_no_talk() -> None:
    excluding = {
        name: excludes_talk(config.Verifier(name=name)) for name in ("single_step", "exact", "terminus", "swe")
    }
    assert excluding == {"single_step": True, "exact": False, "terminus": False, "swe": False}
    assert not excludes_talk(config.Verifier(message="any")) and not excludes_talk(config.Verifier(judge=NAMED))
    turn = Action("message", "{}")
    assert is_talk(turn, {}) and not is_talk(turn, {"harness": "terminus_2"})
    assert not is_talk(turn, {"metadata": {"harness": "terminus_1"}})


def test_the_decision_is_part_of_what_an_artefacts_verifier_is() -> None:
    def of(**section: Any) -> str:
        settings = config.Verifier(**section)
        return identity(load_verifier(settings, lambda judge: Stub(True)), settings)

    assert of(name="single_step", message="any") != of(name="single_step") == of(name="single_step", message="exclude")
    assert of(name="exact", message="any") == of(name="exact")


def test_a_decision_among_a_verifiers_own_settings_is_sent_to_its_place() -> None:
    with pytest.raises(InputError, match=r"a section of its own: verifier\.message"):
        load_verifier(config.Verifier(name="functional", settings={"message": "any"}))


def recipe(folder: Path, **section: Any) -> Recipe:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Which day?"},
        {"role": "user", "content": "today"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    source = folder / "in.jsonl"
    source.write_text(json.dumps({"trajectory_id": "t", "task_id": "k", "messages": messages, "tools": tools}) + "\n")
    settings = Extract(trajectories=(str(source),), validation_share=0.0)
    return Recipe(run_dir=str(folder / "run"), extract=settings, verifier=config.Verifier(**section))


def test_extract_keeps_talk_and_says_what_leaves_it_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(list(read_rows(extract(recipe(tmp_path))))) == 2
    assert "the expert talks in 1 of 2 candidates" in capsys.readouterr().out
    extract(recipe(tmp_path, message="any"))
    assert "the expert talks in" not in capsys.readouterr().out


def test_nothing_is_drawn_or_judged_where_talk_is_excluded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = extract(recipe(tmp_path))
    candidates = list(candidates_of(path))
    kept = judged_candidates(candidates, load("functional"), path)
    assert [c.expected.kind for c in kept] == ["calls"] and "left out: 1 of 2" in capsys.readouterr().out
    assert judged_candidates(candidates, load("functional", message="any"), path) == candidates
    with pytest.raises(InputError, match="the expert only talks"):
        judged_candidates(candidates[:1], load("functional"), path)


def test_a_call_where_the_expert_talks_differs_under_any_decision() -> None:
    call = Action("calls", calls=(ToolCall("f", "{}"),))
    assert load("functional").verify(SAY, call).reward == 0.0
