"""Every recipe setting, its default (only here) and its range. `config/load.py` reads recipe files into these dataclasses.

A verifier's own settings stand in its own file, as the fields of its class; `recipe.build` checks them in the same way.
Names follow NeMo-RL where it has one. `A.15 n` in a docstring is the row of the algorithm specification's table of
choices that a default follows, `B.9 n` a row of LLMdoctor's.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from nemo_pivotrl.config.llmdoctor import (
    Assess,
    Decode,
    Manners,
    Oracles,
    Patient,
    Preferences,
    Rank,
    Reward,
    ServeGuided,
    Tfpo,
)
from nemo_pivotrl.config.models import Lora, Megatron, Optimizer, Policy, Vllm, ranged
from nemo_pivotrl.config.verify import Audit, Rescore, Verifier
from nemo_pivotrl.core.artifacts import digest


@dataclass(kw_only=True, slots=True, frozen=True)
class World:
    """The embedded service-desk world (`demo/service_desk.py`) and the tiny model made for it."""

    warmup_tasks: int = ranged(1000, 1)
    train_tasks: int = ranged(120, 1)
    test_tasks: int = ranged(100, 1)
    puzzle_warmup_tasks: int = ranged(8000, 1)
    puzzle_test_tasks: int = ranged(200, 1)
    vocab_size: int = ranged(512, 300)
    hidden_size: int = ranged(96, 8)
    layers: int = ranged(3, 1)
    heads: int = ranged(4, 1)
    slips: float = ranged(0.0, 0.0, 1.0)
    """How careless those are from whom the start policy learns the desk: share of the rates `world.SLIPS`. 0: they are experts."""
    teacher: Literal["house", "other"] = "house"
    """Whose wording the train trajectories have: that of the start policy's lessons, or another's who does the same."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Sft:
    """Supervised fine-tuning on expert actions: the warm-up of a start policy, or the arm PivotRL is compared with."""

    name: str = "sft"
    """Folder under run_dir that receives the checkpoint."""
    source: Literal["world", "candidates", "pivots"] = "pivots"
    """`world`: a tiny model from nothing on the embedded world's own text; else the train split of that artefact."""
    init: str = ""
    """HF checkpoint to start from; empty: policy.model_name."""
    num_steps: int = ranged(100, 1)
    copy_steps: int = ranged(0, 0)
    """`source: world` only: steps on copying puzzles before the rest, which teach a new model to look back."""
    batch_size: int = ranged(32, 1)
    """Sequences a step. Turns of one trajectory whose prompts are prefixes of each other make one sequence."""
    puzzle_batch_size: int = ranged(32, 0)
    """`source: world` only: puzzles a step."""
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(lr=1e-5))
    decay_from: float = ranged(1.0, 0.0, 1.0)
    """Share of the steps after which the learning rate falls linearly to a tenth."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Extract:
    """Trajectories to candidates."""

    trajectories: tuple[str, ...] = ()
    """Input files. `.json` or `.jsonl`."""
    format: Literal["openai", "responses", "sharegpt", "tau_bench"] = "openai"
    tools: str | None = None
    """JSON file with the tool definitions, for sources that do not carry them."""
    turns: Literal["all", "bash", "tool_calls", "search"] = "all"
    """Which turns count (A.8.1): all of them (tau), bash actions (terminal), non-error tool calls (SWE), search steps."""
    min_reward: float = ranged(1.0)
    """Trajectories below it are skipped: experts are successful ones."""
    unrewarded: Literal["keep", "skip"] = "keep"
    """What to do with trajectories that carry no reward."""
    parallel_calls: Literal["batch", "skip"] = "batch"
    """Turns with several calls: one `function_call_batch` row (Gym 0.6 and later), or the skip audit."""
    on_invalid: Literal["error", "skip"] = "error"
    """Unknown tools and arguments that break their schema, dangling calls: stop and list them all, or skip and count."""
    validation_share: float = ranged(0.1, 0.0, 0.9)
    """Share of the tasks held out, decided by task before anything else."""
    near_duplicate: float = ranged(0.95, 0.5, 1.0)
    """Jaccard similarity of word 5-grams from which two states of different trajectories count as the same; 1.0: off."""
    agent_ref: str = "single_step_tool_use_with_argument_comparison_agent"
    """Name in the rows' `agent_ref`, for NeMo-Gym."""


