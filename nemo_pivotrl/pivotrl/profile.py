"""profile: candidates -> profiles. One-turn rollouts of the frozen start policy for each candidate, verified.

It keeps the rules R1 to R7 of docs/algorithms.md, and stores every (k, K). Each candidate gets as many of K rollouts as its selection
needs (`algorithms/early_stopping.py`). A map draws them (`components/durable_map.py`): whatever is killed, the same command ends with
the same bytes.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nemo_pivotrl.algorithms.early_stopping import StoppingRule, expected_rollouts, plan_of
from nemo_pivotrl.backends.identity import identity_of, policy_revision
from nemo_pivotrl.components.conclusions import conclude, profile_checks
from nemo_pivotrl.components.costs import read_ledgers
from nemo_pivotrl.components.durable_map import Map, too_many
from nemo_pivotrl.components.lineage import check_lineage
from nemo_pivotrl.components.rollout import (
    judged_candidates,
    load_chat,
    load_recipe_verifier,
    sampling,
    unrenderable_lines,
)
from nemo_pivotrl.components.shards import Shard, folder_of, merge_shards, refuse_others
from nemo_pivotrl.components.trackers import check_dashboards, log_summary
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.artifacts import Header, digest, file_digest, is_complete, read_header, read_rows
from nemo_pivotrl.core.errors import UNRENDERABLE, InputError, Problem, UnrenderableState
from nemo_pivotrl.core.lock import one_writer, only_writer
from nemo_pivotrl.data.chat_template import Chat
from nemo_pivotrl.data.states import moved_reference
from nemo_pivotrl.pivotrl import round_trip
from nemo_pivotrl.pivotrl.candidate_index import Index, index_candidates
from nemo_pivotrl.pivotrl.profile_items import Items
from nemo_pivotrl.pivotrl.profile_rows import plan_in
from nemo_pivotrl.pivotrl.profile_statistics import summarise, summary_text
from nemo_pivotrl.pivotrl.profile_worker import OF_THE_STATE, ProfileWorker, transient
from nemo_pivotrl.pivotrl.verifier_audit import audit_first
from nemo_pivotrl.verifiers.base import Bounded

FORECAST_PROMPTS = 64
DECIDING = (
    *("profile.num_generations", "profile.limit", "loop.round", "verifier", "policy.max_total_sequence_length"),
    *("policy.dtype", "policy.backend", "policy.sampler", "policy.generation", "policy.chat_template"),
    *("policy.template_kwargs", "policy.chat", "policy.tool_parser", "policy.model_name"),
)
"""Settings that decide a profile's content: its header tells them, to say which differ and for the viewer to render states."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a profile is made with and belongs to."""

    header: Header
    index: Index
    chat: Chat
    verifier: Bounded
    verifier_id: str
    plan: StoppingRule


def profile(recipe: Recipe, fresh: bool = False, shard: Shard | None = None) -> Path:
    """Write `profiles.jsonl`, or with a `shard` its part of it, beside other shards.

    Raises InputError when more candidates fail than the recipe allows, AtWork where another process writes in the run folder.

    >>> path = profile(load_recipe("recipe.yaml"))
    >>> path.name
    'profiles.jsonl'
    """
    with only_writer(Path(recipe.run_dir), "profile", f"shard {shard.number}/{shard.of}" if shard else ""):
        return _profile(recipe, fresh, shard)


def _profile(recipe: Recipe, fresh: bool, shard: Shard | None) -> Path:
    if fresh and shard:
        remedy = "the other shards' work would go with it: remove the folder profiles.parts before all of them start"
        raise InputError(Problem("command line", None, "fresh=true", f"with --shard {shard.number}/{shard.of}", remedy))
    check_dashboards(recipe)
    path, job = recipe.path("profiles.jsonl"), prepare(recipe)
    if not fresh:
        if path.exists() and not _reopened(recipe, job, path):
            print(f"{path} is complete; fresh=true makes it anew")
            _complete(recipe, path)
            return path
        refuse_others(path, shard)
    else:
        recipe.path("profiles.earlier.jsonl").unlink(missing_ok=True)
        shutil.rmtree(folder_of(path), ignore_errors=True)
    part = _run(recipe, job, path, shard, fresh)
    if shard:
        print(f"shard {shard.number}/{shard.of} is done; when all are: nemo-pivotrl merge RECIPE")
        return part
    log_summary(recipe, "profile", _complete(recipe, path))
    return path


