"""Settings of a whole run: rounds, budget, checkpoints, loggers, machines. `recipe.py` has the recipe that they are part of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nemo_pivotrl.config.schema import ranged


@dataclass(kw_only=True, slots=True, frozen=True)
class Loop:
    """Rounds of profile, select and train, for `run`. One round is the paper's single profile (P16: re-profiling is off)."""

    max_rounds: int = ranged(1, 1)
    """Rounds of profile, select and train at most; 1 is the paper's single profile (P16)."""
    round: int = ranged(1, 1)
    """Which round this recipe is of; `run` sets it.

    The seeds of later rounds' rollouts follow from it.
    """
    gain_window: int = ranged(3, 1)
    """Validations over which held-out accuracy must gain `min_gain`, or the round ends (equation (18))."""
    min_gain: float = ranged(0.005, 0.0, 1.0)
    """What held-out accuracy must gain over `gain_window`, and a round on the best so far for `patience`."""
    std_window: int = ranged(5, 1)
    """Steps whose mean reward std in a group is compared with that of the round's first so many (equation (17))."""
    std_ratio: float = ranged(1 / 3, 0.0, 1.0)
    """The round ends below this share of the first window's std; 0: never."""
    patience: int = ranged(2, 1)
    """So many rounds on end that gain nothing end the run."""
    rest_mastered: bool = True
    """Later rounds do not profile train candidates that the policy won in every rollout of a round's profile."""
    rehearse: bool = True
    """Later rounds also train on the pivots of the rounds before them (P22)."""
    retention_period: int = ranged(0, 0)
    """Score `evaluate.retention` every so many steps, validate and save; 0: never."""
    max_retention_loss: float = ranged(0.02, 0.0, 1.0)
    """Out-of-domain score that may be lost against the start policy before training ends.

    It ends when the paired mean is lower by more than this and the interval of the difference (`evaluate.confidence`) lies
    below 0.
    """


@dataclass(kw_only=True, slots=True, frozen=True)
class Budget:
    """What the rounds of `run` may spend; 0: no bound. The step that reaches a bound is the last, and a round takes at least one."""

    rollouts: int = ranged(0, 0)
    """Turns sampled in profiling, training, validation and retention; 0: no bound.

    Only work that counts is counted: what was lost with a killed process stands in the cost log alone, so a resumed run ends
    where an undisturbed one does.
    """
    tokens: int = ranged(0, 0)
    """Tokens generated in those turns, plus their prompts; 0: no bound.

    A prompt counts once however many turns it begins.
    """
    gpu_hours: float = ranged(0.0, 0.0)
    """Seconds in the cost log, times `gpus`; 0: no bound.

    Lost work is included: a run that was killed may end at another step for it.
    """
    gpus: int = ranged(1, 1)
    """GPUs that the job occupies."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Checkpointing:
    """Complete training states, written atomically."""

    save_period: int = ranged(10, 1)
    """Steps between checkpoints."""
    keep_top_k: int = ranged(2, 1)
    """Best checkpoints kept by metric_name, besides the latest."""
    metric_name: str = "val/accuracy"
    """Metric by which checkpoints are compared."""
    higher_is_better: bool = True
    """Whether more of that metric is better."""
    publish: Literal["last", "best"] = "last"
    """Which state becomes the stage's policy: the last one, or the best checkpoint by metric_name.

    With `best` every step that has the metric is saved. Ties go to the earlier step.
    """
    simulator: Literal["world", "none"] | str = "none"
    """What plays whole validation tasks in PivotRL's trainings, SFT included: `world`, the demo's, or `package.module:function`.

    Their success is the metric `val/tasks`. The tasks must be others than those of `evaluate.simulator`.
    """
    simulator_period: int = ranged(10, 1)
    """Play them every so many steps, and after the last one."""
    checkpoint_must_save_by: str = ""
    """Time after the start of this process (DD:HH:MM:SS) by which to save and stop; empty: none.

    It saves at the end of the step that would pass it, and the same command resumes. Leave a scheduler's time limit room for
    one checkpoint.
    """


@dataclass(kw_only=True, slots=True, frozen=True)
class Logger:
    """Metrics always go to metrics.jsonl; these are copies for the dashboards people use (`components/trackers.py`)."""

    tensorboard: bool = True
    """Event files in the folder's `tensorboard`: `tensorboard --logdir RUN_DIR`."""
    wandb: bool = False
    """Log to W&B; WANDB_MODE=offline writes files for `wandb sync` in the folder's `wandb`."""
    mlflow: bool = False
    """Log to MLflow."""
    project: str = "nemo_pivotrl"
    """W&B's project, MLflow's experiment."""
    name: str = ""
    """Group and first part of the names of this run directory's runs; empty: the directory's name."""
    entity: str = ""
    """W&B's user or team; empty: the one that is logged in."""
    tags: tuple[str, ...] = ()
    """Tags of the runs, beside the algorithm and the stage."""
    mlflow_tracking_uri: str = ""
    """MLflow's server or database (sqlite:////PATH/mlflow.db).

    Empty: MLFLOW_TRACKING_URI, else a database in the working directory.
    """


