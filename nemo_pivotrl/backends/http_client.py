"""HTTP to a sampler's servers and to judges: one deadline from connect to the last byte, and an answer bounded in size.

What a server sends is bounded whatever it drips: requests run on an event loop of their own, where the deadline cancels
connecting, headers, `100 Continue` and body alike. Redirects are not followed, and compressed answers are not unpacked.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any

import httpx

UNREACHABLE = (httpx.RequestError, httpx.InvalidURL, ConnectionError)
"""What `exchange` raises where no response comes; the last where the client is closed."""


class Unreadable(Exception):
    """A response that is longer than asked for, or compressed."""


@dataclass(frozen=True, slots=True)
class Response:
    """A whole response, whatever its status."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class HttpClient:
    """Threads may share it. `connections`: requests at a time, None for any number; others wait, which is no part of their deadline.
    `proxies`: by the environment."""

    def __init__(self, connections: int | None, proxies: bool, name: str):
        self._connections, self._proxies, self._name = connections, proxies, name
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._client: httpx.AsyncClient | None = None
        self._slots: asyncio.Semaphore | None = None
        self._closed = False
        self._stop: Callable[[], object] = lambda: None  # until the first request there is nothing to stop

    def exchange(
        self,
        method: str,
        url: str,
        seconds: float,
        most: int,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        """A response of at most `most` bytes, whole within `seconds`. `body` is sent as JSON.

        Raises TimeoutError, Unreadable and what UNREACHABLE names.
        """
        with self._lock:
            if self._closed:
                raise ConnectionError("the client is closed")
            if self._loop is None:
                self._start()
            assert self._loop is not None
            asked = asyncio.run_coroutine_threadsafe(
                self._exchange(method, url, seconds, most, body, headers or {}), self._loop
            )
        try:
            return asked.result()
        except CancelledError:
            raise ConnectionError("the client was closed") from None

    def close(self) -> None:
        """End requests that are under way, as `ConnectionError`, and give the connections back; the end of the object does so too."""
        with self._lock:
            self._closed = True
            self._stop()

    def _start(self) -> None:
        """Make the client and the loop that it runs on."""
        self._loop = loop = asyncio.new_event_loop()
        self._slots = asyncio.Semaphore(self._connections) if self._connections else None
        self._client = httpx.AsyncClient(
            headers={"Accept-Encoding": "identity"},
            timeout=None,  # the deadline is `_exchange`'s
            limits=httpx.Limits(max_connections=self._connections, max_keepalive_connections=self._connections or 64),
            follow_redirects=False,
            trust_env=self._proxies,
        )
        thread = threading.Thread(target=_run, args=(loop, self._client), name=self._name, daemon=True)
        thread.start()
        self._stop = weakref.finalize(self, _end, loop, thread)

    async def _exchange(self, *asked: Any) -> Response:
        if self._slots is None:
            return await self._within(*asked)
        async with self._slots:
            return await self._within(*asked)

    async def _within(
        self, method: str, url: str, seconds: float, most: int, body: Any, headers: Mapping[str, str]
    ) -> Response:
        assert self._client is not None
        read = bytearray()
        async with (
            asyncio.timeout(seconds),
            self._client.stream(method, url, json=body, headers=dict(headers)) as response,
        ):
            if (packed := response.headers.get("content-encoding", "identity").strip().lower()) != "identity":
                raise Unreadable(f"a response packed as {packed}, unasked for")
            async for block in response.aiter_raw():
                read += block
                if len(read) > most:
                    raise Unreadable(f"a response of more than {most} bytes")
            return Response(response.status_code, response.headers, bytes(read))


def _run(loop: asyncio.AbstractEventLoop, client: httpx.AsyncClient) -> None:
    """The thread of a client's loop: until `_end`, then close what is open."""
    asyncio.set_event_loop(loop)
    loop.run_forever()
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))  # who waits for them is told
    loop.run_until_complete(client.aclose())
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


def _end(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    """Have the loop end and wait for it, not for long: this may run while the interpreter exits."""
    loop.call_soon_threadsafe(loop.stop)
    thread.join(2.0)
