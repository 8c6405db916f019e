"""Outside preference files -> `Preference`: the format of each record found by looking, all errors of all files in one go.

A record that is malformed is an error, or is left out and named with `preferences.on_invalid=skip`. One that is well formed but
prefers nothing (a tie, twice the same answer, an empty answer) or that two answers to one prompt cannot express is skipped and
counted under a reason; so are repeats. `preference_formats.py` has the formats.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_pivotrl.config import Preferences
from nemo_pivotrl.core.artifacts import digest
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.core.types import Preference
from nemo_pivotrl.data.preference_formats import (
    PROMPTS,
    READERS,
    REFUSED,
    ROWS,
    SCORES,
    Pair,
    Skip,
    format_of,
    refuse_columns,
    with_rating_rows,
    with_system,
)
from nemo_pivotrl.data.readers import FieldError, read_records

USED = frozenset(
    [
        *("chosen", "rejected", "chosen_messages", "rejected_messages", "rejected_response", "system", "system_prompt"),
        *("chosen_response", "rejected_response", "response_0", "response_1", "response_2", "response1", "response2"),
        *("preference_strength", "overall_preference", "better_response_id", "safer_response_id", "context", "history"),
        *("completions", "generations", "ratings", "rating", "status", "preferred_output", "non_preferred_output"),
        *(*PROMPTS, *(name for pair in SCORES for name in pair)),
    ]
)
"""Columns that some format reads."""


@dataclass
class Found:
    """Everything read."""

    preferences: list[Preference] = field(default_factory=list)
    """All of split `train`: splitting is the stage's business."""
    records: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    contradictions: int = 0
    """Kept pairs that another kept pair states the other way round."""
    files: dict[str, Counter[str]] = field(default_factory=dict)
    """File to what its records were taken for."""
    left_out: list[Problem] = field(default_factory=list)
    """With `on_invalid: skip`: what was wrong with each record that was left out."""
    unused: Counter[str] = field(default_factory=Counter)
    """Columns that nothing reads, and how many records have them."""


def read_preferences(settings: Preferences) -> Found:
    """The preferences of all files, each pair once. Raises InputError listing every bad record of every file, unless
    `on_invalid: skip` leaves them out."""
    if settings.format not in ("auto", *READERS):
        known = f"use one of auto, {', '.join(READERS)}"
        raise InputError(Problem("recipe", None, "preferences.format", settings.format, known))
    sources = [(settings.objective, path) for path in settings.files]
    sources += [(objective, path) for objective, paths in settings.objectives.items() for path in paths]
    if not sources:
        raise InputError(Problem("recipe", None, "preferences.files", "nothing", "name at least one preference file"))
    found, problems = Found(), []
    kept: dict[str, Preference] = {}
    for objective, path in sources:
        problems += _read_file(path, objective, settings, found, kept)
    if problems:
        raise InputError(problems)
    found.preferences = list(kept.values())
    found.contradictions = sum(
        _identity(p.objective, Pair(p.prompt, p.rejected, p.chosen)) in kept for p in found.preferences
    )
    assert len(kept) + found.skipped.total() == found.records, "a record is neither kept nor counted"
    return found


def _read_file(
    path: str, objective: str, settings: Preferences, found: Found, kept: dict[str, Preference]
) -> list[Problem]:
    """Add a file's preferences to `kept` and its counts to `found`. Returns the errors."""
    broken: list[Problem] = []
    formats = found.files.setdefault(path, Counter())
    bad: list[Problem] = []
    before, usual = found.records, ""
    for line, record in with_rating_rows(read_records(Path(path), broken, "preferences.files")):
        rows = record.pop(ROWS, 1) if isinstance(record, dict) else 1
        found.records += rows
        found.skipped["joined_with_the_row_before"] += rows - 1
        name = settings.format if settings.format != "auto" else format_of(record)
        if not name or (name in REFUSED and usual):
            name = usual or "trl"  # a row that lacks a field is told which one its neighbours have
        usual = usual or (name if name in READERS else "")
        formats[name] += rows
        try:
            preference = _read_record(record, name, settings, objective, f"{path}:{line}", found.unused)
        except FieldError as error:
            bad.append(Problem(path, line, error.field, error.found, error.remedy))
        except Skip as reason:
            found.skipped[str(reason)] += 1
        else:
            if kept.setdefault(preference.preference_id, preference) is not preference:
                found.skipped["duplicate"] += 1
    found.skipped += Counter()  # drops the zeros
    lines = [p for p in broken if p.field == "line"]
    errors = [p for p in broken if p.field != "line"]
    if found.records == before and not broken:
        remedy = "the file is empty; check the path or drop it from the recipe"
        errors.append(Problem(path, None, "file", "no records", remedy))
    if settings.on_invalid == "error":
        return [*errors, *sorted([*lines, *bad], key=lambda p: p.line or 0)]
    found.records += len(lines)
    found.skipped["unreadable"] += len(bad) + len(lines)
    found.skipped += Counter()
    found.left_out += [*bad, *lines]
    return errors


def _read_record(
    record: Any, name: str, settings: Preferences, objective: str, source: str, unused: Counter[str]
) -> Preference:
    """Raises FieldError or Skip."""
    if not isinstance(record, dict):
        raise FieldError("record", record, "each record is a JSON object")
    if name in REFUSED:
        raise FieldError("record", name, REFUSED[name])
    refuse_columns(record)
    try:
        pair = with_system(record, READERS[name](record, settings))
    except (TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise FieldError("record", f"{type(error).__name__}: {error}", f"its shape is not the one of {name}") from error
    unused.update(key for key, value in record.items() if key not in USED and value not in (None, "", [], {}))
    return _preference(pair, objective, source)


def preference_to_row(preference: Preference) -> dict[str, Any]:
    """The preference as an artefact's row."""
    return dataclasses.asdict(preference)


def preference_of_row(row: dict[str, Any]) -> Preference:
    """The preference of a row that `preference_to_row` wrote."""
    return Preference(**{**row, "prompt": tuple(row["prompt"])})


def prompt_digest(preference: Preference) -> str:
    """Equal for pairs with the same prompt: what the split goes by."""
    return digest(list(preference.prompt))


def _identity(objective: str, pair: Pair) -> str:
    return digest([objective, list(pair.prompt), pair.chosen, pair.rejected])


def _preference(pair: Pair, objective: str, source: str) -> Preference:
    if not pair.chosen.strip() or not pair.rejected.strip():
        raise Skip("empty_answer")
    if pair.chosen.strip() == pair.rejected.strip():
        raise Skip("identical_answers")
    return Preference(_identity(objective, pair), "train", objective, pair.prompt, pair.chosen, pair.rejected, source)
