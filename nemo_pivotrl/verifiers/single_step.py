"""`single_step`: NeMo-Gym's single-step tool-use comparison, and `exact`: the paper's strict match for the ablation.

Rules of `single_step_tool_use_with_argument_comparison`. Gym 0.5 judges the first call alone; 0.6 and 0.7 judge the set of
calls. Known weaknesses are part of the rules and kept, since published runs used them: any text passes where a message is
expected, two strings that share no word pass at threshold 0.0, and the largest possible overlap of two equal strings is 0.5.

Where the released code raises (undecodable or absurdly nested arguments), this gives reward 0 with
`ARGUMENTS_DECODE_ERROR`: a model's output can never stop a run.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from nemo_pivotrl.config import Limits, ranged
from nemo_pivotrl.core.types import Action, Case, ToolCall, Verdict
from nemo_pivotrl.verifiers.base import Computing, VerifierFault
from nemo_pivotrl.verifiers.bounds import LimitExceeded, decode_json

PAIR_WORK = 192
"""Units of `Limits.max_work` that comparing one pair of calls costs besides its characters."""


def word_overlap(expected: Sequence[str], actual: Sequence[str]) -> float:
    """Words in common (as multisets) over the words of both: 0.5 for equal texts, 0 for disjoint ones."""
    return (Counter(expected) & Counter(actual)).total() / (len(expected) + len(actual))


def max_matching(edges: Sequence[Sequence[int]], kinds: Sequence[int], room: Sequence[int]) -> set[int]:
    """Expected calls that a maximum bipartite matching serves, those with the fewest partners first.

    Equal calls are one kind: expected call i is of kind `kinds[i]` and may take a place of the actual kinds
    `edges[kinds[i]]`, of which there are `room[j]`. Which calls are served depends on the order of trying alone, so
    this is the matching of single calls at the cost of their kinds. Augmenting paths are followed with a queue: their
    length does not meet Python's recursion limit.
    """
    taken: list[Counter[int]] = [Counter() for _ in room]  # taken[j][k]: calls of kind k that hold places of kind j
    matched, hopeless = set(), set()
    for call in sorted(range(len(kinds)), key=lambda i: sum(room[j] for j in edges[kinds[i]])):
        if kinds[call] in hopeless:  # no later path can free what no path could free before
            continue
        path = _augmenting_path(kinds[call], edges, taken, room)
        if path is None:
            hopeless.add(kinds[call])
            continue
        matched.add(call)
        for comer, place, leaver in path:
            taken[place][comer] += 1
            if leaver is not None:
                taken[place] -= Counter({leaver: 1})
    return matched


def _augmenting_path(
    start: int, edges: Sequence[Sequence[int]], taken: Sequence[Counter[int]], room: Sequence[int]
) -> list[tuple[int, int, int | None]] | None:
    """Steps (kind that comes, place it takes, kind that leaves it for the step before), or None where there is no way."""
    reached: dict[int, int] = {}  # right kind -> the left kind that reached it
    entered: dict[int, int] = {}  # left kind -> the right kind it would be displaced from
    queue = [start]
    while queue:
        left = queue.pop()
        for right in edges[left]:
            if right in reached:
                continue
            reached[right] = left
            if taken[right].total() < room[right]:
                steps: list[tuple[int, int, int | None]] = [(left, right, None)]
                while left != start:
                    right = entered[left]
                    steps.append((reached[right], right, left))
                    left = reached[right]
                return steps
            for owner in taken[right]:
                if owner != start and owner not in entered:
                    entered[owner] = right
                    queue.append(owner)
    return None


@dataclass(kw_only=True, frozen=True)
class SingleStep(Computing):
    """Recursive argument comparison with a word-overlap threshold, and set matching for parallel calls.

    Defaults are Gym's base (tau) config; the shipped SWE config has threshold 0.0, search 0.3.
    """

    name: ClassVar[str] = "single_step"
    version: ClassVar[str] = "2"
    talk_rule: ClassVar[str] = "released"
    word_count_similarity_threshold: float = ranged(0.1, 0.0, 1.0)
    """Texts of two and more words match from this share of common words on; the share is at most 0.5."""
    floating_point_comparison_threshold: float = ranged(1e-6, 0.0)
    """Numbers match when they differ by less than this."""
    parallel_tool_call_rewarding: bool = False
    """Let the number of calls matter; false: calls beyond the expert's cost nothing."""
    allow_subset: bool = False
    """With `parallel_tool_call_rewarding`: accept fewer calls than the expert's."""
    allow_superset: bool = False
    """With `parallel_tool_call_rewarding`: accept more calls than the expert's."""
    parallel_tool_call_reward_mode: Literal["binary_strict", "fractional", "f1"] = "binary_strict"
    """All calls or nothing, the matched share of the required calls, or F1 of both sides."""
    compat: Literal["0.5", "0.6", "0.7"] = "0.7"
    limits: Limits = field(default_factory=Limits)

    def verify(self, case: Case, actual: Action) -> Verdict:
        """Reward and Gym's category name. The tools' schemas are not looked at."""
        expected = case.expected
        if actual.kind == "malformed":
            return Verdict(0.0, "ARGUMENTS_DECODE_ERROR", actual.detail)
        if actual.kind == "none":
            return Verdict(0.0, "NO_ACTION_FOUND", actual.detail)
        if expected.kind == "message":
            said = actual.kind == "message"
            return Verdict(1.0, "EXPECTED_CHAT_MESSAGE_FOUND") if said else Verdict(0.0, "NO_EXPECTED_CHAT_MESSAGE")
        if actual.kind == "message":
            return Verdict(0.0, "NO_EXPECTED_TOOL_CALL")
        made = actual.calls
        if self.compat == "0.5":
            if len(expected.calls) > 1:
                raise VerifierFault("expected_action", "Gym 0.5 has no batches of calls; use compat 0.6 or 0.7")
            made = made[:1]
        if len(expected.calls) == 1 and len(made) == 1:
            category = self._compare_call(self._expert(expected.calls[0]), made[0], self._decode(made[0]))
            return Verdict(0.0, category) if category else Verdict(1.0, "EXPECTED_TOOL_CALL")
        return self._compare_sets(expected.calls, made)

    def _expert(self, call: ToolCall) -> tuple[str, Any]:
        try:
            return call.name, decode_json(call.arguments, self.limits)
        except ValueError as error:  # the row is at fault, not the policy: the candidate is excluded
            raise VerifierFault("expected_arguments", str(error)) from None

    def _decode(self, call: ToolCall) -> Any:
        try:
            return decode_json(call.arguments, self.limits)
        except json.JSONDecodeError:
            return _UNDECODABLE
        except ValueError:
            return _EXCESSIVE

    def _compare_call(self, expected: tuple[str, Any], actual: ToolCall, arguments: Any) -> str:
        """Empty when the calls are equivalent, else the category of the first difference."""
        if expected[0] != actual.name:
            return "UNEXPECTED_TOOL"
        if arguments is _UNDECODABLE or arguments is _EXCESSIVE:
            return "ARGUMENTS_DECODE_ERROR"
        return self._compare(expected[1], arguments)

    def _compare(self, expected: Any, actual: Any) -> str:
        if not isinstance(actual, type(expected)):
            return "ARGUMENT_VALUE_TYPE_DIFFERENT"
        if isinstance(expected, dict):
            if expected.keys() != actual.keys():
                return "ARGUMENT_OBJECT_KEYS_DIFFERENT"
            return next((c for key in expected if (c := self._compare(expected[key], actual[key]))), "")
        if isinstance(expected, list):
            if len(expected) != len(actual):
                return "ARGUMENT_LIST_LENGTH_DIFFERENT"
            return next((c for e, a in zip(expected, actual, strict=True) if (c := self._compare(e, a))), "")
        if isinstance(expected, float):
            same = abs(actual - expected) < self.floating_point_comparison_threshold
        elif isinstance(expected, str):
            wanted, found = expected.lower().split(), actual.lower().split()
            if min(len(wanted), len(found)) >= 2:
                same = word_overlap(wanted, found) >= self.word_count_similarity_threshold
            else:
                same = expected == actual
        else:
            same = expected == actual
        return "" if same else "ARGUMENT_VALUE_DIFFERENT"

    def _compare_sets(self, expected: tuple[ToolCall, ...], actual: tuple[ToolCall, ...]) -> Verdict:
        too_few, too_many = len(actual) < len(expected), len(actual) > len(expected)
        if self.parallel_tool_call_rewarding and (
            (too_few and not self.allow_subset) or (too_many and not self.allow_superset)
        ):
            return Verdict(0.0, "FUNCTION_CALL_BATCH_LENGTH_DIFFERENT")
        wanted, wanted_kind = call_kinds(expected)
        found, found_kind = call_kinds(actual)
        _check_pairs(wanted, found, self.limits)
        room = [0] * len(found)
        for kind in found_kind:
            room[kind] += 1
        decoded = [(call, self._decode(call)) for call in found]
        names = {call.name for call in wanted}
        if any(arguments is _EXCESSIVE and call.name in names for call, arguments in decoded):
            # the released code raises here, whatever the other calls are worth
            return Verdict(0.0, "ARGUMENTS_DECODE_ERROR", "a call's arguments are beyond what is read")
        edges, reasons = [], []
        for call in wanted:
            expert = self._expert(call)
            verdicts = [self._compare_call(expert, *pair) for pair in decoded]
            edges.append([j for j, verdict in enumerate(verdicts) if not verdict])
            reasons.append(next((v for v in verdicts if v and v != "UNEXPECTED_TOOL"), "UNEXPECTED_TOOL"))
        matched = max_matching(edges, wanted_kind, room)
        reward = self._set_reward(len(matched), len(expected), len(actual))
        if reward == 1.0:
            return Verdict(1.0, "EXPECTED_TOOL_CALL" if len(expected) == 1 else "EXPECTED_TOOL_CALL_BATCH")
        unmatched = [i for i in range(len(expected)) if i not in matched]
        if not unmatched or len(matched) == len(actual):
            return Verdict(reward, "FUNCTION_CALL_BATCH_LENGTH_DIFFERENT")
        return Verdict(reward, reasons[wanted_kind[unmatched[0]]])

    def _set_reward(self, matched: int, expected: int, actual: int) -> float:
        if not self.parallel_tool_call_rewarding:
            return float(matched == expected)
        if self.parallel_tool_call_reward_mode == "f1":
            return 2 * matched / (expected + actual) if expected + actual else 0.0
        required = min(expected, actual) if self.allow_subset else expected
        if self.parallel_tool_call_reward_mode == "fractional":
            return matched / required if required else 0.0
        return float(matched == required)


