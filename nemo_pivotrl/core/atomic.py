"""Files that are whole or not there: written aside, synced, renamed; lines that several processes append; sums of folders.

A name with `.part` behind it is unfinished work. It is never opened through a link: whoever can write in a run folder could
otherwise point it at any file of the user's.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from nemo_pivotrl.core.errors import InputError, Problem, short

SUMS = "SHA256SUMS"
"""A finished folder's checksums, in the form that `sha256sum -c` reads."""
MAX_JSON = 1 << 24
KINDS = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
DEVICES = ((stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"))


def kind_of(mode: int) -> str:
    """What a file is that is no regular one, in words; empty for a regular one."""
    return "" if stat.S_ISREG(mode) else next((name for is_it, name in KINDS + DEVICES if is_it(mode)), "no file")


def open_input(path: Path | str) -> IO[bytes]:
    """Open a regular file for reading. Raises InputError for what has no end or no content: pipes, devices, folders.

    The kind is asked of the open file, so nothing can take its place between the look and the reading.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # without O_NONBLOCK a pipe waits for its writer
    if kind := kind_of(os.fstat(handle).st_mode):
        os.close(handle)
        raise InputError(Problem(str(path), None, "file", kind, "give a regular file; write a stream to one first"))
    return os.fdopen(handle, "rb")


def aside(path: Path) -> Path:
    """Where `path` grows until it is whole."""
    return path.with_name(path.name + ".part")


def create(path: Path) -> IO[bytes]:
    """A new file to write, in the place of whatever stood there; a link is removed, not followed. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o666), "wb")


def reopen(path: Path) -> IO[bytes]:
    """An unfinished file to go on with, for reading and writing. Raises InputError for a link, a pipe or a device."""
    remedy = "unfinished work is a file of its own: remove this, then run the same command again"
    try:
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise
        found = {errno.ELOOP: "a symbolic link", errno.EISDIR: "a folder"}.get(error.errno, "a pipe or device")
        raise InputError(Problem(str(path), None, "file", found, remedy)) from None
    about = os.fstat(handle)
    if found := kind_of(about.st_mode) or ("a file of several names" if about.st_nlink > 1 else ""):
        os.close(handle)
        raise InputError(Problem(str(path), None, "file", found, remedy))
    return os.fdopen(handle, "r+b")


def settle(handle: IO[bytes]) -> None:
    """Force what was written to the disk. Raises OSError."""
    handle.flush()
    os.fsync(handle.fileno())


def rename(part: Path, path: Path) -> None:
    """Give finished work its name, and force the name to the disk."""
    os.replace(part, path)
    _settle_folder(path.parent)


def _settle_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems know no sync of a folder; they write names through
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to fill that takes the place of `path` at the end of the block, whole. After an error `path` is as it was."""
    part = aside(path)
    handle = create(part)
    try:
        yield handle
        settle(handle)
    except BaseException:
        with contextlib.suppress(OSError):
            handle.close()
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    handle.close()
    rename(part, path)


def write_atomically(path: Path, text: str) -> None:
    """Write a whole small file; a reader sees the old content or the new, never half."""
    with replacing(path) as handle:
        handle.write(text.encode())


def append_line(path: Path, line: bytes) -> None:
    """Add one line (with its end) to a log that several processes write. A line torn by a kill ends before this one begins.

    The file is locked for the moment of the write: appending is not atomic between machines on NFS.
    """
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    try:
        about = os.fstat(handle)
        if kind := kind_of(about.st_mode):
            raise InputError(Problem(str(path), None, "file", kind, "a log is a regular file: remove this"))
        with contextlib.suppress(OSError):  # without locks: then it is as safe as appending is there
            fcntl.lockf(handle, fcntl.LOCK_EX)
        size = os.fstat(handle).st_size
        torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
        rest = b"\n" * torn + line
        while rest:
            rest = rest[os.write(handle, rest) :]
    finally:
        os.close(handle)


def read_json(path: Path, fields: Mapping[str, type], remedy: str) -> dict[str, Any]:
    """A small JSON object with these fields of these types. Raises InputError for anything else, OSError."""
    try:
        with open_input(path) as handle:
            found = json.loads(handle.read(MAX_JSON))
        if not isinstance(found, dict):
            raise TypeError(f"a {type(found).__name__}")
        wrong = [name for name, kind in fields.items() if not isinstance(found[name], kind)]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(Problem(str(path), None, "file", short(f"{error!r}"), remedy)) from None
    if wrong:
        raise InputError(Problem(str(path), None, wrong[0], short(found[wrong[0]]), remedy))
    return found


# ---- folders ----


@contextlib.contextmanager
def replacing_folder(final: Path, summed: str = "") -> Iterator[Path]:
    """A folder to fill that takes the place of `final`, whole, with the checksums of its files. Raises OSError.

    `summed`: a pattern of files that have checksums elsewhere.
    """
    part = aside(final)
    if part.is_symlink():
        part.unlink()
    remove_folder(part)
    part.mkdir(parents=True)
    yield part
    write_sums(part, summed)
    for path in [*part.rglob("*"), part]:
        if path.is_dir():
            _settle_folder(path)
        else:
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
    remove_folder(final)
    rename(part, final)


def remove_folder(folder: Path) -> None:
    """Delete a folder so that a kill in the middle leaves no half of it under its name."""
    if folder.exists():
        doomed = folder.with_name(folder.name + ".old")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(folder, doomed)
        shutil.rmtree(doomed)


def file_sum(path: Path) -> str:
    """Hex SHA-256 of a file's bytes. Raises InputError for what is no regular file."""
    hasher = hashlib.sha256()
    with open_input(path) as handle:
        while block := handle.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


