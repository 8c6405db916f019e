"""Guided decoding by servers that `nemo-pivotrl serve RECIPE --refit` started: a GuidedEngine's answers and records, over HTTP.

A server draws each token as the reference backend draws it, from the request's own random numbers; what guidance did to it is read
by a method of the server's workers, with the identity of the doctors that it has.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from nemo_pivotrl.backends.base import as_policy
from nemo_pivotrl.backends.doctors import Span, vocabulary_size
from nemo_pivotrl.backends.reference.guided import Checks, Guided, GuidedSamplingParams, Token, check_answers
from nemo_pivotrl.backends.vllm.guidance import PREFIX, SECTION, drawn_by, guide_arguments, identity_of
from nemo_pivotrl.backends.vllm.requests import choice_of, families, in_order, request
from nemo_pivotrl.backends.vllm.servers import Server, Servers
from nemo_pivotrl.config import Decode, Generation, Patient, Vllm
from nemo_pivotrl.core.errors import InputError, Problem, short
from nemo_pivotrl.core.types import FailedSample

OPEN = "start it with `nemo-pivotrl serve RECIPE --refit`: stages read what guidance did from its workers"


class GuidedServers(Checks):
    """Has the verbs of `guided.GuidedGenerator` that a stage calls. Raises InputError for servers that cannot serve."""

    def __init__(
        self,
        patient: Patient,
        decode: Decode,
        settings: Vllm,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: frozenset[int],
        spans: Sequence[Span] = (),
    ):
        arguments, _ = guide_arguments(patient, decode)
        self.identity = identity_of(arguments["additional_config"][SECTION])
        self.markers = [marker for span in spans for marker in (span.start, span.end)]
        self.names, self.tokenizer, self.stop_ids = list(decode.doctors), tokenizer, stop_ids
        self.vocab_size, self.context = vocabulary_size(tokenizer), patient.max_total_sequence_length
        self.servers = Servers(as_policy(patient), settings)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        requests: Sequence[GuidedSamplingParams],
        own_prompts: Sequence[Mapping[str, Sequence[int]]] | None = None,
    ) -> list[Guided | FailedSample]:
        """One answer for each prompt (token ids), or `FailedSample` for one that no server gave. Raises NotFiniteError, and
        InputError where no server is left or one has other doctors."""
        self.check(prompts, requests, own_prompts)
        own, family, preferred = own_prompts or [{}] * len(prompts), families(prompts), dict[int, Server]()

        def one(place: tuple[int, int]) -> Guided | FailedSample:
            p = place[0]
            number = secrets.randbits(62)
            body = {**self._body(requests[p], own[p], number), "prompt": list(prompts[p])}
            found: Guided | FailedSample = self.servers._asked(
                body, lambda answer, server: self._read(answer, server, number), preferred, family[p]
            )
            return found

        order = in_order(prompts, [[0]] * len(prompts))
        found = dict(zip(order, self.servers._all(one, order), strict=True))
        answers = [found[p, 0] for p in range(len(prompts))]
        check_answers([answer for answer in answers if isinstance(answer, Guided)])
        return answers

    def _body(self, asked: GuidedSamplingParams, own: Mapping[str, Sequence[int]], number: int) -> dict[str, Any]:
        stops = self.stop_ids if asked.stop_ids is None else asked.stop_ids
        extra: dict[str, Any] = {f"{PREFIX}alpha": asked.alpha, f"{PREFIX}spans": self.markers}
        extra[f"{PREFIX}draw"] = json.dumps(drawn_by(asked, number))
        extra |= {f"{PREFIX}beta.{name}": weight for name, weight in asked.beta.items()}
        extra |= {f"{PREFIX}prompt.{name}": list(ids) for name, ids in own.items()}
        # the processor leaves one token
        greedy = request(0, stops, Generation(temperature=0.0, max_new_tokens=asked.max_new_tokens))
        return {**greedy, "vllm_xargs": extra}

    def _read(self, answer: Any, server: Server, number: int) -> Guided:
        """The answer with what its server noted. Raises ValueError and the like where the two do not belong together."""
        choice = choice_of(answer)
        if choice.get("finish_reason") not in ("stop", "length"):
            raise ValueError(f"finish_reason {short(choice.get('finish_reason'))}")
        body = {"method": "guided_answer", "args": [number]}
        try:
            noted = self.servers._exchange(server, "POST", "/collective_rpc", body)["results"]
        except InputError as error:
            raise InputError([Problem(p.file, p.line, p.field, p.found, OPEN) for p in error.problems]) from None
        found = next((worker for worker in noted if worker["tokens"]), None)
        if found is None or [values[0] for values in found["tokens"]] != choice["token_ids"]:
            raise ValueError("what the server's sampler took is not what its doctors drew")
        self._same_doctors(found["identity"], server.url)
        tokens = (Token(*(math.nan if v is None else v for v in values)) for values in found["tokens"])
        return Guided(tuple(tokens), choice["finish_reason"])

    def _same_doctors(self, theirs: Mapping[str, Any], url: str) -> None:
        """Raises InputError where the server would steer another way than the recipe says."""
        problems = []
        for name in self.names:
            for field, ours in self.identity["doctors"][name].items():
                found = theirs["doctors"].get(name, {}).get(field)
                if found != ours:
                    remedy = f"the recipe's has {ours or 'none'}: start the server with this recipe"
                    problems.append(Problem("servers", None, f"{url} {name}.{field}", str(found or "none"), remedy))
        if self.names and theirs["min_entropy"] != self.identity["min_entropy"]:
            remedy = f"decode.min_entropy is {self.identity['min_entropy']:g}: start the server with this recipe"
            problems.append(Problem("servers", None, f"{url} min_entropy", str(theirs["min_entropy"]), remedy))
        if problems:
            raise InputError(problems)
