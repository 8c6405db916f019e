"""`serve-verifier` against clients that are slow, large, hostile or gone: on a real socket, with short deadlines."""

import asyncio
import http.client
import json
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from support.processes import wait_for

from nemo_pivotrl import cli, config
from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.tools import gym_server, http_guard, http_server
from nemo_pivotrl.tools.gym_server import aggregate, create_app, judge
from nemo_pivotrl.tools.http_guard import names_of, read_token
from nemo_pivotrl.verifiers.loading import load_verifier

TOKEN = "a-long-random-token-0123456789"
SECRET = {"Authorization": f"Bearer {TOKEN}"}


def row(**more: Any) -> dict[str, Any]:
    call = {"type": "function_call", "name": "bash", "arguments": json.dumps({"command": "ls"}), "call_id": "c"}
    return {
        "responses_create_params": {"input": [{"role": "user", "content": "go"}], "tools": []},
        "expected_action": {"type": "function_call", "name": "bash", "arguments": json.dumps({"command": "ls"})},
        "response": {"id": "r", "object": "response", "output": [{**call, "status": "completed"}]},
        **more,
    }


class Running:
    """A server in a thread, on a port of its own."""

    def __init__(self, token: str, names: frozenset[str] = frozenset(("localhost",))):
        self.app = create_app(config.Verifier(name="swe"), token, names)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        settings = uvicorn.Config(
            self.app, http=http_server.Connection, ws="none", log_level="warning", timeout_keep_alive=1
        )
        self.server = uvicorn.Server(settings)
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],))
        self.thread.start()
        while not self.server.started:
            time.sleep(0.005)

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, **more: Any
    ) -> tuple[int, Any]:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        kind = {"Content-Type": "application/json"} if data is not None else {}
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)) as connection:
            connection.request(method, path, data, kind | (headers or {}), **more)
            found = connection.getresponse()
            text = found.read()
            assert found.headers["Content-Type"] == "application/json"
            return found.status, json.loads(text, parse_constant=pytest.fail)

    def dial(self) -> socket.socket:
        made = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        return made

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)


@pytest.fixture
def deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "HEADER_S", 0.3)
    monkeypatch.setattr(http_server, "WRITE_S", 0.3)
    monkeypatch.setattr(http_guard, "BODY_S", 0.4)


@pytest.fixture
def running(deadlines: None) -> Iterator[Running]:
    made = Running("")
    yield made
    made.close()


@pytest.fixture
def guarded() -> Iterator[Running]:
    made = Running(TOKEN, names_of("127.0.0.1", ["verifier.example"]))
    yield made
    made.close()


# ---- who may ask ----


def test_a_token_is_wanted_on_every_path_but_health(guarded: Running) -> None:
    assert guarded.ask("GET", "/health")[0] == 200
    for path in ("/verify", "/aggregate_metrics", "/seed_session", "/close_session"):
        for headers in (
            {},
            {"Authorization": TOKEN},
            {"Authorization": "Bearer x"},
            {"Authorization": f"Basic {TOKEN}"},
        ):
            status, said = guarded.ask("POST", path, {}, headers)
            assert status == 401 and TOKEN not in str(said)
    assert guarded.ask("GET", "/reverify_mode")[0] == 401
    assert guarded.ask("POST", "/verify", row(), SECRET)[1]["reward"] == 1.0
    assert guarded.ask("POST", "/verify", row(), {"authorization": f"bearer  {TOKEN}"})[0] == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200), ("LOCALHOST:80", 200), ("127.0.0.1", 200), ("127.0.0.1:99", 200), ("[::1]:9", 200),
        ("10.0.0.7:8911", 200), ("verifier.example:8911", 200), ("evil.example", 400), ("evil.example:8911", 400),
        ("localhost.evil.example", 400), ("127.0.0.1.evil.example", 400), ("", 400), ("[evil", 400), ("127.0.0.1@evil", 400),
    ],
)  # fmt: skip
def test_the_host_header_names_this_server(guarded: Running, host: str, status: int) -> None:
    assert guarded.ask("POST", "/verify", row(), {**SECRET, "Host": host})[0] == status
    assert guarded.ask("GET", "/health", headers={"Host": host})[0] == status


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "json"])
def test_a_body_that_a_page_may_send_without_asking_is_refused(running: Running, kind: str) -> None:
    assert running.ask("POST", "/verify", row(), {"Content-Type": kind})[0] == 415
    assert running.ask("POST", "/verify", row(), {"Content-Type": "application/JSON; charset=utf-8"})[0] == 200


def test_a_page_of_another_origin_is_refused_and_an_empty_body_has_no_type(running: Running) -> None:
    for origin in ("https://evil.example", "null", "http://localhost.evil.example:80", "file://"):
        assert running.ask("POST", "/verify", row(), {"Origin": origin})[0] == 403
        assert running.ask("POST", "/seed_session", None, {"Origin": origin})[0] == 403
    assert running.ask("POST", "/verify", row(), {"Origin": f"http://localhost:{running.port}"})[0] == 200
    assert running.ask("POST", "/seed_session")[0] == 200


