"""Coverage-guided fuzzing of every verifier but the judge.

    make fuzz            # installs atheris into the project's environment first
    python benchmarks/fuzz_verifiers.py --seconds 60 [--seed 0] [--corpus FOLDER]

Bytes become a verifier, a case and an action. Whatever they are, the verdict is in [0, 1], takes less than SECONDS of
processor time, and raises nothing but a VerifierFault that blames the expert's side; `functional` accepts the expert's own
calls. The first input that breaks this is shown with its traceback and the command ends with another code than 0.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

PACKAGE = "atheris==3.0.0"
try:
    import atheris
except ModuleNotFoundError:
    sys.exit(f"the package atheris is missing: `make fuzz`, or `{sys.executable} -m pip install {PACKAGE}`")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
with atheris.instrument_imports(include=["nemo_pivotrl.verifiers"]):
    from nemo_pivotrl import config
    from nemo_pivotrl.core.types import Action, Case, ToolCall
    from nemo_pivotrl.verifiers.base import VerifierFault
    from nemo_pivotrl.verifiers.loading import VERIFIERS, load_verifier

    VERIFIER_OF = {
        name: load_verifier(config.Verifier(name=name, message="any")) for name in VERIFIERS if name != "judge"
    }
    VERIFIER_OF["functional, all rules"] = load_verifier(
        config.Verifier(
            name="functional",
            message="any",
            settings={"rules": {"letter_case": True, "set_order": True}, "extra_calls": True},
        )
    )

SECONDS = 1.0
"""Of processor time. Ten times the aim: counting coverage slows the code down."""
EXPERTS_FAULT = ("expected_arguments", "expected_answer", "expected_action", "row_threshold")
SEEDS = 300
"""Random inputs to start from: an empty one decides everything by zeros, and the search is long in leaving it."""
NAMES = [*sorted(VERIFIER_OF), *["functional"] * 5]
TOOLS = "exec_command bash edit str_replace_editor apply_patch python web_search finish return_result todowrite think f".split()
SHELL = (
    "ls -la src",
    "cd a && cat ./b/",
    "A=1 make; ls",
    "cat <<E\na\nE",
    "$(a b)",
    "for i in 1; do a; done",
    "x 2>&1 >y",
)
PYTHON = ("if x:\n  y = 'a'  # b\n", "!rm -rf / x", "print(f'{x}')", "x = (1,\n 2)")
PATCHES = (
    "--- a/f\n+++ b/f\n@@ -1,2 +1,2 @@\n-a\n+b\n",
    "*** Begin Patch\n*** Update File: a\n@@\n-a\n+b\n*** Delete File: c\n*** End Patch",
)
SUITED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("cmd", "command"), SHELL),
    **dict.fromkeys(("path", "file_path"), ("./a//../b/", "/a/b", "a b")),
    **dict.fromkeys(("url", "link"), ("http://a.com:80/b?c=1&d=2", "https://u:p@[::1]/%2F%ff/")),
    **dict.fromkeys(("date", "x"), ("2024-01-01T00:00:00+02:00", "2024-01-01", "9999-12-31T23:59:59-02:00", "10:00")),
    "code": PYTHON,
    **dict.fromkeys(("patch", "input"), PATCHES),
    **dict.fromkeys(("query", "thought"), ("the last line is lost", "lost lines 1 2")),
    **dict.fromkeys(("old_str", "new_str", "file_text"), ("a\nb\n", "a\nc\n", "a")),
    **dict.fromkeys(("insert_line", "n"), (1, 2, 1.0, True, "1", 10**18)),
    **dict.fromkeys(("replace_all", "flag"), (True, False, "true", None)),
    **dict.fromkeys(("view_range", "todos", "paths"), ([1, 2], [2, 1], "[1, 2]", [5, -1], ["a ", "a"])),
}
"""Argument -> values that a verifier looks into."""
KEYS = sorted(SUITED)
KINDS = ("calls", "message", "malformed", "none")
HARNESSES = ("", "codex", "opencode", "agent006", "stirrup", "terminus_1", "terminus_2")
WORDS = (
    *(*SHELL, *PATCHES, *PYTHON, "[1, 2]", "true", "\ue000*\ue001", "\ud800", "\0", "9" * 400, "e\u0301\u0315", "NaN"),
    "0001-01-01T00:00:00+02:00",
)
SPLICES = (" ", "  ", "./", "/", "'", '"', "1", ".0", "\n", "-", "a", "\u0301", "\ud800", "", "9")
SCHEMAS: tuple[Any, ...] = (
    *(
        {},
        {"type": "array", "uniqueItems": True},
        {"type": ["string", "null"]},
        {"enum": ["a", "B-c", 1]},
        {"type": "number"},
    ),
    *({"format": "date-time"}, {"format": "uri"}, {"$ref": "#/properties/x"}, {"pattern": "^(a+)+$"}, {"default": [1]}),
    *(
        {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        {"type": "object", "patternProperties": {"^(a+)+$": {}}},
        True,
        3,
    ),
)


class Bytes:
    """Bytes read as parts of a case."""

    def __init__(self, data: bytes):
        self.data = atheris.FuzzedDataProvider(data)

    def below(self, count: int) -> int:
        return int(self.data.ConsumeIntInRange(0, count - 1))

    def pick(self, options: Any) -> Any:
        return options[self.below(len(options))]

    def many(self, most: int, make: Callable[[], Any]) -> list[Any]:
        return [make() for _ in range(self.below(most + 1))]

    def text(self) -> str:
        """A known text, a new one, or a known one with something put into it."""
        form = self.below(3)
        if form == 0:
            return str(self.data.ConsumeUnicode(self.below(40)))
        known = str(self.pick(WORDS))
        return known if form == 1 else self.spliced(known)

    def value(self, depth: int = 0) -> Any:
        form = self.below(9 if depth < 4 else 6)
        if form < 3:
            return self.text()
        if form < 6:
            return self.pick((None, True, False, 0, 1, 1.0, -1.5, 10**18, 10**400, 1e308, float("nan"), float("inf")))
        if form == 6:
            return self.many(4, lambda: self.value(depth + 1))
        if form == 7:
            return json.dumps(self.value(depth + 1))
        return {self.key(): self.value(depth + 1) for _ in range(self.below(4))}

    def argument(self, key: str) -> Any:
        """A value for an argument: mostly one that suits its name, as it is or changed."""
        form = self.below(4)
        value = self.pick(SUITED[key]) if form and key in SUITED else self.value()
        return self.spliced(value) if form == 3 and isinstance(value, str) else value

    def key(self) -> str:
        return str(self.pick(KEYS)) if self.below(8) else self.text()

    def arguments(self) -> dict[str, Any]:
        keys = [self.key() for _ in range(self.below(5))]
        return {key: self.argument(key) for key in keys}

    def call(self) -> ToolCall:
        raw = self.text() if self.below(8) == 0 else json.dumps(self.arguments())
        return ToolCall(str(self.pick(TOOLS)), raw)

    def content(self) -> str:
        if self.below(2):
            return self.text()
        commands = [{"keystrokes": text} for text in self.many(3, self.text)]
        return json.dumps({"analysis": "", "plan": "", "commands": commands, "task_complete": bool(self.below(2))})

    def action(self) -> Action:
        kind = self.pick(KINDS)
        return Action(kind, self.content() if kind != "calls" else "", tuple(self.many(3, self.call)))

    def expert(self) -> Action:
        if self.below(4) == 0:
            return Action("message", self.content())
        return Action("calls", calls=(self.call(), *self.many(2, self.call)))

    def nearly(self, expert: Action) -> Action:
        """The expert's action with one argument, or one part of its text, written differently."""
        if expert.kind == "message":
            return Action("message", self.spliced(expert.content))
        at = self.below(len(expert.calls))
        call = expert.calls[at]
        try:
            arguments = json.loads(call.arguments)
        except ValueError:
            arguments = None
        if isinstance(arguments, dict) and arguments and self.below(4):
            key = self.pick(list(arguments))
            old = arguments[key]
            arguments[key] = self.spliced(old) if isinstance(old, str) and self.below(2) else self.argument(key)
            text = json.dumps(arguments)
        else:
            text = self.spliced(call.arguments)
        changed = ToolCall(call.name, text)
        return Action("calls", calls=(*expert.calls[:at], changed, *expert.calls[at + 1 :]))

    def spliced(self, text: str) -> str:
        at = self.below(len(text) + 1)
        new = str(self.pick(SPLICES)) if self.below(4) else str(self.data.ConsumeUnicode(self.below(9)))
        return text[:at] + new + text[at + self.below(3) :]

    def tools(self) -> tuple[dict[str, Any], ...]:
        def tool() -> dict[str, Any]:
            properties = {self.key(): self.pick(SCHEMAS) for _ in range(self.below(4))}
            parameters = {"type": "object", "properties": properties, "required": self.many(1, self.key)}
            function = {"name": self.pick(TOOLS), "parameters": parameters}
            return function if self.below(2) else {"type": "function", "function": function}

        return tuple(self.many(2, tool))

    def case(self) -> Case:
        fields: dict[str, Any] = {"harness": self.pick(HARNESSES)}
        if self.below(4) == 0:
            fields["threshold"] = self.pick((0.0, 0.5, 1.0))
        if self.below(4) == 0:
            fields["files"] = {self.text(): self.text() for _ in range(2)}
        return Case(self.expert(), self.tools(), fields=fields)


