"""What an edit of a file does, in one form: its result where the file is known, else what it says, word for word.

The text of a file is known where the row gives it (`files`) or the trace shows it (`trace.py`). Without it nobody can say
whether a shorter quotation finds the same place, or any.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_pivotrl.verifiers.arguments import Form, Reading, snake
from nemo_pivotrl.verifiers.patches import FilePatch, apply_changes, read_starred, read_unified
from nemo_pivotrl.verifiers.swe import PATH_KEYS, category_of
from nemo_pivotrl.verifiers.values import clean_path

OLD = ("old_str", "old_string", "old_text", "old", "search")
NEW = ("new_str", "new_string", "new_text", "new", "replace")
PATCH = ("patch", "diff", "input")
WHOLE = ("file_text", "content", "contents", "text")
INSERT_AT = ("insert_line", "line", "line_number")
FORMS = {"create": WHOLE, "str_replace": OLD, "insert": INSERT_AT}
"""Sub-command of an editor -> arguments of which it needs one."""
SOURCE = re.compile(r"\.(c|cc|cpp|cs|css|go|h|hpp|java|js|json|jsx|kt|php|py|rb|rs|scss|swift|toml|ts|tsx)$")
"""Files in which blanks at a line's end say nothing, but in a text of several lines."""
SEVERAL_LINES = re.compile(r"\"\"\"|'''|`|<<|R\"")
"""What may begin such a text."""


@dataclass(frozen=True, slots=True)
class Edit:
    """What an edit call says, its arguments' names aside."""

    path: str
    kind: str
    """`replace`, `replace_all`, `insert`, `whole`, `unified`, `starred` or `text`."""
    old: str = ""
    new: str = ""
    line: int = 0
    files: tuple[FilePatch, ...] = ()
    read: frozenset[str] = frozenset()
    """Names of the arguments that were read; what the others say is not in here."""


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

    def edit(kind: str, **said: Any) -> Edit:
        return Edit(path, kind, read=frozenset(key for key in arguments if snake(key) in read), **said)

    path = clean_path(first(PATH_KEYS) or "")
    old = first(OLD)
    at = first(INSERT_AT, int) if old is None else None
    if old is not None:
        every = first(("replace_all",), bool) is True
        return edit("replace_all" if every else "replace", old=old, new=first(NEW) or "")
    patch = first(PATCH) if at is None else None
    if patch is not None:
        files = read_unified(patch)
        if files is not None:
            if all(path not in (file.old, file.new) for file in files):
                read -= set(PATH_KEYS)  # the patch names its files itself
            return edit("unified", files=tuple(files))
        starred = read_starred(patch)
        return edit("text" if starred is None else "starred", new=patch if starred is None else "\n".join(starred))
    whole = first(NEW + WHOLE if at is not None else WHOLE)
    if whole is None:
        return None
    return edit("whole", new=whole) if at is None else edit("insert", new=whole, line=at)


def other_arguments(edit: Edit, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `arguments` that `edit` does not say."""
    return {key: value for key, value in arguments.items() if key not in edit.read}


def without_whole_range(tool: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A view's arguments without a range that is all of the file."""
    whole = category_of(tool) in ("edit", "read") and arguments.get("view_range") == [1, -1]
    return {key: value for key, value in arguments.items() if key != "view_range" or not whole}


def read_edit(c: Reading, edit: Edit, files: Mapping[str, str]) -> Form:
    """The form of an edit. `files`: path in one spelling -> text."""
    c.spend(8 * (len(edit.old) + len(edit.new)) + 64 * sum(len(file.changes) for file in edit.files))
    path = edit.path
    if edit.kind == "unified" and len(edit.files) == 1:
        path = edit.files[0].new
    text = files.get(path)
    # the last line's end, where a patch speaks of it: `apply` does not know it
    unended = tuple((file.new, *sorted(file.unended)) for file in edit.files if file.unended)
    if unended and c.on("whitespace"):
        unended = ()
    if text is not None and "edit_effect" in c.rules and edit.kind != "whole" and not unended:
        c.spend(4 * len(text))
        result = apply(edit, text)
        if result is not None:
            c.used.add("edit_effect")
            return "file", path, _settled(c, path, result, whole=True)
    if edit.kind == "unified":
        return "patch", unended, *(file.form() for file in edit.files)
    if edit.kind == "whole":
        return "file", edit.path, _settled(c, edit.path, edit.new, whole=True)
    new = _settled(c, edit.path, edit.new, whole=edit.kind == "insert")
    return edit.kind, edit.path, edit.line, _settled(c, "", edit.old, whole=False), new


def _settled(c: Reading, path: str, text: str, whole: bool) -> str:
    """`text` without blanks at the line ends of source, and without the last line's end."""
    if "whitespace" not in c.rules:
        return text
    settled = text
    if SOURCE.search(path) and not SEVERAL_LINES.search(text):
        settled = re.sub(r"(?<![ \t\\])[ \t]+\n", "\n", settled)
    if whole:
        settled = settled.removesuffix("\n")
    c.used |= {"whitespace"} if settled != text else set()
    return settled


def apply(edit: Edit, text: str) -> str | None:
    """`text` after the edit; None where it does not apply (the old text is missing, or there several times)."""
    if edit.kind == "whole":
        return edit.new
    if edit.kind == "insert":
        lines = text.split("\n")
        if not 0 <= edit.line <= len(lines):
            return None
        return "\n".join([*lines[: edit.line], *edit.new.removesuffix("\n").split("\n"), *lines[edit.line :]])
    if edit.kind in ("replace", "replace_all"):
        found = text.count(edit.old) if edit.old else 0
        return text.replace(edit.old, edit.new) if found == 1 or (found and edit.kind == "replace_all") else None
    if edit.kind == "unified" and len(edit.files) == 1:
        file = edit.files[0]
        return apply_changes(file.changes, text) if file.old == file.new and not file.facts else None
    return None
