"""Search queries in one form. Order counts, and so do numbers, operators, negations and names; little else may differ.

A query with an operator, a field or quotes is a small program and stays as it is. Of plain words, capitals, articles, marks
at word ends and the place of words that name a kind of page (`tutorial`, `weather`) say nothing.
"""

from __future__ import annotations

import re

OPERATORS = re.compile(r"""["“”'`:=<>!~*?\[\]{}()|&^\\/@#$%+;]|(?:^|\s)-\S|\b(?:AND|OR|NOT|NEAR|TO)\b""")
"""Signs that search engines read, except a mark at a word's end."""
ARTICLES = frozenset("a an the".split())
KINDS_OF_PAGE = frozenset(
    (
        "tutorial tutorials documentation docs guide example examples definition meaning wiki wikipedia review reviews news "
        "weather forecast price prices today"
    ).split()
)
"""Words of a query that say what is wanted of the rest, wherever they stand."""
LINKS = frozenset("about for in of on".split())
"""Words that say nothing right after one of those."""
MARKS_AT_END = re.compile(r"[?!.,;:]+(?=\s|$)")


def read_query(text: str) -> tuple[object, ...]:
    """The form of a web search."""
    blanks = " ".join(text.split())
    plain = MARKS_AT_END.sub("", blanks)
    if OPERATORS.search(plain):
        return ("query", blanks)
    plain = re.sub(r"(?<=[\u4e00-\u9fff])的(?=[\u4e00-\u9fff])", "", plain)
    words: list[str] = []
    kinds: list[str] = []
    after_kind = False
    for word in plain.casefold().split():
        if word in KINDS_OF_PAGE:
            kinds.append(word)
        elif word not in ARTICLES and not (after_kind and word in LINKS):
            words.append(word)
        after_kind = word in KINDS_OF_PAGE or (after_kind and word in ARTICLES)
    return ("words", tuple(words), tuple(sorted(kinds))) if words else ("query", blanks.casefold())
