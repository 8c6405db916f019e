"""Asking a judge: until it gives a verdict, each question once, in both orders, and never again what it has answered.

`judge` asks it whether actions are equivalent, `llmdoctor/head_to_head` which of two answers is better.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

import httpx

from nemo_pivotrl import config
from nemo_pivotrl.backends.http_retry import growing_pause
from nemo_pivotrl.core.artifacts import json_line
from nemo_pivotrl.core.atomic import append_line, open_input
from nemo_pivotrl.core.errors import InputError, Problem, short
from nemo_pivotrl.verifiers.base import VerifierFault
from nemo_pivotrl.verifiers.judge_endpoint import Endpoint, PassingFault
from nemo_pivotrl.verifiers.judge_prompt import Question, prompt, read_verdict

R = TypeVar("R")


class Cache(Generic[R]):
    """Rulings by content, in memory and in a file that several processes may append to. `path` empty: no file.

    `read` makes a ruling, a dataclass, of a line's object. Lines that cannot be read (torn by a crash, another program's) are
    passed over: their question is asked again.
    """

    def __init__(self, path: str, read: Callable[[Mapping[str, Any]], R]):
        self._path = path
        self._known: dict[str, R] = {}
        if not path:
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        append_line(Path(path), b"")  # it can be written
        with open_input(path) as handle:
            for line in handle:
                try:
                    row = json.loads(line)
                    key, ruling = row["key"], read(row)
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue
                if isinstance(key, str):
                    self._known[key] = ruling

    def get(self, key: str) -> R | None:
        """What is known of it."""
        return self._known.get(key)

    def put(self, key: str, ruling: R) -> None:
        """Remember it."""
        self._known[key] = ruling
        if self._path:
            append_line(Path(self._path), json_line({"key": key, **asdict(ruling)}))  # type: ignore[call-overload]


class Asking(Generic[R]):
    """One judge, and its rulings. Threads may share it; the same question from several of them is asked once.

    `section`: the settings' place in a recipe, for messages.
    """

    def __init__(self, settings: config.JudgeServer, section: str, cache: Cache[R]):
        self.settings, self._section, self._cache = settings, section, cache
        self._endpoint = Endpoint(settings, settings.timeout_s, section)
        self._lock = threading.Lock()
        self._open: dict[str, Future[R]] = {}

    def close(self) -> None:
        """Give the connections back; the end of the object does so too."""
        self._endpoint.close()

    def asked(self) -> list[Any]:
        """What of the settings an answer depends on: part of a ruling's key."""
        s = self.settings
        return [s.model, s.temperature, s.max_tokens, s.extra_body, s.votes, s.both_orders]

    def once(self, key: str, rule: Callable[[], R]) -> R:
        """The ruling of this key: known, in another thread's work, or made by `rule`, whose errors it raises."""
        with self._lock:
            known, other = self._cache.get(key), self._open.get(key)
            if known is None and other is None:
                mine = self._open[key] = Future[R]()
        if known is not None:
            return known
        if other is not None:
            return other.result()
        try:
            ruling = rule()
            self._cache.put(key, ruling)
        except BaseException as error:
            mine.set_exception(error)
            raise
        else:
            mine.set_result(ruling)
            return ruling
        finally:
            with self._lock:
                del self._open[key]

    def votes(self, question: Question, context: str, first: str, second: str) -> list[Counter[str]]:
        """How often each word was the verdict, for each order. Every order is asked to the end, so that orders which disagree can
        be told from a plain difference. Raises VerifierFault where the judge gives no verdict."""
        orders = [(first, second), (second, first)][: 1 + self.settings.both_orders]
        votes = range(self.settings.votes)
        return [Counter(self._ask(question, context, *order, vote) for vote in votes) for order in orders]

    def _ask(self, question: Question, context: str, first: str, second: str, vote: int) -> str:
        """One verdict. What may pass, an answer without a verdict too, is asked again after growing pauses.

        Every request has a code of its own, so that one asked again at temperature 0 need not fail alike.
        """
        s = self.settings
        for attempt in itertools.count():
            messages, code = prompt(question, context, first, second, f"{vote} {attempt}")
            asked: dict[str, Any] = {
                "model": s.model,
                "messages": messages,
                "temperature": s.temperature,
                "max_tokens": s.max_tokens,
            }
            asked |= s.extra_body
            body = {name: value for name, value in asked.items() if value is not None}  # `temperature: null`: not sent
            try:
                return self._answer(body, question, code)
            except PassingFault as fault:
                if attempt == s.max_retries:
                    raise VerifierFault(fault.kind, f"{fault} (asked {attempt + 1} times)") from None
                time.sleep(max(fault.pause, growing_pause(attempt, s.backoff_s)))
        raise AssertionError("unreachable")

    def _answer(self, body: dict[str, Any], question: Question, code: str) -> str:
        read = self._endpoint.exchange("POST", "chat/completions", body)
        try:
            choice = json.loads(read)["choices"][0]
            content, reason = choice["message"]["content"], choice.get("finish_reason")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            found = self._endpoint.show(read.decode("utf-8", "replace"))
            raise PassingFault("judge_unreadable", f"no chat completion: {found}") from None
        if reason == "length":
            raise PassingFault("judge_unreadable", f"the answer was cut off; raise {self._section}.max_tokens")
        verdict = read_verdict(content, code, question.words) if isinstance(content, str) else None
        if verdict is None:
            raise PassingFault("judge_unreadable", "an answer without a verdict")
        return verdict


