"""A preference as token ids: the answer once, and three prompts to put it behind.

The neutral prompt is what the doctor will see. A face is the same prompt with its text as the system message, before a
system message that is already there. Templates that refuse a system role, or drop it silently, get it at the head of the
first user turn instead. An answer is tokenised once, as one text with the neutral prompt and cut behind it, with the
end-of-turn token its template writes; its ids are then appended to every prompt as they are, so that each face scores the same
tokens. A template whose generation prompt opens reasoning closes it again at the beginning of every answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from nemo_pivotrl.core.errors import InputError, UnrenderableState
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

    def prepare(self, preference: Preference) -> Prepared | str:
        """Its token ids, or the reason why it is excluded. Raises InputError for a template that leaves roles out."""
        states = [placed(preference.prompt, face, self.placement) for face in ("", *self.faces[preference.objective])]
        for state in states:
            try:
                self.chat.prompt_ids(state, ())
            except UnrenderableState as error:
                return "template_refuses_prompt" if error.kind == "template_refuses_state" else error.kind
        try:
            chosen, rejected = (self.example(states[0], text) for text in (preference.chosen, preference.rejected))
            prompts = [self.example(state, preference.chosen)[0] for state in states[1:]]
        except UnrenderableState as error:
            return "special_token_in_answer" if error.kind == "special_token_in_text" else error.kind
        except InputError:
            return "template_changes_answer"
        if not chosen[1] or not rejected[1]:
            return "template_changes_answer"
        if chosen[1] == rejected[1]:
            return "same_tokens"
        found = Prepared(preference, chosen[0], *prompts, chosen[1], rejected[1])
        return "too_long" if found.longest > self.max_tokens else found

    def example(self, state: Sequence[Message], text: str) -> tuple[list[int], list[int]]:
        """The prompt's tokens and the answer's, end of turn included; none where the template leaves something of it out."""
        prompt, answer = self.chat.example_ids(state, (), {"role": "assistant", "content": text})
        whole = self.chat.decode(answer)
        said = self.chat.decode(self.chat.encode(text.strip()))  # as a tokenizer that normalises text gives it back
        return prompt, answer if said.strip() in whole else []


def refuses_system_role(chat: Chat) -> bool:
    """Whether the template raises on a system message or leaves it out."""
    probe = [{"role": "system", "content": "PROBESYSTEM"}, {"role": "user", "content": "PROBEUSER"}]
    try:
        return "PROBESYSTEM" not in chat.template.render(probe, (), prompt=True).plain
    except UnrenderableState:
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
