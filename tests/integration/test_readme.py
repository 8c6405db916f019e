"""Every command the README shows, run: the stage commands on a tiny trained run, the two make targets by what they call."""

import re
import shutil
import subprocess
from pathlib import Path

from support import processes
from support.artefacts import made_once
from support.recipes import ROOT, SMALL

from nemo_pivotrl import cli
from nemo_pivotrl.config.load import load_recipe

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.strip().split("#")[0].strip() for line in README.splitlines() if re.match(r"    (make|nemo-pivotrl) ", line)
]


def run(*arguments: str, folder: Path) -> str:
    overrides = [] if "--print-config" in arguments else [f"run_dir={folder}", *SMALL]
    done = processes.run(
        "-m",
        "nemo_pivotrl.cli",
        *arguments,
        *[o for o in overrides if o.partition("=")[0] not in " ".join(arguments)],
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_readme_shows_the_commands_this_file_runs() -> None:
    assert (
        [c for c in COMMANDS if "STAGE" not in c]
        == [
            "make quickstart",
            "make test",
            "make test-all",
            "nemo-pivotrl view runs/quickstart",  # run in tests/view and tests/unit/report
            "nemo-pivotrl init my-model my-trajectories.jsonl recipe.yaml",  # run in test_first_run.py, as the next one's stages are
            "nemo-pivotrl run recipe.yaml",
            "nemo-pivotrl env",
            "nemo-pivotrl plan recipes/pivotrl/pivotrl-nemotron-3-super-120b-a12b-64n8g-tp8cp16ep8-swe.yaml",
            "nemo-pivotrl preflight recipes/pivotrl/tiny.yaml",
            "nemo-pivotrl select recipes/pivotrl/tiny.yaml --print-config",
            "nemo-pivotrl select recipes/pivotrl/tiny.yaml select.lambda_diff=0.6",
            "nemo-pivotrl export recipes/pivotrl/tiny.yaml",
            "nemo-pivotrl profile RECIPE.yaml policy.sampler=vllm vllm.servers=[http://127.0.0.1:8000,http://127.0.0.1:8001]",
            "make quickstart BACKEND=megatron",
            "make quickstart ENGINE=vllm",  # run in tests/vllm, as the one before the last is
        ]
    )


def test_every_stage_command_of_the_readme_runs(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    for command in COMMANDS:
        words = command.split()[1:]
        if words[0] == "env":
            assert cli.main([*words, "--no-imports", str(ROOT / "recipes")]) == 0
        elif words[0] == "plan":
            assert cli.main([words[0], str(ROOT / words[1])]) == 0
        elif words[0] == "preflight":
            assert cli.main([*words, f"run_dir={tmp_path / 'run'}", *SMALL]) == 0
        elif "recipes/pivotrl" in command and "STAGE" not in command:
            assert run(*words, folder=tmp_path / "run")
    rows = (tmp_path / "run/gym/train.jsonl").read_text().splitlines()
    assert rows and "nemo_pivotrl" not in rows[0] and '"expected_action"' in rows[0]


def test_every_stage_of_the_readmes_table_exists_and_no_other() -> None:
    stages = README.partition("| stage | does |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", stages, flags=re.MULTILINE)) == set(cli.STAGES) - {
        "world",
        "manners",
    }  # the embedded worlds


def test_make_quickstart_is_the_run_command_and_the_run_command_works() -> None:
    for full, name in (("", "quickstart"), ("1", "quickstart-full")):
        asked = ["make", "-n", "quickstart", "VENV=/nowhere", f"FULL={full}"]
        shown = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for algorithm in ("pivotrl", "llmdoctor"):
            assert f"nemo-pivotrl run recipes/{algorithm}/{name}.yaml fresh=true" in shown
    command = ["run", "recipes/pivotrl/tiny.yaml", "fresh=true"]
    folder = made_once("quickstart", [command, SMALL], lambda made: keep(made, run(*command, folder=made)))
    output = (folder / "printed.txt").read_text()
    assert re.search(r"^pivotrl +\d", output, flags=re.MULTILINE) and (folder / "report.html").exists()
    assert (folder / "report.json").exists()


def keep(folder: Path, printed: str) -> None:
    (folder / "printed.txt").write_text(printed)


def test_make_quickstart_over_megatron_is_the_same_runs_in_two_processes() -> None:
    shown = subprocess.run(
        ["make", "-n", "quickstart", "BACKEND=megatron", "VENV=/nowhere"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    lines = [line.split() for line in shown.splitlines() if "torch.distributed.run" in line]
    assert len(lines) == 2 and "nemo-pivotrl run" not in shown
    for words, algorithm in zip(lines, ("pivotrl", "llmdoctor"), strict=True):
        at = words.index("run", words.index("nemo_pivotrl.cli"))
        recipe, *overrides = words[at + 1 :]
        loaded = load_recipe(str(ROOT / recipe), [o for o in overrides if o != "fresh=true"])
        assert loaded.algorithm == algorithm and loaded.megatron.cpu and not loaded.megatron.bf16
        models = [loaded.policy] if algorithm == "pivotrl" else [loaded.doctor, loaded.patient]
        assert {model.backend for model in models} == {"megatron"}


def test_make_quickstart_with_vllm_is_the_same_runs_by_its_environment() -> None:
    asked = ["make", "-n", "quickstart", "ENGINE=vllm", "VENV=/nowhere", "VENV_VLLM=/elsewhere"]
    shown = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = [line.split() for line in shown.splitlines() if "-m nemo_pivotrl.cli" in line]
    assert [words[4] for words in lines] == ["run", "run", "decode"]
    for words, algorithm in zip(lines, ("pivotrl", "llmdoctor", "llmdoctor"), strict=True):
        assert words[1] == "/elsewhere/bin/python"
        loaded = load_recipe(str(ROOT / words[5]), [o for o in words[6:] if o != "fresh=true"])
        assert loaded.algorithm == algorithm
        assert (loaded.policy.sampler if algorithm == "pivotrl" else loaded.patient.backend) == "vllm"
        assert loaded.world.hidden_size % loaded.world.heads == 0


def test_the_readmes_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).exists(), target
