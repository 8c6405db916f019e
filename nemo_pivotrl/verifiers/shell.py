"""Do two shell commands do the same? Compared as parsed commands, not as characters.

A lexer of our own, linear in the text: `shlex` forgets what was quoted (`'*'` and `*`, `'$HOME'` and `$HOME`), and the
full grammars for bash that there are take gigabytes for 200 kB of `a|a|a...` or recurse as deeply as the text says.
Compound commands (loops, conditions, groups) are compared token by token; what the lexer cannot read is compared as
text. Nothing is ever run or looked up.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

ACTIVE, BEGIN, END = "\ue000", "\ue001", "\ue002"
"""Marks in a word: the next character is not quoted and special; an expansion begins; it ends."""
MAX_CHARS = 8192
"""A longer command is compared as text."""
MAX_TOKENS = 1500
"""A command of more words and operators is compared as text."""
EXPLAINED_TOKENS = 500
"""For pairs longer than this together, which rules were needed is not worked out."""
CHAR_WORK = 150
"""Units of work that reading one character costs."""
TOKEN_WORK = 200
"""Units of work that comparing one word or operator costs."""
OPERATOR = re.compile(r"&>>|<<<|<<-|&&|\|\||;;|\|&|&>|>>|<<|>&|<&|>\||<>|[;|&<>()\n]")
PLAIN = re.compile(r"[^\s;|&<>()\\'\"$`*?\[{~]+")
SIMPLE_EXPANSION = re.compile(r"\$(?:([A-Za-z_]\w*|[0-9?!#@*$-])|\{(\w+)\})", re.ASCII)
OPENERS = frozenset("do then else { ( ) && || | ; ;;".split())
"""After these a further `;` or newline says nothing."""
REDIRECTS = frozenset(("&>>", "<<<", "<<-", "&>", ">>", "<<", ">&", "<&", ">|", "<>", "<", ">"))
RESERVED = frozenset(
    "if then elif else fi for while until do done case esac select function { } ! [[ ]] time coproc".split()
)
PROTECTED = re.compile(r"PATH$|^LD_|^PYTHON(HOME|STARTUP)|^IFS$|^(BASH_)?ENV$|^SHELL|^HOME$|^PROMPT_COMMAND$")
"""Variables whose assignment changes what a command means; never dropped."""
ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL)

# command -> short options that take a value, and the long ones that do; all its other options take none, and options may
# stand anywhere among its operands. Commands that are not here keep each option together with what follows it.
OPTIONS: dict[str, tuple[str, frozenset[str]]] = {
    name: (short, frozenset(long.split()))
    for names, short, long in (
        ("ls", "ITw", "block-size color format hide ignore sort time width"),
        ("rm rmdir chmod chown whoami which pwd sync dirname cat", "", "reference"),
        ("mkdir", "m", "mode"),
        ("touch", "dtr", "date reference time"),
        ("cp mv ln", "tS", "target-directory suffix"),
        ("stat", "c", "format printf"),
        ("hostname", "F", "file"),
        ("realpath", "", "relative-to relative-base"),
        ("tac", "s", "separator"),
        ("nl", "bdfhilnsvw", "body-numbering number-format number-separator number-width"),
        ("tree", "LPIo", "filelimit"),
        ("wc", "", "files0-from"),
        ("uniq", "fsw", "skip-fields skip-chars check-chars"),
        (
            "grep egrep fgrep",
            "ABCDdefm",
            "after-context before-context context file regexp max-count include exclude exclude-dir color",
        ),
        (
            "rg",
            "ABCdeEgmrtTjMf",
            "after-context before-context context glob regexp max-count type type-not file threads",
        ),
        ("head tail", "nc", "lines bytes pid sleep-interval"),
        ("sort", "kotTS", "key output field-separator buffer-size"),
        ("cut", "bcdf", "bytes characters delimiter fields output-delimiter"),
        ("sed", "efl", "expression file line-length"),
        ("diff", "UCIxXWFLSD", "unified context exclude label"),
        ("tar", "fCTX", "file directory exclude files-from"),
        ("du df", "dBtX", "max-depth block-size exclude type"),
        ("pytest py.test", "kmcpnrWo", "maxfail tb durations rootdir ignore deselect cov cov-report timeout junitxml"),
        ("curl", "HXdoFuAebmTwxcCDEKPQrtUyYz", "header request data data-raw output form user user-agent max-time url"),
        ("wget", "OPoUtTiQaeARDIXlwB", "output-document directory-prefix timeout tries header"),
        ("ps pgrep pkill", "pouCsPgGtU", "pid user signal sort"),
        ("mypy flake8 black isort ruff", "cmplt", "config config-file line-length select ignore"),
    )
    for name in names.split()
}
IN_ORDER = frozenset(
    (
        "find awk test [ echo printf xargs env sudo python python3 node ssh bash sh git docker timeout nohup nice ionice "
        "stdbuf strace watch exec eval command builtin parallel su doas chroot perl ruby php java ffmpeg convert magick gcc "
        "g++ cc clang clang++ ld rsync jq kubectl npx uv poetry conda kill set trap expr let tmux screen"
    ).split()
)
"""Commands in which the place of an option means something, or whose words are another command's."""
NAMES_FILES = frozenset("find python node bash sh git docker test [".split())
"""Of IN_ORDER, those whose words are paths where they look like one."""
TEXT_AFTER = frozenset("-c -e -m -regex -iregex -path -ipath -name -iname -wholename -printf --grep --message".split())
"""Options of those, after which no path stands."""
PATTERN_FIRST = frozenset("grep egrep fgrep rg sed".split())
"""Commands whose first operand is a pattern or a script, unless an option gives one."""
PATTERN_OPTIONS = ("-e", "-f", "--regexp", "--file", "--expression")
PATH_LIKE = re.compile(rf"[\w.@+,:%=~*?\[\]{{}}/{ACTIVE}{BEGIN}{END}-]+")


