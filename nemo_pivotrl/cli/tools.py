"""The commands that are no stage: what adds each one's arguments to its parser, and what runs it.

Nothing heavy is imported before a command is run.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

from nemo_pivotrl.cli.exits import BAD_INPUT, missing_module
from nemo_pivotrl.cli.stages import CHECKED, STARTED, here
from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.report import VIEW_PORT


class Tool(NamedTuple):
    """A command that is no stage: it takes files or requests, not artefacts."""

    help: str
    register: Callable[[argparse.ArgumentParser], None]
    """Adds the command's arguments to its parser."""
    run: Callable[[argparse.Namespace], int | None]
    """Runs it; returns an exit code, if it is not 0."""


def recipe_arguments(made: argparse.ArgumentParser, recipe: str, others: str = "") -> None:
    """RECIPE and key=value, and what `others` says may stand among them."""
    made.add_argument("recipe", metavar="RECIPE", help=recipe)
    metavar = "STAGE | key=value" if others else "key=value"
    made.add_argument(
        "overrides", nargs="*", default=[], metavar=metavar, help=f"{others}override a setting of the recipe"
    )


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


def env_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("folder", nargs="?", default="recipes", metavar="FOLDER", help="recipes (default: recipes)")
    made.add_argument("--json", action="store_true", help="print JSON")
    made.add_argument("--no-imports", action="store_true", help="take packages for working; quicker")


def run_env(options: argparse.Namespace) -> None:
    """Print what is installed and which recipes could run."""
    import json
    from pathlib import Path

    from nemo_pivotrl.tools.environment import as_json, as_text, look, survey

    machine = look(not options.no_imports)
    recipes = survey(Path(options.folder), machine)
    print(json.dumps(as_json(machine, recipes), indent=1) if options.json else as_text(machine, recipes))


def init_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("model", metavar="MODEL", help="model folder, or the id of a model on the Hugging Face hub")
    made.add_argument("file", metavar="FILE", help="trajectories, or preferences: JSON, JSON lines or Parquet")
    made.add_argument(
        "recipe", nargs="?", default="recipe.yaml", metavar="RECIPE", help="recipe to write (default: recipe.yaml)"
    )


def run_init(options: argparse.Namespace) -> None:
    """Write a minimal recipe, and print what was found."""
    from pathlib import Path

    extras = {"httpx": "verifiers", "openapi_schema_validator": "verifiers", "pyarrow": "tables"}
    with missing_module("init", extras, "reference"):
        from nemo_pivotrl.tools.first_recipe import init

        print(init(options.model, options.file, Path(options.recipe)))


def plan_arguments(made: argparse.ArgumentParser) -> None:
    recipe_arguments(made, "YAML recipe")
    made.add_argument("--json", action="store_true", help="print JSON")


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


def trace_arguments(made: argparse.ArgumentParser) -> None:
    recipe_arguments(made, "YAML recipe")
    made.add_argument("--rank", type=int, default=0, metavar="R", help="which of the ranks that train (default: 0)")
    made.add_argument("--layers", default="", metavar="PATTERN", help="layers in place of the model's, e.g. ME*E or DE")
    made.add_argument("--optimizer", action="store_true", help="with an optimiser's step")
    made.add_argument("--json", action="store_true", help="print JSON")


def run_trace(options: argparse.Namespace) -> int:
    """Print one rank's training step, traced beside planned; 2 where they differ or FP8's rules are broken."""
    import json

    from nemo_pivotrl.config.load import load_recipe
    from nemo_pivotrl.tools import trace as tracing

    recipe = load_recipe(options.recipe, options.overrides)
    with missing_module("trace", {"megatron": "megatron"}, "megatron"):
        from nemo_pivotrl.backends.traced.step import trace

        asked = tracing.asked_of(recipe, options.rank, options.layers, options.optimizer)
        found = trace(asked)
    lines = tracing.compared(asked, found)
    show = tracing.as_json if options.json else tracing.as_text
    made = show(options.recipe, asked, found, lines)
    print(json.dumps(made, indent=1) if options.json else made)
    return 0 if tracing.good(asked, found, lines) else BAD_INPUT


