"""Artefact files: headers, whole rows, and what is left after a crash at any byte."""

import json
import pickle
from pathlib import Path

import pytest

from nemo_pivotrl.components.lineage import check_headers
from nemo_pivotrl.core.artifacts import ArtefactWriter, Header, json_line, read_header, read_rows
from nemo_pivotrl.core.errors import InputError, Problem

HEADER = Header(
    "profiles", "c0ffee", parent="p1", tokenizer="t1", verifier="tool_call 1 ab", extra={"num_generations": 16}
)
ROWS = [{"id": 1, "text": "a"}, {"id": 2, "text": "naïve ☃"}, {"id": 3, "text": "line\nbreak"}]


def write(path: Path, rows: list[dict[str, object]], header: Header = HEADER) -> Path:
    writer = ArtefactWriter(path, header)
    writer.write(rows)
    return writer.finish()


def test_a_header_and_its_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = write(tmp_path / "deep" / "profiles.jsonl", ROWS)
    assert read_header(path, "profiles") == HEADER
    assert read_header(path, ("pivots", "profiles")) == HEADER
    assert list(read_rows(path)) == ROWS
    assert path.read_bytes().count(b"\n") == 4 and [p.name for p in path.parent.iterdir()] == ["profiles.jsonl"]


@pytest.mark.parametrize(
    ("content", "found", "remedy"),
    [
        (None, "no such file", "`nemo-pivotrl extract RECIPE` makes it"),
        (b"", "an empty file", "give a file that a stage wrote"),
        (b'{"messages": []}\n', '{"messages": []}', "give a file that a stage wrote"),
        (b"[1]\n", "[1]", "give a file that a stage wrote"),
        (b"\xff\xfe\x00binary\n", "binary", "give a file that a stage wrote"),
        (b'{"nemo_pivotrl": {"stage": "candidates"}}\n', "nemo_pivotrl", "give a file that a stage wrote"),
        (Header("pivots", "c").to_line().encode(), "pivots", "this stage reads candidates; check the path"),
        (
            Header("candidates", "c", format=1).to_line().encode(),
            "1",
            "make it anew: nemo-pivotrl extract RECIPE fresh=true",
        ),
    ],
)
def test_a_file_that_is_not_the_wanted_artefact_is_named_with_its_remedy(
    tmp_path: Path, content: bytes | None, found: str, remedy: str
) -> None:
    path = tmp_path / "in.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_header(path, "candidates")
    (problem,) = caught.value.problems
    assert problem.file == str(path) and found in problem.found and remedy in problem.remedy
    assert str(path) in str(caught.value) and remedy in str(caught.value)


def test_header_fields_that_contradict_the_recipe_are_all_named(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        check_headers(tmp_path / "x", HEADER, {}, tokenizer="t2", parent="p1", verifier="exact 1 cd")
    assert [(p.field, p.found) for p in caught.value.problems] == [
        ("tokenizer", "'t1'"),
        ("verifier", "'tool_call 1 ab'"),
    ]
    assert "'t2'" in caught.value.problems[0].remedy
    check_headers(tmp_path / "x", HEADER, {}, tokenizer="t1")


def test_what_was_not_finished_is_no_artefact_and_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with pytest.raises(KeyboardInterrupt), ArtefactWriter(path, HEADER) as first:
        first.write(ROWS[:2])
        raise KeyboardInterrupt
    assert not path.exists() and first.part.exists()
    with ArtefactWriter(path, HEADER) as second:
        second.write(ROWS)
        assert list(read_rows(second.finish())) == ROWS


def test_lone_surrogates_and_other_odd_text_come_back(tmp_path: Path) -> None:
    rows = [{"text": "broken \ud83d emoji", "\udc00": [1]}, {"text": "\U0001f600 \u2028 \x00"}]
    path = write(tmp_path / "a.jsonl", rows)
    assert list(read_rows(path)) == rows
    assert path.read_text(encoding="utf-8").count("\n") == 3
    assert json_line({"text": "é"}) == '{"text":"é"}\n'.encode()


def test_all_bad_lines_are_reported_together(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROWS[:1])
    with path.open("ab") as handle:
        handle.write(b'{"torn": \n' + b'{"good": 1}\n' + b"[1, 2]\n" + b"\xff\n" + b"[" * 100_000 + b"\n")
    with pytest.raises(InputError) as caught:
        list(read_rows(path))
    assert [p.line for p in caught.value.problems] == [3, 5, 6, 7]
    assert all(p.file == str(path) and "re-run the stage" in p.remedy for p in caught.value.problems)


def test_an_error_shows_twenty_problems_and_counts_the_rest(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [])
    path.write_bytes(path.read_bytes() + b"oops\n" * 25)
    with pytest.raises(InputError) as caught:
        list(read_rows(path))
    text = str(caught.value)
    assert (
        text.startswith("25 problems:") and text.endswith("... and 5 more") and f"{path}:21: line: found oops" in text
    )
    assert len(caught.value.problems) == 25 and f"{path}:22:" not in text


def test_a_row_is_one_json_object_with_its_keys_in_their_order_and_no_spaces() -> None:
    assert json.loads(json_line({"b": 1, "a": {"d": 2, "c": 3}})) == {"a": {"c": 3, "d": 2}, "b": 1}
    assert json_line({"b": 1, "a": 2}) == b'{"b":1,"a":2}\n'


def test_an_input_error_comes_whole_out_of_another_process() -> None:
    error = InputError([Problem("a.jsonl", 3, "reward", "x", "make it a number"), Problem("b", None, "c", "d", "e")])
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.problems) == (str(error), error.problems)
