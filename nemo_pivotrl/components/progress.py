"""Progress bars: live on a terminal, one line every half minute in a log file."""

from __future__ import annotations

import sys
import threading
from typing import Any

from tqdm import tqdm

tqdm.set_lock(threading.RLock())  # its own is shared with forks, and stays locked when one is killed that holds it


def progress(total: int | None, initial: int, desc: str, unit: str) -> tqdm[Any]:
    """A bar over `total` units (None: not known), of which `initial` are done."""
    live = sys.stderr.isatty()
    return tqdm(total=total, initial=initial, desc=desc, unit=unit, mininterval=0.5 if live else 30, dynamic_ncols=live)


def steps_of(max_num_steps: int, max_num_epochs: int, rows: int, rows_per_step: int) -> int:
    """Optimiser steps of a run over `rows` rows of data: `max_num_steps`, or with -1 as many whole ones as the epochs have."""
    return max_num_steps if max_num_steps >= 0 else max(1, max_num_epochs * rows // rows_per_step)