@dataclass(frozen=True, slots=True)
class Token:
    """`op` for an operator; else a word, as written and with its quotes taken away."""

    op: str
    raw: str = ""
    word: str = ""
    body: str | None = None
    """Text of the here-document that a delimiter word announces."""


class _Lexer:
    """Reads one text into tokens. Raises ValueError for what it cannot read."""

    def __init__(self, text: str):
        if any(mark in text for mark in (ACTIVE, BEGIN, END, "\0")):
            raise ValueError("private characters")
        self.text, self.at = text, 0
        self.tokens: list[Token] = []
        self.awaited: list[
            tuple[int, bool]
        ] = []  # here-documents whose body comes after the line: token, leading tabs dropped

    def read(self) -> list[Token]:
        text = self.text
        while self.at < len(text):
            char = text[self.at]
            if char in " \t" or text.startswith("\\\n", self.at):
                self.at += 1 if char != "\\" else 2
            elif char == "#":
                end = text.find("\n", self.at)
                self.at = len(text) if end < 0 else end
            elif operator := OPERATOR.match(text, self.at):
                self.at = operator.end()
                self.tokens.append(Token(operator[0]))
                if operator[0] == "\n":
                    self._here_documents()
            else:
                self._word()
            if len(self.tokens) > MAX_TOKENS:
                raise ValueError("too many words")
        if self.awaited:
            raise ValueError("a here-document without a body")
        return self.tokens

    def _word(self) -> None:
        text, begin, parts = self.text, self.at, []
        while self.at < len(text):
            char = text[self.at]
            if plain := PLAIN.match(text, self.at):
                parts.append(plain[0])
                self.at = plain.end()
            elif char in " \t\n;|&<>()":
                break
            elif char == "\\":
                parts.append(text[self.at + 1 : self.at + 2].replace("\n", ""))
                self.at += 2
            elif char == "'":
                parts.append(self._until("'", self.at + 1))
            elif char == '"':
                parts.append(self._double_quoted())
            elif char == "$" and text.startswith("$'", self.at):
                raise ValueError("ANSI-C quoting")
            elif char in "$`":
                parts.append(self._expansion())
            else:
                home = char == "~" and (not parts or parts[-1].endswith(("=", ":")))
                active = char in "*?[{" or home
                parts.append(ACTIVE + char if active else char)
                self.at += 1
        raw, word = text[begin : self.at], "".join(parts)
        previous = self.tokens[-1].op if self.tokens else ""
        if previous in ("<<", "<<-"):
            self.awaited.append((len(self.tokens), previous == "<<-"))
        # `2>&1`: digits right before a redirection name a descriptor
        descriptor = raw.isdigit() and self.at < len(text) and text[self.at] in "<>"
        self.tokens.append(Token(raw if descriptor else "", raw, word))

    def _until(self, end: str, begin: int) -> str:
        close = self.text.find(end, begin)
        if close < 0:
            raise ValueError(f"no closing {end}")
        self.at = close + 1
        return self.text[begin:close]

    def _double_quoted(self) -> str:
        text, parts = self.text, []
        self.at += 1
        while self.at < len(text) and text[self.at] != '"':
            if text[self.at] == "\\" and text[self.at + 1 : self.at + 2] in ("$", "`", '"', "\\", "\n"):
                parts.append(text[self.at + 1].replace("\n", ""))
                self.at += 2
            elif text[self.at] in "$`":
                parts.append(self._expansion())
            else:
                parts.append(text[self.at])
                self.at += 1
        if self.at >= len(text):
            raise ValueError('no closing "')
        self.at += 1
        return "".join(parts)

    def _expansion(self) -> str:
        """`$x` and `${x}` alike; anything else as it is written, up to where its bracket closes."""
        text = self.text
        if text[self.at] == "`":
            command = self._until("`", self.at + 1).strip()
            if any(char in command for char in "'\"\\"):
                raise ValueError("quotes inside an expansion")
            return f"{BEGIN}({_single_blanks(command)}){END}"
        if simple := SIMPLE_EXPANSION.match(text, self.at):
            self.at = simple.end()
            return f"{BEGIN}{simple[1] or simple[2]}{END}"
        opening = text[self.at + 1 : self.at + 2]
        if opening not in ("(", "{"):
            self.at += 1
            return "$"
        closing, depth, begin = {"(": ")", "{": "}"}[opening], 0, self.at + 1
        for self.at in range(begin, len(text)):
            depth += (text[self.at] == opening) - (text[self.at] == closing)
            if text[self.at] in "'\"\\`":
                raise ValueError("quotes inside an expansion")
            if depth == 0:
                self.at += 1
                inner = text[begin : self.at]
                if opening == "(" and not inner.startswith("(("):
                    inner = f"({_single_blanks(inner[1:-1].strip())})"
                return f"{BEGIN}{inner}{END}"
        raise ValueError(f"no closing {closing}")

    def _here_documents(self) -> None:
        for index, tabs in self.awaited:
            delimiter, lines = self.tokens[index], []
            while True:
                if self.at >= len(self.text):
                    raise ValueError("a here-document without an end")
                end = self.text.find("\n", self.at)
                end = len(self.text) if end < 0 else end
                line = self.text[self.at : end]
                self.at = end + 1
                line = line.lstrip("\t") if tabs else line
                if line == delimiter.word:
                    break
                lines.append(line)
            body = "\n".join(lines)
            literal = delimiter.raw != delimiter.word  # a quoted delimiter: the body is not expanded
            mark = "'" if literal and any(c in body for c in "$`\\") else ""
            self.tokens[index - 1 : index + 1] = [Token("<<"), Token("", delimiter.raw, mark, body)]
        self.awaited = []


