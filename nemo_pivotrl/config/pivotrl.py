"""Settings of PivotRL's stages. Names follow NeMo-RL where it has one. `recipe.py` has the recipe that they are part of.

`P1`, `equation (3)` and the like in a docstring are numbers of docs/algorithms.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nemo_pivotrl.config.models import Optimizer
from nemo_pivotrl.config.schema import ranged


@dataclass(kw_only=True, slots=True, frozen=True)
class Extract:
    """Trajectories to candidates."""

    trajectories: tuple[str, ...] = ()
    """Input files: JSON, JSON lines or Parquet, also packed by gzip or zstd."""
    format: str = "auto"
    """`auto`: found by looking at each record. A format of docs/formats.md, or `module:function` of your own reader."""
    tools: str | None = None
    """JSON file with the tool definitions, for sources that do not carry them."""
    turns: Literal["all", "bash", "tool_calls", "search"] = "all"
    """Which turns count (P19): all of them (tau), bash actions (terminal), non-error tool calls (SWE), search steps."""
    min_reward: float = ranged(1.0)
    """Trajectories below it are skipped: experts are successful ones."""
    unrewarded: Literal["keep", "skip"] = "keep"
    """What to do with trajectories that carry no reward."""
    parallel_calls: Literal["batch", "skip"] = "batch"
    """Turns with several calls: one `function_call_batch` row (Gym 0.6 and later), or the skip audit."""
    on_invalid: Literal["error", "skip"] = "error"
    """Records that cannot be read, unknown tools, arguments that break their schema, dangling calls: stop and list them all, or
    skip and count."""
    max_state_messages: int = ranged(2000, 1)
    """A longer state is skipped as `state_too_long`: rows hold whole states, so the output grows with the square of this."""
    validation_share: float = ranged(0.1, 0.0, 0.9)
    """Share of the tasks held out, decided by task before anything else."""
    near_duplicate: float = ranged(0.95, 0.5, 1.0)
    """Jaccard similarity of word 5-grams from which two states of different trajectories count as the same; 1.0: off."""
    agent_ref: str = "single_step_tool_use_with_argument_comparison_agent"
    """Name in the rows' `agent_ref`, for NeMo-Gym."""


@dataclass(kw_only=True, slots=True, frozen=True)
class ProfileStage:
    """K one-turn rollouts of the frozen start policy for every candidate (P1: K = 16, at least 4)."""

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
    """P4. `adv` is equation (4), the paper's rule."""
    lambda_diff: float = ranged(0.6, 0.0, 1.0)
    """P2: keep iff k < lambda_diff * K, decided on integers."""
    inclusive: bool = False
    """k <= lambda_diff * K instead."""
    limit: int = ranged(0, 0)
    """At most this many pivots of the train split, chosen by hash; 0: all. `random` without a limit takes as many as
    `adv` would."""
    max_message_ratio: float = ranged(1.0, 0.0, 1.0)
    """Largest share of talking turns among train pivots (P15); 1.0: off."""
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
class Advantages:
    """From verdicts to advantages: of a recipe's `grpo` and of NeMo-Aligner's `trainer.pivotrl`."""

    use_leave_one_out_baseline: bool = False
    """NeMo-RL's leave-one-out mean and std instead of the group's (P7)."""
    normalize_rewards: bool = True
    zero_variance_tolerance: float = ranged(1e-6, 0.0)
    """A group whose rewards span less than this has no signal: all its advantages are exactly 0."""
    advantage_clip: float | None = ranged(None, 0.0)
    overlong_filtering: bool = False
    """Leave truncated samples out of the loss and of the group's statistics."""
    malformed_action_advantage: float | None = None
    """Replaces the advantage of turns whose tool call cannot be read (NVIDIA uses -5.0); None: off."""
    max_retries: int = ranged(2, 0)
    max_failure_share: float = ranged(0.05, 0.0, 1.0)
    """More samples of a step than this without a verdict stop the run at its last checkpoint."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Grpo(Advantages):
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
    """Optimiser steps a rollout batch is divided into (P12: one)."""
    val_period: int = ranged(10, 0)
    """Validate on held-out tasks every so many steps; 0: never."""
    val_kl: bool = True
    """Measure KL to the start policy at every validation; needs a second copy of the weights (not with LoRA)."""
    val_candidates: int = ranged(64, 1)
    val_generations: int = ranged(4, 1)


@dataclass(kw_only=True, slots=True, frozen=True)
class LossFn:
    """The loss of equation (15) and its options."""

    ratio_clip_min: float = ranged(0.2, 0.0, 1.0)
    ratio_clip_max: float = ranged(0.2, 0.0)
    ratio_clip_c: float | None = ranged(None, 1.0)
    """Dual clip: bounds the loss of a bad action whose ratio exploded. None: off."""
    ratio_level: Literal["token", "sequence"] = "token"
    """P9."""
    token_level_loss: bool = True
    """Mean over the batch's tokens; false: mean over sequences of their token means."""
    reference_policy_kl_penalty: float = ranged(0.0, 0.0)
    """beta of the k3 estimator against the profiling policy (P11)."""
    use_importance_sampling_correction: bool = False
    """Weight tokens by old-policy over sampler probability, truncated (P12)."""
    truncated_importance_sampling_ratio: float = ranged(5.0, 0.0)
    truncated_importance_sampling_ratio_min: float = ranged(0.0, 0.0)
    seq_logprob_error_threshold: float | None = ranged(None, 1.0)
    """Leave out samples whose disagreement between trainer and sampler, equation (16), is above it; None: off. NeMo-RL has 2."""
    max_sampler_mismatch: float | None = ranged(None, 0.0)
    """Nats: stop where the old policy's and the sampler's log-probabilities differ more than this, as a mean over a step's
    tokens: the sampler has other weights, or another arithmetic. None: off."""


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
