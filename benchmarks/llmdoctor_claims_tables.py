"""The tables and plots of `llmdoctor_claims.py`, from its jobs' rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby
from typing import Any

import llmdoctor_claims_plan as plan
import numpy as np
from claims import interval
from llmdoctor_claims_arms import ALONE, BRIEF, CANDIDATES, KIND, PLACES

from nemo_pivotrl.llmdoctor.assess import distinct
from nemo_pivotrl.report import plots

TITLE = "# The LLMdoctor paper's claims on the embedded world of manners"
Rows = Sequence[Mapping[str, Any]]
OURS = (plan.DOCTOR, plan.STRONGER, plan.LITERAL)
CORNER = (1.0, -0.2)
"""The best kindness and brevity that an answer can have: `the lamp is lovely .`"""


# ---- figures ----


def by_prompt(rows: Rows, value: Callable[[Mapping[str, Any]], float]) -> np.ndarray:
    """A mean for each question: an interval's items."""
    return np.array([np.mean([value(r) for r in group]) for _, group in groupby(rows, key=lambda r: r["prompt"])])


def kind(row: Mapping[str, Any]) -> float:
    return float(row["worth"][KIND])


def wins(ours: Rows, theirs: Rows) -> np.ndarray:
    """Win + 1/2 tie by worth of kindness, question by question; answers of the same question and sample are compared."""
    assert [(r["prompt"], r["sample"]) for r in ours] == [(r["prompt"], r["sample"]) for r in theirs]
    apart = [np.sign(kind(a) - kind(b)) for a, b in zip(ours, theirs, strict=True)]
    paired = [{"prompt": r["prompt"], "won": (1 + d) / 2} for r, d in zip(ours, apart, strict=True)]
    return by_prompt(paired, lambda r: r["won"])


def between(rows: Rows, figure: Callable[[list[str]], float]) -> np.ndarray:
    """A figure of the answers to each question."""
    texts = [[r["text"] for r in group] for _, group in groupby(rows, key=lambda r: r["prompt"])]
    return np.array([figure(group) for group in texts])


def different(texts: list[str]) -> float:
    """Share of pairs of answers that differ."""
    return float(np.mean([a != b for a, b in combinations(texts, 2)]))


def hypervolume(points: Sequence[tuple[float, float]], floor: tuple[float, float]) -> float:
    """Area that the points dominate above `floor`, both coordinates better when larger."""
    area, reached = 0.0, floor[1]
    for x, y in sorted(points, reverse=True):
        if x > floor[0] and y > reached:
            area += (x - floor[0]) * (y - reached)
            reached = y
    return area


def is_log_value(signal: str) -> bool:
    """Whether a signal of `early_signal` is log V of TFPO."""
    return signal.startswith("LLMdoctor") and signal.endswith(" value")


def halfway(gap: Sequence[float]) -> float:
    """The first relative position at which a gap, linear between `PLACES`, is half of its end."""
    share = np.array(gap) / gap[-1]
    i = int(np.argmax(share >= 0.5))
    if i == 0:
        return PLACES[0]
    step = (0.5 - share[i - 1]) / (share[i] - share[i - 1])
    return float(PLACES[i - 1] + step * (PLACES[i] - PLACES[i - 1]))


def shown(by_seed: Sequence[np.ndarray], digits: int = 2, scale: float = 1.0) -> str:
    mean, low, high = (scale * x for x in interval(by_seed))
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *lines))


# ---- the report ----


