"""What a shell command does, in one form: two commands do the same if their forms are equal.

`read_command` gives the form. Since only forms are compared, the relation is reflexive, symmetric and transitive. A part
whose meaning the words alone do not settle stays as it is written: assignments, redirections, operators and directories
are never dropped, and a command that the lexer cannot read is its own text. Nothing is ever run or looked up.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import chain
from typing import Any

from nemo_pivotrl.verifiers.shell_commands import (
    Command,
    Form,
    clean_operand,
    is_literal,
    only_filters,
    only_lists,
    read_simple,
)
from nemo_pivotrl.verifiers.shell_lexer import BEGIN, WHOLE, Lexer, Token

MAX_CHARS = 8192
"""A longer command is compared as text."""
CHAR_WORK = 150
"""Units of work that reading one character costs."""
OPENERS = frozenset("do then else { ( ) && || | ; ;;".split())
"""After these a further `;` or newline says nothing."""
REDIRECTS = frozenset(("&>>", "<<<", "<<-", "&>", ">>", "<<", ">&", "<&", ">|", "<>", "<", ">"))
LEADING = frozenset("if then elif else while until do { ! time".split())
"""Reserved words after which a command begins."""
RAW = frozenset("for case select function [[ coproc fi done esac } in".split())
"""Reserved words whose whole segment is taken word by word."""
ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL)
NEUTRAL = {
    **dict.fromkeys(("NO_COLOR", "FORCE_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "PY_COLORS"), r"\w*"),
    **dict.fromkeys(("PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE", "PIP_DISABLE_PIP_VERSION_CHECK"), r"\w*"),
    **dict.fromkeys(("PAGER", "GIT_PAGER"), "cat"),
}
"""Variables that change how output looks or is paged and nothing else, with the values for which that holds."""
SHOWS_VARIABLES = frozenset("env printenv set export declare sh bash zsh eval exec sudo".split())
"""Commands that show a variable, or pass it on to one that may."""


def read_command(
    text: str, rules: frozenset[str], spend: Callable[[int], None], directory: str | None = None
) -> tuple[Form, frozenset[str]]:
    """(the form of a command, rules that may have had a say in it). `spend` counts work.

    `directory`: where the command runs, if it is known. A `cd` to it at the beginning does nothing.
    """
    text = _stripped(text.replace("\r\n", "\n")) if "whitespace" in rules else text
    plain = ("text", text)
    if "shell_argv" not in rules or len(text) > MAX_CHARS:
        return plain, frozenset({"whitespace"})
    spend(CHAR_WORK * len(text))
    return _read(text, frozenset(rule for rule in rules if rule.startswith("shell_")), directory or "")


@lru_cache(maxsize=4096)
def _read(text: str, rules: frozenset[str], directory: str) -> tuple[Form, frozenset[str]]:
    used = {"whitespace", "shell_argv"}
    try:
        tokens = Lexer(text).read()
    except ValueError:
        return ("text", text), frozenset(used)
    program = _program(tokens, rules, used)
    if "shell_cd_prefix" in rules:
        program = _without_cd(program, directory, used)
    if "shell_idioms" in rules:
        program = _without_idle_parts(program, used)
    form: Form = tuple(
        _simple(part, rules, used, after == "|") if isinstance(part, Command) else part
        for part, after in zip(program, (*program[1:], ""), strict=False)
    )
    quoted = sorted(token.raw for token in tokens if token.raw != token.word)
    if quoted:
        used.add("shell_quoting")
        form = form if "shell_quoting" in rules else (*form, ("quoted", *quoted))
    return ("program", *form), frozenset(used)


def _stripped(text: str) -> str:
    """`text` without the blanks around it, but with the last one where a backslash makes it part of a word."""
    inner = text.strip()
    escapes = len(inner) - len(inner.rstrip("\\"))
    return inner + text.lstrip()[len(inner) :][:1].strip("\n") if escapes % 2 else inner


Program = tuple[Any, ...]
"""Commands, and between them operators and reserved words."""


def _program(tokens: Sequence[Token], rules: frozenset[str], used: set[str]) -> Program:
    """Tokens to commands and operators. A newline is a `;` under `shell_separators`, and none at an end or after another."""
    joined = "shell_separators" in rules
    raw = any(token.raw == "case" for token in tokens)
    flat: list[Any] = []
    current: list[Token] = []
    for token in chain(tokens, [Token(";")]):
        if not token.op or token.op in REDIRECTS or token.raw:
            current.append(token)
            continue
        flat += _segment(current, raw)
        current = []
        separator = ";" if token.op == "\n" and joined else token.op
        if token.op == "\n":
            used.add("shell_separators")
        idle = not flat or (isinstance(flat[-1], str) and flat[-1] in {*OPENERS, "&"})
        if not (idle and joined and separator == ";"):
            flat.append(separator)
        else:
            used.add("shell_separators")
    while flat and flat[-1] == ";":
        flat.pop()
    return tuple(flat)


def _segment(tokens: Sequence[Token], raw: bool) -> list[Any]:
    """What stands between two operators: reserved words, and the command after them."""
    found: list[Any] = []
    begin = 0
    while begin < len(tokens) and tokens[begin].raw in LEADING and not raw:
        found.append(tokens[begin].raw)
        begin += 1
    rest = tokens[begin:]
    if not rest:
        return found
    if raw or rest[0].raw in RAW:
        return [*found, ("words", *((token.op, token.word, token.body) for token in rest))]
    return [*found, _command(rest)]


def _command(tokens: Sequence[Token]) -> Command:
    assignments: list[tuple[str, str]] = []
    words: list[str] = []
    redirects: list[tuple[str, str, str, str]] = []
    pending = iter(tokens)
    descriptor = ""
    for token in pending:
        if token.op in REDIRECTS and not token.raw:
            target = next(pending, None)
            name = "" if target is None else target.body if target.body is not None else target.word
            mark = "" if target is None or target.body is None else target.word
            redirects += _redirect(descriptor, token.op, str(name), mark)
            descriptor = ""
        elif token.op:  # digits that name the descriptor of the redirection after them
            descriptor = token.op
        elif not words and ASSIGNMENT.match(token.raw) and (found := ASSIGNMENT.fullmatch(token.word)):
            assignments.append((found[1] + found[2], _unsplit(found[3])))
        else:
            words.append(token.word)
    return Command(tuple(assignments), tuple(words), tuple(redirects))


def _unsplit(value: str) -> str:
    """The value of an assignment, which the shell does not split: `x=$y` is `x="$y"`."""
    return value if BEGIN + "@" in value or BEGIN + "*" in value else value.replace(BEGIN, WHOLE)


def _redirect(descriptor: str, op: str, name: str, mark: str) -> list[tuple[str, str, str, str]]:
    if op in ("&>", "&>>") and not descriptor:
        return [("1", op[1:], name, ""), ("2", ">&", "1", "")]
    return [(descriptor or "01"[op[0] != "<"], op, name, mark)]


def _without_cd(program: Program, directory: str, used: set[str]) -> Program:
    if len(program) < 3 or not isinstance(program[0], Command) or program[1] not in ("&&", ";"):
        return program
    first = program[0]
    if not directory or first.assignments or first.redirects or len(first.words) != 2 or first.words[0] != "cd":
        return program
    target = first.words[1]
    if not target.startswith("/") or target.rstrip("/") != directory.rstrip("/"):
        return program
    used.add("shell_cd_prefix")
    return _without_cd(program[2:], directory, used)


def _without_idle_parts(program: Program, used: set[str]) -> Program:
    """Without a `true` at the beginning, a `cat` of one file into a pipe, and a `cat` at the end of all."""
    idle = [Command((), (word,), ()) for word in ("true", ":")]
    while len(program) > 2 and program[0] in idle and program[1] in (";", "&&"):
        used.add("shell_idioms")
        program = program[2:]
    if len(program) > 2 and program[-1] == Command((), ("cat",), ()) and program[-2] == "|":
        source = program[-3]
        if isinstance(source, Command) and source.words and only_lists(source.words[0]):
            used.add("shell_idioms")
            program = program[:-2]
    found: list[Any] = []
    for part in program:
        source = found[-2] if len(found) > 1 and found[-1] == "|" and isinstance(found[-2], Command) else None
        starts = len(found) < 3 or found[-3] in (";", "&&", "||")
        takes = isinstance(part, Command) and part.words and not any(d == "0" for d, *_ in part.redirects)
        if source and starts and takes and only_filters(part.words) and _reads_one_file(source):
            used.add("shell_idioms")
            found[-2:] = [replace(part, redirects=(("0", "<", source.words[1], ""), *part.redirects))]
            continue
        found.append(part)
    return tuple(found)


def _reads_one_file(command: Command) -> bool:
    plain = not command.assignments and not command.redirects and len(command.words) == 2
    return plain and command.words[0] == "cat" and command.words[1][:1] != "-" and is_literal(command.words[1])


def _simple(command: Command, rules: frozenset[str], used: set[str], piped: bool) -> Form:
    kept = []
    for name, value in command.assignments:
        shown = not command.words or command.words[0].rpartition("/")[2] in SHOWS_VARIABLES
        neutral = not shown and name in NEUTRAL and re.fullmatch(NEUTRAL[name], value) is not None
        if neutral and "shell_env_prefix" in rules:
            used.add("shell_env_prefix")
        else:
            kept.append((name, value))
    if command.words and all(is_literal(value) for _, value in kept) and len(dict(kept)) == len(kept):
        kept.sort()  # none looks at another, so their order says nothing
    goes_on = piped or any(d == "1" for d, *_ in command.redirects)
    name_and_words, redirects = read_simple(command.words, command.redirects, rules, used, goes_on)
    cleaned = tuple(
        (d, op, target if op.startswith("<<") else clean_operand(target, rules, used), mark)
        for d, op, target, mark in redirects
    )
    if not any("&" in op for _, op, _, _ in cleaned):  # those of one descriptor in order, or where one copies another
        cleaned = tuple(sorted(cleaned, key=lambda redirect: redirect[0]))
    return ("command", tuple(kept), name_and_words, cleaned)
