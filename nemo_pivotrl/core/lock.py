"""One writer a run folder: a lock that ends with its process, and names who holds it.

It is a POSIX record lock (`fcntl`), because that is released by the kernel however a process ends, is not inherited by forked
workers that outlive it, and is carried over NFS. Where a file system has no locks, or has them on one machine only, that is
said once. The kernel drops such a lock when the process closes any handle of the file: nothing else here opens it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import os
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

from nemo_pivotrl.core.errors import AtWork, InputError, Problem

LOCK = ".lock"
BESIDE = {"report": ".report.lock"}
"""Work that writes nothing that other stages read, and may go on beside them; not beside another of its kind."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
PATIENCE_S = 1.0
"""Seconds for which a lock is tried: a process that was just killed may still be ending, and shards look at each other."""
LOCAL_ONLY = {
    "nfs": ("nolock", "local_lock=all", "local_lock=posix"),
    "nfs4": ("local_lock=all", "local_lock=posix"),
    "cifs": ("nobrl",),
    "lustre": ("localflock",),
    "fuse.sshfs": ("",),
    "9p": ("",),
}
"""File system to the mount options (any one) under which a lock holds among the processes of one machine only."""

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


@dataclass
class _Held:
    handle: int
    record: str
    thread: int
    pid: int
    depth: int = 1


_held: dict[str, _Held] = {}
_guard = threading.Lock()


def one_writer(
    stage: Callable[Concatenate[Any, Parameters], Result],
) -> Callable[Concatenate[Any, Parameters], Result]:
    """A stage, a function of a recipe, that runs as the only writer of the recipe's `run_dir`.

    A stage that is called by another one of the same folder runs under that one's lock. Raises AtWork.
    """

    @functools.wraps(stage)
    def alone(recipe: Any, *rest: Parameters.args, **named: Parameters.kwargs) -> Result:
        with only_writer(Path(recipe.run_dir), stage.__name__.removeprefix("make_")):
            return stage(recipe, *rest, **named)

    return cast("Callable[Concatenate[Any, Parameters], Result]", alone)


@contextlib.contextmanager
def only_writer(folder: Path, work: str, member: str = "", name: str = "") -> Iterator[None]:
    """Run the block as the only writer of `folder`. Raises AtWork where another process, or another thread, is.

    `member`: one of several processes that share the folder by design, e.g. a shard; two of the same name exclude each other,
    and all of them exclude whoever is no member. `name`: of the lock, where it is not the folder's.
    """
    name = name or BESIDE.get(work, LOCK)
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if member:
            stack.enter_context(_locked(folder / f"{name}-{_safe(member)}", f"{work} {member}", fcntl.LOCK_EX))
        mode = fcntl.LOCK_SH if member else fcntl.LOCK_EX
        stack.enter_context(_locked(folder / name, f"{work} {member}".strip(), mode))
        yield


def _safe(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text)


@contextlib.contextmanager
def _locked(path: Path, work: str, mode: int) -> Iterator[None]:
    key = os.path.realpath(path)
    with _guard:
        held = _held.get(key)
        if held is not None and held.pid != os.getpid():  # of the process that this one was forked from
            held = None
        if held is not None and held.thread != threading.get_ident():
            raise AtWork(str(path.parent), held.record)  # opening the file here would drop its lock
        if held is None:
            held = _held[key] = _Held(*_take(path, work, mode), threading.get_ident(), os.getpid())
        else:
            held.depth += 1
    try:
        yield
    finally:
        with _guard:
            held.depth -= 1
            if held.depth == 0:
                del _held[key]
                if mode == fcntl.LOCK_EX:
                    with contextlib.suppress(OSError):
                        os.ftruncate(held.handle, 0)
                os.close(held.handle)


def _take(path: Path, work: str, mode: int) -> tuple[int, str]:
    """The lock's open file, and whose it says it is. Raises AtWork after some tries."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
        remedy = "a lock is a regular file: remove this"
        raise InputError(Problem(str(path), None, "file", "a link, pipe or device", remedy)) from None
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            fcntl.lockf(handle, mode | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno in NO_LOCKS:
                _say_once(
                    f"{path.parent}: its file system has no locks ({error.strerror}): see that nothing else writes there"
                )
                break
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                os.close(handle)
                raise
        if time.monotonic() > until:
            os.close(handle)
            raise AtWork(str(path.parent), _holders(path))
        time.sleep(0.05)
    if where := local_only(path.parent):
        _say_once(f"{path.parent}: a lock on {where} holds on this machine only: see that no other one writes there")
    return handle, _sign(handle, work)


def _sign(handle: int, work: str) -> str:
    about = {"work": work, "host": socket.gethostname(), "pid": os.getpid(), "start": f"{datetime.now(UTC):%FT%TZ}"}
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(about).encode() + b"\n", 0)
    return _told(about)


def _told(about: dict[str, Any]) -> str:
    return f"{about['work']}, pid {about['pid']} on {about['host']}, since {about['start']}"


def _holders(path: Path) -> str:
    """Who holds a lock, as they wrote when they took it: the members, where several share it."""
    found = []
    for one in [*sorted(path.parent.glob(f"{path.name}-*")), path]:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError), one.open("rb") as handle:
            if _is_locked(handle.fileno()):
                found.append(_told(json.loads(handle.read(4096))))
    members = found[:-1] or found
    more = f" and {len(members) - 3} more" if len(members) > 3 else ""
    return "; ".join(members[:3]) + more or "a process that has not yet said its name"


def _is_locked(handle: int) -> bool:
    """Whether another process holds a lock on the file."""
    asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # Linux's `struct flock` of 64 bits
    return bool(struct.unpack_from("h", fcntl.fcntl(handle, fcntl.F_GETLK, asked))[0] != fcntl.F_UNLCK)


_said: set[str] = set()


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        print(text, file=sys.stderr)


def local_only(folder: Path) -> str:
    """The mount of a folder, where its locks do not reach other machines; empty where they do, or it is this machine's own."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return local_only_of(mounts, os.path.realpath(folder))


def local_only_of(mounts: list[str], folder: str) -> str:
    """As `local_only`, of the lines of a `mountinfo`."""
    best, found = "", ""
    for line in mounts:
        before, dash, after = line.partition(" - ")
        fields, rest = before.split(), after.split()
        if not dash or len(fields) < 6 or len(rest) < 2:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4])
        inside = folder == point or folder.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            options = {"", *fields[5].split(","), *(rest[2].split(",") if len(rest) > 2 else ())}
            best, found = point, f"{rest[0]} at {point}" if options & {*LOCAL_ONLY.get(rest[0], ())} else ""
    return found
