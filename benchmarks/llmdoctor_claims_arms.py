"""What `llmdoctor_claims.py` trains and asks, each function a job of a process: worlds, contestants, and what is done with them.

A job's figures are rows, one an answer; every contestant answers the same questions with the same random numbers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import llmdoctor_baselines as opponents
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemo_pivotrl.algorithms.llmdoctor import doctor_loss, token_rewards
from nemo_pivotrl.algorithms.model_outputs import ModelOutputs
from nemo_pivotrl.backends import loading
from nemo_pivotrl.backends.base import TokenBatch, as_trained
from nemo_pivotrl.backends.reference.guided import GuidedSamplingParams
from nemo_pivotrl.backends.reference.policy import ReferencePolicy
from nemo_pivotrl.components.rollout import load_chat, sample_seed
from nemo_pivotrl.config import Arm, Doctor, Recipe
from nemo_pivotrl.config.load import load_recipe
from nemo_pivotrl.core.artifacts import read_rows
from nemo_pivotrl.data.chat_template import load_tokenizer
from nemo_pivotrl.demo import answer_styles_models as manners_stage, tiny_models as tiny
from nemo_pivotrl.demo.answer_styles import kindness
from nemo_pivotrl.llmdoctor import assess, train_doctor as tfpo
from nemo_pivotrl.llmdoctor.decode import Prompt, load, prompt_ids, read_prompts
from nemo_pivotrl.llmdoctor.oracles import brevity, load as load_oracles
from nemo_pivotrl.llmdoctor.preferences import preferences
from nemo_pivotrl.llmdoctor.rank import rank
from nemo_pivotrl.llmdoctor.reward import build_rewards

RECIPE = Path(__file__).resolve().parents[1] / "recipes/llmdoctor/tiny.yaml"
KIND, BRIEF = "kindness", "brevity"
CANDIDATES = 10
"""ARGS' k."""
BEST_OF = (4, 16)
PLACES = tuple(np.linspace(0, 1, 21).tolist())
"""Relative positions in an answer at which the early-token signal is read."""
Result = dict[str, Any]


class World(NamedTuple):
    """A seed's own patient, novice, questions, pairs and token rewards."""

    run_dir: str
    seed: int
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Contestant:
    """Something that is trained on the pairs."""

    loss: str
    """`tfpo`, `dpo`, `arm`, `reward` (a Bradley-Terry model) or `none` (the start model)."""
    beta: float = 0.0
    """A baseline's own, in its loss."""
    on_patient: bool = False
    objective: str = KIND
    tfpo: tuple[tuple[str, Any], ...] = ()
    """Fields of the recipe's `tfpo` section."""
    theta: float = 0.5
    spread: str = "token"
    """`even`: each answer's rewards, spread evenly over its tokens; `end`: all of them at its last token."""
    ended: bool = True
    """False: log V is free at the end."""
    subtb: bool = True
    """False: only the value hinge is left of the loss."""


class Way(NamedTuple):
    """One way of answering with a trained model; `alone` is the model without the patient."""

    mode: str
    weight: float

    @property
    def label(self) -> str:
        return f"{self.mode} {self.weight:g}"


ALONE = Way("alone", 1.0)


# ---- worlds ----


def recipe_of(world: World) -> Recipe:
    """The tiny recipe in the world's folder, with kindness as the doctor's objective, and kappa 1 where a contestant has no other."""
    own = [f"run_dir={world.run_dir}", f"seed={world.seed}", f"tfpo.objective={KIND}", "tfpo.kappa=1.0"]
    return load_recipe(str(RECIPE), [*own, *world.overrides])


def make_world(folder: Path, world: World) -> Result:
    """Everything that a seed's contestants share, by the recipe's own stages."""
    recipe = recipe_of(world)
    for stage in (manners_stage.make_manners, rank, preferences, build_rewards):
        stage(recipe)
    made = json.loads(recipe.path("token_rewards.json").read_text(encoding="utf-8"))["objectives"]
    sizes = {name: _parameters(recipe.path(f"{name}/policy")) for name in ("patient", "novice")}
    return {"parameters": sizes, "objectives": made}


def _parameters(folder: Path) -> int:
    return sum(weight.numel() for weight in load_file(folder / "model.safetensors").values())


