"""Kill, starve and double-start every stage, and compare what it ends with, byte for byte, with an undisturbed run.

    python tests/nightly/torture.py [FOLDER] [--kills 20] [--full 5] [--doubles 3] [--stages extract,select] [--seed 0]

FOLDER gets the runs that the trials begin from (made once, of the tiny recipes made smaller) and every trial that failed.
- kill: SIGKILL at a random moment of the stage's time, again and again until the command ends by itself
- full: no file may grow beyond a random size (RLIMIT_FSIZE); then the command again, without the limit
- tmpfs: the run folder on a file system with little room left (where mounting is allowed); then again, with room
- double: two processes at once; one must end with 0, the other with 75 and the name of the first
Costs and times (`ledger.jsonl`, `timing.jsonl`), dashboards, the report and locks are not compared. Exit code 1 where a trial failed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "SOURCE_DATE_EPOCH": "0"}
# for the fork server, too
os.environ.update(ENVIRONMENT, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
from support.processes import Process, python  # noqa: E402
from support.recipes import SMALL, SMALL_LLMDOCTOR  # noqa: E402

SETTINGS = {"pivotrl": [*SMALL, "loop.max_rounds=1"], "llmdoctor": [*SMALL_LLMDOCTOR, "reward.pairs_per_wave=4"]}

LONGEST_S = 3600.0
"""How long a stage may take on a busy machine."""


@dataclass(frozen=True)
class Work:
    """A command of a recipe."""

    recipe: str
    own: Sequence[str]
    """What it writes: what is not there when a trial begins."""
    words: Sequence[str] = ()
    """The command, where it is not the name in the table."""
    settings: Sequence[str] = ()
    before: Sequence[Sequence[str]] = ()
    """Commands that make what it begins from, where the recipe's run does not."""


SHARDS = [["profile", "--shard", f"{number}/2"] for number in range(2)]
STAGES = {
    "world": Work("pivotrl", ["world"]),
    "extract": Work("pivotrl", ["candidates.*", "trajectories.jsonl"]),
    "warmup": Work("pivotrl", ["start", "start.init-*"]),
    "audit": Work("pivotrl", ["audit.*"]),
    "profile": Work("pivotrl", ["profiles.*"]),
    "shard": Work("pivotrl", ["profiles.*"], words=SHARDS[0]),
    "merge": Work("pivotrl", ["profiles.*"], before=SHARDS),
    "rescore": Work("pivotrl", ["profiles.rescored.jsonl"]),
    "select": Work("pivotrl", ["pivots.jsonl"]),
    "export": Work("pivotrl", ["gym"]),
    "nemo-rl": Work("pivotrl", ["nemo-rl"], words=["export", "nemo-rl"]),
    "artefact": Work("pivotrl", ["nemotron"], words=["export", "nemotron"]),
    "train": Work("pivotrl", ["pivotrl"]),
    "sft": Work("pivotrl", ["sft"]),
    "evaluate": Work("pivotrl", ["evaluation.*"]),
    "manners": Work("llmdoctor", ["manners", "patient*", "novice*"]),
    "rank": Work("llmdoctor", ["answers.jsonl", "ranked"]),
    "preferences": Work("llmdoctor", ["preferences.*"]),
    "reward": Work("llmdoctor", ["token_rewards.*"]),
    "tfpo": Work("llmdoctor", ["doctor-*"]),
    "decode": Work("llmdoctor", ["decoded.*"], settings=["decode.prompts=${run_dir}/manners/test.jsonl"]),
    "assess": Work("llmdoctor", ["assessment.*"]),
}
"""All stages with files of their own; `run` and `nemotron` call them one after the other."""
NOT_COMPARED = ("ledger.jsonl", "timing.jsonl", "report.html", "report.json", "dashboards.json")


