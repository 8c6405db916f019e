"""Time and memory of TFPO's SubTB loss against what one would write from the paper. `python benchmarks/tfpo_speed.py`

All forms take log pi of the tokens, log V of the states and the growth of log Q, and give the mean over an answer's
sub-trajectories m < n of their squared residuals. `ours` sums nothing twice: a variance, or with decay^(n-m) weights a tree
that merges runs of states two by two. `all pairs` is one [L+1, L+1] matrix an answer; `double loop` is a Python loop over
pairs whose every residual sums its own slice of log pi, for all answers at once. A case has a process of its own; time is
that process's processor time, forward and backward, on one thread.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from nemo_pivotrl.algorithms.llmdoctor import flow_statistics, subtb

Form = Callable[[Tensor, Tensor, Tensor, float], Tensor]
BATCH, DECAY = 4, 0.99


def ours(log_probs: Tensor, log_values: Tensor, steps: Tensor, decay: float) -> Tensor:
    """[N] from moments: O(L)."""
    everywhere = torch.ones_like(log_values, dtype=torch.bool)
    return subtb(flow_statistics(pad(steps - log_probs, (0, 1)), log_values, everywhere, decay), "pair_mean")


def all_pairs(log_probs: Tensor, log_values: Tensor, steps: Tensor, decay: float) -> Tensor:
    """[N] from the matrix of all residuals: O(L^2) time and memory."""
    c = log_values + pad((steps - log_probs).cumsum(1), (1, 0))
    place = torch.arange(c.shape[1], device=c.device)
    gap = place[None, :] - place[:, None]
    weight = torch.where(gap > 0, decay ** gap.to(c.dtype), 0.0)
    residual = c[:, None, :] - c[:, :, None]
    return (weight * residual**2).sum((1, 2)) / weight.sum()


def double_loop(log_probs: Tensor, log_values: Tensor, steps: Tensor, decay: float) -> Tensor:
    """[N] from the formula as it stands: O(L^2) residuals of O(L) work each."""
    log_flow = log_values + pad(steps.cumsum(1), (1, 0))
    total, weight = torch.zeros_like(log_values[:, 0]), 0.0
    for m, n in itertools.combinations(range(log_values.shape[1]), 2):
        residual = log_flow[:, n] - log_flow[:, m] - log_probs[:, m:n].sum(1)
        total = total + decay ** (n - m) * residual**2
        weight += decay ** (n - m)
    return total / weight


FORMS: dict[str, tuple[Form, float]] = {
    "ours, variance": (ours, 1.0),
    "all pairs": (all_pairs, 1.0),
    "double loop": (double_loop, 1.0),
    f"ours, tree, decay {DECAY}": (ours, DECAY),
    f"all pairs, decay {DECAY}": (all_pairs, DECAY),
}


def inputs(length: int, dtype: torch.dtype, batch: int = BATCH) -> list[Tensor]:
    """log pi, log V and steps of log Q of random answers; the first two want gradients."""
    g = torch.Generator().manual_seed(0)
    log_probs = -3 * torch.rand(batch, length, generator=g, dtype=torch.float64)
    log_values = torch.randn(batch, length + 1, generator=g, dtype=torch.float64)
    steps = torch.randn(batch, length, generator=g, dtype=torch.float64)
    return [x.to(dtype).requires_grad_(i < 2) for i, x in enumerate((log_probs, log_values, steps))]


def agreement(length: int = 23) -> float:
    """Largest difference (relative to the largest number) of any form's loss or gradient from the loop's, in float64."""
    worst = 0.0
    for form, decay in FORMS.values():
        found = []
        for each in (form, double_loop):
            given = inputs(length, torch.float64)
            loss = each(*given, decay)
            found.append([loss.detach(), *torch.autograd.grad(loss.sum(), given[:2])])
        for a, b in zip(*found, strict=True):
            worst = max(worst, float((a - b).abs().max() / b.abs().max()))
    return worst


def measure(name: str, length: int, runs: int) -> dict[str, float]:
    """Median milliseconds of a run, and MiB by which the process grew over its inputs."""
    form, decay = FORMS[name]
    small = inputs(8, torch.float32)
    torch.autograd.grad(form(*small, decay).sum(), small[:2])  # first calls load code
    given, times = inputs(length, torch.float32), []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(runs):
        begun = time.process_time()
        torch.autograd.grad(form(*given, decay).sum(), given[:2])
        times.append(time.process_time() - begun)
        if sum(times) > 20:
            break
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"ms": 1000 * statistics.median(times), "mib": grown / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--loop-up-to", type=int, default=512, help="longest answer that the Python loop is given")
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--case", nargs=2, metavar=("FORM", "LENGTH"), help="measure one, as this program does itself")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.case:
        print(json.dumps(measure(args.case[0], int(args.case[1]), args.runs)))
        return
    apart = agreement()
    print(f"all forms agree in float64 at L = 23: loss and gradients within {apart:.1e}\n")
    assert apart < 1e-10, "a form is wrong: its time means nothing"
    print(
        f"float32, batch {BATCH}, forward and backward, one thread; ratio: time of the form to ours with the same decay"
    )
    print(f"{'form':<24}{'L':>6}{'ms':>12}{'ratio':>10}{'MiB more':>10}")
    for length in args.lengths:
        own = {}
        for name, (form, decay) in FORMS.items():
            if form is double_loop and length > args.loop_up_to:
                continue
            command = [sys.executable, __file__, "--runs", str(args.runs), "--case", name, str(length)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            own.setdefault(decay, found["ms"])  # ours is the first of its decay
            print(f"{name:<24}{length:>6}{found['ms']:>12.2f}{found['ms'] / own[decay]:>9.1f}x{found['mib']:>10.0f}")


if __name__ == "__main__":
    main()
