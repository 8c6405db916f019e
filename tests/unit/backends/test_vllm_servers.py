"""The pool of servers against stand-ins that fail on demand: retries, ejection, re-admission, back-pressure, deadlines.

Real servers are in tests/vllm. A stand-in computes its answer from the request alone, so that what arrives can be compared.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
from support.http_stub import Fault, StandIn, good, turn
from support.processes import wait_for

from nemo_pivotrl.backends.vllm.servers import Servers
from nemo_pivotrl.config import Generation, Policy, Vllm
from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.core.types import FailedSample, Sample

GENERATION = Generation(max_new_tokens=4)
STOPS = frozenset({2})
PROMPTS = [[5, 6], [5, 6, 7], [9]]
SEEDS = [[10, 11], [20, 21], [30, 31]]


@pytest.fixture
def start() -> Iterator[Callable[..., Any]]:
    """Stand-ins and a pool over them."""
    made: list[Any] = []

    def begin(*faults: Fault | None, **settings: Any) -> tuple[Servers, list[StandIn]]:
        stand_ins = [StandIn(fault) for fault in faults]
        quick = {"backoff_s": 0.01, "timeout_s": 5.0, "max_retries": 4, **settings}
        pool = Servers(Policy(model_name="here"), Vllm(servers=tuple(s.url for s in stand_ins), **quick))
        made.extend([pool, *stand_ins])
        return pool, stand_ins

    yield begin
    for one in made:
        one.close()


def infer(pool: Servers) -> list[list[Sample | FailedSample]]:
    return pool.infer(PROMPTS, SEEDS, STOPS, GENERATION)


def whole(groups: list[list[Sample | FailedSample]]) -> bool:
    """Whether everything arrived where it belongs."""
    for prompt, seeds, group in zip(PROMPTS, SEEDS, groups, strict=True):
        for seed, sample in zip(seeds, group, strict=True):
            ids, logs = turn({"prompt": prompt, "seed": seed, "max_tokens": 4})
            if sample != Sample(tuple(ids), tuple(logs), "length"):
                return False
    return True


def test_requests_carry_every_setting_and_each_seed_once(start: Any) -> None:
    def until_both_work(body: dict[str, Any], number: int) -> None:
        wait_for(
            lambda: one.asked and two.asked, "both have work"
        )  # else the first may have answered all before the second is needed

    pool, (one, two) = start(until_both_work, until_both_work, timeout_s=60.0)
    assert whole(infer(pool))
    asked = one.asked + two.asked
    assert sorted(b["seed"] for b in asked) == [10, 11, 20, 21, 30, 31]
    for body in asked:
        assert body["n"] == 1 and body["model"] == "m" and body["stop_token_ids"] == [2] and body["ignore_eos"] is True
        assert (body["temperature"], body["top_p"], body["top_k"], body["repetition_penalty"]) == (1.0, 1.0, 0, 1.0)
        assert body["prompt"] in PROMPTS and body["return_token_ids"] is True


def test_prompt_log_probs_come_back_for_the_response_alone(start: Any) -> None:
    pool, _ = start(None)
    found = pool.log_probs([([3, 4], [5, 6]), ([3], [8])])
    assert [f.tolist() for f in found] == [[-2.5, -3.0], [-4.0]]


MALFORMED: dict[str, Any] = {
    "no json": b"<html>",
    "cut off": b'{"choices": [',
    "empty": b"",
    "null": b"null",
    "no choice": {"choices": []},
    "two choices": {"choices": [{}, {}]},
    "no ids": {"choices": [{"finish_reason": "length"}]},
    "ids of text": {"choices": [{"token_ids": ["5"], "logprobs": {"tokens": [], "token_logprobs": []}}]},
    "deep": b"[" * 5000,
}


@pytest.mark.parametrize("name", [*MALFORMED, "null log-prob", "other tokens", "reason", "early stop", "nan"])
def test_a_malformed_answer_is_asked_again_and_never_scored(start: Any, name: str) -> None:
    def bent(body: dict[str, Any]) -> Any:
        answer = good(body)
        choice = answer["choices"][0]
        if name == "null log-prob":
            choice["logprobs"]["token_logprobs"][1] = None
        elif name == "other tokens":
            choice["logprobs"]["tokens"][0] = "token_id:1"
        elif name == "reason":
            choice["finish_reason"] = "abort"
        elif name == "early stop":
            choice["token_ids"][1], choice["logprobs"]["tokens"][1] = 2, "token_id:2"
        elif name == "nan":
            choice["logprobs"]["token_logprobs"][0] = float("nan")
        return answer

    def fault(body: dict[str, Any], number: int) -> Any:
        return (200, MALFORMED[name] if name in MALFORMED else bent(body)) if number < 2 else None

    pool, _ = start(fault, eject_after=50)
    assert whole(infer(pool)) and pool.counts["retried sampler_malformed"] == 2 and not pool.counts["lost"]


@pytest.mark.parametrize("status", [500, 502, 504, 408, 409, 425])
def test_a_server_error_is_asked_again(start: Any, status: int) -> None:
    pool, _ = start(lambda body, n: (status, b"oh") if n < 2 else None)
    assert whole(infer(pool)) and pool.counts["retried sampler_http"] == 2


def test_what_stays_lost_is_lost_and_counted_and_has_no_tokens(start: Any) -> None:
    pool, (one,) = start(lambda body, n: (500, b"oh") if body["seed"] == 20 else None, max_retries=2, eject_after=50)
    groups = infer(pool)
    lost = groups[1][0]
    assert isinstance(lost, FailedSample) and lost.kind == "sampler_http" and "status 500" in lost.detail
    assert [isinstance(s, Sample) for g in groups for s in g] == [True, True, False, True, True, True]
    assert pool.counts["lost"] == 1 and sum(b["seed"] == 20 for b in one.asked) == 3


def test_a_refusal_stops_the_stage_with_what_the_server_said(start: Any) -> None:
    pool, _ = start(lambda body, n: (400, b'{"error": "maximum context length is 8"}'))
    with pytest.raises(InputError) as caught:
        infer(pool)
    assert "maximum context length" in caught.value.problems[0].found


def test_a_server_that_hangs_meets_the_deadline_and_another_one_answers(start: Any) -> None:
    pool, (one, _) = start(lambda body, n: "hang", None, timeout_s=0.3, eject_after=1)
    assert whole(infer(pool)) and pool.counts["retried sampler_timeout"] >= 1
    first = len(one.asked)
    for _ in range(3):  # its /health says that it is well: it is tried with one request at a time, and ever more rarely
        assert whole(infer(pool)) and len(one.asked) <= (first := first + 1)


def test_who_looks_after_a_server_when_the_pool_is_closed_is_told_so(start: Any) -> None:
    pool, _ = start(None)
    pool.close()
    assert not pool._recovered(pool.servers[0])


def test_who_waits_for_answers_when_the_pool_is_closed_goes_on(start: Any) -> None:
    asked, ended = threading.Event(), []
    pool, _ = start(lambda body, n: asked.set() or time.sleep(0.3), concurrency=1, max_retries=0)

    def ask() -> None:
        try:
            infer(pool)
        except (CancelledError, RuntimeError, InputError) as error:
            ended.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    assert asked.wait(5.0)
    pool.close()
    asking.join(10.0)
    assert not asking.is_alive() and ended


def test_a_busy_server_is_given_its_pause_and_not_blamed(start: Any) -> None:
    pool, _ = start(lambda body, n: (429, b"", {"Retry-After": "0.2"}) if n == 0 else None, eject_after=1)
    begun = time.monotonic()
    assert whole(infer(pool)) and time.monotonic() - begun >= 0.15
    assert not pool.counts["ejected"] and pool.servers[0].well


def test_no_server_holds_more_than_its_share_and_the_rest_waits(start: Any) -> None:
    def until_another_comes(number: int) -> Fault:
        return lambda body, n: wait_for(lambda: stand_ins[number].most > 1 or n > 1, "another request")

    pool, stand_ins = start(until_another_comes(0), until_another_comes(1), concurrency=2)
    groups = pool.infer([[i] for i in range(1, 25)], [[i] for i in range(24)], STOPS, GENERATION)
    assert all(isinstance(g[0], Sample) for g in groups) and [s.most for s in stand_ins] == [2, 2]


def test_a_server_that_dies_is_ejected_and_comes_back_when_it_is_well(start: Any) -> None:
    pool, (one, _) = start(lambda body, n: "drop" if one_is_down["now"] else None, None, max_retries=8)
    one_is_down["now"] = True
    one.sick = True
    assert whole(infer(pool)) and pool.counts["ejected"] == 1 and not pool.servers[0].well
    before = len(one.asked)
    assert whole(infer(pool)) and len(one.asked) == before, "it gets nothing while it is away"
    one_is_down["now"], one.sick = False, False
    wait_for(lambda: pool.servers[0].well, "the server is well")
    assert pool.counts["re-admitted"] == 1
    assert whole(infer(pool)) and len(one.asked) > before


one_is_down = {"now": False}


def test_a_server_that_comes_back_takes_the_current_weights_first(start: Any, tmp_path: Path) -> None:
    pool, (one, two) = start(None, None)
    two.away = True
    assert (
        pool.refit(str(tmp_path)) == ["abc"] and one.loaded == str(tmp_path) and one.calls["/reset_prefix_cache"] == 1
    )
    assert not pool.servers[1].well and not two.loaded
    two.fingerprint, two.away = "other weights", False
    wait_for(
        lambda: two.calls["/collective_rpc"] > 2, "weights compared"
    )  # the first of them is compared before the next is sent
    assert two.loaded == str(tmp_path) and not pool.servers[1].well, "wrong weights keep it out"
    two.fingerprint = "abc"
    wait_for(lambda: pool.servers[1].well, "the server is well")
    assert whole(infer(pool)) and two.asked


def test_a_pool_that_another_one_refitted_for_keeps_servers_without_the_weights_out(start: Any, tmp_path: Path) -> None:
    pool, (one, two) = start(None, None)
    two.fingerprint = "other weights"
    pool.expect(str(tmp_path), "abc", [one.url])
    assert pool.well == [one.url] and not one.loaded, "who has the weights is not sent them again"
    wait_for(lambda: bool(two.loaded), "weights")
    assert pool.well == [one.url]
    two.fingerprint = "abc"
    wait_for(lambda: len(pool.well) == 2, "both are well")
    assert two.loaded == str(tmp_path)


def test_all_servers_away_stop_the_stage_after_the_deadline(start: Any) -> None:
    pool, (one,) = start(None, timeout_s=0.5, max_retries=50)
    one.away = True
    with pytest.raises(InputError) as caught:
        infer(pool)
    assert caught.value.problems[0].field == "vllm.servers" and "resumes" in caught.value.problems[0].remedy


def test_a_server_that_is_away_at_the_start_may_come_later(tmp_path: Path) -> None:
    late, there = StandIn(), StandIn()
    late.away = True
    pool = Servers(Policy(model_name="x"), Vllm(servers=(late.url, there.url), backoff_s=0.01, timeout_s=5.0))
    try:
        assert whole(infer(pool)) and not late.asked
        late.away = False
        wait_for(lambda: pool.servers[0].well, "the server is well")
        assert whole(infer(pool)) and late.asked and late.asked[0]["model"] == "m"
    finally:
        for one in (pool, late, there):
            one.close()


@pytest.mark.parametrize(
    ("urls", "field"),
    [
        (("ftp://x",), "vllm.servers"),
        (("http://user:secret@x",), "vllm.servers"),
        (("http://127.0.0.1:1", "http://127.0.0.1:1/v1/"), "vllm.servers"),
        (("http://127.0.0.1:1",), "vllm.servers"),
    ],
)
def test_addresses_that_lead_nowhere_are_named(urls: tuple[str, ...], field: str) -> None:
    with pytest.raises(InputError) as caught:
        Servers(Policy(model_name="x"), Vllm(servers=urls, timeout_s=0.5))
    assert caught.value.problems[0].field == field and "secret" not in str(caught.value)


def test_a_server_of_another_model_is_refused(tmp_path: Path) -> None:
    for name, weights in (("ours", b"1234"), ("theirs", b"1235"), ("copy", b"1234")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(weights)
    policy = Policy(model_name=str(tmp_path / "ours"))
    wrong, right = (StandIn(root=str(tmp_path / name), model="policy") for name in ("theirs", "copy"))
    try:
        with pytest.raises(InputError, match="other weights"):
            Servers(policy, Vllm(servers=(right.url, wrong.url)))
        with pytest.raises(InputError, match=r"vllm\.model"):
            Servers(policy, Vllm(servers=(right.url,), model="nobody"))
        Servers(policy, Vllm(servers=(right.url,))).close()
    finally:
        for one in (right, wrong):
            one.close()


def test_a_server_whose_log_probs_ignore_the_temperature_is_refused() -> None:
    def raw(body: dict[str, Any], number: int) -> Any:
        answer = good(body)
        answer["choices"][0]["logprobs"]["top_logprobs"] = [{"a": -0.5}]
        return 200, answer

    one = StandIn(raw)
    try:
        with pytest.raises(InputError, match="processed_logprobs"):
            Servers(Policy(model_name="x", generation=Generation(temperature=0.7)), Vllm(servers=(one.url,)))
    finally:
        one.close()


def test_a_key_goes_to_the_hosts_that_the_recipe_names_for_it_and_is_never_shown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "sesame")
    named, other = (StandIn(lambda body, n: (401, b'{"error": "sesame is no key"}')) for _ in range(2))
    try:
        hosts = (named.url.removeprefix("http://"),)
        pool = Servers(Policy(model_name="x"), Vllm(servers=(named.url, other.url), api_key_hosts=hosts))
        for server in pool.servers:
            with pytest.raises(InputError) as caught:
                pool._exchange(server, "POST", "/v1/completions", {})
            assert "sesame" not in str(caught.value) and "[key] is no key" in str(caught.value)
        assert "vllm.api_key_hosts" in str(caught.value)  # the remedy of the one that had none
        pool.close()
        assert (named.keys, other.keys) == ({"Bearer sesame"}, {None})
        assert other.url in caplog.text and "sesame" not in caplog.text
    finally:
        named.close()
        other.close()


@pytest.mark.parametrize(
    ("hosts", "field"),
    [(("10.255.255.1",), "vllm.servers"), (("10.255.255.1:8000", "elsewhere"), "vllm.servers"), ((), "")],
)
def test_over_http_a_key_leaves_this_machine_only_where_the_recipe_says_so(
    monkeypatch: pytest.MonkeyPatch, hosts: tuple[str, ...], field: str
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "sesame")
    url, settings = "http://10.255.255.1:8000", {"timeout_s": 0.1}
    monkeypatch.setattr(Servers, "_meet", lambda self, policy: None)
    if field:
        with pytest.raises(InputError, match=field) as caught:
            Servers(Policy(model_name="x"), Vllm(servers=(url,), api_key_hosts=hosts, **settings))
        assert "sesame" not in str(caught.value)
        hosts = ("http://10.255.255.1:8000",)
    pool = Servers(Policy(model_name="x"), Vllm(servers=(url,), api_key_hosts=hosts, **settings))
    assert pool._with_key == ({url} if field else set())
    pool.close()


def test_a_key_that_no_header_can_carry_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "two words")
    with pytest.raises(InputError, match=r"vllm\.api_key_env"):
        Servers(Policy(model_name="x"), Vllm(servers=("http://127.0.0.1:1",)))
