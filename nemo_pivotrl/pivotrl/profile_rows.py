"""Rows of a profile: the candidate's row with its rollouts, hit rate and cost beside it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from nemo_pivotrl.algorithms import selection
from nemo_pivotrl.algorithms.early_stopping import StoppingRule, interval
from nemo_pivotrl.core.artifacts import Header, json_bytes
from nemo_pivotrl.core.types import Action, Candidate, Profile, ToolCall
from nemo_pivotrl.pivotrl.profile_scheduler import CandidateProgress

Row = dict[str, Any]
RATES = ("pass_rate", "pass_rate_total", "pass_rate_passed")
"""Fields of the hit rate, named as NeMo-Gym's data sets name them."""
NO_FIELDS: Mapping[str, Any] = MappingProxyType({})


def member_line(member: CandidateProgress, plan: StoppingRule) -> bytes:
    """A finished candidate's row: its line of the candidates file as it is, and the profile after it.

    What a failed one had drawn is kept, for when it is tried again; it has no samples and no rate.
    """
    ks = sorted(member.rows)
    kept = b",".join(member.rows[k] for k in ks)
    told: Row = {
        "tokens_generated": sum(member.tokens.values()),
        "tokens_prompt": member.prompt_tokens,
        "failure": member.failure,
        **({"detail": member.detail} if member.detail else {}),
    }
    if member.failure is not None:
        drawn = b",".join(b"[%d,%b]" % (k, member.rows[k]) for k in ks)
        tail = b',"samples":[],"profile":%b,"kept":[%b]}' % (json_bytes(told)[:-1], drawn)
    else:
        stats = selection.statistics([member.rewards[k] for k in ks])
        told |= _measured(stats, plan.curtailed and not member.plan.curtailed)
        rate = (json_bytes(stats.mean), stats.count, stats.successes)
        tail = b',"pass_rate":%b,"pass_rate_total":%d,"pass_rate_passed":%d' % rate
        tail += b',"samples":[%b],"profile":%b' % (kept, json_bytes(told))
    return member.line.rstrip()[:-1] + tail + b"}\n"


def _measured(stats: selection.GroupStatistics, control: bool) -> Row:
    ends = interval(stats.successes, stats.count - stats.successes) if stats.binary else None
    return {"interval": [round(end, 4) for end in ends] if ends else None, "control": control}


def rescored_row(row: Row, samples: Sequence[Row], failure: str | None) -> Row:
    """A profile's row with its samples judged anew; one that failed has no samples and no rate."""
    told = {key: row["profile"][key] for key in ("tokens_generated", "tokens_prompt")} | {"failure": failure}
    made = {key: value for key, value in row.items() if key not in (*RATES, "samples", "profile", "kept")}
    if failure is None:
        stats = selection.statistics([float(sample["reward"]) for sample in samples])
        made |= dict(zip(RATES, (stats.mean, stats.count, stats.successes), strict=True))
        told |= _measured(stats, bool(row["profile"].get("control")))
    return made | {"samples": [] if failure else list(samples), "profile": told}


@lru_cache(maxsize=4096)
def _light_action(names: tuple[str, ...]) -> Action:
    return Action("calls", calls=tuple(ToolCall(n, "") for n in names)) if names else Action("message")


@lru_cache(maxsize=65536)
def _light_samples(rewards: tuple[float, ...]) -> tuple[Row, ...]:
    return tuple({"reward": reward} for reward in rewards)


def light_of_row(row: Row) -> Profile:
    """The profile of a row as selection and tables need it: no messages, no tools, of an action its tools' names, of samples their
    rewards. A million of them take 0.4 GB, since what repeats is there once."""
    told = row["profile"]
    return Profile(
        candidate=Candidate(
            row["candidate_id"],
            sys.intern(row["trajectory_id"]),
            sys.intern(row["task_id"]),
            sys.intern(row["split"]),  # type: ignore[arg-type]
            row["turn"],
            row["depth"],
            (),
            (),
            _light_action(tuple(row["calls"])),
            fields=NO_FIELDS,
        ),
        samples=_light_samples(tuple(float(sample["reward"]) for sample in row["samples"])),
        tokens_generated=told["tokens_generated"],
        tokens_prompt=told["tokens_prompt"],
        failure=told["failure"],
        control=bool(told.get("control")),
    )


def drawn_of_row(row: Row) -> list[tuple[int, Row]]:
    """(k, rollout) of everything that was drawn and judged for a row's candidate, failed or not."""
    if row["profile"]["failure"] is None:
        return list(enumerate(row["samples"]))
    return [(k, rollout) for k, rollout in row["profile"].get("kept", ())]


def plan_in(header: Header) -> StoppingRule:
    """The stopping rule in a profile's header; without one, all K rollouts of every candidate."""
    told = header.extra.get("plan")
    if told is None:
        return StoppingRule(int(header.extra["num_generations"]), curtailed=False)
    kept = {key: value for key, value in told.items() if key != "control_share"}
    return StoppingRule(**kept | {"prior": (kept["prior"][0], kept["prior"][1])})


def repeated(samples: Sequence[Row]) -> int:
    """How many of a candidate's samples say what an earlier one has said."""
    return len(samples) - len({sample["text"] for sample in samples})
