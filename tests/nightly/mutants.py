"""Faults put into the package on purpose, one at a time: does a test notice each of them?

    python tests/nightly/mutants.py              # all of mutants.yaml, in minutes; exit code 1 where one survives
    python tests/nightly/mutants.py --only swe   # those whose area or fault has this word
    python tests/nightly/mutants.py --root DIR   # of another checkout, an older one for instance
    python tests/nightly/mutants.py --jobs 1     # one at a time; without it, one on each core

Each line of `mutants.yaml` names an area, the fault, a text that stands once in the package, what takes its place, and the tests
that should notice. Each job works on a copy of the project, so nothing here is changed. Torch is imported once, and each mutant is
a fork.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LEFT_OUT = shutil.ignore_patterns(".git", ".venv*", ".pytest_cache", ".mypy_cache", "__pycache__", "runs", "*.egg-info")
TIMEOUT_S = 900
SECONDS = itertools.count(10**9)


def place(root: Path, mutant: dict[str, Any]) -> tuple[Path, str, str]:
    """The one file in which the mutant's text stands, the text, and what takes its place. Raises LookupError otherwise."""
    texts = {path: path.read_text(encoding="utf-8") for path in sorted((root / "nemo_pivotrl").rglob("*.py"))}
    for find, put in ((mutant["find"], mutant["put"]), mutant.get("before", ("", ""))):
        found = [path for path, text in texts.items() for _ in range(text.count(find) if find else 0)]
        if len(found) == 1:
            return found[0], find, put
    raise LookupError("its text does not stand once in the package: rewrite it in mutants.yaml")


def words(root: Path, tests: str) -> list[str]:
    """pytest's arguments: files are found by their names, wherever they lie."""
    name, _, rest = tests.partition(" ")
    apart = {root / "tests/aligner", root / "tests/vllm"}  # with environments of their own
    (path,) = (path for path in (root / "tests").rglob(name) if not apart & set(path.parents))
    chosen = ["-k", rest.strip()] if rest.strip() else []
    quiet = "ignore::pytest.PytestAssertRewriteWarning"  # of plugins that torch has imported already
    return [str(path), *chosen, "-x", "-q", "-p", "no:cacheprovider", "-W", quiet]


def passes(root: Path, tests: str, log: Path) -> bool:
    """Whether the tests pass, in a fork of this process."""
    pid = os.fork()
    if pid == 0:
        code = 3
        try:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            os.setsid()
            os.chdir(root)
            sys.path.insert(0, str(root))
            os.environ["PYTHONPATH"] = str(root)
            import pytest

            code = int(pytest.main(words(root, tests)))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            if code not in (0, 1, 2, -6, -9, -11):  # 5: no test was chosen
                raise LookupError(f"pytest ended with {code}:\n{log.read_text(errors='replace')[-1500:]}")
            return code == 0
        if time.monotonic() > deadline:  # an endless loop is noticed, too
            os.killpg(pid, 9)
            os.waitpid(pid, 0)
            return False
        time.sleep(0.05)


def first_failure(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    named = [line.split(" - ")[0].split("::", 1)[-1] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    return named[0] if named else (lines[-1] if lines else "no output")


def shares(chosen: list[dict[str, Any]], jobs: int) -> list[list[tuple[int, dict[str, Any]]]]:
    """The mutants with their numbers, for each job: those of the same tests together, as these run once without any fault."""
    groups: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for number, mutant in enumerate(chosen, 1):
        groups.setdefault(mutant["tests"], []).append((number, mutant))
    dealt: list[list[tuple[int, dict[str, Any]]]] = [[] for _ in range(jobs)]
    for group in sorted(groups.values(), key=len, reverse=True):
        min(dealt, key=len).extend(group)
    return dealt


def write(path: Path, text: str) -> None:
    """With a time of its own: what Python has compiled is known by a file's size and second, and a fault can keep both."""
    path.write_text(text, encoding="utf-8")
    second = next(SECONDS)
    os.utime(path, (second, second))


def run(root: Path, chosen: list[tuple[int, dict[str, Any]]]) -> int:
    """Print a line a mutant; the number that no test noticed."""
    left = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy, log = Path(folder, "project"), Path(folder, "log")
        shutil.copytree(root, copy, ignore=LEFT_OUT)
        sound: dict[str, bool] = {}
        for number, mutant in chosen:
            begun, tests = time.monotonic(), mutant["tests"]
            try:
                path, find, put = place(copy, mutant)
                text = path.read_text(encoding="utf-8")
                if tests not in sound:
                    sound[tests] = passes(copy, tests, log)
                if not sound[tests]:
                    raise LookupError(f"its tests fail without it: {first_failure(log)}")
                write(path, text.replace(find, put))
                try:
                    survived = passes(copy, tests, log)
                finally:
                    write(path, text)
                verdict = "SURVIVED" if survived else f"killed by {first_failure(log)}"
            except LookupError as error:
                survived, verdict = True, f"STALE: {error}"
            left += survived
            where = f"{number:2} {mutant['area']:<12} {mutant['fault']}"
            print(f"{where:<95} {verdict}  ({time.monotonic() - begun:.0f} s)", flush=True)
    return left


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=HERE.parents[1])
    parser.add_argument("--only", default="")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--check", action="store_true", help="only look whether each text stands once")
    asked = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HYPOTHESIS_PROFILE": "ci"}
    import yaml

    listed: list[dict[str, Any]] = yaml.safe_load((HERE / "mutants.yaml").read_text(encoding="utf-8"))
    chosen = [m for m in listed if asked.only in f"{m['area']} {m['fault']}"]
    if asked.check:
        wrong = 0
        for mutant in chosen:
            try:
                place(asked.root, mutant), words(asked.root, mutant["tests"])
            except (LookupError, ValueError) as error:
                wrong += 1
                print(f"{mutant['area']} {mutant['fault']}: {error}")
        return min(wrong, 1)
    import hypothesis
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    del hypothesis, AutoModelForCausalLM, AutoTokenizer  # imported for the forks
    torch.set_num_threads(1)
    sys.stdout.flush()
    with ProcessPoolExecutor(asked.jobs, multiprocessing.get_context("fork")) as pool:
        left = sum(pool.map(partial(run, asked.root), shares(chosen, asked.jobs)))
    print(f"{len(chosen)} mutants, {left} not noticed")
    return min(left, 1)


if __name__ == "__main__":
    sys.exit(main())
