"""Constant answers: what they earn over a pivot set, and that `select` can leave out what they win."""

from nemo_pivotrl.config import Verifier
from nemo_pivotrl.core.types import Action, Candidate, ToolCall
from nemo_pivotrl.pivotrl.constant_answers import best, earnings, won
from nemo_pivotrl.verifiers.loading import load_verifier

TALK = Action("message", "Shall I?")


def state(name: str, expert: Action) -> Candidate:
    return Candidate(name, f"t-{name}", f"task-{name}", "train", 1, 0, ({"role": "user", "content": "x"},), (), expert)


def call(arguments: str) -> Action:
    return Action("calls", calls=(ToolCall("find", arguments),))


def test_the_best_answer_is_the_one_that_earns_most_over_all_states() -> None:
    states = [state("a", TALK), state("b", Action("message", "No.")), state("c", call('{"q": 1}'))]
    verifier = load_verifier(Verifier(name="single_step", message="any"))
    earned = earnings(verifier, states, [s.expected for s in states], 0)
    answer, mean = best(earned, len(states))
    assert answer == "the text 'ok'" and mean == 2 / 3
    assert set(won(earned)) == {"a", "b"}


def test_an_answer_that_wins_in_one_task_alone_may_be_its_answer() -> None:
    states = [state("a", call('{"q": 1}')), state("b", call('{"q": 2}'))]
    verifier = load_verifier(Verifier(name="single_step"))
    assert earnings(verifier, states, [s.expected for s in states], 0) == {}
    assert best({}, 2)[1] == 0.0
