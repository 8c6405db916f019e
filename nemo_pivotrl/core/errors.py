"""Errors over bad input: every problem with its place and its remedy, all raised together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

MAX_PROBLEMS_SHOWN = 20
MAX_NAME = 300
"""Characters of a file's name that are shown: its last ones."""
TRY_AGAIN = 75
"""Exit code of a command that another time may succeed: EX_TEMPFAIL."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with an input, in the words a person needs to mend it.

    >>> print(Problem("recipe.yaml", None, "seed", "-1", "give 0 or more"))
    recipe.yaml: seed: found -1
        -> give 0 or more
    """

    file: str
    """Path of the input, or the recipe's path."""
    line: int | None
    """1-based line in a JSONL file, 1-based element in a JSON list, None where there are no lines."""
    field: str
    """Dotted path of the field, e.g. `messages[3].tool_calls[0].function.arguments`."""
    found: str
    """What stands there, shortened."""
    remedy: str
    """What to do about it."""

    def __str__(self) -> str:
        file = self.file if len(self.file) <= MAX_NAME else f"…{self.file[-MAX_NAME:]}"
        where = file if self.line is None else f"{file}:{self.line}"
        return printable(f"{where}: {self.field}: found {self.found}") + printable(f"\n    -> {self.remedy}")


class AtWork(RuntimeError):
    """Another process writes in this run folder. The command prints it and exits with `TRY_AGAIN`; nothing was changed."""

    def __init__(self, folder: str, holder: str):
        self.folder, self.holder = folder, holder
        remedy = "wait for it to end, or stop it, then run the same command again; nothing was changed"
        super().__init__(printable(f"{folder}: at work here: {holder}") + f"\n    -> {remedy}")

    def __reduce__(self) -> tuple[type[AtWork], tuple[str, str]]:
        return AtWork, (self.folder, self.holder)


class InputError(ValueError):
    """Bad input or a bad recipe: all problems at once. The command prints it and exits with code 2.

    >>> try:
    ...     load_recipe("recipe.yaml", ["select.lambda_dif=0.6"])
    ... except InputError as error:
    ...     [(problem.field, problem.remedy) for problem in error.problems]
    [('select.lambda_dif', 'did you mean `lambda_diff`?')]
    """

    def __init__(self, problems: Iterable[Problem] | Problem):
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        shown = "\n".join(f"  {p}" for p in self.problems[:MAX_PROBLEMS_SHOWN])
        more = len(self.problems) - MAX_PROBLEMS_SHOWN
        tail = f"\n  ... and {more} more" if more > 0 else ""
        count = f"{len(self.problems)} problem" + ("s" if len(self.problems) != 1 else "")
        super().__init__(f"{count}:\n{shown}{tail}")

    def __reduce__(self) -> tuple[type[InputError], tuple[list[Problem]]]:
        return type(self), (self.problems,)  # from a worker process it arrives with its problems


class NotFiniteError(InputError, FloatingPointError):
    """A model computed NaN or infinity: a fault, and never a number in a file or a reward."""


UNRENDERABLE = ("template_refuses_state", "not_encodable", "special_token_in_text")
"""Kinds of `UnrenderableState`. They say something about the row, not about the policy or the machines."""


class UnrenderableState(InputError):
    """A state or turn that the chat template refuses or the tokenizer cannot encode. Stages exclude and count it by `kind`."""

    def __init__(
        self, kind: str, found: object, remedy: str = "it is excluded; mend the row or set policy.chat_template"
    ):
        self.kind, self.found, self.remedy = kind, short(found), remedy
        super().__init__(Problem("chat template", None, kind, self.found, remedy))

    def __reduce__(self) -> tuple[type[UnrenderableState], tuple[str, str, str]]:  # type: ignore[override]
        return UnrenderableState, (self.kind, self.found, self.remedy)


def short(value: object, limit: int = 120) -> str:
    """`value` as one line of at most `limit` characters, for error messages."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, a value that holds itself
        text = f"a {type(value).__name__} too large to show"
    text = printable(" ".join(text.split()))
    return text if len(text) <= limit else text[: limit - 1] + "…"


def printable(text: str) -> str:
    """`text` without what a terminal obeys or cannot show (escape sequences, changes of direction), which is written as \\x1b."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
