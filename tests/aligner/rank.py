"""One rank of a job. The parent that every rank is forked from imports NeMo-Aligner once (`warm.py`); 13 s of CPU each."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def run(job: str, folder: str, arguments: dict[str, Any], place: dict[str, str]) -> None:
    """Runs `jobs.JOB(folder, **arguments)` in `place`, a rank's environment, and writes FOLDER/out-RANK.json."""
    os.environ.update(place)
    os.chdir(folder)
    log = os.open(f"log-{place['RANK']}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    from warm import jobs  # which puts the stand-ins in place first, where the parent has not

    jobs.torch.set_num_threads(1)
    jobs.write(Path(folder), getattr(jobs, job)(Path(folder), **arguments))


if __name__ == "__main__":  # by hand: RANK=0 WORLD_SIZE=1 ... python rank.py JOB FOLDER ARGUMENTS_JSON
    run(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), {"RANK": os.environ["RANK"]})
