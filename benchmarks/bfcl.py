"""A real model on a public benchmark: SmolLM2-135M-Instruct on BFCL, by every stage and arm of PivotRL.

    python benchmarks/bfcl.py [--seeds 0] [--arms sft adv all mixed strict] [--limit N] [KEY=VALUE ...]

It runs the product's own commands on recipes/pivotrl/smollm2-135m-cpu-bfcl.yaml, one after another, as a user would, each with
KEY=VALUE behind it, in an environment that has vLLM. What is done is not done again: kill it and give the same command. Everything
lies under runs/bfcl; `bfcl_tables.py` has BFCL's checker grade it and writes the tables. `make bfcl` does all of it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bfcl_data import CATEGORIES, SPLITS, data_folder, write_splits

RECIPE = "recipes/pivotrl/smollm2-135m-cpu-bfcl.yaml"
HERE = Path(__file__).parent
RUNS = Path("runs/bfcl")
BASE = "runs/smollm2/base"
SHARES = dict(zip(SPLITS, (0.15, 0.5, 0.35), strict=True))
PIVOTS = ("adv", "mixed", "all", "strict")
ARMS = ("sft", *PIVOTS)
EXACT = ("verifier.name=exact", "verifier.settings={}")

Step = tuple[str, list[str]]
"""Name and the command's words behind `nemo-pivotrl`."""


def steps(seed: int, arms: Sequence[str]) -> Iterator[Step]:
    """Every command of a seed, in order: the start policy, the profile, the arms and their tests."""
    at = RUNS / f"seed-{seed}"
    own = [f"seed={seed}", f"policy.model_name={at}/warm/start/policy"]

    def files(folder: Path, split: str, share: float) -> list[str]:
        data = f"extract.trajectories=[{RUNS}/data-{seed}/{split}.jsonl]"
        return [RECIPE, *own, f"run_dir={folder}", data, f"extract.validation_share={share}"]

    def tested(label: str, policy: Path) -> Iterator[Step]:
        words = files(at / f"test-{label}", "test", 1)
        asked = [f"evaluate.policies={{{label}: {policy}}}", f"evaluate.retention={RUNS}/questions.jsonl"]
        yield f"test-{label}-extract", ["extract", *words]
        yield f"test-{label}", ["evaluate", *words, *asked, "evaluate.trials=1"]

    warm, main = [*files(at / "warm", "warmup", 0), "warmup.name=start"], files(at, "train", 0.2)
    yield "warm-extract", ["extract", *warm]
    yield "warm", ["warmup", *warm]
    yield "extract", ["extract", *main]
    yield "audit", ["audit", *main, "audit.sample=0"]
    yield from tested("start", at / "warm/start/policy")
    if set(arms) & set(PIVOTS):
        yield "profile", ["profile", *main]
    for arm in arms:
        if arm == "sft":  # in a run folder of its own, so that it may run beside the others
            beside = files(at / "fine-tuning", "train", 0.2)
            yield "sft-extract", ["extract", *beside]
            yield "sft", ["sft", *beside]
        else:
            exact = EXACT if arm == "strict" else ()
            chosen = [f"select.rule={'adv' if arm == 'strict' else arm}", f"select.output={arm}.jsonl"]
            if (
                arm == "strict"
            ):  # what was not drawn under the other verifier stays undrawn: pivots go by the rate of what was
                yield "rescore", ["rescore", *main, *exact]
                chosen += ["select.profiles=profiles.rescored.jsonl", "select.undecided=by_rate"]
            yield f"select-{arm}", ["select", *main, *exact, *chosen]
            yield arm, ["train", *main, *exact, f"grpo.name={arm}", f"grpo.pivots={arm}.jsonl"]
        yield from tested(arm, trained_in(seed, arm) / "policy")
    yield from tested("base", Path(BASE))


def trained_in(seed: int, arm: str) -> Path:
    """The folder of an arm's metrics and policy."""
    return RUNS / f"seed-{seed}" / ("fine-tuning/sft" if arm == "sft" else arm)


def run(seed: int, step: Step, more: Sequence[str]) -> None:
    """Run a command unless it has ended well before; note its wall and processor seconds in steps.jsonl. Stops at an error."""
    name, words = step
    folder = RUNS / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "steps.jsonl"
    words = [*words, *more]
    digest = hashlib.sha256(" ".join(words).encode()).hexdigest()[:12]
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if any(row["step"] == name and row["digest"] == digest for row in done):
        return
    print(f"\n== seed {seed}: nemo-pivotrl {shlex.join(words)}", flush=True)
    began, before = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    code = subprocess.run([sys.executable, "-m", "nemo_pivotrl.cli", *words], check=False).returncode
    if code:
        sys.exit(f"{name} ended with {code}; mend it and give the same command again: what is done stays")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    row = {
        "step": name,
        "digest": digest,
        "command": shlex.join(["nemo-pivotrl", *words]),
        "wall_s": round(time.time() - began, 1),
        "cpu_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "load": round(os.getloadavg()[0], 1),
    }
    with log.open("a") as file:
        file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=["sft", "adv", "all"])
    parser.add_argument("--categories", nargs="+", choices=CATEGORIES, default=["simple_python", "parallel"])
    parser.add_argument("--trained", nargs="+", choices=CATEGORIES, default=["simple_python"], help="of the train rows")
    parser.add_argument("--limit", type=int, default=0, help="rows of each split at most; 0: all")
    parser.add_argument("--checker", default=".venv-bfcl/bin/python", help="a Python that has bfcl-eval")
    options, more = parser.parse_known_args()
    if wrong := [word for word in more if "=" not in word or word.startswith("-")]:
        parser.error(f"unknown: {' '.join(wrong)}; settings are KEY=VALUE")
    if not (RUNS / "talk.jsonl").exists():
        subprocess.run([options.checker, str(HERE / "bfcl_ood.py"), "texts", str(RUNS)], check=True)
    for seed in options.seeds:
        target = RUNS / f"data-{seed}"
        if not (target / "test.jsonl").exists():
            counts = write_splits(
                data_folder(options.checker), target, options.categories, options.trained, SHARES, seed, options.limit
            )
            print(f"seed {seed}: {counts} rows, split by function")
        for step in steps(seed, options.arms):
            run(seed, step, more)
    at = RUNS / f"seed-{options.seeds[0]}"
    policies = {"start": at / "warm/start/policy", "base": BASE}
    policies |= {arm: trained_in(options.seeds[0], arm) / "policy" for arm in options.arms}
    words = [f"{label}={folder}" for label, folder in policies.items()]
    subprocess.run([sys.executable, str(HERE / "bfcl_ood.py"), "likelihood", str(RUNS), *words], check=True)


if __name__ == "__main__":
    main()
