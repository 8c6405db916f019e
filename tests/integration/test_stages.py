"""The stages on a tiny trained policy: resume after kill -9 to the same bytes, refusals, and what training does."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from support.recipes import recipe_at
from support.stages import finish, kill_when, sha, start

from nemo_pivotrl.components import rollout
from nemo_pivotrl.components.metrics import read_metrics
from nemo_pivotrl.components.statistics import bootstrap
from nemo_pivotrl.core.artifacts import read_header, read_rows
from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.core.types import Action, Case, Verdict
from nemo_pivotrl.data.states import candidates_of
from nemo_pivotrl.demo import service_desk as world
from nemo_pivotrl.pivotrl.evaluate import evaluate, holds, read_items
from nemo_pivotrl.pivotrl.evaluation_tables import summarise
from nemo_pivotrl.pivotrl.profile import profile
from nemo_pivotrl.pivotrl.profile_rows import light_of_row
from nemo_pivotrl.pivotrl.select import select_pivots
from nemo_pivotrl.pivotrl.sft import merge, sft
from nemo_pivotrl.pivotrl.train import train
from nemo_pivotrl.verifiers.base import VerifierFault
from nemo_pivotrl.verifiers.single_step import SingleStep


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained run at the same recipe, to be changed."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def test_train_killed_with_9_and_resumed_ends_with_the_same_policy_and_metrics(run_dir: Path) -> None:
    finish(start("train", run_dir, "grpo.name=straight"))
    for step in (1, 3):
        folder = run_dir / "killed"
        assert kill_when(start("train", run_dir, "grpo.name=killed"), (folder / f"step_{step:05d}/meta.json").exists)
    finish(start("train", run_dir, "grpo.name=killed"))
    for name in ("policy/model.safetensors", "metrics.jsonl"):
        assert sha(run_dir / "killed" / name) == sha(run_dir / "straight" / name), name
    assert [row["step"] for row in read_metrics(run_dir / "killed/metrics.jsonl")] == [0, 1, 2, 3, 4]


def test_training_changes_the_policy_only_where_there_is_signal(run_dir: Path) -> None:
    before = (run_dir / "start/policy/model.safetensors").read_bytes()
    train(recipe_at(run_dir))
    metrics = read_metrics(run_dir / "pivotrl/metrics.jsonl")
    assert any(row["mixed_group_share"] > 0 for row in metrics[1:])
    assert (run_dir / "pivotrl/policy/model.safetensors").read_bytes() != before
    for row in metrics[1:]:
        assert row["sampler_mismatch"] < 1e-4 and row["ratio"] == pytest.approx(1.0, abs=1e-5)
        assert (row["trained_share"] > 0) == (row["mixed_group_share"] > 0)


@pytest.mark.parametrize(
    "extra",
    [
        ["loss_fn.reference_policy_kl_penalty=0.1"],
        ["grpo.num_minibatches=2"],
        ["loss_fn.use_importance_sampling_correction=true"],
    ],
)
def test_kl_minibatches_and_importance_weights_train(run_dir: Path, extra: list[str]) -> None:
    train(recipe_at(run_dir, "grpo.max_num_steps=2", *extra))
    last = read_metrics(run_dir / "pivotrl/metrics.jsonl")[-1]
    assert last["step"] == 2 and last["grad_norm"] > 0
    if "kl" in extra[0]:
        assert 0 <= last["kl"] < 0.1  # the reference is the start policy, so the first steps are near it


def test_the_second_minibatch_is_off_policy_because_old_log_probs_precede_every_update(run_dir: Path) -> None:
    train(
        recipe_at(
            run_dir, "grpo.max_num_steps=1", "grpo.num_minibatches=2", "policy.optimizer.lr=1e-2", "grpo.val_period=0"
        )
    )
    (row,) = read_metrics(run_dir / "pivotrl/metrics.jsonl")
    assert row["policy_kl"] > 1e-3


def test_train_refuses_pivots_of_another_policy_and_says_which_field_differs(run_dir: Path) -> None:
    sft(recipe_at(run_dir))
    with pytest.raises(InputError, match=r"(?s)policy: found.*re-run the stage"):
        train(recipe_at(run_dir, f"policy.model_name={run_dir}/sft/policy"))


def test_train_refuses_another_verifier_or_template(run_dir: Path) -> None:
    with pytest.raises(InputError, match="verifier: found 'single_step"):
        train(recipe_at(run_dir, "verifier.name=exact"))
    with pytest.raises(InputError, match="chat_template: found"):
        train(recipe_at(run_dir, "policy.template_kwargs.other=1"))


def test_train_refuses_a_cut_or_greedy_sampler(run_dir: Path) -> None:
    with pytest.raises(InputError) as caught:
        train(recipe_at(run_dir, "policy.generation.top_p=0.9", "grpo.num_minibatches=99"))
    fields = [p.field for p in caught.value.problems]
    assert fields == ["policy.generation", "policy.generation.top_p", "grpo.num_minibatches"]


def test_a_run_that_changed_its_recipe_is_not_resumed_silently(run_dir: Path) -> None:
    train(recipe_at(run_dir, "grpo.max_num_steps=1", "grpo.val_period=0"))
    with pytest.raises(InputError, match="fresh=true"):
        train(recipe_at(run_dir, "grpo.val_period=0", "policy.optimizer.lr=1e-5"))
    train(recipe_at(run_dir, "grpo.max_num_steps=2", "grpo.val_period=0"))  # longer is no change


def test_an_unfinished_profile_of_another_recipe_is_refused_and_names_the_difference(run_dir: Path) -> None:
    (run_dir / "profiles.jsonl").unlink()
    journal = run_dir / "profiles.jsonl.journal"
    assert kill_when(start("profile", run_dir), lambda: journal.exists() and journal.stat().st_size > 20_000)
    with pytest.raises(InputError, match=r"(?s)profile.num_generations=\d+ \(now 4\).*fresh=true"):
        profile(recipe_at(run_dir, "profile.num_generations=4"))
    assert journal.stat().st_size > 20_000


def test_best_checkpoints_are_kept_besides_the_latest(run_dir: Path) -> None:
    train(recipe_at(run_dir, "checkpointing.keep_top_k=1", "grpo.val_period=1"))
    metrics = {row["step"]: row["val/accuracy"] for row in read_metrics(run_dir / "pivotrl/metrics.jsonl")}
    best = min(s for s in range(1, 5) if metrics[s] == max(metrics[t] for t in range(1, 5)))
    assert {p.name for p in (run_dir / "pivotrl").glob("step_*")} == {f"step_{best:05d}", "step_00004"}


class Answering:
    """The default verifier, to be made to fail."""

    name, version, concurrency, asks_judge = "single_step", "2", 1, False

    def excludes(self, case: Case) -> bool:
        return False

    def verify(self, case: Case, actual: Action) -> Verdict:
        return SingleStep().verify(case, actual)


class Faulty(Answering):
    """Fails `times` for each candidate whose expert calls find_orders."""

    def __init__(self, times: int):
        self.times, self.calls = times, 0

    def verify(self, case: Case, actual: Action) -> Verdict:
        if case.expected.kind == "calls" and case.expected.calls[0].name == "find_orders":
            self.calls += 1
            if self.times < 0 or self.calls % (self.times + 1):
                raise VerifierFault("judge", "no answer")
        return super().verify(case, actual)


def patched(monkeypatch: pytest.MonkeyPatch, times: int, stage: str = "profile") -> None:
    import importlib

    module = importlib.import_module(f"nemo_pivotrl.pivotrl.{stage}")
    identity = rollout.load_recipe_verifier(recipe_at(Path("unused")))[1]
    monkeypatch.setattr(module, "load_recipe_verifier", lambda recipe: (Faulty(times), identity))


def test_a_fault_that_passes_with_retries_changes_nothing(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = sha(run_dir / "profiles.jsonl")
    patched(monkeypatch, times=2)
    profile(recipe_at(run_dir), fresh=True)
    assert sha(run_dir / "profiles.jsonl") == expected


def test_a_fault_that_stays_excludes_the_candidate_and_is_never_a_zero(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patched(monkeypatch, times=-1)
    with pytest.raises(InputError, match="max_failure_share"):
        profile(recipe_at(run_dir, "audit.before_profile=false"), fresh=True)
    profile(recipe_at(run_dir, "audit.before_profile=false", "profile.max_failure_share=1"), fresh=True)
    rows = [light_of_row(row) for row in read_rows(run_dir / "profiles.jsonl")]
    failed = [p for p in rows if p.failure]
    assert failed and all(
        p.failure == "judge" and p.candidate.action_name == "find_orders" and not p.samples for p in failed
    )
    select_pivots(
        recipe_at(run_dir, "select.rule=adv_with_zeros", "select.lambda_diff=1.0", "select.undecided=by_rate")
    )
    kept = {row["candidate_id"] for row in read_rows(run_dir / "pivots.jsonl")}
    assert not kept & {p.candidate.candidate_id for p in failed}


def test_a_verifier_outage_stops_training_and_is_no_reward_of_zero(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Out(Answering):
        def verify(self, case: Case, actual: Action) -> Verdict:
            raise VerifierFault("transport", "down")

    identity = rollout.load_recipe_verifier(recipe_at(run_dir))[1]
    monkeypatch.setattr(sys.modules[train.__module__], "load_recipe_verifier", lambda recipe: (Out(), identity))
    with pytest.raises(InputError, match="could not be judged"):
        train(recipe_at(run_dir, "grpo.val_period=0"))
    assert not read_metrics(run_dir / "pivotrl/metrics.jsonl")


def test_what_a_kill_leaves_between_two_file_operations_is_no_checkpoint(run_dir: Path) -> None:
    train(recipe_at(run_dir, "grpo.max_num_steps=2"))
    for name in ("step_00009.part", "step_00001.old", "step_00008.part/policy"):
        (run_dir / "pivotrl" / name).mkdir(parents=True, exist_ok=True)
    train(recipe_at(run_dir))
    assert read_metrics(run_dir / "pivotrl/metrics.jsonl")[-1]["step"] == 4


def test_a_shorter_run_than_the_checkpoint_is_refused(run_dir: Path) -> None:
    train(recipe_at(run_dir, "grpo.max_num_steps=2", "grpo.val_period=0"))
    with pytest.raises(InputError, match="already at step 2"):
        train(recipe_at(run_dir, "grpo.max_num_steps=1", "grpo.val_period=0"))


def test_finished_profiles_of_another_recipe_are_not_replaced_silently(run_dir: Path) -> None:
    expected = sha(run_dir / "profiles.jsonl")
    with pytest.raises(InputError, match="fresh=true to replace"):
        profile(recipe_at(run_dir, "profile.num_generations=4"))
    assert sha(run_dir / "profiles.jsonl") == expected


def test_pivots_of_older_profiles_are_refused(run_dir: Path) -> None:
    profile(recipe_at(run_dir, "profile.num_generations=4"), fresh=True)
    with pytest.raises(InputError, match="has changed since"):
        train(recipe_at(run_dir))


def test_a_state_that_does_not_fit_is_excluded_and_counted_and_no_zero(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile(recipe_at(run_dir, "policy.max_total_sequence_length=110"), fresh=True)
    rows = [light_of_row(row) for row in read_rows(run_dir / "profiles.jsonl")]
    outside = [p for p in rows if p.tokens_prompt + 40 > 110]
    assert outside and all(p.failure == "context_overflow" and not p.samples for p in outside)
    assert all(p.failure is None for p in rows if p not in outside)
    assert f"excluded: {len(outside)} candidates, context_overflow" in capsys.readouterr().out
    with pytest.raises(InputError, match="none can be profiled"):
        profile(recipe_at(run_dir, "policy.max_total_sequence_length=41"), fresh=True)


def test_a_sampler_that_ignores_seeds_is_caught(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_pivotrl.backends.reference.policy import ReferencePolicy

    real = ReferencePolicy.infer
    # an almost uniform policy whose samples nevertheless repeat
    monkeypatch.setattr(
        ReferencePolicy,
        "infer",
        lambda self, prompts, seeds, stop, g: real(
            self, prompts, [[1] * len(s) for s in seeds], stop, dataclasses.replace(g, temperature=3.0)
        ),
    )
    copy = trained.parent / "seeds"
    shutil.copytree(trained, copy, dirs_exist_ok=True)
    with pytest.raises(InputError, match="ignores the per-sample seed"):
        profile(recipe_at(copy), fresh=True)


def test_headers_chain_and_rows_carry_no_seed(trained: Path) -> None:
    from nemo_pivotrl.core.artifacts import file_digest

    profiles, pivots = (
        read_header(trained / "profiles.jsonl", "profiles"),
        read_header(trained / "pivots.jsonl", "pivots"),
    )
    assert profiles.parent == file_digest(trained / "candidates.jsonl") and pivots.parent == file_digest(
        trained / "profiles.jsonl"
    )
    assert profiles.policy == pivots.policy != ""
    assert not any("seed" in json.dumps(row) for row in read_rows(trained / "pivots.jsonl"))


def test_no_held_out_task_is_among_the_train_pivots(trained: Path) -> None:
    by_split: dict[str, set[str]] = {"train": set(), "validation": set()}
    for row in read_rows(trained / "pivots.jsonl"):
        by_split[row["split"]].add(row["task_id"])
    assert by_split["train"] and by_split["validation"] and not by_split["train"] & by_split["validation"]


def test_metrics_reach_tensorboard_and_a_missing_dashboard_names_its_extra(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(recipe_at(run_dir, "logger.tensorboard=true", "grpo.max_num_steps=2", "grpo.val_period=0"))
    events = EventAccumulator(str(run_dir / "pivotrl/tensorboard")).Reload()
    rows = read_metrics(run_dir / "pivotrl/metrics.jsonl")
    assert [e.value for e in events.Scalars("reward")] == pytest.approx([row["reward"] for row in rows])
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"(?s)logger\.wandb.*nemo-pivotrl\[wandb\]"):
        train(recipe_at(run_dir, "logger.wandb=true", "grpo.name=other"))


def test_evaluate_and_report_tell_the_same_numbers(run_dir: Path) -> None:
    from nemo_pivotrl.report.page import report

    train(recipe_at(run_dir))
    policies = [
        f"evaluate.policies.{name}={run_dir}/{name if name != 'base' else 'start'}/policy"
        for name in ("base", "pivotrl")
    ]
    recipe = recipe_at(run_dir, *policies)
    recipe = dataclasses.replace(
        recipe,
        evaluate=dataclasses.replace(
            recipe.evaluate, policies={k: v for k, v in recipe.evaluate.policies.items() if k in ("base", "pivotrl")}
        ),
    )
    evaluate(recipe)
    first = sha(run_dir / "evaluation.jsonl")
    rows = list(read_items(run_dir / "evaluation.jsonl"))
    assert {(r["policy"], r["set"]) for r in rows} == {
        (p, s) for p in ("base", "pivotrl") for s in ("one_turn", "multi_turn", "retention")
    }
    numbers = json.loads(report(recipe).with_suffix(".json").read_text())
    scored = [score for r in rows if r["policy"] == "base" and r["set"] == "retention" for score in r["scores"]]
    assert numbers["evaluation"]["policies"]["base"]["retention"]["mean"] == pytest.approx(sum(scored) / len(scored))
    page = (run_dir / "report.html").read_text()
    assert page.count("<svg") >= 5 and "http-equiv" not in page and "src=" not in page
    evaluate(recipe, fresh=True)
    assert sha(run_dir / "evaluation.jsonl") == first


def test_model_output_in_the_report_is_text_and_not_markup() -> None:
    from jinja2 import Environment, PackageLoader, select_autoescape

    pages = Environment(loader=PackageLoader("nemo_pivotrl.report", "."), autoescape=select_autoescape(default=True))
    row = {"sample": "<script>alert(1)</script>", "category": "x"}
    page = pages.get_template("page.html.jinja").render(
        run_dir="r", samples=[{"state": "s", "expected": "e", "labels": ["a", "b"], "before": row, "after": row}]
    )
    assert "<script>" not in page and "&lt;script&gt;" in page


# ---- small parts ----


def test_merge_trains_every_expert_token_once_and_joins_prefixes() -> None:
    first, second, other = ([1, 2], [3, 4]), ([1, 2, 3, 4, 5], [6]), ([1, 9], [8])
    merged = {s.ids: s.trained for s in merge([first, second, other])}
    assert merged == {(1, 2, 3, 4, 5, 6): (0, 0, 1, 1, 0, 1), (1, 9, 8): (0, 0, 1)}


def test_bootstrap_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    covered = 0
    for i in range(200):
        low, high = bootstrap(rng.normal(0.3, 1.0, 60), 0.9, i)
        covered += low <= 0.3 <= high
    assert 0.82 * 200 <= covered <= 0.97 * 200


def test_an_item_whose_samples_all_failed_is_no_zero() -> None:
    rows = [
        {"policy": "a", "set": "one_turn", "item": str(i), "scores": s} for i, s in enumerate([[1.0], [1.0, 0.0], []])
    ]
    assert summarise(rows, "a", 0.95, 0)["policies"]["a"]["one_turn"]["mean"] == 0.75


def test_answers_hold_as_whole_words() -> None:
    assert (
        holds("The capital is Paris.", "paris")
        and not holds("Parisian", "paris")
        and holds("It is New  York!", "new york")
    )


def test_the_worlds_experts_always_succeed_and_splits_share_nothing() -> None:
    import random

    dealt = world.tasks(5, {"train": 150, "test": 150})
    assert all(world.expert_trajectory(t, random.Random(0))["reward"] == 1.0 for split in dealt.values() for t in split)
    keys = [{(t.opening, json.dumps(t.database)) for t in split} for split in dealt.values()]
    assert not keys[0] & keys[1] and len(keys[0]) == 150
    puzzles = world.tasks(5, {"test": 80}, world.puzzle_task)["test"]
    assert all(world.expert_trajectory(t, random.Random(0))["reward"] == 1.0 for t in puzzles)


def test_an_episode_fails_for_a_write_without_asking_and_for_a_wrong_end_state() -> None:
    import random

    task = next(t for t in world.tasks(1, {"a": 50})["a"] if t.family == "buy")
    turns = list(world.expert_turns(task, random.Random(0)))
    unasked, unfinished = world.Episode(task), world.Episode(task)
    for action in (turns[0], *turns[2:]):
        unasked.step(action)
    for action in (turns[0], turns[1], turns[3]):
        unfinished.step(action)
    assert unasked.done and not unasked.success and unasked.database == task.goal
    assert unfinished.done and not unfinished.success and not unfinished.broke_policy
    broken = world.Episode(task)
    broken.step(Action("malformed"))
    assert broken.done and not broken.success


def test_a_trajectorys_pivots_stay_together_where_that_saves_enough_and_each_is_drawn_once_an_epoch(
    trained: Path,
) -> None:
    from nemo_pivotrl.pivotrl.train import State, _draw, together

    (candidate, *_) = candidates_of(trained / "pivots.jsonl", "train")
    lengths = {"a": [60, 30, 60], "b": [5, 100], "c": [40]}
    owners = ["a", "b", "a", "c", "b", "a"]
    rows = [
        {"candidate_id": f"{o}{i}", "trajectory_id": o, "tokens_prompt": lengths[o].pop()} for i, o in enumerate(owners)
    ]

    def growing(row: dict[str, Any]) -> State:
        return State(candidate, list(range(row["tokens_prompt"])))

    def rewritten(row: dict[str, Any]) -> State:
        return State(candidate, [int(row["candidate_id"][1:]), *range(row["tokens_prompt"] - 1)])

    alone = [row["candidate_id"] for row in rows]
    assert together(rows, 1.0, growing, 0) == alone and together(rows, 0.0, rewritten, 0) == alone
    assert together(rows, 0.5, growing, 0) == [*("trajectory a", "b1", "trajectory a", "c3", "b4", "trajectory a")]
    recipe = recipe_at(trained, "grpo.num_prompts_per_step=2")
    for setting in (0.5, 1.0):
        units = together(rows, setting, growing, 0)
        for epoch in range(4):
            drawn = [row for step in range(3) for row in _draw(rows, units, 3 * epoch + step + 1, recipe)]
            names = [row["trajectory_id"] for row in drawn]
            assert sorted(row["candidate_id"] for row in drawn) == sorted(alone)
            if setting == 0.5:
                assert names.index("a") + 2 == len(names) - 1 - names[::-1].index("a")
    assert recipe.grpo.keep_together == 0.5


def test_training_renders_what_it_draws_and_measures_and_evaluation_what_it_scores(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemo_pivotrl.data.chat_template import Chat
    from nemo_pivotrl.pivotrl.train import MEASURED

    real, rendered = Chat.prompt_ids, list[int]()
    monkeypatch.setattr(Chat, "prompt_ids", lambda *args: [rendered.append(1), real(*args)][1])
    small = ["grpo.num_prompts_per_step=2", "grpo.val_candidates=3", "grpo.name=short", "grpo.max_num_steps=1"]
    train(recipe_at(run_dir, *small))
    assert 2 + 3 < len(rendered) <= 2 + 3 + 2 * MEASURED < len(list(read_rows(run_dir / "pivots.jsonl")))
    rendered.clear()
    recipe = recipe_at(run_dir, "evaluate.one_turn_candidates=4", "evaluate.simulator=none", "evaluate.retention=none")
    alone = dataclasses.replace(recipe.evaluate, policies={"base": str(run_dir / "start/policy")})
    evaluate(dataclasses.replace(recipe, evaluate=alone), True)
    assert len(rendered) == 4


def test_sft_renders_the_same_sequences_in_processes_as_here(trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from nemo_pivotrl.components.rollout import load_chat
    from nemo_pivotrl.pivotrl.sft import _sequences

    here, there = recipe_at(trained), recipe_at(trained, "executor=processes", "workers=1")
    chat, source = load_chat(here.policy), trained / "candidates.jsonl"
    found = _sequences(here, here.policy, chat, source)
    assert _sequences(there, here.policy, chat, source) == found and len(found) > 10
    assert "render: 100%" in capfd.readouterr().err