def preflight_arguments(made: argparse.ArgumentParser) -> None:
    stages = (
        f"which stage ({', '.join(CHECKED)}; default: the algorithm's main ones), and override a setting of the recipe"
    )
    recipe_arguments(made, "YAML recipe", stages)


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
        from nemo_pivotrl.backends.hub import with_local_models
        from nemo_pivotrl.tools.checks import (
            caught,
            not_made_yet,
            port_problems,
            preflight,
            stages_of,
            trajectory_problems,
        )

        recipe = with_local_models(recipe, fetch=False)
        world = here().world if os.environ.keys() & STARTED else 1
        problems = port_problems()
        stages = named or stages_of(recipe)
        coming = {} if named else {what: by for stage in stages for what, by in not_made_yet(recipe, stage).items()}
        if "extract" in coming.values():
            problems += trajectory_problems(recipe)
        for stage in stages:
            problems += caught(preflight, recipe, stage, world, coming=coming)[1]
    if problems:
        raise InputError(list(dict.fromkeys(problems)))
    for what, by in coming.items():
        print(f"not made yet: {what}; nemo-pivotrl {by} {options.recipe}")
    print(f"nothing {'else ' if coming else ''}stands in the way of {', '.join(stages)}")
    if "extract" in coming.values():
        print("whether states fit the chat template and the context is seen after extract: run preflight again then")
    return 0


def seal_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("files", nargs="+", metavar="FILE.jsonl", help="its rows are read, counted and summed")


def run_seal(options: argparse.Namespace) -> None:
    """Seal artefacts as they stand."""
    from pathlib import Path

    from nemo_pivotrl.core.artifacts import seal
    from nemo_pivotrl.core.lock import only_writer

    for path in map(Path, options.files):
        with only_writer(path.parent, "seal"):
            print(f"{path}: sealed with {seal(path)} rows")


def compare_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("left", metavar="A.jsonl", help="a profile, e.g. of the start policy")
    made.add_argument("right", metavar="B.jsonl", help="another of the same candidates, e.g. of a checkpoint")
    made.add_argument("--json", action="store_true", help="print JSON")
    made.add_argument("--lambda", dest="lambda_diff", type=share, metavar="L", help="lambda_diff of both")


def run_compare(options: argparse.Namespace) -> None:
    """Print how two profiles differ."""
    import json
    from pathlib import Path

    from nemo_pivotrl.pivotrl.compare import compare
    from nemo_pivotrl.pivotrl.compare_text import as_text

    found = compare(Path(options.left), Path(options.right), options.lambda_diff)
    print(json.dumps(found, indent=1) if options.json else as_text(found))


def verifier_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("--verifier", required=True, metavar="NAME", help="functional, single_step, swe, terminus, ...")
    made.add_argument("--compat", default=None, metavar="VERSION", help="NeMo-Gym release to follow: 0.5, 0.6 or 0.7")
    made.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="key=value",
        help="a setting of the verifier, e.g. word_count_similarity_threshold=0.3; limits.KEY and judge.KEY for those sections",
    )


def verify_arguments(made: argparse.ArgumentParser) -> None:
    verifier_arguments(made)
    made.add_argument(
        "--executor", choices=("here", "processes", "ray"), default="here", help="where verdicts are made"
    )
    made.add_argument("--workers", type=int, default=1, metavar="N", help="processes, or actors on Ray (RAY_ADDRESS)")
    made.add_argument("source", metavar="IN.jsonl", help="rows with expert and sampled action, or a profile")
    made.add_argument("target", metavar="OUT.jsonl", help="one {reward, category, detail} for each action")


