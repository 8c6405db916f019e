"""`serve-guided` over real HTTP: what OpenAI's clients send and read, streamed and whole, against the generator itself."""

import dataclasses
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from hypothesis import given, strategies as st
from test_guided import TOKENIZER, VOCAB, decode_recipe, model

from nemo_pivotrl import cli
from nemo_pivotrl.backends.reference.guided import GuidedGenerator, Steering
from nemo_pivotrl.config.load import load_recipe
from nemo_pivotrl.data.chat_template import Chat
from nemo_pivotrl.llmdoctor.decode import load
from nemo_pivotrl.tools.guided_batches import Batches, Busy, Growing, Job, Piece

GREEDY = {"temperature": 0, "max_tokens": 10}
PROMPT = "book a flight to oslo"
MESSAGES = [{"role": "user", "content": "cancel 12 tickets"}]
BETA = {"kind": 0.8, "brief": 0.5}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("served")
    made = {"patient": model(1, layers=2, extra=8), "kind": model(2, extra=3), "brief": model(3, kind="qwen3")}
    for name, one in made.items():
        one.save_pretrained(root / name)
        TOKENIZER.save_pretrained(root / name)
    path = decode_recipe(root, root / "recipe", max_new_tokens=24)
    content = json.loads(Path(path).read_text()) | {"serve_guided": {"max_body_bytes": 20000, "max_batch": 4}}
    Path(path).write_text(json.dumps(content | {"num_threads": 1}))
    return path


