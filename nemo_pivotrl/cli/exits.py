"""How a command ends: exit codes, and one screen for what a user can mend."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from nemo_pivotrl.core.errors import TRY_AGAIN, AtWork, InputError, printable, short

BAD_INPUT = 2


def guarded(command: str, run: Callable[[], int | None], recipe: str = "RECIPE") -> int:
    """Call `run`, which may return an exit code; what a user can mend becomes one screen on stderr and an exit code.

    recipe: the file in the place of RECIPE in the commands that remedies name.
    """
    try:
        return run() or 0
    except InputError as error:
        named = (replace(p, remedy=p.remedy.replace(" RECIPE`", f" {recipe}`")) for p in error.problems)
        print(f"nemo-pivotrl {command}: {InputError(named)}", file=sys.stderr)
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
