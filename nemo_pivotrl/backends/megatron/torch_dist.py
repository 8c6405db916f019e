"""megatron-core's `torch_dist` checkpoint format: written by the ranks themselves, and read without running what stands in it.

The files are those of `megatron.core.dist_checkpointing.save` of 0.16, whichever release is installed: 0.17 and later read them, and
put into a shard, pickled, what 0.16 has in `common.pt`. What is done otherwise than there:

- Its writer forks processes, which a process with threads and open sockets should not, and which waits for ever when one
  of them dies. torch's own writer makes the same files in this process, and syncs them to disk.
- Reading, torch unpickles `.metadata` whatever it contains; here an unpickler that knows only what an index is made of
  goes first. Shards hold tensors, read with `weights_only`; objects in shards (Transformer Engine's `_extra_state`, which is
  the history of FP8's delayed scaling) would be unpickled unchecked, and are neither written nor read. `common.pt`,
  which in Megatron-LM's checkpoints holds its arguments, is left alone but in our own checkpoints.
- Names, shapes, the sizes of files and, in our own checkpoints, their CRC-32 are compared before any weight moves: torch
  reads a flipped bit as another number.
"""

from __future__ import annotations

import json
import pickle
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess, save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistLoadShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.utils import extract_sharded_base, force_all_tensors_to_non_fp8
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from nemo_pivotrl.backends.megatron.parallel import Groups
from nemo_pivotrl.core.errors import InputError, Problem, short

COMMON = "common.pt"
SUMS = "crc32.json"
"""File name to CRC-32, beside the shards."""
OLDER = "it was cut off or damaged: use another, or remove its folder to go on from the one before it"
INDEX_CLASSES = {
    "torch": {"Size", "strided", "contiguous_format"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
    "pathlib": {"PosixPath"},
}
"""Module to the names that `.metadata` may refer to, beside torch's dtypes. None of them does anything but hold data."""


def write(tensors: dict[str, Any], folder: Path, common: dict[str, Any]) -> None:
    """Write megatron-core's sharded tensors and, once, `common`. All ranks call it; the folder must be one that all see.

    Every rank's files are on disk when it returns. Raises OSError on every rank when one could not write.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rank = dist.get_rank()
    sharded, rest = save_preprocess({"tensors": tensors, "common": common})
    by_name, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    _on_first_rank(lambda: torch.save(rest, folder / COMMON), folder)
    try:
        checkpoint.save(
            mcore_to_pyt_state_dict(by_name, False),
            # one thread: what others raise is lost, and a save without their files succeeds (torch 2.13)
            storage_writer=checkpoint.FileSystemWriter(folder, thread_count=1),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )
    except CheckpointException as error:
        reasons = {rank: short(str(failure[0])) for rank, failure in error.failures.items()}
        raise OSError(0, f"the checkpoint could not be written, by rank: {reasons}", str(folder)) from error
    _on_first_rank(lambda: save_config(CheckpointingConfig("torch_dist", 1), str(folder)), folder)
    sums = _gather({path.name: _sum(path) for path in folder.glob(f"__{rank}_*.distcp")})
    if rank == 0:
        text = json.dumps({name: number for share in sums for name, number in share.items()}, indent=0)
        (folder / SUMS).write_text(text, encoding="utf-8")
    dist.barrier()


def _on_first_rank(work: Callable[[], None], folder: Path) -> None:
    """Raises OSError on every rank where the first cannot do it."""
    fault = ""
    if dist.get_rank() == 0:
        try:
            work()
        except (OSError, RuntimeError) as error:  # torch's writer of files raises the latter
            fault = short(str(error)) or type(error).__name__
    fault = _gather(fault)[0]
    if fault:
        raise OSError(0, f"the checkpoint could not be written, by rank: {{0: {fault!r}}}", str(folder))


def _sum(path: Path) -> int:
    number = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            number = zlib.crc32(block, number)
    return number


def _gather(own: Any) -> list[Any]:
    """Every rank's."""
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, own)
    return shares


def check_sums(folder: Path) -> None:
    """Read every file of a checkpoint that `write` made once, each by one rank. Raises InputError on every rank."""
    path = folder / SUMS
    try:
        sums = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(Problem(str(path), None, "checkpoint", short(str(error)), OLDER)) from error
    mine = sorted(sums)[dist.get_rank() :: dist.get_world_size()]
    bad = [name for share in _gather([n for n in mine if _sum(folder / n) != sums[n]]) for name in share]
    if bad:
        raise InputError(
            [Problem(str(folder / n), None, "checkpoint", "other bytes than were written", OLDER) for n in sorted(bad)]
        )


def read_common(folder: Path) -> dict[str, Any]:
    """`common` of a checkpoint that `write` made. Raises InputError."""
    path = folder / COMMON
    try:
        found: dict[str, Any] = torch.load(path, weights_only=True)["common"]
    except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise InputError(Problem(str(path), None, "checkpoint", short(str(error)), OLDER)) from error
    return found


