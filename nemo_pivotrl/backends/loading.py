"""`load` and its like: the model that a recipe names, in the backend that it names. Each backend is imported when it is asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from nemo_pivotrl.backends.base import Backend, Sampler, Scorer, as_policy, extra_of, there
from nemo_pivotrl.config.llmdoctor import Decode, Patient
from nemo_pivotrl.config.models import Megatron, Policy, Vllm
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
        with extra_of("policy.sampler", "vllm"):
            from nemo_pivotrl.backends.vllm.refit import Refitted
        return Refitted(trainer, load_sampler(policy, megatron, vllm), policy, vllm, moved=bool(megatron.load))
    if policy.backend == "megatron":
        return cast("Backend", _spread("policy", policy, megatron, with_reference))
    with extra_of("policy.backend", "reference"):
        from nemo_pivotrl.backends.reference.policy import ReferencePolicy
    return ReferencePolicy(policy, with_reference)


def load_sampler(policy: Policy, megatron: Megatron = DEFAULT, vllm: Vllm = NO_VLLM) -> Sampler:
    """What samples from the policy in `policy.model_name`, and needs not train it. Raises InputError."""
    if policy.sampler == "backend":
        return load(policy, megatron)
    there("policy.model_name", policy.model_name, "give an HF checkpoint folder, or run the warmup stage first")
    if vllm.servers:
        with extra_of("vllm.servers", "vllm"):
            from nemo_pivotrl.backends.vllm.servers import Servers
        return Servers(policy, vllm)
    if vllm.colocated:
        return cast("Sampler", _spread("rollout", policy, megatron, vllm))
    with extra_of("policy.sampler", "vllm"):
        from nemo_pivotrl.backends.vllm.engine import Engine
    return Engine(policy, vllm)


def load_scorer(patient: Patient, megatron: Megatron = DEFAULT, vllm: Vllm = NO_VLLM) -> Scorer:
    """The scorer for a patient, with its weights loaded. Raises InputError when something is missing."""
    if patient.backend != "reference":
        there("patient.model_name", patient.model_name, "give an HF checkpoint folder")
    if patient.backend == "vllm":
        return cast("Scorer", load_sampler(as_policy(patient), megatron, vllm))
    if patient.backend == "megatron":
        return cast("Scorer", _spread("scorer", patient, megatron))
    with extra_of("patient.backend", "reference"):
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
    with extra_of("patient.backend", "vllm"):
        from nemo_pivotrl.backends.vllm.decode import GuidedEngine
    return GuidedEngine(patient, decode, vllm, *rest)


def _spread(kind: str, settings: Policy | Patient, megatron: Megatron, extra: bool | Vllm = False) -> object:
    """A model over all ranks of the job, which rank 0 speaks to (`megatron/workers.py`)."""
    with extra_of("backend", "megatron"):
        from nemo_pivotrl.backends.megatron import workers

        return workers.load(kind, settings, megatron, extra)