def _stripped(text: str) -> str:
    """`text` without the blanks around it, but with the last one where a backslash makes it part of a word."""
    inner = text.strip()
    escapes = len(inner) - len(inner.rstrip("\\"))
    return inner + text.lstrip()[len(inner) :][:1].strip("\n") if escapes % 2 else inner


def _single_blanks(command: str) -> str:
    return re.sub(r"[ \t]+", " ", command)


def same_command(
    expected: str, actual: str, rules: frozenset[str], touched: set[str], spend: Callable[[int], None]
) -> bool:
    """Whether two commands are the same under the `shell_*` rules; adds to `touched` those that were needed.

    `shell_argv` is the ground of all others: without it commands are compared as text. `spend` counts work.
    """
    expected, actual = (_stripped(text.replace("\r\n", "\n")) for text in (expected, actual))
    if expected == actual:
        touched.add("whitespace")
        return "whitespace" in rules
    if "shell_argv" not in rules or max(len(expected), len(actual)) > MAX_CHARS:
        return False
    size = len(expected) + len(actual)
    spend(CHAR_WORK * size)
    on = frozenset(rule for rule in rules if rule.startswith("shell_"))
    try:
        tokens = _Lexer(expected).read(), _Lexer(actual).read()
    except ValueError:
        return False
    count = sum(map(len, tokens))
    spend(TOKEN_WORK * count)
    if not _same(*tokens, on):
        return False
    touched.add("shell_argv")
    if count <= EXPLAINED_TOKENS:
        spend(TOKEN_WORK * count * len(on))
        touched |= {rule for rule in on - {"shell_argv"} if not _same(*tokens, on - {rule})}
    return True


