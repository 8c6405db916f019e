"""Published pivot rows, in the shapes of NVIDIA's `Nemotron-RL-Agentic-*-Pivot-v1`: read, split by source trajectory, and their
labels counted, explained and never believed."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from nemo_pivotrl.config.load import load_recipe
from nemo_pivotrl.data.gym_rows import candidate_to_row
from nemo_pivotrl.data.published import count, explain, labels_of, marks
from nemo_pivotrl.data.states import candidates_of
from nemo_pivotrl.pivotrl.extract import extract

TOOL = {
    "type": "function",
    "name": "find_order",
    "description": "",
    "parameters": {"type": "object", "properties": {"id": {"type": "string"}}, "required": ["id"]},
    "strict": True,
}
CALL = {"type": "function_call", "name": "find_order", "arguments": '{"id": "A1"}'}
AGENT = "single_step_tool_use_with_argument_comparison_agent"


def params(*texts: str, tools: Any = (TOOL,)) -> dict[str, Any]:
    """A state of user and assistant texts in turn, every field that a table makes null written out."""
    said = []
    for number, text in enumerate(texts):
        role = "user" if number % 2 == 0 else "assistant"
        part = {"type": "output_text", "text": text, "annotations": []}
        said.append({"type": None, "role": role, "content": [part] if role == "assistant" else text, "name": None})
    return {
        "input": [{"role": "system", "content": ""}, *said],
        "tools": list(tools),
        "metadata": None,
        "temperature": None,
    }


def conversational(trajectory: int, *texts: str, rate: float = 0.25, **more: Any) -> dict[str, Any]:
    return {
        "trajectory_id": trajectory,
        "responses_create_params": params(*texts),
        "expected_action": CALL,
        "scenario": None,
        "num_unique_actions": 9,
        "meta_info": {"turn": 1, "step": 0, "assistant_depth": 0},
        "qwen_235b_info": {"rewards": [1, 0, 0, 0] * 4, "reward_mean": 0.25, "reward_std": 0.43, "reward_var": 0.19},
        "agent_ref": {"type": "responses_api_agents", "name": AGENT},
        "pass_rate": rate,
        "pass_rate_total": 32,
        "pass_rate_passed": round(rate * 32),
        **more,
    }


def swe(trajectory: str, *texts: str, passed: int, **more: Any) -> dict[str, Any]:
    return {
        "trajectory_id": trajectory,
        "responses_create_params": params(*texts),
        "expected_action": CALL,
        "agent_ref": {"type": "responses_api_agents", "name": "single_step_tool_use_with_argument_comparison_swe"},
        "pass_rate": passed / 8,
        "pass_rate_total": 8,
        "pass_rate_passed": passed,
        **more,
    }


def function_calling(trajectory: int, *texts: str) -> dict[str, Any]:
    return {
        "trajectory_id": trajectory,
        "info": {"turn": 6, "step": 1, "depth": 12},
        "responses_create_params": params(*texts),
        "expected_action": {"type": "message", "content": "I can do that."},
        "agent_ref": {"type": "responses_api_agents", "name": "toolcall_schema_" + AGENT},
    }


def terminal(trajectory: str, turn: int, *texts: str) -> dict[str, Any]:
    answer = {"analysis": "a", "plan": "p", "commands": [{"keystrokes": "ls\n", "duration": 0.1}]}
    return {
        "uuid": f"{trajectory}-{turn}",
        "responses_create_params": params(*texts, tools=()),
        "expected_answer": json.dumps(answer),
        "metadata": {"harness": "terminus_2", "source_trajectory_uid": trajectory, "pivot_agent_turn_index": turn},
        "threshold": 0.9,
    }


def extracted(folder: Path, *rows: dict[str, Any], **settings: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The candidates of a file with these rows, as NeMo-Gym rows, and the audit."""
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = folder / "recipe.yaml"
    recipe.write_text(f"run_dir: {folder}/run\nverifier: {{message: any}}\nextract: {{trajectories: [{source}]}}\n")
    extract(load_recipe(str(recipe), [f"extract.{key}={value}" for key, value in settings.items()]))
    kept = [candidate_to_row(c, AGENT) for c in candidates_of(folder / "run/candidates.jsonl")]
    return kept, json.loads((folder / "run/candidates.audit.json").read_text())


