"""The tables and curves of benchmarks/bfcl.py.

    python benchmarks/bfcl_tables.py [--checker PYTHON] [--seeds 0] [--name bfcl]

It reads what the arms have left under runs/bfcl, has BFCL's checker grade every answer (PYTHON is the interpreter that has
bfcl-eval), and writes benchmarks/results/NAME.md and NAME.svg. Intervals are 95 % percentile bootstraps over rows; of several seeds a
row's values are averaged first, so they say nothing of how seeds differ.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from bfcl import RECIPE, RUNS, trained_in
from bfcl_data import data_folder
from claims import ROOT, provenance

from nemo_pivotrl.components.metrics import read_metrics
from nemo_pivotrl.components.rollout import load_chat
from nemo_pivotrl.components.statistics import bootstrap
from nemo_pivotrl.config.load import load_recipe
from nemo_pivotrl.data.states import candidates_of
from nemo_pivotrl.pivotrl.evaluate import read_items

LABELS = ("base", "start", "sft", "adv", "mixed", "all", "strict")
RESULTS = ROOT / "benchmarks/results"
SHOWN = 8
"""Disagreements of a kind that are named."""
Row = dict[str, Any]


def answers(seed: int) -> list[Row]:
    """Every answer to a test row, with the calls that our parser reads in it (None where it reads none) and our verdict."""
    recipe = load_recipe(RECIPE, [f"policy.model_name={RUNS}/seed-{seed}/warm/start/policy"])
    chat, found = load_chat(recipe.policy, recipe.verifier.limits), []
    for label in LABELS:
        folder = RUNS / f"seed-{seed}/test-{label}"
        if not (folder / "evaluation.json").exists():
            continue
        cases = {c.candidate_id: c for c in candidates_of(folder / "candidates.jsonl", "validation")}
        for item in read_items(folder / "evaluation.jsonl"):
            if item["set"] != "one_turn":
                continue
            case = cases[item["item"]]
            for text, score in zip(item["texts"], item["scores"], strict=True):
                action = chat.parse(text, case.tools)
                calls = [{"name": c.name, "arguments": _object(c.arguments)} for c in action.calls]
                readable = action.kind == "calls" and all(isinstance(c["arguments"], dict) for c in calls)
                found.append(
                    {
                        "id": case.trajectory_id,
                        "category": case.trajectory_id.rpartition("_")[0],
                        "label": label,
                        "seed": seed,
                        "calls": calls if readable else None,
                        "text": text,
                        "ours": score,
                        "expert": [f"{c.name}({c.arguments})" for c in case.expected.calls],
                    }
                )
    return found


def _object(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def graded(rows: list[Row], checker: str, folder: Path) -> list[Row]:
    """The answers with BFCL's verdict."""
    asked, told = RUNS / "answers.jsonl", RUNS / "verdicts.jsonl"
    asked.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    command = [checker, str(ROOT / "benchmarks/bfcl_check.py"), str(folder), str(asked), str(told)]
    subprocess.run(command, check=True)
    return [json.loads(line) for line in told.read_text(encoding="utf-8").splitlines()]


def interval(values: np.ndarray, signed: bool = False) -> str:
    """Mean and interval in per cent."""
    low, high = bootstrap(values, 0.95, 0)
    plus = "+" if signed else ""
    return f"{100 * values.mean():{plus}.1f} [{100 * low:{plus}.1f}, {100 * high:{plus}.1f}]"


