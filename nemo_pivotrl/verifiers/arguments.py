"""What an argument of a tool call says, in one form, under the tool's JSON schema and by named relaxations.

Two arguments are the same if their forms are equal, so the relation is reflexive, symmetric and transitive. A text is
itself, blanks and case included, unless its schema, its argument's name or the text itself says that it is a number, a
date, an address, a path, a command, a query, code or JSON. No name makes a text free text: what free texts mean is for a
judge to say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from nemo_pivotrl.config import Limits
from nemo_pivotrl.verifiers import values
from nemo_pivotrl.verifiers.bounds import LimitExceeded, decode_json
from nemo_pivotrl.verifiers.queries import read_query
from nemo_pivotrl.verifiers.shell import read_command
from nemo_pivotrl.verifiers.sql import looks_like_sql, read_sql
from nemo_pivotrl.verifiers.swe import category_of

Form = tuple[Any, ...]
WRITTEN = Limits(max_chars=1 << 16)
"""Of a value that was written as a string."""
VALUE_WORK = 256
"""Units of work that reading one value costs besides its characters."""
PROSE_WORDS = 4
"""Texts of so many words are prose to a judge."""
NOTHING: Mapping[str, Any] = {"not": {}}
"""The schema of no value at all."""

SHELL_NAMES = {"command", "cmd", "bash_command", "shell_command", "keystrokes", "commands"}
PYTHON_NAMES = {"code", "python_code", "source", "script"}
QUERY_NAMES = {"query", "q", "queries", "search_query", "search_queries", "search_term", "keywords"}
SQL_NAMES = {"sql", "sql_query", "sql_statement", "statement", "statements"}
BODY_NAMES = {"body", "data", "payload", "json", "json_body", "request_body", "json_data"}
SHELL_TOOL = re.compile(r"(^|_)(bash|shell|terminal|exec|execute|command)(_|$)")
SQL_TOOL = re.compile(r"(^|_)(sql|sqlite|mysql|postgres|postgresql|bigquery|snowflake|duckdb|database|db)(_|$)")
SEARCH_TOOL = re.compile(
    r"^search$|(^|_)(web|internet|google|bing|duckduckgo|brave|tavily|serp|serper|wikipedia|news)(_|$)"
)
WEB_TOOL = re.compile(r"(^|_)(http|https|api|request|curl|fetch|rest|endpoint)(_|$)")
MEDIA_TOOL = re.compile(r"video|audio|clip|trim|media|song|movie|record|timer")
PATH_NAME = re.compile(r"(^|_)(path|file|filename|filepath|dir|directory|folder|cwd|workdir)s?$")
PATH_OF_OTHERS = {"json_path", "jsonpath", "xpath", "key_path", "xml_path", "query_path"}
"""Arguments whose paths lead into a document."""
FOLDER_NAME = re.compile(r"(^|_)(dir|directory|folder|cwd|workdir)$")
URL_NAME = re.compile(r"(^|_)(url|uri|link|href)s?$")
DATE_NAME = re.compile(r"(^|_)(date|day|datetime|timestamp|birthday|dob|deadline)s?$")
TIME_NAME = re.compile(r"(^|_)(t|time|at|when|datetime|timestamp)s?$")
PLACE_NAME = re.compile(r"(^|_)(city|town|country)(_name)?$")
PHONE_NAME = re.compile(r"(^|_)(phone|mobile|telephone|tel|cell|fax|whatsapp)(_number|_no)?s?$")
SECRET_NAME = re.compile(r"pass|secret|token|key|credential|pattern|regex|hash|user|login|(^|_)id$")
DATE, CLOCK = re.compile(r"\d{4}-\d{2}-\d{2}"), re.compile(r"\d{2}:\d{2}(:\d{2}(\.\d{1,6})?)?")


@dataclass
class Reading:
    """One call's arguments on their way to their form."""

    tool: str
    root: Mapping[str, Any]
    """The tool's parameter schema, for local references."""
    rules: frozenset[str]
    """Relaxations that are switched on."""
    kinds: Mapping[str, str]
    """The recipe's word on what an argument is: `tool.argument` or `argument` to kind."""
    max_work: int
    directory: str | None = None
    """Where a shell command runs, if that is known."""
    used: set[str] = field(default_factory=set)
    """Relaxations that had a say in the form."""
    spent: int = 0

    def on(self, rule: str) -> bool:
        """Whether `rule` is on; then it is noted as used."""
        if rule in self.rules:
            self.used.add(rule)
            return True
        return False

    def spend(self, units: int) -> None:
        """Count work. Raises LimitExceeded past the limit."""
        self.spent += units
        if self.spent > self.max_work:
            raise LimitExceeded("more work than `limits.max_work` allows")


