"""A judge's HTTP: the key goes to nobody but the host that it belongs to, and no message shows it.

Text of a server is shown without the key and without control characters.
"""

from __future__ import annotations

import base64
import logging
import os
from typing import Any

import httpx

from nemo_pivotrl import config
from nemo_pivotrl.backends.api_keys import HOSTS, goes_to, is_loopback, key_of
from nemo_pivotrl.backends.http_client import UNREACHABLE, HttpClient, Unreadable
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
        key = key_for(settings, section)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        # also where it is not sent: a server that had it otherwise must not bring it into a file
        self._pieces = _traces(os.environ.get(settings.api_key_env, "").strip())
        self._base, self._timeout_s = settings.base_url.rstrip("/"), timeout_s
        here = is_loopback(httpx.URL(self._base).host)  # no proxy stands between here and here
        self._client = HttpClient(settings.concurrency, not here, "judge")
        self.close = self._client.close

    def show(self, text: str, limit: int = 200) -> str:
        """`text` for a message: one short line without the key, which servers like to quote, and without control characters,
        which would move a terminal's cursor or hide what stands there."""
        for piece in self._pieces:
            text = text.replace(piece, "[API key]")
        line = " ".join(text.split())
        return short("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line), limit)

    def exchange(self, method: str, path: str, body: Any = None) -> bytes:
        """The body of a good response. Raises VerifierFault, and `PassingFault` where it pays to ask again."""
        try:
            found = self._client.exchange(
                method, f"{self._base}/{path}", self._timeout_s, MAX_ANSWER, body, self._headers
            )
        except TimeoutError:
            told = f"no whole response from {self._base} in {self._timeout_s:g} s"
            raise PassingFault("judge_timeout", told) from None
        except Unreadable as error:
            raise PassingFault("judge_unreadable", self.show(str(error))) from None
        except UNREACHABLE as error:
            told = self.show(f"{type(error).__name__}: {error}")
            raise PassingFault("judge_unreachable", f"{self._base}: {told}") from None
        if found.status == 200:
            return found.body
        told = f"status {found.status} from {self._base}: {self.show(found.body.decode('utf-8', 'replace'))}"
        if found.status in RETRIED:
            raise PassingFault("judge_http", told, retry_after(found.headers.get("retry-after", "")) or 0.0)
        raise VerifierFault("judge_refused", told)


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
