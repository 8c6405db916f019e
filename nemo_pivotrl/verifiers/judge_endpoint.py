"""HTTP to a judge: one deadline from connect to the last byte, and the key to nobody but the host that it belongs to.

What a server sends is bounded in size and time, whatever it drips: requests run on an event loop of their own, where the
deadline cancels connecting, headers, `100 Continue` and body alike. Redirects are not followed, compressed answers are not
unpacked, and text of a server is shown without the key and without control characters.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

import httpx

from nemo_pivotrl import config
from nemo_pivotrl.backends.api_keys import HOSTS, goes_to, is_loopback, key_of
from nemo_pivotrl.backends.http_retry import RETRIED, retry_after
from nemo_pivotrl.core.errors import InputError, Problem, short
from nemo_pivotrl.verifiers.base import VerifierFault

MAX_ANSWER = 1 << 20
"""Bytes of a response that are read."""
KEY_PIECE = 8
"""Characters of the key in a row that no message shows."""


class PassingFault(VerifierFault):
    """A fault that another request may not meet. `pause`: the seconds that the server asked for."""

    def __init__(self, kind: str, message: str, pause: float = 0.0):
        super().__init__(kind, message)
        self.pause = pause


class Endpoint:
    """One OpenAI-compatible server. Nothing that it raises or shows holds the API key. Threads may share it."""

    def __init__(self, settings: config.JudgeServer, timeout_s: float, section: str):
        self._key = key_for(settings, section)
        # also where it is not sent: a server that had it otherwise must not bring it into a file
        self._pieces = _traces(os.environ.get(settings.api_key_env, "").strip())
        self._base, self._timeout_s = settings.base_url.rstrip("/"), timeout_s
        self._concurrency = settings.concurrency
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._client: httpx.AsyncClient | None = None
        self._slots: asyncio.Semaphore | None = None
        self.close: Callable[[], object] = lambda: None  # until the first request there is nothing to close

    def show(self, text: str, limit: int = 200) -> str:
        """`text` for a message: one short line without the key, which servers like to quote, and without control characters,
        which would move a terminal's cursor or hide what stands there."""
        for piece in self._pieces:
            text = text.replace(piece, "[API key]")
        line = " ".join(text.split())
        return short("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line), limit)

    def exchange(self, method: str, path: str, body: Any = None) -> bytes:
        """The body of a good response. Raises VerifierFault, and `PassingFault` where it pays to ask again."""
        self._start()
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(self._exchange(method, path, body), self._loop).result()

    def _start(self) -> None:
        """Make the client and the loop that it runs on, once."""
        with self._lock:
            if self._loop is not None:
                return
            self._loop = loop = asyncio.new_event_loop()
            self._slots = asyncio.Semaphore(self._concurrency)
            self._client = httpx.AsyncClient(
                headers={"Accept-Encoding": "identity"}
                | ({"Authorization": f"Bearer {self._key}"} if self._key else {}),
                timeout=None,  # the deadline is `_exchange`'s
                limits=httpx.Limits(max_connections=self._concurrency, max_keepalive_connections=self._concurrency),
                follow_redirects=False,
                trust_env=not is_loopback(httpx.URL(self._base).host),  # no proxy stands between here and here
            )
            thread = threading.Thread(target=_run, args=(loop, self._client), name="judge", daemon=True)
            thread.start()
            self.close = weakref.finalize(self, _stop, loop, thread)

    async def _exchange(self, method: str, path: str, body: Any) -> bytes:
        assert self._client is not None and self._slots is not None
        async with self._slots:  # waiting for a turn is no time-out of the server's
            try:
                async with asyncio.timeout(self._timeout_s):
                    return await self._answer(method, path, body)
            except TimeoutError:
                found = f"no whole response from {self._base} in {self._timeout_s:g} s"
                raise PassingFault("judge_timeout", found) from None
            except (httpx.RequestError, httpx.InvalidURL) as error:
                found = self.show(f"{type(error).__name__}: {error}")
                raise PassingFault("judge_unreachable", f"{self._base}: {found}") from None

    async def _answer(self, method: str, path: str, body: Any) -> bytes:
        assert self._client is not None
        read = bytearray()
        async with self._client.stream(method, f"{self._base}/{path}", json=body) as response:
            if (packed := response.headers.get("content-encoding", "identity").strip().lower()) != "identity":
                raise PassingFault("judge_unreadable", f"a response packed as {self.show(packed, 40)}, unasked for")
            async for block in response.aiter_raw():
                read += block
                if len(read) > MAX_ANSWER:
                    raise PassingFault("judge_unreadable", f"a response of more than {MAX_ANSWER} bytes")
        if response.status_code == 200:
            return bytes(read)
        found = f"status {response.status_code} from {self._base}: {self.show(read.decode('utf-8', 'replace'))}"
        if response.status_code in RETRIED:
            raise PassingFault("judge_http", found, retry_after(response.headers.get("retry-after", "")) or 0.0)
        raise VerifierFault("judge_refused", found)


def _run(loop: asyncio.AbstractEventLoop, client: httpx.AsyncClient) -> None:
    """The thread of an endpoint's loop: until `_stop`, then close what is open."""
    asyncio.set_event_loop(loop)
    loop.run_forever()
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(client.aclose())
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    """Have the loop end and wait for it, not for long: this may run while the interpreter exits."""
    loop.call_soon_threadsafe(loop.stop)
    thread.join(2.0)


# ---- the key ----


def key_for(settings: config.JudgeServer, section: str) -> str:
    """The key that requests to `base_url` carry; '' for none. Raises InputError where it must not go there.

    `OPENAI_API_KEY` belongs to OpenAI unless the recipe says otherwise, and another host is asked without it.
    """
    variable, host = settings.api_key_env, settings.api_key_host.strip()
    key, url = key_of(variable, f"{section}.api_key_env"), httpx.URL(settings.base_url)
    if not key or goes_to(variable, [host], url, f"{section}.base_url"):
        return key
    if host or variable not in HOSTS:
        remedy = f"base_url goes to {url.host}: give the key's own host there, or another api_key_env"
        if not host:
            remedy = f"name the host that the key in {variable} belongs to: it is sent to no other"
        raise InputError(Problem("recipe", None, f"{section}.api_key_host", host or "nothing", remedy))
    text = "%s: the key in %s belongs to %s and is not sent to %s; if it is, set %s.api_key_host"
    logging.getLogger(__name__).warning(text, section, variable, HOSTS[variable], url.host, section)
    return ""


def _traces(key: str) -> list[str]:
    """Texts that no message shows: the key and every long piece of it, as it is, backwards and in base64."""
    if not key:
        return []
    forms = [key, key[::-1], base64.b64encode(key.encode()).decode().rstrip("=")]
    return [*forms, *(form[i : i + KEY_PIECE] for form in forms for i in range(len(form) - KEY_PIECE + 1))]
