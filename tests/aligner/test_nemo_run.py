"""NeMo-Run's executors for this project: what they would submit, and a stage run by the local one."""

import os
import subprocess
import sys
from pathlib import Path

import fiddle
import nemo_run
import pytest

from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.integrations import nemo_run as nemo_run_cli

RECIPE = Path(__file__).resolve().parents[2] / "recipes/pivotrl/tiny.yaml"
CLUSTER = {"SLURM_ACCOUNT": "acc", "SLURM_PARTITION": "batch", "CONTAINER": "nvcr.io/x:1"}


def nemo(folder: Path, *words: str, **variables: str) -> str:
    """What `nemo pivotrl` prints; its executors start `python`, so the environment must be the active one."""
    programs = Path(sys.executable).parent
    named = {"PATH": f"{programs}:{os.environ['PATH']}", "NEMORUN_HOME": str(folder / "home"), "COLUMNS": "200"}
    command = [str(programs / "nemo"), "pivotrl", *words]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **named, **variables}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        **CLUSTER,
        "PERSISTENT_CACHE": "/cache",
        "EXTRA_MOUNTS": "/a:/b,/c:/d",
        "SLURM_TIME_LIMIT": "2:00:00",
    }.items():
        monkeypatch.setenv(name, value)


def test_a_cluster_that_is_not_described_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CLUSTER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_PARTITION", "batch")
    with pytest.raises(InputError, match=r"SLURM_ACCOUNT, CONTAINER"):
        nemo_run_cli.slurm()


def test_the_slurm_executor_says_what_the_env_file_says(
    cluster: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    made = fiddle.build(nemo_run_cli.slurm(nodes=16, gpus_per_node=4, retries=3))
    assert isinstance(made, nemo_run.SlurmExecutor)
    assert (made.account, made.partition, made.time) == ("acc", "batch", "2:00:00")
    assert (made.nodes, made.ntasks_per_node, made.gpus_per_node, made.retries) == (16, 4, 4, 3)
    assert made.container_image == "nvcr.io/x:1"
    assert made.container_mounts == [f"{tmp_path}:{tmp_path}", "/cache:/cache", "/a:/b", "/c:/d"]


DRY_RUN = """
import fiddle, nemo_run
from nemo_pivotrl.integrations.nemo_run import slurm
executor = fiddle.build(slurm(nodes=2, gpus_per_node=4))
executor.tunnel = nemo_run.LocalTunnel(job_dir="jobs")
with nemo_run.Experiment("pivotrl", base_dir=".") as experiment:
    experiment.add(nemo_run.Script(inline="nemo-pivotrl train recipe.yaml"), executor=executor, name="train")
    experiment.dryrun()
"""


def test_a_dry_run_shows_the_job_script(cluster: None, tmp_path: Path) -> None:
    # in a process of its own: NeMo-Run leaves files open
    done = subprocess.run([sys.executable, "-c", DRY_RUN], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    script = "".join(done.stdout.split())
    for line in ("account=acc", "partition=batch", "nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "time=2:00:00"):
        assert f"#SBATCH--{line}" in script, line
    assert "--container-imagenvcr.io/x:1" in script and "/cache:/cache" in script


def test_the_command_line_knows_both_executors(tmp_path: Path) -> None:
    words = ["world", "--factory", f"recipe(path='{RECIPE}')", "--dryrun"]
    shown = "".join(nemo(tmp_path, *words, "run.executor=slurm", "run.executor.nodes=2", **CLUSTER).split())
    assert "SlurmExecutor" in shown and "nodes=2" in shown
    assert "LocalExecutor" in nemo(tmp_path, *words, "run.executor=local")


def test_the_local_executor_runs_a_stage(tmp_path: Path) -> None:
    words = [
        "world",
        "--factory",
        f"recipe(path='{RECIPE}')",
        f"recipe.run_dir={tmp_path}/run",
        "recipe.world.train_tasks=3",
    ]
    nemo(tmp_path, *words, "run.executor=local", "--yes")
    assert len((tmp_path / "run/world/trajectories.jsonl").read_text().splitlines()) == 3


def test_several_processes_are_torchruns() -> None:
    several, one = fiddle.build(nemo_run_cli.local(processes=2)), fiddle.build(nemo_run_cli.local())
    assert isinstance(several.get_launcher(), nemo_run.Torchrun) and several.nproc_per_node() == 2
    assert not isinstance(one.get_launcher(), nemo_run.Torchrun)


RAY_JOB = """
import fiddle, nemo_run, sys
from nemo_pivotrl.integrations import nemo_run as ours
executor = fiddle.build(ours.slurm(nodes=2, gpus_per_node=8))
executor.tunnel = nemo_run.LocalTunnel(job_dir=sys.argv[1])
ours.ray_job("profile", sys.argv[2], executor, "workers=16", "ray.gpus_per_worker=1", dryrun=True)
"""


def test_a_stage_is_submitted_as_a_ray_job(cluster: None, tmp_path: Path) -> None:
    squeue = tmp_path / "squeue"  # NeMo-Run asks whether the job is there already
    squeue.write_text("#!/bin/sh\n")
    squeue.chmod(0o755)
    named = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NEMORUN_HOME": str(tmp_path / "home")}
    words = [sys.executable, "-c", RAY_JOB, str(tmp_path / "jobs"), str(RECIPE)]
    done = subprocess.run(
        words, cwd=tmp_path, env={**os.environ, **named}, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    command = f"cd {tmp_path} && nemo-pivotrl profile {RECIPE} executor=ray ray.address=auto workers=16"
    assert command in done.stdout and "--nodes=2" in done.stdout and "ray start" in done.stdout
    with pytest.raises(InputError, match="use one of"):
        nemo_run_cli.ray_job("profiles", str(RECIPE), None)
