"""The models that come with the package are the ones named, small, and load as the checkpoints they were."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.recipes import ROOT

from nemo_pivotrl.config.load import load_recipe
from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.demo import shipped
from nemo_pivotrl.pivotrl.sft import sft, warmup


def test_every_shipped_model_has_its_digest_and_all_are_below_two_megabytes() -> None:
    folders = sorted(p for p in shipped.FOLDER.iterdir() if p.is_dir())
    assert {p.name: shipped.folder_digest(p) for p in folders} == shipped.DIGESTS
    sizes = {p.name: sum(f.stat().st_size for f in p.iterdir()) for p in folders}
    assert all(size < 1e6 for size in sizes.values()) and sum(sizes.values()) < 2e6
    assert all(sorted(f.name for f in p.iterdir()) == sorted(shipped.FILES) for p in folders)
    assert '"nemo_pivotrl.demo": ["models/*/*"]' in (ROOT / "setup.py").read_text()


@pytest.mark.parametrize("name", sorted(shipped.DIGESTS))
def test_a_model_is_packed_in_half_and_unpacked_in_full_precision(name: str, tmp_path: Path) -> None:
    folder = shipped.unpack(name, tmp_path / "policy")
    packed, weights = load_file(shipped.FOLDER / name / "model.safetensors"), load_file(folder / "model.safetensors")
    assert {str(t.dtype) for t in packed.values()} == {"torch.float16"}
    assert {str(t.dtype) for t in weights.values()} == {"torch.float32"}
    assert all(bool((weights[key] == value).all()) for key, value in packed.items())


def test_a_changed_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(shipped.FOLDER, tmp_path / "models")
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "models")
    with (tmp_path / "models/start-policy/config.json").open("a") as handle:
        handle.write("\n")
    with pytest.raises(InputError, match="install the package anew"):
        shipped.unpack("start-policy", tmp_path / "policy")
    assert not (tmp_path / "policy").exists()


def test_the_shipped_start_policy_is_the_shops_and_only_a_warmup_takes_it(tmp_path: Path) -> None:
    quick = str(ROOT / "recipes/pivotrl/quickstart.yaml")
    recipe = load_recipe(quick, [f"run_dir={tmp_path}"])
    assert warmup(recipe) == tmp_path / "start/policy" and (tmp_path / "start/policy/SHA256SUMS").exists()
    with pytest.raises(InputError, match=r"world\.desk: shop"):
        warmup(load_recipe(quick, [f"run_dir={tmp_path}", "world.desk=requests"]))
    with pytest.raises(InputError, match="only warmup starts from the world"):
        sft(load_recipe(quick, [f"run_dir={tmp_path}", "sft.source=shipped"]))
