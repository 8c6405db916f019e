"""What doubles when its input doubles: CPU seconds, and bytes where a stage writes, along every dimension that runs grow in.

    python benchmarks/growth.py              # every case, about two minutes of one processor
    python benchmarks/growth.py turns K      # some of them

A case fails where the last doubling takes more than 2.3 times as long, or writes more than 2.3 times as much: the best of several
tries, since other work on the machine only ever adds. The exit code is the number of cases that fail.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT = 2.3
"""Most that a doubling may cost: 2, and what caches and noise add."""
TRIES = 5
WORDS = [f"word{i}" for i in range(2000)]
TOOL = {
    "type": "function",
    "function": {"name": "find", "parameters": {"type": "object", "properties": {"q": {"type": "string"}}}},
}
Work = Callable[[], int]
"""Does a case's work once; returns the bytes that it wrote, 0 for none."""


@dataclass(frozen=True, slots=True)
class Case:
    """Work at growing sizes. `make(size, folder)` prepares it; what it returns is timed."""

    name: str
    sizes: Sequence[int]
    make: Callable[[int, Path], Work]
    unit: str


# ---- trajectories: extract, and the rendering that sft shares among the turns of one ----


def trajectories(path: Path, count: int, turns: int, words: int, templated: bool = False) -> Path:
    """A file of trajectories. `templated`: all say the same at a turn, but for numbers in every other output: their states are near
    one another, end alike and ask for the same action, so that each is compared with what is left of all."""
    rng = random.Random(0)

    def text(size: int) -> str:
        return " ".join(WORDS[:size] if templated else rng.choices(WORDS, k=size))

    with path.open("w", encoding="utf-8") as file:
        for n in range(count):
            messages: list[dict[str, Any]] = [{"role": "user", "content": text(words)}]
            for k in range(turns):
                function = {"name": "find", "arguments": json.dumps({"q": text(4)})}
                messages.append(
                    {"role": "assistant", "content": "", "tool_calls": [{"id": f"c{k}", "function": function}]}
                )
                numbers = " ".join(str(rng.randrange(10**6)) for _ in range(6)) if templated and k % 2 == 0 else ""
                messages.append({"role": "tool", "tool_call_id": f"c{k}", "content": f"{numbers} {text(words)}"})
            row = {"trajectory_id": f"t{n}", "task_id": f"k{n}", "reward": 1, "tools": [TOOL], "messages": messages}
            file.write(json.dumps(row) + "\n")
    return path


def extracting(folder: Path, **shape: Any) -> Work:
    from nemo_pivotrl.config import Extract, Recipe
    from nemo_pivotrl.pivotrl.extract import extract

    source = trajectories(folder / "in.jsonl", **shape)
    recipe = Recipe(run_dir=str(folder / "run"), extract=Extract(trajectories=(str(source),)))

    def work() -> int:
        with contextlib.redirect_stdout(io.StringIO()):
            path = extract(recipe)
        return sum(made.stat().st_size for made in path.parent.glob("*.jsonl"))

    return work


def merging(size: int, _: Path) -> Work:
    """`size` turns of 2,000 tokens without a common prefix, as where the template writes the date first."""
    from nemo_pivotrl.pivotrl.sft import merge

    rng = random.Random(0)
    examples = [([n, *(rng.randrange(50_000) for _ in range(1900))], [1] * 100) for n in range(size)]

    def work() -> int:
        assert len(merge(examples)) == size
        return 0

    return work


# ---- candidates and K: what reads profiles ----


