"""reward: preferences -> `token_rewards.jsonl`, stage 1 of LLMdoctor (equations (21) to (23)).

The patient scores both answers of a pair under its two faces, in one batch. How far the faces lie apart on a token is
its importance, and the label gives the sign. Nothing is generated. A row holds the prompt's ids as the doctor will see
it, and for each answer its ids, rewards and importance, which stage 2 needs, and both faces' log-probabilities of every
token, for whoever looks at it. Pairs that are excluded have no row; `token_rewards.json` counts them, beside the
diagnostics of D20. The rewards of a pair are scale-free, so look at the mean Delta and its noise floor before trusting
them.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_pivotrl.algorithms import llmdoctor
from nemo_pivotrl.algorithms.reward_diagnostics import reward_diagnostics
from nemo_pivotrl.backends import loading
from nemo_pivotrl.backends.base import Scorer
from nemo_pivotrl.backends.batching import batches
from nemo_pivotrl.backends.identity import policy_revision, without_start
from nemo_pivotrl.components.conclusions import conclude
from nemo_pivotrl.components.durable_map import Found, Map, Tally, batches_of, found_rows
from nemo_pivotrl.components.lineage import check_lineage
from nemo_pivotrl.components.stage_checks import reward_checks
from nemo_pivotrl.config import Patient, Recipe, Reward
from nemo_pivotrl.core.artifacts import (
    Header,
    digest,
    file_digest,
    read_header,
    read_rows,
)
from nemo_pivotrl.core.atomic import write_atomically
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.core.lock import one_writer
from nemo_pivotrl.core.types import Preference
from nemo_pivotrl.data.chat_template import Chat, generation_stop_ids, load_tokenizer
from nemo_pivotrl.data.preferences import preference_of_row
from nemo_pivotrl.llmdoctor.contrastive_prompts import Face, FacePrompts, Prepared

NOT_FINITE = "not_finite"
"""Why a pair has no row whose log-probabilities are NaN or infinite, twice."""
DIGITS = 6
"""Decimals of rewards and importance: below the noise of a float32 patient."""
FACE_DIGITS = 4
"""Decimals of the faces' log-probabilities, which are only looked at."""
NOISE_MARGIN = 10
"""Mean Delta below so many times the noise floor is weak."""


@one_writer
def build_rewards(recipe: Recipe, fresh: bool = False) -> Path:
    """Write `token_rewards.jsonl` and `token_rewards.json`; returns the artefact. Raises InputError for bad input.

    >>> path = build_rewards(load_recipe("llmdoctor.yaml"))
    >>> path.name
    'token_rewards.jsonl'
    """
    return write_token_rewards(
        recipe,
        load_patient_chat(recipe.patient),
        lambda: policy_revision(recipe.patient.model_name),
        partial(_scorer_of, recipe),
        fresh,
    )


@one_writer
def write_token_rewards(
    recipe: Recipe,
    chat: Chat,
    revision: Callable[[], str],
    load_scorer: Callable[[], Scorer],
    fresh: bool,
) -> Path:
    """As `reward`, for any patient: its template, the digest of its weights, and what scores tokens under it."""
    source = recipe.path("preferences.jsonl")
    check_lineage(recipe, source, read_header(source, "preferences"))
    preferences = [preference_of_row(row) for row in read_rows(source)]
    faces = faces_of(recipe.reward, sorted({p.objective for p in preferences}))
    prompts = FacePrompts(chat, faces, recipe.patient.max_total_sequence_length)
    header = make_header(recipe, source, prompts, revision())
    path, tally = recipe.path("token_rewards.jsonl"), Tally()
    waves = partial(batches_of, preferences, recipe.reward.pairs_per_wave, tally)
    make = partial(Rewarder, recipe, prompts, load_scorer)
    if recipe.executor != "here":  # a worker elsewhere loads its own
        make = partial(make_rewarder, recipe, list(faces))
    none = partial(_none_usable, source, preferences, prompts)
    Map(recipe, "reward", path, header, waves, make, len(preferences), "pair", tally, empty=none).run(fresh)
    summary = summarise(read_rows(path), preferences, prompts, recipe.reward)
    write_atomically(recipe.path("token_rewards.json"), json.dumps(summary, indent=2, sort_keys=True) + "\n")
    print(table(summary, recipe.reward))
    conclude(Path(recipe.run_dir), "reward", reward_checks(summary))
    return path


def load_patient_chat(patient: Patient) -> Chat:
    """The patient's tokenizer and template. Answers are text, so the template need not know tool calls."""
    tokenizer = load_tokenizer(patient.model_name, patient.chat_template, "patient")
    stop_ids = generation_stop_ids(patient.model_name)
    return Chat(
        tokenizer, "hermes", patient.template_kwargs, settings=patient.chat, stop_ids=stop_ids, section="patient"
    )


