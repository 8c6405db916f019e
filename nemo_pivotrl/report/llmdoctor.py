"""report, for LLMdoctor: token rewards seen token by token, the doctors' training, and what steering gained and changed.

Every section stands alone: `gather` adds those whose artefacts are there. Model output is data: it reaches the page
through the template's autoescape, with control characters spelt out.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nemo_pivotrl.components.costs import read_ledger
from nemo_pivotrl.config import Arm, Patient, Recipe
from nemo_pivotrl.core.artifacts import read_header, read_rows
from nemo_pivotrl.core.atomic import read_json
from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.report.plots import curve, plt, svg

SUMMARIES = {
    "preferences": "preferences.audit.json",
    "token_rewards": "token_rewards.json",
    "assessment": "assessment.json",
}
SECTIONS = (*SUMMARIES, "reward_pairs", "doctors", "pareto", "traces")
SHOWN_PAIRS = 6
"""Of each objective."""
SHOWN_TRACES = 8
SHOWN_TOKENS = 400
"""Of an answer; longer ones say how many more there are."""
UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes half a character to."""
SHOWN_PROMPT = 300
"""Characters at the end of a pair's prompt."""
NAME = 28
"""Characters of a name in a plot."""
SPACES = {" ": "·", "\t": "→\t", "\n": "↵\n"}
JOINERS = "\u200c\u200d"
"""Invisible, but spelling in Persian and in emoji."""
GREEN, RED, AMBER = (120, 200, 135), (240, 140, 130), (250, 165, 60)
"""Full colours; black text on them is well above WCAG's contrast of 4.5."""
CURVES = (
    ("subtb", "SubTB"),
    ("hinge", "value hinge"),
    ("margin", "margin, nats"),
    ("ordered", "share of pairs in order"),
    ("chosen_drift", "drift of chosen answers, nats"),
    ("rejected_drift", "drift of rejected answers, nats"),
)
ARM_COLOURS = ("#4a78b5", "#b3423a", "#2a7f3b", "#c9a227", "#7b5aa6", "#444444")

AGAIN = "re-run the stage that wrote it"

Row = dict[str, Any]


def gather(recipe: Recipe, metrics: dict[str, list[Row]], numbers: Row, plots: dict[str, str]) -> None:
    """Add what the run directory holds of LLMdoctor. `metrics`: folder to the rows of its metrics.jsonl."""
    for key, name in SUMMARIES.items():
        if recipe.path(name).exists():
            numbers[key] = read_json(recipe.path(name), {}, AGAIN)
    if recipe.path("token_rewards.jsonl").exists():
        numbers["reward_pairs"] = reward_pairs(recipe)
    doctors = {name: rows for name, rows in metrics.items() if any("subtb" in r or "val/subtb" in r for r in rows)}
    if doctors:
        numbers["doctors"] = {name: {"steps": rows, **_ends(rows)} for name, rows in doctors.items()}
        plots["doctors"] = _doctors_plot(doctors)
    if "assessment" in numbers:
        arms = numbers["assessment"]["arms"]
        for line in read_ledger(Path(recipe.run_dir)):
            for label, seconds in line.get("seconds_per_token", {}).items():
                if label in arms:
                    arms[label]["seconds_per_token"] = seconds
        objectives = list(next(iter(arms.values()))["objectives"])
        plots["scores"] = _scores_plot(arms, objectives)
        if len(objectives) > 1:
            numbers["pareto"] = _pareto(arms, objectives[0], objectives[1])
            plots["pareto"] = _pareto_plot(arms, numbers["pareto"])
    if recipe.path("assessment.jsonl").exists() and (found := traces(recipe)):
        numbers["traces"] = found


def view(numbers: Row) -> dict[str, Callable[..., str]] | None:
    """What the template needs to show these sections; None where there is none of them."""
    if not any(key in numbers for key in SECTIONS):
        return None
    return {"tint": tint, "shade": shade, "visible": visible, "spelt": spelt, "setting": setting_text}


# ---- colours and characters ----


def tint(reward: float) -> str:
    """CSS colour of a reward: white at 0, full green from 1, full red from -1."""
    return _mixed(GREEN if reward > 0 else RED, min(1.0, abs(reward)))


def shade(kl: float, top: float) -> str:
    """CSS colour of a KL, full at `top`. The root is shown: KL grows with the square of a small tilt."""
    return _mixed(AMBER, min(1.0, max(0.0, kl) / top) ** 0.5 if top > 0 else 0.0)


def _mixed(colour: tuple[int, int, int], strength: float) -> str:
    return "#" + "".join(f"{round(255 + (c - 255) * strength):02x}" for c in colour)


def visible(piece: str) -> str:
    """A token's text with its spaces and line breaks shown; one that is only a part of a character gets a sign."""
    return "".join(SPACES.get(c) or spelt(c) for c in piece) or "◌"


def spelt(text: str) -> str:
    """Text without what could not be shown or would rearrange the page: control, direction and surrogate characters."""
    return "".join(
        f"\\u{ord(c):04x}"
        if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in "\n\t" + JOINERS
        else c
        for c in text
    )