def snake(name: str) -> str:
    """`filePath` -> `file_path`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def kind_of(c: Reading, name: str, schema: Mapping[str, Any]) -> str:
    """What an argument is by the recipe, its schema or its name: see `functional.KINDS`."""
    said = c.kinds.get(f"{c.tool}.{name}") or c.kinds.get(name)
    if said:
        return said
    form, plain, tool = schema.get("format"), snake(name), snake(c.tool)
    if form in ("date", "date-time", "time"):
        return "date"
    if form in ("uri", "url", "iri", "uri-reference"):
        return "url"
    if "enum" in schema or "const" in schema or "pattern" in schema:
        return "text"
    if plain in PYTHON_NAMES and re.search(r"python|jupyter|notebook|code_interpreter", tool):
        return "python"
    if plain in SHELL_NAMES and (category_of(c.tool) == "bash" or SHELL_TOOL.search(tool)):
        return "keys" if plain == "keystrokes" else "shell"
    if plain in SQL_NAMES or (plain in QUERY_NAMES and SQL_TOOL.search(tool)):
        return "sql"
    if plain in QUERY_NAMES:
        return "query" if SEARCH_TOOL.search(tool) else "words"
    if plain in PATH_OF_OTHERS or (PATH_NAME.search(plain) and WEB_TOOL.search(tool)):
        return "exact"
    if FOLDER_NAME.search(plain):
        return "folder"
    for kind, pattern in (("path", PATH_NAME), ("url", URL_NAME), ("place", PLACE_NAME), ("phone", PHONE_NAME)):
        if pattern.search(plain):
            return kind
    if (DATE_NAME.search(plain) or TIME_NAME.search(plain)) and not MEDIA_TOOL.search(tool):
        return "when"
    return "body" if plain in BODY_NAMES else "exact" if SECRET_NAME.search(plain) else "text"


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


PLAIN_KINDS = frozenset("text prose message body sql when date url edit".split())
"""Kinds of which a text may still show that it is something else."""
FOLDED = frozenset("path folder exact words".split())
"""Kinds that have a form of their own, or none, and that `letter_case` takes up to case as it does plain texts."""
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


def read_arguments(c: Reading, arguments: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, tuple[str, Form]]:
    """Argument to (what it is, its form), without those that say nothing."""
    declared = schema.get("properties")
    properties: Mapping[str, Any] = declared if isinstance(declared, Mapping) else {}
    found = {}
    for name, value in arguments.items():
        inner = properties.get(name, {})
        if _says_nothing(c, name, value, properties, schema.get("required")):
            continue
        kind = kind_of(c, name, resolve(inner, c.root, value))
        number = None
        if not inner and kind == "text" and isinstance(value, str) and "stringified" in c.rules:
            number = values.written_number(value)  # nothing says that this tool wants a text
            c.used |= {"stringified"} if number is not None else set()
        found[name] = (kind, read_value(c, value if number is None else number, inner, kind, name))
    return found


def _says_nothing(c: Reading, name: str, value: Any, properties: Mapping[str, Any], required: Any) -> bool:
    """Whether an argument may be left out, and is its default, or null where it has none.

    A required argument says what it says, default or not: a tool refuses a call without it.
    """
    optional = name in properties and not (isinstance(required, list) and name in required)
    inner = properties.get(name, {})
    resolved = inner if isinstance(inner, Mapping) and "default" in inner else resolve(inner, c.root, value)
    if "default" in resolved:
        if "omitted_default" not in c.rules or not optional:
            return False
        used = set(c.used)
        same = read_value(c, value, resolved) == read_value(c, resolved["default"], resolved)
        c.used = c.used | {"omitted_default"} if same else used
        return same
    if value is None:
        return optional and c.on("null_optional")
    return optional and "described_default" in c.rules and _is_stated_default(c, value, resolved)


def _is_stated_default(c: Reading, value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether a value is the default that the argument's description states."""
    description = schema.get("description")
    stated: Any = values.stated_default(description) if isinstance(description, str) else None
    if stated is None or isinstance(value, (dict, list)) or not _is_of_type(value, schema):
        return False
    if not isinstance(value, str):
        try:
            stated = decode_json(stated.lower() if stated in ("True", "False") else stated, WRITTEN)
        except ValueError:
            return False
    used = set(c.used)
    same = read_value(c, value, schema) == read_value(c, stated, schema)
    c.used = c.used | {"described_default"} if same else used
    return same


