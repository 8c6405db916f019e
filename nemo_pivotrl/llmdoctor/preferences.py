"""preferences: preference files -> `preferences.jsonl`, each pair once, split by prompt.

Every record is either kept or counted under the reason it was skipped for: kept + skipped = records, always.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_pivotrl.components.conclusions import conclude
from nemo_pivotrl.components.lineage import source_digest
from nemo_pivotrl.components.stage_checks import preference_checks
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.artifacts import Header, write_artefact
from nemo_pivotrl.core.atomic import write_atomically
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.core.lock import one_writer
from nemo_pivotrl.core.types import Preference
from nemo_pivotrl.data.preferences import Found, preference_to_row, prompt_digest, read_preferences
from nemo_pivotrl.data.splits import split_by_task


@one_writer
def preferences(recipe: Recipe, fresh: bool = False) -> Path:
    """Write `preferences.jsonl` and its audit; returns the artefact's path. Raises InputError for bad records."""
    settings = recipe.preferences
    found = read_preferences(settings)
    prompts = [prompt_digest(p) for p in found.preferences]
    splits = split_by_task(prompts, settings.validation_share, recipe.seed)
    kept = [dataclasses.replace(p, split=splits[d]) for p, d in zip(found.preferences, prompts, strict=True)]
    audit = make_audit(found, kept, list(splits.values()))
    print(audit_table(audit))
    path = recipe.path("preferences.jsonl")
    if not kept:
        remedy = "see the skipped records above; check preferences.format, or add files"
        raise InputError(Problem(str(path), None, "preferences", "none kept", remedy))
    parent = source_digest(recipe, "preferences")
    write_artefact(path, Header("preferences", recipe.digest("preferences"), parent), map(preference_to_row, kept))
    write_atomically(recipe.path("preferences.audit.json"), json.dumps(audit, indent=2, sort_keys=True) + "\n")
    conclude(Path(recipe.run_dir), "preferences", preference_checks(audit))
    return path


MAX_NAMED = 1000
"""Left-out records that the audit names."""


def make_audit(found: Found, kept: Sequence[Preference], splits: Sequence[str]) -> dict[str, Any]:
    """What became of every record, and how often the longer answer is the chosen one."""
    longer = sum(len(p.chosen) > len(p.rejected) for p in kept)
    return {
        "records": found.records,
        "kept": {s: sum(p.split == s for p in kept) for s in ("train", "validation")},
        "prompts": {s: sum(split == s for split in splits) for s in ("train", "validation")},
        "skipped": dict(sorted(found.skipped.items())),
        "contradictions": found.contradictions,
        "files": {path: dict(formats) for path, formats in found.files.items()},
        "unused_columns": dict(found.unused.most_common()),
        "left_out": [str(problem) for problem in found.left_out[:MAX_NAMED]],
        "chosen_is_longer": round(longer / len(kept), 4) if kept else None,
    }


def audit_table(audit: dict[str, Any]) -> str:
    """The audit as text."""
    kept, skipped = sum(audit["kept"].values()), sum(audit["skipped"].values())
    lines = [f"{audit['records']} records"]
    lines += [f"  kept     {kept:>7}  (train {audit['kept']['train']}, validation {audit['kept']['validation']})"]
    lines += [f"  skipped  {skipped:>7}"]
    lines += [f"    {reason:<26} {count:>7}" for reason, count in audit["skipped"].items()]
    lines += [f"  {kept} + {skipped} = {audit['records']}"]
    for path, formats in audit["files"].items():
        lines.append(f"{path}: taken for " + (", ".join(f"{name} ({n})" for name, n in formats.items()) or "nothing"))
    if audit["unused_columns"]:
        lines.append(
            "seen and not used: " + ", ".join(f"{n} ({c})" for n, c in list(audit["unused_columns"].items())[:15])
        )
    if audit["left_out"]:
        lines.append("left out by preferences.on_invalid=skip, all named in preferences.audit.json:")
        lines += [f"  {problem}" for problem in audit["left_out"][:5]]
    if audit["contradictions"]:
        lines += [f"  {audit['contradictions']} kept pairs are stated both ways round"]
    if audit["chosen_is_longer"] is not None:
        lines += [f"  the chosen answer is the longer one in {audit['chosen_is_longer']:.0%} of the pairs"]
    return "\n".join(lines)
