"""Actions whose verdict is known beforehand, made from an expert's action: what an audit tries on a verifier.

`right` probes say the same as the expert in another way; `wrong` probes must not be accepted. A probe that happens to equal
the expert's action is left out.
"""

from __future__ import annotations

import heapq
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from nemo_pivotrl.core.artifacts import digest
from nemo_pivotrl.core.types import Action, Case, ToolCall
from nemo_pivotrl.verifiers.arguments import PATH_NAME, snake
from nemo_pivotrl.verifiers.swe import category_of
from nemo_pivotrl.verifiers.terminus import TURN

GARBAGE = "xq zvk wwj 7731"
DESTRUCTIVE = "rm -rf /"
UNKNOWN_TOOL = "no_such_tool_7731"
CLUSTER = re.compile(r"(?<=\s)-([a-zA-Z]{2,3})(?=\s|$)")
CLUSTERED_COMMANDS = ("ls ", "grep ", "rm ", "cp ")
CONSTANT_TEXT = "ok"
CALLS_OF_A_TOOL = 3
"""The expert's most frequent calls of a tool that are tried as constant answers."""
MAX_CONSTANTS = 60
SHELL_ARGUMENTS = ("command", "cmd", "keystrokes")


def _decode(call: ToolCall) -> dict[str, Any] | None:
    try:
        value = json.loads(call.arguments)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _with_arguments(expected: Action, arguments: Mapping[str, Any], **form: Any) -> Action:
    """The expert's action with other arguments in its first call."""
    first, *rest = expected.calls
    text = json.dumps(arguments, ensure_ascii=False, **form)
    return Action("calls", expected.content, (replace(first, arguments=text), *rest))


def _properties(case: Case, name: str) -> Mapping[str, Any]:
    declared = case.fields.get("declared_tools")
    for tool in case.tools if declared is None else declared:
        function = tool.get("function", tool)
        if function.get("name") == name:
            found = (function.get("parameters") or {}).get("properties")
            return found if isinstance(found, Mapping) else {}
    return {}


def right(case: Case) -> Iterator[tuple[str, Action]]:
    """(probe, action): the expert's action written in other ways."""
    expected = case.expected
    if expected.kind != "calls":
        return
    if len(expected.calls) > 1:
        yield "calls_in_another_order", Action("calls", expected.content, expected.calls[::-1])
    arguments = _decode(expected.calls[0])
    if arguments is None:
        return
    properties = _properties(case, expected.calls[0].name)
    if len(arguments) > 1:
        yield "keys_in_another_order", _with_arguments(expected, dict(reversed(arguments.items())), indent=1)
    for key, value in arguments.items():
        declared = properties.get(key)
        kind = declared.get("type") if isinstance(declared, Mapping) else None
        if kind == "number" and isinstance(value, int) and not isinstance(value, bool):
            yield "whole_number_as_float", _with_arguments(expected, {**arguments, key: float(value)})
        path = isinstance(value, str) and PATH_NAME.search(snake(key)) and value.strip()
        if path and not value.startswith(("/", ".", "~")) and "://" not in value:
            yield "dot_before_a_path", _with_arguments(expected, {**arguments, key: "./" + value})
        shell = isinstance(value, str) and key in SHELL_ARGUMENTS and category_of(expected.calls[0].name) == "bash"
        if shell and value.strip() and "\n" not in value and not value.endswith("\\"):
            yield "blank_at_the_end", _with_arguments(expected, {**arguments, key: value + " "})
        if shell and value[:1].isalnum():
            yield "variable_before_a_command", _with_arguments(expected, {**arguments, key: "NO_COLOR=1 " + value})
        if shell and value.startswith(CLUSTERED_COMMANDS) and CLUSTER.search(value):
            apart = CLUSTER.sub(lambda found: " ".join("-" + letter for letter in found[1]), value, count=1)
            yield "shell_flags_apart", _with_arguments(expected, {**arguments, key: apart})
    for key, declared in properties.items():
        if isinstance(declared, Mapping) and "default" in declared and key not in arguments:
            yield "default_spelled_out", _with_arguments(expected, {**arguments, key: declared["default"]})


