"""Tables and curves of `smollm2_doctors.py`, and its statistics: scores at equal KL, with intervals over prompts."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemo_pivotrl.core.atomic import write_atomically

TITLE = "# LLMdoctor on SmolLM2-135M-Instruct, at equal KL"
BOOTSTRAPS = 2000
Result = dict[str, Any]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(value) + "\n")


def mean_kl(rows: Sequence[Result]) -> float:
    """Nats an answer."""
    return float(np.mean([row["kl"] for row in rows]))


# ---- statistics ----


class Curve:
    """A way of steering at rising weights, from the patient (weight 0): per prompt the mean score and the mean KL of its answers."""

    def __init__(self, rows: Sequence[Sequence[Result]], objective: str):
        self.scores = np.stack([by_prompt(point, lambda row: row["scores"][objective]) for point in rows])
        self.kls = np.stack([by_prompt(point, lambda row: row["kl"]) for point in rows])

    def at(self, kl: float, drawn: np.ndarray) -> np.ndarray:
        """The mean score [B] at `kl` nats an answer over the prompts `drawn` [B, prompts]: between the two weights around it the
        score is linear in the KL. NaN where the curve does not reach so far."""
        kls, scores = self.kls[:, drawn].mean(2), self.scores[:, drawn].mean(2)
        found = np.full(len(drawn), np.nan)
        for b in range(len(drawn)):
            order = np.argsort(kls[:, b], kind="stable")
            if kls[order[-1], b] >= kl:
                found[b] = np.interp(kl, kls[order, b], scores[order, b])
        return found


def by_prompt(rows: Sequence[Result], value: Callable[[Result], float]) -> np.ndarray:
    """Mean of `value` over each prompt's answers, in the prompts' order."""
    found: dict[int, list[float]] = {}
    for row in rows:
        found.setdefault(row["prompt"], []).append(value(row))
    return np.array([np.mean(found[prompt]) for prompt in sorted(found)])


def best_of(lots: Sequence[Sequence[Result]], n: int, reward: Sequence[Sequence[float]]) -> list[Result]:
    """Of each lot's first n answers the one with the highest reward; the earlier of equals."""
    return [lot[max(range(n), key=own.__getitem__)] for lot, own in zip(lots, reward, strict=True)]


def best_of_kl(n: int) -> float:
    """Nats by which best of n is away from the patient at most: log n - (n-1)/n (equal where no two answers tie)."""
    return math.log(n) - (n - 1) / n


def draws(prompts: int) -> np.ndarray:
    """The point estimate's prompts, then those of each bootstrap: the same for every arm, so differences are paired."""
    rng = np.random.default_rng(0)
    return np.concatenate([np.arange(prompts)[None], rng.integers(0, prompts, (BOOTSTRAPS, prompts))])


def cell(found: np.ndarray, signed: bool = False) -> str:
    """The point estimate found[0] and a 95 % percentile interval of the rest; empty where the estimate is NaN."""
    if np.isnan(found[0]):
        return ""
    low, high = np.nanquantile(found[1:], [0.025, 0.975])
    plus = "+" if signed else ""
    return f"{found[0]:{plus}.3f} [{low:{plus}.3f}, {high:{plus}.3f}]"


# ---- what is there ----


class Found:
    """The results of one seed's jobs, as far as they are there."""

    def __init__(self, root: Path, contestants: Sequence[str], sizes: Sequence[int]):
        self.jobs = {path.parent.name: read_json(path) for path in sorted(root.glob("*/result.json"))}
        self.contestants, self.sizes = list(contestants), list(sizes)
        alone = self.jobs["alone"]
        self.lots, self.greedy = alone["lots"], alone["greedy"]
        self.patient = [lot[0] for lot in self.lots]
        self.drawn = draws(len({row["prompt"] for row in self.patient}))

    def curves(self, trained: str, objective: str) -> dict[str, Curve]:
        """Label to curve of every way that a doctor of `trained` steers, measured by the oracle `objective`."""
        return {
            label: Curve([self.patient, *points.values()], objective) for label, points in self.points(trained).items()
        }

    def points(self, objective: str) -> dict[str, dict[str, list[Result]]]:
        """Label to weight to rows."""
        return {name: job["curve"] for name in self.contestants if (job := self.jobs.get(f"{objective}-{name}"))}

    def chosen(self, objective: str) -> dict[str, dict[int, list[Result]]]:
        """Who chooses, to n, to rows of best of n."""
        rewards = {"the oracle": [[row["scores"][objective] for row in lot] for lot in self.lots]}
        for name in self.contestants:
            if "reward" in (job := self.jobs.get(f"{objective}-{name}", {})):
                rewards[name] = job["reward"]
        return {who: {n: best_of(self.lots, n, reward) for n in self.sizes} for who, reward in rewards.items()}

    def mean(self, rows: Sequence[Result], objective: str) -> np.ndarray:
        return by_prompt(rows, lambda row: row["scores"][objective])[self.drawn].mean(1)


