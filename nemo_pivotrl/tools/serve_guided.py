"""serve-guided: a patient steered by doctors behind OpenAI's completions and chat completions, streaming included.

What is added to OpenAI's protocol: `guidance: {"alpha": 1.0, "beta": {"NAME": 0.5}}` and `top_k` in a request, `guidance`
with the mean KL from the patient (nats a token) and the share of changed tokens in each choice. Log-probabilities are the
mixture's, before temperature and truncation. What a request asks for and is not offered is refused, never ignored.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import json
import math
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from nemo_pivotrl.backends.reference.guided import Steering, Token
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.errors import InputError, short
from nemo_pivotrl.llmdoctor.decode import load, prompt_ids
from nemo_pivotrl.tools.guided_batches import Batches, Busy, Growing, Job, Piece, figures

MAX_STOPS, MAX_STOP_CHARS, MAX_TOP = 16, 256, 20
COMMON = {
    "model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "n", "seed", "stop", "stream",
    "stream_options", "logprobs", "guidance",
}  # fmt: skip
OWN = {"completions": {"prompt"}, "chat": {"messages", "top_logprobs"}}
WITHOUT_EFFECT = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
NEUTRAL: dict[str, Any] = {
    "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "echo": False, "best_of": 1, "suffix": "",
    "tools": [], "tool_choice": "none", "functions": [], "response_format": {"type": "text"}, "modalities": ["text"],
}  # fmt: skip
"""What is not offered, with the value that asks for nothing."""


class Refusal(Exception):
    """A request's fault: message, the field, HTTP status, OpenAI's code."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, checked."""

    chat: bool
    jobs: list[Job]
    queue: asyncio.Queue[Piece]
    prompt_tokens: int
    stream: bool
    usage: bool
    logprobs: bool
    head: dict[str, Any]
    """id, object, created, model."""


def _json(value: Any, status: int = 200) -> Response:
    return Response(json.dumps(value), status, media_type="application/json")


def _error(message: str, param: str | None = None, status: int = 400, code: str | None = None) -> Response:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return _json({"error": {"message": message, "type": kind, "param": param, "code": code}}, status)