def judge_problems(settings: config.JudgeServer, section: str) -> list[Problem]:
    """What no request could be made with."""
    problems = []

    def refuse(name: str, found: str, remedy: str) -> None:
        problems.append(Problem("recipe", None, f"{section}.{name}", found, remedy))

    try:
        url = httpx.URL(settings.base_url)
        plain = url.scheme in ("http", "https") and url.host and not (url.query or url.fragment)
        plain = plain and 0 < (url.port or 80) < 1 << 16 and not re.search(r"[\s%]", settings.base_url.split("/")[2])
    except httpx.InvalidURL:
        url, plain = httpx.URL(), False
    if not settings.base_url:
        refuse(
            "base_url", "nothing", "give the address of an OpenAI-compatible endpoint, e.g. http://127.0.0.1:8000/v1"
        )
    elif url.userinfo:
        refuse("base_url", "an address with a password", "put the key into the variable that api_key_env names")
    elif not plain:
        refuse("base_url", short(settings.base_url), "give an http or https address that /chat/completions can follow")
    if not settings.model:
        refuse("model", "nothing", "give the name under which the endpoint serves the judge")
    try:
        json.dumps(settings.extra_body, allow_nan=False)
    except (TypeError, ValueError) as error:
        refuse("extra_body", short(str(error)), "write values that JSON has")
    for name in sorted({"messages", "model", "n", "stream"} & settings.extra_body.keys()):
        refuse(f"extra_body.{name}", short(settings.extra_body[name]), "remove it: the judge sets it")
    return problems


def refuse_self_judge(settings: config.JudgeServer, judged: str, section: str, role: str) -> None:
    """Raises InputError where the judge is the model that it judges, unless `allow_self_judge`. `role`: what that model is.

    Compared with `judged` are the judge's name and what the endpoint's `/models` says stands behind it (`id`, and `root`,
    vLLM's path of the weights): the whole name, the last component in any case, and the place that a path leads to. A copy
    of the weights under another name is not found. Where `/models` gives no answer the names alone are compared, and a
    warning is logged: that the judge is another model is then not known.
    """
    if settings.allow_self_judge or not judged:
        return
    names = {settings.model}
    endpoint = Endpoint(settings, min(5.0, settings.timeout_s), section)
    try:
        listed = json.loads(endpoint.exchange("GET", "models"))["data"]
        ours = [m for m in listed if m["id"] == settings.model]
        if not ours and len(listed) == 1:  # a server of one model may take any name for it
            ours = listed
        names |= {str(name) for m in ours for name in (m["id"], m.get("root")) if name}
    except (VerifierFault, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        found = error if isinstance(error, VerifierFault) else "it has no list of models"
        text = "%s: %s/models: %s; whether it serves the %s is judged by its name alone"
        logging.getLogger(__name__).warning(text, section, settings.base_url.rstrip("/"), found, role)
    finally:
        endpoint.close()
    same = next((name for name in sorted(names) if _same_model(name, judged)), None)
    if same is not None:
        served = settings.model if same == settings.model else f"{settings.model}, which serves {same}"
        remedy = f"the {role} is {judged}: take another model, or set {section}.allow_self_judge=true"
        raise InputError(Problem("recipe", None, f"{section}.model", served, remedy))


def _same_model(name: str, judged: str) -> bool:
    first, second = (text.rstrip("/").rpartition("/")[2].casefold() for text in (name, judged))
    return (
        name == judged
        or first == second
        or (os.path.exists(name) and os.path.realpath(name) == os.path.realpath(judged))
    )
