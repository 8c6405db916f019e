"""Rows of a profile: the candidate's row with its rollouts, hit rate and cost beside it."""

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

Row = dict[str, Any]
RATES = ("pass_rate", "pass_rate_total", "pass_rate_passed")
"""Fields of the hit rate, named as NeMo-Gym's data sets name them."""
NO_FIELDS: Mapping[str, Any] = MappingProxyType({})


def measured(stats: selection.GroupStatistics, control: bool) -> Row:
    """What a profile says of a hit rate beside it."""
    ends = interval(stats.successes, stats.count - stats.successes) if stats.binary else None
    return {"interval": [round(end, 4) for end in ends] if ends else None, "control": control}


def rescored_row(row: Row, samples: Sequence[Row], failure: str | None) -> Row:
    """A profile's row with its samples judged anew; one that failed has no samples and no rate."""
    told = {key: row["profile"][key] for key in ("tokens_generated", "tokens_prompt")} | {"failure": failure}
    made = {key: value for key, value in row.items() if key not in (*RATES, "samples", "profile", "kept")}
    if failure is None:
        stats = selection.statistics([float(sample["reward"]) for sample in samples])
        made |= dict(zip(RATES, (stats.mean, stats.count, stats.successes), strict=True))
        told |= measured(stats, bool(row["profile"].get("control")))
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
