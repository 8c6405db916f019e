"""Are two arguments of a tool call the same to the tool? Compared under its JSON schema, by named relaxations.

Every function here answers with the empty string for "the same" and else with a few words on the difference. A value
that is equal as JSON is always the same; a relaxation only ever accepts more. `Comparison.touched` collects the
relaxations that were tried with success, so that a verdict can name them.
"""

from __future__ import annotations

import io
import json
import math
import posixpath
import re
import tokenize
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from nemo_pivotrl.config import Limits
from nemo_pivotrl.core.errors import short
from nemo_pivotrl.verifiers.bounds import LimitExceeded, decode_json
from nemo_pivotrl.verifiers.shell import same_command
from nemo_pivotrl.verifiers.swe import category_of

MAX_DIFFERENCES = 16
MAX_CODE_CHARS = 20_000
"""Longer Python code is compared as text."""
MAX_URL_CHARS = 4096
"""Longer URLs are compared as text."""
MAX_MARKS = 30
"""In a text with more combining marks on end characters are not composed: the cost is their square (UAX 15, stream-safe)."""
WRITTEN = Limits(max_chars=1 << 16)
"""Of a value that was written as a string."""
VALUE_WORK = 256
"""Units of work that comparing two values costs besides their characters."""
NOTHING: Mapping[str, Any] = {"not": {}}
"""The schema of no value at all."""
DEFAULT_PORTS = {"http": 80, "https": 443}
STOP_WORDS = frozenset(
    "a an and are at by for from how in is it of on or that the this to was what when where who with".split()
)

SHELL_NAMES = {"command", "cmd", "bash_command", "shell_command", "keystrokes", "commands"}
PYTHON_NAMES = {"code", "python_code", "source", "script"}
QUERY_NAMES = {"query", "q", "queries", "search_query", "search_queries", "search_term", "keywords"}
PROSE_NAMES = {
    *("summary", "thought", "thoughts", "explanation", "description", "reason", "reasoning", "message", "body"),
    *("note", "notes", "comment", "analysis", "plan", "answer", "content_summary"),
}
PATH_NAME = re.compile(r"(^|_)(path|file|filename|filepath|dir|directory|folder|cwd|workdir)s?$")
URL_NAME = re.compile(r"(^|_)(url|uri|link|href)s?$")


@dataclass
class Comparison:
    """One comparison in progress."""

    tool: str
    root: Mapping[str, Any]
    """The tool's parameter schema, for local references."""
    rules: frozenset[str]
    """Relaxations that are switched on."""
    kinds: Mapping[str, str]
    """The recipe's word on what an argument is: `tool.argument` or `argument` to kind."""
    overlap: Mapping[str, float]
    """Share of words that two texts must have in common, by rule."""
    max_work: int
    touched: set[str] = field(default_factory=set)
    differences: list[tuple[str, str]] = field(default_factory=list)
    """(kind, what differs) of each argument that is not the same."""
    spent: int = 0
    trial: bool = False
    """Whether only the fact of a difference is of interest."""

    def allows(self, rule: str, holds: bool) -> bool:
        """Whether `rule` is on and its condition holds; remembers that it was of use."""
        if rule in self.rules and holds:
            self.touched.add(rule)
            return True
        return False

    def differ(self, kind: str, where: str, expected: Any, actual: Any) -> None:
        if len(self.differences) < MAX_DIFFERENCES:
            shown = "" if self.trial else f"{where}: {short(expected, 60)} is not {short(actual, 60)}"
            self.differences.append((kind, shown))

    def spend(self, units: int) -> None:
        """Count work. Raises LimitExceeded past the limit."""
        self.spent += units
        if self.spent > self.max_work:
            raise LimitExceeded("more work than `limits.max_work` allows")


