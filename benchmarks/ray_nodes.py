"""A map on a real Ray cluster on this machine: what a second node gains, and what kills do.

    python benchmarks/ray_nodes.py --speed       # rollouts a second on one node and on two; the sampler sleeps
    python benchmarks/ray_nodes.py --kills 50    # SIGKILL to actors, to the raylet of a node and to the driver, in turn
    python benchmarks/ray_nodes.py --kills 9 --stages all     # of each stage, on tiny models; or --stages rank,reward

Everything but the sampler is real: the driver, its journal, actors, their restarts, waves that depend on the results before them.
With --stages everything is.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a server that forks has one thread

import torch
from map_kills import STAGES, digest, recipe_of, run_folder, silence

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from support.processes import Process, python  # noqa: E402
from support.ray_cluster import TwoNodes  # noqa: E402
from support.ray_driver import run  # noqa: E402

ITEMS, SECONDS = 300, 0.1
ROLLOUTS = sum(n % 3 + 1 for n in range(ITEMS))


def seconds_of(nodes: TwoNodes, folder: Path, workers: int) -> float:
    """Seconds of a run from its first result to its last, so that the start of Python counts on neither side."""
    driver, journal = nodes.start(folder, workers, ITEMS, SECONDS), folder / "decoded.jsonl.journal"
    begun = 0.0
    while driver.poll() is None:
        there = len(list((folder / "workers").glob("*"))) if (folder / "workers").exists() else 0
        if not begun and there >= workers and journal.exists() and journal.read_bytes().count(b" s "):
            begun = time.monotonic()
        time.sleep(0.005)
    assert driver.returncode == 0 and begun
    return time.monotonic() - begun


def speed() -> None:
    """A table: actors on one node and on two, each node with room for two of them."""
    times = {}
    with TwoNodes() as nodes, tempfile.TemporaryDirectory() as place:
        nodes.kill_second()
        for label, workers in (("one node", 2), ("two nodes", 4)):
            if label == "two nodes":
                nodes.add_second()
            folder = Path(place, label.replace(" ", "-"))
            folder.mkdir()
            times[label] = seconds_of(nodes, folder, workers)
    print("| nodes | actors | rollouts/s |\n|---|---|---|")
    for label, workers in (("one node", 2), ("two nodes", 4)):
        print(f"| {label} | {workers} | {ROLLOUTS / times[label]:.1f} |")
    print(f"two nodes against one: {times['one node'] / times['two nodes']:.2f}x; a rollout sleeps {SECONDS} s")


def kills(wanted: int, seed: int) -> None:
    """Run after run with kills in it. Exits with 1 where a run ends with other bytes than one process writes."""
    rng, counts, runs = random.Random(seed), Counter[str](), 0
    with TwoNodes() as nodes, tempfile.TemporaryDirectory() as place:
        (Path(place) / "here").mkdir()
        whole = run(f"{place}/here", "here", 1, ITEMS, 0.0).read_bytes()
        while counts.total() < wanted:
            folder = Path(place, f"run-{runs}")
            folder.mkdir()
            driver = nodes.start(folder, 3, ITEMS, SECONDS)
            while driver.poll() is None:
                time.sleep(rng.uniform(0.3, 2.5))
                if driver.poll() is None and counts.total() < wanted:
                    driver = one_kill(nodes, folder, driver, rng, counts)
            if driver.returncode or (folder / "decoded.jsonl").read_bytes() != whole:
                raise SystemExit(
                    f"run {runs}: exit code {driver.returncode} after {dict(counts)}: {folder / 'driver.log'}"
                )
            runs += 1
    print(
        f"{counts.total()} kills ({', '.join(f'{n} {kind}s' for kind, n in counts.items())}); {runs} runs, all the same bytes"
    )


def one_kill(
    nodes: TwoNodes, folder: Path, driver: subprocess.Popen[bytes], rng: random.Random, counts: Counter[str]
) -> subprocess.Popen[bytes]:
    """Kill something; the driver that goes on."""
    kind = rng.choices(("actor", "driver", "node"), (6, 2, 1))[0]
    alive = [int(p.name) for p in (folder / "workers").glob("*") if Path("/proc", p.name).exists()]
    if kind == "actor" and not alive:
        return driver
    counts[kind] += 1
    if kind == "actor":
        os.kill(rng.choice(alive), signal.SIGKILL)
    elif kind == "node":
        nodes.kill_second()
        nodes.add_second()
    else:
        driver.kill()
        driver.wait()
        return nodes.start(folder, 3, ITEMS, SECONDS)
    return driver


# ---- stages ----


def stage_kills(names: list[str], wanted: int, seed: int, kept: str) -> None:
    """Print for each stage what was killed. Exits with 1 where one ends with other bytes than a run without Ray.

    `kept`: a folder for the stages' input, which a later run finds there."""
    torch.set_num_threads(1)
    with contextlib.nullcontext(kept) if kept else tempfile.TemporaryDirectory() as place:
        here = {}
        for name in names:
            stage, folder = STAGES[name], run_folder(Path(place), STAGES[name].algorithm)
            path = folder / stage.artefact
            path.unlink(missing_ok=True)
            with silence():
                stage.run(stage.smaller(recipe_of(stage.algorithm, folder, stage.settings)))
            here[name] = digest(path), path.stat().st_size
        with TwoNodes() as nodes:
            for name in names:
                one_stage(nodes, name, Path(place, STAGES[name].algorithm), *here[name], wanted, seed)


