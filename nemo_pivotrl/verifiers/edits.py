"""Do two edits of a file do the same? By their effect, not by how much of the surroundings they quote.

An edit is reduced to what it takes away and what it puts in, between the text before and the text after that it quotes.
Two edits are the same when these cores are equal and the quoted surroundings fit each other; where the text of the file
is known (`files` of the row), both are applied to it and the results are compared.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_pivotrl.verifiers.arguments import Comparison, clean_path, compare, snake, tidy
from nemo_pivotrl.verifiers.swe import PATH_KEYS, category_of

OLD = ("old_str", "old_string", "old_text", "old", "search")
NEW = ("new_str", "new_string", "new_text", "new", "replace")
PATCH = ("patch", "diff", "input")
WHOLE = ("file_text", "content", "contents", "text")
INSERT_AT = ("insert_line", "line", "line_number")
FORMS = {"create": WHOLE, "str_replace": OLD, "insert": INSERT_AT}
"""Sub-command of an editor -> arguments of which it needs one."""
MAX_PATCH_LINES = 4000
STARRED = ("*** Update File: ", "*** Add File: ", "*** Delete File: ", "*** Move to: ")
UNIFIED = ("--- ", "+++ ", "rename to ")
HUNK = re.compile(r"@@ -\d{1,9}(?:,(\d{1,9}))? \+\d{1,9}(?:,(\d{1,9}))? @@")


@dataclass(frozen=True, slots=True)
class Edit:
    """What an edit call says, its arguments' names aside."""

    path: str
    steps: tuple[Step, ...]
    read: frozenset[str] = frozenset()
    """Names of the arguments that were read; what the others say is not in `steps`."""


@dataclass(frozen=True, slots=True)
class Step:
    """One change: `old` becomes `new` (everywhere, if `every`); `old` None: `new` is the whole file, or goes after `line`.

    The path of a file that the change adds, deletes or moves says so.
    """

    path: str
    old: str | None
    new: str
    every: bool = False
    line: int | None = None
    place: str = ""
    """Where a patch says that it is, as after `@@ def f():`; empty where it does not."""


def edit_of(tool: str, arguments: Mapping[str, Any]) -> Edit | None:
    """The edit of a call, or None where it is no edit that can be read (a view, an undo, an unknown form)."""
    named = {snake(key): value for key, value in arguments.items()}
    command, read = named.get("command"), {"command"}
    form = FORMS.get(command, ()) if isinstance(command, str) else ()
    if category_of(tool) != "edit" or command in ("view", "undo_edit") or (form and not named.keys() & set(form)):
        return None

    def first(keys: tuple[str, ...], kind: type = str) -> Any:
        found = next((key for key in keys if type(named.get(key)) is kind), None)
        read.update({found} if found else ())
        return named.get(found) if found else None

    def edit(*steps: Step) -> Edit:
        return Edit(path, steps, frozenset(key for key in arguments if snake(key) in read))

    path = clean_path(first(PATH_KEYS) or "")
    old = first(OLD)
    at = first(INSERT_AT, int) if old is None else None
    if old is not None:
        return edit(Step(path, old, first(NEW) or "", every=first(("replace_all",), bool) is True))
    patch = first(PATCH) if at is None else None
    if patch is not None:
        steps = read_patch(patch, path)
        if steps is not None and all(step.path != path for step in steps):
            read -= set(PATH_KEYS)  # the patch names its files itself
        return None if steps is None else edit(*steps)
    whole = first(NEW + WHOLE if at is not None else WHOLE)
    return None if whole is None else edit(Step(path, None, whole, line=at))