@dataclass(kw_only=True, slots=True, frozen=True)
class ProfileStage:
    """K one-turn rollouts of the frozen start policy for every candidate (A.15 1: K = 16, at least 4)."""

    num_generations: int = ranged(16, 4, 256)
    curtail: Literal["exact", "sequential", "none"] = "exact"
    """Stop drawing for a candidate as soon as no remaining outcome can change what `select` does with it; `sequential`: as soon as
    another decision has at most the chance `error_rate`; `none`: all K of everything."""
    lambda_interval: tuple[float, ...] = ()
    """[low, high]: every `select.lambda_diff` in it stays decidable without drawing anew. Empty: only the recipe's own."""
    error_rate: float = ranged(0.05, 0.0, 0.5)
    """`sequential` only: chance that all K rollouts would select otherwise, under `prior`."""
    prior: tuple[float, ...] = (0.5, 0.5)
    """a and b of the hit rates' Beta distribution, for `sequential` and for the forecast."""
    min_wave: int = ranged(2, 1)
    """Rollouts of a candidate that are drawn together at least, though fewer might decide."""
    control_share: float = ranged(0.02, 0.0, 1.0)
    """Share of the candidates, chosen by hash, that get all K rollouts: what curtailment is checked against."""
    max_retries: int = ranged(2, 0)
    """Of a rollout that could not be drawn or judged, before the candidate is excluded."""
    retries: dict[str, int] = field(default_factory=dict)
    """Another number for some kinds of fault: transport, timeout, parser, judge, sandbox, other."""
    max_failure_share: float = ranged(0.05, 0.0, 1.0)
    """More candidates than this that could not be judged stop the stage, as soon as they are too many of at least 200. States
    that do not fit the context are excluded and counted too, but are no fault."""
    retry_failed: bool = False
    """Of a finished profile, profile again what had failed."""
    candidates_per_chunk: int = ranged(256, 1)
    """Consecutive candidates that one process works on and makes durable as a whole; every wave within is durable too."""
    steal_after_s: float = ranged(900.0, 1.0)
    """A chunk whose process has not been heard of for so long is taken over by another."""
    limit: int = ranged(0, 0)
    """Profile only this many candidates of each split, chosen by hash; 0: all."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Select:
    """Profiles to pivots. Pure and instant: change it as often as you like."""

    rule: Literal["random", "mixed", "adv", "adv_with_zeros"] = "adv"
    """A.15 4. `adv` is the paper's Eq. 5."""
    lambda_diff: float = ranged(0.6, 0.0, 1.0)
    """A.15 2: keep iff k < lambda_diff * K, decided on integers."""
    inclusive: bool = False
    """k <= lambda_diff * K instead."""
    limit: int = ranged(0, 0)
    """At most this many pivots of the train split, chosen by hash; 0: all. `random` without a limit takes as many as
    `adv` would."""
    max_message_ratio: float = ranged(1.0, 0.0, 1.0)
    """Largest share of talking turns among train pivots (A.15 15); 1.0: off."""
    undecided: Literal["refuse", "by_rate"] = "refuse"
    """What to do with candidates whose curtailed samples do not decide this rule and lambda_diff: stop, or go by the hit rate
    of the samples there are."""
    profiles: str = "profiles.jsonl"
    """Or `profiles.rescored.jsonl`, which `rescore` writes."""
    output: str = "pivots.jsonl"


@dataclass(kw_only=True, slots=True, frozen=True)
class Export:
    """Pivots for other trainers."""

    target: Literal["nemo-gym", "nemo-rl", "nemotron"] = "nemo-gym"
    """`nemo-gym`: the rows. `nemo-rl`: rows, Gym config and recipe. `nemotron`: rows with manifest.json and metadata.json, as
    NVIDIA-NeMo/Nemotron's stages pass them on. On the command line: `export nemo-rl RECIPE`."""
    nemo_rl_base: str = "/opt/nemo-rl/examples/nemo_gym/grpo_workplace_assistant_nemotron_nano_v2_9b.yaml"
    """NeMo-RL recipe whose settings hold wherever ours has none: its tool parser and reasoning parser among them."""