def faces_of(settings: Reward, objectives: Sequence[str]) -> dict[str, Face]:
    """The two prompts of each objective in use. Raises InputError with everything that is wrong with them."""
    named = settings.faces or {o: {"positive": settings.positive, "negative": settings.negative} for o in objectives}
    where = "reward.faces" if settings.faces else "reward"
    problems = [
        Problem(
            "recipe", None, f"{where}.{objective}", f"keys {', '.join(pair) or 'none'}", "give positive and negative"
        )
        for objective, pair in named.items()
        if set(pair) != {"positive", "negative"}
    ]
    problems += [
        Problem("recipe", None, where, f"no faces for {o!r}", f"add it; preferences.objective or {', '.join(named)}?")
        for o in objectives
        if o not in named
    ]
    if problems:
        raise InputError(problems)
    found = {objective: Face(pair["positive"], pair["negative"]) for objective, pair in named.items()}
    for objective, face in found.items():
        if not face.positive.strip() or not face.negative.strip() or face.positive == face.negative:
            remedy = "two different prompts that are not empty; where they agree there is nothing to measure"
            problems.append(Problem("recipe", None, f"{where}.{objective}", str(tuple(face)), remedy))
    if problems:
        raise InputError(problems)
    return {objective: found[objective] for objective in objectives}


def make_header(recipe: Recipe, source: Path, prompts: FacePrompts, revision: str) -> Header:
    """Everything that decides the rows; settings of cost alone (batches, waves' warnings) are left out."""
    settings, patient = recipe.reward, recipe.patient
    decides = [settings.tau, settings.theta, settings.eps, settings.pairs_per_wave, settings.noise_pairs]
    names = [
        f"reward.{name}" for name in ("tau", "theta", "eps", "pairs_per_wave", "noise_pairs", "positive", "negative")
    ]
    names += ["reward.faces", *(f"patient.{name}" for name in ("max_total_sequence_length", "dtype", "chat_template"))]
    return Header(
        stage="token_rewards",
        config_hash=digest([*decides, patient.max_total_sequence_length, patient.dtype]),
        parent=file_digest(source),
        tokenizer=prompts.chat.fingerprint,
        chat_template=prompts.chat.template_digest,
        policy=revision,
        extra={
            "faces": {o: {name: digest(text) for name, text in f._asdict().items()} for o, f in prompts.faces.items()},
            "face_placement": prompts.placement,
            "tau": settings.tau,
            "theta": settings.theta,
            "eps": settings.eps,
            "dtype": patient.dtype,
        },
        settings=recipe.told(*names, "patient.template_kwargs", "patient.chat"),
    )


def _none_usable(source: Path, preferences: Sequence[Preference], prompts: FacePrompts) -> Problem:
    reasons = dict(_excluded(preferences, set(), prompts))
    remedy = "raise patient.max_total_sequence_length, or set patient.chat_template or template_kwargs"
    if NOT_FINITE in reasons:
        remedy = "the patient's log-probabilities are no numbers: use float32, or another checkpoint"
    return Problem(str(source), None, "preferences", f"none usable: {reasons}", remedy)


class Rewarder:
    """A patient that scores waves of pairs. They begin at fixed places, so one that is done again is the same."""

    def __init__(self, recipe: Recipe, prompts: FacePrompts, load_scorer: Callable[[], Scorer]):
        self.recipe, self.prompts, self.scorer = recipe, prompts, load_scorer()

    def __call__(self, wave: Sequence[Preference]) -> Found:
        """The rows of the pairs that can be scored."""
        prepared = [p for p in map(self.prompts.prepare, wave) if isinstance(p, Prepared)]
        tokens = 2 * sum(len(p.chosen) + len(p.rejected) for p in prepared)
        return found_rows(reward_wave(prepared, self.recipe, self.scorer), pairs=len(prepared), tokens_scored=tokens)


def make_rewarder(recipe: Recipe, objectives: Sequence[str]) -> Rewarder:
    """The recipe's own patient, loaded where it runs."""
    chat, faces = load_patient_chat(recipe.patient), faces_of(recipe.reward, objectives)
    prompts = FacePrompts(chat, faces, recipe.patient.max_total_sequence_length)
    return Rewarder(recipe, prompts, partial(_scorer_of, recipe))


def _scorer_of(recipe: Recipe) -> Scorer:
    return loading.load_scorer(recipe.patient, without_start(recipe.megatron), recipe.vllm)


