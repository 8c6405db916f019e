"""Artefacts and folders are what was written, or are refused by name; what is unfinished is never opened through a link."""

import json
import os
import random
import stat
import subprocess
from pathlib import Path

import pytest

from nemo_pivotrl import cli
from nemo_pivotrl.core import artifacts, atomic
from nemo_pivotrl.core.artifacts import ArtefactWriter, Header, file_digest, is_complete, read_header, read_rows
from nemo_pivotrl.core.errors import InputError

HEADER = Header("preferences", "c0ffee", parent="p1", extra={"note": "naïve ☃"})
ROWS = [{"preference_id": f"{i:03}", "text": "x" * (i % 7), "numbers": [i, i / 3]} for i in range(40)]


def write(path: Path, rows: list[dict] = ROWS, header: Header = HEADER) -> Path:
    writer = ArtefactWriter(path, header)
    writer.write(rows)
    return writer.finish()


def refused(path: Path) -> InputError:
    """The one refusal of header, rows and "is it complete"."""
    found = []
    for read in (
        lambda: read_header(path, "preferences"),
        lambda: list(read_rows(path)),
        lambda: is_complete(path, HEADER, False),
    ):
        with pytest.raises(InputError) as caught:
            read()
        found.append(caught.value)
    assert all(p.file == str(path) and p.line and p.remedy for error in found for p in error.problems)
    return found[0]


def test_the_seal_is_the_end_of_the_first_line_and_changes_no_digest(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl")
    first, *rows = path.read_bytes().splitlines(keepends=True)
    told = json.loads(first)
    assert set(told) == {"nemo_pivotrl", "sealed"} and told["sealed"]["rows"] == 40 == len(rows)
    (tmp_path / "old.jsonl").write_bytes(HEADER.to_line().encode() + b"".join(rows))  # as before there were seals
    shown = subprocess.run(["sha256sum", str(tmp_path / "old.jsonl")], capture_output=True, text=True, check=True)
    assert shown.stdout.split()[0] == told["sealed"]["sha256"]
    assert file_digest(path) == file_digest(tmp_path / "old.jsonl") == told["sealed"]["sha256"][:16]


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize(
    ("damage", "line", "found"),
    [
        (lambda a: a[:21], 21, "it ends after 20 rows, and 40 were written"),
        (lambda a: a[:1], 1, "it ends after 0 rows"),
        (lambda a: [*a[:21], a[21][:-5]], 22, "preference_id"),
        (lambda a: [*a, *a[1:]], 42, "the row of line 2 again"),
        (lambda a: [*a, a[7]], 42, "the row of line 8 again"),
        (lambda a: [a[0], a[2], a[1], *a[3:]], 1, "in another order"),
        (lambda a: [a[0], *a[:0:-1]], 1, "in another order"),
        (lambda a: [*a, b'{"preference_id":"new"}\n'], 42, "it ends after 41 rows, and 40 were written"),
        (lambda a: [*a[:5], a[5].replace(b"004", b"104"), *a[6:]], 1, "changed"),
        (lambda a: [*a[:5], b"\0" * len(a[5]), *a[6:]], 6, ""),
        (lambda a: [a[0].replace(b"p1", b"p2"), *a[1:]], 1, "header are not what was written"),
        (lambda a: [a[0].replace(b" \n", b"\n"), *a[1:]], 1, "header are not what was written"),
        (lambda a: [HEADER.to_line().encode(), *a[1:]], 1, "no seal on 40 rows"),
        (lambda a: [artifacts.first_line(HEADER), *a[1:]], 1, "no seal on 40 rows"),
    ],
)
def test_what_was_cut_doubled_reordered_changed_or_never_finished_is_refused(
    tmp_path: Path, damage: object, line: int, found: str
) -> None:
    path = write(tmp_path / "a.jsonl")
    path.write_bytes(b"".join(damage(lines_of(path))))  # type: ignore[operator]
    problem = refused(path).problems[0]
    assert problem.line == line and found in problem.found
    assert "nemo-pivotrl preferences RECIPE fresh=true" in problem.remedy


def test_every_flipped_bit_and_every_cut_is_refused(tmp_path: Path) -> None:
    path, rng = write(tmp_path / "a.jsonl"), random.Random(0)
    whole = path.read_bytes()
    header = whole.index(b"\n") + 1
    places = [*range(header), *rng.sample(range(header, len(whole)), 300)]
    for place in places:
        for bit in (0, 5) if place < header else (rng.randrange(8),):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            with pytest.raises(InputError):
                read_header(path, "preferences")
    for cut in rng.sample(range(len(whole)), 300):
        path.write_bytes(whole[:cut])
        with pytest.raises(InputError):
            read_header(path, "preferences")
    path.write_bytes(whole)
    assert list(read_rows(path)) == ROWS


def test_an_id_that_comes_twice_is_refused_even_under_a_seal(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*ROWS, {**ROWS[3], "text": "another"}])
    with pytest.raises(InputError, match="003, as in line 5"):
        list(read_rows(path))
    assert cli.main(["seal", str(path)]) == 2
    pairs = write(tmp_path / "b.jsonl", [{"id": "a", "sample": 0}, {"id": "a", "sample": 1}], Header("decoded", "c"))
    assert len(list(read_rows(pairs))) == 2


