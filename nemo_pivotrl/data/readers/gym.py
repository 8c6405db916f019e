"""NeMo-Gym rows and logs of the Responses API."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from nemo_pivotrl.core.errors import short
from nemo_pivotrl.core.types import Message
from nemo_pivotrl.data.gym_rows import expected_of_row, message_of, to_messages, verifier_fields
from nemo_pivotrl.data.readers.agents import GREETING
from nemo_pivotrl.data.readers.chat import IDENTITY
from nemo_pivotrl.data.readers.drafts import Context, Draft, finished, note_unused, put_system, system_of, tools_in
from nemo_pivotrl.data.readers.fields import Identity
from nemo_pivotrl.data.readers.messages import Conversation, FieldError, conversation_of
from nemo_pivotrl.data.readers.turns import TRUNCATED

CONTRACT = "see the Gym row contract: message, reasoning, function_call, function_call_output"
GYM = ("responses_create_params", "response", "agent_ref", "provenance", "num_unique_actions", "verifier_metadata")
PROMPT = "a prompt alone holds no turn; collect rollouts of it (`ng_collect_rollouts`) and give their file"
ELSEWHERE = ("previous_response_id", "conversation", "prompt")
"""Request fields that say that a part of the state lies with the API's server."""


def read_responses(record: dict[str, Any], context: Context) -> Draft:
    """A Gym rollout (`response.output` after `responses_create_params.input`), a Gym pivot row (`expected_action`, or
    `expected_answer` of a terminus row), or a Responses log (`input` and `output`)."""
    if "responses_create_params" not in record:
        record = _as_gym(record)
    params = record.get("responses_create_params")
    if not isinstance(params, dict) or not params:
        found = "missing" if "responses_create_params" not in record else params
        raise FieldError("responses_create_params", found, "`responses_create_params` must be a non-empty dict")
    for key in ELSEWHERE:
        if params.get(key):
            raise FieldError(
                f"responses_create_params.{key}",
                params[key],
                "a part of the state is not in the record; write it into `input`",
            )
    response = record.get("response")
    output = response.get("output") if isinstance(response, Mapping) else None
    if output is not None:
        return _rollout(record, params, output, context)
    if record.get("expected_action") is not None or _is_terminus(record):
        return _pivot_row(record, params, context)
    if record.get("expected_answer") is not None:
        found = f"{short(record['expected_answer'], 60)}, a reference answer"
        remedy = f"it is no expert's turn (only a terminus row's is one), and {PROMPT}"
        raise FieldError("expected_answer", found, remedy, "prompt_alone")
    field = "response" if "response" in record and response is None else "response.output"
    raise FieldError(field, "missing", f"neither a rollout nor a pivot row: {PROMPT}", "prompt_alone")


def _is_terminus(record: Mapping[str, Any]) -> bool:
    """Whether `expected_answer` is an expert's turn: a terminus row keeps there what the agent wrote, a JSON object."""
    answer, metadata = record.get("expected_answer"), record.get("metadata")
    harness = metadata.get("harness") if isinstance(metadata, Mapping) else record.get("harness")
    if not isinstance(answer, str):
        return False
    if str(harness).startswith("terminus"):
        return True
    try:
        return isinstance(json.loads(answer), dict)
    except (ValueError, RecursionError):
        return False


def _as_gym(record: dict[str, Any]) -> dict[str, Any]:
    """A log of the Responses API as a Gym row: the request, and the response with its `output`."""
    request = record.get("request") if isinstance(record.get("request"), Mapping) else record
    request = request.get("body") if isinstance(request.get("body"), Mapping) else request
    response = record.get("response") if isinstance(record.get("response"), Mapping) else record
    response = response.get("body") if isinstance(response.get("body"), Mapping) else response
    if "output" not in response:
        return record
    if request.get("input") is None:
        remedy = "a Responses object holds the output alone; log the request's `input` beside it"
        raise FieldError("input", "missing", remedy)
    shared = {k: response.get(k) for k in ("instructions", "tools") if response.get(k)}
    params = {
        **shared,
        **{k: v for k, v in request.items() if k in ("input", "instructions", "tools", *ELSEWHERE) and v},
    }
    rest = {
        k: v
        for k, v in record.items()
        if k not in ("request", "response", "input", "output", "instructions", "tools", "object", "id")
    }
    return {**rest, "responses_create_params": params, "response": {k: response.get(k) for k in ("output", "status")}}


