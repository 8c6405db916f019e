"""What a map has done so far: one file, to which its one writer appends records as they come, in any order.

The first line says what the work belongs to. A record is a line `ITEM KIND SIZE ROWS BYTES CRC` and that many bytes after it. KIND
is `s` for a step of an item that goes on, `d` for a finished item's rows. A record that a kill cut off was never written.
"""

from __future__ import annotations

import contextlib
import os
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

from nemo_pivotrl.core.artifacts import header_difference, read_first_line
from nemo_pivotrl.core.atomic import create, reopen
from nemo_pivotrl.core.errors import InputError, Problem, short

SYNC_S = 5.0
"""Seconds between two fsyncs: what a power cut may cost. A killed process loses nothing that was written."""
STEP, DONE = b"s", b"d"
MAX_LINE = 200


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record's bytes lie, and what its line says of them."""

    at: int
    length: int
    size: int
    """Units of progress that the item is worth."""
    rows: int


class Journal:
    """The journal at `path`, opened for more. Raises InputError where it belongs to other work, or is damaged."""

    def __init__(self, path: Path, belongs: bytes, fresh: bool = False):
        self.path = path
        self.done: dict[int, Place] = {}
        """Finished items."""
        self.steps: dict[int, list[Place]] = {}
        """Steps of items that were not finished when the journal was opened."""
        resumed = not fresh and os.path.lexists(path)
        self._handle = reopen(path) if resumed else create(path)
        self._synced = time.monotonic()
        try:
            if not (resumed and self._resume(belongs)):
                self._handle.truncate(0)
                self._handle.seek(0)
                self._write(belongs)
            self._reader = path.open("rb")
        except BaseException:
            self._handle.close()
            raise

    def _resume(self, belongs: bytes) -> bool:
        """Find the records, and cut the file after the last whole one. False where there is nothing."""
        first = self._handle.readline(1 << 24)
        if not first.endswith(b"\n"):
            return False
        begun = bool(self._handle.read(1))
        self._handle.seek(len(first))
        same, told = _compared(first, belongs)
        if not same and not begun:
            return False
        if not same:
            remedy = "unfinished work of another recipe or input; finish it with its own recipe, or add fresh=true to drop it"
            raise InputError(Problem(str(self.path), 1, "header", told, remedy))
        end = self._handle.tell()
        while (line := self._handle.readline(MAX_LINE)).endswith(b"\n"):
            try:
                number, kind, size, rows, length, crc = line.split()
                place = Place(end + len(line), int(length), int(size), int(rows))
                payload = self._handle.read(place.length)
                if len(payload) < place.length:
                    break
                if int(crc) != _crc(int(number), kind, place.size, place.rows, payload):
                    raise ValueError("other bytes than were written")
            except ValueError as error:
                found = f"damaged from byte {end} on ({short(str(error))})"
                remedy = f"truncate -s {end} {self.path}, then run the same command again: only what comes after is done anew"
                raise InputError(Problem(str(self.path), None, "record", found, remedy)) from None
            end = place.at + place.length
            self._note(int(number), kind, place)
        self._handle.truncate(end)
        self._handle.seek(end)
        return True

    def _note(self, number: int, kind: bytes, place: Place) -> None:
        if kind == DONE:
            self.done[number] = place
            self.steps.pop(number, None)
        else:
            self.steps.setdefault(number, []).append(place)

    def step(self, number: int, payload: bytes) -> None:
        """Keep a step of an item. It is there as a whole or not at all. Raises OSError."""
        self._write(_line(number, STEP, 0, 0, payload), payload)

    def finish(self, number: int, payload: bytes, rows: int, size: int) -> None:
        """Keep a finished item: its rows, as lines. Raises OSError."""
        line = _line(number, DONE, size, rows, payload)
        at = self._handle.tell() + len(line)
        self._write(line, payload)
        self._note(number, DONE, Place(at, len(payload), size, rows))

    def read(self, place: Place) -> bytes:
        """The bytes of a record."""
        self._reader.seek(place.at)
        return self._reader.read(place.length)

    def _write(self, *parts: bytes) -> None:
        try:
            self._handle.write(b"".join(parts))
            self._handle.flush()
            if time.monotonic() - self._synced > SYNC_S:
                os.fsync(self._handle.fileno())
                self._synced = time.monotonic()
        except OSError:
            self.close()  # now, or its buffer would reach the file at some later time
            raise

    def close(self) -> None:
        """Nothing more comes; the file stays for a later resume."""
        with contextlib.suppress(OSError):
            self._handle.close()
        if reader := getattr(self, "_reader", None):
            reader.close()


def _compared(first: bytes, belongs: bytes) -> tuple[bool, str]:
    """(whether two first lines stand for the same work, what differs)."""
    if first == belongs:
        return True, ""
    try:
        found, wanted = read_first_line(first)[0], read_first_line(belongs)[0]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False, short(first[:1000].decode("utf-8", "replace"))
    return found.to_line() == wanted.to_line(), header_difference(found, wanted)


def _crc(number: int, kind: bytes, size: int, rows: int, payload: bytes) -> int:
    return zlib.crc32(payload, zlib.crc32(b"%d %b %d %d" % (number, kind, size, rows)))


def _line(number: int, kind: bytes, size: int, rows: int, payload: bytes) -> bytes:
    crc = _crc(number, kind, size, rows, payload)
    return b"%d %b %d %d %d %d\n" % (number, kind, size, rows, len(payload), crc)