@dataclass(kw_only=True, slots=True, frozen=True)
class LossFn:
    """Eq. 7 and its options."""

    ratio_clip_min: float = ranged(0.2, 0.0, 1.0)
    ratio_clip_max: float = ranged(0.2, 0.0)
    ratio_clip_c: float | None = ranged(None, 1.0)
    """Dual clip: bounds the loss of a bad action whose ratio exploded. None: off."""
    ratio_level: Literal["token", "sequence"] = "token"
    """A.15 9."""
    token_level_loss: bool = True
    """Mean over the batch's tokens; false: mean over sequences of their token means."""
    reference_policy_kl_penalty: float = ranged(0.0, 0.0)
    """beta of the k3 estimator against the profiling policy (A.15 11)."""
    use_importance_sampling_correction: bool = False
    """Weight tokens by old-policy over sampler probability, truncated (A.15 12)."""
    truncated_importance_sampling_ratio: float = ranged(5.0, 0.0)
    truncated_importance_sampling_ratio_min: float = ranged(0.0, 0.0)
    seq_logprob_error_threshold: float | None = ranged(None, 1.0)
    """Leave out samples whose mean exp(|old-policy minus sampler log-probability|) over tokens is above it (A.7, NeMo-RL: 2).
    None: off."""
    max_sampler_mismatch: float | None = ranged(None, 0.0)
    """Nats: stop where the old policy's and the sampler's log-probabilities differ more than this, as a mean over a step's
    tokens: the sampler has other weights, or another arithmetic. None: off."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Grpo:
    """Single-turn GRPO on pivots."""

    name: str = "pivotrl"
    """Folder under run_dir for checkpoints, metrics and the final policy."""
    pivots: str = "pivots.jsonl"
    num_prompts_per_step: int = ranged(64, 1)
    num_generations_per_prompt: int = ranged(16, 2)
    max_num_steps: int = ranged(100, -1)
    """-1: as many as `max_num_epochs` have."""
    max_num_epochs: int = ranged(1, 1)
    """With `max_num_steps: -1`: how often each pivot is drawn."""
    keep_together: float = ranged(0.5, 0.0, 1.0)
    """The pivots of a trajectory follow each other in an epoch when that saves more than this share of their prompts'
    tokens (`prefix_tree.py`); 1.0: never. Each pivot is still drawn once an epoch, but those of a step are then more alike."""
    num_minibatches: int = ranged(1, 1)
    """Optimiser steps a rollout batch is divided into (A.15 12: one)."""
    use_leave_one_out_baseline: bool = False
    """NeMo-RL's leave-one-out mean and std instead of the group's (A.15 7)."""
    normalize_rewards: bool = True
    zero_variance_tolerance: float = ranged(1e-6, 0.0)
    """A group whose rewards span less than this has no signal: all its advantages are exactly 0."""
    advantage_clip: float | None = ranged(None, 0.0)
    overlong_filtering: bool = False
    """Leave truncated samples out of the loss and of the group's statistics."""
    malformed_action_advantage: float | None = None
    """Replaces the advantage of turns whose tool call cannot be read (NVIDIA uses -5.0); None: off."""
    max_retries: int = ranged(2, 0)
    val_period: int = ranged(10, 0)
    """Validate on held-out tasks every so many steps; 0: never."""
    val_kl: bool = True
    """Measure KL to the start policy at every validation; needs a second copy of the weights (not with LoRA)."""
    max_failure_share: float = ranged(0.05, 0.0, 1.0)
    """More samples of a step than this without a verdict stop the run at its last checkpoint."""
    val_candidates: int = ranged(64, 1)
    val_generations: int = ranged(4, 1)


