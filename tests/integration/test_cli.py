"""The command line: quick to answer, one screen for a mistake, and a full disk costs nothing that was finished."""

import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.pointers import write_candidates
from support.recipes import ROOT

from nemo_pivotrl import cli
from nemo_pivotrl.components.journal import Journal
from nemo_pivotrl.config import Extract
from nemo_pivotrl.core.types import Action, Candidate, ToolCall
from nemo_pivotrl.data.gym_rows import candidate_to_row

HEAVY = ["torch", "transformers", "numpy", "omegaconf", "yaml", "matplotlib", "jsonschema"]


@contextmanager
def disk_with_room_for(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes: the kernel fails the write as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


def extract_recipe(folder: Path, trajectories: int = 40) -> str:
    """A recipe whose extract stage writes one candidate for each trajectory."""
    records = [
        {"reward": 1, "messages": [{"role": "user", "content": f"q{i} " * 50}, {"role": "assistant", "content": "a"}]}
        for i in range(trajectories)
    ]
    (folder / "in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    settings = f"run_dir: {folder}/run\nextract: {{trajectories: {folder}/in.jsonl}}\nverifier: {{message: any}}\n"
    (folder / "r.yaml").write_text(settings)
    return str(folder / "r.yaml")


def test_help_lists_every_stage_within_a_second_and_imports_nothing_heavy() -> None:
    def seconds() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    begun = seconds()
    shown = command("-m", "nemo_pivotrl.cli", "--help")
    took = seconds() - begun  # of a processor, whatever else it does
    assert shown.returncode == 0 and shown.stderr == ""
    assert all(f"\n  {stage} " in shown.stdout for stage in cli.STAGES)
    assert took < 1.0


HELP = """
import sys, time
from nemo_pivotrl import cli
from nemo_pivotrl.config import Extract
for name in [None, *cli.STAGES, *cli.TOOLS]:
    begun = time.process_time()
    try:
        cli.main([name, "--help"] if name else ["--help"])
    except SystemExit as end:
        print(name, end.code, time.process_time() - begun, file=sys.stderr)
print([m for m in HEAVY if m in sys.modules], file=sys.stderr)
"""


def test_every_commands_own_help_is_quick_and_imports_nothing_heavy() -> None:
    shown = command("-c", HELP.replace("HEAVY", repr(HEAVY)))
    *rows, heavy = shown.stderr.splitlines()
    assert heavy == "[]" and len(rows) == 1 + len(cli.STAGES) + len(cli.TOOLS)
    for name, code, took in (row.split(" ") for row in rows):
        assert code == "0" and float(took) < 1.0, name
        assert name == "None" or f"usage: nemo-pivotrl {name} [-h]" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["extrakt", "r.yaml"], "did you mean extract?"),
        (["verfy", "--verifier", "swe"], "did you mean verify?"),
        (["serve-guided", "r.yaml"], "nemo-pivotrl serve RECIPE"),
        (["zzz"], "use one of world, extract"),
        ([], "COMMAND"),
        (["--print-config"], "COMMAND"),
        (["select"], "required: RECIPE\n"),
        (["export", "nemo-rl"], "required: RECIPE\n"),
        (["select", "r.yaml", "--lambda", "1"], "unrecognized arguments: --lambda"),
        (["compare", "a.jsonl"], "B.jsonl"),
        (["compare", "a.jsonl", "b.jsonl", "--lambda", "2"], "2 is no number from 0 to 1"),
    ],
)
def test_a_wrong_command_line_exits_2_and_says_what_is_missing(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2 and said in capsys.readouterr().err


def test_options_and_overrides_may_stand_in_any_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text("seed: 1\n")
    shown = set()
    words = ["select.limit=3", str(tmp_path / "r.yaml"), "--print-config", "seed=2", "--changed"]
    for order in ([1, 0, 3, 2, 4], [2, 1, 0, 4, 3], [1, 2, 0, 3, 4], [2, 4, 1, 3, 0]):
        assert cli.main(["select", *(words[i] for i in order)]) == 0
        shown.add(capsys.readouterr().out)
    assert len(shown) == 1 and "seed: 2" in shown.pop()


@pytest.mark.parametrize(("words", "usage"), [([], "nemo-pivotrl STAGE"), (["plan"], "nemo-pivotrl plan [-h]")])
def test_help_is_a_word_too(words: list[str], usage: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["help", *words])
    assert caught.value.code == 0 and f"usage: {usage}" in capsys.readouterr().out


def test_export_takes_its_target_as_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text("seed: 1\n")
    for target in cli.EXPORTS:
        assert cli.main(["export", target, str(tmp_path / "r.yaml"), "--print-config"]) == 0
        assert f"  target: {target} " in capsys.readouterr().out


def test_a_recipe_typo_exits_2_with_the_cure_on_stderr_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("select: {lamda_diff: 0.5}\n")
    done = command("-m", "nemo_pivotrl.cli", "select", str(tmp_path / "r.yaml"))
    assert done.returncode == 2 and done.stdout == ""
    assert "select.lamda_diff" in done.stderr and "did you mean `lambda_diff`?" in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) < 25


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["select", "nowhere.yaml"], "nowhere.yaml"),
        (["select", "RECIPE", "select.lambda_diff=7"], "from 0.0 to 1.0"),
        (["select", "RECIPE", "nonsense"], "section.key=value"),
        (["select", "RECIPE"], "`nemo-pivotrl profile RECIPE` makes it"),
        (["export", "RECIPE"], "`nemo-pivotrl select RECIPE` makes it"),
        (["extract", "RECIPE", "extract.trajectories=[gone.jsonl]"], "gone.jsonl"),
        (
            ["extract", "RECIPE", "lr=1e-5"],
            "command line: lr: found unknown key `lr`\n    -> did you mean `policy.optimizer.lr`?",
        ),
        (["extract", "RECIPE", "verifier.name=functionl"], "did you mean functional?"),
        (["extract", "RECIPE", "run_dir=RECIPE/below"], "mend the path"),
    ],
)
def test_bad_input_to_a_stage_exits_2_and_says_what_to_do(
    tmp_path: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = extract_recipe(tmp_path)
    assert cli.main([a.replace("RECIPE", recipe) for a in arguments]) == 2
    shown = capsys.readouterr()
    assert said.replace("RECIPE", recipe) in shown.err and shown.err.startswith(f"nemo-pivotrl {arguments[0]}: ")


def test_a_missing_optional_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)  # Python's own way to say "not installed"
    assert cli.main(["extract", extract_recipe(tmp_path)]) == 2
    assert "no module datasketch" in (shown := capsys.readouterr().err) and "nemo-pivotrl[reference]" in shown


