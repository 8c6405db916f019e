"""Attention over a forest against attention over its rows, values and gradients, in float64; wrong forests are found out."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from nemo_pivotrl.algorithms.prefix_tree import Forest, Fork, lay_out, visible
from nemo_pivotrl.backends import tree_attention
from nemo_pivotrl.backends.tree_attention import attend, blocks, dense, flex

EXACT = 1e-12


def tree(seed: int, rows: int = 9, multiple: int = 4) -> Forest:
    maker = random.Random(seed)
    trunk = [maker.randrange(2) for _ in range(20)]
    prompts = [[*trunk[: maker.randrange(1, 20)], maker.randrange(3)] for _ in range(rows)]
    responses = [[maker.randrange(3) for _ in range(maker.randrange(1, 6))] for _ in range(rows)]
    return lay_out(range(rows), prompts, responses, multiple)


def inputs(forest: Forest, heads: int, groups: int, seed: int = 0) -> list[Tensor]:
    maker = torch.Generator().manual_seed(seed)
    size = len(forest.tokens)
    shapes = [(1, heads, size, 8), (1, groups, size, 8), (1, groups, size, 8)]
    return [torch.randn(s, generator=maker, dtype=torch.float64).requires_grad_() for s in shapes]


def by_hand(query: Tensor, key: Tensor, value: Tensor, forest: Forest, scale: float) -> Tensor:
    """Softmax over the tokens that each query sees, written out."""
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    scores = (query @ key.transpose(2, 3) * scale).masked_fill(~visible(forest), -torch.inf)
    return scores.softmax(-1) @ value


def run(form, given: list[Tensor], forest: Forest, push: Tensor) -> list[Tensor]:
    out = form(*given, forest, 0.3)
    return [out.detach(), *torch.autograd.grad((out * push).sum(), given)]


@pytest.mark.parametrize("form", [dense, blocks])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
def test_every_form_is_softmax_over_what_a_query_sees(form, heads: int, groups: int) -> None:
    for seed in range(6):
        forest = tree(seed)
        given = inputs(forest, heads, groups, seed)
        push = torch.randn(given[0].shape, dtype=torch.float64)
        for found, want in zip(run(form, given, forest, push), run(by_hand, given, forest, push), strict=True):
            torch.testing.assert_close(found, want, rtol=0, atol=EXACT)


HELD = [((0, 4), (12, 16)), ((4, 8), (8, 12)), ((3, 3), (5, 9)), ((1, 2), (7, 19), (19, 20))]


@pytest.mark.parametrize("form", [dense, blocks, "flex"])
@pytest.mark.parametrize("held", HELD)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_queries_of_some_ranges_see_what_they_see_in_the_whole(form, held: tuple[tuple[int, int], ...]) -> None:
    """A context-parallel rank's part, ranges that begin and end inside segments among them."""
    for seed in range(6):
        forest = tree(seed, multiple=20)
        query, key, value = given = inputs(forest, 4, 2, seed)
        places = torch.cat([torch.arange(first, last) for first, last in held])
        push = torch.randn(1, 4, len(places), 8, dtype=torch.float64)
        want = by_hand(query, key, value, forest, 0.3)[:, :, places]
        if form == "flex":
            found = flex(query.detach()[:, :, places], key.detach(), value.detach(), forest, 0.3, held)
            torch.testing.assert_close(found, want.detach(), rtol=0, atol=EXACT)
            continue
        found = form(query[:, :, places], key, value, forest, 0.3, held)
        torch.testing.assert_close(found, want, rtol=0, atol=EXACT)
        pulled = (torch.autograd.grad((out * push).sum(), given) for out in (found, want))
        for ours, theirs in zip(*pulled, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=EXACT)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_sees_the_same_pairs() -> None:
    """Its eager form has no gradient off a GPU, and makes all scores."""
    forest = tree(3)
    given = [x.detach() for x in inputs(forest, 4, 2)]
    torch.testing.assert_close(flex(*given, forest, 0.3), by_hand(*given, forest, 0.3), rtol=0, atol=EXACT)


