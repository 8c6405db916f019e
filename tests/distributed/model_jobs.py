"""What the ranks run in test_megatron_model.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from nemo_pivotrl.backends.megatron.parallel import Groups, initialize
from nemo_pivotrl.config import Megatron
from nemo_pivotrl.sizing.architecture import read_architecture


def settings(**layout: Any) -> Megatron:
    return Megatron(**{"cpu": True, "bf16": False, "recompute": "none", **layout})


def compare(folder: str, layout: dict[str, Any], config: str = "", target: str = "") -> dict[str, Any]:
    """Largest difference from transformers' logits, relative to their largest value, and the names of tensors that an
    export does not give back bit for bit. The model is built from `config`, if given, and saved as `target`, if given."""
    from nemo_pivotrl.backends.megatron import model, weights

    megatron = settings(**layout)
    groups = initialize(megatron, seed=1)
    chunks = model.build_model(config or folder, megatron, groups)
    expected, tokens = (torch.load(Path(folder, f"{name}.pt")) for name in ("logits", "tokens"))
    for chunk in chunks:
        chunk.eval()
    logits = run(chunks, tokens, groups, expected.shape[-1])
    difference = None if logits is None else float((logits - expected).abs().max() / expected.abs().max())
    exported = dict(weights.export_hf(chunks, read_architecture(folder), groups, all_ranks=True))
    original = load_file(str(Path(folder, "model.safetensors")))
    wrong = sorted(exported.keys() ^ original.keys())
    wrong += [name for name, tensor in original.items() if name not in wrong and not same(exported[name], tensor)]
    if target:
        weights.save_hf(chunks, target, config or folder, groups)
    return {"difference": difference, "wrong": wrong, "tensors": len(original)}


def same(one: Tensor | None, other: Tensor) -> bool:
    return one is not None and one.dtype == other.dtype and torch.equal(one, other)


@torch.no_grad()
def run(chunks: list[nn.Module], tokens: Tensor, groups: Groups, vocab_size: int) -> Tensor | None:
    """Logits [B, T, V] of whole sequences by Megatron's own pipeline schedule; None where this rank has no last stage."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from nemo_pivotrl.backends.megatron.microbatches import context_part
    from nemo_pivotrl.backends.megatron.model import forward

    length, cp = tokens.shape[1], groups.cp
    here = context_part([0, length], cp.rank(), cp.size())
    positions = here.expand(tokens.shape[0], -1)

    def step(data: Iterator[Tensor], chunk: nn.Module) -> tuple[Tensor, Any]:
        return forward(chunk, next(data)[:, here], positions), lambda output, non_loss_data: output

    outputs = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter([tokens]),
        model=chunks,
        num_microbatches=1,
        seq_length=length,
        micro_batch_size=tokens.shape[0],
        forward_only=True,
        collect_non_loss_data=True,
    )
    if not groups.last_stage:
        return None
    local = outputs[0]
    parts = gather(local, groups.tp)
    logits = torch.cat(parts, -1)[..., :vocab_size]
    whole = torch.empty(tokens.shape[0], length, vocab_size)
    for rank, part in enumerate(gather(logits, cp)):
        whole[:, context_part([0, length], rank, cp.size())] = part
    return whole


def gather(tensor: Tensor, group: Any) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return parts


def refusal(folder: str, layout: dict[str, Any]) -> dict[str, str]:
    """Field to "found -> remedy" of everything for which a model is not built."""
    from nemo_pivotrl.backends.megatron import model
    from nemo_pivotrl.core.errors import InputError

    try:
        megatron = settings(**layout)
        model.build_model(folder, megatron, initialize(megatron, seed=1))
    except InputError as error:
        return {p.field: f"{p.found} -> {p.remedy}" for p in error.problems}
    return {}


def save(folder: str, layout: dict[str, Any], target: str, max_shard_bytes: int) -> None:
    from nemo_pivotrl.backends.megatron import model, weights

    megatron = settings(**layout)
    groups = initialize(megatron, seed=1)
    weights.save_hf(model.build_model(folder, megatron, groups), target, folder, groups, max_shard_bytes)


def routers(folder: str, layout: dict[str, Any]) -> list[bool]:
    """Whether each router trains."""
    from nemo_pivotrl.backends.megatron import model

    megatron = settings(**layout)
    (chunk,) = model.build_model(folder, megatron, initialize(megatron, seed=1))
    return [p.requires_grad for name, p in chunk.named_parameters() if name.endswith("router.weight")]


def gradients(folder: str, layout: dict[str, Any]) -> dict[str, float]:
    """On one rank: HF tensor to the largest difference of its gradient from transformers', relative to the largest
    gradient in that tensor."""
    import tiny_hf

    from nemo_pivotrl.backends.megatron import model, weights

    megatron = settings(moe_freeze_router=False, **layout)
    groups = initialize(megatron, seed=1)
    chunks = model.build_model(folder, megatron, groups)
    architecture = read_architecture(folder)
    tokens = torch.load(Path(folder, "tokens.pt"))
    logits = model.forward(chunks[0], tokens, torch.arange(tokens.shape[1]).expand_as(tokens))
    tiny_hf.score(logits[..., : architecture.vocab_size], tokens).backward()
    for parameter in chunks[0].parameters():
        assert parameter.grad is not None
        parameter.data = parameter.grad
    exported = dict(weights.export_hf(chunks, architecture, groups))
    expected = load_file(str(Path(folder, "gradients", "model.safetensors")))
    differences = {}
    for name, gradient in expected.items():
        found = exported[name]
        assert found is not None and found.shape == gradient.shape
        if not name.endswith("e_score_correction_bias"):  # it has none
            differences[name] = float((found - gradient).abs().max() / gradient.abs().max())
    return differences


def relaid(folder: str, layouts: list[dict[str, Any]]) -> list[int]:
    """This rank's threads with a model of each layout in turn, each of them used and then forgotten, all in one job."""
    from support.threads import threads

    from nemo_pivotrl.backends.megatron import model

    found = []
    for layout in layouts:
        megatron = settings(**layout)
        groups = initialize(megatron, seed=1)
        chunks = model.build_model(folder, megatron, groups)
        tokens = torch.load(Path(folder, "tokens.pt"))
        run(chunks, tokens, groups, read_architecture(folder).vocab_size)
        found.append(threads())
    return found
