"""profile: candidates -> profiles. One-turn rollouts of the frozen start policy for each candidate, verified.

It keeps the rules R1 to R7 of docs/algorithms.md, and stores every (k, K). Each candidate gets as many of K rollouts as its selection
needs (`algorithms/early_stopping.py`). Work goes on in chunks (`profile_shards.py`) that any number of processes share
(`--shard i/n`); whatever is killed, the same command ends with the same bytes.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

from nemo_pivotrl.algorithms.early_stopping import expected_rollouts, plan_of
from nemo_pivotrl.backends import loading
from nemo_pivotrl.backends.base import concurrency_of, under_way
from nemo_pivotrl.backends.identity import identity_of, policy_revision
from nemo_pivotrl.components.conclusions import conclude, profile_checks
from nemo_pivotrl.components.costs import read_ledgers, spend
from nemo_pivotrl.components.lineage import check_lineage
from nemo_pivotrl.components.rollout import (
    judged_candidates,
    load_chat,
    load_recipe_verifier,
    sampling,
    unrenderable_lines,
)
from nemo_pivotrl.components.trackers import check_dashboards, log_summary
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.artifacts import ArtefactWriter, Header, digest, file_digest, is_complete, read_header, read_rows
from nemo_pivotrl.core.errors import UNRENDERABLE, InputError, Problem, UnrenderableState
from nemo_pivotrl.core.lock import one_writer, only_writer
from nemo_pivotrl.data.states import moved_reference
from nemo_pivotrl.pivotrl import round_trip
from nemo_pivotrl.pivotrl.candidate_index import Index, index_candidates
from nemo_pivotrl.pivotrl.profile_rows import plan_in
from nemo_pivotrl.pivotrl.profile_scheduler import run_waves
from nemo_pivotrl.pivotrl.profile_shards import Shard, ShardStore
from nemo_pivotrl.pivotrl.profile_statistics import summarise, summary_text
from nemo_pivotrl.pivotrl.profile_work import (
    OF_THE_STATE,
    Job,
    Work,
    draw_wave,
    judge_wave,
    render,
    retries_of,
    too_many,
    transient,
)
from nemo_pivotrl.pivotrl.verifier_audit import audit_first

FORECAST_PROMPTS = 64


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
    if not fresh and path.exists() and not _reopened(recipe, job, path):
        return _complete(recipe, path)
    with closing(open_parts(recipe, job, shard or Shard(), fresh)) as parts:
        if parts.missing():
            _run(recipe, job, parts)
        if shard:
            rest = parts.missing()
            told = f"{len(rest)} chunks are with others: {_whose(parts, rest)}" if rest else "nemo-pivotrl merge RECIPE"
            print(f"shard {shard.number}/{shard.of} is done; {told}")
            return parts.folder
        _merge(recipe, job, parts, path)
    log_summary(recipe, "profile", tell(recipe, path))
    return path


@one_writer
def merge(recipe: Recipe, fresh: bool = False) -> Path:
    """Put the shards' chunks together as `profiles.jsonl`. Raises InputError naming what is missing, damaged or of another recipe."""
    path, job = recipe.path("profiles.jsonl"), prepare(recipe)
    if path.exists() and is_complete(path, job.header, fresh):
        return _complete(recipe, path)
    folder = recipe.path("profiles.parts")
    if not folder.exists():
        remedy = "run the shards first: nemo-pivotrl profile RECIPE --shard i/n"
        raise InputError(Problem(str(folder), None, "folder", "no such folder", remedy))
    with closing(open_parts(recipe, job, Shard(), False)) as parts:
        _merge(recipe, job, parts, path)
    log_summary(recipe, "profile", tell(recipe, path))
    return path


def _complete(recipe: Recipe, path: Path) -> Path:
    """A finished profile, and what a kill between its rename and the end may have left of its making."""
    print(f"{path} is complete; fresh=true makes it anew")
    recipe.path("profiles.earlier.jsonl").unlink(missing_ok=True)
    shutil.rmtree(recipe.path("profiles.parts"), ignore_errors=True)
    tell(recipe, path)
    return path


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


