"""`tool_call`: NeMo-Gym's single-step tool-use comparison, and `exact`: the paper's strict match for the ablation.

Rules of `single_step_tool_use_with_argument_comparison` as released in Gym 0.6 and 0.7. Known weaknesses are part of
the rules and kept, since published runs used them: any text passes where a message is expected, two strings that share
no word pass at threshold 0.0, and the largest possible overlap of two equal strings is 0.5.

Where the released code raises (undecodable or absurdly nested arguments), this gives reward 0 with
`ARGUMENTS_DECODE_ERROR`: a model's output can never stop a run.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, Literal

from nemo_pivotrl.records import Action, ToolCall, Verdict
from nemo_pivotrl.verifiers import VerifierFault

MAX_DEPTH = 200
"""Deeper arguments are a decode error: Python's own limit depends on who calls."""


def word_overlap(expected: str, actual: str) -> float:
    """Shared words (as multisets, case folded) over all words of both: 0.5 for equal strings, 0 for disjoint ones."""
    left, right = Counter(expected.strip().lower().split()), Counter(actual.strip().lower().split())
    return (left & right).total() / (left.total() + right.total())


def max_matching(edges: list[list[int]]) -> set[int]:
    """Left vertices of a maximum bipartite matching, offered in order of fewest edges first.

    `edges[i]` lists the right vertices that left vertex i may take. Augmenting paths are followed with a stack, so that
    the number of calls does not meet Python's recursion limit.
    """
    owner: dict[int, int] = {}
    matched = set()
    for start in sorted(range(len(edges)), key=lambda i: len(edges[i])):
        reached_from: dict[int, int] = {}
        queue, free = [start], None
        while queue and free is None:
            left = queue.pop()
            for right in edges[left]:
                if right in reached_from:
                    continue
                reached_from[right] = left
                if right not in owner:
                    free = right
                    break
                queue.append(owner[right])
        if free is None:
            continue
        matched.add(start)
        taken = {left: right for right, left in owner.items()}
        step: int | None = free
        while step is not None:
            left = reached_from[step]
            owner[step], step = left, taken.get(left)
    return matched