@dataclass(frozen=True)
class Report:
    """Everything that was found, by (seed, name)."""

    seeds: list[int]
    worlds: Mapping[int, Any]
    grid: Mapping[str, Mapping[Any, float]]
    best: Mapping[str, Any]
    reported: Mapping[tuple[int, str], Any]
    last: Mapping[tuple[int, str], Any]
    patients: list[int]

    def rows(self, name: str, label: str = "") -> list[Rows]:
        """The contestant's answers, one lot a seed, in its tuned way unless another is named."""
        label = label or self.best[name][2]
        return [self.reported[s, name]["arms"][label] for s in self.seeds]

    def contestants(self) -> dict[str, list[Rows]]:
        """Every way of answering of the first two tables."""
        plain = {label: self.rows("patient", label) for label in ("patient", "greedy", "top-p 0.9")}
        trained = {name: self.rows(name) for name in (*plan.DOCTORS, plan.TUNED, plan.ARGS)}
        alone = {"DPO's doctor alone": self.rows("DPO on the doctor", ALONE.label)}
        every = self.reported[self.seeds[0], plan.BEST_OF]["arms"]
        searched = {label: self.rows(plan.BEST_OF, label) for label in every}
        return plain | trained | alone | {plan.START: self.rows(plan.START)} | searched

    def text(self) -> tuple[str, dict[str, str]]:
        """The report as Markdown, and the plots by name."""
        sizes = self.worlds[self.seeds[0]]["parameters"]
        found = [self.worlds[s]["objectives"][KIND] for s in self.seeds]
        pairs = ", ".join(str(f["pairs"]["train"]) for f in found)
        kept = ", ".join(f"{100 * f['kept_share']:.0f}" for f in found)
        parts = [
            f"Patient {sizes['patient']:,} parameters, doctor {sizes['novice']:,}. Pairs to train on, by seed: {pairs}; "
            f"tokens with a reward at theta 0.5: {kept} %. 95 % intervals: seeds are drawn with replacement, then questions.",
            "## LLMdoctor against each opponent\n\n" + self.against(),
            "## Each contestant\n\n" + self.each(),
            "## Ablations\n\n" + self.variants(plan.ABLATIONS),
            "## Sweeps\n\n" + self.variants(plan.SWEEPS),
            "## Ways of decoding: worth by mode and weight\n\n" + self.decoding(),
            "## One doctor, patients of several sizes\n\n" + self.sizes(),
            "## Two objectives\n\n" + self.fronts() + "\n\n![fronts](llmdoctor_front.svg)",
            "## Where in an answer the signal is\n\n" + self.early() + "\n\n![early tokens](llmdoctor_early.svg)",
            "## Tuning: mean worth on validation questions of the tuning seeds\n\n" + self.tuning(),
        ]
        drawn = {"front": self.draw_fronts(), "early": self.draw_early(), "kl": self.draw_kl()}
        parts[5] += "\n\n![worth over KL](llmdoctor_kl.svg)"
        return "\n\n".join(parts), drawn

    def against(self) -> str:
        every, lines = self.contestants(), []
        for name, theirs in every.items():
            cells = [name]
            for ours in OURS:
                found = [wins(a, b) for a, b in zip(every[ours], theirs, strict=True)]
                other = [wins(b, a) for a, b in zip(every[ours], theirs, strict=True)]
                assert all(np.allclose(a + b, 1) for a, b in zip(found, other, strict=True)), "the orders contradict"
                cells.append("" if name == ours else shown(found, 1, 100))
            lines.append(cells)
        heads = ["opponent", *(f"win + 1/2 tie %: {self._setting(ours)}" for ours in OURS)]
        note = (
            "By the worth of an answer. Both orders were counted and add up to 100 in every question: an oracle that sees "
            "one answer at a time has no order."
        )
        return table(heads, lines) + "\n\n" + note

    def _setting(self, name: str) -> str:
        rate, beta, label = self.best[name]
        if name == plan.START:
            return f"{name} ({label})"
        return f"{name} ({label}, rate {rate:g}{f', beta {beta:g}' if beta else ''})"

    def _passes(self, name: str) -> str:
        """What a token of the answer costs."""
        if "best of" in name:
            n = name.rsplit(" ", 1)[1]
            return f"{n} P + D" if "model" in name else f"{n} P"
        if name == plan.ARGS:
            return f"P + {CANDIDATES + 1} D"
        mode = self.best[name][2].split()[0] if name in self.best else "alone"
        return {"product": "P + D", "ratio": "P + 2 D", "alone": "D" if "alone" in name else "P"}[mode]

    def each(self) -> str:
        lines = []
        for name, by_seed in self.contestants().items():
            searched = "best of" in name
            a_token = [by_prompt(r, lambda x: x["kl"]) for r in by_seed]
            an_answer = [by_prompt(r, lambda x: x["kl"] * x["tokens"]) for r in by_seed]
            unknown = searched or name in ("greedy", "top-p 0.9")
            lines.append(
                [
                    self._setting(name) if name in self.best else name,
                    shown([by_prompt(r, kind) for r in by_seed]),
                    shown([by_prompt(r, lambda x: x["score"]) for r in by_seed]),
                    shown([by_prompt(r, lambda x: x["well_formed"]) for r in by_seed]),
                    *(["", ""] if unknown else [shown(a_token, 3), shown(an_answer, 3)]),
                    *(shown([between(r, f) for r in by_seed]) for f in (lambda t: distinct(t, 2), different)),
                    shown([by_prompt(r, lambda x: x["tokens"]) for r in by_seed], 1),
                    self._passes(name),
                ]
            )
        heads = ("contestant", "worth", "raw kindness", "well formed", "KL a token", "KL an answer")
        note = (
            "distinct-2: different word pairs over all of them, between a question's answers; different: pairs of its answers "
            "that differ. KL in nats, from the patient; best of n has at most log n - (n - 1) / n an answer (1.8 for 16 against "
            "0.6 for 4). Passes a token: P of the patient, D of a model of the doctor's size."
        )
        return table([*heads, "distinct-2", "different", "tokens", "passes a token"], lines) + "\n\n" + note

    def _labels(self) -> list[str]:
        return [label for label in self.reported[self.seeds[0], plan.DOCTOR]["arms"] if label != ALONE.label]

    def variants(self, variants: Mapping[str, Any]) -> str:
        parts = []
        for base in (plan.DOCTOR, plan.LITERAL):
            mode = plan.way_of(self.best[base]).mode
            labels, lines = [label for label in self._labels() if label.startswith(mode)], []
            for name in (base, *(name for name in variants if plan.base_of(name) == base)):
                ours, theirs = (self.rows(n, self.best[base][2]) for n in (name, base))
                apart = [by_prompt(a, kind) - by_prompt(b, kind) for a, b in zip(ours, theirs, strict=True)]
                cells = ["" if name == base else shown(apart)]
                for label in labels:
                    found = self.rows(name, label)
                    mean = np.mean([by_prompt(r, kind).mean() for r in found])
                    far = np.mean([by_prompt(r, lambda x: x["kl"]).mean() for r in found])
                    cells.append(f"{mean:.2f} ({far:.3f})")
                lines.append([name, *cells])
            parts.append(table([self._setting(base), "change of worth in that way", *labels], lines))
        return (
            "\n\n".join(parts)
            + "\n\nCells: worth (KL a token). Every variant is trained with its base's learning rate."
        )

    def decoding(self) -> str:
        lines = [
            [name, *(shown([by_prompt(r, kind) for r in self.rows(name, label)]) for label in self._labels())]
            for name in (*plan.DOCTORS, plan.START)
        ]
        return table(["doctor", *self._labels()], lines)

    def _at_size(self, hidden: int | None) -> dict[str, list[Rows]]:
        if hidden is None:
            middle = {"patient": "patient", "DPO": ALONE.label}
            every = {name: self.rows(who, middle[name]) for name, who in (("patient", "patient"), ("DPO", plan.TUNED))}
            return every | {name: self.rows(name) for name in (plan.DOCTOR, plan.LITERAL)}
        found = [self.last[s, f"patient {hidden}"]["arms"] for s in self.seeds]
        return {name: [arms[name] for arms in found] for name in found[0]}

    def sizes(self) -> str:
        every = {self.worlds[self.seeds[0]]["parameters"]["patient"]: self._at_size(None)}
        for hidden in self.patients:
            size = self.reported[self.seeds[0], f"patient {hidden}"]["parameters"]
            every[size] = self._at_size(hidden)
        names, lines = ("patient", plan.DOCTOR, plan.LITERAL, "DPO"), []
        for size, arms in sorted(every.items()):
            won = [wins(a, b) for a, b in zip(arms[plan.DOCTOR], arms["DPO"], strict=True)]
            worths = [shown([by_prompt(r, kind) for r in arms[name]]) for name in names]
            kept = shown([by_prompt(r, lambda x: x["well_formed"]) for r in arms["DPO"]])
            lines.append([f"{size:,}", *worths, kept, shown(won, 1, 100)])
        heads = ["patient's parameters", "patient alone", plan.DOCTOR, plan.LITERAL, plan.TUNED, "well formed by DPO"]
        note = (
            "Worth. The doctors and all pairs come from the patient that the other tables have; patients of other width "
            "learned from the same lessons with the same tokenizer, and DPO trains each of them on the same pairs, with the "
            "rate and beta that were tuned there."
        )
        return table([*heads, "LLMdoctor against DPO: win + 1/2 tie %"], lines) + "\n\n" + note

    def _fronts(self) -> dict[str, list[list[tuple[float, float]]]]:
        """Method -> for each seed its points (kindness, brevity), by share of kindness."""
        names = [name for s, name in self.last if s == self.seeds[0] and name.startswith("front ")]

        def points(seed: int, name: str) -> list[tuple[float, float]]:
            arms = self.last[seed, name]["arms"].values()
            return [tuple(float(np.mean([r["worth"][o] for r in rows])) for o in (KIND, BRIEF)) for rows in arms]

        return {name.removeprefix("front "): [points(s, name) for s in self.seeds] for name in names}

    def fronts(self) -> str:
        lines, whole = [], (CORNER[0] + 1) * (CORNER[1] + 1)
        for name, by_seed in self._fronts().items():
            volumes = [np.array([hypervolume(points, (-1.0, -1.0)) / whole]) for points in by_seed]
            mean = np.mean(by_seed, 0)
            lines.append([name, shown(volumes), *(f"{x:.2f}, {y:.2f}" for x, y in mean)])
        heads = ["method", "hypervolume", *(f"kindness {share:g}" for share in plan.SHARES)]
        note = (
            "Cells: mean worth of kindness, of brevity, at that share of kindness. Hypervolume above (-1, -1), where an ill-formed "
            f"answer lies, as a share of that of the best possible answer {CORNER}; intervals over seeds."
        )
        return table(heads, lines) + "\n\n" + note

    def draw_fronts(self) -> str:
        figure, axes = plots.plt.subplots(figsize=(5, 3.4))
        for name, by_seed in self._fronts().items():
            mean = np.mean(by_seed, 0)
            axes.plot(mean[:, 0], mean[:, 1], marker="o", markersize=3, linewidth=1.2, label=name)
        axes.set_xlabel("worth: kindness")
        axes.set_ylabel("worth: brevity")
        axes.legend(frameon=False, fontsize=7)
        return plots.svg(figure)

    def _gaps(self) -> dict[str, list[list[float]]]:
        names = list(self.last[self.seeds[0], "early signal"]["gaps"])
        return {name: [self.last[s, "early signal"]["gaps"][name] for s in self.seeds] for name in names}

    def early(self) -> str:
        lines = []
        for name, by_seed in self._gaps().items():
            cells = [""] * 4
            if not is_log_value(name):
                normal = [np.array(gap) / gap[-1] for gap in by_seed]
                at = (np.mean([g[PLACES.index(p)] for g in normal]) for p in (0.25, 0.5, 0.75))
                cells = [shown([np.array([halfway(gap)]) for gap in by_seed]), *(f"{x:.2f}" for x in at)]
            whole = [max(gap, key=abs) if is_log_value(name) else gap[-1] for gap in by_seed]
            lines.append([name.replace("_", " "), *cells, ", ".join(f"{gap:.1f}" for gap in whole)])
        heads = ["signal", "half of the gap is reached at", "gap at 0.25", "at 0.5", "at 0.75", "the whole gap by seed"]
        note = (
            "Held-out pairs; position 0 is the prompt's end, 1 the answer's. A signal's gap is its mean over chosen answers "
            "minus that over rejected ones, as a share of its end; nats, or rewards. Log V is pinned to 0 at the end, so that "
            "its gap has no whole: the table has its largest. Intervals over seeds."
        )
        return table(heads, lines) + "\n\n" + note

    def draw_early(self) -> str:
        figure, axes = plots.plt.subplots(figsize=(5, 3.4))
        for name, by_seed in self._gaps().items():
            if not is_log_value(name):
                normal = np.mean([np.array(gap) / gap[-1] for gap in by_seed], 0)
                axes.plot(PLACES, normal, linewidth=1.2, label=name.replace("_", " "))
        axes.set_xlabel("relative position in the answer")
        axes.set_ylabel("gap, share of the whole")
        axes.legend(frameon=False, fontsize=7)
        return plots.svg(figure)

    def draw_kl(self) -> str:
        figure, axes = plots.plt.subplots(figsize=(5, 3.4))
        for name in (*plan.DOCTORS, plan.START):
            for mode, style in (("product", "-"), ("ratio", "--")):
                labels = [label for label in self._labels() if label.startswith(mode)]
                found = [[r for rows in self.rows(name, label) for r in rows] for label in labels]
                points = [
                    (np.mean([r["kl"] * r["tokens"] for r in rows]), np.mean([kind(r) for r in rows])) for rows in found
                ]
                color = f"C{[*plan.DOCTORS, plan.START].index(name)}"
                axes.plot(*zip(*points, strict=True), style, color=color, marker="o", markersize=3, linewidth=1.2)
            axes.plot([], [], color=color, label=name)
        axes.set_xlim(0, 4)
        axes.set_ylim(-0.3, 1.05)
        axes.set_xlabel("KL an answer, nats (solid: product, dashed: ratio, some of it outside)")
        axes.set_ylabel("worth")
        axes.legend(frameon=False, fontsize=7)
        return plots.svg(figure)

    def tuning(self) -> str:
        parts = []
        for name, cells in self.grid.items():
            betas = sorted({beta for _, beta, _ in cells})
            rates = sorted({rate for rate, _, _ in cells})
            rows = sorted({(beta, label) for _, beta, label in cells}, key=lambda r: (betas.index(r[0]), r[1]))
            lines = []
            for beta, label in rows:
                found = [(rate, beta, label) for rate in rates]
                cells_ = [f"{cells[c]:.3f}{' *' if c == self.best[name] else ''}" if c in cells else "" for c in found]
                lines.append([f"beta {beta:g}" if beta else label, *cells_])
            parts.append(table([name, *(f"{rate:g}" for rate in rates)], lines))
        return "\n\n".join(parts)
