"""view: a run folder in the browser. A server on the loopback that answers in JSON, and one page that shows it.

The page has no dependency and no build step: a few hundred lines that anyone can read are easier to vouch for than a bundle. It makes
every text a text node, and the Content-Security-Policy allows its own script, style and answers, nothing else.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nemo_pivotrl.config import Patient
from nemo_pivotrl.core.artifacts import read_header
from nemo_pivotrl.core.errors import InputError, short
from nemo_pivotrl.report import VIEW_ADDRESS, view_index as index
from nemo_pivotrl.report.llmdoctor import decoder, numbered
from nemo_pivotrl.report.view_prompt import RenderedPrompts
from nemo_pivotrl.tools.http_guard import Guard
from nemo_pivotrl.tools.http_server import check_port, run as serve_app

HOST = "127.0.0.1"
PAGES = {
    "/": ("index.html", "text/html"),
    "/view.js": ("view.js", "text/javascript"),
    "/view.css": ("view.css", "text/css"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
REPORT_HEADERS = HEADERS | {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
}
"""The report's plots and tables have styles inside; scripts it has none."""
Pieces = Callable[[Sequence[int]], list[str]]


def view(folder: Path, port: int) -> None:
    """Serve a run folder on the loopback until interrupted. Raises InputError for a folder without artefacts."""
    app = create_app(folder)
    check_port(HOST, port)
    print(f"{folder} on http://{HOST}:{port}/  (Ctrl-C ends it)", flush=True)
    serve_app(app, HOST, port)


def create_app(folder: Path) -> Guard:
    """The application behind the guard of all servers here. Raises InputError for a folder without artefacts."""
    run = index.open_run(folder)
    pieces, rendered = _pieces(folder), RenderedPrompts(run)
    answers: dict[str, Callable[[dict[str, str]], Any]] = {
        "/api/run": lambda asked: index.overview(run),
        "/api/turns": lambda asked: index.listed(run, asked),
        "/api/turn": lambda asked: index.whole_turn(run, asked["id"]),
        "/api/prompt_text": lambda asked: rendered.prompt(asked["id"]),
        "/api/trajectory": lambda asked: index.trajectory(run, asked["id"]),
        "/api/pairs": lambda asked: _page(run.pairs, asked),
        "/api/pair": lambda asked: index.pair(run, asked["id"], pieces),
        "/api/prompts": lambda asked: index.prompts(run, int(asked.get("offset") or 0), index.PAGE),
        "/api/prompt": lambda asked: index.prompt(run, int(asked["id"]), int(asked.get("sample") or 0)),
    }
    routes = [Route(path, _answered(answer)) for path, answer in answers.items()]
    routes += [Route(path, _static(*page)) for path, page in PAGES.items()]
    return Guard(Starlette(routes=[*routes, Route("/report.html", _report(folder))]))


def _page(pairs: Sequence[dict[str, Any]], asked: dict[str, str]) -> dict[str, Any]:
    found = [p for p in pairs if asked.get("objective", p["objective"]) == p["objective"]]
    start = max(0, int(asked.get("offset") or 0))
    rows = [{key: value for key, value in p.items() if key != "place"} for p in found[start : start + index.PAGE]]
    return {"total": len(found), "offset": start, "rows": rows}


def _answered(answer: Callable[[dict[str, str]], Any]) -> Callable[[Request], Awaitable[Response]]:
    """A route in JSON: 404 for an id that is not there, 400 for a question that cannot be read, each with its reason."""

    async def route(request: Request) -> Response:
        status = 200
        try:
            found = await asyncio.to_thread(answer, dict(request.query_params))
        except KeyError as error:
            status, found = 404, {"error": f"not here: {short(str(error))}"}
        except (ValueError, InputError) as error:
            status, found = 400, {"error": short(str(error), 300)}
        return Response(json.dumps(found), status, HEADERS, "application/json")

    return route


def _static(name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
    content = files("nemo_pivotrl.report").joinpath("view", name).read_bytes()

    async def route(request: Request) -> Response:
        return Response(content, 200, HEADERS, kind)

    return route


def _report(folder: Path) -> Callable[[Request], Awaitable[Response]]:
    async def route(request: Request) -> Response:
        path = folder / "report.html"
        if not path.is_file():
            return Response("no report yet: nemo-pivotrl report RECIPE", 404, HEADERS, "text/plain")
        page = (await asyncio.to_thread(path.read_bytes)).replace(VIEW_ADDRESS.encode(), b"/")
        return Response(page, 200, REPORT_HEADERS, "text/html")

    return route


def _pieces(folder: Path) -> Pieces:
    """Token ids to texts, by the patient's tokenizer where it lies in the run folder; else `#id`."""
    rewards, patient = folder / "token_rewards.jsonl", folder / "patient" / "policy"
    if not (rewards.exists() and patient.exists()):
        return numbered
    pieces, problem = decoder(Patient(model_name=str(patient)), read_header(rewards, "token_rewards").tokenizer)
    if problem:
        print(f"token ids stand for texts: {problem}")
    return pieces
