"""report: one self-contained HTML page, and the same numbers as JSON, from the artefacts of a run.

Plots are SVG inside the page; it works offline and shows what is there: a run without an evaluation or without a second
training arm simply lacks those sections. The profile's sections are in `report_profile`, LLMdoctor's in `report_llmdoctor`.
"""

from __future__ import annotations

import json
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
from nemo_pivotrl.report import llmdoctor as report_llmdoctor, profile as report_profile, rounds as report_loop
from nemo_pivotrl.report.plots import curve, plt, svg

SHOWN_SAMPLES = 12


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
    if lines := ledger.read_ledgers(Path(recipe.run_dir)):
        loop = numbers.get("loop", {})
        pivots, points = loop.get("pivots", numbers.get("pivots", {}).get("count", 0)), loop.get("points", 0.0)
        numbers["ledger"] = {
            "stages": ledger.by_stage(lines),
            "total": ledger.totals(lines, recipe.budget.gpus, pivots, points),
        }
    return numbers, plots


def _training_plot(arms: dict[str, list[dict[str, Any]]]) -> str:
    panels = (
        ("reward", "mean reward"),
        ("reward_std", "std of reward in a group"),
        ("val/accuracy", "held-out accuracy"),
    )
    figure, all_axes = plt.subplots(1, 3, figsize=(11, 2.6))
    for axes, (key, label) in zip(all_axes, panels, strict=True):
        for name, rows in arms.items():
            curve(axes, rows, key, label=name)
        axes.set(xlabel="step", title=label)
        axes.set_ylim(bottom=0)
    all_axes[0].legend(frameon=False)
    return svg(figure)


def _evaluation_plot(summary: dict[str, Any]) -> str:
    policies = summary["policies"]
    names = [n for n in TITLES if any(n in sets for sets in policies.values())]
    figure, all_axes = plt.subplots(1, len(names), figsize=(3.6 * len(names), 2.4), squeeze=False)
    for axes, name in zip(all_axes[0], names, strict=True):
        entries = [(label, sets[name]) for label, sets in policies.items() if name in sets]
        means = [100 * e["mean"] for _, e in entries]
        spread = [
            [100 * (e["mean"] - e["low"]) for _, e in entries],
            [100 * (e["high"] - e["mean"]) for _, e in entries],
        ]
        axes.bar(range(len(entries)), means, yerr=spread, color="#4a78b5", capsize=3)
        axes.set_xticks(range(len(entries)), [label for label, _ in entries])
        axes.set(title=TITLES[name], ylabel="%")
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
                    "labels": [labels[0], chosen],
                    "before": before,
                    "after": after,
                }
            )
    return found