def test_an_unknown_stage_is_refused_before_anything_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["extrakt", "nowhere.yaml"])
    assert caught.value.code == 2 and "extract" in capsys.readouterr().err


def test_all_invalid_trajectories_are_named_by_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = extract_recipe(tmp_path)
    with (tmp_path / "in.jsonl").open("a") as handle:
        handle.write('{"messages": []}\n{broken\n')
    assert cli.main(["extract", recipe]) == 2
    shown = capsys.readouterr().err
    assert "2 problems" in shown and "in.jsonl:41: messages" in shown and "in.jsonl:42: line" in shown


def test_a_full_disk_exits_2_leaves_the_part_and_the_same_command_then_finishes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run = extract_recipe(tmp_path), tmp_path / "run"
    assert cli.main(["extract", recipe, f"run_dir={tmp_path}/whole"]) == 0
    names = ("trajectories.jsonl", "candidates.jsonl")
    whole, pointers = ((tmp_path / "whole" / name).read_bytes() for name in names)
    capsys.readouterr()
    with disk_with_room_for(len(whole) // 2):
        assert cli.main(["extract", recipe]) == 2
    shown = capsys.readouterr().err
    assert "File too large" in shown and "run the same command again" in shown and "Traceback" not in shown
    assert not any((run / name).exists() for name in names)
    part, room = (run / "trajectories.jsonl.part").read_bytes(), len(whole) // 2
    header = whole.index(b"\n")  # with the place of the seal, which is filled in at the end
    assert len(part) == room and part[header:] == whole[header:room]
    assert cli.main(["extract", recipe]) == 0
    assert [(run / name).read_bytes() for name in names] == [whole, pointers] and not list(run.glob("*.part"))


def test_a_journal_stopped_by_a_full_disk_keeps_its_whole_records_and_goes_on(tmp_path: Path) -> None:
    belongs, payload = b"{}\n", b"x" * 200 + b"\n"
    whole = len(belongs) + 30 * (len(payload) + 25)
    for room in range(300, whole, 617):
        journal = Journal(tmp_path / f"{room}", belongs)
        with disk_with_room_for(room), pytest.raises(OSError):
            for number in range(30):
                journal.finish(number, payload, 1, 1)
        done = len(journal.done)
        journal = Journal(journal.path, belongs)
        assert sorted(journal.done) == list(range(done)) and done > 0
        for number in range(done, 30):
            journal.finish(number, payload, 1, 1)
        assert all(journal.read(journal.done[number]) == payload for number in range(30))
        journal.close()


def test_export_writes_gym_rows_without_a_header_one_file_a_split_whatever_text_they_hold(tmp_path: Path) -> None:
    def candidate(name: str, split: str) -> Candidate:
        state = ({"role": "user", "content": f"lone \ud83d {name}"},)
        expected = Action("calls", calls=(ToolCall("f", "{}"),))
        return Candidate(name, "t", "k", split, 1, 0, state, (), expected)  # type: ignore[arg-type]

    made = [candidate("a", "train"), candidate("b", "validation"), candidate("c", "train")]
    (tmp_path / "run").mkdir()
    write_candidates(tmp_path / "run/pivots.jsonl", made, stage="pivots")
    rows = [candidate_to_row(c, Extract().agent_ref) for c in made]
    assert cli.main(["export", extract_recipe(tmp_path)]) == 0
    found = {
        s: [json.loads(line) for line in (tmp_path / f"run/gym/{s}.jsonl").read_bytes().splitlines()]
        for s in ("train", "validation")
    }
    assert found == {"train": [rows[0], rows[2]], "validation": [rows[1]]}
