"""What the benchmarks of the papers' claims share: jobs that resume, intervals over seeds, and where a table comes from."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemo_pivotrl.core.atomic import write_atomically

ROOT = Path(__file__).resolve().parents[1]
BOOTSTRAPS = 10000
Result = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """`work(folder, *arguments)` makes `folder/result.json`, once."""

    folder: Path
    work: Callable[..., Result]
    arguments: tuple[Any, ...] = ()


def results(jobs: Sequence[Job], processes: int) -> dict[Path, Result]:
    """Each job's result, those that are missing made by `processes` processes of one thread (0: in this one), in the order given.

    A job that was killed begins anew and may find what it left in its folder; what it prints is in `folder/log.txt`.
    """
    missing = [job for job in jobs if not (job.folder / "result.json").exists()]
    if not processes:
        for job in missing:
            _made(job)
    elif missing:
        from tqdm import tqdm

        os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when a worker imports it
        context = multiprocessing.get_context("spawn")
        with (
            ProcessPoolExecutor(processes, context, _ends_with, (os.getpid(),)) as pool,
            tqdm(total=len(missing), unit="job") as bar,
        ):
            job_of: dict[Future[Path], Job] = {pool.submit(_made, job): job for job in missing}
            running = set(job_of)
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    try:
                        bar.set_postfix_str(future.result().name)
                    except BaseException as error:
                        error.add_note(f"the job of {job_of[future].folder}: its log.txt says how far it came")
                        pool.shutdown(wait=False, cancel_futures=True)
                        raise
                    bar.update()
    return {job.folder: json.loads((job.folder / "result.json").read_text(encoding="utf-8")) for job in jobs}


def _ends_with(parent: int) -> None:
    """Let this worker end when `parent` is killed: what is run anew must not meet it at work in the same folder."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _made(job: Job) -> Path:
    import torch

    torch.set_num_threads(1)
    job.folder.mkdir(parents=True, exist_ok=True)
    with (
        (job.folder / "log.txt").open("a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        begun, spent = time.perf_counter(), time.process_time()
        result = job.work(job.folder, *job.arguments)
    result |= {"seconds": time.perf_counter() - begun, "processor_seconds": time.process_time() - spent}
    write_atomically(job.folder / "result.json", json.dumps(result) + "\n")
    return job.folder


def interval(by_seed: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """(mean, low, high) of scores or of paired differences, 95 %: seeds are drawn with replacement, then the items of each.

    by_seed: one array of items a seed.
    """
    rng = np.random.default_rng(0)
    # a seed's mean over redrawn items, in advance and often enough: the two drawings are independent
    inner = np.stack([d[rng.integers(0, len(d), (BOOTSTRAPS // 10, len(d)))].mean(1) for d in by_seed])
    chosen = rng.integers(0, len(by_seed), (BOOTSTRAPS, len(by_seed)))
    draws = inner[chosen, rng.integers(0, inner.shape[1], chosen.shape)].mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(np.mean([d.mean() for d in by_seed])), float(low), float(high)


def provenance(seeds: Sequence[int]) -> str:
    """Command, commit, seeds and machine, as a Markdown list."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    changed = " with changes" if git("status", "--porcelain", "--", "nemo_pivotrl", "benchmarks/*.py") else ""
    cpus = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    import torch
    import transformers

    return "\n".join(
        [
            f"- command: `python {os.path.relpath(sys.argv[0], ROOT)} {' '.join(sys.argv[1:])}`",
            f"- commit: {git('rev-parse', '--short=12', 'HEAD')}{changed}",
            f"- seeds: {', '.join(map(str, seeds))}",
            f"- machine: {cpus[0].split(':')[1].strip() if cpus else platform.processor()}, {os.cpu_count()} cores; "
            f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}",
            f"- date: {time.strftime('%Y-%m-%d')}",
        ]
    )
