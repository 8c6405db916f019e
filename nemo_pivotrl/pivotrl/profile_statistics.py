"""What a profile says as a whole, in one pass over its file: hit rates, what curtailment saved, what failed, what repeats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nemo_pivotrl.algorithms import selection
from nemo_pivotrl.algorithms.early_stopping import StoppingRule
from nemo_pivotrl.components.conclusions import TALK
from nemo_pivotrl.core.artifacts import read_rows
from nemo_pivotrl.pivotrl.profile_rows import repeated

CLASSES = ("all 0", "mixed, kept", "mixed, too easy", "all 1")


def hit_class(rewards: Sequence[float], plan: StoppingRule) -> str:
    """Where a candidate's hit rate lies, by the samples there are."""
    stats = selection.statistics(rewards)
    if stats.variance <= 1e-12:
        return "all 1" if stats.mean >= 0.5 else "all 0"
    kept = selection.keep_pivot(stats, "adv", plan.lambda_high, plan.inclusive)
    return "mixed, kept" if kept else "mixed, too easy"


def summarise(path: Path, plan: StoppingRule) -> dict[str, Any]:
    """The numbers of a finished profile, of any length, in constant memory."""
    return summary_of(read_rows(path), plan)


def summary_of(rows: Iterable[dict[str, Any]], plan: StoppingRule) -> dict[str, Any]:
    """`summarise` over rows."""
    counts: Counter[str] = Counter()
    classes = {name: Counter[str]() for name in CLASSES}
    failures, excluded = Counter[str](), Counter[str]()
    for row in rows:
        counts["candidates"] += 1
        told = row["profile"]
        if told["failure"] is not None:
            (excluded if told["failure"] == TALK else failures)[told["failure"]] += 1
            continue
        rewards = [float(sample["reward"]) for sample in row["samples"]]
        entry, saved = classes[hit_class(rewards, plan)], plan.count - len(rewards)
        entry["candidates"] += 1
        entry["train"] += row["split"] == "train"
        entry["rollouts"] += len(rewards)
        entry["saved"] += saved
        counts["tokens_generated"] += told["tokens_generated"]
        counts["tokens_prompt"] += told["tokens_prompt"] * len(rewards)
        entry["tokens_saved"] += round(saved * told["tokens_generated"] / len(rewards))
        counts["repeated"] += repeated(row["samples"])
        counts["truncated"] += sum(sample["finish_reason"] == "length" for sample in row["samples"])
        counts["malformed"] += sum(unreadable(sample) for sample in row["samples"])
        if told.get("control"):
            counts["control"] += 1
            seen = drawn_first(rewards, plan)
            counts["control_saved"] += plan.count - len(seen)
            counts["control_differs"] += _selected(seen, plan) != _selected(rewards, plan)
    rollouts = sum(entry["rollouts"] for entry in classes.values())
    full = rollouts + sum(entry["saved"] for entry in classes.values())
    return {
        "candidates": counts["candidates"],
        "num_generations": plan.count,
        "rollouts": rollouts,
        "rollouts_saved": full - rollouts,
        "saved_share": (full - rollouts) / full if full else 0.0,
        "tokens_generated": counts["tokens_generated"],
        "tokens_prompt": counts["tokens_prompt"],
        "tokens_saved_estimate": sum(entry["tokens_saved"] for entry in classes.values()),
        "classes": {name: dict(entry) for name, entry in classes.items()},
        "failures": dict(failures),
        "excluded": dict(excluded),
        "repeated_samples": counts["repeated"],
        "truncated": counts["truncated"],
        "malformed": counts["malformed"],
        "control": {
            "candidates": counts["control"],
            "saved_share": counts["control_saved"] / max(1, plan.count * counts["control"]),
            "selected_otherwise": counts["control_differs"],
            "stated_rate": plan.error_rate,
        },
    }


def unreadable(sample: dict[str, Any]) -> bool:
    """Whether a stored turn is whole and has no action that a verifier could judge. A cut one counts as truncated alone."""
    return sample["finish_reason"] != "length" and sample["action"]["type"] in ("malformed", "none")


def drawn_first(rewards: Sequence[float], plan: StoppingRule) -> list[float]:
    """The outcomes that a plan would have drawn of a candidate that was drawn in full."""
    seen: list[float] = []
    while len(seen) < len(rewards) and (more := plan.ask(seen)):
        seen += rewards[len(seen) : len(seen) + more]
    return seen


def _selected(rewards: Sequence[float], plan: StoppingRule) -> tuple[bool, bool]:
    stats = selection.statistics(rewards)
    low, high = (
        selection.keep_pivot(stats, plan.rule, lam, plan.inclusive) for lam in (plan.lambda_low, plan.lambda_high)
    )
    return low, high


def summary_text(summary: dict[str, Any]) -> str:
    """The summary for a terminal."""
    lines = [
        f"{'hit rate':<18}{'both splits':>12}{'train':>8}{'rollouts':>12}{'each':>8}{'saved':>9}{'tokens saved':>14}"
    ]
    for name, entry in summary["classes"].items():
        if entry:
            n, drawn, saved = entry["candidates"], entry["rollouts"], entry["saved"]
            share = f"{saved / (drawn + saved):.1%}"
            lines.append(
                f"{name:<18}{n:>12,}{entry['train']:>8,}{drawn:>12,}{drawn / n:>8.1f}{share:>9}{entry['tokens_saved']:>14,}"
            )
    lines.append(
        f"{summary['rollouts']:,} rollouts of {summary['rollouts'] + summary['rollouts_saved']:,}: {summary['saved_share']:.1%} "
        f"saved, about {summary['tokens_saved_estimate']:,} generated tokens; {summary['tokens_generated']:,} tokens were generated"
    )
    control = summary["control"]
    if control["candidates"]:
        lines.append(
            f"control: {control['candidates']} candidates drawn in full; by their first rollouts alone "
            f"{control['selected_otherwise']} would be selected otherwise (stated rate {control['stated_rate']:g})"
        )
    if summary["rollouts"]:
        share = summary["repeated_samples"] / summary["rollouts"]
        lines.append(f"{share:.1%} of the samples repeat another one of their candidate")
    return "\n".join(lines)
