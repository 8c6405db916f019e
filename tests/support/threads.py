"""How many threads the tests' processes have: a process group that nobody closed shows here first."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

MOST = 64
ENDING_S = 10.0
"""How long threads that a test has left may take to end, as those of a server's last connections do."""


def threads(pid: int | str = "self") -> int:
    """Of one process; 0 where it has ended."""
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return 0


def family() -> list[int]:
    """This process and all that descend from it."""
    found, open_ = [], [os.getpid()]
    while open_:
        pid = open_.pop()
        found.append(pid)
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            try:
                open_ += map(int, children.read_text().split())
            except OSError:  # that thread has ended
                continue
    return found


def check() -> None:
    """Raises AssertionError with the threads' names where a process of the tests has more than `MOST`."""
    until = time.monotonic() + ENDING_S
    for pid in family():
        while (number := threads(pid)) > MOST and time.monotonic() < until:
            time.sleep(0.02)
        if number > MOST:
            names = Counter(path.read_text().strip() for path in Path(f"/proc/{pid}/task").glob("*/comm"))
            raise AssertionError(f"process {pid} has {number} threads, more than {MOST}: {names.most_common(5)}")
