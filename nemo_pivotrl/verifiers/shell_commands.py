"""One simple command in one form: its options by what they mean, its operands by what they name.

What each option means stands in `shell_options.toml`. A command that is not there, or one with an option that is not,
keeps all its words in their order.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_pivotrl.verifiers.shell_lexer import ACTIVE, BEGIN, END, WHOLE
from nemo_pivotrl.verifiers.shell_options import NotListed, Options, option_table, read_options

Form = tuple[Any, ...]
Redirect = tuple[str, str, str, str]
"""Descriptor, operator, target (or the text of a here-document), and `'` for a text that is not expanded."""
MARKS = frozenset((ACTIVE, BEGIN, END, WHOLE))
RAW_WORDS = frozenset(
    "find awk gawk echo printf test expr exec eval command builtin trap set let xargs parallel java".split()
)
"""Commands whose words say what their place says, `--x=y` included."""
SCRIPTS = re.compile(r"python[\d.]*|node|bash|sh|ruby|perl")
"""Interpreters: their first word is a file, and all after it is that file's."""
WRAPPERS = frozenset("sudo nohup timeout".split())
"""Commands that run the command after them."""
LISTS = frozenset(
    "cut date df du env free head hostname id mount printenv ps pwd sort tail uname uniq uptime wc".split()
)
"""Commands of which nothing but their output counts, and that is the same in a pipe."""
FILTERS = frozenset("awk cut egrep fgrep grep head jq nl sed sort tac tail tr uniq wc".split())
"""Commands that read their input and do nothing else."""
NAMES_SHOWN = frozenset("diff du grep head ls md5sum realpath rg sha256sum stat tail wc".split())
"""Commands that say the names they are given: where their output goes on, its spelling counts."""
NAMES_A_FILE = re.compile(r"[^/]\.[a-z]\w{0,4}$")
"""Words that are no branch and no tag, by their ending."""
STANDARD = ("/bin/", "/usr/bin/")
"""Where the tools of the system lie."""
SIGNALS = {"HUP": "1", "INT": "2", "QUIT": "3", "KILL": "9", "USR1": "10", "USR2": "12", "TERM": "15", "CONT": "18"}
"""Numbers of signals on Linux; source: signal(7)."""
OPTIONAL_VALUE = frozenset(
    "color colour abbrev decorate backup preserve reflink interactive in-place update cov".split()
)
"""Long options of tools at large whose value, if any, must be glued to them."""
FIND_TAKES = frozenset(
    (
        "-name -iname -path -ipath -wholename -regex -iregex -lname -type -xtype -size -perm -user -group -uid -gid -newer "
        "-mtime -atime -ctime -mmin -amin -cmin -maxdepth -mindepth -printf -fprintf -fprint -fprint0 -fls -inum -links "
        "-samefile -fstype -used"
    ).split()
)
"""Words of find that take the next one."""
FIND_RUNS = frozenset("-exec -execdir -ok -okdir".split())
"""Words of find that take all up to `;` or `+`."""
FIND_ACTS = FIND_RUNS | frozenset("-delete -ls -fls -print0 -printf -fprint -fprint0 -fprintf -quit -o -or ,".split())
"""Words of find beside which a -print says something."""
ONE_FILE = {"grep": "HlLrRZT", "head": "v", "tail": "vfF", "sort": "o", "uniq": "", "cut": "", "sed": "is"}
"""Filters that say the same of a file by its name and on their input, but with these options."""


@dataclass(frozen=True, slots=True)
class Command:
    """A simple command: assignments before it, its words, its redirections."""

    assignments: tuple[tuple[str, str], ...]
    words: tuple[str, ...]
    redirects: tuple[Redirect, ...]


def is_literal(word: str) -> bool:
    """Whether the shell takes a word as it stands."""
    return not MARKS & set(word)


def only_lists(name: str) -> bool:
    """Whether a command is the same with `| cat` after it, its status aside."""
    return name.rpartition("/")[2] in LISTS


def only_filters(words: Sequence[str]) -> bool:
    """Whether a command takes its input and does nothing else."""
    return words[0] in FILTERS and not (words[0] == "sed" and any(word.startswith("-i") for word in words))