def read(
    tensors: dict[str, Any], folder: Path, index: Metadata, ignored: Callable[[str], bool], vocab_size: int
) -> dict[str, Tensor]:
    """This rank's shards of the tensors in a checkpoint, by the names in `tensors`; all ranks call it.

    Sharded tensors that hold data are filled in place. Raises InputError on every rank, before that, where names or shapes
    differ; names for which `ignored` need not be asked for. A padded vocabulary may differ in length, from `vocab_size` on.
    """
    problems = _differences(tensors, folder, index, ignored, vocab_size)
    if problems:
        raise InputError(problems)
    try:
        state = {"tensors": tensors}
        force_all_tensors_to_non_fp8(state)
        sharded, _, factories = load_preprocess(state)
        only, _ = extract_sharded_base(sharded)
        loaded = apply_factory_merges(TorchDistLoadShardedStrategy().load(only, folder), factories)
    except (CheckpointException, CheckpointingException) as error:
        reasons = [str(failure[0]) for failure in getattr(error, "failures", {}).values()] or [str(error)]
        raise InputError(Problem(str(folder), None, "checkpoint", short(reasons[0]), OLDER)) from error
    found: dict[str, Tensor] = loaded["tensors"]
    return found


def _differences(
    tensors: dict[str, Any], folder: Path, index: Metadata, ignored: Callable[[str], bool], vocab_size: int
) -> list[Problem]:
    sharded, _, _ = load_preprocess({"tensors": tensors})
    own = {t.key: (tuple(t.global_shape), t.allow_shape_mismatch) for t in nested_values(sharded)}
    wanted = {
        key: shape for share in _gather(own) for key, shape in share.items()
    }  # all ranks find, and raise, the same
    there = {k: tuple(t.size) for k, t in index.state_dict_metadata.items() if isinstance(t, TensorStorageMetadata)}
    remedy = "the model, or what of it is trained, differs from what wrote the checkpoint: use that recipe again"
    problems = [Problem(str(folder), None, key, "nothing", remedy) for key in sorted(wanted.keys() - there.keys())]
    more = sorted(key for key in there.keys() - wanted.keys() if not ignored(key))
    problems += [Problem(str(folder), None, key, f"a tensor {there[key]}", remedy) for key in more]
    for key in sorted(wanted.keys() & there.keys()):
        (shape, padded), found = wanted[key], there[key]
        if found != shape and not (padded and found[1:] == shape[1:] and found[0] >= vocab_size):
            problems.append(Problem(str(folder), None, key, str(found), f"this model has {shape}: {remedy}"))
    return problems


# ---- the index ----


def read_index(folder: Path) -> Metadata:
    """What a checkpoint says that it contains, after a look at whether its files are as long as it says.

    Raises InputError for a folder that is no checkpoint, for a damaged or hostile index, and for missing or short files.
    """
    path = folder / ".metadata"
    if not (folder / "metadata.json").exists() or not path.exists():
        found = "no metadata.json and .metadata, which are written last" if folder.is_dir() else "no such folder"
        raise InputError(Problem(str(folder), None, "checkpoint", found, OLDER))
    try:
        with path.open("rb") as file:
            index = _IndexUnpickler(file, path).load()
    except InputError:
        raise
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, LookupError, TypeError, ValueError) as error:
        raise InputError(Problem(str(path), None, "checkpoint", short(f"{error!r}"), OLDER)) from error
    if not isinstance(index, Metadata) or not isinstance(index.storage_data, dict):
        raise InputError(Problem(str(path), None, "checkpoint", f"a {type(index).__name__}", "it is not an index"))
    ends: dict[str, int] = {}
    for stored in index.storage_data.values():
        ends[stored.relative_path] = max(ends.get(stored.relative_path, 0), stored.offset + stored.length)
    problems = []
    for name, end in sorted(ends.items()):
        file_path = folder / name
        size = file_path.stat().st_size if file_path.exists() else None
        if size is None or size < end:
            found = "nothing" if size is None else f"{size:,} of {end:,} bytes"
            problems.append(Problem(str(file_path), None, "checkpoint", found, OLDER))
    if problems:
        raise InputError(problems)
    return index


class _IndexUnpickler(pickle.Unpickler):
    """Makes nothing but what an index is made of."""

    def __init__(self, file: Any, path: Path):
        super().__init__(file)
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if name in INDEX_CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and re.fullmatch(r"\w+", name) and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        remedy = "no index refers to this: the file runs code when it is loaded; do not use it"
        raise InputError(Problem(str(self.path), None, "checkpoint", f"{module}.{name}", remedy))


def weights(chunk: nn.Module, groups: Groups, prefix: str = "", **metadata: bool) -> dict[str, Any]:
    """megatron-core's sharded tensors of a model chunk, whose data are the weights themselves; each layer under its own
    name, unless `non_homogeneous_layers` is False."""
    settings = {"dp_cp_group": groups.dp_cp, "non_homogeneous_layers": True, **metadata}
    found = chunk.sharded_state_dict(prefix=prefix, metadata=settings)  # type: ignore[operator]
    return {name: part for name, part in found.items() if not isinstance(part, ShardedObject)}
