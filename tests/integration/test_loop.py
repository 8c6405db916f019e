"""Rounds of profile, select and train: when they end, what they cost, and that kill -9 changes nothing of it."""

import dataclasses
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.artefacts import made_once, own_copy
from support.processes import Process, python
from support.recipes import SMALL, TINY, recipe_at
from support.stages import finish, kill_when

from nemo_pivotrl.algorithms import round_rules as rounds
from nemo_pivotrl.algorithms.round_rules import Ending, Spent
from nemo_pivotrl.components import checkpoint, costs as ledger
from nemo_pivotrl.components.metrics import read_metrics
from nemo_pivotrl.config import Budget, Checkpointing, Loop, Recipe
from nemo_pivotrl.core.artifacts import read_header, read_rows
from nemo_pivotrl.core.atomic import write_sums
from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.pivotrl import monitor as measure
from nemo_pivotrl.pivotrl.loop import REHEARSED, Round, _candidates, _result, _stop, _until, gains, loop, read_history
from nemo_pivotrl.pivotrl.train import train

TWO_ROUNDS = [
    "loop.max_rounds=2",
    "loop.gain_window=1",
    "loop.min_gain=1.0",  # no validation gains as much: a round ends at its first
    "loop.retention_period=2",
    "loop.max_retention_loss=1.0",
    "evaluate.retention=world",
    "evaluate.trials=1",
]


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def of(folder: Path, *overrides: str) -> Recipe:
    """The small recipe with two rounds."""
    return recipe_at(folder, *TWO_ROUNDS, *overrides)


# ---- pure rules ----


def stds(*values: float) -> list[dict[str, Any]]:
    return [{"step": i, "reward_std": v} for i, v in enumerate(values, start=1)]


def test_signal_has_faded_when_the_last_windows_std_is_below_a_third_of_the_first() -> None:
    settings = Loop(std_window=2, gain_window=9)
    # first window (0.4 + 0.2) / 2 = 0.3, a third of it 0.1
    assert rounds.saturated(stds(0.4, 0.2, 0.11, 0.09), settings) is None  # 0.1 is not below it
    found = rounds.saturated(stds(0.4, 0.2, 0.11, 0.08), settings)
    assert found is not None and found.why == "std" and "0.0950" in found.text and "0.3000" in found.text
    assert rounds.saturated(stds(0.4, 0.0, 0.0), settings) is None  # windows would overlap
    assert rounds.saturated(stds(0.4, 0.2, 0.0, 0.0, 0.2, 0.2), settings) is None  # only the last window counts
    assert rounds.saturated(stds(0.4, 0.2, 0.0, 0.0), dataclasses.replace(settings, std_ratio=0.0)) is None
    # step 0 and its validation have no std, and are no step of a window
    assert rounds.saturated([{"step": 0, "val/accuracy": 0.5}, *stds(0.4, 0.2, 0.11, 0.08)], settings) is not None


def accuracies(*values: float) -> list[dict[str, Any]]:
    return [{"step": i, "val/accuracy": v} for i, v in enumerate(values)]


def test_signal_has_faded_when_validation_gains_too_little_over_a_window() -> None:
    settings = Loop(gain_window=2, min_gain=0.1)
    assert (
        rounds.saturated(accuracies(0.5, 0.5), settings) is None
    )  # one validation after the first is no window of two
    assert rounds.saturated(accuracies(0.5, 0.4, 0.6), settings) is None  # 0.1 is enough, the dip does not matter
    assert rounds.saturated(accuracies(0.1, 0.5, 0.4, 0.55), settings) == Ending(
        "gain", "held-out accuracy 0.5000 to 0.5500 in 2 validations"
    )
    assert rounds.saturated(accuracies(0.5, 0.5, 0.5), dataclasses.replace(settings, min_gain=0.0)) is None


def test_std_is_looked_at_first_so_that_a_last_validation_does_not_change_the_reason() -> None:
    settings = Loop(std_window=1, gain_window=1, min_gain=0.1)
    rows = [*accuracies(0.5), *stds(0.3, 0.0)]
    before = rounds.saturated(rows, settings)
    rows[-1]["val/accuracy"] = 0.5
    assert before == rounds.saturated(rows, settings) and before is not None and before.why == "std"


