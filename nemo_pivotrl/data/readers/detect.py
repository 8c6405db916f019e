"""What a record is, by looking at it: the reader that reads it, or the name of a format that is refused with its remedy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nemo_pivotrl.data.readers import agents, chat, gym
from nemo_pivotrl.data.readers.agents import is_tau2
from nemo_pivotrl.data.readers.drafts import Context, Draft

READERS: dict[str, Callable[[dict[str, Any], Context], Draft]] = {
    "openai": chat.read_openai,
    "anthropic": chat.read_openai,
    "llama_factory_v1": chat.read_openai,
    "chat_log": chat.read_chat_log,
    "sharegpt": chat.read_sharegpt,
    "prompt_completion": chat.read_prompt_completion,
    "xlam": chat.read_xlam,
    "glaive": chat.read_glaive,
    "responses": gym.read_responses,
    "tau_bench": agents.read_tau_bench,
    "tau2_bench": agents.read_tau2_bench,
    "swe_agent": agents.read_swe_agent,
    "mini_swe_agent": agents.read_mini_swe_agent,
    "claude_code": agents.read_claude_code,
}
REFUSED = {
    "openhands_events": "an OpenHands event history (what the model read is not in it); give its LLM logs, "
    "`llm_completions/*.json` of a run with LLM_LOG_COMPLETIONS=true: each is a request with its response",
    "atif": "an ATIF trajectory of harbor; export its agent's own log, or chat messages, instead",
    "preferences": "a preference row; `nemo-pivotrl preferences` reads it (preferences.files)",
    "alpaca": "an Alpaca row (instruction, output), no agent's trajectory; write it as `messages` if it is one",
    "text": "plain text, already rendered by some chat template; give the messages that it was rendered from",
    "gym_statistics": "statistics of NeMo-Gym rollouts; give the rollouts' own file",
    "swe_agent_steps": "steps of SWE-agent without `history`; give the whole `.traj` file",
}
"""Formats that are known and not read, and what to do."""


def format_of(record: Any) -> str:
    """The name of a record's format: a key of READERS or of REFUSED, '' for an unknown one."""
    if not isinstance(record, Mapping):
        return ""
    for name, fits in _LOOKS:
        if fits(record):
            return name
    return ""


def _listed(record: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    value = record.get(key)
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def _has_messages(record: Mapping[str, Any]) -> bool:
    return any(isinstance(record.get(key), (list, str)) for key in chat.MESSAGES)


def _is_anthropic(record: Mapping[str, Any]) -> bool:
    if any("input_schema" in tool for tool in _listed(record, "tools")):
        return True
    kinds = ("tool_use", "tool_result", "thinking")
    blocks = (b for m in _listed(record, "messages") for b in _listed(m, "content"))
    return "messages" in record and any(block.get("type") in kinds for block in blocks)


def _is_llama_factory(record: Mapping[str, Any]) -> bool:
    return any("value" in b and "type" in b for m in _listed(record, "messages") for b in _listed(m, "content"))


def _is_events(items: list[Mapping[str, Any]]) -> bool:
    return any("source" in e and ("action" in e or "observation" in e or "kind" in e) for e in items[:5])


def _is_log(record: Mapping[str, Any]) -> bool:
    response = record.get("response")
    response = response[0] if isinstance(response, list) and response else response
    body = (
        response.get("body")
        if isinstance(response, Mapping) and isinstance(response.get("body"), Mapping)
        else response
    )
    return isinstance(body, Mapping) and ("choices" in body or ("content" in body and "output" not in body))


def _is_responses_log(record: Mapping[str, Any]) -> bool:
    if record.get("object") == "response":
        return True
    response = record.get("response")
    body = (
        response.get("body")
        if isinstance(response, Mapping) and isinstance(response.get("body"), Mapping)
        else response
    )
    if isinstance(body, Mapping) and isinstance(body.get("output"), list) and not _has_messages(record):
        return True
    return isinstance(record.get("output"), list) and "input" in record


def _is_preference(record: Mapping[str, Any]) -> bool:
    pairs = (("chosen", "rejected"), ("chosen_response", "rejected_response"), ("response_1", "response_2"))
    pairs += (("response1", "response2"), ("response_0", "response_1"), ("preferred_output", "non_preferred_output"))
    pairs += (("chosen_messages", "rejected_messages"), ("context", "completions"), ("instruction", "completions"))
    return any(first in record and second in record for first, second in pairs)


_LOOKS: tuple[tuple[str, Callable[[Mapping[str, Any]], bool]], ...] = (
    ("claude_code", lambda r: r.get("type") == "claude_code" and "lines" in r),
    ("responses", lambda r: "responses_create_params" in r),
    ("gym_statistics", lambda r: "mean/reward" in r or "mean/input_tokens" in r),
    ("atif", lambda r: str(r.get("schema_version", "")).upper().startswith("ATIF")),
    ("mini_swe_agent", lambda r: str(r.get("trajectory_format", "")).startswith("mini-swe-agent")),
    ("swe_agent", lambda r: bool(_listed(r, "history")) and "role" in _listed(r, "history")[0]),
    (
        "openhands_events",
        lambda r: _is_events(_listed(r, "history")) or _is_events([r]) or _is_events(_listed(r, "trajectory")),
    ),
    ("swe_agent_steps", lambda r: any("observation" in s and "response" in s for s in _listed(r, "trajectory")[:1])),
    ("tau2_bench", is_tau2),
    ("tau_bench", lambda r: isinstance(r.get("traj"), list)),
    ("chat_log", _is_log),
    ("responses", _is_responses_log),
    ("preferences", _is_preference),
    ("glaive", lambda r: isinstance(r.get("chat"), str)),
    ("prompt_completion", lambda r: isinstance(r.get("completion"), list) and "prompt" in r and "messages" not in r),
    ("xlam", lambda r: isinstance(r.get("query"), str) and "answers" in r and "tools" in r),
    ("anthropic", _is_anthropic),
    ("llama_factory_v1", _is_llama_factory),
    ("sharegpt", lambda r: "conversations" in r or "conversation" in r),
    ("sharegpt", lambda r: any("from" in m and "role" not in m for m in _listed(r, "messages")[:1])),
    ("openai", _has_messages),
    ("openai", lambda r: "messages" in r),
    ("alpaca", lambda r: "instruction" in r and ("output" in r or "response" in r)),
    ("text", lambda r: isinstance(r.get("text"), str)),
)
"""In this order: the first that fits is the format."""
