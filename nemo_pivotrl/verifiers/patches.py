"""Patches in one form: which file they change, how, and at which lines.

`read_unified` reads what `git diff` writes, every line of it: modes, new, deleted, renamed and copied files count. A patch
that says anything else, or whose line counts do not add up, is no unified patch here and stays as it is written.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nemo_pivotrl.verifiers.values import clean_path

MAX_LINES = 4000
HUNK = re.compile(r"@@ -(\d{1,9})(?:,(\d{1,9}))? \+\d{1,9}(?:,(\d{1,9}))? @@.*")
GIT_FILE = re.compile(r"diff --git a/(.+) b/(.+)")
FACTS = (
    "old mode ",
    "new mode ",
    "new file mode ",
    "deleted file mode ",
    "rename from ",
    "rename to ",
    "copy from ",
    "copy to ",
)
NOTED = ("index ", "similarity index ", "dissimilarity index ")
"""Lines that say nothing of their own."""
STARRED = ("*** Update File: ", "*** Add File: ", "*** Delete File: ", "*** Move to: ")


@dataclass(frozen=True, slots=True)
class Change:
    """Lines of a file that others take the place of."""

    line: int
    """1-based, in the file before the patch."""
    gone: tuple[str, ...]
    put: tuple[str, ...]
    before: str | None
    """The line before it that the patch quotes; None where it quotes none."""
    after: str | None


@dataclass(slots=True)
class FilePatch:
    """What a patch does to one file."""

    old: str = ""
    new: str = ""
    facts: list[str] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    unended: set[str] = field(default_factory=set)
    """Of the marks `-`, `+` and blank those after whose line stands that the file ends without a line end."""

    def form(self) -> tuple[Any, ...]:
        """Equal for patches of a file that do the same, up to the file's last line end."""
        facts = sorted(fact for fact in self.facts if fact != "new file mode 100644" and not fact.startswith("deleted"))
        said = tuple((c.line, c.gone, c.put, c.before, c.after) for c in self.changes)
        return self.old, self.new, tuple(facts), said


def read_unified(text: str) -> list[FilePatch] | None:
    """The files of a unified patch; None for what is none."""
    lines = text.split("\n")
    if len(lines) > MAX_LINES:
        return None
    found: list[FilePatch] = []
    at = 0
    while at < len(lines):
        line = lines[at]
        git = GIT_FILE.fullmatch(line)
        if git:
            found.append(FilePatch(clean_path(git[1]), clean_path(git[2])))
        elif line.startswith("--- ") and at + 1 < len(lines) and lines[at + 1].startswith("+++ "):
            if not found or found[-1].changes or not _names_follow(lines, at):
                found.append(FilePatch())
            found[-1].old, found[-1].new = _names(line, lines[at + 1])
            at += 1
        elif (hunk := HUNK.fullmatch(line)) and found:
            end = _read_hunk(lines, at + 1, hunk, found[-1])
            if end is None:
                return None
            at = end - 1
        elif line.startswith(FACTS) and found and not found[-1].changes:
            found[-1].facts.append(line.strip())
        elif not line.startswith(NOTED) and line.strip():
            return None
        at += 1
    for file in found:
        file.facts += ["new file mode 100644"] if file.old == "/dev/null" else []
        if any(fact.startswith("new file") for fact in file.facts):
            file.old = "/dev/null"
        if any(fact.startswith("deleted") for fact in file.facts):
            file.new = "/dev/null"
    if not any(file.changes or file.facts for file in found):
        return None
    return sorted(found, key=lambda file: (file.new, file.old)) if len({f.new for f in found}) == len(found) else found


def _names_follow(lines: Sequence[str], at: int) -> bool:
    """Whether `---` at this line belongs to the `diff --git` above it."""
    while at > 0:
        at -= 1
        if lines[at].startswith("diff --git"):
            return True
        if not lines[at].startswith((*FACTS, *NOTED)):
            return False
    return False


def _names(old: str, new: str) -> tuple[str, str]:
    names = [line[4:].split("\t")[0].strip() for line in (old, new)]
    # a/ and b/ are git's own, if both sides have theirs or are no file
    if all(n == "/dev/null" or n.startswith(p) for n, p in zip(names, ("a/", "b/"), strict=True)):
        names = [n if n == "/dev/null" else n[2:] for n in names]
    return clean_path(names[0]), clean_path(names[1])


def _read_hunk(lines: Sequence[str], at: int, hunk: re.Match[str], file: FilePatch) -> int | None:
    """Add to `file` the changes of the hunk whose lines begin at `at`; the line after it, or None where the counts do not add up."""
    begin, old_left, new_left = int(hunk[1]), int(hunk[2] or 1), int(hunk[3] or 1)
    position = begin + (old_left == 0)
    gone: list[str] = []
    put: list[str] = []
    before: str | None = None
    last = ""

    def close(after: str | None) -> None:
        if gone or put:
            file.changes.append(Change(position - len(gone), tuple(gone), tuple(put), before, after))
        gone.clear()
        put.clear()

    while old_left or new_left:
        if at >= len(lines):
            return None
        line = lines[at]
        mark = line[:1] or " "
        if mark == "-":
            gone.append(line[1:])
            position, old_left = position + 1, old_left - 1
        elif mark == "+":
            put.append(line[1:])
            new_left -= 1
        elif mark == " ":
            close(line[1:])
            before = line[1:]
            position, old_left, new_left = position + 1, old_left - 1, new_left - 1
        elif mark == "\\":
            file.unended.add(last)
        else:
            return None
        last, at = mark, at + 1
    if old_left < 0 or new_left < 0:
        return None
    close(None)
    if at < len(lines) and lines[at].startswith("\\"):
        file.unended.add(last)
        return at + 1
    return at


def read_starred(text: str) -> tuple[str, ...] | None:
    """The lines of an `*** Update File:` patch, paths in one spelling; None for what is none. They find their place by context."""
    lines = text.strip("\n").split("\n")
    if len(lines) > MAX_LINES or not lines[0].startswith("*** "):
        return None
    lines = lines[lines[0] == "*** Begin Patch" : len(lines) - (lines[-1] == "*** End Patch")]
    found = []
    for line in lines:
        header = next((h for h in STARRED if line.startswith(h)), "")
        found.append(header + clean_path(line[len(header) :].strip()) if header else line)
    return tuple(found)


def apply_changes(changes: Sequence[Change], text: str) -> str | None:
    """`text` with the changes made; None where a line is not as they say."""
    lines = text.split("\n")
    shift = 0
    for change in changes:
        at = change.line - 1 + shift
        end = at + len(change.gone)
        quoted_before = change.before is None or (0 < at <= len(lines) and lines[at - 1] == change.before)
        quoted_after = change.after is None or (end < len(lines) and lines[end] == change.after)
        if (
            not 0 <= at <= end <= len(lines)
            or tuple(lines[at:end]) != change.gone
            or not (quoted_before and quoted_after)
        ):
            return None
        lines[at:end] = change.put
        shift += len(change.put) - len(change.gone)
    return "\n".join(lines)
