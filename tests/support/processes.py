"""Python processes that have torch already: a fork server imports it once, and every process is a fork of that.

They are processes of their own like any other: they have a pid, end with an exit code and die of SIGKILL. What a test must see of
an interpreter's own start (which modules a command imports, how long that takes) is started by `subprocess` instead.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 300.0
"""How long a process may take on a busy machine before a test gives up waiting for it."""

forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["support.preload"])


class Process:
    """A process that was started by `python`."""

    def __init__(self, words: list[str], cwd: Path, env: dict[str, str], out: Path | None, err: Path | None):
        folder = None if out else own_folder(self, "process-")
        self.out = out = out or Path(str(folder), "out")
        self.err = err = err or (out if folder is None else folder / "err")
        self.words = words
        for path in (out, err):
            if path.parts[1] != "proc":  # another process's output, which has begun
                path.write_bytes(b"")
        # a daemon of multiprocessing is killed when the tests end, whatever has become of the test that started it
        self._process = forks.Process(target=_become, args=(words, str(cwd), env, str(out), str(err)), daemon=True)
        self._process.start()
        self.pid: int = self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        """The exit code, minus the signal's number where one has ended the process; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        self._process.join(timeout_s)
        if self.returncode is None:
            self.kill()
            raise AssertionError(f"{self.words} did not end in {timeout_s:.0f} s:\n{self.printed()[-3000:]}")
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> int:
        """SIGKILL, and its exit code."""
        self._process.kill()
        self._process.join()
        assert self.returncode is not None
        return self.returncode

    def printed(self) -> str:
        """What it has printed so far, on both streams."""
        return "".join(
            path.read_text(encoding="utf-8", errors="replace") for path in dict.fromkeys((self.out, self.err))
        )


def python(
    *words: str,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    out: Path | None = None,
    err: Path | None = None,
) -> Process:
    """Start `python WORDS`: `-m module`, `-c code` or a script, with its arguments. `env` is added to the environment. `out` and
    `err` get what it prints; `err` is `out` where only that is given."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return Process(list(words), cwd, {**os.environ, "PYTHONPATH": path, **(env or {})}, out, err)


def own_folder(owner: object, prefix: str) -> Path:
    """A new folder that goes with its owner."""
    folder = tempfile.mkdtemp(prefix=prefix)
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def run(*words: str, timeout_s: float = PATIENCE_S, **options: Any) -> subprocess.CompletedProcess[str]:
    """Start it, and wait for its end."""
    process = python(*words, **options)
    code = process.wait(timeout_s)
    out, err = (path.read_text(encoding="utf-8", errors="replace") for path in (process.out, process.err))
    return subprocess.CompletedProcess(list(words), code, out, err)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def serving(process: Process, health: str) -> Iterator[Process]:
    """A server that answers at the address `health`, ended by SIGTERM. It must not print a traceback."""

    def up() -> bool:
        assert process.poll() is None, process.printed()
        try:
            urllib.request.urlopen(health, timeout=5).close()
        except OSError:
            return False
        return True

    try:
        wait_for(up, f"{process.words} at {health}")
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        assert "Traceback" not in process.printed(), process.printed()


def kill_when(process: Process, reached: Callable[[], bool]) -> bool:
    """SIGKILL the process once `reached()`; False if it ended before."""
    while process.poll() is None:
        if reached():
            return process.kill() == -signal.SIGKILL
        time.sleep(0.002)
    return False


def wait_for(reached: Callable[[], Any], what: str, timeout_s: float = PATIENCE_S) -> None:
    """Wait for a fact."""
    deadline = time.monotonic() + timeout_s
    while not reached():
        assert time.monotonic() < deadline, f"{what}: not in {timeout_s:.0f} s"
        time.sleep(0.01)


def _become(words: list[str], cwd: str, env: dict[str, str], out: str, err: str) -> None:
    """In the fork: be `python WORDS`."""
    assert "transformers" in sys.modules, "the fork server has not imported support.preload: is PYTHONPATH set?"
    atexit._clear()  # the server's, not this process's
    multiprocessing.current_process().daemon = False  # it may have processes of its own
    for stream, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, stream)
        os.close(file)
    sys.stdout.reconfigure(line_buffering=False)  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path[:0] = [p for p in env.get("PYTHONPATH", "").split(os.pathsep) if p and p not in sys.path]
    words = list(words)
    while words[0] == "-W":
        warnings._processoptions([words[1]])  # type: ignore[attr-defined]
        del words[:2]
    try:
        if words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        elif words[0] == "-m":
            sys.argv = words[1:]
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "'.*' found in sys.modules", RuntimeWarning)
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).parent))
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
