"""Preference readers: hand-written rows of every format, every fault by file, line and field, and the stage around them."""

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from nemo_pivotrl.config import Preferences, Recipe
from nemo_pivotrl.core.artifacts import read_header, read_rows
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.data.preferences import READERS, Found, preference_of_row, read_preferences
from nemo_pivotrl.llmdoctor.preferences import preferences


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def written(folder: Path, rows: list[Any], name: str = "in.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(folder: Path, format: str, *rows: Any, **settings: Any) -> Found:
    return read_preferences(Preferences(files=(written(folder, list(rows)),), format=format, **settings))  # type: ignore[arg-type]


def problems(folder: Path, format: str, *rows: Any, **settings: Any) -> list[Problem]:
    with pytest.raises(InputError) as caught:
        read(folder, format, *rows, **settings)
    return caught.value.problems


H, A = "\n\nHuman: ", "\n\nAssistant: "
TWO_TURNS = (user("Hi"), said("Hello."), user("Why?"))
RIGHT = {
    "hh_rlhf": [
        {"chosen": f"{H}Hi{A}Hello.{H}Why?{A}Because.", "rejected": f"{H}Hi{A}Hello.{H}Why?{A}No."},
        {"prompt": f"{H}Hi{A}Hello.{H}Why?\n\nAssistant:", "chosen": " Because.", "rejected": " No."},
    ],
    "trl": [
        {"prompt": [*TWO_TURNS], "chosen": [said("Because.")], "rejected": [said("No.")]},
        {"prompt": [*TWO_TURNS], "chosen": "Because.", "rejected": "No."},
        {"chosen": [*TWO_TURNS, said("Because.")], "rejected": [*TWO_TURNS, said("No.")]},
    ],
    "nemo_aligner": [
        {
            "prompt": "<extra_id_0>System\n\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\nHello.\n<extra_id_1>User\nWhy?\n"
            "<extra_id_1>Assistant\n",
            "chosen_response": "Because.\n<extra_id_1>",
            "rejected_response": "No.\n<extra_id_1>",
            "chosen_reward": 4,
            "rejected_reward": 1.5,
        },
        {"prompt": [*TWO_TURNS], "chosen_response": "Because.", "rejected_response": "No."},
    ],
    "ultrafeedback": [
        {
            "prompt": "Hi",
            "chosen": [*TWO_TURNS, said("Because.")],
            "rejected": [*TWO_TURNS, said("No.")],
            "score_chosen": 8.5,
            "score_rejected": 7.0,
        }
    ],
    "helpsteer2": [
        {
            "prompt": "Hi\n<extra_id_1>Assistant\nHello.\n<extra_id_1>User\nWhy?",
            "response_1": "Because.",
            "response_2": "No.",
            "preference_strength": -2,
        },
        {
            "prompt": "Hi\n<extra_id_1>Assistant\nHello.\n<extra_id_1>User\nWhy?",
            "response_1": "No.",
            "response_2": "Because.",
            "preference_strength": 1,
        },
    ],
    "helpsteer3": [
        {"context": [*TWO_TURNS], "response1": "Because.", "response2": "No.", "overall_preference": -3},
        {"context": [*TWO_TURNS], "response1": "No.", "response2": "Because.", "overall_preference": 1},
    ],
}


def rated(text: str, *ratings: Any) -> dict[str, Any]:
    aspects = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    return {"response": text, "annotations": {a: {"Rating": r} for a, r in zip(aspects, ratings, strict=True)}}


TRANSCRIPT = [{"role": "user", "content": "Why?"}]
OTHERS: dict[str, list[dict[str, Any]]] = {
    "nemo_rl": [
        {
            "context": TRANSCRIPT,
            "completions": [
                {"rank": 1, "completion": [said("No.")]},
                {"rank": 0, "completion": [said("Because.")]},
            ],
            "task_name": "x",
        },
    ],
    "ultrafeedback": [
        {
            "source": "s",
            "instruction": "Why?",
            "models": ["a", "b", "c"],
            "completions": [
                rated("No.", "1", "2", "1", "2"),
                rated("Well.", "3", "3", "3", "3"),
                {**rated("Because.", "5", "5", "4", "5"), "overall_score": 1.0},
            ],
        },
        {
            "instruction": "Why?",
            "completions": [{"response": "No.", "overall_score": 3}, {"response": "Because.", "overall_score": 8.5}],
        },
    ],
    "trl": [
        {"question": "Why?", "chosen": "Because.", "rejected": "No."},
        {"instruction": "Why?", "input": "", "output": ["x"], "chosen": "Because.", "rejected": "No."},
        {
            "prompt": "Why?",
            "chosen": [user("Why?"), said("Because.")],
            "rejected": [user("Why?"), said("No.")],
            "chosen-rating": 5.0,
            "rejected-rating": 2.0,
        },
        {
            "conversations": [{"from": "human", "value": "Why?"}],
            "chosen": {"from": "gpt", "value": "Because."},
            "rejected": {"from": "gpt", "value": "No."},
        },
        {"messages": [user("Why?"), said("Because.")], "rejected_response": "No."},
        {"messages": [user("Why?"), said("Because.")], "rejected_messages": [user("Why?"), said("No.")]},
        {
            "chosen_messages": [
                {"role": r, "content": [{"type": "text", "value": t}]}
                for r, t in (("user", "Why?"), ("assistant", "Because."))
            ],
            "rejected_messages": [
                {"role": r, "content": [{"type": "text", "value": t}]}
                for r, t in (("user", "Why?"), ("assistant", "No."))
            ],
        },
        {"prompt": "Why?", "chosen": [said("Because.")], "rejected": [said("No.")], "tools": [], "images": None},
    ],
    "openai_dpo": [
        {
            "input": {"messages": TRANSCRIPT, "tools": []},
            "preferred_output": [said("Because.")],
            "non_preferred_output": [said("No.")],
        },
    ],
    "distilabel": [{"instruction": "Why?", "generations": ["No.", "Because."], "ratings": [1, 4]}],
}


@pytest.mark.parametrize(("format", "row"), [(f, r) for f, rows in OTHERS.items() for r in rows])
def test_each_published_shape_is_found_by_looking_and_says_the_same_pair(format: str, row: Any, tmp_path: Path) -> None:
    found = read(tmp_path, "auto", row)
    (kept,) = found.preferences
    assert kept.prompt == (user("Why?"),) and (kept.chosen, kept.rejected) == ("Because.", "No.")
    assert found.files == {f"{tmp_path}/in.jsonl": {format: 1}}


@pytest.mark.parametrize("format", RIGHT)
def test_auto_takes_each_row_for_its_format(format: str, tmp_path: Path) -> None:
    found = read(tmp_path, "auto", *RIGHT[format])
    assert found.preferences == read(tmp_path, format, *RIGHT[format]).preferences
    (taken,) = found.files.values()
    assert set(taken) == {format}


def test_a_system_column_begins_the_prompt_once(tmp_path: Path) -> None:
    row = {"system": "Be brief.", "prompt": "q", "chosen": "a", "rejected": "b"}
    said_twice = {**row, "prompt": [{"role": "system", "content": "Be brief."}, user("q")]}
    other = {**row, "prompt": [{"role": "system", "content": "Be kind."}, user("q")]}
    first, second = read(tmp_path, "auto", row, said_twice, other).preferences
    assert first.prompt == ({"role": "system", "content": "Be brief."}, user("q"))
    assert second.prompt[0] == {"role": "system", "content": "Be brief.\n\nBe kind."}


@pytest.mark.parametrize("column", [{"tools": [{"name": "f"}]}, {"images": ["x.png"]}, {"documents": [{"text": "d"}]}])
def test_a_column_that_changes_the_prompt_is_refused_by_its_name(column: dict[str, Any], tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, "auto", {"prompt": "q", "chosen": "a", "rejected": "b", **column})
    assert problem.field == next(iter(column)) and "two answers as text" in problem.remedy


@pytest.mark.parametrize(
    ("row", "remedy"),
    [
        ({"prompt": "q", "completion": "a", "label": True}, "no other to compare with"),
        ({"text": "q a", "label": 4}, "reward model"),
        ({"messages": [user("q"), said("a")]}, "nemo-pivotrl extract"),
        ({"prompt": "q"}, "nemo-pivotrl rank"),
    ],
)
def test_another_kind_of_file_is_refused_by_its_name_with_the_command_that_reads_it(
    row: Any, remedy: str, tmp_path: Path
) -> None:
    (problem,) = problems(tmp_path, "auto", row)
    assert problem.field == "record" and remedy in problem.remedy


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b", "chosen-rating": 4.0, "rejected-rating": 4.0},
        {"prompt": "q", "chosen": "a", "rejected": "b", "chosen_rating": 4, "rejected_rating": 4},
        {"system": "", "input": "q", "chosen": "a", "rejected": "b", "status": "tie"},
        {"instruction": "q", "generations": ["a", "b"], "ratings": [3, 3]},
        {"context": [user("q")], "completions": [{"rank": 0, "completion": [said(t)]} for t in "ab"]},
    ],
)
def test_ties_are_counted_in_every_format(row: Any, tmp_path: Path) -> None:
    assert read(tmp_path, "auto", row).skipped == {"tie": 1}


