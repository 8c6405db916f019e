"""A profile in the making: chunks of candidates, which process works on which, and what is done of each.

`profiles.parts/` holds `header.json`, which says what all of it belongs to, and of each chunk
- `000017.claim`: whose it is. The owner touches it; one that was not touched for long may be taken over.
- `000017.SHARD.part`: rollouts as they are judged, one line a round. A line that a kill tore is not there.
- `000017.jsonl`: the finished rows, by rename; its first line counts them and has their checksum.

Any number of processes on any number of machines may work in the folder, as long as they share it, each as another shard: two of
one shard would write the same journals, which the run folder's lock forbids (`core/lock.py`). A round is a fact, whoever
draws it: the same seeds give the same samples, and the second record of a rollout is ignored, so nothing can be counted twice.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import threading
import time
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_pivotrl.core.artifacts import Header, canonical_json, header_difference, json_line
from nemo_pivotrl.core.atomic import create, open_input, rename, replacing, settle, write_atomically
from nemo_pivotrl.core.errors import InputError, Problem, short

SYNC_S = 5.0
"""Seconds between two fsyncs of a journal: what a power cut may cost. A killed process loses nothing that was written."""
UNKNOWN = {"fault": "not drawn"}
TOUCH_S = 20.0
"""Seconds between two touches of the claims of a living process."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One of the processes that share a profile."""

    number: int = 0
    of: int = 1

    def __str__(self) -> str:
        """Names its files: the same place among other numbers of shards is another process."""
        return f"{self.number}-of-{self.of}"

    def first(self, chunks: int) -> int:
        """The chunk its share begins with; the share is contiguous, so that a trajectory's turns stay together."""
        return self.number * chunks // self.of

    def last(self, chunks: int) -> int:
        """The chunk after its share."""
        return (self.number + 1) * chunks // self.of


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