@dataclass(kw_only=True, slots=True, frozen=True)
class Cluster:
    """The machines that a recipe is meant for. `plan` and the pre-flight check read it; nothing is started by it."""

    num_nodes: int = ranged(1, 1)
    """Nodes of the job."""
    generation_nodes: int = ranged(0, 0)
    """Of them, those whose GPUs serve rollouts and train nothing (`vllm.servers`)."""
    gpus_per_node: int = ranged(8, 1)
    """GPUs of each node."""
    gpu: Literal["a100", "h100", "h200", "b200"] = "h100"
    """Kind of GPU: the 80 GB forms of A100 and H100, H200 with 141 GB, B200 with 180 GB."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Ray:
    """The Ray cluster of `executor: ray`, and what each of the `workers` takes of it."""

    address: str = ""
    """Its address, or `auto` for the one that this machine is part of.

    Empty: RAY_ADDRESS, else a cluster of this machine alone for as long as the stage runs.
    """
    cpus_per_worker: float = ranged(1.0, 0.0)
    """CPU cores that an actor takes."""
    gpus_per_worker: float = ranged(0.0, 0.0)
    """GPUs that an actor takes: of an engine as many as `vllm.tensor_parallel_size`."""
    placement: Literal["SPREAD", "PACK"] = "SPREAD"
    """Actors on as many nodes as there are, or on as few as hold them."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Plan:
    """Assumptions of `plan` about the data and the machines. It prints each beside the figures that rest on it."""

    candidates: int = ranged(0, 0)
    """States to profile, or preference pairs to score; 0: as many as the run folder's artefact holds."""
    mean_prompt_tokens: int = ranged(0, 0)
    """Mean prompt; 0: a quarter of the longest sequence, `max_total_sequence_length`."""
    mean_response_tokens: int = ranged(0, 0)
    """Mean answer; 0: a quarter of the longest answer."""
    pivots_per_trajectory: int = ranged(4, 1)
    """Pivots of one trajectory in a training step, whose prompts are prefixes of each other."""
    rollout_share: float = ranged(0.0, 0.0, 1.0)
    """Share of the K rollouts of a candidate that are run until its selection is known.

    0: as `profile.curtail` expects under `profile.prior`.
    """
    expert_imbalance: float = ranged(1.2, 1.0)
    """Tokens that the busiest rank's experts get, over the mean."""
    reserve_gib: float = ranged(4.0, 0.0)
    """GiB that a GPU keeps from tensors: CUDA context, buffers of NCCL and Transformer Engine, fragmentation."""
    train_mfu: float = ranged(0.2, 0.001, 1.0)
    """Share of the GPUs' peak that training reaches; a guess until a run of yours has measured it."""
    prefill_mfu: float = ranged(0.3, 0.001, 1.0)
    """Share of the GPUs' peak that reading prompts and scoring reach; a guess, too."""
    decode_efficiency: float = ranged(0.3, 0.001, 1.0)
    """Share of the memory's bandwidth that decoding reaches; a guess, too."""
    rollouts_per_gpu_hour: float = ranged(0.0, 0.0)
    """Measured speed of rollouts; 0: estimated from the three above."""
    gpu_hour_price: float = ranged(0.0, 0.0)
    """Price of a GPU-hour in any currency; 0: no costs are shown."""