@dataclass(frozen=True)
class Stage:
    """A stage in a run folder that has everything but its own files."""

    name: str
    recipe: str
    start: Path
    work: Path

    def command(self, folder: Path, words: Sequence[str] = ()) -> list[str]:
        """What Python is told; `words` in the place of the stage's own."""
        work = STAGES.get(self.name, Work(self.recipe, ()))
        words = words or work.words or [self.name]
        recipe = str(ROOT / f"recipes/{self.recipe}/tiny.yaml")
        settings = [f"run_dir={folder}", *SETTINGS[self.recipe], *work.settings]
        return ["-m", "nemo_pivotrl.cli", *words, recipe, *settings]

    def spawn(self, folder: Path, words: Sequence[str] = ()) -> Process:
        return python(*self.command(folder, words), cwd=self.work)

    def starve(self, folder: Path, largest: int) -> tuple[int, str]:
        """(exit code, what it said) where no file may grow beyond so many bytes. It speaks into a pipe, which has no limit."""
        told = subprocess.run(
            [sys.executable, *self.command(folder)],
            cwd=self.work,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest)),
        )
        return told.returncode, told.stderr

    def finish(self, folder: Path, words: Sequence[str] = ()) -> str:
        """Run the stage to its end; what is wrong, empty where nothing is."""
        process = self.spawn(folder, words)
        code = process.wait(LONGEST_S)
        return "" if code == 0 else f"exit code {code}: {process.printed()[-1500:]}"

    @contextlib.contextmanager
    def trial(self) -> Iterator[Path]:
        """A copy of the run folder to begin from, always under the same path, which artefacts may hold."""
        folder = self.work / "run"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.start, folder, symlinks=True)
        yield folder


def contents(folder: Path) -> dict[str, str]:
    """Path to digest of everything that is compared."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name not in NOT_COMPARED
        and ".lock" not in path.name
        and path.parent.name != "tensorboard"  # a copy for people; it has times in its names
    }


def differences(wanted: dict[str, str], found: dict[str, str]) -> str:
    names = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    return f"{len(names)} files differ: {', '.join(names[:5])}" if names else ""


def ends_within(process: Process, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    return process.poll() is not None


def kill(stage: Stage, wanted: dict[str, str], seconds: float, rng: random.Random) -> tuple[str, int]:
    """(what is wrong, how often it was killed)."""
    with stage.trial() as folder:
        for kills in range(1000):
            process = stage.spawn(folder)
            if kills < 4 and not ends_within(process, rng.uniform(0, 1.1 * seconds)):
                process.kill()
                continue
            if code := process.wait(LONGEST_S):
                return f"exit code {code} after {kills} kills: {process.printed()[-1500:]}", kills
            return differences(wanted, contents(folder)), kills
    raise AssertionError("unreachable")


def full(stage: Stage, wanted: dict[str, str], largest: int, rng: random.Random) -> tuple[str, int]:
    """(what is wrong, whether the limit was met)."""
    with stage.trial() as folder:
        code, told = stage.starve(folder, int(largest * rng.random()))
        if "Traceback" in told:
            return f"a traceback: {told[-1500:]}", 1
        return stage.finish(folder) or differences(wanted, contents(folder)), int(code != 0)


def on_tmpfs(stage: Stage, wanted: dict[str, str], grown: int, rng: random.Random) -> tuple[str, int]:
    """(what is wrong, whether it ran out of room). The run folder lies on a file system of its own."""
    folder = stage.work / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    size = sum(4096 + (path.stat().st_size // 4096 + 1) * 4096 for path in stage.start.rglob("*"))
    room = size + int(grown * rng.random())
    mount(folder, "-t", "tmpfs", "-o", f"size={room}", "tmpfs")
    try:
        shutil.copytree(stage.start, folder, symlinks=True, dirs_exist_ok=True)
        process = stage.spawn(folder)
        met, told = process.wait(LONGEST_S) != 0, process.printed()
        if "Traceback" in told:
            return f"a traceback: {told[-1500:]}", 1
        mount(folder, "-o", f"remount,size={room + 20 * grown + (1 << 30)}")
        return stage.finish(folder) or differences(wanted, contents(folder)), int(met)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def mount(folder: Path, *words: str) -> None:
    subprocess.run(["mount", *words, str(folder)], check=True, capture_output=True)


def can_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            mount(Path(folder), "-t", "tmpfs", "-o", "size=65536", "tmpfs")
        except (OSError, subprocess.CalledProcessError):
            return False
        subprocess.run(["umount", folder], check=True)
        return True


def double(stage: Stage, wanted: dict[str, str], seconds: float, rng: random.Random) -> tuple[str, int]:
    """(what is wrong, whether one was refused). The second starts at some moment of the first's time."""
    with stage.trial() as folder:
        first = stage.spawn(folder)
        time.sleep(rng.uniform(0, 0.5) * seconds)
        second = stage.spawn(folder)
        codes = sorted(process.wait(LONGEST_S) for process in (first, second))
        told = [process.printed() for process in (first, second)]
        refused = next((t for t, p in zip(told, (first, second), strict=True) if p.returncode == 75), None)
        if codes not in ([0, 75], [0, 0]):  # one after the other, where the first had ended
            return f"exit codes {codes}: {told[0][-700:]} {told[1][-700:]}", 0
        if refused is not None and "at work here: " not in refused:
            return f"75 without a name: {refused[-500:]}", 1
        return differences(wanted, contents(folder)), int(refused is not None)


