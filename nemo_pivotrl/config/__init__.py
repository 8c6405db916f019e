"""Every setting of a recipe. `from nemo_pivotrl.config import Recipe, Policy, ...`."""

from nemo_pivotrl.config.demo import Manners, World
from nemo_pivotrl.config.llmdoctor import (
    Arm,
    Assess,
    Decode,
    Doctor,
    Oracles,
    Patient,
    PatientReading,
    Preferences,
    Rank,
    Reward,
    Serve,
    Tfpo,
    TfpoLoss,
)
from nemo_pivotrl.config.models import ChatSettings, Generation, Lora, Megatron, Optimizer, Policy, TrainedModel, Vllm
from nemo_pivotrl.config.pivotrl import Advantages, Evaluate, Export, Extract, Grpo, LossFn, ProfileStage, Select, Sft
from nemo_pivotrl.config.recipe import Recipe
from nemo_pivotrl.config.run import Budget, Checkpointing, Cluster, Logger, Loop, Plan
from nemo_pivotrl.config.schema import ranged
from nemo_pivotrl.config.verify import Audit, Judge, JudgeServer, Limits, Rescore, Verifier

__all__ = [
    "Advantages",
    "Arm",
    "Assess",
    "Audit",
    "Budget",
    "ChatSettings",
    "Checkpointing",
    "Cluster",
    "Decode",
    "Doctor",
    "Evaluate",
    "Export",
    "Extract",
    "Generation",
    "Grpo",
    "Judge",
    "JudgeServer",
    "Limits",
    "Logger",
    "Loop",
    "Lora",
    "LossFn",
    "Manners",
    "Megatron",
    "Optimizer",
    "Oracles",
    "Patient",
    "PatientReading",
    "Plan",
    "Policy",
    "Preferences",
    "ProfileStage",
    "Rank",
    "Recipe",
    "Rescore",
    "Reward",
    "Select",
    "Serve",
    "Sft",
    "Tfpo",
    "TfpoLoss",
    "TrainedModel",
    "Verifier",
    "Vllm",
    "World",
    "ranged",
]
