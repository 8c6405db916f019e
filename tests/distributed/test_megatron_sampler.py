"""Rollouts from Megatron weights: the reference backend's samples, whatever the layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sample_jobs
import tiny_hf
from support.workers import Workers

from nemo_pivotrl.backends.sampling import shares
from nemo_pivotrl.core.types import FailedSample

TP, PP, EP = (f"{axis}_model_parallel_size" for axis in ("tensor", "pipeline", "expert"))
CP, SP = "context_parallel_size", {"sequence_parallel": True}
KINDS = ["plain", "cold", "nucleus", "greedy"]
CASES: list[tuple[str, int, dict[str, Any], list[str]]] = [
    ("qwen3", 1, {}, KINDS),
    ("qwen3", 2, {TP: 2}, KINDS),
    ("qwen3", 2, {TP: 2, **SP}, ["plain"]),
    ("qwen3", 4, {TP: 4, **SP}, ["plain"]),
    ("qwen3", 2, {PP: 2}, KINDS),
    ("qwen3", 2, {}, KINDS),
    ("qwen3", 2, {CP: 2}, ["plain"]),
    ("qwen3", 4, {TP: 2, PP: 2, **SP}, ["plain"]),
    ("llama_tied", 2, {PP: 2}, ["plain"]),
    ("qwen3_moe", 2, {EP: 2}, ["plain", "cold"]),
    ("qwen3_moe", 4, {TP: 2, EP: 2, **SP}, ["plain"]),
    ("nemotron_h", 1, {}, ["plain"]),
    ("nemotron_h", 2, {TP: 2, **SP}, ["plain"]),
    ("nemotron_h", 2, {PP: 2}, ["plain"]),
    ("nemotron_h", 2, {EP: 2}, ["plain", "greedy"]),
]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(folder, the reference backend's samples) of a model and a way to sample, made when first asked for."""
    folders: dict[str, Path] = {}
    answers: dict[tuple[str, str, int], Any] = {}

    def get(name: str, kind: str, number: int = 5) -> tuple[Path, Any]:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("hf") / name
            tiny_hf.make(name, folders[name])
        if (name, kind, number) not in answers:
            answer = sample_jobs.slowly if name == "nemotron_h" else sample_jobs.reference
            answers[name, kind, number] = answer(str(folders[name]), kind, number)
        return folders[name], answers[name, kind, number]

    return get


def same(found: Any, want: Any) -> None:
    """Equal tokens and reasons, log-probabilities equal to rounding."""
    assert [[(s.token_ids, s.finish_reason) for s in g] for g in found] == [
        [(s.token_ids, s.finish_reason) for s in g] for g in want
    ]
    for ours, theirs in zip(found, want, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.log_probs == pytest.approx(other.log_probs, abs=2e-4)


@pytest.mark.parametrize(("name", "ranks", "layout", "kinds"), CASES)
def test_samples_are_those_of_the_reference_backend(
    workers: Workers, expected: Any, name: str, ranks: int, layout: dict[str, Any], kinds: list[str]
) -> None:
    folder, plain = expected(name, "plain")
    lengths = {len(s.token_ids) for group in plain for s in group}
    assert len(lengths) > 4 and {s.finish_reason for group in plain for s in group} == {"stop", "length"}
    for answer in workers.run(ranks, "sample_jobs:sample", folder=str(folder), layout=layout, kinds=kinds):
        for kind in kinds:
            same(answer["found"][kind], expected(name, kind)[1])
        for row, one in zip(answer["log_probs"], answer["flat"], strict=True):
            assert row[: len(one.token_ids)].tolist() == pytest.approx(one.log_probs, abs=2e-4)
        assert answer["ticks"] > 12 and not answer["left"]


def test_sampling_leaves_training_as_it_was_and_sees_what_training_did(workers: Workers, expected: Any) -> None:
    """Sampled, stepped, sampled again: the samples are those of the exported policy."""
    for layout in ({TP: 2, **SP}, {}):
        folder, before = expected("qwen3", "plain")
        given = {"folder": str(folder), "layout": layout, "kinds": ["plain"], "steps": 2}
        (unsampled, _) = workers.run(2, "sample_jobs:sample", between=False, **given)
        answers = workers.run(2, "sample_jobs:sample", **given)
        after = sample_jobs.reference(str(folder / "stepped"), "plain")
        assert [s.log_probs for g in after for s in g] != [s.log_probs for g in before for s in g]
        for answer in answers:
            same(answer["found"]["plain"], after)
            assert answer["found"] == unsampled["found"]  # to the bit: sampling left nothing behind


def test_few_prompts_are_shared_out_by_row_and_ranks_may_stay_without(workers: Workers, expected: Any) -> None:
    folder, want = expected("qwen3_moe", "plain", 1)
    for ranks, layout in ((2, {EP: 2}), (4, {EP: 2}), (4, {})):
        for answer in workers.run(
            ranks, "sample_jobs:sample", folder=str(folder), layout=layout, kinds=["plain"], number=1
        ):
            same(answer["found"]["plain"], want)


@pytest.mark.parametrize(
    ("name", "ranks", "layout"), [("qwen3", 1, {}), ("qwen3_moe", 2, {EP: 2}), ("qwen3", 2, {PP: 2})]
)
def test_logits_that_are_no_numbers_are_drawn_again_alone_and_then_a_failure(
    workers: Workers, expected: Any, name: str, ranks: int, layout: dict[str, Any]
) -> None:
    folder, want = expected(name, "plain")
    given = {"folder": str(folder), "layout": layout}
    for answer in workers.run(ranks, "sample_jobs:spoilt", always=False, **given):
        same(answer, want)
    for answer in workers.run(ranks, "sample_jobs:spoilt", always=True, **given):
        rows = [s for group in answer for s in group]
        lost = [s for s in rows if isinstance(s, FailedSample)]
        assert 0 < len(lost) < len(rows) and {s.kind for s in lost} == {"sampler_not_finite"}


def test_every_row_is_dealt_once_within_the_budget() -> None:
    """`equal` keeps lengths apart."""
    given, seeds = sample_jobs.prompts(), sample_jobs.seeds()
    for ranks in (1, 2, 3, 20):
        for equal in (False, True):
            plan = shares(given, seeds, sample_jobs.GENERATIONS["plain"], ranks, equal)
            rows = [row for share in plan for chunk in share for row in chunk]
            assert sorted(rows) == [(p, k) for p, own in enumerate(seeds) for k in range(len(own))]
            for chunk in (c for share in plan for c in share):
                assert max(len(given[p]) + 12 for p, _ in chunk) * len(chunk) <= 120 or len(chunk) == 1
                assert not equal or len({len(given[p]) for p, _ in chunk}) == 1
