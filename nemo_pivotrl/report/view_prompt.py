"""The prompt of a turn as the policy reads it: rendered anew with the tokenizer and template that the profile names, and compared."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_pivotrl.components.rollout import load_chat
from nemo_pivotrl.config import Policy
from nemo_pivotrl.config.build import build
from nemo_pivotrl.core.artifacts import Header, read_header
from nemo_pivotrl.core.errors import InputError, short
from nemo_pivotrl.report.view_index import Row, Run, candidate_of

if TYPE_CHECKING:
    from nemo_pivotrl.data.chat_template import Chat

SHOWN = 200_000
"""Characters of a prompt that are sent; of a longer one its beginning and its end."""


class RenderedPrompts:
    """Renders one state at a time. The tokenizer is loaded when the first is asked for, once."""

    def __init__(self, run: Run):
        self.run = run
        self._lock = threading.Lock()
        self._chat: Chat | None = None
        self._problem = ""

    def prompt(self, candidate_id: str) -> Row:
        """`text`, its `tokens` and `characters`, or the `problem` why there is none. Raises KeyError for an id that is not there."""
        candidate = candidate_of(self.run, candidate_id)
        with self._lock:
            if self._chat is None and not self._problem:
                try:
                    self._chat = self._load()
                except (InputError, OSError, ImportError) as error:
                    self._problem = short(str(error), 600)
            if self._chat is None:
                return {"problem": self._problem}
            try:
                text = self._chat.render(candidate.messages, candidate.tools, True)
                tokens = len(self._chat.prompt_ids(candidate.messages, candidate.tools))
            except InputError as error:  # a state that the template refuses, or loses a part of
                return {"problem": short(str(error), 600)}
        cut = len(text) - SHOWN
        shown = (
            text if cut <= 0 else f"{text[: SHOWN // 2]}\n\n[{cut:,} characters left out here]\n\n{text[-SHOWN // 2 :]}"
        )
        return {"text": shown, "tokens": tokens, "characters": len(text), "problem": ""}

    def _load(self) -> Chat:
        """Raises InputError where the tokenizer is not there, or is another than the one that was profiled with."""
        assert self.run.source is not None
        header = read_header(self.run.source, ("profiles", "candidates"))
        policy = policy_of(header.settings)
        for home in (self.run.folder, self.run.folder.parent):  # a round of a run lies within the run's folder
            own = policy.model_name.replace("${run_dir}", str(home), 1)
            if Path(own).is_dir():
                policy = replace(policy, model_name=own)
                break
        if not policy.model_name:
            raise OSError(_unknown(header))
        if not Path(policy.model_name).is_dir():
            raise OSError(f"{policy.model_name} is not here: start `view` in the folder where the profile was made")
        chat = load_chat(policy)
        if (chat.fingerprint, chat.template_digest) != (header.tokenizer, header.chat_template):
            raise OSError(f"tokenizer or chat template of {policy.model_name} are others than when it was profiled")
        return chat


def _unknown(header: Header) -> str:
    if header.stage == "candidates":
        return "no policy has read it yet: nemo-pivotrl profile RECIPE"
    return "the profile is of a version that did not name its tokenizer's folder"


def policy_of(settings: Mapping[str, Any]) -> Policy:
    """The tokenizer's part of the section `policy`, out of what a header tells. Raises InputError for a setting that is none."""
    wanted = ("model_name", "chat_template", "template_kwargs", "chat", "tool_parser")
    tree: dict[str, Any] = {}
    for name, value in settings.items():
        section, *parts = name.split(".")
        if section != "policy" or parts[0] not in wanted:
            continue
        place = tree
        for part in parts[:-1]:
            place = place.setdefault(part, {})
        place[parts[-1]] = list(value) if isinstance(value, tuple) else value
    made: Policy = build(Policy, tree, "profile", "policy.")
    return made
