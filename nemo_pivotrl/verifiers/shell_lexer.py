"""Words and operators of a shell command, with what is quoted and what is special in them.

A lexer of our own, linear in the text: `shlex` forgets what was quoted (`'*'` and `*`, `"$x"` and `$x`), and the full
grammars for bash that there are take gigabytes for 200 kB of `a|a|a...` or recurse as deeply as the text says. Nothing is
ever run or looked up.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

ACTIVE, BEGIN, END, WHOLE = "\ue000", "\ue001", "\ue002", "\ue003"
"""Marks in a word: the next character is not quoted and special; an expansion begins that the shell splits into words; an
expansion ends; an expansion begins that stays one word, since it is quoted."""
MAX_TOKENS = 1500
"""Words and operators of a command that is read."""
OPERATOR = re.compile(r"&>>|<<<|<<-|&&|\|\||;;|\|&|&>|>>|<<|>&|<&|>\||<>|[;|&<>()\n]")
PLAIN = re.compile(r"[^\s;|&<>()\\'\"$`*?\[{~]+")
SIMPLE_EXPANSION = re.compile(r"\$(?:([A-Za-z_]\w*|[0-9?!#@*$-])|\{(\w+)\})", re.ASCII)
BRACES = re.compile(r"\{[^\s{}'\"\\]*(?:,|\.\.)[^\s{}'\"\\]*\}")
"""Braces that the shell expands; `{}` and `stash@{0}` are plain characters."""
CLASS = re.compile(r"\[\S+\]")
"""Brackets that may match file names; `[` alone is a command."""


@dataclass(frozen=True, slots=True)
class Token:
    """`op` for an operator; else a word, as written and with its quotes taken away."""

    op: str
    raw: str = ""
    word: str = ""
    body: str | None = None
    """Text of the here-document that a delimiter word announces."""


class Lexer:
    """Reads one text into tokens. Raises ValueError for what it cannot read."""

    def __init__(self, text: str):
        if any(mark in text for mark in (ACTIVE, BEGIN, END, WHOLE, "\0")):
            raise ValueError("private characters")
        self.text, self.at = text, 0
        self.tokens: list[Token] = []
        self.awaited: list[
            tuple[int, bool]
        ] = []  # here-documents whose body comes after the line: token, leading tabs dropped

    def read(self) -> list[Token]:
        """The tokens of the whole text. Raises ValueError for what this lexer does not read."""
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
                if self.at + 1 == len(text):
                    raise ValueError("nothing after a closing backslash")
                parts.append(text[self.at + 1].replace("\n", ""))
                self.at += 2
            elif char == "'":
                parts.append(self._until("'", self.at + 1))
            elif char == '"':
                parts.append(self._double_quoted())
            elif char == "$" and text.startswith("$'", self.at):
                raise ValueError("ANSI-C quoting")
            elif char in "$`":
                parts.append(self._expansion(BEGIN))
            else:
                active = char in "*?" or self._is_active(char, parts)
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
                parts.append(self._expansion(WHOLE))
            else:
                parts.append(text[self.at])
                self.at += 1
        if self.at >= len(text):
            raise ValueError('no closing "')
        self.at += 1
        return "".join(parts)

    def _is_active(self, char: str, parts: list[str]) -> bool:
        """Whether `~`, `[` or `{` means something here."""
        if char == "~":
            return not parts or parts[-1].endswith(("=", ":"))
        pattern = CLASS if char == "[" else BRACES
        return pattern.match(self.text, self.at) is not None

    def _expansion(self, mark: str) -> str:
        """`$x` and `${x}` alike; anything else as it is written, up to where its bracket closes."""
        text = self.text
        if text[self.at] == "`":
            command = self._until("`", self.at + 1).strip()
            if any(char in command for char in "'\"\\"):
                raise ValueError("quotes inside backquotes")
            return f"{mark}({_single_blanks(command)}){END}"
        if simple := SIMPLE_EXPANSION.match(text, self.at):
            self.at = simple.end()
            return f"{mark}{simple[1] or simple[2]}{END}"
        opening = text[self.at + 1 : self.at + 2]
        if opening not in ("(", "{"):
            self.at += 1
            return "$"
        begin = self.at + 1
        self.at = closing_bracket(text, begin)
        inner = text[begin : self.at]
        if opening == "(" and not inner.startswith("(("):
            inner = f"({_single_blanks(inner[1:-1].strip())})"
        return f"{mark}{inner}{END}"

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


def closing_bracket(text: str, begin: int) -> int:
    """Where what the bracket at `begin` opens has ended, quotes and brackets within it aside. Raises ValueError for nowhere."""
    closers = {"(": ")", "{": "}", '"': '"', "`": "`"}
    awaited, at = [closers[text[begin]]], begin + 1
    if text.startswith("case ", begin + 1):
        raise ValueError("a case inside an expansion")  # its patterns end in brackets that nothing opens
    while at < len(text):
        char, quoted = text[at], awaited[-1] == '"'
        if char == awaited[-1]:
            awaited.pop()
            if not awaited:
                return at + 1
        elif char == "\\":
            at += 1
        elif char == "'" and not quoted:
            at = text.find("'", at + 1)
            if at < 0:
                raise ValueError("no closing '")
        elif char == "#" and not quoted and awaited[-1] == ")" and text[at - 1] in " \t\n;(":
            raise ValueError("a comment inside an expansion")
        elif char in '"`' or (char in "({" and (not quoted or text[at - 1] == "$")):
            awaited.append(closers[char])
        at += 1
    raise ValueError(f"no closing {awaited[-1]}")


def _single_blanks(command: str) -> str:
    """`command` with one blank for each run of them, where none may be quoted or in a here-document."""
    return command if re.search(r"['\"\\#`]|<<", command) else re.sub(r"[ \t]+", " ", command)
