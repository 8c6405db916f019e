"""export: the pivot set for other trainers: NeMo-Gym rows, a NeMo-RL recipe around them, or a Nemotron artefact.

NeMo-RL finds a row's environment by `agent_ref.name`, which must be a top-level name of the Gym config. The two are written
together here, so they agree.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.artifacts import Header, digest, file_digest, json_line, read_header, read_rows
from nemo_pivotrl.core.atomic import write_atomically
from nemo_pivotrl.core.errors import InputError, Problem
from nemo_pivotrl.pivotrl import export_nemo_rl as nemo_rl

SPLITS = ("train", "validation")


def export(recipe: Recipe, fresh: bool = False) -> Path:
    """Write the pivot set as the recipe's `export.target` says; returns the folder."""
    source = recipe.path(recipe.select.output)
    header = read_header(source, "pivots")
    if recipe.export.target == "nemotron":
        return _nemotron(recipe, source, header)
    if recipe.export.target == "nemo-rl":
        return _nemo_rl(recipe, source, header)
    folder = recipe.path("gym")
    write_rows(source, {split: folder / f"{split}.jsonl" for split in SPLITS})
    print(f"NeMo-Gym rows -> {folder}")
    return folder


def write_rows(source: Path, target: Mapping[str, Path]) -> dict[str, int]:
    """Write each split's rows, without a header; returns how many of each. A file appears whole or not at all."""
    counts = {}
    for split, path in target.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        counts[split] = 0
        with part.open("wb") as out:
            for row in read_rows(source):
                if row["provenance"]["split"] == split:
                    out.write(json_line(row))
                    counts[split] += 1
        os.replace(part, path)
    return counts


def _agents(source: Path) -> set[str]:
    return {row["agent_ref"]["name"] for row in read_rows(source)}


def _nemo_rl(recipe: Recipe, source: Path, header: Header) -> Path:
    agents = _agents(source)
    if agents != {recipe.extract.agent_ref}:
        remedy = "run extract, profile and select again with this extract.agent_ref, or set it to the rows' name"
        found = f"rows name {', '.join(sorted(agents))}"
        raise InputError(Problem(str(source), None, "agent_ref", found, remedy))
    folder = recipe.path("nemo-rl").absolute()
    counts = write_rows(source, {split: folder / f"{split}.jsonl" for split in SPLITS})
    (agent,) = agents
    gym, own = nemo_rl.gym_config(recipe, agent)
    write_atomically(
        folder / "gym.yaml", _yaml(gym, [f"The environment of this folder's rows: their agent_ref is {agent}."])
    )
    if own:
        for name, text in nemo_rl.own_server(recipe).items():
            path = folder / nemo_rl.OWN_SERVER / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text)
    made, lost = nemo_rl.recipe_of(recipe, folder, counts["validation"] > 0)
    notes = [
        f"Written by `nemo-pivotrl export nemo-rl`, pivot set {header.extra['version']}.",
        *map("Not carried over: {}.".format, lost),
    ]
    path = folder / "grpo-pivotrl.yaml"
    write_atomically(path, _yaml(made, notes))
    print(f"{counts['train']} pivots, {counts['validation']} held-out rows; agent {agent} -> {folder}")
    print("\n".join(f"  not carried over: {what}" for what in lost))
    roots = f"NEMO_GYM_EXTRA_ROOTS={folder} " if own else ""
    print(f"in NeMo-RL: {roots}uv run examples/nemo_gym/run_grpo_nemo_gym.py --config {path}")
    return folder


def _yaml(tree: Mapping[str, Any], notes: Sequence[str]) -> str:
    import yaml

    return "".join(f"# {note}\n" for note in notes) + yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True)


def _nemotron(recipe: Recipe, source: Path, header: Header) -> Path:
    """Files as `SplitJsonlDataArtifact` names them; what the set depends on stands in metadata.json."""
    folder = recipe.path("nemotron").absolute()
    files = {"train": folder / "train/train.jsonl", "validation": folder / "val/val.jsonl"}
    counts = write_rows(source, files)
    val = str(files["validation"]) if counts["validation"] else ""
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
        "train": str(files["train"]),
        "val": val,
        "test": "",
        "mode": "pivotrl",
        "source": str(source.absolute()),
        "run_hash": digest([file_digest(source), recipe.extract.agent_ref]),
        "train_rows": counts["train"],
        "val_rows": counts["validation"],
    }
    fields = {
        "total_sequences": sum(counts.values()),
        "elapsed_sec": 0.0,
        "train": str(files["train"]),
        "val": val or None,
        "test": None,
        "source_datasets": [f"file://{Path(path).absolute()}" for path in recipe.extract.trajectories],
    }
    metadata = {
        "path": str(folder / "manifest.json"),
        "type": "SplitJsonlDataArtifact",
        "metadata": {key: value for key, value in {**fields, **own}.items() if value is not None},
        "created_at": datetime.now(UTC).isoformat(),
        "producer": "local",
        "tracking": None,
        "name": "pivotrl/data",
        **fields,
    }
    for name, tree in (("metadata.json", metadata), ("manifest.json", manifest)):
        write_atomically(folder / name, json.dumps(tree, indent=2) + "\n")
    print(f"{counts['train']} pivots, {counts['validation']} held-out rows -> {folder / 'manifest.json'}")
    return folder
