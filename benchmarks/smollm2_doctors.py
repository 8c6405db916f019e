"""LLMdoctor on a real model: SmolLM2-135M-Instruct under two oracles of kept libraries, beside GenARM, DPO and best-of-n at equal KL.

    python benchmarks/smollm2_doctors.py [--seed 0] [--only sentiment] [--tables]     # resumes; `make smollm2-doctors` prepares it

The patient answers 260 prompts; each oracle (VADER's sentiment, textstat's Coleman-Liau grade) makes pairs of the answers. On each
oracle's pairs LLMdoctor, GenARM and DPO train the same model (the patient with LoRA) for the same steps on the same batches, and each
answers the same test prompts with the same random numbers at weights whose KL from the patient lies around what is compared.
Answers are patient * (doctor / patient)^weight for all of them: at weight 1 DPO's is the tuned model itself. GenARM answers as its
paper has it, too: patient * doctor^weight. Best of n is chosen by the oracle itself, which no other reads at test time, and by each
trained model. Every step is a job with a file of its own under `--folder`; what is done stays done.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import llmdoctor_claims_arms as arms
import smollm2_doctors_tables as tables
from claims import ROOT, Job, Result, provenance, results
from llmdoctor_claims_arms import Contestant
from smollm2_doctors_data import FACES, ORACLES, write_prompts

from nemo_pivotrl.backends import loading
from nemo_pivotrl.backends.base import TokenBatch, as_trained
from nemo_pivotrl.backends.identity import without_start
from nemo_pivotrl.backends.reference.guided import GuidedSamplingParams
from nemo_pivotrl.backends.reference.policy import ReferencePolicy
from nemo_pivotrl.components.rollout import sample_seed
from nemo_pivotrl.config import Arm, Doctor, Recipe
from nemo_pivotrl.config.load import load_recipe
from nemo_pivotrl.core.artifacts import read_rows
from nemo_pivotrl.core.atomic import write_atomically
from nemo_pivotrl.data.preferences import preference_of_row
from nemo_pivotrl.llmdoctor import assess, train_doctor
from nemo_pivotrl.llmdoctor.contrastive_prompts import FacePrompts, Prepared
from nemo_pivotrl.llmdoctor.decode import load, prompt_ids, read_prompts
from nemo_pivotrl.llmdoctor.oracles import load as load_oracles
from nemo_pivotrl.llmdoctor.preferences import preferences
from nemo_pivotrl.llmdoctor.rank import rank
from nemo_pivotrl.llmdoctor.reward import build_rewards, faces_of, load_patient_chat, reward_wave

RECIPE = Path(__file__).with_name("smollm2_doctors.yaml")
CONTESTANTS = {
    "LLMdoctor": Contestant("tfpo", tfpo=(("kappa", 2.0),)),
    "GenARM": Contestant("arm", beta=0.05),
    "DPO": Contestant("dpo", beta=0.1),
}
"""kappa is the default; the betas are those of GenARM's paper for HH and of DPO's."""
COMPARED = (0.6, 1.5)
"""Nats an answer. From 1 the weight is doubled until the mean KL is above the second, and halved until it is below the first."""
WEIGHTS = (0.03125, 32.0)
"""No weight is smaller or larger."""
BEST_OF = (2, 4, 8)
PROBED = 16
"""Train pairs on which pairs of face prompts are compared."""


def recipe_of(
    run_dir: str, seed: int, objective: str = "", faces: Mapping[str, Mapping[str, str]] | None = None
) -> Recipe:
    """The recipe; of an objective in a run folder of its own behind `run_dir`, so that one may be finished before the other."""
    if not objective:
        return load_recipe(str(RECIPE), [f"run_dir={run_dir}", f"seed={seed}"])
    recipe = load_recipe(str(RECIPE), [f"run_dir={run_dir}-{objective}", f"seed={seed}"])
    files = {objective: (f"{run_dir}/ranked/{objective}.jsonl",)}
    return dataclasses.replace(
        recipe,
        preferences=dataclasses.replace(recipe.preferences, objectives=files),
        tfpo=dataclasses.replace(recipe.tfpo, objective=objective),
        reward=dataclasses.replace(recipe.reward, faces=dict(faces or recipe.reward.faces)),
    )


# ---- what all contestants share ----


def make_pairs(folder: Path, run_dir: str, seed: int) -> Result:
    """The patient's answers and each oracle's pairs of them."""
    recipe = recipe_of(run_dir, seed)
    prompts = write_prompts(ROOT / "recipes/llmdoctor/opinions/train.jsonl", Path(recipe.rank.prompts))
    rank(recipe)
    rows = list(read_rows(preferences(recipe)))
    answers = list(read_rows(recipe.path("answers.jsonl")))
    return {
        "prompts": prompts,
        "answers": len(answers),
        "tokens": sum(len(row["token_ids"]) for row in answers),
        "pairs": {o: sum(row["objective"] == o for row in rows) for o in ORACLES},
    }


def choose_faces(folder: Path, run_dir: str, seed: int, objective: str) -> Result:
    """Of the objective's face prompts those that agree best with the labels of some train pairs: the share of the importance
    that lies on tokens which the answer's own face prefers. Validation and test are not looked at."""
    recipe = recipe_of(run_dir, seed, objective)
    chat = load_patient_chat(recipe.patient)
    scorer = loading.load_scorer(recipe.patient, without_start(recipe.megatron), recipe.vllm)
    found = map(preference_of_row, read_rows(preferences(recipe)))
    pairs = [p for p in found if p.split == "train"][:PROBED]
    probed = []
    for positive, negative in FACES[objective]:
        face = {"positive": positive, "negative": negative}
        own = recipe_of(run_dir, seed, objective, {objective: face})
        prompts = FacePrompts(chat, faces_of(own.reward, [objective]), recipe.patient.max_total_sequence_length)
        ready = [p for p in map(prompts.prepare, pairs) if isinstance(p, Prepared)]
        sides = [row[side] for row in reward_wave(ready, own, scorer) for side in ("chosen", "rejected")]
        importance = [value for side in sides for value in side["importance"]]
        agreement = sum(side["agreement"] for side in sides) / len(sides)
        probed.append(face | {"agreement": agreement, "delta": sum(importance) / len(importance)})
    best = max(probed, key=lambda one: one["agreement"])
    return {"faces": {key: best[key] for key in ("positive", "negative")}, "probed": probed}