def report(root: Path, objectives: Sequence[str], contestants: Sequence[str], sizes: Sequence[int]) -> tuple[str, str]:
    """(Markdown, SVG) of everything that is there."""
    found = Found(root, contestants, sizes)
    parts = {"Pairs and face prompts": ground(found, objectives)}
    for objective in objectives:
        other = next(o for o in objectives if o != objective)
        if found.points(objective):
            parts[f"{objective}: at equal KL"] = equal_kl(found, objective)
        parts[f"{objective}: every arm"] = every_arm(found, objective, other)
    parts["Training"] = training(found, objectives)
    parts["What every job took"] = costs(found)
    text = "\n\n".join(f"## {title}\n\n" + "\n".join(lines) for title, lines in parts.items())
    return "![score against KL](smollm2_doctors.svg)\n\n" + text, plot(found, objectives)


def ground(found: Found, objectives: Sequence[str]) -> list[str]:
    pairs = found.jobs["pairs"]
    counts = ", ".join(f"{objective} {n}" for objective, n in pairs["pairs"].items())
    lines = [
        f"{pairs['prompts']} prompts, {pairs['answers']} answers, {pairs['tokens']} tokens; pairs: {counts}.",
        "",
        "| objective | positive face | negative face | agreement | mean Delta, nats a token | taken |",
        "|---|---|---|---|---|---|",
    ]
    for objective in objectives:
        job = found.jobs.get(f"{objective}-faces", {"probed": []})
        lines += [
            f"| {objective} | {one['positive']} | {one['negative']} | {one['agreement']:.3f} | {one['delta']:.3f} | "
            f"{'yes' if one['positive'] == job['faces']['positive'] else ''} |"
            for one in job["probed"]
        ]
    for objective in objectives:
        if rewards := found.jobs.get(f"{objective}-rewards"):
            told = rewards["summary"]
            agreement = ", ".join(f"{side} {share:.3f}" for side, share in told["agreement"].items())
            lines += [
                "",
                f"Rewards of {objective}: {told['tokens']} tokens, of which {told['kept_share']:.1%} have one; mean Delta "
                f"{told['delta_mean']:.3f} nats, noise floor {told['noise_floor']:.3f}; agreement {agreement}.",
            ]
    return lines


def equal_kl(found: Found, objective: str) -> list[str]:
    """Scores at each n's KL, interpolated between weights, beside best of n; and LLMdoctor's lead over the others there."""
    curves, chosen = found.curves(objective, objective), found.chosen(objective)
    patient = found.mean(found.patient, objective)
    ours = next(iter(curves))
    targets = [(f"{best_of_kl(n):.2f} (best of {n})", best_of_kl(n), n) for n in found.sizes]
    lines = ["| arm |" + "".join(f" change from the patient at KL {title} |" for title, *_ in targets)]
    lines.append("|---|" + "---|" * len(targets))
    for label, curve in curves.items():
        cells = [cell(curve.at(kl, found.drawn) - patient, True) for _, kl, _ in targets]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    for who, by_n in chosen.items():
        cells = [cell(found.mean(by_n[n], objective) - patient, True) for *_, n in targets]
        lines.append(f"| best of n by {who} | " + " | ".join(cells) + " |")
    lines += ["", f"| {ours} minus |" + "".join(f" at KL {title} |" for title, *_ in targets)]
    lines.append("|---|" + "---|" * len(targets))
    for label, curve in list(curves.items())[1:]:
        cells = [cell(curves[ours].at(kl, found.drawn) - curve.at(kl, found.drawn), True) for _, kl, _ in targets]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    for who, by_n in chosen.items():
        cells = [cell(curves[ours].at(kl, found.drawn) - found.mean(by_n[n], objective), True) for _, kl, n in targets]
        lines.append(f"| best of n by {who} | " + " | ".join(cells) + " |")
    return lines


