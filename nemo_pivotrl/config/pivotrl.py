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
    """A format of docs/formats.md, `module:function` of your own reader, or `auto`.

    `auto` finds the format by looking at each record.
    """
    tools: str | None = None
    """JSON file with the tool definitions, for sources that do not carry them."""
    turns: Literal["all", "bash", "tool_calls", "search"] = "all"
    """Turns that count (P19): all (tau-bench), bash actions (terminal), calls without an error (SWE), search steps."""
    min_reward: float = ranged(1.0)
    """Trajectories below it are skipped: experts are successful ones."""
    unrewarded: Literal["keep", "skip"] = "keep"
    """What to do with trajectories that carry no reward."""
    parallel_calls: Literal["batch", "skip"] = "batch"
    """Turns with several calls: one `function_call_batch` row (Gym 0.6 and later), or the skip audit."""
    on_invalid: Literal["error", "skip"] = "error"
    """Stop at invalid input and list all of it, or skip and count it.

    Invalid are records that cannot be read, unknown tools, arguments that break their schema, and dangling calls.
    """
    max_state_messages: int = ranged(2000, 1)
    """A state of more messages is skipped as `state_too_long`.

    Rows hold whole states, so the output grows with the square of this.
    """
    validation_share: float = ranged(0.1, 0.0, 1.0)
    """Share of the tasks held out, decided by task before anything else; 1.0 makes a test set, which `evaluate` reads."""
    near_duplicate: float = ranged(0.95, 0.5, 1.0)
    """Similarity from which two states of different trajectories count as the same; 1.0: off.

    It is the Jaccard similarity of word 5-grams.
    """
    agent_ref: str = "single_step_tool_use_with_argument_comparison_agent"
    """Name in the rows' `agent_ref`, for NeMo-Gym."""


@dataclass(kw_only=True, slots=True, frozen=True)
class ProfileStage:
    """K one-turn rollouts of the frozen start policy for every candidate (P1: K = 16, at least 4)."""

    num_generations: int = ranged(16, 4, 256)
    """K: rollouts of a candidate at most (P1)."""
    curtail: Literal["exact", "sequential", "none"] = "exact"
    """Stop drawing for a candidate when its selection is known (`exact`), is likely (`sequential`), or never (`none`).

    `exact`: no remaining outcome can change what `select` does with it. `sequential`: another decision has at most the chance
    `error_rate` (P20).
    """
    lambda_interval: tuple[float, ...] = ()
    """[low, high]: every `select.lambda_diff` in it stays decidable without drawing anew.

    Empty: only the recipe's own.
    """
    error_rate: float = ranged(0.05, 0.0, 0.5)
    """`sequential` only: chance that all K rollouts would select otherwise, under `prior`."""
    prior: tuple[float, ...] = (0.5, 0.5)
    """a and b of the hit rates' Beta distribution, for `sequential` and for the forecast."""
    min_wave: int = ranged(2, 1)
    """Rollouts of a candidate that are drawn together at least, though fewer might decide."""
    control_share: float = ranged(0.02, 0.0, 1.0)
    """Share of the candidates, chosen by hash, that get all K rollouts.

    Early stopping is checked against them.
    """
    max_retries: int = ranged(2, 0)
    """Retries of a rollout that could not be drawn or judged, before the candidate is excluded."""
    retries: dict[str, int] = field(default_factory=dict)
    """Another number for some kinds of fault: transport, timeout, parser, judge, sandbox, other."""
    max_failure_share: float = ranged(0.05, 0.0, 1.0)
    """A greater share of candidates that could not be judged stops the stage.

    It stops as soon as they are too many of at least 200. States that do not fit the context are excluded and counted too, but
    are no fault.
    """
    retry_failed: bool = False
    """Of a finished profile, profile again what had failed."""
    candidates_per_chunk: int = ranged(256, 1)
    """Consecutive candidates that draw together; with `vllm.servers` at most those of one trajectory do."""
    limit: int = ranged(0, 0)
    """Profile only this many candidates of each split, chosen by hash; 0: all."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Select:
    """Profiles to pivots. Pure and instant: change it as often as you like."""

    rule: Literal["random", "mixed", "adv", "adv_with_zeros", "all"] = "adv"
    """Which candidates are pivots (P4): `adv` is equation (4), the paper's rule.

    `all` keeps every candidate that could be profiled: what the paper compares its filter with.
    """
    lambda_diff: float = ranged(0.6, 0.0, 1.0)
    """Keep iff k < lambda_diff * K (P2), decided on integers."""
    inclusive: bool = False
    """Keep iff k <= lambda_diff * K instead (P2)."""
    limit: int = ranged(0, 0)
    """At most this many pivots of the train split, chosen by hash; 0: all.

    `random` without a limit takes as many as `adv` would.
    """
    max_message_ratio: float = ranged(1.0, 0.0, 1.0)
    """Largest share of talking turns among train pivots (P15); 1.0: off."""
    drop_constant_wins: bool = False
    """Leave out pivots that a constant answer wins, such as any text or one tool's commonest call.

    A policy can learn such an answer instead of the task. Every pivot is judged again with each constant answer.
    """
    undecided: Literal["refuse", "by_rate"] = "refuse"
    """What to do with candidates whose rollouts do not decide this rule and lambda_diff.

    `refuse` stops; `by_rate` goes by the hit rate of the rollouts there are.
    """
    profiles: str = "profiles.jsonl"
    """Profile to select from; `profiles.rescored.jsonl` is what `rescore` writes."""
    output: str = "pivots.jsonl"
    """File of the pivots, in run_dir."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Export:
    """Pivots for other trainers."""

    target: Literal["nemo-gym", "nemo-rl", "nemotron"] = "nemo-gym"
    """Whose files to write: NeMo-Gym rows, NeMo-RL's, or an artefact of NVIDIA-NeMo/Nemotron.

    `nemo-rl` writes rows, Gym config and recipe. `nemotron` writes rows with manifest.json and metadata.json. On the command
    line: `export nemo-rl RECIPE`.
    """
    nemo_rl_base: str = "/opt/nemo-rl/examples/nemo_gym/grpo_workplace_assistant_nemotron_nano_v2_9b.yaml"
    """NeMo-RL recipe whose settings hold wherever ours has none.

    Its tool parser and reasoning parser are among them.
    """


