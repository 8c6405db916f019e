"""The `trainer.pivotrl`/`model.pivotrl` and `trainer.llmdoctor`/`model.llmdoctor` blocks of a NeMo-Aligner config.

NeMo-Aligner reads its YAML without a schema. Here an unknown key, a wrong type or a value out of range is an error with
the nearest key, and what remains becomes the same dataclasses that the project's own recipes become.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nemo_pivotrl.config import (
    Advantages,
    Checkpointing,
    Generation,
    Grpo,
    LossFn,
    Optimizer,
    PatientReading,
    Policy,
    Reward,
    TfpoLoss,
    Verifier,
    Vllm,
    ranged,
)
from nemo_pivotrl.config.build import build
from nemo_pivotrl.core.errors import InputError, Problem

FILE = "NeMo-Aligner config"


@dataclass(kw_only=True, slots=True, frozen=True)
class BatchIterator:
    """How prompts reach the data-parallel ranks."""

    use_flask: bool = False
    """NeMo-Aligner's load balancer. Not here: a pivot's group stays on one rank, and its seeds follow from its place."""
    port: int = 5557


@dataclass(kw_only=True, frozen=True)  # without slots, so that a block may have another base beside it
class Progress:
    """What the trainers of both papers have in common; names are NeMo-Aligner's."""

    max_epochs: int = ranged(Grpo().max_num_epochs, 1)
    max_steps: int = ranged(-1, -1)
    """-1: all of the train set, `max_epochs` times."""
    val_check_interval: int = ranged(Grpo().val_period, 0)
    """Steps between validations; 0: never."""
    save_interval: int = ranged(Checkpointing().save_period, 0)
    """Steps between checkpoints; a multiple of `val_check_interval` where there is validation."""
    gradient_clip_val: float = ranged(Optimizer().max_grad_norm, 0.0)


@dataclass(kw_only=True, slots=True, frozen=True)
class PivotRLTrainerBlock(Progress, Advantages):
    """`trainer.pivotrl`."""

    num_rollouts_per_prompt: int = ranged(Grpo().num_generations_per_prompt, 2)
    """`Grpo.num_generations_per_prompt`."""
    initial_policy_kl_penalty: float = ranged(LossFn().reference_policy_kl_penalty, 0.0)
    """`LossFn.reference_policy_kl_penalty`, against the start policy, inside the loss (k3)."""
    rollout_batch_seq_length: int | None = None
    """Pad rollouts to at least so many tokens; less fragmentation for more work."""
    batch_iterator: BatchIterator = field(default_factory=BatchIterator)
    seed: int = ranged(0, 0)
    """Decides every sampled turn, together with the step and the pivot's place in the batch."""
    model_gbs: int = ranged(64, 1)
    model_mbs: int = ranged(1, 1)


@dataclass(kw_only=True, slots=True, frozen=True)
class SamplingParams:
    """NeMo's sampling parameters. A pivot is one only as it was sampled: they must be the profile's."""

    use_greedy: bool = False
    temperature: float = ranged(Generation().temperature, 1e-6, 10.0)
    top_k: int = ranged(0, 0)
    top_p: float = ranged(Generation().top_p, 0.01, 1.0)
    repetition_penalty: float = ranged(1.0, 0.0)
    add_BOS: bool = False
    all_probs: bool = False
    compute_logprob: bool = False
    end_strings: tuple[str, ...] = ()
    """Empty: a turn ends where the chat template ends one."""


@dataclass(kw_only=True, slots=True, frozen=True)
class LengthParams:
    """Bounds of a sampled turn, in tokens."""

    max_length: int = ranged(Generation().max_new_tokens, 1)
    min_length: int = ranged(1, 0)


@dataclass(kw_only=True, slots=True, frozen=True)
class ChatBlock:
    """`config.Policy`'s fields of the same names; the template is that of the model's tokenizer."""

    tool_parser: str = Policy().tool_parser
    template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True, frozen=True)
class PivotRLModelBlock:
    """`model.pivotrl`."""

    rollout_micro_batch_size: int = ranged(8, 1)
    """Pivots that are sampled together, one turn each."""
    num_rollout_samples: int = ranged(Grpo().num_prompts_per_step, 1)
    """Pivots of a step, over all ranks: `Grpo.num_prompts_per_step`."""
    forward_micro_batch_size: int = ranged(8, 1)
    """Rows of one forward pass that only scores."""
    val_rollout_micro_batch_size: int = ranged(8, 1)
    num_val_samples: int = ranged(Grpo().val_candidates, 1)
    """Held-out states of a validation: `Grpo.val_candidates`."""
    offload_adam_states: bool = False
    generation: Literal["nemo", "servers"] = "nemo"
    """What samples turns: NeMo's own `generate`, or OpenAI-compatible servers that get the weights after every step."""
    servers: Vllm = field(default_factory=Vllm)
    """Which servers, for `generation: servers`: `config.Vllm`'s fields that concern servers and refits. Each is started by
    `nemo-pivotrl serve CONFIG --refit`."""
    hf_folder: str = ""
    """HF checkpoint folder of the start policy, for `generation: servers`: what the servers start from, and how the tensors
    that they are sent are called."""
    sampling_params: SamplingParams = field(default_factory=SamplingParams)
    length_params: LengthParams = field(default_factory=LengthParams)
    chat: ChatBlock = field(default_factory=ChatBlock)
    verifier: Verifier = field(default_factory=Verifier)
    loss_fn: LossFn = field(default_factory=LossFn)