def profiles(folder: Path, count: int, k: int) -> Path:
    """`profiles.jsonl` of so many candidates with k samples each, half of them always equal."""
    from nemo_pivotrl.core.artifacts import Header, write_artefact
    from nemo_pivotrl.data.states import reference

    folder.mkdir(parents=True, exist_ok=True)
    stored, path = folder / "trajectories.jsonl", folder / "profiles.jsonl"
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}] * 8
    row = {"trajectory_id": "t", "messages": messages, "tools": [], "fields": {}}
    write_artefact(stored, Header("trajectories", "simulated"), [row])
    drawn = {"text": "x" * 40, "tokens": 12, "log_prob": -3.5, "finish_reason": "stop", "category": "EQUAL"}
    action = {"type": "message", "content": "x"}
    rng = random.Random(0)

    def rows() -> Iterator[dict[str, Any]]:
        for n in range(count):
            hits = [float(n % 2 == 0 and rng.random() < 0.5) for _ in range(k)]
            rate = {"pass_rate": sum(hits) / k, "pass_rate_total": k, "pass_rate_passed": int(sum(hits))}
            told = {"tokens_generated": 12 * k, "tokens_prompt": 300, "failure": None, "interval": None}
            yield {
                "candidate_id": f"c{n}",
                "trajectory_id": f"t{n // 8}",
                "task_id": f"k{n // 8}",
                "split": "train",
                "trajectory": 0,
                "turn": 2 * (n % 8) + 1,
                "depth": n % 8,
                "calls": [],
                "num_unique_actions": 1,
                **rate,
                "samples": [drawn | {"reward": hit, "action": action} for hit in hits],
                "profile": told | {"control": False},
            }

    sampled = {"num_generations": k, "sampling": {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 64}}
    header = Header("profiles", "simulated", verifier="none", extra=sampled | reference(stored, path))
    return write_artefact(path, header, rows())


def selecting(count: int, folder: Path, k: int = 8) -> Work:
    """`select` and the profile's statistics over a finished profile."""
    from nemo_pivotrl.algorithms.early_stopping import StoppingRule
    from nemo_pivotrl.config import Recipe, Select, Verifier
    from nemo_pivotrl.pivotrl.profile_statistics import summarise
    from nemo_pivotrl.pivotrl.select import select_pivots

    path = profiles(folder / "run", count, k)
    verifier = Verifier(message="any")
    recipe = Recipe(run_dir=str(path.parent), select=Select(lambda_diff=0.6, undecided="by_rate"), verifier=verifier)

    def work() -> int:
        with contextlib.redirect_stdout(io.StringIO()):
            pivots = select_pivots(recipe, True)
        summarise(path, StoppingRule(k, curtailed=False))
        return pivots.stat().st_size

    return work


