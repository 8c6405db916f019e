"""The report's part about a profile: hit rates, what profiling cost and saved, what became of which candidates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from nemo_pivotrl.algorithms import selection
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.artifacts import Header, read_header, read_rows
from nemo_pivotrl.core.types import Profile
from nemo_pivotrl.pivotrl.profile_rows import light_of_row, plan_in
from nemo_pivotrl.pivotrl.profile_statistics import summary_of
from nemo_pivotrl.pivotrl.select import FATES, fate, survivals
from nemo_pivotrl.report.plots import plt, svg

COLOURS = dict(
    zip(FATES, ("#2a7f3b", "#b3423a", "#4a78b5", "#8a8a8a", "#c9a227", "#b9b9b9", "#d8cfe8", "#5c5c5c"), strict=True)
)
FATE_LABELS = {"all 0": "never", "all 1": "always", "left out": "left out: talk"}
LABELS = {
    "depth": "assistant turns before",
    "prompt": "tokens of the prompt",
    "action": "expert action",
}


def gather(recipe: Recipe, numbers: dict[str, Any], plots: dict[str, str]) -> None:
    """Add the numbers and plots of the run's profile, in one pass over its file."""
    path, source = recipe.path("profiles.jsonl"), recipe.path(recipe.select.output)
    plan = plan_in(read_header(path, "profiles"))
    train: list[Profile] = []

    def seen() -> Iterator[dict[str, Any]]:
        for row in read_rows(path):
            light = light_of_row(row)
            if light.candidate.split == "train":
                train.append(light)
            yield row

    summary = summary_of(seen(), plan)
    header: Header | None = read_header(source, "pivots") if source.exists() else None
    chosen = {row["candidate_id"] for row in read_rows(source)} if header else set()
    lam = float(header.extra["lambda_diff"]) if header else recipe.select.lambda_diff
    control = [p for p in train if p.control]
    rates, unbiased = _rates(train), _rates(control)
    numbers["profile"] = {
        "candidates": len(train),
        "num_generations": max((len(p.samples) for p in train), default=0),
        "constant_share": sum(r in (0.0, 1.0) for r in rates) / max(1, len(rates)),
        "mean_reward": sum(rates) / max(1, len(rates)),
        "failed": sum(summary["failures"].values()),
        "left_out": sum(summary["excluded"].values()),
        "hit_rate_counts": _counts(rates),
        "control_hit_rate_counts": _counts(unbiased),
        "control_mean_reward": sum(unbiased) / len(unbiased) if unbiased else None,
    }
    numbers["profiling"] = summary | {"curtailed": plan.curtailed}
    if header:
        numbers["pivots"] = {
            "count": header.extra["pivots"],
            **{k: header.extra[k] for k in ("rule", "lambda_diff", "version")},
        }
    numbers["survival"] = survivals(train, [fate(p, chosen, lam) for p in train])
    plots["hit_rate"] = _hit_rate_plot(_counts(rates), lam, "hit rate of the start policy, all candidates")
    if unbiased:
        plots["control"] = _hit_rate_plot(_counts(unbiased), lam, "hit rate of the start policy, control set")
    for name, table in numbers["survival"].items():
        if name != "task":
            plots[name] = _survival_plot(table, LABELS[name])
    plots["task"] = _task_plot(train, chosen)


def _rates(profiles: Sequence[Profile]) -> list[float]:
    return [selection.statistics(p.rewards).mean for p in profiles if p.failure is None]


def _counts(rates: Sequence[float]) -> dict[str, int]:
    return dict(sorted(Counter(f"{rate:.4f}" for rate in rates).items()))


def _task_plot(train: Sequence[Profile], chosen: Collection[str]) -> str:
    """Tasks by their mean hit rate, those with a pivot apart from those without."""
    rates: dict[str, list[float]] = {}
    with_pivot = set()
    for profile in train:
        if profile.failure is None:
            rates.setdefault(profile.candidate.task_id, []).append(selection.statistics(profile.rewards).mean)
            if profile.candidate.candidate_id in chosen:
                with_pivot.add(profile.candidate.task_id)
    means = {task: sum(values) / len(values) for task, values in rates.items()}
    parts = [[m for task, m in means.items() if (task in with_pivot) == inside] for inside in (True, False)]
    figure, axes = plt.subplots(figsize=(5.2, 2.6))
    labels = [f"with a pivot ({len(parts[0])})", f"without ({len(parts[1])})"]
    colours = [COLOURS["pivot"], COLOURS["not drawn"]]
    axes.hist(parts, bins=10, range=(0, 1), stacked=True, color=colours, label=labels, rwidth=0.9)
    axes.set(xlabel="mean hit rate of a task's turns", ylabel="tasks", xlim=(-0.02, 1.02))
    axes.legend(frameon=False, fontsize=8)
    return svg(figure)


def _hit_rate_plot(counts: Mapping[str, int], lambda_diff: float, label: str) -> str:
    figure, axes = plt.subplots(figsize=(5.2, 2.6))
    parts: dict[str, list[tuple[float, int]]] = {}
    for rate, count in ((float(rate), count) for rate, count in counts.items()):
        name = "never" if rate == 0 else "always" if rate == 1 else "mixed" if rate < lambda_diff else "mixed, too easy"
        parts.setdefault(name, []).append((rate, count))
    colours = {"never": "all 0", "mixed": "pivot", "mixed, too easy": "too easy", "always": "all 1"}
    for name, fate_name in colours.items():
        if bars := parts.get(name):
            rates, numbers = zip(*bars, strict=True)
            width = 0.8 / max(8, len(counts))
            axes.bar(rates, numbers, width=width, color=COLOURS[fate_name], label=f"{name} ({sum(numbers)})")
    axes.axvline(lambda_diff, color="#444", linewidth=0.8, linestyle="--")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes.set(xlabel=label, ylabel="candidates", xlim=(-0.06, 1.06))
    return svg(figure)


def _survival_plot(table: Mapping[str, dict[str, int]], label: str) -> str:
    figure, axes = plt.subplots(figsize=(5.2, 0.6 + 0.28 * len(table)))
    left = [0] * len(table)
    for name in FATES:
        values = [row[name] for row in table.values()]
        if any(values):
            axes.barh(range(len(table)), values, left=left, color=COLOURS[name], label=FATE_LABELS.get(name, name))
            left = [a + b for a, b in zip(left, values, strict=True)]
    axes.set_yticks(range(len(table)), [key[:28] for key in table])
    axes.invert_yaxis()
    axes.set(xlabel="candidates", ylabel=label)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return svg(figure)
