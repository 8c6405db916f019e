"""The recipe: every section of it, and what all stages share. `config/load.py` reads recipe files into it.

Each setting is declared once, with its default, its range and its explanation, in the file of its section: `pivotrl.py`,
`llmdoctor.py`, `models.py`, `run.py`, `verify.py`, `demo.py`. A verifier's own settings are the fields of its class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nemo_pivotrl.config.demo import Manners, World
from nemo_pivotrl.config.llmdoctor import Assess, Decode, Oracles, Patient, Preferences, Rank, Reward, Serve, Tfpo
from nemo_pivotrl.config.models import Lora, Megatron, Optimizer, Policy, TrainedModel, Vllm
from nemo_pivotrl.config.pivotrl import Evaluate, Export, Extract, Grpo, LossFn, ProfileStage, Select, Sft
from nemo_pivotrl.config.run import Budget, Checkpointing, Cluster, Logger, Loop, Plan, Ray
from nemo_pivotrl.config.schema import ranged
from nemo_pivotrl.config.verify import Audit, Rescore, Verifier
from nemo_pivotrl.core.artifacts import digest
from nemo_pivotrl.core.told_settings import named


@dataclass(kw_only=True, slots=True, frozen=True)
class Recipe:
    """Every setting of a run, by section. Values are checked when a file is loaded (`load_recipe`).

    >>> Recipe(run_dir="runs/mine").path("pivots.jsonl")
    PosixPath('runs/mine/pivots.jsonl')
    """

    algorithm: Literal["pivotrl", "llmdoctor"] = "pivotrl"
    """Whose stages `run` goes through."""
    run_dir: str = "runs/default"
    """Folder of all artefacts, checkpoints and metrics."""
    seed: int = ranged(0, 0)
    """Seed of everything random."""
    num_threads: int = ranged(0, 0)
    """CPU threads for torch; 0: torch's own choice.

    Bit-exact resume needs the same number.
    """
    executor: Literal["here", "processes", "ray"] = "here"
    """Where stages that work row by row run: in this process, in processes of this machine, or on Ray.

    Rows and their order do not depend on it. Stages that train run here, or as `megatron` says.
    """
    workers: int = ranged(1, 1)
    """Processes, or actors on Ray, each with a model or a client of servers."""
    ray: Ray = field(default_factory=Ray)
    policy: Policy = field(default_factory=Policy)
    megatron: Megatron = field(default_factory=Megatron)
    """How the `megatron` backend of `policy`, `doctor` and `patient` runs; names are Megatron's."""
    vllm: Vllm = field(default_factory=Vllm)
    """vLLM for `policy.sampler: vllm` and `patient.backend: vllm`: an engine in this process, or servers."""
    world: World = field(default_factory=World)
    warmup: Sft = field(default_factory=lambda: Sft(name="start", source="candidates"))
    """The SFT that makes a start policy where there is none."""
    extract: Extract = field(default_factory=Extract)
    verifier: Verifier = field(default_factory=Verifier)
    audit: Audit = field(default_factory=Audit)
    rescore: Rescore = field(default_factory=Rescore)
    profile: ProfileStage = field(default_factory=ProfileStage)
    select: Select = field(default_factory=Select)
    export: Export = field(default_factory=Export)
    sft: Sft = field(default_factory=Sft)
    """The SFT that PivotRL is compared with."""
    grpo: Grpo = field(default_factory=Grpo)
    loss_fn: LossFn = field(default_factory=LossFn)
    loop: Loop = field(default_factory=Loop)
    budget: Budget = field(default_factory=Budget)
    doctor: TrainedModel = field(
        default_factory=lambda: TrainedModel(lora=Lora(r=8, alpha=16), optimizer=Optimizer(lr=1e-4))
    )
    """LLMdoctor's start model and how it trains (D14)."""
    tfpo: Tfpo = field(default_factory=Tfpo)
    manners: Manners = field(default_factory=Manners)
    checkpointing: Checkpointing = field(default_factory=Checkpointing)
    cluster: Cluster = field(default_factory=Cluster)
    plan: Plan = field(default_factory=Plan)
    evaluate: Evaluate = field(default_factory=Evaluate)
    decode: Decode = field(default_factory=Decode)
    assess: Assess = field(default_factory=Assess)
    oracles: Oracles = field(default_factory=Oracles)
    rank: Rank = field(default_factory=Rank)
    serve: Serve = field(default_factory=Serve)
    logger: Logger = field(default_factory=Logger)
    patient: Patient = field(default_factory=Patient)
    preferences: Preferences = field(default_factory=Preferences)
    reward: Reward = field(default_factory=Reward)

    @property
    def rollout_seed(self) -> str:
        """What the seeds of a round's rollouts begin with; a round repeats none of another's."""
        return str(self.seed) if self.loop.round == 1 else f"{self.seed} round {self.loop.round}"

    @property
    def home(self) -> Path:
        """The run directory of the whole run, of which this recipe may be a round."""
        return Path(self.run_dir) if self.loop.round == 1 else Path(self.run_dir).parent

    def model(self, role: str) -> TrainedModel | Patient:
        """The section of a model by its name: `policy`, `doctor` or `patient`."""
        models: dict[str, TrainedModel | Patient] = {
            "policy": self.policy,
            "doctor": self.doctor,
            "patient": self.patient,
        }
        return models[role]

    def maker(self, role: str) -> str:
        """The stage of this recipe that writes a role's model; '' for a checkpoint that the user brings."""
        folders = {
            "policy": {"warmup": f"{self.warmup.name}/policy"},
            "patient": {"manners": "patient/policy"},
            "doctor": {"manners": "novice/policy"},
        }
        named = Path(self.model(role).model_name).resolve()
        return next((stage for stage, own in folders[role].items() if self.path(own).resolve() == named), "")

    def path(self, name: str) -> Path:
        """`name` inside the run directory."""
        return Path(self.run_dir) / name

    def digest(self, *sections: str) -> str:
        """Hash of the named sections and the seed: what an artefact's header carries as its config hash."""
        return digest([self.seed, {name: dataclasses.asdict(getattr(self, name)) for name in sections}])

    def told(self, *names: str, but: Sequence[str] = ()) -> dict[str, Any]:
        """The seed and these settings, whole sections or single ones, as a header tells them: to say by name which differ.

        but: settings that are left out. A path within the run folder begins with `${run_dir}`, wherever the folder lies.
        """
        inside = f"{self.home}/"
        found = named(self, "seed", *names, but=but)
        return {
            name: "${run_dir}/" + value.removeprefix(inside)
            if isinstance(value, str) and value.startswith(inside)
            else value
            for name, value in found.items()
        }