def setting_text(setting: Row) -> str:
    """An arm's settings, those that say something: its doctors, and what differs from plain sampling."""
    plain = Arm()
    parts = [f"{name} {weight:g}" for name, weight in setting.get("beta", {}).items()]
    for key, shown in (("alpha", "alpha"), ("temperature", "temperature"), ("top_p", "top-p"), ("best_of", "best of")):
        if setting.get(key, getattr(plain, key)) != getattr(plain, key):
            parts.append(f"{shown} {setting[key]:g}")
    return ", ".join(parts) or "the patient, sampled"


# ---- token rewards ----


def reward_pairs(recipe: Recipe) -> Row:
    """Some train pairs of each objective, evenly spaced in file order, token by token: [text, reward, Delta]."""
    path = recipe.path("token_rewards.jsonl")
    header = read_header(path, "token_rewards")
    counts: dict[str, int] = {}
    for row in read_rows(path):
        if row["split"] == "train":
            counts[row["objective"]] = counts.get(row["objective"], 0) + 1
    wanted = {objective: {i * n // SHOWN_PAIRS for i in range(SHOWN_PAIRS)} for objective, n in counts.items()}
    seen: dict[str, int] = {}
    pieces_of, problem = decoder(recipe.patient, header.tokenizer)
    pairs: dict[str, list[Row]] = {}
    for row in read_rows(path):
        if row["split"] != "train":
            continue
        objective = row["objective"]
        place = seen[objective] = seen.get(objective, -1) + 1
        if place in wanted[objective]:
            prompt = "".join(pieces_of(row["prompt_ids"][-SHOWN_TOKENS:]))
            shown = {"preference_id": row["preference_id"], "place": place, "prompt": prompt[-SHOWN_PROMPT:]}
            for side in ("chosen", "rejected"):
                shown[side] = _shown_answer(row[side], pieces_of)
            pairs.setdefault(objective, []).append(shown)
    return {"pairs": pairs, "train_pairs": counts, "without_text": problem}


def _shown_answer(answer: Row, pieces_of: Callable[[Sequence[int]], list[str]]) -> Row:
    ids, rewards, importance = (answer[key][:SHOWN_TOKENS] for key in ("ids", "rewards", "importance"))
    tokens = [list(token) for token in zip(pieces_of(ids), rewards, importance, strict=True)]
    return {"tokens": tokens, "more": len(answer["ids"]) - len(ids)}


def decoder(patient: Patient, fingerprint: str) -> tuple[Callable[[Sequence[int]], list[str]], str | None]:
    """(ids to a text for each, why these texts are no texts but ids). Another tokenizer's texts would be wrong ones."""
    from nemo_pivotrl.llmdoctor.reward import load_patient_chat

    try:
        chat = load_patient_chat(patient)
    except InputError as error:
        return numbered, f"the patient's tokenizer could not be read: {error.problems[0]}"
    if chat.fingerprint != fingerprint:
        return numbered, "patient.model_name has another tokenizer than the one that made the rewards"

    def decode(ids: Sequence[int]) -> str:
        return str(chat.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def pieces(ids: Sequence[int]) -> list[str]:
        shown, texts = "", []
        for n in range(1, len(ids) + 1):
            whole = decode(ids[:n])
            if n < len(ids):
                whole = whole.rstrip(UNFINISHED)  # a character that the next token completes is the next token's
            texts.append(whole[len(shown) :])
            shown = max(shown, whole, key=len)
        return texts

    return pieces, None


def numbered(ids: Sequence[int]) -> list[str]:
    """Ids in the place of texts."""
    return [f"#{token} " for token in ids]


# ---- doctors ----


def _ends(rows: Sequence[Row]) -> Row:
    """The held-out metrics before and after training, or the train metrics where nothing was held out."""
    kind = "val/" if any("val/subtb" in row for row in rows) else ""
    measured = [row for row in rows if f"{kind}subtb" in row]
    ends = [
        {"step": row["step"]} | {key.removeprefix(kind): value for key, value in row.items() if key.startswith(kind)}
        for row in measured[:1] + measured[1:][-1:]
    ]
    return {"split": "held out" if kind else "train", "ends": ends}


def _doctors_plot(doctors: dict[str, list[Row]]) -> str:
    figure, all_axes = plt.subplots(2, 3, figsize=(11, 5), layout="constrained")
    for axes, (key, label) in zip(all_axes.flat, CURVES, strict=True):
        for n, (name, rows) in enumerate(doctors.items()):
            colour = ARM_COLOURS[n % len(ARM_COLOURS)]
            curve(axes, rows, key, color=colour, alpha=0.7, label=f"{name[:NAME]}, train")
            held_out = {"linestyle": "--", "marker": "o", "markersize": 4}
            curve(axes, rows, f"val/{key}", color=colour, label=f"{name[:NAME]}, held out", **held_out)
        axes.set(xlabel="step", title=label)
        if key in ("subtb", "hinge", "ordered"):
            axes.set_ylim(bottom=0)
        else:
            axes.axhline(0, color="#999", linewidth=0.8)
    figure.legend(*all_axes.flat[0].get_legend_handles_labels(), loc="outside lower center", frameon=False, ncols=4)
    return svg(figure)


# ---- assessment ----


def _scores_plot(arms: dict[str, Row], objectives: Sequence[str]) -> str:
    """Mean scores with intervals; the first arm's mean is a line through the others."""
    size = (1.8 + 3.4 * len(objectives), 0.9 + 0.28 * len(arms))
    figure, all_axes = plt.subplots(1, len(objectives), figsize=size, squeeze=False, sharey=True)
    for axes, objective in zip(all_axes[0], objectives, strict=True):
        scores = [arm["objectives"][objective]["score"] for arm in arms.values()]
        means = [score[0] for score in scores]
        axes.errorbar(means, range(len(arms)), xerr=_spread(scores), fmt="o", color=ARM_COLOURS[0], capsize=3)
        axes.axvline(means[0], color="#444", linewidth=0.8, linestyle="--")
        axes.set(xlabel="mean score", title=objective[:NAME])
    all_axes[0][0].set_yticks(range(len(arms)), [label[:NAME] for label in arms])
    all_axes[0][0].invert_yaxis()
    return svg(figure)


def _spread(scores: Sequence[Sequence[float]]) -> list[list[float]]:
    """[mean, low, high] of each as matplotlib wants it; a bootstrap's interval need not hold the mean."""
    return [[max(0.0, mean - low) for mean, low, _ in scores], [max(0.0, high - mean) for mean, _, high in scores]]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points that no other beats: none is as good in both and better in one. More is better.

    Equal points stand or fall together. In order of the first coordinate, hence against that of the second.
    """
    kept = [n for n, (x, y) in enumerate(points) if not any(a >= x and b >= y and (a > x or b > y) for a, b in points)]
    return sorted(kept, key=lambda n: points[n])


def _pareto(arms: dict[str, Row], first: str, second: str) -> Row:
    labels = list(arms)
    points = [(arm["objectives"][first]["score"][0], arm["objectives"][second]["score"][0]) for arm in arms.values()]
    return {"objectives": [first, second], "front": [labels[n] for n in pareto_front(points)]}


def _pareto_plot(arms: dict[str, Row], pareto: Row) -> str:
    figure, axes = plt.subplots(figsize=(6.4, 4.6))
    across, up = ([arm["objectives"][o]["score"] for arm in arms.values()] for o in pareto["objectives"])
    x, y = [score[0] for score in across], [score[0] for score in up]
    axes.errorbar(x, y, xerr=_spread(across), yerr=_spread(up), fmt="none", ecolor="#b9b9b9", elinewidth=1)
    places = {label: n for n, label in enumerate(arms)}
    front = [places[label] for label in pareto["front"]]
    axes.plot([x[n] for n in front], [y[n] for n in front], color="#2a7f3b", drawstyle="steps-pre", linewidth=1.4)
    for inside, marker, colour in ((True, "o", "#2a7f3b"), (False, "s", "#8a8a8a")):
        mine = [n for n in range(len(arms)) if (n in front) == inside]
        axes.scatter([x[n] for n in mine], [y[n] for n in mine], marker=marker, color=colour, zorder=3)
    for label, n in places.items():
        weight = "bold" if n in front else "normal"
        axes.annotate(label[:NAME], (x[n], y[n]), xytext=(5, 5), textcoords="offset points", weight=weight)
    axes.set(**{f"{side}label": f"{o[:NAME]}, mean score" for side, o in zip("xy", pareto["objectives"], strict=True)})
    return svg(figure)


def traces(recipe: Recipe) -> Row | None:
    """Answers with a trace, by prompt: the first of each arm. Whole prompts, as many as fit; the first may be cut."""
    path = recipe.path("assessment.jsonl")
    read_header(path, "assessment")
    prompts: dict[Any, dict[str, Row]] = {}
    for row in read_rows(path):
        if row.get("trace") and (row["prompt"] in prompts or len(prompts) < SHOWN_TRACES):
            prompts.setdefault(row["prompt"], {}).setdefault(row["arm"], row)
    groups: list[Row] = []
    left = SHOWN_TRACES
    for by_arm in prompts.values():
        rows = list(by_arm.values())
        if groups and len(rows) > left:
            break
        rows, left = rows[:left], left - len(rows)
        groups.append({"asked": rows[0]["asked"], "answers": [_traced(row) for row in rows]})
    top = max((t[3] for group in groups for answer in group["answers"] for t in answer["tokens"]), default=0.0)
    return {"prompts": groups, "largest_kl": top} if groups else None


def _traced(row: Row) -> Row:
    kept = {key: row[key] for key in ("arm", "kl", "changed", "scores")}
    return kept | {"tokens": row["trace"][:SHOWN_TOKENS], "more": max(0, len(row["trace"]) - SHOWN_TOKENS)}