def test_rating_rows_of_helpsteer2_pair_up(tmp_path: Path) -> None:
    def row(prompt: str, response: str, helpfulness: int) -> dict[str, Any]:
        return {"prompt": prompt, "response": response, "helpfulness": helpfulness, "verbosity": 2}

    rows = [row("q", "a", 1), row("q", "b", 4), row("r", "a", 3), row("r", "b", 3), row("s", "alone", 2)]
    found = read(tmp_path, "auto", *rows)
    (kept,) = found.preferences
    assert (kept.chosen, kept.rejected, found.records) == ("b", "a", 5)
    assert found.skipped == {"joined_with_the_row_before": 2, "tie": 1, "rating_without_another": 1}


def test_skip_leaves_bad_records_out_and_names_them(tmp_path: Path) -> None:
    good = {"prompt": "q", "chosen": "a", "rejected": "b"}
    path = written(tmp_path, [good, {"prompt": "q"}, "text", {**good, "images": ["x"]}, {**good, "prompt": "other"}])
    Path(path).write_text(Path(path).read_text() + "{broken\n")
    found = read_preferences(Preferences(files=(path,), on_invalid="skip"))
    assert (found.records, len(found.preferences), dict(found.skipped)) == (6, 2, {"unreadable": 4})
    assert sorted((p.line, p.field) for p in found.left_out) == [
        (2, "chosen"),
        (3, "record"),
        (4, "images"),
        (6, "line"),
    ]