@dataclass(kw_only=True, slots=True, frozen=True)
class Loop:
    """Rounds of profile, select and train, for `run`. One round is the paper's single profile (A.15 16: re-profiling is off)."""

    max_rounds: int = ranged(1, 1)
    round: int = ranged(1, 1)
    """Which round this recipe is of; `run` sets it, and the seeds of later rounds' rollouts follow from it."""
    gain_window: int = ranged(3, 1)
    """Validations over which held-out accuracy must have gained `min_gain`, or the round ends."""
    min_gain: float = ranged(0.005, 0.0, 1.0)
    """Also what a round must add to the best accuracy so far, for `patience`."""
    std_window: int = ranged(5, 1)
    """Steps whose mean reward std in a group is compared with that of the round's first so many."""
    std_ratio: float = ranged(1 / 3, 0.0, 1.0)
    """The round ends below this share of the first window's; 0: never."""
    patience: int = ranged(2, 1)
    """So many rounds on end that gain nothing end the run."""
    rest_mastered: bool = True
    """Train candidates that the policy won in every rollout of a round's profile are not profiled again in later rounds."""
    rehearse: bool = True
    """Later rounds also train on the pivots of the rounds before them; without those a round unlearns some of what they taught."""
    retention_period: int = ranged(0, 0)
    """Score `evaluate.retention` every so many steps, validate and save; 0: never."""
    max_retention_loss: float = ranged(0.02, 0.0, 1.0)
    """Training ends when the out-of-domain score is lower than the start policy's by more than this, as a paired mean, and the
    interval of the difference (`evaluate.confidence`) lies below 0."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Budget:
    """What the rounds of `run` may spend; 0: no bound. The step that reaches a bound is the last, and a round takes at least one."""

    rollouts: int = ranged(0, 0)
    """Turns sampled in profiling, training, validation and retention, of the work that counts: what was lost with a killed process
    is in the ledger alone, so that a resumed run ends where an undisturbed one does."""
    tokens: int = ranged(0, 0)
    """Generated in those turns, plus their prompts, each once however many turns it begins."""
    gpu_hours: float = ranged(0.0, 0.0)
    """Seconds in the ledger, times `gpus`, lost work included: a run that was killed may end at another step for it."""
    gpus: int = ranged(1, 1)
    """GPUs that the job occupies."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Checkpointing:
    """Complete training states, written atomically."""

    save_period: int = ranged(10, 1)
    keep_top_k: int = ranged(2, 1)
    """Best checkpoints kept by metric_name, besides the latest."""
    metric_name: str = "val/accuracy"
    higher_is_better: bool = True
    checkpoint_must_save_by: str = ""
    """DD:HH:MM:SS after the start of this process: save at the end of the step that would else pass it, and stop, to be
    resumed by the same command. Leave a scheduler's time limit room for one checkpoint. Empty: no deadline."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Evaluate:
    """Policies side by side, in domain and out of domain, with intervals."""

    policies: dict[str, str] = field(default_factory=dict)
    """Label to HF checkpoint folder; the first is what the others are compared with."""
    one_turn_candidates: int = ranged(200, 1)
    """Held-out states (validation split); 0 of them is an error."""
    num_generations: int = ranged(4, 1)
    simulator: Literal["world", "none"] = "none"
    """Multi-turn success on test tasks, where there is something to simulate."""
    trials: int = ranged(2, 1)
    retention: Literal["world", "none"] | str = "none"
    """Out-of-domain set: the world's puzzles, or a JSONL file of `{"messages": [...], "answer": "..."}`."""
    temperature: float = ranged(1.0, 0.0, 10.0)
    confidence: float = ranged(0.95, 0.5, 0.999)


