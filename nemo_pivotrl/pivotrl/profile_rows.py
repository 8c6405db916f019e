"""Rows of a profile: the candidate's Gym row with its rollouts, hit rate and cost beside it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from nemo_pivotrl.algorithms import selection
from nemo_pivotrl.algorithms.early_stopping import StoppingRule, interval
from nemo_pivotrl.core.artifacts import Header
from nemo_pivotrl.core.types import Action, Candidate, Profile, ToolCall
from nemo_pivotrl.data import gym_rows as responses

Row = dict[str, Any]
NO_FIELDS: Mapping[str, Any] = MappingProxyType({})


def measured(stats: selection.GroupStatistics, control: bool) -> Row:
    """What a profile says of a hit rate beside it."""
    ends = interval(stats.successes, stats.count - stats.successes) if stats.binary else None
    return {"interval": [round(end, 4) for end in ends] if ends else None, "control": control}


def profile_to_row(profile: Profile, agent_ref: str) -> Row:
    """A Gym row with the profile beside it. A failed candidate has no pass rate."""
    row = responses.candidate_to_row(profile.candidate, agent_ref)
    told: Row = {
        "tokens_generated": profile.tokens_generated,
        "tokens_prompt": profile.tokens_prompt,
        "failure": profile.failure,
    }
    if profile.failure is None:
        stats = selection.statistics(profile.rewards)
        row |= {"pass_rate": stats.mean, "pass_rate_total": stats.count, "pass_rate_passed": stats.successes}
        told |= measured(stats, profile.control)
    return row | {"samples": list(profile.samples), "profile": told}


def profile_of_row(row: Row) -> Profile:
    """The profile of a row that `profile_to_row` wrote."""
    told = row["profile"]
    ends = told.get("interval")
    return Profile(
        candidate=responses.candidate_of_row(row),
        samples=tuple(row["samples"]),
        tokens_generated=told["tokens_generated"],
        tokens_prompt=told["tokens_prompt"],
        failure=told["failure"],
        interval=(ends[0], ends[1]) if ends else None,
        control=bool(told.get("control")),
    )


@lru_cache(maxsize=4096)
def _light_action(kind: str, names: tuple[str, ...]) -> Action:
    return Action("message") if kind == "message" else Action("calls", calls=tuple(ToolCall(n, "") for n in names))


@lru_cache(maxsize=65536)
def _light_samples(rewards: tuple[float, ...]) -> tuple[Row, ...]:
    return tuple({"reward": reward} for reward in rewards)


def light_of_row(row: Row) -> Profile:
    """The profile of a row as selection and tables need it: no messages, no tools, of an action its tools' names, of samples their
    rewards. A million of them take 0.4 GB, since what repeats is there once."""
    told, source, expected = row["profile"], row["provenance"], row["expected_action"]
    calls = expected["calls"] if expected["type"] == "function_call_batch" else [expected]
    names = () if expected["type"] == "message" else tuple(call["name"] for call in calls)
    return Profile(
        candidate=Candidate(
            source["candidate_id"],
            sys.intern(row["trajectory_id"]),
            sys.intern(source["task_id"]),
            sys.intern(source["split"]),  # type: ignore[arg-type]
            source["turn"],
            source["depth"],
            (),
            (),
            _light_action("message" if expected["type"] == "message" else "calls", names),
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
