"""Every recipe that comes with the project: it loads, says nothing twice, fits the machines it names, and dry-runs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from support.recipes import ROOT

from nemo_pivotrl import cli
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.config.build import build
from nemo_pivotrl.config.load import _chain, load_recipe
from nemo_pivotrl.tools.plan import plan

FOLDER = ROOT / "recipes"
OURS = sorted(p for family in ("pivotrl", "llmdoctor") for p in (FOLDER / family).rglob("*.yaml"))
WHOLE = [p for p in OURS if p.parent.name != "base"]
NAME = re.compile(r"(pivotrl|llmdoctor)-[a-z0-9.-]+-\d+n\d+g(-(tp|pp|cp|ep|etp)[a-z0-9]*)?(-[a-z0-9]+)*")
SMALL = ("quickstart", "quickstart-full", "requests", "tiny", "tiny-loop", "smollm2-135m-cpu", "smollm2-135m-cpu-bfcl")


def ids(path: Path) -> str:
    return str(path.relative_to(FOLDER))


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """SmolLM2-135M's shape, where its recipes expect a checkpoint that a make target fetches."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("smollm2")
    LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ).save_pretrained(folder)
    return str(folder)


def overrides(path: Path, smollm2: str) -> list[str]:
    if "smollm2" not in path.name:
        return []
    return [f"warmup.init={smollm2}", f"patient.model_name={smollm2}", f"doctor.model_name={smollm2}"]


@pytest.mark.parametrize("path", WHOLE, ids=ids)
def test_a_recipe_fits_the_machines_it_names(path: Path, smollm2: str) -> None:
    verdict = plan(load_recipe(str(path), overrides(path, smollm2)))
    assert verdict.good, (verdict.problems, [(m.phase, m.peak, m.limit) for m in verdict.memory])
    assert len(verdict.memory) == (2 if "pivotrl" in path.parent.name else 3) and len(verdict.costs) == 2


@pytest.mark.parametrize("path", OURS, ids=ids)
def test_a_recipe_says_nothing_twice(path: Path) -> None:
    assert repeated(path) == []


def repeated(path: Path) -> list[str]:
    """Settings that the recipe would have without its own file, too."""
    *inherited, own = _chain(path, [])
    tree = OmegaConf.merge({}, *inherited)
    above = build(Recipe, OmegaConf.to_container(tree, resolve=True), str(path))
    before, after = dataclasses.asdict(above), dataclasses.asdict(load_recipe(str(path)))
    return [".".join(keys) for keys in leaves(OmegaConf.to_container(own)) if found(before, keys) == found(after, keys)]


def leaves(node: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Keys of every value that is no mapping."""
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*above, str(key)))
        else:
            yield (*above, str(key))


def found(tree: Any, keys: tuple[str, ...]) -> Any:
    """The value at `keys`; a new object where there is none, which equals nothing."""
    for key in keys:
        if not isinstance(tree, dict) or key not in tree:
            return object()
        tree = tree[key]
    return tree


def test_what_says_something_twice_is_found(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("policy: {optimizer: {lr: 3.0e-6}}\nselect: {limit: 7}\n")
    path = tmp_path / "child.yaml"
    path.write_text("defaults: base.yaml\npolicy: {optimizer: {lr: 3.0e-6, eps: 1.0e-8}}\nselect: {limit: 8}\n")
    assert repeated(path) == ["policy.optimizer.lr", "policy.optimizer.eps"]


@pytest.mark.parametrize("path", OURS, ids=ids)
def test_a_recipe_says_whom_it_follows(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# ") and not any(len(line) > 134 for line in text.splitlines())
    if path.parent.name != "base" and path.stem not in SMALL:
        assert NAME.fullmatch(path.stem), path.stem
        assert path.stem.startswith(path.parent.name + "-")


@pytest.mark.parametrize("path", [p for p in WHOLE if p.stem not in SMALL], ids=ids)
def test_a_name_says_what_the_recipe_does(path: Path) -> None:
    recipe = load_recipe(str(path))
    nodes, gpus = map(int, re.search(r"-(\d+)n(\d+)g", path.stem).groups())  # type: ignore[union-attr]
    whole = recipe.cluster.num_nodes * recipe.cluster.gpus_per_node
    assert (
        nodes == recipe.cluster.num_nodes
        and gpus in (recipe.cluster.gpus_per_node, 1)
        and (gpus == 1 or whole == nodes * gpus)
    )
    sizes = dict(re.findall(r"(tp|pp|cp|ep)(\d+)", path.stem.split(f"{gpus}g", 1)[1].strip("-").partition("-")[0]))
    m = recipe.megatron
    for letter, name in (("tp", "tensor_model"), ("pp", "pipeline_model"), ("ep", "expert_model"), ("cp", "context")):
        assert getattr(m, f"{name}_parallel_size") == int(sizes.get(letter, 1)), letter
    assert ("fp8" in path.stem) == (m.fp8 != "none")


@pytest.mark.parametrize("path", [*WHOLE, *sorted((FOLDER / "aligner").glob("*.yaml"))], ids=ids)
def test_a_recipe_dry_runs(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["profile", str(path), "--print-config"]) == 0
    assert "run_dir:" in capsys.readouterr().out


def test_the_domains_and_models_are_all_there() -> None:
    names = " ".join(p.stem for p in WHOLE)
    for model in ("nemotron-3-super-120b-a12b", "qwen3-30b-a3b-thinking"):
        for domain in ("swe", "conversational", "terminal", "search"):
            assert re.search(rf"pivotrl-{model}-\S*{domain}", names), (model, domain)
    for part in ("qwen3-8b-1n8g", "swe-fp8", "conversational-fp8", "llama-7b", "tulu-2-70b", "safety"):
        assert part in names
    assert "llmdoctor-nemotron-3-super-120b-a12b" in names


def test_the_table_names_every_recipe_and_no_other() -> None:
    patterns = re.findall(r"`((?:pivotrl|llmdoctor|\*)[/-][^`]*)`", (FOLDER / "README.md").read_text())
    patterns += [f"{p}-fp8" for p in patterns if p.endswith(("-swe", "-conversational"))]
    for path in WHOLE:
        names = (path.stem, f"{path.parent.name}/{path.stem}")
        assert any(fnmatch(name, pattern) for name in names for pattern in patterns), path.stem
    every = [n for p in WHOLE for n in (p.stem, f"{p.parent.name}/{p.stem}")]
    listed = [p for p in patterns if not p.endswith("-fp8")]
    assert [p for p in listed if not any(fnmatch(name, p) for name in every)] == []
