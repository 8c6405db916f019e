"""A small run folder for the viewer: one trajectory of three turns, of which one has a hostile sample; LLMdoctor's two files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from nemo_pivotrl.components.conclusions import Check, conclude
from nemo_pivotrl.components.rollout import drawn_row, judged_row
from nemo_pivotrl.core.artifacts import Header, write_artefact
from nemo_pivotrl.core.types import Action, Candidate, Profile, Sample, ToolCall, Verdict
from support.pointers import profile_row, store

HOSTILE = "<img src=x onerror=\"document.title='pwned'\"><script>document.title='pwned'</script>"


def call(query: str) -> Action:
    return Action("calls", calls=(ToolCall("find", f'{{"q": "{query}", "n": 1}}'),))


def sample(action: Action, reward: float, category: str, finish: Any = "stop", **why: Any) -> dict[str, Any]:
    text = action.content or (action.calls[0].arguments if action.calls else "")
    return judged_row(drawn_row(Sample((1, 2), (-0.5, -0.25), finish), text, action), Verdict(reward, category, **why))


def profiles() -> list[Profile]:
    tools = ({"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}},)
    state: list[dict[str, Any]] = [{"role": "user", "content": "Find the BLUE chair"}]
    found = []
    drawn = {
        "t1:1": [
            sample(call("blue chair"), 1.0, "EXPECTED_TOOL_CALL", rules=("letter_case",)),
            *[sample(call("red chair"), 0.0, "ARGUMENT_VALUE_DIFFERENT", detail="q: the colours differ")] * 2,
            sample(Action("none"), 0.0, "TRUNCATED", "length"),
        ],
        "t1:3": [sample(Action("message", HOSTILE), 0.0, "NO_TOOL_CALL")] * 4,
        "t1:5": [sample(call("end"), 1.0, "EXPECTED_TOOL_CALL")] * 4,
    }
    for n, (name, samples) in enumerate(drawn.items()):
        expert = call(["blue chair", "stool", "end"][n])
        ids = ("train", 2 * n + 1, n)
        candidate = Candidate(name, "t1", "task-1", *ids, tuple(state), tools, expert)  # type: ignore[arg-type]
        found.append(Profile(candidate, tuple(samples), 8, 100 * (n + 1)))
        function = {"name": "find", "arguments": expert.calls[0].arguments}
        state.append({"role": "assistant", "content": "", "tool_calls": [{"id": f"c{n}", "function": function}]})
        state.append({"role": "tool", "tool_call_id": f"c{n}", "content": f"found {n}"})
    return found


def make(folder: Path) -> Path:
    """Fill the folder; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [profile_row(profile, number) for number, profile in enumerate(profiles())]
    reference = store([profile.candidate for profile in profiles()], folder / "profiles.jsonl")
    extra = {"num_generations": 4, **reference}
    write_artefact(folder / "profiles.jsonl", Header("profiles", "c", extra=extra), rows)
    sets = {"pivots.jsonl": rows[:1], "random.jsonl": rows[1:2]}
    for name, kept in sets.items():
        write_artefact(folder / name, Header("pivots", "c", extra={"lambda_diff": 0.6, **reference}), kept)
    items = [{"item": "t1:3", "family": "find", "scores": [0.0, 1.0], "failed": 0, "sample": "x", "category": "C"}]
    evaluated = [{"policy": policy, "set": "one_turn", "items": items} for policy in ("base", "pivotrl")]
    write_artefact(folder / "evaluation.jsonl", Header("evaluation", "c"), evaluated)
    answer = {"ids": [5, 6], "rewards": [0.9, 0.0], "importance": [0.1, 0.0], "agreement": 0.7, "ended": True}
    answer |= {"positive": [-0.1, -2.0], "negative": [-1.0, -2.0]}
    pair = {"preference_id": "p1", "split": "train", "objective": "kindness", "prompt_ids": [1]}
    reward = pair | {"chosen": answer, "rejected": answer | {"rewards": [-0.9, 0.0]}}
    write_artefact(folder / "token_rewards.jsonl", Header("token_rewards", "c"), [reward])
    arms = [
        {"arm": arm, "prompt": 0, "sample": 0, "asked": "why?", "text": "so", "tokens": 1, "kl": 0.1, "changed": 1.0}
        | {"scores": {"kindness": 1.0}, "trace": [["so", -1.0, -0.5, 0.1, True]]}
        for arm in ("patient", "kind 1")
    ]
    write_artefact(folder / "assessment.jsonl", Header("assessment", "c"), arms)
    conclude(folder, "profile", [Check("truncated samples", "8.3% (1 of 12)", True), Check("x", "y", False, "mend it")])
    return folder


if __name__ == "__main__":
    make(Path(sys.argv[1]))