def success(rows: list[Row]) -> list[str]:
    """Valid answers of each policy and category, and the paired change from the start policy."""
    of: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        of[row["label"], row["category"]][row["id"]].append(float(row["valid"]))
    categories = sorted({category for _, category in of})
    titles = "".join(f" {c} | from start |" for c in categories)
    lines = [f"| policy |{titles} calls cannot be read |", "|---|" + "---|---|" * len(categories) + "---|"]
    for label in LABELS:
        own = [row for row in rows if row["label"] == label]
        if not own:
            continue
        cells = []
        for category in categories:
            ids = sorted(of[label, category])
            means = np.array([np.mean(of[label, category][i]) for i in ids])
            start = of["start", category]
            change = np.array([np.mean(of[label, category][i]) - np.mean(start[i]) for i in ids if i in start])
            cells += [interval(means), "" if label == "start" or not len(change) else interval(change, True)]
        unread = sum(row["calls"] is None for row in own) / len(own)
        lines.append(f"| {label} | " + " | ".join(cells) + f" | {unread:.1%} |")
    arms = [label for label in LABELS[2:] if any(row["label"] == label for row in rows)]
    lines.append("")
    for first, second in itertools.combinations(arms, 2):
        for category in categories:
            one, other = of[first, category], of[second, category]
            change = np.array([np.mean(other[i]) - np.mean(one[i]) for i in sorted(one) if i in other])
            lines.append(f"{second} minus {first}, {category}: {interval(change, True)}.")
    return lines


def agreement(rows: list[Row]) -> list[str]:
    """Our verdicts beside BFCL's on the same answers, and the disagreements by name."""
    lines = ["| policy | answers | agree | false accepts | false rejects |", "|---|---|---|---|---|"]
    different: dict[str, list[Row]] = {"false accept": [], "false reject": []}
    for label in LABELS:
        counts: Counter[str] = Counter()
        for row in (r for r in rows if r["label"] == label):
            ours = row["ours"] == 1.0
            what = "agree" if ours == row["valid"] else "false accept" if ours else "false reject"
            counts[what] += 1
            if what != "agree":
                different[what].append(row)
        if counts:
            cells = (counts.total(), counts["agree"], counts["false accept"], counts["false reject"])
            lines.append(f"| {label} | " + " | ".join(map(str, cells)) + " |")
    for what, found in different.items():
        seen: set[str] = set()
        for row in found:
            if row["id"] in seen or len(seen) == SHOWN:
                continue
            seen.add(row["id"])
            made = ", ".join(f"{c['name']}({json.dumps(c['arguments'])})" for c in row["calls"] or [])
            lines += ["" if len(seen) > 1 else f"\n{what}s, each row once:\n"] if len(seen) == 1 else []
            lines.append(
                f"- {row['id']}: expert `{'; '.join(row['expert'])[:200]}`, answer `{made[:200]}`. {row['error'][:160]}"
            )
    return lines


def elsewhere(seeds: list[int]) -> list[str]:
    """Out of domain: trivia by `evaluate`, and nats a token of human-written answers."""
    path = RUNS / "likelihoods.json"
    talk = json.loads(path.read_text()) if path.exists() else {}
    lines = ["| policy | trivia, % | nats a token of talk | from start |", "|---|---|---|---|"]
    for label in LABELS:
        items: dict[str, list[float]] = defaultdict(list)
        for seed in seeds:
            path = RUNS / f"seed-{seed}/test-{label}/evaluation.jsonl"
            for item in read_items(path) if path.exists() else ():
                if item["set"] == "retention":
                    items[item["item"]] += item["scores"]
        if not items and label not in talk:
            continue
        trivia = interval(np.array([np.mean(v) for v in items.values()])) if items else ""
        nats = change = ""
        if label in talk:
            found = np.array(talk[label])
            nats = f"{found[:, 0].sum() / found[:, 1].sum():.3f}"
            if "start" in talk and label != "start":
                apart = (found[:, 0] - np.array(talk["start"])[:, 0]) / found[:, 1].mean()
                low, high = bootstrap(apart, 0.95, 0)
                change = f"{apart.mean():+.3f} [{low:+.3f}, {high:+.3f}]"
        lines.append(f"| {label} | {trivia} | {nats} | {change} |")
    return lines


def costs(seeds: list[int]) -> list[str]:
    """What every command took."""
    lines = ["| seed | step | wall, s | processor, s | load |", "|---|---|---|---|---|"]
    for seed in seeds:
        lines += [
            f"| {seed} | {r['step']} | {r['wall_s']:.0f} | {r['cpu_s']:.0f} | {r['load']} |" for r in _steps(seed)
        ]
    return lines


