"""The model card of a trained model: README.md beside its weights, as the Hugging Face hub shows it.

It says what the numbers of the run say and no more. It stands outside the folder's SHA256SUMS: it is there to be edited.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_pivotrl import __version__
from nemo_pivotrl.backends.hub import id_of_snapshot
from nemo_pivotrl.components.conclusions import Check
from nemo_pivotrl.components.metrics import read_metrics
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.atomic import write_atomically
from nemo_pivotrl.core.model_folder import CARD

METHODS = {
    "policy": ("PivotRL", "arXiv 2603.21383", "single-turn GRPO on pivots"),
    "doctor": ("LLMdoctor", "arXiv 2601.10416", "TFPO on token rewards"),
}


def write_card(
    folder: Path, recipe: Recipe, role: str, facts: Sequence[str], numbers: Mapping[str, str], checks: Sequence[Check]
) -> None:
    """Write the card of the model in `folder`, trained as `role` of the recipe. One that is there stays: somebody may have edited
    it, and a training that publishes anew makes the folder anew.

    facts: sentences about data and training. numbers: metrics.jsonl's name to its heading. checks: of the training's end.
    """
    if (folder / CARD).exists():
        return
    method, paper, how = METHODS[role]
    start = recipe.model(role).model_name
    base = id_of_snapshot(start)
    lines = [
        "---",
        *([f"base_model: {base}"] if base else []),
        "library_name: transformers",
        "pipeline_tag: text-generation",
    ]
    lines += [
        f"tags: [{method.lower()}, nemo-pivotrl]",
        "---",
        "",
        f"# {Path(recipe.run_dir).name}: {folder.parent.name}",
        "",
    ]
    lines += [
        f"Trained from `{base or Path(start).name}` by {method} ({paper}), {how}, with nemo_pivotrl {__version__}.",
        "",
    ]
    lines += [*(f"- {fact}" for fact in facts), ""]
    lines += _table(recipe, folder, numbers)
    warned = [f"- {check.name}: {check.found}. {check.remedy}." for check in checks if not check.good]
    lines += ["## What the training warns of", "", *(warned or ["Nothing that its checks know."]), ""]
    if role == "doctor":
        lines += [
            "It is no assistant by itself: it steers the patient, whose tokenizer it has, while that decodes.",
            "",
        ]
    write_atomically(folder / CARD, "\n".join(lines))


def _table(recipe: Recipe, folder: Path, numbers: Mapping[str, str]) -> list[str]:
    """First and last value of the metrics that were measured."""
    rows = read_metrics(folder.parent / "metrics.jsonl")
    found: list[tuple[str, list[Any]]] = [
        (title, [r[name] for r in rows if name in r]) for name, title in numbers.items()
    ]
    measured = [f"| {title} | {values[0]:.4g} | {values[-1]:.4g} |" for title, values in found if values]
    return ["| measured | first | last |", "|---|---|---|", *measured, ""] if measured else []
