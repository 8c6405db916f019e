"""The one place that loads transformers models, and what it takes for a folder to be the model that it says it is.

Nothing is left random and nothing is left out: a missing, unexpected, misshapen, integer, NaN or infinite tensor is refused
with its file and name, before any token is computed. Weights are safetensors only (a pickle runs code), and the folder's own
Python code is never run. A head that a caller adds (a doctor's log V) is the caller's and no part of the folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_pivotrl.core.errors import InputError, Problem, short
from nemo_pivotrl.core.model_folder import (
    AGAIN,
    OFFLINE,
    check_config,
    json_object,
    one_screen,
    regular_file,
)
from nemo_pivotrl.sizing.hf_folder import load_config

if TYPE_CHECKING:
    import torch
    from torch import Tensor

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
CARRIED = ("mtp.",)
"""Tensors that begin so are multi-token prediction heads, which no policy, patient or doctor uses."""
DERIVED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids|attn\.bias|attn\.masked_bias)$")
"""Tensors that old checkpoints carry and that follow from the config."""
FLOATS = frozenset(("F64", "F32", "F16", "BF16"))
"""Types of tensors, as safetensors names them, whose values are what they say. 8-bit floats are quantised weights without
their scales."""
UNQUANTISED = "give the unquantised checkpoint: training and scoring here compute with the weights as they are"
CAUSAL = "AutoModelForCausalLM"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint folder, as the header of its file describes it."""

    file: str
    dtype: str
    """`F32`, `BF16`, `I8`, ..."""
    shape: tuple[int, ...]


# ---- files, without their values ----


def check_weights(folder: str | Path, field: str, quantised: bool = False) -> dict[str, StoredTensor]:
    """Every tensor of an HF folder by name, from the headers of its safetensors files; no value is read.

    quantised: whether packed weights are welcome, as they are to an engine that knows their format. Raises InputError with
    all that is wrong: no safetensors, damaged or missing files, an index that does not describe them, and integer weights.
    """
    where = Path(folder)
    config = check_config(where, field)
    if config.get("quantization_config") and not quantised:
        found = short(config["quantization_config"])
        raise InputError(Problem(str(where / "config.json"), None, "quantization_config", found, UNQUANTISED))
    file_of = _weight_map(where, field)
    files = sorted(set(file_of.values())) if file_of is not None else [SINGLE]
    tensors, problems = _headers(where, files)
    if not problems and file_of is not None:
        problems = _against_index(where, file_of, tensors)
    if not problems and not tensors:
        problems = [Problem(str(where / files[0]), None, "weights", "no tensors", AGAIN)]
    if not quantised and not problems:
        problems = _integers(where, tensors)
    if not problems:
        problems = _impossible_sizes(where, config, tensors)
    if problems:
        raise InputError(problems)
    return tensors


def has_weights(folder: str | Path) -> bool:
    """Whether an HF folder names safetensors at all. It may hold config and tokenizer alone, where weights come from
    elsewhere (`megatron.load`)."""
    return any((Path(folder) / name).exists() for name in (INDEX, SINGLE))


