"""What `trace` refuses by name, how it compares, and the one precision of plan, serve and engine. The traces themselves need
Transformer Engine's sources: `make trace`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_pivotrl.backends.traced import sources
from nemo_pivotrl.cli import main
from nemo_pivotrl.config.load import load_recipe
from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.tools.plan_models import shape_of
from nemo_pivotrl.tools.serve import command
from nemo_pivotrl.tools.trace import Line, refused

RECIPES = Path(__file__).resolve().parents[3] / "recipes"
GPU_RECIPES = sorted([*RECIPES.glob("pivotrl/*8g*.yaml"), *RECIPES.glob("llmdoctor/llmdoctor-*.yaml")])
HYBRID = RECIPES / "pivotrl/pivotrl-nemotron-3-super-120b-a12b-64n8g-tp8cp16ep8-swe.yaml"


def test_without_the_sources_the_command_says_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(sources.VARIABLE, str(tmp_path))
    assert main(["trace", str(HYBRID)]) == 2
    told = capsys.readouterr().err
    assert "without transformer_engine, mamba_ssm, causal_conv1d" in told and "make trace-sources" in told


def test_sources_without_a_version_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in sources.PACKAGES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text('__version__ = "2.3"\n')
    monkeypatch.setenv(sources.VARIABLE, str(tmp_path))
    assert sources.find() == tmp_path
    with pytest.raises(InputError, match="no version of transformer_engine"):
        sources.versions(tmp_path)
    (tmp_path / "transformer_engine-2.15.0.dist-info").mkdir()
    assert sources.versions(tmp_path) == {"transformer_engine": "2.15.0", "mamba_ssm": "2.3", "causal_conv1d": "2.3"}


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("policy.backend=reference", "policy.backend"),
        ("megatron.cpu=true", "megatron.cpu"),
        ("megatron.moe_token_dispatcher_type=flex", "megatron.moe_token_dispatcher_type"),
        ("megatron.moe_grouped_gemm=false", "megatron.moe_grouped_gemm"),
        ("megatron.fp8_recipe=mxfp8", "megatron.fp8_recipe"),
        ("megatron.fp8_param=true", "megatron.fp8_param"),
    ],
)
def test_what_cannot_be_traced_is_refused_by_name(override: str, field: str) -> None:
    recipe = load_recipe(str(HYBRID), [override, "megatron.fp8=hybrid"])
    shape, _ = shape_of(recipe.policy.model_name, recipe)
    assert [p.field for p in refused(recipe, "policy", shape, 0, "")] == [field]


def test_a_rank_and_layers_that_are_not_there_are_refused() -> None:
    recipe = load_recipe(str(HYBRID), [])
    shape, _ = shape_of(recipe.policy.model_name, recipe)
    assert refused(recipe, "policy", shape, 255, "ME*-") == []
    assert [p.field for p in refused(recipe, "policy", shape, 256, "MD")] == ["--rank", "--layers"]


def test_a_figure_is_close_within_a_tenth_of_the_trace() -> None:
    assert Line("a", 10.0, 10.9).close and not Line("a", 10.0, 11.1).close and not Line("a", 10.0, 8.9).close
    assert Line("a", 0.0, 0.04).close and not Line("a", 0.0, 0.06).close  # 0.05 GiB is nothing


@pytest.mark.parametrize("path", GPU_RECIPES, ids=lambda path: path.stem)
def test_a_gpu_recipes_server_computes_in_bfloat16_as_the_plan_counts(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(str(path), [])
    served = recipe.patient if recipe.algorithm == "llmdoctor" else recipe.policy
    uses_vllm = served.backend == "vllm" or getattr(served, "sampler", "") == "vllm"
    if not uses_vllm:
        pytest.skip("nothing is served")
    monkeypatch.chdir(tmp_path)
    (tmp_path / served.model_name).mkdir(parents=True)
    (tmp_path / served.model_name / "config.json").write_text(json.dumps({"max_position_embeddings": 2**20}))
    recipe = replace(recipe, decode=replace(recipe.decode, doctors={}))  # whose folders would have to be models
    arguments, _ = command(recipe, "127.0.0.1", 8000, refit=False)
    assert arguments[arguments.index("--dtype") + 1] == "bfloat16"
