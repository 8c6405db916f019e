"""The request desk (`recipes/pivotrl/requests.yaml`): every arm at its best rate, several seeds, intervals, one command that resumes.

    python benchmarks/request_desk.py --processes 2

One start policy; each seed has trajectories and tasks of its own. An arm's learning rate is the one of `GRID` whose best checkpoint
has the most successes in validation tasks of the tuning seeds, which are none of the reported ones. What we expected is in
results/request_desk_predictions.md. FOLDER keeps what was made: `start`, and `seed-N/ARM-RATE` for one training with its result.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from claims import ROOT, Job, Result, interval, provenance, results

from nemo_pivotrl.components.metrics import read_metrics
from nemo_pivotrl.config import Recipe
from nemo_pivotrl.core.atomic import write_atomically

GRID = (1e-4, 3e-4, 1e-3, 3e-3)
ARMS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "sft": ("SFT", (), "profiles.jsonl"),
    "mixed": ("PivotRL, `mixed`", ("select.rule=mixed",), "profiles.jsonl"),
    "adv": ("PivotRL, `adv`, lambda 0.6", ("select.rule=adv", "select.lambda_diff=0.6"), "profiles.jsonl"),
    "all": ("no pivot filter (`all`)", ("select.rule=all",), "profiles.jsonl"),
    "strict": ("PivotRL, strict match", ("select.rule=mixed", "verifier.name=exact"), "profiles.exact.jsonl"),
}
"""Name -> (title, settings, profile that it selects from)."""
SETS = ("whole tasks", "seen families", "other families", "held-out turns", "out of domain")


def recipe_of(home: Path, seed: int, *settings: str) -> Recipe:
    """The recipe of one training in `home`, FOLDER/seed-N/ARM-RATE."""
    from nemo_pivotrl.config.load import load_recipe

    start = home.parents[1] / "start/policy"
    own = [f"run_dir={home}", f"seed={seed}", f"policy.model_name={start}", "num_threads=1", "logger.tensorboard=false"]
    return load_recipe(str(ROOT / "recipes/pivotrl/requests.yaml"), [*own, "evaluate.policies={}", *settings])


def start(folder: Path, settings: Sequence[str]) -> Result:
    """Make the start policy, FOLDER/start/policy."""
    from nemo_pivotrl.config.load import load_recipe
    from nemo_pivotrl.pivotrl.sft import warmup

    own = [f"run_dir={folder.parent}", "num_threads=1", *settings]
    warmup(load_recipe(str(ROOT / "recipes/pivotrl/requests.yaml"), own))
    return {}


def data(folder: Path, seed: int, settings: Sequence[str]) -> Result:
    """Trajectories, candidates, the start policy's rollouts of each, the same judged by strict match, and its scores."""
    from nemo_pivotrl.demo.expert_trajectories import make_expert_trajectories
    from nemo_pivotrl.pivotrl.extract import extract
    from nemo_pivotrl.pivotrl.profile import profile
    from nemo_pivotrl.pivotrl.rescore import rescore

    recipe = recipe_of(folder, seed, "profile.curtail=none", *settings)  # strict match judges all rollouts anew
    make_expert_trajectories(recipe)
    extract(recipe)
    profiles = profile(recipe)
    strict = dataclasses.replace(recipe.verifier, name="exact")
    to = dataclasses.replace(recipe.rescore, output="profiles.exact.jsonl")
    rescore(dataclasses.replace(recipe, verifier=strict, rescore=to))
    groups = [[sample["reward"] for sample in row["samples"]] for row in rows_of(profiles) if row["split"] == "train"]
    return {
        "items": scores(recipe, recipe.policy.model_name),
        "candidates": len(groups),
        "turns": sum(map(len, groups)),
        "constant": statistics.fmean(len(set(group)) == 1 for group in groups),
        "always": statistics.fmean(set(group) == {1.0} for group in groups),
    }


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of an artefact."""
    from nemo_pivotrl.core.artifacts import read_rows

    return list(read_rows(path))


def training(folder: Path, seed: int, name: str, lr: float, settings: Sequence[str]) -> Result:
    """Train one arm, publish its best checkpoint, and score that."""
    from nemo_pivotrl.pivotrl.select import select_pivots
    from nemo_pivotrl.pivotrl.sft import sft
    from nemo_pivotrl.pivotrl.train import train

    _, own, profiles = ARMS[name]
    section = "sft" if name == "sft" else "policy"
    recipe = recipe_of(folder, seed, *own, f"{section}.optimizer.lr={lr}", *settings)
    for file in ("trajectories.jsonl", "candidates.jsonl"):
        shutil.copyfile(folder.parent / "data" / file, recipe.path(file))
    shutil.copyfile(folder.parent / "data" / profiles, recipe.path("profiles.jsonl"))
    made: Result = {"pivots": 0, "turns": 0}
    if name == "sft":
        policy, place = sft(recipe), recipe.path("sft")
    else:
        made["pivots"] = sum(row["split"] == "train" for row in rows_of(select_pivots(recipe)))
        policy, place = train(recipe), recipe.path("pivotrl")
        per_step = recipe.grpo.num_prompts_per_step * recipe.grpo.num_generations_per_prompt
        made["turns"] = recipe.grpo.max_num_steps * per_step
    curve = [[row["step"], row["val/tasks"]] for row in read_metrics(place / "metrics.jsonl") if "val/tasks" in row]
    judged = recipe_of(folder, seed, *settings)  # all arms by one verifier
    made |= {"items": scores(judged, str(policy)), "curve": curve}
    for heavy in folder.glob("*/step_*"):  # checkpoints; the published policy stays
        shutil.rmtree(heavy)
    return made


def scores(recipe: Recipe, policy: str) -> dict[str, dict[str, float]]:
    """Set -> item -> mean score of the policy in a folder."""
    from nemo_pivotrl.pivotrl.evaluate import evaluate, read_items

    own = dataclasses.replace(recipe, evaluate=dataclasses.replace(recipe.evaluate, policies={"it": policy}))
    titles = {"multi_turn": "whole tasks", "one_turn": "held-out turns", "retention": "out of domain"}
    found: dict[str, dict[str, float]] = {name: {} for name in SETS}
    for row in read_items(evaluate(own, fresh=True)):
        if row["scores"]:
            names = [titles[row["set"]], *([row["family"]] if row["set"] == "multi_turn" else [])]
            for name in names:
                found[name][row["item"]] = statistics.fmean(row["scores"])
    return found


# ---- the run and its table ----


def best_of(result: Result) -> float:
    """Success in validation tasks of the published checkpoint."""
    return float(max(value for _, value in result["curve"]))


def table(made: dict[str, Result], rates: dict[str, float], seeds: Sequence[int]) -> list[str]:
    """Rows of Markdown: each arm's success in per cent, and the paired change from base."""
    base = [made[f"seed-{seed}/data"]["items"] for seed in seeds]

    def cells(runs: list[Any]) -> list[str]:
        shown = []
        for name in SETS:
            own = [np.array(list(items[name].values())) for items in runs]
            text = f"{100 * float(np.mean([x.mean() for x in own])):.1f}"
            if runs is not base:
                changes = [
                    np.array([items[name][item] - first[name][item] for item in items[name]])
                    for items, first in zip(runs, base, strict=True)
                ]
                text += " ({:+.1f} [{:+.1f}, {:+.1f}])".format(*(100 * x for x in interval(changes)))
            shown.append(text)
        return shown

    lines = [f"| policy | rate | {' | '.join(SETS)} |", "|---|---|" + "---|" * len(SETS)]
    lines.append(f"| base | | {' | '.join(cells(base))} |")
    for name, (title, _, _) in ARMS.items():
        if name in rates:
            runs = [made[f"seed-{seed}/{name}-{rates[name]:g}"]["items"] for seed in seeds]
            lines.append(f"| {title} | {rates[name]:g} | {' | '.join(cells(runs))} |")
    return lines


