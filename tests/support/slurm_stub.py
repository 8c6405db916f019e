"""`sbatch`, `srun` and `scontrol` without Slurm: jobs run at once, one after another, on this machine, with Slurm's variables.

Called as `stub.py PROGRAM ARGUMENT...`. STUB_DIR holds what was submitted; a job that another depends on must have ended well
(afterok) or at all (afterany).
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

STORE = Path(os.environ["STUB_DIR"])
VALUED = ("-w",)


def split(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Leading options, and the rest: what is run."""
    options: dict[str, str] = {}
    while words and words[0].startswith("-"):
        name, _, value = words.pop(0).partition("=")
        options[name] = words.pop(0) if name in VALUED else value
    return options, words


def headed(script: Path) -> dict[str, str]:
    lines = [
        line.removeprefix("#SBATCH ").split() for line in script.read_text().splitlines() if line.startswith("#SBATCH ")
    ]
    return split([word for line in lines for word in line])[0]


def sbatch(words: list[str]) -> int:
    given, (script, *arguments) = split(words)
    options = headed(Path(script)) | given
    job = 1000 + len(list(STORE.glob("job-*.json")))
    how, _, before = options.get("--dependency", "").partition(":")
    done = json.loads((STORE / f"job-{before}.json").read_text())["codes"] if before else []
    assert how in ("", "afterok", "afterany"), how
    codes = []
    if how != "afterok" or not any(done):
        first, _, last = options.get("--array", "-").partition("-")
        for task in range(int(first), int(last) + 1) if first else [None]:
            nodes = int(options.get("--nodes", "1"))
            variables = {
                "SLURM_JOB_ID": str(job),
                "SLURM_SUBMIT_DIR": os.getcwd(),
                "SLURM_JOB_NODELIST": ",".join(f"127.0.0.{n + 1}" for n in range(nodes)),
                "SLURM_JOB_END_TIME": str(int(time.time()) + int(os.environ.get("STUB_TIME_S", "7200"))),
            } | ({} if task is None else {"SLURM_ARRAY_TASK_ID": str(task)})
            log = Path(options["--output"].replace("%A", str(job)).replace("%a", str(task)))
            with log.open("a") as out:
                ran = subprocess.run(
                    ["bash", script, *arguments], env={**os.environ, **variables}, stdout=out, stderr=out
                )
            codes.append(ran.returncode)
    kept = {"options": options, "script": Path(script).name, "arguments": arguments, "codes": codes or [-1]}
    (STORE / f"job-{job}.json").write_text(json.dumps(kept))
    print(job)
    return 0


def srun(words: list[str]) -> int:
    options, command = split(words)
    tasks = int(options.get("--ntasks") or int(options["--nodes"]) * int(options["--ntasks-per-node"]))
    step = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": str(tasks), "SLURM_STEP_NODELIST": "127.0.0.1"}
    started = [
        subprocess.Popen(command, env={**os.environ, **step, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)})
        for rank in range(tasks)
    ]
    with (STORE / "steps.jsonl").open("a") as out:
        out.write(json.dumps({"tasks": tasks, "options": options, "command": command}) + "\n")
    return max(process.wait() for process in started)


def scontrol(words: list[str]) -> int:
    if words[:2] == ["show", "hostnames"]:
        print("\n".join(words[2].split(",")))
        return 0
    assert words[0] == "requeue", words
    (STORE / f"requeued-{words[1]}").touch()
    return 0


if __name__ == "__main__":
    sys.exit({"sbatch": sbatch, "srun": srun, "scontrol": scontrol}[sys.argv[1]](sys.argv[2:]))