@dataclass(kw_only=True, slots=True, frozen=True)
class LLMDoctorTrainerBlock(Progress):
    """`trainer.llmdoctor`."""

    limit_train_batches: float = ranged(1.0, 0.0)
    limit_val_batches: float = ranged(1.0, 0.0)


@dataclass(kw_only=True, slots=True, frozen=True)
class PatientBlock(PatientReading):
    """Stage 1's patient, which is the `pretrained_checkpoint`."""

    run_dir: str = "."
    """Folder with `preferences.jsonl`; `token_rewards.jsonl` is written beside it."""


@dataclass(kw_only=True, slots=True, frozen=True)
class LLMDoctorModelBlock(TfpoLoss):
    """`model.llmdoctor`."""

    patient: PatientBlock = field(default_factory=PatientBlock)
    reward: Reward = field(default_factory=Reward)
    """Stage 1: `config.Reward`."""
    objective: str = ""
    """Which of the artefact's objectives; required where it holds several: one run trains one doctor."""
    log_prob_forward_micro_batch_size: int = ranged(1, 1)
    """Pairs of one forward pass of the reference."""


def read_block(cls: type[Any], block: Any, name: str) -> Any:
    """The block `name` (a mapping or a DictConfig) as `cls`. Raises InputError with every problem in it."""
    return build(cls, plain(block), FILE, f"{name}.")


def plain(block: Any) -> Mapping[str, Any]:
    """A mapping or a DictConfig, resolved, as plain dicts and lists."""
    from omegaconf import OmegaConf

    plain: Any = OmegaConf.to_container(block, resolve=True) if OmegaConf.is_config(block) else block
    return plain  # type: ignore[no-any-return]


def served_problems(model: PivotRLModelBlock) -> list[Problem]:
    """What keeps `generation: servers` from sampling as the block says."""
    if model.generation != "servers":
        return []
    wrong = [
        ("servers.servers", "none", not model.servers.servers, "name the servers: nemo-pivotrl serve CONFIG --refit"),
        (
            "hf_folder",
            model.hf_folder or "nothing",
            not model.hf_folder,
            "give the start policy's HF checkpoint folder, which the servers serve",
        ),
        (
            "length_params.min_length",
            str(model.length_params.min_length),
            model.length_params.min_length > 1,
            "servers end a turn at its first stop token: set it to 1",
        ),
    ]
    return [Problem(FILE, None, f"model.pivotrl.{name}", found, remedy) for name, found, bad, remedy in wrong if bad]


def check_pivotrl(trainer: PivotRLTrainerBlock, model: PivotRLModelBlock, gbs: int) -> None:
    """Raise InputError for blocks that contradict each other or would train on something else than they sample."""
    rows = model.num_rollout_samples * trainer.num_rollouts_per_prompt
    sampling, generated = model.sampling_params, "training samples from the whole distribution, as the ratio assumes"
    wrong = [
        (
            "trainer.pivotrl.batch_iterator.use_flask",
            trainer.batch_iterator.use_flask,
            False,
            "a group stays on its rank",
        ),
        ("model.pivotrl.sampling_params.use_greedy", sampling.use_greedy, False, "equal samples have no advantage"),
        ("model.pivotrl.sampling_params.top_k", sampling.top_k, 0, generated),
        ("model.pivotrl.sampling_params.top_p", sampling.top_p, 1.0, generated),
        ("model.pivotrl.sampling_params.repetition_penalty", sampling.repetition_penalty, 1.0, generated),
        ("model.pivotrl.sampling_params.add_BOS", sampling.add_BOS, False, "the chat template writes its own"),
        (
            "model.pivotrl.sampling_params.end_strings",
            sampling.end_strings,
            (),
            "the chat template says how a turn ends",
        ),
        (
            "model.pivotrl.loss_fn.reference_policy_kl_penalty",
            model.loss_fn.reference_policy_kl_penalty,
            trainer.initial_policy_kl_penalty,
            "trainer.pivotrl.initial_policy_kl_penalty is the same number",
        ),
        (
            "model.pivotrl.loss_fn.use_importance_sampling_correction",
            model.loss_fn.use_importance_sampling_correction,
            False,
            "turns come without the sampler's log-probabilities",
        ),
        (
            "model.global_batch_size",
            rows % gbs,
            0,
            f"it must divide num_rollout_samples * num_rollouts_per_prompt = {rows}",
        ),
    ]
    problems = [
        Problem(FILE, None, name, str(found), f"set it to {wanted}: {why}" if name[-4:] != "size" else why)
        for name, found, wanted, why in wrong
        if found != wanted
    ]
    problems += served_problems(model)
    if problems:
        raise InputError(problems)
