"""The candidates file as a profile reads it: by place, a chunk at a time, without ever holding all of it.

One pass finds where each row begins; a row is taken apart only when its candidate is drawn for. A million candidates take 8 MB.
"""

from __future__ import annotations

import heapq
import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nemo_pivotrl.algorithms import selection
from nemo_pivotrl.core.artifacts import read_rows
from nemo_pivotrl.core.atomic import open_input
from nemo_pivotrl.core.errors import InputError, Problem, short
from nemo_pivotrl.core.types import Candidate
from nemo_pivotrl.data.states import States, open_states


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of the candidates file."""

    line: bytes
    candidate_id: str
    trajectory_id: str
    split: str


@dataclass(frozen=True, slots=True)
class Index:
    """Where the rows of a candidates file begin, in chunks of `chunk` of them."""

    path: Path
    seed: int
    chunk: int
    offsets: array[int]
    states: States

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def chunks(self) -> int:
        return -(-len(self.offsets) // self.chunk)

    def place(self, number: int, place: int) -> int:
        """Which candidate the `place`-th of a chunk is."""
        return number * self.chunk + place

    def rows_of(self, number: int) -> int:
        """How many candidates a chunk has."""
        return min(self.chunk, len(self.offsets) - number * self.chunk)

    def read(self, number: int) -> Iterator[Entry]:
        """The rows of a chunk."""
        with self.path.open("rb") as file:
            for offset in self.offsets[number * self.chunk : (number + 1) * self.chunk]:
                file.seek(offset)
                yield entry_of(file.readline(), self.path)

    def candidate(self, line: bytes) -> Candidate:
        """The candidate of a row, with its state."""
        return self.states.candidate(json.loads(line))

    def sample(self, size: int) -> list[Candidate]:
        """So many candidates chosen by hash (0: all), in the file's order."""
        keyed = ((selection.order_key(self.seed, e.candidate_id), n) for n, e in enumerate(self.entries()))
        chosen = {n for _, n in heapq.nsmallest(size, keyed)} if size and size < len(self) else None
        return [self.candidate(e.line) for n, e in enumerate(self.entries()) if chosen is None or n in chosen]

    def entries(self) -> Iterator[Entry]:
        """All rows."""
        for number in range(self.chunks):
            yield from self.read(number)


def index_candidates(path: Path, seed: int, limit: int, chunk: int) -> Index:
    """The index of a candidates artefact; with a `limit`, of so many of each split, chosen by hash. Raises InputError."""
    offsets, keys = array("q"), {"train": array("Q"), "validation": array("Q")}
    states = open_states(path)
    with open_input(path) as file:
        at = len(file.readline())
        for number, line in enumerate(file, start=2):
            offsets.append(at)
            at += len(line)
            if limit:
                entry = entry_of(line, path, number)
                keys[entry.split].append(int(selection.order_key(seed, entry.candidate_id)[:16], 16))
    if limit:
        bounds = {split: sorted(found)[min(limit, len(found)) - 1] for split, found in keys.items() if found}
        whole = Index(path, seed, max(1, len(offsets)), offsets, states)
        chosen = (
            offset
            for offset, e in zip(offsets, whole.read(0), strict=True)
            if int(selection.order_key(seed, e.candidate_id)[:16], 16) <= bounds[e.split]
        )
        offsets = array("q", chosen)
    index = Index(path, seed, chunk, offsets, states)
    marks = array("Q", (hash(entry.candidate_id) & (1 << 64) - 1 for entry in index.entries()))
    ordered = np.sort(np.frombuffer(marks, np.uint64))
    if (ordered[1:] == ordered[:-1]).any():
        for _ in read_rows(path):  # names the ids that come twice
            pass
    return index


def entry_of(line: bytes, path: Path, number: int | None = None) -> Entry:
    """What of a row is needed to plan with it. Raises InputError for a line that is no candidate."""
    try:
        row = json.loads(line)
        if row["split"] not in ("train", "validation"):
            raise ValueError(f"split {row['split']!r}")
        return Entry(line, str(row["candidate_id"]), str(row["trajectory_id"]), row["split"])
    except (ValueError, KeyError, TypeError) as error:
        remedy = f"no candidate ({type(error).__name__}: {error}); run extract again"
        raise InputError(Problem(str(path), number, "line", short(line.decode("utf-8", "replace")), remedy)) from None