def wrong(case: Case) -> Iterator[tuple[str, Action]]:
    """(probe, action): nothing, noise, and the expert's call with something in it changed."""
    expected = case.expected
    yield "nothing", Action("none")
    yield "empty_message", Action("message", "")
    if expected.kind == "message":
        yield "garbage_message", Action("message", GARBAGE)
        yield "call_instead_of_talk", Action("calls", "", (ToolCall(UNKNOWN_TOOL, "{}"),))
        yield from _wrong_turns(expected.content)
        return
    yield "talk_instead_of_call", Action("message", "Let me think about it.")
    first = expected.calls[0]
    yield "unknown_tool", Action("calls", "", (replace(first, name=UNKNOWN_TOOL), *expected.calls[1:]))
    yield "further_call", Action("calls", "", (*expected.calls, ToolCall(UNKNOWN_TOOL, "{}")))
    yield "broken_json", Action("calls", "", (replace(first, arguments='{"x": '), *expected.calls[1:]))
    arguments = _decode(first)
    if not arguments:
        return
    yield "no_arguments", _with_arguments(expected, {})
    yield from (
        (name, _with_arguments(expected, made)) for name, made in _changed(arguments, _properties(case, first.name))
    )


def _changed(arguments: dict[str, Any], properties: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    if any(isinstance(value, (str, int, float)) for value in arguments.values()):
        yield "garbage_arguments", {key: _garbage(value) for key, value in arguments.items()}
    keys = list(arguments)
    if len(keys) > 1:
        yield "shuffled_arguments", {key: arguments[keys[i - 1]] for i, key in enumerate(keys)}
    for key, value in arguments.items():
        declared = properties.get(key)
        fixed = isinstance(declared, Mapping) and "enum" in declared
        if isinstance(value, str) and len(value.split()) > 1 and not fixed:
            yield "destructive_command", {**arguments, key: DESTRUCTIVE}
        if isinstance(value, str) and len(arguments) > 1 and not fixed:
            yield "garbage_in_one_argument", {**arguments, key: GARBAGE}
        if isinstance(value, str) and len(value) > 2000:
            yield "changed_past_2000_characters", {**arguments, key: value[:2000] + GARBAGE}
        if type(value) is int and value == 1:
            yield "true_for_one", {**arguments, key: True}
        if isinstance(value, str) and re.search(r"\d", value):
            yield "another_digit", {**arguments, key: re.sub(r"\d(?=\D*$)", lambda d: str((int(d[0]) + 1) % 10), value)}
        elif isinstance(value, bool):
            yield "flipped", {**arguments, key: not value}
        elif isinstance(value, int):
            yield "another_number", {**arguments, key: value + 1}
        if isinstance(declared, Mapping) and "enum" in declared:
            other = next((option for option in declared["enum"] if option != value), None)
            if other is not None:
                yield "another_option", {**arguments, key: other}
    for key in list(arguments)[::-1]:
        declared = properties.get(key)
        if len(arguments) > 1 and not (isinstance(declared, Mapping) and "default" in declared):
            yield "argument_left_out", {k: v for k, v in arguments.items() if k != key}
            return


def _garbage(value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, str):
        return GARBAGE
    if isinstance(value, (int, float)):
        return value + 7731
    return [_garbage(v) for v in value] if isinstance(value, list) else {k: _garbage(v) for k, v in value.items()}


def _wrong_turns(text: str) -> Iterator[tuple[str, Action]]:
    """A terminal turn in JSON with other keystrokes, or declared complete."""
    turn = _decode(ToolCall("", text))
    harness = next((name for name, fields in TURN.items() if turn is not None and turn.keys() <= fields.keys()), None)
    if turn is None or harness is None or not isinstance(turn.get("commands"), list):
        return
    for name, keys in (("garbage_keystrokes", GARBAGE + "\n"), ("destructive_command", DESTRUCTIVE + "\n")):
        commands = [{**c, "keystrokes": keys} for c in turn["commands"] if isinstance(c, dict)][:1]
        if commands and commands != turn["commands"]:
            yield name, Action("message", json.dumps({**turn, "commands": commands}))
    digits = [
        {**c, "keystrokes": re.sub(r"\d(?=\D*$)", lambda d: str((int(d[0]) + 1) % 10), str(c.get("keystrokes")))}
        for c in turn["commands"]
        if isinstance(c, dict)
    ]
    if digits != turn["commands"]:
        yield "another_digit", Action("message", json.dumps({**turn, "commands": digits}))
    complete = "is_task_complete" if harness == "terminus_1" else "task_complete"
    if not turn.get(complete):
        yield "complete_too_early", Action("message", json.dumps({**turn, complete: True}))


class Commonest:
    """The most frequent of many actions, those seen first among equals. Of the others no more than a number is kept."""

    def __init__(self, size: int):
        self._size = size
        self._counts: dict[int, int] = {}
        self._kept: dict[int, Action] = {}

    def add(self, action: Action) -> None:
        """Count an action. One that comes once can be among the first `size` only if fewer came before it."""
        key = int(digest([action.kind, action.content, [(c.name, c.arguments) for c in action.calls]]), 16)
        self._counts[key] = count = self._counts.get(key, 0) + 1
        if count > 1 or len(self._counts) <= self._size:
            self._kept.setdefault(key, action)

    def total(self) -> int:
        """How many were counted."""
        return sum(self._counts.values())

    def found(self) -> list[tuple[Action, int]]:
        """The most frequent ones, and how often they came."""
        pairs = ((self._kept.get(key), count) for key, count in self._counts.items())
        return heapq.nlargest(self._size, ((a, n) for a, n in pairs if a is not None), key=lambda pair: pair[1])


class Constants:
    """Answers that need no thought, of experts that come one by one: any text, and of each tool that an expert uses no arguments
    and the commonest ones."""

    def __init__(self) -> None:
        self._texts, self._calls = Commonest(1), dict[str, Commonest]()

    def add(self, action: Action) -> None:
        """Take in what an expert did."""
        if action.kind == "message" and action.content.strip():
            self._texts.add(Action("message", action.content))
        if len(action.calls) == 1:
            call = action.calls[0]
            made = Action("calls", calls=(ToolCall(call.name, _in_order(call)),))
            self._calls.setdefault(call.name, Commonest(CALLS_OF_A_TOOL)).add(made)

    def found(self) -> list[Action]:
        """The answers."""
        found = [Action("message", CONSTANT_TEXT), *(text for text, n in self._texts.found() if n > 1)]
        for name, counted in sorted(self._calls.items(), key=lambda pair: -pair[1].total()):
            commonest = [*(made for made, _ in counted.found()), Action("calls", calls=(ToolCall(name, "{}"),))]
            found += dict.fromkeys(commonest)
        return found[:MAX_CONSTANTS]


def constants(experts: Iterable[Action]) -> list[Action]:
    """As `Constants`, of experts that are there."""
    made = Constants()
    for action in experts:
        made.add(action)
    return made.found()


def _in_order(call: ToolCall) -> str:
    arguments = _decode(call)
    return call.arguments if arguments is None else json.dumps(arguments, sort_keys=True, ensure_ascii=False)


def same_action(left: Action, right: Action) -> bool:
    """Equality as JSON, calls in any order."""
    return plain(left) == plain(right)


def plain(action: Action) -> tuple[Any, ...]:
    """A form that is equal for the same actions as `same_action` finds."""
    if action.kind != "calls":
        return action.kind, len(action.calls), action.content.strip()
    decoded = ((c, _decode(c)) for c in action.calls)
    return action.kind, *sorted(
        (c.name, c.arguments if d is None else json.dumps(d, sort_keys=True)) for c, d in decoded
    )
