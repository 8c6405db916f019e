"""profile: candidates -> profiles. K one-turn rollouts of the frozen start policy for each, verified.

Rules (A.5): all K outcomes come from one policy revision, a fault is retried and then excludes the candidate, a state
that does not fit the context is excluded, prompts are rendered as in training, every (k, K) is kept. Work is made
durable wave by wave; after kill -9 the stage resumes at the first unwritten wave and ends with the same bytes.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_pivotrl import backends, pivotrl, responses
from nemo_pivotrl.chat import Chat
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.records import (
    ArtefactWriter,
    Candidate,
    Header,
    InputError,
    Problem,
    Profile,
    digest,
    file_digest,
    is_complete,
    read_header,
    read_rows,
)
from nemo_pivotrl.stages.audit import audit_first
from nemo_pivotrl.stages.ledger import spend
from nemo_pivotrl.stages.progress import progress
from nemo_pivotrl.stages.rollout import (
    fits,
    load_chat,
    load_recipe_verifier,
    roll_out,
    rollout_row,
    sample_seed,
    sampling,
)
from nemo_pivotrl.verifiers import Verifier


def profile(recipe: Recipe, fresh: bool = False) -> Path:
    """Write `profiles.jsonl`. Raises InputError when more candidates fail than the recipe allows."""
    source = recipe.path("candidates.jsonl")
    read_header(source, "candidates")
    chat = load_chat(recipe.policy, recipe.verifier.limits)
    verifier, verifier_id = load_recipe_verifier(recipe)
    header = Header(
        stage="profiles",
        config_hash=profile_digest(recipe),
        parent=file_digest(source),
        tokenizer=chat.fingerprint,
        chat_template=chat.template_digest,
        policy=backends.policy_revision(recipe.policy.model_name),
        verifier=verifier_id,
        extra={"num_generations": recipe.profile.num_generations, "sampling": sampling(recipe.policy.generation)},
    )
    candidates = _limited([responses.candidate_of_row(r) for r in read_rows(source)], recipe)
    path = recipe.path("profiles.jsonl")
    if is_complete(path, header, fresh):
        print(f"{path} is complete; fresh=true makes it anew")
        report_failures([profile_of_row(row) for row in read_rows(path)], recipe, path)
        return path
    if recipe.audit.before_profile:
        audit_first(recipe, candidates, verifier, verifier_id)
    backend = backends.load_sampler(recipe.policy, recipe.megatron, recipe.vllm)
    with ArtefactWriter(path, header, fresh) as writer, spend(Path(recipe.run_dir), "profile") as cost:
        _profile_rest(recipe, candidates, writer, backend, chat, verifier)
        path = writer.finish()
        rows = [profile_of_row(row) for row in read_rows(path)]
        cost.update(
            candidates=len(rows),
            rollouts=sum(len(p.samples) for p in rows),
            tokens_generated=sum(p.tokens_generated for p in rows),
            tokens_prompt=sum(p.tokens_prompt for p in rows),
        )
    report_failures(rows, recipe, path)
    return path


def profile_digest(recipe: Recipe) -> str:
    """Hash of every setting that decides a profile's content; cost settings that cannot change it are left out."""
    kept = dataclasses.asdict(recipe.profile) | {"max_failure_share": None}
    policy = recipe.policy
    computed = backends.identity_of(policy, recipe.megatron) or policy.dtype
    drawn = [] if policy.sampler == "backend" else [policy.sampler]  # other samples from the same seeds
    return digest([recipe.seed, kept, policy.max_total_sequence_length, computed, *drawn])


def _limited(candidates: list[Candidate], recipe: Recipe) -> list[Candidate]:
    limit = recipe.profile.limit
    if not limit:
        return candidates
    chosen: set[str] = set()
    for split in ("train", "validation"):
        ids = [c.candidate_id for c in candidates if c.split == split]
        chosen |= set(sorted(ids, key=lambda i: pivotrl.order_key(recipe.seed, i))[:limit])
    return [c for c in candidates if c.candidate_id in chosen]