@pytest.mark.parametrize(
    ("label", "found"),
    [
        ({"pass_rate": 0.5, "pass_rate_total": 8, "pass_rate_passed": 4}, {"rollouts 8"}),
        ({"pass_rate": 0.0, "pass_rate_total": 16, "pass_rate_passed": 0}, {"rollouts 16", "labelled 0 of n"}),
        ({"pass_rate": 1.0, "pass_rate_total": 64, "pass_rate_passed": 64}, {"rollouts 64", "labelled n of n"}),
        ({"pass_rate": 0.5, "pass_rate_total": 16, "pass_rate_passed": 4}, {"rollouts 16", "label contradicts itself"}),
        ({"pass_rate": 0.5, "pass_rate_total": 8, "pass_rate_passed": 9}, {"rollouts 8", "label contradicts itself"}),
        ({"pass_rate": 0.5, "pass_rate_total": 0, "pass_rate_passed": 0}, {"rollouts 0", "label contradicts itself"}),
        ({"pass_rate": 0.3333, "pass_rate_total": 3, "pass_rate_passed": 1}, {"rollouts 3"}),
        ({"pass_rate": 0.5}, {"label contradicts itself"}),
        ({"m_info": {"rewards": [1, 0, 0, 1], "reward_mean": 0.5}}, {"rollouts 4"}),
        ({"m_info": {"rewards": [1, 0, 0, 1], "reward_mean": 0.25}}, {"rollouts 4", "label contradicts itself"}),
        (
            {"m_info": {"rewards": [0, 0], "reward_mean": 0.0}, "pass_rate": 0.5, "pass_rate_total": 8, "pass_rate_passed": 4},
            {"rollouts 8", "labels disagree"},
        ),
    ],
)  # fmt: skip
def test_a_label_is_checked_against_itself(label: dict[str, Any], found: set[str]) -> None:
    assert set(marks(label)) == {"labelled", *found}


def test_a_row_without_labels_bears_no_mark_and_null_is_no_label() -> None:
    assert marks({"pass_rate": None, "info": {"turn": 1}, "_ng_rollout_index": 0}) == []
    assert labels_of({"pass_rate": True}) == [] and marks({"_ng_rollout_index": 3}) == ["copy"]


def test_every_published_shape_is_read_and_split_by_source_trajectory(tmp_path: Path) -> None:
    rows = [
        conversational(0, "hello"),  # an id of 0 is an id
        conversational(0, "hello", "hi, your number?", "it is A1"),
        swe("s-1", "fix it", passed=0),
        function_calling(3344, "what can you do"),
        terminal("t-1", 2, "task", "{}", "screen"),
        terminal("t-1", 1, "task"),
    ]
    kept, audit = extracted(tmp_path, *rows, validation_share=0.4)
    assert len(kept) == 6 and audit["skipped"] == {}
    assert [row["trajectory_id"] for row in kept] == ["0", "0", "s-1", "3344", "t-1", "t-1"]
    splits: dict[str, set[str]] = {}
    for row in kept:
        splits.setdefault(row["trajectory_id"], set()).add(row["provenance"]["split"])
    assert all(len(found) == 1 for found in splits.values())  # NVIDIA's own preparation holds out the last 100 rows
    assert {s for found in splits.values() for s in found} == {"train", "validation"}
    assert len({row["provenance"]["candidate_id"] for row in kept}) == 6
    assert kept[4]["expected_answer"] == rows[4]["expected_answer"] and kept[4]["threshold"] == 0.9
    assert {row["agent_ref"]["name"] for row in kept} == {AGENT}


def test_labels_select_nothing_and_are_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        conversational(1, "a b c d"),
        conversational(2, "e f g h", rate=0.5),
        swe("s-1", "i j k l", passed=0),
        swe("s-2", "m n o p", passed=8),
        swe("s-3", "q r s t", passed=4, pass_rate_total=16),
        swe("s-3", "q r s t", passed=4, _ng_rollout_index=1),
    ]
    kept, audit = extracted(tmp_path, *rows)
    assert [row["trajectory_id"] for row in kept] == ["1", "2", "s-1", "s-2", "s-3"]
    assert audit["skipped"] == {"duplicate_state": 1}
    assert not any(key for row in kept for key in row if key.startswith("pass_rate") or key.endswith("_info"))
    assert [row["num_unique_actions"] for row in kept] == [1] * 5  # ours, not the row's 9
    assert audit["published"] == {
        "labelled": 6,
        "labelled 0 of n": 1,
        "labelled n of n": 1,
        "label contradicts itself": 1,
        "labels disagree": 1,
        "copy": 1,
        "rollouts 8": 3,
        "rollouts 16": 1,
        "rollouts 32": 2,
        f"agent {AGENT}": 2,
        "agent single_step_tool_use_with_argument_comparison_swe": 4,
    }
    said = capsys.readouterr().out
    assert "6 carry hit rates of another model; dropped" in said
    assert "of rollouts: 3 rows 8, 1 rows 16, 2 rows 32" in said
    assert "4 name another agent: single_step_tool_use_with_argument_comparison_swe (4)" in said


def test_other_formats_have_nothing_to_explain() -> None:
    assert count([{"messages": [], "reward": 1.0}]) == Counter() and explain({}, AGENT) == ""
    assert explain({f"agent {AGENT}": 3}, AGENT) == ""