def open_parts(recipe: Recipe, job: Job, shard: Shard, fresh: bool) -> ShardStore:
    """The folder in which the profile grows."""
    earlier = recipe.path("profiles.earlier.jsonl")
    if fresh:
        earlier.unlink(missing_ok=True)
    grown = {"earlier": file_digest(earlier)} if earlier.exists() else {}
    extra = {**job.header.extra, **grown, "candidates": len(job.index), "chunk": job.index.chunk}
    header = dataclasses.replace(job.header, extra=extra)
    folder = recipe.path("profiles.parts")
    return ShardStore(folder, header, job.index.chunks, shard, recipe.profile.steal_after_s, fresh)


def _whose(parts: ShardStore, chunks: Sequence[int]) -> str:
    held = parts.held_by_others()
    shown = ", ".join(f"{n} ({held.get(n, 'nobody works on it')})" for n in chunks[:8])
    return shown + (f" and {len(chunks) - 8} more" if len(chunks) > 8 else "")


def _merge(recipe: Recipe, job: Job, parts: ShardStore, path: Path) -> None:
    """All chunks in order as one artefact, then the folder goes. Raises InputError for what is missing or damaged."""
    if missing := parts.missing():
        remedy = (
            "run `nemo-pivotrl profile RECIPE` or its shards again: any process takes over what is left; then merge"
        )
        found = f"{len(missing)} of {parts.chunks} chunks are missing: {_whose(parts, missing)}"
        raise InputError(Problem(str(parts.folder), None, "chunks", found, remedy))
    merge_chunks(job.header, job.index, parts, path)
    recipe.path("profiles.earlier.jsonl").unlink(missing_ok=True)
    parts.remove()


def merge_chunks(header: Header, index: Index, parts: ShardStore, path: Path) -> None:
    """All chunks in order as one artefact, by rename. Raises InputError for a damaged one."""
    with ArtefactWriter(path, header, fresh=True) as writer:
        for number in range(parts.chunks):
            writer.write_lines(parts.rows(number, index.rows_of(number), index.ids[number]), sync=False)
        writer.finish()


# ---- drawing, and what is told before and after ----


def _run(recipe: Recipe, job: Job, parts: ShardStore) -> None:
    """Work until no chunk is left that another process is not at work on."""
    if recipe.audit.before_profile:
        sample = job.index.sample(4 * max(recipe.audit.sample, 1) if recipe.audit.sample else 0)
        round_trip.check(recipe, job.chat, sample)
        judged = judged_candidates(sample, job.verifier, recipe.path("candidates.jsonl"))
        audit_first(recipe, judged, job.verifier, job.verifier_id)
    print(forecast(recipe, job, parts))
    sampler = loading.load_sampler(recipe.policy, recipe.megatron, recipe.vllm)
    concurrency = concurrency_of(sampler)
    work = Work(recipe, job.index, job.plan, parts, concurrency == 1, partial(render, job.chat, job.index))
    with spend(Path(recipe.run_dir), "profile") as cost:
        try:
            draw = partial(draw_wave, recipe, job, sampler)
            judge = partial(judge_wave, job.chat, job.verifier, partial(retries_of, recipe.profile))
            work.go(run_waves(work.units(), draw, judge, concurrency, lambda: under_way(sampler)), cost)
        finally:
            work.close()
            if concurrency > 1:
                sampler.close()  # type: ignore[attr-defined]


def forecast(recipe: Recipe, job: Job, parts: ShardStore) -> str:
    """What is to come, before it begins: rollouts, and tokens read and generated at most."""
    settings = recipe.profile
    left = sum(job.index.rows_of(n) for n in parts.missing())
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
    report_failures(Counter(summary["failures"]), summary["candidates"], recipe, path)
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
        raise InputError(too_many(str(path), faults, candidates, failures))
