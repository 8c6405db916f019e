"""The records of a file: JSON lines, a JSON list, one object (also indented), Parquet, Arrow; gzip and zstd by their first bytes."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from nemo_pivotrl.core.errors import Problem, short
from nemo_pivotrl.data.readers.shapes import is_chat

GZIP, ZSTD, PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
ARROW = (b"ARROW1", b"\xff\xff\xff\xff")
"""An Arrow file, and an Arrow stream as `datasets` keeps it."""
UTF16 = (b"\xff\xfe", b"\xfe\xff")
LFS_POINTER = b"version https://git-lfs"
NEEDS_PYARROW = "pip install 'nemo-pivotrl[tables]' (pyarrow), or {other}"


class _Unreadable(Exception):
    """The whole file cannot be read: what stands there and what to do."""

    def __init__(self, found: str, remedy: str, line: int | None = None, field: str = "file"):
        super().__init__(found)
        self.found, self.remedy, self.line, self.field = found, remedy, line, field


def read_records(path: Path, problems: list[Problem], setting: str) -> Iterator[tuple[int, Any]]:
    """(line, element or row number, record) of every record of a file.

    What cannot be read goes to `problems`; `setting` is the recipe's name for the path. Headers of our own artefacts are
    left out.
    """
    try:
        for number, record in _records(path, problems, setting):
            if not (isinstance(record, dict) and "nemo_pivotrl" in record):
                yield number, record
    except _Unreadable as error:
        problems.append(Problem(str(path), error.line, error.field, error.found, error.remedy))
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        problems.append(Problem(str(path), None, "file", "broken gzip", f"{error}; fetch it again"))
    except OSError as error:
        problems.append(Problem(str(path), None, "file", "cannot be read", f"{error}; fetch it again"))


def _records(path: Path, problems: list[Problem], setting: str) -> Iterator[tuple[int, Any]]:
    if not path.exists():
        raise _Unreadable(str(path), "no such file", field=setting)
    if not path.is_file():
        raise _Unreadable(str(path), "no plain file; name the files of a folder one by one", field=setting)
    with path.open("rb") as handle:
        magic = handle.read(len(LFS_POINTER))
    if magic.startswith(PARQUET):
        yield from _parquet_rows(path)
        return
    if magic.startswith(ARROW):
        yield from _arrow_rows(path, magic)
        return
    if magic == LFS_POINTER:
        raise _Unreadable("a Git LFS pointer, not the file itself", "run `git lfs pull` where it came from")
    with _opened(path, magic) as handle:
        if magic.startswith(UTF16):  # what PowerShell's `>` writes
            try:
                handle = io.BytesIO(handle.read().decode("utf-16").encode())
            except UnicodeError as error:
                raise _Unreadable("broken UTF-16", f"{error}; write it as UTF-8") from None
        yield from _json_records(path, handle, problems)


def _opened(path: Path, magic: bytes) -> IO[bytes]:
    if magic.startswith(GZIP) or path.suffix == ".gz":
        return gzip.open(path)
    if magic.startswith(ZSTD):
        try:
            import pyarrow
        except ImportError:
            remedy = NEEDS_PYARROW.format(other="decompress it with `zstd -d`")
            raise _Unreadable("a zstd file, and no pyarrow to read it with", remedy) from None
        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        remedy = NEEDS_PYARROW.format(other="export it as JSON lines (`to_json` of a datasets.Dataset)")
        raise _Unreadable("a Parquet file, and no pyarrow to read it with", remedy) from None
    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except pyarrow.ArrowException as error:
        raise _Unreadable("broken Parquet", f"{short(str(error))}; fetch it again") from None


def _arrow_rows(path: Path, magic: bytes) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError:
        remedy = NEEDS_PYARROW.format(other="export it as JSON lines (`to_json` of a datasets.Dataset)")
        raise _Unreadable("an Arrow file, and no pyarrow to read it with", remedy) from None
    opened = pyarrow.ipc.open_file if magic.startswith(ARROW[0]) else pyarrow.ipc.open_stream
    try:
        number = 0
        with pyarrow.memory_map(str(path)) as source, opened(source) as table:
            batches = (
                table if opened is pyarrow.ipc.open_stream else map(table.get_batch, range(table.num_record_batches))
            )
            for batch in batches:
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except pyarrow.ArrowException as error:
        raise _Unreadable("broken Arrow", f"{short(str(error))}; fetch it again") from None


def _json_records(path: Path, handle: IO[bytes], problems: list[Problem]) -> Iterator[tuple[int, Any]]:
    """JSON lines where the first line is a record of its own, or any later one is; else one JSON text, or several."""
    lines, first = enumerate(handle, start=1), b""
    for number, line in lines:
        first = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if first.strip():
            break
    if not first.strip():
        return
    whole = first.lstrip()[:1] == b"[" or _parsed(first) is _BROKEN
    if whole:
        rest = [first, *(line for _, line in lines)]
        records = _whole(rest)
        if records is not None:
            yield from enumerate(records, start=1)
            return
        lines = enumerate(rest[1:], start=number + 1)
    yield from _lines([(number, first)], path, problems)
    yield from _lines(lines, path, problems)


def _whole(lines: list[bytes]) -> list[Any] | None:
    """The records of a file that is one JSON text or a row of them; None where it is JSON lines, some of them broken.

    Raises _Unreadable where it is neither.
    """
    text = b"".join(lines)
    try:
        return _listed(json.loads(text))
    except RecursionError:
        raise _Unreadable("broken JSON", "nested too deeply; mend or drop the file") from None
    except ValueError as error:
        full = [line for line in lines if line.strip()]
        if 2 * sum(isinstance(_parsed(line), (dict, list)) for line in full) >= len(full):
            return None
        several = _several(text)
        if several is not None:
            return several
        if len(lines) == 1 and lines[0].lstrip()[:1] != b"[":
            return None  # a single broken line
        at = error.lineno if isinstance(error, json.JSONDecodeError) else None
        raise _Unreadable("broken JSON", f"{error}; neither JSON lines nor one JSON text", at) from None


def _listed(value: Any) -> list[Any]:
    if not isinstance(value, list):
        return [value]
    return [{"messages": value}] if is_chat(value) else value


def _several(text: bytes) -> list[Any] | None:
    """The values of indented JSON objects that follow one another, None where it is something else."""
    try:
        whole, at = text.decode("utf-8-sig").rstrip(), 0
        decoder, found = json.JSONDecoder(), []
        while at < len(whole):
            at += len(whole[at : at + 1024]) - len(whole[at : at + 1024].lstrip())
            value, at = decoder.raw_decode(whole, at)
            found.append(value)
    except (ValueError, RecursionError):
        return None
    return found if all(isinstance(value, dict) for value in found) else None


_BROKEN = object()


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return _BROKEN


def _lines(lines: Any, path: Path, problems: list[Problem]) -> Iterator[tuple[int, Any]]:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            found, remedy = short(line.decode("utf-8", "replace")), f"broken JSON ({error}); mend or drop it"
            problems.append(Problem(str(path), number, "line", found, remedy))
