"""A `MegatronGPTModel` of NeMo, spread over ranks, as an HF checkpoint folder: `backends/megatron/mapping.py` backwards.

NeMo-Aligner's megatron-core is older than what `backends/megatron/weights.py` needs, and its vocabulary is padded as its
config says: shards are gathered here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from nemo_pivotrl.backends.hf_models import not_finite
from nemo_pivotrl.backends.megatron.mapping import Entry, Piece, entries, plain_name
from nemo_pivotrl.core.errors import InputError, Problem, short
from nemo_pivotrl.integrations.nemo_aligner.versions import require
from nemo_pivotrl.sizing.architecture import Architecture

require()

from megatron.core import parallel_state  # noqa: E402

T = TypeVar("T")
MAX_FILE_BYTES = 5 * 10**9


def everywhere(do: Callable[[], T]) -> list[T]:
    """What `do` returned on each rank. A collective of all ranks; raises InputError on every one if it failed on any."""
    own: T | None = None
    problems: Sequence[Problem] = ()
    fault: Exception | None = None
    try:
        own = do()
    except InputError as error:
        problems = error.problems
    except Exception as error:  # the others wait, and must hear of it whatever it is
        fault, found = error, f"{type(error).__name__}: {short(str(error))}"
        problems = [Problem(f"rank {dist.get_rank()}", None, "failure", found, "mend it; the same command resumes")]
    results: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(results, (own, problems))
    wrong = list(dict.fromkeys(problem for _, failed in results for problem in failed))
    if wrong:
        raise InputError(wrong) from fault
    return [result for result, _ in results]


def on_first(do: Callable[[], T]) -> T:
    """What `do` returned on rank 0, on every rank; see `everywhere`."""
    return everywhere(lambda: do() if dist.get_rank() == 0 else None)[0]  # type: ignore[return-value]


@torch.no_grad()
def export(model: Any, architecture: Architecture, source: Path, folder: Path) -> None:
    """Write NeMo's `model` (a module, or one for each virtual pipeline stage) to `folder`, in the place of what is there.

    `source` is the HF folder of the same architecture whose config and tokenizer it gets. Every pipeline stage writes its own
    files, so all of them must see the folder. A collective of all ranks; raises InputError on every one when it fails.
    """
    new = folder.with_name(f"{folder.name}.new")
    table = [entry for entry in entries(architecture) if not entry.copy]
    shards = local_shards(model)

    def begin() -> None:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)

    on_first(begin)
    held = set().union(*everywhere(lambda: _known(shards, architecture)))
    lacking = sorted(entry.name for entry in table if entry.name not in held)
    if lacking:
        found = f"the model has no {', '.join(lacking[:4])}"
        remedy = "give the config.json that belongs to the weights in training"
        raise InputError(Problem(f"{source}/config.json", None, "model.pivotrl.hf_folder", found, remedy))
    written = everywhere(lambda: _write(shards, table, new))
    on_first(lambda: _finish({file: names for files in written for file, names in files.items()}, source, new, folder))


def local_shards(model: Any) -> dict[str, Tensor]:
    """This rank's parameters, by their names in `mapping`."""
    found: dict[str, Tensor] = {}
    for wrapped in model if isinstance(model, (list, nn.ModuleList)) else [model]:
        chunk: Any = wrapped
        while isinstance(getattr(chunk, "module", None), nn.Module):  # half precision and the like
            chunk = chunk.module
        numbers = {str(i): layer.layer_number - 1 for i, layer in enumerate(chunk.decoder.layers)}
        found |= {plain_name(name, numbers): parameter for name, parameter in chunk.named_parameters()}
    return found


def _known(shards: Mapping[str, Tensor], architecture: Architecture) -> set[str]:
    """Names of the shards. Raises InputError for one that no HF tensor is made of, or that is not as long as its pieces."""
    table = {entry.name: entry for entry in entries(architecture)}
    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    problems = []
    for name, shard in shards.items():
        entry = table.get(name)
        if entry is None:
            remedy = "an HF checkpoint like model.pivotrl.hf_folder has no such tensor: set generation to nemo"
            problems.append(Problem("model", None, name, "a parameter", remedy))
            continue
        length, wanted = shard.shape[entry.dim], sum(stop - start for _, start, stop in _cut(entry, shard, rank, size))
        if length * size < entry.sizes[0] if entry.padded else length != wanted:
            remedy = f"hf_folder's config.json makes it {entry.sizes[0] / size if entry.padded else wanted:g} or more"
            problems.append(Problem("model", None, name, f"{length} of dimension {entry.dim}", remedy))
    if problems:
        raise InputError(problems)
    return set(shards)


