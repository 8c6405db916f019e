"""`nemo-pivotrl STAGE RECIPE.yaml [key=value ...]`. Nothing heavy is imported before the command line is understood."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, NoReturn

from nemo_pivotrl import __version__
from nemo_pivotrl.core.errors import InputError

if TYPE_CHECKING:
    from nemo_pivotrl.backends.launch import Place
    from nemo_pivotrl.config import Recipe

STAGES = {
    "world": (
        "nemo_pivotrl.demo.expert_trajectories:make_expert_trajectories",
        "write the embedded world's expert trajectories",
    ),
    "extract": ("nemo_pivotrl.pivotrl.extract:extract", "trajectories -> candidates"),
    "warmup": ("nemo_pivotrl.pivotrl.sft:warmup", "make the start policy by a short SFT"),
    "profile": (
        "nemo_pivotrl.pivotrl.profile:profile",
        "candidates -> profiles: K verified rollouts of the start policy each",
    ),
    "merge": ("nemo_pivotrl.pivotrl.profile:merge", "the shards of a profile -> profiles"),
    "audit": ("nemo_pivotrl.pivotrl.verifier_audit:audit", "does the verifier say what is known beforehand?"),
    "rescore": ("nemo_pivotrl.pivotrl.rescore:rescore", "another verifier or threshold over a profile's samples"),
    "select": ("nemo_pivotrl.pivotrl.select:select", "profiles -> pivots"),
    "export": (
        "nemo_pivotrl.pivotrl.export:export",
        "pivots -> NeMo-Gym rows; `export nemo-rl` adds a recipe, `export nemotron` the artefact's files",
    ),
    "nemotron": (
        "nemo_pivotrl.integrations.nemotron:nemotron",
        "extract to train, with the artefacts of Nemotron's pipeline",
    ),
    "sft": ("nemo_pivotrl.pivotrl.sft:sft", "fine-tune on the same data, for comparison"),
    "train": ("nemo_pivotrl.pivotrl.train:train", "pivots -> policy, by single-turn GRPO"),
    "manners": (
        "nemo_pivotrl.demo.answer_styles_models:make_manners",
        "write the embedded patient, doctor and questions",
    ),
    "rank": (
        "nemo_pivotrl.llmdoctor.rank:rank",
        "prompts -> preference files: the patient's own answers, ranked (LLMdoctor)",
    ),
    "tfpo": ("nemo_pivotrl.llmdoctor.train_doctor:tfpo", "token rewards -> doctor (LLMdoctor)"),
    "assess": ("nemo_pivotrl.llmdoctor.assess:assess", "steered answers against others, with intervals (LLMdoctor)"),
    "evaluate": ("nemo_pivotrl.pivotrl.evaluate:evaluate", "policies side by side, with intervals"),
    "preferences": ("nemo_pivotrl.llmdoctor.preferences:preferences", "LLMdoctor: preference files -> preferences"),
    "reward": (
        "nemo_pivotrl.llmdoctor.reward:reward",
        "LLMdoctor: preferences -> token rewards, by the patient's two faces",
    ),
    "decode": (
        "nemo_pivotrl.llmdoctor.decode:decode",
        "LLMdoctor: prompts -> answers of the policy steered by doctors",
    ),
    "report": ("nemo_pivotrl.report.page:report", "one HTML page and its numbers as JSON"),
    "run": (
        "nemo_pivotrl.pipeline:run",
        "all stages of the recipe; profile, select and train again when signal fades (loop.max_rounds)",
    ),
}
TOOLS = {
    "env": "what is installed here, and which recipes could run: env [--json] [FOLDER]",
    "plan": "will it fit, and what will it cost: plan RECIPE [key=value ...] [--json]",
    "preflight": "what would stop a stage, all at once: preflight RECIPE [STAGE] [key=value ...]",
    "compare": "two profiles of the same candidates: what moved, and the pivots: compare A.jsonl B.jsonl [--json] [--lambda L]",
    "verify": "score rows of a file: verify --verifier NAME [--set key=value ...] IN.jsonl OUT.jsonl",
    "serve-verifier": "serve a verifier to NeMo-Gym: serve-verifier --verifier NAME [--port N]",
    "serve": "serve the policy, or the patient with its doctors, by vLLM: serve RECIPE [key=value ...] [--port N] [--refit]",
}
"""Commands that are no stage: they take files or requests, not artefacts."""
EXPORTS = ("nemo-gym", "nemo-rl", "nemotron")
"""`export nemo-rl RECIPE` is `export RECIPE export.target=nemo-rl`."""
CHECKED = ("profile", "sft", "train", "rank", "reward", "tfpo", "decode", "assess")
"""Stages that load a model which must be there already: `tools/checks.py` looks at all they need before they begin."""
BAD_INPUT = 2
STARTED = frozenset({"RANK", "WORLD_SIZE", "SLURM_STEP_ID"})
"""Variables of torchrun and srun: without one of them this is the only process, and launch.py, a second's import, is not asked."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    stages = "\n".join(f"  {name:<14} {text}" for name, (_, text) in STAGES.items())
    tools = "\n".join(f"  {name:<14} {text}" for name, text in TOOLS.items())
    made = argparse.ArgumentParser(
        prog="nemo-pivotrl",
        description=f"PivotRL and LLMdoctor, stage by stage.\n\nstages:\n{stages}\n\n"
        f"other commands (--help shows their options):\n{tools}",
        epilog="Settings: `nemo-pivotrl select RECIPE.yaml --print-config` shows all of them with their values; override any "
        "as section.key=value. fresh=true drops a stage's unfinished work instead of resuming it.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("stage", choices=STAGES, metavar="STAGE")
    made.add_argument("recipe", metavar="RECIPE", help="YAML recipe, e.g. recipes/pivotrl/tiny.yaml")
    made.add_argument("overrides", nargs="*", metavar="key=value", help="override a setting of the recipe")
    made.add_argument(
        "--print-config", action="store_true", help="print the complete recipe, with explanations, and stop"
    )
    made.add_argument("--changed", action="store_true", help="with --print-config: only what differs from the defaults")
    made.add_argument(
        "--shard", metavar="i/n", help="profile only: work as the i-th of n processes, i from 0; then merge"
    )
    made.add_argument("--version", action="version", version=__version__)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one stage. Exit code 0: done, 2: bad input (one screen on stderr), 130: interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] == "serve-guided":
        print("nemo-pivotrl serve-guided: it is vLLM's server now: nemo-pivotrl serve RECIPE", file=sys.stderr)
        return BAD_INPUT
    if arguments and arguments[0] in TOOLS:
        tool, rest = arguments[0], spread_settings(arguments[1:])
        options = tool_parser(tool).parse_intermixed_args(rest)
        return guarded(tool, lambda: run_tool(tool, options))
    if len(arguments) > 1 and arguments[0] == "export" and arguments[1] in EXPORTS:
        arguments = [arguments[0], *arguments[2:], f"export.target={arguments[1]}"]
    options = parser().parse_intermixed_args(arguments)
    if options.changed and not options.print_config:
        parser().error("--changed goes with --print-config")
    fresh = "fresh=true" in options.overrides
    overrides = [o for o in options.overrides if o not in ("fresh=true", "fresh=false")]

    def run() -> int | None:
        from nemo_pivotrl.config.load import load_recipe
        from nemo_pivotrl.config.show import to_yaml

        recipe = load_recipe(options.recipe, overrides)
        if not options.print_config:
            return run_stage(options.stage, recipe, fresh, options.shard)
        print(to_yaml(recipe, options.changed), end="")
        return None

    return guarded(options.stage, run)