@pytest.fixture(scope="module")
def truth(recipe: str) -> GuidedGenerator:
    return load(load_recipe(recipe))[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def server(recipe: str) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "nemo_pivotrl.cli", "serve-guided", recipe, "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    url = f"http://127.0.0.1:{port}/v1"
    try:
        for _ in range(400):
            try:
                urllib.request.urlopen(url + "/models", timeout=1).close()
                break
            except (urllib.error.URLError, ConnectionError):
                assert process.poll() is None, process.stderr.read() if process.stderr else ""
                time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.wait(20)
        if process.stderr:
            assert b"Traceback" not in process.stderr.read()
            process.stderr.close()


def post(url: str, body: Any) -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def answered(url: str, **body: Any) -> dict[str, Any]:
    status, answer = post(url, body)
    assert status == 200, answer
    return dict(answer)


def streamed(url: str, **body: Any) -> list[dict[str, Any]]:
    request = urllib.request.Request(url, json.dumps(body | {"stream": True}).encode())
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [line.strip() for line in answer if line.strip()]
    assert all(e.startswith(b"data: ") for e in events) and events[-1] == b"data: [DONE]"
    return [json.loads(e[6:]) for e in events[:-1]]


def ids(text: str) -> list[int]:
    return list(TOKENIZER.encode(text))


def expected(truth: GuidedGenerator, prompt: Sequence[int], **request: Any) -> str:
    settings = {"beta": BETA, "temperature": 0, "max_new_tokens": 10} | request
    (answer,) = truth.generate([prompt], Steering(**settings))
    cut = answer.token_ids[:-1] if answer.finish_reason == "stop" else answer.token_ids
    return str(TOKENIZER.decode(list(cut)))


# ---- answers ----


def test_the_model_and_its_doctors_are_listed(server: str) -> None:
    with urllib.request.urlopen(server + "/models", timeout=5) as answer:
        (listed,) = json.load(answer)["data"]
    assert (listed["id"], listed["object"], listed["doctors"]) == ("guided", "model", ["kind", "brief"])


def test_a_completion_is_the_generators_answer(server: str, truth: GuidedGenerator) -> None:
    answer = answered(server + "/completions", model="guided", prompt=PROMPT, **GREEDY)
    (choice,) = answer["choices"]
    assert choice["text"] == expected(truth, ids(PROMPT)) and answer["object"] == "text_completion"
    assert choice["finish_reason"] == "length" and choice["logprobs"] is None
    assert choice["guidance"]["kl"] > 0 and 0 < choice["guidance"]["changed"] <= 1
    n = len(ids(PROMPT))
    assert answer["usage"] == {"prompt_tokens": n, "completion_tokens": 10, "total_tokens": n + 10}
    by_ids = answered(server + "/completions", prompt=ids(PROMPT), **GREEDY)
    several = answered(server + "/completions", prompt=[PROMPT, "fox"], **GREEDY)
    assert by_ids["choices"][0]["text"] == choice["text"] == several["choices"][0]["text"]
    assert several["choices"][1]["text"] == expected(truth, ids("fox")) and several["choices"][1]["index"] == 1


def test_a_chat_completion_goes_through_the_template(server: str, truth: GuidedGenerator) -> None:
    answer = answered(server + "/chat/completions", messages=MESSAGES, temperature=0, max_completion_tokens=10)
    (choice,) = answer["choices"]
    rendered = Chat(TOKENIZER).prompt_ids(MESSAGES, [])
    assert choice["message"] == {"role": "assistant", "content": expected(truth, rendered)}
    assert answer["object"] == "chat.completion" and answer["usage"]["prompt_tokens"] == len(rendered)


def test_a_stream_adds_up_to_the_whole_answer(server: str, truth: GuidedGenerator) -> None:
    whole = expected(truth, ids(PROMPT))
    events = streamed(server + "/completions", prompt=PROMPT, stream_options={"include_usage": True}, **GREEDY)
    assert "".join(c["text"] for e in events for c in e["choices"]) == whole and len(events) > 5
    assert len({e["id"] for e in events}) == 1 and events[-1]["usage"]["completion_tokens"] == 10
    assert [c["finish_reason"] for e in events for c in e["choices"] if c["finish_reason"]] == ["length"]
    rendered = Chat(TOKENIZER).prompt_ids(MESSAGES, [])
    events = streamed(server + "/chat/completions", messages=MESSAGES, n=2, **GREEDY)
    assert {e["object"] for e in events} == {"chat.completion.chunk"}
    for index in (0, 1):
        deltas = [c["delta"] for e in events for c in e["choices"] if c["index"] == index]
        assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
        assert "".join(d.get("content", "") for d in deltas) == expected(truth, rendered)


def test_weights_in_the_body_replace_the_recipes(server: str, truth: GuidedGenerator) -> None:
    def text(**guidance: Any) -> tuple[str, float]:
        (choice,) = answered(server + "/completions", prompt=PROMPT, guidance=guidance, **GREEDY)["choices"]
        return choice["text"], choice["guidance"]["kl"]

    assert text(beta={"kind": 0, "brief": 0}) == (expected(truth, ids(PROMPT), beta={}), 0)
    assert text(alpha=0.5, beta={"kind": -1.5})[0] == expected(
        truth, ids(PROMPT), alpha=0.5, beta={"kind": -1.5, "brief": 0.5}
    )
    assert len({text()[0], text(beta={"kind": 0, "brief": 0})[0], text(alpha=0.5, beta={"kind": -1.5})[0]}) == 3


def test_seeds_repeat_choices_and_n_choices_differ(server: str, truth: GuidedGenerator) -> None:
    sampled = {"prompt": PROMPT, "max_tokens": 12, "n": 3, "seed": 7, "temperature": 0.9, "top_p": 0.95, "top_k": 50}
    first, again = ([c["text"] for c in answered(server + "/completions", **sampled)["choices"]] for _ in range(2))
    assert first == again and len(set(first)) == 3
    request = {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "max_new_tokens": 12}
    assert first == [expected(truth, ids(PROMPT), seed=7 + i, **request) for i in range(3)]
    unseeded = {k: v for k, v in sampled.items() if k != "seed"}
    assert [c["text"] for c in answered(server + "/completions", **unseeded)["choices"]] != first


def test_log_probabilities_are_the_mixtures(server: str, truth: GuidedGenerator) -> None:
    (answer,) = truth.generate([ids(PROMPT)], Steering(beta=BETA, temperature=0, max_new_tokens=6, top=2))
    asked = {"prompt": PROMPT, "temperature": 0, "max_tokens": 6}
    found = answered(server + "/completions", logprobs=2, **asked)["choices"][0]["logprobs"]
    assert found["token_logprobs"] == pytest.approx([t.mixed_log_prob for t in answer.tokens], abs=1e-4)
    assert found["tokens"] == [TOKENIZER.decode([i]) for i in answer.token_ids]
    assert found["text_offset"] == [len("".join(found["tokens"][:i])) for i in range(6)]
    assert all(
        max(top.values()) == pytest.approx(lp)
        for top, lp in zip(found["top_logprobs"], found["token_logprobs"], strict=True)
    )
    events = streamed(server + "/completions", logprobs=0, **asked)
    parts = [c["logprobs"] for e in events for c in e["choices"] if c["logprobs"]]
    assert [p["tokens"][0] for p in parts] == found["tokens"]
    assert [p["text_offset"][0] for p in parts] == found["text_offset"] and parts[0]["top_logprobs"] == [{}]
    chat = {"messages": MESSAGES, "temperature": 0, "max_tokens": 3, "logprobs": True, "top_logprobs": 2}
    content = answered(server + "/chat/completions", **chat)["choices"][0]["logprobs"]["content"]
    assert len(content) == 3 and all(len(c["top_logprobs"]) == 2 for c in content)
    assert content[0]["bytes"] == list(content[0]["token"].encode())


def test_a_stop_string_ends_the_answer_before_it_and_is_never_shown(server: str, truth: GuidedGenerator) -> None:
    whole = expected(truth, ids(PROMPT), max_new_tokens=20)
    stop = whole[9:13]
    asked = {"prompt": PROMPT, "temperature": 0, "max_tokens": 20}
    answer = answered(server + "/completions", stop=[stop, "never there"], **asked)
    cut = whole[: whole.find(stop)]
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == (cut, "stop")
    assert answer["usage"]["completion_tokens"] < 20
    events = streamed(server + "/completions", stop=stop, **asked)
    assert "".join(c["text"] for e in events for c in e["choices"]) == cut


def test_many_at_once_get_what_each_would_get_alone(server: str, truth: GuidedGenerator) -> None:
    prompts = [PROMPT, "fox", "cancel 12 tickets", "the quick", "a b c"] * 3

    def ask(prompt: str) -> str:
        return str(answered(server + "/completions", prompt=prompt, **GREEDY)["choices"][0]["text"])

    with ThreadPoolExecutor(15) as pool:
        found = list(pool.map(ask, prompts))
    assert found == [expected(truth, ids(p)) for p in prompts]


def test_a_client_that_leaves_costs_the_others_nothing(server: str, truth: GuidedGenerator) -> None:
    for _ in range(3):
        request = urllib.request.Request(
            server + "/completions", json.dumps({"prompt": PROMPT, "max_tokens": 24, "stream": True, "n": 8}).encode()
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            answer.readline()
    text = answered(server + "/completions", prompt=PROMPT, **GREEDY)["choices"][0]["text"]
    assert text == expected(truth, ids(PROMPT))


# ---- refusals ----


@pytest.mark.parametrize(
    ("change", "status", "param", "said"),
    [
        ({"model": "gpt-5"}, 404, "model", "no model gpt-5"),
        ({"prompt": None}, 400, "prompt", "a text, token ids"),
        ({"prompt": []}, 400, "prompt", "a text, token ids"),
        ({"prompt": [["a"]]}, 400, "prompt", "neither a text"),
        ({"prompt": [VOCAB + 5]}, 400, "prompt", f"token id {VOCAB + 5}"),
        ({"prompt": "fox " * 300}, 400, None, "fill the context of 96"),
        ({"max_tokens": 25}, 400, "max_tokens", "from 1 to 24"),
        ({"max_tokens": 0}, 400, "max_tokens", "from 1 to 24"),
        ({"temperature": -1}, 400, "temperature", "from 0 to 10"),
        ({"temperature": True}, 400, "temperature", "from 0 to 10"),
        ({"temperature": float("nan")}, 400, "temperature", "from 0 to 10"),
        ({"top_p": 0}, 400, "top_p", "from 1e-06 to 1"),
        ({"top_k": 1.5}, 400, "top_k", "an integer"),
        ({"n": 17}, 400, "n", "from 1 to 16"),
        ({"n": 9, "prompt": ["a", "b"]}, 400, "n", "18 choices"),
        ({"seed": "x"}, 400, "seed", "an integer"),
        ({"stop": [""]}, 400, "stop", "1 to 256"),
        ({"stop": 3}, 400, "stop", "a text or a list"),
        ({"stream": "yes"}, 400, "stream", "true or false"),
        ({"logprobs": True}, 400, "logprobs", "an integer"),
        ({"guidance": 3}, 400, "guidance", "alpha"),
        ({"guidance": {"gamma": 3}}, 400, "guidance", "alpha"),
        ({"guidance": {"beta": 1}}, 400, "guidance.beta", "a mapping"),
        ({"guidance": {"beta": {"kindness": 1}}}, 400, "guidance.beta", "the doctors are kind, brief"),
        ({"guidance": {"beta": {"kind": "1"}}}, 400, "guidance.beta.kind", "a finite number"),
        ({"guidance": {"alpha": float("inf")}}, 400, "guidance.alpha", "a finite number"),
        ({"guidence": {}}, 400, "guidence", "did you mean guidance?"),
        ({"echo": True}, 400, "echo", "not offered"),
        ({"logit_bias": {"5": 3}}, 400, "logit_bias", "not offered"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_in_openais_shape(
    server: str, change: dict[str, Any], status: int, param: str | None, said: str
) -> None:
    found, answer = post(server + "/completions", {"prompt": "fox"} | change)
    assert (found, answer["error"]["param"], answer["error"]["type"]) == (status, param, "invalid_request_error")
    assert said in answer["error"]["message"]


def test_bad_chats_bodies_paths_and_methods_are_refused_in_openais_shape(server: str) -> None:
    for bad in ([], "hi", [{"role": "user"}], [{"role": 3, "content": "x"}], [{"role": "user", "content": [{}]}]):
        status, answer = post(server + "/chat/completions", {"messages": bad})
        assert (status, answer["error"]["param"]) == (400, "messages")
    for key, value in {"tools": [{"type": "function"}], "prompt": "x", "top_logprobs": 2}.items():
        assert post(server + "/chat/completions", {"messages": MESSAGES, key: value})[1]["error"]["param"] == key
    for body, status in ((b"{", 400), (b"[1]", 400), (b"", 400), (b"[" * 19000, 400), (b"x" * 30000, 413)):
        found, answer = post(server + "/completions", body)
        assert found == status and answer["error"]["message"]
    assert post(server + "/nowhere", {})[0] == 404 and post(server + "/models", {})[0] == 405
    neutral = {"presence_penalty": 0, "logit_bias": None, "user": "me", "stop": None, "seed": None, "n": None}
    assert answered(server + "/completions", prompt="fox", **GREEDY, **neutral)["choices"]


def test_the_server_listens_on_the_loopback_unless_told_and_bad_recipes_exit_2(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.tool_parser("serve-guided").parse_args(["r.yaml"]).host == "127.0.0.1"
    assert cli.main(["serve-guided", recipe, "decode.doctors.kind.path=nowhere"]) == 2
    assert "decode.doctors.kind.path" in capsys.readouterr().err


# ---- batches and growing text ----


@given(
    st.lists(st.sampled_from([*"abcé€😀"]), max_size=12), st.lists(st.text("abé", min_size=1, max_size=3), max_size=2)
)
def test_growing_text_shows_whole_characters_and_nothing_of_a_stop_string(letters: list[str], stops: list[str]) -> None:
    data = "".join(letters).encode()
    growing = Growing(lambda tokens: bytes(tokens).decode("utf-8", "replace"), tuple(stops))
    pieces = []
    for i, byte in enumerate(data):
        pieces.append(growing.add(byte, last=i + 1 == len(data)))
        assert "\N{REPLACEMENT CHARACTER}" not in pieces[-1]
        if growing.stopped:
            break
    seen = data[: len(growing.ids)].decode("utf-8", "replace")
    ends = [seen.find(s) for s in stops if s in seen]
    assert "".join(pieces) == growing.text == (seen[: min(ends)] if ends else seen)
    assert growing.stopped == bool(ends) and (growing.stopped or len(growing.ids) == len(data))


def jobs_for(truth: GuidedGenerator, count: int, into: list[Piece], done: threading.Semaphore) -> list[Job]:
    def emit(piece: Piece) -> None:
        into.append(piece)
        if piece.finish_reason or piece.error:
            done.release()

    request = Steering(beta={"kind": 1.0}, temperature=0, max_new_tokens=4)
    return [Job(i, ids("fox"), {}, request, Growing(lambda t: TOKENIZER.decode(list(t))), emit) for i in range(count)]


def test_what_waits_is_decoded_in_batches_and_too_much_is_refused(truth: GuidedGenerator) -> None:
    pieces: list[Piece] = []
    done = threading.Semaphore(0)
    batches = Batches(truth, Chat(TOKENIZER), max_batch=3, max_waiting=7)
    try:
        with pytest.raises(Busy, match="at most 7"):
            batches.submit(jobs_for(truth, 8, pieces, done))
        batches.submit(jobs_for(truth, 7, pieces, done))
        assert all(done.acquire(timeout=20) for _ in range(7))
        assert list(batches.sizes) == [3, 3, 1]
        gone = jobs_for(truth, 1, pieces, done)
        gone[0].gone = True
        batches.submit([*gone, *jobs_for(truth, 1, pieces, done)])
        assert done.acquire(timeout=20)
    finally:
        batches.close()
    assert not batches.thread.is_alive()


def test_a_fault_reaches_every_caller_and_the_next_batch_is_served(
    truth: GuidedGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: list[Piece] = []
    done = threading.Semaphore(0)
    batches = Batches(truth, Chat(TOKENIZER), max_batch=4, max_waiting=9)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(truth, "start", lambda *_: 1 / 0)
            batches.submit(jobs_for(truth, 2, pieces, done))
            assert all(done.acquire(timeout=20) for _ in range(2))
        assert [p.error for p in pieces] == ["ZeroDivisionError: division by zero"] * 2
        batches.submit([dataclasses.replace(j) for j in jobs_for(truth, 1, pieces, done)])
        assert done.acquire(timeout=20) and pieces[-1].finish_reason == "length"
    finally:
        batches.close()
