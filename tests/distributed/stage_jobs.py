"""What the ranks run in test_megatron_stages.py: whole stages through the command line, in ranks that stay or in processes
of their own (`python stage_jobs.py TROUBLE ARGUMENT...`)."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_pivotrl import cli
from nemo_pivotrl.algorithms.model_outputs import ModelOutputs
from nemo_pivotrl.backends.launch import Patience, place_of
from nemo_pivotrl.backends.megatron import workers
from nemo_pivotrl.config import Megatron
from nemo_pivotrl.core.errors import InputError, Problem

PATIENCE = Patience(join=60.0, collective=60.0, beat=0.2, dead=4.0, stuck=60.0, leave=5.0)


def stage(arguments: list[str]) -> dict[str, Any]:
    """The command line on one rank: exit code, what it printed, and how many models it held after each call."""
    out, err, held = io.StringIO(), io.StringIO(), []
    execute = workers.RankGroup._execute

    def noted(ranks: Any, *given: Any) -> Any:
        found = execute(ranks, *given)
        held.append(len(ranks.models))
        return found

    workers.RankGroup._execute = noted  # type: ignore[method-assign]
    before = sys.stdout
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main(arguments)
    finally:
        sys.stdout, workers.RankGroup._execute, workers._ranks = before, execute, None  # type: ignore[method-assign]
    return {"code": code, "out": out.getvalue(), "err": err.getvalue(), "held": held}


def scores(folder: str, layout: dict[str, Any], sequences: list[Any]) -> Any:
    """A scorer's answers on rank 0."""
    import train_jobs

    from nemo_pivotrl.backends import loading
    from nemo_pivotrl.config import Patient

    found: list[Any] = []
    patient = Patient(model_name=folder, backend="megatron", batch_tokens=60)
    megatron = train_jobs.megatron_of(layout)

    def work() -> None:
        found.extend(loading.load_scorer(patient, megatron).log_probs(sequences))

    workers.run_together(work, megatron, place_of(os.environ))
    workers._ranks = None
    return found


def total(outputs: ModelOutputs, data: dict[str, Tensor], scale: float) -> tuple[Tensor, dict[str, Tensor]]:
    return outputs.log_probs.sum() * scale, {"rows": torch.tensor(float(len(outputs.log_probs)))}


def spread(folder: str, layout: dict[str, Any]) -> Any:
    """Two models at a time, one of them let go of; what is set is set everywhere; errors are told apart."""
    import train_jobs

    megatron, seen, sizes = train_jobs.megatron_of(layout), {}, []
    execute = workers.RankGroup._execute

    def noted(ranks: Any, verb: str, *rest: Any) -> Any:
        found = execute(ranks, verb, *rest)
        if verb != "stop":
            sizes.append(sorted(m.decay for m in ranks.models.values()))
        return found

    workers.RankGroup._execute = noted  # type: ignore[method-assign]

    from nemo_pivotrl.backends import loading

    def work() -> None:
        policy, batch = train_jobs.policy_of(folder), train_jobs.grpo_batch()
        first, second = loading.load(policy, megatron), loading.load(policy, megatron)
        second.decay = 0.5  # type: ignore[attr-defined]
        del first
        metrics = second.get_loss_and_metrics(batch, partial(total, scale=2.0), forward_only=True)
        seen.update(rows=metrics["rows"])
        try:
            second.get_loss_and_metrics(batch, lambda outputs, data: (outputs.log_probs.sum(), {}), forward_only=True)
        except TypeError as error:
            seen.update(lambda_error=str(error))
        try:
            second.nonsense()  # type: ignore[attr-defined]
        except AttributeError as error:
            seen.update(verb_error=str(error))

    workers.run_together(work, megatron, place_of(os.environ))
    workers._ranks, workers.RankGroup._execute = None, execute  # type: ignore[method-assign]
    return seen, sizes


def paused() -> int:
    """The exit code of a rank of a job that stops at its deadline."""

    def work() -> None:
        raise SystemExit(75)

    try:
        return workers.run_together(work, Megatron(cpu=True, bf16=False), place_of(os.environ))
    finally:
        workers._ranks = None


def in_trouble(kind: str, arguments: list[str]) -> int:
    """One process of a job in which rank 1 gets into trouble in the third step."""
    from nemo_pivotrl.backends.megatron.parallel import initialize  # noqa: F401  before megatron's other files

    rank, steps = int(os.environ["RANK"]), 0
    execute = workers.RankGroup._execute

    def noted(ranks: Any, verb: str, model: int, given: tuple[Any, ...]) -> Any:
        nonlocal steps
        if verb == "call" and given[0] == "finish_training_step":
            steps += 1
            if steps == 3 and rank == 1 and kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if steps == 3 and rank == 1 and kind == "refuse":
                raise InputError(Problem("rank 1", None, "disk", "full", "buy another"))
        return execute(ranks, verb, model, given)

    workers.RankGroup._execute = noted  # type: ignore[method-assign]
    workers.ALIKE_S = 1.0
    run = workers.run_together
    workers.run_together = partial(run, patience=PATIENCE)  # type: ignore[assignment]
    return cli.main(arguments)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    torch.set_num_threads(1)
    sys.exit(in_trouble(sys.argv[1], sys.argv[2:]))
