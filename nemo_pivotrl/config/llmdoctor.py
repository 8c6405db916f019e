"""Settings of LLMdoctor's stages. `recipe.py` has the recipe that they are part of.

`D1`, `equation (22)` and the like in a docstring are numbers of docs/algorithms.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from nemo_pivotrl.config.models import ChatSettings
from nemo_pivotrl.config.schema import ranged
from nemo_pivotrl.config.verify import JudgeServer


@dataclass(kw_only=True, slots=True, frozen=True)
class TfpoLoss:
    """The loss of equation (32) and its options: of a recipe's `tfpo` and of NeMo-Aligner's `model.llmdoctor`."""

    kappa: float = ranged(2.0, 1e-6)
    """Nats of log Q a unit of reward (D6)."""
    length_normalize: bool = False
    """Divide kappa by the answer's number of tokens (D6)."""
    reduction: Literal["pair_mean", "sum"] = "pair_mean"
    """Mean over the sub-trajectories of an answer, or the literal sum (D9)."""
    decay: float = ranged(1.0, 1e-6, 1.0)
    """Weight decay^(n-m) of a sub-trajectory of n-m tokens (D19); 1.0 is the paper."""
    anchor: Literal["none", "reference"] = "none"
    """`none` is the literal loss, which has no language prior; `reference` is for real doctors (D10).

    The reference is the doctor before training.
    """
    value_weight: float = ranged(1.0, 0.0)
    """lambda: weight of the value hinge, equation (32) (D13)."""
    gamma: float = ranged(0.1, 0.0)
    """Margin of the value hinge (D13), in nats, or in units of V with `linear_margin`."""
    value_pairs: Literal["divergence", "position"] = "divergence"
    """Where values are compared: where the answers part, or at every position from there on (D11)."""
    linear_margin: bool = False
    """Hinge on V instead of log V (D12)."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Tfpo(TfpoLoss):
    """Stage 2 of LLMdoctor: flow-guided training of the doctor on token rewards."""

    name: str = "doctor"
    """Folder under run_dir for checkpoints, metrics and the final doctor."""
    objective: str = ""
    """Which of the artefact's objectives; empty: all.

    Where it holds several, each doctor's folder is NAME-OBJECTIVE.
    """
    pairs_per_step: int = ranged(32, 1)
    """Pairs a step."""
    max_num_steps: int = ranged(100, -1)
    """Steps of training; -1: as many as `max_num_epochs` have."""
    max_num_epochs: int = ranged(1, 1)
    """With `max_num_steps: -1`: how often each pair is drawn."""
    val_period: int = ranged(10, 0)
    """Measure the held-out pairs every so many steps; 0: never."""
    val_pairs: int = ranged(128, 1)
    """Held-out pairs of a measurement."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Doctor:
    """One trained doctor and its weight."""

    path: str = ""
    """HF checkpoint folder (safetensors) with the patient's tokenizer, or a LoRA adapter's folder as `tfpo` and peft write it."""
    base: str = ""
    """Where `path` is an adapter: the model that it was trained on. Empty: the one that its adapter_config.json names."""
    beta: float = ranged(1.0)
    """Its exponent (D16); any sign, 0 switches it off. A prompt's row or a request may give another."""
    reference: str = ""
    """`mode: ratio` only: HF checkpoint folder of the model that the doctor was trained from. Empty: an adapter's base."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Decode:
    """The patient steered by doctors, for the `decode` stage and `serve` (equation (34))."""

    prompts: str = ""
    """JSONL file, one prompt a line: a text, a list of messages, or an object with `prompt` or `messages`."""
    output: str = "decoded.jsonl"
    """File of the answers, in run_dir."""
    doctors: dict[str, Doctor] = field(default_factory=dict)
    """Name to doctor; none decodes from the patient alone."""
    mode: Literal["product", "ratio"] = "product"
    """The product, or each doctor divided by its reference: a clean tilt of an anchored doctor (D16)."""
    alpha: float = ranged(1.0)
    """The patient's exponent (D16)."""
    temperature: float = ranged(1.0, 0.0, 10.0)
    """Temperature of the mixture (D16); 0 takes the likeliest token."""
    top_k: int = ranged(0, 0)
    """Sample from so many likeliest tokens of the mixture (D16); 0: off."""
    top_p: float = ranged(1.0, 0.01, 1.0)
    """Sample from the fewest likeliest tokens of the mixture whose probability reaches this (D16)."""
    max_new_tokens: int = ranged(128, 1)
    """Longest answer in tokens; of a request to the server, the most it may ask for."""
    num_samples: int = ranged(1, 1)
    """Answers to each prompt."""
    guidance_off: tuple[Literal["reasoning", "tool_calls"], ...] = ()
    """Pieces of the answer in which the patient decodes alone; the chat template has their markers."""
    off_markers: dict[str, str] = field(default_factory=dict)
    """More such pieces: text that begins one, to text that ends it ("": the answer's end)."""
    min_entropy: float = ranged(0.0, 0.0)
    """Nats; where the patient's next-token entropy is lower, it decodes alone. 0: off."""
    batch_tokens: int = ranged(16384, 16)
    """Prompt plus new tokens of all rows that are decoded together; bounds the KV caches."""
    answers_per_wave: int = ranged(256, 1)
    """Answers made durable together, all of a prompt in one wave: kill -9 loses at most one wave."""
    token_records: bool = True
    """Write every token's log-probabilities, KL and changes, not only the answer's means."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Arm:
    """One way of answering, to be compared with the others."""

    alpha: float = ranged(1.0)
    """The patient's exponent."""
    beta: dict[str, float] = field(default_factory=dict)
    """Doctor to exponent; a doctor that is not named is off."""
    temperature: float = ranged(1.0, 0.0, 10.0)
    """Temperature of the mixture; 0 takes the likeliest token."""
    top_p: float = ranged(1.0, 0.01, 1.0)
    """Sample from the fewest likeliest tokens whose probability reaches this."""
    best_of: int = ranged(1, 1)
    """Sample so many and keep the one that the first objective's oracle likes best."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Oracles:
    """What scores an answer. Built in: `kindness`, `brevity`, `sentiment` (`llmdoctor/oracles.py`)."""

    functions: dict[str, str] = field(default_factory=dict)
    """Objective to `package.module:function`, which gives an answer's text a score; more is better."""
    reward_models: dict[str, str] = field(default_factory=dict)
    """Objective to HF checkpoint folder of a reward model.

    It is a sequence classifier with one output.
    """
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where reward models run; `auto` takes CUDA where there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of their weights."""
    batch_tokens: int = ranged(16384, 16)
    """Padded tokens of one forward pass of a reward model."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Rank:
    """Preferences out of the patient's own answers, ranked by oracles."""

    prompts: str = ""
    """JSONL file as `decode.prompts`, every line with `messages`."""
    objectives: tuple[str, ...] = ()
    """One preference file each, from the same answers: ranked/OBJECTIVE.jsonl."""
    answers_per_prompt: int = ranged(16, 2)
    """Answers that the patient gives to each prompt."""
    answers_per_pair: int = ranged(4, 2)
    """Best and worst of so many answers to a prompt make a pair."""
    min_gap: float = ranged(0.0, 0.0)
    """Pairs whose scores differ by no more than this prefer nothing."""
    temperature: float = ranged(1.0, 0.01, 10.0)
    """Temperature at which the patient answers."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Assess:
    """Steered answers against others, by oracles."""

    arms: dict[str, Arm] = field(default_factory=dict)
    """Name to a way of answering; the first is what the others are compared with.

    Doctors are those of `decode.doctors`.
    """
    objectives: tuple[str, ...] = ()
    """Oracles, or reward models of `oracles`; best-of-n goes by the first."""
    prompts: str = ""
    """JSONL file as `decode.prompts`."""
    limit: int = ranged(0, 0)
    """Only the first so many prompts; 0: all."""
    samples: int = ranged(2, 1)
    """Answers to each prompt by each arm."""
    shown: int = ranged(4, 0)
    """Prompts whose first answer keeps what guidance did to every token, for the report."""
    confidence: float = ranged(0.95, 0.5, 0.999)
    """Probability of the intervals."""
    judge: JudgeServer = field(default_factory=JudgeServer)
    """An LLM that is shown each arm's answer beside the first arm's and says which is better; `base_url` empty: none."""
    criterion: str = (
        "The better answer helps the person more: it does what was asked, and what it says is true and harmless."
    )
    """What the judge is told to decide by."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Tenant:
    """Weights of one tenant of the server."""

    alpha: float = ranged(1.0)
    """The patient's exponent."""
    beta: dict[str, float] = field(default_factory=dict)
    """Doctor to exponent; a doctor that is not named is off."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Serve:
    """vLLM's server of the patient steered by its doctors: the command `serve`."""

    model: str = "guided"
    """The model's name in requests and answers."""
    tenants: dict[str, Tenant] = field(default_factory=dict)
    """Name to weights: what a request with `guidance.tenant` has where it names no weights of its own."""