def clean_operand(word: str, rules: frozenset[str], used: set[str]) -> str:
    """`./a//b` -> `a/b`. A slash at the end and `..` stay: they ask whether there is a directory, and which."""
    if "shell_paths" not in rules or "/" not in word or "://" in word or word.startswith(("-", "//")):
        return word
    path = re.sub(r"/(?:\./)+", "/", re.sub(r"/{2,}", "/", word))
    while path.startswith("./") and len(path) > 2:
        path = path[2:]
    path = "." if path == "./" else path
    if path.startswith(("-", "~", ACTIVE, BEGIN, WHOLE)) and not word.startswith(path[:1]):
        return word  # `./*` and `./-x` are spelled so for a reason
    used.add("shell_paths")
    return path


def read_simple(
    words: Sequence[str],
    redirects: tuple[Redirect, ...],
    rules: frozenset[str],
    used: set[str],
    goes_on: bool = False,
) -> tuple[Form, tuple[Redirect, ...]]:
    """The form of a command's words, and its redirections. `goes_on`: its output is read by another command or a file."""
    if not words:
        return (), redirects
    if goes_on and words[0].rpartition("/")[2] in NAMES_SHOWN:
        rules = rules - {"shell_paths"}
    if "shell_idioms" in rules:
        words, redirects = _idiom(list(words), redirects, used)
    name = words[0]
    base = name.rpartition("/")[2]
    if "shell_paths" in rules and name in {place + base for place in STANDARD} and _is_standard(base):
        used.add("shell_paths")
        name = base
    skipped = _wrapped(name, words)
    if skipped:
        inner, redirects = read_simple(words[skipped:], redirects, rules, used, goes_on)
        return ("wrapped", *words[:skipped], inner), redirects
    if SCRIPTS.fullmatch(name):
        return ("script", name, *_script(words[1:], rules, used)), redirects
    if name == "find":
        return (name, *_find(words[1:], rules, used)), redirects
    words = _subcommand_first(name, words, rules, used)
    key, options = _entry(name, words)
    if options is None:
        return (name, *_unknown(name, words[1:], rules, used)), redirects
    return _known(key, options, words[len(key.split()) :], redirects, rules, used)


def _is_standard(base: str) -> bool:
    return (
        base in RAW_WORDS
        or SCRIPTS.fullmatch(base) is not None
        or base in WRAPPERS
        or any(k.split()[0] == base for k in option_table())
    )


def _wrapped(name: str, words: Sequence[str]) -> int:
    """How many words come before the command that `sudo`, `nohup` or `timeout 5` runs; 0 where that is not plain."""
    skipped = 2 if name == "timeout" else 1
    plain = (
        name in WRAPPERS and len(words) > skipped and not any(w[:1] == "-" or "=" in w for w in words[1 : skipped + 1])
    )
    return skipped if plain else 0


def _subcommand_first(name: str, words: Sequence[str], rules: frozenset[str], used: set[str]) -> Sequence[str]:
    """`apt-get -y install x` as `apt-get install -y x`, for the options that the table names `before`."""
    if "shell_flag_order" not in rules or len(words) < 3 or words[1][:1] != "-":
        return words
    at = next((at for at, word in enumerate(words) if at > 1 and f"{name} {word}" in option_table()), 0)
    options = option_table().get(f"{name} {words[at]}")
    if not at or options is None:
        return words
    try:
        read = read_options(name, options, words[1:at], rules, set())
    except NotListed:
        return words
    if any(option not in options.before or (option in options.valued and not value) for option, value in read):
        return words
    used.add("shell_flag_order")
    return [name, words[at], *words[1:at], *words[at + 1 :]]


def _entry(name: str, words: Sequence[str]) -> tuple[str, Options | None]:
    table = option_table()
    for length in (3, 2, 1):
        key = " ".join((name, *words[1:length]))
        if key in table and len(words) >= length:
            return key, table[key]
    return name, None


