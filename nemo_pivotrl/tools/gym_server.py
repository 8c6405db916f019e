"""serve-verifier: any verifier behind NeMo-Gym's resources-server protocol, for users of NeMo-RL with Gym.

POST /verify takes a row with the policy's `response` and returns it with `reward`, `category` and what was measured. A fault
is answered the way Gym marks a failed judge: reward 0 with `mask_sample`, which keeps it out of training and metrics.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nemo_pivotrl import config
from nemo_pivotrl.core.errors import short
from nemo_pivotrl.core.types import Verdict
from nemo_pivotrl.tools.verify import verdict_row
from nemo_pivotrl.verifiers.base import VerifierFault, verdicts
from nemo_pivotrl.verifiers.loading import ALIASES, load_verifier
from nemo_pivotrl.verifiers.rows import RowError, case_of, sampled_action

MAX_BODY = 64 << 20
"""Bytes of a request: a state of 131,072 tokens with its tools fits many times."""
MAX_RETRIES = 2
FIGURES = {"similarity": "similarity_score", "target_match": "target_match", "diff_penalty": "diff_size_penalty"}
"""Our names of what Gym's responses carry under others."""


def _json(value: Any, status: int = 200) -> Response:
    # ASCII escapes: a lone surrogate in a rollout has no UTF-8 form
    return Response(json.dumps(value), status, media_type="application/json")


def _bad_request(field: str, message: str, status: int = 422) -> Response:
    return _json({"detail": [{"loc": ["body", *field.split(".")], "msg": message, "type": "value_error"}]}, status)


async def _body(request: Request) -> Any:
    """The request's JSON. Raises RowError; reads no more than MAX_BODY bytes."""
    read = bytearray()
    async for block in request.stream():
        read += block
        if len(read) > MAX_BODY:
            raise RowError("body", f"more than {MAX_BODY} bytes", "send smaller rows")
    try:
        return json.loads(bytes(read) or b"null")
    except (ValueError, RecursionError) as error:
        raise RowError("body", short(str(error)), "send JSON") from None


def create_app(settings: config.Verifier) -> Starlette:
    """The server's application. Raises InputError for settings that no verifier takes."""
    verifier = load_verifier(settings)
    name = ALIASES.get(settings.name, settings.name)

    async def verify(request: Request) -> Response:
        try:
            body = await _body(request)
            if not isinstance(body, Mapping):
                raise RowError("body", body, "a JSON object: the row with `response`")
            case = case_of(body, with_messages=verifier.asks_judge, family=name)
            action = sampled_action(body, "\n" if name == "terminus" else "")
        except RowError as error:
            return _bad_request(error.field, f"{error.remedy}; found {short(error.found)}")
        (result,) = await run_in_threadpool(verdicts, verifier, [(case, action)], MAX_RETRIES)
        added = response_fields(name, result)
        if isinstance(body.get("instance_config"), Mapping) and "instance_config" in added:
            added["instance_config"] = {**body["instance_config"], **added["instance_config"]}
        return _json({**body, **added})

    async def metrics(request: Request) -> Response:
        try:
            body = await _body(request)
            rows = body.get("verify_responses") or [] if isinstance(body, Mapping) else []
            measured = [float(row["reward"]) for row in rows if not row.get("mask_sample")]
        except (RowError, TypeError, KeyError, ValueError, AttributeError) as error:
            return _bad_request("verify_responses", str(error))
        mean = {"mean/reward": fmean(measured)} if measured else {}
        counted = {"verified": len(measured), "masked": len(rows) - len(measured)}
        return _json({"group_level_metrics": [], "agent_metrics": mean | counted, "key_metrics": mean})

    async def nothing(request: Request) -> Response:
        return _json({})

    async def mode(request: Request) -> Response:
        return _json("stateless")

    async def health(request: Request) -> Response:
        return _json({"status": "ok", "verifier": verifier.name, "version": verifier.version})

    return Starlette(
        routes=[
            Route("/verify", verify, methods=["POST"]),
            Route("/aggregate_metrics", metrics, methods=["POST"]),
            Route("/seed_session", nothing, methods=["POST"]),
            Route("/close_session", nothing, methods=["POST"]),
            Route("/reverify_mode", mode),
            Route("/health", health),
        ]
    )


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
    settings = build(config.Verifier, json.loads(verifier.read_text(encoding="utf-8")), str(verifier))
    serve(settings, place["host"], place["port"])


def serve(settings: config.Verifier, host: str, port: int) -> None:
    """Serve until interrupted."""
    import uvicorn

    app = create_app(settings)
    print(f"{settings.name} on http://{host}:{port}/verify", flush=True)
    uvicorn.run(app, host=host, port=port, log_level="warning")
