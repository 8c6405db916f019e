"""docs/algorithms.md: its numbers are complete, every number that is cited stands there, and its defaults are the code's."""

import re
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import yaml

import nemo_pivotrl
from nemo_pivotrl.config import Recipe

ROOT = Path(nemo_pivotrl.__file__).parents[1]
PAGE = (ROOT / "docs/algorithms.md").read_text(encoding="utf-8")
EQUATIONS = [int(n) for n in re.findall(r"\\tag\{(\d+)\}", PAGE)]
ROWS = re.findall(r"^\| ([PDR]\d+) \|(.*)\|$", PAGE, flags=re.MULTILINE)
CITED_EQUATIONS = re.compile(r"\bequations? (\(\d+\)(?:(?:,| and| to) \(\d+\))*)")
CITED_ROWS = re.compile(r"\b[PDR][1-9]\d?\b")


def sources() -> list[Path]:
    """Every text of the project that may cite the page."""
    found = [ROOT / "README.md", ROOT / "CHANGELOG.md"]
    for folder in ("nemo_pivotrl", "docs", "benchmarks", "recipes", "deploy", "tests", "examples"):
        found += [p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".md", ".yaml", ".jinja", ".sh")]
    return found


def unknown(text: str) -> list[str]:
    """What `text` cites and the page does not have."""
    numbers = [n for group in CITED_EQUATIONS.findall(text) for n in re.findall(r"\d+", group)]
    rows = {name for name, _ in ROWS}
    return [f"equation ({n})" for n in numbers if int(n) not in EQUATIONS] + [
        row for row in CITED_ROWS.findall(text) if row not in rows
    ]


def test_equations_and_rows_are_numbered_without_a_gap() -> None:
    assert list(range(1, len(EQUATIONS) + 1)) == EQUATIONS and len(EQUATIONS) > 30
    for letter in "PDR":
        numbers = [int(name[1:]) for name, _ in ROWS if name[0] == letter]
        assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) > 6


def test_a_number_that_the_page_lacks_is_found() -> None:
    assert unknown("as equations (1) to (999) and equation (12) say") == ["equation (999)"]
    assert unknown("a pivot (P2, P" + "99), D1 and R1") == ["P" + "99"]


def test_every_number_that_is_cited_stands_on_the_page() -> None:
    wrong = {}
    for path in sources():
        text = path.read_text(encoding="utf-8")
        # outside the package and the pages, P1 may be anything
        cites = "nemo_pivotrl" in path.parts[len(ROOT.parts) :] or path.suffix == ".md"
        missing = [c for c in unknown(text) if cites or c.startswith("equation")]
        if missing and path != Path(__file__):
            wrong[str(path.relative_to(ROOT))] = missing
    assert wrong == {}


def test_the_package_cites_the_page() -> None:
    for name in (
        "algorithms/selection.py",
        "algorithms/pivotrl.py",
        "algorithms/llmdoctor.py",
        "config/pivotrl.py",
        "config/llmdoctor.py",
    ):
        text = (ROOT / "nemo_pivotrl" / name).read_text(encoding="utf-8")
        assert CITED_EQUATIONS.search(text) and CITED_ROWS.search(text), name


def test_the_package_cites_no_equation_by_a_papers_number() -> None:
    package = [path for path in sources() if "nemo_pivotrl" in path.relative_to(ROOT).parts and path.suffix == ".py"]
    assert len(package) > 90
    assert [str(p) for p in package if re.search(r"\bEqs?\. ?\(?\d", p.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("words", [r"\b[AB]\.\d+", r"\bthe specification", r"\bfield report", r"(?<![`\w/])spec/"])
def test_no_text_refers_to_a_document_outside_the_project(words: str) -> None:
    found = [str(p) for p in sources() if p != Path(__file__) and re.search(words, p.read_text(encoding="utf-8"))]
    assert found == []


def defaults() -> list[tuple[str, str]]:
    """(setting, value) of every default that a table names."""
    cells = [(row, cells.split(" | ")[1]) for row, cells in ROWS if row[0] != "R"]
    return [found for _, cell in cells for found in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+): ([^`]+)`", cell)]


def test_the_tables_defaults_are_the_codes() -> None:
    recipe: Any = Recipe()
    named = defaults()
    assert len(named) > 45
    for setting, text in named:
        value, wanted = attrgetter(setting)(recipe), yaml.safe_load(text)
        if isinstance(value, float):
            assert float(wanted) == pytest.approx(value, rel=1e-3), setting
        else:
            assert wanted == value, setting