@one_writer
def merge(recipe: Recipe, fresh: bool = False) -> Path:
    """Put the shards together as `profiles.jsonl`. Raises InputError naming what is missing, damaged or of another recipe."""
    path, job = recipe.path("profiles.jsonl"), prepare(recipe)
    if not path.exists() or not is_complete(path, job.header, fresh):
        merge_shards(path, job.header, _unfinished(recipe, job))
    log_summary(recipe, "profile", _complete(recipe, path))
    return path


def _complete(recipe: Recipe, path: Path) -> dict[str, Any]:
    """Tell about a finished profile. What its making, or a kill between its rename and the end, has left goes."""
    recipe.path("profiles.earlier.jsonl").unlink(missing_ok=True)
    shutil.rmtree(folder_of(path), ignore_errors=True)
    return tell(recipe, path)


def prepare(recipe: Recipe) -> Job:
    """Read everything that decides the profile's content. Raises InputError."""
    source = recipe.path("candidates.jsonl")
    check_lineage(recipe, source, found := read_header(source, "candidates"))
    chat = load_chat(recipe.policy, recipe.verifier.limits)
    verifier, verifier_id = load_recipe_verifier(recipe)
    plan = plan_of(recipe.profile, recipe.select)
    header = Header(
        stage="profiles",
        config_hash=profile_digest(recipe),
        parent=file_digest(source),
        tokenizer=chat.fingerprint,
        chat_template=chat.template_digest,
        policy=policy_revision(recipe.policy.model_name),
        verifier=verifier_id,
        extra=moved_reference(found, source, recipe.path("profiles.jsonl"))
        | {
            "num_generations": recipe.profile.num_generations,
            "sampling": sampling(recipe.policy.generation),
            "plan": dataclasses.asdict(plan)
            | {"prior": list(plan.prior), "control_share": recipe.profile.control_share},
        },
        settings=recipe.told(*DECIDING, but=("verifier.judge.cache",)),
    )
    index = index_candidates(source, recipe.seed, recipe.profile.limit, recipe.profile.candidates_per_chunk)
    return Job(header, index, chat, verifier, verifier_id, plan)


def profile_digest(recipe: Recipe) -> str:
    """Hash of what decides a rollout's content. How many of them are drawn stands in the header's `plan`; what only decides when
    and where they are drawn is left out."""
    kept = {"num_generations": recipe.profile.num_generations, "limit": recipe.profile.limit}
    policy = recipe.policy
    computed = identity_of(policy, recipe.megatron) or policy.dtype
    drawn = [] if policy.sampler == "backend" else [policy.sampler]  # other samples from the same seeds
    return digest([recipe.rollout_seed, kept, policy.max_total_sequence_length, computed, *drawn])


# ---- what is there already ----


def _reopened(recipe: Recipe, job: Job, path: Path) -> bool:
    """Whether the finished profile at `path` is to be drawn on from: for another plan, or for what had failed.

    It becomes `profiles.earlier.jsonl`, whose rollouts are all kept. Raises InputError when it is another recipe's.
    """
    found = read_header(path, "profiles")
    if found == job.header:
        if not recipe.profile.retry_failed:
            return False
        again = sum(transient(row["profile"]["failure"]) for row in read_rows(path))
        if not again:
            return False
        print(f"{again} candidates that had failed are profiled again; all else is kept")
    else:
        other = {key: value for key, value in found.extra.items() if key != "plan"}
        mine = {key: value for key, value in job.header.extra.items() if key != "plan"}
        if dataclasses.replace(found, extra=mine) != dataclasses.replace(job.header, extra=mine) or other != mine:
            is_complete(path, job.header, False)  # says which field differs
        print(f"{path} was drawn under another plan: its rollouts are kept, and what is missing for this one is added")
    with suppress(FileNotFoundError):  # another shard was quicker
        os.replace(path, recipe.path("profiles.earlier.jsonl"))
    return True


def _unfinished(recipe: Recipe, job: Job) -> Header:
    """The header of work that is not finished: with what decides where it begins, and what its rows begin with."""
    earlier = recipe.path("profiles.earlier.jsonl")
    grown = {"earlier": file_digest(earlier)} if earlier.exists() else {}
    together = not recipe.vllm.servers
    extra = {**job.header.extra, **grown, "candidates": len(job.index), "chunk": job.index.chunk, "together": together}
    return dataclasses.replace(job.header, extra=extra)


# ---- drawing, and what is told before and after ----


