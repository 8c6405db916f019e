"""Every command in docs/, run here, or named with where it is run and why not here."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support import processes
from support.artefacts import made_once
from support.recipes import ROOT, SMALL, SMALL_LLMDOCTOR
from support.slurm import environment

from nemo_pivotrl import cli
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.verifiers.loading import VERIFIERS

SLURM = ROOT / "deploy/slurm"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PROGRAMS = (
    "torchrun",
    "srun",
    "nemo-pivotrl",
    "make",
    "bash",
    "docker",
    "kubectl",
    "nemo",
    "python",
    "python3",
    "git",
    "source",
    "cp",
    "set",
)
TINY = {"pivotrl": "recipes/pivotrl/tiny.yaml", "llmdoctor": "recipes/llmdoctor/tiny.yaml"}
ELSEWHERE = {
    "nemo-pivotrl serve recipes/": "vllm/test_vllm_serve.py",
    "nemo-pivotrl serve RECIPE.yaml --host ": "vllm/test_vllm_serve.py",
    "nemo-pivotrl assess RECIPE.yaml patient.backend=vllm vllm.servers=": "vllm/test_vllm_serve.py",
    "nemo-pivotrl profile RECIPE.yaml policy.sampler=vllm vllm.servers=": "vllm/test_vllm_stages.py",
    "nemo-pivotrl profile RECIPE.yaml executor=ray ": "test_ray.py",
    "make trace-sources": "trace/test_slices.py",
    "nemo-pivotrl trace ": "trace/test_slices.py",
    "nemo-pivotrl seal ": "unit/core/test_whole_files.py",
    "nemo-pivotrl serve-verifier ": "test_verify.py",
    "torchrun --nproc-per-node 8 -m nemo_pivotrl.cli train ": "distributed/test_megatron_stages.py",
    "srun nemo-pivotrl train ": "test_slurm.py",
    "nemo pivotrl train ": "aligner/test_nemo_run.py",
    "python -m nemo_pivotrl.integrations.nemo_aligner.": "aligner/test_scripts.py",
    "python deploy/nemotron/rl/pivotrl/step.py ": "test_nemotron_step.py",
    "python examples/": "test_examples.py",
}
"""How a command begins, and the test that runs it."""
BY_HAND = ("docker build", "kubectl apply", "git clone", "python3 -m venv", "source .venv", "cp deploy", "set -a")
"""No Docker or cluster here; the rest makes an environment, which `make test` does too."""


def commands(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    indented = [line.strip() for line in lines if line.startswith("    ")]
    return [line.split(" # ")[0].strip() for line in indented if line.split(" ")[0] in PROGRAMS]


ALL = [command for path in DOCS if path.name != "first-run.md" for command in commands(path)]
"""That page has a test of its own."""


def of(algorithm: str, page: str) -> list[list[str]]:
    """The words behind `nemo-pivotrl` of a page's commands on the tiny recipe of an algorithm."""
    on_tiny = [c for c in commands(ROOT / "docs" / page) if TINY[algorithm] in c and not c.startswith(tuple(ELSEWHERE))]
    found = [c.split()[1:] for c in on_tiny]
    return [words for words in found if words[0] in cli.STAGES]


def run(words: list[str], folder: Path, small: list[str]) -> None:
    named = " ".join(words)
    settled = [o for o in small if o.partition("=")[0] not in named]
    assert (
        cli.main([w.replace("recipes/", f"{ROOT}/recipes/") for w in words] + [f"run_dir={folder}", *settled]) == 0
    ), named


REFERENCE = ("algorithms.md", "formats.md", "settings.md")
"""Pages to look things up in; the others are read from top to bottom and stay short."""


def test_pages_are_short_and_their_links_lead_somewhere() -> None:
    assert {"algorithms.md", "cluster.md", "design.md", "formats.md", "llmdoctor.md", "pivotrl.md"} <= {
        p.name for p in DOCS
    }
    for path in DOCS:
        text = path.read_text(encoding="utf-8")
        assert path.name in REFERENCE or len(text.splitlines()) <= 110, path.name
        for target in re.findall(r"\]\(([^)]+)\)", text):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_every_command_is_run_here_or_somewhere_named() -> None:
    others = [c for c in ALL if not c.startswith(tuple(ELSEWHERE))]
    here = [c for c in others if c.startswith(("nemo-pivotrl ", "bash deploy/slurm"))]
    known = {"plan", "verify", "compare"} | set(cli.STAGES)
    assert all(c.startswith("bash") or c.split()[1] in known for c in here)
    assert [c for c in others if c not in here and not c.startswith(BY_HAND)] == []
    for begin, test in ELSEWHERE.items():
        assert any(c.startswith(begin) for c in ALL) and list((ROOT / "tests").rglob(test)), begin


def test_every_setting_a_page_names_exists() -> None:
    sections = {name: field.type for name, field in Recipe.__dataclass_fields__.items()}
    recipe = Recipe()
    for path in DOCS:
        for section, name in re.findall(r"`([a-z_]+)\.([a-z_]+)(?:[:=][^`]*)?`", path.read_text(encoding="utf-8")):
            if (
                section in sections
                and hasattr(getattr(recipe, section), "__dataclass_fields__")
                and name not in ("jsonl", "py")
            ):
                assert hasattr(getattr(recipe, section), name), f"{path.name}: {section}.{name}"


