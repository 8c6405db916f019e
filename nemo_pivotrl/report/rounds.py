"""The report's history of the rounds: a table of them, and their curves over the steps of all rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_pivotrl.components.metrics import read_metrics
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.pivotrl.loop import gains, read_history
from nemo_pivotrl.report.plots import curve, plt, svg

PANELS = (
    ("val/accuracy", "held-out accuracy"),
    ("reward_std", "std of reward in a group"),
    ("retention/accuracy", "out of domain"),
)


def gather(recipe: Recipe, numbers: dict[str, Any], plots: dict[str, str]) -> None:
    """Add the history of `loop.jsonl`, where there is one. Pivots and points are of all rounds, for the costs."""
    events = read_history(Path(recipe.run_dir))
    if not events:
        return
    rounds: dict[int, dict[str, Any]] = {}
    for event in events:
        if event["event"] != "stopped":
            rounds.setdefault(event["round"], {"retention": None}).update(
                {k: v for k, v in event.items() if k not in ("event", "text")}
            )
    ended = [r for r in rounds.values() if "step" in r]  # a run that is under way has one that has not
    pivots, points = gains(events)
    numbers["loop"] = {
        "rounds": ended,
        "events": [f"{e['event']}: {e['text']}" for e in events],
        "pivots": pivots,
        "points": points,
        "result": events[-1].get("result"),
    }
    plots["loop"] = _plot([curves(recipe, r["round"]) for r in ended])


def curves(recipe: Recipe, number: int) -> list[dict[str, Any]]:
    """The metrics of a round."""
    folder = Path(recipe.run_dir) if number == 1 else recipe.path(f"round-{number:02d}")
    return read_metrics(folder / recipe.grpo.name / "metrics.jsonl")


def cumulative(rounds: list[list[dict[str, Any]]]) -> tuple[list[dict[str, Any]], list[int]]:
    """(rows of all rounds with steps counted on, steps at which a later round began)."""
    rows: list[dict[str, Any]] = []
    borders, before = [], 0
    for own in rounds:
        borders.append(before)
        rows += [{**row, "step": before + row["step"]} for row in own]
        before = rows[-1]["step"] if rows else before
    return rows, borders[1:]


def _plot(rounds: list[list[dict[str, Any]]]) -> str:
    rows, borders = cumulative(rounds)
    panels = [panel for panel in PANELS if any(panel[0] in row for row in rows)]
    if not panels:
        return ""
    figure, all_axes = plt.subplots(1, len(panels), figsize=(3.7 * len(panels), 2.6), squeeze=False)
    for axes, (key, label) in zip(all_axes[0], panels, strict=True):
        curve(axes, rows, key, color="#4a78b5")
        for border in borders:
            axes.axvline(border, color="#444", linewidth=0.8, linestyle="--")
        axes.set(xlabel="step of all rounds", title=label)
    return svg(figure)
