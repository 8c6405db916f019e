"""The pivot set as a NeMo-Aligner data set, its collate function, and the verifier in the reward model's place.

A pivots artefact is read as `pivots.jsonl` is written: the header is checked against the model's tokenizer, template and
verifier, and a row is rendered by the project's own `Chat`. A state that leaves no room for a whole turn is left out and
counted; it is not replaced by its neighbour.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_pivotrl.components.rollout import judge_all
from nemo_pivotrl.config import Limits
from nemo_pivotrl.config.nemo_aligner_blocks import FILE, PivotRLModelBlock, PivotRLTrainerBlock, read_block
from nemo_pivotrl.core.artifacts import HEADER_KEY, read_header
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.core.types import Candidate
from nemo_pivotrl.data.chat_template import Chat
from nemo_pivotrl.data.states import open_states
from nemo_pivotrl.integrations.nemo_aligner.versions import require
from nemo_pivotrl.pivotrl.monitor import rendered_state
from nemo_pivotrl.verifiers.base import Verifier, VerifierFault
from nemo_pivotrl.verifiers.loading import identity, load_verifier

require()

from nemo.utils import logging  # noqa: E402  after the version guard, which says what is missing
from nemo_aligner.data.nlp.builders import build_train_valid_test_datasets  # noqa: E402
from nemo_aligner.utils.distributed import broadcast_2d_tensor_within_mp, run_if_model_parallel_src  # noqa: E402


def chat_over(
    tokenizer: Any, tool_parser: str, template_kwargs: Mapping[str, Any], limits: Limits | None = None
) -> Chat:
    """The project's `Chat` over the tokenizer of a NeMo model. Raises InputError for one that has no chat template."""
    inner = getattr(tokenizer, "tokenizer", None)
    if getattr(inner, "chat_template", None) is None:
        remedy = "turns are rendered with the model's own template: set model.tokenizer.library to huggingface"
        raise InputError(
            Problem(FILE, None, "model.tokenizer", type(tokenizer).__name__, f"{remedy}, and type to its folder")
        )
    return Chat(inner, tool_parser, dict(template_kwargs), limits)


def chat_of(tokenizer: Any, block: PivotRLModelBlock) -> Chat:
    """The chat that `model.pivotrl` describes."""
    return chat_over(tokenizer, block.chat.tool_parser, block.chat.template_kwargs, block.verifier.limits)


class PivotDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """States of one split of a pivots artefact, each rendered when it is asked for. Constructor keywords are NeMo-Aligner's.

    `cfg` is the `model` block. `data` holds the artefact's lines, header first. `name` decides the split: `train`, or
    anything else for the held-out states. Raises InputError for a header that does not fit the model.
    """

    def __init__(
        self,
        cfg: Any,
        tokenizer: Any,
        name: str,
        data_prefix: str,
        documents: Any,
        data: Sequence[Mapping[str, Any]],
        seq_length: int,
        seed: int,
        drop_last: bool = True,
    ):
        super().__init__()
        block = read_block(PivotRLModelBlock, cfg.pivotrl, "model.pivotrl")
        chat = chat_of(tokenizer, block)
        check_header(str(data_prefix), data[0], chat, block)
        split = "train" if name == "train" else "validation"
        self._render = functools.partial(rendered_state, open_states(Path(data_prefix)), chat)
        rows, room = [row for row in data[1:] if row["split"] == split], seq_length - block.length_params.max_length
        self.rows = [row for row in rows if row["tokens_prompt"] <= room]
        self.excluded = len(rows) - len(self.rows)
        """States too long for the context, which are in no batch and in no count."""
        if self.excluded:
            logging.warning(f"{name}: {self.excluded} of {len(rows)} states left out, longer than {room} tokens")
        if not self.rows:
            remedy = "raise model.data.seq_length, or lower model.pivotrl.length_params.max_length"
            raise InputError(
                Problem(str(data_prefix), None, f"{split} split", f"no state of {room} tokens or less", remedy)
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A state: `text` [L] int64, `length`, and its `pivot` (a Candidate)."""
        state = self._render(dict(self.rows[index]))
        ids = torch.tensor(state.prompt, dtype=torch.int64)
        return {"text": ids, "length": len(ids), "pivot": state.candidate}


def check_header(path: str, first: Mapping[str, Any], chat: Chat, block: PivotRLModelBlock) -> None:
    """Raise InputError unless the artefact is of this tokenizer, template, verifier and sampling.

    Which weights profiled the pivots cannot be compared: a `.nemo` file has no revision.
    """
    if HEADER_KEY not in first:
        raise InputError(Problem(path, 1, "header", "none", "give the pivots.jsonl that the select stage wrote"))
    header = read_header(Path(path), "pivots")  # the whole file is what its seal says
    verifier = identity(load_verifier(block.verifier), block.verifier)
    sampling = {
        "temperature": block.sampling_params.temperature,
        "top_p": block.sampling_params.top_p,
        "max_new_tokens": block.length_params.max_length,
    }
    compared = {
        "tokenizer": (header.tokenizer, chat.fingerprint),
        "chat_template": (header.chat_template, chat.template_digest),
        "verifier": (header.verifier, verifier),
        "extra.sampling": (header.extra.get("sampling"), sampling),
    }
    problems = [
        Problem(path, 1, field, repr(found), f"the config gives {wanted!r}; use the matching one or re-run the stage")
        for field, (found, wanted) in compared.items()
        if found != wanted
    ]
    if problems:
        raise InputError(problems)


build_pivot_datasets = functools.partial(build_train_valid_test_datasets, PivotDataset)
"""(train, validation, test) of an Aligner-style call: cfg, data_prefix, data_impl, ..., tokenizer."""


def collate_pivots(batch: Sequence[Mapping[str, Any]], response_token_length: int, eos_id: int) -> dict[str, Any]:
    """`text` [b, longest + response_token_length] padded with `eos_id`, `length` [b], and `pivot`, a list of Candidates."""
    lengths = torch.tensor([item["length"] for item in batch])
    text = torch.full((len(batch), int(lengths.max()) + response_token_length), eos_id, dtype=torch.int64)
    for row, item in zip(text, batch, strict=True):
        row[: item["length"]] = item["text"]
    return {"text": text, "length": lengths, "pivot": [item["pivot"] for item in batch]}


@dataclass(frozen=True)
class Judged:
    """Verdicts on the way, on the rank that asked for them; the others wait for its broadcast."""

    future: Future[Tensor] | None

    def result(self) -> Tensor:
        """[b, 2] float32: the reward, NaN where there is no verdict, and 1.0 for a tool call that cannot be read.

        A collective of the model-parallel group.
        """
        here = self.future.result() if self.future is not None else None
        found: Tensor = broadcast_2d_tensor_within_mp(here)
        return found


class PivotVerifier:
    """In the place of NeMo-Aligner's reward model: judges sampled turns while the next ones are sampled.

    A fault of the verifier gives no reward: the sample is excluded. Each model-parallel group judges once.
    """

    def __init__(self, chat: Chat, verifier: Verifier, max_retries: int):
        self.chat, self.verifier, self.max_retries = chat, verifier, max_retries
        self.pool = ThreadPoolExecutor(1)

    def infer_rm(self, rollout_batch: Mapping[str, Any]) -> Judged:
        """Begin to judge `response_tokens` [b, S] with their lengths, `is_end` and `pivot`s."""
        return Judged(run_if_model_parallel_src(self._submit, dict(rollout_batch)))

    def _submit(self, rollout_batch: dict[str, Any]) -> Future[Tensor]:
        plain = {key: rollout_batch[key].tolist() for key in ("prompt_lengths", "response_lengths", "is_end")}
        rows = rollout_batch["response_tokens"].tolist()
        answers = [
            row[start:stop]
            for row, start, stop in zip(rows, plain["prompt_lengths"], plain["response_lengths"], strict=True)
        ]
        return self.pool.submit(self._judge, rollout_batch["pivot"], answers, plain["is_end"])

    def _judge(self, pivots: Sequence[Candidate], answers: Sequence[Sequence[int]], ended: Sequence[bool]) -> Tensor:
        actions = [self.chat.parse(self.chat.decode(ids), p.tools) for p, ids in zip(pivots, answers, strict=True)]
        questions = [
            (p.case, action, "stop" if end else "length") for p, action, end in zip(pivots, actions, ended, strict=True)
        ]
        verdicts = judge_all(self.verifier, questions, self.max_retries)
        return torch.tensor(
            [
                [float("nan") if isinstance(v, VerifierFault) else v.reward, float(action.kind == "malformed")]
                for v, action in zip(verdicts, actions, strict=True)
            ]
        )

    def close(self) -> None:
        """Wait for verdicts that are still on the way, and end the thread."""
        self.pool.shutdown()


def make_verifier(tokenizer: Any, trainer: PivotRLTrainerBlock, model: PivotRLModelBlock) -> PivotVerifier:
    """The config's verifier. Raises InputError for an unknown one."""
    return PivotVerifier(chat_of(tokenizer, model), load_verifier(model.verifier), trainer.max_retries)
