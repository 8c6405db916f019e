"""What stands between a network and a server's routes: who may ask, what is read, for how long, and how much at a time.

`Guard` is an ASGI middleware: the Host header is one of this server's names (a web page that points a name of its own at this
machine is refused), requests carry the token where there is one, bodies are JSON and whole within `BODY_S`, and all bodies
together stay within `BODIES`. `http_server.py` adds the deadlines that no middleware can hold.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from pathlib import Path
from typing import Any

from nemo_pivotrl.backends.api_keys import is_loopback
from nemo_pivotrl.core.errors import InputError, Problem

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

MAX_BODY = 64 << 20
"""Bytes of a request: a state of 131,072 tokens with its tools fits many times."""
BODIES = 256 << 20
"""Bytes of all bodies that are held at a time. More wait, unread, and after `BODY_S` are asked to come again."""
BODY_S = 30.0
"""Seconds until a request's body is whole."""
TOKEN = "NEMO_PIVOTRL_TOKEN"
"""Environment variable with the token, where no file is named."""
NAMES = "NEMO_PIVOTRL_SERVER_NAMES"
"""Environment variable by which `EngineGuard` learns its server's names, with commas between them."""
OPEN = ("/health", "/metrics")
"""Paths that need no token: what waits for a server to come up, or watches it, has none."""
_LOG = logging.getLogger(__name__)


# ---- settings ----


def read_token(file: str | None, host: str, variable: str = TOKEN) -> str:
    """The token that requests must carry, from a file or else the environment; '' for none, on the loopback alone.

    Raises InputError for a file that holds none, for a token that no header can carry, and for none off the loopback.
    """
    where, token = f"environment variable {variable}", os.environ.get(variable, "").strip()
    if file is not None:
        where = file
        try:
            if not Path(file).is_file():  # a FIFO would never end
                raise OSError("no regular file")
            with open(file, encoding="utf-8") as handle:
                token = handle.read(4096).strip()
        except (OSError, ValueError) as error:
            found = getattr(error, "strerror", None) or str(error)
            raise InputError(Problem(file, None, "--token-file", found, "give a text file with one line")) from None
        if not token:
            raise InputError(Problem(file, None, "--token-file", "an empty file", "write a long random token into it"))
    if token and not (token.isascii() and token.isprintable() and " " not in token and len(token) >= 16):
        remedy = "take 16 or more letters and digits, for example from `openssl rand -hex 32`"
        raise InputError(Problem(where, None, "token", "too short, or with characters that no header carries", remedy))
    if not token and not is_loopback(host):
        remedy = f"others reach it there: give --token-file or set {variable}, or listen on 127.0.0.1"
        raise InputError(Problem("command line", None, "--host", f"{host} without a token", remedy))
    return token


def names_of(host: str, more: Iterable[str] = ()) -> frozenset[str]:
    """Names that the Host header may give a server that listens on `host`. Addresses are let through beside them: a page
    cannot make a browser send one that is not in its own URL."""
    names = {"localhost", host.strip("[]").lower(), *(name.strip("[]").lower() for name in more)}
    if not is_loopback(host):
        names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
    return frozenset(names)


# ---- the middleware ----


