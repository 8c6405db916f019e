"""Settings of verification: the verifier, its limits and judge, the audit and rescoring. `recipe.py` has the recipe that they are
part of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from nemo_pivotrl.config.schema import ranged


@dataclass(kw_only=True, slots=True, frozen=True)
class Limits:
    """What of a sampled action is looked at at all. Beyond a limit the action scores 0 as `LIMIT_EXCEEDED`, at once."""

    max_chars: int = ranged(1 << 17, 256, 1 << 24)
    """Characters of an action: its text, or the names and arguments of its calls."""
    max_calls: int = ranged(4096, 1, 1 << 16)
    """Parallel calls of one turn."""
    max_depth: int = ranged(100, 4, 300)
    """Nesting of JSON arguments; deeper ones are a decode error."""
    max_values: int = ranged(4096, 16, 1 << 20)
    """JSON values in one call's arguments; more are a decode error."""
    max_work: int = ranged(3_000_000, 10_000)
    """Character comparisons of one verdict, in units of roughly 20 ns.

    They are counted and not timed: a verdict never depends on how busy the machine is.
    """


@dataclass(kw_only=True, slots=True, frozen=True)
class JudgeServer:
    """An LLM that judges, behind any OpenAI-compatible endpoint: of `verifier.judge` and `assess.judge`."""

    base_url: str = ""
    """Address of an OpenAI-compatible endpoint, e.g. http://127.0.0.1:8000/v1; empty: no judge."""
    model: str = ""
    """Name of the model that judges."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; unset means that none is sent."""
    api_key_host: str = ""
    """Host (or host:port) that the key is sent to, over https or on this machine, and no other.

    Empty: api.openai.com for OPENAI_API_KEY. Every other variable needs its host named. One written `http://HOST` gets it over
    http, too: then the network to it must be private.
    """
    votes: int = ranged(1, 1, 99)
    """Answers per order; the majority of them is that order's verdict."""
    both_orders: bool = True
    """Ask with the two texts swapped, too. Actions are equivalent only if both orders say so; answers that they disagree on tie."""
    temperature: float = ranged(0.0, 0.0, 2.0)
    """Temperature of the judge."""
    max_tokens: int = ranged(1024, 16)
    """Longest answer of the judge, in tokens."""
    extra_body: dict[str, Any] = field(default_factory=dict)
    """Added to every request; null drops a field.

    For example `chat_template_kwargs: {enable_thinking: false}`.
    """
    max_action_chars: int = ranged(8192, 64)
    """A longer action or answer is cut in the middle before it is shown; the cut is marked."""
    max_context_chars: int = ranged(8192, 0)
    """Characters of the state's end that are shown to the judge; 0: none."""
    timeout_s: float = ranged(120.0, 0.1)
    """Seconds for one request."""
    max_retries: int = ranged(4, 0)
    """Retries of a request.

    It is retried for lost connections, time-outs, 408, 409, 425, 429, 5xx, and answers without a verdict.
    """
    backoff_s: float = ranged(0.5, 0.0)
    """Seconds before the first retry; doubled up to 30 s, with jitter."""
    concurrency: int = ranged(32, 1)
    """Requests at a time."""
    allow_self_judge: bool = False
    """Let the policy, or the patient, judge itself."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Judge(JudgeServer):
    """A judge of equivalence."""

    cache: str = ""
    """JSONL file of verdicts keyed by content; empty: `judge_cache.jsonl` in the run directory."""
    calibration: str = ""
    """JSONL file of labelled pairs; empty: the small set that comes with the package."""
    min_agreement: float = ranged(0.9, 0.0, 1.0)
    """`audit` stops when the judge agrees less than this with the calibration set."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Verifier:
    """Which verifier judges, with its own settings."""

    name: str = "single_step"
    """Which verifier judges: docs/pivotrl.md lists them; `package.module:Class` is one of your own."""
    compat: Literal["0.5", "0.6", "0.7"] = "0.7"
    """NeMo-Gym release whose rules the four families follow, where releases differ."""
    message: Literal["judge", "exclude", "any"] | None = None
    """What decides where the expert talks (P23); unset: `judge` if `judge.base_url` names one, else `exclude`.

    For verifiers that do not compare talk. `judge`: the judge compares it. `exclude`: such a turn is not profiled and no
    pivot. `any`: any text scores 1, which teaches to talk and nothing about what to say.
    """
    settings: dict[str, Any] = field(default_factory=dict)
    """The verifier's own settings, e.g. `word_count_similarity_threshold`; docs/settings.md lists them."""
    limits: Limits = field(default_factory=Limits)
    judge: Judge = field(default_factory=Judge)

    @property
    def talk(self) -> Literal["judge", "exclude", "any"]:
        """`message`, decided."""
        return self.message or ("judge" if self.judge.base_url else "exclude")


@dataclass(kw_only=True, slots=True, frozen=True)
class Audit:
    """What the verifier does with actions whose verdict is known. `profile` runs it first, on a sample."""

    before_profile: bool = True
    """`profile` audits a sample first."""
    sample: int = ranged(200, 0)
    """Candidates that are audited, chosen by hash; 0: all."""
    foreign_actions: int = ranged(3, 0)
    """Other rows' actions that each candidate is tried with."""
    judged_sample: int = ranged(20, 0)
    """Candidates of the sample that are audited when a judge is asked, since every probe may cost a request."""
    max_gold_failures: float = ranged(0.05, 0.0, 1.0)
    """A greater share of candidates whose own expert action does not score 1 stops `audit` and `profile`."""
    max_round_trip_failures: float = ranged(0.05, 0.0, 1.0)
    """A greater share of expert actions that the policy's template and parser change stops `profile`.

    The template writes the action and the parser reads it back. `audit` tries all of them, `profile` its sample.
    """


@dataclass(kw_only=True, slots=True, frozen=True)
class Rescore:
    """Another verifier or threshold over the samples of a profile."""

    profiles: str = "profiles.jsonl"
    """Profile whose samples are judged anew."""
    output: str = "profiles.rescored.jsonl"
    """File of the judged profile, in run_dir."""
