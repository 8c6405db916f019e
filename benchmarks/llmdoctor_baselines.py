"""What LLMdoctor's doctor is compared with, by the formulas of its opponents' papers, for `llmdoctor_claims.py`.

- DPO (Rafailov et al. 2305.18290, Eq. 7);
- GenARM's autoregressive reward model (Xu et al. 2410.08193), which decodes patient * pi_r^weight;
- a reward model of whole answers (Bradley and Terry), the one that ARGS and best-of-n ask;
- ARGS (Khanov et al. 2402.01694): of the patient's k likeliest tokens each is scored by log-probability plus weight times
  the reward of the text so far; drawn from the softmax of these scores, as every contestant here draws;
- rewarded soups (Rame et al. 2306.04488): the weights of two tuned models, interpolated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import DynamicCache

from nemo_pivotrl.algorithms.llmdoctor import kl
from nemo_pivotrl.backends.batching import Decoder
from nemo_pivotrl.backends.reference.guided import GuidedSamplingParams, Shape, draw, noise_of
from nemo_pivotrl.demo import answer_styles as manners

# ---- losses; rows 2p and 2p+1 are the chosen and the rejected answer of pair p ----


def dpo_loss(log_probs: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Sum over pairs of -log sigmoid(beta * ((w - w_ref) - (l - l_ref))), w and l the answers' log-probabilities.

    log_probs, reference [2P, T] nats, 0 on padding.
    """
    moved = (log_probs - reference).sum(1)
    return -logsigmoid(beta * (moved[::2] - moved[1::2])).sum()


def arm_loss(log_probs: Tensor, beta: float) -> Tensor:
    """Sum over pairs of -log sigmoid(beta * (w - l)): the reward of an answer is its own log-probability, and no reference
    holds it; rows as in `dpo_loss`."""
    total = log_probs.sum(1)
    return -logsigmoid(beta * (total[::2] - total[1::2])).sum()


def reward_model_loss(values: Tensor, length: Tensor) -> Tensor:
    """Sum over pairs of -log sigmoid(w - l), w and l read after the answers' last tokens alone: values [2P, T+1] of the
    states, length [2P] tokens."""
    reward = values.gather(1, length[:, None])[:, 0]
    return -logsigmoid(reward[::2] - reward[1::2]).sum()


def soup(first: Mapping[str, Tensor], second: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """share * first + (1 - share) * second, weight by weight."""
    return {name: share * weight + (1 - share) * second[name] for name, weight in first.items()}


# ---- ARGS ----


def args_scores(log_probs: Tensor, rewards: Callable[[Tensor], Tensor], k: int, weight: float) -> Tensor:
    """Scores [R, V]: log pi + weight * reward of each row's k likeliest tokens, -inf for all others.

    log_probs [R, V] of the patient; rewards: candidate tokens [R, k] -> reward [R, k] of the text that ends with each.
    """
    best = log_probs.topk(k, 1)
    found = best.values + weight * rewards(best.indices).to(log_probs.dtype)
    return torch.full_like(log_probs, -torch.inf).scatter(1, best.indices, found)


class PartialRewards:
    """A reward model reading the rows of a running batch: what the text so far would be worth with each candidate behind it.

    The candidates of a row are read in one pass over its cache and do not see each other.
    """

    def __init__(self, model: Any, head: Any, prompts: Sequence[Sequence[int]]):
        self.model, self.head = model, head
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
        self.mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        self.cache = DynamicCache()
        self._run(ids, self.mask, (self.mask.cumsum(1) - 1).clamp(min=0))

    def _run(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
            output_hidden_states=True,
        )
        return self.head(output.hidden_states[-1])[..., 0]

    @torch.no_grad()
    def of(self, candidates: Tensor) -> Tensor:
        """Rewards [R, k] of the text so far with each of the candidates [R, k] behind it."""
        k = candidates.shape[1]
        seen = self.mask[:, None, None, :].bool().expand(-1, 1, k, -1)
        own = torch.eye(k, dtype=torch.bool).expand(len(candidates), 1, k, k)
        place = self.mask.sum(1, keepdim=True).expand(-1, k)
        found = self._run(candidates, torch.cat([seen, own], 3), place)
        self.cache.crop(-k)
        return found

    @torch.no_grad()
    def feed(self, tokens: Tensor) -> None:
        """Take the tokens [R] into the text."""
        place = self.mask.sum(1, keepdim=True)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], 1)
        self._run(tokens[:, None], self.mask, place)

    def select(self, index: Tensor) -> None:
        """Keep the rows at `index`."""
        self.cache.batch_select_indices(index)
        self.mask = self.mask[index]