def test_a_token_comes_from_a_file_or_the_environment_and_is_wanted_off_the_loopback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(http_guard.TOKEN, raising=False)
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    assert read_token(str(file), "0.0.0.0") == TOKEN
    for host in ("127.0.0.1", "localhost", "::1", "127.8.8.8"):
        assert read_token(None, host) == ""
    for host in ("0.0.0.0", "::", "10.0.0.1", "node7", ""):
        with pytest.raises(InputError, match="without a token"):
            read_token(None, host)
    monkeypatch.setenv(http_guard.TOKEN, TOKEN)
    assert read_token(None, "0.0.0.0") == TOKEN
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for content in ("", "brief", "two words in it, long enough", "tab\tin it, long enough 0123"):
        file.write_text(content)
        with pytest.raises(InputError) as caught:
            read_token(str(file), "127.0.0.1")
        assert content == "" or content not in str(caught.value)
    for path in (fifo, tmp_path / "away", tmp_path):
        with pytest.raises(InputError, match="--token-file"):
            read_token(str(path), "127.0.0.1")
    assert stat.S_ISFIFO(fifo.stat().st_mode)


def test_the_command_refuses_an_open_address_before_it_listens(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(http_guard.TOKEN, raising=False)
    assert cli.main(["serve-verifier", "--verifier", "swe", "--host", "0.0.0.0"]) == 2
    assert "without a token" in capsys.readouterr().err


# ---- what is read, and for how long ----


def ends(connection: socket.socket) -> bytes:
    """What still comes until the other side closes."""
    found = b""
    try:
        while block := connection.recv(65536):
            found += block
    except ConnectionResetError:
        pass
    return found


HEAD = b"POST /verify HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize("sent", [b"", b"G", HEAD, HEAD + b"X-More: "])
def test_headers_that_do_not_come_end_the_connection(running: Running, sent: bytes) -> None:
    with running.dial() as connection:
        connection.sendall(sent)
        assert ends(connection) == b""


def test_headers_that_drip_end_the_connection_also_after_a_request(running: Running) -> None:
    with running.dial() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in connection.recv(65536)
        begun = time.monotonic()
        try:
            for byte in HEAD * 100:
                connection.sendall(bytes([byte]))
                time.sleep(0.02)
        except OSError:
            pass
        assert time.monotonic() - begun < 10
    assert running.ask("GET", "/health")[0] == 200


def test_a_body_that_drips_is_a_408(running: Running) -> None:
    with running.dial() as connection:
        connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\n")
        for _ in range(5):
            connection.sendall(b" ")
        assert b"408" in ends(connection).splitlines()[0]


def test_a_client_that_does_not_read_is_let_go(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_guard, "BODY_S", 30.0)
    body = json.dumps(row(padding="x" * (24 << 20))).encode()
    with running.dial() as connection:
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        # the connection goes first, and its request's bytes are given back once the task that answers has been told
        wait_for(lambda: not running.server.server_state.connections and running.app._held == 0, "the end of both")


def test_too_much_is_refused_before_it_is_read_and_while_it_is(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_guard, "MAX_BODY", 1000)
    assert running.ask("POST", "/verify", b" " * 1001)[0] == 413
    chunks = (b" " * 300 for _ in range(10))
    with closing(http.client.HTTPConnection("127.0.0.1", running.port, timeout=20)) as connection:
        headers = {"Content-Type": "application/json"}
        with suppress(OSError):
            connection.request("POST", "/verify", chunks, headers, encode_chunked=True)
        assert connection.getresponse().status == 413
    assert running.app._held == 0


def test_all_bodies_together_are_bounded(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_guard, "BODIES", 1500)
    half = HEAD + b"Content-Length: 1000\r\n\r\n" + b" " * 999
    with running.dial() as first, running.dial() as second:
        first.sendall(half)
        while running.app._held < 999:
            time.sleep(0.005)
        second.sendall(half)
        answers = {ends(c).split(b" ", 2)[1] for c in (first, second)}
    assert answers <= {b"408", b"503"} and running.app._held == 0
    assert running.ask("POST", "/verify", b"{}")[0] == 422


@pytest.mark.parametrize(
    "sent", [HEAD + b"Content-Length: 1000\r\n\r\n{", HEAD, b"\x00\xff\r\n\r\n", HEAD * 3 + b"\r\n"]
)
def test_a_client_that_goes_is_no_news(running: Running, sent: bytes, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(5):
        with running.dial() as connection:
            connection.sendall(sent)
    assert running.ask("GET", "/health")[0] == 200
    wait_for(lambda: running.app._held == 0, "bytes given back")
    assert "Traceback" not in caplog.text and not [r for r in caplog.records if r.levelname == "ERROR"]


# ---- what is answered ----


def verdict(raw: Any) -> tuple[int, Any]:
    body = raw if isinstance(raw, bytes) else json.dumps(raw).encode()
    found = judge(load_verifier(config.Verifier(name="swe")), "swe", body)
    return found.status, json.loads(found.body, parse_constant=pytest.fail)


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b'{"a": NaN}', 422),
        (b'{"a": -Infinity}', 422),
        (json.dumps(row(a=1))[:-1].encode() + b', "b": 1e999}', 422),
        (json.dumps(row(a=1))[:-1].encode() + b', "b": ' + b"9" * 5000 + b"}", 422),
        (b'{"a": "\\ud800"}', 400),
        (b'{"\\uDC00": 1}', 400),
        (row(note="\ud83d"), 400),
        (b'{"a": "\xed\xa0\x80"}', 422),
        (row(note="\U0001f600 \\ud800"), 200),  # a whole pair, and a text about half of one
        (b"[" * 100_000, 422),
        (json.dumps(row(a=1))[:-1].encode() + b', "b": ' + b"[" * 900 + b"]" * 900 + b"}", 200),
        (b"", 422),
        (b"nul", 422),
        (b"\xff\xfe", 422),
    ],
)
def test_an_answer_is_always_json(raw: Any, status: int) -> None:
    assert verdict(raw)[0] == status