def guarded(command: str, run: Callable[[], int | None]) -> int:
    """Call `run`, which may return an exit code; what a user can mend becomes one screen on stderr and an exit code."""
    try:
        return run() or 0
    except InputError as error:
        print(f"nemo-pivotrl {command}: {error}", file=sys.stderr)
        return BAD_INPUT
    except OSError as error:
        # a full disk or a missing right: whole rows already written stay in .part and are resumed
        print(
            f"nemo-pivotrl {command}: {error.filename or 'file'}: {error.strerror or error}\n"
            "    -> free space or mend the path, then run the same command again; finished work is kept",
            file=sys.stderr,
        )
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"\nnemo-pivotrl {command}: interrupted; the same command resumes", file=sys.stderr)
        return 130


def tool_parser(tool: str) -> argparse.ArgumentParser:
    """The command line of a command that is no stage."""
    made = argparse.ArgumentParser(prog=f"nemo-pivotrl {tool}", description=TOOLS[tool])
    if tool in ("plan", "preflight"):
        made.add_argument("recipe", metavar="RECIPE", help="YAML recipe")
        what = "override a setting of the recipe"
        if tool == "preflight":
            what = f"which stage ({', '.join(CHECKED)}; default: the algorithm's main ones), and {what}"
        made.add_argument("overrides", nargs="*", metavar="key=value", help=what)
    if tool == "plan":
        made.add_argument("--json", action="store_true", help="print JSON")
    if tool in ("plan", "preflight"):
        return made
    if tool == "env":
        made.add_argument("folder", nargs="?", default="recipes", metavar="FOLDER", help="recipes (default: recipes)")
        made.add_argument("--json", action="store_true", help="print JSON")
        made.add_argument("--no-imports", action="store_true", help="take packages for working; quicker")
        return made
    if tool == "compare":
        made.add_argument("left", metavar="A.jsonl", help="a profile, e.g. of the start policy")
        made.add_argument("right", metavar="B.jsonl", help="another of the same candidates, e.g. of a checkpoint")
        made.add_argument("--json", action="store_true", help="print JSON")
        made.add_argument("--lambda", dest="lambda_diff", type=share, metavar="L", help="lambda_diff of both")
        return made
    if tool != "verify":
        made.add_argument("--host", default="127.0.0.1", help="address to listen on (default: loopback only)")
        made.add_argument("--port", type=int, default=8911 if tool == "serve-verifier" else 8000)
        made.add_argument(
            "--token-file", metavar="FILE", help="requests must carry this token; needed off the loopback"
        )
    if tool == "serve-verifier":
        made.add_argument(
            "--allow-host", action="append", default=[], metavar="NAME", help="another name of this server"
        )
    if tool == "serve":
        made.add_argument(
            "--refit",
            action="store_true",
            help="take weights from a trainer; opens vLLM's development endpoints, which must not face a network you do not own",
        )
    if tool == "serve":
        made.add_argument("recipe", metavar="RECIPE", help="YAML recipe: policy or patient, decode and vllm are read")
        made.add_argument("overrides", nargs="*", metavar="key=value", help="override a setting of the recipe")
        return made
    made.add_argument("--verifier", required=True, metavar="NAME", help="functional, single_step, swe, terminus, ...")
    made.add_argument("--compat", default=None, metavar="VERSION", help="NeMo-Gym release to follow: 0.5, 0.6 or 0.7")
    made.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="key=value",
        help="a setting of the verifier, e.g. word_count_similarity_threshold=0.3; limits.KEY and judge.KEY for those sections",
    )
    if tool == "verify":
        made.add_argument("source", metavar="IN.jsonl", help="rows with expert and sampled action, or a profile")
        made.add_argument("target", metavar="OUT.jsonl", help="one {reward, category, detail} for each action")
    return made


