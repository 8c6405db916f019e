"""`nemo-pivotrl STAGE RECIPE.yaml [key=value ...]`, and the commands that are no stage.

Each command is a row of a table: `stages.py` has the import path of a stage's function, `tools.py` what adds a command's arguments
and what runs it. Nothing heavy is imported before the command line is understood. A command's parser is made when it is asked for.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import NoReturn

from nemo_pivotrl import __version__
from nemo_pivotrl.cli.exits import BAD_INPUT, guarded
from nemo_pivotrl.cli.stages import EXPORTS, STAGES, leave_together, run_stage, stage_command
from nemo_pivotrl.cli.tools import TOOLS, recipe_arguments, spread_settings

__all__ = [
    "BAD_INPUT",
    "EXPORTS",
    "STAGES",
    "TOOLS",
    "command",
    "guarded",
    "leave_together",
    "main",
    "parser_of",
    "run_stage",
]

GONE = {"serve-guided": "it is vLLM's server now: nemo-pivotrl serve RECIPE"}
"""Commands of earlier versions, and what to use instead."""
SETTINGS = (
    "Settings: `nemo-pivotrl select RECIPE.yaml --print-config` shows all of them with their values, with --changed only what "
    "differs from the defaults; override any as section.key=value. fresh=true drops a stage's unfinished work instead of "
    "resuming it."
)


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
        return guarded(name, lambda: TOOLS[name].run(options), getattr(options, "recipe", "RECIPE"))
    target = [f"export.target={rest.pop(0)}"] if name == "export" and rest and rest[0] in EXPORTS else []
    options = parser.parse_intermixed_args(rest)
    options.overrides = [*options.overrides, *target]
    if options.changed and not options.print_config:
        parser.error("--changed goes with --print-config")
    return guarded(name, lambda: stage_command(name, options), options.recipe)


def overview() -> argparse.ArgumentParser:
    """The command line as a whole: what `nemo-pivotrl --help` shows."""
    stages = "\n".join(f"  {name:<14} {text}" for name, (_, text) in STAGES.items())
    tools = "\n".join(f"  {name:<14} {tool.help}" for name, tool in TOOLS.items())
    made = argparse.ArgumentParser(
        prog="nemo-pivotrl",
        usage="nemo-pivotrl STAGE RECIPE [key=value ...]\n       nemo-pivotrl COMMAND --help",
        description="PivotRL and LLMdoctor, stage by stage. To begin: nemo-pivotrl init MODEL FILE writes a first recipe.\n\n"
        f"stages:\n{stages}\n\nother commands:\n{tools}",
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


def command() -> NoReturn:
    """`nemo-pivotrl`: `main`, and the end of the process."""
    leave_together(main())
