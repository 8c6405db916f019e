"""Tables and plots of `pivotrl_claims.py`, out of its results alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pivotrl_theory
from claims import Result, interval
from pivotrl_claims import ARMS, EVERY, HOUSE, SETS, SWEEP, TRIAL_TASKS

Interval = tuple[float, float, float]
BOOTSTRAPS = 2000


@dataclass(frozen=True)
class Shown:
    """What there is to show."""

    made: dict[str, Result]
    """`seed-N/ARM` -> result."""
    seeds: list[int]
    sweep_seeds: list[int]
    tuning_seeds: list[int]
    grid: list[float]
    rates: dict[str, float]
    """The learning rate of each arm."""

    def of(self, name: str, seeds: Sequence[int] | None = None) -> list[Result]:
        """The results of an arm, or of the start policy (`base`, `house-base`), one a seed."""
        rate = f"{name}-{self.rates[EVERY[name].like or name]:g}" if name in EVERY else ""
        folder = {"base": "data", "house-base": "house"}.get(name, rate)
        return [self.made[f"seed-{seed}/{folder}"] for seed in (self.seeds if seeds is None else seeds)]

    def scores(self, name: str, of: str, seeds: Sequence[int] | None = None) -> list[dict[str, float]]:
        """Item -> score of one set, one dict a seed."""
        return [result["items"][of] for result in self.of(name, seeds)]

    def score(self, name: str, of: str, seeds: Sequence[int] | None = None) -> Interval:
        """Mean with its interval, per cent."""
        return percent(interval([np.array(list(s.values())) for s in self.scores(name, of, seeds)]))

    def apart(self, name: str, other: str, of: str, seeds: Sequence[int] | None = None) -> Interval:
        """Paired difference, `name` minus `other`, with its interval, percentage points."""
        pairs = zip(self.scores(name, of, seeds), self.scores(other, of, seeds), strict=True)
        return percent(interval([np.array([a[item] - b[item] for item in sorted(b)]) for a, b in pairs]))


def percent(found: Interval) -> Interval:
    """Shares as per cent."""
    return (100 * found[0], 100 * found[1], 100 * found[2])


def text(found: Interval, sign: str = "") -> str:
    """`12.3 [10.1, 14.0]`."""
    return f"{found[0]:{sign}.1f} [{found[1]:{sign}.1f}, {found[2]:{sign}.1f}]"


def verdict(found: Interval) -> str:
    """Of a difference that the claim says is above 0."""
    return "yes" if found[1] > 0 else "no: the other way round" if found[2] < 0 else "not shown"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *rows])


def document(shown: Shown, origin: str) -> str:
    """Everything as Markdown."""
    parts = [
        "# The PivotRL paper's claims on the embedded world",
        "Generated; do not edit.",
        origin,
        "Per cent; 95 % intervals by bootstrap over seeds, then items; differences are paired by item.",
        "## Claims",
        claims(shown),
        "## Arms (the paper's Tables 1 to 3)",
        arms(shown),
        "## End-to-end GRPO: rollout turns and time (Figure 1)",
        economy(shown),
        "## Signal (Figure 3)",
        signal(shown),
        "## Whose wording the expert has",
        house(shown),
        "## Sweeps of choices of docs/algorithms.md",
        sweep(shown),
        "## Learning rates",
        tuning(shown),
        "## Theory, tabular",
        pivotrl_theory.report(),
    ]
    return "\n\n".join(parts)


def claims(shown: Shown) -> str:
    """The paper's claims one by one."""
    task, away = "multi_turn", "retention"
    above = shown.apart("pivotrl", "sft", task)
    rows = [
        ("PivotRL is above SFT in domain", "+4.17", text(above, "+"), verdict(above)),
        *_retention(shown, away),
        *(
            (f"{what} hurts in domain", paper, text(lost, "+"), verdict(lost))
            for what, name, paper in (
                ("dropping the pivot filter", "random", "+4.13"),
                ("strict match", "exact", "+6.47"),
                ("`mixed` instead of `adv`", "mixed", "no figure"),
                ("any text where the expert talks", "any-text", "its tau-bench rule"),
            )
            for lost in [shown.apart("pivotrl", name, task)]
        ),
    ]
    even = shown.apart("pivotrl", "e2e", task)
    rows.append(("PivotRL is on a level with end-to-end RL", "32.7 both", text(even, "+"), level(even)))
    constant = [r["constant"] for r in shown.of("base")]
    rows.append(
        (
            "most random turns give no gradient",
            "71",
            f"{100 * statistics.fmean(constant):.1f} ({', '.join(f'{100 * c:.0f}' for c in constant)})",
            "yes" if min(constant) > 0.5 else "no",
        )
    )
    kept = interval(
        [np.array([late_std(p) - late_std(r)]) for p, r in zip(shown.of("pivotrl"), shown.of("random"), strict=True)]
    )
    rows.append(
        (
            "pivots keep their signal longer than random turns (std of the reward in a group, last fifth of the steps)",
            "Figure 3",
            f"{kept[0]:+.2f} [{kept[1]:+.2f}, {kept[2]:+.2f}]",
            verdict(kept),
        )
    )
    return table(("claim", "paper", "here", "holds?"), rows)