@pytest.mark.parametrize(
    ("rewards", "status"),
    [
        ("[0.5, 1]", 200), ("[]", 200), ("[NaN]", 422), ("[1e999]", 422), ("[-1e999, 1e999]", 422),
        ("[1.7e308, 1.7e308]", 422), ('["nan"]', 422), ('["inf"]', 422), ("[null]", 422), ("[1" + "0" * 400 + "]", 422),
    ],
)  # fmt: skip
def test_metrics_are_numbers(rewards: str, status: int) -> None:
    rows = ",".join(f'{{"reward": {r.strip()}}}' for r in rewards[1:-1].split(",") if r.strip())
    found = aggregate(f'{{"verify_responses": [{rows}]}}'.encode())
    assert found.status == status
    json.loads(found.body, parse_constant=pytest.fail)
    assert aggregate(b'{"verify_responses": 5}').status == aggregate(b'{"verify_responses": [5]}').status == 422


def test_a_path_that_is_none_and_a_fault_of_ours_are_json(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    assert running.ask("GET", "/nowhere")[0] == 404 and running.ask("GET", "/verify")[0] == 405
    monkeypatch.setattr(gym_server, "verdicts", lambda *_: 1 / 0)
    status, said = running.ask("POST", "/verify", row())
    assert status == 500 and "ZeroDivisionError" in str(said) and "Traceback" not in str(said)


def test_a_large_row_is_judged_and_does_not_hold_the_others_up() -> None:
    server = Running("")
    try:
        large = json.dumps(row(padding=[[0.5, "x"]] * (1 << 18))).encode()
        assert server.ask("POST", "/verify", json.dumps(row(padding="x" * (2 << 20))).encode())[1]["reward"] == 1.0
        statuses: list[int] = []
        jobs = [
            threading.Thread(target=lambda: statuses.append(server.ask("POST", "/verify", large)[0])) for _ in range(2)
        ]
        for job in jobs:
            job.start()
        waits = []
        while any(job.is_alive() for job in jobs):
            begun = time.perf_counter()
            assert server.ask("GET", "/health")[0] == 200
            waits.append(time.perf_counter() - begun)
        assert statuses == [200, 200] and len(waits) > 3
        assert sorted(waits)[len(waits) * 3 // 4] < 0.5  # other processes share this machine: not the last of them
    finally:
        server.close()


def test_a_large_response_is_written_in_pieces() -> None:
    app = gym_server.create_app(config.Verifier(name="exact"))
    row = json.dumps({"verify_responses": [], "pad": "x" * (3 * gym_server.PIECE)}).encode()
    sent: list[Any] = []

    parts = iter([{"type": "http.request", "body": row, "more_body": False}])

    async def receive() -> Any:
        return next(parts, None) or await asyncio.Event().wait()  # a client that stays

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"content-length", b"%d" % len(row))]
    scope = {"type": "http", "method": "POST", "path": "/verify", "query_string": b"", "root_path": ""}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gym_server, "judge", lambda *_: gym_server.Answer(200, row))
        asyncio.run(app({**scope, "headers": headers}, receive, send))
    pieces = [message["body"] for message in sent[1:]]
    assert b"".join(pieces) == row and max(map(len, pieces)) <= gym_server.PIECE
    assert dict(sent[0]["headers"])[b"content-length"] == b"%d" % len(row)
