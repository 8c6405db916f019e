"""`functional`: is the sampled action as good as the expert's? Tool calls in one form each, under their schema, by named relaxations.

The paper's functional equivalence (equation (1)), made as exact as can be without running anything: a call is right when the
tool would do the same. What counts as the same is the table RULES; each rule can be switched in the recipe
(`verifier.settings.rules.shell_env_prefix: false`), and a verdict lists those without which it would have been 0. Calls are
compared by their forms (`arguments.py`, `shell.py`, `edits.py`), so that being the same is reflexive, symmetric and
transitive.

Deviations from the paper: it gives a rule for each domain; this is one verifier for all of them.
`mode: tool_name` is its SWE-Bench rule. What a talking turn is worth is decided by `verifier.message` (`base.py`).
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from typing import Any, ClassVar, Literal

from nemo_pivotrl.config import Limits
from nemo_pivotrl.core.errors import InputError, Problem, short
from nemo_pivotrl.core.types import Action, Case, Message, ToolCall, Verdict
from nemo_pivotrl.verifiers.arguments import Form, Reading, is_prose, read_arguments
from nemo_pivotrl.verifiers.base import Judging, VerifierFault, harness_of
from nemo_pivotrl.verifiers.bounds import LimitExceeded, decode_json
from nemo_pivotrl.verifiers.edits import edit_of, other_arguments, read_edit, without_whole_range
from nemo_pivotrl.verifiers.shell import read_command
from nemo_pivotrl.verifiers.terminus import follows_schema, keystrokes, says_complete, text_of_action
from nemo_pivotrl.verifiers.trace import files_shown, working_directory
from nemo_pivotrl.verifiers.values import clean_path

RULES: dict[str, tuple[bool, str]] = {
    "number_type": (True, "1 is 1.0; fractions up to the fifteen digits that a double holds"),
    "stringified": (
        True,
        'a number, truth value, list or object written as a string ("[1]") where the schema wants none; a plain number '
        "written as a string where no schema says anything",
    ),
    "omitted_default": (True, "an omitted argument that the schema does not require is its default"),
    "described_default": (
        False,
        "an omitted argument that the schema does not require is the default that its description states in words, where "
        "the schema has none",
    ),
    "null_optional": (True, "null for an optional argument without a default is its omission"),
    "enum_case": (True, "enum values up to case, blanks, hyphens and underscores"),
    "set_order": (False, "lists with `uniqueItems: true` in any order, which the schema does not promise"),
    "whitespace": (
        True,
        "blanks around a command; in what an edit writes blanks at the ends of source lines, and the last line's end",
    ),
    "letter_case": (False, "all texts up to case: paths and mail addresses too, but not URLs, commands, code and SQL"),
    "place_case": (True, "names of cities and countries up to case and blanks around them"),
    "dates": (True, "dates and times that name the same moment"),
    "mail_domains": (True, "mail addresses up to the case of their domain"),
    "phones": (True, "international telephone numbers up to the marks between digits"),
    "urls": (True, "URLs up to case of the host, default port, escapes, and order of differently named query fields"),
    "paths": (True, "paths up to `.` and doubled slashes, those of folders up to a last slash"),
    "json_text": (True, "texts that are a JSON object, as JSON"),
    "sql": (
        True,
        "SQL up to case of keywords, blanks, comments, a last semicolon, ASC, INNER, OUTER, and the order of what AND, OR and "
        "IN join",
    ),
    "python_tokens": (True, "Python code up to comments, blank lines, indentation width and quotes"),
    "edit_effect": (True, "edits with the same result, where the row or the trace shows the file"),
    "search_tokens": (
        True,
        "web searches up to case, marks at word ends, and `the` before `... of`; `weather in Paris` is `Paris weather`",
    ),
    "shell_argv": (True, "shell commands as parsed commands; the ground of the other shell rules"),
    "shell_quoting": (True, "quotes that do not change a word"),
    "shell_flag_order": (True, "options that do not touch each other in any order, and among the operands"),
    "shell_flag_clusters": (True, "-la is -l -a, -n5 is -n 5"),
    "shell_long_options": (True, "--lines=5 is --lines 5, and -n 5 where the table of options says so"),
    "shell_operand_order": (True, "operands in any order where the command does not care: rm, mkdir, pip install"),
    "shell_env_prefix": (True, "variables before a command that change the look of its output alone"),
    "shell_cd_prefix": (True, "`cd DIR &&` where the trace shows that the shell is in DIR"),
    "shell_paths": (True, "operands up to `.` and doubled slashes, up to a last slash for some commands, and /bin/ls"),
    "shell_separators": (True, "a newline is a `;`"),
    "shell_idioms": (
        True,
        "another spelling of the same: `[ x ]`, kill -KILL, chmod +x, sed -n 1,5p, cat f |, | cat, true;, python - <<E",
    ),
}
"""Rule -> (on by default, what it takes for the same)."""

CALL_WORK = 2000
"""Units of `Limits.max_work` that reading one call costs besides what is in it."""

KINDS = ("text exact words prose query sql shell keys python path folder url date when place phone body edit").split()
"""What an argument may hold. `exact`: itself alone. `words`: a query that no rule reads. `when`: a date or time, in words
too. `body`: JSON. `keys`: what a terminal is sent."""

Calls = Sequence[tuple[ToolCall, dict[str, Any] | None]]


@dataclass(frozen=True, slots=True)
class CallForm:
    """One call in its form."""

    name: str
    arguments: tuple[tuple[str, str, Form], ...]
    """(argument, what it is, its form), by argument."""

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for calls that do the same."""
        return self.name, tuple((name, form) for name, _, form in self.arguments)


