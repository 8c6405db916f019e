"""The audit finds the known weaknesses of the released rules, stops a profile that could teach nothing, and rescore."""

import dataclasses
import gc
import importlib.util
import json
import random
import shutil
import tracemalloc
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.journals import journals_kept
from support.recipes import ROOT, recipe_at

from nemo_pivotrl import config
from nemo_pivotrl.core.artifacts import read_header, read_rows
from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.core.types import Action, Candidate, Case, ToolCall, Verdict
from nemo_pivotrl.pivotrl import verifier_audit
from nemo_pivotrl.pivotrl.audit_sample import Others
from nemo_pivotrl.pivotrl.extract import extract
from nemo_pivotrl.pivotrl.profile import profile
from nemo_pivotrl.pivotrl.rescore import rescore
from nemo_pivotrl.pivotrl.select import select_pivots
from nemo_pivotrl.pivotrl.train import train
from nemo_pivotrl.pivotrl.verifier_audit import GOLD, RIGHT, WRONG, Prober, audit, run_audit, summarise, tables
from nemo_pivotrl.verifiers import probes
from nemo_pivotrl.verifiers.base import VerifierFault
from nemo_pivotrl.verifiers.loading import load_verifier

TOOL = {
    "type": "function",
    "function": {
        "name": "bash",
        "parameters": {
            "type": "object",
            "properties": {"command": {"type": "string"}, "n": {"type": "number", "default": 1}},
        },
    },
}


def candidate(name: str, expected: Action) -> Candidate:
    return Candidate(
        name, "t", f"task of {name}", "train", 1, 0, ({"role": "user", "content": "go"},), (TOOL,), expected
    )


def bash(command: str, **more: Any) -> Action:
    return Action("calls", calls=(ToolCall("bash", json.dumps({"command": command, **more})),))


CANDIDATES = [
    candidate("a", bash("ls -la src", n=1)),
    candidate("b", bash("rm x.txt")),
    candidate("c", Action("message", "Done.")),
]


class Always:
    """Gives every action the same verdict."""

    name, version, concurrency, asks_judge = "always", "1", 1, False

    def __init__(self, reward: float):
        self.reward = reward

    def verify(self, case: Case, actual: Action) -> Verdict:
        return Verdict(self.reward, "ALWAYS")