def late_std(result: Result) -> float:
    """Mean std of the reward in a group over the last fifth of a training's steps."""
    steps = result["steps"]
    return statistics.fmean(row["reward_std"] for row in steps[-max(1, len(steps) // 5) :])


def _retention(shown: Shown, away: str) -> list[tuple[str, str, str, str]]:
    lost, kept = shown.apart("base", "sft", away), shown.apart("pivotrl", "base", away)
    gap = shown.apart("pivotrl", "sft", away)
    held = "yes" if kept[1] > -2.0 else "no" if kept[2] < 0 else "not shown"
    return [
        ("SFT loses out of domain", "9.83", text(lost, "+"), verdict(lost)),
        ("PivotRL loses almost nothing there (2 points at most)", "-0.21", text(kept, "+"), held),
        ("PivotRL is above SFT there", "+10.04", text(gap, "+"), verdict(gap)),
    ]


def level(found: Interval) -> str:
    """Whether a difference is shown to be small or on either side."""
    return "above" if found[1] > 0 else "below" if found[2] < 0 else "no difference shown"


def arms(shown: Shown) -> str:
    """Scores of every arm."""
    rows = []
    for name in ("base", *ARMS):
        done = shown.of(name)
        cells = [ARMS[name].title if name in ARMS else "start policy"]
        for of in SETS:
            change = "" if name == "base" else f" ({shown.apart(name, 'base', of)[0]:+.1f})"
            cells.append(text(shown.score(name, of)) + change)
        cells += ["" if name == "base" else f"{statistics.fmean(r['drift'] for r in done):.3f}"]
        pivots = [r["pivots"] for r in done if "pivots" in r]
        cells += [f"{statistics.fmean(pivots):.0f}" if pivots else ""]
        cells += ["" if name == "base" else f"{statistics.fmean(r['training_seconds'] for r in done):.0f}"]
        rows.append(cells)
    heads = ("arm", *SETS.values(), "drift", "pivots", "training, s")
    note = (
        "In brackets the change from the start policy. Drift: KL(start policy || policy) in nats a token on the start policy's "
        "answers to the puzzles."
    )
    return f"{table(heads, rows)}\n\n{note}"


# ---- what it costs ----


def curves(shown: Shown, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(turns, success), each [seeds, points]; the start policy is the first point."""
    starts = [r["curve"][0] for r in shown.of("base")]
    whole = np.array([[first, *r["curve"]] for first, r in zip(starts, shown.of(name), strict=True)])
    return whole[..., 0], whole[..., 1]


def reached(turns: np.ndarray, success: np.ndarray, target: float) -> float:
    """Turns [points] at which a curve first is at `target`, between points in proportion; infinite where it never is."""
    for i in range(len(turns)):
        if success[i] >= target:
            if i == 0:
                return float(turns[0])
            share = (target - success[i - 1]) / (success[i] - success[i - 1])
            return float(turns[i - 1] + share * (turns[i] - turns[i - 1]))
    return math.inf


def economy(shown: Shown) -> str:
    """Turns and seconds until PivotRL has the success that end-to-end GRPO ends with."""
    theirs, at_theirs = curves(shown, "e2e")
    profiled = np.array([r["curtailed"] for r in shown.of("base")], dtype=float)
    rng = np.random.default_rng(0)
    draws = [rng.integers(0, len(shown.seeds), len(shown.seeds)) for _ in range(BOOTSTRAPS)]
    names, points, rows = ("pivotrl", "any-text", "e2e"), [], []
    for name in names:
        ours, at_ours = curves(shown, name)
        found = zip(ours.mean(0), at_ours.mean(0), strict=True)
        points.append((ARMS[name].title, *(f"{turns:,.0f}: {100 * share:.1f}" for turns, share in found)))
    ours, at_ours = curves(shown, "pivotrl")

    def ratio(s: np.ndarray, level: np.ndarray, more: np.ndarray) -> float:
        """Turns of end-to-end GRPO over PivotRL's, `more` included, to the success `level` [seeds]."""
        target = float(level[s].mean())
        needed = reached(ours[s].mean(0), at_ours[s].mean(0), target) + float(more[s].mean())
        asked = reached(theirs[s].mean(0), at_theirs[s].mean(0), target)
        return 0.0 if math.isinf(needed) else asked / needed if needed else math.inf

    for which, level in (("end-to-end GRPO's", at_theirs[:, -1]), ("PivotRL's", at_ours[:, -1])):
        for way, before in (("training turns", 0 * profiled), ("with a curtailed profile", profiled)):
            low, high = np.quantile([ratio(draw, level, before) for draw in draws], [0.025, 0.975], method="nearest")
            middle = ratio(np.arange(len(shown.seeds)), level, before)
            paper = "4" if which != "PivotRL's" and way == "training turns" else ""
            rows.append((f"{which} last success", way, f"{middle:.2f} [{low:.2f}, {high:.2f}]", paper))
    steps, parts = len(shown.of("e2e")[0]["steps"]), theirs.shape[1] - 1
    spent = {name: statistics.fmean(r["training_seconds"] for r in shown.of(name)) for name in names}
    profile = statistics.fmean(r["profile_seconds"] for r in shown.of("base"))
    return "\n\n".join(
        [
            f"Success on {TRIAL_TASKS} validation tasks in per cent after so many rollout turns, means of {len(shown.seeds)} seeds:",
            table(("arm", "start", *(f"step {steps * (i + 1) // parts}" for i in range(parts))), points),
            table(("to", "counted", "turns of end-to-end GRPO over PivotRL's", "paper"), rows),
            "0 says that PivotRL does not reach it. Whole trainings, seconds: "
            + ", ".join(f"{ARMS[name].title} {seconds:.0f}" for name, seconds in spent.items())
            + f"; the profile of all K {profile:.0f}. Profile: {statistics.fmean(r['rollouts'] for r in shown.of('base')):,.0f} "
            f"turns, {profiled.mean():,.0f} if curtailed.",
        ]
    )


def signal(shown: Shown) -> str:
    """Reward std in a group, and the share of groups with any, at the beginning and at the end of training."""
    count = len(shown.of("pivotrl")[0]["steps"])
    fifth = max(1, count // 5)
    rows = []
    for name in ("pivotrl", "mixed", "random", "exact", "any-text", "e2e"):
        steps = [r["steps"] for r in shown.of(name)]

        def mean(key: str, part: slice, steps: list[list[dict[str, float]]] = steps) -> str:
            return f"{statistics.fmean(row[key] for one in steps for row in one[part]):.2f}"

        first, last = slice(0, fifth), slice(-fifth, None)
        rows.append(
            (
                ARMS[name].title,
                *(mean(key, part) for key in ("reward_std", "mixed_group_share", "reward") for part in (first, last)),
            )
        )
    heads = (
        "arm",
        *(f"{what}, {when} {fifth}" for what in ("std", "mixed groups", "reward") for when in ("first", "last")),
    )
    return f"Means of the first and the last {fifth} of {count} steps.\n\n{table(heads, rows)}"


def house(shown: Shown) -> str:
    """Arms whose expert words things as the start policy does, beside the same seeds of the others."""
    seeds = shown.sweep_seeds
    if not seeds:
        return "None."
    rows = []
    for name, base in (
        ("base", "base"),
        ("sft", "base"),
        ("pivotrl", "base"),
        *((name, "house-base") for name in HOUSE),
    ):
        title = (
            "start policy"
            if name == "base"
            else f"{EVERY[name].title}, {'the same' if name in HOUSE else 'another'} wording"
        )
        cells = []
        for of in SETS:
            change = "" if name == "base" else f" ({text(shown.apart(name, base, of, seeds), '+')})"
            cells.append(f"{shown.score(name, of, seeds)[0]:.1f}{change}")
        drift = "" if name == "base" else f"{statistics.fmean(r['drift'] for r in shown.of(name, seeds)):.3f}"
        rows.append((title, *cells, drift))
    which = ", ".join(map(str, seeds))
    return f"Seeds {which}; in brackets the change from the start policy.\n\n{table(('arm', *SETS.values(), 'drift'), rows)}"


def sweep(shown: Shown) -> str:
    """Each choice against PivotRL with its default, on fewer seeds."""
    seeds = shown.sweep_seeds
    if not seeds:
        return "None."
    rows = []
    for name, arm in SWEEP.items():
        pivots = statistics.fmean(r["pivots"] for r in shown.of(name, seeds))
        rows.append((arm.title, *(text(shown.apart(name, "pivotrl", of, seeds), "+") for of in SETS), f"{pivots:.0f}"))
    which = ", ".join(map(str, seeds))
    note = f"Seeds {which}, PivotRL's learning rate: difference from PivotRL as above."
    return f"{note}\n\n{table(('setting', *SETS.values(), 'pivots'), rows)}"


def tuning(shown: Shown) -> str:
    """What each learning rate gave on the tuning seeds."""
    rows = []
    for name in shown.rates:
        arm, cells = EVERY[name], []
        for lr in shown.grid:
            done = [shown.made[f"seed-{seed}/{name}-{lr:g}"] for seed in shown.tuning_seeds]
            found = statistics.fmean(r["curve"][-1][1] for r in done)
            away = statistics.fmean(statistics.fmean(r["items"]["retention"].values()) for r in done)
            bold = "**" if lr == shown.rates[name] else ""
            cells.append(f"{bold}{100 * found:.1f}{bold} ({100 * away:.1f})")
        rows.append((arm.title + (", the same wording" if name in HOUSE else ""), *cells))
    heads = ("arm", *(f"{lr:g}" for lr in shown.grid))
    seeds = ", ".join(map(str, shown.tuning_seeds))
    return f"Success on validation tasks of tuning seed {seeds} (out of domain); the bold one is used.\n\n{table(heads, rows)}"


# ---- plots ----


def plots(shown: Shown) -> str:
    """Three panels as one SVG: retention against success, success against turns, signal over steps."""
    from nemo_pivotrl.report import plots as drawn

    figure, (trade, cost, std) = drawn.plt.subplots(1, 3, figsize=(12, 3.6))
    for name in ("base", *ARMS):
        x, y = shown.score(name, "multi_turn"), shown.score(name, "retention")
        label = ARMS[name].title if name in ARMS else "start policy"
        spread = [[[v[0] - v[1]], [v[2] - v[0]]] for v in (x, y)]
        trade.errorbar(x[0], y[0], xerr=spread[0], yerr=spread[1], fmt="o", markersize=4, linewidth=0.8, label=label)
    trade.set(xlabel="whole tasks, %", ylabel="out of domain, %")
    trade.legend(fontsize=6, frameon=False)
    for name in ("pivotrl", "random", "any-text", "e2e"):
        turns, success = curves(shown, name)
        cost.plot(turns.mean(0), 100 * success.mean(0), marker="o", markersize=3, label=ARMS[name].title)
    cost.set(xlabel="rollout turns in training", ylabel="whole tasks (validation), %")
    cost.legend(fontsize=7, frameon=False)
    for name in ("pivotrl", "mixed", "random", "exact"):
        rows = np.array([[row["reward_std"] for row in r["steps"]] for r in shown.of(name)]).mean(0)
        std.plot(range(1, len(rows) + 1), rows, linewidth=1.2, label=ARMS[name].title)
    std.set(xlabel="step", ylabel="std of the reward in a group", ylim=(0, None))
    std.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    return drawn.svg(figure)
