"""`terminal_multi_harness`: NeMo-Gym's next-step verifier with a rule book for each agent harness.

The tool call must be valid under the declared schema of the tool it names, name the expert's tool, add no argument, and
pass the harness's rule for that tool. Under `generic`, and for tools without a rule, values are never compared: that is
the released behaviour. Arguments that are no JSON object crash the released server; here they are `ARGUMENTS_DECODE_ERROR`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

from jsonschema import ValidationError
from openapi_schema_validator import OAS32Validator, validate
from referencing import Registry

from nemo_pivotrl.config import Limits, ranged
from nemo_pivotrl.core.types import Action, Case, ToolCall, Verdict
from nemo_pivotrl.verifiers.base import Computing, VerifierFault
from nemo_pivotrl.verifiers.bounds import LimitExceeded, decode_json, ratio
from nemo_pivotrl.verifiers.schema import bounded, is_valid as follows

VALUE = "ARGUMENT_VALUE_MISMATCH"
Arguments = dict[str, Any]


def _command(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def _web(text: str) -> str:
    return text.lower().strip()


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_path_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


# what a rule is given: expert's arguments, the policy's, and a function that says whether two texts are similar enough
Similar = Callable[[str, str], bool]
Rule = Callable[[Arguments, Arguments, Similar], str]


def equal_values(*keys: str) -> Rule:
    """These arguments must be equal; the others do not matter."""

    def rule(expected: Arguments, actual: Arguments, similar: Similar) -> str:
        return "" if all(expected.get(k) == actual.get(k) for k in keys) else VALUE

    return rule


def similar_command(key: str, prefix: str) -> Rule:
    """Two shell commands under `key`, compared as text."""

    def rule(expected: Arguments, actual: Arguments, similar: Similar) -> str:
        if not isinstance(actual.get(key), str) or not isinstance(expected.get(key), str):
            return f"{prefix}_MISSING_{key.upper()}"
        same = similar(_command(expected[key]), _command(actual[key]))
        return "" if same else f"{prefix}_{key.upper()}_SIMILARITY_BELOW_THRESHOLD"

    return rule


def update_plan(expected: Arguments, actual: Arguments, similar: Similar) -> str:
    plan = actual.get("plan")
    blank = (
        plan is None or (isinstance(plan, str) and not plan.strip()) or (isinstance(plan, (list, dict)) and not plan)
    )
    return "UPDATE_PLAN_EMPTY_PLAN" if blank else ""


def execute_python(expected: Arguments, actual: Arguments, similar: Similar) -> str:
    codes = expected.get("code"), actual.get("code")
    if not all(isinstance(code, str) and code.strip() for code in codes):
        return VALUE
    return "" if similar(str(codes[0]), str(codes[1])) else "EXECUTE_PYTHON_CODE_SIMILARITY_BELOW_THRESHOLD"


def return_result(expected: Arguments, actual: Arguments, similar: Similar) -> str:
    texts = [json.dumps(arguments.get("result"), sort_keys=True) for arguments in (expected, actual)]
    return "" if similar(*texts) else "RETURN_RESULT_SIMILARITY_BELOW_THRESHOLD"


def todowrite(expected: Arguments, actual: Arguments, similar: Similar) -> str:
    wanted, found = expected.get("todos"), actual.get("todos")
    if wanted == []:
        return "" if found == [] else VALUE
    if not isinstance(wanted, list) or not isinstance(found, list):
        return "TODOWRITE_EMPTY_TODOS"
    same = len(wanted) == len(found) and all(
        isinstance(w, dict) and isinstance(f, dict) and all(w.get(k) == f.get(k) for k in ("status", "priority"))
        for w, f in zip(wanted, found, strict=True)
    )
    return "" if same else VALUE


def edit(expected: Arguments, actual: Arguments, similar: Similar) -> str:
    if actual.get("oldString") == actual.get("newString"):
        return VALUE
    return equal_values("filePath", "replaceAll")(expected, actual, similar)


def web_search(expected: Arguments, actual: Arguments, similar: Similar) -> str:
    if not _is_text(actual.get("query")) or not _is_text(expected.get("query")):
        return "WEB_SEARCH_MISSING_QUERY"
    same = similar(_web(expected["query"]), _web(actual["query"]))
    return "" if same else "WEB_SEARCH_QUERY_SIMILARITY_BELOW_THRESHOLD"


def fetch_web_page(expected: Arguments, actual: Arguments, similar: Similar) -> str:
    if not _is_text(actual.get("url")) or not _is_text(expected.get("url")):
        return "FETCH_WEB_PAGE_MISSING_URL"
    return "" if _web(expected["url"]) == _web(actual["url"]) else "FETCH_WEB_PAGE_URLS_DO_NOT_MATCH"


def finish(expected: Arguments, actual: Arguments, similar: Similar) -> str:
    if not _is_text(actual.get("reason")) or not _is_text(expected.get("reason")):
        return "FINISH_MISSING_REASON"
    if not _is_path_list(actual.get("paths")) or not _is_path_list(expected.get("paths")):
        return "FINISH_MISSING_PATHS"
    if sorted(p.strip() for p in actual["paths"]) != sorted(p.strip() for p in expected["paths"]):
        return "FINISH_PATHS_DO_NOT_MATCH"
    same = similar(_web(actual["reason"]), _web(expected["reason"]))  # the released order: the policy's text first
    return "" if same else "FINISH_REASON_SIMILARITY_BELOW_THRESHOLD"


RULES: dict[str, dict[str, Rule]] = {
    "codex": {"exec_command": similar_command("cmd", "EXEC_COMMAND"), "update_plan": update_plan},
    "agent006": {"execute_python": execute_python, "return_result": return_result},
    "opencode": {
        "bash": similar_command("command", "BASH"),
        "todowrite": todowrite,
        "read": equal_values("filePath"),
        "write": equal_values("filePath"),
        "edit": edit,
        "glob": equal_values("pattern", "path"),
        "grep": equal_values("pattern", "path", "include"),
        "webfetch": equal_values("url", "format"),
        "skill": equal_values("name"),
        "task": equal_values("subagent_type"),
    },
    "stirrup": {
        "code_exec": similar_command("cmd", "EXEC_COMMAND"),
        "web_search": web_search,
        "fetch_web_page": fetch_web_page,
        "finish": finish,
    },
}


@lru_cache(maxsize=512)
def _validator(schema_text: str) -> Any:
    """Validator of a declared schema, None where the schema itself is invalid. Checking a schema takes long: cached."""
    schema = json.loads(schema_text)
    try:
        validate(None, schema, registry=Registry())  # references are never fetched
    except ValidationError:
        pass
    except Exception:  # as released: a schema over which the library raises anything else is invalid
        return None
    return bounded(OAS32Validator)(schema, registry=Registry())


def is_valid(arguments: Arguments, schema: dict[str, Any]) -> bool:
    """Whether arguments follow a declared schema. An invalid schema, or one that cannot be resolved, accepts nothing."""
    try:
        validator = _validator(json.dumps(schema, sort_keys=True))
        return validator is not None and follows(validator, arguments)
    except LimitExceeded:
        raise
    except BaseException as error:
        # as released: whatever the schema library raises, the arguments are not valid under the schema. Where recursion
        # ends inside its Rust part that is a PanicException, which is no Exception.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            return False
        raise


def declared_schemas(case: Case) -> dict[str, dict[str, Any]]:
    """Parameter schemas by tool name, from the row's `declared_tools` or else its tools, in either form."""
    found: dict[str, dict[str, Any]] = {}
    declared = case.fields.get("declared_tools")
    for tool in case.tools if declared is None else declared:
        function = tool.get("function") if isinstance(tool, dict) else None
        source = function if isinstance(function, dict) else tool if isinstance(tool, dict) else {}
        if isinstance(source.get("name"), str) and isinstance(source.get("parameters"), dict):
            found[source["name"]] = source["parameters"]
    return found


