"""Checks of the stages around profiling and training: what their numbers warn of, and what to do. See `conclusions`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from nemo_pivotrl.components.conclusions import (
    ENDS,
    MAX_KL,
    MAX_MALFORMED,
    MIN_PIVOTS,
    Check,
    at_least,
    share_check,
)

Row = Mapping[str, Any]
MIN_CANDIDATES = 4 * MIN_PIVOTS
"""Candidates of which enough become pivots: a quarter is what profiles of working policies keep."""
MIN_HELD_OUT = 16
MAX_SKIPPED = 0.5
MAX_CHANGED = 0.1
"""Share of verdicts that another verifier changes."""
MAX_LONGER = 0.75
"""Share of pairs whose chosen answer is the longer one: beyond it a doctor may learn length."""
MAX_WEAK = 0.5
"""Share of pairs on which the faces hardly differ."""
MIN_AGREEMENT = 0.55
"""Share of Delta from tokens that the answer's own face prefers; 0.5 is chance."""
MIN_REWARDED = 0.005
"""Share of answer tokens with a reward."""
MAX_DRIFT = 1.0
"""Nats by which training may make chosen answers less likely, or rejected ones likelier."""
MIN_DIFFERENT = 0.2
"""Share of different answers that a steered arm keeps of the first arm's."""
MAX_DISAGREE = 0.25
"""Share of pairs on which a judge's two orders may disagree."""


def extract_checks(audit: Row, talk: int) -> list[Check]:
    """Checks of an extraction's audit. talk: candidates that the verifier will leave out because the expert talks."""
    kept, files = audit["kept"], audit["files"].values()
    records, left_out = sum(f["records"] for f in files), sum(sum(f["left_out"].values()) for f in files)
    return [
        share_check(
            "records left out", left_out, records, MAX_MALFORMED, "candidates.audit.json names each one and why"
        ),
        share_check(
            "assistant turns skipped",
            sum(audit["skipped"].values()),
            audit["turns"],
            MAX_SKIPPED,
            "the table above says why: mend the records, or loosen extract.*",
        ),
        share_check(
            "candidates where the expert talks",
            talk,
            kept["train"] + kept["validation"],
            MAX_SKIPPED,
            "they are left out: name a judge that compares texts (verifier.judge), or set extract.turns=tool_calls",
        ),
        at_least(
            "candidates to train on", kept["train"], MIN_CANDIDATES, "few of them become pivots: add trajectories"
        ),
        at_least(
            "candidates held out",
            kept["validation"],
            MIN_HELD_OUT,
            "a validation on so few says little: raise extract.validation_share, or give every record its task_id",
        ),
    ]


def rescore_checks(changed: int, samples: int, pivots: int, failed: int, candidates: int) -> list[Check]:
    """Checks of another verifier over a profile's samples."""
    which = "one of the two verifiers is wrong about them: look at such turns in `view`, and audit both"
    return [
        share_check("verdicts that change", changed, samples, MAX_CHANGED, which),
        share_check("failed candidates", failed, candidates, MAX_MALFORMED, "the lines `excluded:` say why"),
        at_least("pivots by this verifier", pivots, MIN_PIVOTS, "too few to train on: keep the other verifier"),
    ]


def held_out_checks(rows: Sequence[Row]) -> list[Check]:
    """Whether training made worse what was measured on held-out data before it and after it."""
    checks = []
    for key, name in (("val/accuracy", "accuracy on held-out turns"), ("val/tasks", "success in held-out tasks")):
        values = [row[key] for row in rows if key in row]
        if len(values) > 1:
            found = f"{values[0]:.3f} before, {values[-1]:.3f} after"
            remedy = (
                "train fewer steps, lower the learning rate, or take the best checkpoint: checkpointing.publish=best"
            )
            checks.append(Check(name, found, values[-1] >= values[0], remedy))
    return checks


def sft_checks(rows: Sequence[Row]) -> list[Check]:
    """Checks of a fine-tuning's metrics."""
    losses = [row["loss"] for row in rows if "loss" in row]
    if len(losses) < 2 * ENDS:
        return held_out_checks(rows)
    before, after = fmean(losses[:ENDS]), fmean(losses[-ENDS:])
    check = Check(
        "loss", f"{before:.3f} at first, {after:.3f} at last", after < before, "raise the learning rate, or the steps"
    )
    return [check, *held_out_checks(rows)]


def evaluation_checks(summary: Row) -> list[Check]:
    """Checks of policies against the first one: a gain in domain that is shown, no loss out of domain that is."""
    checks = []
    for label, sets in list(summary["policies"].items())[1:]:
        for name, title in (
            ("multi_turn", "whole tasks"),
            ("one_turn", "held-out turns"),
            ("retention", "out of domain"),
        ):
            change = sets.get(name, {}).get("difference")
            if change is None or (name == "one_turn" and "multi_turn" in sets):
                continue
            found = "{mean:+.1f} [{low:+.1f}, {high:+.1f}] points".format(**{k: 100 * v for k, v in change.items()})
            if name == "retention":
                good, remedy = change["high"] >= 0, "it forgets: fewer steps, a lower learning rate, or a KL penalty"
            elif change["high"] < 0:
                good, remedy = (
                    False,
                    "it got worse: see in `view` what it does otherwise, and how the verifier judges that",
                )
            else:
                good, remedy = (
                    change["low"] > 0,
                    "no gain is shown: more steps or a higher learning rate, or more held-out tasks, which narrow the interval",
                )
            checks.append(Check(f"{label}: {title}", found, good, remedy))
    found = [entry for sets in summary["policies"].values() for entry in sets.values()]
    failed, items = (sum(entry[key] for entry in found) for key in ("failed", "items"))
    checks.append(share_check("items that failed", failed, failed + items, MAX_MALFORMED, "evaluation.jsonl has them"))
    return checks


