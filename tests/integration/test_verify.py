"""`verify` and `serve-verifier`: rows of every shape in, verdicts out, in order; and a real server on the loopback."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.journals import journals_kept
from support.processes import free_port, python, serving
from support.recipes import ROOT

from nemo_pivotrl import cli
from nemo_pivotrl.config import Verifier
from nemo_pivotrl.core.artifacts import read_rows
from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.tools import verify

GOLDEN = ROOT.parent / "shared/golden"
FAMILIES = {
    "single_step": "single_step.jsonl",
    "swe": "swe_pivot.jsonl",
    "terminus": "terminus_judge_string.jsonl",
    "terminal_multi_harness": "terminal_multi_harness.jsonl",
}


def call(name: str, /, **arguments: Any) -> dict[str, Any]:
    return {"type": "function_call", "name": name, "arguments": json.dumps(arguments)}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, *content: Any) -> Path:
    path.write_text("".join((c if isinstance(c, str) else json.dumps(c)) + "\n" for c in content))
    return path


def verified(tmp_path: Path, name: str, *content: Any, more: tuple[str, ...] = ()) -> list[tuple[Any, str]]:
    source = write(tmp_path / "in.jsonl", *content)
    assert cli.main(["verify", "--verifier", name, *more, str(source), str(tmp_path / "out.jsonl")]) == 0
    return [(row["reward"], row["category"]) for row in rows(tmp_path / "out.jsonl")]


# ---- verify ----


@pytest.mark.skipif(
    not GOLDEN.exists(), reason="the recorded verdicts of the released verifiers are not on this machine"
)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_recorded_verdict_of_the_released_verifiers_is_reproduced(name: str, tmp_path: Path) -> None:
    source = GOLDEN / FAMILIES[name]
    assert cli.main(["verify", "--verifier", name, str(source), str(tmp_path / "out.jsonl")]) == 0
    recorded, found = rows(source), rows(tmp_path / "out.jsonl")
    assert len(recorded) == len(found) >= 250
    for number, (row, verdict) in enumerate(zip(recorded, found, strict=True), start=1):
        reward, category = row["verdict"]
        if reward == "EXC":  # the released server crashes
            reward, category = 0.0, "ARGUMENTS_DECODE_ERROR"
        assert (verdict["reward"], verdict["category"]) == (float(reward), category), number
        for theirs, ours in (
            ("similarity", "similarity"),
            ("target_match", "target_match"),
            ("diff_penalty", "diff_penalty"),
        ):
            if row.get(theirs) is not None:
                assert verdict["detail"][ours] == pytest.approx(row[theirs], abs=5e-5), number


def test_rows_of_every_shape_are_read(tmp_path: Path) -> None:
    item = {**call("f", x=1), "call_id": "c"}
    said = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "hi"}]}
    expected = call("f", x=1)
    assert verified(
        tmp_path,
        "single_step",
        {"expected": expected, "actual": call("f", x=1)},
        {"expected_action": expected, "response": {"output": [{"type": "reasoning", "summary": []}, said, item]}},
        {"expected": expected, "output": [said]},
        {"metadata": {"expected_action": expected}, "output": [call("f", x=2)]},
        {"expected_answer": json.dumps(expected), "actual": None},
        {"expected_action": {"type": "message", "content": "x"}, "response": {"output": [said]}},
        {"expected": expected, "config": {"parallel_tool_call_rewarding": True}, "output": [item, item]},
    ) == [
        (1.0, "EXPECTED_TOOL_CALL"),
        (1.0, "EXPECTED_TOOL_CALL"),
        (0.0, "NO_EXPECTED_TOOL_CALL"),
        (0.0, "ARGUMENT_VALUE_DIFFERENT"),
        (0.0, "NO_ACTION_FOUND"),
        (1.0, "EXPECTED_CHAT_MESSAGE_FOUND"),
        (0.0, "FUNCTION_CALL_BATCH_LENGTH_DIFFERENT"),
    ]


def test_a_recorded_config_is_for_the_verifier_it_names(tmp_path: Path) -> None:
    row = {
        "expected": call("f", x="a b"),
        "actual": call("f", x="c d"),
        "config": {"word_count_similarity_threshold": 0.0},
    }
    assert verified(tmp_path, "single_step", row) == [(1.0, "EXPECTED_TOOL_CALL")]
    named = row | {"verifier": "single_step_tool_use_with_argument_comparison"}
    assert verified(tmp_path, "tool_call", named) == [(1.0, "EXPECTED_TOOL_CALL")]
    assert verified(tmp_path, "functional", named) == [(0.0, "DIFFERENT_ARGUMENTS")]


def test_compat_and_settings_of_the_command_line_reach_the_verifier(tmp_path: Path) -> None:
    lost = {"expected": call("execute_bash", command="pytest tests"), "output": [call("execute_bash")]}
    assert verified(tmp_path, "swe", lost) == [(0.0, "target_mismatch")]
    assert verified(tmp_path, "swe_pivot", lost, more=("--compat", "0.6")) == [(1.0, "none")]
    assert verified(tmp_path, "swe", lost, more=("--set", "compat=0.5")) == [(1.0, "none")]
    assert verified(tmp_path, "swe", lost, more=("--set", "mode=tool_name")) == [(1.0, "none")]
    far = {"expected": call("f", x="a b c"), "actual": call("f", x="a x y")}
    assert verified(tmp_path, "tool_call", far) == [(1.0, "EXPECTED_TOOL_CALL")]
    more = ("--set", "word_count_similarity_threshold=0.3", "floating_point_comparison_threshold=0.1")
    assert verified(tmp_path, "single_step", far, more=more) == [(0.0, "ARGUMENT_VALUE_DIFFERENT")]
    assert verified(tmp_path, "single_step", far, more=("--set", "limits.max_chars=256")) == [
        (1.0, "EXPECTED_TOOL_CALL")
    ]
    long = {"expected": call("f", x="a"), "actual": call("f", x="a" * 300)}
    assert verified(tmp_path, "single_step", long, more=("--set", "limits.max_chars=256")) == [(0.0, "LIMIT_EXCEEDED")]
    wrong_first = {"expected": call("f", x=1), "output": [call("f", x=2), call("f", x=1)]}
    assert verified(tmp_path, "single_step", wrong_first) == [(1.0, "EXPECTED_TOOL_CALL")]
    assert verified(tmp_path, "single_step", wrong_first, more=("--compat", "0.5")) == [
        (0.0, "ARGUMENT_VALUE_DIFFERENT")
    ]


def test_a_fault_has_no_reward_and_the_verdict_names_rules_and_reason(tmp_path: Path) -> None:
    source = write(
        tmp_path / "in.jsonl",
        {"expected": {"type": "function_call", "name": "f", "arguments": "{"}, "actual": call("f")},
        {"expected": call("bash", command="ls -la"), "actual": call("bash", command="ls -a -l")},
        {"expected": call("bash", command="ls -la"), "actual": call("bash", command="ls")},
    )
    assert cli.main(["verify", "--verifier", "functional", str(source), str(tmp_path / "out.jsonl")]) == 0
    fault, same, different = rows(tmp_path / "out.jsonl")
    assert fault["reward"] is None and fault["category"] == "VERIFIER_FAULT"
    assert fault["detail"]["kind"] == "expected_arguments"
    assert same["reward"] == 1.0 and "shell_flag_clusters" in same["detail"]["rules"]
    assert different["reward"] == 0.0 and "ls -la is not ls" in different["detail"]["reason"]


def test_bad_rows_are_all_named_with_line_and_field_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"expected": call("f"), "actual": call("f")}
    source = write(
        tmp_path / "in.jsonl",
        good,
        "{not json",
        [1],
        {"expected": {"type": "function_call", "name": "f"}, "actual": call("f")},
        {"expected": call("f"), "actual": {"type": "function_call", "name": "f", "arguments": {"x": 1}}},
        {"expected": call("f")},
        {"expected": call("f"), "actual": call("f"), "threshold": "high"},
        {"expected": call("f"), "output": [3]},
        good,
    )
    out = tmp_path / "out.jsonl"
    assert cli.main(["verify", "--verifier", "single_step", str(source), str(out)]) == cli.BAD_INPUT
    said = capsys.readouterr().err
    for line, field in (
        (2, "line"),
        (3, "line"),
        (4, "expected"),
        (5, "actual"),
        (6, "output"),
        (7, "threshold"),
        (8, "output[0]"),
    ):
        assert f"in.jsonl:{line}: {field}:" in said
    assert "7 problems" in said
    assert not out.exists() and not out.with_name("out.jsonl.part").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--verifier", "functonal"], "did you mean functional?"),
        (["--verifier", "swe", "--compat", "0.4"], "use one of 0.5, 0.6, 0.7"),
        (["--verifier", "swe", "--set", "similarity_treshold=0.1"], "did you mean `similarity_threshold`"),
        (["--verifier", "swe", "--set", "limits.max_char=0.1"], "did you mean `max_chars`"),
        (["--verifier", "functional", "--set", "rules={letter_cases: true}"], "did you mean `letter_case`"),
        (["--verifier", "functional", "--set", "message=judge"], "verifier.judge"),
        (["--verifier", "functional", "--set", "message=none"], "use one of judge, exclude, any"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    source = write(tmp_path / "in.jsonl", {"expected": call("f"), "actual": call("f")})
    assert cli.main(["verify", *arguments, str(source), str(tmp_path / "out.jsonl")]) == cli.BAD_INPUT
    assert message in capsys.readouterr().err


def test_the_samples_of_a_profile_score_as_they_did(trained: Path, tmp_path: Path) -> None:
    assert (
        cli.main(["verify", "--verifier", "single_step", str(trained / "profiles.jsonl"), str(tmp_path / "o.jsonl")])
        == 0
    )
    stored = [
        (row["candidate_id"], i, sample["reward"], sample["category"])
        for row in read_rows(trained / "profiles.jsonl")
        for i, sample in enumerate(row["samples"])
    ]
    found = [(r["candidate_id"], r["sample"], r["reward"], r["category"]) for r in rows(tmp_path / "o.jsonl")]
    assert found == stored and len({s[2] for s in stored}) == 2


def test_a_killed_verify_goes_on_in_other_processes_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows_ = [{"expected": call("f", x=n % 3), "actual": call("f", x=1)} for n in range(40)]
    source, out = write(tmp_path / "in.jsonl", *rows_), tmp_path / "out.jsonl"
    monkeypatch.setattr(verify, "CHUNK", 8)
    settings = Verifier(name="single_step", compat="0.7")
    with journals_kept() as kept:
        counts = verify.verify(settings, source, out)
    assert counts == {"accepted": 13, "rejected": 27}
    whole, journal = out.read_bytes(), tmp_path / "out.jsonl.journal"
    out.unlink()
    journal.write_bytes(kept[0][: len(kept[0]) // 2])
    words = ["--executor", "processes", "--workers", "1", str(source), str(out)]
    assert cli.main(["verify", "--verifier", "single_step", *words]) == 0
    assert out.read_bytes() == whole and not journal.exists() and not (tmp_path / "ledger.jsonl").exists()
    assert verify.verify(settings, source, out) == counts, "a finished file is made again"
    journal.write_bytes(kept[0])
    with pytest.raises(InputError, match="or remove this file"):
        verify.verify(Verifier(name="exact"), source, out)
    assert out.read_bytes() == whole


def test_unreadable_rows_behind_the_first_task_are_named_and_mended_rows_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "CHUNK", 4)
    good, bad = json.dumps({"expected": call("f"), "actual": call("f")}), "{not json"
    source, out = write(tmp_path / "in.jsonl", *[good] * 9, bad, *[good] * 9, bad), tmp_path / "out.jsonl"
    with pytest.raises(InputError) as caught:
        verify.verify(Verifier(name="single_step"), source, out)
    assert [problem.line for problem in caught.value.problems] == [10, 20] and not out.exists()
    write(source, *[good] * 20)
    assert verify.verify(Verifier(name="single_step"), source, out) == {"accepted": 20}


# ---- serve-verifier ----


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    process = python("-m", "nemo_pivotrl.cli", "serve-verifier", "--verifier", "swe", "--port", str(port))
    with serving(process, url + "/health"):
        yield url


def post(url: str, body: Any) -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def gym_row(actual: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A request as NeMo-Gym's tool simulation agent sends it."""
    return {
        "responses_create_params": {"input": [{"role": "user", "content": "go"}], "tools": []},
        "expected_action": call("execute_bash", command="pytest tests -x"),
        "response": {"id": "r", "object": "response", "output": [{**actual, "call_id": "c", "status": "completed"}]},
        "uuid": "u-1",
        **more,
    }