def snake(name: str) -> str:
    """`filePath` -> `file_path`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def kind_of(c: Comparison, name: str, schema: Mapping[str, Any]) -> str:
    """What an argument is: date, url, path, shell, python, query, prose or text."""
    said = c.kinds.get(f"{c.tool}.{name}") or c.kinds.get(name)
    if said:
        return said
    form, plain, tool = schema.get("format"), snake(name), snake(c.tool)
    if form in ("date", "date-time", "time"):
        return "date"
    if form in ("uri", "url", "iri", "uri-reference"):
        return "url"
    if "enum" in schema or "const" in schema:
        return "text"
    shell_tool = category_of(c.tool) == "bash" or re.search(
        r"(^|_)(bash|shell|terminal|exec|execute|command)(_|$)", tool
    )
    if plain in PYTHON_NAMES and re.search(r"python|jupyter|notebook|code_interpreter", tool):
        return "python"
    if plain in SHELL_NAMES and shell_tool:
        return "shell"
    if plain in QUERY_NAMES and "search" in tool and category_of(c.tool) != "search":
        return "query"
    if PATH_NAME.search(plain):
        return "path"
    if URL_NAME.search(plain):
        return "url"
    return "prose" if plain in PROSE_NAMES or category_of(c.tool) == "think" else "text"


def resolve(schema: Any, root: Mapping[str, Any], value: Any) -> Mapping[str, Any]:
    """`schema` with its local reference followed and, of alternatives, the one that fits `value`'s JSON type."""
    for _ in range(8):
        if not isinstance(schema, Mapping):
            return {}
        reference = schema.get("$ref")
        options = schema.get("anyOf") or schema.get("oneOf")
        if isinstance(reference, str) and reference.startswith("#/"):
            found: Any = root
            for part in reference[2:].split("/"):
                found = found.get(part.replace("~1", "/").replace("~0", "~"), {}) if isinstance(found, Mapping) else {}
            schema = found
        elif isinstance(options, list):
            schema = next((o for o in options if isinstance(o, Mapping) and _is_of_type(value, o)), NOTHING)
        else:
            return schema
    return {}


JSON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "boolean": (bool,),
    "integer": (int, float),
    "number": (int, float),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


def _types(schema: Mapping[str, Any]) -> tuple[str, ...]:
    declared = schema.get("type", ())
    listed = [declared] if isinstance(declared, str) else declared if isinstance(declared, (list, tuple)) else ()
    return tuple(t for t in listed if isinstance(t, str))


def _is_of_type(value: Any, schema: Mapping[str, Any]) -> bool:
    types = _types(schema)
    return not types or any(
        isinstance(value, JSON_TYPES.get(t, ())) and (t == "boolean") == isinstance(value, bool) for t in types
    )


def same_json(expected: Any, actual: Any) -> bool:
    """Equality of JSON values; unlike Python's, 1 is neither true nor 1.0."""
    if type(expected) is not type(actual):
        return False
    if isinstance(expected, dict):
        return expected.keys() == actual.keys() and all(same_json(v, actual[k]) for k, v in expected.items())
    if isinstance(expected, list):
        return len(expected) == len(actual) and all(map(same_json, expected, actual))
    return bool(expected == actual) or (expected != expected and actual != actual)  # NaN is the same NaN


def compare(c: Comparison, where: str, expected: Any, actual: Any, schema: Any, kind: str = "text") -> None:
    """Record in `c.differences` where two values are not the same."""
    c.spend(VALUE_WORK)
    if not isinstance(expected, (dict, list)) and same_json(expected, actual):  # of those, part by part
        return
    takes_text = _takes_text(schema, c.root)
    schema = resolve(schema, c.root, expected)
    if not takes_text:
        expected, actual = (_unstring(c, value, schema) for value in (expected, actual))
    if isinstance(expected, dict) and isinstance(actual, dict):
        compare_objects(c, where, expected, actual, schema)
    elif isinstance(expected, list) and isinstance(actual, list):
        _compare_lists(c, where, expected, actual, schema, kind)
    elif isinstance(expected, str) and isinstance(actual, str):
        if not _same_text(c, expected, actual, schema, kind):
            c.differ(kind, where, expected, actual)
    elif not same_json(expected, actual) and not _same_number(c, expected, actual):
        c.differ(kind, where, expected, actual)


def compare_objects(
    c: Comparison, where: str, expected: Mapping[str, Any], actual: Mapping[str, Any], schema: Mapping[str, Any]
) -> None:
    """Compare two objects property by property; one that only one side has must be its default, or null and optional."""
    declared = schema.get("properties")
    properties: Mapping[str, Any] = declared if isinstance(declared, Mapping) else {}
    required = schema.get("required")
    for name in sorted(expected.keys() | actual.keys()):
        inner, place = properties.get(name, {}), f"{where}.{name}" if where else name
        if name in expected and name in actual:
            kind = kind_of(c, name, resolve(inner, c.root, expected[name]))
            compare(c, place, expected[name], actual[name], inner, kind)
            continue
        value = expected.get(name, actual.get(name))
        resolved = inner if isinstance(inner, Mapping) and "default" in inner else resolve(inner, c.root, value)
        optional = not (isinstance(required, list) and name in required)
        if "default" in resolved and c.allows("omitted_default", _equals(c, resolved["default"], value, resolved)):
            continue
        if name in properties and optional and c.allows("null_optional", value is None):
            continue
        c.differ("text", place, *(side.get(name, "(absent)") for side in (expected, actual)))


