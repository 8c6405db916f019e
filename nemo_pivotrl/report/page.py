"""report: one self-contained HTML page, and the same numbers as JSON, from the artefacts of a run.

Plots are SVG inside the page; it works offline and shows what is there: a run without an evaluation or without a second
training arm simply lacks those sections. The profile's sections are in `report_profile`, LLMdoctor's in `report_llmdoctor`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

from nemo_pivotrl.components import costs as ledger
from nemo_pivotrl.components.lineage import check_lineage
from nemo_pivotrl.components.metrics import read_metrics
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.artifacts import read_header
from nemo_pivotrl.core.atomic import read_json, write_atomically
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.core.lock import one_writer
from nemo_pivotrl.data.states import candidates_of
from nemo_pivotrl.pivotrl.evaluate import read_items
from nemo_pivotrl.pivotrl.evaluation_tables import TITLES
from nemo_pivotrl.report import (
    VIEW_ADDRESS,
    llmdoctor as report_llmdoctor,
    profile as report_profile,
    rounds as report_loop,
    verdict,
)
from nemo_pivotrl.report.plots import curve, plt, svg

SHOWN_SAMPLES = 12
GAIN, LOSS, UNSHOWN = "#2a7f3b", "#b3423a", "#8a8a8a"
"""Colours of a policy that gained, lost, or is not shown to have changed."""


@one_writer
def report(recipe: Recipe, fresh: bool = False) -> Path:
    """Write `report.html` and `report.json`. Raises InputError when there is nothing to report yet."""
    numbers, plots = gather(recipe)
    if len(numbers) == 1:
        first = "preferences, reward and tfpo" if recipe.algorithm == "llmdoctor" else "extract, profile and select"
        raise InputError(Problem(recipe.run_dir, None, "run_dir", "no artefacts", f"run {first} first"))
    write_atomically(recipe.path("report.json"), json.dumps(numbers, indent=2, sort_keys=True) + "\n")
    pages = Environment(loader=PackageLoader("nemo_pivotrl.report", "."), autoescape=select_autoescape(default=True))
    page = pages.get_template("page.html.jinja").render(
        title="LLMdoctor" if recipe.algorithm == "llmdoctor" else "PivotRL",
        titles=TITLES,
        plots=plots,
        view=VIEW_ADDRESS,
        llmdoctor=report_llmdoctor.view(numbers),
        **numbers,
    )
    path = recipe.path("report.html")
    write_atomically(path, page)
    return path


def gather(recipe: Recipe) -> tuple[dict[str, Any], dict[str, str]]:
    """(numbers, SVG plots) of everything the run directory holds."""
    numbers: dict[str, Any] = {"run_dir": recipe.run_dir}
    plots: dict[str, str] = {}
    if recipe.path("candidates.audit.json").exists():
        numbers["audit"] = read_json(recipe.path("candidates.audit.json"), {}, report_llmdoctor.AGAIN)
    if recipe.path("audit.json").exists():
        numbers["verifier"] = read_json(recipe.path("audit.json"), {}, report_llmdoctor.AGAIN)
        for line in ledger.read_ledger(Path(recipe.run_dir)):
            numbers["verifier"] |= {key: value for key, value in line.items() if key.startswith("ms_")}
    if recipe.path("profiles.jsonl").exists():
        report_profile.gather(recipe, numbers, plots)
    metrics = {path.parent.name: read_metrics(path) for path in sorted(Path(recipe.run_dir).glob("*/metrics.jsonl"))}
    arms = {name: rows for name, rows in metrics.items() if any("reward" in row for row in rows)}
    if arms:
        numbers["training"] = arms
        plots["training"] = _training_plot(arms)
    if recipe.path("evaluation.json").exists():
        numbers["evaluation"] = read_json(recipe.path("evaluation.json"), {"policies": dict}, report_llmdoctor.AGAIN)
        numbers["samples"] = _samples(recipe)
        plots["evaluation"] = _evaluation_plot(numbers["evaluation"])
    report_llmdoctor.gather(recipe, metrics, numbers, plots)
    report_loop.gather(recipe, numbers, plots)
    if len(numbers) > 1:
        verdict.gather(recipe, numbers)
        numbers["funnel"] = list(verdict.funnel(numbers))
    if lines := ledger.read_ledgers(Path(recipe.run_dir)):
        loop = numbers.get("loop", {})
        pivots, points = loop.get("pivots", numbers.get("pivots", {}).get("count", 0)), loop.get("points", 0.0)
        numbers["ledger"] = {
            "stages": ledger.by_stage(lines),
            "total": ledger.totals(lines, recipe.budget.gpus, pivots, points),
        }
    return numbers, plots


TRAINING = (
    ("reward", "mean reward"),
    ("mixed_group_share", "share of groups with a gradient"),
    ("val/accuracy", "accuracy on held-out turns"),
    ("val/tasks", "success in held-out tasks"),
    ("entropy", "entropy, nats a token"),
    ("val/kl", "KL to the start policy, nats a token"),
)
"""Metrics of a training that are drawn where they were measured."""


def _training_plot(arms: dict[str, list[dict[str, Any]]]) -> str:
    panels = [(key, label) for key, label in TRAINING if any(key in row for rows in arms.values() for row in rows)]
    columns = min(3, len(panels))
    size = (3.7 * columns, 2.5 * math.ceil(len(panels) / columns))
    figure, all_axes = plt.subplots(
        math.ceil(len(panels) / columns), columns, figsize=size, squeeze=False, layout="constrained"
    )
    for axes, (key, label) in zip(all_axes.flat, panels, strict=False):
        for name, rows in arms.items():
            curve(axes, rows, key, label=name, marker="o" if key.startswith("val/") else "", markersize=3)
        axes.set(xlabel="step", title=label)
        if key != "val/kl":
            axes.set_ylim(bottom=0)
    for axes in all_axes.flat[len(panels) :]:
        axes.set_visible(False)
    if len(arms) > 1:
        all_axes[0, 0].legend(frameon=False)
    return svg(figure)


def _evaluation_plot(summary: dict[str, Any]) -> str:
    """Each policy's success with its interval; the first policy's is a line through the others."""
    policies = summary["policies"]
    names = [n for n in TITLES if any(n in sets for sets in policies.values())]
    size = (1.4 + 3.2 * len(names), 0.9 + 0.36 * len(policies))
    figure, all_axes = plt.subplots(1, len(names), figsize=size, squeeze=False, sharey=True)
    labels = list(policies)
    for axes, name in zip(all_axes[0], names, strict=True):
        found = [(at, policies[label][name]) for at, label in enumerate(labels) if name in policies[label]]
        for at, entry in found:
            mean, low, high = (100 * entry[key] for key in ("mean", "low", "high"))
            change = entry.get("difference")
            colour = "#4a78b5" if not change else GAIN if change["low"] > 0 else LOSS if change["high"] < 0 else UNSHOWN
            axes.errorbar([mean], [at], xerr=[[mean - low], [high - mean]], fmt="o", color=colour, capsize=3)
            axes.annotate(f"{mean:.0f}", (mean, at), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8)
        axes.axvline(100 * found[0][1]["mean"], color="#888", linewidth=0.8, linestyle="--")
        axes.set(title=TITLES[name], xlabel="%", ylim=(len(labels) - 0.5, -0.7))
        axes.set_xlim(-2, 102)
    all_axes[0][0].set_yticks(range(len(labels)), labels)
    return svg(figure)


def _samples(recipe: Recipe) -> list[dict[str, Any]]:
    """Held-out turns where the last policy's first sample differs from the first policy's verdict, both shown."""
    path = recipe.path("evaluation.jsonl")
    check_lineage(recipe, path, read_header(path, "evaluation"))
    states = {c.candidate_id: c for c in candidates_of(recipe.path("candidates.jsonl"), "validation")}
    rows = [row for row in read_items(recipe.path("evaluation.jsonl")) if row["set"] == "one_turn"]
    labels = list(dict.fromkeys(row["policy"] for row in rows))
    by_item: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_item.setdefault(row["item"], {})[row["policy"]] = row
    chosen = recipe.grpo.name if recipe.grpo.name in labels else labels[-1]
    found = []
    for item, by_policy in sorted(by_item.items()):
        before, after = by_policy[labels[0]], by_policy[chosen]
        if before["category"] != after["category"] and len(found) < SHOWN_SAMPLES:
            candidate = states[item]
            wanted = candidate.expected.content or " ".join(f"{c.name} {c.arguments}" for c in candidate.expected.calls)
            last = candidate.messages[-1]
            found.append(
                {
                    "state": f"{last['role']}: {last['content']}",
                    "expected": wanted,
                    "item": item,
                    "labels": [labels[0], chosen],
                    "before": before,
                    "after": after,
                }
            )
    return found