def _steps(seed: int) -> list[Row]:
    path = RUNS / f"seed-{seed}/steps.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def processor_hours(steps: list[Row]) -> dict[str, float]:
    """Arm to hours of a processor: its training and the selection of its turns, rescoring included; what all arms share (warm-up,
    profile, tests) is in none."""
    hours: dict[str, float] = {}
    for label in LABELS[2:]:
        own = {label, f"select-{label}", f"{label}-extract"} | ({"rescore"} if label == "strict" else set())
        if any(row["step"] == label for row in steps):
            hours[label] = sum(row["cpu_s"] for row in steps if row["step"] in own) / 3600
    return hours


def trained(seeds: list[int]) -> list[str]:
    """Of every training: steps, rollouts, tokens, and its validation at the start, at the best and at the last step."""
    head = "| seed | arm | steps | turns | tokens generated | processor, h | signal, first and last fifth |"
    head += " validation: start, best (step), last |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    for seed in seeds:
        spent = processor_hours(_steps(seed))
        for label in LABELS[2:]:
            path = trained_in(seed, label) / "metrics.jsonl"
            rows = list(read_metrics(path)) if path.exists() else []
            if not rows:
                continue
            known = {r["step"]: r["val/accuracy"] for r in rows if "val/accuracy" in r}
            mixed = [r["mixed_group_share"] for r in rows if "mixed_group_share" in r]
            fifth = max(1, len(mixed) // 5)
            signal = f"{np.mean(mixed[:fifth]):.2f}, {np.mean(mixed[-fifth:]):.2f}" if mixed else ""
            best = max(known, key=lambda s: (known[s], -s)) if known else None
            said = f"{known[min(known)]:.3f}, {known[best]:.3f} ({best}), {known[max(known)]:.3f}" if known else ""
            turns, tokens = (sum(r.get(k, 0) for r in rows) for k in ("rollouts", "tokens_generated"))
            hours = f"{spent[label]:.2f}" if label in spent else ""
            lines.append(
                f"| {seed} | {label} | {rows[-1]['step']} | {turns:.0f} | {tokens:.0f} | {hours} | {signal} | {said} |"
            )
    return lines


def plot(seeds: list[int], target: Path) -> None:
    """Validation, reward and signal over the steps."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4))
    titles = {"val/accuracy": "held-out turns", "reward": "reward of a step", "mixed_group_share": "groups with signal"}
    for axis, (metric, title) in zip(axes, titles.items(), strict=True):
        for label in LABELS[2:]:
            for seed in seeds:
                path = trained_in(seed, label) / "metrics.jsonl"
                points = [(r["step"], r[metric]) for r in read_metrics(path) if metric in r] if path.exists() else []
                if points:
                    axis.plot(*zip(*points, strict=True), label=label if seed == seeds[0] else None, marker=".")
        axis.set(title=title, xlabel="step")
    axes[0].legend()
    figure.tight_layout()
    plt.rcParams["svg.hashsalt"] = "bfcl"
    figure.savefig(target, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checker", default=".venv-bfcl/bin/python", help="a Python that has bfcl-eval")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--name", default="bfcl", help="name of the table and the curves in benchmarks/results")
    options = parser.parse_args()
    rows = graded([a for s in options.seeds for a in answers(s)], options.checker, data_folder(options.checker))
    parts = {
        "Test rows by BFCL's own checker, per cent": success(rows),
        "Our verifier beside BFCL's checker, on the same answers": agreement(rows),
        "Out of domain": elsewhere(options.seeds),
        "Training": trained(options.seeds),
        "What every command took": costs(options.seeds),
    }
    text = [f"# SmolLM2-135M-Instruct on BFCL\n\n{provenance(options.seeds)}\n\n![curves]({options.name}.svg)"]
    text += [f"\n## {title}\n\n" + "\n".join(lines) for title, lines in parts.items()]
    target = RESULTS / f"{options.name}.md"
    target.write_text("\n".join(text) + "\n", encoding="utf-8")
    plot(options.seeds, target.with_suffix(".svg"))
    print(f"-> {target}")


if __name__ == "__main__":
    main()
