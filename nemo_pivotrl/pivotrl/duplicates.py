"""One candidate for each state: exact repeats by a running digest, near repeats by MinHash. Both read a trajectory once."""

from __future__ import annotations

import dataclasses
import hashlib
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

from nemo_pivotrl.core.artifacts import canonical_json, digest
from nemo_pivotrl.core.types import Candidate, Message

SHINGLE = 5
SKETCH_SIZE = 128
SKETCH_BANDS = (16, 8)
"""16 bands of 8: states above 0.9 similarity meet with probability > 0.999, then their sketches are compared."""


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
    sketches = _Sketches(threshold)
    return frozenset(
        c.candidate_id
        for key, c in zip(keys, candidates, strict=True)
        if len(members[key]) > 1 and sketches.seen(c, key)
    )


class _Groups:
    """Equal keys for states of which one may stand for the other: depth, expert action, system text, the user's last turn and
    the last message are the same. A long context that two questions share makes no duplicates of them."""

    def __init__(self) -> None:
        self._trajectory = ""
        self._read = 0
        self._system: list[str] = []
        self._asked = ""

    def of(self, candidate: Candidate) -> str:
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


class _Sketches:
    """MinHash over word 5-grams of the conversation, compared within a group.

    The states of a trajectory grow out of one another, so its sketch grows with it: the cost is one pass over the text.
    """

    def __init__(self, threshold: float):
        import datasketch  # here, so that a missing package is told whatever the data are

        self._datasketch = datasketch
        self.threshold = threshold
        self._indexes: dict[str, Any] = {}
        self._trajectory = ""
        self._read = 0
        self._tail: list[str] = []
        self._sketch: Any = None

    def seen(self, candidate: Candidate, group: str) -> bool:
        """Whether a state of the group and of another trajectory is this similar; remembers the candidate if not."""
        self._advance(candidate)
        if group not in self._indexes:
            self._indexes[group] = (self._datasketch.MinHashLSH(num_perm=SKETCH_SIZE, params=SKETCH_BANDS), {})
        index, kept = self._indexes[group]
        for key in index.query(self._sketch):
            if kept[key][0] != candidate.trajectory_id and kept[key][1].jaccard(self._sketch) >= self.threshold:
                return True
        sketch = self._sketch.copy()
        index.insert(candidate.candidate_id, sketch)
        kept[candidate.candidate_id] = (candidate.trajectory_id, sketch)
        return False

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