def _equals(c: Comparison, expected: Any, actual: Any, schema: Any, kind: str = "text") -> bool:
    trial = Comparison(c.tool, c.root, c.rules, c.kinds, c.overlap, c.max_work - c.spent, trial=True)
    compare(trial, "", expected, actual, schema, kind)
    c.spend(trial.spent)
    if trial.differences:
        return False
    c.touched |= trial.touched
    return True


def _compare_lists(
    c: Comparison, where: str, expected: list[Any], actual: list[Any], schema: Mapping[str, Any], kind: str
) -> None:
    inner = schema.get("items")
    if len(expected) != len(actual):
        c.differ(kind, where, f"{len(expected)} items", f"{len(actual)} items")
        return
    if not (schema.get("uniqueItems") is True and "set_order" in c.rules):
        # the words of one command, rather than a list of commands: no shell reads them, but what follows `sh -c`
        words = kind == "shell" and not where.endswith("s")
        for index, pair in enumerate(zip(expected, actual, strict=True)):
            script = index and expected[index - 1] in ("-c", "-lc", "-ic")
            compare(c, f"{where}[{index}]", *pair, inner, "text" if words and not script else kind)
        return
    # equality under the rules is close enough to transitive for a greedy matching, equal values first
    c.spend(VALUE_WORK * (len(expected) + len(actual)))
    texts = [[json.dumps(value, sort_keys=True) for value in side] for side in (expected, actual)]
    c.spend(4 * sum(len(text) for side in texts for text in side))
    left: dict[str, list[int]] = {}
    for index, text in enumerate(texts[1]):
        left.setdefault(text, []).append(index)
    unmatched, moved = [], False
    for index, value in enumerate(expected):
        places = left.get(texts[0][index])
        if places:
            moved |= places.pop(0) != index
        else:
            unmatched.append((index, value))
    rest = sorted(index for places in left.values() for index in places)
    for index, value in unmatched:
        at = next((i for i in rest if _equals(c, value, actual[i], inner, kind)), None)
        if at is None:
            c.differ(kind, where, value, "(absent)")
            return
        rest.remove(at)
        moved |= at != index
    if moved:
        c.touched.add("set_order")


