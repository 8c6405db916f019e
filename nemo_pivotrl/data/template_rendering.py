"""Chat messages to the text and tokens of a model's own chat template, and nothing that reads them back.

A template is handed messages in the form that it understands (arguments as an object or as text, reasoning under the name
it reads, roles renamed as the recipe says), a clock that stands still, and text in which special tokens are only text.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nemo_pivotrl.config import ChatSettings
from nemo_pivotrl.core.errors import InputError, Problem, UnrenderableState, short
from nemo_pivotrl.core.types import Message
from nemo_pivotrl.data import template_sandbox

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKS = tuple(chr(0xFDD0 + n) for n in range(16)) + tuple(chr(0xF1F00 + n) for n in range(16))
"""One of them that no text holds breaks up the special tokens in text. Most are no characters in Unicode, so texts have none."""
NEAR_END = 4096
"""Characters of a prompt in which its last marker is looked for; further back it saves nothing."""
INLINE = "content"
"""A template that reads reasoning out of the text itself, where it stands between the markers."""


class Template:
    """A tokenizer with its chat template and the recipe's rules for it.

    How it wants calls and reasoning, and what it does with the last turn, `template_probes` finds out: `arguments_as_text`,
    `ids_name_calls` (it writes a call's id in the place of its name, as Kimi K2's does, `functions.NAME:NUMBER`),
    `reasoning_field`, and `prefills` (it takes an assistant turn at the end for one that goes on).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        kwargs: Mapping[str, Any],
        settings: ChatSettings,
        section: str = "policy",
    ):
        self.tokenizer, self.settings, self.section = tokenizer, settings, section
        self.kwargs = dict(kwargs)
        self.arguments_as_text = self.ids_name_calls = self.prefills = False
        self.reasoning_field = "reasoning_content"
        self.inline_markers = ("", "")
        if re.search(r"\|\s*random\b", str(tokenizer.chat_template)):
            remedy = f"states must have the same tokens every time: set {section}.chat_template to one without it"
            raise InputError(Problem("chat template", None, "filter", "random", remedy))
        self.tells_time = "strftime_now" in str(tokenizer.chat_template)
        if self.tells_time:
            moment = _moment(settings.date, f"{section}.chat.date")
            self.kwargs.setdefault("strftime_now", moment.strftime)
        added = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        self.special_tokens = sorted({t for t in [*added, *tokenizer.all_special_tokens] if len(t) > 1})

    @property
    def special_tokens(self) -> list[str]:
        """Texts that are tokens of their own where the template writes them, and plain text where a person does."""
        return self._special_tokens

    @special_tokens.setter
    def special_tokens(self, tokens: Sequence[str]) -> None:
        self._special_tokens = list(tokens)
        longest_first = sorted(tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], prompt: bool) -> Marked:
        """The template's text; `prompt`: up to where the policy writes. Raises UnrenderableState."""
        try:
            prepared = self._prepared(messages)
            mark = self._mark_for(prepared, tools)
            if mark:
                prepared, tools = self._broken_up(prepared, mark), self._broken_up(list(tools), mark)
            text = template_sandbox.render(self.tokenizer, prepared, tools, prompt, **self.kwargs)
            if mark:  # some templates write JSON in ASCII
                text = text.replace(_escaped(mark), mark)
        except InputError:
            raise
        except Exception as error:  # whatever a template does with a state that it was not written for
            renamed = any(m["role"] == "developer" for m in messages) and "developer" not in self.settings.roles
            roles = f"'{self.section}.chat.roles={{developer: system}}'" if renamed else f"{self.section}.chat.roles"
            remedy = f"it is excluded; mend the row, set {roles}, or another {self.section}.chat_template"
            raise UnrenderableState(
                "template_refuses_state", f"{type(error).__name__}: {short(str(error))}", remedy
            ) from error
        return Marked(text, mark)

    def _prepared(self, messages: Sequence[Message]) -> list[Message]:
        made: list[Message] = []
        names: dict[str, str] = {}
        ids: dict[str, str] = {}
        calls = 0
        for number, message in enumerate(messages):
            role = self.settings.roles.get(message["role"], message["role"])
            clean: Message = {**message, "role": role, "content": message.get("content") or ""}
            if role != message["role"] and made and made[-1]["role"] == role:
                made[-1]["content"] = f"{made[-1]['content']}\n\n{clean['content']}"  # templates refuse two in a row
                continue
            reasoning = clean.pop("reasoning_content", "")
            if reasoning:
                self._add_reasoning(clean, reasoning)
            if message.get("tool_calls"):
                clean["tool_calls"] = [
                    self._call(call, number, place) for place, call in enumerate(message["tool_calls"])
                ]
                names.update((call["id"], call["function"]["name"]) for call in clean["tool_calls"])
                for call in clean["tool_calls"] if self.ids_name_calls else ():
                    ids[call["id"]] = call["id"] = f"functions.{call['function']['name']}:{calls}"
                    calls += 1
            else:
                clean.pop("tool_calls", None)  # templates look whether it is there
            if role == "tool" and "name" not in clean and message.get("tool_call_id") in names:
                clean["name"] = names[message["tool_call_id"]]
            if role == "tool" and message.get("tool_call_id") in ids:
                clean["tool_call_id"] = ids[message["tool_call_id"]]
            made.append(clean)
        return made

    def _add_reasoning(self, message: Message, reasoning: str) -> None:
        if self.reasoning_field == INLINE:
            begin, end = self.inline_markers
            message["content"] = f"{begin}\n{reasoning}\n{end}\n\n{message['content']}"
        elif self.reasoning_field:
            message[self.reasoning_field] = reasoning

    def _call(self, call: Mapping[str, Any], number: int, place: int) -> dict[str, Any]:
        """A call in the template's form. An expected action has no id, and some templates want nine characters."""
        function = dict(call["function"])
        try:
            parsed = json.loads(function["arguments"] or "{}")
        except (ValueError, RecursionError):
            parsed = None
        if isinstance(parsed, dict):
            function["arguments"] = json.dumps(parsed, ensure_ascii=False) if self.arguments_as_text else parsed
        return {**call, "id": call.get("id") or f"c{number % 100000:05d}{place % 1000:03d}", "function": function}

    def marked(self, text: str, mark: str) -> str:
        """`text` with its special tokens broken up by `mark`."""
        return str(self._broken_up(text, mark)) if mark else text

    def mark_for(self, *texts: str) -> str:
        """A mark for these texts alone; '' where they hold no special token. Raises UnrenderableState."""
        return self._mark_for([{"content": text} for text in texts], [])

    def _mark_for(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> str:
        """'' where no text holds a special token, else a character that no text holds."""
        found = next((hit for text in _leaves([messages, list(tools)]) if (hit := self._special.search(text))), None)
        if found is None:
            return ""
        if self.settings.special_tokens == "refuse":
            remedy = f"it is excluded; {self.section}.chat.special_tokens: as_text encodes it as text"
            raise UnrenderableState("special_token_in_text", found[0], remedy)
        texts = list(_leaves([messages, list(tools)]))
        free = next((m for m in _MARKS if not any(m in text or _escaped(m) in text for text in texts)), None)
        if free is None:
            raise UnrenderableState("special_token_in_text", found[0])
        return free

    def _broken_up(self, value: Any, mark: str) -> Any:
        if isinstance(value, str):
            return self._special.sub(lambda hit: hit[0][0] + mark + hit[0][1:], value)
        if isinstance(value, Mapping):
            return {self._broken_up(key, mark): self._broken_up(item, mark) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._broken_up(item, mark) for item in value]
        return value

    # ---- tokens ----

    def last_special(self, text: str) -> int:
        """Where the last special token near the end of a rendered text begins; 0 where there is none."""
        window = max(0, len(text) - NEAR_END)
        return max((found.start() + window for found in self._special.finditer(text[window:])), default=0)

    def encode(self, text: str | Marked, inside: bool = False) -> list[int]:
        """Token ids of a rendered text; `inside`: of one that follows another, from which it does not take a token.

        Raises UnrenderableState for what has no UTF-8 form, such as half an emoji.
        """
        if isinstance(text, Marked) and text.mark and text.mark in text.text:
            return self._encode_marked(text, inside)
        return self._segment(text.text if isinstance(text, Marked) else text, inside)

    def _encode(self, text: str, **kwargs: Any) -> list[int]:
        check_encodable(text)
        return list(self.tokenizer.encode(text, add_special_tokens=False, **kwargs))

    def _encode_marked(self, text: Marked, inside: bool) -> list[int]:
        """As `encode`: the template's own special tokens by id, those in text broken up.

        Tokenizers split a text at its special tokens first, so what stands between two of them has tokens of its own.
        """
        ids: list[int] = []
        for piece in re.split(f"({self._special.pattern})", text.text):
            if self._special.fullmatch(piece):
                ids.append(int(self.tokenizer.convert_tokens_to_ids(piece)))
            elif text.mark not in piece:
                ids += self._segment(piece, inside or bool(ids))
            elif piece:
                found = self._segment(piece.replace(text.mark, ""), inside or bool(ids), split_special_tokens=True)
                if set(found) & set(self.tokenizer.convert_tokens_to_ids(self.special_tokens)):
                    # tokens that end turns but are not flagged as special
                    found = [i for part in piece.split(text.mark) for i in self._segment(part, True)]
                ids += found
        return ids

    def _segment(self, text: str, inside: bool, **kwargs: Any) -> list[int]:
        """Tokens of `text`; `inside`: without the blank that SentencePiece tokenizers put before a text's first word."""
        if not text:
            return []
        whole = self._encode(text, **kwargs)
        if not inside:
            return whole
        anchor = self._encode("\n")
        anchored = self._encode("\n" + text, **kwargs)
        return anchored[len(anchor) :] if anchored[: len(anchor)] == anchor else whole


def _escaped(mark: str) -> str:
    """As JSON in ASCII has it."""
    return json.dumps(mark)[1:-1]


class Marked:
    """A rendered text. `mark` breaks up special tokens that are not the template's; '' where there are none."""

    __slots__ = ("mark", "text")

    def __init__(self, text: str, mark: str = ""):
        self.text, self.mark = text, mark

    @property
    def plain(self) -> str:
        """The text as a person sees it."""
        return self.text.replace(self.mark, "") if self.mark else self.text


def check_encodable(text: str) -> None:
    """Raises UnrenderableState for a text without a UTF-8 form."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"a lone surrogate {text[error.start]!r} after {text[max(0, error.start - 30) : error.start]!r}"
        raise UnrenderableState("not_encodable", found, "it is excluded; mend the text, which was cut") from None


def _moment(date: str, where: str) -> datetime.datetime:
    try:
        return datetime.datetime.fromisoformat(date)
    except ValueError:
        raise InputError(
            Problem("recipe", None, where, date, "give a date as YYYY-MM-DD: the template writes it")
        ) from None


def _leaves(value: Any) -> Any:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(key)
            yield from _leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
