"""Candidates and profiles of a test's own as the artefacts hold them: a trajectory for each, and rows that point to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_pivotrl.core.artifacts import Header, read_rows, write_artefact
from nemo_pivotrl.core.types import Candidate, Profile, Trajectory
from nemo_pivotrl.data import states
from nemo_pivotrl.data.gym_rows import message_of
from nemo_pivotrl.pivotrl.profile_rows import light_of_row, rescored_row


def store(candidates: Sequence[Candidate], artefact: Path) -> dict[str, Any]:
    """Write `trajectories.jsonl` beside `artefact`, a row for each candidate; what the artefact's header says of it."""
    target = artefact.with_name(states.NAME)
    rows = [
        states.trajectory_row(
            Trajectory(
                c.candidate_id, c.task_id, (*c.messages, message_of(c.expected)), c.tools, None, "t:1", fields=c.fields
            )
        )
        for c in candidates
    ]
    write_artefact(target, Header("trajectories", "c"), rows)
    return states.reference(target, artefact)


def pointers(candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
    """Rows that point to what `store` wrote."""
    return [
        states.candidate_row(dataclasses.replace(c, turn=len(c.messages)), number)
        for number, c in enumerate(candidates)
    ]


def write_candidates(path: Path, candidates: Sequence[Candidate], parent: str = "", stage: str = "candidates") -> Path:
    """An artefact of candidates, or of pivots, and its trajectories."""
    header = Header(stage, "c", parent, extra=store(candidates, path))
    return write_artefact(path, header, pointers(candidates))


def profile_row(profile: Profile, number: int = 0) -> dict[str, Any]:
    """A profile as a row that points to the trajectory `number`."""
    told = {"tokens_generated": profile.tokens_generated, "tokens_prompt": profile.tokens_prompt}
    row = states.candidate_row(profile.candidate, number) | {"profile": told | {"control": profile.control}}
    return rescored_row(row, profile.samples, profile.failure)


def whole_profiles(path: Path) -> list[Profile]:
    """A file's profiles with their states and samples."""
    found = states.open_states(path)
    return [
        dataclasses.replace(light_of_row(row), candidate=found.candidate(row), samples=tuple(row["samples"]))
        for row in read_rows(path)
    ]
