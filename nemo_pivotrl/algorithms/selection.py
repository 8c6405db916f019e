"""Which turns are pivots (PivotRL, Algorithm 1, steps 1 to 3), pure and without torch: cutting, statistics, selection.

Selection is decided on integers, so that no rounding can keep or drop a pivot (P2).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from nemo_pivotrl.core.types import Profile, Trajectory

Rule = Literal["random", "mixed", "adv", "adv_with_zeros", "all"]
"""`all` and `random` filter nothing: every candidate, or as many as `adv` keeps."""


def cut(trajectory: Trajectory) -> Iterator[tuple[int, int]]:
    """(index in messages, depth) of every assistant turn: each one is a candidate (Algorithm 1, step 1).

    `depth` counts the assistant turns before it. A ready-made pivot row (`last_only`) gives its last turn alone.
    """
    turns = [i for i, message in enumerate(trajectory.messages) if message["role"] == "assistant"]
    for depth, index in enumerate(turns):
        if not trajectory.last_only or index == len(trajectory.messages) - 1:
            yield index, depth


@dataclass(frozen=True, slots=True)
class GroupStatistics:
    """Outcomes of a candidate's K rollouts."""

    count: int
    """K."""
    successes: int
    """k: rollouts with reward 1. Meaningful for binary rewards only."""
    mean: float
    variance: float
    """Population variance (1/K); only its being positive decides (equation (3))."""
    binary: bool


def statistics(rewards: Sequence[float]) -> GroupStatistics:
    """Statistics of one candidate's rewards. Raises ValueError for none, or for a reward outside [0, 1]."""
    if not rewards:
        raise ValueError("a candidate without rollouts has no statistics; exclude it")
    if any(not 0.0 <= r <= 1.0 for r in rewards):
        raise ValueError(f"rewards lie in [0, 1], got {[r for r in rewards if not 0.0 <= r <= 1.0]}")
    count, mean = len(rewards), math.fsum(rewards) / len(rewards)
    variance = math.fsum((r - mean) ** 2 for r in rewards) / count
    return GroupStatistics(count, sum(r == 1.0 for r in rewards), mean, variance, all(r in (0.0, 1.0) for r in rewards))


def keep_pivot(
    stats: GroupStatistics | Sequence[float], rule: Rule = "adv", lambda_diff: float = 0.6, inclusive: bool = False
) -> bool:
    """Whether statistics, or rewards, are those of a pivot under `rule` (equations (3) and (4) for `adv`; P2 to P4).

    Binary rewards are decided on integers: mixed iff 0 < k < K, hard iff k < lambda_diff*K - 1e-9 (or <= with
    `inclusive`). Other rewards use variance > 1e-12 and the mean; Theorem 3.3 assumes binary ones.

    >>> [keep_pivot([1] * k + [0] * (4 - k)) for k in range(5)]  # k of 4 rollouts succeeded
    [False, True, True, False, False]
    """
    if not isinstance(stats, GroupStatistics):
        stats = statistics(stats)
    if rule in ("all", "random"):
        return True
    if stats.binary:
        mixed = 0 < stats.successes < stats.count
        bound = lambda_diff * stats.count
        hard = stats.successes <= bound + 1e-9 if inclusive else stats.successes < bound - 1e-9
    else:
        mixed = stats.variance > 1e-12
        hard = stats.mean <= lambda_diff + 1e-12 if inclusive else stats.mean < lambda_diff - 1e-12
    if rule == "mixed":
        return mixed
    return hard and (mixed if rule == "adv" else stats.mean < 1.0)


def order_key(seed: int, candidate_id: str) -> str:
    """A random order that depends on seed and id alone, so that subsets are nested and resumable."""
    return hashlib.sha256(f"{seed} {candidate_id}".encode()).hexdigest()


def select(
    profiles: Iterable[Profile],
    rule: Rule,
    lambda_diff: float,
    seed: int,
    inclusive: bool = False,
    limit: int = 0,
    max_message_ratio: float = 1.0,
) -> list[Profile]:
    """The pivots among `profiles`, in their order. Failed candidates are never selected.

    `limit` keeps that many, chosen by hash. `random` without a limit keeps as many as `adv` would, so that the two can
    be compared. `max_message_ratio` bounds the share of talking turns (P15).
    """
    usable = [(p, statistics(p.rewards)) for p in profiles if p.failure is None]
    kept = [p for p, stats in usable if keep_pivot(stats, rule, lambda_diff, inclusive)]
    if rule == "random":
        adv = select([p for p, _ in usable], "adv", lambda_diff, seed, inclusive, limit, max_message_ratio)
        limit = limit or len(adv)
        if limit == 0:
            return []
    talking = [p for p in kept if p.candidate.expected.kind == "message"]
    if max_message_ratio < 1.0:
        allowed = math.floor(max_message_ratio * (len(kept) - len(talking)) / (1.0 - max_message_ratio) + 1e-9)
        dropped = {p.candidate.candidate_id for p in talking}
        dropped -= {p.candidate.candidate_id for p in _subset(talking, allowed, seed)}
        kept = [p for p in kept if p.candidate.candidate_id not in dropped]
    return _subset(kept, limit, seed) if limit else kept


def _subset(profiles: list[Profile], size: int, seed: int) -> list[Profile]:
    chosen = {
        p.candidate.candidate_id
        for p in sorted(profiles, key=lambda p: order_key(seed, p.candidate.candidate_id))[:size]
    }
    return [p for p in profiles if p.candidate.candidate_id in chosen]


def identical_groups(
    groups: Sequence[Sequence[tuple[tuple[int, ...], float]]], bound: float = math.log(1e-6)
) -> list[int]:
    """Groups whose samples are all the same although chance would hardly make them so: a shared seed (R5).

    groups: per pivot, (token ids, summed log-probability in nats) of each sample at temperature > 0. A group of G
    identical samples has chance exp((G-1) * log p); it is suspicious below exp(`bound`). A policy that is simply sure
    of itself has log p near 0 and is not.
    """
    found = []
    for index, group in enumerate(groups):
        if len(group) > 1 and len({ids for ids, _ in group}) == 1 and (len(group) - 1) * group[0][1] < bound:
            found.append(index)
    return found
