"""Processes that end together: real ones, of which one raises, is killed, hangs or never comes."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.processes import python

from nemo_pivotrl.backends.launch import Place, as_torchrun, first_host, place_of
from nemo_pivotrl.core.errors import InputError

HERE = Path(__file__).parent
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_NODELIST": "gpu[003-006,009],login1",
}


def test_places() -> None:
    assert place_of(TORCHRUN) == Place(3, 8, 1, "a", 29500)
    assert place_of(TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).agent_store
    assert place_of(TORCHRUN | SRUN) == Place(3, 8, 1, "a", 29500)  # torchrun inside srun: torchrun knows
    assert place_of(SRUN) == Place(5, 16, 1, "gpu003", 20000 + 123456 % 20000)
    assert place_of(SRUN | {"SLURM_STEP_NUM_TASKS": "8"}).world == 8
    assert place_of(SRUN | {"MASTER_ADDR": "b", "MASTER_PORT": "7"}).address == "b"
    batch_script = {key: value for key, value in SRUN.items() if key != "SLURM_STEP_ID"} | {"SLURM_PROCID": "0"}
    assert place_of(batch_script) == place_of({}) == Place(0, 1, 0, "127.0.0.1", 0)
    assert as_torchrun(place_of(TORCHRUN)) == TORCHRUN


def test_half_of_torchruns_variables_are_refused() -> None:
    with pytest.raises(InputError, match="MASTER_PORT"):
        place_of({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[003-006,009],login1", "gpu003"),
        ("r[1-2]n[01-04]", "r1n01"),
        ("dgx-a.cluster[7]", "dgx-a.cluster7"),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize("nodes", ["", "a[", "; rm"])
def test_what_is_no_node_list_is_refused(nodes: str) -> None:
    with pytest.raises(InputError, match="MASTER_ADDR"):
        first_host(nodes)


def launch(*arguments: str, ranks: int = 3, started: int = 3) -> tuple[list[int], str, float]:
    """(exit codes, everything on stderr that is ours, seconds) of a job."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    begun = time.monotonic()
    processes = [
        python(
            *("-W", "ignore", str(HERE / "launch_jobs.py"), *arguments),
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(started)
    ]
    try:
        for process in processes:
            process.wait()
    finally:
        for process in processes:
            process.kill()
    errors = [process.err.read_text() for process in processes]
    ours = "".join(line + "\n" for error in errors for line in error.splitlines() if "nemo-pivotrl:" in line)
    return [process.returncode for process in processes], ours, time.monotonic() - begun


def test_a_job_without_trouble_ends_with_0_and_no_word() -> None:
    assert launch("well")[:2] == ([0, 0, 0], "")


@pytest.mark.parametrize("victim", ["0", "1"])
def test_a_rank_that_raises_ends_all_with_one_error(victim: str) -> None:
    codes, error, _ = launch("raise", victim)
    assert codes == [1, 1, 1]
    assert error == f"nemo-pivotrl: rank {victim} failed: ZeroDivisionError: of all things\n"


def test_bad_input_has_its_own_code() -> None:
    codes, error, _ = launch("input", "2")
    assert codes == [1, 1, 2] and error.count("nemo-pivotrl:") == 1 and "rank 2 failed: 1 problem" in error


def test_a_rank_that_raises_after_the_others_were_done_is_no_success() -> None:
    codes, error, _ = launch("late", "1")
    assert codes[:2] == [1, 1] and "rank 1 failed: ValueError: after the others were done" in error


def test_a_killed_rank_is_named() -> None:
    codes, error, _ = launch("kill", "1")
    assert codes == [1, -9, 1] and error == "nemo-pivotrl: rank 1 died: no sign of life for 2 s\n"


def test_when_the_store_dies_with_rank_0_the_others_end_too() -> None:
    codes, error, _ = launch("kill", "0")
    assert codes == [-9, 1, 1] and error == "nemo-pivotrl: rank 0 died: its store does not answer\n"


def test_a_rank_that_hangs_is_named_with_where() -> None:
    codes, error, seconds = launch("hang", "2")
    assert codes == [1, 1, 1] and seconds < 40
    assert error == "nemo-pivotrl: rank 2 hangs in 'step 1': no progress for 4 s, the others wait for it\n"


def test_a_rank_that_works_alone_while_the_others_rest_does_not_hang() -> None:
    codes, error, seconds = launch("busy")
    assert (codes, error) == ([0, 0, 0], "") and seconds > 7


def test_a_rank_that_hangs_while_the_others_rest_is_named() -> None:
    codes, error, seconds = launch("lost", "1")
    assert codes == [1, 1, 1] and seconds < 40
    assert error == "nemo-pivotrl: rank 1 hangs in 'infer': no progress for 4 s, the others wait for it\n"


def test_a_rank_that_never_comes_is_named() -> None:
    codes, error, _ = launch("well", started=2)
    assert codes == [1, 1] and error.count("nemo-pivotrl:") == 1 and "rank 2 did not arrive in 10 s" in error


def test_a_finished_process_leaves_before_its_teardown_can_fail(tmp_path: Path) -> None:
    program = f"""
import atexit, os, pathlib
from nemo_pivotrl.backends.launch import leave

class Group:
    def __del__(self):
        os._exit(9)

held = Group()
atexit.register(pathlib.Path({str(tmp_path / "closed")!r}).touch)
print("last line")
leave(CODE)
"""
    for code in (0, 2):
        done = subprocess.run(
            [sys.executable, "-c", program.replace("CODE", str(code))], capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == (code, "last line\n"), done.stderr
        assert (tmp_path / "closed").exists()
        (tmp_path / "closed").unlink()
    done = subprocess.run([sys.executable, "-c", program.replace("leave(CODE)", "")], capture_output=True)
    assert done.returncode == 9  # this is what an ordinary end would do
