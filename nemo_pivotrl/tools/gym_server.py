"""serve-verifier: any verifier behind NeMo-Gym's resources-server protocol, for users of NeMo-RL with Gym.

POST /verify takes a row with the policy's `response` and returns it with `reward`, `category` and what was measured. A fault
is answered the way Gym marks a failed judge: reward 0 with `mask_sample`, which keeps it out of training and metrics.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import resource
import signal
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NoReturn

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from nemo_pivotrl import config
from nemo_pivotrl.backends.api_keys import is_loopback
from nemo_pivotrl.core.errors import short
from nemo_pivotrl.core.types import Verdict
from nemo_pivotrl.tools.http_guard import TOKEN, Guard, names_of, read_token
from nemo_pivotrl.tools.http_server import run
from nemo_pivotrl.tools.verify import verdict_row
from nemo_pivotrl.verifiers.base import Bounded, VerifierFault, verdicts
from nemo_pivotrl.verifiers.loading import ALIASES, load_verifier
from nemo_pivotrl.verifiers.rows import RowError, case_of, sampled_action

LARGE = 1 << 20
"""Bytes of a body from which on a process of its own reads it."""
PIECE = 1 << 18
"""Bytes of a response that are written at a time."""
WORKER_MEMORY = 8 << 30
"""Bytes of that process."""
MAX_REWARD = 1e12
"""Of what metrics are made; sums stay finite."""
MAX_RETRIES = 2
FIGURES = {"similarity": "similarity_score", "target_match": "target_match", "diff_penalty": "diff_size_penalty"}
"""Our names of what Gym's responses carry under others."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A response: its status and its JSON."""

    status: int
    body: bytes


def _json(value: Any, status: int = 200) -> Answer:
    """Raises ValueError for what JSON has no form of: NaN and infinity."""
    return Answer(status, json.dumps(value, allow_nan=False).encode())


def _bad_request(field: str, message: str, status: int = 422) -> Answer:
    return _json({"detail": [{"loc": ["body", *field.split(".")], "msg": message, "type": "value_error"}]}, status)


def _read(raw: bytes) -> Any:
    """The JSON of a body. Raises RowError; UnicodeEncodeError for half a surrogate pair, which no UTF-8 text can hold."""
    try:
        value = json.loads(raw or b"null", parse_constant=_no_number)
        if b"\\u" in raw:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise RowError("body", short(str(error)), "send JSON") from None
    return value


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def judge(verifier: Bounded, name: str, raw: bytes) -> Answer:
    """The response to POST /verify. Nothing in a body makes it raise."""
    try:
        body = _read(raw)
        if not isinstance(body, Mapping):
            raise RowError("body", body, "a JSON object: the row with `response`")
        case = case_of(body, with_messages=verifier.reads_state, family=name)
        action = sampled_action(body, "\n" if name == "terminus" else "")
        (result,) = verdicts(verifier, [(case, action)], MAX_RETRIES)
        added = response_fields(name, result)
        if isinstance(body.get("instance_config"), Mapping) and "instance_config" in added:
            added["instance_config"] = {**body["instance_config"], **added["instance_config"]}
        return _json({**body, **added})
    except RowError as error:
        return _bad_request(error.field, f"{error.remedy}; found {short(error.found)}")
    except UnicodeEncodeError:
        return _bad_request("body", "half a surrogate pair in a text: send Unicode", 400)
    except (ValueError, RecursionError) as error:
        return _bad_request("body", f"no JSON can answer it: {short(str(error))}")


def aggregate(raw: bytes) -> Answer:
    """The response to POST /aggregate_metrics."""
    try:
        body = _read(raw)
        rows = body.get("verify_responses") or [] if isinstance(body, Mapping) else []
        measured = [float(row["reward"]) for row in rows if not row.get("mask_sample")]
        if wrong := [reward for reward in measured if not abs(reward) <= MAX_REWARD]:
            return _bad_request("verify_responses", f"a reward of {wrong[0]:g}")
    except UnicodeEncodeError:
        return _bad_request("body", "half a surrogate pair in a text: send Unicode", 400)
    except (RowError, TypeError, KeyError, ValueError, OverflowError, AttributeError) as error:
        return _bad_request("verify_responses", short(str(error)))
    mean = {"mean/reward": fmean(measured)} if measured else {}
    counted = {"verified": len(measured), "masked": len(rows) - len(measured)}
    return _json({"group_level_metrics": [], "agent_metrics": mean | counted, "key_metrics": mean})


# ---- large bodies ----

_of_worker: tuple[Bounded, str]
"""Verifier and its name, in the process that judges large rows."""


def _begin_worker(settings: config.Verifier) -> None:
    """Set the large rows' process up: its memory is bounded, and it leaves interrupts to its parent."""
    global _of_worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY, WORKER_MEMORY))
    _of_worker = load_verifier(settings), ALIASES.get(settings.name, settings.name)


def _judge_large(raw: bytes) -> Answer:
    return judge(*_of_worker, raw)


def _aggregate_large(raw: bytes) -> Answer:
    return aggregate(raw)


