"""What a trace notices: each mutant is one mistake, and the trace of the same slice without it is good."""

from __future__ import annotations

import pytest
from mutant import MUTANTS
from traced import ROOT, run

SHARED = ("pivotrl/pivotrl-nemotron-3-super-120b-a12b-64n8g-tp8cp16ep8-swe", "MEM*")
STAGES = ("pivotrl/pivotrl-qwen3-30b-a3b-thinking-16n8g-tp2pp2cp4ep8-swe", "EEEEEE")
DENSE = ("pivotrl/pivotrl-qwen3-8b-1n8g-tp2-conversational", "DDDDDD")
KEPT = ("llmdoctor/llmdoctor-tulu-2-70b-1n8g-tp8-ultrafeedback", "DDDD")
FP8 = ("pivotrl/pivotrl-qwen3-8b-1n8g-tp2-conversational-fp8", "DDDDDD", "plan.mean_prompt_tokens=6001")
CASES: dict[str, tuple[str, ...]] = {
    "shapes between stages are not told": STAGES,
    "squared relu without fusion": SHARED,
    "swiglu without fusion": KEPT,
    "rotary embedding without fusion": DENSE,
    "permutation without fusion": STAGES,
    "a norm that is not cut over the sequence": DENSE,
    "weights in float32": DENSE,
    "gradients in float32": SHARED,
    "an optimiser that is not distributed": DENSE,
    "a key missing in the name map": DENSE,
    "layers that are not recomputed": SHARED,
    "a mask of all queries": SHARED,
    "routing that is kept": STAGES,
    "FP8 rows that are not padded": FP8,
    "logits of all positions at once": DENSE,
}


@pytest.mark.parametrize("case", sorted(set(CASES.values())), ids=lambda case: case[0])
def test_without_a_mutant_the_trace_is_good(case: tuple[str, ...]) -> None:
    recipe, layers, *overrides = case
    found = run(ROOT / f"recipes/{recipe}.yaml", *overrides, layers=layers)
    assert found.code == 0, found.off() if found.answer else found.error[-2000:]


def test_every_mutant_has_a_case() -> None:
    assert CASES.keys() == MUTANTS.keys()


@pytest.mark.parametrize("name", CASES)
def test_a_mutant_is_noticed(name: str) -> None:
    recipe, layers, *overrides = CASES[name]
    found = run(ROOT / f"recipes/{recipe}.yaml", *overrides, layers=layers, mutant=name)
    assert found.code != 0, found.answer.get("lines")
    noticed = (
        found.off() + found.answer["traced"]["broken_fp8"] + found.answer["traced"]["unmapped"] if found.answer else []
    )
    assert noticed or "Error" in found.error or "DynamicOutputShapeException" in found.error, found.error[-2000:]
    print(f"\n{name}: {', '.join(noticed) or found.error.strip().splitlines()[-1][:150]}")
