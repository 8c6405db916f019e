"""The options of a command as `shell_options.toml` lists them: one name each, with their values, whatever the spelling."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any


@dataclass(frozen=True, slots=True)
class Options:
    """What a command's options mean."""

    names: dict[str, str]
    """Each name of an option to the one it goes by."""
    valued: frozenset[str]
    """Options that take a value."""
    optional: frozenset[str]
    """Long options that take one only after `=`."""
    order: tuple[frozenset[str], ...]
    glued: str
    counts: str
    number: str
    operands: str
    unordered: bool
    slash: str | None
    placed: frozenset[str]
    before: frozenset[str]


@cache
def option_table() -> dict[str, Options]:
    """Command (`ls`, `git add`) to its options."""
    text = files("nemo_pivotrl.verifiers").joinpath("shell_options.toml").read_text(encoding="utf-8")
    return {command: _options(said) for command, said in tomllib.loads(text).items()}


def _options(said: dict[str, Any]) -> Options:
    names: dict[str, str] = {}
    valued, optional = set(), set()
    for option in said["options"].split():
        every = option.rstrip("=?").split("/")
        chosen = min(every, key=lambda name: len(name) > 1)
        names |= dict.fromkeys(every, chosen)
        valued |= {chosen} if option.endswith("=") else set()
        optional |= {chosen} if option.endswith("?") else set()
    return Options(
        names,
        frozenset(valued),
        frozenset(optional),
        tuple(frozenset(group.split()) for group in said.get("order", ())),
        said.get("glued", ""),
        said.get("counts", ""),
        said.get("number", ""),
        said.get("operands", "files"),
        said.get("unordered", False),
        said.get("slash"),
        frozenset(said.get("placed", "").split()),
        frozenset(names[option] for option in said.get("before", "").split()),
    )


class NotListed(Exception):
    """An option that the table does not have."""


def read_options(
    key: str, options: Options, words: Sequence[str], rules: frozenset[str], used: set[str]
) -> list[tuple[str, str]]:
    """Options with their values, and operands under the name ''. Raises NotListed."""
    read: list[tuple[str, str]] = []
    pending = list(words)
    if key == "tar" and pending and "shell_flag_clusters" in rules and re.fullmatch(r"[a-zA-Z]+", pending[0]):
        pending[0] = "-" + pending[0]  # the old style: letters without a dash
        if set(pending[0][1:-1]) & set("bCfgHIKLNTX"):
            raise NotListed  # their values follow all letters
        used.add("shell_flag_clusters")
    while pending:
        word = pending.pop(0)
        if word == "--":
            keep = [("", "--")] if key.startswith("git ") else []
            read += [*keep, *(("", operand) for operand in pending)]
            break
        if word.startswith("--"):
            read.append(_long_option(options, word, pending, rules, used))
        elif len(word) > 1 and word[0] == "-":
            read += _cluster(options, word, pending, rules, used)
        else:
            read.append(("", word))
    return read


def _long_option(
    options: Options, word: str, pending: list[str], rules: frozenset[str], used: set[str]
) -> tuple[str, str]:
    option, equals, value = word[2:].partition("=")
    name = options.names.get(option)
    if name is None or len(option) < 2 or (equals and name not in options.valued | options.optional):
        raise NotListed
    if "shell_long_options" not in rules:
        raise NotListed
    used.add("shell_long_options")
    if not equals and name in options.valued:
        value = pending.pop(0) if pending else ""
    elif equals and name in options.optional:
        value = "=" + value
    return name, value


def _cluster(
    options: Options, word: str, pending: list[str], rules: frozenset[str], used: set[str]
) -> list[tuple[str, str]]:
    """The options of `-abc`: letters up to one that takes a value, which is the rest or the next word."""
    if len(word) > 2 and "shell_flag_clusters" not in rules:
        raise NotListed
    used.add("shell_flag_clusters")
    if options.number and word[1:].isdigit():
        return [(options.number, word[1:])]
    found = []
    letters = word[1:]
    for index, letter in enumerate(letters, start=1):
        name = options.names.get(letter)
        if name is None:
            raise NotListed
        rest = letters[index:]
        if name in options.valued:
            found.append((name, rest if rest else pending.pop(0) if pending else ""))
            break
        if letter in options.glued:
            follows = not rest and letter in options.counts and pending and pending[0].isdigit()
            value = pending.pop(0) if follows else rest
            found.append((name, "=" + value if value and name in options.optional else value))
            break
        found.append((name, ""))
    return found
