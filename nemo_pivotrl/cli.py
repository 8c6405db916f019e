"""`nemo-pivotrl STAGE RECIPE.yaml [key=value ...]`, and the commands that are no stage.

Each command is a row of a table: STAGES has the import path of a stage's function, TOOLS what adds a command's arguments and what
runs it. Nothing heavy is imported before the command line is understood, and a command's parser is made when it is asked for.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from nemo_pivotrl import __version__
from nemo_pivotrl.core.errors import TRY_AGAIN, AtWork, InputError, printable, short

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
    "select": ("nemo_pivotrl.pivotrl.select:select_pivots", "profiles -> pivots"),
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
        "LLMdoctor: write the embedded patient, doctor and questions",
    ),
    "rank": (
        "nemo_pivotrl.llmdoctor.rank:rank",
        "LLMdoctor: prompts -> preference files: the patient's own answers, ranked",
    ),
    "tfpo": ("nemo_pivotrl.llmdoctor.train_doctor:train_doctor", "LLMdoctor: token rewards -> doctor"),
    "assess": ("nemo_pivotrl.llmdoctor.assess:assess", "LLMdoctor: steered answers against others, with intervals"),
    "evaluate": ("nemo_pivotrl.pivotrl.evaluate:evaluate", "policies side by side, with intervals"),
    "preferences": ("nemo_pivotrl.llmdoctor.preferences:preferences", "LLMdoctor: preference files -> preferences"),
    "reward": (
        "nemo_pivotrl.llmdoctor.reward:build_rewards",
        "LLMdoctor: preferences -> token rewards, by the patient's two faces",
    ),
    "decode": (
        "nemo_pivotrl.llmdoctor.decode:decode",
        "LLMdoctor: prompts -> answers of the patient steered by doctors",
    ),
    "report": ("nemo_pivotrl.report.page:report", "one HTML page and its numbers as JSON"),
    "run": (
        "nemo_pivotrl.pipeline:run",
        "all stages of the recipe; profile, select and train again when signal fades (loop.max_rounds)",
    ),
}
EXPORTS = ("nemo-gym", "nemo-rl", "nemotron")
"""`export nemo-rl RECIPE` is `export RECIPE export.target=nemo-rl`."""
GONE = {"serve-guided": "it is vLLM's server now: nemo-pivotrl serve RECIPE"}
"""Commands of earlier versions, and what to use instead."""
CHECKED = ("profile", "sft", "train", "rank", "reward", "tfpo", "decode", "assess")
"""Stages that load a model which must be there already: `tools/checks.py` looks at all they need before they begin."""
SETTINGS = (
    "Settings: `nemo-pivotrl select RECIPE.yaml --print-config` shows all of them with their values, with --changed only what "
    "differs from the defaults; override any as section.key=value. fresh=true drops a stage's unfinished work instead of "
    "resuming it."
)
BAD_INPUT = 2
STARTED = frozenset({"RANK", "WORLD_SIZE", "SLURM_STEP_ID"})
"""Variables of torchrun and srun: without one of them this is the only process, and launch.py, a second's import, is not asked."""