class Answer(NamedTuple):
    """An answer's tokens, and the mean KL a token (nats) of what it was drawn from, from the patient."""

    tokens: list[int]
    kl: float


@torch.no_grad()
def args_answers(
    patient: Any,
    reward: tuple[Any, Any],
    prompts: Sequence[Sequence[int]],
    requests: Sequence[GuidedSamplingParams],
    stop_ids: frozenset[int],
    weight: float,
    k: int = 10,
) -> list[Answer]:
    """ARGS' answers to prompts of token ids. reward: (causal model, head on its last hidden state).

    Random numbers are those of `GuidedGenerator` for the same request. Logits as wide as the vocabulary.
    """
    noise = [noise_of(request, prompt) for request, prompt in zip(requests, prompts, strict=True)]
    answers: list[tuple[list[int], list[float]]] = [([], []) for _ in prompts]
    stream, rewards = Decoder(patient, prompts), PartialRewards(*reward, prompts)
    alive, running = list(range(len(prompts))), set(range(len(prompts)))
    for step in range(max(request.max_new_tokens for request in requests)):
        log_probs = torch.log_softmax(stream.logits(), 1)
        scores = torch.log_softmax(args_scores(log_probs, rewards.of, k, weight), 1)
        chance = torch.tensor([noise[row][step] for row in alive], dtype=torch.float64)
        plain = Shape(torch.ones(len(alive)), torch.zeros(len(alive), dtype=torch.long), torch.ones(len(alive)))
        tokens, moved = draw(scores, plain, chance)[0], kl(scores, log_probs)
        for row, token, far in zip(alive, tokens.tolist(), moved.tolist(), strict=True):
            if row in running:
                answers[row][0].append(token)
                answers[row][1].append(far)
                if token in stop_ids or len(answers[row][0]) == requests[row].max_new_tokens:
                    running.remove(row)
        if not running:
            break
        stream.feed(tokens)
        rewards.feed(tokens)
        if len(running) <= len(alive) // 2:  # it copies the caches
            index = torch.tensor([place for place, row in enumerate(alive) if row in running])
            stream.select(index)
            rewards.select(index)
            alive = [row for row in alive if row in running]
    return [Answer(tokens, sum(far) / len(far)) for tokens, far in answers]


# ---- a second oracle: is it an answer at all? ----


def well_formed(asked: str, text: str) -> bool:
    """Whether the world's grammar makes `text` as an answer about the thing that was asked about, tones mixed or not."""

    def one_of(*groups: Sequence[str]) -> str:
        return f"(?:{'|'.join(re.escape(words) for group in groups for words in group)})"

    thing = next(thing for thing in manners.THINGS if thing in asked.split())
    tones = manners.MANNERS.values()
    start, quality, close = (one_of(*(tone[part] for tone in tones)) for part in ("open", "quality", "close"))
    long = rf"{start} , the {thing} is {quality} and {quality} , it is {one_of(manners.FACTS)} , {close} \."
    return re.fullmatch(rf"the {thing} is {quality} \.|{long}", text) is not None


def worth(asked: str, text: str, score: float) -> float:
    """The oracle's score, or -1 for what is no answer: counting kind words alone would choose kind gibberish. -1 is the
    least kindness there is, and the brevity of twenty words, more than the grammar can say."""
    return score if well_formed(asked, text) else -1.0
