"""The headered JSONL files that stages write and read.

An artefact is a JSONL file whose first line is a header (what made this file, from what) and whose other lines are
rows. A stage refuses an input whose header contradicts its recipe and says which field differs, because a silent
change of tokenizer, chat template or policy is the commonest way to lose days of GPU time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nemo_pivotrl.core.errors import InputError, Problem, short

FORMAT_VERSION = 1


HEADER_KEY = "nemo_pivotrl"


def canonical_json(value: object) -> str:
    """The one JSON text of `value`: sorted keys, no spaces. What hashes are made from."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=_plain)


def json_line(row: object) -> bytes:
    """A row as one UTF-8 line, keys in their own order: a tool schema must reach the prompt as it was written."""
    return json_bytes(row) + b"\n"


def json_bytes(value: object) -> bytes:
    """`value` as JSON without spaces. Lone surrogates, which models do emit, are kept as JSON escapes."""
    try:
        return _compact(value).encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":"), default=_plain).encode()


def _plain(value: object) -> object:
    if hasattr(value, "__dataclass_fields__"):
        return asdict(value)  # type: ignore[call-overload]
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


# made once: what `json.dumps` makes anew at every call costs more than a small row
_compact = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, default=_plain).encode


def digest(value: object, length: int = 16) -> str:
    """Hex SHA-256 of `value`'s canonical JSON, cut to `length` characters."""
    return hashlib.sha256(canonical_json(value).encode("utf-8", "surrogatepass")).hexdigest()[:length]


def file_digest(path: Path) -> str:
    """Hex SHA-256 of a file's bytes (16 characters)."""
    hasher = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Header:
    """First line of an artefact: what made it, from what."""

    stage: str
    """`candidates`, `profiles`, `pivots`, `preferences`, `token_rewards`, ..."""
    config_hash: str
    """Of the recipe sections that decide this artefact's content."""
    parent: str = ""
    """Digest of the input artefact's file, empty for a first stage."""
    tokenizer: str = ""
    """Fingerprint of the tokenizer (`chat.fingerprint`), empty where none was used."""
    chat_template: str = ""
    policy: str = ""
    """Revision of the policy: digest of its weights."""
    verifier: str = ""
    """`name version settings-digest`, empty where none was used."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    format: int = FORMAT_VERSION

    def to_line(self) -> str:
        return canonical_json({HEADER_KEY: asdict(self)}) + "\n"


def read_header(path: Path, stage: str | tuple[str, ...]) -> Header:
    """Header of the artefact at `path`, which must be of `stage` (one of them, where several are given).

    Raises InputError when the file is missing, empty, has no header, or belongs to another stage.
    """
    wanted = (stage,) if isinstance(stage, str) else stage
    if not path.exists():
        raise InputError(
            Problem(str(path), None, "file", "no such file", f"run the stage that writes {wanted[0]} first")
        )
    with path.open("rb") as handle:
        first = handle.readline()
    try:
        raw = json.loads(first)[HEADER_KEY]
        header = Header(**raw)
    except (ValueError, KeyError, TypeError, RecursionError):
        found = "an empty file" if not first else short(first.decode("utf-8", "replace"))
        raise InputError(
            Problem(str(path), 1, "header", found, "this is no nemo_pivotrl artefact; give a file that a stage wrote")
        ) from None
    if header.format != FORMAT_VERSION:
        raise InputError(
            Problem(
                str(path),
                1,
                "format",
                str(header.format),
                f"this version reads format {FORMAT_VERSION}; re-run the stage",
            )
        )
    if header.stage not in wanted:
        raise InputError(
            Problem(str(path), 1, "stage", header.stage, f"this stage reads {' or '.join(wanted)}; check the path")
        )
    return header


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows after the header. Raises InputError with every line that is not a JSON object."""
    return (row for _, row in placed_rows(path))


