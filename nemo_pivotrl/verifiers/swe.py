"""`swe`: NeMo-Gym's pivot verifier for coding agents. Tool, then target, then similarity of the arguments.

Rules of `swe_pivot`. 0.5 and 0.6 accept a shell call whose command is missing; 0.7 does not (`compat`). `mode: tool_name` is
not Gym's: it is what the paper's appendix describes for SWE-Bench, the tool's name alone.

The released code turns any exception of its own into reward 0 with `unknown_error`, and so does this: arguments that are
JSON but no object are its usual cause, since they are looked into as if they were one.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from nemo_pivotrl.config import Limits, ranged
from nemo_pivotrl.core.types import Action, Case, ToolCall, Verdict
from nemo_pivotrl.verifiers.base import Computing
from nemo_pivotrl.verifiers.bounds import LimitExceeded, decode_json, ratio

MAX_COMPARED_CHARS = 2000
"""Text beyond this is not compared."""
SHELL_FLOOR = 0.3
"""Shell commands less similar than this do not have the same target."""
VIEW_OVERLAP = 0.8
"""Share of the expert's line range that a view must cover."""
FULL_SIZE = 500
"""Characters from which an edit carries the whole size penalty."""

TOOLS = {
    "edit": "str_replace_editor text_editor file_editor code_editor edit_file modify_file update_file file_edit edit modify "
    "apply_patch patch_file apply_diff apply_changes write write_file save_file create_file",
    "bash": "execute_bash run_bash bash_exec shell_run shell bash terminal shell_command shell_cmd run_shell_cmd "
    "exec_command exec_cmd",
    "search": "grep search_text find_pattern text_search glob find_files file_glob match_files grep_files search_files "
    "find_in_files code_search list_dir ls show_dir ls_dir list_directory",
    "read": "read read_file view_file cat_file view file_view inspect show_file read_file_content",
    "finish": "finish submit",
    "think": "think",
    "planning": "task_tracker todo_tracker plan_tracker todo_read todo_write update_plan list_tasks update_tasks read_todos "
    "write_todos edit_plan modify_plan",
}
CATEGORY = {
    form: category
    for category, names in TOOLS.items()
    for name in names.split()
    for form in (name, name.replace("_", ""))
}
"""Tool name in lower case, with underscores or (camel case) without, to the category of tools that do the same."""

PATH_KEYS = ("path", "file", "file_path", "filename", "file_name")
SHELL_KEYS = ("command", "cmd")
# after a blank, a quote, `=` or `(`: /abs/olute, ./relative or ../relative, some/where
PATH_IN_COMMAND = re.compile(r"""(?:^|[\s='"(])((?:/[\w.-]+)+|\.{1,2}/[\w./-]+|[\w.-]+/[\w./-]+)""")


def category_of(tool: str) -> str:
    """Category of a tool name, `unknown` where it has none."""
    return CATEGORY.get(tool.lower(), "unknown")


def _first(arguments: Any, keys: tuple[str, ...]) -> str:
    return next((str(arguments[key]).strip() for key in keys if key in arguments), "")


def _suffix(path: str, parts: int) -> str:
    return "/".join(path.strip("/").split("/")[-parts:])


def _verb(command: str) -> str:
    return command.split()[0].rpartition("/")[2] if command else ""


def _paths(command: str) -> set[str]:
    found = (path for path in PATH_IN_COMMAND.findall(command) if len(path) > 2 and not path.startswith("--"))
    return {_suffix(path.rstrip("/"), 3) for path in found} - {""}


def _lines(raw: Any) -> tuple[int, int] | None:
    """A view range of two whole numbers, written as a list or as its JSON text; anything else is no range."""
    try:
        value = json.loads(raw) if isinstance(raw, str) else raw
        return (int(value[0]), int(value[1])) if isinstance(value, list) and len(value) == 2 else None
    except (ValueError, TypeError):
        return None


def edit_content(arguments: Any) -> str:
    """The text an edit writes: replacement, patch, diff, or the whole file."""
    if "new_str" in arguments:
        return f"{arguments.get('old_str', '')}\n{arguments['new_str']}"
    for key in ("patch", "diff"):
        if key in arguments:
            return str(arguments[key])
    if "content" in arguments or "file_text" in arguments:
        return str(arguments.get("content", arguments.get("file_text", "")))
    return ""


