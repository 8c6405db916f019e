"""What a NeMo-Aligner user meets first: names, constructors, configs found by name, imports on a bare machine."""

import importlib.metadata
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import nemo_pivotrl
from nemo_pivotrl.integrations.nemo_aligner.registration import LLMDOCTOR, PIVOTRL, algorithms, trust

PACKAGE = Path(nemo_pivotrl.__file__).parent / "integrations/nemo_aligner"
MODULES = sorted(
    f"nemo_pivotrl.integrations.nemo_aligner.{p.stem}" for p in PACKAGE.glob("*.py") if p.stem != "__init__"
)
HERE = Path(__file__).parent
PREAMBLE = (
    "import os; os.environ['NVIDIA_PYTORCH_VERSION'] = 'none'\n"  # NeMo 2.1 wants it anywhere but in NGC's containers
)


def python(code: str, cwd: Path, **environment: str) -> str:
    """What a fresh interpreter, without the stand-ins of the other tests, prints."""
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + code],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_both_algorithms_are_registered_as_entry_points_and_by_a_call(tmp_path: Path) -> None:
    assert algorithms() == {"pivotrl": PIVOTRL, "llmdoctor": LLMDOCTOR}
    assert PIVOTRL.conf.exists() and LLMDOCTOR.conf.exists()
    code = "import nemo_pivotrl\nfrom nemo_pivotrl.integrations.nemo_aligner.registration import algorithms\n"
    assert python(code + "print(nemo_pivotrl.register() == algorithms())", tmp_path).splitlines()[-1] == "True"


def test_every_module_imports_without_tensorrt_llm_apex_and_transformer_engine(tmp_path: Path) -> None:
    code = "import importlib, sys\n"
    code += "".join(f"importlib.import_module({module!r})\n" for module in MODULES)
    code += "print(sorted(m for m in ('tensorrt_llm', 'apex', 'transformer_engine', 'mpi4py') if m in sys.modules))\n"
    code += "print('nemo_aligner.utils.trt_llm' in sys.modules)"  # the stand-in has gone again
    assert python(code, tmp_path).splitlines()[-2:] == ["[]", "False"]


def test_naming_the_algorithms_imports_nothing_of_nvidias(tmp_path: Path) -> None:
    code = "import sys, nemo_pivotrl\nfrom nemo_pivotrl.integrations.nemo_aligner.registration import algorithms\nalgorithms()\n"
    code += "print(sorted({m.partition('.')[0] for m in sys.modules} & {'torch', 'nemo', 'nemo_aligner', 'megatron'}))"
    assert python(code, tmp_path).splitlines()[-1] == "[]"


CLASSES = """
import inspect
from nemo_aligner.algorithms.dpo import DPOTrainer
from nemo_aligner.data.nlp.datasets import DPOModelDataset, RLHFDataset
from nemo_aligner.models import alignable_interface as ours
from nemo_pivotrl.integrations.nemo_aligner.registration import LLMDOCTOR, PIVOTRL
from nemo_pivotrl.integrations.nemo_aligner.versions import without_tensorrt_llm
with without_tensorrt_llm():
    from nemo_aligner.algorithms.reinforce import ReinforceTrainer
    from nemo_aligner.models.nlp.gpt.megatron_gpt_ppo_actor import MegatronGPTActorModel
def keywords(cls):
    return [p for p in inspect.signature(cls.__init__).parameters]
trainer, model, dataset = PIVOTRL.trainer, PIVOTRL.model, PIVOTRL.dataset_builder.args[0]
assert issubclass(trainer, ReinforceTrainer) and keywords(trainer) == keywords(ReinforceTrainer), keywords(trainer)
assert issubclass(model, MegatronGPTActorModel) and issubclass(model, ours.AlignableGenerativeInterface)
assert keywords(model) == keywords(MegatronGPTActorModel) == ["self", "cfg", "trainer"]
assert keywords(dataset) == keywords(RLHFDataset), keywords(dataset)
trainer, model, dataset = LLMDOCTOR.trainer, LLMDOCTOR.model, LLMDOCTOR.dataset_builder.args[0]
assert issubclass(trainer, DPOTrainer) and keywords(trainer) == keywords(DPOTrainer), keywords(trainer)
assert issubclass(model, ours.SupervisedInterface) and keywords(model) == ["self", "cfg", "trainer"]
assert keywords(dataset) == keywords(RLHFDataset)
for cls in (PIVOTRL.model, LLMDOCTOR.model):
    assert not getattr(cls, "__abstractmethods__", None), cls.__abstractmethods__
print("agreed")
"""


