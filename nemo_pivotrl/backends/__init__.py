"""What a stage may ask of a backend, in the verbs of NeMo-Aligner's interfaces, and `load`.

A backend computes per-token log-probabilities and samples tokens; it knows nothing of either paper. The loss is an
argument: a pure function of tensors, already normalised by a global count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from nemo_pivotrl.config import Generation, Optimizer, Patient, Policy
from nemo_pivotrl.records import InputError, Problem, Sample, digest, file_digest

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_pivotrl.backends.reference_doctor import DoctorModel

    LossFn = Callable[[Tensor, dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]
    """(log_probs [N, T], rows' data) -> (loss, metrics that add up over micro-batches)."""


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Responses to prompts, as token ids. A prompt stands here once however many responses it has."""

    prompts: Sequence[Sequence[int]]
    prompt_of: Sequence[int]
    """For each of the N responses, the index of its prompt."""
    responses: Sequence[Sequence[int]]
    data: dict[str, Tensor]
    """Tensors with N rows that the loss wants beside the log-probabilities; token-wise ones are padded to T."""


class Sampler(Protocol):
    """Generates turns."""

    def infer(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        stop_ids: frozenset[int],
        generation: Generation,
    ) -> list[list[Sample]]:
        """One sample for every seed of every prompt. The same seed at the same prompt gives the same sample."""
        ...


class Trainer(Protocol):
    """Trains a policy. Verbs and their order are NeMo-Aligner's."""

    def prepare_for_training(self, optimizer: Optimizer) -> None: ...
    def prepare_for_training_step(self) -> None: ...
    def get_loss_and_metrics(
        self, batch: TokenBatch, loss_fn: LossFn, forward_only: bool = False
    ) -> dict[str, float]: ...
    def finish_training_step(self) -> dict[str, float]: ...
    def get_inference_log_probs(self, batch: TokenBatch, reference: bool = False) -> Tensor: ...
    def save_training_state(self, folder: Path) -> None:
        """Write what a bit-exact resume needs into a new folder. All of it is on disk on return. Raises OSError."""
        ...

    def load_training_state(self, folder: Path) -> None:
        """Undo `save_training_state`. Raises InputError for a damaged folder and for another model's."""
        ...

    def export(self, folder: Path) -> None: ...


class Backend(Sampler, Trainer, Protocol):
    """A policy that samples and trains."""


class Scorer(Protocol):
    """Scores given tokens; generates and trains nothing."""

    def log_probs(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Tensor]:
        """For each (prompt ids, response ids): log-probability [T] (nats) of every response token, on the CPU."""
        ...


def load(policy: Policy, with_reference: bool = False) -> Backend:
    """The backend a recipe names, with its start policy loaded. Raises InputError when something is missing."""
    _only_reference("policy", policy)
    try:
        from nemo_pivotrl.backends.reference import ReferencePolicy
    except ImportError as error:
        raise InputError(
            Problem(
                "environment",
                None,
                "policy.backend",
                f"{policy.backend}: {error}",
                "pip install 'nemo-pivotrl[reference]'",
            )
        ) from error
    if not Path(policy.model_name, "config.json").exists():
        raise InputError(
            Problem(
                "recipe",
                None,
                "policy.model_name",
                policy.model_name or "nothing",
                "give an HF checkpoint folder, or run the warmup stage first",
            )
        )
    return ReferencePolicy(policy, with_reference)


def load_scorer(patient: Patient) -> Scorer:
    """The scorer for a patient, with its weights loaded. Raises InputError when something is missing."""
    try:
        from nemo_pivotrl.backends.scorer import ReferenceScorer
    except ImportError as error:
        remedy = "pip install 'nemo-pivotrl[reference]'"
        raise InputError(Problem("environment", None, "patient", str(error), remedy)) from error
    return ReferenceScorer(patient)


def load_doctor(doctor: Policy, anchored: bool) -> DoctorModel:
    """The doctor's start model with its head; `anchored` keeps the start model as reference. Raises InputError."""
    from nemo_pivotrl.backends.reference_doctor import DoctorModel

    _only_reference("doctor", doctor)
    if not Path(doctor.model_name, "config.json").exists():
        found = doctor.model_name or "nothing"
        remedy = "give an HF checkpoint folder of a small model with the patient's tokenizer"
        raise InputError(Problem("recipe", None, "doctor.model_name", found, remedy))
    return DoctorModel(doctor, anchored)


def _only_reference(section: str, policy: Policy) -> None:
    """The stages run one process. What runs many is not put in their place unnoticed."""
    if policy.backend != "reference":
        remedy = "the stages run `reference` only; backends/megatron/train.py trains under torchrun"
        raise InputError(Problem("recipe", None, f"{section}.backend", policy.backend, remedy))


def policy_revision(folder: str | Path) -> str:
    """Digest of a checkpoint's weights and config: equal iff the policy is the same."""
    files = sorted(p for p in Path(folder).iterdir() if p.suffix in (".safetensors", ".bin") or p.name == "config.json")
    if not any(p.suffix != ".json" for p in files):
        raise InputError(Problem(str(folder), None, "weights", "no .safetensors file", "give an HF checkpoint folder"))
    return digest([[p.name, file_digest(p)] for p in files])