def _cut(entry: Entry, shard: Tensor, rank: int, size: int) -> list[Piece]:
    """Pieces of a rank's shard. How far a vocabulary is padded is NeMo's choice, so that the shard itself says it."""
    if not entry.padded:
        return entry.cut(rank, size)
    part, whole = shard.shape[entry.dim], entry.sizes[0]
    return [(0, min(rank * part, whole), min((rank + 1) * part, whole))]


def _gathered(shards: Mapping[str, Tensor], table: Sequence[Entry]) -> Iterator[tuple[str, Tensor]]:
    """HF tensors of this pipeline stage, on the CPU of its first tensor-parallel rank; the others get none.

    A collective of the tensor-parallel group, to be followed to its end.
    """
    group, size = (
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    first = parallel_state.get_tensor_model_parallel_rank() == 0
    for entry in table:
        if entry.name not in shards:
            continue
        shard = shards[entry.name].detach().contiguous()
        parts = [shard]
        if size > 1:
            parts = [torch.empty_like(shard) for _ in range(size)] if first else []
            dist.gather(shard, parts or None, parallel_state.get_tensor_model_parallel_src_rank(), group)
        if not first:
            continue
        shape = list(shard.shape)
        whole = [torch.empty([*shape[: entry.dim], n, *shape[entry.dim + 1 :]], dtype=shard.dtype) for n in entry.sizes]
        for rank, part in enumerate(parts):
            at = 0
            for source, start, stop in _cut(entry, shard, rank, size):
                whole[source].narrow(entry.dim, start, stop - start).copy_(part.narrow(entry.dim, at, stop - start))
                at += stop - start
        yield from zip(entry.hf, whole, strict=True)


def _write(shards: Mapping[str, Tensor], table: Sequence[Entry], folder: Path) -> dict[str, dict[str, str]]:
    """This stage's tensors into files of bounded size: file to the names in it and their dtypes, on the rank that wrote."""
    if parallel_state.get_data_parallel_rank(with_context_parallel=True) != 0:
        return {}
    stage = parallel_state.get_pipeline_model_parallel_rank()
    files: dict[str, dict[str, str]] = {}
    held: dict[str, Tensor] = {}
    fault: Exception | None = None
    remedy = "training has diverged: lower the learning rate and go on from an earlier checkpoint"
    wrong: list[Problem] = []

    def flush() -> None:
        nonlocal fault
        name = f"stage-{stage:03d}-{len(files):03d}.safetensors"
        files[name] = {key: str(value.dtype).removeprefix("torch.") for key, value in held.items()}
        try:
            save_file(held, str(folder / name), {"format": "pt"})
        except Exception as error:  # the other ranks wait in the next collective: told when all are through
            fault = fault or error
        held.clear()

    for name, tensor in _gathered(shards, table):
        held[name] = tensor
        if what := not_finite(tensor):
            wrong.append(Problem("model", None, name, f"{what} among its values", remedy))
        if sum(t.numel() * t.element_size() for t in held.values()) >= MAX_FILE_BYTES:
            flush()
    if held:
        flush()
    if fault:
        raise fault
    if wrong:  # no server may be given them
        raise InputError(wrong)
    return files


def _finish(files: Mapping[str, Mapping[str, str]], source: Path, new: Path, folder: Path) -> None:
    """Index, config and tokenizer; then the folder takes its name. Rank 0 alone."""
    away = sorted(name for name in files if not (new / name).exists())
    if away:
        remedy = "set model.pivotrl.servers.refit_folder to a folder that all ranks and servers see"
        raise InputError(Problem(str(new), None, ", ".join(away), "not seen by rank 0", remedy))
    for path in source.iterdir():
        if path.is_file() and path.suffix in (".json", ".jinja", ".txt", ".model") and "index" not in path.name:
            shutil.copyfile(path, new / path.name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    dtype = next(iter(next(iter(files.values())).values()))  # of the embedding
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    (new / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    index = {"metadata": {}, "weight_map": {name: file for file, names in files.items() for name in names}}
    (new / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)