def _same(expected: Sequence[Token], actual: Sequence[Token], rules: frozenset[str]) -> bool:
    ours, theirs = _program(expected, rules), _program(actual, rules)
    if "shell_env_prefix" in rules:
        # set on one side only: taken as noise, unless the variable changes what commands mean
        one_sided = _environment(ours) ^ _environment(theirs)
        dropped = {name for name in one_sided if not PROTECTED.search(name)}
    else:
        dropped = set()
    return _same_programs(_canonical(ours, rules, dropped), _canonical(theirs, rules, dropped), rules)


@dataclass(frozen=True, slots=True)
class Command:
    """A simple command: assignments before it, its words, its redirections."""

    assignments: tuple[tuple[str, str], ...]
    words: tuple[str, ...]
    redirects: tuple[tuple[str, ...], ...]


Program = tuple[Any, ...]
"""Commands and the operators between them, in order; or plain words where the program is a compound one."""


def _program(tokens: Sequence[Token], rules: frozenset[str]) -> Program:
    """Tokens to commands and operators. A newline is a `;` under `shell_separators`, and none at an end or after another."""
    said = "word" if "shell_quoting" in rules else "raw"
    flat: list[Any] = []
    current: list[Token] = []
    compound = False
    for token in chain(tokens, [Token(";")]):
        if token.op and token.op not in REDIRECTS and not token.raw:
            compound |= token.op in ("(", ")", ";;") or (bool(current) and current[0].raw in RESERVED)
            if current:
                flat.append(_command(current, said))
            current = []
            separator = ";" if token.op == "\n" and "shell_separators" in rules else token.op
            idle = not flat or isinstance(flat[-1], str)
            if not (idle and separator in (";", "\n") and "shell_separators" in rules):
                flat.append(separator)
        else:
            current.append(token)
    while flat and flat[-1] == ";":
        flat.pop()
    if compound:
        return ("compound", *_flat_words(tokens, said, "shell_separators" in rules))
    return tuple(flat)


def _flat_words(tokens: Sequence[Token], said: str, separators: bool) -> list[Any]:
    """Words and operators of a compound program, without separators that say nothing."""
    words: list[Any] = []
    opened = True  # whether a command would begin here
    for token in tokens:
        operator = ";" if token.op == "\n" and separators else token.op
        if operator in (";", "\n") and opened and separators:
            continue
        opened = operator in OPENERS if operator else opened and token.raw in OPENERS
        words.append(operator or (getattr(token, said), token.body))
    while words and words[-1] == ";":
        words.pop()
    return words