def _profile_rest(
    recipe: Recipe,
    candidates: list[Candidate],
    writer: ArtefactWriter,
    backend: backends.Sampler,
    chat: Chat,
    verifier: Verifier,
) -> None:
    """Profile what is not written yet, wave by wave. Waves begin at fixed places, so a resumed one repeats exactly."""
    size = recipe.profile.candidates_per_wave
    done = writer.rows_done - writer.rows_done % size if writer.rows_done < len(candidates) else len(candidates)
    skip = writer.rows_done - done
    with progress(len(candidates), writer.rows_done, "profile", "cand") as bar:
        for start in range(done, len(candidates), size):
            wave = _profile_wave(candidates[start : start + size], recipe, backend, chat, verifier)
            writer.write(profile_to_row(p, recipe.extract.agent_ref) for p in wave[skip:])
            bar.update(len(wave) - skip)
            skip = 0


def _profile_wave(
    wave: list[Candidate], recipe: Recipe, backend: backends.Sampler, chat: Chat, verifier: Verifier
) -> list[Profile]:
    prompts = [chat.prompt_ids(c.messages, c.tools) for c in wave]
    inside = [i for i, prompt in enumerate(prompts) if fits(prompt, recipe.policy)]
    repeats = range(recipe.profile.num_generations)
    seeds = [[sample_seed("profile", recipe.seed, wave[i].candidate_id, k) for k in repeats] for i in inside]
    groups = roll_out(
        backend,
        chat,
        verifier,
        [wave[i] for i in inside],
        [prompts[i] for i in inside],
        seeds,
        recipe.policy.generation,
        recipe.profile.max_retries,
    )
    found = dict(zip(inside, groups, strict=True))
    profiles = []
    for i, candidate in enumerate(wave):
        rollouts = found.get(i, [])
        failure = "context_overflow" if i not in found else next((r.failure for r in rollouts if r.failure), None)
        profiles.append(
            Profile(
                candidate=candidate,
                samples=() if failure else tuple(rollout_row(r) for r in rollouts),
                tokens_generated=sum(len(r.sample.token_ids) for r in rollouts),
                tokens_prompt=len(prompts[i]),
                failure=failure,
            )
        )
    return profiles


def profile_to_row(profile: Profile, agent_ref: str) -> dict[str, Any]:
    """A Gym row with the profile beside it. A failed candidate has no pass rate."""
    row = responses.candidate_to_row(profile.candidate, agent_ref)
    if profile.failure is None:
        stats = pivotrl.statistics(profile.rewards)
        row |= {"pass_rate": stats.mean, "pass_rate_total": stats.count, "pass_rate_passed": stats.successes}
    cost = {"tokens_generated": profile.tokens_generated, "tokens_prompt": profile.tokens_prompt}
    return row | {"samples": list(profile.samples), "profile": {**cost, "failure": profile.failure}}


def profile_of_row(row: dict[str, Any]) -> Profile:
    """The profile of a row that `profile_to_row` wrote."""
    return Profile(candidate=responses.candidate_of_row(row), samples=tuple(row["samples"]), **row["profile"])


def report_failures(profiles: Sequence[Profile], recipe: Recipe, path: Path) -> None:
    """Print what was excluded and why. Raises InputError when it is too much."""
    failures = Counter(p.failure for p in profiles if p.failure)
    for kind, count in failures.items():
        print(f"excluded: {count} candidates, {kind}")
    if failures["context_overflow"] == len(profiles):
        remedy = "raise policy.max_total_sequence_length"
        raise InputError(
            Problem(str(recipe.path("candidates.jsonl")), None, "candidates", "none fits: context_overflow", remedy)
        )
    faults = failures.total() - failures["context_overflow"]
    if faults > recipe.profile.max_failure_share * len(profiles):
        raise InputError(
            Problem(
                str(path),
                None,
                "profile.max_failure_share",
                f"{faults} of {len(profiles)} candidates could not be judged: {dict(failures)}",
                "mend the cause and profile with fresh=true, or accept it with a larger share",
            )
        )
