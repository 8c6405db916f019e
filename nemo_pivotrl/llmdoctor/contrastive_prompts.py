"""A preference as token ids: the answer once, and three prompts to put it behind.

The neutral prompt is what the doctor will see. A face is the same prompt with its text as the system message, before a
system message that is already there. Templates that refuse a system role, or drop it silently, get it at the head of the
first user turn instead. An answer is tokenised once, behind the neutral prompt, with the end-of-turn token its template
writes; its ids are then appended to every prompt as they are. Tokenising prompt and answer together instead could merge
across the border, differently for each face.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from jinja2 import TemplateError

from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.core.types import Message, Preference
from nemo_pivotrl.data.chat_template import Chat

Placement = Literal["system", "first_user_turn"]


class Face(NamedTuple):
    """The two system prompts of an objective."""

    positive: str
    negative: str


@dataclass(frozen=True, slots=True)
class Prepared:
    """A preference as token ids. Every answer ends with the template's end-of-turn token."""

    preference: Preference
    neutral: list[int]
    positive: list[int]
    negative: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that is scored."""
        answer = max(len(self.chosen), len(self.rejected))
        return max(len(self.neutral), len(self.positive), len(self.negative)) + answer


class FacePrompts:
    """Prepares preferences through one model's chat template."""

    def __init__(self, chat: Chat, faces: Mapping[str, Face], max_tokens: int):
        self.chat, self.faces, self.max_tokens = chat, faces, max_tokens
        self.placement: Placement = "first_user_turn" if refuses_system_role(chat) else "system"
        tokenizer = chat.tokenizer
        added = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        self.special_tokens = sorted({*added, *tokenizer.all_special_tokens})

    def prepare(self, preference: Preference) -> Prepared | str:
        """Its token ids, or the reason why it is excluded."""
        neutral = placed(preference.prompt, "", self.placement)
        faces = self.faces[preference.objective]
        try:
            prompts = [self.chat.prompt_ids(neutral, ())]
            prompts += [self.chat.prompt_ids(placed(preference.prompt, f, self.placement), ()) for f in faces]
        except TemplateError:
            return "template_refuses_prompt"
        answers = []
        for text in (preference.chosen, preference.rejected):
            if any(token in text for token in self.special_tokens):
                return "special_token_in_answer"
            ids = self.answer_ids(neutral, text)
            if ids is None:
                return "template_changes_answer"
            answers.append(ids)
        if answers[0] == answers[1]:
            return "same_tokens"
        found = Prepared(preference, *prompts, *answers)
        return "too_long" if found.longest > self.max_tokens else found

    def answer_ids(self, messages: Sequence[Message], text: str) -> list[int] | None:
        """The answer's tokens, end of turn included; None where the template leaves something of it out."""
        message = {"role": "assistant", "content": text}
        try:
            written = self.chat.action_text(messages, (), message)
            ids = self.chat.action_ids(messages, (), message)
        except (InputError, TemplateError):
            return None
        _, found, after = written.rpartition(text.strip())
        cut_off = self.chat.tokenizer.decode(self.chat.encode(written)[len(ids) :], skip_special_tokens=False)
        if not found or len(cut_off) > len(after):  # a stop token that is plain text may stand inside an answer
            return None
        if ids[-1] not in self.chat.stop_ids:  # a template without an end of turn: the model would end the text
            ids.append(self.chat.tokenizer.eos_token_id)
        return ids


def refuses_system_role(chat: Chat) -> bool:
    """Whether the template raises on a system message or leaves it out."""
    probe = [{"role": "system", "content": "PROBESYSTEM"}, {"role": "user", "content": "PROBEUSER"}]
    try:
        return "PROBESYSTEM" not in chat.render(probe, (), add_generation_prompt=True)
    except TemplateError:
        return True


def placed(messages: Sequence[Message], face: str, placement: Placement) -> list[Message]:
    """`messages` with the text of a face ('' for none) before their own system text, where `placement` says."""
    count = next((i for i, m in enumerate(messages) if m["role"] not in ("system", "developer")), len(messages))
    texts = [text for text in (face, *(m["content"] for m in messages[:count])) if text]
    rest = list(messages[count:])
    if not texts:
        return rest
    text = "\n\n".join(texts)
    if placement == "system":
        return [{"role": messages[0]["role"] if count else "system", "content": text}, *rest]
    first = next(i for i, m in enumerate(rest) if m["role"] == "user")
    rest[first] = {**rest[first], "content": f"{text}\n\n{rest[first]['content']}"}
    return rest
