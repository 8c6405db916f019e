"""Token rewards as a NeMo-Aligner data set: pairs of answers, in DPO's keys with a reward for every token."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_pivotrl.config.nemo_aligner_blocks import LLMDoctorModelBlock, read_block
from nemo_pivotrl.core.artifacts import HEADER_KEY, read_header
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.data.chat_template import fingerprint
from nemo_pivotrl.integrations.nemo_aligner.versions import require

require()

from nemo.utils import logging  # noqa: E402
from nemo_aligner.data.nlp.builders import build_train_valid_test_datasets  # noqa: E402

SIDES = ("chosen", "rejected")


class TokenRewardDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Pairs of one split and one objective of a `token_rewards` artefact. Constructor keywords are NeMo-Aligner's.

    `cfg` is the `model` block. `data` holds the artefact's lines, header first. A pair longer than `seq_length` tokens is
    left out and counted. Raises InputError for another tokenizer's artefact and an objective that it does not hold.
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
        block = read_block(LLMDoctorModelBlock, cfg.llmdoctor, "model.llmdoctor")
        path = str(data_prefix)
        _check_header(path, data[0], tokenizer)
        objective = _objective(path, sorted({row["objective"] for row in data[1:]}), block.objective)
        split = "train" if name == "train" else "validation"
        mine = [row for row in data[1:] if row["split"] == split and row["objective"] == objective]
        self.pairs = [row for row in mine if _length(row) <= seq_length]
        self.excluded = len(mine) - len(self.pairs)
        """Pairs too long for the context, which are in no batch and in no count."""
        if self.excluded:
            logging.warning(f"{name}: {self.excluded} of {len(mine)} pairs left out, longer than {seq_length} tokens")
        if not self.pairs:
            remedy = "raise model.data.seq_length, or read more preferences"
            raise InputError(Problem(path, None, f"{split} split", f"no pair of {objective} fits", remedy))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A row of the artefact: `prompt_ids`, and for both sides their `ids`, `rewards` and whether they `ended`."""
        return dict(self.pairs[index])


def _check_header(path: str, first: Mapping[str, Any], tokenizer: Any) -> None:
    if HEADER_KEY not in first:
        raise InputError(Problem(path, 1, "header", "none", "give the token_rewards.jsonl that the reward stage wrote"))
    header = read_header(Path(path), "token_rewards")  # the whole file is what its seal says
    inner = getattr(tokenizer, "tokenizer", None)
    if not hasattr(inner, "get_vocab") or fingerprint(inner) != header.tokenizer:
        remedy = "a doctor must share the patient's tokenizer: set model.tokenizer to that Hugging Face tokenizer"
        raise InputError(Problem(path, 1, "tokenizer", header.tokenizer, remedy))


def _objective(path: str, found: Sequence[str], wanted: str) -> str:
    if wanted in found or (not wanted and len(found) == 1):
        return wanted or found[0]
    remedy = f"set it to one of {', '.join(found)}: one run trains one doctor"
    raise InputError(Problem(path, None, "model.llmdoctor.objective", wanted or "nothing", remedy))


def _length(row: Mapping[str, Any]) -> int:
    return len(row["prompt_ids"]) + max(len(row[side]["ids"]) for side in SIDES)


build_token_reward_datasets = functools.partial(build_train_valid_test_datasets, TokenRewardDataset)
"""(train, validation, test) of an Aligner-style call: cfg, data_prefix, data_impl, ..., tokenizer."""


def collate_pairs(
    batch: Sequence[Mapping[str, Any]], eos_id: int, pad_length_to_multiple_of: int | None = None
) -> dict[str, Tensor]:
    """b pairs as tensors of one width S, in DPO's keys, for each of chosen and rejected:

    `chosen` [b, S] prompt and answer; `chosen_rewards`, `chosen_mask` [b, S-1], of the token after each position;
    `chosen_ended` [b], whether the answer's last token is its end.
    """
    width = max(_length(row) for row in batch)
    width += -width % (pad_length_to_multiple_of or 1)
    found: dict[str, Tensor] = {}
    for side in SIDES:
        tokens = torch.full((len(batch), width), eos_id, dtype=torch.int64)
        rewards, mask = torch.zeros(len(batch), width - 1), torch.zeros(len(batch), width - 1, dtype=torch.bool)
        for i, row in enumerate(batch):
            ids, start = [*row["prompt_ids"], *row[side]["ids"]], len(row["prompt_ids"]) - 1
            tokens[i, : len(ids)] = torch.tensor(ids)
            rewards[i, start : len(ids) - 1] = torch.tensor(row[side]["rewards"])
            mask[i, start : len(ids) - 1] = True
        ended = torch.tensor([bool(row[side]["ended"]) for row in batch])
        found |= {side: tokens, f"{side}_rewards": rewards, f"{side}_mask": mask, f"{side}_ended": ended}
    return found
