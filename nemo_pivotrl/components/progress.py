"""Progress bars: live on a terminal, one line every half minute in a log file."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

from tqdm import tqdm

tqdm.set_lock(threading.RLock())  # its own is shared with forks, and stays locked when one is killed that holds it


class Bar(tqdm):  # type: ignore[type-arg]  # at run time it takes no argument
    """A bar that asks what stands behind it when it is drawn: that happens less often than something is done."""

    shown: Callable[[], Mapping[str, str]] = dict

    @property
    def format_dict(self) -> dict[str, Any]:
        """See tqdm."""
        found = super().format_dict
        behind = ", ".join(f"{name}={text}" for name, text in self.shown().items())
        return {**found, "postfix": behind or found["postfix"]}


def progress(total: int | None, initial: int, desc: str, unit: str) -> Bar:
    """A bar over `total` units (None: not known), of which `initial` are done."""
    live = sys.stderr.isatty()
    return Bar(total=total, initial=initial, desc=desc, unit=unit, mininterval=0.5 if live else 30, dynamic_ncols=live)


def steps_of(max_num_steps: int, max_num_epochs: int, rows: int, rows_per_step: int) -> int:
    """Optimiser steps of a run over `rows` rows of data: `max_num_steps`, or with -1 as many whole ones as the epochs have."""
    return max_num_steps if max_num_steps >= 0 else max(1, max_num_epochs * rows // rows_per_step)