class ShardStore:
    """The folder of one profile, as one shard sees it. Raises InputError where it holds another recipe's work."""

    def __init__(
        self, folder: Path, header: Header, chunks: int, shard: Shard, steal_after_s: float, fresh: bool = False
    ):
        self.folder, self.chunks, self.shard, self.steal_after_s = folder, chunks, shard, steal_after_s
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        self._belongs(header)
        self._mine: set[int] = set()
        self._next = shard.first(chunks)
        self._name = canonical_json(
            {"shard": shard.number, "of": shard.of, "host": socket.gethostname(), "pid": os.getpid()}
        )
        self._closing = threading.Event()
        threading.Thread(target=self._touch, daemon=True).start()

    def _belongs(self, header: Header) -> None:
        path, line = self.folder / "header.json", header.to_line().encode()
        if not path.exists():
            own = path.with_name(f"header-{self.shard}.json")
            write_atomically(own, line.decode())
            with contextlib.suppress(FileExistsError):  # another shard was quicker
                os.link(own, path)
            own.unlink()
        found = path.read_bytes()
        if found != line:
            remedy = "unfinished work of another recipe or input; finish it with its own recipe, or add fresh=true to drop it"
            raise InputError(Problem(str(path), 1, "header", short(header_difference(found, line)), remedy))

    def close(self) -> None:
        """Stop the heart-beat and free this shard's unfinished chunks for others."""
        self._closing.set()
        for number in list(self._mine):
            self._path(number, "claim").unlink(missing_ok=True)

    def remove(self) -> None:
        """Drop the folder, when all of it is merged."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    # ---- who works on what ----

    def claim(self) -> int | None:
        """The next chunk to work on: this shard's own share in order, then the last free chunk of the slowest shard, then chunks
        of dead processes. None if living processes work on all that is left."""
        while self._next < self.shard.last(self.chunks):
            self._next += 1
            if not self.finished(self._next - 1) and self._take(self._next - 1):
                return self._next - 1
        there = {int(name[:6]) for name in os.listdir(self.folder) if name.endswith(".jsonl")} | self._mine
        free = [n for n in range(self.chunks) if n not in there]
        shares = [Shard(number, self.shard.of) for number in range(self.shard.of)]
        held = [[n for n in free if s.first(self.chunks) <= n < s.last(self.chunks)] for s in shares]
        for number in [n for share in sorted(held, key=len, reverse=True) for n in reversed(share)]:
            if self._take(number):
                return number
        return None

    def _take(self, number: int) -> bool:
        path = self._path(number, "claim")
        for _ in range(2):
            try:
                handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            except FileExistsError:
                if not self._deserted(path):
                    return False
                with contextlib.suppress(FileNotFoundError):  # another shard was quicker
                    os.rename(path, path.with_suffix(f".left-to-{self.shard}"))
                continue
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(self._name)
            path.with_suffix(f".left-to-{self.shard}").unlink(missing_ok=True)
            if not self.finished(number):
                self._mine.add(number)
                return True
            path.unlink(missing_ok=True)  # its owner ended between our two looks
            return False
        return False

    def _deserted(self, path: Path) -> bool:
        """Whether a claim is our own earlier self's, or was not touched for long by the clock of the file system."""
        try:
            owner, touched = json.loads(path.read_text(encoding="utf-8") or "{}"), path.stat().st_mtime
        except (FileNotFoundError, ValueError):
            return False
        if (owner.get("shard"), owner.get("of")) == (self.shard.number, self.shard.of):
            return True
        clock = self.folder / f"shard-{self.shard}.clock"
        clock.touch()
        return clock.stat().st_mtime - touched > self.steal_after_s

    def _touch(self) -> None:
        while not self._closing.wait(min(TOUCH_S, self.steal_after_s / 4)):
            for number in list(self._mine):
                with contextlib.suppress(FileNotFoundError):
                    os.utime(self._path(number, "claim"))

    def held_by_others(self) -> dict[int, str]:
        """Unfinished chunks and who works on them."""
        held = {}
        for number in range(self.chunks):
            path = self._path(number, "claim")
            if number not in self._mine and not self.finished(number):
                with contextlib.suppress(FileNotFoundError, ValueError):
                    owner = json.loads(path.read_text(encoding="utf-8"))
                    held[number] = f"shard {owner['shard']}/{owner['of']} on {owner['host']}"
        return held

    # ---- what is done ----

    def finished(self, number: int) -> bool:
        """Whether a chunk's rows are there."""
        return self._path(number, "jsonl").exists()

    def missing(self) -> list[int]:
        """Chunks whose rows are not there."""
        return [n for n in range(self.chunks) if not self.finished(n)]

    def journal(self, number: int) -> Journal:
        """The chunk's rollouts so far, of all shards, open for more."""
        found: dict[tuple[int, int], dict[str, Any]] = {}
        rounds = []
        for path in sorted(self.folder.glob(f"{number:06d}.*.part")):
            with open_input(path) as file:
                lines = file.read().splitlines(keepends=True)
            for line in lines:
                if not line.endswith(b"\n"):
                    continue
                # one that was drawn may be there again with its verdict; after that nothing can change it
                rollouts = [(c, k, row) for c, k, row in json.loads(line) if "fault" in found.get((c, k), UNKNOWN)]
                found |= {(c, k): row for c, k, row in rollouts}
                if rollouts:
                    rounds.append(json_line(rollouts))
        path = self._path(number, f"{self.shard}.part")
        with replacing(path) as file:
            file.writelines(rounds)
        return Journal(path, found)

    def publish(self, number: int, rows: Sequence[bytes], ids: str) -> None:
        """Make a chunk's rows (each a line) its result. `ids` is the digest of its candidates' ids."""
        head = {"chunk": number, "rows": len(rows), "ids": ids, "crc": zlib.crc32(b"".join(rows))}
        part = self._path(number, f"{self.shard}.done")
        with create(part) as file:
            file.write(json_line(head))
            file.writelines(rows)
            settle(file)
        if self.finished(number):  # one that we took for dead was not
            part.unlink()
        else:
            rename(part, self._path(number, "jsonl"))
        for journal in self.folder.glob(f"{number:06d}.*.part"):
            journal.unlink(missing_ok=True)
        self._path(number, "claim").unlink(missing_ok=True)
        self._mine.discard(number)

    def rows(self, number: int, count: int, ids: str) -> list[bytes]:
        """The lines of a finished chunk. Raises InputError for one that is cut, changed, or of other candidates."""
        path = self._path(number, "jsonl")
        with open_input(path) as file:
            head, *rows = file.read().splitlines(keepends=True) or [b""]
        expected = {"chunk": number, "rows": count, "ids": ids, "crc": zlib.crc32(b"".join(rows))}
        try:
            wrong = [key for key, value in expected.items() if json.loads(head).get(key) != value]
        except (ValueError, AttributeError):
            wrong = ["first line"]
        if wrong or len(rows) != count:
            remedy = "the file is damaged: remove it, and profile again; all other chunks are kept"
            raise InputError(Problem(str(path), 1, ", ".join(wrong) or "rows", f"{len(rows)} rows", remedy))
        return rows

    def _path(self, number: int, what: str) -> Path:
        return self.folder / f"{number:06d}.{what}"


class Journal:
    """The rollouts of a chunk, appended a round at a time."""

    def __init__(self, path: Path, found: dict[tuple[int, int], dict[str, Any]]):
        self.found = found
        """What was there: (candidate's place in the chunk, k) to its row."""
        self._file = path.open("ab")
        self._synced = time.monotonic()

    def write(self, rollouts: Iterable[tuple[int, int, bytes]]) -> None:
        """Append one round: (candidate's place, k, row as JSON) of each. It is there as a whole or not at all."""
        line = b"[" + b",".join(b"[%d,%d,%b]" % rollout for rollout in rollouts) + b"]\n"
        try:
            self._file.write(line)
            self._file.flush()
            if time.monotonic() - self._synced > SYNC_S:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        except OSError:
            with contextlib.suppress(OSError):
                self._file.close()  # now, or its buffer would reach the file at some later time
            raise

    def close(self) -> None:
        """Nothing more comes."""
        self._file.close()
