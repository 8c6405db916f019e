"""One writer a run folder: a second is refused by name and changes nothing; a dead one holds nothing."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from nemo_pivotrl import cli
from nemo_pivotrl.core import lock
from nemo_pivotrl.core.errors import AtWork, InputError
from nemo_pivotrl.core.lock import local_only_of, one_writer, only_writer

HOLDER = """
import sys
from pathlib import Path
from nemo_pivotrl.core.lock import only_writer
with only_writer(Path(sys.argv[1]), sys.argv[2], sys.argv[3]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE_S", 0.0)


@contextmanager
def holder(folder: Path, work: str = "reward", member: str = "") -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder's lock until it is told to end."""
    words = [sys.executable, "-c", HOLDER, str(folder), work, member]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and ".lock" not in p.name
    }


def test_a_second_process_is_refused_by_name_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        with pytest.raises(AtWork) as caught, only_writer(tmp_path, "train"):
            pass
        assert f"reward, pid {process.pid} on {os.uname().nodename}, since 20" in caught.value.holder
        assert str(tmp_path) in str(caught.value) and "nothing was changed" in str(caught.value)
        again = pickle.loads(pickle.dumps(caught.value))
        assert (type(again), str(again)) == (AtWork, str(caught.value))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with only_writer(tmp_path, "train"):
            pass


def test_another_name_of_the_folder_is_the_same_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    with holder(tmp_path / "run"), pytest.raises(AtWork), only_writer(tmp_path / "link", "train"):
        pass


def test_stages_inside_a_stage_run_under_its_lock_and_other_threads_do_not(tmp_path: Path) -> None:
    seen: list[BaseException] = []

    @one_writer
    def inner(recipe: SimpleNamespace) -> str:
        return "done"

    def elsewhere() -> None:
        try:
            inner(recipe)
        except AtWork as error:
            seen.append(error)

    @one_writer
    def outer(recipe: SimpleNamespace) -> str:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return inner(recipe)

    recipe = SimpleNamespace(run_dir=str(tmp_path))
    assert outer(recipe) == "done" and len(seen) == 1
    assert "outer" in str(seen[0])  # and the refusal has not dropped the lock:
    with only_writer(tmp_path, "first"):
        with pytest.raises(AtWork):
            threading_call(lambda: inner(recipe))
        with pytest.raises(subprocess.CalledProcessError):
            subprocess.run([sys.executable, "-c", HOLDER, str(tmp_path), "x", ""], check=True, capture_output=True)


def threading_call(run: object) -> None:
    found: list[BaseException] = []

    def guarded() -> None:
        try:
            run()  # type: ignore[operator]
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join()
    raise found[0]


def _try(folder: Path, answers: "multiprocessing.SimpleQueue[str]") -> None:
    try:
        with only_writer(folder, "child"):
            answers.put("held")
    except AtWork as error:
        answers.put(error.holder)


def test_a_forked_child_does_not_have_its_parents_lock(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    with only_writer(tmp_path, "parent"):
        child = context.Process(target=_try, args=(tmp_path, answers))
        child.start()
        child.join()
        assert f"parent, pid {os.getpid()}" in answers.get()


def test_shards_share_a_folder_and_exclude_their_like_and_everybody_else(tmp_path: Path) -> None:
    with holder(tmp_path, "profile", "shard 0/2") as first:
        with only_writer(tmp_path, "profile", "shard 1/2"):
            pass
        with pytest.raises(AtWork, match=f"profile shard 0/2, pid {first.pid}"), only_writer(tmp_path, "select"):
            pass
        with (
            pytest.raises(AtWork, match=f"profile shard 0/2, pid {first.pid}"),
            only_writer(tmp_path, "profile", "shard 0/2"),
        ):
            pass
    with (
        holder(tmp_path, "select"),
        pytest.raises(AtWork, match="select"),
        only_writer(tmp_path, "profile", "shard 1/2"),
    ):
        pass


def test_a_report_goes_on_beside_a_stage_and_not_beside_another_report(tmp_path: Path) -> None:
    with holder(tmp_path, "train"), only_writer(tmp_path, "report"):
        pass
    with holder(tmp_path, "report"), only_writer(tmp_path, "train"):
        pass
    with holder(tmp_path, "report"), pytest.raises(AtWork), only_writer(tmp_path, "report"):
        pass


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_lock_that_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "mine").write_text("precious")
    if kind == "link":
        (tmp_path / ".lock").symlink_to("mine")
    else:
        os.mkfifo(tmp_path / ".lock")
    with pytest.raises((InputError, OSError)), only_writer(tmp_path, "train"):
        pass
    assert (tmp_path / "mine").read_text() == "precious"


MOUNTS = [
    "22 1 0:21 / / rw - ext4 /dev/sda rw",
    "23 22 0:22 / /scratch rw - nfs4 server:/a rw,vers=4.2,local_lock=none",
    "24 22 0:23 / /old rw - nfs server:/b rw,nolock,vers=3",
    "25 22 0:24 / /old/deep\\040er rw - nfs server:/c rw,local_lock=flock",
    "26 22 0:25 / /fast rw - lustre mds:/d rw,localflock",
    "27 22 0:26 / /home/me/ssh rw - fuse.sshfs me@host: rw",
]


@pytest.mark.parametrize(
    ("folder", "told"),
    [
        ("/runs/a", ""),
        ("/scratch/a", ""),
        ("/old/a", "nfs at /old"),
        ("/old/deep er/a", ""),
        ("/older/a", ""),
        ("/fast", "lustre at /fast"),
        ("/home/me/ssh/a", "fuse.sshfs at /home/me/ssh"),
    ],
)
def test_mounts_whose_locks_do_not_reach_other_machines_are_told(folder: str, told: str) -> None:
    assert local_only_of(MOUNTS, folder) == told


def test_every_command_that_writes_in_a_run_folder_exits_75_at_once_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text(f"run_dir: {tmp_path}/run\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/ledger.jsonl").write_text("{}\n")
    before = files(tmp_path)
    with holder(tmp_path / "run", "train") as process:
        for stage in set(cli.STAGES) - {"report"}:
            assert cli.main([stage, str(tmp_path / "r.yaml"), "fresh=true"]) == 75, stage
            assert f"at work here: train, pid {process.pid}" in capsys.readouterr().err
        assert cli.main(["profile", str(tmp_path / "r.yaml"), "--shard", "0/2"]) == 75
    assert files(tmp_path) == before
