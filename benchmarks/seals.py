"""What seals and checksums cost of a stage's processor time.

    python benchmarks/seals.py                     # stages that load no model: synthetic artefacts of 16,000 rows
    python benchmarks/seals.py --runs FOLDER       # those that do, in FOLDER/pivotrl and FOLDER/llmdoctor of tests/nightly/torture.py

Counted are the hash of every row written, every reading of a file for its seal or sum, and the sums of folders. A stage may
spend 5 % of its time on them. Times are those of the processor, so other work on the machine adds little. Exit code: stages above.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import io
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from growth import profiles, trajectories
from support.recipes import ROOT, SMALL, SMALL_LLMDOCTOR

from nemo_pivotrl.config.load import load_recipe
from nemo_pivotrl.core import artifacts, atomic

LIMIT = 0.05
TRIES = 3
ROWS = 16_000
MODELS = {
    "pivotrl": {
        "warmup": "start",
        "profile": "profiles.*",
        "sft": "sft",
        "train": "pivotrl",
        "evaluate": "evaluation.*",
    },
    "llmdoctor": {
        "rank": "answers.jsonl",
        "reward": "token_rewards.*",
        "tfpo": "doctor-*",
        "decode": "decoded.*",
        "assess": "assessment.*",
    },
}
"""Recipe to its stages with models, and what each writes."""
Call = Callable[[], Any]


class Clock:
    """Adds up what is spent under it, once where it is nested."""

    def __init__(self) -> None:
        self.seconds, self.updates, self._depth = 0.0, 0, 0

    @contextlib.contextmanager
    def runs(self) -> Iterator[None]:
        begun, self._depth = time.process_time(), self._depth + 1
        try:
            yield
        finally:
            self._depth -= 1
            self.seconds += time.process_time() - begun if not self._depth else 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*rest: Any, **named: Any) -> Any:
            with self.runs():
                return function(*rest, **named)

        return timed

    def sha256(self, *begin: Any) -> Any:
        """A hash object whose `update` is counted."""
        inner = hashlib.sha256(*begin)

        def update(data: bytes) -> None:
            begun = time.process_time()
            inner.update(data)
            self.seconds += 0.0 if self._depth else time.process_time() - begun
            self.updates += 1

        return SimpleNamespace(update=update, hexdigest=inner.hexdigest)


@contextlib.contextmanager
def watched(clock: Clock) -> Iterator[None]:
    """Everything that seals or checks is counted on `clock`."""
    from nemo_pivotrl.pivotrl import export

    hashing = SimpleNamespace(sha256=clock.sha256)
    swapped = [
        (artifacts, "_content", clock.around(artifacts._content)),
        (artifacts, "hashlib", hashing),
        (atomic, "file_sums", clock.around(atomic.file_sums)),
        (export, "hashlib", hashing),
    ]
    kept = [getattr(module, name) for module, name, _ in swapped]
    try:
        for module, name, new in swapped:
            setattr(module, name, new)
        yield
    finally:
        for (module, name, _), old in zip(swapped, kept, strict=True):
            setattr(module, name, old)


def share(prepare: Call, run: Call, tries: int = TRIES) -> tuple[float, float]:
    """(seconds, those of them on seals): of the try that took least, without what reading the clock at every row takes."""
    found = []
    price = reading()
    for _ in range(tries):
        prepare()
        artifacts._contents.clear()  # each command is a process of its own
        clock = Clock()
        with watched(clock), contextlib.redirect_stdout(io.StringIO()):
            begun = time.process_time()
            run()
            told = time.process_time() - begun
        # one of the two readings falls between them
        found.append((told - 2 * price * clock.updates, clock.seconds - price * clock.updates))
    return min(found)


def reading() -> float:
    """Seconds that one look at the clock takes."""
    begun = time.process_time()
    for _ in range(20_000):
        time.process_time()
    return (time.process_time() - begun) / 20_000


def without_models(folder: Path) -> Iterator[tuple[str, Call, Call]]:
    """(stage, what to remove before it, the stage)."""
    from nemo_pivotrl.config import Extract, Recipe, Select, Verifier
    from nemo_pivotrl.pivotrl.export import export
    from nemo_pivotrl.pivotrl.extract import extract
    from nemo_pivotrl.pivotrl.rescore import rescore
    from nemo_pivotrl.pivotrl.select import select_pivots

    source = trajectories(folder / "in.jsonl", count=ROWS // 20, turns=20, words=40)
    taken = Recipe(run_dir=str(folder / "taken"), extract=Extract(trajectories=(str(source),)))
    run = folder / "run"
    profiles(run, ROWS, 8)
    chosen = Recipe(
        run_dir=str(run), select=Select(lambda_diff=0.6, undecided="by_rate"), verifier=Verifier(message="any")
    )

    def age() -> None:
        """As where a person types the next command: a file that was just written is read again whenever it is asked for."""
        for path in folder.rglob("*.jsonl"):
            os.utime(path, (0, 0))

    yield "extract", age, lambda: extract(taken, True)
    yield "rescore", age, lambda: rescore(chosen, True)
    yield "select", age, lambda: select_pivots(chosen, True)
    yield "export", age, lambda: export(chosen)


def with_models(folder: Path, runs: Path) -> Iterator[tuple[str, Call, Call]]:
    """The same of stages of the tiny recipes, each in a copy of a finished run."""
    from importlib import import_module

    from nemo_pivotrl.cli.stages import STAGES

    for name, stages in MODELS.items():
        run = folder / name
        shutil.copytree(runs / name, run)
        settings = [*(SMALL if name == "pivotrl" else SMALL_LLMDOCTOR), "decode.prompts=${run_dir}/manners/test.jsonl"]
        settings = settings if name == "llmdoctor" else settings[:-1]
        recipe = load_recipe(str(ROOT / f"recipes/{name}/tiny.yaml"), [f"run_dir={run}", *settings])
        for stage, own in stages.items():
            module, _, function = STAGES[stage][0].partition(":")
            call = getattr(import_module(module), function)

            def prepare(run: Path = run, own: str = own) -> None:
                for path in run.glob(own):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

            yield stage, prepare, functools.partial(call, recipe, True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--only", default="", help="stages, with commas between them")
    options = parser.parse_args()
    above = 0
    print(f"{'stage':<12}{'seconds':>9}{'on seals':>10}{'share':>8}")
    with tempfile.TemporaryDirectory() as folder:
        cases = with_models(Path(folder), options.runs) if options.runs else without_models(Path(folder))
        for stage, prepare, run in cases:
            if not options.only or stage in options.only.split(","):
                seconds, sealing = share(prepare, run, 1 if options.runs else TRIES)
                above += sealing > LIMIT * seconds
                print(f"{stage:<12}{seconds:>9.2f}{sealing:>10.3f}{sealing / seconds:>8.1%}", flush=True)
    return above


if __name__ == "__main__":
    sys.exit(main())