def one_input(data: bytes) -> None:
    """One verdict. Raises AssertionError, or whatever a verifier should not have raised."""
    source = Bytes(data)
    name, case = source.pick(NAMES), source.case()
    form = source.below(3)
    actual = source.action() if form == 0 else source.nearly(case.expected) if form == 1 else case.expected
    begun = time.thread_time()
    try:
        verdict = VERIFIER_OF[name].verify(case, actual)
    except VerifierFault as fault:
        assert fault.kind in EXPERTS_FAULT, (name, fault.kind)
        return
    took = time.thread_time() - begun
    assert took < SECONDS, (name, took, case, actual)
    assert 0.0 <= verdict.reward <= 1.0 and verdict.category, (name, verdict)
    if name.startswith("functional") and form == 2 and actual.kind == "calls":
        assert verdict.reward == 1.0, (name, verdict, case)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=int, default=60, help="how long to search")
    parser.add_argument("--seed", type=int, default=0, help="of the search; 0: another one every time")
    parser.add_argument("--corpus", default="", help="folder that keeps inputs which reached something new")
    options = parser.parse_args()
    corpus = options.corpus or tempfile.mkdtemp(prefix="fuzz-corpus-")
    os.makedirs(corpus, exist_ok=True)
    if not os.listdir(corpus):
        random = Random(options.seed)
        for number in range(SEEDS):
            Path(corpus, f"seed-{number}").write_bytes(random.randbytes(1024))
    flags = [
        f"-max_total_time={options.seconds}",
        f"-seed={options.seed}",
        "-max_len=2048",
        "-len_control=0",
        "-rss_limit_mb=2048",
    ]
    flags += ["-timeout=20", "-print_final_stats=1", f"-artifact_prefix={corpus}/failed-", corpus]
    atheris.Setup([sys.argv[0], *flags], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
