"""An OpenAI-compatible server that judges as it is told: well, badly, late, not at all, or with a trick."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Asked:
    """One request as the server got it."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    code: str = ""
    sections: dict[str, str] = field(default_factory=dict)

    @property
    def pair(self) -> tuple[str, str]:
        return self.sections["ACTION 1"], self.sections["ACTION 2"]


@dataclass(frozen=True)
class Raw:
    """A response that is no completion."""

    status: int = 200
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = (("Content-Type", "application/json"),)
    pieces: int = 1
    """Sent in so many pieces, a twentieth of a second apart."""


DROP = object()
"""Close the connection without a word."""
Behaviour = Callable[[Asked, int], Any]
"""(request, how many came before it) -> a verdict, an answer's text, a Raw or DROP."""


def read_sections(user: str, code: str) -> dict[str, str]:
    found = re.findall(rf"^{code} BEGIN ([A-Z0-9 ]+)\n(.*?)\n{code} END \1$", user, re.S | re.M)
    return dict(found)


class Server:
    """An OpenAI-compatible server on a port of its own, in a thread."""

    def __init__(self, behave: Behaviour):
        self.behave, self.asked, self.busy, self.most_busy = behave, list[Asked](), 0, 0
        self.models: Any = None
        self.lock, self.released = threading.Lock(), threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                made = outer.models
                outer.send(self, made if isinstance(made, Raw) else Raw(body=json.dumps(made).encode()))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                system, user = (m["content"] for m in body["messages"])
                code = system.rpartition("The code is ")[2]
                asked = Asked(self.path, dict(self.headers), body, code, read_sections(user, code))
                with outer.lock:
                    outer.asked.append(asked)
                    number = len(outer.asked) - 1
                    outer.busy += 1
                    outer.most_busy = max(outer.most_busy, outer.busy)
                made = outer.behave(asked, number)
                with outer.lock:
                    outer.busy -= 1
                if made is DROP:
                    self.close_connection = True
                    return
                if isinstance(made, bool):
                    made = f"They would do this and that.\n{code} {'SAME' if made else 'DIFFERENT'}"
                if isinstance(made, str):
                    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": made}}
                    made = Raw(body=json.dumps({"choices": [choice]}).encode())
                outer.send(self, made)

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                pass  # a client that hangs up is part of the script

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,))
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def send(self, handler: BaseHTTPRequestHandler, made: Raw) -> None:
        handler.send_response(made.status)
        for name, value in made.headers:
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(made.body)))
        handler.end_headers()
        step = -(-len(made.body) // made.pieces) or 1
        for start in range(0, len(made.body), step):
            if start and self.released.wait(0.05):
                return
            handler.wfile.write(made.body[start : start + step])

    def stall(self, *_: object) -> str:
        self.released.wait(10)
        return ""

    def close(self) -> None:
        self.released.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()