def read_value(c: Reading, value: Any, schema: Any, kind: str = "text", name: str = "") -> Form:
    """The form of a value."""
    c.spend(VALUE_WORK)
    takes_text = (found := resolve(schema, c.root, "")) is not NOTHING and _is_of_type("", found)
    schema = resolve(schema, c.root, value)
    if not takes_text:
        value = _unstring(c, value, schema)
    if isinstance(value, dict):
        declared = schema.get("properties")
        properties: Mapping[str, Any] = declared if isinstance(declared, Mapping) else {}
        kept = ((k, v) for k, v in value.items() if not _says_nothing(c, k, v, properties, schema.get("required")))
        exact = kind == "exact"  # within a text that is JSON no name says what a value is
        forms = (
            (k, read_value(c, v, properties.get(k, {}), kind if exact else _inner_kind(c, k, v, properties), k))
            for k, v in kept
        )
        return "object", *sorted(forms, key=lambda pair: pair[0])
    if isinstance(value, list):
        return _read_list(c, value, schema, kind, name)
    if isinstance(value, str):
        return read_text(c, value, schema, kind)
    if value is None or isinstance(value, bool):
        return "constant", str(value)
    return values.number(value) if c.on("number_type") else (type(value).__name__, repr(value))


def _inner_kind(c: Reading, name: str, value: Any, properties: Mapping[str, Any]) -> str:
    return kind_of(c, name, resolve(properties.get(name, {}), c.root, value))


def _read_list(c: Reading, value: list[Any], schema: Mapping[str, Any], kind: str, name: str) -> Form:
    inner = schema.get("items")
    # the words of one command, rather than a list of commands: no shell reads them, but what follows `sh -c`
    words = kind == "shell" and not name.endswith("s")
    scripts = {i for i in range(1, len(value)) if value[i - 1] in ("-c", "-lc", "-ic")} if words else set()
    forms = [read_value(c, v, inner, "text" if words and i not in scripts else kind) for i, v in enumerate(value)]
    if schema.get("uniqueItems") is True and c.on("set_order"):
        keys = [repr(form) for form in forms]
        c.spend(8 * sum(map(len, keys)))
        return "set", *(form for _, form in sorted(zip(keys, forms, strict=True), key=lambda pair: pair[0]))
    return "list", *forms


def _unstring(c: Reading, value: Any, schema: Mapping[str, Any]) -> Any:
    """A number, truth value, list or object that was written as a string, where the schema wants no string."""
    if not isinstance(value, str) or "stringified" not in c.rules:
        return value
    text = value.strip()
    try:
        read = decode_json(text.lower() if text in ("True", "False") else text, WRITTEN)
    except ValueError:
        return value
    if not _is_of_type(read, schema):
        return value
    c.used.add("stringified")
    return read


