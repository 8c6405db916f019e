"""Any number of OpenAI-compatible servers of one policy as one sampler.

Requests go to the healthy server that has the fewest, a prompt's samples preferably to the same one, whose prefix cache then
knows the prompt. A request that fails is tried again, elsewhere if it can be, after a growing pause. A server that cannot be
reached, or fails several times in a row, gets nothing more until its /health says it is well again and, in training, it has
the current weights. Nothing of this is ever a reward: what stays lost after all retries is `FailedSample`.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from torch import Tensor

from nemo_pivotrl.backends.api_keys import goes_to, key_of
from nemo_pivotrl.backends.http_client import UNREACHABLE, HttpClient, Unreadable
from nemo_pivotrl.backends.http_retry import RETRIED, growing_pause, retry_after
from nemo_pivotrl.backends.identity import policy_revision
from nemo_pivotrl.backends.vllm.requests import IMPOSSIBLE, WANTED, choice_of, families, in_order, request, sample_of
from nemo_pivotrl.config import Generation, Policy, Vllm
from nemo_pivotrl.core.errors import InputError, Problem, short
from nemo_pivotrl.core.types import FailedSample, Sample

BUSY = frozenset({429, 503})
"""The server is well and has too much to do: it is given a pause, and is not blamed."""
BUSY_PAUSE = 1.0
"""Seconds, where it does not say how long."""
MAX_ANSWER = 256 << 20
"""Bytes of one answer."""
_log = logging.getLogger(__name__)


class TransientError(Exception):
    """A failure that may be over when the request is made again."""

    def __init__(self, kind: str, detail: str, pause: float = 0.0):
        super().__init__(detail)
        self.kind, self.pause = kind, pause


@dataclass
class Server:
    """State of one server in the pool. Times are of the monotonic clock."""

    url: str
    """Without /v1 and without a slash at its end."""
    model: str = ""
    busy: int = 0
    """Requests that it holds."""
    failures: int = 0
    """In a row."""
    well: bool = True
    on_trial: bool = False
    """It has come back, and gets one request at a time until it has answered one: a server that hangs may call itself well."""
    ejections: int = 0
    """Since it last answered. The pause before it is looked at again grows with them."""
    not_before: float = 0.0
    """It asked for a pause until then."""


class Servers:
    """See `backends.base`. Raises InputError for servers that do not answer or serve another model."""

    in_one_process = False

    def __init__(self, policy: Policy, settings: Vllm):
        self.settings = settings
        self.counts: Counter[str] = Counter()
        """Requests tried again, by the kind of failure; servers ejected and re-admitted; turns lost."""
        # a proxy has no business between a trainer and its servers
        self._client = HttpClient(None, proxies=False, name="servers")
        self._changed = threading.Condition()
        self._weights = ""
        """Folder of the weights that all servers must have; empty: those that they started with."""
        self._arrived: list[str] = []
        self._closing = threading.Event()
        self._pool = ThreadPoolExecutor(self.concurrency)
        self._under_way = 0
        weakref.finalize(self, _let_go, self._closing, self._pool)
        self._key = key_of(settings.api_key_env, "vllm.api_key_env")
        self.servers = [Server(_root(url)) for url in settings.servers]
        self._with_key = frozenset(server.url for server in self.servers if self._has_key(server.url))
        if len({server.url for server in self.servers}) < len(self.servers):
            remedy = "name each server once"
            raise InputError(Problem("recipe", None, "vllm.servers", ", ".join(settings.servers), remedy))
        self._meet(policy)
        self._check_log_probs(policy.generation)

    def _has_key(self, url: str) -> bool:
        """Whether the key goes to this server. Raises InputError as `goes_to` does."""
        variable, hosts = self.settings.api_key_env, self.settings.api_key_hosts
        if not self._key or goes_to(variable, hosts, httpx.URL(url), "vllm.servers"):
            return bool(self._key)
        _log.warning("the key in %s is not sent to %s: vllm.api_key_hosts names the hosts that get it", variable, url)
        return False

    @property
    def concurrency(self) -> int:
        """Requests that all servers hold together; several threads may ask for turns at a time, to keep them busy."""
        return self.settings.concurrency * len(self.settings.servers)

    @property
    def under_way(self) -> int:
        """Requests that wait or that a server holds."""
        return self._under_way

    def _ended(self, job: Future[Any]) -> None:
        with self._changed:
            self._under_way -= 1

    def close(self) -> None:
        """Close the connections and stop polling ejected servers. Requests in flight end soon, as failures."""
        _let_go(self._closing, self._pool)
        self._client.close()

    # ---- the verbs ----

    def infer(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        stop_ids: frozenset[int],
        generation: Generation,
    ) -> list[list[Sample | FailedSample]]:
        """One sample for every seed of every prompt, or `FailedSample`. Raises InputError when no server is left."""
        preferred: dict[int, Server] = {}
        family = families(prompts)

        def one(place: tuple[int, int]) -> Sample | FailedSample:
            p, k = place
            body = {**request(seeds[p][k], stop_ids, generation), "prompt": list(prompts[p])}

            def read(answer: Any, server: Server) -> Sample:
                return sample_of(answer, stop_ids, generation.max_new_tokens)

            return self._asked(body, read, preferred, family[p])

        order = in_order(prompts, seeds)
        found = dict(zip(order, self._all(one, order), strict=True))
        return [[found[p, k] for k in range(len(own))] for p, own in enumerate(seeds)]

    def log_probs(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Tensor]:
        """For each (prompt ids, response ids): log-probability [T] (nats, at temperature 1) of every response token.

        Raises InputError for a sequence that no server would score.
        """
        if any(not prompt or not response for prompt, response in sequences):
            raise ValueError("a sequence needs at least one prompt token and one response token")

        def one(place: tuple[int, int]) -> Tensor:
            prompt, response = sequences[place[0]]
            body = {"prompt": [*prompt, *response], "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0}

            def read(answer: Any, server: Server) -> Tensor:
                listed = choice_of(answer).get("prompt_logprobs")
                if not isinstance(listed, list) or len(listed) != len(prompt) + len(response):
                    raise ValueError(f"prompt_logprobs of {len(prompt) + len(response)} tokens: {short(listed)}")
                values = [at[str(t)]["logprob"] for at, t in zip(listed[len(prompt) :], response, strict=True)]
                if not all(isinstance(v, float) and math.isfinite(v) and v > IMPOSSIBLE for v in values):
                    raise ValueError("a log-probability that is no number, or that stands for minus infinity")
                return torch.tensor(values)

            found = self._asked(body, read, {}, 0)
            if isinstance(found, FailedSample):
                raise InputError(Problem("servers", None, found.kind, found.detail, "mend the servers; run again"))
            return found

        order = in_order([prompt for prompt, _ in sequences], [[0]] * len(sequences))
        found = dict(zip(order, self._all(one, order), strict=True))
        return [found[n, 0] for n in range(len(sequences))]

    def refit(self, weights: Iterable[tuple[str, Tensor]] | str) -> list[str]:
        """Have every server load a folder of HF tensors, which it must see; each one's fingerprint of what it loaded.

        A server that is away now loads them before it is let back. Raises InputError for one that will not.
        """
        if not isinstance(weights, str):
            raise ValueError("servers are refitted from a folder")
        self._weights, self._arrived = weights, []
        found: list[str] = []
        for server in [s for s in self.servers if s.well]:
            try:
                found += self._load_weights(server)
            except TransientError as failure:
                self._eject(server, f"{failure.kind}: {failure}")
        self._arrived = found[:1]
        return found

    @property
    def well(self) -> list[str]:
        """Addresses of the servers that get requests."""
        with self._changed:
            return [server.url for server in self.servers if server.well]

    def expect(self, folder: str, fingerprint: str, loaded: Collection[str]) -> None:
        """Weights that another process's pool has sent to the servers at `loaded`: one that is not there gets no request
        before it has them, too."""
        self._weights, self._arrived = folder, [fingerprint]
        for server in [s for s in self.servers if s.well and s.url not in loaded]:
            self._eject(server, "it has not the current weights")

    # ---- one request ----

    def _all(self, one: Callable[[tuple[int, int]], Any], places: Sequence[tuple[int, int]]) -> list[Any]:
        """Every place's result; as many at a time as the servers hold. The first InputError ends it."""
        jobs = [self._pool.submit(one, place) for place in places]
        with self._changed:
            self._under_way += len(jobs)
        for job in jobs:
            job.add_done_callback(self._ended)
        try:
            return [job.result() for job in jobs]
        except BaseException:
            for job in jobs:
                job.cancel()
            # those that run: `wait` would wait for ever for one that is cancelled and that a closed pool never looks at
            wait([job for job in jobs if not job.cancelled()])
            raise

    def _asked(
        self, body: dict[str, Any], read: Callable[[Any, Server], Any], preferred: dict[int, Server], group: int
    ) -> Any:
        """What `read` makes of a server's answer (it raises ValueError and the like for a malformed one), or `FailedSample`."""
        failure, failed = TransientError("sampler_unreachable", "never asked"), None
        for attempt in range(self.settings.max_retries + 1):
            server = self._take(preferred.get(group), failed)
            preferred[group] = server
            try:
                answer = self._exchange(server, "POST", "/v1/completions", {"model": server.model, **body, **WANTED})
                found = read(answer, server)
                self._give_back(server, None)
                return found
            except TransientError as passing:
                failure = passing
            except InputError:
                self._give_back(server, None)
                raise
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                failure = TransientError("sampler_malformed", short(f"{server.url}: {type(error).__name__}: {error}"))
            failed = server
            self._give_back(server, failure)
            preferred.pop(group, None)
            self._count(f"retried {failure.kind}")
            if attempt < self.settings.max_retries:
                self._closing.wait(growing_pause(attempt, self.settings.backoff_s))
        self._count("lost")
        return FailedSample(failure.kind, f"{failure} (asked {self.settings.max_retries + 1} times)")

    def _exchange(self, server: Server, method: str, path: str, body: Any = None, timeout: float = 0.0) -> Any:
        """A good answer's JSON. Raises TransientError where it pays to ask again, InputError where it does not."""
        limit, url = timeout or self.settings.timeout_s, server.url + path
        headers = {"Authorization": f"Bearer {self._key}"} if server.url in self._with_key else {}
        try:
            response = self._client.exchange(method, url, limit, MAX_ANSWER, body, headers)
        except TimeoutError:
            raise TransientError("sampler_timeout", f"{server.url}: no whole answer in {limit:g} s") from None
        except Unreadable as error:
            raise TransientError("sampler_malformed", f"{server.url}: {error}") from None
        except UNREACHABLE as error:
            raise TransientError("sampler_unreachable", f"{server.url}: {type(error).__name__}: {error}") from None
        status = response.status
        if status == 200:
            return json.loads(response.body) if response.body else None
        text = response.body.decode("utf-8", "replace")
        found = (
            f"status {status} of {server.url}{path}: {short(text.replace(self._key, '[key]') if self._key else text)}"
        )
        if status in RETRIED:
            asked = retry_after(response.headers.get("retry-after", ""))
            raise TransientError(
                "sampler_http", found, (BUSY_PAUSE if asked is None else max(asked, 0.01)) if status in BUSY else 0.0
            )
        remedy = "the server refuses the request: start it with the recipe's model and lengths (`nemo-pivotrl serve`)"
        if status in (401, 403) and server.url not in self._with_key:
            remedy = (
                f"no key was sent: put it into {self.settings.api_key_env}, and name the host in vllm.api_key_hosts"
            )
        raise InputError(Problem("servers", None, path, found, remedy))

    # ---- which server ----

    def _take(self, preferred: Server | None, failed: Server | None) -> Server:
        """A place at a server, another than the one that failed if there is one; waits while all are full.

        Raises InputError when none is well for `timeout_s`.
        """
        away_since: float | None = None
        with self._changed:
            while True:
                now = time.monotonic()
                well = [s for s in self.servers if s.well]
                others = [s for s in well if s is not failed] or well
                free = [s for s in others if s.busy < self._room(s) and s.not_before <= now]
                if free:
                    least = min(free, key=lambda s: s.busy)
                    near = preferred in free and preferred.busy <= least.busy + NEAR  # type: ignore[union-attr]
                    chosen = preferred if near and preferred is not None else least
                    chosen.busy += 1
                    return chosen
                away_since = None if well else away_since or now
                if away_since is not None and now - away_since > self.settings.timeout_s:
                    urls = ", ".join(s.url for s in self.servers)
                    found = f"none of {urls} for {self.settings.timeout_s:g} s"
                    raise InputError(
                        Problem("servers", None, "vllm.servers", found, "mend them; the same command resumes")
                    )
                self._changed.wait(0.2)

    def _room(self, server: Server) -> int:
        return 1 if server.on_trial else self.settings.concurrency

    def _give_back(self, server: Server, failure: TransientError | None) -> None:
        with self._changed:
            server.busy -= 1
            if failure is None:
                server.failures = server.ejections = 0
                server.on_trial = False
            elif failure.pause:
                server.not_before = time.monotonic() + failure.pause
            else:
                server.failures += 1
            self._changed.notify_all()
        lost = failure is not None and failure.kind == "sampler_unreachable"
        allowed = 1 if server.on_trial else self.settings.eject_after
        if failure is not None and (lost or server.failures >= allowed):
            self._eject(server, f"{failure.kind}: {failure}")

    def _eject(self, server: Server, why: str) -> None:
        with self._changed:
            if not server.well:
                return
            server.well = False
            server.ejections += 1
            self.counts["ejected"] += 1
        _log.warning("vllm.servers: %s gets no more requests (%s)", server.url, why)
        nurse = threading.Thread(target=_look_after, args=(weakref.ref(self), server, self._closing), daemon=True)
        nurse.start()

    def _recovered(self, server: Server) -> bool:
        """Re-admit an ejected server if it is healthy and has the current weights; whether it is."""
        try:
            self._exchange_plain(server, "/health")
            if self._weights and self._load_weights(server)[:1] != self._arrived:
                return False
        except (TransientError, InputError, ValueError):
            return False
        with self._changed:
            server.well, server.on_trial, server.failures, server.not_before = True, True, 0, 0.0
            self.counts["re-admitted"] += 1
            self._changed.notify_all()
        _log.warning("vllm.servers: %s is back", server.url)
        return True

    def _exchange_plain(self, server: Server, path: str) -> None:
        """Ask for something whose answer is a status alone."""
        seconds = min(5.0, self.settings.timeout_s)
        try:
            status = self._client.exchange("GET", server.url + path, seconds, MAX_ANSWER).status
        except (TimeoutError, Unreadable, *UNREACHABLE) as error:
            raise TransientError("sampler_unreachable", f"{server.url}: {type(error).__name__}") from None
        if status != 200:
            raise TransientError("sampler_http", f"status {status} of {server.url}{path}")

    def _load_weights(self, server: Server) -> list[str]:
        body = {"method": "refit", "args": [self._weights]}
        answer = self._exchange(server, "POST", "/collective_rpc", body)
        found = (answer or {}).get("results")
        if not isinstance(found, list) or not found or not all(isinstance(value, str) for value in found):
            remedy = "start the server with `nemo-pivotrl serve`, which knows how to take weights"
            raise InputError(Problem("servers", None, server.url, f"refit answered {short(answer)}", remedy))
        self._exchange(server, "POST", "/reset_prefix_cache")
        return found

    def _count(self, what: str) -> None:
        with self._changed:
            self.counts[what] += 1

    # ---- at the start ----

    def _meet(self, policy: Policy) -> None:
        """Read each server's list of models. A server may be unreachable now and join later; at least one must answer."""
        problems = []
        for server in self.servers:
            try:
                listed = self._exchange(server, "GET", "/v1/models", timeout=min(30.0, self.settings.timeout_s))["data"]
                names = {model["id"]: str(model.get("root") or "") for model in listed}
            except TransientError as failure:
                server.model = self.settings.model
                self._eject(server, f"{failure.kind}: {failure}")
                continue
            except InputError as error:
                problems += [(p.field, p.found, p.remedy) for p in error.problems]
                continue
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                problems.append((server.url, "no list of models", "give the address of an OpenAI-compatible server"))
                continue
            server.model = self.settings.model or next(iter(names), "")
            root = names.get(server.model)
            if root is None:
                problems.append((server.url, f"it serves {', '.join(names)}", f"vllm.model is {server.model}"))
            elif Path(root, "config.json").exists() and policy_revision(root) != policy_revision(policy.model_name):
                remedy = f"the policy is {policy.model_name}: start the server with that"
                problems.append((server.url, f"it serves {root}, which has other weights", remedy))
        if problems:
            raise InputError([Problem("servers", None, *problem) for problem in problems])
        if not any(server.well for server in self.servers):
            found = "none answers of " + ", ".join(server.url for server in self.servers)
            raise InputError(Problem("servers", None, "vllm.servers", found, "start them: nemo-pivotrl serve RECIPE"))
        known = {server.model for server in self.servers if server.model}
        for server in self.servers:
            server.model = server.model or min(known)

    def _check_log_probs(self, generation: Generation) -> None:
        """Refuse servers whose log-probabilities are not those of the sampling distribution, where the two differ."""
        if generation.temperature in (0.0, 1.0):
            return
        for server in [s for s in self.servers if s.well]:
            found = []
            for temperature in (generation.temperature, 1.0):
                asked = request(0, frozenset(), Generation(temperature=temperature, max_new_tokens=1))
                body = {"model": server.model, **asked, "prompt": [0], **WANTED, "logprobs": 1}
                try:
                    top = choice_of(self._exchange(server, "POST", "/v1/completions", body))["logprobs"][
                        "top_logprobs"
                    ][0]
                except TransientError as failure:
                    self._eject(server, f"{failure.kind}: {failure}")
                    break
                found.append(max(top.values()))
            if len(found) == 2 and found[0] == found[1]:
                remedy = "start it with --logprobs-mode processed_logprobs, as `nemo-pivotrl serve` does"
                raise InputError(Problem("servers", None, server.url, "log-probabilities before temperature", remedy))


