"""One candidate for each state: exact repeats by a running digest, near repeats by MinHash. Both read a trajectory once."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from nemo_pivotrl.core.artifacts import canonical_json, digest
from nemo_pivotrl.core.types import Candidate, Message

SHINGLE = 5
SKETCH_SIZE = 128
SORTED_AT_ONCE = 4096
"""Sketches whose places are sorted together: a sorted copy of all would take twice the sketches' memory."""


def without_duplicates(candidates: list[Candidate], skipped: Counter[str], threshold: float) -> list[Candidate]:
    """One candidate for each state: exact repeats (call ids aside) first, then near repeats of other trajectories.

    Held-out states are seen first, so that a state which occurs in both splits leaves the train split. Candidates of one
    trajectory follow each other.
    """
    actions: dict[bytes, set[str]] = {}
    first: dict[bytes, Candidate] = {}
    states = _StateDigests()
    for c in sorted(candidates, key=lambda c: c.split == "train"):
        key = states.of(c)
        actions.setdefault(key, set()).add(_action(c))
        if first.setdefault(key, c) is not c:
            skipped["duplicate_state"] += 1
    near = _near_duplicates(list(first.values()), threshold) if threshold < 1.0 else frozenset()
    skipped["near_duplicate_state"] += len(near)
    skipped += Counter()  # drops a zero
    kept = {
        c.candidate_id: dataclasses.replace(c, num_unique_actions=len(actions[key]))
        for key, c in first.items()
        if c.candidate_id not in near
    }
    return [kept[c.candidate_id] for c in candidates if c.candidate_id in kept]


def _action(candidate: Candidate) -> str:
    expected = candidate.expected
    return canonical_json([expected.content, [(call.name, call.arguments) for call in expected.calls]])


class _StateDigests:
    """Digests of states, call ids aside. The states of a trajectory grow out of one another, and so does their digest."""

    def __init__(self) -> None:
        self._trajectory: Any = None
        self._read = 0
        self._running = hashlib.sha256()

    def of(self, candidate: Candidate) -> bytes:
        """The digest of a candidate's state and tools. Candidates of one trajectory come in their order."""
        if (candidate.trajectory_id, candidate.tools) != self._trajectory or len(candidate.messages) < self._read:
            self._trajectory, self._read = (candidate.trajectory_id, candidate.tools), 0
            self._running = hashlib.sha256(canonical_json(list(candidate.tools)).encode("utf-8", "surrogatepass"))
        for message in candidate.messages[self._read :]:
            plain = {**message, "tool_call_id": "", "tool_calls": _without_ids(message)}
            self._running.update(canonical_json(plain).encode("utf-8", "surrogatepass"))
        self._read = len(candidate.messages)
        return self._running.digest()


def _without_ids(message: Message) -> list[Any]:
    return [call["function"] for call in message.get("tool_calls") or []]


def _near_duplicates(candidates: Sequence[Candidate], threshold: float) -> frozenset[str]:
    """Ids of candidates whose state is this similar to the one of an earlier candidate of another trajectory.

    Only states that agree in what must be equal (`_Groups`) are compared at all.
    """
    groups = _Groups()
    keys = [groups.of(c) for c in candidates]
    members: dict[str, set[str]] = {}
    for key, c in zip(keys, candidates, strict=True):
        members.setdefault(key, set()).add(c.trajectory_id)
    sketcher = _Sketcher()
    rows: dict[str, list[tuple[Candidate, np.ndarray]]] = {}
    for key, c in zip(keys, candidates, strict=True):
        if len(members[key]) > 1:
            rows.setdefault(key, []).append((c, sketcher.of(c)))
    return frozenset(name for group in rows.values() for name in _similar(group, threshold))