def test_an_old_or_edited_artefact_is_vouched_for_by_a_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.jsonl")
    whole = path.read_bytes()
    path.write_bytes(HEADER.to_line().encode() + b"".join(lines_of(path)[1:]))
    assert "nemo-pivotrl seal" in refused(path).problems[0].remedy
    assert cli.main(["seal", str(path)]) == 0 and "sealed with 40 rows" in capsys.readouterr().out
    assert path.read_bytes() == whole
    path.write_bytes(b"".join(lines_of(path)[:11]))
    assert cli.main(["seal", str(path)]) == 0 and len(list(read_rows(path))) == 10
    path.write_bytes(b"".join(lines_of(path)) + b'{"torn": ')
    assert cli.main(["seal", str(path)]) == 2


def test_a_header_is_not_read_again_while_its_file_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl")
    os.utime(path, (1e9, 1e9))
    read_header(path, "preferences")
    monkeypatch.setattr(artifacts.hashlib, "sha256", None)  # any other look at the content would need it
    assert read_header(path, "preferences") == HEADER and file_digest(path)


@pytest.mark.parametrize("kind", ["link", "dangling", "hard link", "pipe", "folder", "device"])
def test_unfinished_work_is_not_opened_through_a_link_nor_waits_for_a_pipe(tmp_path: Path, kind: str) -> None:
    mine, part = tmp_path / "mine", tmp_path / "a.jsonl.part"
    mine.write_text("precious")
    make = {
        "link": lambda: part.symlink_to(mine),
        "dangling": lambda: part.symlink_to(tmp_path / "nowhere"),
        "hard link": lambda: os.link(mine, part),
        "pipe": lambda: os.mkfifo(part),
        "folder": lambda: part.mkdir(),
        "device": lambda: part.symlink_to("/dev/full"),
    }
    make[kind]()
    with pytest.raises(InputError, match="remove this"):
        atomic.reopen(part)
    assert mine.read_text() == "precious" and not (tmp_path / "nowhere").exists()
    if kind != "folder":
        write(tmp_path / "a.jsonl")
        part.symlink_to(mine)
        atomic.write_atomically(tmp_path / "a.jsonl", "new")
        assert mine.read_text() == "precious" and (tmp_path / "a.jsonl").read_text() == "new"


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "/dev/null", "folder"])
def test_an_input_that_is_no_regular_file_is_refused_and_never_waited_for(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "in.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(kind)
    with pytest.raises(InputError, match="regular file"):
        read_header(path, "preferences")
    with pytest.raises(InputError, match="regular file"):
        file_digest(path)


def test_a_log_gets_whole_lines_whatever_a_kill_left_and_never_through_a_link(tmp_path: Path) -> None:
    path = tmp_path / "log"
    atomic.append_line(path, b"one\n")
    with path.open("ab") as handle:
        handle.write(b"to")
    atomic.append_line(path, b"two\n")
    assert path.read_bytes() == b"one\nto\ntwo\n"
    (tmp_path / "link").symlink_to("log")
    with pytest.raises(OSError):
        atomic.append_line(tmp_path / "link", b"three\n")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="a pipe"):
        atomic.append_line(tmp_path / "pipe", b"three\n")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def filled(folder: Path) -> Path:
    with atomic.replacing_folder(folder, "state/*.big") as part:
        (part / "state").mkdir()
        (part / "state/x.bin").write_bytes(b"x" * 1000)
        (part / "state/y.big").write_bytes(b"y" * 1000)
        (part / "policy").mkdir()
        (part / "policy/model").write_bytes(b"m")
        atomic.write_sums(part / "policy")
        (part / "meta.json").write_text("{}")
    return folder


def test_a_folder_carries_sums_that_sha256sum_reads_and_every_change_is_named(tmp_path: Path) -> None:
    folder = filled(tmp_path / "step_00001")
    assert set(atomic.read_sums(folder)) == {"meta.json", "policy/SHA256SUMS", "state/x.bin"}
    for place in (folder, folder / "policy"):
        subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=place, check=True, capture_output=True)
    assert atomic.check_sums(folder, "mend it")
    (folder / "policy/model").write_bytes(b"n")
    (folder / "state/x.bin").unlink()
    with pytest.raises(InputError) as caught:
        atomic.check_sums(folder, "mend it", ("state/",))
    assert [(p.file, p.found) for p in caught.value.problems] == [(str(folder / "state/x.bin"), "nothing")]
    (folder / "state/x.bin").write_bytes(b"x" * 1000)
    with pytest.raises(InputError, match="policy/model: file: found other bytes"):
        atomic.check_sums(folder, "mend it")
    assert not atomic.check_sums(tmp_path, "mend it")


def test_a_folder_in_the_making_is_not_filled_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/precious").write_text("here")
    (tmp_path / "step_00001.part").symlink_to("mine")
    filled(tmp_path / "step_00001")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["precious"]


def test_sums_that_point_out_of_their_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  ../secret\n")
    with pytest.raises(InputError, match="damaged"):
        atomic.check_sums(tmp_path, "mend it")
