"""TFPO's doctor against DPO and GenARM's autoregressive reward model on the embedded world.

    nemo-pivotrl run recipes/llmdoctor/tiny.yaml run_dir=runs/llmdoctor
    python benchmarks/llmdoctor_baselines.py --run-dir runs/llmdoctor --out runs/llmdoctor-baselines
    python benchmarks/llmdoctor_baselines.py --pool OUT OUT ...    # one table over several runs, made with other seeds

Every contestant reads the same preference pairs in the same batches for the same number of steps, with the recipe's
optimiser; its last step counts. Its learning rate is the one of the grid that does best, with weight 1, on the prompts of
the validation pairs, which are none of the test prompts: by the oracle's score, where an answer that the world's grammar
cannot make (`well_formed`) counts as the worst one, since counting kind words alone would choose kind gibberish. Contestants:

- `tfpo`: the recipe's own loss; the patient is steered by doctor / start model (ratio mode), and by the doctor alone as a
  factor (product mode, the paper's form);
- `start`: the doctor's start model, untrained, as a factor: what the product does by itself;
- `dpo`: DPO (Rafailov et al. 2305.18290, Eq. 7, beta 0.1) from the same start model, once as a doctor in ratio mode, once
  answering alone; and with beta 1 (`dpo-b1`), since 0.1 asks these pairs for tens of nats where TFPO asks for about four;
- `arm`: GenARM's autoregressive reward model (Xu et al. 2410.08193, beta_r 0.05), decoding patient * pi_r^weight, the
  weight being the paper's 1 / beta; also in ratio mode, which the paper does not do, to tell the loss from the decoding;
- `tuned`: DPO on the patient itself, which is what steering at test time wants to spare.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from nemo_pivotrl import backends, manners
from nemo_pivotrl.backends.reference_doctor import DoctorModel
from nemo_pivotrl.config import Arm, Doctor, Recipe
from nemo_pivotrl.oracles import load as load_oracles
from nemo_pivotrl.recipe import load_recipe
from nemo_pivotrl.records import read_rows
from nemo_pivotrl.stages import assess, tfpo
from nemo_pivotrl.stages.decode import Prompt, load, prompt_ids, read_prompts
from nemo_pivotrl.stages.rollout import load_chat

RECIPE = Path(__file__).resolve().parents[1] / "recipes/llmdoctor/tiny.yaml"
OBJECTIVE = "kindness"
WEIGHTS = (0.5, 1.0, 2.0)


# ---- the baselines' losses ----


def dpo_loss(log_probs: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Sum over pairs of -log sigmoid(beta * ((w - w_ref) - (l - l_ref))), w and l the answers' log-probabilities.

    log_probs, reference [2P, T] nats, 0 on padding; rows 2p and 2p+1 are the chosen and the rejected answer of pair p.
    """
    moved = (log_probs - reference).sum(1)
    return -logsigmoid(beta * (moved[::2] - moved[1::2])).sum()


def arm_loss(log_probs: Tensor, beta: float) -> Tensor:
    """Sum over pairs of -log sigmoid(beta * (w - l)): the reward of an answer is its own log-probability, and no reference
    holds it; rows as in `dpo_loss`."""
    total = log_probs.sum(1)
    return -logsigmoid(beta * (total[::2] - total[1::2])).sum()


# ---- a second oracle: is it an answer at all? ----


def well_formed(asked: str, text: str) -> bool:
    """Whether the world's grammar makes `text` as an answer about the thing that was asked about, tones mixed or not."""

    def one_of(*groups: Sequence[str]) -> str:
        return f"(?:{'|'.join(re.escape(words) for group in groups for words in group)})"

    thing = next(thing for thing in manners.THINGS if thing in asked.split())
    tones = manners.MANNERS.values()
    start, quality, close = (one_of(*(tone[part] for tone in tones)) for part in ("open", "quality", "close"))
    long = rf"{start} , the {thing} is {quality} and {quality} , it is {one_of(manners.FACTS)} , {close} \."
    return re.fullmatch(rf"the {thing} is {quality} \.|{long}", text) is not None


