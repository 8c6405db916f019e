"""Executors: results come in the order of their tasks, however they end."""

import pytest

from nemo_pivotrl.backends.executors import Here, in_order


class Backwards:
    """Holds three tasks and ends the last of them first."""

    def __init__(self) -> None:
        self.held: list[tuple[int, int]] = []
        self.most, self.closed = 0, False

    def room(self) -> bool:
        return len(self.held) < 3

    def submit(self, number: int, task: int) -> None:
        self.held.append((number, task))
        self.most = max(self.most, len(self.held))

    def wait(self, block: bool) -> tuple[int, int] | None:
        return (lambda entry: (entry[0], 10 * entry[1]))(self.held.pop()) if block and self.held else None

    def close(self) -> None:
        self.closed = True


def test_results_come_in_the_order_of_their_tasks_and_the_executor_is_closed() -> None:
    executor = Backwards()
    assert list(in_order(executor, range(8))) == [10 * n for n in range(8)]
    assert executor.most == 3 and executor.closed
    assert list(in_order(Here(lambda task: task + 1), range(5))) == [1, 2, 3, 4, 5]
    assert list(in_order(Here(lambda task: lambda: task + 1), range(5))) == [1, 2, 3, 4, 5]
    assert list(in_order(Backwards(), [])) == []


def test_what_a_worker_raises_ends_it() -> None:
    def refuse(task: int) -> int:
        raise ValueError(task)

    with pytest.raises(ValueError, match="7"):
        list(in_order(Here(refuse), [7]))