def read_text(c: Reading, text: str, schema: Mapping[str, Any], kind: str) -> Form:
    """The form of a text."""
    c.spend(len(text))
    options = schema.get("enum")
    if isinstance(options, list):
        named = values.option(text, options) if "enum_case" in c.rules else None
        c.used |= {"enum_case"} if named is not None else set()
        return "text", text if named is None else named
    if kind in FOLDED and "letter_case" in c.rules and (folded := text.casefold()) != text:
        c.used.add("letter_case")
        text = folded
    form = _of_kind(c, text, schema, kind)
    if form is None and (kind in PLAIN_KINDS or (kind in ("query", "words") and looks_like_sql(text))):
        form = _by_itself(c, text, kind)
    if form is not None:
        return form
    return "text", text.casefold() if c.on("letter_case") else text


def _of_kind(c: Reading, text: str, schema: Mapping[str, Any], kind: str) -> Form | None:
    """The form of a text whose kind is known; None where it is not of that kind after all."""
    rule: str = ""
    found: Any = None
    if kind in ("shell", "keys"):
        form, used = read_command(text, c.rules, c.spend, c.directory)
        c.used |= used
        return ("shell", form, kind == "keys" and text.endswith("\n"))
    if kind == "query" and not looks_like_sql(text):
        rule, found = "search_tokens", read_query(text) if "search_tokens" in c.rules else None
    elif kind == "date":
        rule, found = "dates", values.moment(text, loose=False)
    elif kind == "when" and (DATE.fullmatch(text) or CLOCK.fullmatch(text) or values.NAMED_DATE.fullmatch(text)):
        rule, found = (
            "dates",
            values.moment(text, loose=not re.search("iso|yyyy", str(schema.get("description")).lower())),
        )
    elif kind == "url":
        rule, found = "urls", values.url(text)
    elif kind == "path":
        rule, found = "paths", ("path", values.clean_path(text))
    elif kind == "folder":
        rule, found = "paths", ("path", values.clean_path(text, folder=True))
    elif kind == "python":
        rule, found = "python_tokens", values.python_tokens(text)
    elif kind == "place":
        rule, found = "place_case", ("place", text.strip().casefold())
    elif kind == "phone":
        rule, found = "phones", values.phone(text)
    if found is None or not c.on(rule):
        return None
    return rule, found


def _by_itself(c: Reading, text: str, kind: str) -> Form | None:
    """The form of a text that shows what it is: SQL, a moment with its zone, a mail address, a JSON object."""
    if (kind == "sql" or looks_like_sql(text)) and "sql" in c.rules:
        c.spend(200 * len(text))
        statements = read_sql(text)
        if statements is not None:
            c.used.add("sql")
            return "sql", statements
    if values.MOMENT.fullmatch(text) and (found := values.moment(text, loose=False)) and c.on("dates"):
        return "dates", found
    if (address := values.mail(text)) and c.on("mail_domains"):
        return "mail", (address[0].casefold(), address[1]) if c.on("letter_case") else address
    if text[:1].isspace() or text[-1:].isspace():
        return None
    if text[:1] == "{" or (kind == "body" and text[:1] == "["):
        try:
            decode_json(text, WRITTEN)
            body = json.loads(text, parse_float=Decimal)  # whoever reads it may keep more digits than a double
        except (ValueError, ArithmeticError):
            return None
        if isinstance(body, (dict, list)) and not _repeats_a_key(text) and c.on("json_text"):
            return "json", read_value(c, body, {}, "exact")
    return None


def _repeats_a_key(text: str) -> bool:
    repeated: list[bool] = []

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        repeated.append(len({key for key, _ in found}) < len(found))
        return {}

    json.loads(text, object_pairs_hook=pairs)
    return any(repeated)


def is_prose(value: Any) -> bool:
    """Whether a value is a text of several words, which a judge may compare."""
    return isinstance(value, str) and len(value.split()) >= PROSE_WORDS