def reward_wave(prepared: Sequence[Prepared], recipe: Recipe, scorer: Scorer) -> list[dict[str, Any]]:
    """The rows of a wave's pairs. The first few pairs measure the noise floor: their positive face, scored again.

    A pair whose log-probabilities are no numbers is scored again alone, and then it has no row.
    """
    rows: dict[str, dict[str, Any]] = {}
    again = {p.preference.preference_id for p in prepared[: recipe.reward.noise_pairs]}
    sizes = [p.longest for p in prepared]
    order = sorted(range(len(prepared)), key=lambda i: (sizes[i], prepared[i].preference.preference_id))
    for places in batches(sizes, recipe.patient.batch_tokens, order, rows=4):  # a pair's four sequences go together
        group = [prepared[i] for i in places]
        sequences = [
            (face, answer) for p in group for answer in (p.chosen, p.rejected) for face in (p.positive, p.negative)
        ]
        log_probs = scorer.log_probs(sequences)
        group, log_probs = _finite(group, log_probs, scorer)
        if not group:
            continue
        positive, negative = log_probs[0::2], log_probs[1::2]
        second = list(positive)
        for k, p in enumerate(group):
            if p.preference.preference_id in again:
                second[2 * k] = scorer.log_probs([(p.positive, p.chosen)])[0]
                second[2 * k + 1] = scorer.log_probs([(p.positive, p.rejected)])[0]
        made = _rows(group, positive, negative, second, again, recipe.reward)
        rows |= {row["preference_id"]: row for row in made}
    return [rows[p.preference.preference_id] for p in prepared if p.preference.preference_id in rows]


def _finite(group: list[Prepared], log_probs: list[Tensor], scorer: Scorer) -> tuple[list[Prepared], list[Tensor]]:
    """The pairs whose four sequences have log-probabilities that are numbers, with these, in the same order."""
    kept, found = [], []
    for k, p in enumerate(group):
        own = log_probs[4 * k : 4 * k + 4]
        if not all(bool(values.isfinite().all()) for values in own):
            own = scorer.log_probs([(f, a) for a in (p.chosen, p.rejected) for f in (p.positive, p.negative)])
        if all(bool(values.isfinite().all()) for values in own):
            kept.append(p)
            found += own
    return kept, found


def _rows(
    group: Sequence[Prepared],
    positive: Sequence[Tensor],
    negative: Sequence[Tensor],
    second: Sequence[Tensor],
    again: set[str],
    settings: Reward,
) -> list[dict[str, Any]]:
    """Rows of a batch of pairs; log-probabilities come answer by answer: chosen, rejected, chosen, ..."""
    pos, neg, twice = (_padded(t) for t in (positive, negative, second))
    lengths = torch.tensor([len(t) for t in positive])
    mask = torch.arange(pos.shape[1]) < lengths[:, None]
    chosen = torch.arange(len(positive)) % 2 == 0
    found = llmdoctor.token_rewards(pos, neg, mask, chosen, settings.tau, settings.theta, settings.eps)
    measured = reward_diagnostics(found, pos, neg, mask, chosen, twice)
    assert measured.noise is not None, "a second scoring was given"

    def answer(n: int, ids: Sequence[int]) -> dict[str, Any]:
        return {
            "ids": list(ids),
            "rewards": _rounded(found.rewards[n, : len(ids)]),
            "importance": _rounded(found.importance[n, : len(ids)]),
            "positive": _rounded(pos[n, : len(ids)], FACE_DIGITS),
            "negative": _rounded(neg[n, : len(ids)], FACE_DIGITS),
            "agreement": round(float(measured.agreement[n]), DIGITS),
            "ended": True,
        }

    rows = []
    for k, p in enumerate(group):
        preference = p.preference
        row: dict[str, Any] = {
            "preference_id": preference.preference_id,
            "split": preference.split,
            "objective": preference.objective,
            "prompt_ids": p.neutral,
            "chosen": answer(2 * k, p.chosen),
            "rejected": answer(2 * k + 1, p.rejected),
        }
        if preference.preference_id in again:
            row["noise"] = float(f"{float(measured.noise[2 * k : 2 * k + 2].mean()):.3g}")
        rows.append(row)
    return rows