@pytest.mark.parametrize(
    ("change", "high", "held"),
    [
        (-0.05, -0.01, False),
        (-0.05, 0.01, True),  # may be chance
        (-0.02, -0.01, True),  # sure, and no more than is allowed
        (0.05, 0.09, True),
    ],
)
def test_retention_is_lost_only_when_the_drop_is_large_and_sure(change: float, high: float, held: bool) -> None:
    settings = Loop(max_retention_loss=0.02)
    rows = [{"step": 5, "retention/change": change, "retention/low": -0.2, "retention/high": high}, {"step": 6}]
    assert rounds.held(change, high, settings) is held
    assert (rounds.retention_lost(rows, settings) is None) is held
    kept = {"step": 7, "retention/change": 0.0, "retention/low": 0.0, "retention/high": 0.0}
    assert rounds.retention_lost([*rows, kept], settings) is None  # the latest measurement decides


def test_budget_counts_rollouts_tokens_and_hours_each_for_itself() -> None:
    spent = Spent(10, 60, 40)
    assert rounds.exhausted(spent, 1.0, Budget()) is None
    for name, bound in (("rollouts", 10), ("tokens", 100), ("gpu_hours", 1.0)):
        found = rounds.exhausted(spent, 1.0, Budget(**{name: bound}))
        assert found is not None and found.why == "budget" and f"budget.{name}" in found.text
        assert rounds.exhausted(spent, 1.0, Budget(**{name: type(bound)(bound * 1.1 + 1)})) is None
    rows = [{"step": 0, "rollouts": 3.0}, {"step": 1, "rollouts": 4.0, "tokens_generated": 5.0, "tokens_read": 6.0}]
    assert rounds.spent_of(rows) + Spent(1, 1, 1) * 2 == Spent(9, 7, 8)


def test_patience_counts_rounds_since_the_last_gain() -> None:
    settings = Loop(patience=2, min_gain=0.01)
    assert rounds.impatient([0.5, 0.5], settings) is None
    assert rounds.impatient([0.5, 0.5, 0.505], settings) is not None  # 0.005 is no gain
    assert rounds.impatient([0.5, 0.5, 0.51], settings) is None
    assert rounds.impatient([0.5, 0.6, 0.55, 0.58], settings) is not None  # above the last, below the best
    assert rounds.impatient([0.5, 0.4, 0.6, 0.6], settings) is None
    assert rounds.impatient([0.5, 0.5, 0.5], dataclasses.replace(settings, min_gain=0.0)) is not None


def test_overlap_is_jaccards() -> None:
    assert rounds.overlap(frozenset("abc"), frozenset("bcd")) == 0.5
    assert rounds.overlap(frozenset(), frozenset()) == 1.0 and rounds.overlap(frozenset("a"), frozenset()) == 0.0


def made(recipe: Recipe, number: int, accuracy: list[float], ending: Ending | None = None) -> Round:
    own = dataclasses.replace(
        recipe, run_dir=f"{recipe.run_dir}/r{number}", loop=dataclasses.replace(recipe.loop, round=number)
    )
    return Round(own, frozenset(), frozenset(), frozenset(), Spent(), Spent(), accuracies(*accuracy), ending)


def test_the_result_is_the_first_of_the_best_rounds_that_kept_the_out_of_domain_score(tmp_path: Path) -> None:
    recipe = of(tmp_path)
    lost = Ending("retention", "")
    past = [made(recipe, 1, [0.5, 0.6]), made(recipe, 2, [0.6, 0.7]), made(recipe, 3, [0.7, 0.7])]
    assert _result(past)[:2] == (2, past[1].policy)
    past.append(made(recipe, 4, [0.7, 0.9], lost))
    assert _result(past)[0] == 2  # no checkpoint of round 4 had kept it
    folder = past[3].recipe.path("pivotrl")
    for step, kept, accuracy in ((0, 1.0, 0.7), (1, 0.0, 0.9)):
        (folder / f"step_{step:05d}").mkdir(parents=True)
        meta = {"step": step, "identity": "x", "metrics": {"retention/held": kept, "val/accuracy": accuracy}}
        (folder / f"step_{step:05d}/meta.json").write_text(json.dumps(meta))
    assert _result(past)[0] == 2  # step 0's 0.7 is no better than round 2's, which came first
    assert _result(past[3:])[1] == folder / "step_00000/policy"
    assert _result([made(recipe, 5, [0.5, 0.9], lost)])[:2] == (0, Path(recipe.policy.model_name))