@dataclass(kw_only=True, frozen=True)
class Swe(Computing):
    """Layered comparison of one tool call; the first call of the turn is judged. Defaults are Gym's."""

    name: ClassVar[str] = "swe"
    version: ClassVar[str] = "1"
    mode: Literal["arguments", "tool_name"] = "arguments"
    """`tool_name`: the tool's name alone decides (P18)."""
    reward_mode: Literal["binary", "continuous"] = "binary"
    """`binary`: 1 from `similarity_full_credit` on. `continuous`: 0.5 to 1 between the two thresholds."""
    enable_target_match: bool = True
    """Ask for the same file or the same command before anything is compared."""
    enable_argument_similarity: bool = True
    """Compare the arguments; false: tool and target decide."""
    similarity_threshold: float = ranged(0.4, 0.0, 1.0)
    """`continuous` only: similarity below which the reward is 0."""
    similarity_full_credit: float = ranged(0.8, 0.0, 1.0)
    """Similarity from which the reward is 1."""
    enable_diff_size_shaping: bool = True
    """`continuous` only: take off a share for large edits."""
    diff_size_alpha: float = ranged(0.1, 0.0, 1.0)
    """The greatest share that is taken off, for edits of 500 and more characters."""
    compat: Literal["0.5", "0.6", "0.7"] = "0.7"
    limits: Limits = field(default_factory=Limits)

    def verify(self, case: Case, actual: Action) -> Verdict:
        """Reward and Gym's failure code (`none` on success), with target_match, similarity and diff_penalty."""
        if not case.expected.calls:
            return Verdict(0.0, "expected_action_invalid", "the expert's action is no tool call")
        expert = case.expected.calls[0]
        figures: dict[str, Any] = {"target_match": None, "similarity": None, "diff_penalty": None}
        try:
            wanted = self._arguments(expert)
            if not actual.calls:
                return Verdict(0.0, "model_output_invalid", actual.detail)
            reward, code = self._judge(expert.name, wanted, actual.calls[0], figures)
        except LimitExceeded:
            raise
        except (AttributeError, TypeError, ValueError, OverflowError, RecursionError) as error:
            return Verdict(0.0, "unknown_error", f"{type(error).__name__}: {error}", figures=figures)
        return Verdict(reward, code, figures=figures)

    def _arguments(self, call: ToolCall) -> Any:
        try:
            return decode_json(call.arguments, self.limits)
        except json.JSONDecodeError:
            return {}

    def _judge(self, tool: str, wanted: Any, actual: ToolCall, figures: dict[str, Any]) -> tuple[float, str]:
        found = self._arguments(actual)
        wanted_kind, found_kind = category_of(tool), category_of(actual.name)
        if tool.lower() != actual.name.lower() and (found_kind != wanted_kind or found_kind == "unknown"):
            return 0.0, "tool_name_mismatch"
        if self.mode == "tool_name":
            return 1.0, "none"
        if self.enable_target_match:
            figures["target_match"] = self._same_target(found_kind, found, wanted_kind, wanted)
            if not figures["target_match"]:
                return 0.0, "target_mismatch"
        reward = 1.0
        if self.enable_argument_similarity:
            similarity = figures["similarity"] = self._similarity(found_kind, found, wanted_kind, wanted)
            reward = self._credit(similarity)
            if reward == 0.0:
                return 0.0, "similarity_below_threshold"
        if self.enable_diff_size_shaping and self.reward_mode == "continuous":
            size = len(edit_content(found)) if found_kind == "edit" else 0
            figures["diff_penalty"] = self.diff_size_alpha * min(size / FULL_SIZE, 1.0)
            reward *= 1.0 - figures["diff_penalty"]
        return reward, "none"

    def _credit(self, similarity: float) -> float:
        full, part = self.similarity_full_credit, self.similarity_threshold
        if similarity >= full:
            return 1.0
        if self.reward_mode == "binary" or similarity < part:
            return 0.0
        return 0.5 + 0.5 * (similarity - part) / (full - part)

    def _ratio(self, actual: str, expected: str) -> float:
        return ratio(actual[:MAX_COMPARED_CHARS], expected[:MAX_COMPARED_CHARS], self.limits.max_work).value

    def _same_target(self, found_kind: str, found: Any, wanted_kind: str, wanted: Any) -> bool:
        kinds = {found_kind, wanted_kind}
        if kinds == {"edit"}:
            return self._same_edit_target(found, wanted)
        if kinds == {"bash"}:
            return self._same_shell_target(_first(found, SHELL_KEYS), _first(wanted, SHELL_KEYS))
        if kinds <= {"search", "read"}:
            theirs, ours = _first(found, PATH_KEYS), _first(wanted, PATH_KEYS)
            return not (theirs and ours) or _suffix(theirs, 3) == _suffix(ours, 3)
        return True

    def _same_edit_target(self, found: Any, wanted: Any) -> bool:
        theirs, ours = str(found.get("command", "")), str(wanted.get("command", ""))
        if theirs != ours and (self.compat == "0.7" or (theirs and ours)):
            return False
        their_path, our_path = _first(found, PATH_KEYS), _first(wanted, PATH_KEYS)
        if their_path and our_path and _suffix(their_path, 2) != _suffix(our_path, 2):
            return False
        if theirs == ours == "view":
            shown, needed = _lines(found.get("view_range")), _lines(wanted.get("view_range"))
            if shown and needed:
                common = max(0, min(shown[1], needed[1]) - max(shown[0], needed[0]))
                return common / max(1, needed[1] - needed[0]) >= VIEW_OVERLAP
        return True

    def _same_shell_target(self, theirs: str, ours: str) -> bool:
        if not theirs or not ours:
            return not (theirs or ours) or self.compat != "0.7"
        if _verb(theirs) != _verb(ours) and _verb(theirs) and _verb(ours):
            return False
        their_paths, our_paths = _paths(theirs), _paths(ours)
        if their_paths and our_paths and not their_paths & our_paths:
            return False
        return self._ratio(theirs, ours) >= SHELL_FLOOR

    def _similarity(self, found_kind: str, found: Any, wanted_kind: str, wanted: Any) -> float:
        if found_kind == wanted_kind == "edit":
            pairs = [(str(found.get(key, "")), str(wanted.get(key, ""))) for key in ("old_str", "new_str")]
            if any(theirs for theirs, _ in pairs) and any(ours for _, ours in pairs):
                return min(self._ratio(*pair) if all(pair) else float(pair[0] == pair[1]) for pair in pairs)
            return self._text_similarity(edit_content(found), edit_content(wanted))
        if found_kind == wanted_kind == "bash":
            theirs, ours = _first(found, SHELL_KEYS), _first(wanted, SHELL_KEYS)
            if self.compat != "0.7" and not (theirs and ours):
                return 1.0
            return self._text_similarity(theirs, ours)
        return 1.0

    def _text_similarity(self, theirs: str, ours: str) -> float:
        return self._ratio(theirs, ours) if theirs and ours else float(theirs == ours)
