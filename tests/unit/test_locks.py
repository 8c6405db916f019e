"""Locks hold a hash for every file of every package, the versions that the constraints pin, and no torch."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCKS = sorted([*(ROOT / "requirements").glob("*.lock"), ROOT / "deploy/docker/requirements.lock"])
PINNED = {
    "main": "constraints.txt",
    "vllm": "tests/vllm/constraints.txt",
    "aligner": "tests/aligner/constraints.txt",
    "requirements": "deploy/docker/requirements.txt",
}


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(text: str) -> dict[str, str]:
    return {plain(m[1]): m[2] for m in re.finditer(r"^([\w.-]+)(?:\[[\w,-]+\])?==([^\s;\\]+)", text, re.M)}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)
def test_a_lock_pins_everything_with_hashes(lock: Path) -> None:
    text = lock.read_text()
    found = pins(text)
    blocks = [block for block in re.split(r"\n(?=[a-zA-Z])", text) if not block.startswith("#")]
    assert len(blocks) == len(found) > 0
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", block) for block in blocks)
    assert not found.keys() & {"torch", "triton", "apex", "transformer-engine", "nemo-pivotrl"}
    assert not any(name.startswith("nvidia-") for name in found)
    assert "/tmp" not in text and "file:" not in text and "--index" not in text
    tested = pins((ROOT / PINNED[lock.stem]).read_text()) if lock.stem in PINNED else {}
    assert {n: found[n] for n in tested if n in found} == {n: tested[n] for n in tested if n in found}


def test_every_environment_has_a_lock() -> None:
    assert {lock.stem for lock in LOCKS} == {
        "main", "vllm", "aligner", "aligner-packages", "conformance", "requirements",
    }  # fmt: skip
    assert pins((ROOT / "deploy/docker/requirements.lock").read_text()) == pins(
        (ROOT / "deploy/docker/requirements.txt").read_text()
    )