NEAR = 8
"""How many more requests than the least loaded a server may hold and still get a prompt's next sample."""


def _look_after(pool: weakref.ref[Servers], server: Server, closing: threading.Event) -> None:
    """Poll an ejected server until it has recovered or the pool is closed."""
    attempt = server.ejections - 1
    while True:
        servers = pool()
        if servers is None or closing.is_set():
            return
        pause = growing_pause(attempt, servers.settings.backoff_s)
        del servers
        if closing.wait(pause):
            return
        servers = pool()
        if servers is None or servers._recovered(server):
            return
        attempt += 1


def _let_go(closing: threading.Event, pool: ThreadPoolExecutor) -> None:
    closing.set()
    pool.shutdown(wait=False, cancel_futures=True)


def _root(url: str) -> str:
    """A server's address without /v1. Raises InputError for one that is none."""
    try:
        parsed = httpx.URL(url)
        good = parsed.scheme in ("http", "https") and parsed.host and not (parsed.query or parsed.fragment)
        good = good and not parsed.userinfo and 0 < (parsed.port or 80) < 1 << 16
    except httpx.InvalidURL:
        good = False
    if not good:
        shown = "an address with a password" if "@" in url else short(url)
        remedy = "give addresses such as http://127.0.0.1:8000; a key goes into the variable vllm.api_key_env"
        raise InputError(Problem("recipe", None, "vllm.servers", shown, remedy))
    return url.rstrip("/").removesuffix("/v1").rstrip("/")