def _rollout(record: dict[str, Any], params: dict[str, Any], output: Any, context: Context) -> Draft:
    """The whole conversation; the turns that its input holds were given, and the reward does not speak of them."""
    made = _messages(_last_state(output), "response.output")
    before: list[Message] = []
    if params.get("input") or not any(m["role"] in ("user", "system", "developer") for m in made):
        if made and not params.get("input"):
            remedy = "the agent's own prompt is not in the record, so its turns have no state; log it as `input`"
            raise FieldError("responses_create_params.input", params.get("input"), remedy, "prompt_elsewhere")
        before = _messages(_input(params), "responses_create_params.input") if params.get("input") else []
    if before and made[: len(before)] == before:
        made = made[len(before) :]  # some agents write the state into their output once more
    conversation = _checked([*before, *made])
    conversation.untrained |= {i: GREETING for i, m in enumerate(before) if m["role"] == "assistant"}
    turns = [i for i, m in enumerate(conversation.messages) if m["role"] == "assistant"]
    if turns and record["response"].get("status") == "incomplete":
        conversation.untrained.setdefault(turns[-1], TRUNCATED)
    put_system(conversation, _instructions(params))
    note_unused(record, (*GYM, *IDENTITY), context.notes)
    draft = finished(record, conversation, tools_in(params, context), context)
    identity = draft.identity
    if identity.task is None and identity.row is not None:
        draft.identity = identity._replace(task=identity.row)
    return draft


def _last_state(output: Any) -> Any:
    """The items of a rollout. Some agents give the whole state after each step: the last one holds the others.

    Raises FieldError where a step does not go on with the one before.
    """
    if not isinstance(output, list) or not output or not all(isinstance(step, list) for step in output):
        return output
    for number, (before, after) in enumerate(pairwise(output), start=1):
        if after[: len(before)] != before:
            remedy = "each step's state goes on with the one before; write a rollout for each that does not"
            raise FieldError(f"response.output[{number}]", "another state", remedy)
    return output[-1]


def _pivot_row(record: dict[str, Any], params: dict[str, Any], context: Context) -> Draft:
    """One turn: everything before it, and the expert's action."""
    field = "expected_action"
    try:
        if record.get("expected_action") is not None:
            action = message_of(expected_of_row(record["expected_action"]))
        else:  # a terminus row: the expert's turn is a JSON text
            field = "expected_answer"
            action = {"role": "assistant", "content": record["expected_answer"]}
            if not isinstance(action["content"], str) or not action["content"]:
                raise FieldError(field, record[field], "`expected_answer` must be a non-empty str")
    except (KeyError, TypeError, AttributeError) as error:
        raise FieldError(field, f"missing or malformed: {error}", CONTRACT) from None
    except FieldError:
        raise
    except ValueError as error:
        raise FieldError(field, error, CONTRACT) from None
    before = _messages(_input(params), "responses_create_params.input")
    conversation = _checked([*before, action])
    put_system(conversation, _instructions(params))
    draft = finished({}, conversation, tools_in(params, context), context)
    draft.identity, draft.last_only, draft.fields = _of_pivot_row(record), True, verifier_fields(record)
    return draft


def _of_pivot_row(record: Mapping[str, Any]) -> Identity:
    """A row's ids name its source trajectory, of which it is one turn; a terminal row's own `uuid` names the row alone."""
    metadata, provenance = record.get("metadata"), record.get("provenance")
    uid = metadata.get("source_trajectory_uid") if isinstance(metadata, Mapping) else None
    names = (record.get("trajectory_id"), uid, record.get("id"), record.get("uuid"))
    run = next((str(name) for name in names if name is not None), None)
    task = record.get("task_id")
    if task is None and isinstance(provenance, Mapping):  # a row of ours
        task = provenance.get("task_id") or None
    if task is None and run is None:
        task = record.get("_ng_task_index")
    return Identity(run, None, None if task is None else str(task), None)


def _instructions(params: Mapping[str, Any]) -> str:
    return system_of({"instructions": params.get("instructions")})


def _input(params: Mapping[str, Any]) -> list[Any]:
    items = params.get("input")
    if isinstance(items, str) and items:
        items = [{"role": "user", "content": items}]
    if not isinstance(items, list) or not items:
        raise FieldError("responses_create_params.input", items, "a non-empty list of Responses items")
    return items


def _messages(items: Any, field: str) -> list[Message]:
    if not isinstance(items, list):
        raise FieldError(field, items, "a list of Responses items")
    try:
        return to_messages(items)
    except (KeyError, TypeError, AttributeError) as error:
        raise FieldError(field, f"missing or malformed: {error}", CONTRACT) from None
    except ValueError as error:
        remedy = f"{CONTRACT}; drop the record, or set extract.on_invalid=skip"
        raise FieldError(field, error, remedy, "not_text" if "content part" in str(error) else "unreadable") from None


def _checked(messages: list[Message]) -> Conversation:
    """The messages under the rules for all messages (roles, calls, reasoning written into the text)."""
    return conversation_of(messages, where="responses_create_params.input")
