"""The step for NVIDIA-NeMo/Nemotron: its manifest and header follow that repository's schema, and it runs."""

import ast
import json
import re
import tomllib
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from support.processes import run
from support.recipes import ROOT

from nemo_pivotrl.config.load import load_recipe
from nemo_pivotrl.config.nemo_aligner import register_resolver
from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.data.gym_rows import candidate_to_row
from nemo_pivotrl.data.states import candidates_of
from nemo_pivotrl.integrations.nemotron_step import manifest_entry, register_resolvers
from nemo_pivotrl.pivotrl.extract import extract

STEP = ROOT / "deploy/nemotron/rl/pivotrl"
TYPES = {"training_jsonl", "checkpoint_hf", "checkpoint_megatron", "checkpoint_lora", "packed_parquet", "eval_results"}
"""Of those in Nemotron's types.toml (e27b3713)."""


def runspec() -> dict[str, object]:
    """The header of step.py, read as Nemotron reads it."""
    text = (STEP / "step.py").read_text()
    (block,) = re.findall(r"^# /// script\s*\n((?:#[^\n]*\n)*?)# ///$", text, flags=re.MULTILINE)
    return tomllib.loads("\n".join(line[2:] for line in block.splitlines()))["tool"]["runspec"]  # type: ignore[no-any-return]


def test_the_manifest_has_the_fields_and_types_of_a_step() -> None:
    made = tomllib.loads((STEP / "step.toml").read_text())
    assert set(made) <= {"step", "consumes", "produces", "parameters", "strategies", "errors", "models", "reference"}
    assert set(made["step"]) == {"id", "name", "category", "description", "tags"}
    assert made["step"]["id"] == "/".join(STEP.parts[-2:]) and made["step"]["category"] == STEP.parts[-2]
    assert {entry["type"] for section in ("consumes", "produces") for entry in made[section]} <= TYPES
    assert [e["type"] for e in made["consumes"] if e["required"]] == ["training_jsonl", "checkpoint_hf"]
    assert all(set(entry) == {"when", "then"} for entry in made["strategies"]) and len(made["strategies"]) >= 2
    assert all(set(entry) == {"name", "recovery"} for entry in made["errors"])


def test_a_parameters_default_is_the_recipes_own() -> None:
    plain = load_recipe(str(STEP / "config/test.yaml"), ["profile.num_generations=16", "select.lambda_diff=0.6"])
    for parameter in tomllib.loads((STEP / "step.toml").read_text())["parameters"]:
        section, name = parameter["name"].split(".")
        usual = {f.name: f.default for f in type(getattr(plain, section)).__dataclass_fields__.values()}[name]
        assert usual == parameter["default"], parameter["name"]


def test_the_header_is_a_runspec() -> None:
    spec = runspec()
    assert set(spec) == {"schema", "name", "image", "setup", "run", "config", "resources"} and spec["schema"] == "1"
    assert spec["run"]["launch"] in ("torchrun", "ray", "direct")  # type: ignore[index]
    assert (STEP / spec["config"]["dir"] / f"{spec['config']['default']}.yaml").exists()  # type: ignore[index]
    assert len(ast.parse((STEP / "step.py").read_text()).body) <= 4  # a thin step


@pytest.mark.parametrize("name", ["default", "tiny", "test"])
def test_every_config_is_a_recipe_with_nemotrons_section_beside(name: str, tmp_path: Path) -> None:
    register_resolver("art", lambda artefact, field: f"/artefacts/{artefact}/{field}")
    try:
        recipe = load_recipe(str(STEP / f"config/{name}.yaml"), [f"run_dir={tmp_path}"], beside=("run",))
    finally:
        OmegaConf.clear_resolver("art")
    if name == "default":
        assert (
            recipe.extract.trajectories == ("/artefacts/data/train",)
            and recipe.policy.model_name == "/artefacts/model/path"
        )
        with pytest.raises(InputError, match="run"):  # without `beside` an unknown section stays an error
            load_recipe(str(STEP / "config/default.yaml"), ["extract.trajectories=[a]", "policy.model_name=b"])


def test_a_manifests_entry_is_found_or_named(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"train": "/t.jsonl", "val": "", "source": "../s.jsonl"}))
    assert manifest_entry(str(tmp_path), "train") == "/t.jsonl"
    assert manifest_entry(str(tmp_path), "source") == f"{tmp_path}/../s.jsonl"
    with pytest.raises(InputError, match="missing or empty"):
        manifest_entry(str(tmp_path), "val")
    with pytest.raises(InputError, match="run data preparation first"):
        manifest_entry(str(tmp_path / "nowhere"), "train")


@pytest.mark.slow
def test_the_step_runs_and_what_it_produces_it_can_consume(tmp_path: Path) -> None:
    words = [str(STEP / "step.py"), "--config", str(STEP / "config/test.yaml"), "grpo.max_num_steps=1"]
    done = run(*words, env={"RL_OUTPUT_DIR": str(tmp_path)})
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "pivotrl-test"
    model = json.loads((folder / "pivotrl/policy/metadata.json").read_text())
    assert model["type"] == "ModelArtifact" and model["step"] == 1 and Path(model["path"]) == folder / "pivotrl/policy"
    assert (folder / "pivotrl/policy/config.json").exists()
    manifest = json.loads((folder / "nemotron/manifest.json").read_text())

    register_resolvers(str(STEP / "config/test.yaml"))
    taken = f"extract.trajectories=['${{manifest:{folder}/nemotron,train}}']"
    again = load_recipe(
        str(STEP / "config/test.yaml"), [f"run_dir={tmp_path}/again", "extract.format=responses", taken]
    )
    extract(again)
    rows = [candidate_to_row(c, "agent") for c in candidates_of(tmp_path / "again/candidates.jsonl")]
    assert len(rows) == manifest["train_rows"] > 0
    first = json.loads((folder / "nemotron" / manifest["train"]).read_text().splitlines()[0])
    same = [row for row in rows if row["responses_create_params"] == first["responses_create_params"]]
    assert same and same[0]["expected_action"] == first["expected_action"]