def _command(tokens: Sequence[Token], said: str) -> Command:
    assignments: list[tuple[str, str]] = []
    words: list[str] = []
    redirects: list[tuple[str, ...]] = []
    pending = iter(tokens)
    descriptor = ""
    for token in pending:
        if token.op in REDIRECTS and not token.raw:
            target = next(pending, None)
            name = "" if target is None else target.body if target.body is not None else getattr(target, said)
            redirects.append(
                (descriptor, token.op, str(name), "" if target is None or target.body is None else target.word)
            )
            descriptor = ""
        elif token.op:  # digits that name the descriptor of the redirection after them
            descriptor = token.op
        elif not words and ASSIGNMENT.match(token.raw) and (found := ASSIGNMENT.fullmatch(getattr(token, said))):
            assignments.append((found[1] + found[2], found[3]))
        else:
            words.append(getattr(token, said))
    return Command(tuple(assignments), tuple(words), tuple(redirects))


def _environment(program: Program) -> set[str]:
    return {name for part in program if isinstance(part, Command) and part.words for name, _ in part.assignments}


def _canonical(program: Program, rules: frozenset[str], dropped: Iterable[str]) -> tuple[str | None, Program]:
    """(directory that the program changes to first, the rest of it), every command in canonical form."""
    directory = None
    first = program[0] if program else None
    if (
        "shell_cd_prefix" in rules
        and isinstance(first, Command)
        and len(first.words) == 2
        and first.words[0] == "cd"
        and len(program) > 2
        and program[1] in ("&&", ";", "\n")
    ):
        directory, program = _path(first.words[1], rules), program[2:]
    parts = (_simple(part, rules, set(dropped)) if isinstance(part, Command) else part for part in program)
    return directory, tuple(parts)


def _simple(command: Command, rules: frozenset[str], dropped: set[str]) -> tuple[Any, ...]:
    kept = command.assignments if not command.words else tuple(a for a in command.assignments if a[0] not in dropped)
    redirects = tuple(
        (d or "01"[op[0] != "<"], op, name if op.startswith("<<") else _path(name, rules), mark)
        for d, op, name, mark in command.redirects
    )
    if not any("&" in op for _, op, _, _ in redirects):  # those of one descriptor in order, or where one copies another
        redirects = tuple(sorted(redirects, key=lambda redirect: redirect[0]))
    if not command.words:
        return ("assign", kept, redirects)
    name, words = command.words[0], command.words[1:]
    return (tuple(sorted(kept)), name, *_arguments(name, words, rules), redirects)


def _path(word: str, rules: frozenset[str]) -> str:
    if "shell_paths" not in rules or word.startswith("-") or "/" not in word or "://" in word:
        return word
    active = ACTIVE in word or BEGIN in word
    if not PATH_LIKE.fullmatch(word) or (active and (".." in word or word.endswith("/"))):
        return word  # `*/` are directories alone, and `$x/..` is not nothing
    path = posixpath.normpath(word).replace("//", "/", 1)
    return word if path.startswith("-") else path