def test_every_program_and_file_of_the_figures_table_exists() -> None:
    table = (ROOT / "docs/design.md").read_text().partition("| figure | command |")[2]
    makefile = (ROOT / "Makefile").read_text()
    rows = [line for line in table.splitlines() if line.startswith("| ") and "---" not in line]
    assert len(rows) > 8
    for row in rows:
        assert row.count("|") == 4
    for script in re.findall(r"`python (\S+)`", table):
        assert (ROOT / script).exists(), script
    for target in re.findall(r"`make ([\w-]+)`", table):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_the_launch_commands_say_what_they_would_submit(tmp_path: Path) -> None:
    launched = [c for c in ALL if "deploy/slurm/launch.sh" in c]
    mine, settings = tmp_path / "my.env", (ROOT / "deploy/slurm/cluster.env").read_text()
    filled = {"EXP_NAME": "mine", "CONFIG_PATH": "recipe.yaml", "SLURM_PARTITION": "batch", "GPUS_PER_NODE": "8"}
    for name, value in filled.items():
        settings = re.sub(rf"^{name}= .*", f"{name}={value}", settings, flags=re.MULTILINE)
    mine.write_text(settings)
    assert len(launched) >= 4
    for command in launched:
        line = command.replace("source my.env", f"source {mine}").replace(
            "deploy/slurm/launch.sh", f"{ROOT}/deploy/slurm/launch.sh"
        )
        done = subprocess.run(
            ["bash", "-c", line], cwd=tmp_path, env=environment(tmp_path, DRY_RUN="true"), capture_output=True, text=True, check=False
        )  # fmt: skip
        assert done.returncode == 0 and done.stdout.startswith("sbatch "), command + done.stderr
        assert ("train.sbatch" in done.stdout) == (not command.endswith("profile"))


def test_the_plan_of_a_120b_run_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    if "plan" not in cli.TOOLS:
        pytest.skip("this version has no plan")
    plans = [c.split()[1:] for c in ALL if c.startswith("nemo-pivotrl plan")]
    assert plans
    for words in plans:
        assert cli.main([words[0], str(ROOT / words[1])]) == 0
        assert "GPU-hours" in capsys.readouterr().out


@pytest.mark.slow
def test_the_guide_to_pivotrl_runs_from_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told = of("pivotrl", "pivotrl.md")

    def make(folder: Path) -> None:
        for words in told:
            run(words, folder, SMALL)

    folder = made_once("guide-pivotrl", [told, SMALL], make)
    for made in (
        "pivotrl/policy/config.json",
        "report.html",
        "gym/train.jsonl",
        "nemo-rl/gym.yaml",
        "nemotron/manifest.json",
    ):
        assert (folder / made).exists(), made


@pytest.mark.slow
def test_the_guide_to_llmdoctor_runs_from_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told = of("llmdoctor", "llmdoctor.md")

    def make(folder: Path) -> None:
        for words in told:
            run([w.replace("runs/llmdoctor", str(folder)) for w in words], folder, SMALL_LLMDOCTOR)

    assert (made_once("guide-llmdoctor", [told, SMALL_LLMDOCTOR], make) / "decoded.jsonl").exists()


def test_rows_are_verified_without_a_model(trained: Path, tmp_path: Path) -> None:
    (command,) = [c for c in ALL if c.startswith("nemo-pivotrl verify ")]
    files = [str(trained / "profiles.jsonl"), str(tmp_path / "verdicts.jsonl")]
    assert cli.main([*command.split()[1:-2], *files]) == 0 and (tmp_path / "verdicts.jsonl").read_text()


def test_profiles_are_compared(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = [c for c in ALL if c.startswith("nemo-pivotrl compare ")]
    same = str(trained / "profiles.jsonl")
    assert cli.main([command.split()[1], same, same]) == 0 and "NOT DRIFT ALONE" in capsys.readouterr().out


@pytest.mark.slow
def test_the_guides_rounds_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (command,) = [c for c in ALL if c.startswith("nemo-pivotrl run ")]
    few = [*SMALL, "loop.max_rounds=2", "evaluate.simulator=none", "evaluate.retention=none", "loop.retention_period=0"]
    folder = made_once("guide-rounds", [command, few], lambda folder: run(command.split()[1:], folder, few))
    assert (folder / "final/policy/config.json").exists() and (folder / "loop.jsonl").read_text()


def test_steering_from_python_runs(steered: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/llmdoctor.md").read_text(), flags=re.DOTALL)
    done = processes.run("-W", "error::UserWarning", "-c", code.replace("runs/llmdoctor", str(steered)))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(" ")[0] for line in lines] == ["-1.0", "0.0", "1.0"] and all(len(line) > 8 for line in lines)


def test_every_verifier_of_the_table_exists_and_no_other() -> None:
    table = (ROOT / "docs/pivotrl.md").read_text().partition("| verifier | judges |")[2].partition("\n\n")[0]
    first = " ".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
    assert set(re.findall(r"`(\w+)`", first)) == set(VERIFIERS)


@pytest.mark.parametrize("page", ["formats.md", "cluster.md"])
def test_the_other_pages_commands_run_on_a_trained_run(page: str, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    found = of("pivotrl", page)
    for words in found:
        run(words, tmp_path / "run", SMALL)
    assert found and (tmp_path / "run/nemo-rl/gym.yaml").exists()


@pytest.mark.slow
def test_the_page_on_workers_gives_the_bytes_of_one_process(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    (words,) = of("pivotrl", "workers.md")
    run(words, tmp_path / "run", SMALL)
    assert (tmp_path / "run/profiles.jsonl").read_bytes() == (trained / "profiles.jsonl").read_bytes()
