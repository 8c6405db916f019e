"""The request desk: its conversations are as long and as routine as it says, families stay apart, and clerks and experts differ."""

import json
import random
import statistics

import pytest

from nemo_pivotrl.core.types import Action, Case, ToolCall
from nemo_pivotrl.demo import request_desk as desk
from nemo_pivotrl.demo.simulators import RequestDesk
from nemo_pivotrl.demo.start_policy import own_turns
from nemo_pivotrl.demo.talk_judge import DeskTalk

TASKS = [desk.request_task(random.Random(n), str(n)) for n in range(400)]


def test_experts_of_either_wording_always_succeed_in_9_to_16_turns() -> None:
    rng = random.Random(0)
    for teacher in desk.WORDING:
        made = [desk.conversation(task, rng, lambda teacher=teacher: teacher) for task in TASKS]
        turns = [len(m["wording"]) for m in made]
        assert all(m["reward"] == 1.0 for m in made) and set(m["wording"][0] for m in made) == {teacher}
        assert min(turns) >= 9 and max(turns) <= 16 and 12 <= statistics.mean(turns) <= 15


def test_routine_turns_are_about_six_of_ten() -> None:
    """Opening, logging, ending, and changes without a number once asked: what no error touches."""
    routine = {"open", "log", *desk.PLAIN}
    turns = [action for task in TASKS for action, _ in desk.clerk_turns(task, random.Random(1))]
    kept = sum((not a.calls and "?" not in a.content) or (bool(a.calls) and a.calls[0].name in routine) for a in turns)
    assert 0.5 < kept / len(turns) < 0.7


def test_clerks_err_and_finish_about_three_tasks_of_ten() -> None:
    rng = random.Random(0)
    assert 0.2 < statistics.mean(desk.conversation(task, rng, error_rate=1.0)["reward"] for task in TASKS) < 0.4


def play(task: desk.Task, actions: list[Action]) -> desk.RequestEpisode:
    episode = desk.RequestEpisode(task)
    for action in actions:
        episode.step(action)
    return episode


def test_a_change_needs_a_yes_of_its_own_and_a_held_record_a_human() -> None:
    free = next(t for t in TASKS if {w["status"] for w in t.facts["wishes"]} == {"free"})
    held = next(t for t in TASKS if "held" in {w["status"] for w in t.facts["wishes"]})
    right = [action for action, _ in desk.clerk_turns(free, random.Random(0))]
    assert play(free, right).success
    asked = [i for i, a in enumerate(right) if "?" in a.content]
    assert not play(
        free, [a for i, a in enumerate(right) if i != asked[-1]]
    ).success  # the first yes is not for the second change
    careless = [a for a, _ in desk.clerk_turns(held, random.Random(0))]
    swapped = [
        Action("calls", calls=(ToolCall("close", a.calls[0].arguments, "x"),))
        if a.calls and a.calls[0].name == "pass_on"
        else a
        for a in careless
    ]
    assert play(held, careless).success and not play(held, swapped).success


def test_train_and_validation_show_eight_families_and_the_test_plays_both_sides_apart() -> None:
    sizes = {"warmup": 50, "train": 60, "validation": 30, "test": 40}
    made = {split: RequestDesk(3, sizes, split).tasks() for split in sizes}
    verbs = {split: {w["verb"] for t in tasks for w in t.facts["wishes"]} for split, tasks in made.items()}
    assert verbs["train"] == verbs["validation"] == set(desk.SEEN) and verbs["warmup"] == set(desk.FAMILIES)
    assert [t.family for t in made["test"]] == ["seen families"] * 20 + ["other families"] * 20
    assert {w["verb"] for t in made["test"][20:] for w in t.facts["wishes"]} == set(desk.UNSEEN)
    openings = [{t.opening for t in tasks} for tasks in made.values()]
    assert sum(map(len, openings)) == len(set().union(*openings)) == 180
    assert RequestDesk(3, sizes, "test").tasks() == made["test"]


def test_the_start_policy_learns_only_turns_in_its_own_wording() -> None:
    rng = random.Random(5)
    made = desk.conversation(TASKS[0], rng, desk.mixed(rng), 1.0)
    assert set(made["wording"]) == {"house", "other"}
    assert [made["wording"][i] for i in own_turns(made)] == ["house"] * made["wording"].count("house")


@pytest.mark.parametrize(
    ("actual", "reward"),
    [
        ("shall i pause alfa ?", 1.0),
        ("pause alfa , ok ?", 1.0),
        ("shall i lock alfa ?", 0.0),
        ("shall i pause bravo ?", 0.0),
        ("done .", 0.0),
    ],
)
def test_talk_is_judged_by_what_it_asks(actual: str, reward: float) -> None:
    expected = Action("message", content="thank you for waiting ! do you agree that we pause alfa now ?")
    case = Case(expected, desk.TOOLS, ())
    assert DeskTalk().verify(case, Action("message", content=actual)).reward == reward
    call = Action("calls", calls=(ToolCall("pause", json.dumps({"id": "alfa"}), "x"),))
    assert DeskTalk().verify(case, call).reward == 0.0