def _unstring(c: Comparison, value: Any, schema: Mapping[str, Any]) -> Any:
    """A number, truth value, list or object that was written as a string, where the schema wants no string."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    try:
        read = decode_json(text.lower() if text in ("True", "False") else text, WRITTEN)
    except ValueError:
        return value
    return read if _is_of_type(read, schema) and c.allows("stringified", True) else value


def _takes_text(schema: Any, root: Mapping[str, Any]) -> bool:
    resolved = resolve(schema, root, "")
    return resolved is not NOTHING and _is_of_type("", resolved)


def _same_number(c: Comparison, expected: Any, actual: Any) -> bool:
    if isinstance(expected, bool) or isinstance(actual, bool):
        return False
    if not isinstance(expected, (int, float)) or not isinstance(actual, (int, float)):
        return False
    close = isinstance(expected, float) and isinstance(actual, float) and math.isclose(expected, actual, rel_tol=1e-9)
    whole = isinstance(expected, float) and isinstance(actual, float) and expected.is_integer() and actual.is_integer()
    return c.allows("number_type", expected == actual or (close and not whole))


def _same_text(c: Comparison, expected: str, actual: str, schema: Mapping[str, Any], kind: str) -> bool:
    c.spend(len(expected) + len(actual))
    options = schema.get("enum")
    if isinstance(options, list):
        return c.allows("enum_case", _enum(expected, options) == _enum(actual, options) != "")
    if kind == "shell":
        return same_command(expected, actual, c.rules, c.touched, c.spend)
    runs = kind not in ("path", "python")  # within these two blanks may count
    if c.allows("whitespace", tidy(expected, runs) == tidy(actual, runs)):
        return True
    if "letter_case" in c.rules and c.allows("letter_case", _fold(expected) == _fold(actual)):
        return True
    if kind == "date":
        return c.allows("dates", (instant := _instant(expected)) is not None and instant == _instant(actual))
    if kind == "url":
        return c.allows("urls", (found := _url(expected)) is not None and found == _url(actual))
    if kind == "path":
        return c.allows("paths", clean_path(expected) == clean_path(actual))
    if kind == "python":
        return c.allows("python_tokens", (tokens := _tokens(expected)) is not None and tokens == _tokens(actual))
    if kind == "query":
        return c.allows("search_tokens", word_share(expected, actual) >= c.overlap["search_tokens"])
    if kind == "prose":
        share = word_share(expected, actual) >= c.overlap["prose"] and not contradicts(expected, actual)
        return c.allows("prose", share)
    return bool(ISO.match(expected)) and c.allows(
        "dates", (at := _instant(expected)) is not None and at == _instant(actual)
    )


ISO = re.compile(r"\d{4}-\d{2}-\d{2}(T|$)")


def tidy(text: str, runs: bool = True) -> str:
    """`text` with one form of line ends and of composed characters, no blanks at line ends, nor around the whole.

    `runs`: in a single line, blanks on end are one.
    """
    lines = _compose(text).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if len(lines) == 1:
        return " ".join(lines[0].split()) if runs else lines[0].strip()
    return "\n".join(line.rstrip() for line in lines).strip("\n")


def _compose(text: str) -> str:
    if text.isascii():
        return text
    marks = 0
    for char in text:
        marks = marks + 1 if unicodedata.combining(char) else 0
        if marks > MAX_MARKS:
            return text
    return unicodedata.normalize("NFC", text)


def _fold(text: str) -> str:
    return tidy(text).casefold()


def _enum(value: str, options: list[Any]) -> str:
    """The one option that `value` names up to case, blanks, hyphens and underscores; '' where none or several do."""

    def plain(text: str) -> str:
        return re.sub(r"[\s_-]+", "_", text.strip().casefold())

    named = {option for option in options if isinstance(option, str) and plain(option) == plain(value)}
    return named.pop() if len(named) == 1 else ""


def _instant(text: str) -> tuple[str, Any] | None:
    """A date, a time of day, or a moment in UTC (without a zone: as it stands)."""
    text = text.strip()
    if len(text) > 64:
        return None
    readers: tuple[tuple[str, Any], ...] = (("date", date), ("time", time), ("moment", datetime))
    for name, cls in readers:
        try:
            read = cls.fromisoformat(text)
        except ValueError:
            continue
        if isinstance(read, datetime) and read.tzinfo is not None:
            try:
                read = read.astimezone(UTC)
            except OverflowError:  # before the year 1 or after 9999, seen from Greenwich
                return None
        return name, read.isoformat()
    return None


def _url(text: str) -> tuple[Any, ...] | None:
    if len(text) > MAX_URL_CHARS:
        return None
    odd = "surrogateescape"  # bytes that are no UTF-8 stay what they are
    try:
        parts = urlsplit(text.strip())
        port = parts.port
        pairs = parse_qsl(parts.query, keep_blank_values=True, errors=odd)
        query = urlencode(sorted(pairs, key=lambda pair: pair[0]), errors=odd)
        segments = (quote(unquote(s, errors=odd), safe=":@!$&'()*+,;=~-._", errors=odd) for s in parts.path.split("/"))
        path = "/".join(segments).rstrip("/") or "/"
    except ValueError:
        return None
    if not parts.scheme or not parts.hostname:
        return None
    scheme = parts.scheme.lower()
    return (
        scheme,
        parts.username,
        parts.password,
        parts.hostname,
        None if port == DEFAULT_PORTS.get(scheme) else port,
        path,
        query,
        parts.fragment,
    )


def clean_path(text: str) -> str:
    """`./a//b/../c/` -> `a/c`. Nothing is looked up, so links are not followed."""
    text = text.strip()
    return posixpath.normpath(text).replace("//", "/", 1) if text else text


def _tokens(code: str) -> list[tuple[int, str]] | None:
    """Tokens of Python code without comments, blank lines and the choice of quotes; None for what is no Python.

    A notebook's `!` and `%` lines are no Python: blanks mean something in them.
    """
    if len(code) > MAX_CODE_CHARS or re.search(r"^\s*[%!?]", code, re.MULTILINE):
        return None
    left_out = (tokenize.COMMENT, tokenize.NL, tokenize.ENCODING)
    found = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(code.rstrip() + "\n").readline):
            if token.type == tokenize.INDENT:
                found.append((token.type, ""))
            elif token.type == tokenize.STRING:
                found.append((token.type, re.sub(r"^(\w*)'([^'\"\\\n]*)'$", r'\1"\2"', token.string)))
            elif token.type == tokenize.ERRORTOKEN:
                return None
            elif token.type not in left_out:
                found.append((token.type, token.string))
    except (tokenize.TokenError, SyntaxError, UnicodeError):
        return None
    return found


def contradicts(expected: str, actual: str) -> bool:
    """Whether each text has a number or an identifier with digits that the other has not."""
    left, right = (
        {w for w in re.findall(r"\w+", text.casefold()) if any(map(str.isdigit, w))} for text in (expected, actual)
    )
    return not (left <= right or right <= left)


def word_share(expected: str, actual: str) -> float:
    """Words in common over all words of both texts (Jaccard on multisets), stop words and case aside; 1 for equal ones."""
    left, right = (
        Counter(w for w in re.findall(r"\w+", text.casefold()) if w not in STOP_WORDS) for text in (expected, actual)
    )
    union = (left | right).total()
    return (left & right).total() / union if union else 0.0
