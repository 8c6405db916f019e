"""Checksums of large files, remembered between commands: reading the weights of a 120B model again takes minutes a stage."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

from nemo_pivotrl.core.atomic import file_sum, write_atomically

SMALLEST = 64 << 20
"""Bytes from which a sum is remembered; smaller files are read faster than they are worth a line."""
SETTLED_S = 60.0
"""Age of a file, in seconds, from which its sum is remembered: a file system may give two writes of one moment the same time."""


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/nemo_pivotrl/sums`, by default below `~/.cache`. It may be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "nemo_pivotrl", "sums")


def known_sum(path: Path) -> str:
    """`file_sum` of a file; remembered while its size, inode, and times of writing and of change stay the same.

    A copy that keeps all of these and has other bytes goes unnoticed. The time of change cannot be set by a program, so such a
    copy takes a fault of the file system or of the disk. Raises InputError for what is no regular file.
    """
    status = path.stat()
    if status.st_size < SMALLEST:
        return file_sum(path)
    seen = [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
    place = cache_folder() / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # a damaged note is no note
        note = json.loads(place.read_text(encoding="utf-8"))
        if note["seen"] == seen and len(bytes.fromhex(note["sha256"])) == 32:
            return str(note["sha256"])
    found = file_sum(path)
    after = path.stat()
    same = seen == [after.st_size, after.st_ino, after.st_mtime_ns, after.st_ctime_ns]
    if same and time.time() - max(status.st_mtime, status.st_ctime) > SETTLED_S:
        with contextlib.suppress(OSError):  # no home, or a full one: the next command reads the file again
            place.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(place, json.dumps({"path": str(path.resolve()), "seen": seen, "sha256": found}) + "\n")
    return found
