"""The report's part about a profile: hit rates, what profiling cost and saved, what became of which candidates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nemo_pivotrl.algorithms import selection
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.artifacts import Header, read_header, read_rows
from nemo_pivotrl.core.types import Profile
from nemo_pivotrl.pivotrl.profile_rows import light_of_row, plan_in
from nemo_pivotrl.pivotrl.profile_statistics import summary_of
from nemo_pivotrl.pivotrl.select import FATES, fate, survivals
from nemo_pivotrl.report.plots import plt, svg

COLOURS = dict(zip(FATES, ("#2a7f3b", "#b3423a", "#4a78b5", "#8a8a8a", "#c9a227", "#b9b9b9", "#000000"), strict=True))
LABELS = {
    "depth": "assistant turns before",
    "prompt": "tokens of the prompt",
    "action": "expert action",
    "task": "task",
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
        plots[name] = _survival_plot(table, LABELS[name])


def _rates(profiles: Sequence[Profile]) -> list[float]:
    return [selection.statistics(p.rewards).mean for p in profiles if p.failure is None]


def _counts(rates: Sequence[float]) -> dict[str, int]:
    return dict(sorted(Counter(f"{rate:.4f}" for rate in rates).items()))


def _hit_rate_plot(counts: Mapping[str, int], lambda_diff: float, label: str) -> str:
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
    axes.set(xlabel=label, ylabel="candidates", xlim=(-0.06, 1.06))
    return svg(figure)


def _survival_plot(table: Mapping[str, dict[str, int]], label: str) -> str:
    figure, axes = plt.subplots(figsize=(5.2, 0.6 + 0.28 * len(table)))
    left = [0] * len(table)
    for name in FATES:
        values = [row[name] for row in table.values()]
        if any(values):
            axes.barh(range(len(table)), values, left=left, color=COLOURS[name], label=name)
            left = [a + b for a, b in zip(left, values, strict=True)]
    axes.set_yticks(range(len(table)), [key[:28] for key in table])
    axes.invert_yaxis()
    axes.set(xlabel="candidates", ylabel=label)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return svg(figure)
