"""What a guided server's worker notes of an answer, and what is made of it. Real servers answer in tests/vllm/test_vllm_serve.py."""

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_pivotrl.backends.reference.guided import Token, check_answers
from nemo_pivotrl.backends.vllm import guidance
from nemo_pivotrl.backends.vllm.guided_servers import GuidedServers
from nemo_pivotrl.backends.vllm.refit import Refit
from nemo_pivotrl.backends.vllm.servers import Server
from nemo_pivotrl.core.errors import InputError, NotFiniteError, Problem

IDENTITY = {"doctors": {"kind": {"revision": "a1", "reference": "b2"}}, "min_entropy": 0.0}
GOOD = Token(5, -1.5, -2.0, -1.25, 0.5, True, False)
HERE = Server("http://gpu-17:8000")


def noted(monkeypatch: pytest.MonkeyPatch, *tokens: Token) -> dict[str, Any]:
    """What a worker tells of request 7, after its way through JSON."""
    monkeypatch.setattr(guidance, "IDENTITY", IDENTITY)
    monkeypatch.setitem(guidance.RECORDS, 7, list(tokens))
    found: dict[str, Any] = json.loads(json.dumps(Refit().guided_answer(7), allow_nan=False))
    return found


def client(*workers: dict[str, Any], **identity: Any) -> GuidedServers:
    """A client whose server's workers, each of a tensor-parallel rank, say this."""
    made = object.__new__(GuidedServers)
    made.names, made.identity = ["kind"], {**IDENTITY, **identity}

    def exchange(server: Server, method: str, path: str, body: Any) -> Any:
        assert (server, method, path, body) == (
            HERE,
            "POST",
            "/collective_rpc",
            {"method": "guided_answer", "args": [7]},
        )
        return {"results": list(workers)}

    made.servers = SimpleNamespace(_exchange=exchange)  # type: ignore[assignment]
    return made


def answer(*ids: int, reason: str = "stop") -> dict[str, Any]:
    return {"choices": [{"token_ids": list(ids), "finish_reason": reason}]}


def test_records_come_from_the_rank_that_has_them_and_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    told = noted(monkeypatch, GOOD)
    found = client({"identity": {}, "tokens": []}, told)._read(answer(5), HERE, 7)
    assert found.tokens == (GOOD,) and found.finish_reason == "stop"
    assert Refit().guided_answer(7)["tokens"] == [], "it is forgotten"


def test_a_log_probability_that_is_no_number_is_a_fault_and_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    told = noted(monkeypatch, GOOD, GOOD._replace(mixed_log_prob=math.nan), GOOD._replace(log_prob=-math.inf))
    found = client(told)._read(answer(5, 5, 5), HERE, 7)
    with pytest.raises(NotFiniteError, match="in 1 of 1 answers"):
        check_answers([found])


def test_an_answer_and_records_that_do_not_belong_together_are_malformed(monkeypatch: pytest.MonkeyPatch) -> None:
    told = noted(monkeypatch, GOOD)
    for wrong in (answer(6), answer(5, 5), answer(), answer(5, reason="abort")):
        with pytest.raises(ValueError, match=r"finish_reason|not what its doctors drew"):
            client(told)._read(wrong, HERE, 7)
    with pytest.raises(ValueError, match="not what its doctors drew"):
        client({"identity": {}, "tokens": []})._read(answer(5), HERE, 7)


def test_a_server_that_steers_otherwise_is_named_with_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    told = noted(monkeypatch, GOOD)
    other = {"doctors": {"kind": {"revision": "a1", "reference": ""}}, "min_entropy": 0.5}
    with pytest.raises(InputError) as caught:
        client(told, **other)._read(answer(5), HERE, 7)
    assert [(p.field, p.found) for p in caught.value.problems] == [
        ("http://gpu-17:8000 kind.reference", "b2"),
        ("http://gpu-17:8000 min_entropy", "0.0"),
    ]
    with pytest.raises(InputError, match=r"kind\.revision: found none"):
        client({**told, "identity": {"doctors": {}, "min_entropy": 0.0}})._read(answer(5), HERE, 7)


def test_a_closed_server_is_told_with_the_flag_that_opens_it() -> None:
    def refused(*_: Any) -> Any:
        raise InputError(Problem("servers", None, "/collective_rpc", "status 404", "something general"))

    made = client()
    made.servers = SimpleNamespace(_exchange=refused)  # type: ignore[assignment]
    with pytest.raises(InputError, match=r"(?s)status 404.*serve RECIPE --refit"):
        made._read(answer(5), HERE, 7)
