"""What the ranks run in test_megatron_prefix.py: one step over a forest and over the rows one by one, in float64."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from train_jobs import TFPO, VOCABULARY, bend, megatron_of, policy_of

from nemo_pivotrl.algorithms import llmdoctor, pivotrl
from nemo_pivotrl.algorithms.model_outputs import ModelOutputs
from nemo_pivotrl.backends.base import TokenBatch
from nemo_pivotrl.config import Generation, LossFn


@dataclass
class Grpo:
    """GRPO with KL against a reference and a clip that binds for some tokens and not for others."""

    normaliser: float

    def __call__(self, outputs: ModelOutputs, data: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        settings, log_probs = LossFn(reference_policy_kl_penalty=0.1), outputs.log_probs
        apart = data["apart"].to(log_probs.dtype)
        old, start = log_probs.detach() + apart, log_probs.detach() - 2 * apart
        advantages = data["advantages"].to(log_probs.dtype)
        return pivotrl.grpo_loss(
            log_probs, old, advantages, data["mask"], self.normaliser, settings, ref_log_probs=start
        )


def tree(seed: int, pairs: bool = False) -> TokenBatch:
    """Pivots of two trajectories, prompts of others, samples that begin or are alike, and one over-long, hence masked."""
    maker = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [maker.randrange(VOCABULARY) for _ in range(maker.randrange(low, high))]

    trunks = [ids(14, 22) for _ in range(2)]
    prompts = [trunk[: maker.randrange(2, len(trunk))] for trunk in trunks for _ in range(2)] + [trunks[0], ids(1, 6)]
    prompt_of = [p for p in range(len(prompts)) for _ in range(2 if pairs else maker.randrange(1, 4))]
    responses = [ids(1, 7) for _ in prompt_of]
    responses[1] = [*responses[0][:2], *ids(1, 3)]
    responses[-1] = list(responses[-2])
    width = max(map(len, responses))
    mask = torch.tensor([[1.0] * len(r) + [0.0] * (width - len(r)) for r in responses])
    values = torch.Generator().manual_seed(seed)
    data = {"mask": mask.clone(), "advantages": torch.randn(len(responses), generator=values)}
    data["mask"][2] = 0.0  # over-long
    data["apart"] = 0.4 * torch.randn(mask.shape, generator=values)
    ids_of = [torch.nn.functional.pad(torch.tensor(r), (0, width - len(r))) for r in responses]
    data["token_ids"] = torch.stack(ids_of)
    data["rewards"] = torch.randn(mask.shape, generator=values) * mask
    data["length"] = torch.tensor([len(r) for r in responses])
    data["ended"] = torch.tensor([i % 3 > 0 for i in range(len(responses))])
    return TokenBatch(prompts, prompt_of, responses, data, together=2 if pairs else 1)


def tfpo(outputs: ModelOutputs, data: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    wide = {**data, "rewards": data["rewards"].double()}
    return llmdoctor.doctor_loss(outputs, wide, replace(TFPO, anchor="none"), 6.0)


@contextmanager
def no_rounding() -> Iterator[None]:
    """megatron-core casts some of its arithmetic to float32 by name; here that leaves float64 as it is."""
    as_it_is = Tensor.float

    def wide(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self if self.dtype == torch.float64 else as_it_is(self, *args, **kwargs)

    softmax = torch.softmax

    def exact(logits: Tensor, dim: int, dtype: Any = None) -> Tensor:
        return softmax(logits, dim=dim, dtype=torch.promote_types(logits.dtype, dtype or logits.dtype))

    Tensor.float = wide  # type: ignore[method-assign]
    torch.softmax = exact
    try:
        yield
    finally:
        torch.softmax = softmax
        Tensor.float = as_it_is  # type: ignore[method-assign]


def by_kernel(form: str, **arguments: Any) -> Any:
    """`both` with attention by a kernel for packed sequences, whose library is emulated: (what it found, calls of the kernel)."""
    from support import varlen_libraries

    varlen_libraries.CALLED.clear()
    return both(**arguments, form=form), varlen_libraries.CALLED[form]


def both(
    folder: str, layout: dict[str, Any], kind: str, runs: list[tuple[int, int]], harm: str = "", form: str = "auto"
) -> Any:
    """For every run, (seed, tokens of a micro-batch): (loss apart, worst gradient apart and its name, largest gradient, tokens run,
    tokens one by one). One model serves all of them."""
    from support import varlen_libraries

    from nemo_pivotrl.backends.megatron.parallel import initialize
    from nemo_pivotrl.backends.megatron.train import MegatronPolicy

    megatron = replace(megatron_of(layout), moe_freeze_router=False)
    groups = initialize(megatron, seed=1)
    policy = replace(policy_of(folder), prefix_sharing=True)
    if kind == "tfpo":
        policy = replace(policy, generation=Generation(temperature=1.0))
    backend: Any = MegatronPolicy(policy, megatron, groups, value_head=kind == "tfpo")
    stage, config = backend.stage.double(), backend.stage.config
    stage.prefix_attention = form  # the recipe's is refused on CPUs
    config.params_dtype = config.pipeline_dtype = torch.float64
    config.moe_router_dtype = "fp64" if config.num_moe_experts else None
    bend(stage.head)
    found = []
    with no_rounding(), varlen_libraries.installed() if form != "auto" else nullcontext():
        for seed, budget in runs:
            batch, made = tree(seed, kind == "tfpo"), []
            for share in (False, True):
                backend.settings = replace(policy, prefix_sharing=share, train_micro_batch_tokens=budget)
                for parameter in stage.parameters():
                    parameter.grad = None
                with harmed(harm if share else ""):
                    loss_fn = tfpo if kind == "tfpo" else Grpo(float(batch.data["mask"].sum()))
                    metrics = backend.get_loss_and_metrics(batch, loss_fn)
                log_probs = backend.get_inference_log_probs(batch)
                tokens = sum(rows.tokens.numel() for rows in backend._layouts(batch))
                made.append((metrics, gradients(stage, groups), log_probs, tokens))
            (one, a, log_a, many), (other, b, log_b, few) = made
            apart = {name: float((a[name] - b[name]).abs().max()) for name in a}
            worst = max(apart, key=apart.__getitem__, default="")
            largest = max((float(g.abs().max()) for g in a.values()), default=0.0)
            assert float((log_a - log_b).abs().max()) < 1e-5 or harm  # float32, as it is handed to the stage
            # shares of pairs in the right order: pairs that tie fall to either side by rounding
            keys = [k for k in one if k in other and k != "token_ratio" and not k.startswith("ordered")]
            loss = max((abs(one[key] - other[key]) for key in keys), default=0.0)
            found.append((loss, apart.get(worst, 0.0), worst, largest, few, many))
    return found


@contextmanager
def harmed(harm: str) -> Iterator[None]:
    """A mistake one could make, which the comparison must find."""
    from nemo_pivotrl.algorithms import prefix_tree as prefix
    from nemo_pivotrl.backends import tree_mamba as forest_mamba

    right, cut = prefix.lay_out, forest_mamba.pieces

    def wrong(*args: Any, **kwargs: Any) -> prefix.Forest:
        made = right(*args, **kwargs)
        if harm == "offset":  # branches look one trunk token too far, or too short
            forks = tuple(f._replace(end=max(f.end - 1, f.begin + 1)) for f in made.forks)
            return replace(made, forks=forks)
        if harm == "positions":  # counted along the stream
            return replace(made, positions=torch.arange(len(made.tokens)))
        if harm == "first":  # the first token's log-probability read where the branch begins
            begins = {f.end - 1: f.first for f in made.forks}
            return replace(made, places=torch.tensor([begins.get(p, p) for p in made.places.tolist()]))
        return made

    def early(forest: prefix.Forest) -> list[forest_mamba.Piece]:
        """Branches start from the state of a branching point before their own."""
        made = cut(forest)
        return [p if p.inner or p.before < 0 else p._replace(before=made[p.before].before) for p in made]

    prefix.lay_out = wrong
    if harm == "state":
        forest_mamba.pieces = early
    try:
        yield
    finally:
        prefix.lay_out, forest_mamba.pieces = right, cut


def gradients(stage: Any, groups: Any) -> dict[str, Tensor]:
    """Gradients of this rank's parameters, summed over the ranks that hold other rows or other parts of the stream."""
    found = {}
    for name, parameter in stage.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        dist.all_reduce(grad, group=groups.dp_cp if getattr(parameter, "allreduce", True) else groups.expt_dp)
        if getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(grad, group=groups.tp)
        found[name] = grad
    return found
