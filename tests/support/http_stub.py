"""Stand-ins for completion servers, which fail on demand. Each computes its answer from the request alone."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = Callable[[dict[str, Any], int], Any]
"""(request, how many came before) -> None for a good answer; (status, headers, body), `hang`, or `drop`."""


def turn(body: dict[str, Any]) -> tuple[list[int], list[float]]:
    """Four tokens that follow from prompt and seed, with their log-probabilities."""
    ids = [100 + (sum(body["prompt"]) * 7 + body["seed"] * 13 + i) % 50 for i in range(body["max_tokens"])]
    return ids, [-0.01 * i for i in ids]


def good(body: dict[str, Any]) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0, "text": "", "finish_reason": "length"}
    if "seed" in body:
        ids, logs = turn(body)
        shown = [f"token_id:{i}" for i in ids]
        choice |= {"token_ids": ids, "logprobs": {"tokens": shown, "token_logprobs": logs}}
    else:
        scored = [{str(t): {"logprob": -0.5 * t}} for t in body["prompt"][1:]]
        choice |= {"token_ids": [1], "prompt_logprobs": [None, *scored]}
    return {"choices": [choice]}


class StandIn:
    """One server. `fault` decides over each completion; `away` drops every connection."""

    def __init__(
        self,
        fault: Fault | None = None,
        model: str = "m",
        root: str = "",
        policy: Callable[[dict[str, Any]], dict[str, Any]] = good,
    ):
        self.fault, self.away, self.held, self.most = fault, False, 0, 0
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.calls: Counter[str] = Counter()
        self.loaded, self.fingerprint, self.sick = "", "abc", False
        lock = threading.Lock()
        me = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None: ...

            def answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
                raw = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def do_GET(self) -> None:
                me.keys.add(self.headers["Authorization"])
                me.calls[self.path] += 1
                if me.away:
                    return self.connection.close()
                if self.path == "/health":
                    return self.answer(500 if me.sick else 200, b"")
                self.answer(200, {"data": [{"id": model, "root": root}]})

            def do_POST(self) -> None:
                me.keys.add(self.headers["Authorization"])
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"null")
                me.calls[self.path] += 1
                if me.away:
                    return self.connection.close()
                if self.path == "/collective_rpc":
                    me.loaded = body["args"][0]
                    return self.answer(200, {"results": [me.fingerprint]})
                if self.path != "/v1/completions":
                    return self.answer(200, b"")
                with lock:
                    number = len(me.asked)
                    me.asked.append(body)
                    me.held += 1
                    me.most = max(me.most, me.held)
                try:
                    fate = me.fault(body, number) if me.fault else None
                    if fate == "hang":
                        time.sleep(1.5)
                    answer = (200, policy(body)) if fate is None else fate
                finally:
                    with lock:  # before the answer leaves: whoever has it may ask again at once
                        me.held -= 1
                if fate in ("drop", "hang"):
                    return self.connection.close()
                self.answer(*answer)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