def test_classes_are_subclasses_with_the_constructor_keywords_of_their_parents(tmp_path: Path) -> None:
    assert python(CLASSES, tmp_path).splitlines()[-1] == "agreed"


SCRIPT = """
from nemo.core.config import hydra_runner
from nemo_pivotrl.config.nemo_aligner import register_resolvers
register_resolvers()
@hydra_runner(config_path=".", config_name="mine")
def main(cfg):
    print(cfg.trainer.{name}.max_epochs, cfg.trainer.{name}.save_interval, cfg.model.micro_batch_size)
main()
"""


@pytest.mark.parametrize("name", ["pivotrl", "llmdoctor"])
def test_any_script_finds_our_configs_by_name_and_changes_them(tmp_path: Path, name: str) -> None:
    (tmp_path / "mine.yaml").write_text(
        f"defaults: [gpt_{name}, _self_]\ntrainer: {{{name}: {{max_epochs: 7}}}}\nmodel: {{micro_batch_size: 3}}\n"
    )
    (tmp_path / "script.py").write_text(PREAMBLE + SCRIPT.format(name=name))
    command = [sys.executable, "script.py", f"trainer.{name}.val_check_interval=4"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "7 4 3"


def test_nemo_may_instantiate_our_classes_where_it_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    common: Any = types.ModuleType("nemo.core.classes.common")
    monkeypatch.setitem(sys.modules, "nemo.core.classes.common", common)
    trust("nemo_pivotrl.")  # as in the releases that do not ask
    for kind in (list, tuple):
        common.ALLOWED_TARGET_PREFIXES = kind(["nemo."])
        held = common.ALLOWED_TARGET_PREFIXES
        trust("nemo_pivotrl.")
        trust("nemo_pivotrl.")
        assert list(common.ALLOWED_TARGET_PREFIXES) == ["nemo.", "nemo_pivotrl."]
        assert kind is tuple or held is common.ALLOWED_TARGET_PREFIXES  # whoever imported the list sees it


def test_a_wrong_version_is_named_with_the_one_that_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_pivotrl.core.errors import InputError
    from nemo_pivotrl.integrations.nemo_aligner.versions import require

    require()
    real = importlib.metadata.version
    for name, version, said in (
        ("megatron-core", "0.16.1", "megatron-core: found 0.16.1"),
        ("megatron-core", "0.12.3", "0.12 with nemo-toolkit 2.1"),
        ("nemo-toolkit", "2.5.0", "nemo-toolkit: found 2.5.0"),
        ("nemo-aligner", "", "nemo-aligner: found not installed"),
    ):

        def version_of(asked: str, name: str = name, version: str = version) -> str:
            if asked == name and not version:
                raise importlib.metadata.PackageNotFoundError(asked)
            return version if asked == name else real(asked)

        monkeypatch.setattr(importlib.metadata, "version", version_of)
        with pytest.raises(InputError, match=said):
            require()


def test_nemo_run_runs_a_stage_of_a_recipe(tmp_path: Path) -> None:
    recipe = HERE.parents[1] / "recipes/pivotrl/tiny.yaml"
    command = [str(Path(sys.executable).parent / "nemo"), "pivotrl", "world", "--factory", f"recipe(path='{recipe}')"]
    command += [f"recipe.run_dir={tmp_path}/run", "recipe.world.train_tasks=3", "recipe.grpo.advantage_clip=2.5"]
    exported = tmp_path / "world.yaml"
    done = subprocess.run([*command, "--to-yaml", str(exported)], capture_output=True, text=True, cwd=tmp_path)
    assert exported.exists(), done.stdout[-2000:] + done.stderr[-2000:]
    text = exported.read_text()
    assert "train_tasks: 3" in text
    exported.write_text(text.replace("_partial_: true\n", ""))
    command = [command[0], "pivotrl", "world", "--yaml", str(exported), "recipe.world.train_tasks=2", "--yes"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (tmp_path / "run/world").is_dir(), done.stdout[-2000:] + done.stderr[-2000:]
    assert done.returncode == 0
    steps = re.search(r"sft=Sft\(.*?num_steps=(\d+)", done.stdout, re.S)
    assert steps is not None and steps[1] == "60", "sections of one class keep their own settings"