class Guard:
    """ASGI middleware. Requests reach the application with their body read; it may take it from `receive` at once."""

    def __init__(self, app: App, token: str = "", names: frozenset[str] = frozenset(("localhost",))):
        self.app, self.names = app, names
        self._token = token.encode()
        self._held = 0
        self._room = asyncio.Condition()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return None  # a web socket is closed by the server
        refused = self._refusal(scope)
        if refused is not None:
            return await answer(send, *refused)
        held = 0
        try:
            body = bytearray()
            async with asyncio.timeout(BODY_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None  # nobody is there to be answered
                    block = message.get("body", b"")
                    if len(body) + len(block) > MAX_BODY:
                        return await answer(send, 413, f"more than {MAX_BODY} bytes: send smaller rows")
                    await self._reserve(len(block))
                    held += len(block)
                    body += block
                    if not message.get("more_body", False):
                        break
            whole, body = bytes(body), bytearray()  # it is held once, not twice
            await self._run(scope, whole, receive, send)
        except TimeoutError:
            full = self._held > BODIES // 2
            status, why = (503, "too many large requests") if full else (408, f"no whole body in {BODY_S:g} s")
            await answer(send, status, why, [(b"connection", b"close"), (b"retry-after", b"1")])
        finally:
            async with self._room:
                self._held -= held
                self._room.notify_all()
        return None

    def _refusal(self, scope: Message) -> tuple[int, str, list[tuple[bytes, bytes]]] | None:
        """Why a request goes no further: status, text and headers."""
        close = [(b"connection", b"close")]
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.lower(), []).append(value)
        if not self._known(headers.get(b"host", [])):
            return (
                400,
                "the Host header does not name this server: ask it by its address, or start it with --allow-host",
                close,
            )
        if self._token and scope["path"] not in OPEN:
            given = headers.get(b"authorization", [b""])
            scheme, _, token = given[0].partition(b" ")
            if len(given) != 1 or scheme.lower() != b"bearer" or not hmac.compare_digest(token.strip(), self._token):
                return 401, "Authorization: Bearer TOKEN is needed", [*close, (b"www-authenticate", b"Bearer")]
        for origin in headers.get(b"origin", []):
            if not self._known([origin.partition(b"://")[2]]):
                return 403, "a page of another origin may not ask", close
        has_body = headers.get(b"content-length", [b"0"]) != [b"0"] or b"transfer-encoding" in headers
        if has_body and scope["method"] != "GET":
            kinds = headers.get(b"content-type", [b""])
            if len(kinds) != 1 or kinds[0].split(b";")[0].strip().lower() != b"application/json":
                return 415, "send Content-Type: application/json", close
            length = headers.get(b"content-length", [b"0"])[0]
            if length.isdigit() and int(length[:20]) > MAX_BODY:
                return 413, f"more than {MAX_BODY} bytes: send smaller rows", close
        return None

    def _known(self, hosts: list[bytes]) -> bool:
        if len(hosts) != 1:
            return False
        text = hosts[0].decode("latin-1").strip().lower()
        host = text[1:].partition("]")[0] if text.startswith("[") else text.partition(":")[0]
        if host.rstrip(".") in self.names:
            return True
        try:
            return bool(ipaddress.ip_address(host))
        except ValueError:
            return False

    async def _reserve(self, size: int) -> None:
        async with self._room:
            await self._room.wait_for(lambda: self._held + size <= BODIES)
            self._held += size

    async def _run(self, scope: Message, body: bytes, receive: Receive, send: Send) -> None:
        """The application, with its body at hand. What it raises is one line in the log and a 500 in JSON."""
        started, given = False, False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def watched(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, replay, watched)
        except Exception as error:
            _LOG.error("%s %s: %s: %s", scope["method"], scope["path"][:80], type(error).__name__, str(error)[:200])
            if not started:
                await answer(send, 500, f"{type(error).__name__} in the server; its log has the line")


class EngineGuard(Guard):
    """The guard of vLLM's server, which makes it itself (`--middleware`) and passes it nothing: all its paths want the token,
    also those by which a trainer replaces the weights."""

    def __init__(self, app: App):
        names = frozenset(filter(None, os.environ.get(NAMES, "localhost").split(",")))
        super().__init__(app, os.environ.get("VLLM_API_KEY", ""), names)


async def answer(send: Send, status: int, why: str, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
    """A response that says why there is no other, in the shape of the application's own."""
    body = json.dumps({"detail": [{"loc": ["request"], "msg": why, "type": "value_error"}]}).encode()
    own = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*own, *headers]})
    await send({"type": "http.response.body", "body": body})