def preference_checks(audit: Row) -> list[Check]:
    """Checks of a preference audit."""
    kept = sum(audit["kept"].values())
    return [
        at_least("pairs to train on", audit["kept"]["train"], MIN_PIVOTS, "too few for a doctor: add preferences"),
        share_check(
            "records skipped", audit["records"] - kept, audit["records"], MAX_SKIPPED, "the table above says why"
        ),
        share_check(
            "pairs stated both ways round", audit["contradictions"], kept, MAX_MALFORMED, "drop one of each two"
        ),
        share_check(
            "chosen answer is the longer one",
            round((audit["chosen_is_longer"] or 0.0) * kept),
            kept,
            MAX_LONGER,
            "the doctor may learn length: balance the pairs",
        ),
    ]


def reward_checks(summary: Row) -> list[Check]:
    """Checks of token rewards."""
    checks = []
    for objective, found in summary["objectives"].items():
        pairs = sum(found["pairs"].values())
        faces = "write faces that differ more (reward.faces), or take a patient that follows system prompts"
        checks += [
            share_check(f"{objective}: weak pairs", round(found["weak_share"] * pairs), pairs, MAX_WEAK, faces),
            Check(
                f"{objective}: tokens with a reward",
                f"{found['kept_share']:.1%}",
                found["kept_share"] >= MIN_REWARDED,
                "lower reward.theta: hardly a token teaches anything",
            ),
        ]
        worst = min(found["agreement"].values(), default=1.0)
        remedy = "the faces do not tell good answers from bad ones: word them for this objective"
        checks.append(Check(f"{objective}: agreement of the faces", f"{worst:.2f}", worst >= MIN_AGREEMENT, remedy))
    excluded = sum(summary["excluded"].values())
    why = "token_rewards.json counts them by reason"
    return [*checks, share_check("pairs excluded", excluded, excluded + summary["pairs"], MAX_MALFORMED, why)]


def doctor_checks(rows: Sequence[Row]) -> list[Check]:
    """Checks of a doctor's training; empty before its first step."""
    kind = "val/" if any("val/loss" in row for row in rows) else ""
    found = [row for row in rows if f"{kind}loss" in row]
    if len(found) < 2:
        return []
    first, last = ({key.removeprefix(kind): value for key, value in row.items()} for row in (found[0], found[-1]))
    where = "held-out pairs" if kind else "train pairs"
    fewer = "train fewer steps, or lower doctor.optimizer.lr"
    checks = [
        Check(f"loss on {where}", f"{first['loss']:.3f} to {last['loss']:.3f}", last["loss"] < first["loss"], fewer),
        Check(
            "pairs in the right order",
            f"{first['ordered']:.1%} to {last['ordered']:.1%}",
            last["ordered"] >= first["ordered"],
            fewer,
        ),
    ]
    if last.get("rejected_drift") or last.get("chosen_drift"):
        drift, anchor = (
            (last.get(key, 0.0) for key in ("chosen_drift", "rejected_drift")),
            "tfpo.anchor=reference holds it",
        )
        chosen, rejected = drift
        good = chosen >= -MAX_DRIFT and rejected <= MAX_DRIFT
        text = f"chosen answers {chosen:+.2f} nats, rejected ones {rejected:+.2f}"
        checks.append(
            Check("drift from the start model", text, good, f"the doctor loses its language: {anchor}, or {fewer}")
        )
    return checks


def assessment_checks(summary: Row) -> list[Check]:
    """Checks of steered answers against the first arm's."""
    (_, first), *others = summary["arms"].items()
    steered = [(label, arm) for label, arm in others if any(arm["setting"].get("beta", {}).values())]
    if not steered:
        return []

    def gains(arm: Row) -> bool:
        wanted = [o for o, weight in arm["setting"]["beta"].items() if weight > 0 and o in arm["objectives"]]
        return any(arm["objectives"][o]["win"][1] > arm["objectives"][o]["lose"][2] for o in wanted)

    far = [label for label, arm in steered if arm["kl"] > MAX_KL]
    least = MIN_DIFFERENT * (first["different_answers"] or 0.0)  # not measured on one answer to a prompt
    alike = [label for label, arm in steered if (arm["different_answers"] or 0.0) < least]
    won = sum(gains(arm) for _, arm in steered)
    judged = [arm["judge"] for _, arm in others if "judge" in arm]
    more = "more prompts or samples narrow the intervals; else larger weights, or a doctor that learned more"
    return [
        Check("steered arms that gain", f"{won} of {len(steered)}", won > 0, more),
        Check(
            "steered arms far from the patient",
            f"{', '.join(far) or 'none'} (more than {MAX_KL:g} nats a token)",
            not far,
            "lower their weights: answers so far from the patient's are seldom better",
        ),
        Check(
            "steered arms that answer alike",
            ", ".join(alike) or "none",
            not alike,
            "lower their weights, or raise the temperature",
        ),
        *(_judge_checks(judged) if judged else ()),
    ]


def _judge_checks(judged: Sequence[Row]) -> list[Check]:
    """Checks of a judge between answers: `judged` are arms' shares."""
    failed = sum(sum(arm["failed"].values()) for arm in judged)
    pairs, disagree = (sum(arm[name] for arm in judged) for name in ("pairs", "orders_disagree"))
    return [
        Check(
            "pairs without a verdict",
            f"{failed} of {pairs + failed}",
            not failed,
            "they are left out: mend the endpoint and run the same command, which asks for them again",
        ),
        share_check(
            "pairs on which the judge's orders disagree",
            disagree,
            pairs,
            MAX_DISAGREE,
            "it goes by the order of the answers: a larger judge, a plainer assess.criterion or more votes",
        ),
    ]