def placed_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(byte at which its line begins, row) of every row after the header. Raises InputError as `read_rows` does."""
    problems = []
    with path.open("rb") as handle:
        end = len(handle.readline())
        for number, line in enumerate(handle, start=2):
            place, end = end, end + len(line)
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"it is a {type(row).__name__}")
            except (ValueError, RecursionError) as error:
                problems.append(
                    Problem(
                        str(path),
                        number,
                        "line",
                        short(line.decode("utf-8", "replace")),
                        f"not a JSON object ({error}); re-run the stage",
                    )
                )
                continue
            if not problems:
                yield place, row
    if problems:
        raise InputError(problems)


def rows_at(path: Path, places: Iterable[int]) -> Iterator[dict[str, Any]]:
    """The rows that begin at these bytes, which `placed_rows` gave."""
    with path.open("rb") as handle:
        for place in places:
            handle.seek(place)
            yield json.loads(handle.readline())


def check_headers(path: Path, found: Header, **expected: str) -> None:
    """Compare header fields with what the recipe implies, all differences in one InputError."""
    problems = [
        Problem(
            str(path),
            1,
            name,
            repr(getattr(found, name)),
            f"the recipe gives {value!r}; use the matching recipe or re-run the stage",
        )
        for name, value in expected.items()
        if getattr(found, name) != value
    ]
    if problems:
        raise InputError(problems)


def check_parent(path: Path, found: Header, parent: Path) -> None:
    """Refuse an artefact made from an older version of `parent`. A parent that is not here (another job's) is no error."""
    if parent.exists() and found.parent != file_digest(parent):
        raise InputError(
            Problem(
                str(path),
                1,
                "parent",
                found.parent,
                f"{parent} has changed since; re-run the stage that writes {path.name}",
            )
        )


def is_complete(path: Path, header: Header, fresh: bool) -> bool:
    """Whether the finished artefact at `path` is the one `header` describes.

    Raises InputError when it is finished but another one and `fresh` is not set: it may be paid-for work.
    """
    if fresh or not path.exists():
        return False
    with path.open("rb") as handle:
        first = handle.readline()
    if first == header.to_line().encode():
        return True
    difference = short(header_difference(first, header.to_line().encode()))
    raise InputError(
        Problem(
            str(path), 1, "header", difference, "finished work of another recipe or input; add fresh=true to replace it"
        )
    )


class ArtefactWriter:
    """Writes an artefact so that kill -9 at any byte loses at most the rows not yet flushed.

    Rows go to `PATH.part`. `finish` renames it to PATH, so PATH is always complete. Opening a second time with the
    same header resumes: whole rows are kept, a torn last line is cut off, and `rows_done` says how many are there.
    A `.part` with another header is refused unless `fresh` is set: it holds somebody's paid-for rollouts.
    """

    def __init__(self, path: Path, header: Header, fresh: bool = False):
        self.path = path
        self.part = path.with_name(path.name + ".part")
        path.parent.mkdir(parents=True, exist_ok=True)
        line = header.to_line().encode()
        self.rows_done = 0
        if self.part.exists() and not fresh:
            self.rows_done = self._keep_whole_rows(line)
        if self.rows_done == 0:
            self.part.write_bytes(line)
        self._handle = self.part.open("ab")

    def _keep_whole_rows(self, header_line: bytes) -> int:
        with self.part.open("rb+") as handle:
            first = handle.readline()
            if not first.endswith(b"\n"):
                return 0
            if first != header_line:
                raise InputError(
                    Problem(
                        str(self.part),
                        1,
                        "header",
                        short(header_difference(first, header_line)),
                        "unfinished work of another recipe or input; finish it with its own recipe, or add fresh=true to drop it",
                    )
                )
            rows, end = 0, handle.tell()
            while handle.readline().endswith(b"\n"):
                rows, end = rows + 1, handle.tell()
            handle.truncate(end)
        return rows

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows already there, for a stage that resumes."""
        return read_rows(self.part)

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows as one write, then fsync. A crash may keep the first of them; a torn last row is cut on resume."""
        lines = b"".join(json_line(row) for row in rows)
        try:
            self._handle.write(lines)
            self._handle.flush()
            os.fsync(self._handle.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                self._handle.close()  # now, or its buffer would reach the file at some later time
            raise

    def finish(self) -> Path:
        self._handle.close()
        os.replace(self.part, self.path)
        return self.path

    def __enter__(self) -> ArtefactWriter:
        return self

    def __exit__(self, *error: object) -> None:
        """Close the file; unless `finish` was called, `.part` stays for a later resume."""
        self._handle.close()


def header_difference(found: bytes, wanted: bytes) -> str:
    try:
        old, new = json.loads(found)[HEADER_KEY], json.loads(wanted)[HEADER_KEY]
    except (ValueError, KeyError, TypeError):
        return found.decode("utf-8", "replace")
    return ", ".join(f"{key}={old.get(key)!r} (now {new[key]!r})" for key in new if old.get(key) != new[key])
