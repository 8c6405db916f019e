"""The PivotRL paper's Proposition 3.1 and Theorems 3.2 and 3.3, checked by numbers in the tabular case, float64.

One state, `ACTIONS` actions, a random start policy pi_0, reward 1 on a random set M of them. `python
benchmarks/pivotrl_claims.py` prints the table; each check also says what would have come out of a wrong statement.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from nemo_pivotrl.algorithms import pivotrl
from nemo_pivotrl.config import LossFn

ACTIONS = 12
PROBLEMS = 200
SETTINGS = LossFn()


def problem(seed: int) -> tuple[Tensor, Tensor]:
    """(pi_0 [A], binary rewards [A]) of a random state; M is neither empty nor everything."""
    generator = torch.Generator().manual_seed(seed)
    pi_0 = (2 * torch.randn(ACTIONS, generator=generator, dtype=torch.float64)).softmax(0)
    size = int(torch.randint(1, ACTIONS, (1,), generator=generator))
    rewards = torch.zeros(ACTIONS, dtype=torch.float64)
    rewards[torch.randperm(ACTIONS, generator=generator)[:size]] = 1.0
    return pi_0, rewards


def tilted(pi_0: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """pi_{s,beta}: proportional to pi_0 * exp(r / beta), the optimum of E[r] - beta * KL(pi || pi_0)."""
    return (pi_0.log() + rewards / beta).softmax(0)


def proposition_3_1(size: int = 8) -> dict[str, float]:
    """All 2^size groups of binary rewards: are the advantages, and GRPO's gradient, zero exactly where all rewards are equal?"""
    wrong, worst, least = 0, 0.0, math.inf
    for group in itertools.product((0.0, 1.0), repeat=size):
        rewards = torch.tensor([group], dtype=torch.float64)
        advantages = pivotrl.group_advantages(rewards, torch.ones_like(rewards, dtype=torch.bool))
        logits = torch.zeros(size, dtype=torch.float64, requires_grad=True)  # each sample another action
        log_probs = logits.log_softmax(0)[:, None]
        ones = torch.ones_like(log_probs)
        loss, _ = pivotrl.grpo_loss(log_probs, log_probs.detach(), advantages[0], ones, float(size), SETTINGS)
        (gradient,) = torch.autograd.grad(loss, logits)
        size_of = float(gradient.abs().max())
        equal = len(set(group)) == 1
        wrong += equal != (float(advantages.abs().max()) == 0.0)
        worst, least = (max(worst, size_of), least) if equal else (worst, min(least, size_of))
    return {"groups": 2.0**size, "wrong": float(wrong), "gradient, equal": worst, "least gradient, mixed": least}


def fisher_norm(pi: Tensor, direction: Tensor) -> float:
    """sqrt(d^T F d) of a direction of log pi [A]: its root mean square under pi."""
    return float((pi * direction**2).sum().sqrt())


def theorem_3_2(beta: float, step: float = 1e-5) -> dict[str, float]:
    """Largest relative error, over random problems, of the signal std(r) / beta^2 (Fisher norm along the KL path, by
    differences), of its misprint Var(r) / beta^2, and of std(r) as natural-gradient norm of the expected reward."""
    worst = {"std": 0.0, "variance": 0.0, "natural gradient": 0.0}
    for seed in range(PROBLEMS):
        pi_0, rewards = problem(seed)
        pi = tilted(pi_0, rewards, beta)
        after, before = (tilted(pi_0, rewards, beta + sign * step).log() for sign in (1, -1))
        measured = fisher_norm(pi, (after - before) / (2 * step))
        mean = float((pi * rewards).sum())
        std = math.sqrt(mean * (1 - mean))
        logits = pi.log().requires_grad_()
        (gradient,) = torch.autograd.grad((logits.softmax(0) * rewards).sum(), logits)
        fisher = pi.diag() - pi[:, None] * pi[None, :]
        natural = float((gradient @ torch.linalg.pinv(fisher, hermitian=True) @ gradient).sqrt())
        for name, stated, found in (
            ("std", std / beta**2, measured),
            ("variance", std**2 / beta**2, measured),
            ("natural gradient", std, natural),
        ):
            worst[name] = max(worst[name], abs(stated - found) / found)
    return worst


def signal_of_groups(size: int = 8, draws: int = 4000) -> list[tuple[float, float, float]]:
    """(success rate, std, mean length of the centred GRPO gradient without division by std) over a few rates: the signal
    of groups that are sampled grows as the std does (Theorem 3.2), too."""
    generator = torch.Generator().manual_seed(0)
    table = []
    for rate in (0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98):
        rewards = (torch.rand(draws, size, generator=generator, dtype=torch.float64) < rate).double()
        centred = pivotrl.group_advantages(rewards, torch.ones_like(rewards, dtype=torch.bool), normalize=False)
        table.append((rate, math.sqrt(rate * (1 - rate)), float(centred.pow(2).mean(1).sqrt().mean())))
    return table