def one_stage(nodes: TwoNodes, name: str, folder: Path, whole: str, size: int, wanted: int, seed: int) -> None:
    """Actor, driver and node in turn, each when the journal has grown past a random place."""
    rng, counts, runs = random.Random(f"{seed} {name}"), Counter[str](), 0
    path, log = folder / STAGES[name].artefact, folder / "driver.log"
    journal, kinds = path.with_name(path.name + ".journal"), ("actor", "driver", "node")
    begin = partial(
        python, __file__, "--one", name, "--folder", str(folder), "--address", nodes.cluster.address, out=log
    )
    start = time.monotonic()
    while counts.total() < wanted:
        path.unlink(missing_ok=True)
        driver = begin()
        while counts.total() < wanted and grown(driver, journal, rng.randrange(size)):
            kind = kinds[counts.total() % len(kinds)]
            if kind == "driver":
                driver.kill()
                driver = begin()
            elif kind == "node":
                nodes.kill_second()
                nodes.add_second()
            elif actors := nodes.actors():
                os.kill(rng.choice(actors), signal.SIGKILL)
            else:
                continue
            counts[kind] += 1
        if driver.wait() or digest(path) != whole:
            raise SystemExit(f"{name}: exit code {driver.returncode} after {dict(counts)}:\n{driver.printed()[-2000:]}")
        runs += 1
    killed = ", ".join(f"{n} {kind}s" for kind, n in counts.items())
    print(f"{name}: {killed}; {runs} runs ended, all the same bytes; {time.monotonic() - start:.0f} s", flush=True)


def grown(driver: Process, journal: Path, size: int) -> bool:
    """Wait until the journal has so many bytes; False where the driver ended before."""
    while driver.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            if journal.stat().st_size >= size:
                return True
        time.sleep(0.002)
    return False


def one(name: str, folder: str, address: str) -> None:
    """The driver of a stage."""
    there = (*STAGES[name].settings, "executor=ray", "workers=2", f"ray.address={address}")
    os.environ["RAY_ADDRESS"] = address  # for verify, which has no recipe
    STAGES[name].run(STAGES[name].smaller(recipe_of(STAGES[name].algorithm, Path(folder), there)))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", default="", help="all, or names with commas between them")
    parser.add_argument("--keep", default="", metavar="FOLDER", help="keep the stages' input there for another run")
    for word in ("--one", "--folder", "--address"):
        parser.add_argument(word, default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(options.one, options.folder, options.address)
    if options.speed:
        speed()
    if options.kills and options.stages:
        names = list(STAGES) if options.stages == "all" else options.stages.split(",")
        stage_kills(names, options.kills, options.seed, options.keep)
    elif options.kills:
        kills(options.kills, options.seed)


if __name__ == "__main__":
    main()