def make_patient(folder: Path, world: World, hidden: int) -> Result:
    """Another patient of the world: the first one's tokenizer, lessons and steps, other width."""
    recipe = recipe_of(world)
    shape = recipe.manners
    tokenizer = load_tokenizer(recipe.patient.model_name)
    init = folder / "init"
    tiny.save(tiny.make_model(tokenizer, hidden, shape.layers, shape.heads, recipe.seed), tokenizer, init)
    lessons = manners_stage.lessons_of(recipe)
    manners_stage.teach(recipe, f"patient-{hidden}", init, lessons, fresh=True)
    return {"parameters": _parameters(recipe.path(f"patient-{hidden}/policy"))}


def with_patient(recipe: Recipe, folder: Path) -> Recipe:
    return dataclasses.replace(recipe, patient=dataclasses.replace(recipe.patient, model_name=str(folder)))


def questions(recipe: Recipe, split: str) -> list[Prompt]:
    """Test: the world's held-out questions. Validation: those of the validation pairs, none of which are trained on."""
    if split == "test":
        return read_prompts(Path(recipe.assess.prompts), recipe)[: recipe.assess.limit or None]
    held_out = {
        row["prompt"][-1]["content"] for row in read_rows(recipe.path("preferences.jsonl")) if row["split"] == split
    }
    return [
        Prompt(str(i), ({"role": "user", "content": text},), (), 1.0, {}, i) for i, text in enumerate(sorted(held_out))
    ]


# ---- training ----


def rewarded(pair: tfpo.Pair, contestant: Contestant, recipe: Recipe) -> tfpo.Pair:
    """The pair with the contestant's rewards, from the importance of its tokens."""
    sides = {}
    for side in ("chosen", "rejected"):
        importance = torch.tensor([pair[side]["importance"]])
        mask, chosen = torch.ones_like(importance, dtype=torch.bool), torch.tensor([side == "chosen"])
        settings = recipe.reward
        found = token_rewards(
            importance, torch.zeros_like(importance), mask, chosen, settings.tau, contestant.theta, settings.eps
        )
        rewards = found.rewards[0]
        if contestant.spread == "even":
            rewards = torch.full_like(rewards, float(rewards.mean()))
        elif contestant.spread == "end":
            rewards = torch.zeros_like(rewards).index_fill(0, torch.tensor([len(rewards) - 1]), float(rewards.sum()))
        sides[side] = pair[side] | {"rewards": rewards.tolist(), "ended": contestant.ended}
    return pair | sides