def other_arguments(edit: Edit, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `arguments` that `edit` does not say."""
    return {key: value for key, value in arguments.items() if key not in edit.read}


def read_patch(text: str, path: str) -> tuple[Step, ...] | None:
    """Steps of a unified diff or of an `*** Update File:` patch, line numbers aside; None for neither."""
    lines = text.replace("\r\n", "\n").split("\n")
    if len(lines) > MAX_PATCH_LINES:
        return None
    steps: list[Step] = []
    old: list[str] = []
    new: list[str] = []

    def close() -> None:
        if old or new:
            steps.append(Step(path, "\n".join(old), "\n".join(new), place=place))
        old.clear()
        new.clear()

    place = ""
    headers = STARRED if text.lstrip().startswith("*** ") else UNIFIED
    inside, source, promised = False, "", [0, 0]  # lines that the hunk is still to have, of old and of new
    for line in lines:
        header = next((h for h in headers if line.startswith(h)), "") if not any(promised) else ""
        name = line[len(header) :].split("\t")[0].strip()
        if header == "--- ":
            close()
            source, inside = name.removeprefix("a/"), False
        elif header == "+++ ":
            close()
            path, inside = _changed_path(source, name.removeprefix("b/")), False
        elif header:
            close()
            place = ""
            path = f"{path} -> {clean_path(name)}" if header == "*** Move to: " else clean_path(name)
            path += {"*** Delete File: ": " (deleted)", "*** Add File: ": " (added)"}.get(header, "")
            inside = headers is STARRED
            if header not in ("*** Update File: ", "*** Add File: "):
                steps.append(Step(path, None, ""))
        elif line.startswith(("@@", "diff --git")):
            place = place if inside and not (old or new) else ""
            close()
            if headers is STARRED:  # several lines name a place from the outside in; a unified diff has line numbers
                place = f"{place} {line[2:].strip()}".strip()
            counts = HUNK.match(line)
            promised = [int(count or 1) for count in counts.groups()] if counts else [0, 0]
            inside = line.startswith("@@")
        elif not inside:
            continue
        elif line.startswith(("-", "+", " ")) or line == "":
            for index, (side, mark) in enumerate(((old, "+"), (new, "-"))):
                if line[:1] != mark:
                    side.append(line[1:])
                    promised[index] = max(0, promised[index] - 1)
    close()
    return tuple(steps) if steps else None


def _changed_path(source: str, target: str) -> str:
    if target == "/dev/null":
        return clean_path(source) + " (deleted)"
    if source == "/dev/null":
        return clean_path(target) + " (added)"
    return clean_path(target) if source in ("", target) else f"{clean_path(source)} -> {clean_path(target)}"


def core(step: Step) -> tuple[str, str, str, str]:
    """(quoted before, taken away, put in, quoted after), the common ends of old and new being surroundings."""
    old, new = (_lines(text) for text in (step.old or "", step.new))
    before = _shared(old, new)
    after = _shared(old[before:][::-1], new[before:][::-1])
    return old[:before], old[before : len(old) - after], new[before : len(new) - after], old[len(old) - after :]


def _shared(left: str, right: str) -> int:
    """How many characters two texts begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def _lines(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.replace("\r\n", "\n").split("\n"))


def same_change(expected: Step, actual: Step) -> bool:
    """Whether two replacements take away and put in the same at what may be the same place."""
    ours, theirs = expected.place, actual.place
    if expected.every != actual.every or not (ours.endswith(theirs) or theirs.endswith(ours)):
        return False
    (before, gone, put, after), (their_before, their_gone, their_put, their_after) = core(expected), core(actual)
    if (gone, put) != (their_gone, their_put):
        return False
    if (
        before + after != their_before + their_after
        and not gone
        and not (before and their_before)
        and not (after and their_after)
    ):
        return False  # an insertion with nothing in common that says where
    fits_before = before.endswith(their_before) or their_before.endswith(before)
    return fits_before and (after.startswith(their_after) or their_after.startswith(after))


def apply(edit: Edit, text: str) -> str | None:
    """`text` after the edit; None where it does not apply (the old text is missing, or there several times)."""
    for step in edit.steps:
        if step.old is None:
            if step.line is None:
                text = step.new
                continue
            lines = text.split("\n")
            if not 0 <= step.line <= len(lines):
                return None
            text = "\n".join([*lines[: step.line], *step.new.removesuffix("\n").split("\n"), *lines[step.line :]])
        elif not step.old or text.count(step.old) != 1:
            if not (step.every and step.old and step.old in text):
                return None
            text = text.replace(step.old, step.new)
        else:
            text = text.replace(step.old, step.new)
    return text


def compare_edits(c: Comparison, expected: Edit, actual: Edit, files: Mapping[str, Any]) -> None:
    """Record in `c.differences` where two edits are not the same."""
    for edit in (expected, actual):
        c.spend(8 * sum(len(step.old or "") + len(step.new) for step in edit.steps))
    ours, theirs = ([step.path for step in edit.steps] for edit in (expected, actual))
    if ours != theirs:
        c.differ("path", "path", ours, theirs)
        return
    text = next((files[p] for p in files if clean_path(p) == expected.path and isinstance(files[p], str)), None)
    if text is not None and "edit_effect" in c.rules and len(set(ours)) == 1:
        c.spend(4 * len(text))
        results = apply(expected, text), apply(actual, text)
        if results[0] is not None:  # else the row's file is not the one the expert saw: fall through
            same = results[1] is not None and tidy(results[0]) == tidy(results[1])
            if not c.allows("edit_effect", same):
                c.differ(
                    "edit", "effect", "the expert's result", "another text" if results[1] is not None else "no match"
                )
            return
    for index, (step, other) in enumerate(zip(expected.steps, actual.steps, strict=True)):
        place = f"change {index + 1}"
        if (step.old is None) != (other.old is None) or step.line != other.line:
            c.differ("edit", place, _form(step), _form(other))
        elif step.old is None:
            compare(c, place, step.new, other.new, {}, "python" if step.path.endswith(".py") else "text")
        elif (step.old, step.new, step.every, step.place) != (
            other.old,
            other.new,
            other.every,
            other.place,
        ) and not c.allows("edit_effect", same_change(step, other)):
            c.differ("edit", place, step.new, other.new)


def _form(step: Step) -> str:
    return (
        "a replacement"
        if step.old is not None
        else f"an insertion at {step.line}"
        if step.line is not None
        else "a whole file"
    )
