"""Does what the experts do survive the policy's own chat template? Each action is rendered and read back, as a sampled one is.

An action that is read back as another can be won by nobody, whatever the verifier says of the action itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_pivotrl.components.rollout import load_chat, unrenderable_lines
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.errors import InputError, Problem, UnrenderableState
from nemo_pivotrl.core.types import Candidate
from nemo_pivotrl.data.chat_template import Chat


@dataclass
class RoundTrip:
    """What became of the experts' actions."""

    parser: str
    tried: int = 0
    lost: dict[str, str] = field(default_factory=dict)
    """Candidate id -> how its action is read back instead."""
    refused: dict[str, str] = field(default_factory=dict)
    """Candidate id -> why its state or action cannot be rendered; profiling leaves these out."""

    def summary(self) -> dict[str, Any]:
        """The counts, and the candidates by id."""
        return {"parser": self.parser, "tried": self.tried, "lost": self.lost, "refused": self.refused}

    def lines(self, source: Path) -> list[str]:
        """The counts as text, with the first candidates' lines in `source`."""
        kinds = Counter(reason.partition(":")[0] for reason in self.refused.values())
        told = "".join(f", {count} not rendered ({kind})" for kind, count in kinds.items())
        head = f"{self.tried} expert actions rendered and read back ({self.parser}): {len(self.lost)} come back as others{told}"
        named = [*self.lost.items(), *self.refused.items()]
        return [head, *(unrenderable_lines(named, source) if named else [])]


def round_trip(chat: Chat, candidates: Iterable[Candidate]) -> RoundTrip:
    """Render and read back every expert action. Raises InputError for a template that leaves a part of the states out."""
    found = RoundTrip(chat.parser)
    for candidate in candidates:
        found.tried += 1
        try:
            reason = chat.lost_in_rendering(candidate.messages, candidate.tools, candidate.expected)
        except UnrenderableState as error:
            found.refused[candidate.candidate_id] = f"{error.kind}: {error.found}"
            continue
        if reason:
            found.lost[candidate.candidate_id] = reason
    return found


def of_recipe(recipe: Recipe, candidates: Iterable[Candidate]) -> RoundTrip | None:
    """As `round_trip`, with the recipe's policy; None, and a line that says so, where it has no tokenizer yet."""
    if not Path(recipe.policy.model_name, "tokenizer_config.json").exists():
        print(
            f"no tokenizer at policy.model_name ({recipe.policy.model_name}): expert actions are not rendered and read back"
        )
        return None
    return round_trip(load_chat(recipe.policy, recipe.verifier.limits), candidates)


def check(recipe: Recipe, chat: Chat, candidates: Iterable[Candidate]) -> None:
    """Print what does not survive. Raises InputError where it is more than `audit.max_round_trip_failures`."""
    found, source = round_trip(chat, candidates), recipe.path("candidates.jsonl")
    print("\n".join(found.lines(source)))
    if len(found.lost) > recipe.audit.max_round_trip_failures * found.tried:
        asked = (
            f"{len(found.lost)} of {found.tried} expert actions are read back as others from the policy's own template"
        )
        remedy = "see `nemo-pivotrl audit`; name the model's policy.tool_parser or policy.chat_template, or accept a larger share"
        raise InputError(Problem(str(source), None, "audit.max_round_trip_failures", asked, remedy))