def _depth_within(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            child
            for node in level
            if isinstance(node, (dict, list))
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return True
    return False


def decode_arguments(text: str) -> Any:
    """The arguments' JSON value. Raises ValueError when it is no JSON or nested deeper than MAX_DEPTH."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not _depth_within(value, MAX_DEPTH):
        raise ValueError("nested too deeply")
    return value


class ToolCallVerifier:
    """Recursive argument comparison with a word-overlap threshold, and set matching for parallel calls.

    Defaults are Gym's base (tau) config; the shipped SWE config has threshold 0.0, search 0.3.
    """

    name = "tool_call"
    version = "gym-0.7"

    def __init__(
        self,
        word_count_similarity_threshold: float = 0.1,
        floating_point_comparison_threshold: float = 1e-6,
        parallel_tool_call_rewarding: bool = False,
        allow_subset: bool = False,
        allow_superset: bool = False,
        parallel_tool_call_reward_mode: Literal["binary_strict", "fractional", "f1"] = "binary_strict",
    ):
        if parallel_tool_call_reward_mode not in ("binary_strict", "fractional", "f1"):
            raise TypeError(
                f"parallel_tool_call_reward_mode {parallel_tool_call_reward_mode!r} is not binary_strict, fractional or f1"
            )
        self.word_threshold = word_count_similarity_threshold
        self.float_threshold = floating_point_comparison_threshold
        self.parallel = parallel_tool_call_rewarding
        self.allow_subset, self.allow_superset = allow_subset, allow_superset
        self.mode = parallel_tool_call_reward_mode

    def verify(self, tools: tuple[dict[str, Any], ...], expected: Action, actual: Action) -> Verdict:
        """Reward and Gym's category name. `tools` is not used: this verifier does not look at schemas."""
        if actual.kind == "malformed":
            return Verdict(0.0, "ARGUMENTS_DECODE_ERROR", actual.detail)
        if actual.kind == "none":
            return Verdict(0.0, "NO_ACTION_FOUND", actual.detail)
        if expected.kind == "message":
            said = actual.kind == "message"
            return Verdict(1.0, "EXPECTED_CHAT_MESSAGE_FOUND") if said else Verdict(0.0, "NO_EXPECTED_CHAT_MESSAGE")
        if actual.kind == "message":
            return Verdict(0.0, "NO_EXPECTED_TOOL_CALL")
        if len(expected.calls) == 1 and len(actual.calls) == 1:
            category = self.compare_call(expected.calls[0], actual.calls[0])
            return Verdict(0.0, category) if category else Verdict(1.0, "EXPECTED_TOOL_CALL")
        return self._compare_sets(expected.calls, actual.calls)

    def compare_call(self, expected: ToolCall, actual: ToolCall) -> str:
        """Empty when the calls are equivalent, else the category of the first difference."""
        if expected.name != actual.name:
            return "UNEXPECTED_TOOL"
        try:
            wanted = decode_arguments(expected.arguments)
        except ValueError as error:  # the row is at fault, not the policy: the candidate is excluded
            raise VerifierFault("expected_arguments", str(error)) from None
        try:
            found = decode_arguments(actual.arguments)
        except ValueError:
            return "ARGUMENTS_DECODE_ERROR"
        return self._compare(wanted, found)

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
            same = abs(actual - expected) < self.float_threshold
        elif isinstance(expected, str) and min(len(expected.split()), len(actual.split())) >= 2:
            same = word_overlap(expected, actual) >= self.word_threshold
        else:
            same = expected == actual
        return "" if same else "ARGUMENT_VALUE_DIFFERENT"

    def _compare_sets(self, expected: tuple[ToolCall, ...], actual: tuple[ToolCall, ...]) -> Verdict:
        too_few, too_many = len(actual) < len(expected), len(actual) > len(expected)
        if self.parallel and ((too_few and not self.allow_subset) or (too_many and not self.allow_superset)):
            return Verdict(0.0, "FUNCTION_CALL_BATCH_LENGTH_DIFFERENT")
        seen: dict[tuple[str, str, str, str], str] = {}
        edges, reasons = [], []
        for e in expected:
            row, reason = [], "UNEXPECTED_TOOL"
            for index, a in enumerate(actual):
                key = (e.name, e.arguments, a.name, a.arguments)
                if key not in seen:
                    seen[key] = self.compare_call(e, a)
                if not seen[key]:
                    row.append(index)
                elif reason == "UNEXPECTED_TOOL":
                    reason = seen[key]
            edges.append(row)
            reasons.append(reason)
        matched = max_matching(edges)
        reward = self._set_reward(len(matched), len(expected), len(actual))
        if reward == 1.0:
            return Verdict(1.0, "EXPECTED_TOOL_CALL" if len(expected) == 1 else "EXPECTED_TOOL_CALL_BATCH")
        unmatched = [i for i in range(len(expected)) if i not in matched]
        if not unmatched or len(matched) == len(actual):
            return Verdict(reward, "FUNCTION_CALL_BATCH_LENGTH_DIFFERENT")
        return Verdict(reward, reasons[unmatched[0]])

    def _set_reward(self, matched: int, expected: int, actual: int) -> float:
        if not self.parallel:
            return float(matched == expected)
        if self.mode == "f1":
            return 2 * matched / (expected + actual) if expected + actual else 0.0
        required = min(expected, actual) if self.allow_subset else expected
        if self.mode == "fractional":
            return matched / required if required else 0.0
        return float(matched == required)


class ExactVerifier:
    """The paper's Eq. 2: the action must equal the expert's, calls as parsed JSON and in order, messages as text.

    This is the reward that PivotRL's ablation shows to be too strict; it is here to be compared with.
    """

    name = "exact"
    version = "1"

    def verify(self, tools: tuple[dict[str, Any], ...], expected: Action, actual: Action) -> Verdict:
        """1.0 iff equal. `tools` is not used."""
        if expected.kind == "message":
            same = actual.kind == "message" and actual.content == expected.content.strip()
        else:
            same = actual.kind == "calls" and [_strict(c) for c in actual.calls] == [_strict(c) for c in expected.calls]
        return Verdict(float(same), "EQUAL" if same else "DIFFERENT")


def _strict(call: ToolCall) -> tuple[str, str]:
    try:
        return call.name, json.dumps(decode_arguments(call.arguments), sort_keys=True)
    except ValueError:
        return call.name, "undecodable: " + call.arguments
