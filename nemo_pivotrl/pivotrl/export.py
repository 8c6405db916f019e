"""export: the pivot set for other trainers: NeMo-Gym rows, a NeMo-RL recipe around them, or a Nemotron artefact.

NeMo-RL finds a row's environment by `agent_ref.name`, which must be a top-level name of the Gym config. The two are written
together here, so they agree.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from nemo_pivotrl.components.lineage import check_lineage
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.artifacts import ROWS_AT_ONCE, Header, digest, file_digest, json_line, read_header, read_rows
from nemo_pivotrl.core.atomic import SUMS, replacing, write_atomically, write_sums
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.core.lock import one_writer
from nemo_pivotrl.data.gym_rows import candidate_to_row
from nemo_pivotrl.data.states import open_states
from nemo_pivotrl.pivotrl import export_nemo_rl as nemo_rl
from nemo_pivotrl.pivotrl.profile_rows import RATES

SPLITS = ("train", "validation")


@one_writer
def export(recipe: Recipe, fresh: bool = False) -> Path:
    """Write the pivot set as the recipe's `export.target` says; returns the folder."""
    source = recipe.path(recipe.select.output)
    header = read_header(source, "pivots")
    check_lineage(recipe, source, header)
    check_rows(source)
    if recipe.export.target == "nemotron":
        return _nemotron(recipe, source, header)
    if recipe.export.target == "nemo-rl":
        return _nemo_rl(recipe, source, header)
    folder = recipe.path("gym")
    with summed(folder) as sums:
        counts = write_rows(
            source, {split: folder / f"{split}.jsonl" for split in SPLITS}, recipe.extract.agent_ref, sums
        )
    print(f"{counts['train']} pivots, {counts['validation']} held-out rows as NeMo-Gym rows -> {folder}")
    return folder


@contextmanager
def summed(folder: Path) -> Iterator[dict[Path, str]]:
    """Files of an export that the block writes; `SHA256SUMS` of them comes last, so that one beside other files is never there.

    The block puts the sums that it knows into the dictionary: their files are not read again.
    """
    (folder / SUMS).unlink(missing_ok=True)
    known: dict[Path, str] = {}
    yield known
    write_sums(folder, known=known)


def check_rows(source: Path) -> None:
    """Refuse a pivot set that no trainer could use. Raises InputError."""
    if not any(row["split"] == "train" for row in read_rows(source)):
        remedy = "select keeps none: see its tables, and raise select.lambda_diff or profile more candidates"
        raise InputError(Problem(str(source), None, "rows", "no pivot of the train split", remedy))


def write_rows(source: Path, target: Mapping[str, Path], agent_ref: str, sums: dict[Path, str]) -> dict[str, int]:
    """Write each split's rows as NeMo-Gym rows, without a header; returns how many of each. A file appears whole or not at all.

    The files' SHA-256 go to `sums`.
    """
    counts, states = dict.fromkeys(target, 0), open_states(source)
    hashers = {split: hashlib.sha256() for split in target}
    rest = iter(read_rows(source))
    with ExitStack() as files:
        out = {split: files.enter_context(replacing(path)) for split, path in target.items()}
        while chunk := list(islice(rest, ROWS_AT_ONCE)):
            lines: dict[str, list[bytes]] = {split: [] for split in target}
            for row in chunk:
                rates = {key: row[key] for key in RATES if key in row}
                lines[row["split"]].append(json_line(candidate_to_row(states.candidate(row), agent_ref) | rates))
            for split, own in lines.items():
                text = b"".join(own)
                out[split].write(text)
                hashers[split].update(text)
                counts[split] += len(own)
    sums |= {path: hashers[split].hexdigest() for split, path in target.items()}
    return counts