def run_verify(options: argparse.Namespace) -> None:
    """Score rows of a file, and print how many verdicts there are of each kind."""
    from pathlib import Path

    from nemo_pivotrl.config.load import verifier_settings

    settings = verifier_settings(options.verifier, options.compat, options.set)
    with missing_module("verify", {}, "verifiers"):
        from nemo_pivotrl.tools.verify import verify

        counts = verify(settings, Path(options.source), Path(options.target), options.executor, options.workers)
    print(", ".join(f"{n} {name}" for name, n in sorted(counts.items())) + f" -> {options.target}")


def address_arguments(made: argparse.ArgumentParser, port: int) -> None:
    made.add_argument("--host", default="127.0.0.1", help="address to listen on (default: loopback only)")
    made.add_argument("--port", type=int, default=port, help=f"port to listen on (default: {port})")
    made.add_argument("--token-file", metavar="FILE", help="requests must carry this token; needed off the loopback")


def serve_verifier_arguments(made: argparse.ArgumentParser) -> None:
    address_arguments(made, 8911)
    made.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="another name of this server")
    verifier_arguments(made)


def run_serve_verifier(options: argparse.Namespace) -> None:
    """Serve a verifier until it is interrupted."""
    from nemo_pivotrl.config.load import verifier_settings

    settings = verifier_settings(options.verifier, options.compat, options.set)
    with missing_module("serve-verifier", {"starlette": "serve", "uvicorn": "serve"}, "verifiers"):
        from nemo_pivotrl.tools.gym_server import serve

        serve(settings, options.host, options.port, options.token_file, options.allow_host)


def serve_arguments(made: argparse.ArgumentParser) -> None:
    address_arguments(made, 8000)
    made.add_argument(
        "--refit",
        action="store_true",
        help="take weights from a trainer; opens vLLM's development endpoints, which must not face a network you do not own",
    )
    recipe_arguments(made, "YAML recipe: policy or patient, decode and vllm are read")


def run_serve(options: argparse.Namespace) -> None:
    """Serve the policy, or the patient with its doctors, until it is interrupted."""
    from nemo_pivotrl.backends.hub import with_local_models
    from nemo_pivotrl.config.load import load_recipe
    from nemo_pivotrl.tools.serve import serve

    recipe = with_local_models(load_recipe(options.recipe, options.overrides), fetch=True)
    serve(recipe, options.host, options.port, options.refit, options.token_file)


def view_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("run", metavar="RUN", help="run folder, e.g. runs/quickstart")
    made.add_argument("--port", type=int, default=VIEW_PORT, help=f"port on this machine (default: {VIEW_PORT})")


def run_view(options: argparse.Namespace) -> None:
    """Serve the viewer until it is interrupted."""
    from pathlib import Path

    with missing_module("view", {"starlette": "serve", "uvicorn": "serve", "matplotlib": "report"}, "reference"):
        from nemo_pivotrl.report.view_server import view

        view(Path(options.run), options.port)


TOOLS = {
    "init": Tool("write a first recipe for a model and a file of yours", init_arguments, run_init),
    "view": Tool(
        "look at a run in the browser: every turn, its samples, and why each was accepted or not",
        view_arguments,
        run_view,
    ),
    "env": Tool("see what is installed here, and which recipes could run", env_arguments, run_env),
    "plan": Tool("see whether a recipe fits its GPUs, and what it costs", plan_arguments, run_plan),
    "trace": Tool("run one rank's training step without a GPU, beside the plan's figures", trace_arguments, run_trace),
    "preflight": Tool("list all that would stop a stage, before a model is loaded", preflight_arguments, run_preflight),
    "compare": Tool("compare two profiles of the same candidates", compare_arguments, run_compare),
    "seal": Tool("seal artefacts as they stand, after editing them", seal_arguments, run_seal),
    "verify": Tool("score rows of a file", verify_arguments, run_verify),
    "serve-verifier": Tool("serve a verifier to NeMo-Gym", serve_verifier_arguments, run_serve_verifier),
    "serve": Tool("serve the policy, or the patient with its doctors, by vLLM", serve_arguments, run_serve),
}