def make_rewards(folder: Path, run_dir: str, seed: int, objective: str, face: Mapping[str, str]) -> Result:
    """Token rewards: the patient scores every pair once under both faces."""
    recipe = recipe_of(run_dir, seed, objective, {objective: face})
    build_rewards(recipe)
    summary = json.loads(recipe.path("token_rewards.json").read_text(encoding="utf-8"))
    return {"summary": summary["objectives"][objective]}


def answer_alone(folder: Path, run_dir: str, seed: int) -> Result:
    """The patient's greedy answers, and lots of sampled ones: the first of each lot is the patient, and best-of-n takes from them."""
    recipe = recipe_of(run_dir, seed)
    most = max(BEST_OF)
    exam = _exam(recipe)
    work = [(p, k, n) for p in range(len(exam.asked)) for k in range(recipe.assess.samples) for n in range(most)]
    requests = [
        GuidedSamplingParams(
            max_new_tokens=recipe.decode.max_new_tokens,
            seed=sample_seed("assess", recipe.seed, exam.asked[p].prompt_id, k, n),
        )
        for p, k, n in work
    ]
    answers = exam.generator.generate([exam.rendered[p][0] for p, _, _ in work], requests, [{} for _ in work])
    texts = [exam.chat.decode(a.token_ids).strip() for a in answers]
    scores = {o: list(judge([()] * len(texts), texts)) for o, judge in exam.judges.items()}
    rows = [
        {
            "prompt": p,
            "sample": k,
            "text": text,
            "ids": list(a.token_ids),
            "log_prob": sum(t.patient_log_prob for t in a.tokens),
            "tokens": len(a.tokens),
            "kl": 0.0,
            "scores": {o: found[i] for o, found in scores.items()},
        }
        for i, ((p, k, _), a, text) in enumerate(zip(work, answers, texts, strict=True))
    ]
    lots = [rows[i : i + most] for i in range(0, len(rows), most)]
    greedy = _rows(exam.answers("greedy", Arm(temperature=0.0))[0])
    return {"lots": lots, "greedy": greedy, "prompts": [ids for ids, _ in exam.rendered]}


