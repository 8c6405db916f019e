"""Every reason to refuse FP8, on machines that this one is not; and the fields that reach Megatron."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_pivotrl.backends.installed import probe, which_apex
from nemo_pivotrl.config import Megatron
from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.sizing.precision import Probe, check_fp8, fp8_fields, mamba_projection, require_fp8, token_multiple

HOPPER = Probe("2.8.0", "", (12, 9), (9, 0), "nvidia")
BLACKWELL = replace(HOPPER, capability=(10, 0))
FP8 = Megatron(fp8="hybrid")
DELAYED = replace(FP8, fp8_recipe="delayed", first_last_layers_bf16=False)


@pytest.mark.parametrize("request_", [FP8, DELAYED, replace(FP8, fp8_recipe="blockwise"), replace(FP8, fp8_param=True)])
def test_a_hopper_machine_is_not_refused(request_: Megatron) -> None:
    assert check_fp8(request_, HOPPER, {"hidden size": 4096}) == []


def test_no_request_is_never_refused() -> None:
    assert check_fp8(Megatron(), Probe()) == [] and fp8_fields(Megatron()) == {} and token_multiple(Megatron()) == 1


REFUSED = {
    "not installed": (FP8, replace(HOPPER, transformer_engine=None), "is not installed", "silently train in bf16"),
    "broken": (
        FP8,
        replace(HOPPER, transformer_engine=None, transformer_engine_error="RuntimeError: Found empty meta package"),
        "cannot be imported (RuntimeError: Found empty",
        "silently",
    ),
    "old engine": (
        replace(FP8, fp8_recipe="blockwise"),
        replace(HOPPER, transformer_engine="2.2.0.dev0+a1"),
        "2.2.0.dev0",
        "2.3",
    ),
    "CPU build": (FP8, replace(HOPPER, cuda=None, capability=None), "a CPU build of torch", "fp8=none"),
    "no GPU": (FP8, replace(HOPPER, capability=None), "no visible GPU", "fp8=none"),
    "Ampere": (FP8, replace(HOPPER, capability=(8, 0)), "8.0", "Hopper"),
    "Ada": (FP8, replace(HOPPER, capability=(8, 9)), "8.9", "Hopper"),
    "old CUDA": (replace(FP8, fp8_recipe="blockwise"), replace(HOPPER, cuda=(12, 8)), "CUDA 12.8", "12.9"),
    "mxfp8 on Hopper": (replace(FP8, fp8_recipe="mxfp8"), HOPPER, "9.0", "tensorwise"),
    "mxfp8 on consumer Blackwell": (
        replace(FP8, fp8_recipe="mxfp8"),
        replace(HOPPER, capability=(12, 0)),
        "12.0",
        "mxfp8",
    ),
    "param without fp8": (Megatron(fp8_param=True), HOPPER, "true", "set megatron.fp8"),
    "param without its optimizer": (
        replace(FP8, fp8_param=True, use_distributed_optimizer=False),
        HOPPER,
        "without the distributed optimizer",
        "use_distributed_optimizer",
    ),
    "outer layers with delayed": (replace(DELAYED, first_last_layers_bf16=True), HOPPER, "delayed", "tensorwise"),
    "fp32": (replace(FP8, bf16=False), HOPPER, "false", "bf16"),
    "cpu": (replace(FP8, cpu=True), HOPPER, "megatron.cpu", "fp8=none"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_each_refusal_says_what_and_what_to_do(name: str) -> None:
    request_, machine, found, remedy = REFUSED[name]
    (problem,) = check_fp8(request_, machine)
    assert found in problem.found and remedy in problem.remedy and problem.field.startswith("megatron.")
    with pytest.raises(InputError):
        require_fp8(request_, machine)


def test_mxfp8_is_for_blackwell() -> None:
    assert check_fp8(replace(FP8, fp8_recipe="mxfp8"), BLACKWELL) == []


def test_dimensions_are_multiples_of_16_on_every_rank() -> None:
    nemotron = mamba_projection(heads=128, head_dim=64, groups=8, state=128)
    assert nemotron == 2 * 8192 + 2 * 1024 + 128
    assert check_fp8(FP8, HOPPER, {"Mamba input projection": nemotron // 8}) == []
    (problem,) = check_fp8(FP8, HOPPER, {"Mamba input projection": mamba_projection(9, 64, 1, 16), "MLP": 64})
    assert problem.found == f"Mamba input projection of {2 * 576 + 32 + 9}" and "multiple of 16" in problem.remedy


def test_everything_wrong_is_said_at_once() -> None:
    problems = check_fp8(replace(DELAYED, first_last_layers_bf16=True, bf16=False), Probe())
    assert len(problems) == 4


@pytest.mark.filterwarnings("ignore:full scope is deprecated")
def test_fields_are_fields_of_transformer_config() -> None:
    transformer_config = pytest.importorskip("megatron.core.transformer.transformer_config")
    names = set(transformer_config.TransformerConfig.__dataclass_fields__)
    for request_ in (FP8, DELAYED):
        fields = fp8_fields(request_)
        assert set(fields) <= names
        made = transformer_config.TransformerConfig(num_layers=8, hidden_size=64, num_attention_heads=4, **fields)
        assert made.fp8 == "hybrid" and made.fp8_recipe == request_.fp8_recipe
    assert fp8_fields(FP8)["num_layers_at_start_in_bf16"] == 2 and fp8_fields(DELAYED)["fp8_amax_history_len"] == 1024


def test_tokens_are_padded_for_the_recipe() -> None:
    assert [token_multiple(replace(FP8, fp8_recipe=r)) for r in ("delayed", "tensorwise", "mxfp8", "blockwise")] == [
        16,
        16,
        32,
        128,
    ]


# ---- looking at a machine ----


def package(folder: Path, name: str, text: str = "", *parts: str) -> None:
    for part in ("", *parts):
        (folder / name / part).mkdir(parents=True, exist_ok=True)
        (folder / name / part / "__init__.py").write_text(text if not part else "")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("transformer_engine", "transformer_engine.pytorch", "apex"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield tmp_path
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        sys.modules.pop(name, None)


def test_an_engine_that_raises_anything_at_import_is_broken(installed: Path) -> None:
    package(installed, "transformer_engine", "raise RuntimeError('Found empty `transformer-engine` meta package')")
    found = probe()
    assert found.transformer_engine is None and found.transformer_engine_error.startswith("RuntimeError: Found empty")


def test_an_engine_that_imports_has_a_version(installed: Path) -> None:
    package(installed, "transformer_engine", "__version__ = '2.8.0+abc'", "pytorch")
    assert probe().transformer_engine == "2.8.0+abc" and probe().transformer_engine_error == ""


def test_pypis_apex_is_not_nvidias(installed: Path) -> None:
    package(installed, "apex", "raise RuntimeError('never imported')", "interfaces")
    assert which_apex() == "other"
    package(installed, "apex", "", "multi_tensor_apply")
    assert which_apex() == "nvidia"
