"""The Dockerfile without Docker: linted, its sources there, and the environment it makes made over this one."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.recipes import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
SHELL = [*(ROOT / "deploy").rglob("*.sh"), *(ROOT / "deploy").rglob("*.sbatch")]


def program(name: str) -> str:
    """Path of a linter that `pip install -e .[dev]` brings."""
    own = Path(sys.executable).parent / name
    found = str(own) if own.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: pip install 'nemo-pivotrl[dev]'")
    return found


def test_hadolint_finds_nothing() -> None:
    words = [program("hadolint"), "--config", str(ROOT / ".hadolint.yaml"), str(ROOT / "Dockerfile")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_shellcheck_finds_nothing() -> None:
    assert len(SHELL) >= 5
    words = [program("shellcheck"), "-x", "-s", "bash", *map(str, SHELL)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_file_that_is_copied_exists_and_reaches_the_build() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[0] == "*"
    let_in = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = [
        line.split()[1:-1] for line in DOCKERFILE.splitlines() if line.startswith("COPY ") and "--from" not in line
    ]
    for source in (s for sources in copied for s in sources):
        assert (ROOT / source).exists(), source
        assert source.split("/")[0] in let_in, source


def test_images_and_packages_are_pinned_and_the_version_is_the_packages_own() -> None:
    images = re.findall(r"^(?:ARG \w*BASE_IMAGE=|FROM )([^\s$]+)", DOCKERFILE, flags=re.MULTILINE)
    assert len(images) == 3 and all(re.search(r":[\w.-]*\d", image) for image in images)
    pins = [
        line
        for line in (ROOT / "deploy/docker/requirements.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins) and len(pins) > 20
    names = {pin.partition("==")[0] for pin in pins}
    assert not names & {"torch", "numpy", "triton", "transformer-engine", "apex", "vllm", "flash-attn"}  # the base's
    tested = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert {name: version for name, version in (pin.split("==") for pin in pins) if name in tested} == {
        name: version for name, version in tested.items() if name in names
    }
    from nemo_pivotrl import __version__

    assert set(re.findall(r"^ARG VERSION=(.*)$", DOCKERFILE, flags=re.MULTILINE)) == {__version__}


def test_nobody_is_root_at_the_end_of_a_stage() -> None:
    for stage in ("aligner", "release"):
        text = DOCKERFILE.partition(f" AS {stage}\n")[2].partition("\nFROM ")[0]
        users = re.findall(r"^USER (.*)$", text, flags=re.MULTILINE)
        assert users == ["10001"] and "HEALTHCHECK" in text and "org.opencontainers.image.title" in text


@pytest.mark.slow
def test_an_environment_over_another_sees_it_and_leaves_it_alone(tmp_path: Path) -> None:
    source = tmp_path / "package"
    (source / "shadow").mkdir(parents=True)
    (source / "shadow/__init__.py").write_text("")
    (source / "setup.py").write_text(
        "from setuptools import setup; setup(name='shadow', version='7', packages=['shadow'])"
    )
    target, offline = tmp_path / "over", ["--no-index", "--no-build-isolation"]
    done = subprocess.run(
        ["sh", str(ROOT / "deploy/docker/overlay.sh"), sys.executable, str(target), *offline, str(source)],
        capture_output=True,
        text=True,
        check=False,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    code = "import omegaconf, shadow; print(omegaconf.__file__); print(shadow.__file__)"
    above = subprocess.run([str(target / "bin/python"), "-c", code], capture_output=True, text=True, check=True).stdout
    base, own = above.splitlines()
    assert not base.startswith(str(tmp_path)) and own.startswith(str(target))
    below = subprocess.run([sys.executable, "-c", "import shadow"], cwd=tmp_path, capture_output=True, check=False)
    assert below.returncode != 0