def test_a_run_stops_for_rounds_patience_and_what_ended_the_last_round(tmp_path: Path) -> None:
    recipe = of(tmp_path, "loop.max_rounds=3", "loop.patience=2", "loop.min_gain=0.0")
    why = lambda *past: getattr(_stop(recipe, past), "why", None)  # noqa: E731
    first, idle = made(recipe, 1, [0.5, 0.6]), made(recipe, 2, [0.6, 0.6])
    assert why() is None and why(first) is None and why(first, idle) is None
    assert why(first, idle, made(recipe, 3, [0.6, 0.9])) == "max_rounds"
    assert why(made(recipe, 1, [0.5, 0.5]), idle) is None  # the first gained nothing, the second did
    assert why(made(recipe, 1, [0.6, 0.5]), idle) == "patience"
    assert why(made(recipe, 1, [0.5, 0.6], Ending("budget", ""))) == "budget"
    assert why(made(recipe, 1, [0.5, 0.6], Ending("std", ""))) is None


# ---- whole runs ----


def files(folder: Path) -> dict[str, str]:
    """Digest of everything that a resumed run must repeat."""
    names = ("*/policy/model.safetensors", "*/metrics.jsonl", "profiles.jsonl", "pivots.jsonl", "candidates.jsonl")
    paths = [p for name in (*names, "loop.jsonl", "retention.jsonl") for p in folder.rglob(name)]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