@dataclass(kw_only=True, slots=True, frozen=True)
class Logger:
    """Metrics always go to metrics.jsonl; these are copies for the dashboards people use (`components/trackers.py`)."""

    tensorboard: bool = True
    """Event files in the folder's `tensorboard`: `tensorboard --logdir RUN_DIR`."""
    wandb: bool = False
    """WANDB_MODE=offline writes files for `wandb sync` in the folder's `wandb`."""
    mlflow: bool = False
    project: str = "nemo_pivotrl"
    """W&B's project, MLflow's experiment."""
    name: str = ""
    """What the runs of this run directory are grouped by, and what their names begin with; empty: the directory's name."""
    entity: str = ""
    """W&B's user or team; empty: the one that is logged in."""
    tags: tuple[str, ...] = ()
    """Beside the algorithm and the stage."""
    mlflow_tracking_uri: str = ""
    """Server or database (sqlite:////PATH/mlflow.db); empty: MLFLOW_TRACKING_URI, else a database in the working directory."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Cluster:
    """The machines that a recipe is meant for. `plan` and the pre-flight check read it; nothing is started by it."""

    num_nodes: int = ranged(1, 1)
    generation_nodes: int = ranged(0, 0)
    """Of them, those whose GPUs serve rollouts and train nothing (`vllm.servers`)."""
    gpus_per_node: int = ranged(8, 1)
    gpu: Literal["a100", "h100", "h200", "b200"] = "h100"
    """The 80 GB forms of the first two, H200 with 141 GB, B200 with 180 GB."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Plan:
    """What `plan` cannot know and has to be told. It prints every one of these beside the figures that rest on it."""

    candidates: int = ranged(0, 0)
    """States to profile, or preference pairs to score; 0: as many as the run folder's artefact holds."""
    mean_prompt_tokens: int = ranged(0, 0)
    """0: a quarter of the longest sequence, `max_total_sequence_length`."""
    mean_response_tokens: int = ranged(0, 0)
    """0: a quarter of the longest answer."""
    pivots_per_trajectory: int = ranged(4, 1)
    """Pivots of one trajectory in a training step, whose prompts are prefixes of each other."""
    rollout_share: float = ranged(0.0, 0.0, 1.0)
    """Of K rollouts a candidate, those that are run until its selection is known; 0: as `profile.curtail` expects under
    `profile.prior`."""
    expert_imbalance: float = ranged(1.2, 1.0)
    """Tokens that the busiest rank's experts get, over the mean."""
    reserve_gib: float = ranged(4.0, 0.0)
    """What a GPU keeps from tensors: CUDA context, NCCL's and Transformer Engine's buffers, fragmentation."""
    train_mfu: float = ranged(0.2, 0.001, 1.0)
    """Share of the GPUs' peak that training reaches; a guess, as the next two, until a run of yours has measured it."""
    prefill_mfu: float = ranged(0.3, 0.001, 1.0)
    """The same of reading prompts and of scoring."""
    decode_efficiency: float = ranged(0.3, 0.001, 1.0)
    """Share of the memory's bandwidth that decoding reaches."""
    rollouts_per_gpu_hour: float = ranged(0.0, 0.0)
    """Measured speed of rollouts; 0: estimated from the three above."""
    gpu_hour_price: float = ranged(0.0, 0.0)
    """In any currency; 0: no costs are shown."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Recipe:
    """All of it."""

    algorithm: Literal["pivotrl", "llmdoctor"] = "pivotrl"
    """Whose stages `run` goes through."""
    run_dir: str = "runs/default"
    seed: int = ranged(0, 0)
    num_threads: int = ranged(0, 0)
    """CPU threads for torch; 0: torch's own choice. Bit-exact resume needs the same number."""
    policy: Policy = field(default_factory=Policy)
    megatron: Megatron = field(default_factory=Megatron)
    """For `policy.backend: megatron` and `doctor.backend: megatron`."""
    vllm: Vllm = field(default_factory=Vllm)
    """For `policy.sampler: vllm` and `patient.backend: vllm`."""
    world: World = field(default_factory=World)
    warmup: Sft = field(default_factory=lambda: Sft(name="start", source="candidates"))
    extract: Extract = field(default_factory=Extract)
    verifier: Verifier = field(default_factory=Verifier)
    audit: Audit = field(default_factory=Audit)
    rescore: Rescore = field(default_factory=Rescore)
    profile: ProfileStage = field(default_factory=ProfileStage)
    select: Select = field(default_factory=Select)
    export: Export = field(default_factory=Export)
    sft: Sft = field(default_factory=Sft)
    grpo: Grpo = field(default_factory=Grpo)
    loss_fn: LossFn = field(default_factory=LossFn)
    loop: Loop = field(default_factory=Loop)
    budget: Budget = field(default_factory=Budget)
    doctor: Policy = field(default_factory=lambda: Policy(lora=Lora(r=8, alpha=16), optimizer=Optimizer(lr=1e-4)))
    """LLMdoctor's start model and how it trains (B.9 14: LoRA r 8, alpha 16, or full)."""
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
    serve_guided: ServeGuided = field(default_factory=ServeGuided)
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

    def path(self, name: str) -> Path:
        """`name` inside the run directory."""
        return Path(self.run_dir) / name

    def digest(self, *sections: str) -> str:
        """Hash of the named sections and the seed: what an artefact's header carries as its config hash."""
        return digest([self.seed, {name: dataclasses.asdict(getattr(self, name)) for name in sections}])
