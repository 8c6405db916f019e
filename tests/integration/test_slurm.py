"""The job scripts in deploy/slurm, run by a stub of Slurm (`slurm/stub.py`): real processes, Slurm's variables, no scheduler."""

import json
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support.fork_door import fork_door
from support.processes import wait_for
from support.recipes import SMALL
from support.slurm import SCRIPTS, environment

from nemo_pivotrl.components.checkpoint import time_limit
from nemo_pivotrl.core.artifacts import read_rows


def launch(folder: Path, *words: str, **settings: str) -> str:
    done = subprocess.run(
        ["bash", str(SCRIPTS / "launch.sh"), *words],
        cwd=folder,
        env=environment(folder, **settings),
        capture_output=True,
        text=True,
        check=False,
    )
    logs = (
        "".join(path.read_text() for path in sorted((folder / "logs").rglob("*.log")))
        if (folder / "logs").exists()
        else ""
    )
    assert done.returncode == 0, done.stdout + done.stderr + logs
    return done.stdout


def jobs(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("job-*.json"))]


def steps(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 2])
def test_the_whole_pipeline_runs_as_jobs_and_trains_in_two_processes(
    trained: Path, tmp_path: Path, shards: int
) -> None:
    for name in ("world", "start"):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / name).symlink_to(trained / name)
    cpu = ["policy.backend=megatron", "megatron.cpu=true", "megatron.bf16=false"]
    extra = " ".join([f"run_dir={tmp_path}/run", *SMALL, *cpu, "grpo.max_num_steps=2"])
    with fork_door(tmp_path) as python:
        command = f"{python} -m nemo_pivotrl.cli"
        settings = {"EXTRA_HYDRA_ARGS": extra, "GPUS_PER_NODE": "2", "NUM_SHARDS": str(shards)}
        launch(tmp_path, "all", COMMAND_PREFIX=command, **settings)
    log = "".join(path.read_text() for path in sorted((tmp_path / "logs/test").glob("*.log")))
    assert all(set(job["codes"]) == {0} for job in jobs(tmp_path)), log
    started = [step["command"][step["command"].index("nemo_pivotrl.cli") + 1] for step in steps(tmp_path)]
    assert started == ["extract", *["profile"] * shards, *["merge"] * (shards > 1), "select", "train"]
    assert [step["tasks"] for step in steps(tmp_path)] == [1] * (len(started) - 1) + [2]
    assert (tmp_path / "run/pivotrl/policy/config.json").exists()
    metrics = [json.loads(line) for line in (tmp_path / "run/pivotrl/metrics.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in metrics) == 2
    assert len(list(read_rows(tmp_path / "run/profiles.jsonl"))) == len(
        list(read_rows(tmp_path / "run/candidates.jsonl"))
    )


def test_what_would_be_submitted_is_printed_and_nothing_is(tmp_path: Path) -> None:
    said = launch(
        tmp_path, "all", DRY_RUN="true", NUM_SHARDS="8", SBATCH_NUM_NODES="64", NUM_SERVER_NODES="32", NO_GRES="0",
        SLURM_ACCOUNT="me", SLURM_TIME_LIMIT="4:0:0", GPUS_PER_NODE="8", VAL_PATH="",
    ).splitlines()  # fmt: skip
    assert not jobs(tmp_path) and not (tmp_path / "logs").exists()
    scripts = [
        line.split()[-2:] if line.endswith(("extract", "merge", "select")) else line.split()[-1:] for line in said
    ]
    assert [Path(words[0]).name for words in scripts] == [
        "stage.sbatch", "profile.sbatch", "stage.sbatch", "stage.sbatch", "train.sbatch",
    ]  # fmt: skip
    assert [line.partition("--dependency=")[2].split(" ")[0] for line in said] == [
        "", "afterok:<extract>", "afterany:<profile>", "afterok:<merge>", "afterok:<select>",
    ]  # fmt: skip
    assert (
        "--array=0-7" in said[1] and "--nodes=64" in said[4] and "--gres=gpu:8" in said[4] and "--gres" not in said[0]
    )
    assert all("--account=me" in line and "--time=4:0:0" in line and "--signal=B:USR1@600" in line for line in said)


PRETENDED = """#!/bin/sh
echo "$@" >>"$STUB_DIR/asked"
case $1 in
serve) exec sleep 60 ;;
*) exit "${PRETEND_CODE:-0}" ;;
esac
"""


def pretend(folder: Path, stage: str = "train", **settings: str) -> tuple[dict[str, Any], str]:
    """A stage's job whose commands do nothing: the job, and what was asked."""
    (folder / "command").write_text(PRETENDED)
    (folder / "command").chmod(0o755)
    curl = folder / "bin/curl"
    curl.parent.mkdir(exist_ok=True)
    servers = settings.get("NUM_SERVER_NODES", "0")  # they are healthy as soon as all of them were started
    curl.write_text(f"#!/bin/sh\n[ \"$(grep -c '^serve' {folder}/asked)\" -ge {servers} ]\n")
    curl.chmod(0o755)
    launch(folder, stage, COMMAND_PREFIX=str(folder / "command"), **settings)
    (job,) = jobs(folder)
    return job, (folder / "asked").read_text()


RAY = """#!/bin/sh
# as `ray symmetric-run` does: Ray everywhere, the command on the first node alone
echo "$@" >>"$STUB_DIR/ray-asked"
[ "$SLURM_PROCID" = 0 ] || exit 0
while [ "$1" != -- ]; do shift; done
shift
exec "$@"
"""


def test_a_profile_on_ray_is_one_process_on_the_first_of_its_nodes(tmp_path: Path) -> None:
    (tmp_path / "ray").write_text(RAY)
    (tmp_path / "ray").chmod(0o755)
    settings = {"RAY_NODES": "3", "RAY_PREFIX": str(tmp_path / "ray"), "GPUS_PER_NODE": "8", "GPUS_PER_WORKER": "2"}
    job, asked = pretend(tmp_path, "profile", **settings)
    assert job["codes"] == [0] and job["options"]["--nodes"] == "3" and "--array" not in job["options"]
    (started,) = asked.splitlines()
    assert started.startswith("profile ") and started.endswith(
        "executor=ray ray.address=auto ray.gpus_per_worker=2 workers=12"
    )
    assert steps(tmp_path)[-1]["tasks"] == 3
    assert (
        "symmetric-run --address 127.0.0.1:6379 --min-nodes 3 -- env -u SLURM_STEP_ID"
        in (tmp_path / "ray-asked").read_text()
    )


def test_servers_stand_beside_the_training_and_leave_with_it(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    job, asked = pretend(
        tmp_path, SBATCH_NUM_NODES="3", NUM_SERVER_NODES="2", GPUS_PER_NODE="1", PERSISTENT_CACHE=str(cache)
    )
    assert job["codes"] == [0]
    serving = [line for line in asked.splitlines() if line.startswith("serve")]
    (training,) = {line for line in asked.splitlines() if line.startswith("train")}
    assert sorted(line.split("--host ")[1].split()[0] for line in serving) == ["127.0.0.2", "127.0.0.3"]
    assert "vllm.servers=[http://127.0.0.2:8000,http://127.0.0.3:8000]" in training.split()
    assert f"vllm.refit_folder={cache}/refit-test" in training and all("--refit" in line for line in serving)
    trainer = steps(tmp_path)[-1]["options"]
    assert trainer["--nodes"] == "1" and trainer["-w"] == "127.0.0.1"


def test_servers_without_a_shared_folder_are_refused(tmp_path: Path) -> None:
    launch(tmp_path, "train", SBATCH_NUM_NODES="2", NUM_SERVER_NODES="1", COMMAND_PREFIX="true")
    (job,) = jobs(tmp_path)
    (log,) = (tmp_path / "logs/test").glob("*.log")
    assert job["codes"] != [0] and "set PERSISTENT_CACHE" in log.read_text()


def test_a_run_that_stopped_at_its_deadline_is_requeued_and_another_failure_is_not(tmp_path: Path) -> None:
    for name, code, requeued in (("paused", "75", True), ("failed", "2", False), ("done", "0", False)):
        folder = tmp_path / name
        folder.mkdir()
        job, _ = pretend(folder, PRETEND_CODE=code, GPUS_PER_NODE="2")
        assert job["codes"] == [2 if name == "failed" else 0]
        assert bool(list(folder.glob("requeued-*"))) is requeued, name


@pytest.mark.parametrize("stage", ["train", "sft", "tfpo"])
def test_the_deadline_is_the_jobs_time_limit_less_the_margin(tmp_path: Path, stage: str) -> None:
    _, asked = pretend(tmp_path, stage, STUB_TIME_S="95000", SAVE_MARGIN="5000", GPUS_PER_NODE="1")
    (word,) = [w for w in asked.split() if w.startswith("checkpointing.checkpoint_must_save_by=")]
    assert 89990 <= time_limit(word.partition("=")[2].strip("'")) <= 90000 and word.partition("=")[2].startswith("'01:")


def test_a_warning_before_the_time_limit_requeues_and_lets_the_step_end(tmp_path: Path) -> None:
    step = "(while [ ! -e go ]; do sleep 0.02; done; exit 0)"
    script = f"SCRIPTS={SCRIPTS}; source $SCRIPTS/common.sh; {step} & requeue_or_wait $!; echo code $?"
    settings = environment(tmp_path, SLURM_JOB_ID="7", SLURM_SUBMIT_DIR=str(tmp_path))
    started = subprocess.Popen(["bash", "-c", script], env=settings, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    wait_for(lambda: catches(started.pid, signal.SIGUSR1), "a handler for the warning")
    started.send_signal(signal.SIGUSR1)
    wait_for((tmp_path / "requeued-7").exists, "the job to be queued again")
    (tmp_path / "go").touch()
    out, _ = started.communicate(timeout=60)
    assert "code 0" in out


def catches(pid: int, number: signal.Signals) -> bool:
    (caught,) = re.findall(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(caught, 16) >> (number - 1) & 1)


def test_a_container_is_asked_for_with_its_mounts(tmp_path: Path) -> None:
    _, _ = pretend(
        tmp_path, CONTAINER="nvcr.io/x:1", EXTRA_MOUNTS="/a:/b", PERSISTENT_CACHE=str(tmp_path / "c"), GPUS_PER_NODE="1"
    )
    options = steps(tmp_path)[-1]["options"]
    assert options["--container-image"] == "nvcr.io/x:1" and options["--container-workdir"] == str(tmp_path)
    assert options["--container-mounts"] == f"{tmp_path}:{tmp_path},{tmp_path}/c:{tmp_path}/c,/a:/b"


def test_settings_of_the_env_file_become_overrides(tmp_path: Path) -> None:
    _, asked = pretend(
        tmp_path,
        MODEL_PATH="/m",
        TRAIN_PATH="/d.jsonl",
        WANDB_PROJ="p",
        EXTRA_HYDRA_ARGS="a.b=1 c.d=2",
        GPUS_PER_NODE="1",
    )
    words = asked.split()
    assert words[0] == "train" and words[1].endswith("tiny.yaml")
    assert words[2:8] == [
        "policy.model_name=/m", "extract.trajectories=[/d.jsonl]", "logger.project=p", "logger.wandb=true", "a.b=1", "c.d=2",
    ]  # fmt: skip


def test_an_unedited_env_file_submits_nothing(tmp_path: Path) -> None:
    command = f"set -a; source {SCRIPTS}/cluster.env; set +a; bash {SCRIPTS}/launch.sh all"
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 2 and not done.stdout and not (tmp_path / "logs").exists()
    assert "not filled in: EXP_NAME CONFIG_PATH SLURM_PARTITION GPUS_PER_NODE" in done.stderr


def test_the_env_file_names_every_variable_the_scripts_read() -> None:
    told = set(re.findall(r"^(\w+)=", (SCRIPTS / "cluster.env").read_text(), flags=re.MULTILINE))
    text = "".join(path.read_text() for path in SCRIPTS.glob("*") if path.name != "cluster.env")
    read = set(re.findall(r"\$\{([A-Z][A-Z_]+):", text))
    inner = {
        "SCRIPTS",
        "COMMAND_PREFIX",
        "NO_GRES",
        "RAY_PORT",
        "SERVER_PORT",
        "VAL_PATH",
        "VLLM_API_KEY",
    }  # a job makes itself a key
    assert told <= {*read, "EXP_NAME"} and {name for name in read if not name.startswith("SLURM_JOB")} - inner <= told
