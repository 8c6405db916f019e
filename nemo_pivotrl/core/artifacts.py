"""The headered JSONL files that stages write and read.

An artefact is a JSONL file whose first line is a header (what made this file, from what) and whose other lines are
rows. A stage refuses an input whose header contradicts its recipe and says which field differs, because a silent
change of tokenizer, chat template or policy is the commonest way to lose days of GPU time.

The first line ends with a seal: the number of rows and the SHA-256 of header and rows. It stands there, not in a last line and
not in a file beside, so that one line is all that a reader of JSONL skips (`tail -n +2`), a copy of the file is a copy of its
seal, and no cut can take the seal away. Its place is kept free while rows are written, and filled before the rename.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from nemo_pivotrl.core.atomic import aside, create, open_input, rename, replacing, settle
from nemo_pivotrl.core.errors import InputError, Problem, short
from nemo_pivotrl.core.told_settings import difference, leaves

POINTING = ("candidates", "profiles", "pivots")
"""Artefacts whose rows point to turns of trajectories (`data/states.py`)."""
FORMATS = dict.fromkeys(POINTING, 2)
"""Versions of the artefacts' rows; of all others 1."""
HEADER_KEY, SETTINGS_KEY, SEAL_KEY = "nemo_pivotrl", "settings", "sealed"
ROWS_AT_ONCE = 256
MAX_HEADER = 1 << 24
SEAL_WIDTH = len('{"rows":,"sha256":""}') + 12 + 64
"""Bytes that are kept free for a seal: of up to 10^12 rows."""
MADE_BY = {
    "trajectories": "extract",
    "candidates": "extract",
    "profiles": "profile",
    "pivots": "select",
    "preferences": "preferences",
    "token_rewards": "reward",
    "decoded": "decode",
    "evaluation": "evaluate",
    "assessment": "assess",
    "audit": "audit",
    "retention": "train",
}
"""Artefact to the command that makes it."""
IDS = {
    "trajectories": ("trajectory_id",),
    **dict.fromkeys((*POINTING, "audit"), ("candidate_id",)),
    **dict.fromkeys(("preferences", "token_rewards"), ("preference_id",)),
    "decoded": ("id", "sample"),
    "evaluation": ("policy", "set"),
    "assessment": ("arm", "prompt", "sample"),
    "retention": ("item",),
}
"""Artefact to the fields that tell its rows apart."""
DOUBLE = "an id stands for one row: remove one of the two where they come from, and make this file anew"


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
    """Fingerprint of the tokenizer (`Chat.fingerprint`), empty where none was used."""
    chat_template: str = ""
    policy: str = ""
    """Revision of the policy: digest of its weights."""
    verifier: str = ""
    """`name version settings-digest`, empty where none was used."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    format: int = 0
    """Version of the rows; 0: today's."""
    settings: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """The settings behind `config_hash` by their names, to say which differ; no part of what the header is compared by."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", self.format or FORMATS.get(self.stage, 1))

    def to_line(self) -> str:
        """The line without settings and seal: what digests are made of."""
        told = asdict(self)
        del told["settings"]
        return canonical_json({HEADER_KEY: told}) + "\n"

    def to_told_line(self) -> str:
        """The line with its settings, without its seal: what unfinished work begins with."""
        return (
            f'{self.to_line()[:-2]},"{SETTINGS_KEY}":{canonical_json(self.settings)}}}\n'
            if self.settings
            else self.to_line()
        )


@dataclass(frozen=True, slots=True)
class Seal:
    """How much follows the header, and the SHA-256 of header and rows, the seal itself left out."""

    rows: int
    sha256: str


def first_line(header: Header, seal: Seal | None = None) -> bytes:
    """An artefact's first line. It is as long without its seal, which is filled in when the last row is written."""
    told = canonical_json(None if seal is None else asdict(seal))
    return f'{header.to_told_line()[:-2]},"{SEAL_KEY}":{told}}}'.encode() + b" " * (SEAL_WIDTH - len(told)) + b"\n"


