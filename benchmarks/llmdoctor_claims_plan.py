"""Which contestants `llmdoctor_claims.py` has, at which settings, and the jobs that train them and let them answer."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llmdoctor_claims_arms as arms
import numpy as np
from claims import Job, Result
from llmdoctor_claims_arms import ALONE, BRIEF, KIND, Contestant, Way, World

from nemo_pivotrl.core.artifacts import digest

TUNING_SEEDS = (100, 101)
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Size:
    """How large everything is."""

    overrides: tuple[str, ...]
    rates: tuple[float, ...]
    weights: tuple[float, ...]
    betas: tuple[float, ...]
    """Of DPO on the patient, in place of weights."""
    patients: tuple[int, ...]
    """Hidden sizes of the other patients."""
    beyond: tuple[tuple[float, float], ...] = ()
    """(rate, beta) of DPO on the patient beyond the edges of the grid on which its best lies."""


FULL = Size(
    ("manners.doctor_hidden_size=80", "tfpo.pairs_per_step=16"),
    rates=(3e-5, 1e-4, 3e-4, 1e-3),
    weights=(0.5, 1.0, 2.0),
    betas=(0.1, 0.3, 1.0),
    patients=(64, 128),
    beyond=((1e-5, 1.0), (3e-5, 3.0)),
)
QUICK = Size(
    (
        *(
            "manners.lessons=300",
            "manners.num_steps=60",
            "manners.hidden_size=32",
            "manners.layers=1",
            "manners.heads=2",
        ),
        *(
            "manners.doctor_hidden_size=16",
            "manners.doctor_layers=1",
            "manners.batch_size=16",
            "decode.max_new_tokens=24",
        ),
        *("tfpo.max_num_steps=2", "tfpo.pairs_per_step=4", "assess.limit=3", "assess.samples=2"),
    ),
    rates=(1e-3,),
    weights=(1.0,),
    betas=(0.1,),
    patients=(16,),
)


def tfpo(**fields: Any) -> Contestant:
    """TFPO's doctor with fields of the recipe's `tfpo` section, or of Contestant."""
    own = {f.name for f in dataclasses.fields(Contestant)}
    given = {name: value for name, value in fields.items() if name not in own}
    settings = {"anchor": "reference"} | given
    return Contestant("tfpo", tfpo=tuple(settings.items()), **{k: v for k, v in fields.items() if k in own})


DOCTOR, STRONGER, LITERAL = "LLMdoctor", "LLMdoctor, kappa 2", "LLMdoctor, no anchor"
DOCTORS = {
    DOCTOR: tfpo(),
    STRONGER: tfpo(kappa=2.0),
    LITERAL: tfpo(anchor="none"),
    "GenARM": Contestant("arm", beta=0.05),
    "DPO on the doctor": Contestant("dpo", beta=0.1),
}
TUNED = "DPO on the patient"
ARGS, BEST_OF = "ARGS", "best of n"
START = "start model as a doctor"
ABLATIONS = {
    "no SubTB, the hinge alone": tfpo(subtb=False),
    "no hinge": tfpo(value_weight=0.0),
    "no sparsity (theta 0)": tfpo(theta=0.0),
    "no token rewards: spread evenly": tfpo(spread="even"),
    "no token rewards: at the end": tfpo(spread="end"),
    "no anchor, no hinge": tfpo(anchor="none", value_weight=0.0),
    "no anchor, theta 0": tfpo(anchor="none", theta=0.0),
    "no anchor, spread evenly": tfpo(anchor="none", spread="even"),
}
SWEEPS = {
    "theta 0.1": tfpo(theta=0.1),
    "theta 0.25": tfpo(theta=0.25),
    "theta 0.76": tfpo(theta=0.76),
    "kappa 0.5": tfpo(kappa=0.5),
    "kappa 2": tfpo(kappa=2.0),
    "kappa 4": tfpo(kappa=4.0),
    "hinge weight 10": tfpo(value_weight=10.0),
    "log V free at the end": tfpo(ended=False),
    "no anchor, log V free at the end": tfpo(anchor="none", ended=False),
    "kappa 20 over length": tfpo(kappa=20.0, length_normalize=True),
}


def base_of(variant: str) -> str:
    """What a variant is compared with: it differs from that in one thing, and answers in its mode."""
    return LITERAL if variant.startswith("no anchor") else DOCTOR


def job(root: Path, name: str, work: Callable[..., Result], *arguments: Any) -> Job:
    """Its folder is named after its arguments too: other settings are another job, wherever the folder lies."""
    plain = [dataclasses.asdict(a) if dataclasses.is_dataclass(a) else a for a in arguments]
    settings = digest(repr(plain).replace(f"{root.parent}/", ""), 8)
    return Job(root / f"{re.sub('[^a-z0-9/]+', '-', name.lower())}-{settings}", work, arguments)


def ways(size: Size) -> list[Way]:
    return [Way(mode, weight) for mode in ("product", "ratio") for weight in size.weights]


# ---- tuning ----


def tuning_jobs(root: Path, world: World, size: Size) -> dict[tuple[str, float, float], Job]:
    """(contestant, learning rate, DPO's beta or 0) -> job."""
    jobs = {}
    for rate in size.rates:
        for name, contestant in DOCTORS.items():
            found = [*ways(size), ALONE] if contestant.loss == "dpo" else ways(size)
            jobs[name, rate, 0.0] = job(
                root, f"tune/{name}", arms.contest, world, contestant, rate, "validation", found
            )
        jobs[ARGS, rate, 0.0] = job(root, "tune/search", arms.search, world, rate, "validation", size.weights, True)
    tuned = [(rate, beta) for rate in size.rates for beta in size.betas]
    for rate, beta in (*tuned, *size.beyond):
        contestant = Contestant("dpo", beta=beta, on_patient=True)
        jobs[TUNED, rate, beta] = job(root, "tune/tuned", arms.contest, world, contestant, rate, "validation", [ALONE])
    jobs[START, 0.0, 0.0] = job(
        root, "tune/start", arms.contest, world, Contestant("none"), 0.0, "validation", ways(size)
    )
    return jobs


Choice = tuple[float, float, str]
"""(learning rate, DPO's beta or 0, label of the arm)"""


def grid(found: Mapping[int, Mapping[tuple[str, float, float], Result]]) -> dict[str, dict[Choice, float]]:
    """Contestant -> setting -> mean worth over the tuning seeds."""
    table: dict[str, dict[Choice, float]] = {}
    by_seed = list(found.values())
    for name, rate, beta in by_seed[0]:
        for label in by_seed[0][name, rate, beta]["arms"]:
            rows = [row for seed in by_seed for row in seed[name, rate, beta]["arms"][label]]
            who = BEST_OF if "best of" in label else name
            if not label.startswith("oracle"):
                table.setdefault(who, {})[rate, beta, label] = float(np.mean([r["worth"][KIND] for r in rows]))
    return table


def chosen(table: Mapping[str, Mapping[Choice, float]]) -> dict[str, Choice]:
    """The best setting of each; the smaller learning rate among equals."""
    return {name: max(cells, key=lambda c: (cells[c], -c[0])) for name, cells in table.items()}


def way_of(choice: Choice) -> Way:
    mode, weight = choice[2].split()
    return Way(mode, float(weight))


# ---- reported seeds ----


def reported_jobs(root: Path, world: World, size: Size, best: Mapping[str, Choice]) -> dict[str, Job]:
    """What a reported seed trains on its own."""
    every = ways(size)
    jobs = {"patient": job(root, "patient", arms.patient_alone, world)}

    def contest(name: str, contestant: Contestant, rate: float, found: Sequence[Way]) -> None:
        jobs[name] = job(root, name, arms.contest, world, contestant, rate, "test", found)

    for name, contestant in DOCTORS.items():
        contest(name, contestant, best[name][0], [*every, ALONE] if contestant.loss == "dpo" else every)
    contest(START, Contestant("none"), 0.0, every)
    tuned = Contestant("dpo", beta=best[TUNED][1], on_patient=True)
    contest(TUNED, tuned, best[TUNED][0], [ALONE])
    weight = float(best[ARGS][2].split()[1])
    jobs[ARGS] = job(root, "args", arms.search, world, best[ARGS][0], "test", [weight], False)
    jobs[BEST_OF] = job(root, "best-of-n", arms.search, world, best[BEST_OF][0], "test", [], True)
    for name, contestant in (ABLATIONS | SWEEPS).items():
        base = base_of(name)
        mode = way_of(best[base]).mode
        contest(name, contestant, best[base][0], [way for way in every if way.mode == mode])
    for name in (DOCTOR, LITERAL, "GenARM"):
        contest(f"{name}, brevity", dataclasses.replace(DOCTORS[name], objective=BRIEF), best[name][0], [])
    contest(f"{TUNED}, brevity", dataclasses.replace(tuned, objective=BRIEF), best[TUNED][0], [])
    return jobs


def later_jobs(
    root: Path, world: World, size: Size, best: Mapping[str, Choice], models: Mapping[str, str]
) -> dict[str, Job]:
    """What needs models of the same seed's earlier jobs."""
    jobs = {}
    doctors = {name: (models[name], way_of(best[name])) for name in (DOCTOR, LITERAL)}
    tuned = Contestant("dpo", beta=best[TUNED][1], on_patient=True)
    for hidden in size.patients:
        patient = f"{world.run_dir}/patient-{hidden}/policy"
        jobs[f"patient {hidden}"] = job(
            root, f"patient-{hidden}", arms.weak_to_strong, world, patient, doctors, tuned, best[TUNED][0]
        )
    for name in (DOCTOR, LITERAL, "GenARM"):
        both = {KIND: models[name], BRIEF: models[f"{name}, brevity"]}
        jobs[f"front {name}"] = job(root, "front", arms.front, world, both, way_of(best[name]), SHARES, False)
    both = {KIND: models[TUNED], BRIEF: models[f"{TUNED}, brevity"]}
    jobs["front reward soup"] = job(root, "soup", arms.front, world, both, ALONE, SHARES, True)
    signals = {
        "LLMdoctor, log_ratio": models[DOCTOR],
        "LLMdoctor, flow": models[DOCTOR],
        "LLMdoctor, value": models[DOCTOR],
        "LLMdoctor, no anchor, log_prob": models[LITERAL],
        "LLMdoctor, no anchor, value": models[LITERAL],
        "GenARM, log_prob": models["GenARM"],
        "DPO on the doctor, log_ratio": models["DPO on the doctor"],
        "reward model, value": models[ARGS],
    }
    jobs["early signal"] = job(root, "early", arms.early_signal, world, signals)
    return jobs