def _exam(recipe: Recipe) -> assess._Exam:
    chat, generator, own = load(recipe)
    asked = read_prompts(Path(recipe.assess.prompts), recipe)[: recipe.assess.limit or None]
    rendered = [prompt_ids(p.content, p.tools, chat, own) for p in asked]
    return assess._Exam(recipe, asked, rendered, chat, generator, load_oracles(ORACLES, recipe.oracles))


def _rows(found: Sequence[Mapping[str, Any]]) -> list[Result]:
    """Rows of an arm; `kl` is of the whole answer, in nats."""
    return [
        {key: row[key] for key in ("prompt", "sample", "text", "tokens", "scores")} | {"kl": row["kl"] * row["tokens"]}
        for row in found
    ]


# ---- contestants ----


def contest(folder: Path, run_dir: str, seed: int, objective: str, contestant: Contestant, alone: str) -> Result:
    """Train the contestant on the objective's pairs, let it answer at rising weights, and choose among the patient's lots by it."""
    recipe = recipe_of(run_dir, seed, objective)
    model = folder / "model"
    contestant = dataclasses.replace(contestant, objective=objective)
    losses: list[float] = []
    if not (model / "losses.json").exists():
        losses = arms.train(recipe, contestant, recipe.doctor.optimizer.lr, model)
        tables.write_json(model / "losses.json", losses)
    losses = tables.read_json(model / "losses.json")
    reward = _rank_of(recipe, model, tables.read_json(Path(alone)), against_patient=contestant.loss != "arm")
    curve = _curve(recipe, model, "ratio", folder)
    return {"losses": losses, "curve": curve, "reward": reward, "held_out": _held_out(recipe, model)}


def as_product(folder: Path, run_dir: str, seed: int, model: str) -> Result:
    """A trained model's answers as patient * model^weight."""
    return {"curve": _curve(recipe_of(run_dir, seed), Path(model), "product", folder)}


def _curve(recipe: Recipe, model: Path, mode: str, folder: Path) -> dict[str, list[Result]]:
    """Rows of each weight in that mode, from small to large; each weight has a file of its own."""
    doctor = Doctor(path=str(model), reference=recipe.patient.model_name if mode == "ratio" else "")
    steered = dataclasses.replace(recipe, decode=dataclasses.replace(recipe.decode, doctors={"it": doctor}, mode=mode))
    exam: list[assess._Exam] = []

    def at(weight: float) -> list[Result]:
        path = folder / f"{mode}-{weight:g}.json"
        if not path.exists():
            exam.extend([] if exam else [_exam(steered)])
            tables.write_json(path, _rows(exam[0].answers(f"{weight:g}", Arm(beta={"it": weight}))[0]))
        return tables.read_json(path)

    found = around(at, tables.mean_kl)
    return {f"{weight:g}": rows for weight, rows in sorted(found.items())}