def read_first_line(line: bytes) -> tuple[Header, Seal | None]:
    """Undo `first_line`, and read the line of an artefact that has none. Raises ValueError, KeyError or TypeError."""
    raw = json.loads(line)
    header, told = Header(**raw[HEADER_KEY], settings=raw.get(SETTINGS_KEY) or {}), raw.get(SEAL_KEY)
    return header, None if told is None else Seal(int(told["rows"]), str(told["sha256"]))


@dataclass(frozen=True, slots=True)
class _Content:
    """What one pass over a file finds."""

    first: bytes
    rows: int
    sha256: str
    """Of a file that is an artefact: as its seal counts."""
    torn: bool


_contents: dict[tuple[int, ...], _Content] = {}
"""By what the file system says of a file, so that a stage which asks for header, rows and digest reads it once for them."""
SETTLED_S = 2.0
"""A file that changed less than so many seconds ago is read again: another change might not show in its times."""


def _content(path: Path) -> _Content:
    with open_input(path) as handle:
        about = os.fstat(handle.fileno())
        key = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
        if key in _contents:
            return _contents[key]
        first = handle.readline(MAX_HEADER)
        hasher = hashlib.sha256(first)
        if first.startswith(f'{{"{HEADER_KEY}":'.encode()):
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
                hasher = hashlib.sha256(read_first_line(first)[0].to_line().encode())
        rows, last = 0, first[-1:]
        while block := handle.read(1 << 20):
            hasher.update(block)
            rows += block.count(b"\n")
            last = block[-1:]
        found = _Content(first, rows, hasher.hexdigest(), last != b"\n")
    if time.time() - about.st_mtime > SETTLED_S:
        _contents[key] = found
    return found


def file_digest(path: Path) -> str:
    """Hex SHA-256 of a file's bytes (16 characters); an artefact's seal is left out, so sealing one changes no digest."""
    return _content(path).sha256[:16]


def count_rows(path: Path) -> int:
    """How many rows a file has after its first line."""
    return _content(path).rows


def read_header(path: Path, stage: str | tuple[str, ...]) -> Header:
    """Header of the artefact at `path`, which must be of `stage` (one of them, where several are given), and whole.

    Raises InputError when the file is missing, empty, cut, damaged, has no header or no seal, or belongs to another stage.
    """
    wanted = (stage,) if isinstance(stage, str) else stage
    if not path.exists():
        remedy = " or ".join(f"`nemo-pivotrl {MADE_BY[kind]} RECIPE`" for kind in wanted) + " makes it"
        raise InputError(Problem(str(path), None, "file", "no such file", remedy))
    content = _content(path)
    header, seal = _parsed(path, content.first)
    if header.stage not in wanted:
        remedy = f"this stage reads {' or '.join(wanted)}; check the path"
        raise InputError(Problem(str(path), 1, "stage", short(header.stage), remedy))
    _check_whole(path, content, header, seal)
    return header


def _parsed(path: Path, first: bytes) -> tuple[Header, Seal | None]:
    try:
        header, seal = read_first_line(first)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        found = "an empty file" if not first else short(first[:1000].decode("utf-8", "replace"))
        remedy = "this is no nemo_pivotrl artefact; give a file that a stage wrote"
        raise InputError(Problem(str(path), 1, "header", found, remedy)) from None
    if header.format != (known := FORMATS.get(header.stage, 1)):
        remedy = f"this version reads format {known} of {header.stage}; make it anew: {_command(header.stage)}"
        raise InputError(Problem(str(path), 1, "format", short(str(header.format)), remedy))
    return header, seal


def _command(stage: str) -> str:
    return f"nemo-pivotrl {MADE_BY.get(stage, 'STAGE')} RECIPE fresh=true"


def _check_whole(path: Path, content: _Content, header: Header, seal: Seal | None) -> None:
    """Refuse an artefact that is not what its seal says. Raises InputError that names the line, where one shows."""
    again = f"re-run the stage ({_command(header.stage)}), or copy the file again, whole"
    if seal is None:
        found = f"no seal on {content.rows} rows: unfinished, made by an earlier version, or edited"
        remedy = f"if it is as you want it: nemo-pivotrl seal {path}; or {again}"
        raise InputError(Problem(str(path), 1, SEAL_KEY, found, remedy))
    if (content.rows, content.sha256) == (seal.rows, seal.sha256) and content.first == first_line(header, seal):
        return
    problems = list(_odd_lines(path, again))
    if not problems and (content.rows != seal.rows or content.torn):
        end = "in the middle of a row" if content.torn else f"after {content.rows} rows"
        found = f"it ends {end}, and {seal.rows} were written"
        problems.append(Problem(str(path), content.rows + 1 + content.torn, "rows", found, again))
    elif not problems:
        found = "rows or header are not what was written: changed, or in another order"
        remedy = f"if you changed it: nemo-pivotrl seal {path}; or {again}"
        problems.append(Problem(str(path), 1, "sha256", found, remedy))
    raise InputError(problems)


