"""HF safetensors into a model that is spread over ranks, and back, along `mapping`.

Every rank reads only its own pieces, and export holds one whole tensor at a time. Nothing is left random and nothing is
left out: what is missing, unexpected or misshapen stops the job by name.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from nemo_pivotrl.backends.hf_models import not_finite
from nemo_pivotrl.backends.megatron.mapping import Entry, entries, plain_name
from nemo_pivotrl.backends.megatron.parallel import Groups
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.sizing.architecture import Architecture, read_architecture

CARRIED = ("mtp.",)
"""Tensors that begin so are not part of the policy (multi-token prediction heads). `save_hf` copies them as they were."""
DERIVED = re.compile(r"\.rotary_emb\.inv_freq$")
"""Tensors that old checkpoints carry and that follow from the config."""
MAX_SHARD_BYTES = 5 * 10**9


class Checkpoint:
    """The safetensors of an HF checkpoint folder, read lazily. Raises InputError when there are none."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._open: dict[str, Any] = {}
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            self.file_of: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        elif (self.folder / "model.safetensors").exists():
            self.file_of = dict.fromkeys(self._file("model.safetensors").keys(), "model.safetensors")
        else:
            remedy = "give an HF checkpoint folder with model.safetensors"
            raise InputError(Problem(str(folder), None, "weights", "no safetensors", remedy))

    def _file(self, name: str) -> Any:
        if name not in self._open:
            path = self.folder / name
            if not path.exists():
                remedy = "complete the download: the folder's index names it"
                raise InputError(Problem(str(path), None, "weights", "nothing", remedy))
            self._open[name] = safe_open(str(path), "pt")
        return self._open[name]

    def path(self, name: str) -> str:
        """The file that holds a tensor."""
        return str(self.folder / self.file_of[name])

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header."""
        return tuple(self._file(self.file_of[name]).get_slice(name).get_shape())

    def read(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Positions `start` to `stop` along `dim` (0 or 1) of a tensor."""
        lazy = self._file(self.file_of[name]).get_slice(name)
        found: Tensor = lazy[start:stop] if dim == 0 else lazy[:, start:stop]
        return found

    def whole(self, name: str) -> Tensor:
        """A tensor, read as a whole."""
        found: Tensor = self._file(self.file_of[name]).get_tensor(name)
        return found


# ---- the tensors of this rank ----


def local_tensors(chunks: Sequence[nn.Module], architecture: Architecture, groups: Groups) -> dict[str, Tensor]:
    """This rank's parameters and expert biases, by their names in `mapping`."""
    found: dict[str, Tensor] = {}
    for wrapped in chunks:
        chunk = wrapped
        while isinstance(getattr(chunk, "module", None), nn.Module):  # DistributedDataParallel and the like
            chunk = chunk.module  # type: ignore[assignment]
        tensors = _named_tensors(chunk)
        found |= {mapped: tensors[name] for name, mapped in local_names(chunk, architecture, groups).items()}
    return found


def local_names(chunk: nn.Module, architecture: Architecture, groups: Groups) -> dict[str, str]:
    """A chunk's own name of each of its parameters and expert biases, to that in `mapping`."""
    numbers = {str(i): layer.layer_number - 1 for i, layer in enumerate(chunk.decoder.layers)}  # type: ignore
    return {name: _name_in_mapping(name, numbers, architecture, groups) for name in _named_tensors(chunk)}


def _named_tensors(chunk: nn.Module) -> dict[str, Tensor]:
    biases = {name: t for name, t in chunk.named_buffers() if name.endswith(".router.expert_bias")}
    return {**dict(chunk.named_parameters()), **biases}