@dataclass(kw_only=True, slots=True, frozen=True)
class Sft:
    """Supervised fine-tuning on expert actions: the warm-up of a start policy, or the arm PivotRL is compared with."""

    name: str = "sft"
    """Folder under run_dir that receives the checkpoint."""
    source: Literal["world", "shipped", "candidates", "pivots"] = "pivots"
    """What it trains on: the train split of candidates or pivots, or the demo world's own text.

    `world` makes a tiny model from nothing; `shipped` trains nothing and takes the one that comes with the package. Both are the
    warm-up's only.
    """
    init: str = ""
    """HF checkpoint to start from; empty: policy.model_name."""
    num_steps: int = ranged(100, 1)
    """Optimiser steps."""
    copy_steps: int = ranged(0, 0)
    """`source: world` only: steps on copying puzzles before the rest, which teach a new model to look back."""
    batch_size: int = ranged(32, 1)
    """Sequences a step.

    Turns of one trajectory whose prompts are prefixes of each other make one sequence.
    """
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(lr=1e-5))
    decay_from: float = ranged(1.0, 0.0, 1.0)
    """Share of the steps after which the learning rate falls linearly to a tenth."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Advantages:
    """From verdicts to advantages: of a recipe's `grpo` and of NeMo-Aligner's `trainer.pivotrl`."""

    use_leave_one_out_baseline: bool = False
    """NeMo-RL's leave-one-out mean and std, equation (9), instead of the group's (P7)."""
    normalize_rewards: bool = True
    """Divide advantages by the standard deviation (P7)."""
    zero_variance_tolerance: float = ranged(1e-6, 0.0)
    """A group whose rewards span less than this has no signal: all its advantages are exactly 0."""
    advantage_clip: float | None = ranged(None, 0.0)
    """Clip advantages to plus and minus this; None: off."""
    overlong_filtering: bool = False
    """Leave truncated samples out of the loss and of the group's statistics."""
    malformed_action_advantage: float | None = None
    """Replaces the advantage of turns whose tool call cannot be read; None: off.

    Recipes of NVIDIA use -5.0.
    """
    max_retries: int = ranged(2, 0)
    """Retries of a sample that could not be judged, before it is left out."""
    max_failure_share: float = ranged(0.05, 0.0, 1.0)
    """A greater share of a step's samples without a verdict stops the run at its last checkpoint."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Grpo(Advantages):
    """Single-turn GRPO on pivots."""

    name: str = "pivotrl"
    """Folder under run_dir for checkpoints, metrics and the final policy."""
    pivots: str = "pivots.jsonl"
    """File of the pivots, in run_dir."""
    num_prompts_per_step: int = ranged(64, 1)
    """Pivots a step (P13)."""
    num_generations_per_prompt: int = ranged(16, 2)
    """G: samples of each pivot in a step (P13)."""
    max_num_steps: int = ranged(100, -1)
    """Steps of training; -1: as many as `max_num_epochs` have."""
    max_num_epochs: int = ranged(1, 1)
    """With `max_num_steps: -1`: how often each pivot is drawn."""
    keep_together: float = ranged(0.5, 0.0, 1.0)
    """Pivots of a trajectory share a step when that saves more than this share of their prompts' tokens.

    1.0: never. Each pivot is still drawn once an epoch, but those of a step are then more alike (P21).
    """
    num_minibatches: int = ranged(1, 1)
    """Optimiser steps that a rollout batch is divided into (P12)."""
    val_period: int = ranged(10, 0)
    """Validate on held-out tasks every so many steps; 0: never."""
    val_kl: bool = True
    """Measure KL to the start policy at every validation.

    It needs a second copy of the weights, but not with LoRA.
    """
    val_candidates: int = ranged(64, 1)
    """Held-out states of a validation."""
    val_generations: int = ranged(4, 1)
    """Samples of each of them."""


@dataclass(kw_only=True, slots=True, frozen=True)
class LossFn:
    """The loss of equation (15) and its options."""

    ratio_clip_min: float = ranged(0.2, 0.0, 1.0)
    """The ratio is clipped from below at 1 minus this (P10)."""
    ratio_clip_max: float = ranged(0.2, 0.0)
    """The ratio is clipped from above at 1 plus this (P10)."""
    ratio_clip_c: float | None = ranged(None, 1.0)
    """Dual clip, equation (12): bounds the loss of a bad action whose ratio exploded. None: off."""
    ratio_level: Literal["token", "sequence"] = "token"
    """One ratio for each token, or for each sample (P9)."""
    token_level_loss: bool = True
    """Mean over the batch's tokens (P9); false: mean over samples of their token means."""
    reference_policy_kl_penalty: float = ranged(0.0, 0.0)
    """beta of the k3 estimator against the profiling policy (P11)."""
    use_importance_sampling_correction: bool = False
    """Weight tokens by old-policy over sampler probability, truncated (P12)."""
    truncated_importance_sampling_ratio: float = ranged(5.0, 0.0)
    """Upper bound of that weight."""
    truncated_importance_sampling_ratio_min: float = ranged(0.0, 0.0)
    """Lower bound of that weight."""
    seq_logprob_error_threshold: float | None = ranged(None, 1.0)
    """Leave out samples whose disagreement between trainer and sampler is above it; None: off.

    Equation (16) is the measure. NeMo-RL's recipes have 2.
    """
    max_sampler_mismatch: float | None = ranged(None, 0.0)
    """Nats a token of difference between trainer and sampler at which the run stops; None: off.

    It is a mean over a step's tokens. The sampler then has other weights, or another arithmetic.
    """


@dataclass(kw_only=True, slots=True, frozen=True)
class Evaluate:
    """Policies side by side, in domain and out of domain, with intervals."""

    policies: dict[str, str] = field(default_factory=dict)
    """Label to HF checkpoint folder; the first is what the others are compared with."""
    one_turn_candidates: int = ranged(200, 1)
    """Held-out states (validation split); 0 of them is an error."""
    num_generations: int = ranged(4, 1)
    """Samples of each state."""
    simulator: Literal["world", "none"] | str = "none"
    """What plays whole test tasks: `world`, the demo's, or `package.module:function`.

    The function makes a simulator out of the recipe (`components/simulation.py`).
    """
    trials: int = ranged(2, 1)
    """Times that each test task is played."""
    retention: Literal["world", "none"] | str = "none"
    """Out-of-domain set: a simulator as above, `world`, or a JSONL file of `{"messages": [...], "answer": "..."}`."""
    temperature: float = ranged(1.0, 0.0, 10.0)
    """Temperature of the sampling; 0 takes the likeliest token."""
    greedy: bool = False
    """Play the whole tasks once more at temperature 0: sampling favours a policy whose entropy fell."""
    confidence: float = ranged(0.95, 0.5, 0.999)
    """Probability of the intervals."""