def _odd_lines(path: Path, remedy: str) -> Iterator[Problem]:
    """Lines of a damaged artefact that show the damage: not JSON, or there before."""
    seen: dict[bytes, int] = {}
    for number, line in enumerate(_lines(path), start=1):
        if number > 1:
            try:
                _object(line)
            except (ValueError, RecursionError) as error:
                shown = short(line[:1000].decode("utf-8", "replace"))
                yield Problem(str(path), number, "line", shown, f"not a JSON object ({error}); {remedy}")
                continue
            key = hashlib.sha256(line).digest()
            if key in seen:
                yield Problem(str(path), number, "line", f"the row of line {seen[key]} again", remedy)
            seen[key] = number


def _lines(path: Path) -> Iterator[bytes]:
    with open_input(path) as handle:
        yield from handle


def _object(line: bytes) -> dict[str, Any]:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"it is a {type(row).__name__}")
    return row


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows after the header of a whole artefact. Raises InputError as `placed_rows` does."""
    return (row for _, row in placed_rows(path))


def placed_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(byte at which its line begins, row) of every row after the header.

    Raises InputError for an artefact that is cut, damaged or without a seal, and names every id that comes twice.
    """
    content = _content(path)
    header, seal = _parsed(path, content.first)
    _check_whole(path, content, header, seal)
    yield from _unique(path, header.stage, _placed(path))


