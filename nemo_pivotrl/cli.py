"""`nemo-pivotrl STAGE RECIPE.yaml [key=value ...]`. Nothing heavy is imported before the command line is understood."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from nemo_pivotrl import __version__
from nemo_pivotrl.records import InputError

if TYPE_CHECKING:
    from nemo_pivotrl.config import Recipe

STAGES = {
    "world": ("nemo_pivotrl.stages.quickstart:make_world", "write the embedded world's expert trajectories"),
    "extract": ("nemo_pivotrl.stages.extract:extract", "trajectories -> candidates"),
    "warmup": ("nemo_pivotrl.stages.sft:warmup", "make the start policy by a short SFT"),
    "profile": (
        "nemo_pivotrl.stages.profile:profile",
        "candidates -> profiles: K verified rollouts of the start policy each",
    ),
    "select": ("nemo_pivotrl.stages.select:select", "profiles -> pivots"),
    "export": ("nemo_pivotrl.stages.select:export", "pivots -> NeMo-Gym files for NeMo-RL"),
    "sft": ("nemo_pivotrl.stages.sft:sft", "fine-tune on the same data, for comparison"),
    "train": ("nemo_pivotrl.stages.train:train", "pivots -> policy, by single-turn GRPO"),
    "evaluate": ("nemo_pivotrl.stages.evaluate:evaluate", "policies side by side, with intervals"),
    "report": ("nemo_pivotrl.report:report", "one HTML page and its numbers as JSON"),
    "run": ("nemo_pivotrl.stages.quickstart:run", "all stages of the recipe, one after another"),
}
BAD_INPUT = 2


def parser() -> argparse.ArgumentParser:
    """The command line."""
    stages = "\n".join(f"  {name:<10} {text}" for name, (_, text) in STAGES.items())
    made = argparse.ArgumentParser(
        prog="nemo-pivotrl",
        description=f"PivotRL, stage by stage.\n\nstages:\n{stages}",
        epilog="Settings: `nemo-pivotrl select RECIPE.yaml --print-config` shows all of them with their values; override any "
        "as section.key=value. fresh=true drops a stage's unfinished work instead of resuming it.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("stage", choices=STAGES, metavar="STAGE")
    made.add_argument("recipe", metavar="RECIPE", help="YAML recipe, e.g. recipes/pivotrl/tiny.yaml")
    made.add_argument("overrides", nargs="*", metavar="key=value", help="override a setting of the recipe")
    made.add_argument(
        "--print-config", action="store_true", help="print the complete recipe, defaults included, and stop"
    )
    made.add_argument("--version", action="version", version=__version__)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one stage. Exit code 0: done, 2: bad input (one screen on stderr), 130: interrupted."""
    options = parser().parse_args(arguments)
    fresh = "fresh=true" in options.overrides
    overrides = [o for o in options.overrides if o not in ("fresh=true", "fresh=false")]
    try:
        from nemo_pivotrl.recipe import load_recipe, to_yaml

        recipe = load_recipe(options.recipe, overrides)
        if options.print_config:
            print(to_yaml(recipe), end="")
            return 0
        run_stage(options.stage, recipe, fresh)
    except InputError as error:
        print(f"nemo-pivotrl {options.stage}: {error}", file=sys.stderr)
        return BAD_INPUT
    except OSError as error:
        # a full disk or a missing right: whole rows already written stay in .part and are resumed
        print(
            f"nemo-pivotrl {options.stage}: {error.filename or 'file'}: {error.strerror or error}\n"
            "    -> free space or mend the path, then run the same command again; finished work is kept",
            file=sys.stderr,
        )
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"\nnemo-pivotrl {options.stage}: interrupted; the same command resumes", file=sys.stderr)
        return 130
    return 0


def run_stage(stage: str, recipe: Recipe, fresh: bool) -> None:
    """Import a stage's function and call it."""
    if stage not in ("world", "extract", "select", "export", "report") and recipe.num_threads:
        os.environ.setdefault("OMP_NUM_THREADS", str(recipe.num_threads))
        import torch

        torch.set_num_threads(recipe.num_threads)
    module, _, function = STAGES[stage][0].partition(":")
    try:
        getattr(import_module(module), function)(recipe, fresh)
    except ModuleNotFoundError as error:
        from nemo_pivotrl.records import Problem

        extra = "report" if error.name in ("matplotlib", "jinja2") else "reference"
        raise InputError(
            Problem(
                "environment", None, f"stage {stage}", f"no module {error.name}", f"pip install 'nemo-pivotrl[{extra}]'"
            )
        ) from error


if __name__ == "__main__":
    sys.exit(main())
