"""Attention over forests by kernels for packed sequences, whose libraries are emulated, against all other forms, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given as drawn, settings, strategies as st
from support import varlen_libraries
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from nemo_pivotrl.algorithms.prefix_tree import Forest, lay_out
from nemo_pivotrl.backends import tree_attention, varlen_attention
from nemo_pivotrl.backends.traced.ledger import Ledger
from nemo_pivotrl.backends.tree_attention import attend, blocks, check_form, dense, flex, rectangles
from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.sizing.memory import calls_bytes

EXACT = 1e-12
NAMES = sorted(varlen_attention.KERNELS)


@pytest.fixture(autouse=True)
def libraries() -> Iterator[None]:
    with varlen_libraries.installed():
        yield


def forest_of(rows: list[tuple[list[int], list[int]]], multiple: int = 1) -> Forest:
    prompts, responses = zip(*rows, strict=True)
    return lay_out(range(len(rows)), prompts, responses, multiple)


GROUP = forest_of([([1, 2, 3, 4, 5], [i, 7, i, 8]) for i in range(4)])
TRAJECTORY = forest_of(
    [([1, 2, 3, 4, 5, 6, 7][:n], [i, 9, 1, i]) for n in (2, 5, 7) for i in range(3)] + [([3, 3], [1, 2])], 4
)


def inputs(forest: Forest, heads: int = 4, groups: int = 2, seed: int = 0) -> list[Tensor]:
    maker, size = torch.Generator().manual_seed(seed), len(forest.tokens)
    shapes = [(1, heads, size, 8), (1, groups, size, 8), (1, groups, size, 8)]
    return [torch.randn(s, generator=maker, dtype=torch.float64).requires_grad_() for s in shapes]


def apart(forms: list[Any], given: list[Tensor], forest: Forest, held: Any = None, scale: float = 0.3) -> float:
    """The largest difference of forms from the first, of outputs and of all gradients."""
    query, *rest = given
    if held is not None:
        query = query[:, :, torch.cat([torch.arange(*r) for r in held])]
    push = torch.randn(query.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for form in forms:
        out = form(query, *rest, forest, scale, held)
        found.append([out.detach(), *torch.autograd.grad((out * push).sum(), given, retain_graph=True)])
    return max(float((a - b).abs().max()) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def by(name: str) -> Any:
    return lambda *given: attend(*given, form=name)


IDS = st.lists(st.integers(0, 2), min_size=1, max_size=9)
FORESTS = st.builds(forest_of, st.lists(st.tuples(IDS, IDS), min_size=1, max_size=8), st.sampled_from([1, 4, 8]))
SHAPES = st.sampled_from([(4, 4), (4, 2), (6, 1)])


@settings(deadline=None, max_examples=60)
@drawn(FORESTS, SHAPES, st.integers(0, 99))
def test_all_forms_are_one_function_over_any_forest(forest: Forest, heads: tuple[int, int], seed: int) -> None:
    given = inputs(forest, *heads, seed)
    assert apart([dense, blocks, *map(by, NAMES)], given, forest) < EXACT


@settings(deadline=None, max_examples=60)
@drawn(FORESTS, st.data())
def test_all_forms_agree_on_a_context_parallel_ranks_queries(forest: Forest, data: st.DataObject) -> None:
    """Ranges that begin and end anywhere, as a rank's two do."""
    size = len(forest.tokens)
    cuts = sorted(data.draw(st.lists(st.integers(0, size), min_size=4, max_size=4)))
    held = tuple(pair for pair in ((cuts[0], cuts[1]), (cuts[2], cuts[3])) if pair[0] < pair[1])
    if held:
        assert apart([dense, blocks, *map(by, NAMES)], inputs(forest), forest, held) < EXACT


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_the_same_forward() -> None:
    """Its eager form has no gradient off a GPU."""
    for forest in (GROUP, TRAJECTORY):
        given = [x.detach() for x in inputs(forest)]
        want = flex(*given, forest, 0.3)
        assert all(float((attend(*given, forest, 0.3, form=n) - want).abs().max()) < EXACT for n in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    given = [x.detach()[..., :3].clone().requires_grad_() for x in inputs(GROUP, 2, 1)]
    assert torch.autograd.gradcheck(lambda *x: attend(*x, GROUP, 0.3, form=name), given)


@pytest.mark.parametrize("name", NAMES)
def test_one_call_takes_all_segments_and_one_each_fork(name: str) -> None:
    """The 16 segments of a group are one call, and what hangs on the trunk is one more."""
    varlen_libraries.CALLED.clear()
    forest = forest_of([(list(range(9)), [i, 7]) for i in range(16)])
    with torch.no_grad():
        attend(*inputs(forest), forest, 0.3, form=name)
    assert {name: 2} == varlen_libraries.CALLED and len(forest.segments) == 16


@pytest.mark.parametrize("name", NAMES)
def test_a_backward_pass_with_a_calls_own_log_sum_exp_is_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What autograd would make of the sum of calls if the kernels' log-sum-exp were taken for a constant: seen by the test above."""
    kind = varlen_attention.KERNELS[name]
    right = kind.backward

    def own(
        self: Any, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, top: Tensor, of: Any, scale: float
    ) -> Any:
        out, top = self.forward(q, k, v, of, scale)
        return right(self, grad, q, k, v, out, top.contiguous(), of, scale)

    monkeypatch.setattr(kind, "backward", own)
    assert apart([dense, by(name)], inputs(GROUP), GROUP) > 1e-2


def test_a_fork_that_is_taken_for_causal_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    tree_attention._calls.cache_clear()
    make = varlen_attention.Sequences
    monkeypatch.setattr(varlen_attention, "Sequences", lambda *given, causal: make(*given, causal=True))
    forest = forest_of([(list(range(9)), [i, 7, 1]) for i in range(3)])
    assert apart([dense, by("torch")], inputs(forest), forest) > 1e-2
    tree_attention._calls.cache_clear()


def test_nothing_is_kept_for_each_branch() -> None:
    prompt = list(range(200))
    forest = forest_of([(prompt, [i, 7, 8]) for i in range(30)])
    given, kept = inputs(forest), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        attend(*given, forest, 0.3, form="torch")
    assert sum(kept) == sum(x.numel() for x in given) + given[0].numel() * 9 // 8


def test_a_ranks_calls_hold_no_more_keys_than_its_squares_need() -> None:
    """The squares' keys are those of the queries that are held, joined where they touch."""
    held = ((2, 5), (5, 9))
    made = varlen_attention.calls(*rectangles(GROUP.segments, GROUP.forks, held), torch.device("cpu"))
    assert made.own == ((2, 9),) and made.squares.queries[-1] == 7


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_summed_in_float32(name: str) -> None:
    given = inputs(TRAJECTORY)
    low = [x.detach().bfloat16().requires_grad_() for x in given]
    out = attend(*low, TRAJECTORY, 0.3, form=name)
    want = dense(*(x.detach().double() for x in low), TRAJECTORY, 0.3)
    assert out.dtype == torch.bfloat16 and float((out.detach().double() - want).abs().max()) < 0.03
    assert all(g.dtype == torch.bfloat16 for g in torch.autograd.grad(out.sum(), low))


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("trunk", [2000, 6192, 7900])
def test_the_backward_pass_takes_what_plan_counts(trunk: int, ranks: int) -> None:
    """Without numbers, with float32 sums of the queries' gradient as the kernel makes them, by bytes that live at a time."""
    heads, groups, width = 32, 2, 128
    rows = [(list(range(trunk)), [i] * ((8192 - trunk) // 16)) for i in range(16)]
    forest = forest_of(rows, 8)
    size = len(forest.tokens)
    piece = size // (2 * ranks)
    held = None if ranks == 1 else ((0, piece), (size - piece, size))
    made = varlen_attention.calls(*rectangles(forest.segments, forest.forks, held), torch.device("cpu"))

    class WithSums(varlen_attention.TorchFlash):
        def backward(self, grad: Tensor, query: Tensor, *rest: Any) -> Any:
            sums = query.new_empty(len(query) + 128 * (len(rest[4].queries) - 1), heads, width, dtype=torch.float32)
            found = super().backward(grad, query, *rest)
            del sums
            return found

    with FakeTensorMode(allow_non_fake_inputs=True):
        ledger = Ledger()
        with ledger:
            shapes = [(size // ranks, heads, width), (size, groups, width), (size, groups, width)]
            given = [torch.empty(s, dtype=torch.bfloat16).requires_grad_() for s in shapes]
            out = varlen_attention.attend_by_calls(*given, made, 0.3, WithSums())
            push = torch.empty_like(out)
            before = ledger.now
            ledger.restart()
            torch.autograd.grad(out, given, push)
        found = (ledger.peak - before) / len(out)
    planned = calls_bytes(heads * width, groups * width, ranks)
    assert 0.75 * planned < found < planned


CASES = [
    (("flex", False, 64, torch.bfloat16), "flex, on a CPU"),
    (("torch", False, 64, torch.bfloat16), "torch, on a CPU"),
    (("torch", True, 20, torch.bfloat16), "heads of 20"),
    (("flash_attn_2", True, 64, torch.float32), "in float32"),
]


@pytest.mark.parametrize(("asked", "found"), CASES)
def test_what_does_not_run_is_refused_by_name(asked: tuple[Any, ...], found: str) -> None:
    with pytest.raises(InputError, match=rf"policy\.prefix_attention: found .*{found}"):
        check_form(*asked, "policy.prefix_attention")


@pytest.mark.parametrize("name", ["flash_attn_2", "flash_attn_3", "transformer_engine"])
def test_a_library_that_is_not_there_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_form(name, True, 64, torch.bfloat16, "policy.prefix_attention")
    varlen_attention.kernel.cache_clear()
    for module in varlen_libraries.modules():
        monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(InputError, match=rf"{name}, which is not there\n.*use flex, or install"):
        check_form(name, True, 64, torch.bfloat16, "policy.prefix_attention")


def test_auto_and_flex_run_where_they_did() -> None:
    check_form("auto", False, 20, torch.float64, "policy.prefix_attention")
    check_form("flex", True, 20, torch.float32, "policy.prefix_attention")