def around(at: Callable[[float], list[Result]], kl: Callable[[list[Result]], float]) -> dict[float, list[Result]]:
    """Weight to rows, of as few weights as lie around all that is compared (`COMPARED`)."""
    found = {1.0: at(1.0)}
    low, high = COMPARED
    while kl(found[max(found)]) < high and max(found) < WEIGHTS[1]:
        found[2 * max(found)] = at(2 * max(found))
    while kl(found[min(found)]) > low and min(found) > WEIGHTS[0]:
        found[min(found) / 2] = at(min(found) / 2)
    return found


def _log_probs(policy: ReferencePolicy, batch: TokenBatch) -> list[float]:
    return [float(total) for total in policy.get_inference_log_probs(batch).sum(1)]


def _rank_of(recipe: Recipe, model: Path, alone: Result, against_patient: bool) -> list[list[float]]:
    """What the trained model says of the patient's lots: its log-probability of each answer, over the patient's or alone."""
    rows = [row for lot in alone["lots"] for row in lot]
    policy = _trained(recipe, model)
    found = _log_probs(policy, TokenBatch(alone["prompts"], [r["prompt"] for r in rows], [r["ids"] for r in rows], {}))
    if against_patient:
        found = [total - row["log_prob"] for total, row in zip(found, rows, strict=True)]
    size = len(alone["lots"][0])
    return [found[i : i + size] for i in range(0, len(found), size)]


def _trained(recipe: Recipe, model: Path) -> ReferencePolicy:
    lora = dataclasses.replace(recipe.doctor.lora, enabled=False)
    return ReferencePolicy(as_trained(dataclasses.replace(recipe.doctor, model_name=str(model), lora=lora)))


def _held_out(recipe: Recipe, model: Path) -> Result:
    """Over held-out pairs: in how many the model moved towards the chosen answer, seen from the patient, and by how many nats."""
    pairs = train_doctor._pairs(recipe, recipe.path("token_rewards.jsonl"))[1]
    batch = train_doctor.batch_of(pairs)
    moved = [
        after - before
        for after, before in zip(
            _log_probs(_trained(recipe, model), batch),
            _log_probs(_trained(recipe, Path(recipe.doctor.model_name)), batch),
            strict=True,
        )
    ]
    gaps = [w - r for w, r in zip(moved[::2], moved[1::2], strict=True)]
    return {"pairs": len(gaps), "ordered": sum(gap > 0 for gap in gaps), "gap": sum(gaps) / len(gaps)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", choices=ORACLES, nargs="+", default=list(ORACLES), help="oracles whose doctors are trained"
    )
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("runs/smollm2-doctors"))
    parser.add_argument("--tables", action="store_true", help="write the tables of what is there; run nothing")
    args = parser.parse_args()
    root = args.folder / f"seed-{args.seed}"
    run_dir = str(root / "run")
    make = partial(results, processes=args.processes)

    def one(name: str, work: Any, *more: Any) -> Job:
        return Job(root / name, work, (run_dir, args.seed, *more))

    if not args.tables:
        make([one("pairs", make_pairs)])
        alone = str(root / "alone/result.json")
        for objective in args.only:
            make([one(f"{objective}-faces", choose_faces, objective)])
            face = tables.read_json(root / f"{objective}-faces/result.json")["faces"]
            make([one(f"{objective}-rewards", make_rewards, objective, face), one("alone", answer_alone)])
            make([one(f"{objective}-{name}", contest, objective, c, alone) for name, c in CONTESTANTS.items()])
        for objective in args.only:
            model = str(root / f"{objective}-GenARM/model")
            make([one(f"{objective}-GenARM, product", as_product, model)])
    text, svg = tables.report(root, ORACLES, [*CONTESTANTS, "GenARM, product"], BEST_OF)
    head = provenance([args.seed])
    out = ROOT / "benchmarks/results"
    write_atomically(out / "smollm2_doctors.md", f"{tables.TITLE}\n\n{head}\n\n{text}\n")
    write_atomically(out / "smollm2_doctors.svg", svg + "\n")
    print(out / "smollm2_doctors.md")


if __name__ == "__main__":
    main()