_UNDECODABLE = object()
"""Arguments that are no JSON."""
_EXCESSIVE = object()
"""Arguments too deep, too many, or with too many digits to be read."""


def call_kinds(calls: Sequence[ToolCall]) -> tuple[list[ToolCall], list[int]]:
    """Different calls in order of appearance, and for every call which of them it is."""
    index: dict[tuple[str, str], int] = {}
    kinds = [index.setdefault((c.name, c.arguments), len(index)) for c in calls]
    return [ToolCall(*key) for key in index], kinds


def _check_pairs(wanted: Sequence[ToolCall], found: Sequence[ToolCall], limits: Limits) -> None:
    """Raises LimitExceeded where comparing every pair would cost too much."""
    size_wanted, size_found = (sum(len(c.arguments) for c in calls) for calls in (wanted, found))
    work = len(wanted) * size_found + len(found) * size_wanted + PAIR_WORK * len(wanted) * len(found)
    if work > limits.max_work:
        raise LimitExceeded(f"{len(wanted)} expected and {len(found)} different calls to compare")


@dataclass(kw_only=True, frozen=True)
class Exact(Computing):
    """The naive local reward: the action must equal the expert's, calls as parsed JSON and in order, messages as text.

    This is the reward that PivotRL's ablation shows to be too strict; it is here to be compared with.
    """

    name: ClassVar[str] = "exact"
    version: ClassVar[str] = "1"
    limits: Limits = field(default_factory=Limits)

    def verify(self, case: Case, actual: Action) -> Verdict:
        """1.0 iff equal."""
        expected = case.expected
        if expected.kind == "message":
            same = actual.kind == "message" and actual.content == expected.content.strip()
        else:
            wanted, found = ([self._strict(c) for c in a.calls] for a in (expected, actual))
            same = actual.kind == "calls" and found == wanted
        return Verdict(float(same), "EQUAL" if same else "DIFFERENT")

    def _strict(self, call: ToolCall) -> tuple[str, str]:
        try:
            return call.name, json.dumps(decode_json(call.arguments, self.limits), sort_keys=True)
        except ValueError:
            return call.name, "undecodable: " + call.arguments
