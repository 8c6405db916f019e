"""Locks hold a hash for every file of every package, the versions that the constraints pin, and no torch but the image's."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCKS = sorted([*(ROOT / "requirements").glob("*.lock"), *(ROOT / "deploy/docker").glob("*.lock")])
WITH_TORCH = (ROOT / "deploy/docker/vllm.lock",)
"""For GPUs alone, so that there is one build."""
PINNED = {
    "main": "constraints.txt",
    "vllm": "tests/vllm/constraints.txt",
    "aligner": "tests/aligner/constraints.txt",
    "requirements": "deploy/docker/requirements.txt",
    "docker/vllm": "deploy/docker/vllm.txt",
}


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(text: str) -> dict[str, str]:
    return {plain(m[1]): m[2] for m in re.finditer(r"^([\w.-]+)(?:\[[\w,-]+\])?==([^\s;\\]+)", text, re.M)}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_lock_pins_everything_with_hashes(lock: Path) -> None:
    text = lock.read_text()
    found = pins(text)
    blocks = [block for block in re.split(r"\n(?=[a-zA-Z])", text) if not block.startswith("#")]
    assert len(blocks) == len(found) > 0
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", block) for block in blocks)
    assert not found.keys() & {"apex", "transformer-engine", "nemo-pivotrl"}
    if lock not in WITH_TORCH:
        assert not found.keys() & {"torch", "triton"} and not any(name.startswith("nvidia-") for name in found)
    assert "/tmp" not in text and "file:" not in text and "--index" not in text
    name = "docker/vllm" if lock in WITH_TORCH else lock.stem
    tested = pins((ROOT / PINNED[name]).read_text()) if name in PINNED else {}
    assert {n: found[n] for n in tested if n in found} == {n: tested[n] for n in tested if n in found}


def test_every_environment_has_a_lock() -> None:
    assert {lock.stem for lock in LOCKS} == {
        "main", "view", "vllm", "aligner", "aligner-packages", "conformance", "bfcl", "requirements",
    }  # fmt: skip
    docker = (ROOT / "Dockerfile").read_text()
    steps = re.split(r"&&|;|\n", docker.replace("\\\n", " "))
    installs = [step for step in steps if "pip" in step and " install " in step]
    assert len(installs) == 5
    for install in installs:  # by hashes, or the project's own wheel
        assert "--no-deps" in install and ("--require-hashes -r" in install or install.split()[-1] == "/wheel/*.whl")
    assert pins((ROOT / "deploy/docker/requirements.lock").read_text()) == pins(
        (ROOT / "deploy/docker/requirements.txt").read_text()
    )