def _nemo_rl(recipe: Recipe, source: Path, header: Header) -> Path:
    folder, agent = recipe.path("nemo-rl"), recipe.extract.agent_ref
    gym, own = nemo_rl.gym_config(recipe, agent)
    with summed(folder) as sums:
        counts = write_rows(source, {split: folder / f"{split}.jsonl" for split in SPLITS}, agent, sums)
        about = f"The environment of this folder's rows: their agent_ref is {agent}."
        write_atomically(folder / "gym.yaml", _yaml(gym, [about]))
        for name, text in nemo_rl.own_server(recipe).items() if own else ():
            write_atomically(folder / nemo_rl.OWN_SERVER / name, text)
        made, lost = nemo_rl.recipe_of(recipe, folder, counts["validation"] > 0)
        notes = [
            f"Written by `nemo-pivotrl export nemo-rl`, pivot set {header.extra['version']}.",
            f"{nemo_rl.HERE} is this folder, as an absolute path: it may lie anywhere.",
            *map("Not carried over: {}.".format, lost),
        ]
        write_atomically(folder / "grpo-pivotrl.yaml", _yaml(made, notes))
    print(f"{counts['train']} pivots, {counts['validation']} held-out rows; agent {agent} -> {folder}")
    print("\n".join(f"  not carried over: {what}" for what in lost))
    roots = f" NEMO_GYM_EXTRA_ROOTS=${nemo_rl.HERE}" if own else ""
    print(
        f"in NeMo-RL: export {nemo_rl.HERE}={folder.absolute()};{roots} uv run examples/nemo_gym/run_grpo_nemo_gym.py "
        f"--config ${nemo_rl.HERE}/grpo-pivotrl.yaml"
    )
    return folder


def _yaml(tree: Mapping[str, Any], notes: Sequence[str]) -> str:
    import yaml

    return "".join(f"# {note}\n" for note in notes) + yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True)


def _nemotron(recipe: Recipe, source: Path, header: Header) -> Path:
    """Files as `SplitJsonlDataArtifact` names them; what the set depends on stands in metadata.json.

    Paths are relative to the folder, which may be moved.
    """
    folder = recipe.path("nemotron")
    files = {"train": folder / "train/train.jsonl", "validation": folder / "val/val.jsonl"}
    with summed(folder) as sums:
        counts = write_rows(source, files, recipe.extract.agent_ref, sums)
        _describe(recipe, source, header, counts, files)
    print(f"{counts['train']} pivots, {counts['validation']} held-out rows -> {folder / 'manifest.json'}")
    return folder


def _describe(
    recipe: Recipe, source: Path, header: Header, counts: Mapping[str, int], files: Mapping[str, Path]
) -> None:
    """Write the two files beside a Nemotron artefact's rows."""
    folder = recipe.path("nemotron")
    train, val = (str(path.relative_to(folder)) for path in files.values())
    val = val if counts["validation"] else ""
    own = {
        "pivot_set": header.extra["version"],
        "policy": header.policy,
        "tokenizer": header.tokenizer,
        "chat_template": header.chat_template,
        "verifier": header.verifier,
        "rule": header.extra["rule"],
        "lambda_diff": header.extra["lambda_diff"],
        "parent": header.parent,
    }
    manifest = {
        "train": train,
        "val": val,
        "test": "",
        "mode": "pivotrl",
        "source": os.path.relpath(source, folder),
        "run_hash": digest([file_digest(source), recipe.extract.agent_ref]),
        "train_rows": counts["train"],
        "val_rows": counts["validation"],
    }
    fields = {
        "total_sequences": sum(counts.values()),
        "elapsed_sec": 0.0,
        "train": train,
        "val": val or None,
        "test": None,
        "source_datasets": [os.path.relpath(path, folder) for path in recipe.extract.trajectories],
    }
    metadata = {
        "path": "manifest.json",
        "type": "SplitJsonlDataArtifact",
        "metadata": {key: value for key, value in {**fields, **own}.items() if value is not None},
        "created_at": made_at(),
        "producer": "local",
        "tracking": None,
        "name": "pivotrl/data",
        **fields,
    }
    for name, tree in (("metadata.json", metadata), ("manifest.json", manifest)):
        write_atomically(folder / name, json.dumps(tree, indent=2) + "\n")


def made_at() -> str:
    """The time that Nemotron's artefacts must name: that of `SOURCE_DATE_EPOCH` (seconds), where it is set, so that bytes repeat."""
    told = os.environ.get("SOURCE_DATE_EPOCH", "")
    return datetime.fromtimestamp(int(told) if told.isdecimal() else time.time(), UTC).isoformat()
