"""SQL in one form: keywords in any case, blanks, comments, a last semicolon, what ASC, INNER and OUTER say of themselves, and the
order of what AND, OR and IN join.

`sqlglot` reads it. Names keep their case, since some databases tell them apart; a statement that it does not read, or one
with hints in comments, stays as it is written.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

MAX_CHARS = 8192
"""Longer SQL is compared as text."""
MAX_NESTING = 12
"""Brackets in brackets; deeper SQL is compared as text, since its parser tries alternatives at each."""
MAX_TOKENS = 600
UNSAID = frozenset("ALIAS SEMICOLON ASC INNER OUTER".split())
"""Tokens that may be left out: a list is sorted upwards, a join is an inner one, and a left, right or full one an outer one."""
BEGINNING = re.compile(
    r"\s*(?:select\s|with\s+\w+\s*(?:\(|as\s)|insert\s+(?:into|or)\s|update\s+\S+\s+set\s|delete\s+from\s"
    r"|(?:create|alter|drop|truncate)\s+(?:temp\w*\s+)?(?:table|view|index|unique|database|schema|or)\b)",
    re.IGNORECASE,
)
"""How a text begins that may be taken for SQL whatever its argument's name is."""


def looks_like_sql(text: str) -> bool:
    """Whether a text begins as a statement does."""
    return BEGINNING.match(text) is not None


@lru_cache(maxsize=1024)
def read_sql(text: str) -> tuple[str, ...] | None:
    """The form of one or several statements, or None for what is not read."""
    if len(text) > MAX_CHARS or re.search(r"/\*[!+]|--\+", text) or _nesting(text) > MAX_NESTING:
        return None
    import sqlglot
    from sqlglot.errors import SqlglotError

    logger = logging.getLogger("sqlglot")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # it warns of statements that it takes as they are
    try:
        dialect = "mysql" if "`" in text else None  # only there backquotes are around names
        tokens = sqlglot.tokenize(text, read=dialect)
        if len(tokens) > MAX_TOKENS:
            return None
        statements = [tree for tree in sqlglot.parse(text, read=dialect) if tree is not None]
        if not statements or any(tree.find(sqlglot.exp.Command) for tree in statements):
            return None
        # the parser takes some types and functions for one another, of which a database may have both: words must be the same
        words = sorted(_word(token) for token in tokens if token.token_type.name not in UNSAID)
        return (dialect or "", *(_ordered(tree).sql(comments=False) for tree in statements), *words)
    except (SqlglotError, RecursionError, ValueError, AttributeError, TypeError):
        return None
    finally:
        logger.setLevel(level)


def _word(token: Any) -> str:
    named = str(token.token_type.name)
    return named if named == "NEQ" else str(token.text).upper()


def _nesting(text: str) -> int:
    deepest = depth = 0
    for char in text:
        depth += (char in "([") - (char in ")]")
        deepest = max(deepest, depth)
    return deepest


def _ordered(tree: Any) -> Any:
    """`tree` with what AND and OR join, and the values of IN, in one order, and without words that may be left out."""
    from sqlglot import exp

    for order in tree.find_all(exp.Ordered):
        order.set("desc", order.args.get("desc") or None)
    for join in tree.find_all(exp.Join):
        if join.args.get("kind") == "INNER" or (join.args.get("kind") == "OUTER" and join.args.get("side")):
            join.set("kind", None)
    for among in tree.find_all(exp.In):
        if among.expressions and all(isinstance(value, exp.Literal) for value in among.expressions):
            among.set("expressions", sorted(among.expressions, key=lambda value: value.sql()))
    for kind in (exp.And, exp.Or):
        for node in list(tree.find_all(kind)):
            if type(node.parent) is kind:
                continue
            parts = sorted(node.flatten(unnest=False), key=lambda part: part.sql(comments=False))
            joined = parts[0].copy()
            for part in parts[1:]:
                joined = kind(this=joined, expression=part.copy())
            if node.parent is None:
                tree = joined
            else:
                node.replace(joined)
    return tree