def _placed(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """As `placed_rows`, without a look at seal and ids. Raises InputError with every line that is not a JSON object."""
    problems = []
    end = 0
    for number, line in enumerate(_lines(path), start=1):
        place, end = end, end + len(line)
        if number == 1:
            continue
        try:
            row = _object(line)
        except (ValueError, RecursionError) as error:
            shown = short(line[:1000].decode("utf-8", "replace"))
            problems.append(Problem(str(path), number, "line", shown, f"not a JSON object ({error}); re-run the stage"))
            continue
        if not problems:
            yield place, row
    if problems:
        raise InputError(problems)


def _unique(path: Path, stage: str, rows: Iterator[tuple[int, dict[str, Any]]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows. Raises InputError after the last of them where an id came twice."""
    seen: dict[object, int] = {}
    problems = []
    for number, (place, row) in enumerate(rows, start=2):
        name = row_id(stage, row)
        if name is not None and seen.setdefault(name, number) != number:
            found = f"{short(str(name))}, as in line {seen[name]}"
            problems.append(Problem(str(path), number, "id", found, DOUBLE))
        yield place, row
    if problems:
        raise InputError(problems)


def row_id(stage: str, row: Mapping[str, Any]) -> object:
    """What tells a row of this stage's artefact from every other; None where rows have no id."""
    found = tuple(row.get(key) for key in IDS.get(stage, ()))
    return None if not found or None in found else found[0] if len(found) == 1 else repr(found)


def rows_at(path: Path, places: Iterable[int]) -> Iterator[dict[str, Any]]:
    """The rows that begin at these bytes, which `placed_rows` gave."""
    with path.open("rb") as handle:
        for place in places:
            handle.seek(place)
            yield json.loads(handle.readline())


def check_parent(path: Path, found: Header, parent: Path) -> Header:
    """Refuse an artefact made from an older version of `parent`; the parent's header. Raises InputError.

    Of a parent with a seal the first line is read alone: whoever reads its rows looks whether they are what the seal says.
    """
    with open_input(parent) as handle:
        header, seal = _parsed(parent, handle.readline(MAX_HEADER))
    if found.parent != (file_digest(parent) if seal is None else seal.sha256[:16]):
        remedy = f"{parent} has changed since; re-run the stage that writes {path.name}"
        raise InputError(Problem(str(path), 1, "parent", found.parent, remedy))
    return header


def is_complete(path: Path, header: Header, fresh: bool) -> bool:
    """Whether the finished artefact at `path` is the one `header` describes.

    Raises InputError when it is finished but another one, or damaged, and `fresh` is not set: it may be paid-for work.
    """
    if fresh or not path.exists():
        return False
    content = _content(path)
    found, seal = _parsed(path, content.first)
    if found.to_line() != header.to_line():
        remedy = "finished work of another recipe or input; add fresh=true to replace it"
        raise InputError(Problem(str(path), 1, "header", header_difference(found, header), remedy))
    _check_whole(path, content, found, seal)
    return True


class ArtefactWriter:
    """Writes an artefact to `PATH.part`. `finish` seals it and renames it to PATH, so PATH is always complete.

    It is written in one go; work that must survive a kill is in a journal until then (`components/journal.py`).
    """

    def __init__(self, path: Path, header: Header):
        self.path, self.part, self.header = path, aside(path), header
        self._rows = 0
        self._hasher = hashlib.sha256(header.to_line().encode())
        self._handle = create(self.part)
        self._handle.write(first_line(header))

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows. Raises OSError."""
        lines = [json_line(row) for row in rows]
        self.write_text(b"".join(lines), len(lines))

    def write_text(self, text: bytes, rows: int) -> None:
        """Append so many rows that are one text, each a line with its end. Raises OSError."""
        try:
            self._handle.write(text)
        except OSError:
            self._close()  # now, or its buffer would reach the file at some later time
            raise
        self._hasher.update(text)
        self._rows += rows

    def finish(self) -> Path:
        """Seal the part and give it its name. Raises OSError."""
        seal = first_line(self.header, Seal(self._rows, self._hasher.hexdigest()))[-SEAL_WIDTH - 2 :]
        self._handle.flush()  # the header of an artefact without rows
        os.pwrite(self._handle.fileno(), seal, len(first_line(self.header)) - len(seal))
        settle(self._handle)
        self._close()
        rename(self.part, self.path)
        return self.path

    def _close(self) -> None:
        with contextlib.suppress(OSError):
            self._handle.close()

    def __enter__(self) -> ArtefactWriter:
        return self

    def __exit__(self, *error: object) -> None:
        """Close the file. Unless `finish` was called, `.part` stays until it is written anew."""
        self._close()


def write_artefact(path: Path, header: Header, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write an artefact in one go, in the place of any that is there. Raises OSError."""
    rest = iter(rows)
    with ArtefactWriter(path, header) as writer:
        while chunk := list(islice(rest, ROWS_AT_ONCE)):
            writer.write(chunk)
        return writer.finish()


def header_difference(found: Header, wanted: Header) -> str:
    """What differs between two headers: settings by their names where both tell theirs, else field by field."""
    settings = difference(found.settings, wanted.settings) if found.config_hash != wanted.config_hash else ""
    old, new = (_fields(header) for header in (found, wanted))
    if settings:  # they say it better than a hash
        old["config_hash"] = new["config_hash"]
    return ", ".join(filter(None, [settings, difference(old, new)]))


def _fields(header: Header) -> dict[str, Any]:
    told = asdict(header)
    del told["settings"]
    extra = told.pop("extra")
    return told | leaves(extra, "")


def seal(path: Path) -> int:
    """Seal an artefact as it is: one of an earlier version, or edited by hand. Returns its number of rows.

    Raises InputError for a file without a header, for lines that are no rows, and for ids that come twice.
    """
    content = _content(path)
    header, _ = _parsed(path, content.first)
    for _ in _unique(path, header.stage, _placed(path)):
        pass
    if content.torn:
        found = "no line end: the last row may be cut"
        raise InputError(Problem(str(path), content.rows + 2, "line", found, "add the line end, or remove the line"))
    with replacing(path) as target, open_input(path) as source:
        source.readline()
        target.write(first_line(header, Seal(content.rows, content.sha256)))
        shutil.copyfileobj(source, target, 1 << 20)
    return content.rows
