"""Complete training states on disk: written atomically, resumed exactly, the best few kept.

`FOLDER/step_00010/` holds `policy/` (an ordinary HF checkpoint), `state/` (weights in training, optimiser, random state, in
the backend's own form), `meta.json`, and `SHA256SUMS` of all of them, which a resume compares. A folder appears by rename, when
all of it is on disk, so what is there is whole.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from nemo_pivotrl.backends.base import Trainer
from nemo_pivotrl.config import Checkpointing
from nemo_pivotrl.core.atomic import (
    SUMS,
    check_sums,
    read_json,
    read_sums,
    remove_folder,
    replacing_folder,
    write_atomically,
    write_sums,
)
from nemo_pivotrl.core.errors import TRY_AGAIN, InputError, Problem
from nemo_pivotrl.core.model_folder import CARD
from nemo_pivotrl.core.told_settings import difference
from nemo_pivotrl.data.chat_template import Chat

STARTED = time.monotonic()
"""What `checkpoint_must_save_by` counts from: the import of this file, right after the process began."""
META = "meta.json"
SUMMED = "state/*.distcp"
"""Files whose ranks summed them as they wrote them, and check them as they load (`megatron/torch_dist.py`)."""
_DAMAGED = "damaged: remove this checkpoint's folder, then the same command goes on from the one before"
HELD = "retention/held"
"""Metric of a checkpoint whose out-of-domain score was measured: true where it had been kept. Such checkpoints are saved at once."""


class TimeLimitReached(SystemExit):
    """A run that stopped at its deadline after a checkpoint; every process of it exits with `TRY_AGAIN`."""

    def __init__(self, where: Path):
        super().__init__(TRY_AGAIN)
        self.where = where


def time_limit(must_save_by: str) -> float:
    """Seconds of DD:HH:MM:SS, inf for an empty text. Raises InputError for any other form and for no time at all."""
    if not must_save_by:
        return math.inf
    parts = [int(part) for part in re.findall(r"\d+", must_save_by)]
    good = re.fullmatch(r"\d+:\d\d:\d\d:\d\d", must_save_by) and parts[1] < 24 and max(parts[2:]) < 60 and any(parts)
    if not good:
        remedy = "write DD:HH:MM:SS, e.g. 00:03:45:00 for three and three quarter hours, in quotes"
        raise InputError(Problem("recipe", None, "checkpointing.checkpoint_must_save_by", must_save_by, remedy))
    days, hours, minutes, seconds = parts
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def is_due(limit_s: float, elapsed_s: float, slowest_step_s: float) -> bool:
    """Whether to save and stop now: another step as slow as the slowest would pass the limit (all in seconds)."""
    return elapsed_s + slowest_step_s >= limit_s


@contextmanager
def _whole(final: Path) -> Iterator[Path]:
    """A folder to fill that becomes `final`, or nothing. A failed write is an OSError, on every rank."""
    from safetensors import SafetensorError

    with replacing_folder(final, SUMMED) as part:
        try:
            yield part
        except (RuntimeError, SafetensorError) as error:
            raise OSError(0, f"the checkpoint could not be written ({error})", str(part)) from error


def save(folder: Path, meta: Mapping[str, Any], trainer: Trainer, chat: Chat, settings: Checkpointing) -> None:
    """Write the state after `meta["step"]` steps, then drop checkpoints that are neither the latest nor among the best.

    meta: also `identity` of the run, the `settings` behind it by name, and `metrics` of the step.
    """
    with _whole(folder / f"step_{meta['step']:05d}") as part:
        trainer.export(part / "policy")
        chat.tokenizer.save_pretrained(part / "policy")
        trainer.save_training_state(part / "state")
        (part / META).write_text(json.dumps(meta, default=str), encoding="utf-8")
        write_sums(part / "policy")  # on its own, for whoever is given that folder
    prune(folder, settings)


def prune(folder: Path, settings: Checkpointing) -> None:
    """Keep the latest checkpoint, the best few by the recipe's metric, and the latest that held the out-of-domain score."""
    for doomed in folder.glob("*.old"):  # left by a kill in the middle of a deletion
        shutil.rmtree(doomed)
    found = steps(folder)
    keep = {*ranked(folder, settings)[: settings.keep_top_k], *found[-1:], *last_held(folder)}
    for path in found:
        if path not in keep:
            remove_folder(path)


def ranked(folder: Path, settings: Checkpointing) -> list[Path]:
    """Checkpoints that have the recipe's metric, the best first; of equals the earlier."""
    sign = -1.0 if settings.higher_is_better else 1.0
    scored = [p for p in steps(folder) if settings.metric_name in _meta(p)["metrics"]]
    return sorted(scored, key=lambda p: (sign * _meta(p)["metrics"][settings.metric_name], _step_of(p)))


