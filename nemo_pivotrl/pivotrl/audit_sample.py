"""What an audit tries: a sample of the candidates, and the actions that each is tried with.

The candidates are read one after the other, and none but the sample is kept: there may be a million.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Iterable, Iterator
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any

from nemo_pivotrl.algorithms import selection
from nemo_pivotrl.components.rollout import tell_left_out
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.artifacts import count_rows
from nemo_pivotrl.core.types import Action, Candidate
from nemo_pivotrl.data.states import candidates_of
from nemo_pivotrl.verifiers import probes
from nemo_pivotrl.verifiers.base import Bounded

GOLD, RIGHT, WRONG = "gold", "right", "wrong"
Question = tuple[Candidate, list[tuple[str, str, Action]]]
"""A candidate, and (side, probe, action) of each action that it is tried with."""


class Judged:
    """The candidates of a file that the verifier judges, read anew at every pass."""

    def __init__(self, source: Path, verifier: Bounded):
        self.source, self.verifier = source, verifier

    def __iter__(self) -> Iterator[Candidate]:
        return (c for c in candidates_of(self.source) if not self.verifier.excludes(c.case))

    def tell(self, judged: int) -> None:
        """Say how many are left out. Raises InputError where that is all."""
        tell_left_out(count_rows(self.source), judged, self.source)


class Others:
    """What experts do with one tool: as much of it as shows, for any action, the first others in the order of their hashes."""

    def __init__(self, size: int):
        self.size = max(1, size)
        self._alike: dict[tuple[Any, ...], list[tuple[str, Action]]] = {}
        """Same actions -> the first of them."""

    def add(self, key: str, action: Action) -> None:
        """Take in an expert's action. Of `size` + 1 different actions the first `size` are enough whatever the one in question is."""
        own = self._alike.setdefault(probes.plain(action), [])
        insort(own, (key, action), key=itemgetter(0))
        del own[self.size :]
        if len(self._alike) > self.size + 1:
            del self._alike[max(self._alike, key=lambda alike: self._alike[alike][0][0])]

    def of(self, action: Action) -> Iterator[Action]:
        """Actions that are not this one, in order."""
        same = probes.plain(action)
        found = (entry for alike, entries in self._alike.items() if alike != same for entry in entries)
        return (other for _, other in islice(sorted(found, key=itemgetter(0)), self.size))

    def first(self) -> Action:
        """The very first."""
        return min((entries[0] for entries in self._alike.values()), key=itemgetter(0))[1]


class Tried:
    """A sample of the candidates, and what they are tried with. Other rows' actions come from the whole set.

    `candidates` are read once, and once more where all of them are tried: those are asked about in the file's order.
    """

    def __init__(self, recipe: Recipe, candidates: Iterable[Candidate], asks_judge: bool):
        size = recipe.audit.judged_sample if asks_judge else recipe.audit.sample
        self._seed, self._foreign = recipe.seed, recipe.audit.foreign_actions
        self._by_tool: dict[str, Others] = {}
        self._made, self.judged = probes.Constants(), 0
        keyed = self._taken_in(candidates)
        chosen = [c for _, _, c in heapq.nsmallest(size, keyed)] if size else None
        for _ in keyed:  # all of them, where there is no sample
            pass
        self._chosen = candidates if chosen is None else chosen
        self.count = self.judged if chosen is None else len(chosen)
        self.constants = self._made.found()

    def _taken_in(self, candidates: Iterable[Candidate]) -> Iterator[tuple[str, int, Candidate]]:
        """(hash, place, candidate) of each, once its action is counted."""
        for place, c in enumerate(candidates):
            key = selection.order_key(self._seed, c.candidate_id)
            self.judged = place + 1
            self._made.add(c.expected)
            if c.action_name not in self._by_tool:
                self._by_tool[c.action_name] = Others(self._foreign)
            self._by_tool[c.action_name].add(key, c.expected)
            yield key, place, c

    def questions(self) -> Iterator[Question]:
        """What a `Prober` gets of each chosen candidate."""
        return ((c, list(self._actions(c))) for c in self._chosen)

    def _actions(self, candidate: Candidate) -> Iterator[tuple[str, str, Action]]:
        case, expected = candidate.case, candidate.expected
        yield GOLD, "expert", expected
        for name, action in probes.right(case):
            yield RIGHT, name, action
        for name, action in probes.wrong(case):
            if not probes.same_action(action, expected):
                yield WRONG, name, action
        if not self._foreign:
            return
        if expected.kind == "calls":  # any talk is as good as another to most verifiers; see garbage_message
            for other in self._by_tool[candidate.action_name].of(expected):
                yield WRONG, "other_row", other
        another = next((tool for tool in sorted(self._by_tool) if tool != candidate.action_name), None)
        if another is not None:
            yield WRONG, "other_tool", self._by_tool[another].first()