def pair_loss(contestant: Contestant, recipe: Recipe, pairs: int) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    """The contestant's loss, a mean over pairs, as a doctor's backend takes it."""
    settings = recipe.tfpo

    def loss_fn(outputs: ModelOutputs, data: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        if contestant.loss == "tfpo":
            loss, metrics = doctor_loss(outputs, data, settings, float(pairs))
            if not contestant.subtb:
                balance = dataclasses.replace(settings, value_weight=0.0)
                loss = loss - doctor_loss(outputs, data, balance, float(pairs))[0]
            return loss, metrics
        if contestant.loss == "arm":
            loss = opponents.arm_loss(outputs.log_probs, contestant.beta) / pairs
        elif contestant.loss == "reward":
            assert outputs.values is not None
            loss = opponents.reward_model_loss(outputs.values, data["length"]) / pairs
        else:
            assert outputs.reference is not None
            loss = opponents.dpo_loss(outputs.log_probs, outputs.reference, contestant.beta) / pairs
        return loss, {"loss": loss.detach()}

    return loss_fn


def train(recipe: Recipe, contestant: Contestant, lr: float, folder: Path) -> list[float]:
    """The contestant after the recipe's steps at learning rate `lr` in `folder`, an ordinary checkpoint with the head
    beside it; returns the loss of every step."""
    fields = {"objective": contestant.objective, **dict(contestant.tfpo)}
    recipe = dataclasses.replace(recipe, tfpo=dataclasses.replace(recipe.tfpo, **fields))
    start = recipe.patient.model_name if contestant.on_patient else recipe.doctor.model_name
    policy = as_trained(dataclasses.replace(recipe.doctor, model_name=start))
    anchored = contestant.loss == "dpo" or (contestant.loss == "tfpo" and recipe.tfpo.anchor == "reference")
    backend = loading.load(policy, value_head=True, reference=anchored, section="doctor")
    backend.prepare_for_training(dataclasses.replace(policy.optimizer, lr=lr))
    pairs = [rewarded(pair, contestant, recipe) for pair in tfpo._pairs(recipe, recipe.path("token_rewards.jsonl"))[0]]
    loss_fn = pair_loss(contestant, recipe, recipe.tfpo.pairs_per_step)
    losses = []
    for step in range(1, recipe.tfpo.max_num_steps + 1):
        backend.prepare_for_training_step()
        batch = tfpo.batch_of(tfpo._draw(pairs, step, recipe))
        losses.append(backend.get_loss_and_metrics(batch, loss_fn, reference=anchored)["loss"])
        backend.finish_training_step()
    backend.export(folder)
    load_chat(policy).tokenizer.save_pretrained(folder)
    torch.save(backend.head.state_dict(), folder / "head.pt")
    return losses


def trained(recipe: Recipe, folder: Path) -> ReferencePolicy:
    """What `train` left in `folder`, with its head; a start model has a head of zeros."""
    model = ReferencePolicy(as_trained(dataclasses.replace(recipe.doctor, model_name=str(folder))), value_head=True)
    if (folder / "head.pt").exists():
        model.head.load_state_dict(torch.load(folder / "head.pt", weights_only=True))
    return model


# ---- answering ----


def answer(
    recipe: Recipe, asked: Sequence[Prompt], doctors: Mapping[str, Path], mode: str, arms: Mapping[str, Arm]
) -> dict[str, list[Result]]:
    """Rows of each arm, by the project's own stages."""
    reference = recipe.doctor.model_name if mode == "ratio" else ""
    named = {name: Doctor(path=str(folder), reference=reference) for name, folder in doctors.items()}
    recipe = dataclasses.replace(recipe, decode=dataclasses.replace(recipe.decode, doctors=named, mode=mode))
    chat, generator, own = load(recipe)
    rendered = [prompt_ids(p.content, p.tools, chat, own) for p in asked]
    exam = assess._Exam(recipe, asked, rendered, chat, generator, load_oracles([KIND], recipe.oracles))
    rows = {label: exam.answers(label, arm)[0] for label, arm in arms.items()}
    return {
        label: [_row(r["prompt"], r["sample"], r["asked"], r["text"], r["tokens"], r["kl"]) for r in found]
        for label, found in rows.items()
    }


def _row(prompt: int, sample: int, asked: str, text: str, tokens: int, kl: float) -> Result:
    scores = {KIND: kindness(text), BRIEF: brevity(text)}
    return {
        "prompt": prompt,
        "sample": sample,
        "text": text,
        "tokens": tokens,
        "kl": kl,
        "score": scores[KIND],
        "worth": {objective: opponents.worth(asked, text, score) for objective, score in scores.items()},
        "well_formed": opponents.well_formed(asked, text),
    }


def answer_in(recipe: Recipe, asked: Sequence[Prompt], folder: Path, ways: Sequence[Way]) -> dict[str, list[Result]]:
    """Rows of each way of using the one model in `folder`."""
    rows: dict[str, list[Result]] = {}
    for mode in dict.fromkeys(way.mode for way in ways):
        alpha = 0.0 if mode == "alone" else 1.0
        arms = {way.label: Arm(alpha=alpha, beta={"it": way.weight}) for way in ways if way.mode == mode}
        rows |= answer(recipe, asked, {"it": folder}, "product" if mode == "alone" else mode, arms)
    return rows


def answer_alone(recipe: Recipe, asked: Sequence[Prompt]) -> dict[str, list[Result]]:
    """Rows of the patient by itself."""
    arms = {"patient": Arm(), "greedy": Arm(temperature=0.0), "top-p 0.9": Arm(top_p=0.9)}
    return answer(recipe, asked, {}, "product", arms)


# ---- jobs ----


def contest(folder: Path, world: World, contestant: Contestant, lr: float, split: str, ways: Sequence[Way]) -> Result:
    """Train the contestant and let it answer."""
    recipe = recipe_of(world)
    if contestant.loss == "none":
        model, losses = Path(recipe.doctor.model_name), []
    else:
        model = folder / "model"
        losses = train(recipe, contestant, lr, model)
    return {"losses": losses, "arms": answer_in(recipe, _several(recipe, split), model, ways) if ways else {}}


def _several(recipe: Recipe, split: str) -> list[Prompt]:
    """Validation questions are few: each is there several times, as a question of its own."""
    asked = questions(recipe, split)
    if split == "test":
        return asked
    times = -(-(recipe.assess.limit or 36) // len(asked))
    return [dataclasses.replace(p, prompt_id=f"{p.prompt_id} {t}") for t in range(times) for p in asked]


def patient_alone(folder: Path, world: World) -> Result:
    recipe = recipe_of(world)
    return {"arms": answer_alone(recipe, questions(recipe, "test"))}


def search(folder: Path, world: World, lr: float, split: str, weights: Sequence[float], best_of: bool) -> Result:
    """ARGS and best-of-n: those who ask a reward model of whole answers, trained on the same pairs."""
    recipe = recipe_of(world)
    train(recipe, Contestant("reward"), lr, folder / "model")
    asked = _several(recipe, split)
    arms = {f"args {weight:g}": args_rows(recipe, asked, folder / "model", weight) for weight in weights}
    return {"arms": arms | (best_rows(recipe, asked, folder / "model") if best_of else {})}


def _requests(recipe: Recipe, asked: Sequence[Prompt], lot: int) -> list[tuple[int, int, GuidedSamplingParams]]:
    """(question, sample, request), `lot` requests of each sample behind one another, seeded as `assess` seeds them."""
    return [
        (
            p,
            k,
            GuidedSamplingParams(
                max_new_tokens=recipe.decode.max_new_tokens,
                seed=sample_seed("assess", recipe.seed, prompt.prompt_id, k, n),
            ),
        )
        for p, prompt in enumerate(asked)
        for k in range(recipe.assess.samples)
        for n in range(lot)
    ]


def args_rows(recipe: Recipe, asked: Sequence[Prompt], folder: Path, weight: float) -> list[Result]:
    chat, generator, own = load(dataclasses.replace(recipe, decode=dataclasses.replace(recipe.decode, doctors={})))
    rendered = [prompt_ids(p.content, p.tools, chat, own)[0] for p in asked]
    judge, work = trained(recipe, folder), _requests(recipe, asked, 1)
    found = opponents.args_answers(
        generator.patient,
        (judge.model, judge.head),
        [rendered[p] for p, _, _ in work],
        [request for *_, request in work],
        generator.stop_ids,
        weight,
        CANDIDATES,
    )
    return [
        _row(p, k, _asked(asked[p]), chat.decode(a.tokens).strip(), len(a.tokens), a.kl)
        for (p, k, _), a in zip(work, found, strict=True)
    ]


def _asked(prompt: Prompt) -> str:
    return str(prompt.content[-1]["content"])


def best_rows(recipe: Recipe, asked: Sequence[Prompt], folder: Path) -> dict[str, list[Result]]:
    """The patient's best of n, by the reward model, and by the oracle that scores the answers."""
    chat, generator, own = load(dataclasses.replace(recipe, decode=dataclasses.replace(recipe.decode, doctors={})))
    rendered = [prompt_ids(p.content, p.tools, chat, own)[0] for p in asked]
    most = max(BEST_OF)
    work = _requests(recipe, asked, most)
    answers = generator.generate([rendered[p] for p, _, _ in work], [request for *_, request in work])
    rows = [
        _row(p, k, _asked(asked[p]), chat.decode(a.token_ids).strip(), len(a.tokens), 0.0)
        for (p, k, _), a in zip(work, answers, strict=True)
    ]
    judge, rewards = trained(recipe, folder), []
    with torch.no_grad():
        for start in range(0, len(work), 512):
            part = range(start, min(start + 512, len(work)))
            given = [list(answers[i].token_ids) for i in part]
            values = judge.outputs(TokenBatch(rendered, [work[i][0] for i in part], given, {})).values
            rewards += [float(row[len(ids)]) for row, ids in zip(values, given, strict=True)]
    best: dict[str, list[Result]] = {}
    for n in BEST_OF:
        lots = [range(first, first + n) for first in range(0, len(rows), most)]
        best[f"reward model's best of {n}"] = [rows[max(lot, key=lambda i: rewards[i])] for lot in lots]
        best[f"oracle's best of {n}"] = [rows[max(lot, key=lambda i: rows[i]["worth"][KIND])] for lot in lots]
    return best


def weak_to_strong(
    folder: Path, world: World, patient: str, doctors: Mapping[str, tuple[str, Way]], tuned: Contestant, lr: float
) -> Result:
    """A patient alone, steered by doctors that were trained beside another one, and tuned by DPO on the same pairs."""
    recipe = with_patient(recipe_of(world), Path(patient))
    asked = questions(recipe, "test")
    arms = {"patient": answer(recipe, asked, {}, "product", {"patient": Arm()})["patient"]}
    for name, (path, way) in doctors.items():
        arms[name] = answer_in(recipe, asked, Path(path), [way])[way.label]
    train(recipe, tuned, lr, folder / "model")
    return {"arms": arms | {"DPO": answer_in(recipe, asked, folder / "model", [ALONE])[ALONE.label]}}


def front(
    folder: Path, world: World, models: Mapping[str, str], way: Way, shares: Sequence[float], soup: bool
) -> Result:
    """Answers at each share of kindness: two doctors with `way` divided between them, or two tuned patients' soup."""
    recipe = recipe_of(world)
    asked = questions(recipe, "test")
    if not soup:
        arms = {f"{share:g}": Arm(beta={KIND: way.weight * share, BRIEF: way.weight * (1 - share)}) for share in shares}
        return {"arms": answer(recipe, asked, {name: Path(path) for name, path in models.items()}, way.mode, arms)}
    weights = [load_file(Path(models[name]) / "model.safetensors") for name in (KIND, BRIEF)]
    rows = {}
    for share in shares:
        mixed = folder / f"soup-{share:g}"
        mixed.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            if (Path(models[KIND]) / name).exists():
                (mixed / name).write_bytes((Path(models[KIND]) / name).read_bytes())
        save_file(opponents.soup(*weights, share), mixed / "model.safetensors", {"format": "pt"})
        rows[f"{share:g}"] = answer_in(recipe, asked, mixed, [ALONE])[ALONE.label]
    return {"arms": rows}


def early_signal(folder: Path, world: World, models: Mapping[str, str]) -> Result:
    """How far chosen and rejected answers of held-out pairs are apart at each place of them, by each model's signal.

    models: signal to the model that gives it. `log_ratio` is the growth of log pi - log pi_start so far, `log_prob` that of
    log pi, `value` what the head says, `flow` log Q + log V.
    """
    recipe = recipe_of(world)
    held_out = tfpo._pairs(recipe, recipe.path("token_rewards.jsonl"))[1]
    batch = tfpo.batch_of(held_out)
    lengths = batch.data["length"].tolist()
    rewards = torch.nn.functional.pad(batch.data["rewards"].cumsum(1), (1, 0))

    @torch.no_grad()
    def read(path: str) -> tuple[Tensor, Tensor]:
        log_probs, values, _ = trained(recipe, Path(path)).outputs(batch)
        return torch.nn.functional.pad(log_probs.cumsum(1), (1, 0)), values

    start = read(recipe.doctor.model_name)[0]
    gaps = {}
    for name, path in models.items():
        total, values = read(path)
        kind = name.rsplit(" ", 1)[-1]
        signal = {"log_ratio": total - start, "log_prob": total, "value": values, "flow": values + rewards}[kind]
        curves = np.stack([at_places(row[: n + 1].numpy()) for row, n in zip(signal, lengths, strict=True)])
        gaps[name] = (curves[::2] - curves[1::2]).mean(0).tolist()
    return {"gaps": gaps, "pairs": len(held_out)}


def at_places(states: np.ndarray) -> np.ndarray:
    """A signal of an answer's L+1 states at the relative positions `PLACES`, linear between states."""
    return np.interp(np.array(PLACES) * (len(states) - 1), np.arange(len(states)), states)
