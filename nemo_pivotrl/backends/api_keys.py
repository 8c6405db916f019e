"""Which servers get which API key: one rule for judges and for samplers' servers.

A key goes to the hosts that the recipe names for it, over https or within this machine. An entry that begins with `http://` says
that the network to that host is private: then the key goes there over http, too.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nemo_pivotrl.core.errors import InputError, Problem

if TYPE_CHECKING:
    import httpx

HOSTS = {"OPENAI_API_KEY": "api.openai.com"}
"""Variables whose key belongs to a host by its name."""
PRIVATE = "http://"


def key_of(variable: str, setting: str) -> str:
    """The key that a variable holds; '' for none. Raises InputError, in `setting`'s name, for one that no header can carry."""
    key = os.environ.get(variable, "").strip()
    if key and (not (key.isascii() and key.isprintable()) or " " in key):
        found, remedy = f"a key in {variable} that no header can carry", "check the variable's value"
        raise InputError(Problem("environment", None, setting, found, remedy))
    return key


def goes_to(variable: str, hosts: Sequence[str], url: httpx.URL, setting: str) -> bool:
    """Whether the key in `variable`, which belongs to `hosts`, goes to `url`, which the recipe names in `setting`.

    Raises InputError for a host that it belongs to and that is asked over http, off this machine.
    """
    named = [host.strip().lower() for host in hosts if host.strip()]
    private = {host.removeprefix(PRIVATE).rstrip("/.") for host in named if host.startswith(PRIVATE)}
    owners = private | {host.rstrip(".") for host in named} or {HOSTS.get(variable, "")}
    if not owners & addresses(url):
        return False
    if url.scheme != "https" and not is_loopback(url.host) and not private & addresses(url):
        remedy = f"use https: over http everybody on the way reads the key in {variable}"
        raise InputError(Problem("recipe", None, setting, f"{url.scheme}://{url.host}", remedy))
    return True


def addresses(url: httpx.URL) -> set[str]:
    """What a recipe may call the URL's host: with its port and without it."""
    host = url.host.lower().rstrip(".")
    shown = f"[{host}]" if ":" in host else host
    port = url.port or {"https": 443, "http": 80}.get(url.scheme)
    return {host, shown, f"{shown}:{port}"}


def is_loopback(host: str) -> bool:
    """Whether a host is this machine by its name: only processes here reach it."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
