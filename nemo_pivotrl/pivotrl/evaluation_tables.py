"""What `evaluate` measured, as means with intervals, a table and one sentence. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nemo_pivotrl.components.statistics import bootstrap
from nemo_pivotrl.core.errors import InputError, Problem

Row = dict[str, Any]


def summarise(rows: Sequence[Row], first: str, confidence: float, seed: int) -> dict[str, Any]:
    """Per policy and set: mean, interval, failed samples, and the paired difference from policy `first`.

    An item all of whose samples failed has no score, which is not a score of 0; a set without any is an InputError.
    """
    scores: dict[str, dict[str, dict[str, float]]] = {}
    family: dict[tuple[str, str], str] = {}
    failed: Counter[tuple[str, str]] = Counter()
    for row in rows:
        items = scores.setdefault(row["policy"], {}).setdefault(row["set"], {})
        failed[row["policy"], row["set"]] += row.get("failed", 0)
        family[row["set"], row["item"]] = str(row.get("family", ""))
        if row["scores"]:
            items[row["item"]] = float(np.mean(row["scores"]))
    empty = [
        Problem("evaluation", None, f"{label} {name}", "no score", "every sample failed; mend the verifier")
        for label, sets in scores.items()
        for name, items in sets.items()
        if not items
    ]
    if empty:
        raise InputError(empty)
    summary: dict[str, Any] = {"confidence": confidence, "policies": {}}
    for label, sets in scores.items():
        summary["policies"][label] = {}
        for name, items in sets.items():
            means = np.array([items[i] for i in sorted(items)])
            low, high = bootstrap(means, confidence, seed)
            entry = {
                "mean": float(means.mean()),
                "low": low,
                "high": high,
                "items": len(items),
                "failed": failed[label, name],
            }
            start = {} if label == first else scores[first].get(name, {})
            if items.keys() & start.keys():
                entry["difference"] = _difference(items, start, confidence, seed)
            of: dict[str, list[str]] = {}
            for item in items:
                of.setdefault(family[name, item], []).append(item)
            if 1 < len(of) <= MOST_FAMILIES:
                entry["families"] = {
                    each: _of_family({i: items[i] for i in own}, start, confidence, seed)
                    for each, own in sorted(of.items())
                }
            summary["policies"][label][name] = entry
    return summary


def _difference(
    items: Mapping[str, float], start: Mapping[str, float], confidence: float, seed: int
) -> dict[str, float]:
    """Mean and interval of what the items that both have gained on `start`."""
    apart = np.array([items[i] - start[i] for i in sorted(items.keys() & start.keys())])
    low, high = bootstrap(apart, confidence, seed)
    return {"mean": float(apart.mean()), "low": low, "high": high}


def _of_family(items: Mapping[str, float], start: Mapping[str, float], confidence: float, seed: int) -> dict[str, Any]:
    means = np.array([items[i] for i in sorted(items)])
    low, high = bootstrap(means, confidence, seed)
    entry: dict[str, Any] = {"mean": float(means.mean()), "low": low, "high": high, "items": len(items)}
    return entry | ({"difference": _difference(items, start, confidence, seed)} if items.keys() & start.keys() else {})


MOST_FAMILIES = 6
"""A set of more families is not divided by them."""
TITLES = {
    "one_turn": "held-out turns",
    "multi_turn": "whole tasks",
    "greedy": "whole tasks at T = 0",
    "retention": "out of domain",
}


def table(summary: dict[str, Any]) -> str:
    """The before/after table, in per cent with intervals; differences from the first policy in brackets.

    Below it whole tasks by family, where there are a few families.
    """
    names = [n for n in TITLES if any(n in sets for sets in summary["policies"].values())]
    lines = [f"{'policy':<12}" + "".join(f"{TITLES[n]:>34}" for n in names)]
    for label, sets in summary["policies"].items():
        lines.append(f"{label:<12}" + "".join(f"{_cell(sets.get(name)):>34}" for name in names))
    divided = {label: sets.get("multi_turn", {}).get("families", {}) for label, sets in summary["policies"].items()}
    if families := list(next(iter(divided.values()))):
        lines.append(f"{'whole tasks':<12}" + "".join(f"{name:>34}" for name in families))
        for label, found in divided.items():
            lines.append(f"{label:<12}" + "".join(f"{_cell(found.get(name)):>34}" for name in families))
    first = next(iter(summary["policies"]))
    lost = sum(entry["failed"] for sets in summary["policies"].values() for entry in sets.values())
    if lost:
        lines.append(f"{lost} samples could not be judged and count nowhere")
    lines.append(
        f"per cent, {summary['confidence']:.0%} bootstrap intervals over items; in brackets the change from {first}"
    )
    return "\n".join(lines)


def _cell(entry: dict[str, Any] | None) -> str:
    if not entry:
        return "-"
    text = f"{100 * entry['mean']:.1f} [{100 * entry['low']:.1f}, {100 * entry['high']:.1f}]"
    return text + (f" ({100 * entry['difference']['mean']:+.1f})" if "difference" in entry else "")


def verdict(summary: dict[str, Any]) -> str:
    """One sentence with what every policy gained and lost against the first: whole tasks (or turns), and out of domain.

    A change whose interval holds 0 is called not shown, whichever way it points.
    """
    first, *others = summary["policies"].items()
    inside = "multi_turn" if "multi_turn" in first[1] else "one_turn"
    parts = []
    for label, sets in others:
        said = [
            f"{_change(sets[name]['difference'])} points {where}"
            for name, where in ((inside, f"of {TITLES[inside]}"), ("retention", "out of domain"))
            if "difference" in sets.get(name, {})
        ]
        if said:
            parts.append(f"{label} {' and '.join(said)}")
    return f"Against {first[0]}: {'; '.join(parts)}." if parts else f"Only {first[0]} was measured."


def _change(difference: dict[str, float]) -> str:
    mean, low, high = (100 * difference[key] for key in ("mean", "low", "high"))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]{'' if low > 0 or high < 0 else ' (not shown)'}"