class Tool(NamedTuple):
    """A command that is no stage: it takes files or requests, not artefacts."""

    help: str
    register: Callable[[argparse.ArgumentParser], None]
    """Adds the command's arguments to its parser."""
    run: Callable[[argparse.Namespace], int | None]
    """Runs it; returns an exit code, if it is not 0."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Exit code 0: done, 2: bad input (one screen on stderr), 75: another is at work there, 130: interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] == "help":
        arguments = [*arguments[1:2], "--help"]
    if not arguments or (arguments[0] not in STAGES and arguments[0] not in TOOLS):
        overview().parse_args(arguments[:1])  # --help and --version end here
        refuse_command(arguments[0])
    name, *rest = arguments
    parser = parser_of(name)
    if name in TOOLS:
        options = parser.parse_intermixed_args(spread_settings(rest))
        return guarded(name, lambda: TOOLS[name].run(options))
    target = [f"export.target={rest.pop(0)}"] if name == "export" and rest and rest[0] in EXPORTS else []
    options = parser.parse_intermixed_args(rest)
    options.overrides = [*options.overrides, *target]
    if options.changed and not options.print_config:
        parser.error("--changed goes with --print-config")
    return guarded(name, lambda: stage_command(name, options))


def overview() -> argparse.ArgumentParser:
    """The command line as a whole: what `nemo-pivotrl --help` shows."""
    stages = "\n".join(f"  {name:<14} {text}" for name, (_, text) in STAGES.items())
    tools = "\n".join(f"  {name:<14} {tool.help}" for name, tool in TOOLS.items())
    made = argparse.ArgumentParser(
        prog="nemo-pivotrl",
        usage="nemo-pivotrl STAGE RECIPE [key=value ...]\n       nemo-pivotrl COMMAND --help",
        description=f"PivotRL and LLMdoctor, stage by stage.\n\nstages:\n{stages}\n\nother commands:\n{tools}",
        epilog=SETTINGS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("command", metavar="COMMAND", help="a stage or another command; COMMAND --help shows its options")
    made.add_argument("--version", action="version", version=__version__)
    return made


def refuse_command(name: str) -> NoReturn:
    """End with exit code 2 and the nearest command."""
    if name in GONE:
        overview().error(f"{name}: {GONE[name]}")
    near = difflib.get_close_matches(name, [*STAGES, *TOOLS], n=1)
    hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join([*STAGES, *TOOLS])}"
    overview().error(f"no command {name!r}; {hint}")


def parser_of(command: str) -> argparse.ArgumentParser:
    """The command line of one stage or tool."""
    prog = f"nemo-pivotrl {command}"
    if command in TOOLS:
        made = argparse.ArgumentParser(prog=prog, description=TOOLS[command].help)
        TOOLS[command].register(made)
        return made
    made = argparse.ArgumentParser(prog=prog, description=STAGES[command][1], epilog=SETTINGS)
    recipe_arguments(made, "YAML recipe, e.g. recipes/pivotrl/tiny.yaml")
    made.add_argument(
        "--print-config", action="store_true", help="print the complete recipe, with explanations, and stop"
    )
    made.add_argument("--changed", action="store_true", help="with --print-config: only what differs from the defaults")
    shards = "work as the i-th of n processes, i from 0; then merge"
    made.add_argument("--shard", metavar="i/n", help=shards if command == "profile" else argparse.SUPPRESS)
    return made


def recipe_arguments(made: argparse.ArgumentParser, recipe: str, others: str = "") -> None:
    """RECIPE and key=value, and what `others` says may stand among them."""
    made.add_argument("recipe", metavar="RECIPE", help=recipe)
    metavar = "STAGE | key=value" if others else "key=value"
    made.add_argument(
        "overrides", nargs="*", default=[], metavar=metavar, help=f"{others}override a setting of the recipe"
    )


def stage_command(stage: str, options: argparse.Namespace) -> int | None:
    """Run a stage, or print its recipe."""
    from nemo_pivotrl.config.load import load_recipe
    from nemo_pivotrl.config.show import to_yaml

    fresh = "fresh=true" in options.overrides
    recipe = load_recipe(options.recipe, [o for o in options.overrides if o not in ("fresh=true", "fresh=false")])
    if not options.print_config:
        return run_stage(stage, recipe, fresh, options.shard)
    print(to_yaml(recipe, options.changed), end="")
    return None


def guarded(command: str, run: Callable[[], int | None]) -> int:
    """Call `run`, which may return an exit code; what a user can mend becomes one screen on stderr and an exit code."""
    try:
        return run() or 0
    except InputError as error:
        print(f"nemo-pivotrl {command}: {error}", file=sys.stderr)
        return BAD_INPUT
    except AtWork as error:
        print(f"nemo-pivotrl {command}: {error}", file=sys.stderr)
        return TRY_AGAIN
    except OSError as error:
        # a full disk or a missing right: whole rows already written stay in .part and are resumed
        print(
            f"nemo-pivotrl {command}: {short(error.filename or 'file', 300)}: {printable(error.strerror or str(error))}\n"
            "    -> free space or mend the path, then run the same command again; finished work is kept",
            file=sys.stderr,
        )
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"\nnemo-pivotrl {command}: interrupted; the same command resumes", file=sys.stderr)
        return 130


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
    made.add_argument("source", metavar="IN.jsonl", help="rows with expert and sampled action, or a profile")
    made.add_argument("target", metavar="OUT.jsonl", help="one {reward, category, detail} for each action")


def run_verify(options: argparse.Namespace) -> None:
    """Score rows of a file, and print how many verdicts there are of each kind."""
    from pathlib import Path

    from nemo_pivotrl.config.load import verifier_settings

    settings = verifier_settings(options.verifier, options.compat, options.set)
    with missing_module("verify", {}, "verifiers"):
        from nemo_pivotrl.tools.verify import verify

        counts = verify(settings, Path(options.source), Path(options.target))
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
    from nemo_pivotrl.config.load import load_recipe
    from nemo_pivotrl.tools.serve import serve

    serve(load_recipe(options.recipe, options.overrides), options.host, options.port, options.refit, options.token_file)


TOOLS = {
    "env": Tool("what is installed here, and which recipes could run", env_arguments, run_env),
    "plan": Tool("will it fit, and what will it cost", plan_arguments, run_plan),
    "preflight": Tool("what would stop a stage, all at once", preflight_arguments, run_preflight),
    "compare": Tool("two profiles of the same candidates: what moved, and the pivots", compare_arguments, run_compare),
    "seal": Tool("vouch for artefacts as they stand: of an earlier version, or edited", seal_arguments, run_seal),
    "verify": Tool("score rows of a file", verify_arguments, run_verify),
    "serve-verifier": Tool("serve a verifier to NeMo-Gym", serve_verifier_arguments, run_serve_verifier),
    "serve": Tool("serve the policy, or the patient with its doctors, by vLLM", serve_arguments, run_serve),
}


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
        with missing_module(f"stage {stage}", extras, "reference"), alone(stage, recipe, shard):
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


def alone(stage: str, recipe: Recipe, shard: str | None) -> contextlib.AbstractContextManager[None]:
    """The lock of the stage's run folder, before anything heavy is imported."""
    from pathlib import Path

    from nemo_pivotrl.core.lock import only_writer

    return only_writer(Path(recipe.run_dir), stage, f"shard {shard}" if shard else "")


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