def _arguments(name: str, words: Sequence[str], rules: frozenset[str]) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    """(options in canonical order, operands in theirs)."""
    base = re.sub(r"^python[\d.]+$", "python", name.rpartition("/")[2])
    known = OPTIONS.get(base)
    if base in IN_ORDER:
        if base not in NAMES_FILES:
            return (), tuple(words)
        pairs = zip(("", *words), words, strict=False)
        return (), tuple(word if before in TEXT_AFTER else _path(word, rules) for before, word in pairs)
    if known is None:
        return _unknown_options(words, rules)
    with_value, long_with_value = known
    read: list[tuple[str, str]] = []  # options with their values, and operands under the name ''
    pending = iter(words)
    for word in pending:
        if word == "--":
            read += [("", operand) for operand in pending]
        elif word.startswith("--"):
            option, equals, value = word.partition("=")
            if not equals and option[2:] in long_with_value:
                value, equals = next(pending, ""), "=" if "shell_long_options" in rules else " "
            read.append((option, equals + value))
        elif len(word) > 1 and word[0] == "-":
            read += _cluster(base, word, with_value, pending, rules)
        else:
            read.append(("", word))
    pattern = base in PATTERN_FIRST and not any(option in PATTERN_OPTIONS for option, _ in read)
    for index, (option, operand) in enumerate(read):
        if not option and not pattern:
            read[index] = ("", _path(operand, rules))
        pattern = pattern and bool(option)
    if "shell_flag_order" not in rules:
        return tuple(read), ()
    # tar's -C holds for the operands after it
    placed = [pair for pair in read if base == "tar" and pair[0] in ("-C", "--directory")]
    # stable: the order of equal options may mean something
    options = sorted((pair for pair in read if pair[0] and pair not in placed), key=lambda pair: pair[0])
    operands = (
        f"{option} {value}" if option else value for option, value in read if not option or (option, value) in placed
    )
    return tuple(options), tuple(operands)


def _cluster(base: str, word: str, with_value: str, pending: Any, rules: frozenset[str]) -> list[tuple[str, str]]:
    """The options of `-abc`: letters up to one that takes a value, which is the rest or the next word."""
    if base in ("head", "tail") and word[1:].isdigit():
        return [("-n", word[1:])]
    if "shell_flag_clusters" not in rules and len(word) > 2:
        return [(word, next(pending, "") if word[-1] in with_value else "")]
    found = []
    letters = re.findall(r"\d+|\D", word[1:])
    for index, letter in enumerate(letters, start=1):
        if letter in with_value or (base == "sed" and letter == "i"):
            rest = "".join(letters[index:])
            found.append(("-" + letter, rest if rest or letter not in with_value else next(pending, "")))
            break
        found.append(("-" + letter, ""))
    return found


def _unknown_options(words: Sequence[str], rules: frozenset[str]) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    """Each option with all that follows it up to the next one, since which of it is the option's value is not known."""
    leading: list[str] = []
    groups: list[list[str]] = []
    end = words.index("--") if "--" in words else len(words)
    for word in words[:end]:
        option, equals, value = word.partition("=")
        if word.startswith("--") and equals and "shell_long_options" in rules:
            groups.append([option, value])
        elif word.startswith("-") and word != "-":
            groups.append([word])
        else:
            (groups[-1] if groups else leading).append(_path(word, rules))
    if "shell_flag_order" in rules:
        groups.sort(key=lambda group: group[0])
    rest = [_path(word, rules) for word in words[end:]]
    return tuple(map(tuple, [*groups, rest] if rest else groups)), tuple(leading)


def _same_programs(ours: tuple[str | None, Program], theirs: tuple[str | None, Program], rules: frozenset[str]) -> bool:
    (our_place, left), (their_place, right) = ours, theirs
    if our_place is not None and their_place is not None:
        return our_place == their_place and left == right
    place = our_place if our_place is not None else their_place
    if left == right:
        # an absolute directory may be the one the agent is in; `..`, `src`, `~` and `/` are another
        return place is None or (place.startswith("/") and place.strip("/") != "")
    if place is None:
        return False
    return _inside(left, our_place, rules) == _inside(right, their_place, rules)


def _inside(program: Program, directory: str | None, rules: frozenset[str]) -> Program:
    """`program` with its relative operands seen from `directory`; unchanged where that is None."""
    if directory is None:
        return program

    def moved(word: str) -> str:
        inner = isinstance(word, str) and word and word[0] not in "-/" + ACTIVE + BEGIN
        return posixpath.normpath(posixpath.join(directory, word)) if inner else word

    return tuple(
        (*part[:3], tuple(moved(w) for w in part[3]), *part[4:])
        if isinstance(part, tuple) and len(part) == 5 and part[1] not in ("echo", "printf")
        else part
        for part in program
    )
