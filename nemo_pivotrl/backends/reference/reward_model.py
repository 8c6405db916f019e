"""A Hugging Face reward model as an oracle: a sequence classifier with one output, which reads the whole conversation
through its own chat template."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from nemo_pivotrl.backends.batching import batches
from nemo_pivotrl.backends.hf_models import load_model
from nemo_pivotrl.config import Oracles
from nemo_pivotrl.core.errors import InputError, Problem, UnrenderableState
from nemo_pivotrl.sizing.hf_folder import load_config, load_tokenizer

Encode = Callable[[Sequence[dict[str, Any]]], list[int]]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class RewardModel:
    """`(conversations, answers) -> scores` by the checkpoint of one objective.

    encoder: (tokenizer, its setting's name) -> what makes token ids of messages by the tokenizer's chat template.
    """

    def __init__(self, objective: str, settings: Oracles, encoder: Callable[[Any, str], Encode]):
        folder, where = settings.reward_models[objective], f"oracles.reward_models.{objective}"

        def refuse(found: str, remedy: str) -> InputError:
            return InputError(Problem("recipe", None, where, found, remedy))

        try:
            outputs = load_config(folder, where).num_labels
            if outputs != 1:
                raise refuse(f"{outputs} outputs", "a reward model has one (`num_labels: 1` in its config.json)")
            self.tokenizer = load_tokenizer(folder, where)
            if self.tokenizer.chat_template is None:
                raise refuse("no chat template", "add the one it was trained with to its tokenizer")
            self.encode = encoder(self.tokenizer, where)
            device = settings.device if settings.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
            kind = "AutoModelForSequenceClassification"
            self.model = load_model(folder, where, DTYPES[settings.dtype], device, kind).requires_grad_(False)
        except ImportError as error:
            remedy = "pip install 'nemo-pivotrl[reference]'"
            raise InputError(Problem("environment", None, "oracles.reward_models", str(error), remedy)) from error
        self.batch_tokens, self.objective = settings.batch_tokens, objective

    @torch.no_grad()
    def __call__(self, asked: Sequence[Sequence[dict[str, Any]]], answers: Sequence[str]) -> list[float | None]:
        """A score for each answer to its messages; None where the model gave NaN or infinity, twice, and for text that has
        no UTF-8 form.

        One conversation runs with others of its length only: what a classifier makes of padding is the architecture's own
        affair.
        """
        scores: list[float | None] = [None] * len(answers)
        ids: dict[int, list[int]] = {}
        for n, (messages, answer) in enumerate(zip(asked, answers, strict=True)):
            try:
                ids[n] = self.encode([*messages, {"role": "assistant", "content": answer}])
            except UnrenderableState as error:
                if error.kind != "not_encodable":  # half an emoji of one answer is no fault of the template
                    raise
        limit = self.model.config.to_dict().get("max_position_embeddings")
        longest = max(map(len, ids.values()), default=0)
        if limit and longest > limit:
            remedy = f"the reward model reads {limit}: lower decode.max_new_tokens or shorten the prompts"
            raise InputError(Problem("oracle", None, self.objective, f"{longest} tokens", remedy))
        known = list(ids)
        for batch in batches([len(ids[n]) for n in known], self.batch_tokens, equal=True):
            rows = [known[place] for place in batch]
            for n, score in zip(rows, self._scores([ids[n] for n in rows]), strict=True):
                (again,) = [score] if math.isfinite(score) else self._scores([ids[n]])
                scores[n] = again if math.isfinite(again) else None
        return scores

    def _scores(self, rows: list[list[int]]) -> list[float]:
        """The model's output for conversations of one length."""
        logits = self.model(input_ids=torch.tensor(rows, device=self.model.device)).logits
        found: list[float] = logits[:, 0].float().tolist()
        return found
