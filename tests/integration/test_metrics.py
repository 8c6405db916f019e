"""Metrics on disk and on TensorBoard, W&B and MLflow, each read back from what the real package wrote; nothing asks a network."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import signal
import struct
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from support.processes import run, wait_for

from nemo_pivotrl import config
from nemo_pivotrl.components import trackers as dashboards
from nemo_pivotrl.components.metrics import MetricsLog, read_metrics
from nemo_pivotrl.components.trackers import (
    Run,
    Sink,
    check_dashboards,
    flat,
    log_summary,
    mlflow_params,
    offline_step,
    without_secrets,
)
from nemo_pivotrl.config import Logger, Policy, Recipe
from nemo_pivotrl.core.errors import InputError

QUIET = Logger(tensorboard=False)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DO_NOT_TRACK", "1")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield
    if (wandb := sys.modules.get("wandb")) is not None:
        wandb.teardown()  # it reads its environment once a process


def recipe_in(folder: Path, **logger: Any) -> Recipe:
    return Recipe(run_dir=str(folder / "quickstart"), logger=Logger(**{"tensorboard": False, **logger}))


def write(log: MetricsLog, steps: range, extra: Mapping[str, float] | None = None) -> None:
    for step in steps:
        log.write(step, {"reward": step / 8, **(extra or {})}, {"seconds": 100.0 + step})


# ---- the files ----


def test_a_resumed_run_repeats_its_lines_and_a_torn_last_one_is_no_row(tmp_path: Path) -> None:
    folder = tmp_path / "quickstart/pivotrl"
    log = MetricsLog(folder, -1, recipe_in(tmp_path), "train")
    write(log, range(4))
    whole = (folder / "metrics.jsonl").read_bytes()
    assert whole.splitlines()[1] == b'{"reward":0.125,"step":1}'
    assert (folder / "timing.jsonl").read_bytes().splitlines()[1] == b'{"seconds":101.0,"step":1}'
    for name in ("metrics.jsonl", "timing.jsonl"):
        with (folder / name).open("ab") as handle:
            handle.write('{"step":4,"ä'.encode()[:-1])  # cut inside a character
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [0, 1, 2, 3]
    log = MetricsLog(folder, 2, recipe_in(tmp_path), "train")
    assert [row["step"] for row in read_metrics(folder / "timing.jsonl")] == [0, 1, 2]
    write(log, range(3, 4))
    assert (folder / "metrics.jsonl").read_bytes() == whole
    assert not (folder / "dashboards.json").exists(), "no dashboard is on"


def test_a_spoilt_line_in_the_middle_is_named_and_nothing_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "quickstart/pivotrl/metrics.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text('{"step":0}\n{"step":1,\n{"step":2}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl:2"):
        MetricsLog(path.parent, 2, recipe_in(tmp_path), "train")
    assert path.read_text().count("\n") == 3


def test_numbers_that_json_lacks_are_named_in_the_file_and_come_back_as_numbers(tmp_path: Path) -> None:
    folder = tmp_path / "quickstart/pivotrl"
    log = MetricsLog(folder, -1, recipe_in(tmp_path), "train")
    log.write(1, {"loss": math.nan, "ratio": math.inf, "low": -math.inf, "fine": 1.5}, {"seconds": math.inf})

    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is no JSON")

    line = (folder / "metrics.jsonl").read_text()
    want = {"fine": 1.5, "loss": "NaN", "low": "-Infinity", "ratio": "Infinity", "step": 1}
    assert json.loads(line, parse_constant=refuse) == want
    MetricsLog(folder, 1, recipe_in(tmp_path), "train")
    assert (folder / "metrics.jsonl").read_text() == line
    (row,) = read_metrics(folder / "metrics.jsonl")
    assert math.isnan(row["loss"]) and (row["ratio"], row["low"], row["fine"]) == (math.inf, -math.inf, 1.5)


# ---- what dashboards are told ----


def test_a_recipe_becomes_parameters_within_mlflows_limits() -> None:
    recipe = Recipe(policy=Policy(template_kwargs={"odd [key]": "x" * 7000, "k" * 300: 1}))
    params = mlflow_params(dataclasses.asdict(recipe))
    assert params["policy.optimizer.lr"] == "1e-06" and params["grpo.val_kl"] in ("true", "false")
    assert params["policy.template_kwargs.odd _key_"] == "x" * 499 + "…"
    assert params["policy.lora.target_modules"].startswith('["q_proj", "k_proj"')
    assert max(map(len, params)) == 250
    assert len(params) > 200, "the whole recipe"


def test_settings_called_like_secrets_and_passwords_in_addresses_are_not_shown() -> None:
    tree = {
        "judge": {"base_url": "https://me:pw@host:80/v1", "api_key_env": "MY_KEY", "extra_body": {"api_key": "sk-1"}},
        "servers": ("http://a:1", "http://u:p@b:2"),
        "engine_args": {"hf_token": "hf_x", "Authorization": "Bearer y", "max_tokens": 12, "password": ""},
    }
    assert without_secrets(tree) == {
        "judge": {"base_url": "https://***@host:80/v1", "api_key_env": "MY_KEY", "extra_body": {"api_key": "***"}},
        "servers": ["http://a:1", "http://***@b:2"],
        "engine_args": {"hf_token": "***", "Authorization": "***", "max_tokens": 12, "password": ""},
    }
    settings = dataclasses.asdict(Recipe())
    assert flat(without_secrets(settings), ".").keys() == flat(settings, ".").keys()
    hidden = [name for name, text in flat(without_secrets(settings), ".").items() if text == "***"]
    assert not hidden, "no setting of ours is called like a secret"


def test_names_tell_run_directories_and_rounds_apart(tmp_path: Path) -> None:
    def names(recipe: Recipe, folder: str) -> tuple[str, str]:
        run = dashboards._run(recipe, recipe.path(folder), "train", -1)
        return run.name, run.group

    recipe = recipe_in(tmp_path)
    assert names(recipe, "pivotrl") == ("quickstart/pivotrl", "quickstart")
    assert names(recipe, "round-02/pivotrl") == ("quickstart/round-02/pivotrl", "quickstart")
    assert names(recipe_in(tmp_path, name="study 7"), "pivotrl") == ("study 7/pivotrl", "study 7")


# ---- faults ----


class Flaky:
    """A dashboard that is away for the sends whose number is in `away`."""

    def __init__(self, away: range, reached: int = -1):
        self.away, self.reached = away, reached
        self.asked, self.got, self.closed = 0, [], 0

    def open(self, run: Run) -> Sink:
        return Sink(self.send, self.close, (OSError,), self.reached)

    def send(self, step: int, values: Mapping[str, float]) -> None:
        self.asked += 1
        if self.asked - 1 in self.away:
            raise ConnectionResetError("the server is gone")
        self.got.append((step, dict(values)))

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def flaky(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Flaky:
    made = Flaky(request.param)
    monkeypatch.setattr(dashboards, "SINKS", {"mlflow": made.open})
    return made


@pytest.mark.parametrize("flaky", [range(2, 4)], indirect=True)
def test_a_dashboard_that_is_away_gets_later_what_it_missed(
    flaky: Flaky, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "quickstart/pivotrl"
    log = MetricsLog(folder, -1, recipe_in(tmp_path, mlflow=True), "train")
    write(log, range(4))  # steps 0 and 1 arrive; 2 fails, 3 makes two that wait, and fails
    assert [step for step, _ in flaky.got] == [0, 1] and flaky.asked == 4
    write(log, range(4, 5))
    assert flaky.asked == 4, "three wait: it is tried again at four"
    write(log, range(5, 7))
    log.close()
    assert flaky.got == [(step, {"reward": step / 8, "seconds": 100.0 + step}) for step in range(7)]
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == list(range(7))
    told = capsys.readouterr().err
    assert told.count("warning") == 1 and "mlflow: the server is gone" in told
    assert flaky.closed == 1


@pytest.mark.parametrize("flaky", [range(1, 999)], indirect=True)
def test_a_dashboard_that_stays_away_is_told_once_and_counted(
    flaky: Flaky, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = MetricsLog(tmp_path / "quickstart/pivotrl", -1, recipe_in(tmp_path, mlflow=True), "train")
    write(log, range(100))
    log.close()
    # step 0 arrives; 99 wait: tried when 1, 2, 4, ... 64 had come together, and at the end
    assert flaky.asked == 1 + 7 + 1
    told = capsys.readouterr().err
    assert told.count("the server is gone") == 1 and "99 steps were not sent" in told
    assert len(read_metrics(tmp_path / "quickstart/pivotrl/metrics.jsonl")) == 100


@pytest.mark.parametrize("flaky", [range(0)], indirect=True)
def test_a_dashboard_turned_on_late_gets_all_steps_and_each_once(flaky: Flaky, tmp_path: Path) -> None:
    folder = tmp_path / "quickstart/pivotrl"
    write(MetricsLog(folder, -1, recipe_in(tmp_path), "train"), range(5))
    log = MetricsLog(folder, 3, recipe_in(tmp_path, mlflow=True), "train")
    write(log, range(4, 6))
    assert [step for step, _ in flaky.got] == [0, 1, 2, 3, 4, 5]
    assert flaky.got[2] == (2, {"reward": 0.25, "seconds": 102.0})


def test_a_bug_is_no_fault_of_a_dashboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(step: int, values: Mapping[str, float]) -> None:
        raise KeyError("ours")

    monkeypatch.setattr(dashboards, "SINKS", {"mlflow": lambda run: Sink(broken, lambda: None, (OSError,), -1)})
    log = MetricsLog(tmp_path / "quickstart/pivotrl", -1, recipe_in(tmp_path, mlflow=True), "train")
    with pytest.raises(KeyError, match="ours"):
        write(log, range(1))


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_package_names_its_extra(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    if name == "tensorboard":
        monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    recipe = recipe_in(tmp_path, **{name: True})
    for call in (
        lambda: check_dashboards(recipe),
        lambda: log_summary(recipe, "evaluate", {"a": 1}),
        lambda: MetricsLog(tmp_path / "quickstart/pivotrl", -1, recipe, "train"),
    ):
        with pytest.raises(InputError, match=rf"(?s)logger\.{name}.*nemo-pivotrl\[{name}\].*logger\.{name}=false"):
            call()
    check_dashboards(recipe_in(tmp_path))


# ---- the real packages ----


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / "tensorboard")).Reload()


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(e.step, e.value) for e in events(folder).Scalars(name)]


def wandb_records(folder: Path) -> Iterator[Any]:
    """Records of all of a folder's offline files. A file is a LevelDB log: blocks of 32 KiB, chunks of at most one block."""
    pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        raw, at, held = path.read_bytes(), 7, b""
        while at + 7 <= len(raw):
            if 32768 - at % 32768 < 7:
                at += 32768 - at % 32768
                continue
            _, size, kind = struct.unpack("<IHB", raw[at : at + 7])
            body, at = raw[at + 7 : at + 7 + size], at + 7 + size
            held = body if kind in (1, 2) else held + body  # 1: a whole record, 2: its first chunk
            if kind in (1, 4) and at <= len(raw):  # 4: its last chunk
                record = pb.Record()
                record.ParseFromString(held)
                yield record