def against(made: dict[str, Result], rates: dict[str, float], seeds: Sequence[int]) -> list[str]:
    """Rows of Markdown: paired differences between arms in points, 95 % over seeds, then items."""
    lines = [f"| difference | {' | '.join(SETS)} |", "|---|" + "---|" * len(SETS)]
    for one, other in (("mixed", "sft"), ("mixed", "adv"), ("mixed", "all"), ("mixed", "strict")):
        if one in rates and other in rates:
            runs = [[made[f"seed-{s}/{n}-{rates[n]:g}"]["items"] for s in seeds] for n in (one, other)]
            shown = []
            for name in SETS:
                changes = [np.array([a[name][i] - b[name][i] for i in a[name]]) for a, b in zip(*runs, strict=True)]
                shown.append("{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * x for x in interval(changes))))
            lines.append(f"| `{one}` minus `{other}` | {' | '.join(shown)} |")
    return lines


def document(made: dict[str, Result], options: argparse.Namespace, rates: dict[str, float]) -> str:
    """The page of results."""
    seeds = options.seeds
    profiles = [made[f"seed-{seed}/data"] for seed in seeds]
    per_cent = [[f"{100 * p[key]:.0f}" for p in profiles] for key in ("constant", "always")]
    grids = [f"| arm | {' | '.join(f'{lr:g}' for lr in options.grid)} |", "|---|" + "---|" * len(options.grid)]
    for name in rates:
        found = [
            statistics.fmean(best_of(made[f"seed-{seed}/{name}-{lr:g}"]) for seed in options.tuning_seeds)
            for lr in options.grid
        ]
        grids.append(f"| {ARMS[name][0]} | {' | '.join(f'{100 * x:.1f}' for x in found)} |")
    spent = sum(result.get("processor_seconds", 0.0) for result in made.values())
    return "\n".join(
        [
            "# The request desk: results",
            "",
            provenance(seeds),
            f"- tuning seeds: {', '.join(map(str, options.tuning_seeds))}",
            f"- {spent / 60:.0f} minutes of a processor, without the start policy",
            "",
            "Per cent; in brackets the paired change from base with 95 % intervals over seeds, then items. Every arm is its best",
            "checkpoint by 60 validation tasks of seen families. Sampled at T = 1.",
            "",
            *table(made, rates, seeds),
            "",
            "Differences between arms, points:",
            "",
            *against(made, rates, seeds),
            "",
            f"Profile (K 8): {profiles[0]['candidates']} train candidates a seed. By seed {', '.join(per_cent[0])} % of the groups",
            f"have no signal, and {', '.join(per_cent[1])} % of the candidates are always right.",
            "",
            "Success in validation tasks of the best checkpoint on the tuning seeds, per cent, by learning rate:",
            "",
            *grids,
        ]
    )


def main() -> None:
    """Run what is missing, then write the page."""
    options = arguments()
    home, settings = Path(options.folder).resolve(), tuple(options.set)
    results([Job(home / "start", start, (settings,))], 1)
    every = [*options.tuning_seeds, *options.seeds]
    made = results([Job(home / f"seed-{seed}/data", data, (seed, settings)) for seed in every], options.processes)

    def jobs(rates: dict[str, Sequence[float]], seeds: Sequence[int]) -> list[Job]:
        return [
            Job(home / f"seed-{seed}/{name}-{lr:g}", training, (seed, name, lr, settings))
            for seed in seeds
            for name, choices in rates.items()
            for lr in choices
        ]

    made |= results(jobs(dict.fromkeys(options.arms, options.grid), options.tuning_seeds), options.processes)

    def tuned(name: str, lr: float) -> float:
        return statistics.fmean(best_of(made[home / f"seed-{s}/{name}-{lr:g}"]) for s in options.tuning_seeds)

    rates = {name: max(options.grid, key=lambda lr, name=name: (tuned(name, lr), -lr)) for name in options.arms}
    made |= results(jobs({name: [lr] for name, lr in rates.items()}, options.seeds), options.processes)
    text = document({str(path.relative_to(home)): result for path, result in made.items()}, options, rates)
    print(text)
    if options.output:
        write_atomically(Path(options.output), text + "\n")


def arguments() -> argparse.Namespace:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    made.add_argument("--tuning-seeds", type=int, nargs="+", default=[101, 102, 103])
    made.add_argument("--grid", type=float, nargs="+", default=list(GRID), help="learning rates of every arm")
    made.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    made.add_argument("--folder", default="runs/request_desk")
    made.add_argument("--processes", type=int, default=2)
    made.add_argument("--output", default="benchmarks/results/request_desk.md", help="of the page; empty: none")
    made.add_argument("--set", nargs="*", default=[], metavar="key=value", help="settings of all arms")
    return made.parse_args()


if __name__ == "__main__":
    main()
