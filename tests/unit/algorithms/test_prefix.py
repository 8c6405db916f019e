"""The forest says of every row what the row itself says, computes no token twice, and the attention over it is attention."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from nemo_pivotrl.algorithms import prefix_tree as prefix
from nemo_pivotrl.algorithms.prefix_tree import Fork, Segment, lay_out, packs, token_ratio, visible

IDS = st.lists(st.integers(0, 2), min_size=1, max_size=7)  # few ids, so that prefixes are shared in every way
ROWS = st.lists(st.tuples(IDS, IDS), min_size=1, max_size=12)


def split(rows: list[tuple[list[int], list[int]]]) -> tuple[list[list[int]], list[list[int]]]:
    return [p for p, _ in rows], [r for _, r in rows]


def kept(prompt: list[int], response: list[int], keep_last: bool) -> tuple[int, ...]:
    return tuple([*prompt, *(response if keep_last else response[:-1])])


@given(ROWS, st.booleans(), st.booleans(), st.sampled_from([1, 4, 16]))
@settings(max_examples=300, deadline=None)
def test_a_forest_is_its_rows(
    rows: list[tuple[list[int], list[int]]], keep_last: bool, share: bool, multiple: int
) -> None:
    prompts, responses = split(rows)
    made = lay_out(range(len(rows)), prompts, responses, multiple, keep_last, share)
    sees = visible(made)
    distinct = {ids[:n] for p, r in rows if (ids := kept(p, r, keep_last)) for n in range(1, len(ids) + 1)}
    real = len(distinct) if share else sum(len(kept(p, r, keep_last)) for p, r in rows)
    assert len(made.tokens) == -(-real // multiple) * multiple  # every distinct prefix once
    for i, (prompt, response) in enumerate(rows):
        whole = [*prompt, *response]
        for t in range(len(response)):
            at = int(made.predicts[i, t])
            place = int(made.places[at])
            path = sees[place].nonzero()[:, 0]
            assert made.tokens[path].tolist() == whole[: len(prompt) + t]  # it sees exactly what stands before it
            assert made.positions[path].tolist() == list(range(len(prompt) + t))
            assert int(made.goals[at]) == response[t] and bool(made.mask[i, t])
            if keep_last:
                assert int(made.seen[made.states[i, t]]) == place
        if keep_last:
            last = int(made.seen[made.states[i, len(response)]])
            assert made.tokens[sees[last]].tolist() == whole
        assert int(made.mask[i].sum()) == len(response)
    pairs = list(zip(made.places.tolist(), made.goals.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)


@given(ROWS, st.sampled_from([1, 4]))
@settings(max_examples=200, deadline=None)
def test_segments_and_forks_are_the_visible_pairs_each_once(
    rows: list[tuple[list[int], list[int]]], multiple: int
) -> None:
    made = lay_out(range(len(rows)), *split(rows), multiple)
    count = torch.zeros(len(made.tokens), len(made.tokens), dtype=torch.long)
    place = 0
    for s in made.segments:
        assert s.start == place and s.length > 0
        place += s.length
        assert made.positions[s.start : place].tolist() == list(range(s.offset, s.offset + s.length))
        count[s.start : place, s.start : place] += torch.ones(s.length, s.length, dtype=torch.long).tril()
    assert place == len(made.tokens)
    for fork in made.forks:
        count[fork.first : fork.last, fork.begin : fork.end] += 1
    assert torch.equal(count, visible(made).long())
    before = made.ancestors()
    for s in made.segments:
        above = made.place_before(s)
        assert before[s.start : s.start + s.length].tolist() == [above, *range(s.start, s.start + s.length - 1)]
        if above >= 0:
            assert (
                made.segments[s.parent].start <= above < made.segments[s.parent].start + made.segments[s.parent].length
            )
            assert int(made.positions[above]) == s.offset - 1 and int(made.leave[above]) >= s.start + s.length


@given(ROWS, st.integers(1, 60), st.integers(1, 4), st.booleans(), st.booleans())
@settings(max_examples=200, deadline=None)
def test_packs_hold_every_row_once_within_the_budget(
    rows: list[tuple[list[int], list[int]]], budget: int, ranks: int, pairs: bool, keep_last: bool
) -> None:
    rows = rows[: len(rows) // 2 * 2] if pairs else rows
    prompts, responses = split(rows)
    groups = [(i, i + 1) for i in range(0, len(rows), 2)] if pairs else None
    plan = packs(prompts, responses, budget, ranks, groups, keep_last=keep_last)
    assert plan == packs(prompts, responses, budget, ranks, groups, keep_last=keep_last)
    assert sorted(row for rank in plan for pack in rank for row in pack) == list(range(len(rows)))
    assert len(plan) == ranks and len({len(rank) for rank in plan}) == 1 and plan[0]
    for pack in (pack for rank in plan for pack in rank):
        made = lay_out(pack, [prompts[i] for i in pack], [responses[i] for i in pack], keep_last=keep_last)
        assert len(made.tokens) <= budget or len(pack) <= (2 if pairs else 1)
        if pairs:
            assert all(a + 1 == b and a % 2 == 0 for a, b in zip(pack[::2], pack[1::2], strict=True))


def test_a_trajectorys_trunk_is_one_segment_and_its_branches_hang_where_they_should() -> None:
    trunk = list(range(10, 22))
    prompts = [trunk[:4], trunk[:4], trunk[:8], trunk]
    made = lay_out([5, 6, 7, 8], prompts, [[1, 2, 3], [1, 9, 3], [4, 5], [6]])
    assert made.segments == (Segment(0, 12, 0, -1), Segment(12, 1, 8, 0), Segment(13, 2, 4, 0), Segment(15, 1, 5, 2))
    assert made.tokens.tolist() == [*trunk, 4, 1, 2, 9]
    assert made.positions.tolist() == [*range(12), 8, 4, 5, 5]
    assert made.forks == (Fork(12, 13, 0, 8), Fork(13, 16, 0, 4), Fork(15, 16, 13, 14))
    first = made.predicts[:, 0]
    assert made.places[first].tolist() == [3, 3, 7, 11]  # from the trunk, and the same prediction once for two rows
    assert first[0] == first[1] and made.rows == (5, 6, 7, 8) and len(made.places) == 8


def test_packs_are_cut_where_the_least_is_repeated() -> None:
    long, other = list(range(100)), list(range(200, 260))
    prompts = [long, other, long, other, long]
    responses = [[i, 1, 2] for i in range(5)]
    plan = packs(prompts, responses, 110)
    assert sorted(map(sorted, plan[0])) == [[0, 2, 4], [1, 3]]
    two = packs(prompts, responses, 1000, ranks=2)
    assert sorted(sorted(pack) for rank in two for pack in rank) == [[0, 2, 4], [1, 3]]
    assert packs([], [], 10, ranks=2) == [[[]], [[]]]


def test_packs_of_different_ranks_cost_about_the_same() -> None:
    maker = random.Random(0)
    prompts = [[maker.randrange(1000) for _ in range(maker.randrange(50, 150))] for _ in range(24)]
    rows = [(p, [maker.randrange(1000) for _ in range(20)]) for p in prompts for _ in range(4)]
    plan = packs(*split(rows), budget=10**6, ranks=4)
    made = [lay_out(pack[0], *split([rows[i] for i in pack[0]])) for pack in plan]
    sizes = [len(m.tokens) for m in made]
    assert max(sizes) < 1.15 * min(sizes)
    naive = sum(len(p) + len(r) for p, r in rows)
    assert token_ratio(*split(rows), [pack for rank in plan for pack in rank]) == naive / sum(sizes) > 2


def test_what_cannot_be_laid_out_is_refused() -> None:
    for rows in ([([], [1])], [([1], [])]):
        with pytest.raises(ValueError, match="at least one token"):
            lay_out([0], *split(rows))
    with pytest.raises(ValueError, match="exactly one group"):
        packs([[1], [2]], [[1], [2]], 10, groups=[(0,)])


@pytest.mark.parametrize("keep_last", [False, True])
def test_a_filler_has_tokens_and_no_rows(keep_last: bool) -> None:
    made = lay_out([], [], [], multiple=8, keep_last=keep_last)
    assert len(made.tokens) == 8 and made.rows == () and made.mask.shape == (0, 1) and made.places.numel() == 0
    assert made.pick(torch.zeros(0)).shape == (0, 1)


def test_a_tree_of_many_levels_is_laid_out_without_recursion() -> None:
    rows = [([0] * (i + 1), [1]) for i in range(1500)]
    made = prefix.lay_out(range(1500), *split(rows))
    assert len(made.tokens) == 1500 and len(made.segments) == 1
    assert torch.equal(replace(made).leave, torch.full((1500,), 1500))
