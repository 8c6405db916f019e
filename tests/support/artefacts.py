"""Fixtures that are artefacts, made once for all workers and all runs of the tests until the package or their recipe changes."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".pytest_cache" / "artefacts"
LIBRARIES = ("torch", "transformers", "tokenizers", "numpy")
KEPT = 3
"""Folders of one name that stay: those of the latest versions of the package."""


def made_once(name: str, recipe: Any, make: Callable[[Path], None]) -> Path:
    """The folder that `make(folder)` fills, from the cache where it is there. Do not change what is in it.

    It is known by the package's files, the recipes, the versions of the libraries, this folder's files, and `recipe`: whatever else
    decides what is made. Of workers that ask at once, one makes it and the others wait.
    """
    digest = hashlib.sha256(json.dumps([package_digest(), recipe], default=str).encode()).hexdigest()[:20]
    CACHE.mkdir(parents=True, exist_ok=True)
    folder = CACHE / f"{name}-{digest}"
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():  # nobody has made it, or who did was killed
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder / "run")  # in its place, since stages write paths down
        (folder / "done").touch()
        for old in sorted(CACHE.glob(f"{name}-*/done"), key=lambda path: path.stat().st_mtime)[:-KEPT]:
            shutil.rmtree(old.parent, ignore_errors=True)
    return folder / "run"


def own_copy(folder: Path, factory: pytest.TempPathFactory, name: str) -> Path:
    """A copy to be changed: what is cached is shared by all workers."""
    return Path(shutil.copytree(folder, factory.mktemp(name) / "run"))


@cache
def package_digest() -> str:
    """Of everything that can change what a stage writes."""
    found = hashlib.sha256(json.dumps({name: importlib.metadata.version(name) for name in LIBRARIES}).encode())
    folders: Iterable[Path] = (ROOT / "nemo_pivotrl", ROOT / "recipes", Path(__file__).parent)
    for path in sorted(path for folder in folders for path in folder.rglob("*") if path.is_file()):
        if "__pycache__" not in path.parts:
            found.update(f"{path.relative_to(ROOT)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return found.hexdigest()
