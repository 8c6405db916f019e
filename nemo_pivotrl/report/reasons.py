"""A verdict's category in words, for people who look at a sample. Categories are the verifiers' own, NeMo-Gym's names among them."""

from __future__ import annotations

TOOL_CALLED = "The policy calls a tool where the expert talks."
TALKED = "The policy talks, or does nothing, where the expert calls a tool."
WORDS = {
    "EQUAL": "The same action as the expert's.",
    "EXPECTED_TOOL_CALL": "The expert's call, by the verifier's rules.",
    "EXPECTED_TOOL_CALL_BATCH": "The expert's calls, by the verifier's rules.",
    "EXPECTED_CHAT_MESSAGE_FOUND": "The policy talks, as the expert does; what it says is not compared.",
    "EQUIVALENT": "Another action that does the same as the expert's.",
    "MESSAGE": "The policy talks, as the expert does; what it says is not compared.",
    "JUDGED_SAME": "The judge calls it the same as the expert's.",
    "JUDGE_SAME": "The judge calls it the same as the expert's.",
    "JUDGE_DIFFERENT": "The judge calls it another action than the expert's.",
    "JUDGE_ORDERS_DISAGREE": "The judge changes its mind when the two actions are swapped, so it does not count as the same.",
    "TRUNCATED": "It was cut at policy.generation.max_new_tokens, before it ended.",
    "LIMIT_EXCEEDED": "It is larger than verifier.limits allow.",
    "UNDECODABLE": "What begins as a tool call cannot be read as one.",
    "ARGUMENTS_DECODE_ERROR": "Its arguments are no JSON object.",
    "NO_ACTION": "There is no action in it.",
    "NO_ACTION_FOUND": "There is no action in it.",
    "EMPTY_MESSAGE": "It is empty.",
    "DIFFERENT_KIND": "It calls a tool where the expert talks, or the other way round.",
    "ACTION_TYPE_MISMATCH": "It calls a tool where the expert talks, or the other way round.",
    "NO_EXPECTED_TOOL_CALL": TALKED,
    "NO_TOOL_CALL": TALKED,
    "NO_EXPECTED_CHAT_MESSAGE": TOOL_CALLED,
    "UNEXPECTED_TOOL": "It calls another tool than the expert.",
    "DIFFERENT_TOOL": "It calls another tool than the expert.",
    "DIFFERENT_COUNT": "It makes more or fewer calls than the expert.",
    "FUNCTION_CALL_BATCH_LENGTH_DIFFERENT": "It makes more or fewer calls than the expert.",
    "DIFFERENT_ARGUMENTS": "The expert's tool, with arguments that do something else.",
    "DIFFERENT_MESSAGE": "It says something else than the expert.",
    "UNEXPECTED_ARGUMENT_KEYS": "The expert's tool, with other arguments than the expert names.",
    "ARGUMENT_OBJECT_KEYS_DIFFERENT": "An object among its arguments has other keys than the expert's.",
    "ARGUMENT_LIST_LENGTH_DIFFERENT": "A list among its arguments is longer or shorter than the expert's.",
    "ARGUMENT_VALUE_DIFFERENT": "An argument has another value than the expert's.",
    "ARGUMENT_VALUE_MISMATCH": "An argument has another value than the expert's.",
    "ARGUMENT_VALUE_TYPE_DIFFERENT": "An argument is of another type than the expert's.",
    "TOOL_SCHEMA_VALIDATION_FAILED": "Its arguments break the tool's schema.",
    "TOOL_SCHEMA_NOT_FOUND": "It calls a tool that is not defined.",
}


def in_words(category: str) -> str:
    """What a category means; one that is not known here is read out.

    >>> in_words("FINISH_MISSING_PATHS")
    'Finish missing paths.'
    """
    return WORDS.get(category) or f"{category.replace('_', ' ').capitalize()}."