def _weight_map(where: Path, field: str) -> dict[str, str] | None:
    """Tensor to file, by the index; None where one file holds everything. Raises InputError."""
    index, single = where / INDEX, where / SINGLE
    if not index.exists():
        if not single.exists():
            pickles = sorted(p.name for p in where.iterdir() if p.suffix in PICKLES)
            found = "no .safetensors file" + (f", but {', '.join(pickles[:4])}" if pickles else "")
            remedy = (
                "save it with save_pretrained(safe_serialization=True): pickled weights run code and are not loaded"
            )
            raise InputError(
                Problem(str(where), None, field, found, remedy if pickles else "give an HF checkpoint folder")
            )
        return None
    table = json_object(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise InputError(Problem(str(index), None, "weight_map", short(table), AGAIN))
    problems = []
    for name, file in table.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            remedy = "an index names safetensors files of its own folder"
            problems.append(Problem(str(index), None, f"weight_map.{short(name, 60)}", short(file), remedy))
    if single.exists() and SINGLE not in table.values():
        remedy = f"remove {SINGLE} or {INDEX}: which of them is the model differs from reader to reader"
        problems.append(Problem(str(where), None, field, "two sets of weights", remedy))
    if problems:
        raise InputError(problems)
    return table


def _headers(where: Path, files: Iterable[str]) -> tuple[dict[str, StoredTensor], list[Problem]]:
    """What the files' headers say, and what is wrong with the files."""
    from safetensors import safe_open

    tensors: dict[str, StoredTensor] = {}
    problems = []
    for name in files:
        path = where / name
        if why := regular_file(path):
            remedy = "complete the download: the folder's index names it" if why == "nothing" else AGAIN
            problems.append(Problem(str(path), None, "weights", why, remedy))
            continue
        try:
            with one_screen(path, "weights", f"damaged or cut off: {AGAIN}"), safe_open(str(path), "np") as opened:
                for key in opened.keys():  # noqa: SIM118
                    about = opened.get_slice(key)
                    if key in tensors:
                        remedy = "one tensor stands in one file"
                        problems.append(Problem(str(path), None, key, f"also in {tensors[key].file}", remedy))
                    tensors[key] = StoredTensor(name, str(about.get_dtype()), tuple(about.get_shape()))
        except InputError as error:
            problems += error.problems
    return tensors, problems


def _against_index(where: Path, file_of: Mapping[str, str], tensors: Mapping[str, StoredTensor]) -> list[Problem]:
    """Tensors that are not where the index says, and the other way round."""
    problems = []
    for name in sorted(file_of.keys() | tensors.keys()):
        if name not in tensors:
            found = "named by the index, and not in the file"
            problems.append(Problem(str(where / file_of[name]), None, short(name), found, AGAIN))
        elif file_of.get(name) != tensors[name].file:
            found = f"in the file, and the index says {file_of.get(name, 'nothing')}"
            problems.append(Problem(str(where / tensors[name].file), None, short(name), found, AGAIN))
    return problems


def _integers(where: Path, tensors: Mapping[str, StoredTensor]) -> list[Problem]:
    return [
        Problem(str(where / about.file), None, short(name), f"a tensor of type {about.dtype}", UNQUANTISED)
        for name, about in sorted(tensors.items())
        if about.dtype not in FLOATS and not DERIVED.search(name) and not _counter(name)
    ]


def _counter(name: str) -> bool:
    """Buffers that count, and are integers by their nature."""
    return name.rpartition(".")[2] in ("num_batches_tracked", "tokens_per_expert")


def _impossible_sizes(where: Path, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> list[Problem]:
    """Numbers of layers that these weights cannot have: building such a model takes time without end."""
    inner = config.get("text_config")
    sizes = inner if isinstance(inner, dict) else config
    problems = []
    for name in ("num_hidden_layers", "n_layer", "num_layers"):
        value = sizes.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value > len(tensors)):
            remedy = f"the folder has {len(tensors)} tensors: give the config that belongs to these weights"
            problems.append(Problem(str(where / "config.json"), None, name, short(value), remedy))
    return problems


# ---- values ----


def not_finite(tensor: Tensor) -> str | None:
    """What stands in a tensor beside numbers: NaN, inf or -inf; None if it is finite. Takes no memory of its size."""
    if tensor.numel() == 0 or not (tensor.is_floating_point() or tensor.is_complex()):
        return None
    if tensor.element_size() == 1:  # 8-bit floats have no order of their own
        tensor = tensor.float()
    low, high = (float(value) for value in tensor.detach().aminmax())
    if low != low or high != high:
        return "NaN"
    return "-inf" if low == -float("inf") else "inf" if high == float("inf") else None


def check_values(named: Iterable[tuple[str, Tensor]], file_of: Mapping[str, str], folder: str | Path) -> None:
    """Raise InputError with every tensor that holds NaN or infinity. file_of: tensor name to its file, as far as known."""
    remedy = "the weights are damaged or training diverged: use an earlier checkpoint, or copy the file again"
    problems = [
        Problem(str(Path(folder, file_of.get(name, ""))), None, name, f"{what} among its values", remedy)
        for name, tensor in named
        if (what := not_finite(tensor))
    ]
    if problems:
        raise InputError(problems)


def _once(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor under the first of its names: tied ones are looked at once."""
    seen = set()
    for name, tensor in state.items():
        if (place := (tensor.data_ptr(), tensor.shape)) not in seen:
            seen.add(place)
            yield name, tensor


# ---- models ----


def load_model(
    folder: str,
    field: str,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    kind: str = CAUSAL,
) -> Any:
    """A transformers model from an HF folder, on `device`, in evaluation mode, every tensor checked.

    field: the recipe's field that names the folder, for errors. kind: transformers' class. Raises InputError with all that
    is wrong with the folder's files, with the names, types, shapes and values of its tensors, and with what it computes.
    """
    import torch

    stored = check_structure(folder, field, kind)
    exact = {"experts_implementation": "eager"} if dtype is torch.float64 else {}  # grouped matmuls know no float64
    model = _from_pretrained(folder, field, kind, dtype=dtype, **exact)
    if problems := _untied(folder, model, stored):
        raise InputError(problems)
    model = model.to(device).eval()
    check_values(_once(model.state_dict()), {name: about.file for name, about in stored.items()}, folder)
    check_output(model, folder)
    if (head := model.get_output_embeddings()) is not None:
        head.register_forward_pre_hook(_contiguous)
    return model


def _contiguous(_: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The head's input in one piece. Of hidden states cut by `logits_to_keep` torch makes a batched product, for which it copies
    the head's weights once a row: seconds and gigabytes where this takes a hundredth of a second (benchmarks/head_cut.py)."""
    return tuple(x.contiguous() for x in given)


def check_engine_model(folder: str, field: str, values: bool) -> None:
    """What `load_model` checks, for a model that an engine of its own loads: engines leave random what they do not find.

    values: whether every tensor is read and looked at, too. A quantised checkpoint is the engine's own affair but for its
    files. Raises InputError.
    """
    quantised = bool(check_config(folder, field).get("quantization_config"))
    stored = check_weights(folder, field, quantised) if quantised else check_structure(folder, field)
    if values:
        check_values(_read(folder, stored), {name: about.file for name, about in stored.items()}, folder)


def _read(folder: str, stored: Mapping[str, StoredTensor]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a folder's files, one at a time."""
    from safetensors import safe_open

    for file in sorted({about.file for about in stored.values()}):
        with safe_open(str(Path(folder, file)), "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                yield name, opened.get_tensor(name)


def check_structure(folder: str, field: str, kind: str = CAUSAL) -> dict[str, StoredTensor]:
    """Every stored tensor, as `check_weights` has them, once names and shapes are those of the model in config.json.

    transformers loads the files into a model without memory and says what differs: loading in earnest would give what is
    missing or misshapen its memory first, however much the config asks for. Raises InputError.
    """
    stored = check_weights(folder, field)
    load_config(folder, field)
    if (Path(folder) / "generation_config.json").exists():
        json_object(Path(folder) / "generation_config.json")
    _, report = _from_pretrained(
        folder, field, kind, device_map="meta", ignore_mismatched_sizes=True, output_loading_info=True
    )
    if problems := _differences(folder, stored, report):
        raise InputError(problems)
    return stored


def _from_pretrained(folder: str, field: str, kind: str, **options: Any) -> Any:
    import transformers

    remedy = f"give the config that belongs to these weights, or {AGAIN}"
    with one_screen(folder, field, remedy), _quiet():
        return getattr(transformers, kind).from_pretrained(folder, use_safetensors=True, **OFFLINE, **options)


def _differences(folder: str, stored: Mapping[str, StoredTensor], report: Mapping[str, Any]) -> list[Problem]:
    """What transformers would have left random, left out, or replaced."""

    def file(name: str) -> str:
        return str(Path(folder, stored[name].file if name in stored else ""))

    remedy = "the config asks for it, and it would start random: give the whole checkpoint and its own config.json"
    problems = [Problem(folder, None, name, "nothing", remedy) for name in sorted(report["missing_keys"])]
    for name, there, wanted in sorted(report["mismatched_keys"]):
        found = f"shape {tuple(there)}"
        remedy = f"the config makes it {tuple(wanted)}: give the config that belongs to these weights"
        problems.append(Problem(file(name), None, name, found, remedy))
    remedy = "the config has no place for it: give the config that belongs to these weights, or remove the tensor"
    problems += [
        Problem(file(name), None, name, "a tensor", remedy)
        for name in sorted(report["unexpected_keys"])
        if not name.startswith(CARRIED) and not DERIVED.search(name)
    ]
    return problems


def _untied(folder: str, model: Any, stored: Mapping[str, StoredTensor]) -> list[Problem]:
    """A head that the config ties to the embedding, and that the file gives other values: readers choose differently."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = model.config.get_text_config().to_dict().get("tie_word_embeddings")
    if not tied or head is None or embedding is None:
        return []
    if head.weight is embedding.weight or head.weight.data_ptr() == embedding.weight.data_ptr():
        return []
    name = next((n for n, m in model.named_modules() if m is head), "lm_head") + ".weight"
    file = str(Path(folder, stored[name].file if name in stored else ""))
    remedy = "tie_word_embeddings is true in config.json: set it to false, or remove the tensor"
    return [Problem(file, None, name, "other values than the embedding's", remedy)]


def check_output(model: Any, folder: str) -> None:
    """Run four tokens. Raises InputError where finite weights give logits that are not, or the model cannot run at all."""
    import torch

    rows = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(4, device=model.device) % rows)[None]
    with one_screen(folder, "first forward pass"), torch.inference_mode():
        logits = model(input_ids=ids).logits
    if what := not_finite(logits):
        remedy = "the weights are finite and too large, or config.json is not theirs: use another checkpoint"
        raise InputError(Problem(folder, None, "first forward pass", f"{what} among the logits", remedy))


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers logs a table of what differs; here an InputError says it."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