def viewing(count: int, folder: Path) -> Work:
    """What `view` reads once, and a page of it."""
    from nemo_pivotrl.report.view_index import listed, open_run

    path = profiles(folder / "run", count, 4)

    def work() -> int:
        run = open_run(path.parent)
        listed(run, {"sort": "rate", "desc": "1", "offset": str(count // 2)})
        return 0

    return work


def indexing(count: int, folder: Path) -> Work:
    """The candidates as a profile finds them, and a sample of them."""
    from nemo_pivotrl.core.artifacts import Header, read_header, read_rows, write_artefact
    from nemo_pivotrl.pivotrl.candidate_index import index_candidates

    source = profiles(folder / "run", count, 1)
    path, told = source.with_name("candidates.jsonl"), read_header(source, "profiles").extra
    write_artefact(path, Header("candidates", "c", extra={"trajectories": told["trajectories"]}), read_rows(source))

    def work() -> int:
        index_candidates(path, 0, count // 2, 64).sample(256)
        return 0

    return work


def stopping(k: int, _: Path) -> Work:
    """The stopping rule of K rollouts, and candidates drawn by it."""
    from nemo_pivotrl.algorithms.early_stopping import StoppingRule

    def work() -> int:
        plan, rng = StoppingRule(k, lambda_low=0.6, lambda_high=0.6), random.Random(0)
        for _ in range(8000):
            rate, rewards = rng.random(), list[float]()
            while asked := plan.ask(rewards):
                rewards += [float(rng.random() < rate) for _ in range(asked)]
        return 0

    return work


# ---- vocabulary and sequences ----


def drawing(vocabulary: int, _: Path) -> Work:
    """Tokens drawn by top-p, and the log-probabilities and gradients of as many, in chunks."""
    import torch

    from nemo_pivotrl.backends.sampling import draw
    from nemo_pivotrl.config import Generation

    torch.manual_seed(0)
    logits, uniform = torch.randn(32, vocabulary), torch.rand(32, dtype=torch.float64)
    settings = Generation(temperature=0.8, top_p=0.9)

    def work() -> int:
        for _ in range(4):
            draw(logits, uniform, settings)
        return 0

    return work


def laying_out(rows: int, _: Path) -> Work:
    """Samples of one prompt of 1,000 tokens as a prefix tree."""
    from nemo_pivotrl.algorithms.prefix_tree import lay_out

    rng = random.Random(0)
    prompt = [rng.randrange(50_000) for _ in range(1000)]
    responses = [[rng.randrange(50_000) for _ in range(100)] for _ in range(rows)]

    def work() -> int:
        lay_out(range(rows), [prompt] * rows, responses)
        return 0

    return work


CASES = [
    Case("turns", (40, 80, 160, 320), lambda n, f: extracting(f, count=40, turns=n, words=40), "turns a trajectory"),
    Case("length", (250, 500, 1000, 2000), lambda n, f: extracting(f, count=80, turns=10, words=n), "words a message"),
    Case("trajectories", (50, 100, 200, 400), lambda n, f: extracting(f, count=n, turns=20, words=40), "trajectories"),
    Case(
        "near-duplicates",
        (200, 400, 800, 1600),
        lambda n, f: extracting(f, count=n, turns=10, words=40, templated=True),
        "templated trajectories",
    ),
    Case("merge", (400, 800, 1600, 3200), merging, "turns without a common prefix"),
    Case("candidates", (2500, 5000, 10000, 20000), selecting, "candidates"),
    Case("K", (8, 16, 32, 64), lambda n, f: selecting(2500, f, n), "samples a candidate"),
    Case("forest", (500, 1000, 2000, 4000), laying_out, "samples of a prompt in a prefix tree"),
    Case("stopping", (16, 32, 64, 128), stopping, "rollouts at most"),
    Case("index", (10000, 20000, 40000, 80000), indexing, "candidates"),
    Case("view", (10000, 20000, 40000, 80000), viewing, "candidates"),
    Case("vocabulary", (32768, 65536, 131072, 262144), drawing, "tokens of the vocabulary"),
]


def measure(case: Case, tries: int = TRIES) -> list[tuple[int, float, int]]:
    """(size, CPU seconds, bytes) of each size. Sizes are tried in turn until the last doubling is below the limit."""
    with tempfile.TemporaryDirectory() as folder:
        works = []
        for size in case.sizes:
            place = Path(folder, str(size))
            place.mkdir()
            works.append(case.make(size, place))
        best, written = [float("inf")] * len(works), [0] * len(works)
        for tried in range(tries):
            for i, work in enumerate(works):
                started = time.process_time()
                written[i] = work()
                best[i] = min(best[i], time.process_time() - started)
            if tried > 1 and best[-1] <= LIMIT * best[-2]:
                break
    return list(zip(case.sizes, best, written, strict=True))


def problem(found: Sequence[tuple[int, float, int]]) -> str:
    """What grows too fast in the last doubling; '' where nothing does."""
    (_, before, small), (_, after, large) = found[-2:]
    told = [f"{after / before:.2f}x the seconds"] if after > LIMIT * before else []
    return ", ".join(told + ([f"{large / small:.2f}x the bytes"] if large > LIMIT * small else []))


def shown(case: Case, found: Sequence[tuple[int, float, int]]) -> str:
    """A line of the table."""
    sizes, seconds, written = zip(*found, strict=True)
    parts = [f"{case.name:<16}", f"{' / '.join(map(str, sizes)):<32}", " / ".join(f"{s:.2f}" for s in seconds)]
    parts += [f"({seconds[-1] / seconds[-2]:.2f}x)"]
    if written[-1]:
        parts += [", MiB " + " / ".join(f"{n / 2**20:.1f}" for n in written) + f" ({written[-1] / written[-2]:.2f}x)"]
    wrong = problem(found)
    return " ".join(parts) + (f"  TOO FAST: {wrong}" if wrong else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help=", ".join(case.name for case in CASES))
    wanted = parser.parse_args().cases
    chosen = [case for case in CASES if not wanted or case.name in wanted]
    if unknown := set(wanted) - {case.name for case in CASES}:
        parser.error(f"no case {sorted(unknown)[0]!r}; there are: {', '.join(case.name for case in CASES)}")
    failed = 0
    for case in chosen:
        found = measure(case)
        print(shown(case, found), flush=True)
        failed += bool(problem(found))
    print(f"{failed} of {len(chosen)} cases grow by more than {LIMIT}x a doubling")
    return failed


if __name__ == "__main__":
    sys.exit(main())