@pytest.fixture(scope="module")
def looped(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two rounds, undisturbed, in a process of its own. Not to be changed."""

    def make(folder: Path) -> None:
        shutil.copytree(trained, folder)
        finish(start(folder))

    return own_copy(made_once("looped", TWO_ROUNDS, make), tmp_path_factory, "looped")


def start(folder: Path, *overrides: str) -> Process:
    """The loop alone, as `run` calls it, in a process of its own."""
    code = (
        "import sys; from nemo_pivotrl.config.load import load_recipe; from nemo_pivotrl.pivotrl.loop import loop;"
        "import torch; torch.set_num_threads(1); loop(load_recipe(sys.argv[1], sys.argv[2:]))"
    )
    return python("-c", code, TINY, f"run_dir={folder}", *SMALL, *TWO_ROUNDS, *overrides, out=folder / "log.txt")


def test_two_rounds_of_one_run(looped: Path) -> None:
    events = read_history(looped)
    assert [(e["event"], e.get("round")) for e in events] == [
        ("profiled", 1),
        ("faded", 1),
        ("profiled", 2),
        ("ended", 2),
        ("stopped", None),
    ]
    first, faded, second, ended, stopped = events
    assert faded["why"] == "gain" and faded["step"] == 2  # of 4: the first validation of the training
    assert ended["why"] == "steps" and ended["step"] == 4  # nothing may follow the last round, so nothing cuts it short
    assert stopped["why"] == "max_rounds"
    again = looped / "round-02"
    # one checkpoint is what round 1 published, what round 2 profiled and what it began with
    published = read_header(again / "profiles.jsonl", "profiles").policy
    assert second["policy"] == published == read_header(again / "pivots.jsonl", "pivots").policy != first["policy"]
    assert second["version"] == read_header(again / REHEARSED, "pivots").extra["version"]
    ids = [{r["candidate_id"] for r in read_rows(d / "pivots.jsonl") if r["split"] == "train"} for d in (looped, again)]
    assert second["overlap"] == pytest.approx(len(ids[0] & ids[1]) / len(ids[0] | ids[1]))
    result = looped / "final/policy/model.safetensors"
    best = [looped, again][stopped["result"]["round"] - 1] / "pivotrl/policy/model.safetensors"
    assert result.read_bytes() == best.read_bytes()
    rows = read_metrics(again / "pivotrl/metrics.jsonl")
    assert rows[0]["val/accuracy"] == faded["accuracy"][1]  # the same policy, states and seeds
    assert faded["spent"]["rollouts"] == first["profile"]["rollouts"] + sum(
        round(r["rollouts"]) for r in read_metrics(looped / "pivotrl/metrics.jsonl")
    )


def test_a_later_round_draws_other_samples_and_lets_mastered_candidates_rest(looped: Path) -> None:
    rows = {folder: list(read_rows(looped / folder / "profiles.jsonl")) for folder in (".", "round-02")}
    texts = {f: {r["candidate_id"]: [s["text"] for s in r["samples"]] for r in rows[f]} for f in rows}
    mastered = {
        r["candidate_id"]
        for r in rows["."]
        if r["split"] == "train" and r["samples"] and all(s["reward"] == 1.0 for s in r["samples"])
    }
    assert texts["."].keys() - texts["round-02"].keys() == mastered
    same = sum(texts["."][c] == texts["round-02"][c] for c in texts["round-02"])
    assert same < 0.2 * len(texts["round-02"])  # two training steps hardly change this policy; its seeds do


def test_a_later_round_rehearses_the_pivots_before_it(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, recipe = run_dir, of(run_dir, "loop.rehearse=true")
    trained_on: list[str] = []

    def watched(own: Recipe, *rest: Any) -> Path:
        trained_on.append(own.grpo.pivots)
        return train(own, *rest)

    monkeypatch.setattr("nemo_pivotrl.pivotrl.loop.train", watched)
    loop(recipe)
    first, second, both = (folder / name for name in ("pivots.jsonl", "round-02/pivots.jsonl", f"round-02/{REHEARSED}"))
    rows = {path: list(read_rows(path)) for path in (first, second, both)}
    ids = {path: [p["candidate_id"] for p in found if p["split"] == "train"] for path, found in rows.items()}
    assert ids[both][: len(ids[second])] == ids[second]
    assert sorted(ids[both]) == sorted({*ids[first], *ids[second]})  # each once
    held_out = {path: [p["candidate_id"] for p in found if p["split"] == "validation"] for path, found in rows.items()}
    assert held_out[both] == held_out[second]
    header = read_header(both, "pivots")
    assert header.extra["earlier"] == len(ids[both]) - len(ids[second]) > 0
    assert header.policy == read_header(second, "pivots").policy
    said = [e["text"] for e in read_history(folder) if e["event"] == "profiled"]
    assert "rehearsed" not in said[0] and f"{header.extra['earlier']} of earlier rounds rehearsed" in said[1]
    assert trained_on == ["pivots.jsonl", REHEARSED]
    files = [folder / "round-02/pivotrl/metrics.jsonl", folder / "loop.jsonl", both]
    before = [path.read_bytes() for path in files]
    shutil.rmtree(folder / "round-02/pivotrl")
    loop(recipe)
    assert [path.read_bytes() for path in files] == before


def test_rounds_of_limited_profiles_go_through_all_candidates_before_one_comes_again(
    looped: Path, tmp_path: Path
) -> None:
    recipe = of(looped, "profile.limit=30", "loop.rest_mastered=false")
    rows = {r["candidate_id"]: r["split"] for r in read_rows(looped / "candidates.jsonl")}
    train_ids = {c for c, split in rows.items() if split == "train"}
    held_out = frozenset(sorted(rows.keys() - train_ids)[:5])
    past: list[Round] = []
    seen: list[set[str]] = []
    for number in range(1, 5):
        _candidates(recipe, past or [made(recipe, 0, [])], tmp_path / "next.jsonl")
        chosen = {r["candidate_id"] for r in read_rows(tmp_path / "next.jsonl")}
        assert chosen - train_ids == (held_out if past else set())
        seen.append(chosen & train_ids)
        past.append(dataclasses.replace(made(recipe, number, []), seen=frozenset(seen[-1]) | held_out))
    assert [len(s) for s in seen] == [30] * 4 and len(train_ids) == 74
    assert not seen[0] & seen[1] and len(seen[0] | seen[1] | seen[2]) == 74 and len(seen[2] & (seen[0] | seen[1])) == 16
    rested = dataclasses.replace(past[0], mastered=frozenset(seen[0]))
    _candidates(of(looped, "profile.limit=0"), [rested], tmp_path / "next.jsonl")
    chosen = {r["candidate_id"] for r in read_rows(tmp_path / "next.jsonl")}
    assert chosen & train_ids == train_ids - seen[0]


@pytest.mark.parametrize(
    "moments",
    [
        ("round-02/candidates.jsonl", "round-02/profiles.jsonl.journal"),
        ("retention.jsonl", "pivotrl/step_00002/meta.json", "round-02/profiles.jsonl", "round-02/pivotrl/step_00003/meta.json"),
        ("pivotrl/published.json", "round-02/pivotrl/published.json", "final/policy"),
    ],
)  # fmt: skip
def test_a_run_killed_with_9_at_any_moment_ends_with_the_same_bytes(
    trained: Path, looped: Path, tmp_path: Path, moments: tuple[str, ...]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    kills = 0
    for moment in moments:
        kills += kill_when(start(folder), (folder / moment).exists)
    assert kills >= len(moments) - 1
    finish(start(folder))
    assert files(folder) == files(looped)


def test_a_finished_run_that_is_started_again_does_nothing_again(looped: Path) -> None:
    before, lines = files(looped), len(ledger.read_ledgers(looped))
    loop(of(looped))
    assert files(looped) == before and len(ledger.read_ledgers(looped)) == lines


def watched(folder: Path, monkeypatch: pytest.MonkeyPatch, score: Callable[[int], float]) -> None:
    """The nth out-of-domain measurement gives `score(n)` on every item, the start's being the 0th."""
    taken = iter(range(99))

    def retention(recipe: Recipe, policy: object, sampler: object, chat: object) -> list[dict[str, Any]]:
        value = score(next(taken))
        return [{"item": str(i), "scores": [value]} for i in range(5)]

    monkeypatch.setattr(measure.evaluate, "retention", retention)


def test_a_lost_out_of_domain_score_ends_the_run_with_the_last_checkpoint_that_kept_it(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched(run_dir, monkeypatch, lambda n: 0.5 if n < 3 else 0.4)
    extra = ["loop.retention_period=1", "loop.max_retention_loss=0.05", "loop.gain_window=9", "grpo.val_period=4"]
    loop(of(run_dir, *extra))
    events = read_history(run_dir)
    assert [e["event"] for e in events] == ["profiled", "lost", "stopped"] and events[1]["step"] == 3
    assert events[2]["why"] == "retention" and events[1]["retention"] == pytest.approx(-0.1)
    kept = run_dir / "pivotrl/step_00002/policy/model.safetensors"
    assert (run_dir / "final/policy/model.safetensors").read_bytes() == kept.read_bytes()
    assert kept.read_bytes() != (run_dir / "pivotrl/policy/model.safetensors").read_bytes()
    rows = read_metrics(run_dir / "pivotrl/metrics.jsonl")
    assert [row["retention/held"] for row in rows] == [1.0, 1.0, 1.0, 0.0]
    assert all("val/accuracy" in row for row in rows)  # where retention is measured, so is what it is weighed against


def test_train_alone_stops_for_a_lost_score_too(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched(run_dir, monkeypatch, lambda n: 0.5 if n < 1 else 0.4)
    train(of(run_dir, "loop.retention_period=2"))  # a loss of 1.0 is allowed
    assert read_metrics(run_dir / "pivotrl/metrics.jsonl")[-1]["step"] == 4
    shutil.rmtree(run_dir / "pivotrl")
    (run_dir / "retention.jsonl").unlink()
    watched(run_dir, monkeypatch, lambda n: 0.5 if n < 1 else 0.4)
    train(of(run_dir, "loop.retention_period=2", "loop.max_retention_loss=0.05"))
    assert read_metrics(run_dir / "pivotrl/metrics.jsonl")[-1]["step"] == 2


def test_the_out_of_domain_score_is_really_measured_with_the_policy_in_training(looped: Path) -> None:
    start = [row["score"] for row in read_rows(looped / "retention.jsonl")]
    rows = [row for row in read_metrics(looped / "pivotrl/metrics.jsonl") if "retention/accuracy" in row]
    assert [row["step"] for row in rows] == [0, 2] and len(start) == 10
    assert rows[0]["retention/accuracy"] == pytest.approx(sum(start) / 10) and rows[0]["retention/change"] == 0.0


def test_a_monitor_without_a_set_or_without_a_start_is_refused(run_dir: Path) -> None:
    with pytest.raises(InputError, match=r"(?s)loop\.retention_period.*evaluate\.retention"):
        train(of(run_dir, "evaluate.retention=none"))
    train(of(run_dir, "loop.retention_period=0", "grpo.max_num_steps=1"))
    with pytest.raises(InputError, match="no scores of the start policy"):
        train(of(run_dir, "loop.retention_period=2"))


def test_a_budget_ends_the_run_at_the_step_that_reaches_it(run_dir: Path) -> None:
    plain = [*TWO_ROUNDS[:1], "loop.retention_period=0", "loop.gain_window=9", "grpo.val_period=0"]
    profiled = sum(len(row["samples"]) for row in read_rows(run_dir / "profiles.jsonl"))
    loop(of(run_dir, *plain, f"budget.rollouts={profiled + 17}"))  # a step is 4 x 4
    faded, stopped = read_history(run_dir)[1:]
    assert (faded["why"], faded["step"], faded["spent"]["rollouts"]) == ("budget", 2, profiled + 32)
    assert stopped["why"] == "budget"
    loop(of(run_dir, *plain, f"budget.rollouts={profiled + 33}"))  # raised: it goes on from there
    assert read_history(run_dir)[1]["step"] == 3


def test_no_round_begins_that_the_budget_could_not_pay_for(run_dir: Path) -> None:
    profiled = sum(len(row["samples"]) for row in read_rows(run_dir / "profiles.jsonl"))
    loop(of(run_dir, f"budget.rollouts={2 * profiled}"))
    assert [e["event"] for e in read_history(run_dir)] == ["profiled", "ended", "profiled", "ended", "stopped"] or [
        e["event"] for e in read_history(run_dir)
    ] == ["profiled", "ended", "stopped"]
    assert read_history(run_dir)[1]["step"] == 4  # it did not fade at step 2 as it does with money to spend


def test_the_last_rows_measurements_do_not_undo_the_decision_to_end_a_round(tmp_path: Path) -> None:
    """Seen in a run: a round faded, its last validation made another profile too dear, and it went on when it was resumed."""
    rows = [{"step": i, "reward_std": v, "rollouts": 10.0} for i, v in enumerate((0.3, 0.0, 0.0), start=1)]
    for budget in range(20, 200):
        recipe = of(tmp_path, f"budget.rollouts={budget}", "loop.std_window=1")
        until = _until(recipe, Spent(30), Spent(30))
        ended = until(rows)
        after = until([*rows[:-1], {**rows[-1], "rollouts": 45.0, "val/accuracy": 0.1}])
        # 30 before, 20 in the rows but the last, 30 for a profile, and three steps of 10
        assert (ended is not None) == (budget > 110 or budget <= 60) and (after is not None or ended is None)


def test_a_policy_without_pivots_ends_the_run(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[loop.__module__]
    real = module.select_pivots

    def select(recipe: Recipe, fresh: bool = False) -> Path:
        if recipe.loop.round > 1:
            recipe = dataclasses.replace(recipe, select=dataclasses.replace(recipe.select, rule="adv", lambda_diff=0.0))
        return real(recipe, fresh)

    monkeypatch.setattr(module, "select_pivots", select)
    loop(of(run_dir))
    assert read_history(run_dir)[-1]["why"] == "no_pivots" and read_history(run_dir)[-1]["result"]["round"] == 1


def test_servers_and_numbered_rounds_are_refused(run_dir: Path) -> None:
    with pytest.raises(InputError, match=r"loop\.max_rounds"):
        loop(of(run_dir, "vllm.servers=[http://127.0.0.1:1]"))
    with pytest.raises(InputError, match=r"loop\.round"):
        loop(of(run_dir, "loop.round=2"))


def test_run_audits_once_and_only_before_there_is_a_profile(trained: Path, tmp_path: Path) -> None:
    from nemo_pivotrl.pipeline import _pivotrl

    def names(*overrides: str, folder: Path = tmp_path, fresh: bool = False) -> list[str]:
        return list(_pivotrl(of(folder, "extract.trajectories=[x]", *overrides), fresh))

    assert names()[:4] == ["extract", "audit", "warmup", "profile"] and names()[-1] == "evaluate"
    assert "audit" not in names("audit.before_profile=false") and "audit" not in names(folder=trained)
    assert "audit" in names(folder=trained, fresh=True)
    assert "warmup" not in names("policy.model_name=/elsewhere", folder=trained)


# ---- costs ----


def test_the_ledger_knows_what_a_killed_process_spent(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from nemo_pivotrl.components.costs import spend\n"
        "with spend(Path(sys.argv[1]), 'profile') as cost:\n"
        "    cost['rollouts'] = 7\n"
        "    time.sleep(600)\n"
    )
    begun, path = time.monotonic(), tmp_path / "ledger.jsonl"
    for lines in (1, 2):  # each is killed after its first line, which it writes after a second
        process = python("-c", code, str(tmp_path))
        assert kill_when(process, lambda: path.exists() and path.read_text().count('"id"') == lines)  # noqa: B023
    with ledger.spend(tmp_path, "profile") as cost:
        cost["rollouts"] = 5
    (entry,) = ledger.by_stage(ledger.read_ledger(tmp_path))
    assert entry["processes"] == 3 and entry["rollouts"] == 19 and 2.0 <= entry["seconds"] <= time.monotonic() - begun


def test_lines_of_one_process_replace_each_other_and_those_of_two_add_up(tmp_path: Path) -> None:
    lines = [
        {"stage": "profile", "seconds": 1.0, "rollouts": 3, "tokens_prompt": 10, "id": "a"},
        {"stage": "profile", "seconds": 2.0, "rollouts": 6, "tokens_prompt": 20, "id": "a"},
        {"stage": "profile", "seconds": 4.0, "rollouts": 8, "tokens_prompt": 30, "id": "b"},
        {"stage": "train x", "seconds": 8.0, "rollouts": 20, "tokens_generated": 100, "id": "c"},
        {"stage": "evaluate", "seconds": 5.0},
    ]
    (tmp_path / "round-02").mkdir()
    (tmp_path / "ledger.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"stage": "torn')
    (tmp_path / "round-02/ledger.jsonl").write_text(json.dumps({"stage": "profile", "seconds": 1.0, "rollouts": 2}))
    read = ledger.read_ledgers(tmp_path)
    stages = {e["stage"]: e for e in ledger.by_stage(read)}
    assert stages["profile"]["seconds"] == 6.0 and stages["profile"]["rollouts"] == 14
    assert stages["profile"]["tokens_read"] == 50 and stages["round-02 profile"]["rollouts"] == 2
    found = ledger.totals(read, gpus=9, pivots=8, points=4.0)
    assert found["seconds"] == 20.0 and found["gpu_hours"] == 0.05 and found["rollouts"] == 36
    assert found["per_pivot"]["rollouts"] == 2.0 and found["per_pivot"]["seconds"] == round(7 / 8, 2)
    assert found["per_point"]["rollouts"] == 9.0 and found["per_point"]["tokens_generated"] == 25.0
    assert "per_point" not in ledger.totals(read, 1, 8, 0.0)
    assert "round-02 profile" in ledger.table(read, 1)


def test_the_run_ledger_counts_what_the_history_counts(looped: Path) -> None:
    events = read_history(looped)
    spent = [e["spent"] for e in events if "spent" in e][-1]
    lines = [e for e in ledger.by_stage(ledger.read_ledgers(looped)) if "train" in e["stage"]]
    profiled = sum(e["profile"]["rollouts"] for e in events if e["event"] == "profiled")
    assert sum(e["rollouts"] for e in lines) + profiled == spent["rollouts"]
    assert all(e["tokens_trained"] > 0 for e in lines)
    pivots, points = gains(events)
    assert pivots == sum(e["pivots"] for e in events if e["event"] == "profiled")
    ends = [e["accuracy"] for e in events if "accuracy" in e]
    assert points == pytest.approx(100 * (max(e[1] for e in ends) - ends[0][0]))


def test_the_report_shows_the_history(looped: Path) -> None:
    from nemo_pivotrl.report.page import gather, report
    from nemo_pivotrl.report.rounds import cumulative

    rows, borders = cumulative([accuracies(0.1, 0.2, 0.3), accuracies(0.3, 0.4)])
    assert [row["step"] for row in rows] == [0, 1, 2, 2, 3] and borders == [2]
    numbers, plots = gather(of(looped))
    assert [r["round"] for r in numbers["loop"]["rounds"]] == [1, 2] and "<svg" in plots["loop"]
    page = report(of(looped)).read_text()
    for event in read_history(looped):
        assert event["text"].split(";")[0] in page
    assert "round-02 train pivotrl" in page


def test_a_published_policy_is_known_only_for_its_own_run_and_latest_step(run_dir: Path) -> None:
    folder = train(of(run_dir, "grpo.max_num_steps=2", "loop.retention_period=0")).parent
    told = json.loads((folder / "published.json").read_text())
    last = Checkpointing()
    assert checkpoint.published(folder, told["identity"], last) == 2
    assert checkpoint.published(folder, "other", last) is None
    assert checkpoint.published(folder, told["identity"], Checkpointing(publish="best")) is None  # chosen otherwise
    shutil.copytree(folder / "step_00002", folder / "step_00003")
    meta = json.loads((folder / "step_00003/meta.json").read_text())
    (folder / "step_00003/meta.json").write_text(json.dumps({**meta, "step": 3}))
    write_sums(folder / "step_00003")
    assert (
        checkpoint.published(folder, told["identity"], Checkpointing()) is None
    )  # killed between checkpoint and publication
