"""Copies of numbers on the dashboards people use: TensorBoard, W&B and MLflow. The truth is in the stage's own files.

A folder that trains is one run on each of them, by whatever process it is continued; `FOLDER/dashboards.json` holds its id. Each
is asked for the last step it has, and gets what follows. One that cannot start is an InputError. One that fails later is
told once, what it misses waits and is tried again, and training goes on.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_pivotrl.config import Logger, Recipe
from nemo_pivotrl.core.artifacts import canonical_json
from nemo_pivotrl.core.atomic import write_atomically
from nemo_pivotrl.core.errors import InputError, Problem, short

SECRET = re.compile(r"(api_?key|secret|pass(word|wd)?|token|authorization|credentials?)$", re.IGNORECASE)
"""Names whose text is no business of a dashboard. Recipes hold names of environment variables (`api_key_env`), not keys, but
free-form settings (`extra_body`, `engine_args`) may hold anything."""
MLFLOW_NAME, MLFLOW_VALUE, MLFLOW_BATCH = 250, 500, 100
"""Characters of a parameter's name and value, and parameters of a request: what MLflow's narrowest store takes."""


BLOCK = 32768


@dataclass(frozen=True, slots=True)
class Run:
    """What a dashboard needs to start a run."""

    settings: Logger
    folder: Path
    id: str
    name: str
    """E.g. `quickstart/pivotrl`: the run directory and the folder in it."""
    group: str
    algorithm: str
    stage: str
    config: Mapping[str, Any]
    """The whole recipe, without secrets."""
    first_step: int
    """The last step that is done; later ones will be sent."""


@dataclass(frozen=True, slots=True)
class Sink:
    """A dashboard's run."""

    send: Callable[[int, Mapping[str, float]], None]
    close: Callable[[], None]
    faults: tuple[type[Exception], ...]
    """What it raises when it fails."""
    reached: int
    """The last step it holds, which needs no sending."""


class Feed:
    """A sink with a queue. After a failure the steps stay in the queue and are sent again when twice as many have come."""

    def __init__(self, name: str, sink: Sink):
        self.name, self.sink = name, sink
        self.waiting: deque[tuple[int, Mapping[str, float]]] = deque()
        self.due, self.told = 1, False

    def send(self, step: int, values: Mapping[str, float]) -> None:
        """Send a step that the dashboard does not have."""
        if step <= self.sink.reached:
            return
        self.waiting.append((step, values))
        if len(self.waiting) >= self.due:
            self._send_waiting()

    def _send_waiting(self) -> None:
        self.due = 1
        try:
            while self.waiting:
                self.sink.send(*self.waiting[0])
                self.waiting.popleft()
        except self.sink.faults as error:
            self.due = 2 * len(self.waiting)  # a server that is away may take minutes to say so
            if not self.told:
                _tell(self.name, f"{short(str(error))}; it is tried again, and metrics.jsonl has everything")
            self.told = True

    def close(self) -> None:
        """End the run; say how many steps did not arrive."""
        self._send_waiting()
        if self.waiting:
            _tell(self.name, f"{len(self.waiting)} steps were not sent; metrics.jsonl has them")
        try:
            self.sink.close()
        except self.sink.faults as error:
            _tell(self.name, f"its run was not ended ({short(str(error))})")


def open_feeds(recipe: Recipe, folder: Path, stage: str, first_step: int) -> list[Feed]:
    """The recipe's dashboards for the run in `folder`, which is done up to first_step.

    Raises InputError for a package that is missing and for a dashboard that cannot start.
    """
    names = wanted(recipe.logger)
    if not names:
        return []
    run = _run(recipe, folder, stage, first_step)
    return [Feed(name, _open(name, run)) for name in names]


def log_summary(recipe: Recipe, name: str, numbers: Mapping[str, Any], step: int = 0) -> None:
    """Show a stage's final numbers on the recipe's dashboards, as the run RUN_DIR/name. Call it when the stage's files are written.

    numbers: nested mappings become `a/b/c`; what is no number is left out. step: of a stage that runs again and again (a
    round), so that its numbers make curves; the same step again replaces them. Raises InputError for a missing package
    (`check_dashboards` finds it beforehand); logs any other error and continues.
    """
    values = {key: float(value) for key, value in flat(numbers, "/").items() if isinstance(value, (int, float))}
    check_dashboards(recipe)
    names = wanted(recipe.logger)
    if not names:
        return
    run = _run(recipe, recipe.path(name), name, step - 1)
    for dashboard in names:
        try:
            feed = Feed(dashboard, _open(dashboard, run))
        except InputError as error:
            _tell(dashboard, f"the numbers of {name} were not sent; {error}")
            continue
        try:
            feed.sink.send(step, values)
        except feed.sink.faults as error:
            _tell(dashboard, f"the numbers of {name} were not sent ({short(str(error))})")
        feed.close()