def listed(mask: Any, kind: str) -> list[list[int]]:
    """The blocks of each row (`kv`) or column (`q`), in their order."""
    counts, indices = getattr(mask, f"{kind}_num_blocks")[0, 0], getattr(mask, f"{kind}_indices")[0, 0]
    return [row[:n].tolist() for row, n in zip(indices, counts.tolist(), strict=True)]


@pytest.mark.parametrize("size", [1, 2, 4, 16, 128])
def test_block_lists_are_those_that_the_mask_of_all_pairs_gives(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against torch's own builder, which makes that mask; forests of many shapes, also of lengths that no block divides."""
    monkeypatch.setattr(tree_attention, "FLEX_BLOCK", size)
    for seed in range(40):
        forest = tree(seed, rows=1 + seed % 12, multiple=1 + seed % 3)
        length = len(forest.leave)
        for held in (None, ((0, length // 2),), ((length // 4, length // 2), (length - length // 4, length))):
            queries = sum(last - first for first, last in held or ((0, length),))
            found = tree_attention._masks(forest.leave, held)
            want = create_block_mask(found.mask_mod, None, None, queries, length, device="cpu", BLOCK_SIZE=size)
            assert found.seq_lengths == want.seq_lengths == (queries, length)
            for kind in ("kv", "full_kv", "q", "full_q"):
                if held is None or "full" in kind or len(held) == 1:
                    assert listed(found, kind) == listed(want, kind), (seed, held, kind)
                else:  # a block over the gap between two ranges may be tried in vain
                    for ours, theirs in zip(listed(found, kind), listed(want, kind), strict=True):
                        assert set(theirs) <= set(ours)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor made under it."""

    found = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        self.found = max(
            [self.found, *(x.numel() * x.element_size() for x in tree_iter(made) if isinstance(x, Tensor))]
        )
        return made


def test_the_mask_of_131072_tokens_takes_megabytes() -> None:
    """1,024 blocks a side: a list of all their pairs is 4 MiB of int32, and sorting makes it 8."""
    size, trunk = 131_072, 65_536
    leave = torch.arange(size) + 1
    leave[:trunk] = size
    for first in range(trunk, size, 512):
        leave[first : first + 512] = first + 512
    with Largest() as watched:
        mask = tree_attention._masks(leave)
    assert watched.found <= 8 << 20
    assert mask.seq_lengths == (size, size) and int(mask.full_kv_num_blocks.sum()) > int(mask.kv_num_blocks.sum())


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_lower_precisions_are_as_exact_as_their_dtype(kind: torch.dtype) -> None:
    forest = tree(1, rows=20)
    given = inputs(forest, 4, 2)
    low = [x.detach().to(kind).requires_grad_() for x in given]
    push = torch.randn(given[0].shape, dtype=torch.float64)
    want = run(by_hand, [x.detach().double().requires_grad_() for x in low], forest, push.to(kind).double())
    for found, exact in zip(run(attend, low, forest, push.to(kind)), want, strict=True):
        assert found.dtype == kind
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=20 * torch.finfo(kind).eps)


def wrong_by_one(forest: Forest, by: int) -> Forest:
    """The branching points moved along the trunk."""
    return replace(forest, forks=tuple(Fork(a, b, c, max(d + by, c + 1)) for a, b, c, d in forest.forks))


@pytest.mark.parametrize("by", [-1, 1])
def test_a_branching_point_that_is_off_by_one_is_seen(by: int) -> None:
    forest = tree(2)
    given = [x.detach() for x in inputs(forest, 4, 2)]
    apart = blocks(*given, wrong_by_one(forest, by), 0.3) - dense(*given, forest, 0.3)
    assert forest.forks and float(apart.abs().max()) > 1e-3


def test_nothing_is_kept_for_each_branch() -> None:
    """Of a trunk with 30 branches, what is saved for the backward pass is the stream alone."""
    prompt = list(range(200))
    forest = lay_out(range(30), [prompt] * 30, [[i, 7, 8] for i in range(30)])
    given = inputs(forest, 4, 2)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        blocks(*given, forest, 0.3)
    assert sum(kept) == sum(x.numel() for x in given) + given[0].numel() * 9 // 8