class Server:
    """The recipe's models behind the endpoints."""

    def __init__(self, recipe: Recipe):
        self.recipe, self.settings, self.defaults = recipe, recipe.serve_guided, recipe.decode
        self.chat, self.generator, self.own_chats = load(recipe)
        bounds = (self.settings.max_batch, self.settings.max_waiting, recipe.num_threads)
        self.batches = Batches(self.generator, self.chat, *bounds)
        self.begun = int(time.time())

    async def models(self, request: Request) -> Response:
        names = list(self.generator.doctors.models)
        model = {"id": self.settings.model, "object": "model", "created": self.begun, "owned_by": "nemo_pivotrl"}
        return _json({"object": "list", "data": [model | {"doctors": names}]})

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, chat=False)

    async def chat_completions(self, request: Request) -> Response:
        return await self._answer(request, chat=True)

    async def _answer(self, request: Request, chat: bool) -> Response:
        try:
            asked = self._read(await self._body(request), chat)
            self.batches.submit(asked.jobs)
        except Refusal as error:
            return _error(error.message, error.param, error.status, error.code)
        except Busy as error:
            return _error(f"{error}; try again later", None, 429, "rate_limit_exceeded")
        if asked.stream:
            return StreamingResponse(self._stream(asked), media_type="text/event-stream")
        return await self._whole(asked, request)

    async def _body(self, request: Request) -> dict[str, Any]:
        """The request's JSON object, of which no more than `max_body_bytes` are read."""
        read = bytearray()
        async for block in request.stream():
            read += block
            if len(read) > self.settings.max_body_bytes:
                raise Refusal(f"the request is longer than {self.settings.max_body_bytes} bytes", status=413)
        try:
            body = json.loads(bytes(read) or b"null")
        except (ValueError, RecursionError) as error:
            raise Refusal(f"the body is not JSON: {short(str(error))}") from None
        if not isinstance(body, dict):
            raise Refusal("the body must be a JSON object")
        return body

    # ---- reading requests ----

    def _read(self, body: Mapping[str, Any], chat: bool) -> Asked:
        kind = "chat" if chat else "completions"
        _refuse_unknown(body, COMMON | OWN[kind])
        if body.get("model") not in (None, self.settings.model):
            found = f"no model {short(body['model'], 60)}; this server has {self.settings.model}"
            raise Refusal(found, "model", 404, "model_not_found")
        texts = [self._messages(body)] if chat else self._prompts(body)
        n = _integer(body, "n", 1, 1, self.settings.max_choices)
        if n * len(texts) > self.settings.max_choices:
            raise Refusal(f"{n * len(texts)} choices; at most {self.settings.max_choices}", "n")
        request, stops, top = self._steering(body, chat), _stops(body), _top(body, chat)
        limit = self._max_tokens(body, max(max(map(len, [ids, *own.values()])) for ids, own in texts))
        seed = _integer(body, "seed", secrets.randbits(62), -(1 << 63), 1 << 64)
        queue: asyncio.Queue[Piece] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def emit(piece: Piece) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is gone: the server is closing
                loop.call_soon_threadsafe(queue.put_nowait, piece)

        jobs = []
        for choice in range(n * len(texts)):
            ids, own = texts[choice // n]
            growing = Growing(lambda tokens: self.chat.tokenizer.decode(list(tokens)), stops)
            steering = Steering(**request, max_new_tokens=limit, seed=seed + choice % n, top=max(top, 0))
            jobs.append(Job(choice, ids, own, steering, growing, emit))
        try:
            self.generator.check([j.prompt for j in jobs], [j.request for j in jobs], [j.own_prompts for j in jobs])
        except InputError as error:
            problem = error.problems[0]
            raise Refusal(f"{problem.field}: {problem.found}; {problem.remedy}", problem.field) from None
        options = body.get("stream_options") or {}
        head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": self.settings.model,
        }
        return Asked(
            chat=chat,
            jobs=jobs,
            queue=queue,
            prompt_tokens=sum(len(ids) for ids, _ in texts),
            stream=_boolean(body, "stream"),
            usage=isinstance(options, Mapping) and _boolean(options, "include_usage"),
            logprobs=top >= 0,
            head=head,
        )

    def _messages(self, body: Mapping[str, Any]) -> tuple[list[int], dict[str, list[int]]]:
        messages = body.get("messages")
        if not (isinstance(messages, list) and messages and all(_is_message(m) for m in messages)):
            raise Refusal("a list of {role, content} whose content is text", "messages")
        try:
            return prompt_ids(messages, [], self.chat, self.own_chats)
        except InputError as error:
            raise Refusal(f"{error.problems[0].remedy}: {error.problems[0].found}", "messages") from None

    def _prompts(self, body: Mapping[str, Any]) -> list[tuple[list[int], dict[str, list[int]]]]:
        """A text, token ids, or a list of either."""
        given = body.get("prompt")
        whole = isinstance(given, str) or (isinstance(given, list) and given and isinstance(given[0], int))
        prompts = [given] if whole else given
        if not isinstance(prompts, list) or not 0 < len(prompts) <= self.settings.max_choices:
            raise Refusal(f"a text, token ids, or a list of 1 to {self.settings.max_choices} of them", "prompt")
        made: list[tuple[list[int], dict[str, list[int]]]] = []
        for prompt in prompts:
            if isinstance(prompt, str) and prompt:
                made.append(prompt_ids(prompt, [], self.chat, {}))
            elif isinstance(prompt, list) and prompt and all(type(i) is int for i in prompt):
                made.append((prompt, {}))
            else:
                raise Refusal(f"neither a text nor token ids: {short(prompt, 60)}", "prompt")
        return made

    def _steering(self, body: Mapping[str, Any], chat: bool) -> dict[str, Any]:
        """Arguments of Steering: the recipe's, where the request does not say otherwise."""
        guidance = body.get("guidance") or {}
        if not isinstance(guidance, Mapping) or set(guidance) - {"alpha", "beta"}:
            raise Refusal('guidance is {"alpha": number, "beta": {doctor: number}}', "guidance")
        given = guidance.get("beta") or {}
        if not isinstance(given, Mapping):
            raise Refusal("a mapping from doctor to number", "guidance.beta")
        doctors = self.defaults.doctors
        if strangers := sorted(set(given) - set(doctors)):
            known = ", ".join(doctors) or "none"
            raise Refusal(f"no doctor {short(', '.join(strangers), 60)}; the doctors are {known}", "guidance.beta")
        return {
            "alpha": _number(guidance, "alpha", self.defaults.alpha, -math.inf, math.inf, "guidance."),
            "beta": {n: _number(given, n, d.beta, -math.inf, math.inf, "guidance.beta.") for n, d in doctors.items()},
            "temperature": _number(body, "temperature", self.defaults.temperature, 0, 10),
            "top_p": _number(body, "top_p", self.defaults.top_p, 1e-6, 1),
            "top_k": _integer(body, "top_k", self.defaults.top_k, 0, 1 << 31),
        }

    def _max_tokens(self, body: Mapping[str, Any], prompt: int) -> int:
        key = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
        room = min(self.defaults.max_new_tokens, self.generator.context - prompt)
        if room < 1:
            raise Refusal(
                f"the prompt's {prompt} tokens fill the context of {self.generator.context}",
                None,
                code="context_length_exceeded",
            )
        return _integer(body, key, int(room), 1, self.defaults.max_new_tokens)

    # ---- writing answers ----

    async def _pieces(self, asked: Asked) -> AsyncIterator[Piece]:
        """All news of the request until its last answer is finished; leaving early frees its places in the batch."""
        running = len(asked.jobs)
        try:
            while running:
                piece = await asked.queue.get()
                yield piece
                running -= piece.finish_reason is not None or piece.error is not None
        finally:
            for job in asked.jobs:
                job.gone = True

    async def _whole(self, asked: Asked, request: Request) -> Response:
        texts, tokens, reasons = ([""] * len(asked.jobs), [[] for _ in asked.jobs], [""] * len(asked.jobs))  # type: ignore[var-annotated]
        async with contextlib.aclosing(self._pieces(asked)) as pieces:
            async for piece in pieces:
                if piece.error:
                    return _error(piece.error, status=500)
                texts[piece.choice] += piece.text
                tokens[piece.choice] += [piece.token] if piece.token else []
                reasons[piece.choice] = piece.finish_reason or ""
                if await request.is_disconnected():
                    return Response(status_code=499)
        choices = []
        for i, text in enumerate(texts):
            body = {"message": {"role": "assistant", "content": text}} if asked.chat else {"text": text}
            logprobs = self._logprobs(tokens[i], asked.chat) if asked.logprobs else None
            end = {"logprobs": logprobs, "finish_reason": reasons[i], "guidance": figures(tokens[i])}
            choices.append({"index": i, **body, **end})
        return _json({**asked.head, "choices": choices, "usage": _usage(asked, sum(map(len, tokens)))})

    async def _stream(self, asked: Asked) -> AsyncIterator[bytes]:
        head = {**asked.head, "object": "chat.completion.chunk"} if asked.chat else asked.head
        tokens: list[list[Token]] = [[] for _ in asked.jobs]

        def event(choice: int, delta: Any, **more: Any) -> bytes:
            body = {"delta": delta} if asked.chat else {"text": delta}
            shown = {"index": choice, **body, "logprobs": None, "finish_reason": None, **more}
            return _event({**head, "choices": [shown]})

        for job in asked.jobs if asked.chat else ():
            yield event(job.choice, {"role": "assistant", "content": ""})
        async with contextlib.aclosing(self._pieces(asked)) as pieces:
            async for piece in pieces:
                if piece.error:
                    yield _event(
                        {"error": {"message": piece.error, "type": "server_error", "param": None, "code": None}}
                    )
                    return
                new = [piece.token] if piece.token else []
                offset = sum(len(self._word(t.token_id)) for t in tokens[piece.choice])
                tokens[piece.choice] += new
                more = {"logprobs": self._logprobs(new, asked.chat, offset)} if asked.logprobs else {}
                if piece.text or more:
                    yield event(piece.choice, {"content": piece.text} if asked.chat else piece.text, **more)
                if piece.finish_reason:
                    last = {"finish_reason": piece.finish_reason, "guidance": figures(tokens[piece.choice])}
                    yield event(piece.choice, {} if asked.chat else "", **last)
        if asked.usage:
            yield _event({**head, "choices": [], "usage": _usage(asked, sum(map(len, tokens)))})
        yield b"data: [DONE]\n\n"

    def _word(self, token: int) -> str:
        return self.chat.tokenizer.decode([token])

    def _logprobs(self, tokens: Sequence[Token], chat: bool, offset: int = 0) -> dict[str, Any]:
        words = [self._word(t.token_id) for t in tokens]
        if chat:

            def entry(word: str, value: float) -> dict[str, Any]:
                return {"token": word, "logprob": value, "bytes": list(word.encode("utf-8", "replace"))}

            return {
                "content": [
                    {**entry(word, t.mixed_log_prob), "top_logprobs": [entry(self._word(i), lp) for i, lp in t.top]}
                    for word, t in zip(words, tokens, strict=True)
                ]
            }
        offsets = [offset + sum(map(len, words[:i])) for i in range(len(words))]
        return {
            "tokens": words,
            "token_logprobs": [t.mixed_log_prob for t in tokens],
            # tokens of the same text (bytes of a character) share an entry: the likelier one's
            "top_logprobs": [{self._word(i): lp for i, lp in reversed(t.top)} for t in tokens],
            "text_offset": offsets,
        }