def check_dashboards(recipe: Recipe) -> None:
    """Raise InputError for every dashboard of the recipe whose package is not installed."""
    missing = [name for name in wanted(recipe.logger) if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError([_missing(name, f"no module {name}") for name in missing])


def wanted(settings: Logger) -> list[str]:
    """Names of the dashboards that are on."""
    on = {"tensorboard": settings.tensorboard, "wandb": settings.wandb, "mlflow": settings.mlflow}
    return [name for name in SINKS if on[name]]


def _run(recipe: Recipe, folder: Path, stage: str, first_step: int) -> Run:
    path = folder / "dashboards.json"
    if not path.exists():
        write_atomically(path, canonical_json({"id": uuid.uuid4().hex[:16]}) + "\n")
    root, place = recipe.home.resolve(), folder.resolve()
    group = recipe.logger.name or root.name
    inner = place.relative_to(root).as_posix() if place.is_relative_to(root) else place.name
    return Run(
        settings=recipe.logger,
        folder=folder,
        id=json.loads(path.read_text(encoding="utf-8"))["id"],
        name=f"{group}/{inner}",
        group=group,
        algorithm=recipe.algorithm,
        stage=stage,
        config=without_secrets(dataclasses.asdict(recipe)),
        first_step=first_step,
    )


def without_secrets(value: Any, name: str = "") -> Any:
    """A recipe's tree without passwords in addresses and without the text of settings called like a secret."""
    if isinstance(value, Mapping):
        return {key: without_secrets(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(inner, name) for inner in value]
    if isinstance(value, str):
        return "***" if value and SECRET.search(name) else re.sub(r"//[^/@\s]+@", "//***@", value)
    return value


def flat(tree: Mapping[str, Any], joint: str) -> dict[str, Any]:
    """Leaves of nested mappings under their joined names."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        inner = flat(value, joint) if isinstance(value, Mapping) and value else None
        found |= {str(key): value} if inner is None else {f"{key}{joint}{name}": leaf for name, leaf in inner.items()}
    return found


def _tell(name: str, text: str) -> None:
    print(f"warning: {name}: {text}", file=sys.stderr, flush=True)


def _missing(name: str, found: str) -> Problem:
    remedy = f"pip install 'nemo-pivotrl[{name}]' or set logger.{name}=false"
    return Problem("environment", None, f"logger.{name}", found, remedy)


def _open(name: str, run: Run) -> Sink:
    try:
        return SINKS[name](run)
    except ImportError as error:
        raise InputError(_missing(name, str(error))) from error


def _refused(name: str, error: Exception, remedy: str) -> InputError:
    return InputError(
        Problem("environment", None, f"logger.{name}", short(str(error)), f"{remedy}, or set logger.{name}=false")
    )


def _tensorboard(run: Run) -> Sink:
    from torch.utils.tensorboard import SummaryWriter

    folder = run.folder / "tensorboard"
    before = folder.is_dir()
    # TensorBoard reads a folder's files by name, and their names order by whole seconds only
    while any(folder.glob(f"events.out.tfevents.{int(time.time()):010d}.*")):
        time.sleep(0.05)
    try:
        writer = SummaryWriter(str(folder), purge_step=run.first_step + 1)
        writer.add_text("recipe", f"```\n{json.dumps(run.config, indent=1)}\n```", run.first_step + 1)
        writer.flush()
    except OSError as error:
        raise _refused("tensorboard", error, "mend the path or free space") from error

    def send(step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    # what earlier files hold of later steps is purged
    return Sink(send, writer.close, (OSError,), run.first_step if before else -1)


def _wandb(run: Run) -> Sink:
    import wandb
    from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

    faults = (OSError, wandb.errors.Error, HandleAbandonedError, MailboxClosedError)
    try:
        handle = wandb.init(
            project=run.settings.project,
            entity=run.settings.entity or None,
            id=run.id,
            resume="allow",
            name=run.name,
            group=run.group,
            job_type=run.stage,
            tags=[run.algorithm, run.stage, *run.settings.tags],
            config=dict(run.config),
            dir=str(run.folder),
            reinit="create_new",
        )
        reached = offline_step(run.folder) if handle.offline else handle.step - 1
    except faults as error:
        raise _refused("wandb", error, "run `wandb login`, set WANDB_MODE=offline") from error

    def send(step: int, values: Mapping[str, float]) -> None:
        if step > reached:
            handle.log(dict(values), step=step, commit=True)
        else:  # W&B takes no step a second time
            handle.summary.update(dict(values))

    return Sink(send, handle.finish, faults, reached)


def offline_step(folder: Path) -> int:
    """The last step in the folder's offline files of W&B, -1 where there is none: a killed process leaves 15 seconds unwritten.

    A file is a LevelDB log of protobuf records behind seven bytes: chunks (checksum, size, kind: 1 whole, 2 first, 3 middle,
    4 last) in blocks of 32 KiB, none of which straddles two blocks.
    """
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record

    last = -1
    for path in folder.glob("wandb/offline-run-*/*.wandb"):
        raw, at, held = path.read_bytes(), 7, b""
        while at + 7 <= len(raw):
            if BLOCK - at % BLOCK < 7:
                at += BLOCK - at % BLOCK
                continue
            size, kind = int.from_bytes(raw[at + 4 : at + 6], "little"), raw[at + 6]
            chunk, at = raw[at + 7 : at + 7 + size], at + 7 + size
            held = chunk if kind in (1, 2) else held + chunk
            if kind not in (1, 4) or at > len(raw):  # a part, or torn by a kill
                continue
            try:
                record = Record.FromString(held)
            except DecodeError as error:
                remedy = "mend it, or delete its folder: metrics.jsonl has the steps"
                raise InputError(Problem(str(path), None, f"record before byte {at}", str(error), remedy)) from error
            if record.HasField("history"):
                last = max(last, record.history.step.num)
    return last


def _mlflow(run: Run) -> Sink:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param
    from mlflow.exceptions import MlflowException

    faults, project = (OSError, MlflowException), run.settings.project
    tags = {"nemo_pivotrl.run": run.id, "algorithm": run.algorithm, "stage": run.stage, "group": run.group}
    tags |= {_mlflow_name(tag): "true" for tag in run.settings.tags}
    try:
        client = MlflowClient(run.settings.mlflow_tracking_uri or None)
        experiment = client.get_experiment_by_name(project)
        place = experiment.experiment_id if experiment else client.create_experiment(project)
        found = client.search_runs([place], f"tags.`nemo_pivotrl.run` = '{run.id}'")
        held = found[0] if found else client.create_run(place, tags=tags, run_name=run.name)
        own = held.info.run_id
        client.update_run(own, status="RUNNING")
        params = mlflow_params(run.config)
        fresh = [Param(key, value) for key, value in params.items() if key not in held.data.params]
        for start in range(0, len(fresh), MLFLOW_BATCH):
            client.log_batch(own, params=fresh[start : start + MLFLOW_BATCH])
        for key, value in params.items():  # MLflow lets no parameter change
            if held.data.params.get(key, value) != value:
                client.set_tag(own, f"resumed_with.{key}"[:MLFLOW_NAME], value)
        steps = [m.step for key in held.data.metrics for m in client.get_metric_history(own, key)]
    except faults as error:
        raise _refused("mlflow", error, "mend logger.mlflow_tracking_uri or MLFLOW_TRACKING_URI") from error

    def send(step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        client.log_batch(own, metrics=[Metric(_mlflow_name(key), value, now, step) for key, value in values.items()])

    return Sink(send, lambda: client.set_terminated(own), faults, max(steps, default=-1))


def mlflow_params(config: Mapping[str, Any]) -> dict[str, str]:
    """A recipe as parameters: dotted names, and text that is cut, with a mark, where MLflow's limits are."""
    params = {}
    for key, value in flat(config, ".").items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        params[_mlflow_name(key)] = text if len(text) <= MLFLOW_VALUE else text[: MLFLOW_VALUE - 1] + "…"
    return params


def _mlflow_name(key: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", key)[:MLFLOW_NAME]


SINKS: dict[str, Callable[[Run], Sink]] = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
"""Names are those of `Logger`'s switches, of the modules and of the extras."""
