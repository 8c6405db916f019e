"""From messages to token ids and back, always through the model's own chat template.

Nothing here knows a template's markers. Where an assistant turn begins and ends, where its reasoning ends and how it
writes tool calls are found by rendering probes with the template and looking at what comes out (`template_probes`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_pivotrl.config import ChatSettings, Limits
from nemo_pivotrl.core import model_folder
from nemo_pivotrl.core.artifacts import digest
from nemo_pivotrl.core.errors import InputError, Problem, UnrenderableState, short
from nemo_pivotrl.core.types import Action, Message
from nemo_pivotrl.data import gym_rows, template_probes
from nemo_pivotrl.data.template_rendering import INLINE, Marked, Template, check_encodable
from nemo_pivotrl.data.tool_parsers import NAMES, PARSERS
from nemo_pivotrl.sizing import hf_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tools = Sequence[Mapping[str, Any]]


def load_tokenizer(path: str, chat_template: str | None = None, section: str = "policy") -> PreTrainedTokenizerBase:
    """The tokenizer at `path` (an HF folder); `chat_template` is a Jinja file that replaces its template.
    `section` is the recipe's section that names both, for errors.

    Raises InputError when there is no tokenizer or it has no chat template.
    """
    remedy = "give an HF checkpoint folder" + (
        ", or run the warmup stage first, which begins with the model in warmup.init" if section == "policy" else ""
    )
    tokenizer = hf_folder.load_tokenizer(path, f"{section}.model_name", remedy)
    if chat_template is not None:
        tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
    if not tokenizer.chat_template:
        raise InputError(
            Problem(
                path,
                None,
                f"{section}.chat_template",
                "a tokenizer without a chat template",
                f"set {section}.chat_template to a Jinja file",
            )
        )
    return tokenizer


def generation_stop_ids(path: str) -> tuple[int, ...]:
    """The tokens at which the model's own `generation_config.json` ends a turn; none where it says nothing.

    Raises InputError for a file that is broken.
    """
    file = Path(path, "generation_config.json")
    if not file.exists():
        return ()
    found = model_folder.json_object(file).get("eos_token_id")
    listed = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in listed):
        raise InputError(Problem(str(file), None, "eos_token_id", short(found), "a token id, or a list of them"))
    return tuple(listed)


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of vocabulary, merges, normaliser and special tokens: equal iff token ids mean the same."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = json.loads(backend.to_str()) if backend is not None else sorted(tokenizer.get_vocab().items())
    if isinstance(content, dict):
        content.pop("padding", None)
        content.pop("truncation", None)
    return digest(content)


@dataclass(frozen=True, slots=True)
class Turn:
    """An assistant turn as the template writes it behind a state."""

    prompt: Marked
    """The state and what of the generation prompt the turn continues."""
    text: Marked
    """The rest: what the policy would have to write."""
    opened: bool
    """Whether the prompt has begun reasoning."""


class Chat:
    """One tokenizer with its template: renders states, actions, and reads sampled actions back.

    `parser` names how the template writes tool calls (`tool_parsers.PARSERS`); `auto` finds out by rendering a probe call and
    taking the parser that reads it back. A template that cannot render a tool call gets an error, not a guess. `stop_ids` are
    tokens that end a turn beside the tokenizer's own and the template's. `section` is the recipe's section, for errors.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        parser: str = "auto",
        template_kwargs: Mapping[str, Any] | None = None,
        limits: Limits | None = None,
        settings: ChatSettings | None = None,
        stop_ids: Sequence[int] = (),
        section: str = "policy",
    ):
        self.limits, self.settings = limits or Limits(), settings or ChatSettings()
        self.tokenizer = tokenizer
        self.template_kwargs = dict(template_kwargs or {})
        if parser != "auto" and parser not in NAMES:
            raise InputError(
                Problem("recipe", None, "policy.tool_parser", parser, f"use one of auto, {', '.join(NAMES)}")
            )
        self.template = Template(tokenizer, self.template_kwargs, self.settings, section)
        self.fingerprint = fingerprint(tokenizer)
        told = [tokenizer.chat_template, self.template_kwargs]
        told += [self.settings.date] if self.template.tells_time else []
        told += [self.settings.roles] if self.settings.roles else []
        self.template_digest = digest(told)
        try:
            template_probes.find_argument_form(self.template)
            template_probes.find_id_form(self.template)
            template_probes.find_prefill(self.template)
            self.reasoning = template_probes.find_reasoning(self.template)
            self._closed = template_probes.closed_block(self.template, self.reasoning)
            self.stop_ids = template_probes.find_stop_ids(self.template, stop_ids)
        except UnrenderableState as error:
            raise InputError(
                Problem("chat template", None, "a user's question", error.found, "set policy.chat_template")
            ) from error
        plain = {
            tokenizer.added_tokens_decoder[i].content for i in self.stop_ids if i in tokenizer.added_tokens_decoder
        }
        self.template.special_tokens = sorted({*self.template.special_tokens, *(t for t in plain if len(t) > 1)})
        self.dropped = template_probes.DropCheck(self.template)
        self.parser = self._probe_parser() if parser == "auto" else NAMES[parser]

    # ---- messages to text and tokens ----

    def render(self, messages: Sequence[Message], tools: Tools, add_generation_prompt: bool) -> str:
        """The template's text for `messages`.

        Raises UnrenderableState where the template refuses them, InputError where it leaves something of them out.
        """
        return self._render(messages, tools, add_generation_prompt).plain

    def _render(self, messages: Sequence[Message], tools: Tools, prompt: bool) -> Marked:
        self.dropped.check(messages, tools)
        return self.template.render(messages, tools, prompt)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text in which special tokens are special tokens. Raises UnrenderableState for half an emoji."""
        return self.template.encode(text)

    def prompt_ids(self, messages: Sequence[Message], tools: Tools) -> list[int]:
        """Token ids of the state, up to where the policy starts to write. Raises UnrenderableState and InputError."""
        return self.template.encode(self._render(messages, tools, True))

    def turn(self, messages: Sequence[Message], tools: Tools, action: Message) -> Turn:
        """How the template writes assistant message `action` after the state.

        A turn without reasoning may leave the generation prompt where that opens reasoning; what is left out of the prompt
        then is part of the turn. Reasoning that the prompt has opened and the template does not write is put between the prompt
        and the turn, as the model writes it. Where the template writes the state otherwise once the turn is there, the turn's text is
        that behind a stand-in. Raises UnrenderableState, and InputError for a template whose turns do not continue its own
        generation prompt.
        """
        prompt = self._render(messages, tools, True)
        thought = action.get("reasoning_content", "")
        if thought and self.reasoning.opened and self.template.reasoning_field in ("", INLINE):
            return self._after_reasoning(prompt, thought, messages, tools, {**action, "reasoning_content": ""})
        return self._turn_behind(prompt, messages, tools, action)

    @property
    def writes_reasoning(self) -> bool:
        """Whether an expert's reasoning is in the turns that `turn` gives: by the template, or behind a prompt that opens it."""
        return bool(self.template.reasoning_field) or self.reasoning.opened

    def _after_reasoning(
        self, prompt: Marked, thought: str, messages: Sequence[Message], tools: Tools, action: Message
    ) -> Turn:
        """A turn whose reasoning the template drops from any turn: the prompt opens it, so the policy writes it."""
        bare = self._turn_behind(prompt, messages, tools, action).text
        mark = bare.mark or prompt.mark or self.template.mark_for(thought)
        if mark and mark in thought:
            raise UnrenderableState("special_token_in_text", short(thought, 40))
        begins, ends = self.reasoning.begins, self.reasoning.ends
        line = "\n" if "\n" in prompt.text.rpartition(begins)[2] else ""
        body = bare.text.replace(bare.mark, mark) if bare.mark else bare.text
        text = f"{self.template.marked(thought, mark)}{line}{ends}{line * 2}{body.removeprefix(ends).lstrip(chr(10))}"
        return Turn(prompt, Marked(text, mark), True)

    def _turn_behind(self, prompt: Marked, messages: Sequence[Message], tools: Tools, action: Message) -> Turn:
        for state in (messages, [template_probes.USER]):
            begun = prompt if state is messages else self.template.render(state, tools, True)
            behind: Sequence[Message] = ()
            if self.template.prefills:
                behind = template_probes.outputs_of(action.get("tool_calls") or ()) or [template_probes.USER]
            whole = self.template.render([*state, action, *behind], tools, False)
            bare = self.template.render(state, tools, False)
            kept = self._kept(begun.text, bare.text, whole.text)
            if kept is not None:
                cut = len(begun.text) - kept
                text = Marked(prompt.text[: len(prompt.text) - cut], prompt.mark)
                begins = self.reasoning.begins
                opened = bool(begins) and text.plain.rstrip().endswith(begins)
                return Turn(text, Marked(whole.text[kept:], whole.mark), opened)
            block, ends = self._closed
            header = begun.text.removesuffix(block)
            if block and whole.text.startswith(header):
                return Turn(prompt, Marked(whole.text[len(header) :].removeprefix(ends), whole.mark), False)
        section = self.template.section
        remedy = (
            "the template writes an assistant turn that does not begin with its own generation prompt; "
            f"set {section}.template_kwargs (for example enable_thinking: false) or {section}.chat_template"
        )
        raise InputError(Problem("chat template", None, "assistant turn", short(whole.plain[-160:]), remedy))

    def _kept(self, prompt: str, bare: str, whole: str) -> int | None:
        """How many characters of the generation prompt the turn in `whole` continues; None where it is another state."""
        if whole.startswith(prompt):
            return len(prompt)
        begins = self.reasoning.begins
        place = prompt.find(begins, len(bare)) if begins and prompt.startswith(bare) else -1
        if place < 0 or not whole.startswith(prompt[:place]):
            return None
        return place + len(begins) if whole.startswith(begins, place) else place

    def example_ids(self, messages: Sequence[Message], tools: Tools, action: Message) -> tuple[list[int], list[int]]:
        """Token ids of a state and of an expert's turn behind it, up to its end-of-turn token.

        Both are encoded as one text and cut, for a turn that is encoded alone may begin otherwise. Where a token would lie across
        the border the turn has tokens of its own, since the policy is given the state's. Raises as `turn` does.
        """
        self.dropped.check([*messages, action], tools)
        turn = self.turn(messages, tools, action)
        mark = turn.prompt.mark or turn.text.mark
        text = turn.text.text if turn.text.mark in ("", mark) else turn.text.text.replace(turn.text.mark, mark)
        prompt = self.template.encode(turn.prompt)
        for start in (self.template.last_special(turn.prompt.text), 0):  # a special token begins a text of its own
            before = self.template.encode(Marked(turn.prompt.text[start:], mark)) if start else prompt
            if prompt[len(prompt) - len(before) :] == before:
                break
        whole = self.template.encode(Marked(turn.prompt.text[start:] + text, mark))
        own_tokens = whole[: len(before)] != before
        action_ids = self.template.encode(turn.text, inside=True) if own_tokens else whole[len(before) :]
        end = next((place for place, token in enumerate(action_ids) if token in self.stop_ids), None)
        if end is not None:
            return prompt, action_ids[: end + 1]
        own = self.tokenizer.eos_token_id  # a template without an end of turn: the model would end the text
        return prompt, [*action_ids, own if own is not None else min(self.stop_ids)]

    def action_ids(self, messages: Sequence[Message], tools: Tools, action: Message) -> list[int]:
        """Token ids of an expert action: from the first token the policy would write to its end-of-turn token."""
        return self.example_ids(messages, tools, action)[1]

    # ---- tokens and text to actions ----

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a sampled action without its end-of-turn token."""
        ids = list(token_ids)
        if ids and ids[-1] in self.stop_ids:
            ids.pop()
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def parse(self, text: str, tools: Tools = (), opened: bool | None = None) -> Action:
        """The action in generated `text`: reasoning set apart, tool calls read. Never raises: text is data.

        opened: whether the prompt has begun reasoning; by default, what the template's generation prompt does.
        """
        if len(text) > self.limits.max_chars:
            return Action("malformed", detail=f"longer than {self.limits.max_chars} characters")
        parser = PARSERS[self.parser]
        begins, ends = (self.reasoning.begins, self.reasoning.ends) if self.reasoning.ends else ("<think>", "</think>")
        thought = parser.reasoning(text) if parser.reasoning else ""
        if parser.reasoning is None:
            opened = self.reasoning.opened if opened is None else opened
            if not opened and text.lstrip().startswith(begins):
                text = text.lstrip().removeprefix(begins)
                if ends not in text:
                    return Action("malformed", content=text, detail="reasoning never ended")
                opened = True
            if opened:
                thought, ended, text = text.partition(ends)
                if not ended:
                    return Action("none", detail="reasoning never ended")
            elif text.lstrip().startswith(ends):  # the end of reasoning that is empty, which the template writes alone
                text = text.lstrip().removeprefix(ends)
        try:
            content, calls = parser.read(text, tools)
        except (ValueError, RecursionError) as error:
            return Action("malformed", content=text, detail=short(str(error)))
        if len(calls) > self.limits.max_calls:
            return Action(
                "malformed", content=text, detail=f"{len(calls)} calls, at most {self.limits.max_calls} are read"
            )
        content, thought = content.strip(), thought.strip()
        if parser.reasoning is None and begins in content and ends not in content.partition(begins)[2]:
            return Action("malformed", content=content, detail="reasoning never ended")
        if calls:
            return Action("calls", content=content, calls=tuple(calls), reasoning=thought)
        return Action("message", content=content, reasoning=thought) if content else Action("none")

    def lost_in_rendering(self, messages: Sequence[Message], tools: Tools, expected: Action) -> str:
        """Why an expert action is not what is read out of the template's own text of it; '' where it is.

        Raises InputError as `turn` does, UnrenderableState for a state or turn that the template refuses.
        """
        turn = self.turn(messages, tools, gym_rows.message_of(expected))
        check_encodable(turn.prompt.text)
        return self._lost(turn, tools, expected)

    def _lost(self, turn: Turn, tools: Tools, expected: Action) -> str:
        ids = self.template.encode(turn.text)
        end = next((place for place, token in enumerate(ids) if token in self.stop_ids), len(ids))
        found = self.parse(self.decode(ids[:end]), tools, turn.opened)
        if found.kind != expected.kind:
            return f"{expected.kind} read as {found.kind}" + (f" ({found.detail})" if found.detail else "")
        if found.kind == "message":
            return "" if found.content == expected.content.strip() else "other text"
        names = [[call.name for call in action.calls] for action in (found, expected)]
        if names[0] != names[1]:
            return f"calls {'+'.join(names[1])} read as {'+'.join(names[0])}"
        for one, other in zip(found.calls, expected.calls, strict=True):
            if not _same_json(one.arguments, other.arguments):
                return f"arguments {short(other.arguments, 50)} read as {short(one.arguments, 50)}"
        return ""

    def markers(self, piece: str) -> tuple[str, str]:
        """Text that begins and that ends a `reasoning` or `tool_calls` piece of an answer; '' for an end: the turn's end.

        Raises InputError where the template has no such piece.
        """
        parser = PARSERS[self.parser]
        found = (self.reasoning.begins, self.reasoning.ends) if piece == "reasoning" else (parser.begins, parser.ends)
        if not found[0]:
            problem = Problem("chat template", None, piece, "no marker", "drop it, or name the markers in off_markers")
            raise InputError(problem)
        return found

    def _probe_parser(self) -> str:
        (call,) = template_probes.calls_of(template_probes.ARGUMENTS)
        action = {"role": "assistant", "content": "", "tool_calls": [call]}
        state, tools = [template_probes.USER], [template_probes.TOOL]
        try:
            turn = self._turn_behind(self.template.render(state, tools, True), state, tools, action)
        except UnrenderableState as error:
            remedy = "the template cannot render a tool call; set policy.chat_template"
            raise InputError(Problem("chat template", None, "tool calls", error.found, remedy)) from error
        expected = gym_rows.action_of(action)
        for name in PARSERS:
            self.parser = name
            if not self._lost(turn, tools, expected):
                return name
        raise template_probes.no_parser(turn.text.plain, list(PARSERS))


def _same_json(left: str, right: str) -> bool:
    """Whether two JSON texts hold the same values of the same types; no arguments at all are an empty object."""
    try:
        return _equal(json.loads(left or "{}"), json.loads(right or "{}"))
    except (ValueError, RecursionError):
        return left == right


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_equal(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_equal, left, right))
    return isinstance(left, bool) == isinstance(right, bool) and bool(left == right)
