"""What a stage may ask of a backend, in the verbs of NeMo-Aligner's interfaces, and `load`.

A backend computes per-token log-probabilities and samples tokens; it knows nothing of either paper. The loss is an
argument: a pure function of tensors, already normalised by a global count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from nemo_pivotrl.config import Generation, Megatron, Optimizer, Patient, Policy
from nemo_pivotrl.records import InputError, Problem, Sample, digest, file_digest

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_pivotrl.backends.reference_doctor import DoctorModel

    LossFn = Callable[[Tensor, dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]
    """(log_probs [N, T], rows' data) -> (loss, metrics that add up over micro-batches)."""


DEFAULT = Megatron()


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Responses to prompts, as token ids. A prompt stands here once however many responses it has."""

    prompts: Sequence[Sequence[int]]
    prompt_of: Sequence[int]
    """For each of the N responses, the index of its prompt."""
    responses: Sequence[Sequence[int]]
    data: dict[str, Tensor]
    """Tensors with N rows that the loss wants beside the log-probabilities; token-wise ones are padded to T."""

    @property
    def prompts_of_rows(self) -> list[Sequence[int]]:
        """The prompt of each of the N responses."""
        return [self.prompts[p] for p in self.prompt_of]


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


def load(policy: Policy, megatron: Megatron = DEFAULT, with_reference: bool = False) -> Backend:
    """The backend a recipe names, with its start policy loaded. Raises InputError when something is missing."""
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
    if policy.backend == "megatron":
        return cast("Backend", _spread("policy", policy, megatron, with_reference))
    with _installed("policy.backend", "reference"):
        from nemo_pivotrl.backends.reference import ReferencePolicy
    return ReferencePolicy(policy, with_reference)


def load_scorer(patient: Patient, megatron: Megatron = DEFAULT) -> Scorer:
    """The scorer for a patient, with its weights loaded. Raises InputError when something is missing."""
    if patient.backend == "megatron":
        if not Path(patient.model_name, "config.json").exists():
            found = patient.model_name or "nothing"
            raise InputError(Problem("recipe", None, "patient.model_name", found, "give an HF checkpoint folder"))
        return cast("Scorer", _spread("scorer", patient, megatron))
    with _installed("patient.backend", "reference"):
        from nemo_pivotrl.backends.scorer import ReferenceScorer
    return ReferenceScorer(patient)


def load_doctor(doctor: Policy, anchored: bool, megatron: Megatron = DEFAULT) -> DoctorModel:
    """The doctor's start model with its head; `anchored` keeps the start model as reference. Raises InputError."""
    if not Path(doctor.model_name, "config.json").exists():
        found = doctor.model_name or "nothing"
        remedy = "give an HF checkpoint folder of a small model with the patient's tokenizer"
        raise InputError(Problem("recipe", None, "doctor.model_name", found, remedy))
    if doctor.backend == "megatron":
        return cast("DoctorModel", _spread("doctor", doctor, megatron, anchored))
    from nemo_pivotrl.backends.reference_doctor import DoctorModel

    return DoctorModel(doctor, anchored)


def _spread(kind: str, settings: Policy | Patient, megatron: Megatron, extra: bool = False) -> object:
    """A model over all ranks of the job, which rank 0 speaks to (`megatron/workers.py`)."""
    with _installed("backend", "megatron"):
        from nemo_pivotrl.backends.megatron import workers

        return workers.load(kind, settings, megatron, extra)


@contextmanager
def _installed(field: str, extra: str) -> Iterator[None]:
    """Turn a module that is not installed into the name of the extra that brings it."""
    try:
        yield
    except ImportError as error:
        remedy = f"pip install 'nemo-pivotrl[{extra}]'"
        raise InputError(Problem("environment", None, field, f"{extra}: {error}", remedy)) from error


def without_start(megatron: Megatron) -> Megatron:
    """The section for a model that is not the start policy: `megatron.load` holds the start policy's weights alone."""
    return replace(megatron, load="")


def identity_of(model: Policy, megatron: Megatron) -> dict[str, Any]:
    """Settings of the `megatron` section that change what a model computes beyond rounding; its layout does not."""
    if model.backend != "megatron":
        return {}
    layout = ("_parallel", "use_distributed", "dispatcher", "grouped", "recompute", "chunk", "cpu", "timeout")
    return {name: value for name, value in asdict(megatron).items() if not any(part in name for part in layout)}


def policy_revision(folder: str | Path) -> str:
    """Digest of a checkpoint's weights and config: equal iff the policy is the same."""
    files = sorted(p for p in Path(folder).iterdir() if p.suffix in (".safetensors", ".bin") or p.name == "config.json")
    if not any(p.suffix != ".json" for p in files):
        raise InputError(Problem(str(folder), None, "weights", "no .safetensors file", "give an HF checkpoint folder"))
    return digest([[p.name, file_digest(p)] for p in files])