def _similar(group: Sequence[tuple[Candidate, np.ndarray]], threshold: float) -> Iterator[str]:
    """Ids of those whose sketch agrees with the one of an earlier candidate that stays in at least this share of its places.

    Two such sketches differ in at most `apart` places, so one of the `apart` + 1 rarest entries of each is an entry of both
    (the prefix filter of similarity joins). Where a template makes thousands of states alike, the rare entries are what tells
    them apart: few are compared, none of the similar ones is missed.
    """
    sketches = np.stack([sketch for _, sketch in group])
    apart = SKETCH_SIZE - math.ceil(threshold * SKETCH_SIZE)
    rarity = np.empty(sketches.shape, np.int32)
    for place in range(SKETCH_SIZE):
        _, inverse, counts = np.unique(sketches[:, place], return_inverse=True, return_counts=True)
        rarity[:, place] = counts[inverse]
    parts = [rarity[i : i + SORTED_AT_ONCE] for i in range(0, len(rarity), SORTED_AT_ONCE)]
    rare = np.concatenate([np.argsort(part, axis=1, kind="stable")[:, : apart + 1] for part in parts])
    kept: dict[tuple[int, int], list[int]] = {}
    for i, (candidate, sketch) in enumerate(group):
        entries = [(place, value) for place, value in zip(rare[i].tolist(), sketch[rare[i]].tolist(), strict=True)]
        near = sorted({j for entry in entries for j in kept.get(entry, ())})
        agree = (sketches[near] == sketch).sum(1) >= threshold * SKETCH_SIZE if near else ()
        if any(
            yes and group[j][0].trajectory_id != candidate.trajectory_id for j, yes in zip(near, agree, strict=True)
        ):
            yield candidate.candidate_id
        else:
            for entry in entries:
                kept.setdefault(entry, []).append(i)


class _Groups:
    """Equal keys for states of which one may stand for the other: depth, expert action, system text, the user's last turn and
    the last message are the same. A long context that two questions share makes no duplicates of them."""

    def __init__(self) -> None:
        self._trajectory = ""
        self._read = 0
        self._system: list[str] = []
        self._asked = ""

    def of(self, candidate: Candidate) -> str:
        """The key of a candidate's state. Candidates of one trajectory come in their order."""
        messages = candidate.messages
        if candidate.trajectory_id != self._trajectory or len(messages) < self._read:
            self._trajectory, self._read, self._asked = candidate.trajectory_id, 0, ""
            self._system = [digest(m["content"]) for m in messages[:2] if m["role"] in ("system", "developer")]
        for message in messages[self._read :]:
            if message["role"] == "user":
                self._asked = digest(message["content"].split())
        self._read = len(messages)
        last = digest(_spoken(messages[-1]).split())
        return digest([candidate.depth, _action(candidate), self._system, self._asked, last], 32)


class _Sketcher:
    """MinHash over word 5-grams of the conversation.

    The states of a trajectory grow out of one another, so its sketch grows with it: the cost is one pass over the text.
    """

    def __init__(self) -> None:
        import datasketch  # here, so that a missing package is told whatever the data are

        self._datasketch = datasketch
        self._trajectory = ""
        self._read = 0
        self._tail: list[str] = []
        self._sketch: Any = None

    def of(self, candidate: Candidate) -> np.ndarray:
        """The state's sketch, [SKETCH_SIZE] of 32 bits; the share of equal places estimates the Jaccard similarity."""
        self._advance(candidate)
        return self._sketch.hashvalues.astype(np.uint32)

    def _advance(self, candidate: Candidate) -> None:
        if candidate.trajectory_id != self._trajectory or len(candidate.messages) < self._read:
            self._trajectory, self._read, self._tail = candidate.trajectory_id, 0, []
            self._sketch = self._datasketch.MinHash(num_perm=SKETCH_SIZE, seed=1, hashfunc=zlib.crc32)
        new = [_spoken(m) for m in candidate.messages[self._read :] if m["role"] != "system"]
        words = [*self._tail, *" ".join(new).lower().split()]
        shingles = [" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))]
        self._sketch.update_batch([shingle.encode("utf-8", "replace") for shingle in shingles])
        self._read, self._tail = len(candidate.messages), words[-SHINGLE + 1 :]


def _spoken(message: Message) -> str:
    return message["content"] + " " + " ".join(f["name"] + " " + f["arguments"] for f in _without_ids(message))