class LargeRows:
    """One process that reads large bodies, one at a time: reading JSON stops a whole process, and these would stop the
    server for seconds. When it dies, of memory for example, the next row gets a new one."""

    def __init__(self, settings: config.Verifier):
        self.settings = settings
        self._turn = asyncio.Lock()
        self._pool: ProcessPoolExecutor | None = None

    async def __call__(self, work: Callable[[bytes], Answer], raw: bytes) -> Answer:
        async with self._turn:
            if self._pool is None:
                spawn = multiprocessing.get_context("spawn")
                self._pool = ProcessPoolExecutor(1, spawn, _begin_worker, (self.settings,))
            try:
                return await asyncio.get_running_loop().run_in_executor(self._pool, work, raw)
            except (BrokenProcessPool, MemoryError) as error:
                self.close()
                return _json(
                    {"detail": f"{type(error).__name__} over a row of {len(raw)} bytes: send a smaller one"}, 503
                )

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None


def create_app(settings: config.Verifier, token: str = "", names: frozenset[str] = frozenset(("localhost",))) -> Guard:
    """The server's application: requests carry `token` where it is not empty, and a Host header that is an address or one of
    `names`. Raises InputError for settings that no verifier takes."""
    verifier = load_verifier(settings)
    name = ALIASES.get(settings.name, settings.name)
    large = LargeRows(settings)

    async def answered(request: Request, small: Callable[[bytes], Answer], big: Callable[[bytes], Answer]) -> Response:
        raw = await request.body()
        found = await (run_in_threadpool(small, raw) if len(raw) <= LARGE else large(big, raw))
        length = {"content-length": str(len(found.body))}
        return StreamingResponse(_pieces(found.body), found.status, length, "application/json")

    async def verify(request: Request) -> Response:
        return await answered(request, partial(judge, verifier, name), _judge_large)

    async def metrics(request: Request) -> Response:
        return await answered(request, aggregate, _aggregate_large)

    async def nothing(request: Request) -> Response:
        return _response({})

    async def mode(request: Request) -> Response:
        return _response("stateless")

    async def health(request: Request) -> Response:
        return _response({"status": "ok", "verifier": verifier.name, "version": verifier.version})

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return Response(json.dumps({"detail": error.detail}), error.status_code, error.headers, "application/json")

    async def failed(request: Request, error: Exception) -> Response:
        return Response(
            json.dumps({"detail": f"{type(error).__name__} in the server"}), 500, media_type="application/json"
        )

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        large.close()

    routes = [
        Route("/verify", verify, methods=["POST"]),
        Route("/aggregate_metrics", metrics, methods=["POST"]),
        Route("/seed_session", nothing, methods=["POST"]),
        Route("/close_session", nothing, methods=["POST"]),
        Route("/reverify_mode", mode),
        Route("/health", health),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: refused, Exception: failed}, lifespan=lifespan)
    return Guard(app, token, names)


async def _pieces(body: bytes) -> AsyncIterator[bytes]:
    """A response as its client takes it: a large one at once would be copied several times and hold up all others."""
    for begin in range(0, len(body), PIECE):
        yield body[begin : begin + PIECE]


def _response(value: Any) -> Response:
    return Response(json.dumps(value), media_type="application/json")


def response_fields(name: str, result: Verdict | VerifierFault) -> dict[str, Any]:
    """What a `/verify` response adds to the request."""
    if isinstance(result, VerifierFault):
        kind = "judge_failed" if result.kind.startswith("judge") else "verifier_error"
        return {
            "reward": 0.0,
            "mask_sample": True,
            "failure_kind": kind,
            "failure_reason": str(result),
            "instance_config": {"mask_sample": True},
            "_ng_failure_class": kind,
        }
    row = verdict_row(result)
    gym = {FIGURES[key]: value for key, value in result.figures.items() if key in FIGURES}
    code = {"failure_reason": result.category} if name in ("swe", "terminus") else {}
    return {
        "reward": result.reward,
        "category": result.category,
        "mask_sample": False,
        **gym,
        **code,
        "detail": row["detail"],
    }


def serve_in_gym(verifier: Path) -> None:
    """Serve as NeMo-Gym's launcher asks: where its config puts this server, by the verifier whose settings `verifier` holds.

    Raises InputError for settings that no verifier takes, KeyError outside NeMo-Gym.
    """
    import yaml

    from nemo_pivotrl.config.build import build

    tree = yaml.safe_load(os.environ["NEMO_GYM_CONFIG_DICT"])[os.environ["NEMO_GYM_CONFIG_PATH"]]
    (place,) = tree["resources_servers"].values()
    host, port = place["host"], place["port"]
    settings = build(config.Verifier, json.loads(verifier.read_text(encoding="utf-8")), str(verifier))
    token = os.environ.get(TOKEN, "")
    if not token and not is_loopback(host):
        print(
            f"warning: NeMo-Gym put this server on {host} and sends no token: whoever reaches it can ask it", flush=True
        )
    run(create_app(settings, token, names_of(host)), host, port)


def serve(
    settings: config.Verifier, host: str, port: int, token_file: str | None = None, allowed: Sequence[str] = ()
) -> None:
    """Serve until interrupted. allowed: further names of this server, in Host headers. Raises InputError for settings that no
    verifier takes, and for an address that others reach without a token."""
    app = create_app(settings, read_token(token_file, host), names_of(host, allowed))
    print(f"{settings.name} on http://{host}:{port}/verify", flush=True)
    run(app, host, port)
