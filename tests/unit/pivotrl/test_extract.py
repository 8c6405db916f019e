"""Extraction: the split comes first and goes by task, every turn is kept or counted, every invalid turn is named."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.recipes import ROOT

from nemo_pivotrl import config
from nemo_pivotrl.config import Extract, Recipe
from nemo_pivotrl.core.artifacts import read_header, read_rows
from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.core.types import Action, Candidate, Message, ToolCall, Trajectory
from nemo_pivotrl.data.splits import split_by_task
from nemo_pivotrl.data.states import candidates_of
from nemo_pivotrl.pivotrl.duplicates import SKETCH_SIZE, _similar
from nemo_pivotrl.pivotrl.extract import cut_all, extract, is_error
from nemo_pivotrl.pivotrl.growing_state import dangling_call, leaks

TAU = ROOT.parent / "shared/data/tau_airline"
SCHEMA = {"type": "object", "properties": {"q": {"type": "integer"}}, "required": ["q"]}
NAMES = ("find", "book", "execute_bash", "web_search", "open_page", "calculate")
TOOLS = tuple({"type": "function", "function": {"name": n, "parameters": SCHEMA}} for n in NAMES)
SYSTEM: Message = {"role": "system", "content": "rules"}


def user(text: str = "please") -> Message:
    return {"role": "user", "content": text}


def say(text: str) -> Message:
    return {"role": "assistant", "content": text}


def call(*made: tuple[str, Any], ids: str = "abc") -> Message:
    """An assistant turn with calls of (tool, arguments); a number q stands for {"q": q}."""
    written = [
        {
            "id": i,
            "type": "function",
            "function": {"name": n, "arguments": a if isinstance(a, str) else json.dumps({"q": a})},
        }
        for i, (n, a) in zip(ids, made, strict=False)
    ]
    return {"role": "assistant", "content": "", "tool_calls": written}


def output(text: str = "done", call_id: str = "a") -> Message:
    return {"role": "tool", "tool_call_id": call_id, "content": text}


def trajectory(
    *messages: Message, name: str = "t", task: str | None = None, reward: float | None = 1.0, **more: Any
) -> Trajectory:
    return Trajectory(name, task or "task-" + name, messages, TOOLS, reward, f"in.jsonl:{more.pop('line', 1)}", **more)


def cut(*trajectories: Trajectory, **settings: Any) -> tuple[list[Candidate], dict[str, int]]:
    """What is kept and the skip counts; kept + skipped must be all assistant turns."""
    kept, audit = cut_all(trajectories, {t.task_id: "train" for t in trajectories}, Extract(**settings))
    turns = sum(m["role"] == "assistant" for t in trajectories for m in t.messages)
    assert audit["turns"] == turns == len(kept) + sum(audit["skipped"].values())
    assert audit["kept"] == {"train": len(kept), "validation": 0}
    return kept, audit["skipped"]


# ---- split ----


def test_the_split_holds_out_its_share_of_tasks_whatever_their_order_and_repeats() -> None:
    tasks = [f"task-{i}" for i in range(20)]
    split = split_by_task(tasks, 0.25, seed=1)
    assert sorted(split.values()) == ["train"] * 15 + ["validation"] * 5
    assert split_by_task(tasks[::-1] * 3, 0.25, seed=1) == split
    assert split_by_task(tasks, 0.25, seed=2) != split
    held_out_less = {t for t, s in split_by_task(tasks, 0.1, seed=1).items() if s == "validation"}
    assert held_out_less < {t for t, s in split.items() if s == "validation"}
    assert set(split_by_task(tasks, 0.0, seed=1).values()) == {"train"}
    assert split_by_task(["only"], 0.5, seed=1) == {"only": "train"}


def test_no_task_trajectory_or_state_is_in_both_splits_and_a_shared_state_stays_held_out() -> None:
    # all twenty trajectories (two a task) open with the very same state: one held-out copy is left
    made = [trajectory(SYSTEM, user(), call(("find", i)), name=f"t{i}", task=f"task-{i // 2}") for i in range(20)]
    splits = split_by_task([t.task_id for t in made], 0.3, seed=0)
    kept, audit = cut_all(made, splits, Extract())
    assert audit["tasks"] == {"train": 7, "validation": 3} and audit["kept"] == {"train": 0, "validation": 1}
    assert all(splits[c.task_id] == c.split for c in kept)
    kept, _ = cut_all(
        [dataclasses.replace(t, messages=(SYSTEM, user(t.trajectory_id), *t.messages[2:])) for t in made],
        splits,
        Extract(),
    )
    for key in ("task_id", "trajectory_id"):
        sides = [{getattr(c, key) for c in kept if c.split == s} for s in ("train", "validation")]
        assert not sides[0] & sides[1] and all(sides)
    assert len(kept) == 20


# ---- what is kept ----


def test_every_assistant_turn_becomes_a_candidate_with_everything_before_it_as_state() -> None:
    messages = (SYSTEM, user(), call(("find", 1)), output(), say("anything else?"), user("no"), say("bye"))
    kept, skipped = cut(trajectory(*messages))
    assert skipped == {} and [(c.turn, c.depth) for c in kept] == [(2, 0), (4, 1), (6, 2)]
    assert [c.messages for c in kept] == [messages[:2], messages[:4], messages[:6]]
    assert kept[0].expected == Action("calls", "", (ToolCall("find", '{"q": 1}', "a"),)) and kept[2].expected == Action(
        "message", "bye"
    )
    assert len({c.candidate_id for c in kept}) == 3


def test_a_ready_made_pivot_row_gives_its_last_turn_alone() -> None:
    row = trajectory(user(), call(("find", 1)), output(), say("found"), reward=None, last_only=True)
    kept, audit = cut_all([row], {row.task_id: "train"}, Extract(unrewarded="skip"))
    assert [c.turn for c in kept] == [3] and audit["turns"] == 1


@pytest.mark.parametrize(
    ("messages", "settings", "skipped", "kept"),
    [
        ((say("welcome"), user(), say("yes")), {}, {"no_state": 1}, 1),
        ((user(), say("  ")), {}, {"empty_turn": 1}, 0),
        (
            (user(), call(("find", 1), ("find", 2)), output(), output(call_id="b"), say("ok")),
            {"parallel_calls": "skip"},
            {"parallel_calls": 1},
            1,
        ),
        ((user(), call(("find", 1), ("find", 2)), output(), output(call_id="b"), say("ok")), {}, {}, 2),
        ((user(), say("one"), say("two")), {}, {"answer_leak": 1}, 1),
        ((user(), call(("find", 1)), say("so")), {"on_invalid": "skip"}, {"dangling_call": 1}, 1),
        ((user(), call(("fly", 1))), {"on_invalid": "skip"}, {"unknown_tool": 1}, 0),
        ((user(), call(("find", "{}"))), {"on_invalid": "skip"}, {"invalid_arguments": 1}, 0),
        ((user(), call(("find", '{"q": "x"}'))), {"on_invalid": "skip"}, {"invalid_arguments": 1}, 0),
        ((user(), call(("find", "{q: 1}"))), {"on_invalid": "skip"}, {"invalid_arguments": 1}, 0),
        ((user(), call(("find", "[1]"))), {"on_invalid": "skip"}, {"invalid_arguments": 1}, 0),
        (
            (user(), say("hm"), user(), call(("find", 1)), output(), call(("execute_bash", 1))),
            {"turns": "bash"},
            {"not_a_bash_action": 1, "not_a_tool_call": 1},
            1,
        ),
        ((user(), call(("execute_bash", 1), ("find", 1))), {"turns": "bash"}, {"not_a_bash_action": 1}, 0),
        (
            (user(), call(("find", 1)), output("Error: no"), call(("find", 2)), output(), say("ok")),
            {"turns": "tool_calls"},
            {"not_a_tool_call": 1, "tool_error": 1},
            1,
        ),
        (
            (user(), call(("web_search", 1)), output(), call(("open_page", 1)), output(), call(("calculate", 1))),
            {"turns": "search"},
            {"not_a_search_step": 1},
            2,
        ),
    ],
)
def test_each_turn_that_does_not_count_is_counted_under_its_reason(
    messages: tuple[Message, ...], settings: dict[str, Any], skipped: dict[str, int], kept: int
) -> None:
    found, counted = cut(trajectory(*messages), **settings)
    assert counted == skipped and len(found) == kept


def test_an_error_in_any_output_of_a_parallel_turn_skips_it_and_a_later_error_does_not() -> None:
    both = call(("find", 1), ("book", 1))
    assert cut(
        trajectory(user(), both, output(), output("Traceback (most recent call last):", "b")), turns="tool_calls"
    )[1] == {"tool_error": 1}
    later = trajectory(user(), call(("find", 1)), output(), call(("book", 1)), output("invalid seat"))
    assert [c.turn for c in cut(later, turns="tool_calls")[0]] == [1]


def test_trajectories_below_the_reward_or_without_one_are_skipped_whole() -> None:
    turns = (user(), say("one"), user(), say("two"))
    good, bad = trajectory(*turns, name="good"), trajectory(user("other"), *turns[1:], name="bad", reward=0.5)
    unknown = trajectory(user("third"), *turns[1:], name="unknown", reward=None)
    assert cut(good, bad, unknown)[1] == {"trajectory_below_min_reward": 2}
    kept, skipped = cut(good, bad, unknown, min_reward=0.5, unrewarded="skip")
    assert skipped == {"trajectory_unrewarded": 2} and {c.trajectory_id for c in kept} == {"good", "bad"}


def test_a_tool_whose_own_schema_is_invalid_is_named() -> None:
    broken = {"type": "function", "function": {"name": "find", "parameters": {"type": "objekt"}}}
    made = dataclasses.replace(trajectory(user(), call(("find", 1))), tools=(broken,))
    assert cut(made, on_invalid="skip")[1] == {"invalid_schema": 1}
    with pytest.raises(InputError, match="find"):
        cut(made)


# ---- invalid turns ----


def test_all_invalid_turns_of_all_trajectories_are_listed_at_once() -> None:
    unknown = trajectory(user(), call(("find", 1), ("fly", 1)), name="u", line=1)
    schema = trajectory(user(), call(("find", '{"q": "x"}')), output(), say("ok"), name="s", line=2)
    dangling = trajectory(user(), call(("find", 1)), user("hello?"), say("sorry"), name="d", line=3)
    with pytest.raises(InputError) as caught:
        cut(unknown, schema, dangling)
    found = [(p.file, p.line, p.field, p.found) for p in caught.value.problems]
    assert found == [
        ("in.jsonl", 1, "messages[1].tool_calls[1].function.name", "'fly'"),
        ("in.jsonl", 2, "messages[1].tool_calls[0].function.arguments", '{"q": "x"}'),
        ("in.jsonl", 3, "messages[3]", "call 'a' has no output before messages[2]"),
    ]
    remedies = [p.remedy for p in caught.value.problems]
    assert "find, book" in remedies[0] and "'x' is not of type 'integer'" in remedies[1]
    assert all("extract.on_invalid=skip" in r for r in remedies)
    kept, skipped = cut(unknown, schema, dangling, on_invalid="skip")
    assert skipped == {"dangling_call": 1, "invalid_arguments": 1, "unknown_tool": 1} and len(kept) == 2


def test_calls_of_undefined_tools_are_one_problem_a_file() -> None:
    bare = [dataclasses.replace(trajectory(user(), call((n, 1)), output(), name=n), tools=()) for n in ("fly", "book")]
    with pytest.raises(InputError) as caught:
        cut(*bare)
    (problem,) = caught.value.problems
    assert problem.field == "tools" and "2 calls use: 'fly', 'book'" in problem.found
    assert "extract.tools=FILE" in problem.remedy


@pytest.mark.parametrize(
    ("state", "wrong"),
    [
        ((user(), call(("find", 1)), output()), False),
        ((user(), call(("find", 1), ("find", 2)), output(call_id="b"), output(call_id="a")), False),
        ((user(), call(("find", 1)), output(call_id="")), False),
        ((user(), call(("find", 1)), output(), call(("find", 2)), output()), False),
        ((user(), output()), True),
        ((user(), call(("find", 1))), True),
        ((user(), call(("find", 1), ("find", 2)), output()), True),
        ((user(), call(("find", 1)), output(), output()), True),
        ((user(), call(("find", 1)), output(call_id="z")), True),
        ((user(), call(("find", 1)), user(), output()), True),
    ],
)
def test_calls_and_outputs_pair_up(state: tuple[Message, ...], wrong: bool) -> None:
    assert bool(dangling_call(state)) is wrong


# ---- leaks ----


def test_a_reused_call_id_is_no_leak_but_the_same_call_is() -> None:
    state = (user(), call(("find", 1)), output())
    assert not leaks(state, Action("calls", calls=(ToolCall("find", '{"q": 2}', "a"),)))
    assert not leaks(state, Action("calls", calls=(ToolCall("book", '{"q": 1}', "a"),)))
    assert not leaks(state, Action("calls", calls=(ToolCall("find", '{"q": 1}', "b"),)))
    assert leaks(state, Action("calls", calls=(ToolCall("book", "{}", "z"), ToolCall("find", '{"q": 1}', "a"))))


def test_the_answer_in_the_prompt_is_a_leak_and_a_short_echo_is_not() -> None:
    arguments = '{"a": 1, "b": 2}'
    answer = Action("calls", calls=(ToolCall("find", arguments, "a"),))
    assert leaks(({"role": "system", "content": f"Answer: find({arguments})"}, user()), answer)
    assert not leaks((user(f"my data: {arguments}"),), answer)  # the tool is not named
    assert not leaks(
        (user('find {"q": 1}'),), Action("calls", calls=(ToolCall("find", '{"q": 1}', "a"),))
    )  # a single key
    long = "you will get your money back within five days"
    assert leaks((user(f"Say: {long}."),), Action("message", long))
    assert not leaks((user("Say: yes, sure."),), Action("message", "yes, sure."))
    assert not leaks((user(), say(long), user()), Action("message", long))  # the assistant repeats itself
    assert leaks((user(), say("one")), Action("message", "two"))


def test_a_sentence_that_the_policy_orders_is_no_leak() -> None:
    ordered = "YOU ARE BEING TRANSFERRED TO A HUMAN AGENT. PLEASE HOLD ON."
    for role in ("system", "developer"):
        state = ({"role": role, "content": f"If you cannot help, say '{ordered}' and nothing else."}, user())
        assert not leaks(state, Action("message", ordered))
    assert leaks((user(f'Answer with "{ordered}"'),), Action("message", ordered))


def test_a_turn_that_is_not_to_be_learned_is_counted_under_its_reason() -> None:
    turns = (user(), call(("find", 1)), output(), call(("find", 2)), output(), call(("find", 3)))
    kept, skipped = cut(trajectory(*turns, untrained={1: "given_turn", 5: "weight_zero"}))
    assert skipped == {"given_turn": 1, "weight_zero": 1} and [c.turn for c in kept] == [3]


def test_a_long_trajectory_is_read_once_and_its_longest_states_are_counted() -> None:
    turns = [message for i in range(3000) for message in (call(("find", i)), output(f"result {i}"))]
    started = time.process_time()
    kept, skipped = cut(trajectory(user(), *turns), max_state_messages=100)
    assert len(kept) == 50 and skipped == {"state_too_long": 2950}
    assert time.process_time() - started < 10.0  # 6,001 messages; with the square of them it takes minutes


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("Error: not found", True),
        ("  error", True),
        ("Traceback (most recent call last):\n ...", True),
        ("Invalid user", True),
        ('{"error": "no seat"}', True),
        ('{"exit_code": 1}', True),
        ('{"error": null, "exit_code": 0}', False),
        ("No error found", False),
        ("errors: 0", False),
        ("", False),
        ("{broken", False),
        ('{"a":' * 100_000, False),
    ],
)
def test_an_output_is_an_error_when_it_begins_like_one_or_says_so(text: str, error: bool) -> None:
    assert is_error(text) is error


# ---- duplicates ----


def test_equal_states_are_merged_call_ids_aside_and_their_different_actions_counted() -> None:
    def opening(name: str, ids: str, answer: Message) -> Trajectory:
        return trajectory(user(), call(("find", 1), ids=ids), output(call_id=ids[0]), answer, name=name)

    kept, skipped = cut(opening("1", "abc", say("x")), opening("2", "xyz", say("y")), opening("3", "xyz", say("x")))
    assert skipped == {"duplicate_state": 4} and [c.trajectory_id for c in kept] == ["1", "1"]
    assert [c.num_unique_actions for c in kept] == [1, 2]  # all find 1 at first; then x or y
    other_tools = dataclasses.replace(opening("4", "abc", say("x")), tools=TOOLS[:1])
    assert cut(opening("1", "abc", say("x")), other_tools, near_duplicate=1.0)[1] == {}


def asked(context: str, question: str, q: int, name: str, policy: str = "rules") -> Trajectory:
    """A long context, an answer that is not to be learned, and a question that is answered by a call."""
    turns = ({**SYSTEM, "content": policy}, user(context), say("ok"), user(question), call(("find", q)))
    return trajectory(*turns, name=name, untrained={2: "given"})


def test_near_duplicates_of_other_trajectories_are_dropped_down_to_the_threshold() -> None:
    words = [f"word{i}" for i in range(1000)]
    nearly = [*words[:500], "changed", *words[501:]]  # 5 of 996 five-grams differ: similarity 991/1001 = 0.99
    half = [*words[:500], *(f"other{i}" for i in range(500))]  # 496 of 996 shared: similarity 496/1496 = 0.33
    made = [asked(" ".join(w), "and now?", 1, str(i)) for i, w in enumerate((words, nearly, half))]
    kept, skipped = cut(*made)
    assert [c.trajectory_id for c in kept] == ["0", "2"] and skipped == {"given": 3, "near_duplicate_state": 1}
    assert cut(*made, near_duplicate=1.0)[1] == {"given": 3}
    other_action = asked(" ".join(nearly), "and now?", 2, "3")
    other_question = asked(" ".join(nearly), "and then?", 1, "4")
    other_policy = asked(" ".join(nearly), "and now?", 1, "5", policy="other rules")
    assert cut(made[0], other_action, other_question, other_policy)[1] == {"given": 4}
    # two questions over one long context, which is a part of the same message
    shared = [
        trajectory(user(" ".join([*words, "question", str(i)])), call(("find", 1)), name=str(i)) for i in range(3)
    ]
    assert len(cut(*shared)[0]) == 3
    same_trajectory = trajectory(user(" ".join(words)), say("yes"), user("ok"), say("well"), name="own")
    assert len(cut(same_trajectory)[0]) == 2


# ---- the stage ----


def openai_file(folder: Path, *records: dict[str, Any]) -> Path:
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps({"tools": TOOLS, "reward": 1, **r}) + "\n" for r in records), encoding="utf-8")
    return path


def test_the_stage_writes_rows_that_read_back_an_audit_that_adds_up_and_the_same_bytes_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [
        {"trajectory_id": f"t{i}", "messages": [user(f"lone \ud83d {i}"), call(("find", i)), output(), say(" ")]}
        for i in range(10)
    ]
    recipe = Recipe(
        run_dir=str(tmp_path / "run"),
        extract=Extract(trajectories=(str(openai_file(tmp_path, *records)),), validation_share=0.2),
    )
    path = extract(recipe)
    assert "10 + 10 = 20" in capsys.readouterr().out
    audit = json.loads((tmp_path / "run/candidates.audit.json").read_text())
    assert (audit["turns"], audit["kept"], audit["skipped"]) == (20, {"train": 8, "validation": 2}, {"empty_turn": 10})
    rows = list(candidates_of(path))
    assert {c.messages[0]["content"] for c in rows} == {f"lone \ud83d {i}" for i in range(10)}
    header, before = read_header(path, "candidates"), path.read_bytes()
    assert extract(recipe).read_bytes() == before
    records[0]["messages"] = [user("changed"), say("yes")]
    openai_file(tmp_path, *records)
    assert read_header(extract(recipe), "candidates").parent != header.parent


def test_a_test_set_is_held_out_as_a_whole(tmp_path: Path) -> None:
    records = [{"trajectory_id": f"t{i}", "messages": [user(f"a{i}"), call(("find", i)), output()]} for i in range(5)]
    settings = Extract(trajectories=(str(openai_file(tmp_path, *records)),), validation_share=1.0)
    rows = list(read_rows(extract(Recipe(run_dir=str(tmp_path / "run"), extract=settings))))
    assert len(rows) == 5 and {r["split"] for r in rows} == {"validation"}


def test_the_stage_splits_trials_of_a_task_together(tmp_path: Path) -> None:
    records = [{"task_id": i // 4, "messages": [user(f"trial {i}"), say("yes")]} for i in range(20)]
    settings = Extract(trajectories=(str(openai_file(tmp_path, *records)),), validation_share=0.4)
    recipe = Recipe(run_dir=str(tmp_path / "run"), extract=settings, verifier=config.Verifier(message="any"))
    rows = list(read_rows(extract(recipe)))
    held_out = [r["task_id"] for r in rows if r["split"] == "validation"]
    assert len(rows) == 20 and len(held_out) == 8 and len(set(held_out)) == 2


def test_invalid_turns_leave_no_artefact_and_nothing_kept_is_an_error(tmp_path: Path) -> None:
    broken = openai_file(
        tmp_path, {"messages": [user(), call(("fly", 1))]}, {"messages": [user(), call(("find", "{}"))]}
    )
    recipe = Recipe(run_dir=str(tmp_path / "run"), extract=Extract(trajectories=(str(broken),)))
    with pytest.raises(InputError) as caught:
        extract(recipe)
    assert [(p.file, p.line) for p in caught.value.problems] == [(str(broken), 1), (str(broken), 2)]
    assert not (tmp_path / "run/candidates.jsonl").exists()
    with pytest.raises(InputError, match="none kept"):
        extract(dataclasses.replace(recipe, extract=dataclasses.replace(recipe.extract, on_invalid="skip")))


@pytest.mark.skipif(not TAU.exists(), reason="the recorded airline trajectories are not on this machine")
def test_real_trajectories_lose_no_turn(tmp_path: Path) -> None:
    file = TAU / "trajectories.jsonl"
    raw = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    failed = sum(m["role"] == "assistant" for r in raw if r["reward"] < 1 for m in r["messages"])
    settings = Extract(
        trajectories=(str(file),),
        tools=str(TAU / "tools.json"),
        format="tau_bench",
        validation_share=0.2,
        on_invalid="skip",
    )
    path = extract(Recipe(run_dir=str(tmp_path), extract=settings))
    audit = json.loads((tmp_path / "candidates.audit.json").read_text())
    assert audit["trajectories"] == 140 and audit["turns"] == 2023 and audit["tasks"] == {"train": 28, "validation": 7}
    assert sum(audit["kept"].values()) + sum(audit["skipped"].values()) == 2023
    assert audit["skipped"]["trajectory_below_min_reward"] == failed
    rows = list(read_rows(path))
    tasks = [{r["task_id"] for r in rows if r["split"] == s} for s in ("train", "validation")]
    assert not tasks[0] & tasks[1] and len(rows) == sum(audit["kept"].values())


def test_similar_sketches_are_those_that_comparing_every_pair_finds() -> None:
    draw = np.random.default_rng(0)
    base = draw.integers(0, 2**32, (3, SKETCH_SIZE), np.uint32)
    rows = base[draw.integers(0, 3, 300)].copy()
    for row in rows:  # entries of few and of many rows, so that rare ones decide and common ones do not
        places = draw.choice(SKETCH_SIZE, draw.integers(0, 14), replace=False)
        row[places] = draw.integers(0, 4, len(places))
    made = [asked("a", "b", 1, str(i % 200)) for i in range(300)]
    group = [(c, row) for (c, *_), row in zip((cut(one)[0] for one in made), rows, strict=True)]
    group = [(dataclasses.replace(c, candidate_id=str(i)), row) for i, (c, row) in enumerate(group)]
    kept: list[int] = []
    dropped = []
    for i, (candidate, row) in enumerate(group):
        near = any(
            (rows[j] == row).mean() >= 0.95 and group[j][0].trajectory_id != candidate.trajectory_id for j in kept
        )
        (dropped if near else kept).append(i)
    assert len(dropped) > 50 and len(kept) > 50
    assert list(_similar(group, 0.95)) == [str(i) for i in dropped]


def test_a_users_file_where_extract_writes_its_own_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    source = openai_file(tmp_path, {"messages": [user(), say("yes")]}).rename(tmp_path / "run/trajectories.jsonl")
    before = source.read_bytes()
    with pytest.raises(InputError, match=r"extract\.trajectories: found (?s:.*)move yours out of run_dir"):
        extract(Recipe(run_dir=str(tmp_path / "run"), extract=Extract(trajectories=(str(source),))))
    assert source.read_bytes() == before