@dataclass(kw_only=True, frozen=True)
class Functional:
    """Schema-aware equivalence of actions."""

    name: ClassVar[str] = "functional"
    version: ClassVar[str] = "4"
    talk_rule: ClassVar[str] = "decided"
    reads_state: ClassVar[bool] = True
    mode: Literal["arguments", "tool_name"] = "arguments"
    """`tool_name`: the tool's name alone decides, as in the paper's SWE-Bench runs."""
    rules: dict[str, bool] = field(default_factory=dict)
    """Rules to switch on or off; the others are as in RULES of `nemo_pivotrl/verifiers/functional.py`."""
    kinds: dict[str, str] = field(default_factory=dict)
    """What an argument holds, where its name and schema do not say: `tool.argument` or `argument` to one of KINDS."""
    ignored_arguments: tuple[str, ...] = ()
    """Arguments that never count, e.g. `security_risk`."""
    extra_calls: bool = False
    """Accept calls beyond the expert's."""
    ask_judge: tuple[Literal["shell", "query", "sql", "prose", "python", "edit"], ...] = ()
    """Kinds whose differences the judge decides; it is asked only when nothing else differs.

    `prose` is every text of several words that is none of the others.
    """
    limits: Limits = field(default_factory=Limits)
    judge: Judging | None = None

    def __post_init__(self) -> None:
        problems = []
        for what, names, allowed in (
            ("rules", self.rules, tuple(RULES)),
            ("kinds", self.kinds.values(), tuple(KINDS)),
        ):
            for name in names:
                if name not in allowed:
                    near = difflib.get_close_matches(name, allowed, n=1)
                    hint = f"did you mean `{near[0]}`?" if near else f"use one of {', '.join(allowed)}"
                    problems.append(Problem("recipe", None, f"verifier.settings.{what}", name, hint))
        if "sql" in self.switched_on and find_spec("sqlglot") is None:
            remedy = "pip install 'nemo-pivotrl[verifiers]', or set verifier.settings.rules.sql=false"
            problems.append(Problem("environment", None, "verifier functional", "no module sqlglot", remedy))
        if problems:
            raise InputError(problems)

    @cached_property
    def switched_on(self) -> frozenset[str]:
        """The rules that may accept."""
        return frozenset(rule for rule, (default, _) in RULES.items() if self.rules.get(rule, default))

    @property
    def asks_judge(self) -> bool:
        """Whether a verdict may need the judge."""
        return bool(self.ask_judge)

    @property
    def concurrency(self) -> int:
        return self.judge.concurrency if self.judge else 1

    def verify(self, case: Case, actual: Action) -> Verdict:
        """1.0 or 0.0. Categories: EQUAL, EQUIVALENT, JUDGED_SAME, MESSAGE; DIFFERENT_KIND, DIFFERENT_TOOL,
        DIFFERENT_COUNT, DIFFERENT_ARGUMENTS, UNDECODABLE, NO_ACTION."""
        expected = case.expected
        if actual.kind in ("none", "malformed"):
            return Verdict(0.0, "NO_ACTION" if actual.kind == "none" else "UNDECODABLE", actual.detail)
        harness = harness_of(case.fields)
        if expected.kind == "message" and harness in ("terminus_1", "terminus_2"):
            return self._compare_turns(case, harness, actual)
        if expected.kind != actual.kind:
            return Verdict(0.0, "DIFFERENT_KIND", f"the expert {'calls a tool' if expected.calls else 'talks'}")
        if expected.kind == "message":
            return Verdict(1.0, "MESSAGE") if actual.content.strip() else Verdict(0.0, "NO_ACTION", "an empty message")
        if len(actual.calls) < len(expected.calls) or (
            len(actual.calls) > len(expected.calls) and not self.extra_calls
        ):
            return Verdict(0.0, "DIFFERENT_COUNT", f"{len(expected.calls)} calls expected, {len(actual.calls)} made")
        wanted = [(call, self._arguments(call, fault=True)) for call in expected.calls]
        found = [(call, self._arguments(call, fault=False)) for call in actual.calls]
        if Counter(map(_plain, wanted)) <= Counter(map(_plain, found)):
            return Verdict(1.0, "EQUAL")
        try:
            return self._compare_calls(case, wanted, found)
        except RecursionError:  # values written as strings inside such values
            raise LimitExceeded("nested too deeply") from None

    def _compare_calls(self, case: Case, wanted: Calls, found: Calls) -> Verdict:
        used: set[str] = set()
        left = [self.limits.max_work]
        ours, theirs = (self._forms(case, calls, self.switched_on, used, left) for calls in (wanted, found))
        missing = Counter(form.key for form in ours if form is not None) - Counter(
            form.key for form in theirs if form is not None
        )
        if not missing:
            needed = self._needed(case, wanted, found, used, left)
            return Verdict(1.0, "EQUAL" if needed is None else "EQUIVALENT", rules=needed or ())
        form = next(form for form in ours if form is not None and form.key in missing)
        call = wanted[ours.index(form)][0]
        alike = [(i, other) for i, other in enumerate(theirs) if found[i][0].name == form.name]
        if not alike:
            names = ", ".join(sorted({call.name for call, _ in found}))
            return Verdict(0.0, "DIFFERENT_TOOL", f"{form.name} expected, found {short(names)}")
        spare = [(i, other) for i, other in alike if other is None or other.key != form.key]
        if not spare:
            return Verdict(0.0, "DIFFERENT_COUNT", f"{form.name} expected more often")
        readable = [(i, other) for i, other in spare if other is not None]
        if not readable:
            return Verdict(
                0.0, "UNDECODABLE", f"arguments: {short(found[spare[0][0]][0].arguments, 60)} is no JSON object"
            )
        place, other = min(readable, key=lambda pair: len(_differences(form, pair[1])))
        differences = _differences(form, other)
        arguments = wanted[ours.index(form)][1] or {}, found[place][1] or {}
        kinds = {_judged_kind(kind, name, arguments) for name, kind in differences.items()}
        if len(wanted) == len(found) == 1 and kinds <= set(self.ask_judge):
            ours_said, theirs_said = (f"{made.name}({made.arguments})" for made in (call, found[place][0]))
            return self._ruling(case, "action", ours_said, theirs_said, "DIFFERENT_ARGUMENTS")
        shown = [
            f"{name}: {' is not '.join(short(side.get(name, '(absent)'), 60) for side in arguments)}"
            for name in differences
        ]
        return Verdict(0.0, "DIFFERENT_ARGUMENTS", "; ".join(shown[:3]))

    def _ruling(self, case: Case, kind: str, expected: str, actual: str, otherwise: str) -> Verdict:
        assert self.judge is not None, "load_verifier connects the judge"
        ruling = self.judge.equivalent(kind, case, expected, actual)
        category = "JUDGED_SAME" if ruling.same else otherwise
        return Verdict(float(ruling.same), category, ruling.detail, figures={"votes": ruling.votes})

    def _needed(
        self, case: Case, wanted: Calls, found: Calls, used: set[str], left: list[int]
    ) -> tuple[str, ...] | None:
        """Rules without any one of which the calls would differ; None where they are the same without any rule.

        Empty where either of two rules would do, and where finding out would take too much work.
        """

        def same(rules: frozenset[str]) -> bool:
            ours, theirs = (self._forms(case, calls, rules, set(), left) for calls in (wanted, found))
            return not Counter(f.key for f in ours if f) - Counter(f.key for f in theirs if f)

        try:
            if same(frozenset()):
                return None
            return tuple(rule for rule in sorted(used) if not same(self.switched_on - {rule}))
        except LimitExceeded:
            return ()

    def _forms(
        self, case: Case, calls: Calls, rules: frozenset[str], used: set[str], left: list[int]
    ) -> list[CallForm | None]:
        """The form of each call, None for one whose arguments cannot be read. `left`: work that may still be spent."""
        made = []
        for call, arguments in calls:
            unread = arguments is None and self.mode == "arguments"
            made.append(None if unread else self._form(case, call, arguments or {}, rules, used, left))
        return made

    def _form(
        self,
        case: Case,
        call: ToolCall,
        arguments: dict[str, Any],
        rules: frozenset[str],
        used: set[str],
        left: list[int],
    ) -> CallForm:
        schema = _schema(case, call.name)
        c = Reading(call.name, schema, rules, self.kinds, left[0])
        c.spend(CALL_WORK)
        moves = any(isinstance(value, str) and value.lstrip().startswith("cd ") for value in arguments.values())
        c.directory = self._directory(case) if moves else None
        found: list[tuple[str, str, Form]] = []
        if self.mode == "arguments":
            kept = {key: value for key, value in arguments.items() if key not in self.ignored_arguments}
            kept = without_whole_range(call.name, kept)
            edit = edit_of(call.name, kept)
            if edit is not None:
                properties = schema.get("properties")
                known = {"replace_all", *(properties if isinstance(properties, Mapping) else ())}
                # under names that no schema declares the tool may find nothing
                spelled = *sorted(edit.read - known), "command" in kept
                found.append(("edit", "edit", (spelled, read_edit(c, edit, self._files(case)))))
                kept = other_arguments(edit, kept)
            found += [(name, kind, form) for name, (kind, form) in read_arguments(c, kept, schema).items()]
        used |= c.used
        left[0] -= c.spent
        return CallForm(call.name, tuple(sorted(found, key=lambda part: part[0])))

    def _files(self, case: Case) -> Mapping[str, str]:
        """Path in one spelling -> text, of the files that the row gives or the trace shows."""
        given = case.fields.get("files")
        own = given if isinstance(given, Mapping) else {}
        told = {clean_path(str(path)): text for path, text in own.items() if isinstance(text, str)}
        return {**self._remembered("files", case.messages, files_shown), **told} if case.messages else told

    def _directory(self, case: Case) -> str | None:
        """Where the shell is, if the row or the trace says it."""
        said = case.fields.get("cwd")
        if isinstance(said, str) or not case.messages:
            return said if isinstance(said, str) else None
        found: str | None = self._remembered("directory", case.messages, working_directory)
        return found

    def _remembered(self, what: str, messages: Sequence[Message], read: Callable[[Sequence[Message]], Any]) -> Any:
        """What `read` finds in a trace; that of the last one is kept, since all samples of a candidate share it."""
        last = self.__dict__.get(f"_last_{what}")
        if last is None or last[0] is not messages:
            last = (messages, read(messages))
            self.__dict__[f"_last_{what}"] = last  # one assignment, so threads see a whole one
        return last[1]

    def _arguments(self, call: ToolCall, fault: bool) -> dict[str, Any] | None:
        try:
            value = decode_json(call.arguments or "{}", self.limits)
            if isinstance(value, dict):
                return value
            reason = f"{type(value).__name__} instead of an object"
        except ValueError as error:
            reason = str(error)
        if fault:  # the row is at fault, not the policy: the candidate is excluded
            raise VerifierFault("expected_arguments", f"{call.name}: {reason}")
        return None

    def _compare_turns(self, case: Case, harness: str, actual: Action) -> Verdict:
        """Terminal turns written as JSON: the same keystrokes, and the same word on whether the task is complete."""
        turns = []
        for text in (case.expected.content, text_of_action(actual)):
            try:
                turns.append(decode_json(text, self.limits))
            except ValueError as error:
                turns.append(str(error))
        for turn, is_expert in zip(turns, (True, False), strict=True):
            if not follows_schema(turn, harness):
                if is_expert:
                    raise VerifierFault("expected_answer", f"the expert's turn does not follow the schema of {harness}")
                return Verdict(0.0, "UNDECODABLE", f"no turn of {harness}")
        wanted, found = turns
        if says_complete(wanted) != says_complete(found):
            return Verdict(0.0, "DIFFERENT_ARGUMENTS", f"task complete: {says_complete(wanted)} expected")
        ours, theirs = keystrokes(wanted), keystrokes(found)
        if ours == theirs:
            return Verdict(1.0, "EQUAL")
        if ours.endswith("\n") != theirs.endswith("\n"):
            return Verdict(0.0, "DIFFERENT_ARGUMENTS", "one side only ends its last line, which runs it")
        c = Reading("", {}, self.switched_on, self.kinds, self.limits.max_work)
        pair = [read_command(keys, c.rules, c.spend) for keys in (ours, theirs)]
        if pair[0][0] == pair[1][0]:
            tried = sorted(pair[0][1] | pair[1][1])
            rules = [r for r in tried if len({read_command(k, c.rules - {r}, c.spend)[0] for k in (ours, theirs)}) > 1]
            return Verdict(1.0, "EQUIVALENT", rules=tuple(rules))
        if "shell" in self.ask_judge:
            return self._ruling(case, "terminal", ours, theirs, "DIFFERENT_ARGUMENTS")
        return Verdict(0.0, "DIFFERENT_ARGUMENTS", f"{short(ours, 60)} is not {short(theirs, 60)}")