def defects() -> ModuleType:
    spec = importlib.util.spec_from_file_location("verifier_defects", ROOT / "benchmarks/verifier_defects.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_audit_finds_every_known_weakness_of_the_released_rules_and_functional_has_none() -> None:
    rows = defects().table()
    assert len(rows) >= 20
    assert [row[0] for row in rows if not row[3]] == [] and [row[0] for row in rows if row[4]] == []


def test_probes_say_the_same_or_something_else() -> None:
    for c in CANDIDATES:
        right, wrong = list(probes.right(c.case)), list(probes.wrong(c.case))
        assert all(not probes.same_action(action, c.expected) for _, action in wrong)
        assert len({name for name, _ in wrong}) == len(wrong) or c.expected.kind == "calls"
        names = {name for name, _ in right}
        if c.candidate_id == "a":
            assert names == {
                "keys_in_another_order",
                "blank_at_the_end",
                "whole_number_as_float",
                "shell_flags_apart",
                "variable_before_a_command",
            }
        if c.candidate_id == "b":
            assert "default_spelled_out" in names and "shell_flags_apart" not in names
        if c.candidate_id == "c":
            assert names == set()


def test_a_verifier_that_takes_everything_and_one_that_takes_nothing_are_seen_through() -> None:
    recipe = config.Recipe()
    everything = run_audit(recipe, CANDIDATES, Always(1.0))
    assert (
        sorted(everything.unlosable) == ["a", "b", "c"] and not everything.unwinnable and not everything.gold_failures
    )
    nothing = run_audit(recipe, CANDIDATES, Always(0.0))
    assert sorted(nothing.unwinnable) == ["a", "b", "c"] == sorted(nothing.gold_failures) and not nothing.unlosable
    counted = summarise(everything)["by_tool"]["bash"]
    assert counted["false_accept"] == counted[WRONG] > 0 and counted["gold_failed"] == counted["right_failed"] == 0
    assert summarise(nothing)["by_tool"]["bash"]["right_failed"] == summarise(nothing)["by_tool"]["bash"][RIGHT] > 0


def test_functional_passes_its_own_audit_and_its_rules_are_counted() -> None:
    found = run_audit(config.Recipe(), CANDIDATES, load_verifier(config.Verifier(name="functional", message="any")))
    failed = [(p.side, p.name, p.detail) for name in "ab" for p in found.probes[name] if p.failed]
    assert failed == [] and found.unlosable == ["c"]
    assert summarise(found)["by_rule"]["shell_flag_clusters"] == {"accepted": 1, "accepted_wrongly": 0}


def test_a_constant_answer_that_wins_several_candidates_is_flagged_with_its_share() -> None:
    again = [candidate(f"a{i}", bash("ls -la src")) for i in range(3)]
    talk = [candidate(f"c{i}", Action("message", text)) for i, text in enumerate(("Done.", "Which day?", "No."))]
    every = [*again, candidate("b", bash("rm x.txt")), *talk]
    found = run_audit(config.Recipe(), every, load_verifier(config.Verifier(name="functional", message="any")))
    assert {k: sorted(v) for k, v in found.constants.items()} == {
        "the text 'ok'": ["c0", "c1", "c2"],
        'bash({"command": "ls -la src"})': ["a0", "a1", "a2"],
    }
    summary = summarise(found)
    assert summary["won_by_a_constant"] == ["a0", "a1", "a2", "c0", "c1", "c2"]
    assert summary["constants"]["the text 'ok'"] == pytest.approx(3 / 7)
    assert "the text 'ok' wins 42.9% of the candidates" in tables(summary)
    one_task = [dataclasses.replace(c, task_id="k") for c in every]
    assert run_audit(config.Recipe(), one_task, load_verifier(config.Verifier(name="functional"))).constants == {}
    strict = run_audit(config.Recipe(), every, load_verifier(config.Verifier(name="exact")))
    assert list(strict.constants) == ['bash({"command": "ls -la src"})'], "talk is compared there"


def test_faults_and_undeclared_tools_are_counted_and_are_no_verdicts() -> None:
    class Down(Always):
        def verify(self, case: Case, actual: Action) -> Verdict:
            raise VerifierFault("judge_timeout", "no answer")

    foreign = candidate("d", Action("calls", calls=(ToolCall("zsh", "{}"),)))
    found = run_audit(config.Recipe(), [*CANDIDATES, foreign], Down(1.0))
    assert found.undeclared == ["d"] and sorted(found.gold_failures) == ["a", "b", "c", "d"]
    summary = summarise(found)
    assert summary["faults"] == {"FAULT judge_timeout": summary["verdicts"]}
    assert all(row["false_accept"] == 0 for row in summary["by_tool"].values())


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def test_the_stage_writes_rows_and_numbers_and_the_sample_is_the_recipes(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    audit(recipe_at(run_dir, "audit.sample=7", "verifier.name=functional"))
    assert "milliseconds a verdict: p50" in capsys.readouterr().out
    listed = list(read_rows(run_dir / "audit.jsonl"))
    summary = json.loads((run_dir / "audit.json").read_text())
    assert len(listed) == 7 == summary["candidates"] and read_header(
        run_dir / "audit.jsonl", "audit"
    ).verifier.startswith("functional")
    assert summary["gold_failures"] == [] and all(row["probes"][0]["side"] == GOLD for row in listed)
    assert summary["verdicts"] == sum(len(row["probes"]) for row in listed)


def test_profile_stops_before_generating_when_the_experts_fail(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_pivotrl.backends import loading

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the policy was loaded")

    monkeypatch.setattr(loading, "load", never)
    impossible = recipe_at(
        run_dir, "verifier.settings.word_count_similarity_threshold=1.0", "profile.num_generations=9"
    )
    with pytest.raises(InputError, match=r"do not score 1 under single_step") as caught:
        profile(impossible, fresh=True)
    assert any(p.field.startswith("candidate ") for p in caught.value.problems)
    with pytest.raises(AssertionError, match="the policy was loaded"):
        profile(
            recipe_at(run_dir, "verifier.settings.word_count_similarity_threshold=1.0", "audit.before_profile=false"),
            fresh=True,
        )
    accepted = ("verifier.settings.word_count_similarity_threshold=1.0", "audit.max_gold_failures=1.0")
    with pytest.raises(AssertionError, match="the policy was loaded"):
        profile(recipe_at(run_dir, *accepted), fresh=True)


# ---- rescore ----


def test_rescoring_with_the_same_verifier_changes_nothing(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rescore(recipe_at(run_dir))
    assert ", 0 gain, 0 lose" in capsys.readouterr().out
    before, after = (list(read_rows(run_dir / name)) for name in ("profiles.jsonl", "profiles.rescored.jsonl"))
    assert before == after


def test_another_verifier_gives_another_pivot_set_which_select_and_train_follow(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = (run_dir / "profiles.jsonl").read_bytes()
    exact = ("verifier.name=exact", "select.profiles=profiles.rescored.jsonl")
    rescore(recipe_at(run_dir, *exact))
    said = capsys.readouterr().out
    assert "EXPECTED_CHAT_MESSAGE_FOUND -> DIFFERENT" in said and "pivots:" in said
    assert (run_dir / "profiles.jsonl").read_bytes() == original
    rescored = list(read_rows(run_dir / "profiles.rescored.jsonl"))
    rates = [row["pass_rate"] for row in rescored]
    assert rates != [row["pass_rate"] for row in read_rows(run_dir / "profiles.jsonl")]
    assert all(row["pass_rate"] == sum(s["reward"] for s in row["samples"]) / len(row["samples"]) for row in rescored)
    select_pivots(recipe_at(run_dir, *exact, "select.rule=random", "select.limit=4"))
    assert read_header(run_dir / "pivots.jsonl", "pivots").verifier.startswith("exact ")
    with pytest.raises(InputError, match="verifier: found 'exact"):
        train(recipe_at(run_dir))


def test_a_rescore_resumes_where_it_was_cut_and_never_writes_over_its_source(run_dir: Path) -> None:
    recipe = recipe_at(run_dir, "verifier.name=functional")
    with journals_kept() as kept:
        whole = rescore(recipe).read_bytes()
    (run_dir / "profiles.rescored.jsonl").unlink()
    (run_dir / "profiles.rescored.jsonl.journal").write_bytes(kept[0][: len(kept[0]) // 2])
    assert rescore(recipe).read_bytes() == whole
    with pytest.raises(InputError, match="a name of its own"):
        rescore(recipe_at(run_dir, "rescore.output=profiles.jsonl"))


def test_of_many_tools_the_table_shows_those_that_fail() -> None:
    def named(number: int) -> Candidate:
        tool = {"type": "function", "function": {**TOOL["function"], "name": f"tool_{number:02}"}}
        expected = Action(
            "calls", calls=(ToolCall(f"tool_{number:02}", "{}" if number == 77 else '{"command": "ls"}'),)
        )
        return dataclasses.replace(candidate(str(number), expected), tools=(tool,))

    class OneFails(Always):
        def verify(self, case: Case, action: Action) -> Verdict:
            good = action == case.expected and action.calls[0].name != "tool_77"
            return Verdict(float(good), "x")

    recipe = config.Recipe(audit=config.Audit(sample=0))
    found = run_audit(recipe, [named(i) for i in range(80)], OneFails(0.0))
    lines = tables(summarise(found)).splitlines()
    assert lines[1].startswith("tool_77") and "... and 40 more tools: all are in audit.json" in lines


# ---- on the map ----


def test_an_audit_goes_on_from_its_journal_in_other_processes_to_the_same_bytes(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_at(run_dir, "audit.sample=0")
    with journals_kept() as kept:
        whole = audit(recipe).read_bytes(), (run_dir / "audit.json").read_bytes()
    for name in ("audit.jsonl", "audit.json"):
        (run_dir / name).unlink()
    (run_dir / "audit.jsonl.journal").write_bytes(kept[0][: len(kept[0]) // 2])
    there = recipe_at(run_dir, "audit.sample=0", "executor=processes")
    assert (audit(there).read_bytes(), (run_dir / "audit.json").read_bytes()) == whole
    entry = json.loads((run_dir / "ledger.jsonl").read_text().splitlines()[-1])
    assert 0 < entry["verdicts"] < json.loads(whole[1])["verdicts"], "what is there is not done again"
    capsys.readouterr()


def test_a_finished_audit_is_told_again_and_one_of_another_verifier_makes_way(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told() -> str:
        return capsys.readouterr().out.partition("\ntool ")[2]

    path, first = run_dir / "audit.jsonl", recipe_at(run_dir, "audit.sample=7")
    whole = audit(first).read_bytes()
    said = told()
    with monkeypatch.context() as patch:
        patch.setattr(Prober, "__call__", None)
        assert audit(first) == path and told() == said != ""
    audit(recipe_at(run_dir, "audit.sample=7", "verifier.name=functional"))
    assert read_header(path, "audit").verifier.startswith("functional")
    (run_dir / "audit.json").unlink()
    audit(recipe_at(run_dir, "audit.sample=7", "verifier.name=functional"))
    assert (run_dir / "audit.json").exists()
    assert audit(first).read_bytes() == whole


def test_a_summary_is_never_that_of_another_audit(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the two files, the audit is not taken for finished."""

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    audit(recipe_at(run_dir, "audit.sample=7"))
    monkeypatch.setattr(verifier_audit, "write_artefact", killed)
    with pytest.raises(KeyboardInterrupt):
        audit(recipe_at(run_dir, "audit.sample=9"), fresh=True)
    assert not (run_dir / "audit.jsonl").exists() and (run_dir / "audit.jsonl.journal").exists()


def test_the_first_others_are_those_of_all_candidates_in_the_order_of_their_hashes() -> None:
    """Against all of them kept and sorted. Keeping too few actions, or too few of one, shows where one action is very common."""
    draw = random.Random(0)
    for size, kinds in [(1, 2), (2, 3), (3, 3), (3, 40), (0, 5)]:
        seen = [
            (f"{draw.randrange(10**9):09d}", bash(f"run {min(draw.randrange(kinds), draw.randrange(kinds))}"))
            for _ in range(200)
        ]
        kept = Others(size)
        for key, action in seen:
            kept.add(key, action)
        ordered = [action for _, action in sorted(seen, key=lambda entry: entry[0])]
        assert kept.first() == ordered[0]
        for number in range(kinds + 1):
            mine = bash(f"run {number}")
            assert list(kept.of(mine))[:size] == [a for a in ordered if a != mine][:size]


def test_the_commonest_actions_are_those_of_a_count_of_all() -> None:
    draw = random.Random(1)
    for size, kinds in [(1, 3), (3, 4), (3, 50), (3, 10_000)]:
        seen = [bash(f"run {min(draw.randrange(kinds), draw.randrange(kinds))}") for _ in range(300)]
        kept = probes.Commonest(size)
        for action in seen:
            kept.add(action)
        assert kept.found() == Counter(seen).most_common(size) and kept.total() == 300


@pytest.mark.parametrize("sample", [20, 0])
def test_an_audit_of_more_candidates_takes_no_more_memory(tmp_path: Path, sample: int) -> None:
    """States of 20 KB each: 120 of them, held, would be 2.4 MB more than 12."""

    def peak(count: int) -> int:
        folder = tmp_path / f"{sample}-{count}"
        folder.mkdir()
        call = {"id": "c", "type": "function", "function": {"name": "bash", "arguments": '{"command": "ls"}'}}
        rows = (
            {
                "trajectory_id": f"t{n}",
                "task_id": f"k{n}",
                "messages": [
                    {"role": "user", "content": f"{n} " * 5_000},
                    {"role": "assistant", "content": "", "tool_calls": [call]},
                ],
                "tools": [TOOL],
            }
            for n in range(count)
        )
        (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = config.Recipe(
            run_dir=str(folder),
            extract=config.Extract(trajectories=(str(folder / "in.jsonl"),), near_duplicate=1.0),
            audit=config.Audit(sample=sample),
        )
        extract(recipe)
        gc.collect()
        tracemalloc.start()
        audit(recipe)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(2)  # what is imported and compiled at first use
    assert peak(120) - peak(12) < 1_200_000