# ---- contestants ----


class Contestant(NamedTuple):
    """Something that is trained."""

    loss: str
    """`tfpo`, `dpo` or `arm`."""
    beta: float = 0.0
    """The baseline's own, in its loss."""
    on_patient: bool = False


CONTESTANTS = {
    "tfpo": Contestant("tfpo"),
    "dpo": Contestant("dpo", 0.1),
    "dpo-b1": Contestant("dpo", 1.0),
    "arm": Contestant("arm", 0.05),
    "tuned": Contestant("dpo", 0.1, on_patient=True),
}


class Way(NamedTuple):
    """One way of answering with what was trained; `alone` is the model without the patient."""

    mode: str
    weight: float


ALONE = Way("alone", 1.0)
RATIO, PRODUCT = ([Way(mode, w) for w in WEIGHTS] for mode in ("ratio", "product"))
WAYS = {
    "tfpo": [*RATIO, *PRODUCT],
    "dpo": [*RATIO, ALONE],
    "dpo-b1": [*RATIO, ALONE],
    "arm": [*PRODUCT, *RATIO],
    "tuned": [ALONE],
}
CHOSEN_BY = {name: next(way for way in ways if way.weight == 1) for name, ways in WAYS.items()}


def run(backend: DoctorModel, pairs: Sequence[tfpo.Pair], contestant: Contestant, recipe: Recipe) -> dict[str, float]:
    """Loss and gradient of one batch, a mean over its pairs."""
    if contestant.loss == "tfpo":
        return tfpo._run(backend, pairs, tfpo.tfpo_settings(recipe))

    def loss_fn(
        log_probs: Tensor, log_values: Tensor, reference: Tensor | None, token_ids: Tensor, data: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if contestant.loss == "arm":
            loss = arm_loss(log_probs, contestant.beta) / len(pairs)
        else:
            assert reference is not None
            loss = dpo_loss(log_probs, reference, contestant.beta) / len(pairs)
        return loss, {"loss": loss.detach()}

    return backend.get_pair_loss_and_metrics(tfpo.batch_of(pairs), loss_fn)


def train(recipe: Recipe, contestant: Contestant, lr: float, folder: Path) -> Path:
    """The contestant after the recipe's steps at learning rate `lr`, as an ordinary checkpoint in `folder`."""
    start = recipe.patient.model_name if contestant.on_patient else recipe.doctor.model_name
    policy = dataclasses.replace(recipe.doctor, model_name=start)
    backend = backends.load_doctor(policy, anchored=contestant.loss != "arm")
    backend.prepare_for_training(dataclasses.replace(policy.optimizer, lr=lr))
    pairs, _ = tfpo._pairs(recipe, recipe.path("token_rewards.jsonl"))
    for step in range(1, recipe.tfpo.max_num_steps + 1):
        backend.prepare_for_training_step()
        run(backend, tfpo._draw(pairs, step, recipe), contestant, recipe)
        backend.finish_training_step()
    backend.export(folder)
    load_chat(policy).tokenizer.save_pretrained(folder)
    return folder


# ---- answering, through the project's own stages ----


def answers(recipe: Recipe, label: str, asked: Sequence[Prompt], folder: Path | None, way: Way) -> list[assess.Row]:
    """Scored answers of the patient (no folder), or of what lies in `folder` used in `way`.

    A model alone is patient^0 * model^1, so that its KL from the patient is known; its time is taken from a run of its own.
    """
    if folder is None:
        return _answers(recipe, label, asked, {}, "product", Arm())
    doctors = {"it": Doctor(path=str(folder), reference=recipe.doctor.model_name if way.mode == "ratio" else "")}
    mode = "ratio" if way.mode == "ratio" else "product"
    arm = Arm(alpha=0.0 if way.mode == "alone" else 1.0, beta={"it": way.weight})
    rows = _answers(recipe, label, asked, doctors, mode, arm)
    if way.mode != "alone":
        return rows
    itself = dataclasses.replace(recipe, patient=dataclasses.replace(recipe.patient, model_name=str(folder)))
    took = _answers(itself, label, asked, {}, "product", Arm())[0]["seconds_per_token"]
    return [row | {"seconds_per_token": took} for row in rows]


def _answers(
    recipe: Recipe, label: str, asked: Sequence[Prompt], doctors: dict[str, Doctor], mode: str, arm: Arm
) -> list[assess.Row]:
    decode = dataclasses.replace(recipe.decode, doctors=doctors, mode=mode)
    recipe = dataclasses.replace(recipe, decode=decode)
    chat, generator, own = load(recipe)
    rendered = [prompt_ids(p.content, p.tools, chat, own) for p in asked]
    judges = load_oracles(recipe.assess.objectives, recipe.oracles)
    return assess._Exam(recipe, asked, rendered, chat, generator, judges).answers(label, arm)


def worth(row: assess.Row, objective: str) -> float:
    """The oracle's score, or its least one for what is no answer."""
    return float(row["scores"][objective]) if well_formed(row["asked"], row["text"]) else -1.0


def choose(recipe: Recipe, out: Path, grid: Sequence[float]) -> dict[str, Path]:
    """Train every contestant at every learning rate, and keep the one that does best on the validation prompts."""
    pairs = read_rows(recipe.path("preferences.jsonl"))
    held_out = {
        row["prompt"][-1]["content"]
        for row in pairs
        if row["split"] == "validation" and row["objective"] == recipe.tfpo.objective
    }
    asked = [
        Prompt(str(i), ({"role": "user", "content": text},), (), 1.0, {}, i) for i, text in enumerate(sorted(held_out))
    ]
    several = dataclasses.replace(recipe, assess=dataclasses.replace(recipe.assess, samples=-(-200 // len(asked))))
    objective = recipe.assess.objectives[0]
    print(f"score with ill-formed answers at -1 (KL a token), weight 1, {len(asked)} validation prompts, ", end="")
    print(f"{several.assess.samples} answers each, by learning rate; * is kept\n")
    print(f"{'':<12}" + "".join(f"{lr:>17g}" for lr in grid) + f"{'s a training':>14}")
    kept = {}
    for name, contestant in CONTESTANTS.items():
        found, spent = [], 0.0
        for lr in grid:
            begun = time.process_time()
            folder = train(recipe, contestant, lr, out / f"{name}-{lr:g}")
            spent += time.process_time() - begun
            rows = answers(several, name, asked, folder, CHOSEN_BY[name])
            found.append((fmean(worth(r, objective) for r in rows), -lr, folder, fmean(r["kl"] for r in rows)))
        best = max(found)  # ties go to the smaller rate
        cells = [f"{'*' if f is best else ''}{f[0]:.3f} ({f[3]:.3f})" for f in found]
        print(f"{name:<12}" + "".join(f"{cell:>17}" for cell in cells) + f"{spent / len(grid):>14.1f}", flush=True)
        kept[name] = best[2]
    return kept


def show(summary: dict[str, Any], rows: Sequence[assess.Row], objective: str) -> str:
    """The project's own table and, below it, what that leaves out."""
    heads = ("well formed", "worth", "KL/answer", "cut off", "distinct-2", "different", "ms/token")
    lines = [assess.table(summary), "", f"{'':<20}" + "".join(f"{head:>12}" for head in heads)]
    for label, arm in summary["arms"].items():
        mine = [row for row in rows if row["arm"] == label]
        figures = (
            fmean(well_formed(row["asked"], row["text"]) for row in mine),
            fmean(worth(row, objective) for row in mine),
            fmean(row["kl"] * row["tokens"] for row in mine),
            fmean(row["tokens"] == max(r["tokens"] for r in rows) for row in mine),
            arm["distinct_2"],
            arm["different_answers"],
            1000 * fmean(row["seconds_per_token"] for row in mine),
        )
        lines.append(f"{label:<20}" + "".join(f"{x:>12.3f}" for x in figures))
    lines.append("worth: the score with ill-formed answers at -1; cut off: ended by the limit of new tokens")
    lines.append("different: share of pairs of answers to one prompt; ms/token: wall time of the batch over its tokens")
    return "\n".join(lines)


def tables(rows: Sequence[assess.Row], recipe: Recipe) -> tuple[dict[str, Any], str]:
    """Summary of the answers, and its text; the first row's arm is what the others are compared with."""
    settings = dataclasses.replace(recipe.assess, arms={row["arm"]: Arm() for row in rows})
    summary = assess.summarise(rows, dataclasses.replace(recipe, assess=settings))
    return summary, show(summary, rows, recipe.assess.objectives[0])


def pool(folders: Sequence[Path], recipe: Recipe) -> str:
    """A Markdown table over the answers of several runs, whose prompts count as different ones."""
    rows = []
    for number, folder in enumerate(folders):
        lines = (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()
        rows += [row | {"run": number, "prompt": (number, row["prompt"])} for row in map(json.loads, lines)]
    summary, objective = tables(rows, recipe)[0], recipe.assess.objectives[0]
    heads = ("arm", f"{objective} score", "win / tie / lose %", "KL a token", "well formed", "worth", "worth by seed")
    heads += ("distinct-2", "tokens", "ms a token")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for label, arm in summary["arms"].items():
        mine = [row for row in rows if row["arm"] == label]
        found = arm["objectives"][objective]
        by_run = [fmean(worth(r, objective) for r in mine if r["run"] == n) for n in range(len(folders))]
        cells = (
            label,
            "{:.3f} [{:.3f}, {:.3f}]".format(*found["score"]),
            "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * x for x in found["win"]))
            + f" / {100 * found['tie'][0]:.1f} / {100 * found['lose'][0]:.1f}",
            f"{arm['kl']:.3f}",
            f"{fmean(well_formed(r['asked'], r['text']) for r in mine):.2f}",
            f"{fmean(by_run):.2f}",
            ", ".join(f"{x:.2f}" for x in by_run),
            f"{arm['distinct_2']:.2f}",
            f"{arm['tokens']:.1f}",
            f"{1000 * fmean(r['seconds_per_token'] for r in mine):.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", default="runs/llmdoctor", help="where the recipe was run")
    parser.add_argument("--out", type=Path, default="runs/llmdoctor-baselines", help="folder for all that this makes")
    parser.add_argument("--grid", type=float, nargs="+", default=[1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3])
    parser.add_argument("--pool", type=Path, nargs="+", help="print the tables over these finished --out folders")
    parser.add_argument("override", nargs="*", help="key=value, as for nemo-pivotrl; those the recipe was run with")
    args = parser.parse_args()
    torch.set_num_threads(1)
    only = [f"tfpo.objective={OBJECTIVE}", f"assess.objectives=[{OBJECTIVE}]"]
    recipe = load_recipe(str(RECIPE), [f"run_dir={args.run_dir}", *only, *args.override])
    if args.pool:
        print(pool(args.pool, recipe))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    folders = choose(recipe, args.out, args.grid)
    folders["start"] = Path(recipe.doctor.model_name)
    asked = read_prompts(Path(recipe.assess.prompts), recipe)
    rows = answers(recipe, "patient", asked, None, ALONE)
    for name, ways in (WAYS | {"start": PRODUCT}).items():
        for way in ways:
            label = " ".join([name, way.mode, *([] if way == ALONE else [f"{way.weight:g}"])])
            rows += answers(recipe, label, asked, folders[name], way)
    summary, text = tables(rows, recipe)
    (args.out / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (args.out / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    print(f"\n{text}\n\n{time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