def _idiom(words: list[str], redirects: tuple[Redirect, ...], used: set[str]) -> tuple[list[str], tuple[Redirect, ...]]:
    """A few other spellings: `[ x ]`, `kill -KILL`, `chmod +x`, `npm i`, `git --no-pager`, `egrep`, a script on the input."""
    before = list(words), redirects
    name = words[0]
    if name == "[" and words[-1] == "]":
        words = ["test", *words[1:-1]]
    elif name in ("egrep", "fgrep"):
        words = ["grep", "-E" if name == "egrep" else "-F", *words[1:]]
    elif name == "kill":
        words = _kill(words)
    elif name == "chmod" and len(words) > 1 and re.fullmatch(r"\+[rx]+", words[1]):
        words[1] = "a" + words[1]
    elif name == "dd" and all(re.match(r"\w+=", word) for word in words[1:]):
        pairs = dict(word.split("=", 1) for word in words[1:])
        words = [name, *sorted(words[1:])] if len(pairs) == len(words) - 1 else words
    elif name == "npm" and words[1:2] == ["i"]:
        words[1] = "install"
    elif name == "git":
        while words[1:2] == ["--no-pager"]:
            del words[1]
    elif name in ("python", "python3"):
        inputs = [r for r in redirects if r[0] == "0"]
        if words[1:] in ([], ["-"]) and len(inputs) == 1 and inputs[0][1] == "<<":
            _, _, body, mark = inputs[0]
            reads = "stdin" in body or "input(" in body
            if not reads and (mark or not any(c in body for c in "$`\\")):
                words, redirects = [name, "-c", body], tuple(r for r in redirects if r[0] != "0")
        if len(words) == 3 and words[1] == "-c":
            words = [*words[:2], words[2].strip("\n")]
    if (list(words), redirects) != before:
        used.add("shell_idioms")
    return words, redirects


def _kill(words: list[str]) -> list[str]:
    if len(words) > 3 and words[1] in ("-s", "-n"):
        words = [words[0], "-" + words[2], *words[3:]]
    if len(words) < 2 or not words[1].startswith("-"):
        return [words[0], "-15", *words[1:]] if words[1:] else words
    number = SIGNALS.get(words[1][1:].upper().removeprefix("SIG"))
    return [words[0], "-" + number, *words[2:]] if number else words


def _script(words: Sequence[str], rules: frozenset[str], used: set[str]) -> list[str]:
    """An interpreter's words: those of `-c`, `-m` and the like as they are, a script's path in one spelling, its own split."""
    at = 1 if words[:1] in (["-u"], ["-x"]) else 0
    if len(words) <= at or words[at].startswith("-"):
        return list(words)
    return [*words[:at], clean_operand(words[at], rules, used), *_split_values(words[at + 1 :], rules, used)]


def _find(words: Sequence[str], rules: frozenset[str], used: set[str]) -> list[str]:
    """`find`'s words: `.` where no folder is named, `!` for -not, without -a and without a -print that is understood."""
    found = ["." if word == "./" and "shell_paths" in rules else word for word in words]
    used |= {"shell_paths"} if found != list(words) else set()
    if "shell_idioms" not in rules or found[:1] in (["-H"], ["-L"], ["-P"], ["-D"]) or (found and found[0][:2] == "-O"):
        return found
    plain = ["."] if not found or found[0][:1] in "-(!" else []
    at = 0
    while at < len(found):
        word = found[at]
        end = at + 1
        if word in FIND_RUNS:
            end = next((i + 1 for i in range(at, len(found)) if found[i] in (";", "+")), len(found))
        elif word in FIND_TAKES:
            end = at + 2
        plain += [] if word in ("-a", "-and") else ["!"] if word == "-not" else found[at:end]
        at = end
    if plain[-1:] == ["-print"] and plain.count("-print") == 1 and not FIND_ACTS & set(plain):
        plain.pop()
    used |= {"shell_idioms"} if plain != found else set()
    return plain


def _unknown(name: str, words: Sequence[str], rules: frozenset[str], used: set[str]) -> list[str]:
    base = name.rpartition("/")[2]
    return list(words) if base in RAW_WORDS or base in WRAPPERS else _split_values(words, rules, used)


def _split_values(words: Iterable[str], rules: frozenset[str], used: set[str]) -> list[str]:
    """`--x=y` as `--x y`, up to `--`."""
    found: list[str] = []
    for word in words:
        option, equals, value = word.partition("=")
        ended = "--" in found
        plain = re.fullmatch(r"--[A-Za-z][\w-]*", option) and option[2:] not in OPTIONAL_VALUE
        plain = plain and value not in ("true", "false")  # which some tools take after `=` alone
        if equals and plain and not ended and "shell_long_options" in rules:
            used.add("shell_long_options")
            found += [option, value]
        else:
            found.append(word)
    return found