def _padded(rows: Sequence[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def _rounded(values: Tensor, digits: int = DIGITS) -> list[float]:
    return [round(v, digits) + 0.0 for v in values.tolist()]


def _excluded(preferences: Sequence[Preference], kept: set[str], prompts: FacePrompts) -> Counter[str]:
    """Why the pairs that have no row have none."""
    missing = (prompts.prepare(p) for p in preferences if p.preference_id not in kept)
    return Counter(reason if isinstance(reason, str) else NOT_FINITE for reason in missing)


def summarise(
    rows: Iterable[dict[str, Any]], preferences: Sequence[Preference], prompts: FacePrompts, settings: Reward
) -> dict[str, Any]:
    """The diagnostics, objective by objective, and the excluded pairs. Computed from the artefact, so that a resumed run
    and a second look report the same."""
    of: dict[str, _Tally] = {}
    kept: set[str] = set()
    for row in rows:
        of.setdefault(row["objective"], _Tally()).add(row)
        kept.add(row["preference_id"])
    excluded = _excluded(preferences, kept, prompts)
    return {
        "pairs": len(kept),
        "excluded": dict(sorted(excluded.items())),
        "face_placement": prompts.placement,
        "settings": {"tau": settings.tau, "theta": settings.theta, "eps": settings.eps},
        "objectives": {objective: tally.summary(settings) for objective, tally in sorted(of.items())},
    }


@dataclasses.dataclass
class _Tally:
    """Sums over the rows of one objective."""

    splits: Counter[str] = dataclasses.field(default_factory=Counter)
    tokens: int = 0
    kept: int = 0
    deltas: list[float] = dataclasses.field(default_factory=list)
    """Mean importance (nats a token) of each pair."""
    agreements: dict[str, list[float]] = dataclasses.field(default_factory=lambda: {"chosen": [], "rejected": []})
    noises: list[float] = dataclasses.field(default_factory=list)

    def add(self, row: dict[str, Any]) -> None:
        self.splits[row["split"]] += 1
        importance = row["chosen"]["importance"] + row["rejected"]["importance"]
        self.tokens += len(importance)
        self.kept += sum(r != 0 for r in row["chosen"]["rewards"] + row["rejected"]["rewards"])
        self.deltas.append(sum(importance) / len(importance))
        for side, found in self.agreements.items():
            found.append(row[side]["agreement"])
        if "noise" in row:
            self.noises.append(row["noise"])

    def summary(self, settings: Reward) -> dict[str, Any]:
        """What `token_rewards.json` says of an objective. Delta in nats a token."""
        noise = sum(self.noises) / len(self.noises) if self.noises else None
        floor = max(settings.weak_importance, NOISE_MARGIN * (noise or 0.0))
        ordered = sorted(self.deltas)
        return {
            "pairs": dict(sorted(self.splits.items())),
            "tokens": self.tokens,
            "kept_share": round(self.kept / self.tokens, 4),
            "delta_mean": round(sum(ordered) / len(ordered), DIGITS),
            "delta_quartiles": [round(ordered[(len(ordered) - 1) * q // 4], DIGITS) for q in (1, 2, 3)],
            "delta_weak_below": round(floor, DIGITS),
            "weak_share": round(sum(d < floor for d in ordered) / len(ordered), 4),
            "noise_floor": noise,
            "noise_pairs": len(self.noises),
            "agreement": {side: round(sum(found) / len(found), 4) for side, found in self.agreements.items()},
        }


def table(summary: dict[str, Any], settings: Reward) -> str:
    """The diagnostics as text, with a warning where the faces hardly differ."""
    lines = [f"{summary['pairs']} pairs rewarded, {sum(summary['excluded'].values())} excluded"]
    lines += [f"    {reason:<26} {count:>7}" for reason, count in summary["excluded"].items()]
    for objective, found in summary["objectives"].items():
        noise = "not measured" if found["noise_floor"] is None else f"{found['noise_floor']:.2g} nats"
        low, middle, high = found["delta_quartiles"]
        agreement = ", ".join(f"{side} {share:.2f}" for side, share in found["agreement"].items())
        lines += [
            f"{objective}: {', '.join(f'{s} {n}' for s, n in found['pairs'].items())} pairs, {found['tokens']} answer tokens",
            f"  kept share   {found['kept_share']:.1%} of the tokens have a reward at theta {settings.theta:g}; "
            "theta 0.1 keeps 80-90 %, 0.9 about 20 %",
            f"  mean Delta   {found['delta_mean']:.4f} nats a token; quartiles over pairs {low:.4f} {middle:.4f} {high:.4f}",
            f"  noise floor  {noise} a token: one face scored twice, in different batches",
            f"  agreement    {agreement}: share of Delta from tokens that the answer's own face prefers; 0.5 is chance",
        ]
        if found["weak_share"] >= 0.5:
            lines += [
                f"  WARNING: the faces hardly differ: {found['weak_share']:.0%} of the pairs have a mean Delta below "
                f"{found['delta_weak_below']:g} nats.",
                "    -> rewards are scale-free and would amplify noise; write faces that differ more (reward.faces), "
                "or use a patient that follows its system prompt",
            ]
    return "\n".join(lines)