def wandb_history(folder: Path) -> list[dict[str, Any]]:
    """Every row that was logged: the metrics and `_step`."""
    return [
        {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
        for record in wandb_records(folder)
        if record.WhichOneof("record_type") == "history"
    ]


def wandb_runs(folder: Path) -> list[Any]:
    return [record.run for record in wandb_records(folder) if record.WhichOneof("record_type") == "run"]


def mlflow_client(folder: Path) -> Any:
    mlflow = pytest.importorskip("mlflow")
    return mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")


def mlflow_runs(folder: Path) -> list[Any]:
    client = mlflow_client(folder)
    return list(client.search_runs([client.get_experiment_by_name("nemo_pivotrl").experiment_id]))


def mlflow_history(folder: Path, run: Any, name: str) -> list[tuple[int, float]]:
    found = mlflow_client(folder).get_metric_history(run.info.run_id, name)
    return sorted((metric.step, metric.value) for metric in found)


JOB = """
    import os, signal, sys
    from pathlib import Path
    from nemo_pivotrl.config import Grpo, Logger, Recipe
    from nemo_pivotrl.components.metrics import MetricsLog

    folder, first, last, name, end = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
    logger = Logger(**{"tensorboard": False, name: True}, tags=("mine",), mlflow_tracking_uri=f"sqlite:///{folder}/mlflow.db")
    recipe = Recipe(run_dir=str(folder / "quickstart"), logger=logger, grpo=Grpo(max_num_steps=last))
    log = MetricsLog(folder / "quickstart/pivotrl", first, recipe, "train")
    for step in range(first + 1, last + 1):
        log.write(step, {"reward": step / 8, "val/odd": float("nan")}, {"seconds": first + 1000.0})
    if end == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    log.close()
"""


@pytest.fixture
def resumed(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A run that is killed at step 6, resumed after step 3, ends at step 5, and goes on after step 4 to step 9."""
    name = request.param
    if name != "tensorboard":
        pytest.importorskip(name)
    for first, last, end in ((-1, 6, "kill"), (3, 5, "close"), (4, 9, "close")):
        done = run("-c", textwrap.dedent(JOB), str(tmp_path), str(first), str(last), name, end)
        assert done.returncode == (-signal.SIGKILL if end == "kill" else 0), done.stderr
        assert "warning:" not in done.stderr
    rows = read_metrics(tmp_path / "quickstart/pivotrl/metrics.jsonl")
    assert [(row["step"], row["reward"]) for row in rows] == EACH_ONCE
    return tmp_path


EACH_ONCE = [(step, step / 8) for step in range(10)]


@pytest.mark.parametrize("resumed", ["tensorboard"], indirect=True)
def test_tensorboard_shows_each_step_of_a_killed_run_once(resumed: Path) -> None:
    folder = resumed / "quickstart/pivotrl"
    assert scalars(folder, "reward") == EACH_ONCE
    assert [value for _, value in scalars(folder, "seconds")] == [999.0] * 4 + [1003.0] + [1004.0] * 5
    (tag,) = [tag for tag in events(folder).Tags()["tensors"] if tag.startswith("recipe")]
    assert b'"max_num_steps": 9' in events(folder).Tensors(tag)[-1].tensor_proto.string_val[0]


@pytest.mark.parametrize("resumed", ["wandb"], indirect=True)
def test_wandb_continues_a_killed_run_and_gets_each_step_once(resumed: Path) -> None:
    folder = resumed / "quickstart/pivotrl"
    history = wandb_history(folder)
    assert [(row["_step"], row["reward"]) for row in history] == EACH_ONCE
    assert all(math.isnan(row["val/odd"]) for row in history)
    # nothing of the killed process was on disk, and metrics.jsonl had its steps; step 5 ran a third time and was not sent again
    assert [row["seconds"] for row in history] == [999.0] * 4 + [1003.0] * 2 + [1004.0] * 4
    runs = wandb_runs(folder)
    assert len(runs) == 2 and len({run.run_id for run in runs}) == 1
    told = runs[-1]
    assert (told.display_name, told.run_group, told.job_type) == ("quickstart/pivotrl", "quickstart", "train")
    assert (told.project, sorted(told.tags)) == ("nemo_pivotrl", ["mine", "pivotrl", "train"])
    settings = {update.key: json.loads(update.value_json) for update in told.config.update}
    assert settings["grpo"]["max_num_steps"] == 9 and settings["policy"]["optimizer"]["lr"] == 1e-6


def test_wandbs_offline_files_say_how_far_they_go(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    folder = tmp_path / "quickstart/pivotrl"
    assert offline_step(folder) == -1
    log = MetricsLog(folder, -1, recipe_in(tmp_path, wandb=True), "train")
    write(log, range(400))
    log.close()
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    whole = path.read_bytes()
    assert len(whole) > 3 * 32768, "records that are cut at the ends of blocks"
    wait_for(lambda: offline_step(folder) == 399, "the last step in the file")  # another process writes the file
    for size in (len(whole) // 2, 32768 + 3, 7, 0):
        path.write_bytes(whole[:size])
        steps = [row["_step"] for row in wandb_history(folder)] if size > 7 else []
        assert offline_step(folder) == max(steps, default=-1) < 399
    path.write_bytes(whole[:7] + bytes([0, 0, 0, 0, 3, 0, 1]) + b"\xff\xff\xff")
    with pytest.raises(InputError, match=r"(?s)\.wandb: record before byte 17.*metrics\.jsonl has the steps"):
        offline_step(folder)


@pytest.mark.slow
@pytest.mark.parametrize("resumed", ["mlflow"], indirect=True)
def test_mlflow_finds_a_killed_run_again_and_gets_each_step_once(resumed: Path) -> None:
    (run,) = mlflow_runs(resumed)
    assert mlflow_history(resumed, run, "reward") == EACH_ONCE
    assert [value for _, value in mlflow_history(resumed, run, "seconds")] == [999.0] * 7 + [1004.0] * 3
    assert len(mlflow_history(resumed, run, "val/odd")) == 10
    assert (run.info.run_name, run.info.status) == ("quickstart/pivotrl", "FINISHED")
    assert {run.data.tags[name] for name in ("algorithm", "stage", "group")} == {"pivotrl", "train", "quickstart"}
    assert run.data.tags["mine"] == "true"
    assert run.data.params["grpo.max_num_steps"] == "6", "MLflow lets no parameter change"
    assert run.data.tags["resumed_with.grpo.max_num_steps"] == "9"
    assert run.data.params.keys() == mlflow_params(dataclasses.asdict(Recipe())).keys()


def test_mlflow_that_loses_its_database_does_not_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlflow")
    recipe = recipe_in(tmp_path, mlflow=True, mlflow_tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    log = MetricsLog(tmp_path / "quickstart/pivotrl", -1, recipe, "train")
    write(log, range(1))
    (tmp_path / "mlflow.db").unlink()
    write(log, range(1, 4))
    log.close()
    told = capsys.readouterr().err
    assert told.count("it is tried again") == 1 and "3 steps were not sent" in told
    assert len(read_metrics(log.path)) == 4


def test_tensorboard_that_cannot_start_is_bad_input(tmp_path: Path) -> None:
    folder = tmp_path / "quickstart/pivotrl"
    folder.mkdir(parents=True)
    (folder / "tensorboard").write_text("in the way")
    with pytest.raises(InputError, match=r"logger\.tensorboard"):
        MetricsLog(folder, -1, recipe_in(tmp_path, tensorboard=True), "train")


def test_mlflow_that_cannot_start_is_bad_input(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    recipe = recipe_in(tmp_path, mlflow=True, mlflow_tracking_uri="nonsense://x")
    with pytest.raises(InputError, match=r"(?s)logger\.mlflow.*nonsense.*MLFLOW_TRACKING_URI"):
        MetricsLog(tmp_path / "quickstart/pivotrl", -1, recipe, "train")


def test_wandb_without_a_login_is_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.netrc
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(InputError, match=r"(?s)logger\.wandb.*WANDB_MODE=offline"):
        MetricsLog(tmp_path / "quickstart/pivotrl", -1, recipe_in(tmp_path, wandb=True), "train")


def test_final_numbers_are_shown_and_replaced(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    pytest.importorskip("mlflow")
    recipe = recipe_in(
        tmp_path, tensorboard=True, wandb=True, mlflow=True, mlflow_tracking_uri=f"sqlite:///{tmp_path}/mlflow.db"
    )
    for mean in (0.25, 0.5):
        log_summary(recipe, "evaluate", {"policies": {"my policy!": {"mean": mean, "low": 0}}, "note": "no number"})
    name, folder = "policies/my policy!/mean", tmp_path / "quickstart/evaluate"
    assert scalars(folder, name) == [(0, 0.5)]
    (run,) = mlflow_runs(tmp_path)
    assert run.data.metrics == {"policies/my policy_/mean": 0.5, "policies/my policy_/low": 0.0}
    assert [row[name] for row in wandb_history(folder)] == [0.25]
    summary = [r.summary for r in wandb_records(folder) if r.WhichOneof("record_type") == "summary"]
    last = [u.value_json for s in summary for u in s.update if (u.key or "/".join(u.nested_key)) == name]
    assert float(last[-1]) == 0.5
    assert wandb_runs(folder)[-1].display_name == "quickstart/evaluate"
    log_summary(recipe_in(tmp_path), "profile", {"a": 1})
    assert not (tmp_path / "quickstart/profile").exists(), "no dashboard is on"


def test_rounds_of_final_numbers_make_a_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.summary.writer import event_file_writer

    # the files of one second are told apart by a count of the process: 10 sorts before 9
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(8))
    for round_, kept in enumerate((30, 20, 25)):
        log_summary(recipe_in(tmp_path, tensorboard=True), "loop", {"pivots": kept}, step=round_)
    log_summary(recipe_in(tmp_path, tensorboard=True), "loop", {"pivots": 26}, step=2)
    assert scalars(tmp_path / "quickstart/loop", "pivots") == [(0, 30.0), (1, 20.0), (2, 26.0)]


@pytest.mark.parametrize("flaky", [range(9)], indirect=True)
def test_final_numbers_that_cannot_be_sent_end_no_stage(
    flaky: Flaky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dashboards, "check_dashboards", lambda recipe: None)
    log_summary(recipe_in(tmp_path, mlflow=True), "evaluate", {"a": 1})
    assert "mlflow: the numbers of evaluate were not sent (the server is gone)" in capsys.readouterr().err

    def closed(run: Run) -> Sink:
        raise dashboards._refused("mlflow", OSError("no route"), "mend it")

    monkeypatch.setattr(dashboards, "SINKS", {"mlflow": closed})
    log_summary(recipe_in(tmp_path, mlflow=True), "evaluate", {"a": 1})
    assert re.search(r"found no route\s+-> mend it, or set logger\.mlflow=false", capsys.readouterr().err)


def test_tensorboard_is_on_by_default_and_the_others_are_not() -> None:
    assert config.Logger().tensorboard and not config.Logger().wandb and not config.Logger().mlflow