def _run(recipe: Recipe, job: Job, path: Path, shard: Shard | None, fresh: bool) -> Path:
    """Draw what is not drawn yet, of everything or of a shard's share."""
    chunks = (shard or Shard()).share(job.index.chunks)
    begun = _unfinished(recipe, job)
    items = Items(recipe, job.index, job.plan, together=bool(begun.extra["together"]))
    total = sum(job.index.rows_of(n) for n in chunks)
    here = recipe.executor == "here"  # elsewhere a worker loads its own
    return Map(
        recipe,
        "profile",
        shard.path(path) if shard else path,
        shard.header(begun) if shard else job.header,
        partial(items.of_chunks, chunks),
        partial(ProfileWorker, recipe, *((job.chat, job.verifier, job.index.states) if here else ())),
        total,
        "cand",
        items.tally,
        recipe.profile.max_failure_share,
        "profile.max_failure_share",
        begun,
        before=partial(_before, recipe, job),
    ).run(fresh)


def _before(recipe: Recipe, job: Job, left: int) -> None:
    """What comes before the first rollout: the audit, which may stop here, and the forecast."""
    if recipe.audit.before_profile:
        sample = job.index.sample(4 * max(recipe.audit.sample, 1) if recipe.audit.sample else 0)
        round_trip.check(recipe, job.chat, sample)
        judged = judged_candidates(sample, job.verifier, recipe.path("candidates.jsonl"))
        audit_first(recipe, judged, job.verifier, job.verifier_id)
    print(forecast(recipe, job, left))


def forecast(recipe: Recipe, job: Job, left: int) -> str:
    """What is to come, before it begins: rollouts, and tokens read and generated at most."""
    settings = recipe.profile
    mean = expected_rollouts(job.plan, job.plan.prior)
    mean += settings.control_share * (settings.num_generations - mean)
    lengths = []
    for c in job.index.sample(FORECAST_PROMPTS):
        with suppress(UnrenderableState):
            lengths.append(len(job.chat.prompt_ids(c.messages, c.tools)))
    prompt = sum(lengths) / max(1, len(lengths))
    before = [e for e in read_ledgers(recipe.home) if e["stage"].endswith("profile") and e.get("rollouts")]
    rate = sum(e["rollouts"] for e in before) / max(1e-9, sum(e["seconds"] for e in before))
    hours = mean * left / rate / 3600 if before else 0.0
    time = (
        f"; {hours:.2f} h at the last {rate:,.1f} rollouts a second, {hours * recipe.budget.gpus:.2f} GPU-hours"
        if before
        else ""
    )
    most = settings.num_generations * left
    return (
        f"forecast: {left:,} candidates of {len(job.index):,}, about {mean * left:,.0f} rollouts (at most {most:,}; hit rates as "
        f"Beta{job.plan.prior}); {prompt:,.0f} tokens a prompt, {mean * left * prompt:,.0f} to read without a prefix cache, at most "
        f"{mean * left * recipe.policy.generation.max_new_tokens:,.0f} to generate{time}"
    )


def tell(recipe: Recipe, path: Path) -> dict[str, Any]:
    """Print the statistics of a finished profile, and return them. Raises InputError when too much of it failed."""
    header = read_header(path, "profiles")
    summary = summarise(path, plan_in(header))
    print(summary_text(summary))
    report_failures(Counter(summary["failures"] | summary["excluded"]), summary["candidates"], recipe, path)
    return summary | conclude(Path(recipe.run_dir), "profile", profile_checks(summary))


def report_failures(failures: Counter[str], candidates: int, recipe: Recipe, path: Path) -> None:
    """Print what was excluded and why. Raises InputError when it is too much."""
    for kind, count in failures.items():
        print(f"excluded: {count} candidates, {kind}")
    source = recipe.path("candidates.jsonl")
    if any(failures[kind] for kind in UNRENDERABLE) and source.exists():
        told = ((row["candidate_id"], row["profile"]) for row in read_rows(path))
        refused = [(c, f"{p['failure']}: {p.get('detail', '')}") for c, p in told if p["failure"] in UNRENDERABLE]
        print("\n".join(unrenderable_lines(refused, source)))
    of_states = sum(failures[kind] for kind in OF_THE_STATE)
    if candidates and of_states == candidates:
        remedy = "raise policy.max_total_sequence_length; see policy.chat where the template refuses them, verifier.message for talk"
        kinds = ", ".join(kind for kind in OF_THE_STATE if failures[kind])
        raise InputError(Problem(str(source), None, "candidates", f"none can be profiled: {kinds}", remedy))
    faults = failures.total() - of_states
    if faults > recipe.profile.max_failure_share * candidates:
        raise InputError(too_many(str(path), "profile.max_failure_share", failures, candidates))
