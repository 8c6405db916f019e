"""Profiles: curtailed as the recipe says, resumed to the same bytes wherever they die, shared by processes, mended and extended."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.recipes import recipe_at
from support.stages import finish, kill_when, said, sha, start

from nemo_pivotrl import cli
from nemo_pivotrl.backends import loading
from nemo_pivotrl.components import durable_map
from nemo_pivotrl.components.shards import Shard, shard_of
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.artifacts import read_rows, seal
from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.core.types import Action, Case, FailedSample, Sample, Verdict
from nemo_pivotrl.pivotrl.profile import merge, prepare, profile
from nemo_pivotrl.pivotrl.select import select_pivots

QUIET = ["audit.before_profile=false"]


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained run, without its profile."""
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run/profiles.jsonl").unlink()
    return tmp_path / "run"


@pytest.fixture(scope="module")
def full(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Rows of the same profile with all K of everything, by candidate."""
    folder = tmp_path_factory.mktemp("full") / "run"
    shutil.copytree(trained, folder)
    (folder / "profiles.jsonl").unlink()
    profile(recipe_at(folder, *QUIET, "profile.curtail=none"))
    return {row["candidate_id"]: row for row in read_rows(folder / "profiles.jsonl")}


def pivots(recipe: Recipe) -> list[str]:
    select_pivots(recipe, True)
    return [row["candidate_id"] for row in read_rows(recipe.path("pivots.jsonl")) if "pass_rate" in row]


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["candidate_id"]: row for row in read_rows(folder / "profiles.jsonl")}


# ---- curtailment ----


@pytest.mark.parametrize(
    "settings", [["select.rule=mixed"], ["select.rule=adv", "select.lambda_diff=0.6"], ["profile.min_wave=1"]]
)
def test_a_curtailed_profile_draws_the_first_of_the_same_samples_and_selects_the_same_pivots(
    run_dir: Path, full: dict[str, dict[str, Any]], settings: list[str]
) -> None:
    recipe = recipe_at(run_dir, *QUIET, *settings)
    profile(recipe)
    found, fewer = rows_of(run_dir), 0
    for name, row in found.items():
        n = len(row["samples"])
        assert said(row) == said(full[name])[:n] and row["pass_rate_total"] == n
        assert row["profile"]["control"] <= (n == 8)
        low, high = row["profile"]["interval"]
        assert low <= row["pass_rate"] <= high
        fewer += n < 8
    assert fewer > 5 and any(row["profile"]["control"] for row in found.values())
    chosen = pivots(recipe)
    whole = recipe_at(run_dir, *QUIET, *settings, "profile.curtail=none")
    profile(whole)  # keeps what is there and adds the rest
    assert {name: said(row) for name, row in rows_of(run_dir).items()} == {n: said(row) for n, row in full.items()}
    assert pivots(whole) == chosen and chosen


def test_another_lambda_needs_its_interval_and_gets_it_without_losing_a_sample(
    run_dir: Path, full: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    narrow = ["select.rule=adv", "select.lambda_diff=0.3", "profile.control_share=0"]
    profile(recipe_at(run_dir, *QUIET, *narrow))
    before = rows_of(run_dir)
    other = ["select.rule=adv", "select.lambda_diff=0.9", "profile.control_share=0"]
    with pytest.raises(InputError, match=r"open for \d+ of \d+ candidates(?s:.*)lambda_interval") as caught:
        select_pivots(recipe_at(run_dir, *other))
    assert "0.3 to 0.3" in caught.value.problems[0].remedy
    capsys.readouterr()
    select_pivots(recipe_at(run_dir, *other, "select.undecided=by_rate"), True)
    assert "go by their hit rate" in capsys.readouterr().out
    profile(recipe_at(run_dir, *QUIET, *other, "profile.lambda_interval=[0.2,0.9]"))
    after, added = rows_of(run_dir), 0
    for name, row in after.items():
        n = len(before[name]["samples"])
        assert row["samples"][:n] == before[name]["samples"], "not drawn anew"
        assert said(row) == said(full[name])[: len(row["samples"])]
        added += len(row["samples"]) > n
    assert 0 < added < len(after)
    assert not (run_dir / "profiles.earlier.jsonl").exists()
    for lam in (0.4, 0.6, 0.9):
        select_pivots(recipe_at(run_dir, "select.rule=adv", f"select.lambda_diff={lam}"), True)
    with pytest.raises(InputError, match=r"lambda_interval(?s:.*)around select.lambda_diff"):
        profile(recipe_at(run_dir, "profile.lambda_interval=[0.2,0.5]", "select.lambda_diff=0.6"))


def test_the_sequential_mode_stops_zeros_sooner_and_says_how_often_control_disagrees(
    run_dir: Path, full: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["profile.curtail=sequential", "profile.error_rate=0.2", "profile.control_share=0.5"]
    profile(recipe_at(run_dir, *QUIET, *settings))
    out = capsys.readouterr().out
    assert "stated rate 0.2" in out and "drawn in full" in out
    rows = rows_of(run_dir)
    assert any(len(r["samples"]) < 8 and r["pass_rate"] == 0 for r in rows.values())
    assert all(said(row) == said(full[name])[: len(row["samples"])] for name, row in rows.items())
    controls = sum(row["profile"]["control"] for row in rows.values())
    assert 0.3 < controls / len(rows) < 0.7
    select_pivots(recipe_at(run_dir, *settings), True)


# ---- resuming ----


def test_killed_with_9_at_random_moments_it_ends_with_the_same_bytes(run_dir: Path, trained: Path) -> None:
    """Deaths inside the writing of files are in the test after this one."""
    expected, journal = sha(trained / "profiles.jsonl"), run_dir / "profiles.jsonl.journal"

    def written(size: int) -> Callable[[], bool]:
        return lambda: journal.exists() and journal.stat().st_size > size

    kills = sum(kill_when(start("profile", run_dir), written(size)) for size in (2_000, 60_000, 130_000))
    assert kills >= 2 and journal.exists() and not (run_dir / "profiles.jsonl").exists()
    with journal.open("ab") as handle:
        handle.write(b'0 s 0 0 100 1\n[[0,7,{"torn":')
    finish(start("profile", run_dir))
    assert sha(run_dir / "profiles.jsonl") == expected and not journal.exists()


class Dead(BaseException):
    """What stands for kill -9 inside a process: nothing after it runs that a killed process would not have run."""


def dying(monkeypatch: pytest.MonkeyPatch, rng: random.Random, writes: int = 30) -> None:
    """Let one of the next writes of the profile stop at a random byte, as a kill between two system calls does."""
    from nemo_pivotrl.components.journal import Journal
    from nemo_pivotrl.core.artifacts import ArtefactWriter

    left, write, order = [rng.randrange(1, writes)], Journal._write, ArtefactWriter.write_text

    def counted() -> bool:
        left[0] -= 1
        return left[0] == 0

    def torn_write(self: Journal, *parts: bytes) -> None:
        if not counted():
            return write(self, *parts)
        size = self.path.stat().st_size
        write(self, *parts)
        os.truncate(self.path, rng.randrange(size, self.path.stat().st_size))
        raise Dead

    def torn_order(self: ArtefactWriter, text: bytes, rows: int) -> None:
        if self.path.name == "profiles.jsonl" and counted():
            order(self, text[: rng.randrange(len(text))], 0)
            raise Dead
        return order(self, text, rows)

    monkeypatch.setattr(Journal, "_write", torn_write)
    monkeypatch.setattr(ArtefactWriter, "write_text", torn_order)


def test_deaths_at_random_bytes_end_with_the_same_bytes(
    run_dir: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, rng, deaths = sha(trained / "profiles.jsonl"), random.Random(17), 0
    whole = loading.load_sampler(recipe_at(run_dir).policy)  # the reference policy, loaded once
    monkeypatch.setattr(loading, "load_sampler", lambda *_: whole)
    while deaths < 16:  # fifty real kills are in benchmarks/map_kills.py
        recipe = recipe_at(run_dir, *QUIET)
        with monkeypatch.context() as patch:
            dying(patch, rng)
            try:
                profile(recipe)
            except Dead:
                deaths += 1
                continue
        assert sha(run_dir / "profiles.jsonl") == expected, deaths
        (run_dir / "profiles.jsonl").unlink()
    profile(recipe)
    assert sha(run_dir / "profiles.jsonl") == expected


def test_a_profile_of_another_recipe_is_left_alone(run_dir: Path, trained: Path) -> None:
    shutil.copy(trained / "profiles.jsonl", run_dir)
    with pytest.raises(InputError, match=r"(?s)seed=0 \(now 1\).*fresh=true"):
        profile(recipe_at(run_dir, "seed=1"))
    assert sha(run_dir / "profiles.jsonl") == sha(trained / "profiles.jsonl")
    profile(recipe_at(run_dir, "seed=1", *QUIET), fresh=True)
    assert sha(run_dir / "profiles.jsonl") != sha(trained / "profiles.jsonl")


# ---- shards ----


def test_shards_merge_to_what_one_process_writes(run_dir: Path, trained: Path) -> None:
    recipe = recipe_at(run_dir, *QUIET)
    with pytest.raises(InputError, match="no shards"):
        merge(recipe)
    profile(recipe, shard=Shard(2, 3))
    assert not (run_dir / "profiles.jsonl").exists()
    profile(recipe, shard=Shard(0, 3))
    with pytest.raises(InputError, match=r"1-of-3.jsonl(?s:.*)not begun(?s:.*)--shard 1/3"):
        merge(recipe)
    for other in (None, Shard(0, 2)):
        with pytest.raises(InputError, match="work of 2 shards of 3"):
            profile(recipe, shard=other)
    profile(recipe, shard=Shard(1, 3))
    assert sha(merge(recipe)) == sha(trained / "profiles.jsonl") and not (run_dir / "profiles.parts").exists()
    assert merge(recipe) == run_dir / "profiles.jsonl"


def test_two_shards_at_once_share_the_work(run_dir: Path, trained: Path) -> None:
    started = [
        start("profile", run_dir, flags=("--shard", f"{number}/2"), log=run_dir / f"log{number}.txt")
        for number in range(2)
    ]
    for process in started:
        finish(process)
    assert sha(merge(recipe_at(run_dir))) == sha(trained / "profiles.jsonl")


def test_a_dead_shard_goes_on_with_its_rollouts(run_dir: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_at(run_dir, *QUIET)
    with monkeypatch.context() as patch:
        dying(patch, random.Random(4), writes=60)
        before = counting(patch)
        with pytest.raises(Dead):
            profile(recipe, shard=Shard(0, 1))
    with pytest.raises(InputError, match="unfinished"):
        merge(recipe)
    drawn = counting(monkeypatch)
    profile(recipe, shard=Shard(0, 1))
    assert sha(merge(recipe)) == sha(trained / "profiles.jsonl")
    total = sum(len(row["samples"]) for row in read_rows(run_dir / "profiles.jsonl"))
    torn = before[0] + drawn[0] - total
    assert before[0] and 0 <= torn <= 8 * 8, (
        "of what was drawn nothing is drawn again but the wave that was torn, and one ahead"
    )


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many turns are drawn from now on."""
    load, count = loading.load_sampler, [0]

    def loaded(*arguments: Any) -> Any:
        sampler = load(*arguments)
        infer = sampler.infer

        def counted(prompts: Any, seeds: Any, *rest: Any) -> Any:
            count[0] += sum(map(len, seeds))
            return infer(prompts, seeds, *rest)

        sampler.infer = counted
        return sampler

    monkeypatch.setattr(loading, "load_sampler", loaded)
    return count


def test_shards_are_counted_from_zero(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_at(run_dir, *QUIET)
    assert shard_of("0/8") == Shard(0, 8) and shard_of("7/8") == Shard(7, 8)
    for wrong in ("8/8", "1", "-1/8", "a/b", "1/0", "²/3"):
        with pytest.raises(InputError, match="0/8"):
            shard_of(wrong)
    with pytest.raises(InputError, match="other shards' work"):
        profile(recipe, fresh=True, shard=Shard(0, 2))
    assert cli.main(["select", "recipes/pivotrl/tiny.yaml", "--shard", "0/2"]) == 2
    assert "only profile has shards" in capsys.readouterr().err


def test_a_damaged_shard_is_named_and_everything_else_is_kept(run_dir: Path, trained: Path) -> None:
    recipe = recipe_at(run_dir, *QUIET)
    for number in range(2):
        profile(recipe, shard=Shard(number, 2))
    second = run_dir / "profiles.parts/1-of-2.jsonl"
    whole = second.read_bytes()
    for damaged in (whole[:-40], whole.replace(b'"reward":0.0', b'"reward":1.0', 1)):
        second.write_bytes(damaged)
        with pytest.raises(
            InputError, match=rf"{second.name}(?s:.*)remove it, then nemo-pivotrl profile RECIPE --shard 1/2"
        ):
            merge(recipe)
    second.unlink()
    profile(recipe, shard=Shard(1, 2))
    assert sha(merge(recipe)) == sha(trained / "profiles.jsonl")


def test_a_damaged_journal_is_named_with_what_can_be_kept(
    run_dir: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, journal = recipe_at(run_dir, *QUIET), run_dir / "profiles.jsonl.journal"
    with monkeypatch.context() as patch:
        dying(patch, random.Random(4), writes=60)
        with pytest.raises(Dead):
            profile(recipe)
    whole = journal.read_bytes()
    at = whole.rindex(b'"reward":0.0', 0, len(whole) - 3000)
    journal.write_bytes(whole[:at] + whole[at:].replace(b'"reward":0.0', b'"reward":1.0', 1))
    with pytest.raises(InputError, match=r"damaged from byte \d+ on(?s:.*)truncate -s") as caught:
        profile(recipe)
    os.truncate(journal, int(caught.value.problems[0].remedy.split()[2]))
    assert sha(profile(recipe)) == sha(trained / "profiles.jsonl")


# ---- failures ----


class Wavering:
    """The recipe's verifier, which loses every so-manyth verdict."""

    def __init__(self, inner: Any, every: int, kind: str = "judge_timeout"):
        self.inner, self.every, self.kind, self.calls = inner, every, kind, 0
        self.name, self.version, self.concurrency, self.asks_judge = inner.name, inner.version, 1, False
        self.excludes = inner.excludes

    def verify(self, case: Case, actual: Action) -> Verdict:
        from nemo_pivotrl.verifiers.base import VerifierFault

        self.calls += 1
        if self.every and self.calls % self.every == 0:
            raise VerifierFault(self.kind, "no answer")
        return self.inner.verify(case, actual)  # type: ignore[no-any-return]


def wavering(monkeypatch: pytest.MonkeyPatch, every: int, kind: str = "judge_timeout") -> None:
    from nemo_pivotrl.components.rollout import load_recipe_verifier

    def load(recipe: Recipe) -> tuple[Any, str]:
        verifier, name = load_recipe_verifier(recipe)
        return Wavering(verifier, every, kind), name

    monkeypatch.setattr(sys.modules[profile.__module__], "load_recipe_verifier", load)


def test_faults_that_pass_when_tried_again_change_no_byte(
    run_dir: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wavering(monkeypatch, every=7)
    assert sha(profile(recipe_at(run_dir, *QUIET, "profile.max_retries=9"))) == sha(trained / "profiles.jsonl")


def test_kinds_have_retries_of_their_own_and_a_faulty_row_has_none(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind, retries, failed in (
        ("judge_timeout", "{judge: 9}", False),
        ("sandbox_oom", "{sandbox: 9}", False),
        ("judge_timeout", "{transport: 9}", True),
        ("expected_arguments", "{row: 9, other: 9, judge: 9}", True),
    ):
        with monkeypatch.context() as patch:
            wavering(patch, every=30, kind=kind)
            allowed = ["profile.max_failure_share=1", "profile.max_retries=0", f"profile.retries={retries}"]
            profile(recipe_at(run_dir, *QUIET, *allowed), fresh=True)
        kinds = {row["profile"]["failure"] for row in read_rows(run_dir / "profiles.jsonl")}
        assert kinds == ({None, kind} if failed else {None}), (kind, retries)


def test_what_failed_keeps_its_rollouts_has_no_rate_and_can_be_tried_again(
    run_dir: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = ["profile.max_failure_share=1", "profile.max_retries=0"]
    with monkeypatch.context() as patch:
        wavering(patch, every=9)
        profile(recipe_at(run_dir, *QUIET, *allowed))
    failed = {name: row for name, row in rows_of(run_dir).items() if row["profile"]["failure"]}
    clean = rows_of(trained)
    assert 5 < len(failed) < len(clean)
    for name, row in rows_of(run_dir).items():
        if name in failed:
            assert row["samples"] == [] and "pass_rate" not in row and row["profile"]["kept"]
        else:
            assert said(row) == said(clean[name])
    unjudged = sum("reward" not in rollout for row in failed.values() for _, rollout in row["profile"]["kept"])
    assert unjudged >= len(failed), "what was drawn and could not be judged is kept as well"
    kept = sum(len(row["profile"]["kept"]) for row in failed.values())
    again = recipe_at(run_dir, *QUIET, *allowed, "profile.retry_failed=true")
    drawn = counting(monkeypatch)
    profile(again)
    assert {name: said(row) for name, row in rows_of(run_dir).items()} == {n: said(row) for n, row in clean.items()}
    assert drawn[0] == sum(len(clean[name]["samples"]) for name in failed) - kept, "not one rollout twice"
    profile(again)
    assert drawn[0] == sum(len(clean[name]["samples"]) for name in failed) - kept


def test_too_many_failures_stop_the_run_early_and_lose_nothing(
    run_dir: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable_map, "JUDGED_BEFORE_STOPPING", 20)
    with monkeypatch.context() as patch:
        wavering(patch, every=4)
        drawn = counting(patch)
        with pytest.raises(InputError, match=r"max_failure_share(?s:.*)judge_timeout"):
            profile(recipe_at(run_dir, *QUIET, "profile.max_retries=0"))
        total = sum(len(row["samples"]) for row in read_rows(trained / "profiles.jsonl"))
        assert drawn[0] < total / 2, "it did not go on to the end"
    profile(recipe_at(run_dir, *QUIET, "profile.retry_failed=true"))
    profile(recipe_at(run_dir, *QUIET, "profile.retry_failed=true"))
    assert {n: said(row) for n, row in rows_of(run_dir).items()} == {
        n: said(row) for n, row in rows_of(trained).items()
    }


def test_a_sampler_that_ignores_its_seeds_is_found(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = loading.load_sampler

    def loaded(*arguments: Any) -> Any:
        sampler = load(*arguments)
        infer = sampler.infer
        sampler.infer = lambda prompts, seeds, *rest: infer(prompts, [[1] * len(s) for s in seeds], *rest)
        return sampler

    monkeypatch.setattr(loading, "load_sampler", loaded)
    with pytest.raises(InputError, match="ignores the per-sample seed"):
        profile(recipe_at(run_dir, *QUIET))


def test_a_lost_turn_is_drawn_again_before_its_candidate_is_given_up(
    run_dir: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, count = loading.load_sampler, iter(range(1 << 30))

    def lossy(*arguments: Any) -> Any:
        sampler = load(*arguments)
        infer = sampler.infer

        def some(*a: Any) -> list[list[Sample | FailedSample]]:
            return [
                [FailedSample("sampler_timeout", "late") if next(count) % 10 == 9 else s for s in g] for g in infer(*a)
            ]

        sampler.infer = some
        return sampler

    monkeypatch.setattr(loading, "load_sampler", lossy)
    profile(recipe_at(run_dir, *QUIET, "profile.max_retries=9"))
    for row, clean in zip(read_rows(run_dir / "profiles.jsonl"), read_rows(trained / "profiles.jsonl"), strict=True):
        assert [s["text"] for s in row["samples"]] == [s["text"] for s in clean["samples"]]
        assert not row["profile"]["failure"]


def test_a_line_that_is_no_candidate_is_named(run_dir: Path) -> None:
    source = run_dir / "candidates.jsonl"
    lines = source.read_bytes().splitlines(keepends=True)
    source.write_bytes(b"".join([*lines[:3], lines[3].replace(b'"split":"', b'"split":"x'), *lines[4:]]))
    seal(source)
    with pytest.raises(InputError, match=r"split 'x"):
        profile(recipe_at(run_dir))


def test_the_plan_survives_the_header(run_dir: Path) -> None:
    from nemo_pivotrl.core.artifacts import Header
    from nemo_pivotrl.pivotrl.profile_rows import plan_in

    job = prepare(recipe_at(run_dir, "profile.lambda_interval=[0.1,0.9]", "profile.curtail=sequential"))
    header = Header(**json.loads(job.header.to_line())["nemo_pivotrl"])
    assert plan_in(header) == job.plan and header == job.header and dataclasses.asdict(job.plan)
