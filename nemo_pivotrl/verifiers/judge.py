"""`judge`: an LLM says whether two actions amount to the same, over any OpenAI-compatible endpoint.

Both orders are asked, so that a liking for one place cannot pass; text of an action cannot speak for the judge
(`judge_prompt`); answers are kept by content; a judge without an answer is a `VerifierFault`, so that the sample is excluded
and never scores 0; and how far to trust a judge is measured (`judge_calibration`).

Deviations from NeMo-Gym's terminus_judge: its labels can be quoted from an action, it scores an answer without a label 0,
it asks one order unless told, and one of its shipped configs lets the policy judge itself; this refuses.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import threading
import time
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import httpx

from nemo_pivotrl import config
from nemo_pivotrl.backends.http_retry import growing_pause
from nemo_pivotrl.core.artifacts import digest, json_line
from nemo_pivotrl.core.atomic import append_line, open_input
from nemo_pivotrl.core.errors import InputError, Problem, short
from nemo_pivotrl.core.types import Action, Case, Verdict
from nemo_pivotrl.verifiers.base import Judging, Ruling, VerifierFault
from nemo_pivotrl.verifiers.bounds import decode_json
from nemo_pivotrl.verifiers.judge_calibration import Calibration, calibrate
from nemo_pivotrl.verifiers.judge_endpoint import Endpoint, PassingFault
from nemo_pivotrl.verifiers.judge_prompt import RUBRIC_VERSION, prompt, read_verdict, shown, shown_context
from nemo_pivotrl.verifiers.swe import category_of

__all__ = ["Calibration", "Judge", "JudgeVerifier", "calibrate", "connect", "refuse_self_judge"]

ORDERS_DISAGREE = "the orders disagree"


class _Cache:
    """Rulings by content, in memory and in a file that several processes may append to. `path` empty: no file.

    Lines that cannot be read (torn by a crash, another program's) are passed over: their question is asked again.
    """

    def __init__(self, path: str):
        self._path = path
        self._known: dict[str, Ruling] = {}
        if not path:
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        append_line(Path(path), b"")  # it can be written
        with open_input(path) as handle:
            for line in handle:
                try:
                    row = json.loads(line)
                    key, ruling = row["key"], Ruling(row["same"], row["votes"], row["detail"])
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue
                texts = (key, ruling.votes, ruling.detail)
                if isinstance(ruling.same, bool) and all(isinstance(text, str) for text in texts):
                    self._known[key] = ruling

    def get(self, key: str) -> Ruling | None:
        return self._known.get(key)

    def put(self, key: str, ruling: Ruling) -> None:
        self._known[key] = ruling
        if not self._path:
            return
        append_line(Path(self._path), json_line({"key": key, **asdict(ruling)}))


class Judge:
    """Asks, counts votes and remembers. Threads may share it; the same question from several of them is asked once."""

    def __init__(self, settings: config.Judge):
        self.settings = settings
        self.concurrency = settings.concurrency
        self._endpoint = Endpoint(settings, settings.timeout_s)
        self._cache = _Cache(settings.cache)
        self._lock = threading.Lock()
        self._open: dict[str, Future[Ruling]] = {}

    def __repr__(self) -> str:
        return f"Judge({self.settings.model!r} at {self.settings.base_url!r})"

    def close(self) -> None:
        """Give the connections back; the end of the object does so too."""
        self._endpoint.close()

    def equivalent(self, kind: str, case: Case, expected: str, actual: str) -> Ruling:
        """Whether two actions do the same in `case`. Raises VerifierFault where the judge gives no answer."""
        if expected.strip() == actual.strip():
            return Ruling(True, "", "equal texts")
        s = self.settings
        texts = shown_context(case, s.max_context_chars), *(shown(t, s.max_action_chars) for t in (expected, actual))
        if texts[1] == texts[2]:
            return Ruling(False, "", "they differ in invisible characters only, which the judge is not shown")
        asked = [s.model, s.temperature, s.max_tokens, s.extra_body, s.votes, s.both_orders]
        key = digest([kind, RUBRIC_VERSION, asked, texts], 32)
        with self._lock:
            known, other = self._cache.get(key), self._open.get(key)
            if known is None and other is None:
                mine = self._open[key] = Future[Ruling]()
        if known is not None:
            return known
        if other is not None:
            return other.result()
        try:
            ruling = self._rule(kind, *texts)
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

    def _rule(self, kind: str, context: str, expected: str, actual: str) -> Ruling:
        """Every order is asked to the end, so that orders which disagree can be told from a plain difference."""
        votes = self.settings.votes
        orders = [(expected, actual), (actual, expected)][: 1 + self.settings.both_orders]
        counts = [sum(self._ask(kind, context, *order, vote) for vote in range(votes)) for order in orders]
        said = [2 * count > votes for count in counts]
        tally = " ".join(f"{count}/{votes}" for count in counts)
        return Ruling(all(said), tally, "" if len(set(said)) == 1 else ORDERS_DISAGREE)

    def _ask(self, kind: str, context: str, first: str, second: str, vote: int) -> bool:
        """One answer. What may pass, an answer without a verdict too, is asked again after growing pauses.

        Every request has a code of its own, so that one asked again at temperature 0 need not fail alike.
        """
        s = self.settings
        for attempt in itertools.count():
            messages, code = prompt(kind, context, first, second, f"{vote} {attempt}")
            asked: dict[str, Any] = {
                "model": s.model,
                "messages": messages,
                "temperature": s.temperature,
                "max_tokens": s.max_tokens,
            }
            asked |= s.extra_body
            body = {name: value for name, value in asked.items() if value is not None}  # `temperature: null`: not sent
            try:
                return self._answer(body, code)
            except PassingFault as fault:
                if attempt == s.max_retries:
                    raise VerifierFault(fault.kind, f"{fault} (asked {attempt + 1} times)") from None
                time.sleep(max(fault.pause, growing_pause(attempt, s.backoff_s)))
        raise AssertionError("unreachable")

    def _answer(self, body: dict[str, Any], code: str) -> bool:
        read = self._endpoint.exchange("POST", "chat/completions", body)
        try:
            choice = json.loads(read)["choices"][0]
            content, reason = choice["message"]["content"], choice.get("finish_reason")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            found = self._endpoint.show(read.decode("utf-8", "replace"))
            raise PassingFault("judge_unreadable", f"no chat completion: {found}") from None
        if reason == "length":
            raise PassingFault("judge_unreadable", "the answer was cut off; raise verifier.judge.max_tokens")
        verdict = read_verdict(content, code) if isinstance(content, str) else None
        if verdict is None:
            raise PassingFault("judge_unreadable", "an answer without a verdict")
        return verdict


def connect(settings: config.Judge) -> Judge:
    """A judge behind `settings.base_url`. Raises InputError for settings that no request could be made with."""
    problems = []

    def refuse(name: str, found: str, remedy: str) -> None:
        problems.append(Problem("recipe", None, f"verifier.judge.{name}", found, remedy))

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
    if problems:
        raise InputError(problems)
    try:
        return Judge(settings)
    except OSError as error:
        refuse("cache", short(str(error)), "give a file that can be written, or none")
        raise InputError(problems) from None


def refuse_self_judge(settings: config.Judge, policy: str) -> None:
    """Raises InputError where the judge is the policy, unless `allow_self_judge`.

    Compared with `policy` are the judge's name and what the endpoint's `/models` says stands behind it (`id`, and `root`,
    vLLM's path of the weights): the whole name, the last component in any case, and the place that a path leads to. A copy
    of the weights under another name is not found. Where `/models` gives no answer the names alone are compared, and a
    warning is logged: that the judge is another model is then not known.
    """
    if settings.allow_self_judge or not policy:
        return
    names = {settings.model}
    endpoint = Endpoint(settings, min(5.0, settings.timeout_s))
    try:
        listed = json.loads(endpoint.exchange("GET", "models"))["data"]
        ours = [m for m in listed if m["id"] == settings.model]
        if not ours and len(listed) == 1:  # a server of one model may take any name for it
            ours = listed
        names |= {str(name) for m in ours for name in (m["id"], m.get("root")) if name}
    except (VerifierFault, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        found = error if isinstance(error, VerifierFault) else "it has no list of models"
        text = "verifier.judge: %s/models: %s; whether it serves the policy is judged by its name alone"
        logging.getLogger(__name__).warning(text, settings.base_url.rstrip("/"), found)
    finally:
        endpoint.close()
    same = next((name for name in sorted(names) if _same_model(name, policy)), None)
    if same is not None:
        served = settings.model if same == settings.model else f"{settings.model}, which serves {same}"
        remedy = f"the policy is {policy}: take another model, or set verifier.judge.allow_self_judge=true"
        raise InputError(Problem("recipe", None, "verifier.judge.model", served, remedy))


def _same_model(name: str, policy: str) -> bool:
    first, second = (text.rstrip("/").rpartition("/")[2].casefold() for text in (name, policy))
    return (
        name == policy
        or first == second
        or (os.path.exists(name) and os.path.realpath(name) == os.path.realpath(policy))
    )


@dataclass(kw_only=True, frozen=True)
class JudgeVerifier:
    """Asks the judge about every action that is not plainly equal to the expert's, or plainly no answer to it."""

    name: ClassVar[str] = "judge"
    version: ClassVar[str] = "1"
    kind: Literal["auto", "terminal", "search", "message", "action"] = "auto"
    """The rubric; `auto` takes `terminal` for shells and Terminus turns, `search` for search engines, else the action's own."""
    limits: config.Limits = field(default_factory=config.Limits)
    judge: Judging | None = None

    @property
    def asks_judge(self) -> bool:
        """Whether a verdict may need the judge."""
        return True

    @property
    def concurrency(self) -> int:
        return self.judge.concurrency if self.judge else 1

    def verify(self, case: Case, actual: Action) -> Verdict:
        """1.0 or 0.0. Categories: EQUAL, JUDGE_SAME; JUDGE_DIFFERENT, JUDGE_ORDERS_DISAGREE, ACTION_TYPE_MISMATCH,
        UNDECODABLE, NO_ACTION. Calls of one turn have no order."""
        if actual.kind in ("none", "malformed"):
            return Verdict(0.0, "NO_ACTION" if actual.kind == "none" else "UNDECODABLE", actual.detail)
        if actual.kind != case.expected.kind:
            return Verdict(0.0, "ACTION_TYPE_MISMATCH", f"the expert {'calls' if case.expected.calls else 'talks'}")
        try:
            expected = self._text(case.expected)
        except ValueError as error:  # the row is at fault, not the policy: the candidate is excluded
            raise VerifierFault("expected_arguments", str(error)) from None
        try:
            found = self._text(actual)
        except ValueError as error:
            return Verdict(0.0, "UNDECODABLE", str(error))
        if found == expected:
            return Verdict(1.0, "EQUAL")
        if not found:
            return Verdict(0.0, "NO_ACTION", "an empty message")
        assert self.judge is not None, "load_verifier connects the judge"
        ruling = self.judge.equivalent(self._kind(case), case, expected, found)
        disagree = ruling.detail == ORDERS_DISAGREE
        category = "JUDGE_SAME" if ruling.same else "JUDGE_ORDERS_DISAGREE" if disagree else "JUDGE_DIFFERENT"
        return Verdict(float(ruling.same), category, ruling.detail, figures={"votes": ruling.votes})

    def _text(self, action: Action) -> str:
        """What is compared. Raises ValueError for a call whose arguments are no JSON."""
        if action.kind == "message":
            return action.content.strip()
        made = ((c.name, decode_json(c.arguments or "{}", self.limits)) for c in action.calls)
        return "\n".join(
            sorted(f"{name} {json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False)}" for name, value in made)
        )

    def _kind(self, case: Case) -> str:
        if self.kind != "auto":
            return self.kind
        metadata = case.fields.get("metadata")
        harness = case.fields.get("harness") or (metadata.get("harness") if isinstance(metadata, dict) else "")
        if case.expected.kind == "message":
            return "terminal" if str(harness).startswith("terminus") else "message"
        names = [call.name for call in case.expected.calls]
        if all(category_of(name) == "bash" for name in names):
            return "terminal"
        return "search" if all("search" in n.lower() and category_of(n) == "unknown" for n in names) else "action"