def _event(value: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def _usage(asked: Asked, generated: int) -> dict[str, int]:
    total = asked.prompt_tokens + generated
    return {"prompt_tokens": asked.prompt_tokens, "completion_tokens": generated, "total_tokens": total}


# ---- fields of a request ----


def _refuse_unknown(body: Mapping[str, Any], known: set[str]) -> None:
    for key, value in body.items():
        if key in NEUTRAL:
            if value is not None and value != NEUTRAL[key]:
                raise Refusal(f"{key} is not offered here; leave it out", key, code="unsupported_parameter")
        elif key not in known | WITHOUT_EFFECT:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
            raise Refusal(f"unknown field {short(key, 60)}; {hint}", short(key, 60), code="unknown_parameter")


def _number(body: Mapping[str, Any], key: str, default: float, low: float, high: float, prefix: str = "") -> float:
    value = body.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high or abs(value) > 1e6:
        allowed = f"a number from {low} to {high}" if math.isfinite(high) else "a finite number"
        raise Refusal(f"{short(value, 60)}: use {allowed}", prefix + key)
    return float(value)


def _integer(body: Mapping[str, Any], key: str, default: int, low: int, high: int) -> int:
    value = body.get(key)
    if value is None:
        return default
    if type(value) is not int or not low <= value <= high:
        raise Refusal(f"{short(value, 60)}: use an integer from {low} to {high}", key)
    return value


def _boolean(body: Mapping[str, Any], key: str) -> bool:
    value = body.get(key)
    if not isinstance(value, (bool, type(None))):
        raise Refusal(f"{short(value, 60)}: use true or false", key)
    return bool(value)


def _stops(body: Mapping[str, Any]) -> tuple[str, ...]:
    given = body.get("stop")
    stops = [given] if isinstance(given, str) else given or []
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise Refusal(f"a text or a list of at most {MAX_STOPS}", "stop")
    if not all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_CHARS for s in stops):
        raise Refusal(f"each of 1 to {MAX_STOP_CHARS} characters", "stop")
    return tuple(stops)


