"""What published pivot rows say about themselves, and what of it `extract` believes.

NVIDIA's `Nemotron-RL-Agentic-*-Pivot-v1` sets carry hit rates in several shapes: `pass_rate` with `pass_rate_total` (8, 16, 32 or
64 rollouts) and `pass_rate_passed`, and `<model>_info` with every reward. They belong to the publisher's model and verifier, two
of them in one row differ, and some rows are at 0. A pivot is one only for the policy that was profiled, so no label selects
anything here: labels are counted, checked against themselves, explained, and dropped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

ROUNDING = 1e-3
"""A rate that differs more from passed / total is wrong: publishers round to three digits or more."""
EXPLAINED = {
    "labelled": "carry hit rates of another model; dropped, `profile` measures your policy's",
    "labelled 0 of n": "were never solved by that model; kept, since your policy may",
    "labelled n of n": "were always solved by that model; kept, since your policy may not",
    "label contradicts itself": "have a rate that is not passed / total, or no total; dropped like the rest",
    "labels disagree": "carry two labels whose rates differ; neither is yours",
    "copy": "are a further copy of a row for another rollout; repeats are profile.num_generations, not rows",
}
"""Mark to what it means for a row that bears it."""


@dataclass(frozen=True, slots=True)
class Label:
    """One hit rate in a row."""

    source: str
    """The field it stands in."""
    rate: float | None
    passed: float | None
    total: float | None


def labels_of(row: Mapping[str, Any]) -> list[Label]:
    """Every hit rate in a row, unchecked."""
    found = []
    if any(_number(row.get(key)) is not None for key in ("pass_rate", "pass_rate_passed", "pass_rate_total")):
        rate, passed, total = (_number(row.get(f"pass_rate{end}")) for end in ("", "_passed", "_total"))
        found.append(Label("pass_rate", rate, passed, total))
    for key, value in row.items():
        if isinstance(value, Mapping) and isinstance(value.get("rewards"), list):
            rewards = [_number(r) for r in value["rewards"]]
            known = [r for r in rewards if r is not None]
            passed = sum(known) if len(known) == len(rewards) else None
            found.append(Label(key, _number(value.get("reward_mean")), passed, float(len(rewards))))
    return found


def contradicts_itself(label: Label) -> bool:
    """Whether a label's numbers cannot all be true."""
    if label.total is None or label.passed is None or label.rate is None:
        return True
    if label.total <= 0 or not 0 <= label.passed <= label.total:
        return True
    return abs(label.rate - label.passed / label.total) > ROUNDING


def marks(row: Mapping[str, Any]) -> list[str]:
    """What is to be counted of a row: keys of EXPLAINED, `rollouts N` and `agent NAME`."""
    labels, found = labels_of(row), []
    if labels:
        rates = [label.rate for label in labels if label.rate is not None]
        found.append("labelled")
        found += ["labelled 0 of n"] * (bool(rates) and max(rates) == 0.0)
        found += ["labelled n of n"] * (bool(rates) and min(rates) == 1.0)
        found += ["label contradicts itself"] * any(map(contradicts_itself, labels))
        found += ["labels disagree"] * (len(rates) > 1 and max(rates) - min(rates) > ROUNDING)
        found += [f"rollouts {label.total:g}" for label in labels[:1] if label.total is not None]
    if (_number(row.get("_ng_rollout_index")) or 0) > 0 and not isinstance(row.get("response"), Mapping):
        found.append("copy")
    agent = row.get("agent_ref")
    if isinstance(agent, Mapping) and isinstance(agent.get("name"), str):
        found.append(f"agent {agent['name']}")
    return found


def count(rows: Iterable[Mapping[str, Any]]) -> Counter[str]:
    """How many rows bear each mark."""
    return Counter(mark for row in rows for mark in marks(row))


def explain(counts: Mapping[str, int], agent_ref: str) -> str:
    """The counts as text, a line for each thing a user should know; empty where there is none."""
    lines = [f"  {counts[mark]:>7} {meaning}" for mark, meaning in EXPLAINED.items() if counts.get(mark)]
    totals = sorted((float(m.removeprefix("rollouts ")), n) for m, n in counts.items() if m.startswith("rollouts "))
    if totals:
        lines.append("          of rollouts: " + ", ".join(f"{n} rows {total:g}" for total, n in totals))
    agents = {m.removeprefix("agent "): n for m, n in counts.items() if m.startswith("agent ")}
    other = {name: n for name, n in sorted(agents.items()) if name != agent_ref}
    if other:
        named = ", ".join(f"{name} ({n})" for name, n in other.items())
        lines.append(
            f"  {sum(other.values()):>7} name another agent: {named}; rewritten to extract.agent_ref, {agent_ref}"
        )
    return "\n".join(["published rows", *lines]) if lines else ""


def _number(value: Any) -> float | None:
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300  # not nan, not inf
    return float(value) if known else None