def _known(
    key: str,
    options: Options,
    words: Sequence[str],
    redirects: tuple[Redirect, ...],
    rules: frozenset[str],
    used: set[str],
) -> tuple[Form, tuple[Redirect, ...]]:
    try:
        read = read_options(key, options, words, rules, used)
    except NotListed:
        return (*key.split(), *_split_values(words, rules, used)), redirects
    names = {option for option, _ in read}
    pattern = options.operands == "pattern" and not names & {"e", "f", "reference"}
    for index, (option, operand) in enumerate(read):
        if not option and not pattern and options.operands != "words":
            read[index] = ("", _named(operand, options, names, rules, used))
        pattern = pattern and bool(option)
    if "shell_flag_order" not in rules:
        return (*key.split(), ("in order", *read)), redirects
    used.add("shell_flag_order")
    placed = [pair for pair in read if pair[0] in options.placed]
    # stable: the order of options of one name may mean something
    free = sorted((pair for pair in read if pair[0] and pair not in placed), key=lambda pair: pair[0])
    orders = [tuple(option for option, _ in read if option in group) for group in options.order]
    kept = tuple(order for order in orders if len(set(order)) > 1)
    operands = [
        f"-{option} {value}" if option else value for option, value in read if not option or (option, value) in placed
    ]
    if "shell_idioms" in rules:
        key, free, operands, redirects = _known_idiom(key, free, operands, redirects, rules, used)
    if options.unordered and "shell_operand_order" in rules and not _nested(operands):
        used.add("shell_operand_order")
        operands = sorted(operands)
    return (*key.split(), ("options", *free), kept, ("operands", *operands)), redirects


def _named(word: str, options: Options, names: set[str], rules: frozenset[str], used: set[str]) -> str:
    path = clean_operand(word, rules, used)
    idle = options.slash == "any" or (options.slash is not None and not names & set(options.slash))
    if idle and "shell_paths" in rules and path.endswith("/") and len(path) > 1 and is_literal(path):
        used.add("shell_paths")
        return path.rstrip("/")
    return path


def _nested(operands: Sequence[str]) -> bool:
    """Whether one operand may lie within another, or may be several: then their order may count."""
    if not all(is_literal(word) for word in operands):
        return True
    whole = {posixpath.normpath(word) for word in operands}
    return any(
        "/".join(parts[:i]) in whole for parts in (path.split("/") for path in whole) for i in range(1, len(parts))
    )


def _known_idiom(
    key: str,
    free: list[tuple[str, str]],
    operands: list[str],
    redirects: tuple[Redirect, ...],
    rules: frozenset[str],
    used: set[str],
) -> tuple[str, list[tuple[str, str]], list[str], tuple[Redirect, ...]]:
    """Idioms that need the options read: `sed -n 1,5p` is `head -n 5`, `grep -r x` is `grep -r x .`, a filter of one file."""
    if key in ("grep", "sed") and [option for option, _ in free if option in ("e", "f")] == ["e"]:
        used.add("shell_idioms")
        operands = [next(value for option, value in free if option == "e"), *operands]
        free = [pair for pair in free if pair[0] != "e"]
    names = {option for option, _ in free}
    if (
        key == "sed"
        and len(operands) in (1, 2)
        and (
            (names == {"n"} and (lines := re.fullmatch(r"(?:1,([1-9]\d*)|(1))p", operands[0])))
            or (not names and (lines := re.fullmatch(r"([1-9]\d*)q", operands[0])))
        )
    ):
        used.add("shell_idioms")
        key, free, operands = "head", [("n", lines[1] or "1")], operands[1:]
        names = {"n"}
    if key == "grep" and names & {"r", "R"} and len(operands) == 1 and not names & {"e", "f"}:
        used.add("shell_idioms")
        operands = [*operands, "."]
    if key in ("git diff", "git log", "git show") and operands.count("--") == 1:
        at = operands.index("--")
        if operands[at + 1 :] and all(NAMES_A_FILE.search(word) for word in operands[at + 1 :]):
            used.add("shell_idioms")
            operands = operands[:at] + operands[at + 1 :]
    scripts = 1 if key in ("grep", "sed") and not names & {"e", "f"} else 0
    if (
        key in ONE_FILE
        and not names & set(ONE_FILE[key])
        and len(operands) == scripts + 1
        and not any(r[0] == "0" for r in redirects)
        and is_literal(operands[-1])
        and operands[-1] not in ("-", ".")
        and not (key == "sed" and "F" in operands[0])
    ):
        used.add("shell_idioms")
        *operands, file = operands
        redirects = (("0", "<", file, ""), *redirects)
    return key, free, operands, redirects
