"""Start weights from a `torch_dist` checkpoint of Megatron-LM, Megatron-Bridge or NeMo, whatever layout wrote it.

Config and tokenizer come from the HF folder `policy.model_name`; only weights are read. The tools differ in a prefix of
all names, and in whether layers, and experts, are stacked in one tensor or stand under their own names: all of it is
read off the names. `MegatronPolicy.export` makes an HF checkpoint of such a model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from nemo_pivotrl.backends.megatron import torch_dist
from nemo_pivotrl.backends.megatron.parallel import Groups
from nemo_pivotrl.backends.megatron.torch_dist import weights
from nemo_pivotrl.backends.megatron.weights import raise_together, value_problems
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.sizing.architecture import Architecture

EMBEDDING = "embedding.word_embeddings.weight"
NEMO_FOLDERS = ("weights", "model_weights")
"""Of NeMo 2, and of NeMo 1's unpacked `.nemo` files."""
FIELD = "megatron.load"


def find(folder: str | Path) -> Path:
    """The checkpoint proper in the folder that a tool made of it. Raises InputError."""
    named = Path(folder)
    tracker = named / "latest_checkpointed_iteration.txt"
    found = named
    if tracker.exists():
        latest = tracker.read_text(encoding="utf-8").strip()
        found = named / (f"iter_{int(latest):07d}" if latest.isdigit() else latest)
    for name in NEMO_FOLDERS:
        if (named / name).is_dir():
            found = named / name
    about = found / "metadata.json"
    if not about.exists():
        legacy = found.is_dir() and any(found.glob("mp_rank_*"))
        what = "Megatron-LM's `torch` format" if legacy else "no metadata.json"
        remedy = "give a torch_dist checkpoint; Megatron-LM makes one with --ckpt-convert-format torch_dist"
        raise InputError(Problem(str(found), None, FIELD, what, remedy))
    backend = json.loads(about.read_text(encoding="utf-8")).get("sharded_backend")
    if backend != "torch_dist":
        remedy = "convert it to torch_dist with the tool that wrote it"
        raise InputError(Problem(str(about), None, "sharded_backend", str(backend), remedy))
    return found


@torch.no_grad()
def load_pretrained(
    chunks: Sequence[nn.Module], folder: str | Path, architecture: Architecture, groups: Groups
) -> None:
    """Fill every weight of this rank. All ranks call it.

    Raises InputError, on all ranks and before any weight has moved, for tensors that are missing, unexpected or misshapen.
    """
    found = find(folder)
    index = torch_dist.read_index(found)
    names = set(index.state_dict_metadata)
    prefixes = {n.removesuffix(EMBEDDING) for n in names if n.endswith(EMBEDDING) and not n.startswith("optimizer.")}
    if len(prefixes) != 1:
        what = f"{EMBEDDING} {len(prefixes)} times"
        raise InputError(Problem(str(found), None, FIELD, what, "give a checkpoint of one GPT or hybrid model"))
    (prefix,) = prefixes
    layers = re.compile(rf"{re.escape(prefix)}decoder\.layers\.\d+\.")
    layout = {
        "non_homogeneous_layers": any(layers.match(name) for name in names),
        "singleton_local_shards": any(re.search(r"\.mlp\.experts\.experts\.\d+\.", name) for name in names),
    }
    model = tuple(f"{prefix}{part}." for part in ("embedding", "decoder", "output_layer"))

    def elsewhere(name: str) -> bool:
        """Optimiser, random states, multi-token prediction: not the policy's weights."""
        return not name.startswith(model)

    if problems := _types(index, found, model):
        raise InputError(problems)
    faults: list[Problem] = []
    for chunk in chunks:
        tensors = weights(chunk, groups, prefix, **layout)
        targets = {name: tensor.data for name, tensor in tensors.items()}
        loaded = torch_dist.read(tensors, found, index, elsewhere, architecture.vocab_size)
        for name, target in targets.items():
            target.copy_(loaded[name])
            faults += value_problems(str(found), name, target)
    raise_together(faults, groups)


def _types(index: Metadata, folder: Path, model: tuple[str, ...]) -> list[Problem]:
    """Tensors of the model that are no floating-point numbers of 16 bits or more, by the index."""
    remedy = "give the unquantised checkpoint: training and scoring here compute with the weights as they are"
    return [
        Problem(str(folder), None, name, f"a tensor of type {str(kind).removeprefix('torch.')}", remedy)
        for name, about in sorted(index.state_dict_metadata.items())
        if isinstance(about, TensorStorageMetadata) and name.startswith(model)
        if not (kind := about.properties.dtype).is_floating_point or kind.itemsize < 2
    ]