def unstring(arguments: Arguments, schema: dict[str, Any], limits: Limits) -> None:
    """Replace, in place, top-level arrays and objects that were written as strings by what they say.

    Every declared argument that is a string is read as JSON, as released. Raises ValueError or RecursionError for digits or
    nesting beyond what Python reads, and for a replacement beyond the limits; a text that is just no JSON stays as it is.
    """
    properties = schema.get("properties")
    wanted = {"array": list, "object": dict}
    for name, declared in properties.items() if isinstance(properties, dict) else ():
        if not isinstance(declared, dict) or not isinstance(arguments.get(name), str):
            continue
        try:
            value = json.loads(arguments[name])
        except json.JSONDecodeError:
            continue
        kind = declared.get("type")
        if isinstance(kind, str) and kind in wanted and isinstance(value, wanted[kind]):
            arguments[name] = decode_json(arguments[name], limits)


@dataclass(kw_only=True, frozen=True)
class TerminalMultiHarness(Computing):
    """One call against the expert's call by the harness's rules; batches pairwise after sorting."""

    name: ClassVar[str] = "terminal_multi_harness"
    version: ClassVar[str] = "1"
    talk_rule: ClassVar[str] = "released"
    string_similarity_threshold: float = ranged(0.9, 0.0, 1.0)
    """Similarity of commands, code, queries and reasons that is enough; the row's `threshold` wins."""
    harness: str = "generic"
    """Harness of rows that name none: codex, opencode, agent006, stirrup or generic."""
    limits: Limits = field(default_factory=Limits)

    def verify(self, case: Case, actual: Action) -> Verdict:
        """1.0 or 0.0, Gym's category name, and the similarity where one was computed."""
        expected = case.expected
        if actual.kind == "none":
            return Verdict(0.0, "NO_ACTION_FOUND", actual.detail)
        if actual.kind == "malformed":
            return Verdict(0.0, "ARGUMENTS_DECODE_ERROR", actual.detail)
        if expected.kind == "calls" and not expected.calls:
            raise VerifierFault("expected_action", "an expert action of no calls")
        if expected.kind != actual.kind or min(len(expected.calls), 2) != min(len(actual.calls), 2):
            return Verdict(0.0, "ACTION_TYPE_MISMATCH")
        if expected.kind == "message":
            said = bool(actual.content.strip())
            return Verdict(float(said), "EXPECTED_CHAT_MESSAGE_FOUND" if said else "EMPTY_MESSAGE")
        if len(expected.calls) != len(actual.calls):
            return Verdict(0.0, "FUNCTION_CALL_BATCH_LENGTH_DIFFERENT")
        schemas = declared_schemas(case)
        batch = len(expected.calls) > 1
        try:
            ours = self._sorted(expected.calls)
        except ValueError as error:
            raise VerifierFault("expected_arguments", str(error)) from None
        try:
            theirs = self._sorted(actual.calls)
        except ValueError as error:
            return Verdict(0.0, "ARGUMENTS_DECODE_ERROR", str(error))
        for wanted, found in dict.fromkeys(zip(ours, theirs, strict=True)):  # equal pairs once
            figures: dict[str, Any] = {}
            category, detail = self._compare(case, schemas, wanted, found, figures)
            if category:
                return Verdict(0.0, category, detail, figures=figures)
        return Verdict(
            1.0, "EXPECTED_TOOL_CALL_BATCH" if batch else "EXPECTED_TOOL_CALL", figures={} if batch else figures
        )

    def _sorted(self, calls: tuple[ToolCall, ...]) -> list[ToolCall]:
        """By name and canonical arguments. Raises ValueError for arguments beyond what is read; no JSON sorts as text."""
        bare = [ToolCall(call.name, call.arguments) for call in calls]
        if len(bare) == 1:
            return bare
        keys = {}
        for text in {call.arguments for call in bare}:
            try:
                value = decode_json(text, self.limits)
            except json.JSONDecodeError:
                value = None
            as_object = isinstance(value, dict)
            keys[text] = json.dumps(value, sort_keys=True, separators=(",", ":")) if as_object else text
        return sorted(bare, key=lambda call: (call.name, keys[call.arguments]))

    def _decode(self, call: ToolCall) -> Arguments:
        """Raises ValueError for arguments that are no JSON object."""
        value = decode_json(call.arguments, self.limits)
        if not isinstance(value, dict):
            raise ValueError(f"{type(value).__name__} instead of an object")
        return value

    def _compare(
        self,
        case: Case,
        schemas: dict[str, dict[str, Any]],
        expected: ToolCall,
        actual: ToolCall,
        figures: dict[str, Any],
    ) -> tuple[str, str]:
        """Category of the first difference ('' where there is none) and a word on it."""
        try:
            wanted = self._decode(expected)
        except ValueError as error:
            raise VerifierFault("expected_arguments", str(error)) from None
        try:
            found = self._decode(actual)
        except ValueError as error:
            return "ARGUMENTS_DECODE_ERROR", str(error)
        schema = schemas.get(actual.name)
        if schema is None:
            return "TOOL_SCHEMA_NOT_FOUND", actual.name
        try:
            unstring(found, schema, self.limits)
        except (ValueError, RecursionError) as error:
            return "ARGUMENTS_DECODE_ERROR", str(error)
        if not is_valid(found, schema):
            return "TOOL_SCHEMA_VALIDATION_FAILED", ""
        if expected.name != actual.name:
            return "UNEXPECTED_TOOL", actual.name
        if not found.keys() <= wanted.keys():
            return "UNEXPECTED_ARGUMENT_KEYS", ", ".join(sorted(found.keys() - wanted.keys()))
        rule = RULES.get(str(case.fields.get("harness") or self.harness), {}).get(expected.name)
        if rule is None:
            return "", ""
        threshold = case.fields.get("threshold")
        at_least = self.string_similarity_threshold if threshold is None else float(threshold)

        def similar(first: str, second: str) -> bool:
            similarity = ratio(first, second, self.limits.max_work, at_least)
            figures.clear()
            figures.update(similarity.figures)
            return similarity.value >= at_least

        return rule(wanted, found, similar), ""