def _name_in_mapping(name: str, layers: dict[str, int], architecture: Architecture, groups: Groups) -> str:
    """Layers and experts counted over the whole model; Transformer Engine's names as the plain layers have them."""
    name = plain_name(name, layers)
    name = re.sub(r"\.experts\.(linear_fc[12])\.weight(\d+)$", r".experts.local_experts.\2.\1.weight", name)
    if architecture.moe is None:
        return name
    first = groups.ep.rank() * (architecture.moe.num_experts // groups.ep.size())
    return re.sub(r"(\.local_experts\.)(\d+)", lambda m: f"{m[1]}{int(m[2]) + first}", name)


def _ranks_of(entry: Entry, groups: Groups) -> ProcessGroup:
    return groups.tp if entry.expert is None else groups.expt_tp


# ---- reading ----


@torch.no_grad()
def load_hf(chunks: Sequence[nn.Module], folder: str | Path, architecture: Architecture, groups: Groups) -> None:
    """Fill every parameter of this rank from an HF checkpoint folder. Raises InputError with all problems at once."""
    checkpoint = Checkpoint(folder)
    table = entries(architecture)
    tensors = local_tensors(chunks, architecture, groups)
    unknown = sorted(tensors.keys() - {entry.name for entry in table})
    if unknown:
        raise RuntimeError(f"parameters that no HF tensor maps to, with this release of megatron-core: {unknown}")
    problems = check_names(checkpoint, table, architecture)
    here = [entry for entry in table if entry.name in tensors]
    for entry in here:
        problems += _misshapen(checkpoint, entry, tensors[entry.name], _ranks_of(entry, groups))
    if problems:
        raise InputError(problems)
    faults = _untied(checkpoint, architecture) if groups.world.rank() == 0 else []
    for entry in here:
        ranks, target = _ranks_of(entry, groups), tensors[entry.name]
        cut = entry.cut(ranks.rank(), ranks.size())
        pieces = [checkpoint.read(entry.hf[source], entry.dim, start, stop) for source, start, stop in cut]
        for (source, _, _), piece in zip(cut, pieces, strict=True):
            faults += value_problems(checkpoint.path(entry.hf[source]), entry.hf[source], piece)
        shard = torch.cat(pieces, entry.dim) if len(pieces) > 1 else pieces[0]
        if entry.padded:
            target.zero_()
            target.narrow(entry.dim, 0, shard.shape[entry.dim]).copy_(shard)
        else:
            target.copy_(shard)
    raise_together(faults, groups)


def value_problems(file: str, name: str, *tensors: Tensor) -> list[Problem]:
    """A problem where a tensor, or what this rank has of it, holds NaN or infinity."""
    remedy = "the weights are damaged or training diverged: use an earlier checkpoint, or copy the file again"
    found = sorted({what for tensor in tensors if (what := not_finite(tensor))})
    return [Problem(file, None, name, f"{what} among its values", remedy) for what in found]


def raise_together(problems: Sequence[Problem], groups: Groups) -> None:
    """Raise InputError on every rank with what any of them has found. A collective of all ranks."""
    shares: list[Any] = [None] * groups.world.size()
    dist.all_gather_object(shares, list(problems), group=groups.world)
    found = list(dict.fromkeys(problem for share in shares for problem in share))
    if found:
        raise InputError(found)


def _untied(checkpoint: Checkpoint, architecture: Architecture) -> list[Problem]:
    """A head that the config ties to the embedding and that the files give other values: readers choose differently."""
    head, embedding = "lm_head.weight", embedding_name(checkpoint.file_of)
    if not architecture.tied or head not in checkpoint.file_of or embedding is None:
        return []
    if torch.equal(checkpoint.whole(head), checkpoint.whole(embedding)):
        return []
    remedy = "tie_word_embeddings is true in config.json: set it to false, or remove the tensor"
    return [Problem(checkpoint.path(head), None, head, "other values than the embedding's", remedy)]


def embedding_name(names: Iterable[str]) -> str | None:
    """The embedding's name among a checkpoint's."""
    return next((name for name in names if name.endswith((".embed_tokens.weight", ".embeddings.weight"))), None)


def mark(chunks: Sequence[nn.Module], architecture: Architecture, groups: Groups) -> None:
    """Tell Megatron what it notes down where it initialises weights, which is switched off, and what it overlooks."""
    tensors = local_tensors(chunks, architecture, groups)
    for entry in entries(architecture):
        if entry.name in tensors:
            mark_entry(entry, tensors[entry.name], groups)


def mark_entry(entry: Entry, target: Tensor, groups: Groups) -> None:
    """Note down on a parameter what Megatron asks it: whether ranks hold parts of it, and which of them sum its gradient."""
    ranks = _ranks_of(entry, groups)
    length = sum(stop - start for _, start, stop in entry.cut(ranks.rank(), ranks.size()))
    if entry.expert is not None or entry.padded or length < sum(entry.sizes):
        # the gradient norm leaves what is not marked out on every tensor-parallel rank but the first, which for experts
        # may be other experts
        for name, value in (("tensor_model_parallel", True), ("partition_dim", entry.dim), ("partition_stride", 1)):
            setattr(target, name, value)
    if entry.expert is not None and groups.expt_dp.size() != groups.dp_cp.size():
        # experts whole on several tensor-parallel ranks, each of which sends them its own tokens: without expert
        # parallelism Megatron takes them for dense weights and does not sum their gradients over those ranks
        target.allreduce = False  # type: ignore[attr-defined]


def check_names(checkpoint: Checkpoint, table: Sequence[Entry], architecture: Architecture) -> list[Problem]:
    """Tensors that the architecture needs and the folder lacks, and the other way round."""
    file = str(checkpoint.folder)
    wanted = {name for entry in table for name in entry.hf}
    there = {n for n in checkpoint.file_of if not n.startswith(CARRIED) and not DERIVED.search(n)}
    if architecture.tied:
        there.discard("lm_head.weight")  # the embedding again
    problems = []
    experts = {int(m[1]) for name in there if (m := re.search(r"\.experts\.(\d+)\.", name))}
    if architecture.moe is not None and len(experts) != architecture.moe.num_experts:
        remedy = f"config.json says {architecture.moe.num_experts}: give the config that belongs to these weights"
        problems.append(Problem(file, None, "experts", f"{len(experts)} of them", remedy))
    problems += [Problem(file, None, name, "nothing", "the config asks for it") for name in sorted(wanted - there)]
    remedy = "the config has no place for it"
    problems += [Problem(file, None, name, "a tensor", remedy) for name in sorted(there - wanted)]
    return problems


def _misshapen(checkpoint: Checkpoint, entry: Entry, target: Tensor, ranks: ProcessGroup) -> list[Problem]:
    """HF tensors whose shape is not what the config makes it, and shards that would not fill their parameter."""
    problems = []
    for name, wanted in zip(entry.hf, _hf_shapes(entry, tuple(target.shape)), strict=True):
        if name in checkpoint.file_of and checkpoint.shape(name) != wanted:
            remedy = f"the config makes it {wanted}"
            problems.append(Problem(str(checkpoint.folder), None, name, str(checkpoint.shape(name)), remedy))
    length = sum(stop - start for _, start, stop in entry.cut(ranks.rank(), ranks.size()))
    if length != target.shape[entry.dim] and not (entry.padded and length < target.shape[entry.dim]):
        raise RuntimeError(
            f"{entry.name} is {tuple(target.shape)} here, but its pieces make {length} of dim {entry.dim}"
        )
    return problems


def _hf_shapes(entry: Entry, shard: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Shapes of the HF tensors that a shard of shape `shard` is a part of."""
    return [(*shard[: entry.dim], size, *shard[entry.dim + 1 :]) for size in entry.sizes]


# ---- exporting ----


def export_hf(
    chunks: Sequence[nn.Module],
    architecture: Architecture,
    groups: Groups,
    all_ranks: bool = False,
    adapters: Mapping[str, Any] | None = None,
    only: Collection[str] | None = None,
) -> Iterator[tuple[str, Tensor | None]]:
    """Every HF tensor of a model by name, as `export_entries` gives them. adapters: what is added to weights (`lora.merged`);
    only: names in the mapping of the weights that are asked for."""
    table = [entry for entry in entries(architecture) if not entry.copy and (only is None or entry.name in only)]
    return export_entries(table, local_tensors(chunks, architecture, groups), groups, all_ranks, adapters)


@torch.no_grad()
def export_entries(
    table: Sequence[Entry],
    tensors: Mapping[str, Tensor],
    groups: Groups,
    all_ranks: bool = False,
    adapters: Mapping[str, Any] | None = None,
) -> Iterator[tuple[str, Tensor | None]]:
    """Every HF tensor of `table` by name, whole, in the parameter's own dtype, one at a time. tensors: this rank's, by name.

    All ranks must iterate to the end, together: each step is a collective. The tensor is None but on rank 0, unless
    `all_ranks`. Tensors are on `groups.device`, and are the caller's to keep.
    """
    owners = _owners(tensors, groups)
    wanted = all_ranks or groups.world.rank() == 0
    for entry in table:
        stage, expert_rank, shape, dtype = owners[entry.name]
        whole = [torch.empty(s, dtype=dtype, device=groups.device) for s in _hf_shapes(entry, shape)]
        if stage == groups.pp.rank():
            if entry.name in tensors:
                shard = tensors[entry.name]
                if adapters and entry.name in adapters:
                    shard = (shard.float() + adapters[entry.name].delta()).to(shard.dtype)
                _join(entry, shard, _ranks_of(entry, groups), whole)
            if entry.expert is not None:
                _broadcast(whole, groups.ep, expert_rank)
        _broadcast(whole, groups.pp, stage)
        for name, tensor in zip(entry.hf, whole, strict=True):
            yield name, tensor if wanted else None


def _owners(tensors: Mapping[str, Tensor], groups: Groups) -> dict[str, tuple[int, int, tuple[int, ...], torch.dtype]]:
    """Parameter to the stage and the expert-parallel rank that hold it, and its shard's shape and dtype there."""
    own = {n: (groups.pp.rank(), groups.ep.rank(), tuple(t.shape), t.dtype) for n, t in tensors.items()}
    for group in (groups.ep, groups.pp):
        seen: list[Any] = [None] * group.size()
        dist.all_gather_object(seen, own, group=group)
        own = {name: place for found in reversed(seen) for name, place in found.items()}  # the first rank wins
    return own


def _join(entry: Entry, shard: Tensor, ranks: ProcessGroup, whole: list[Tensor]) -> None:
    """Gather all shards of a parameter and put their pieces where they belong in the HF tensors `whole`."""
    shard = shard.detach().contiguous()
    shards = [shard]
    if ranks.size() > 1:
        shards = [torch.empty_like(shard) for _ in range(ranks.size())]
        dist.all_gather(shards, shard, group=ranks)
    for rank, part in enumerate(shards):
        at = 0
        for source, start, stop in entry.cut(rank, ranks.size()):
            length = stop - start
            whole[source].narrow(entry.dim, start, length).copy_(part.narrow(entry.dim, at, length))
            at += length


def _broadcast(tensors: list[Tensor], group: ProcessGroup, rank: int) -> None:
    if group.size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, dist.get_global_rank(group, rank), group=group)


def save_hf(
    chunks: Sequence[nn.Module],
    folder: str | Path,
    source: str | Path,
    groups: Groups,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    adapters: Mapping[str, Any] | None = None,
    only: Collection[str] | None = None,
) -> None:
    """Write the model as an HF checkpoint folder; tokenizer and config come from `source`, the folder it began as.

    With `only` (as for `export_hf`) the folder has these tensors and nothing else. All ranks call it; rank 0 writes. Raises OSError
    on every rank when that fails, or when what was written is not a checkpoint of this architecture, with every tensor that
    `source` has, in its shape.
    """
    architecture = read_architecture(source)
    writer = _Writer(Path(folder), Path(source), max_shard_bytes) if groups.world.rank() == 0 else None
    error: list[str | None] = [None]
    for name, tensor in export_hf(chunks, architecture, groups, adapters=adapters, only=only):
        if writer is not None and error[0] is None:
            assert tensor is not None
            try:
                writer.add(name, tensor)
            except OSError as caught:  # the others wait in the next collective: tell them at the end
                error[0] = str(caught)
    if writer is not None and error[0] is None:
        try:
            if only is None:
                writer.finish()
                check_export(folder, source, architecture)
            else:
                writer.finish_weights()
        except (OSError, InputError) as caught:
            error[0] = str(caught)
    dist.broadcast_object_list(error, 0, group=groups.world, device=groups.device)
    if error[0] is not None:
        raise OSError(f"could not write {folder}: {error[0]}")


def has_weights(folder: str | Path) -> bool:
    """Whether an HF folder is more than a config and a tokenizer, which is enough where `megatron.load` names weights."""
    return any(Path(folder, f"model.safetensors{end}").exists() for end in ("", ".index.json"))


def check_export(folder: str | Path, source: str | Path, architecture: Architecture) -> None:
    """Raise InputError unless a folder has every tensor of the architecture, and in the shapes that the start policy's
    folder has them in. Files are opened, values not compared."""
    written = Checkpoint(folder)
    problems = check_names(written, entries(architecture), architecture)
    if has_weights(source):
        start = Checkpoint(source)
        for name in sorted(written.file_of.keys() & start.file_of.keys()):
            if written.shape(name) != start.shape(name):
                remedy = f"the start policy's is {start.shape(name)}"
                problems.append(Problem(str(folder), None, name, str(written.shape(name)), remedy))
    if problems:
        raise InputError(problems)


class _Writer:
    """HF's own layout: shards of bounded size, an index, and everything beside the weights from the source folder."""

    def __init__(self, folder: Path, source: Path, max_shard_bytes: int):
        self.folder, self.source, self.max_shard_bytes = folder, source, max_shard_bytes
        self.held: dict[str, Tensor] = {}
        self.bytes = 0
        self.shards: list[list[str]] = []
        self.total = 0
        self.dtype: torch.dtype | None = None

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self.held and self.bytes + size > self.max_shard_bytes:
            self._flush()
        self.dtype = self.dtype or tensor.dtype  # the embedding's
        self.held[name] = tensor.cpu().contiguous()
        self.bytes += size
        self.total += size

    def _flush(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        save_file(self.held, str(self.folder / f".part-{len(self.shards)}.safetensors"), {"format": "pt"})
        self.shards.append(list(self.held))
        self.held, self.bytes = {}, 0

    def finish(self) -> None:
        """A whole checkpoint: the weights, what is carried along, and the source's other files. Raises OSError."""
        if has_weights(self.source):
            start = Checkpoint(self.source)
            for name in start.file_of:
                if name.startswith(CARRIED):
                    self.add(name, start.whole(name))
        self.finish_weights()
        for path in self.source.iterdir():
            if (
                path.is_file()
                and path.suffix in (".json", ".jinja", ".txt", ".model", ".py")
                and "index" not in path.name
            ):
                shutil.copyfile(path, self.folder / path.name)
        self._write_config()

    def finish_weights(self) -> None:
        """The shards by their names, with an index where there are several. Raises OSError."""
        self._flush()
        count, weight_map = len(self.shards), {}
        for i, names in enumerate(self.shards):
            file = "model.safetensors" if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            (self.folder / f".part-{i}.safetensors").rename(self.folder / file)
            weight_map |= dict.fromkeys(names, file)
        if count > 1:
            index = {"metadata": {"total_size": self.total}, "weight_map": weight_map}
            text = json.dumps(index, indent=2, sort_keys=True)
            (self.folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")

    def _write_config(self) -> None:
        path = self.folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(self.dtype).removeprefix("torch.")
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
