"""view: the server's answers in JSON over a small run folder. Its page is tested in a browser (tests/view)."""

import socket
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from support.view_run import HOSTILE, make

from nemo_pivotrl.components.conclusions import TALK
from nemo_pivotrl.core.artifacts import read_header, read_rows, write_artefact
from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.report import VIEW_ADDRESS
from nemo_pivotrl.report.reasons import in_words
from nemo_pivotrl.report.view_index import listed, open_run, overview, whole_turn
from nemo_pivotrl.report.view_server import create_app, view


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    return TestClient(create_app(make(tmp_path_factory.mktemp("view") / "run")), base_url="http://127.0.0.1")  # type: ignore[arg-type]


def ask(client: TestClient, path: str, **asked: object) -> Any:
    response = client.get(f"/api/{path}", params={key: str(value) for key, value in asked.items()})
    assert response.status_code == 200, response.text
    return response.json()


def ids(client: TestClient, **asked: object) -> list[str]:
    return [row["id"] for row in ask(client, "turns", **asked)["rows"]]


def test_the_overview_counts_fates_samples_and_sets(client: TestClient) -> None:
    found = ask(client, "run")
    assert found["fates"] == {"pivot": 1, "all 0": 1, "all 1": 1}
    assert (found["turns"], found["trajectories"], found["samples"], found["truncated"]) == (3, 1, 12, 1)
    assert found["sets"] == {"pivots.jsonl": 1, "random.jsonl": 1} and found["policies"] == ["base", "pivotrl"]
    assert [check["good"] for check in found["checks"]["profile"]] == [True, False]


@pytest.mark.parametrize(
    "asked, expected",
    [
        ({}, ["t1:1", "t1:3", "t1:5"]),
        ({"fate": "all 0"}, ["t1:3"]),
        ({"low": 0.2, "high": 0.9}, ["t1:1"]),
        ({"sort": "rate", "desc": 1}, ["t1:5", "t1:1", "t1:3"]),
        ({"sort": "depth", "desc": 1, "limit": 2, "offset": 1}, ["t1:3", "t1:1"]),
        ({"q": "red CHAIR"}, ["t1:1"]),
        ({"q": 'onerror="document'}, ["t1:3"]),
        ({"in": "pivots.jsonl", "out": "random.jsonl"}, ["t1:1"]),
        ({"tool": "other"}, []),
    ],
)
def test_turns_are_filtered_sorted_searched_and_paged(
    client: TestClient, asked: dict[str, object], expected: list[str]
) -> None:
    assert ids(client, **asked) == expected


def test_a_turn_groups_its_samples_by_action_and_says_why_it_was_kept_or_dropped(client: TestClient) -> None:
    turn = ask(client, "turn", id="t1:1")
    assert [(g["count"], g["category"], g["reward"]) for g in turn["groups"]] == [
        (2, "ARGUMENT_VALUE_DIFFERENT", 0.0),
        (1, "EXPECTED_TOOL_CALL", 1.0),
        (1, "TRUNCATED", 0.0),
    ]
    assert turn["groups"][0]["detail"] == "q: the colours differ" and turn["groups"][1]["rules"] == ["letter_case"]
    assert turn["expected"]["calls"] == [{"name": "find", "arguments": '{\n "n": 1,\n "q": "blue chair"\n}'}]
    assert turn["why"].startswith("A pivot: 1 of 4") and turn["sets"] == ["pivots.jsonl"] and turn["interval"]
    lost = ask(client, "turn", id="t1:3")
    assert lost["why"].startswith("Dropped: 0 of 4") and lost["groups"][0]["action"]["content"] == HOSTILE
    assert lost["answers"]["pivotrl"]["scores"] == [0.0, 1.0]
    assert [s["id"] for s in lost["siblings"]] == ["t1:1", "t1:3", "t1:5"]


def test_a_trajectory_is_its_longest_state_with_what_is_known_of_each_turn(client: TestClient) -> None:
    found = ask(client, "trajectory", id="t1")
    assert [t["fate"] for t in found["turns"]] == ["pivot", "all 0", "all 1"] and found["turns"][0]["interval"]
    assert [item["type"] for item in found["state"]].count("function_call_output") == 2


