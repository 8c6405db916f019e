"""What a chat template does, found by rendering probes with it: reasoning, ends of turns, the form of calls, what it drops."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from nemo_pivotrl.core.errors import InputError, Problem, UnrenderableState, short
from nemo_pivotrl.core.types import Message
from nemo_pivotrl.data.template_rendering import INLINE, Template

TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "probe",
        "parameters": {
            "type": "object",
            "properties": {
                "key": {"type": "string", "description": "probe key"},
                "number": {"type": "integer", "description": "probe number"},
            },
        },
    },
}
ARGUMENTS = {"key": "two words", "number": 7}
USER: Message = {"role": "user", "content": "probe question"}
CONTENT, REASON, OUTPUT = "PROBECONTENT", "PROBEREASON", "PROBEOUTPUT"
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
REASONING_MARKERS = {
    "</think>": "<think>",
    "[/THINK]": "[THINK]",
    "<channel|>": "<|channel>thought",
    "<|END_THINKING|>": "<|START_THINKING|>",
    "</seed:think>": "<seed:think>",
}
"""Where reasoning ends, and how it begins, in the templates that are known to us; others are found by their rendering."""


class Reasoning(NamedTuple):
    """How a template writes reasoning."""

    begins: str
    """'' where it writes none."""
    ends: str
    opened: bool
    """Whether the generation prompt has begun it already."""


def calls_of(*arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Calls of the probe tool, with ids that every template takes."""
    return [
        {
            "id": f"call{number:05d}",
            "type": "function",
            "function": {"name": "probe_tool", "arguments": json.dumps(given)},
        }
        for number, given in enumerate(arguments)
    ]


def outputs_of(calls: Sequence[dict[str, Any]]) -> list[Message]:
    """An output of each call."""
    return [{"role": "tool", "tool_call_id": call["id"], "content": OUTPUT} for call in calls]


def _turn(template: Template, *after: Message, **fields: Any) -> str:
    """The text of a conversation with one assistant turn; '' where the template refuses it."""
    message: Message = {"role": "assistant", "content": "", **fields}
    try:
        return template.render([USER, message, *after], [TOOL], prompt=False).plain
    except UnrenderableState:
        return ""


def find_argument_form(template: Template) -> None:
    """Set `arguments_as_text` where a template wants the arguments of a call as text."""
    (call,) = calls_of(ARGUMENTS)
    if "two words" not in _turn(template, tool_calls=[call]):
        template.arguments_as_text = True
        if "two words" not in _turn(template, tool_calls=[call]):
            template.arguments_as_text = False


def find_id_form(template: Template) -> None:
    """Set `ids_name_calls` where a template writes a call's id and not its name."""
    (call,) = calls_of(ARGUMENTS)
    state = template.render([USER], [TOOL], prompt=False).plain
    own = _turn(template, tool_calls=[call])
    template.ids_name_calls = call["id"] in own and own.count("probe_tool") == state.count("probe_tool")


def find_prefill(template: Template) -> None:
    """Set `prefills` where a template writes text and calls of a last turn as two turns, and those of an earlier one as one."""
    (call,) = calls_of(ARGUMENTS)
    last, inner = (
        _turn(template, *after, content=CONTENT, tool_calls=[call]).partition(CONTENT)[2].partition("two words")
        for after in ((), outputs_of([call]))
    )
    template.prefills = bool(last[1]) and bool(inner[1]) and last[0] != inner[0]


def find_reasoning(template: Template) -> Reasoning:
    """How reasoning is written; sets the template's `reasoning_field`, '' where it writes none."""
    prompt = template.render([USER], [TOOL], prompt=True).plain
    opened = next(((b, e) for e, b in REASONING_MARKERS.items() if prompt.rstrip().endswith(b)), None)
    for name in REASONING_FIELDS:
        template.reasoning_field = name
        text = _turn(template, content=CONTENT, reasoning_content=REASON)
        before, found, after = text.partition(REASON)
        ends = after.partition(CONTENT)[0].strip()
        ends = next((end for end in REASONING_MARKERS if ends.startswith(end)), ends)  # a marker of text may follow
        if not found or CONTENT not in after:  # some templates write it beside calls alone
            calls = calls_of(ARGUMENTS)
            text = _turn(template, *outputs_of(calls), tool_calls=calls, reasoning_content=REASON)
            before, found, after = text.partition(REASON)
            ends = next((end for end in REASONING_MARKERS if after.lstrip().startswith(end)), "")
        if found and ends:
            begins = _beginning(template, before, ends)
            return Reasoning(begins, ends, bool(begins) and prompt.rstrip().endswith(begins))
    template.reasoning_field = ""
    if opened is None:
        return Reasoning("", "", False)
    template.reasoning_field, template.inline_markers = INLINE, opened
    text = _turn(template, content=CONTENT, reasoning_content=REASON)
    if REASON not in text:
        template.reasoning_field = ""
    return Reasoning(*opened, True)