def _top(body: Mapping[str, Any], chat: bool) -> int:
    """How many likeliest tokens to list; -1: no log-probabilities at all."""
    if not chat:
        return _integer(body, "logprobs", -1, 0, MAX_TOP)
    wanted = _boolean(body, "logprobs")
    top = _integer(body, "top_logprobs", 0, 0, MAX_TOP)
    if top and not wanted:
        raise Refusal("needs logprobs: true", "top_logprobs")
    return top if wanted else -1


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
    )


# ---- the application ----


def create_app(recipe: Recipe) -> Starlette:
    """The server's application, its models loaded. Raises InputError for models that do not belong together."""
    server = Server(recipe)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        server.batches.close()

    async def refuse(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        return _error(f"{request.method} {request.url.path}: {getattr(error, 'detail', 'fault')}", status=status)

    app = Starlette(
        routes=[
            Route("/v1/models", server.models),
            Route("/v1/completions", server.completions, methods=["POST"]),
            Route("/v1/chat/completions", server.chat_completions, methods=["POST"]),
        ],
        lifespan=lifespan,
        exception_handlers={HTTPException: refuse, Exception: refuse},
    )
    app.state.server = server
    return app


def serve(recipe: Recipe, host: str, port: int) -> None:
    """Serve until interrupted."""
    import uvicorn

    app = create_app(recipe)
    print(f"{recipe.serve_guided.model} on http://{host}:{port}/v1", flush=True)
    uvicorn.run(app, host=host, port=port, log_level="warning")