def conditionals(pi: Tensor, inside: Tensor) -> Tensor:
    """pi given M on M, and pi given its complement elsewhere [A]."""
    return torch.where(inside, pi / pi[inside].sum(), pi / pi[~inside].sum())


def theorem_3_3(beta: float) -> dict[str, float]:
    """The optimum of E[r] - beta * KL, found by ascent on logits: how far conditionals and mass are from those stated.

    `no KL, sampled`: mean total variation between the conditionals of pi_0 and those after 300 plain GRPO steps, beta 0, when the
    same mass is reached or the steps are over; `sft`: the same for maximum likelihood of one action of M.
    """
    found = {"conditionals": 0.0, "mass": 0.0, "no KL, sampled": 0.0, "sft": 0.0}
    for seed in range(PROBLEMS):
        pi_0, rewards = problem(seed)
        inside = rewards > 0
        logits = torch.randn(ACTIONS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for _ in range(2000):  # natural gradient ascent: log pi moves by what is left of r - beta * log(pi / pi_0)
            pi = logits.softmax(0)
            logits = logits + 0.5 / beta * (rewards - beta * (pi / pi_0).log())
            logits = logits - logits.logsumexp(0)
        pi = logits.softmax(0)
        p_0 = float(pi_0[inside].sum())
        mass = p_0 * math.exp(1 / beta) / (1 - p_0 + p_0 * math.exp(1 / beta))
        apart = (conditionals(pi, inside) - conditionals(pi_0, inside)).abs().max()
        found["conditionals"] = max(found["conditionals"], float(apart))
        found["mass"] = max(found["mass"], abs(float(pi[inside].sum()) - mass))
        found["no KL, sampled"] += _moved(_grpo(pi_0, rewards, mass, seed), pi_0, inside) / PROBLEMS
        found["sft"] += _moved(_sft(pi_0, int((pi_0 * rewards).argmax()), mass, inside), pi_0, inside) / PROBLEMS
    return found


def _moved(pi: Tensor, pi_0: Tensor, inside: Tensor) -> float:
    """Total variation between conditionals, the mean of the two sets' (each at most 1)."""
    apart = (conditionals(pi, inside) - conditionals(pi_0, inside)).abs()
    return float((apart[inside].sum() + apart[~inside].sum()) / 4)


def _grpo(pi_0: Tensor, rewards: Tensor, mass: float, seed: int, size: int = 8, lr: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = pi_0.log()
    for _ in range(300):
        pi = logits.softmax(0)
        if float(pi[rewards > 0].sum()) >= mass:
            break
        taken = torch.multinomial(pi, size, replacement=True, generator=generator)
        group = rewards[taken][None]
        advantages = pivotrl.group_advantages(group, torch.ones_like(group, dtype=torch.bool))[0]
        gradient = torch.zeros(ACTIONS, dtype=torch.float64).index_add_(0, taken, advantages) - advantages.sum() * pi
        logits = logits + lr * gradient / size
    return logits.softmax(0)


def _sft(pi_0: Tensor, expert: int, mass: float, inside: Tensor, lr: float = 0.3) -> Tensor:
    logits = pi_0.log()
    for _ in range(300):
        pi = logits.softmax(0)
        if float(pi[inside].sum()) >= mass:
            break
        gradient = -pi.clone()
        gradient[expert] += 1.0
        logits = logits + lr * gradient
    return logits.softmax(0)


def report() -> str:
    """All checks as Markdown."""
    one = proposition_3_1()
    lines = [
        f"- Proposition 3.1: {one['groups']:.0f} groups of 8 binary rewards, {one['wrong']:.0f} in which advantages are zero and "
        f"rewards differ, or the other way round; gradient of equal groups {one['gradient, equal']:g}, of mixed ones at least "
        f"{one['least gradient, mixed']:.3f}."
    ]
    for beta in (0.3, 1.0):
        two = theorem_3_2(beta)
        lines.append(
            f"- Theorem 3.2, beta {beta:g}, {PROBLEMS} random states of {ACTIONS} actions: the signal is std / beta^2 within "
            f"{two['std']:.1e} (relative); Var / beta^2, as one account has it, is off by up to {two['variance']:.2f}; the "
            f"natural gradient of the expected reward has norm std within {two['natural gradient']:.1e}."
        )
    table = signal_of_groups()
    lines.append(
        "- The same for sampled groups of 8, success rate: std, mean size of the centred signal: "
        + "; ".join(f"{rate:g}: {std:.2f}, {signal:.2f}" for rate, std, signal in table)
        + "."
    )
    for beta in (0.5, 1.0):
        three = theorem_3_3(beta)
        lines.append(
            f"- Theorem 3.3, beta {beta:g}: at the optimum found by ascent, conditionals inside M and outside differ "
            f"from pi_0's by at most {three['conditionals']:.1e}, the mass of M from the closed form by {three['mass']:.1e}. "
            f"Taken to the same mass, GRPO on samples without KL moves the conditionals by {three['no KL, sampled']:.2f} "
            f"(total variation, 0 to 1), likelihood of one right action by {three['sft']:.2f}."
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