def closed_block(template: Template, reasoning: Reasoning) -> tuple[str, str]:
    """(what the generation prompt ends with where it has begun and ended reasoning that is empty, its end marker), or two ''."""
    prompt = template.render([USER], [TOOL], prompt=True).text
    known = {reasoning.ends: reasoning.begins, **REASONING_MARKERS}
    for ends, begins in known.items():
        found = re.search(re.escape(begins) + r"\s*" + re.escape(ends) + r"\s*\Z", prompt) if ends and begins else None
        if found:
            return found[0], ends
    return "", ""


def _beginning(template: Template, before: str, ends: str) -> str:
    """The marker at the end of `before`, which is all that the template writes before a turn's reasoning."""
    known = REASONING_MARKERS.get(ends)
    if known and before.rstrip().endswith(known):
        return known
    state = template.render([USER], [TOOL], prompt=False).plain
    header = template.render([USER], [TOOL], prompt=True).plain
    own = before.removeprefix(header if before.startswith(header) else state)
    words = own.split()
    return words[-1] if words else ""


def find_stop_ids(template: Template, known: Sequence[int]) -> frozenset[int]:
    """Tokens that end an assistant turn: `known` (the model's own), the tokenizer's end of text, and the template's markers."""
    tokenizer = template.tokenizer
    eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    suffix = template.encode(_turn(template, content=CONTENT).rpartition(CONTENT)[2])
    special = [i for i in suffix if i in tokenizer.all_special_ids or i in tokenizer.added_tokens_decoder]
    # a template without a marker of its own ends a turn with text: its first token that is more than white space
    found = special[:1] or [i for i in suffix if tokenizer.decode([i]).strip()][:1]
    if not found:  # the next turn's marker ends this one
        following = _turn(template, USER, content=CONTENT).rpartition(CONTENT)[2]
        found = [i for i in template.encode(following) if i in tokenizer.added_tokens_decoder][:1]
    stops = [*found, *eos, *known]
    if not stops:
        remedy = "use a template that ends assistant turns"
        raise InputError(Problem("chat template", None, "end of turn", "neither a marker nor an eos token", remedy))
    return frozenset([*stops, *_call_end(template, stops)])


def _call_end(template: Template, stops: Sequence[int]) -> list[int]:
    """The marker that ends a turn of calls, where it is another than that of text."""
    tokenizer = template.tokenizer
    calls = calls_of({"key": "FIRSTARG"}, {"key": "LASTARG"})
    text = _turn(template, *outputs_of(calls), tool_calls=calls)
    if "FIRSTARG" not in text or "LASTARG" not in text:
        text = _turn(template, tool_calls=calls[1:])
    between = template.encode(text.partition("FIRSTARG")[2].partition("LASTARG")[0])
    tail = template.encode(text.rpartition("LASTARG")[2].partition(OUTPUT)[0])
    if "LASTARG" not in text or set(tail) & set(stops):
        return []
    return [i for i in tail if i in tokenizer.added_tokens_decoder and i not in between][:1]


# ---- what a template leaves out ----


def _dropped_probes() -> dict[str, tuple[list[Message], tuple[str, ...]]]:
    """What may be left out of a prompt -> messages that hold it, and the texts that must be in the prompt."""
    one, two = calls_of({"key": "FIRSTARG"}), calls_of({"key": "FIRSTARG"}, {"key": "LASTARG"})
    calling: Message = {"role": "assistant", "content": ""}
    talk: Message = {"role": "assistant", "content": "probe answer"}
    return {
        "tools": ([USER], ("probe_tool",)),
        "calls": ([USER, {**calling, "tool_calls": one}, *outputs_of(one)], ("FIRSTARG",)),
        "parallel_calls": ([USER, {**calling, "tool_calls": two}, *outputs_of(two)], ("FIRSTARG", "LASTARG")),
        "text_beside_calls": (
            [USER, {**calling, "content": CONTENT, "tool_calls": one}, *outputs_of(one)],
            (CONTENT,),
        ),
        "tool": ([USER, {**calling, "tool_calls": one}, *outputs_of(one)], (OUTPUT,)),
        "system": ([{"role": "system", "content": CONTENT}, USER], (CONTENT,)),
        "developer": ([{"role": "developer", "content": CONTENT}, USER], (CONTENT,)),
        "later system": ([USER, talk, {"role": "system", "content": CONTENT}, USER], (CONTENT,)),
        "later developer": ([USER, talk, {"role": "developer", "content": CONTENT}, USER], (CONTENT,)),
    }


