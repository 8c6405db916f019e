"""Outside rows to (case, sampled action): NeMo-Gym's `/verify` requests and rollouts, and recorded verdicts.

An expert action stands under `expected_action`, `expected` or (as text) `expected_answer`; the sampled one under `actual`,
under `response.output` or `output` as Responses items, or as bare text under `assistant_text`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_pivotrl.core.types import Action, Case, ToolCall
from nemo_pivotrl.data.gym_rows import expected_of_row, to_messages, verifier_fields


class RowError(ValueError):
    """A row that cannot be read: `field` names the place."""

    def __init__(self, field: str, found: object, remedy: str):
        super().__init__(f"{field}: {remedy}")
        self.field, self.found, self.remedy = field, found, remedy


ACTION = "an action: {type: message, content} or {type: function_call, name, arguments} or {type: function_call_batch, calls}"


def case_of(row: Mapping[str, Any], with_messages: bool = False, family: str = "") -> Case:
    """The case of a row. Raises RowError. `with_messages`: the state too, for a verifier that reads it.

    `family`: the verifier's name; NeMo-Gym's servers look for the expert's action in different places.
    """
    params = row.get("responses_create_params")
    params = params if isinstance(params, Mapping) else {}
    tools = row.get("tools") or params.get("tools") or ()
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowError("tools", tools, "a list of tool definitions")
    fields = verifier_fields(dict(row))
    if fields.get("threshold") is None and row.get("row_threshold") is not None:
        fields["threshold"] = row["row_threshold"]
    threshold = fields.get("threshold")
    is_number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool) and threshold == threshold
    if threshold is not None and not is_number:
        raise RowError("threshold", threshold, "a number")
    messages: tuple[dict[str, Any], ...] = ()
    if with_messages and isinstance(params.get("input"), list):
        try:
            messages = tuple(to_messages(params["input"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RowError("responses_create_params.input", error, "a list of Responses items") from None
    return Case(_expected(row, family), tuple(dict(tool) for tool in tools), messages, fields)


def _expected(row: Mapping[str, Any], family: str) -> Action:
    metadata = row.get("metadata")
    within = metadata if isinstance(metadata, Mapping) else {}
    places = (
        ("expected_action", row.get("expected_action")),
        ("expected", row.get("expected")),
        ("expected_answer", row.get("expected_answer")),
        ("metadata.expected_action", within.get("expected_action")),
        ("metadata.expected_answer", within.get("expected_answer")),
    )
    if family == "swe":
        return _first_call(places)
    place, raw = next(((place, raw) for place, raw in places if raw), ("expected_action", None))
    if isinstance(raw, str):  # the terminus server's text, or the coding server's call as JSON text
        read = None if family == "terminus" else _json(raw)
        if not (isinstance(read, dict) and read.get("type") == "function_call"):
            return Action("message", raw)
        raw = read
    if raw is None:
        return Action("none", detail="the row has no expert action")
    action = action_of(raw, place)
    if family == "terminal_multi_harness" and raw["type"] == "function_call_batch" and len(action.calls) == 1:
        raise RowError(place, raw, "a batch of one call, which no turn can match: write it as function_call")
    return action


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _first_call(places: Sequence[tuple[str, Any]]) -> Action:
    """The first place that holds one call, as an object or as its JSON text. Arguments may be an object too."""
    for place, raw in places:
        read = _json(raw) if isinstance(raw, str) else raw
        if not isinstance(read, Mapping) or read.get("type") != "function_call":
            continue
        name, arguments = read.get("name"), read.get("arguments")
        if isinstance(name, str):
            text = json.dumps(arguments) if isinstance(arguments, dict) else arguments
            return Action("calls", calls=(ToolCall(name, text if isinstance(text, str) else ""),))
        if not isinstance(raw, str):
            raise RowError(place, raw, ACTION)
    return Action("none", detail="the row has no expert call")


def action_of(raw: Any, place: str) -> Action:
    """An action as rows write it. Raises RowError."""
    try:
        action = expected_of_row(raw)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise RowError(place, raw, ACTION) from None
    if not all(isinstance(c.name, str) and isinstance(c.arguments, str) for c in action.calls):
        raise RowError(place, raw, "name and arguments are texts; arguments hold JSON")
    return action


def sampled_action(row: Mapping[str, Any], joint: str = "") -> Action:
    """What the policy did. Texts of several messages are joined with `joint`. Raises RowError."""
    if "assistant_text" in row:
        if not isinstance(row["assistant_text"], str):
            raise RowError("assistant_text", row["assistant_text"], "a text")
        return Action("message", row["assistant_text"])
    if "actual" in row:
        return Action("none") if row["actual"] is None else action_of(row["actual"], "actual")
    response = row.get("response")
    place, items = (
        ("response.output", response.get("output")) if isinstance(response, Mapping) else ("output", row.get("output"))
    )
    if not isinstance(items, list):
        raise RowError(place, items, "the sampled turn as a list of Responses items (or `actual`, or `assistant_text`)")
    return action_of_items(items, place, joint)


def action_of_items(items: Sequence[Any], place: str, joint: str = "") -> Action:
    """The action in Responses items: all calls, or else the assistant's text."""
    texts: list[str] = []
    calls: list[ToolCall] = []
    for index, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise RowError(f"{place}[{index}]", item, "a Responses item (a mapping)")
        if item.get("type") == "function_call":
            name, arguments = item.get("name"), item.get("arguments")
            if not isinstance(name, str) or not isinstance(arguments, str):
                raise RowError(f"{place}[{index}]", item, "name and arguments are texts; arguments hold JSON")
            calls.append(ToolCall(name, arguments, str(item.get("call_id") or "")))
        elif item.get("type", "message") == "message" and item.get("role", "assistant") == "assistant":
            content = item.get("content")
            parts = [content] if isinstance(content, str) else content if isinstance(content, list) else []
            texts += [
                text
                for part in parts
                if isinstance(text := part.get("text") if isinstance(part, Mapping) else part, str)
            ]
    content = joint.join(texts)
    if calls:
        return Action("calls", content, tuple(calls))
    return Action("message", content) if texts else Action("none", detail="neither text nor call")
