"""What the trace before an action shows of the world it acts in: the text of files, and where the shell is.

Only what a tool's output or the agent's own call says for certain is taken: a listing of a whole file with its line
numbers, a file that the agent wrote, edits of those that apply. A command that may write forgets all files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_pivotrl.core.types import Message
from nemo_pivotrl.verifiers.arguments import SHELL_NAMES, snake
from nemo_pivotrl.verifiers.edits import apply, edit_of, without_whole_range
from nemo_pivotrl.verifiers.swe import PATH_KEYS, category_of
from nemo_pivotrl.verifiers.values import clean_path

MAX_FILE_CHARS = 200_000
NUMBERED = re.compile(r" *(\d{1,7})\t(.*)")
CUT = re.compile(
    r"<response clipped>|\[truncated|characters? (?:omitted|truncated)|lines? (?:omitted|truncated)", re.IGNORECASE
)
FAILED = re.compile(r"\s*(?:error\b|no replacement|invalid|no such file|.{0,80}did not appear verbatim)", re.IGNORECASE)
WHERE = re.compile(r"\[Current working directory: (/[^\]\n]*)\]")
READS_ONLY = re.compile(r"(?:cat|cd|echo|grep|head|ls|nl|pwd|pytest|rg|tail|tree|wc|which)(?:\s|$)")


def files_shown(messages: Sequence[Message]) -> dict[str, str]:
    """Path in one spelling -> text, for files that the trace shows in full."""
    found: dict[str, str] = {}
    calls: dict[str, tuple[str, dict[str, Any]]] = {}
    unanswered: list[str] = []
    for message in messages:
        for number, call in enumerate(message.get("tool_calls") or ()):
            function = call.get("function", {})
            key = str(call.get("id") or f"unnamed {number}")
            calls[key] = str(function.get("name")), _decoded(function.get("arguments"))
            unanswered.append(key)
        if message.get("role") == "tool" and unanswered:
            key = str(message.get("tool_call_id") or unanswered[0])
            if key in unanswered:
                unanswered.remove(key)
                _after(found, *calls[key], str(message.get("content") or ""))
    return found


def working_directory(messages: Sequence[Message]) -> str | None:
    """The shell's folder after the last command whose output shows it; None if no output does."""
    for message in reversed(messages):
        if message.get("role") == "tool" and (places := WHERE.findall(str(message.get("content") or "")[-2000:])):
            return str(places[-1]).rstrip("/") or None
    return None


def _decoded(arguments: Any) -> dict[str, Any]:
    try:
        value = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _after(found: dict[str, str], tool: str, arguments: Mapping[str, Any], output: str) -> None:
    """Bring `found` up to date with one call and its output."""
    edit = edit_of(tool, arguments)
    named = {snake(key): value for key, value in without_whole_range(tool, arguments).items()}
    path = next((clean_path(named[key]) for key in PATH_KEYS if isinstance(named.get(key), str)), "")
    commands = [value for key, value in named.items() if key in SHELL_NAMES and isinstance(value, str)]
    if edit is not None:
        if FAILED.match(output):
            return
        text = edit.new if edit.kind == "whole" else found.get(edit.path)
        result = apply(edit, text) if text is not None else None
        found.pop(edit.path, None)
        if edit.kind in ("unified", "starred", "text"):
            found.clear()
        elif result is not None and len(result) <= MAX_FILE_CHARS:
            found[edit.path] = result
    elif category_of(tool) == "bash" or (commands and named.get("command") != "view"):
        if not all(_reads_only(command) for command in commands):
            found.clear()
    elif path and category_of(tool) in ("edit", "read"):
        if named.get("command", "view") != "view":
            found.pop(path, None)
        elif not named.keys() - {"command", "security_risk", *PATH_KEYS} and (text := _listed(output)) is not None:
            found[path] = text


def _reads_only(command: str) -> bool:
    if any(mark in command for mark in (">", "$(", "`", "tee ")):
        return False
    return all(READS_ONLY.match(part.strip()) for part in re.split(r"&&|\|\||[;|\n]", command) if part.strip())


def _listed(output: str) -> str | None:
    """The text of a listing with line numbers from 1 on, whatever stands before it."""
    if len(output) > 2 * MAX_FILE_CHARS or CUT.search(output):
        return None
    lines: list[str] = []
    for line in output.split("\n"):
        found = NUMBERED.fullmatch(line)
        if found and int(found[1]) == len(lines) + 1:
            lines.append(found[2])
        elif lines and line.strip():
            return None
    return "\n".join(lines) if lines else None
