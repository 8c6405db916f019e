"""How the report begins: three sentences computed from the numbers (better, worse, not shown), and what stages warn of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_pivotrl.components.conclusions import read_checks
from nemo_pivotrl.config import Recipe

Row = Mapping[str, Any]
SETS = {"multi_turn": "whole tasks", "one_turn": "held-out turns", "retention": "out of domain"}
MISSING = {
    "multi_turn": "no whole task was played (evaluate.simulator)",
    "one_turn": "no held-out turn was tried",
    "retention": "nothing out of domain was tried (evaluate.retention)",
}
MEASURED = {"val/accuracy": "accuracy on held-out turns", "val/tasks": "success in held-out tasks"}


def gather(recipe: Recipe, numbers: dict[str, Any]) -> None:
    """Add `verdict` (better, worse, not_shown: a sentence each) and `warnings` to the numbers of a report."""
    if "evaluation" in numbers and len(numbers["evaluation"]["policies"]) > 1:
        found = of_policies(numbers["evaluation"]["policies"], recipe.grpo.name)
    elif "assessment" in numbers:
        found = of_arms(numbers["assessment"])
    elif any("val/loss" in row for doctor in numbers.get("doctors", {}).values() for row in doctor["steps"]):
        found = of_doctors({name: doctor["steps"] for name, doctor in numbers["doctors"].items()})
    elif "training" in numbers:
        found = of_training(numbers["training"].get(recipe.grpo.name, []))
    else:
        found = untrained(numbers)
    numbers["verdict"] = dict(zip(("better", "worse", "not_shown"), found, strict=True))
    numbers["warnings"] = [
        {"stage": stage} | check
        for stage, checks in read_checks(Path(recipe.run_dir)).items()
        for check in checks
        if not check["good"]
    ]


def of_policies(policies: Row, label: str) -> tuple[str, str, str]:
    """Sentences about the policy `label`, or the last one, against the first."""
    first, *others = policies
    label = label if label in others else others[-1]
    better, worse, open_, missing = [], [], [], []
    for name, title in SETS.items():
        change = policies[label].get(name, {}).get("difference")
        if change is None:
            missing.append(MISSING[name])
            continue
        mean, low, high = (100 * change[key] for key in ("mean", "low", "high"))
        what = ("of " if name != "retention" else "") + title
        if high < 0:
            worse.append(f"{-mean:.1f} points [{-high:.1f}, {-low:.1f}] {what}")
        else:
            (better if low > 0 else open_).append(f"{mean:+.1f} points [{low:+.1f}, {high:+.1f}] {what}")
    for other in others:  # what is to be compared with it, where no gain is shown
        for name, title in SETS.items() if other != label else ():
            change = policies[other].get(name, {}).get("difference")
            if change is not None and change["low"] <= 0 <= change["high"] and name != "retention":
                mean, low, high = (100 * change[key] for key in ("mean", "low", "high"))
                open_.append(f"{other} {mean:+.1f} points [{low:+.1f}, {high:+.1f}] of {title}")
    return (
        f"{label} against {first}: {_list(better)}." if better else f"No gain of {label} over {first} is shown.",
        f"{label} loses {_list(worse)}." if worse else "Nothing that was measured got worse beyond its interval.",
        _open([*(f"{text}: the interval holds 0" for text in open_), *missing]),
    )


def of_arms(assessment: Row) -> tuple[str, str, str]:
    """Sentences about steered arms against the first one."""
    arms = assessment["arms"]
    first, *others = arms
    steered = {label: arms[label] for label in others if any(arms[label]["setting"].get("beta", {}).values())}
    won, lost, open_ = [], [], []
    for label, arm in steered.items():
        for objective, scores in arm["objectives"].items():
            weight = arm["setting"]["beta"].get(objective, 0.0)
            win, lose = scores["win"], scores["lose"]
            if win[1] > lose[2]:
                won.append(
                    (weight > 0, win[0] - lose[0], f"{label} wins {win[0]:.0%} and loses {lose[0]:.0%} on {objective}")
                )
            elif lose[1] > win[2]:
                lost.append(f"{label} loses {lose[0]:.0%} and wins {win[0]:.0%} on {objective}")
            elif weight > 0:
                open_.append(f"{label} on {objective}")
    wanted = sorted((w for w in won if w[0]), key=lambda w: -w[1])
    asked = sum(w > 0 for arm in steered.values() for o, w in arm["setting"]["beta"].items() if o in arm["objectives"])
    count = f"Steered answers win against {first} in {len(wanted)} of {asked} cases, a case being an arm and an objective it is for"
    return (
        f"{count}; most of all {wanted[0][2]}." if wanted else f"No steered arm is shown to win against {first}.",
        f"{_list(lost[:3])}{f', and {len(lost) - 3} more' if len(lost) > 3 else ''}."
        if lost
        else "No steered arm is shown to lose.",
        _open(
            [
                *(
                    [f"that {_list(open_[:4])} differ{' and others' if len(open_) > 4 else ''} from {first}"]
                    if open_
                    else []
                ),
                f"anything beyond {assessment['prompts']} prompts, or what the oracles do not measure",
            ]
        ),
    )


def of_doctors(doctors: Mapping[str, Sequence[Row]]) -> tuple[str, str, str]:
    """Sentences about doctors that were trained and not assessed."""
    better, worse = [], []
    for name, rows in doctors.items():
        ordered = [row["val/ordered"] for row in rows if "val/ordered" in row]
        if len(ordered) > 1:
            text = f"{name} orders {ordered[-1]:.1%} of its held-out pairs, {ordered[0]:.1%} before"
            (better if ordered[-1] > ordered[0] else worse).append(text)
    return (
        f"{_list(better)}." if better else "No doctor orders its held-out pairs better than before.",
        f"{_list(worse)}." if worse else "No doctor orders them worse.",
        _open(["that steered answers are better: nemo-pivotrl assess compares them (assess.arms)"]),
    )


def of_training(rows: Sequence[Row]) -> tuple[str, str, str]:
    """Sentences about a training that was not evaluated."""
    better, worse = [], []
    for key, title in MEASURED.items():
        values = [row[key] for row in rows if key in row]
        if len(values) > 1:
            text = f"{title} went from {values[0]:.3f} to {values[-1]:.3f}, one measurement each"
            (better if values[-1] > values[0] else worse if values[-1] < values[0] else []).append(text)
    return (
        f"{_list(better).capitalize()}." if better else "No gain was measured on held-out data.",
        f"{_list(worse).capitalize()}." if worse else "Nothing that was measured fell.",
        _open(
            [
                "any of it with an interval, whole tasks, and what is out of domain: nemo-pivotrl evaluate compares policies"
            ]
        ),
    )


def untrained(numbers: Row) -> tuple[str, str, str]:
    """Sentences about a run that has not trained."""
    pivots = numbers.get("pivots", {}).get("count")
    found = "Nothing is trained yet" + ("." if pivots is None else f"; {pivots:,} pivots are ready.")
    return found, "Nothing can have got worse.", _open(["what training would bring"])


def _open(parts: Sequence[str]) -> str:
    return f"Not shown: {'; '.join(parts)}." if parts else "Every measured difference is beyond its interval."


def _list(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def funnel(numbers: Row) -> Iterator[tuple[str, int, str]]:
    """From assistant turns to pivots: (what, how many, the viewer's filter for those that are left; '' where it has none)."""
    audit, profile, survival = (numbers.get(key) for key in ("audit", "profile", "survival"))
    if audit:
        yield "assistant turns", audit["turns"], ""
        yield "candidates", sum(audit["kept"].values()), "turns"
        yield "candidates to train on", audit["kept"]["train"], "turns?split=train"
    if profile and survival:
        fates: dict[str, int] = {}
        for row in next(iter(survival.values())).values():
            for name, count in row.items():
                fates[name] = fates.get(name, 0) + count
        judged = sum(count for name, count in fates.items() if name not in ("failed", "left out", "all"))
        equal = sum(fates.get(name, 0) for name in ("all 0", "all 1", "all equal"))
        yield "of these profiled and judged", judged, "turns?split=train&sort=rate"
        yield "of these with mixed outcomes", judged - equal, "turns?split=train&low=0.001&high=0.999"
        if "pivots" in numbers:
            yield "pivots", fates.get("pivot", 0), "turns?fate=pivot"