def share(text: str) -> float:
    """A number from 0 to 1. Raises ArgumentTypeError for anything else."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is no number from 0 to 1")
    return value


def spread_settings(arguments: Sequence[str]) -> list[str]:
    """`--set a=1 b=2 IN OUT` as `--set a=1 --set b=2 IN OUT`: the settings end where the files begin."""
    spread: list[str] = []
    for argument in arguments:
        follows = len(spread) >= 2 and spread[-2] == "--set" and "=" in argument and not argument.startswith("-")
        spread += ["--set", argument] if follows else [argument]
    return spread


def run_tool(tool: str, options: argparse.Namespace) -> int | None:
    """Run a command that is no stage; an exit code, if it is not 0."""
    from pathlib import Path

    from nemo_pivotrl.config.load import load_recipe, verifier_settings

    if tool == "env":
        import json

        from nemo_pivotrl.tools.environment import as_json, as_text, look, survey

        machine = look(not options.no_imports)
        recipes = survey(Path(options.folder), machine)
        print(json.dumps(as_json(machine, recipes), indent=1) if options.json else as_text(machine, recipes))
        return None
    if tool == "plan":
        return run_plan(options)
    if tool == "preflight":
        return run_preflight(options)
        return
    if tool == "compare":
        import json

        from nemo_pivotrl.pivotrl.compare import compare
        from nemo_pivotrl.pivotrl.compare_text import as_text as told

        found = compare(Path(options.left), Path(options.right), options.lambda_diff)
        print(json.dumps(found, indent=1) if options.json else told(found))
        return None
    if tool == "serve":
        from nemo_pivotrl.tools.serve import serve as serve_engine

        serve_engine(
            load_recipe(options.recipe, options.overrides),
            options.host,
            options.port,
            options.refit,
            options.token_file,
        )
        return None
    settings = verifier_settings(options.verifier, options.compat, options.set)
    with missing_module(tool, {"starlette": "serve", "uvicorn": "serve"}, "verifiers"):
        if tool == "verify":
            from nemo_pivotrl.tools.verify import verify

            counts = verify(settings, Path(options.source), Path(options.target))
            print(", ".join(f"{n} {name}" for name, n in sorted(counts.items())) + f" -> {options.target}")
        else:
            from nemo_pivotrl.tools.gym_server import serve

            serve(settings, options.host, options.port, options.token_file, options.allow_host)
    return None


def run_plan(options: argparse.Namespace) -> int:
    """Print the plan; 2 where the recipe cannot run as it is."""
    import json

    from nemo_pivotrl.config.load import load_recipe
    from nemo_pivotrl.tools.plan import plan
    from nemo_pivotrl.tools.plan_text import as_json, as_text

    recipe = load_recipe(options.recipe, options.overrides)
    verdict = plan(recipe)
    found = as_json(recipe, options.recipe, verdict) if options.json else as_text(recipe, options.recipe, verdict)
    print(json.dumps(found, indent=1) if options.json else found)
    return 0 if verdict.good else BAD_INPUT


def run_preflight(options: argparse.Namespace) -> int:
    """Print what would stop the stages, or that nothing would. Raises InputError with all of it."""
    from nemo_pivotrl.config.load import load_recipe
    from nemo_pivotrl.core.errors import Problem

    named = [word for word in options.overrides if "=" not in word]
    if wrong := [word for word in named if word not in CHECKED]:
        problem = Problem("command line", None, "STAGE", " ".join(wrong), f"use one of {', '.join(CHECKED)}")
        raise InputError(problem)
    recipe = load_recipe(options.recipe, [word for word in options.overrides if "=" in word])
    with missing_module("preflight", {"httpx": "verifiers", "openapi_schema_validator": "verifiers"}, "reference"):
        from nemo_pivotrl.tools.checks import caught, port_problems, preflight, stages_of

        world = here().world if os.environ.keys() & STARTED else 1
        problems = port_problems()
        stages = named or stages_of(recipe)
        for stage in stages:
            problems += caught(preflight, recipe, stage, world)[1]
    if problems:
        raise InputError(list(dict.fromkeys(problems)))
    print(f"nothing stands in the way of {', '.join(stages)}")
    return 0


@contextlib.contextmanager
def missing_module(command: str, extras: Mapping[str, str], default: str) -> Iterator[None]:
    """Turn a module that is not installed into the name of the extra that brings it."""
    try:
        yield
    except ModuleNotFoundError as error:
        from nemo_pivotrl.core.errors import Problem

        extra = extras.get((error.name or "").partition(".")[0], default)
        remedy = f"pip install 'nemo-pivotrl[{extra}]'"
        raise InputError(Problem("environment", None, command, f"no module {error.name}", remedy)) from error


def run_stage(stage: str, recipe: Recipe, fresh: bool, shard: str | None = None) -> int:
    """Import a stage's function and call it: here, or on the first of many processes that torchrun or srun started.

    Returns this process's exit code; every process but the first is silent.
    """
    light = ("world", "extract", "audit", "rescore", "select", "export", "report", "preferences")
    if stage not in light and recipe.num_threads:
        os.environ.setdefault("OMP_NUM_THREADS", str(recipe.num_threads))
        import torch

        torch.set_num_threads(recipe.num_threads)
    module, _, function = STAGES[stage][0].partition(":")
    extras = {"matplotlib": "report", "jinja2": "report", "httpx": "verifiers", "openapi_schema_validator": "verifiers"}

    more = {}
    if shard is not None:
        from nemo_pivotrl.core.errors import Problem
        from nemo_pivotrl.pivotrl.profile_shards import shard_of

        if stage != "profile":
            raise InputError(Problem("command line", None, "--shard", f"stage {stage}", "only profile has shards"))
        more["shard"] = shard_of(shard)

    def call() -> None:
        with missing_module(f"stage {stage}", extras, "reference"):
            if stage in CHECKED:
                from nemo_pivotrl.tools.checks import preflight

                preflight(recipe, stage, here().world if os.environ.keys() & STARTED else 1)
            getattr(import_module(module), function)(recipe, fresh, **more)

    if os.environ.keys() & STARTED and (place := here()).world > 1:
        if "megatron" not in (recipe.policy.backend, recipe.doctor.backend, recipe.patient.backend):
            return one_too_many(place)
        with missing_module(f"stage {stage}", {}, "megatron"):
            from nemo_pivotrl.backends.megatron.workers import run_together
        return run_together(call, recipe.megatron, place)
    call()
    return 0


def here() -> Place:
    """Which process of how many this is."""
    with missing_module("many processes", {}, "reference"):
        from nemo_pivotrl.backends.launch import place_of
    return place_of(os.environ)


def one_too_many(place: Place) -> int:
    """Refuse processes that would all run the same stage; the first says so."""
    from nemo_pivotrl.core.errors import Problem

    if place.rank > 0:
        from nemo_pivotrl.backends.launch import SPEAK_S

        time.sleep(SPEAK_S)
        return BAD_INPUT
    remedy = "start one process, or set policy.backend, doctor.backend or patient.backend to megatron"
    raise InputError(Problem("recipe", None, "backend", f"reference, in {place.world} processes", remedy))


def command() -> NoReturn:
    """`nemo-pivotrl`: `main`, and the end of the process."""
    leave_together(main())


def leave_together(code: int) -> NoReturn:
    """End this process; one of many that has worked leaves as torch.distributed needs it."""
    if code == 0 and os.environ.keys() & STARTED and here().world > 1:
        from nemo_pivotrl.backends.launch import leave

        leave(code)
    sys.exit(code)


if __name__ == "__main__":
    command()
