"""What the ranks run in test_megatron_sampler.py, and the reference backend's samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import train_jobs

from nemo_pivotrl.backends.base import TokenBatch
from nemo_pivotrl.config import Generation
from nemo_pivotrl.core.types import FailedSample, Sample

GENERATIONS = {
    "plain": Generation(max_new_tokens=12, batch_tokens=120),
    "cold": Generation(max_new_tokens=12, batch_tokens=1000, temperature=0.8),
    "nucleus": Generation(max_new_tokens=12, batch_tokens=120, top_p=0.7),
    "greedy": Generation(max_new_tokens=12, batch_tokens=120, temperature=0.0),
}
STOP = frozenset(range(0, train_jobs.VOCABULARY, 12))
"""So many tokens stop a turn that turns have all lengths."""


def prompts(number: int = 5) -> list[list[int]]:
    """Unequal prompts, one of which stands there twice."""
    maker = torch.Generator().manual_seed(5)
    made = [torch.randint(1, train_jobs.VOCABULARY, (3 + 4 * i,), generator=maker).tolist() for i in range(number)]
    return [*made, made[1]] if number > 1 else made


def seeds(number: int = 5) -> list[list[int]]:
    return [[100 * p + k for k in range(2 + p % 3)] for p in range(len(prompts(number)))]


def reference(folder: str, kind: str, number: int = 5) -> list[list[Sample]]:
    from nemo_pivotrl.backends.reference.policy import ReferencePolicy

    backend = ReferencePolicy(train_jobs.policy_of(folder, 10**6))
    return backend.infer(prompts(number), seeds(number), STOP, GENERATIONS[kind])


def slowly(folder: str, kind: str, number: int = 5) -> list[list[Sample]]:
    """The same without any cache, one row at a time: the reference backend samples no hybrid models."""
    from nemo_pivotrl.backends.reference.policy import ReferencePolicy
    from nemo_pivotrl.backends.sampling import Turns

    model = ReferencePolicy(train_jobs.policy_of(folder, 10**6)).model
    found = []
    for prompt, own in zip(prompts(number), seeds(number), strict=True):
        group = []
        for seed in own:
            turn = Turns([seed], STOP, GENERATIONS[kind])
            while not turn.done:
                ids = torch.tensor([[*prompt, *turn.tokens[0]]])
                with torch.no_grad():
                    token, log_prob = turn.draw(model(ids, use_cache=False).logits[:, -1])
                turn.note(token.tolist(), log_prob.tolist())
            group += turn.samples()
        found.append(group)
    return found


def outside(backend: Any) -> list[Any]:
    """What sampling could leave behind in a model."""
    return [
        (name, m.training, type(m).__name__, "forward" in vars(m), getattr(m, "sequence_parallel", None), cut)
        for name, m in backend.stage.named_modules()
        for cut in [getattr(getattr(m, "config", None), "sequence_parallel", None)]
    ]


def sample(
    folder: str, layout: dict[str, Any], kinds: list[str], number: int = 5, steps: int = 0, between: bool = True
) -> dict[str, Any]:
    """Samples of each kind, after so many training steps with samples `between`; the training forward's log-probabilities
    of the first kind's."""
    from nemo_pivotrl.backends.megatron.parallel import initialize
    from nemo_pivotrl.backends.megatron.train import MegatronPolicy

    megatron = train_jobs.megatron_of(layout)
    groups = initialize(megatron, seed=1)
    backend = MegatronPolicy(train_jobs.policy_of(folder), megatron, groups)
    backend.stage.temperature = GENERATIONS[kinds[0]].temperature or 1.0
    ticks: list[str] = []
    before = outside(backend)
    backend.tick = ticks.append  # type: ignore[method-assign]
    if steps:
        backend.prepare_for_training(train_jobs.OPTIMIZER)
    batch = train_jobs.grpo_batch()
    for _ in range(steps):
        if between:
            backend.infer(prompts(number), seeds(number), STOP, GENERATIONS[kinds[0]])
        backend.prepare_for_training_step()
        backend.get_loss_and_metrics(batch, train_jobs.Losses(10.0, 3).grpo)
        backend.finish_training_step()
    found = {kind: backend.infer(prompts(number), seeds(number), STOP, GENERATIONS[kind]) for kind in kinds}
    flat = [(p, s) for p, group in enumerate(found[kinds[0]]) for s in group]
    taken = TokenBatch(prompts(number), [p for p, _ in flat], [s.token_ids for _, s in flat], {})
    log_probs = backend.get_inference_log_probs(taken)
    if steps:
        backend.export(Path(folder) / "stepped")
    return {
        "found": found,
        "log_probs": log_probs,
        "flat": [s for _, s in flat],
        "ticks": len(ticks),
        "left": outside(backend) != before,
    }


def spoilt(folder: str, layout: dict[str, Any], always: bool) -> list[list[Sample | FailedSample]]:
    """Samples where the last row of the first pass has NaN for its second token; `always`: of every pass that follows, too."""
    from nemo_pivotrl.backends.megatron import sampler
    from nemo_pivotrl.backends.megatron.parallel import initialize
    from nemo_pivotrl.backends.megatron.train import MegatronPolicy

    megatron, whole, passes = train_jobs.megatron_of(layout), sampler._forward, []
    backend = MegatronPolicy(train_jobs.policy_of(folder), megatron, initialize(megatron, seed=1))

    def forward(stage: Any, groups: Any, memory: Any, tokens: torch.Tensor) -> torch.Tensor | None:
        logits = whole(stage, groups, memory, tokens)
        passes.append(tokens.shape[1] > 1)
        if logits is not None and not passes[-1] and passes[-2] and (always or sum(passes) == 1):
            logits[-1] = float("nan")
        return logits

    sampler._forward = forward
    try:
        return backend.infer(prompts(), seeds(), STOP, GENERATIONS["plain"])
    finally:
        sampler._forward = whole
