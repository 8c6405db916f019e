"""Which HTTP requests are made again, and after what pause: one rule for samplers' servers and judges."""

from __future__ import annotations

import email.utils
import math
import random
import time

RETRIED = frozenset((408, 409, 425, 429, *range(500, 600)))
"""Statuses of a server that may give a good answer later."""
MAX_PAUSE = 30.0
"""Seconds between two requests at most, whatever a server asks for."""
_JITTER = random.Random()  # the global generator belongs to the stages


def growing_pause(attempt: int, backoff_s: float) -> float:
    """Seconds to wait after the request numbered `attempt` from 0: twice as long each time, scattered, MAX_PAUSE at most."""
    return min(MAX_PAUSE, backoff_s * 2.0 ** min(attempt, 30)) * _JITTER.uniform(0.5, 1.0)


def retry_after(header: str) -> float | None:
    """Seconds of a Retry-After header, a number or a date, from 0 to MAX_PAUSE; None where it is neither."""
    try:
        wanted = float(header)
    except ValueError:
        try:
            wanted = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return None if math.isnan(wanted) else min(max(wanted, 0.0), MAX_PAUSE)