def every_arm(found: Found, objective: str, other: str) -> list[str]:
    lines = [
        f"| arm | weight | {objective} | change from the patient | {other} | change | KL, nats an answer | tokens |",
        "|---|---|---|---|---|---|---|---|",
    ]
    patient = {o: found.mean(found.patient, o) for o in (objective, other)}

    def line(label: str, weight: str, rows: Sequence[Result], kl: str) -> str:
        cells = []
        for o in (objective, other):
            own = found.mean(rows, o)
            cells += [cell(own), "" if rows is found.patient else cell(own - patient[o], True)]
        return (
            f"| {label} | {weight} | " + " | ".join(cells) + f" | {kl} | {np.mean([r['tokens'] for r in rows]):.1f} |"
        )

    lines += [line("patient", "", found.patient, "0"), line("greedy", "", found.greedy, "")]
    for who, by_n in found.chosen(objective).items():
        lines += [line(f"best of {n} by {who}", "", rows, f"{best_of_kl(n):.2f}") for n, rows in by_n.items()]
    for label, points in found.points(objective).items():
        lines += [line(label, weight, rows, f"{mean_kl(rows):.2f}") for weight, rows in points.items()]
    return lines


def training(found: Found, objectives: Sequence[str]) -> list[str]:
    lines = [
        "| objective | contestant | loss of the first and the last fifth | held-out pairs moved the right way | gap, nats |",
        "|---|---|---|---|---|",
    ]
    for objective in objectives:
        for name in found.contestants:
            if job := found.jobs.get(f"{objective}-{name}"):
                losses, held = job["losses"], job["held_out"]
                fifth = max(1, len(losses) // 5)
                ends = f"{np.mean(losses[:fifth]):.3f}, {np.mean(losses[-fifth:]):.3f}"
                right = f"{held['ordered']} of {held['pairs']}"
                lines.append(f"| {objective} | {name} | {ends} | {right} | {held['gap']:.2f} |")
    return lines


def costs(found: Found) -> list[str]:
    lines = ["| job | wall, s | processor, s | tokens generated |", "|---|---|---|---|"]
    for name, job in found.jobs.items():
        tokens = job.get("tokens", 0)
        if "lots" in job:
            tokens = sum(row["tokens"] for lot in (*job["lots"], job["greedy"]) for row in lot)
        if "curve" in job:
            tokens = sum(r["tokens"] for rows in job["curve"].values() for r in rows)
        lines.append(f"| {name} | {job['seconds']:.0f} | {job['processor_seconds']:.0f} | {tokens or ''} |")
    total = sum(job["processor_seconds"] for job in found.jobs.values())
    return [*lines, "", f"{total / 60:.0f} minutes of a processor together."]


def plot(found: Found, objectives: Sequence[str]) -> str:
    """Change of an objective's score against KL, a panel an objective."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "smollm2"
    figure, axes = plt.subplots(1, len(objectives), figsize=(11, 4))
    for axis, objective in zip(axes, objectives, strict=True):
        for label, curve in found.curves(objective, objective).items():
            axis.plot(curve.kls.mean(1), curve.scores.mean(1), marker=".", label=label)
        for who, by_n in found.chosen(objective).items():
            points = [(best_of_kl(n), found.mean(rows, objective)[0]) for n, rows in by_n.items()]
            axis.plot(*zip(*points, strict=True), linestyle=":", marker="x", label=f"best of n by {who}")
        axis.set(title=objective, xlabel="KL from the patient, nats an answer", xlim=(0, 8))
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    return buffer.getvalue().rstrip()
