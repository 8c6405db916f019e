"""Static shares: the i-th of n processes does its part of a stage's rows, and `merge` puts the parts together.

A part is an artefact of its own, `NAME.parts/i-of-n.jsonl`, with a header and a seal: the parts of other work, and damaged ones,
are refused like any other artefact.
"""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

from nemo_pivotrl.core.artifacts import ArtefactWriter, Header, header_difference, read_header
from nemo_pivotrl.core.atomic import open_input
from nemo_pivotrl.core.errors import InputError, Problem


@dataclass(frozen=True, slots=True)
class Shard:
    """One of the processes that share a stage's rows."""

    number: int = 0
    of: int = 1

    def __str__(self) -> str:
        """Names its files."""
        return f"{self.number}-of-{self.of}"

    def share(self, parts: int) -> range:
        """Which of so many parts are its own. They are contiguous, so that a trajectory's turns stay together."""
        return range(self.number * parts // self.of, (self.number + 1) * parts // self.of)

    def path(self, whole: Path) -> Path:
        """Where its part of the artefact at `whole` lies."""
        return folder_of(whole) / f"{self}.jsonl"

    def header(self, whole: Header) -> Header:
        """The header of its part."""
        return dataclasses.replace(whole, extra={**whole.extra, "shard": f"{self.number}/{self.of}"})


def shard_of(text: str) -> Shard:
    """`i/n`, with i from 0 to n-1 as Slurm's array tasks count. Raises InputError for anything else."""
    first, slash, second = text.partition("/")
    if slash and first.isascii() and second.isascii() and first.isdigit() and second.isdigit():
        shard = Shard(int(first), int(second))
        if shard.number < shard.of <= 100_000:
            return shard
    remedy = (
        "write i/n with i from 0 to n-1, e.g. --shard 0/8 to --shard 7/8 ($SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT)"
    )
    raise InputError(Problem("command line", None, "--shard", text, remedy))


def folder_of(whole: Path) -> Path:
    """Where the parts of an artefact lie."""
    return whole.with_suffix(".parts")


def shards_there(whole: Path) -> list[Shard]:
    """The shards that have begun, finished or not."""
    found = set()
    for path in folder_of(whole).glob("*-of-*.jsonl*"):
        number, _, of = path.name.partition(".")[0].partition("-of-")
        if number.isdigit() and of.isdigit():
            found.add(Shard(int(number), int(of)))
    return sorted(found, key=lambda shard: (shard.of, shard.number))


def refuse_others(whole: Path, mine: Shard | None) -> None:
    """Raises InputError where shards of another number have begun: no process would do what they leave."""
    others = [shard for shard in shards_there(whole) if mine is None or shard.of != mine.of]
    if others:
        of = others[0].of
        remedy = f"run its shards 0/{of} to {of - 1}/{of}, then nemo-pivotrl merge RECIPE; or remove the folder to drop their work"
        folder = str(folder_of(whole))
        raise InputError(Problem(folder, None, "shards", f"work of {len(others)} shards of {of}", remedy))


def merge_shards(whole: Path, header: Header, begun: Header) -> None:
    """All parts in order as one artefact, by rename; then they go. `begun`: what their headers are made from.

    Raises InputError for what is missing, damaged or of other work.
    """
    folder, there = folder_of(whole), shards_there(whole)
    if not there:
        remedy = "run the shards first: nemo-pivotrl profile RECIPE --shard i/n"
        raise InputError(Problem(str(folder), None, "folder", "no shards", remedy))
    shards = [Shard(number, there[0].of) for number in range(there[0].of)]
    problems: list[Problem] = []
    for shard in shards:
        path, wanted = shard.path(whole), shard.header(begun)
        again = f"nemo-pivotrl profile RECIPE --shard {shard.number}/{shard.of}"
        if not path.exists():
            state = "unfinished" if shard in there else "not begun"
            problems.append(Problem(str(path), None, "shard", state, f"{again}; it goes on where it was. Then merge"))
            continue
        try:
            found = read_header(path, header.stage)
        except InputError as error:
            problems += [dataclasses.replace(p, remedy=f"remove it, then {again}") for p in error.problems]
            continue
        if found.to_line() != wanted.to_line():
            difference = header_difference(found, wanted)
            problems.append(
                Problem(str(path), 1, "header", difference, f"work of another recipe: remove it, then {again}")
            )
    if problems:
        raise InputError(problems)
    with ArtefactWriter(whole, header) as writer:
        for shard in shards:
            with open_input(shard.path(whole)) as file:
                file.readline()
                while lines := file.readlines(1 << 20):
                    writer.write_text(b"".join(lines), len(lines))
        writer.finish()
    shutil.rmtree(folder, ignore_errors=True)
