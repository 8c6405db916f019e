"""A door to the fork server for scripts that start `python` themselves: COMMAND_PREFIX of the job scripts, for instance.

In the tests: `with fork_door(folder) as prefix`, where `prefix` takes the place of `python`. Run as a program, this file is what
that prefix starts: it asks for a process with its own words, folder, environment and output, and ends as that one ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def fork_door(folder: Path) -> Iterator[str]:
    """What to write instead of `python`, while the block runs."""
    address = folder / "door"
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(address))
    listening.listen()

    def accept() -> None:
        with contextlib.suppress(OSError):  # closed: nobody comes any more
            while True:
                threading.Thread(target=serve, args=(listening.accept()[0],), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"{sys.executable} -S {Path(__file__).resolve()} {address}"
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join()


def serve(asking: socket.socket) -> None:
    """One process: from the question to its exit code."""
    from support.processes import Process

    with asking, asking.makefile("r") as lines:
        asked = json.loads(lines.readline())
        out, err = (Path(f"/proc/{asked['pid']}/fd/{fd}") for fd in (1, 2))
        process = Process(asked["words"], Path(asked["cwd"]), asked["env"], out, err)
        threading.Thread(target=lambda: lines.read() or process.kill(), daemon=True).start()  # who asked is gone
        code = process.wait()
        with contextlib.suppress(OSError):
            asking.sendall(f"{code}\n".encode())


def ask(address: str, words: list[str]) -> int:
    with socket.socket(socket.AF_UNIX) as door:
        door.connect(address)
        question = {"words": words, "cwd": os.getcwd(), "env": dict(os.environ), "pid": os.getpid()}
        door.sendall((json.dumps(question) + "\n").encode())
        code = int(door.makefile("r").readline() or 70)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(ask(sys.argv[1], sys.argv[2:]))
