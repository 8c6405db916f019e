"""Progress bars: live on a terminal, one line every half minute in a log file."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress(total: int | None, initial: int, desc: str, unit: str) -> tqdm[Any]:
    """A bar over `total` units (None: not known), of which `initial` are done."""
    live = sys.stderr.isatty()
    return tqdm(total=total, initial=initial, desc=desc, unit=unit, mininterval=0.5 if live else 30, dynamic_ncols=live)
