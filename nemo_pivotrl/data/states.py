"""States are stored once: `trajectories.jsonl` holds the trajectories, and rows of candidates, profiles and pivots point into it.

A pointer is `trajectory`, a row there counted from 0, and `turn`, the message that is the expert's action: the state is every message
before it. The header of an artefact with pointers names that file, relative to its own folder, and its digest: a run folder can be
moved, and no pointer is followed into another version of the file.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from nemo_pivotrl.core.artifacts import POINTING, Header, file_digest, read_header, read_rows
from nemo_pivotrl.core.atomic import open_input
from nemo_pivotrl.core.errors import InputError, Problem, short
from nemo_pivotrl.core.types import Candidate, Split, Trajectory
from nemo_pivotrl.data.gym_rows import action_of, tool_to_chat, tool_to_flat, verifier_fields

Row = dict[str, Any]
NAME = "trajectories.jsonl"
KEY = "trajectories"
"""Field of a header's `extra` that names the file and its digest."""
PARSED = 16
"""Trajectories that are kept parsed: candidates of one follow each other."""


def trajectory_row(trajectory: Trajectory) -> Row:
    """A trajectory as `trajectories.jsonl` holds it. Tools are in the chat form, as they are read back from a NeMo-Gym row."""
    return {
        "trajectory_id": trajectory.trajectory_id,
        "messages": trajectory.messages,
        "tools": [tool_to_chat(tool_to_flat(tool)) for tool in trajectory.tools],
        "fields": verifier_fields(dict(trajectory.fields)),
    }


def candidate_row(candidate: Candidate, trajectory: int) -> Row:
    """A candidate as a pointer into the file's row `trajectory`, with what is its own; of its action the tools' names, for tables."""
    return {
        "candidate_id": candidate.candidate_id,
        "trajectory_id": candidate.trajectory_id,
        "task_id": candidate.task_id,
        "split": candidate.split,
        "trajectory": trajectory,
        "turn": candidate.turn,
        "depth": candidate.depth,
        "calls": [call.name for call in candidate.expected.calls],
        "num_unique_actions": candidate.num_unique_actions,
    }


def reference(trajectories: Path, artefact: Path) -> Row:
    """What the header of `artefact` says of the file that its rows point into."""
    return {KEY: {"file": os.path.relpath(trajectories, artefact.parent), "digest": file_digest(trajectories)}}


def moved_reference(header: Header, source: Path, target: Path) -> Row:
    """The reference in the header of `source`, as `target` has it: the same file, seen from another folder."""
    told = header.extra[KEY]
    return {KEY: told | {"file": os.path.relpath(source.parent / told["file"], target.parent)}}


class States:
    """The trajectories that an artefact's rows point into. Raises InputError where they are missing, damaged or another version's."""

    def __init__(self, artefact: Path, header: Header):
        told = header.extra[KEY]
        self.artefact, self.header, self.path = artefact, header, Path(os.path.normpath(artefact.parent / told["file"]))
        again = "or run nemo-pivotrl extract RECIPE again: the same trajectories and settings give the same file"
        if not self.path.exists():
            remedy = f"{artefact} points into it: put it back there (it moves with its run folder), {again}"
            raise InputError(Problem(str(self.path), None, "file", "no such file", remedy))
        read_header(self.path, "trajectories")
        if (found := file_digest(self.path)) != told["digest"]:
            remedy = f"{artefact} points into the version {told['digest']}: put that one back, {again}"
            raise InputError(Problem(str(self.path), 1, "digest", found, remedy))
        self._places = array("q")
        with open_input(self.path) as file:
            at = len(file.readline())
            for line in file:
                self._places.append(at)
                at += len(line)
        self.trajectory = lru_cache(PARSED)(self._trajectory)
        """(messages, tools, the verifier's fields) of a row."""

    def __reduce__(self) -> tuple[type[States], tuple[Path, Header]]:
        return States, (self.artefact, self.header)

    def _trajectory(self, number: int) -> tuple[tuple[Row, ...], tuple[Row, ...], Row]:
        with self.path.open("rb") as file:
            file.seek(self._places[number])
            row = json.loads(file.readline())
        return tuple(row["messages"]), tuple(row["tools"]), row["fields"]

    def candidate(self, row: Mapping[str, Any]) -> Candidate:
        """The candidate that a row points to. Raises InputError for a row without a pointer, or with one to nothing."""
        try:
            turn, (messages, tools, fields) = row["turn"], self.trajectory(row["trajectory"])
            return Candidate(
                candidate_id=row["candidate_id"],
                trajectory_id=row["trajectory_id"],
                task_id=row["task_id"],
                split=row["split"],
                turn=turn,
                depth=row["depth"],
                messages=messages[:turn],
                tools=tools,
                expected=action_of(messages[turn]),
                num_unique_actions=row["num_unique_actions"],
                fields=fields,
            )
        except (KeyError, IndexError, TypeError) as error:
            found = f"{short(str(dict(row)))}: {type(error).__name__} {error}"
            remedy = f"this row points to no turn of {self.path}; re-run the stage that wrote it"
            raise InputError(Problem(str(self.artefact), None, "trajectory, turn", found, remedy)) from None


def open_states(artefact: Path) -> States:
    """The trajectories that an artefact of candidates, profiles or pivots points into. Raises InputError."""
    return States(artefact, read_header(artefact, POINTING))


def candidates_of(artefact: Path, split: Split | None = None) -> Iterator[Candidate]:
    """The candidates of an artefact's rows, in order; with a `split`, only its own. Raises InputError."""
    states = open_states(artefact)
    return (states.candidate(row) for row in read_rows(artefact) if split in (None, row["split"]))
