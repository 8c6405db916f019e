"""What each artefact of a run folder is made from, and whether it still is: from the file that is read up to the user's own files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.artifacts import MADE_BY, Header, check_parent, digest, file_digest
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.core.told_settings import difference

FIRST = ("candidates", "preferences")
"""Artefacts that are made from the user's own files."""


def source_digest(recipe: Recipe, stage: str) -> str:
    """Digest of the user's own files that the first artefact of a run is made from. Raises OSError for one that is not there."""
    if stage == "preferences":
        return digest([file_digest(path) for path in _sources(recipe, stage)])
    tools = recipe.extract.tools
    trajectories = [file_digest(Path(path)) for path in recipe.extract.trajectories]
    return digest([trajectories, tools and file_digest(Path(tools))])


def _sources(recipe: Recipe, stage: str) -> list[Path]:
    if stage == "preferences":
        settings = recipe.preferences
        return [Path(p) for p in (*settings.files, *(path for paths in settings.objectives.values() for path in paths))]
    return [Path(p) for p in (*recipe.extract.trajectories, recipe.extract.tools) if p]


BEHIND = {
    "verifier": ("verifier.",),
    "chat_template": ("policy.chat_template", "policy.template_kwargs", "policy.chat."),
}
"""Field of a header to the settings that change it, as their names begin."""


def check_headers(path: Path, found: Header, told: Mapping[str, Any], **expected: str) -> None:
    """Compare header fields with what the recipe implies, all differences in one InputError. told: the recipe's settings by name."""
    text = "the recipe gives {!r}{}; use the matching recipe or re-run the stage"
    problems = []
    for name, value in expected.items():
        if getattr(found, name) != value:
            old, new = (_behind(name, side) for side in (found.settings, told))
            named = difference(old, new)
            why = text.format(value, f": {named}" if named else "")
            problems.append(Problem(str(path), 1, name, repr(getattr(found, name)), why))
    if problems:
        raise InputError(problems)


def _behind(field: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name.startswith(BEHIND.get(field, ()))}


def check_lineage(recipe: Recipe, path: Path, header: Header) -> None:
    """Refuse an artefact that was made from an older version of its parent, or whose parent was. Raises InputError.

    A parent that is not here (another job's) is no error.
    """
    if header.stage in FIRST and recipe.loop.round == 1:
        sources = _sources(recipe, header.stage)
        if sources and all(p.is_file() for p in sources) and header.parent != source_digest(recipe, header.stage):
            remedy = (
                f"they have changed since: run {MADE_BY[header.stage]} again, or name the files that it was made from"
            )
            found = f"{header.parent}, which is not {', '.join(map(str, sources[:3]))}"
            raise InputError(Problem(str(path), 1, "parent", found, remedy))
        return
    while (parent := _parent(recipe, path, header)) is not None and parent.exists():
        path, header = parent, check_parent(path, header, parent)


def _parent(recipe: Recipe, path: Path, header: Header) -> Path | None:
    """What an artefact of a recipe's run folder is made from; None for what is made from the user's files."""
    if header.stage == "pivots":
        return recipe.path(recipe.select.profiles)
    if header.stage in ("profiles", "evaluation", "audit"):
        return recipe.path("candidates.jsonl")
    if header.stage == "token_rewards":
        return recipe.path("preferences.jsonl")
    whole = recipe.home / "candidates.jsonl"  # of which a later round of the loop has a part
    return whole if header.stage == "candidates" and recipe.loop.round > 1 and path != whole else None
