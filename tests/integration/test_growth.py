"""The benchmark of growth names what grows too fast, and what `extract` writes doubles with the turns."""

import sys
from pathlib import Path

import pytest
from support.recipes import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import growth
from growth import Case, Work


def looping(power: int) -> Case:
    def make(size: int, _: Path) -> Work:
        def work() -> int:
            sum(range(20 * size**power))
            return size

        return work

    return Case("loop", (100, 200, 400), make, "loops")


def test_a_quadratic_loop_is_too_fast_and_a_linear_one_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(growth, "CASES", [looping(2)])
    monkeypatch.setattr(sys, "argv", ["growth.py"])
    assert growth.main() == 1 and "TOO FAST: " in capsys.readouterr().out
    assert growth.problem([(1, 1.0, 5), (2, 2.2, 11)]) == ""
    assert growth.problem([(1, 1.0, 5), (2, 2.2, 12)]) == "2.40x the bytes"


def test_what_extract_writes_doubles_with_the_turns_of_a_trajectory(tmp_path: Path) -> None:
    written = []
    for turns in (10, 20, 40):
        (tmp_path / str(turns)).mkdir()
        written.append(growth.extracting(tmp_path / str(turns), count=5, turns=turns, words=20)())
    assert written[1] < 2.1 * written[0] and written[2] < 2.1 * written[1]
