"""Search queries in one form. Order counts, and so do numbers, operators, negations and names; little else may differ.

A query with an operator, a field or quotes is a small program and stays as it is. Of plain words, capitals and marks at word
ends say nothing, nor does `the` of `the capital of`; `weather in Paris` is `Paris weather`. Other articles stay: `vitamin a`
and `The Who` are names.
"""

from __future__ import annotations

import re

OPERATORS = re.compile(r"""["“”'`:=<>!~*?\[\]{}()|&^\\/@#$%+;]|(?:^|\s)-\S|\b(?:AND|OR|NOT|NEAR|TO)\b""")
"""Signs that search engines read, except a mark at a word's end."""
KINDS_OF_PAGE = frozenset(
    (
        "tutorial tutorials documentation docs guide example examples definition meaning wiki wikipedia review reviews news "
        "weather forecast price prices"
    ).split()
)
"""Words that say what is wanted of the rest: before it with a link, or after it without one."""
LINKS = frozenset("about for in of on".split())
MARKS_AT_END = re.compile(r"[?!.,;:]+(?=\s|$)")
THE_OF = re.compile(r"\bthe (?=\S+ of\b)")


def read_query(text: str) -> tuple[str, str]:
    """The form of a web search."""
    blanks = " ".join(text.split())
    plain = MARKS_AT_END.sub("", blanks)
    if not plain or OPERATORS.search(plain):
        return "query", blanks
    plain = re.sub(r"(?<=[\u4e00-\u9fff])的(?=[\u4e00-\u9fff])", "", plain)
    words = THE_OF.sub("", plain.casefold()).split()
    kinds = next((at for at, word in enumerate(words) if word not in KINDS_OF_PAGE), len(words))
    if kinds and words[kinds : kinds + 1] and words[kinds] in LINKS and len(words) > kinds + 1:
        words = [*words[kinds + 1 :], *words[:kinds]]
    return "words", " ".join(words)
