"""How slow this machine is at this moment, for bounds on time that hold on every machine."""

from __future__ import annotations

import json
import re
import time


def slowness() -> float:
    """How many times longer than 8 ms the work that verdicts consist of takes at this moment; 1 at least.

    JSON, patterns, strings and dictionaries: another processor's cache slows them down where an empty loop notices nothing.
    """
    row = {f"k{i}": [str(i), {"v": i}] for i in range(4000)}
    begun = time.thread_time()
    text = json.dumps(row, sort_keys=True)
    assert len(set(re.findall(r"\w+", text))) > 4000 and json.loads(text) == row
    return max(1.0, (time.thread_time() - begun) / 8e-3)