def test_parquet_and_zstd_hold_the_same_rows_as_lines(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {"prompt": f"q{i}", "chosen": [said("a")], "rejected": [said("b")], "images": None, "score": 1.5}
        for i in range(150)
    ]
    plain = Path(written(tmp_path, rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    with pyarrow.output_stream(str(tmp_path / "t.jsonl.zst"), compression="zstd") as stream:
        stream.write(plain.read_bytes())
    want = [p.prompt for p in read_preferences(Preferences(files=(str(plain),))).preferences]
    for name in ("t.parquet", "t.jsonl.zst"):
        found = read_preferences(Preferences(files=(str(tmp_path / name),)))
        assert [p.prompt for p in found.preferences] == want
        assert found.unused == {"score": 150}


@pytest.mark.parametrize("format", RIGHT)
def test_every_format_says_the_same_pair_which_is_kept_once(format: str, tmp_path: Path) -> None:
    found = read(tmp_path, format, *RIGHT[format], objective="helpful")
    (kept,) = found.preferences
    assert kept.prompt == TWO_TURNS and (kept.chosen, kept.rejected) == ("Because.", "No.")
    assert kept.objective == "helpful" and kept.source == f"{tmp_path}/in.jsonl:1"
    assert (found.records, found.skipped["duplicate"]) == (len(RIGHT[format]), len(RIGHT[format]) - 1)
    assert (
        kept.preference_id == read(tmp_path, "trl", RIGHT["trl"][0], objective="helpful").preferences[0].preference_id
    )


def test_every_format_of_the_setting_has_a_reader() -> None:
    assert set(READERS) == {*RIGHT, *OTHERS, "pku_saferlhf"}


def test_pku_saferlhf_is_read_by_the_label_the_recipe_names(tmp_path: Path) -> None:
    row = {"prompt": "How?", "response_0": "So.", "response_1": "No.", "better_response_id": 0, "safer_response_id": 1}
    helpful = read(tmp_path, "pku_saferlhf", row).preferences[0]
    harmless = read(tmp_path, "pku_saferlhf", row, better_by="safer_response_id").preferences[0]
    assert (helpful.chosen, helpful.rejected) == ("So.", "No.") == (harmless.rejected, harmless.chosen)
    del row["safer_response_id"]
    (problem,) = problems(tmp_path, "pku_saferlhf", row, better_by="safer_response_id")
    assert (problem.field, problem.found) == ("safer_response_id", "missing")


def test_what_prefers_nothing_is_skipped_and_counted(tmp_path: Path) -> None:
    hh = [
        {"chosen": f"{H}Hi{A}Yes.", "rejected": f"{H}Hi{A}"},
        {"chosen": f"{H}Hi{A}Yes.", "rejected": f"{H}Hi{A}Yes. "},
        {"chosen": f"{H}Hi{A}Yes.{H}So?{A}a", "rejected": f"{H}Hi{A}No.{H}So?{A}b"},
        {"chosen": f"{H}Hi{A}Yes.{H}Thanks", "rejected": f"{H}Hi{A}Yes.{H}Bye"},
        {"chosen": f"{H}Hi{A}Yes.", "rejected": f"{H}Hi{A}No."},
        {"chosen": f"{H}Hi{A}Yes.", "rejected": f"{H}Hi{A}No."},
        {"chosen": f"{H}Hi{A}No.", "rejected": f"{H}Hi{A}Yes."},
        {"chosen": f"{H}Hi{A}Yes.{A}Now.", "rejected": f"{H}Hi{A}Yes.{A}Later."},
    ]
    found = read(tmp_path, "hh_rlhf", *hh)
    assert found.skipped == {
        "empty_answer": 1,
        "identical_answers": 1,
        "different_prompts": 1,
        "no_answer": 1,
        "duplicate": 1,
        "answer_to_no_question": 1,
    }
    assert (found.records, len(found.preferences), found.contradictions) == (8, 2, 2)
    tied = {"context": [user("q")], "response1": "a", "response2": "b", "overall_preference": 0}
    assert read(tmp_path, "helpsteer3", tied).skipped == {"tie": 1}
    tied = {
        "chosen": [user("q"), said("a")],
        "rejected": [user("q"), said("b")],
        "score_chosen": 5,
        "score_rejected": 5,
    }
    assert read(tmp_path, "ultrafeedback", tied).skipped == {"tie": 1}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    acts = {"prompt": "q", "chosen": [{**said(""), "tool_calls": [call]}], "rejected": "b"}
    assert read(tmp_path, "trl", acts).skipped == {"answer_is_not_plain_text": 1}


WRONG = [
    ("trl", {"prompt": "q", "chosen": "a"}, "rejected", "needs `rejected`"),
    ("trl", {"prompt": "q", "chosen": "a", "rejected": 3}, "rejected", "text or a list"),
    ("trl", {"chosen": "a", "rejected": "b"}, "prompt", "preferences.format=hh_rlhf"),
    ("trl", {"prompt": f"{H}q\n\nAssistant:", "chosen": "a", "rejected": "b"}, "prompt", "preferences.format=hh_rlhf"),
    ("trl", {"prompt": 5, "chosen": "a", "rejected": "b"}, "prompt", "text or a list"),
    ("trl", {"prompt": "  ", "chosen": "a", "rejected": "b"}, "prompt", "a user turn with text"),
    ("trl", {"prompt": [user("q"), said("a")], "chosen": "a", "rejected": "b"}, "prompt", "ends with the turn"),
    ("trl", {"prompt": [{"role": "bot"}], "chosen": "a", "rejected": "b"}, "prompt[0].role", "use one of"),
    ("trl", {"prompt": "q", "chosen": [user("x")], "rejected": "b"}, "chosen", "the assistant turn that is judged"),
    ("trl", {"prompt": "q", "chosen": [], "rejected": "b"}, "chosen", "the assistant turn that is judged"),
    (
        "trl",
        {"prompt": "q", "chosen": [said("x"), said("y")], "rejected": [said("x"), said("z")]},
        "chosen",
        "in `prompt`",
    ),
    ("trl", "q, a, b", "record", "JSON object"),
    ("hh_rlhf", {"chosen": "Yes.", "rejected": "No."}, "chosen", "begins with"),
    ("hh_rlhf", {"chosen": f"{H}q{A}a", "rejected": None}, "rejected", "needs `rejected`"),
    (
        "ultrafeedback",
        {"chosen": [user("q"), said("a")], "rejected": [user("q"), said("b")], "score_chosen": 1, "score_rejected": 2},
        "score_chosen",
        "contradict the label",
    ),
    (
        "nemo_aligner",
        {"prompt": "<extra_id_2>quality:4\n", "chosen_response": "a", "rejected_response": "b"},
        "prompt",
        "<extra_id_1>User",
    ),
    (
        "nemo_aligner",
        {"prompt": "q", "chosen_response": "a", "rejected_response": "b", "chosen_reward": "4", "rejected_reward": 1},
        "chosen_reward",
        "a number",
    ),
    ("helpsteer2", {"prompt": "q", "response_1": "a", "response_2": "b"}, "preference_strength", "needs"),
    (
        "helpsteer3",
        {"context": [user("q")], "response1": "a", "response2": "b", "overall_preference": 4},
        "overall_preference",
        "from -3",
    ),
    (
        "pku_saferlhf",
        {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 2},
        "better_response_id",
        "0 or 1",
    ),
]


@pytest.mark.parametrize(("format", "row", "field", "remedy"), WRONG)
def test_a_malformed_row_is_named_with_its_field_and_cure(
    format: str, row: Any, field: str, remedy: str, tmp_path: Path
) -> None:
    (problem,) = problems(tmp_path, format, row)
    assert (problem.file, problem.line, problem.field) == (f"{tmp_path}/in.jsonl", 1, field)
    assert remedy in problem.remedy and problem.found


def test_all_faults_of_all_files_come_at_once(tmp_path: Path) -> None:
    good = {"prompt": "q", "chosen": "a", "rejected": "b"}
    first = written(tmp_path, [good, {"prompt": "q"}, good, {"prompt": "q", "chosen": 1, "rejected": "b"}], "a.jsonl")
    second = written(tmp_path, [], "b.jsonl")
    third = written(tmp_path, [good], "c.jsonl")
    Path(third).write_text(Path(third).read_text() + "{broken\n")
    parquet, torn = tmp_path / "d.parquet", tmp_path / "e.jsonl.gz"
    parquet.write_bytes(b"PAR1 and more")
    torn.write_bytes(gzip.compress(json.dumps(good).encode() * 100)[:-20])
    files = (first, second, third, str(parquet), str(torn), str(tmp_path / "gone.jsonl"))
    with pytest.raises(InputError) as caught:
        read_preferences(Preferences(files=files))
    assert [(Path(p.file).name, p.line, p.field) for p in caught.value.problems] == [
        ("a.jsonl", 2, "chosen"),
        ("a.jsonl", 4, "chosen"),
        ("b.jsonl", None, "file"),
        ("c.jsonl", 2, "line"),
        ("d.parquet", None, "file"),
        ("e.jsonl.gz", None, "file"),
        ("gone.jsonl", None, "preferences.files"),
    ]
    with pytest.raises(InputError, match="at least one preference file"):
        read_preferences(Preferences())


def test_gzipped_lines_and_a_json_list_are_read_like_plain_lines(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(3)]
    plain = Path(written(tmp_path, rows))
    (tmp_path / "z.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "l.json").write_text(json.dumps(rows))
    for name in ("z.jsonl.gz", "l.json"):
        found = read_preferences(Preferences(files=(str(tmp_path / name),)))
        assert [p.prompt[0]["content"] for p in found.preferences] == ["q0", "q1", "q2"]


def test_the_stage_keeps_a_prompts_pairs_on_one_side_and_accounts_for_every_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"q{i % 20}", "chosen": f"yes {i}", "rejected": "no"} for i in range(60)]
    rows += [rows[0], {"prompt": "q", "chosen": "same", "rejected": "same"}]
    settings = Preferences(files=(written(tmp_path, rows),), validation_share=0.2)
    recipe = Recipe(run_dir=str(tmp_path / "run"), preferences=settings)
    path = preferences(recipe)
    kept = [preference_of_row(row) for row in read_rows(path)]
    sides: dict[str, set[str]] = {}
    for p in kept:
        sides.setdefault(p.prompt[0]["content"], set()).add(p.split)
    assert len(kept) == 60 and len(sides) == 20 and all(len(s) == 1 for s in sides.values())
    assert sum(s == {"validation"} for s in sides.values()) == 4
    audit = json.loads((tmp_path / "run/preferences.audit.json").read_text())
    assert audit["records"] == 62 and audit["skipped"] == {"duplicate": 1, "identical_answers": 1}
    assert audit["kept"] == {"train": 48, "validation": 12} and audit["prompts"] == {"train": 16, "validation": 4}
    assert audit["chosen_is_longer"] == 1.0 and "60 + 2 = 62" in capsys.readouterr().out
    assert read_header(path, "preferences").parent
    before = path.read_bytes()
    assert preferences(recipe).read_bytes() == before
    other = dataclasses.replace(recipe, seed=1)
    assert [preference_of_row(r).split for r in read_rows(preferences(other))] != [p.split for p in kept]


def test_the_stage_refuses_files_of_which_nothing_is_kept(tmp_path: Path) -> None:
    tied = {"context": [user("q")], "response1": "a", "response2": "b", "overall_preference": 0}
    settings = Preferences(files=(written(tmp_path, [tied]),), format="helpsteer3")
    with pytest.raises(InputError, match="none kept"):
        preferences(Recipe(run_dir=str(tmp_path / "run"), preferences=settings))
