"""Guided decoding for the `decode` stage inside vLLM: the reference backend's answers and records, at an engine's speed.

A token is drawn by the processor as the reference draws it, so equal seeds give the reference's answers, up to rounding.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import vllm
from transformers import PreTrainedTokenizerBase

from nemo_pivotrl.backends.base import as_policy
from nemo_pivotrl.backends.doctors import Span, vocabulary_size
from nemo_pivotrl.backends.reference.guided import Checks, Guided, GuidedSamplingParams, Token, check_answers
from nemo_pivotrl.backends.vllm.engine import Engine
from nemo_pivotrl.backends.vllm.guidance import NAMES, PREFIX, SECTION, drawn_by, guide_arguments, names_here
from nemo_pivotrl.config import Decode, Patient, Vllm
from nemo_pivotrl.core.errors import InputError, Problem

_numbers = itertools.count()


class GuidedEngine(Checks):
    """Has the verbs of `guided.GuidedGenerator` that a stage calls. Raises InputError for what does not belong together."""

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
        # requests are checked by the names that the process knows: those of all its engines
        os.environ[NAMES] = json.dumps(sorted({*(names_here() or []), *decode.doctors}))
        arguments["additional_config"][SECTION]["spans"] = [[s.start, s.end] for s in spans]
        self.engine = Engine(as_policy(patient), settings, **arguments)
        self.names, self.tokenizer, self.stop_ids = list(decode.doctors), tokenizer, stop_ids
        self.vocab_size = vocabulary_size(tokenizer)
        self.context = patient.max_total_sequence_length

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        requests: GuidedSamplingParams | Sequence[GuidedSamplingParams],
        own_prompts: Sequence[Mapping[str, Sequence[int]]] | None = None,
    ) -> list[Guided]:
        """One answer for each prompt (token ids); see `guided.GuidedGenerator.generate`."""
        asked = [requests] * len(prompts) if isinstance(requests, GuidedSamplingParams) else list(requests)
        self.check(prompts, asked, own_prompts)
        numbers = [next(_numbers) for _ in prompts]
        own = own_prompts or [{}] * len(prompts)
        params = [self._params(*one) for one in zip(asked, own, numbers, strict=True)]
        answers = self.engine._generate(prompts, params)
        records = self.engine.llm.collective_rpc("guide_records", args=(numbers,))[0]
        found = []
        for answer, noted in zip(answers, records, strict=True):
            (choice,) = answer.outputs
            tokens = tuple(Token(*values) for values in noted)
            if tuple(choice.token_ids) != tuple(t.token_id for t in tokens) or choice.finish_reason not in (
                "stop",
                "length",
            ):
                said = f"{list(choice.token_ids)[:8]} ({choice.finish_reason}), drawn were {[t.token_id for t in tokens][:8]}"
                raise InputError(
                    Problem("vLLM", None, "answer", said, "its sampler did not take what the doctors drew")
                )
            found.append(Guided(tokens, choice.finish_reason))
        return check_answers(found)

    def _params(self, request: GuidedSamplingParams, own: Mapping[str, Sequence[int]], number: int) -> Any:
        stops = self.stop_ids if request.stop_ids is None else request.stop_ids
        extra: dict[str, Any] = {f"{PREFIX}alpha": request.alpha, f"{PREFIX}draw": drawn_by(request, number)}
        extra |= {f"{PREFIX}beta.{name}": weight for name, weight in request.beta.items()}
        extra |= {f"{PREFIX}prompt.{name}": list(ids) for name, ids in own.items()}
        return vllm.SamplingParams(
            temperature=0.0,  # the processor leaves one token
            max_tokens=request.max_new_tokens,
            stop_token_ids=sorted(stops),
            ignore_eos=True,
            detokenize=False,
            extra_args=extra,
        )

    def close(self) -> None:
        self.engine.close()