def last_held(folder: Path) -> list[Path]:
    """The latest checkpoint whose out-of-domain score was measured and had been kept, if there is one."""
    return [path for path in steps(folder) if _meta(path)["metrics"].get(HELD)][-1:]


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def steps(folder: Path) -> list[Path]:
    """Whole checkpoints in order of step."""
    return sorted((p for p in folder.glob("step_*") if p.name.removeprefix("step_").isdigit()), key=_step_of)


def _meta(path: Path) -> dict[str, Any]:
    return read_json(path / META, {"step": int, "identity": str, "metrics": dict}, _DAMAGED)


def resume(
    folder: Path, identity: str, trainer: Trainer, fresh: bool, settings: Mapping[str, Any] = MappingProxyType({})
) -> int:
    """Restore the latest state and return its step, 0 where there is none (or `fresh`, which drops all).

    Raises InputError when the state belongs to another recipe or other data; it names which of `settings` differ.
    """
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    found = steps(folder)
    if not found:
        return 0
    meta = _meta(found[-1])
    if meta["identity"] != identity:
        named = difference(meta.get("settings") or {}, settings)
        told = named or f"{meta['identity']}, and this recipe with its weights and data gives {identity}"
        remedy = "use another name for the new run, or add fresh=true to drop the old one"
        raise InputError(Problem(str(found[-1]), None, "settings" if named else "identity", told, remedy))
    listed = read_sums(found[-1])
    if listed and not (META in listed and any(name.startswith("state/") for name in listed)):
        raise InputError(Problem(str(found[-1] / SUMS), None, "file", "no line for state or meta.json", _DAMAGED))
    if not check_sums(found[-1], _DAMAGED, ("state/", META)):
        print(f"{found[-1]} was written before checkpoints had checksums: it is resumed unchecked")
    trainer.load_training_state(found[-1] / "state")
    return int(meta["step"])


PUBLISHED = "published.json"


def publish(folder: Path, trainer: Trainer, chat: Chat, settings: Checkpointing) -> Path:
    """Write the final policy, or the best checkpoint's, as `FOLDER/policy`.

    Raises InputError where `publish: best` has no checkpoint to choose.
    """
    prune(folder, settings)  # a run that was killed while pruning has one too many
    (folder / PUBLISHED).unlink(missing_ok=True)
    if settings.publish == "best":
        share(_best(folder, settings) / "policy", folder / "policy")
    else:
        with _whole(folder / "policy") as part:
            trainer.export(part)
            chat.tokenizer.save_pretrained(part)
    if found := steps(folder):
        meta = _meta(found[-1])
        made = {key: meta[key] for key in ("step", "identity")} | _choice(settings)
        write_atomically(folder / PUBLISHED, json.dumps(made))
    return folder / "policy"


def _best(folder: Path, settings: Checkpointing) -> Path:
    if found := ranked(folder, settings):
        print(f"{found[0]} is published: {settings.metric_name} {_meta(found[0])['metrics'][settings.metric_name]:.4f}")
        return found[0]
    remedy = "measure it (grpo.val_period, checkpointing.simulator), or set checkpointing.publish: last"
    raise InputError(Problem("recipe", None, "checkpointing.metric_name", f"no {settings.metric_name}", remedy))


def _choice(settings: Checkpointing) -> dict[str, str]:
    """What a published policy was chosen by, where it is not the last."""
    return {} if settings.publish == "last" else {"best": f"{settings.metric_name} {settings.higher_is_better}"}


def published(folder: Path, identity: str, settings: Checkpointing) -> int | None:
    """The step that training had reached when it published; None where nothing is published that these settings would give.

    It may be another run's, one older than the latest checkpoint, or one that was chosen otherwise.
    """
    path, found = folder / PUBLISHED, steps(folder)
    if not path.exists() or not found or not any((folder / "policy").glob("*.safetensors")):
        return None
    told = read_json(path, {"step": int, "identity": str}, "remove it: the policy is published again")
    check_sums(folder / "policy", f"remove {path}: the policy is published again from the last checkpoint")
    now = {"step": _meta(found[-1])["step"], "identity": identity} | _choice(settings)
    return int(told["step"]) if told == now else None


def share(source: Path, final: Path) -> Path:
    """`final` with the files of `source`: hard links, or copies where the file system knows none. Raises InputError.

    The model card is a copy: it is there to be edited."""
    check_sums(source, "damaged: restore it, or train anew with fresh=true")
    with _whole(final) as part:
        for path in sorted(p for p in source.rglob("*") if p.is_file() and p not in (source / SUMS, source / CARD)):
            target = part / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, target)
            except OSError:
                shutil.copyfile(path, target)
    if (source / CARD).exists():
        write_atomically(final / CARD, (source / CARD).read_text(encoding="utf-8"))
    return final
