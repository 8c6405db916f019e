"""What a trace shows: whole files and nothing less, the shell's directory, and edits judged by their result on them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nemo_pivotrl import config
from nemo_pivotrl.core.types import Action, Case, Message, ToolCall
from nemo_pivotrl.verifiers.loading import load_verifier
from nemo_pivotrl.verifiers.trace import files_shown, working_directory

FILE = "a = 1\n\nb = 1\n"
LISTED = "Here's the result of running `cat -n` on /r/a.py:\n     1\ta = 1\n     2\t\n     3\tb = 1\n     4\t\n"
EDITOR, BASH = "str_replace_editor", "execute_bash"
VIEW = (EDITOR, {"command": "view", "path": "/r/a.py"}, LISTED)
REPLACED = (
    EDITOR,
    {"command": "str_replace", "path": "/r/a.py", "old_str": "a = 1", "new_str": "a = 2"},
    "The file has been edited.",
)


def trace(*steps: tuple[str, dict[str, Any], str]) -> tuple[Message, ...]:
    """A trace of (tool, arguments, output)."""
    messages: list[Message] = [{"role": "user", "content": "go"}]
    for number, (tool, arguments, output) in enumerate(steps):
        function = {"name": tool, "arguments": json.dumps(arguments)}
        messages.append(
            {"role": "assistant", "content": "", "tool_calls": [{"id": f"c{number}", "function": function}]}
        )
        messages.append({"role": "tool", "tool_call_id": f"c{number}", "content": output})
    return tuple(messages)


@pytest.mark.parametrize(
    ("steps", "text"),
    [
        ([VIEW], FILE),
        ([(EDITOR, {"command": "view", "path": "/r/./a.py", "view_range": [1, -1]}, LISTED)], FILE),
        ([(EDITOR, {"command": "create", "path": "/r/a.py", "file_text": FILE}, "New file")], FILE),
        ([VIEW, REPLACED], FILE.replace("a = 1", "a = 2")),
        ([VIEW, (BASH, {"command": "pytest -q && cat /r/b.py"}, "1 passed")], FILE),
        ([VIEW, (*REPLACED[:2], "ERROR: no replacement was performed")], FILE),
        ([(EDITOR, {"command": "view", "path": "/r/a.py", "view_range": [1, 3]}, LISTED)], None),
        ([(EDITOR, {"command": "view", "path": "/r/a.py"}, LISTED + "<response clipped>")], None),
        ([(EDITOR, {"command": "view", "path": "/r/a.py"}, "     3\tb = 1\n")], None),
        ([VIEW, (BASH, {"command": "sed -i s/1/2/ /r/a.py"}, "")], None),
        ([VIEW, (BASH, {"command": "echo x > /r/a.py"}, "")], None),
        ([VIEW, (EDITOR, {"command": "undo_edit", "path": "/r/a.py"}, "")], None),
        ([VIEW, (EDITOR, {**REPLACED[1], "old_str": "= 1"}, "ok")], None),
        ([VIEW, ("apply_patch", {"patch": "what no parser reads"}, "done")], None),
    ],
)  # fmt: skip
def test_a_file_is_known_where_all_of_it_was_shown_and_nothing_may_have_changed_it(
    steps: list[tuple[str, dict[str, Any], str]], text: str | None
) -> None:
    assert files_shown(trace(*steps)).get("/r/a.py") == text


def test_the_directory_is_the_one_that_the_last_output_names() -> None:
    first = (BASH, {"command": "cd /a"}, "x\n[Current working directory: /a]\n[exit code 0]")
    last = (BASH, {"command": "cd /b"}, "[Current working directory: /b/]")
    assert working_directory(trace(first, last, VIEW)) == "/b" and working_directory(trace(VIEW)) is None


def test_an_edit_is_judged_by_its_result_on_a_file_that_the_trace_shows() -> None:
    verifier = load_verifier(config.Verifier(name="functional"))

    def call(**arguments: Any) -> Action:
        return Action(
            "calls", calls=(ToolCall(EDITOR, json.dumps({"command": "str_replace", "path": "/r/a.py", **arguments})),)
        )

    expected, longer = call(old_str="a = 1", new_str="a = 2"), call(old_str="a = 1\n\nb", new_str="a = 2\n\nb")
    assert verifier.verify(Case(expected, messages=trace(VIEW)), longer).rules == ("edit_effect",)
    assert verifier.verify(Case(expected), longer).reward == 0.0
    assert verifier.verify(Case(expected, messages=trace(VIEW)), call(old_str="= 1", new_str="= 2")).reward == 0.0
    shell = [Action("calls", calls=(ToolCall(BASH, json.dumps({"command": c})),)) for c in ("make", "cd /b && make")]
    where = trace((BASH, {"command": "cd /b"}, "[Current working directory: /b]"))
    assert verifier.verify(Case(shell[0], messages=where), shell[1]).rules == ("shell_argv", "shell_cd_prefix")
    assert verifier.verify(Case(shell[0]), shell[1]).reward == 0.0
