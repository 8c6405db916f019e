"""uvicorn with deadlines: for headers, for idle connections, and for clients that do not read what they are sent."""

from __future__ import annotations

import asyncio
import socket

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.tools.http_guard import App

HEADER_S, WRITE_S, IDLE_S = 10.0, 60.0, 5
"""Seconds: until a request's headers are whole, until a client has read what it is sent, and that a connection may be kept
without a request."""
MAX_CONNECTIONS = 1024


class Connection(H11Protocol):
    """Ends a connection whose headers are not whole in `HEADER_S`, and one whose client does not read for `WRITE_S`."""

    _late: asyncio.TimerHandle | None = None
    _stuck: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._late = self.loop.call_later(HEADER_S, self.transport.abort)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before and self._late is not None:
            self._late.cancel()
            self._late = None
        elif self._late is None and (self.cycle is None or self.cycle.response_complete):
            self._late = self.loop.call_later(HEADER_S, self.transport.abort)  # the next request has begun

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stuck = self._stuck or self.loop.call_later(WRITE_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._late, self._stuck):
            if timer is not None:
                timer.cancel()


def check_port(host: str, port: int) -> None:
    """Raises InputError where another program listens."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            remedy = "end the program that listens there (perhaps an earlier `view`), or give another --port"
            found = f"{port} ({error.strerror})"
            raise InputError(Problem("command line", None, "--port", found, remedy)) from None


def run(app: App, host: str, port: int) -> None:
    """Serve an application until interrupted."""
    uvicorn.run(
        app,
        host=host,
        port=port,
        http=Connection,
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=IDLE_S,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=10,
    )
