"""Values that can be written in several ways, each in one: numbers, dates, addresses, URLs, paths, enum options, Python code.

Every function gives a form that is equal for texts that say the same, or None for a text that is not of its kind.
"""

from __future__ import annotations

import io
import math
import re
import tokenize
from datetime import UTC, date, datetime, time
from decimal import Context, Decimal
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

MAX_CODE_CHARS = 20_000
"""Longer Python code is compared as text."""
MAX_URL_CHARS = 4096
"""Longer URLs are compared as text."""
MAX_DATE_CHARS = 64
MAX_DESCRIPTION_CHARS = 4096
"""Of a description a stated default is looked for so far."""
MAX_DIGITS = 400
DIGITS = Context(prec=MAX_DIGITS, Emax=10**9, Emin=-(10**9))
"""Of a number in a text; longer ones are rounded there."""
DEFAULT_PORTS = {"http": 80, "https": 443}
MONTHS = "january february march april may june july august september october november december".split()
MONTH = "|".join(f"{month[:3]}(?:{month[3:]})?" for month in MONTHS)
NAMED_DATE = re.compile(
    rf"(?:(?P<m>{MONTH})\.? (?P<d>\d{{1,2}})(?:st|nd|rd|th)?,? (?P<y>\d{{4}})"
    rf"|(?P<d2>\d{{1,2}})(?:st|nd|rd|th)? (?P<m2>{MONTH})\.?,? (?P<y2>\d{{4}}))",
    re.IGNORECASE,
)
MOMENT = re.compile(r"\d{4}-\d{2}-\d{2}[T ]\d{2}:\d{2}(:\d{2}([.,]\d{1,6})?)?([Zz]|[+-]\d{2}:?\d{2})?")
MAIL = re.compile(r"([^@\s\"'<>]+)@([A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+)")
STATED_DEFAULT = re.compile(
    r"\bdefaults?(?: value)?(?: is| to|:)?\s+(?:'([^'\n]*)'|\"([^\"\n]*)\"|`([^`\n]*)`|([^\s,;()'\"`]+))", re.IGNORECASE
)
PHONE = re.compile(r"\+\d[\d ().-]{5,22}\d")


def number(value: int | float | Decimal) -> tuple[str, str]:
    """Equal for numbers of one value: whole ones exactly, fractions up to the fifteen digits that a double holds."""
    if isinstance(value, Decimal):
        if value != value.to_integral_value() or abs(value.adjusted()) > MAX_DIGITS:
            return "number", str(value.normalize(DIGITS))
        value = int(value)
    if isinstance(value, int):
        return "number", str(value) if abs(value) < 1 << 4096 else hex(value)
    if not math.isfinite(value):
        return "number", "nan" if math.isnan(value) else str(value)
    return "number", str(int(value)) if value.is_integer() else format(value, ".15g")


def written_number(text: str) -> float | None:
    """The number that a text is the one plain spelling of: `5` and `0.5`, but not `5.0`, `05` or `1e3`."""
    if not re.fullmatch(r"-?(0|[1-9]\d{0,15})(\.\d{0,14}[1-9])?", text) or text == "-0":
        return None
    return float(text) if "." in text else int(text)


def stated_default(description: str) -> str | None:
    """The default that a description states in words, as it is written there: `km` of "Unit (defaults to 'km')"."""
    found = STATED_DEFAULT.search(description[:MAX_DESCRIPTION_CHARS])
    if found is None:
        return None
    quoted = next((part for part in found.groups()[:3] if part is not None), None)
    return found[4].rstrip(".") if quoted is None else quoted


def moment(text: str, loose: bool) -> tuple[str, ...] | None:
    """A date, a time of day, or a moment in UTC (without a zone: as it stands). `loose`: also `March 1, 2024`."""
    text = text.strip()
    if len(text) > MAX_DATE_CHARS:
        return None
    if loose and (found := NAMED_DATE.fullmatch(text)):
        month = MONTHS.index(next(m for m in MONTHS if m.startswith((found["m"] or found["m2"]).lower()[:3]))) + 1
        try:
            return "date", date(int(found["y"] or found["y2"]), month, int(found["d"] or found["d2"])).isoformat()
        except ValueError:
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


def mail(text: str) -> tuple[str, str] | None:
    """An address up to the case of its domain."""
    found = MAIL.fullmatch(text)
    return (found[1], found[2].lower()) if found else None


def phone(text: str) -> str | None:
    """An international number up to the marks between its digits."""
    return re.sub(r"[^\d+]", "", text) if PHONE.fullmatch(text.strip()) else None


def url(text: str) -> tuple[Any, ...] | None:
    """A URL up to case of scheme and host, default port, escapes, and the order of differently named query fields."""
    if len(text) > MAX_URL_CHARS:
        return None
    odd = "surrogateescape"  # bytes that are no UTF-8 stay what they are
    try:
        parts = urlsplit(text.strip())
        port = parts.port
        pairs = parse_qsl(parts.query, keep_blank_values=True, errors=odd)
        query = urlencode(sorted(pairs, key=lambda pair: pair[0]), errors=odd)
        segments = (quote(unquote(s, errors=odd), safe=":@!$&'()*+,;=~-._", errors=odd) for s in parts.path.split("/"))
        path = "/".join(segments) or "/"
    except ValueError:
        return None
    if not parts.scheme or not parts.hostname:
        return None
    scheme = parts.scheme.lower()
    fields = query if pairs else parts.query
    place = (parts.hostname, None if port == DEFAULT_PORTS.get(scheme) else port)
    return scheme, parts.username, parts.password, *place, path, fields, parts.fragment


def clean_path(text: str, folder: bool = False) -> str:
    """`./a//b` -> `a/b`; `..` stays, since it asks what a link points to. `folder`: a last slash says nothing."""
    if "://" in text or text.startswith("//"):
        return text
    path = re.sub(r"/(?:\./)+", "/", re.sub(r"/{2,}", "/", text))
    while path.startswith("./") and len(path) > 2:
        path = path[2:]
    path = "." if path == "./" else path
    return path[:-1] if folder and len(path) > 1 and path.endswith("/") else path


def option(value: str, options: list[Any]) -> str | None:
    """The one option that `value` names up to case, blanks, hyphens and underscores; None where none or several do."""

    def plain(text: str) -> str:
        return re.sub(r"[\s_-]+", "_", text.strip().casefold())

    if value in options:
        return value
    named = {option for option in options if isinstance(option, str) and plain(option) == plain(value)}
    return named.pop() if len(named) == 1 else None


def python_tokens(code: str) -> tuple[tuple[int, str], ...] | None:
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
    return tuple(found)
