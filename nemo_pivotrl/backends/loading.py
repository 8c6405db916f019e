"""`load` and its like: the model that a recipe names, in the backend that it names. Each backend is imported when it is asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from nemo_pivotrl.backends.base import Backend, Sampler, Scorer, as_policy, extra_of, require_checkpoint
from nemo_pivotrl.config.llmdoctor import Decode, Patient
from nemo_pivotrl.config.models import Megatron, Policy, Vllm
from nemo_pivotrl.sizing.precision import engine_dtype

if TYPE_CHECKING:
    from nemo_pivotrl.backends.vllm.decode import GuidedEngine
    from nemo_pivotrl.backends.vllm.guided_servers import GuidedServers

DEFAULT = Megatron()


NO_VLLM = Vllm()


REMEDIES = {
    "policy": "give an HF checkpoint folder, or the id of a model on the Hugging Face hub",
    "doctor": "give an HF checkpoint folder of a small model with the patient's tokenizer",
    "patient": "give an HF checkpoint folder, or the id of a model on the Hugging Face hub",
}
"""What to do about a section without a model."""


def load(
    policy: Policy,
    megatron: Megatron = DEFAULT,
    vllm: Vllm = NO_VLLM,
    value_head: bool = False,
    reference: bool = False,
    section: str = "policy",
) -> Backend:
    """The backend a recipe names, with its start weights loaded. Raises InputError when something is missing.

    value_head: with a head for log V (a doctor). reference: the start model stays beside the one in training. section: the
    recipe's section that `policy` stands for, for errors.
    """
    require_checkpoint(f"{section}.model_name", policy.model_name, REMEDIES[section])
    if policy.sampler == "vllm":
        trainer = load(replace(policy, sampler="backend"), megatron, NO_VLLM, value_head, reference, section)
        with extra_of("policy.sampler", "vllm"):
            from nemo_pivotrl.backends.vllm.refit import Refitted
        return Refitted(trainer, load_sampler(policy, megatron, vllm), policy, vllm, moved=bool(megatron.load))
    if policy.backend == "megatron":
        with extra_of(f"{section}.backend", "megatron"):
            from nemo_pivotrl.backends.megatron import workers
        return cast("Backend", workers.load("policy", policy, megatron, value_head, reference))
    with extra_of(f"{section}.backend", "reference"):
        from nemo_pivotrl.backends.reference.policy import ReferencePolicy
    return ReferencePolicy(policy, value_head, reference, section)


def load_sampler(
    policy: Policy, megatron: Megatron = DEFAULT, vllm: Vllm = NO_VLLM, section: str = "policy"
) -> Sampler:
    """What samples from the policy in `policy.model_name`, and needs not train it. Raises InputError."""
    if policy.sampler == "backend":
        return load(policy, megatron, section=section)
    require_checkpoint(f"{section}.model_name", policy.model_name, REMEDIES[section])
    if vllm.servers:
        with extra_of("vllm.servers", "vllm"):
            from nemo_pivotrl.backends.vllm.servers import Servers
        return Servers(policy, vllm)
    policy = replace(policy, dtype=engine_dtype(policy, megatron))
    if vllm.colocated:
        with extra_of("vllm.colocated", "megatron"):
            from nemo_pivotrl.backends.megatron import workers
        return cast("Sampler", workers.load("engine", policy, megatron, vllm))
    with extra_of("policy.sampler", "vllm"):
        from nemo_pivotrl.backends.vllm.engine import Engine
    return Engine(policy, vllm)


def load_scorer(patient: Patient, megatron: Megatron = DEFAULT, vllm: Vllm = NO_VLLM) -> Scorer:
    """What scores under a patient, with its weights loaded. Raises InputError when something is missing."""
    return cast("Scorer", load_sampler(as_policy(patient), megatron, vllm, section="patient"))


def load_guided_engine(patient: Patient, decode: Decode, vllm: Vllm, *rest: Any) -> GuidedEngine | GuidedServers:
    """The patient inside vLLM with its doctors, here or on servers; rest: tokenizer, stop ids, spans. Raises InputError."""
    require_checkpoint("patient.model_name", patient.model_name, REMEDIES["patient"])
    if vllm.servers:
        with extra_of("vllm.servers", "vllm"):
            from nemo_pivotrl.backends.vllm.guided_servers import GuidedServers
        return GuidedServers(patient, decode, vllm, *rest)
    with extra_of("patient.backend", "vllm"):
        from nemo_pivotrl.backends.vllm.decode import GuidedEngine
    return GuidedEngine(patient, decode, vllm, *rest)