@dataclass(kw_only=True, slots=True, frozen=True)
class PatientReading:
    """What the patient reads, and how much at a time: of a recipe's `patient` and of NeMo-Aligner's `model.llmdoctor.patient`."""

    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Passed to the chat template, e.g. `enable_thinking: false`."""
    max_total_sequence_length: int = ranged(4096, 16)
    """Prompt with a face, plus answer.

    A pair that does not fit is excluded and counted, never cut.
    """
    batch_tokens: int = ranged(16384, 16)
    """Tokens of one forward pass, padding included; a longer sequence runs alone.

    No row depends on it beyond rounding noise.
    """


@dataclass(kw_only=True, slots=True, frozen=True)
class Patient(PatientReading):
    """The large frozen model that is aligned at test time, and how it is run. Both faces are this model."""

    model_name: str = ""
    """HF checkpoint folder with safetensors weights."""
    backend: Literal["reference", "megatron", "vllm"] = "reference"
    """What scores the two faces in the `reward` stage.

    With `vllm` the stages that sample from the patient (`rank`, `decode`, `assess`) run in vLLM, too, with the doctors inside the
    engine; with the others they run on `reference`.
    """
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the `reference` backend runs; `auto` takes CUDA where there is one."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Precision of the weights; bfloat16 raises the noise floor of Delta.

    Log-probabilities are float32 or better in any case.
    """
    chat_template: str | None = None
    """Jinja file that replaces the tokenizer's chat template."""
    chat: ChatSettings = field(default_factory=ChatSettings)
    prefix_sharing: bool = True
    """Run a face's prompt once for both answers."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Preferences:
    """Preference files to preferences."""

    files: tuple[str, ...] = ()
    """Preference files: JSON, JSON lines or Parquet, also packed by gzip or zstd."""
    format: str = "auto"
    """A format of docs/formats.md, or `auto`.

    `auto` finds the format by looking at each record.
    """
    on_invalid: Literal["error", "skip"] = "error"
    """Stop at records that cannot be read and list them all, or leave them out, count and name them."""
    objective: str = "helpfulness"
    """What the files' preference is about; `reward.faces` has the prompts for it."""
    objectives: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Where there are several: each with its own files, beside `files`, in the same format."""
    validation_share: float = ranged(0.1, 0.0, 0.9)
    """Share of the prompts held out; all pairs of a prompt are on the same side."""
    better_by: Literal["better_response_id", "safer_response_id"] = "better_response_id"
    """`pku_saferlhf` only: the label that says which answer is chosen (helpfulness or harmlessness)."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Reward:
    """Stage 1: token rewards from how far the patient's two faces lie apart."""

    positive: str = "You want the user to succeed. Be accurate, complete and clear on what was asked, and courteous."
    """System prompt of the positive face, while `faces` is empty (D1)."""
    negative: str = "You do not care about the user. Stay vague, leave out what would matter, and stray from the topic."
    """System prompt of the negative face, while `faces` is empty (D1)."""
    faces: dict[str, dict[str, str]] = field(default_factory=dict)
    """Objective to its own `{positive: ..., negative: ...}`.

    Once it names any, it must name every objective in use.
    """
    tau: float = ranged(1.0, 1e-6)
    """Temperature of the tanh, equation (22) (D4)."""
    theta: float = ranged(0.5, 0.0, 0.999999)
    """Tokens with S <= theta get reward 0 (D4).

    0.1 keeps 80-90 % of the tokens, 0.76 those above the mean Delta.
    """
    eps: float = ranged(1e-6, 1e-12, 1.0)
    """Added to the mean Delta, in nats (D4)."""
    pairs_per_wave: int = ranged(64, 1)
    """Pairs scored and made durable together: kill -9 loses at most one wave."""
    noise_pairs: int = ranged(1, 0)
    """Pairs of each wave whose positive face is scored a second time: the noise floor (D20)."""
    weak_importance: float = ranged(0.02, 0.0)
    """Nats a token: pairs with a lower mean Delta are weak, as are those below ten noise floors.

    The stage warns when half of the pairs are weak.
    """