REMEDIES = {
    "developer": "set 'SECTION.chat.roles={developer: system}'",
    "system": "set 'SECTION.chat.roles={system: user}'",
    "parallel_calls": "split turns of several calls",
}


class DropCheck:
    """Refuses states of which the template leaves something out. Each kind of thing is tried once, when it first occurs."""

    def __init__(self, template: Template):
        self.template = template
        self.accepted = set(template.settings.accept_dropped)
        self.known: dict[tuple[str, bool], bool] = {}

    def check(self, messages: Sequence[Message], tools: Sequence[Any]) -> None:
        """Raises InputError naming all that the template drops of such a state, with a remedy."""
        first = messages[0]["role"] if messages else ""
        system = self.template.settings.roles.get(first, first) == "system"
        lost = [what for what in sorted(_holds(messages, tools)) if self.drops(what, system)]
        if lost:
            names = sorted(self.accepted | {what.removeprefix("later ") for what in lost})
            raise InputError([self._problem(what, names, self._needs(what, system, first)) for what in lost])

    def drops(self, what: str, system: bool) -> bool:
        """Whether the template leaves it out, in a state that begins with a system message or in another, unaccepted."""
        if what.removeprefix("later ") in self.accepted:
            return False
        if (what, system) not in self.known:
            messages, texts = _dropped_probes()[what]
            before: list[Message] = (
                [{"role": "system", "content": "probe system"}] if system and what != "system" else []
            )
            try:
                rendered = self.template.render([*before, *messages], [TOOL], prompt=True).plain
                self.known[what, system] = not all(text in rendered for text in texts)
            except UnrenderableState:  # then the state itself is refused, or it is not: it is rendered, too
                self.known[what, system] = False
        return self.known[what, system]

    def _needs(self, what: str, system: bool, first: str) -> str:
        """What to do where the template writes it behind a system message alone; '' where that is not why it is left out."""
        if system or what in ("system", "developer") or self.drops(what, True):
            return ""
        return (
            REMEDIES["developer"]
            if first == "developer"
            else "begin the state with a system message: it is written behind one"
        )

    def _problem(self, what: str, names: Sequence[str], needs: str) -> Problem:
        """names: all that would have to be accepted. What stands between single quotes can be given to the command as it is."""
        name = what.removeprefix("later ")
        section = self.template.section
        remedy = (needs or REMEDIES.get(name, "")).replace("SECTION", section)
        accepting = f"'{section}.chat.accept_dropped=[{','.join(names)}]'"
        in_recipe = f"in the recipe, below {section}: `chat: {{accept_dropped: [{', '.join(names)}]}}`"
        more = f"{section}.chat_template, or accept the loss with {accepting} ({in_recipe})"
        found = f"{what.replace('_', ' ')}, left out of the prompt by the template"
        return Problem("chat template", None, name, found, f"{remedy}, or {more}" if remedy else f"set {more}")


def _holds(messages: Sequence[Message], tools: Sequence[Any]) -> set[str]:
    """What there is in a state that a template may drop."""
    found = {"tools"} if tools else set()
    for number, message in enumerate(messages):
        role = message["role"]
        if role == "tool":
            found.add("tool")
        elif role in ("system", "developer") and message.get("content"):
            found.add(f"later {role}" if number else role)
        if message.get("tool_calls"):
            found.add("calls")
            found |= {"parallel_calls"} if len(message["tool_calls"]) > 1 else set()
            found |= {"text_beside_calls"} if message.get("content") else set()
    return found


def no_parser(text: str, names: Sequence[str]) -> InputError:
    """The error for a template whose calls nobody reads back, or which writes none."""
    if ARGUMENTS["key"] not in text:
        remedy = "set policy.chat_template; where no state has tools, policy.tool_parser: hermes will do"
        found = "tool calls, left out by the template"
        return InputError(Problem("chat template", None, "policy.tool_parser", found, remedy))
    remedy = (
        f"no parser reads the template's tool calls back; name one of {', '.join(names)} or set policy.chat_template"
    )
    return InputError(Problem("chat template", None, "policy.tool_parser", short(text), remedy))
