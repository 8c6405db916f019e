"""Sums that are remembered: never those of other bytes, and never at the price of an error."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from nemo_pivotrl.core import known_sums
from nemo_pivotrl.core.atomic import file_sum


@pytest.fixture
def reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose bytes were read; the cache is empty, and small and young files are remembered, too."""
    found: list[Path] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(known_sums, "SMALLEST", 1)
    monkeypatch.setattr(known_sums, "SETTLED_S", -1.0)
    monkeypatch.setattr(known_sums, "file_sum", lambda path: [found.append(path), file_sum(path)][1])
    return found


def test_a_file_that_nobody_touched_is_read_once(tmp_path: Path, reads: list[Path]) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    assert known_sums.known_sum(path) == known_sums.known_sum(path) == file_sum(path)
    assert reads == [path]


def test_other_bytes_are_read_although_size_and_time_of_writing_are_as_before(
    tmp_path: Path, reads: list[Path]
) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    before, first = path.stat(), known_sums.known_sum(path)
    path.write_bytes(b"two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_size == before.st_size
    assert known_sums.known_sum(path) == file_sum(path) != first
    other = tmp_path / "other"
    other.write_bytes(b"six")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)
    assert known_sums.known_sum(path) == file_sum(path)
    assert len(reads) == 3


@pytest.mark.parametrize("note", ["", "[]", "{}", '{"seen": 3, "sha256": "ab"}', "\x00\xff"])
def test_a_damaged_note_or_no_place_for_notes_costs_a_reading_and_no_more(
    tmp_path: Path, reads: list[Path], note: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    known_sums.known_sum(path)
    (kept,) = known_sums.cache_folder().iterdir()
    assert json.loads(kept.read_text())["path"] == str(path)
    kept.write_text(note)
    assert known_sums.known_sum(path) == file_sum(path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))  # a file, no folder
    assert known_sums.known_sum(path) == file_sum(path)
    assert len(reads) == 3


def test_a_file_that_was_just_written_is_not_remembered(
    tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_sums, "SETTLED_S", 60.0)
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    assert known_sums.known_sum(path) == known_sums.known_sum(path)
    assert len(reads) == 2