def test_token_rewards_and_arms_are_shown_token_by_token(client: TestClient) -> None:
    assert [p["id"] for p in ask(client, "pairs", objective="kindness")["rows"]] == ["p1"]
    assert ask(client, "pair", id="p1")["chosen"] == [["#5 ", 0.9, 0.1, -0.1, -1.0], ["#6 ", 0.0, 0.0, -2.0, -2.0]]
    assert ask(client, "prompts")["rows"] == [{"prompt": 0, "asked": "why?"}]
    assert [a["arm"] for a in ask(client, "prompt", id=0)["arms"]] == ["patient", "kind 1"]


@pytest.mark.parametrize(
    "path, status",
    [
        ("/api/turn?id=nobody", 404),
        ("/api/turn", 404),
        ("/api/trajectory?id=nobody", 404),
        ("/api/turns?sort=colour", 400),
        ("/api/turns?colour=red", 400),
        ("/api/turns?low=much", 400),
        ("/api/turns?in=nowhere.jsonl", 400),
        ("/api/prompt?id=first", 400),
        ("/../profiles.jsonl", 404),
        ("/report.html", 404),
    ],
)
def test_a_question_that_cannot_be_answered_says_so(client: TestClient, path: str, status: int) -> None:
    response = client.get(path)
    assert response.status_code == status and response.text


def test_other_names_of_this_machine_and_other_pages_are_refused(client: TestClient) -> None:
    assert client.get("/api/run", headers={"host": "evil.example"}).status_code == 400
    assert client.get("/api/run", headers={"origin": "https://evil.example"}).status_code == 403


def test_every_answer_forbids_what_the_page_does_not_need(client: TestClient) -> None:
    for path in ("/", "/view.js", "/view.css", "/api/run"):
        policy = client.get(path).headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
    page = client.get("/").text + client.get("/view.js").text + client.get("/view.css").text
    assert "http://" not in page and "https://" not in page and "innerHTML" not in page


def test_a_folder_without_artefacts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no artefacts to show"):
        create_app(tmp_path)


def test_a_port_that_is_taken_is_said_before_an_address_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path / "run")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match=r"another --port"):
            view(run, taken.getsockname()[1])
    assert "http://" not in capsys.readouterr().out


def test_the_reports_links_lead_into_the_viewer_wherever_it_listens(tmp_path: Path) -> None:
    make(tmp_path / "run")
    (tmp_path / "run/report.html").write_text(f'<a href="{VIEW_ADDRESS}#/turns?fate=pivot">pivots</a>')
    served = TestClient(create_app(tmp_path / "run"), base_url="http://127.0.0.1:8801").get("/report.html").text
    assert served == '<a href="/#/turns?fate=pivot">pivots</a>'


def test_turns_without_a_hit_rate_come_last_both_ways(tmp_path: Path) -> None:
    path = make(tmp_path) / "profiles.jsonl"
    rows, header = list(read_rows(path)), read_header(path, "profiles")
    talk = rows[0] | {"candidate_id": "talk", "samples": [], "profile": rows[0]["profile"] | {"failure": TALK}}
    write_artefact(path, header, [talk, *rows])
    run = open_run(tmp_path)
    up, down = ([row["id"] for row in listed(run, {"sort": "rate", "desc": desc})["rows"]] for desc in ("", "1"))
    assert up == ["t1:3", "t1:1", "t1:5", "talk"] and down == ["t1:5", "t1:1", "t1:3", "talk"]
    assert (
        whole_turn(run, "talk")["why"].startswith("Left out: the expert talks")
        and overview(run)["fates"]["left out"] == 1
    )


def test_categories_are_words_and_a_strange_one_is_read_out() -> None:
    assert in_words("DIFFERENT_TOOL") == "It calls another tool than the expert."
    assert in_words("FINISH_MISSING_PATHS") == "Finish missing paths."
