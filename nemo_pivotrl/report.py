"""report: one self-contained HTML page, and the same numbers as JSON, from the artefacts of a run.

Plots are SVG inside the page; it works offline and shows what is there: a run without an evaluation or without a second
training arm simply lacks those sections. LLMdoctor's sections are in `report_llmdoctor`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

from nemo_pivotrl import pivotrl, report_llmdoctor
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.plots import curve, plt, svg
from nemo_pivotrl.records import (
    Header,
    InputError,
    Problem,
    Profile,
    check_parent,
    read_header,
    read_rows,
    write_atomically,
)
from nemo_pivotrl.responses import candidate_of_row
from nemo_pivotrl.stages.evaluate import TITLES, read_items
from nemo_pivotrl.stages.ledger import read_ledger
from nemo_pivotrl.stages.metrics import read_metrics
from nemo_pivotrl.stages.profile_rows import profile_of_row
from nemo_pivotrl.stages.select import FATES, depth_band, survival

COLOURS = dict(zip(FATES, ("#2a7f3b", "#b3423a", "#4a78b5", "#8a8a8a", "#c9a227", "#b9b9b9", "#000000"), strict=True))
SHOWN_SAMPLES = 12


def report(recipe: Recipe, fresh: bool = False) -> Path:
    """Write `report.html` and `report.json`. Raises InputError when there is nothing to report yet."""
    numbers, plots = gather(recipe)
    if len(numbers) == 1:
        first = "preferences, reward and tfpo" if recipe.algorithm == "llmdoctor" else "extract, profile and select"
        raise InputError(Problem(recipe.run_dir, None, "run_dir", "no artefacts", f"run {first} first"))
    write_atomically(recipe.path("report.json"), json.dumps(numbers, indent=2, sort_keys=True) + "\n")
    pages = Environment(loader=PackageLoader("nemo_pivotrl", "."), autoescape=select_autoescape(default=True))
    page = pages.get_template("report.html.jinja").render(
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
        numbers["audit"] = json.loads(recipe.path("candidates.audit.json").read_text(encoding="utf-8"))
    if recipe.path("audit.json").exists():
        numbers["verifier"] = json.loads(recipe.path("audit.json").read_text(encoding="utf-8"))
    if recipe.path("profiles.jsonl").exists():
        read_header(recipe.path("profiles.jsonl"), "profiles")
        _profiles(recipe, numbers, plots)
    metrics = {path.parent.name: read_metrics(path) for path in sorted(Path(recipe.run_dir).glob("*/metrics.jsonl"))}
    arms = {name: rows for name, rows in metrics.items() if any("reward" in row for row in rows)}
    if arms:
        numbers["training"] = arms
        plots["training"] = _training_plot(arms)
    if recipe.path("evaluation.json").exists():
        numbers["evaluation"] = json.loads(recipe.path("evaluation.json").read_text(encoding="utf-8"))
        numbers["samples"] = _samples(recipe)
        plots["evaluation"] = _evaluation_plot(numbers["evaluation"])
    report_llmdoctor.gather(recipe, metrics, numbers, plots)
    ledger = read_ledger(Path(recipe.run_dir))
    if ledger:
        numbers["ledger"] = _ledger(ledger, numbers.get("pivots", {}).get("count", 0))
    return numbers, plots


def _profiles(recipe: Recipe, numbers: dict[str, Any], plots: dict[str, str]) -> None:
    profiles = [profile_of_row(row) for row in read_rows(recipe.path("profiles.jsonl"))]
    train = [p for p in profiles if p.candidate.split == "train"]
    source = recipe.path(recipe.select.output)
    header: Header | None = read_header(source, "pivots") if source.exists() else None
    chosen = {row["provenance"]["candidate_id"] for row in read_rows(source)} if header else set()
    lam = float(header.extra["lambda_diff"]) if header else recipe.select.lambda_diff
    rates = [pivotrl.statistics(p.rewards).mean for p in train if p.failure is None]
    numbers["profile"] = {
        "candidates": len(train),
        "num_generations": max((len(p.samples) for p in train), default=0),
        "constant_share": sum(r in (0.0, 1.0) for r in rates) / max(1, len(rates)),
        "mean_reward": sum(rates) / max(1, len(rates)),
        "failed": sum(p.failure is not None for p in profiles),
        "hit_rate_counts": _counts(train),
    }
    if header:
        numbers["pivots"] = {
            "count": header.extra["pivots"],
            **{k: header.extra[k] for k in ("rule", "lambda_diff", "version")},
        }
    by_depth = survival(train, chosen, lam, lambda p: depth_band(p.candidate.depth))
    by_tool = survival(train, chosen, lam, lambda p: p.candidate.action_name)
    numbers["survival"] = {"depth": by_depth, "action": by_tool}
    plots["hit_rate"] = _hit_rate_plot(numbers["profile"]["hit_rate_counts"], lam)
    order = sorted(by_depth, key=lambda name: int(name.rstrip("+").split("-")[0]))
    plots["depth"] = _survival_plot(by_depth, order, "assistant turns before")
    plots["action"] = _survival_plot(
        by_tool, sorted(by_tool, key=lambda n: -sum(by_tool[n].values()))[:14], "expert action"
    )


def _counts(train: Sequence[Profile]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for p in train:
        if p.failure is None:
            key = f"{pivotrl.statistics(p.rewards).mean:.4f}"
            counts[key] = counts.get(key, 0) + 1
    return dict(sorted(counts.items()))


def _hit_rate_plot(counts: dict[str, int], lambda_diff: float) -> str:
    figure, axes = plt.subplots(figsize=(5.2, 2.6))
    rates = [float(rate) for rate in counts]
    colours = [
        COLOURS["all 0"]
        if r == 0
        else COLOURS["all 1"]
        if r == 1
        else COLOURS["pivot"]
        if r < lambda_diff
        else COLOURS["too easy"]
        for r in rates
    ]
    axes.bar(rates, list(counts.values()), width=0.8 / max(8, len(rates)), color=colours)
    axes.axvline(lambda_diff, color="#444", linewidth=0.8, linestyle="--")
    axes.set(xlabel="hit rate of the start policy", ylabel="candidates")
    return svg(figure)


def _survival_plot(table: dict[str, dict[str, int]], order: Sequence[str], label: str) -> str:
    figure, axes = plt.subplots(figsize=(5.2, 0.6 + 0.28 * len(order)))
    left = [0] * len(order)
    for name in FATES:
        values = [table[key][name] for key in order]
        if any(values):
            axes.barh(range(len(order)), values, left=left, color=COLOURS[name], label=name)
            left = [a + b for a, b in zip(left, values, strict=True)]
    axes.set_yticks(range(len(order)), [key[:28] for key in order])
    axes.invert_yaxis()
    axes.set(xlabel="candidates", ylabel=label)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return svg(figure)


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
    check_parent(
        recipe.path("evaluation.jsonl"),
        read_header(recipe.path("evaluation.jsonl"), "evaluation"),
        recipe.path("candidates.jsonl"),
    )
    states = {
        row["provenance"]["candidate_id"]: candidate_of_row(row) for row in read_rows(recipe.path("candidates.jsonl"))
    }
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


def _ledger(lines: list[dict[str, Any]], pivots: int) -> dict[str, Any]:
    # a profile that crashed has written its seconds and nothing else
    profiling = [line for line in lines if line["stage"] == "profile" and "rollouts" in line]
    total = {"seconds": round(sum(line["seconds"] for line in lines), 1)}
    if pivots and profiling:
        total["profiling_tokens_per_pivot"] = round(sum(line["tokens_generated"] for line in profiling) / pivots, 1)
        total["profiling_rollouts_per_pivot"] = round(sum(line["rollouts"] for line in profiling) / pivots, 1)
    return {"stages": lines, "total": total}
