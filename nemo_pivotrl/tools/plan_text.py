"""`plan` on a terminal, and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from nemo_pivotrl.config import Recipe
from nemo_pivotrl.tools.plan import Memory, Verdict
from nemo_pivotrl.tools.plan_costs import Cost, all_gpus, assumptions, generators

NAME = 58


def as_text(recipe: Recipe, path: str, verdict: Verdict) -> str:
    """Tables of models, memory and costs, and one line for each verdict at the end."""
    cluster = recipe.cluster
    lines = [f"{path}: {recipe.algorithm} on {all_gpus(recipe)} x {cluster.gpu.upper()}"]
    if cluster.generation_nodes:
        lines[0] += f", {generators(recipe)} of them for rollouts"
    for model in verdict.models:
        lines.append(f"  {model.role:<9} {model.parameters / 1e9:8.2f} B parameters   {model.source}")
    for memory in verdict.memory:
        lines += ["", f"{memory.phase:<9} {memory.layout}, {memory.note}"]
        lines += [f"  {name:<{NAME}}{gib:9.1f} GiB" for name, gib in memory.parts.items() if gib >= 0.05]
        lines.append(f"  {'at most':<{NAME}}{memory.peak:9.1f} GiB of {memory.limit:.1f}")
    for cost in verdict.costs:
        lines += ["", *_cost(cost)]
    if verdict.costs:
        told = [f"{name}={value:,g}" for name, value in assumptions(recipe).items()]
        lines += ["", "It rests on (set them in the recipe, or behind it on this command line):"]
        lines += [f"  {'  '.join(told[i : i + 3])}" for i in range(0, len(told), 3)]
    return "\n".join([*lines, "", *[f"note: {note}" for note in verdict.notes], *verdict_lines(verdict)])


def _cost(cost: Cost) -> list[str]:
    price = "" if cost.price is None else f"  costs {cost.price:,.0f}"
    lines = [f"{cost.stage:<9} {cost.gpu_hours:,.1f} GPU-hours {cost.unit}{price}"]
    return lines + [f"  {name:<{NAME}}{number(value):>13}" for name, value in cost.figures.items()]


def number(value: float) -> str:
    """1,234 or 12.3 or 1.5e+12."""
    if abs(value) >= 1e10:
        return f"{value:.2e}"
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:,.2f}"


def verdict_lines(verdict: Verdict) -> list[str]:
    """What fits and what does not, and what to change."""
    lines = [f"NOT POSSIBLE: {p.field}: {p.found}\n    -> {p.remedy}" for p in verdict.problems]
    for m in verdict.memory:
        lines.append(_fit(m))
        lines += [f"    -> {remedy}" for remedy in m.remedies[:6]]
    return lines


def _fit(m: Memory) -> str:
    word = f"fits: {m.phase}" if m.fits else f"DOES NOT FIT: {m.phase}"
    rest = f"{m.limit - m.peak:.1f} GiB to spare" if m.fits else f"{m.peak - m.limit:.1f} GiB too much"
    return f"{word} needs {m.peak:.1f} of {m.limit:.1f} GiB, {rest}"


def as_json(recipe: Recipe, path: str, verdict: Verdict) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "recipe": path,
        "good": verdict.good,
        "gpus": all_gpus(recipe),
        "gpu": recipe.cluster.gpu,
        "models": [
            {"role": m.role, "folder": m.folder, "source": m.source, "parameters": m.parameters} for m in verdict.models
        ],
        "memory": [asdict(m) | {"fits": m.fits} for m in verdict.memory],
        "costs": [asdict(c) for c in verdict.costs],
        "assumptions": assumptions(recipe),
        "problems": [asdict(p) for p in verdict.problems],
        "notes": verdict.notes,
    }
