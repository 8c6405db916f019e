"""view: the prompt of a turn, rendered as the policy read it, or the reason why it is not."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from support.recipes import ROOT
from support.view_run import make

from nemo_pivotrl.components.rollout import load_chat
from nemo_pivotrl.config import ChatSettings, Policy, Recipe
from nemo_pivotrl.core.artifacts import read_header, read_rows, write_artefact
from nemo_pivotrl.report import view_prompt
from nemo_pivotrl.report.view_prompt import policy_of
from nemo_pivotrl.report.view_server import create_app

MODEL = str(ROOT / "nemo_pivotrl/demo/models/start-policy")
POLICY = Policy(model_name=MODEL, chat=ChatSettings(accept_dropped=("tools",)), template_kwargs={"depth": {"x": 1}})


def run_with(folder: Path, policy: Policy | None, **header: str) -> TestClient:
    """A run whose profile tells this policy, or nothing; `header`: fields that are others than the policy's."""
    path = make(folder) / "profiles.jsonl"
    rows, found = list(read_rows(path)), read_header(path, "profiles")
    if policy is not None:
        chat = load_chat(policy)
        made = {"tokenizer": chat.fingerprint, "chat_template": chat.template_digest} | header
        found = replace(found, settings=Recipe(policy=policy).told("policy", "verifier"), **made)
    write_artefact(path, found, rows)
    return TestClient(create_app(folder), base_url="http://127.0.0.1")  # type: ignore[arg-type]


def asked(client: TestClient, name: str = "t1:3") -> Any:
    return client.get("/api/prompt_text", params={"id": name}).json()


def test_a_turns_prompt_is_the_text_that_the_policy_reads_with_its_tokens(tmp_path: Path) -> None:
    client, chat = run_with(tmp_path, POLICY), load_chat(POLICY)
    state = [{"role": "user", "content": "Find the BLUE chair"}]
    assert asked(client, "t1:1")["text"] == chat.render(state, [], True)
    longer = asked(client)
    assert "Find the BLUE chair" in longer["text"] and "found 0" in longer["text"] and longer["problem"] == ""
    assert longer["tokens"] == len(chat.encode(longer["text"])) and longer["characters"] == len(longer["text"])
    assert client.get("/api/prompt_text", params={"id": "no"}).status_code == 404


def test_a_long_prompt_is_sent_as_its_beginning_and_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = run_with(tmp_path, POLICY)
    whole = asked(client)["text"]
    monkeypatch.setattr(view_prompt, "SHOWN", 20)
    found = asked(client)
    assert found["text"] == f"{whole[:10]}\n\n[{len(whole) - 20} characters left out here]\n\n{whole[-10:]}"
    assert found["characters"] == len(whole)


@pytest.mark.parametrize(
    ("policy", "header", "why"),
    [
        (None, {}, "did not name its tokenizer's folder"),
        (replace(POLICY, chat=ChatSettings()), {}, "tools, left out of the prompt by the template"),
        (POLICY, {"tokenizer": "of another"}, "are others than when it was profiled"),
        (POLICY, {"chat_template": "of another"}, "are others than when it was profiled"),
    ],
)
def test_a_prompt_that_cannot_be_shown_says_why(
    policy: Policy | None, header: dict[str, str], why: str, tmp_path: Path
) -> None:
    assert why in asked(run_with(tmp_path, policy, **header))["problem"]


def test_a_policy_within_the_run_is_found_wherever_the_run_lies(tmp_path: Path) -> None:
    path = make(tmp_path / "here") / "profiles.jsonl"
    shutil.copytree(MODEL, tmp_path / "here/start/policy")
    policy = replace(POLICY, model_name=str(tmp_path / "here/start/policy"))
    told = Recipe(policy=policy, run_dir=str(tmp_path / "here")).told("policy")
    assert told["policy.model_name"] == "${run_dir}/start/policy"
    chat, rows = load_chat(policy), list(read_rows(path))
    made = {"tokenizer": chat.fingerprint, "chat_template": chat.template_digest, "settings": told}
    write_artefact(path, replace(read_header(path, "profiles"), **made), rows)
    moved = shutil.move(tmp_path / "here", tmp_path / "there")
    client = TestClient(create_app(Path(moved)), base_url="http://127.0.0.1")  # type: ignore[arg-type]
    assert "Find the BLUE chair" in asked(client)["text"]


def test_a_policy_that_lies_elsewhere_is_named(tmp_path: Path) -> None:
    path = make(tmp_path) / "profiles.jsonl"
    rows, found = list(read_rows(path)), read_header(path, "profiles")
    write_artefact(path, replace(found, settings={"policy.model_name": "gone/away"}), rows)
    client = TestClient(create_app(tmp_path), base_url="http://127.0.0.1")  # type: ignore[arg-type]
    assert "gone/away is not here" in asked(client)["problem"]


def test_the_policy_is_read_back_out_of_what_a_header_tells() -> None:
    assert policy_of(Recipe(policy=POLICY).told("policy")) == POLICY
    assert policy_of({}).model_name == ""
