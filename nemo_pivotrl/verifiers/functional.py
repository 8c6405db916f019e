"""`functional`: is the sampled action as good as the expert's? Tool calls compared under their schema, by named relaxations.

The paper's functional equivalence (equation (1)), made as exact as can be without running anything: a call is right when the
tool would do the same. What counts as the same is the table RULES; each rule can be switched in the recipe
(`verifier.settings.rules.shell_env_prefix: false`), and a verdict lists those without which it would have been 0.

Deviations from the paper: it gives a rule for each domain; this is one verifier for all of them.
`mode: tool_name` is its SWE-Bench rule. A talking turn is right when the policy talks too, as in tau-bench; its words are
compared by the judge alone (`ask_judge: [message]`).
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

from nemo_pivotrl.config import Limits, ranged
from nemo_pivotrl.core.errors import InputError, Problem, short
from nemo_pivotrl.core.types import Action, Case, ToolCall, Verdict
from nemo_pivotrl.verifiers.arguments import Comparison, compare_objects, same_json
from nemo_pivotrl.verifiers.base import Judging, VerifierFault
from nemo_pivotrl.verifiers.bounds import LimitExceeded, decode_json
from nemo_pivotrl.verifiers.edits import compare_edits, edit_of, other_arguments
from nemo_pivotrl.verifiers.shell import same_command
from nemo_pivotrl.verifiers.single_step import call_kinds, max_matching
from nemo_pivotrl.verifiers.terminus import follows_schema, keystrokes, says_complete, text_of_action

RULES: dict[str, tuple[bool, str]] = {
    "number_type": (True, "1 is 1.0; fractions up to their ninth digit"),
    "stringified": (
        True,
        'a number, truth value, list or object written as a string ("[1]") where the schema wants none',
    ),
    "omitted_default": (True, "an omitted argument is its schema's default"),
    "null_optional": (True, "null for an optional argument is its omission"),
    "enum_case": (True, "enum values up to case, blanks, hyphens and underscores"),
    "set_order": (True, "lists with `uniqueItems: true` in any order"),
    "whitespace": (
        True,
        "blanks at line ends and around a text, runs of blanks in one line, line ends, composed characters",
    ),
    "letter_case": (False, "all texts up to case"),
    "dates": (True, "ISO dates and times that name the same moment"),
    "urls": (True, "URLs up to case of the host, default port, order of the query, escapes and a last slash"),
    "paths": (True, "paths up to `.`, `..`, doubled and last slashes"),
    "python_tokens": (True, "Python code up to comments, blank lines, indentation width and quotes"),
    "edit_effect": (True, "edits that change the same text, whatever of the surroundings they quote"),
    "search_tokens": (True, "search queries that share enough words (`search_overlap`)"),
    "prose": (
        True,
        "free texts (summaries, reasons, thoughts) that share enough words (`prose_overlap`) and contradict in no number",
    ),
    "shell_argv": (True, "shell commands as parsed commands; the ground of the other shell rules"),
    "shell_quoting": (True, "quotes that do not change a word"),
    "shell_flag_order": (True, "options in any order, and among the operands where the command allows it"),
    "shell_flag_clusters": (True, "-la is -l -a"),
    "shell_long_options": (True, "--lines=5 is --lines 5"),
    "shell_env_prefix": (
        True,
        "assignments before a command that only one side has, unless they change what commands mean",
    ),
    "shell_cd_prefix": (
        True,
        "`cd /DIR &&` on one side only: the agent may be there already, or name its operands from there",
    ),
    "shell_paths": (True, "operands up to `.`, `..`, doubled and last slashes"),
    "shell_separators": (True, "a newline is a `;`"),
}
"""Rule -> (on by default, what it takes for the same)."""

PAIR_WORK = 2000
"""Units of `Limits.max_work` that comparing one pair of calls costs besides what is in them."""

KINDS = ("text", "prose", "query", "shell", "python", "path", "url", "date", "edit", "message")


@dataclass(kw_only=True, frozen=True)
class Functional:
    """Schema-aware equivalence of actions."""

    name: ClassVar[str] = "functional"
    version: ClassVar[str] = "1"
    mode: Literal["arguments", "tool_name"] = "arguments"
    """`tool_name`: the tool's name alone decides, as in the paper's SWE-Bench runs."""
    rules: dict[str, bool] = field(default_factory=dict)
    """Rules to switch on or off; the others are as in RULES of `nemo_pivotrl/verifiers/functional.py`."""
    kinds: dict[str, str] = field(default_factory=dict)
    """What an argument holds, where its name and schema do not say: `tool.argument` or `argument` to one of KINDS."""
    ignored_arguments: tuple[str, ...] = ()
    """Arguments that never count, e.g. `security_risk`."""
    search_overlap: float = ranged(0.5, 0.0, 1.0)
    """Search queries match from this share of common words on (Jaccard), stop words aside."""
    prose_overlap: float = ranged(0.2, 0.0, 1.0)
    """Prose arguments match from this share of common words on (Jaccard), stop words aside."""
    extra_calls: bool = False
    """Accept calls beyond the expert's."""
    ask_judge: tuple[Literal["message", "shell", "query", "prose", "python", "edit"], ...] = ()
    """Kinds whose differences the judge decides; it is asked only when nothing else differs."""
    limits: Limits = field(default_factory=Limits)
    judge: Judging | None = None

    def __post_init__(self) -> None:
        problems = []
        for what, names, allowed in (
            ("rules", self.rules, tuple(RULES)),
            ("kinds", self.kinds.values(), KINDS),
        ):
            for name in names:
                if name not in allowed:
                    near = difflib.get_close_matches(name, allowed, n=1)
                    hint = f"did you mean `{near[0]}`?" if near else f"use one of {', '.join(allowed)}"
                    problems.append(Problem("recipe", None, f"verifier.settings.{what}", name, hint))
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
        DIFFERENT_COUNT, DIFFERENT_ARGUMENTS, DIFFERENT_MESSAGE, UNDECODABLE, NO_ACTION."""
        expected = case.expected
        if actual.kind in ("none", "malformed"):
            return Verdict(0.0, "NO_ACTION" if actual.kind == "none" else "UNDECODABLE", actual.detail)
        harness = _harness(case)
        if expected.kind == "message" and harness in ("terminus_1", "terminus_2"):
            return self._compare_turns(case, harness, actual)
        if expected.kind != actual.kind:
            return Verdict(0.0, "DIFFERENT_KIND", f"the expert {'calls a tool' if expected.calls else 'talks'}")
        if expected.kind == "message":
            return self._compare_messages(case, actual)
        if len(actual.calls) < len(expected.calls) or (
            len(actual.calls) > len(expected.calls) and not self.extra_calls
        ):
            return Verdict(0.0, "DIFFERENT_COUNT", f"{len(expected.calls)} calls expected, {len(actual.calls)} made")
        return self._compare_calls(case, actual)

    def _compare_messages(self, case: Case, actual: Action) -> Verdict:
        if not actual.content.strip():
            return Verdict(0.0, "NO_ACTION", "an empty message")
        if "message" not in self.ask_judge:
            return Verdict(1.0, "MESSAGE")
        return self._ruling(case, "message", case.expected.content, actual.content, "DIFFERENT_MESSAGE")

    def _ruling(self, case: Case, kind: str, expected: str, actual: str, otherwise: str) -> Verdict:
        assert self.judge is not None, "load_verifier connects the judge"
        ruling = self.judge.equivalent(kind, case, expected, actual)
        category = "JUDGED_SAME" if ruling.same else otherwise
        return Verdict(float(ruling.same), category, ruling.detail, figures={"votes": ruling.votes})

    def _compare_calls(self, case: Case, actual: Action) -> Verdict:
        (wanted, kind_of_wanted), (found, kind_of_found) = call_kinds(case.expected.calls), call_kinds(actual.calls)
        room = Counter(kind_of_found)
        results: dict[tuple[int, int], Comparison] = {}
        experts = [self._arguments(call, fault=True) for call in wanted]
        theirs = [self._arguments(call, fault=False) for call in found]
        ours, others = Counter(map(_plain, wanted, experts)), Counter(map(_plain, found, theirs))
        if len(wanted) == len(kind_of_wanted) and not ours - others:
            return Verdict(1.0, "EQUAL")
        left = self.limits.max_work
        for i, call in enumerate(wanted):
            for j, other in enumerate(found):
                if call.name == other.name:
                    results[i, j] = self._compare_call(case, other, experts[i], theirs[j], left)
                    left -= results[i, j].spent
        edges = [
            [j for j in range(len(found)) if (i, j) in results and not results[i, j].differences]
            for i in range(len(wanted))
        ]
        matched = max_matching(edges, kind_of_wanted, [room[j] for j in range(len(found))])
        if len(matched) == len(kind_of_wanted):
            easiest = (min((results[i, j].touched for j in row), key=len) for i, row in enumerate(edges))
            rules = sorted(set().union(*easiest))
            return Verdict(1.0, "EQUIVALENT" if rules else "EQUAL", rules=tuple(rules))
        i = next(kind for call, kind in enumerate(kind_of_wanted) if call not in matched)
        tried = [result for (row, _), result in results.items() if row == i and result.differences]
        if not tried and edges[i]:
            return Verdict(0.0, "DIFFERENT_COUNT", f"{wanted[i].name} expected more often")
        if not tried:
            names = ", ".join(sorted({call.name for call in actual.calls}))
            return Verdict(0.0, "DIFFERENT_TOOL", f"{wanted[i].name} expected, found {short(names)}")
        nearest = min(tried, key=lambda result: len(result.differences))
        undecodable = nearest.differences[0][0] == "json"
        if (
            not undecodable
            and len(kind_of_wanted) == len(kind_of_found) == 1
            and {kind for kind, _ in nearest.differences} <= set(self.ask_judge)
        ):
            ours_said, theirs_said = (f"{call.name}({call.arguments})" for call in (wanted[0], found[0]))
            return self._ruling(case, "action", ours_said, theirs_said, "DIFFERENT_ARGUMENTS")
        detail = "; ".join(text for _, text in nearest.differences[:3])
        return Verdict(0.0, "UNDECODABLE" if undecodable else "DIFFERENT_ARGUMENTS", detail)

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

    def _compare_call(
        self, case: Case, call: ToolCall, wanted: dict[str, Any] | None, found: dict[str, Any] | None, max_work: int
    ) -> Comparison:
        schema = _schema(case, call.name)
        overlap = {"search_tokens": self.search_overlap, "prose": self.prose_overlap}
        c = Comparison(call.name, schema, self.switched_on, self.kinds, overlap, max_work)
        c.spend(PAIR_WORK)
        if self.mode == "tool_name":
            return c
        if found is None or wanted is None:
            c.differ("json", "arguments", "a JSON object", call.arguments)
            return c
        left, right = (
            {key: value for key, value in side.items() if key not in self.ignored_arguments} for side in (wanted, found)
        )
        if same_json(left, right):
            return c
        edit, other = edit_of(call.name, left), edit_of(call.name, right)
        try:
            if edit is not None and other is not None:
                files = case.fields.get("files")
                compare_edits(c, edit, other, files if isinstance(files, Mapping) else {})
                properties = schema.get("properties")
                known = {*left, *(properties if isinstance(properties, Mapping) else ())}
                unknown = {key: value for key, value in right.items() if key not in known}
                missing = {key: left[key] for key in ("command",) if key in left and key not in right}
                rest = other_arguments(edit, left) | missing, other_arguments(other, right) | unknown
                compare_objects(c, "", *rest, schema)
            else:
                compare_objects(c, "", left, right, schema)
        except RecursionError:  # values written as strings inside such values
            raise LimitExceeded("nested too deeply") from None
        return c

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
        c = Comparison("", {}, self.switched_on, self.kinds, {}, self.limits.max_work)
        if same_command(ours, theirs, c.rules, c.touched, c.spend):
            return Verdict(1.0, "EQUIVALENT", rules=tuple(sorted(c.touched)))
        if "shell" in self.ask_judge:
            return self._ruling(case, "terminal", ours, theirs, "DIFFERENT_ARGUMENTS")
        return Verdict(0.0, "DIFFERENT_ARGUMENTS", f"{short(ours, 60)} is not {short(theirs, 60)}")


def _harness(case: Case) -> str:
    metadata = case.fields.get("metadata")
    return str(case.fields.get("harness") or (metadata.get("harness") if isinstance(metadata, dict) else "") or "")


def _schema(case: Case, name: str) -> Mapping[str, Any]:
    declared = case.fields.get("declared_tools")
    for tool in declared if isinstance(declared, (list, tuple)) else case.tools:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else {}
        if isinstance(function, Mapping) and function.get("name") == name:
            parameters = function.get("parameters")
            return parameters if isinstance(parameters, Mapping) else {}
    return {}


def _plain(call: ToolCall, arguments: dict[str, Any] | None) -> tuple[str, str]:
    """Equal for calls that are equal as JSON."""
    return call.name, call.arguments if arguments is None else json.dumps(arguments, sort_keys=True)