def test_a_gym_request_comes_back_with_reward_and_measurements(server: str) -> None:
    request = gym_row(call("bash", command="pytest tests -xv"))
    status, answer = post(server + "/verify", request)
    assert status == 200 and answer["reward"] == 1.0 and answer["category"] == "none" == answer["failure_reason"]
    assert 0.9 < answer["similarity_score"] < 1.0 and answer["target_match"] is True and answer["mask_sample"] is False
    assert {key: answer[key] for key in request} == request  # Gym's agent reads the request back
    status, answer = post(server + "/verify", gym_row(call("grep", pattern="x")))
    assert (status, answer["reward"], answer["failure_reason"]) == (200, 0.0, "tool_name_mismatch")


def test_the_other_endpoints_of_a_resources_server_answer(server: str) -> None:
    assert post(server + "/seed_session", {}) == (200, {}) and post(server + "/close_session", {}) == (200, {})
    responses = [{"reward": 1.0}, {"reward": 0.0}, {"reward": 0.0, "mask_sample": True}]
    status, metrics = post(server + "/aggregate_metrics", {"verify_responses": responses})
    assert status == 200 and metrics["key_metrics"] == {"mean/reward": 0.5}
    assert metrics["agent_metrics"] == {"mean/reward": 0.5, "verified": 2, "masked": 1}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"{not json", ["body", "body"]),
        (b"[1]", ["body", "body"]),
        (gym_row(call("f"), response={}), ["body", "response", "output"]),
        (gym_row(call("f"), expected_action={"type": "function_call"}), ["body", "expected_action"]),
    ],
)
def test_a_request_that_cannot_be_read_is_422_with_the_field(server: str, body: Any, field: list[str]) -> None:
    status, answer = post(server + "/verify", body)
    assert status == 422 and answer["detail"][0]["loc"] == field
    assert post(server + "/verify", gym_row(call("bash", command="pytest tests -x")))[1]["reward"] == 1.0


def test_hostile_rollouts_get_a_verdict_and_the_server_lives(server: str) -> None:
    for text in ("[" * 100_000, '{"command": "\\ud800"}', '{"command": ' + "9" * 5000 + "}", "x" * 1_000_000):
        item = {"type": "function_call", "name": "bash", "arguments": text}
        status, answer = post(server + "/verify", gym_row(item))
        assert status == 200 and answer["reward"] == 0.0, text[:20]


def test_a_fault_is_masked_and_never_a_bare_zero() -> None:
    from nemo_pivotrl.tools.gym_server import response_fields
    from nemo_pivotrl.verifiers.base import VerifierFault

    added = response_fields("terminus", VerifierFault("judge_timeout", "no answer in 5 s"))
    assert added["mask_sample"] is True and added["instance_config"] == {"mask_sample": True}
    assert added["failure_kind"] == "judge_failed" == added["_ng_failure_class"] and "5 s" in added["failure_reason"]
    assert response_fields("swe", VerifierFault("expected_arguments", "x"))["failure_kind"] == "verifier_error"


def test_the_server_listens_on_the_loopback_unless_told() -> None:
    assert cli.parser_of("serve-verifier").parse_args(["--verifier", "swe"]).host == "127.0.0.1"