def file_sums(paths: Iterable[Path], sum_of: Callable[[Path], str] = file_sum) -> list[str]:
    """`sum_of` each; several are read at once, as hashing lets other threads run."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(sum_of, paths))


def write_sums(folder: Path, summed: str = "", known: Mapping[Path, str] | None = None) -> None:
    """Write `SHA256SUMS` of a folder's files, those of the pattern `summed` left out. `known`: sums that need no reading.

    Of a folder inside that has sums of its own, only those are listed.
    """
    (folder / SUMS).unlink(missing_ok=True)
    listed = {path.parent for path in folder.rglob(SUMS)}
    elsewhere = {*folder.glob(summed)} if summed else set()
    chosen = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path not in elsewhere and (path.name == SUMS or not listed & {*path.parents})
    ]
    found = dict(known or {})
    unread = [path for path in chosen if path not in found]
    found |= zip(unread, file_sums(unread), strict=True)
    write_atomically(folder / SUMS, "".join(f"{found[path]}  {path.relative_to(folder)}\n" for path in chosen))


def read_sums(folder: Path) -> dict[str, str]:
    """Name to hex SHA-256 of the files that `SHA256SUMS` lists; empty where there is none. Raises InputError."""
    path = folder / SUMS
    if not path.exists():
        return {}
    found: dict[str, str] = {}
    with open_input(path) as handle:
        for number, line in enumerate(handle, start=1):
            digest, _, name = line.decode("utf-8", "replace").rstrip("\n").partition("  ")
            if len(digest) != 64 or not name or Path(name).is_absolute() or ".." in Path(name).parts:
                remedy = "damaged: copy the folder again from where it is whole"
                raise InputError(Problem(str(path), number, "line", line.decode("utf-8", "replace")[:80], remedy))
            found[name] = digest
    if not found:
        raise InputError(Problem(str(path), None, "file", "an empty file", "damaged: copy the folder again"))
    return found


def check_sums(folder: Path, remedy: str, under: tuple[str, ...] = ("",)) -> bool:
    """Compare a folder's files (those whose paths begin so) with its `SHA256SUMS`; False where it has none.

    Raises InputError naming every file that is missing or has other bytes, with `remedy`.
    """
    listed = read_sums(folder)
    wanted = {name: digest for name, digest in listed.items() if name.startswith(under)}
    there = [name for name in wanted if (folder / name).is_file()]
    found = dict(zip(there, file_sums(folder / name for name in there), strict=True))
    compare_sums(folder, wanted, found, remedy)
    for name in there:
        if Path(name).name == SUMS:
            check_sums((folder / name).parent, remedy)
    return bool(listed)


def compare_sums(folder: Path, wanted: Mapping[str, str], found: Mapping[str, str], remedy: str) -> None:
    """Raises InputError naming every file of `wanted` that `found` lacks or has otherwise."""
    problems = [
        Problem(
            str(folder / name), None, "file", "other bytes than were written" if name in found else "nothing", remedy
        )
        for name, digest in wanted.items()
        if found.get(name) != digest
    ]
    if problems:
        raise InputError(problems)
