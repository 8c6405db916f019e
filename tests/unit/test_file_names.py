"""Names of files in docstrings, comments and pages: what is named is there."""

import ast
import re
from pathlib import Path

import nemo_pivotrl

ROOT = Path(nemo_pivotrl.__file__).parents[1]
FILES = [p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*") if p.is_file() and ".git" not in p.parts]
NAME = re.compile(r"(?<![\w/.$-])((?:[\w-]+/)*[\w-]+\.(?:py|md|jinja|sbatch))\b")
FOREIGN = {"quantization.py", "train_gpt_dpo.py", "train_gpt_reinforce_actor.py", "RATES.md"}
"""Files of other projects: Transformer Engine, NeMo-Aligner, NeMo-Gym."""


def missing(text: str) -> set[str]:
    """Files that `text` names and the project does not have, whatever their folder."""
    return {n for n in NAME.findall(text) if n not in FOREIGN and not any(f == n or f.endswith(f"/{n}") for f in FILES)}


def docstrings(path: Path) -> str:
    """Every docstring of a source file, those of settings and constants included."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    texts = (n.value for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))
    return "\n".join(t.value for t in texts if isinstance(t.value, str))


def test_a_file_that_is_not_there_is_found() -> None:
    assert missing("see `pipeline.py`, docs/design.md and algorithms/pivotrl.py, not chunks.py or docs/nowhere.md") == {
        "chunks.py",
        "docs/nowhere.md",
    }


def test_every_file_that_the_package_names_is_there() -> None:
    sources = sorted((ROOT / "nemo_pivotrl").rglob("*.py"))
    assert {str(p.relative_to(ROOT)): found for p in sources if (found := missing(docstrings(p)))} == {}


def test_every_file_that_a_page_names_is_there() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]
    assert {p.name: found for p in pages if (found := missing(p.read_text(encoding="utf-8")))} == {}


def test_a_folders_list_of_its_files_names_no_other() -> None:
    for path in (ROOT / "nemo_pivotrl").rglob("__init__.py"):
        listed = re.findall(r"^(\w+\.py)  ", docstrings(path), flags=re.MULTILINE)
        if listed:
            there = {p.name for p in path.parent.glob("*.py")} - {"__init__.py"}
            assert set(listed) <= there, path
