"""Every record that passes between stages.

Messages are OpenAI chat messages (plain dicts): `role`, `content`, and on assistant turns `reasoning_content` and
`tool_calls`. Rows on disk are NeMo-Gym rows (Responses items); `data/gym_rows.py` translates between the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Message = dict[str, Any]


Split = Literal["train", "validation"]


FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One function call of an assistant turn."""

    name: str
    arguments: str
    """The arguments as the model wrote them: a JSON text, not checked here."""
    call_id: str = ""


@dataclass(frozen=True, slots=True)
class Action:
    """What an assistant turn does, as a verifier sees it: reasoning already removed."""

    kind: Literal["message", "calls", "malformed", "none"]
    """`malformed`: a tool call was begun and cannot be read. `none`: neither text nor call."""
    content: str = ""
    calls: tuple[ToolCall, ...] = ()
    detail: str = ""
    """For `malformed`: why."""
    reasoning: str = field(default="", compare=False)
    """What preceded it as reasoning. No verifier looks at it and `expected_action` never holds it; fine-tuning trains it."""


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One expert trajectory as a reader gives it."""

    trajectory_id: str
    task_id: str
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...]
    """Tool definitions in the OpenAI chat form `{"type": "function", "function": {...}}`."""
    reward: float | None
    """Outcome of the whole trajectory, None where the source has none."""
    source: str
    """`file:line` it was read from."""
    last_only: bool = False
    """True where only the last message is an action to learn (a ready-made pivot row)."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The row's fields for its verifier (`responses.VERIFIER_FIELDS`)."""
    untrained: Mapping[int, str] = field(default_factory=dict)
    """Index of an assistant turn that is not to be learned, and the reason it is counted under."""


@dataclass(frozen=True, slots=True)
class Case:
    """What a verifier judges against: the expert's action and the state it was taken in."""

    expected: Action
    tools: tuple[dict[str, Any], ...] = ()
    """In the chat form or the flat one."""
    messages: tuple[Message, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)
    """What the row says to its verifier: `harness`, `threshold`, `declared_tools`, `metadata`, `files`."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A pair (state, expert action): one assistant turn of one trajectory.

    >>> state, action = ({"role": "user", "content": "Book it."},), Action("calls", calls=(ToolCall("book", "{}"),))
    >>> Candidate("t1:1", "t1", "task", "train", 1, 0, messages=state, tools=(), expected=action).action_name
    'book'
    """

    candidate_id: str
    trajectory_id: str
    task_id: str
    split: Split
    turn: int
    """Index of the action in the trajectory's messages."""
    depth: int
    """How many assistant turns precede it."""
    messages: tuple[Message, ...]
    """The state: everything before the action, as chat messages."""
    tools: tuple[dict[str, Any], ...]
    expected: Action
    num_unique_actions: int = 1
    """How many different expert actions the source has at this state."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The row's fields for its verifier."""

    @property
    def case(self) -> Case:
        """The candidate as its verifier sees it."""
        return Case(self.expected, self.tools, self.messages, self.fields)

    @property
    def action_name(self) -> str:
        """Tool name of the expert action, `message` for a talking turn, names joined by `+` for a batch."""
        return "message" if self.expected.kind == "message" else "+".join(c.name for c in self.expected.calls)


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to one prompt, of which one is preferred under an objective."""

    preference_id: str
    """Digest of what the pair says: the same pair has the same id in every file."""
    split: Split
    objective: str
    """What the preference is about, e.g. `helpfulness`; one objective makes one doctor."""
    prompt: tuple[Message, ...]
    """Chat messages before the answer; the last one is no assistant turn."""
    chosen: str
    rejected: str
    source: str
    """`file:line` it was read from."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One generated turn. Token ids are what the policy emitted, never re-tokenised text."""

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    """Log-probability (nats) of each token under the sampling distribution."""
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class FailedSample:
    """A turn that could not be generated: a fault of machines, after all retries. It says nothing about the policy."""

    kind: str
    """E.g. `sampler_timeout`."""
    detail: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """A verifier's judgement of one sampled action.

    >>> Verdict(1.0, "EQUAL").reward
    1.0
    """

    reward: float
    """In [0, 1]."""
    category: str
    """Why, in the verifier's own vocabulary."""
    detail: str = ""
    rules: tuple[str, ...] = ()
    """Relaxations without which the action would not have been accepted."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """What was measured on the way, e.g. `similarity`."""


@dataclass(frozen=True, slots=True)
class Profile:
    """A candidate with its K verified one-turn rollouts."""

    candidate: Candidate
    samples: tuple[dict[str, Any], ...]
    """One dict a rollout: text, tokens, finish_reason, reward, category. Fewer than K where curtailed sampling stopped."""
    tokens_generated: int
    tokens_prompt: int
    failure: str | None = None
    """Why the candidate is excluded (a fault that outlived its retries); then it has no k."""
    interval: tuple[float, float] | None = None
    """Jeffreys interval of the hit rate (95 %); None where rewards are not 0 or 1, and for what failed."""
    control: bool = False
    """Whether it was drawn in full whatever its first outcomes said."""

    @property
    def rewards(self) -> tuple[float, ...]:
        return tuple(float(s["reward"]) for s in self.samples)
