"""Which rank trains which rows, and what the tensors of a micro-batch say."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, strategies as st

from nemo_pivotrl.algorithms import prefix_tree
from nemo_pivotrl.algorithms.prefix_tree import Forest
from nemo_pivotrl.backends.megatron.microbatches import (
    Rows,
    _joined,
    context_part,
    context_ranges,
    lay_out,
    schedule,
    tree_ranges,
)
from nemo_pivotrl.sizing.layout_rules import multiple_of, round_up


@given(
    st.lists(st.integers(2, 60), max_size=30),
    st.integers(1, 200),
    st.integers(1, 5),
    st.sampled_from([1, 4, 16]),
    st.booleans(),
    st.booleans(),
)
def test_every_row_once_equal_counts_and_the_budget_holds(
    lengths: list[int], budget: int, ranks: int, multiple: int, packed: bool, pairs: bool
) -> None:
    if pairs:
        lengths = lengths[: len(lengths) // 2 * 2]
    size = 2 if pairs else 1
    groups = [tuple(range(i, i + size)) for i in range(0, len(lengths), size)]
    plan = schedule(groups, lengths, budget, ranks, multiple, packed)
    assert plan == schedule(groups, lengths, budget, ranks, multiple, packed)
    assert sorted(row for rank in plan for rows in rank for row in rows) == list(range(len(lengths)))
    assert len(plan) == ranks and len({len(rank) for rank in plan}) == 1 and plan[0]
    for rows in (rows for rank in plan for rows in rank):
        assert len(rows) % size == 0 and all(rows[i] % size == i % size for i in range(len(rows)))
        widths = [round_up(lengths[row], multiple) for row in rows]
        tokens = sum(widths) if packed else len(rows) * max(widths, default=0)
        assert tokens <= budget or len(rows) == size


def test_work_of_the_same_turn_is_of_about_the_same_size() -> None:
    lengths = [10, 100, 20, 90, 30, 80, 40, 70]
    plan = schedule([(i,) for i in range(8)], lengths, 100, 2)
    padded = [[len(rows) * max(lengths[i] for i in rows) for rows in rank] for rank in plan]
    assert padded == [[100, 80, 70], [90, 80, 40]]


def test_a_row_in_no_group_or_in_two_is_refused() -> None:
    for groups in ([(0,)], [(0, 1), (1,)]):
        with pytest.raises(ValueError, match="exactly one group"):
            schedule(groups, [3, 3], 100, 1)


PROMPTS, RESPONSES = [[1, 2, 3], [4]], [[5, 6], [7, 8, 9]]


def test_a_padded_micro_batch_by_hand() -> None:
    made = lay_out([4, 7], PROMPTS, RESPONSES, multiple=8)
    assert made.tokens.tolist() == [[1, 2, 3, 5, 6, 0, 0, 0], [4, 7, 8, 9, 0, 0, 0, 0]]
    assert made.places.tolist() == [2, 3, 8, 9, 10] and made.goals.tolist() == [5, 6, 7, 8, 9]
    assert made.positions[1].tolist() == list(range(8)) and made.rows == (4, 7)
    assert made.predicts.tolist() == [[0, 1, 0], [2, 3, 4]] and made.states.tolist() == [[0, 1, 2, 0], [3, 4, 5, 6]]
    assert made.seen.tolist() == [2, 3, 4, 8, 9, 10, 11]
    assert made.mask.tolist() == [[True, True, False], [True, True, True]] and made.starts is None


def test_a_packed_micro_batch_by_hand() -> None:
    made = lay_out([4, 7], PROMPTS, RESPONSES, multiple=2, packed=True)
    assert made.tokens.tolist() == [[1, 2, 3, 5, 6, 0, 4, 7, 8, 9]]
    assert made.positions.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3]]
    assert made.places.tolist() == [2, 3, 6, 7, 8] and made.goals.tolist() == [5, 6, 7, 8, 9]
    assert made.starts.tolist() == [0, 6, 10] and made.seen.tolist() == [2, 3, 4, 6, 7, 8, 9]
    assert made.predicts.tolist() == [[0, 1, 0], [2, 3, 4]] and made.states.tolist() == [[0, 1, 2, 0], [3, 4, 5, 6]]


@pytest.mark.parametrize("packed", [False, True])
def test_both_forms_point_at_the_tokens_they_predict(packed: bool) -> None:
    made = lay_out([0, 1], PROMPTS, RESPONSES, multiple=4, packed=packed)
    for row, response in enumerate(RESPONSES):
        at = made.predicts[row][made.mask[row]]
        assert made.goals[at].tolist() == made.tokens.flatten()[made.places[at] + 1].tolist() == response
    assert len(made.goals) == 5


@pytest.mark.parametrize("packed", [False, True])
def test_what_nobody_asks_for_is_not_predicted(packed: bool) -> None:
    asked = torch.zeros(9, 4, dtype=torch.bool)
    asked[4, 1], asked[7, 0], asked[7, 2] = True, True, True
    made = lay_out([4, 7], PROMPTS, RESPONSES, multiple=2, packed=packed, asked=asked)
    assert made.goals.tolist() == [6, 7, 9] and made.mask.tolist() == [[False, True, False], [True, False, True]]
    assert made.tokens.flatten()[made.places + 1].tolist() == [6, 7, 9]
    whole = lay_out([4, 7], PROMPTS, RESPONSES, multiple=2, packed=packed)
    assert made.states.tolist() == whole.states.tolist() and torch.equal(made.tokens, whole.tokens)


@pytest.mark.parametrize("packed", [False, True])
def test_a_filler_has_tokens_and_no_rows(packed: bool) -> None:
    made = lay_out([], [], [], multiple=8, packed=packed)
    assert made.tokens.shape == (1, 8) and made.mask.shape == (0, 1) and made.states.shape == (0, 2)
    assert made.places.numel() == made.goals.numel() == 0


def test_empty_prompts_and_responses_are_refused() -> None:
    for prompts, responses in (([[]], [[1]]), ([[1]], [[]])):
        with pytest.raises(ValueError):
            lay_out([0], prompts, responses)


def test_multiples() -> None:
    assert multiple_of(1, 1, False) == 1 and multiple_of(2, 1, True) == 2 and multiple_of(2, 1, False) == 1
    assert multiple_of(1, 2, False) == 4 and multiple_of(2, 2, True) == 4 and multiple_of(8, 2, True) == 16
    assert multiple_of(8, 2, True, 16) == 256 and multiple_of(1, 1, False, 128) == 128


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_context_parts_are_all_of_the_sequence_with_equal_causal_work(ranks: int) -> None:
    parts = [context_part([0, 12], rank, ranks) for rank in range(ranks)]
    assert sorted(torch.cat(parts).tolist()) == list(range(12))
    assert len({int((part + 1).sum()) for part in parts}) == 1


def test_a_packed_stream_is_dealt_out_sequence_by_sequence() -> None:
    parts = [context_part([0, 4, 12], rank, 2).tolist() for rank in range(2)]
    assert parts == [[0, 3, 4, 5, 10, 11], [1, 2, 6, 7, 8, 9]]


def loads(forest: Forest, ranges: Sequence[tuple[tuple[int, int], ...]]) -> list[int]:
    """Pairs of query and key of each rank."""
    seen = (forest.positions + 1).tolist()
    return [sum(sum(seen[first:last]) for first, last in own) for own in ranges]


GROUPS = {
    "half of it trunk": (4096, [256] * 16),
    "mostly trunk": (7168, [64] * 16),
    "mostly responses": (1024, [448] * 16),
    "no response": (8190, [2]),
}


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
@pytest.mark.parametrize("shape", GROUPS)
def test_ranks_have_equal_tokens_and_about_equal_pairs_of_a_tree(shape: str, ranks: int) -> None:
    """Mirrored pieces, which are right for one sequence, would leave a rank up to a third more."""
    trunk, responses = GROUPS[shape]
    prompts = [list(range(trunk))] * len(responses)
    forest = prefix_tree.lay_out(range(len(responses)), prompts, [[i] * n for i, n in enumerate(responses)], 8 * ranks)
    rows = Rows.of(forest, ranks)
    size = len(forest.tokens)
    held = [rows.held(rank, ranks) for rank in range(ranks)]
    assert torch.cat(held).sort().values.tolist() == list(range(size)) and {len(own) for own in held} == {size // ranks}
    assert rows.ranges is not None and all(own == tuple(sorted(own)) for own in rows.ranges)
    found = loads(forest, rows.ranges)
    mirrored = loads(forest, [context_ranges(size, rank, ranks) for rank in range(ranks)])
    assert max(found) / (sum(found) / ranks) < 1.05
    assert max(found) <= max(mirrored)
    if shape == "half of it trunk":
        assert max(mirrored) / (sum(mirrored) / ranks) > (1.08 if ranks == 2 else 1.2)


def test_one_sequence_is_cut_as_megatron_core_cuts_it() -> None:
    for ranks in (2, 4):
        want = tuple(context_ranges(64, rank, ranks) for rank in range(ranks))
        assert sorted(tree_ranges(range(1, 65), ranks)) == sorted(_joined(list(own)) for own in want)