def _schema(case: Case, name: str) -> Mapping[str, Any]:
    declared = case.fields.get("declared_tools")
    for tool in declared if isinstance(declared, (list, tuple)) else case.tools:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else {}
        if isinstance(function, Mapping) and function.get("name") == name:
            parameters = function.get("parameters")
            return parameters if isinstance(parameters, Mapping) else {}
    return {}


def _plain(call: tuple[ToolCall, dict[str, Any] | None]) -> tuple[str, str]:
    """Equal for calls that are equal as JSON."""
    made, arguments = call
    return made.name, made.arguments if arguments is None else json.dumps(arguments, sort_keys=True)


def _differences(ours: CallForm, theirs: CallForm) -> dict[str, str]:
    """Argument -> what it is, of those that differ."""
    left, right = ({name: (kind, form) for name, kind, form in side.arguments} for side in (ours, theirs))
    differing = sorted(
        name for name in left.keys() | right.keys() if left.get(name, ("",))[1:] != right.get(name, ("",))[1:]
    )
    return {name: left.get(name, right.get(name, ("text",)))[0] for name in differing}


def _judged_kind(kind: str, name: str, arguments: tuple[Mapping[str, Any], Mapping[str, Any]]) -> str:
    """The kind of an argument in the judge's prompt: texts of several words are prose, whatever their name."""
    return "prose" if kind in ("text", "body") and all(is_prose(side.get(name)) for side in arguments) else kind