def prepare(name: str, folder: Path) -> Stage:
    """The stage with a run folder to begin from; the whole run is made first, where it is not there."""
    work_of, recipe = STAGES[name], STAGES[name].recipe
    whole = folder / recipe
    if not (whole / "report.html").exists():
        shutil.rmtree(whole, ignore_errors=True)
        made = Stage("run", recipe, whole, folder)
        if wrong := made.finish(whole):
            raise SystemExit(f"the run of {recipe} failed: {wrong}")
    work = folder / f"stage-{name}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    start = work / "start"
    shutil.copytree(whole, start, symlinks=True)
    for path in [path for pattern in work_of.own for path in start.glob(pattern)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    stage = Stage(name, recipe, start, work)
    if work_of.before:
        with stage.trial() as run:  # under the path of the trials
            for words in work_of.before:
                if wrong := stage.finish(run, words):
                    raise SystemExit(f"{shlex.join(words)} failed: {wrong}")
            shutil.rmtree(start)
            shutil.copytree(run, start, symlinks=True)
    return stage


def torture(
    name: str, folder: Path, kills: int, fulls: int, doubles: int, tmpfs: int, seed: int
) -> tuple[Counter[str], list[str]]:
    """(counts of trials, and of those in which the stage was hit; what went wrong) of one stage."""
    stage, rng = prepare(name, folder), random.Random(f"{seed} {name}")
    counts, wrong = Counter[str](), []
    with stage.trial() as run:
        begun = time.monotonic()
        if failed := stage.finish(run):
            return counts, [f"{name}, undisturbed: {failed}"]
        seconds, wanted = time.monotonic() - begun, contents(run)
        before = contents(stage.start)
        new = [run / path for path in wanted if before.get(path) != wanted[path]]
        if not new:
            return counts, [f"{name}, undisturbed: it writes nothing, so no trial can show anything; see STAGES"]
        sizes = [path.stat().st_size for path in new]
    trials: list[tuple[str, int, Callable[[], tuple[str, int]]]] = [
        ("kill", kills, lambda: kill(stage, wanted, seconds, rng)),
        ("full", fulls, lambda: full(stage, wanted, max(sizes), rng)),
        ("tmpfs", tmpfs, lambda: on_tmpfs(stage, wanted, sum(sizes), rng)),
        ("double", doubles, lambda: double(stage, wanted, seconds, rng)),
    ]
    for kind, times, run_trial in trials:
        for _ in range(times):
            found, hits = run_trial()
            counts.update({kind: 1, f"{kind} hits": hits})
            if found:
                wrong.append(f"{name}, {kind}: {found}")
                shutil.copytree(stage.work / "run", folder / f"failed-{name}-{kind}-{len(wrong)}", symlinks=True)
    shutil.rmtree(stage.work)
    return counts, wrong


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="runs/torture", type=Path)
    for option, default in (("kills", 20), ("full", 5), ("doubles", 3), ("tmpfs", 3), ("seed", 0)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--stages", default=",".join(STAGES))
    options = parser.parse_args(arguments)
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    tmpfs = options.tmpfs if can_mount() else 0
    total, every = Counter[str](), []
    print(
        f"{'stage':<14}{'SIGKILLs':>10}{'trials':>8}{'full':>6}{'met':>5}{'tmpfs':>7}{'met':>5}{'double':>8}{'refused':>9}{'wrong':>7}"
    )
    for name in options.stages.split(","):
        counts, wrong = torture(name, folder, options.kills, options.full, options.doubles, tmpfs, options.seed)
        total += counts
        every += wrong
        show(name, counts, len(wrong))
        for text in wrong:
            print(f"    {text}")
    show("all", total, len(every))
    return 1 if every else 0


def show(name: str, counts: Counter[str], wrong: int) -> None:
    cells = ("kill hits", "kill", "full", "full hits", "tmpfs", "tmpfs hits", "double", "double hits")
    widths = (10, 8, 6, 5, 7, 5, 8, 9)
    row = "".join(f"{counts[cell]:>{width}}" for cell, width in zip(cells, widths, strict=True))
    print(f"{name:<14}{row}{wrong:>7}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
