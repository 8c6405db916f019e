"""Does the audit find what is known to be wrong with the released verifiers, and is `functional` free of it?

    python benchmarks/verifier_defects.py

Each line below is a measured weakness of a NeMo-Gym verifier. The expert's action goes through `nemo-pivotrl audit`'s own
probes, under the released rules and under `functional`; the table shows which probes give the weakness away.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from nemo_pivotrl import config
from nemo_pivotrl.config.build import build
from nemo_pivotrl.core.types import Action, Candidate, ToolCall
from nemo_pivotrl.pivotrl.verifier_audit import GOLD, RIGHT, WRONG, Audit, run_audit
from nemo_pivotrl.verifiers.loading import load_verifier


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)[:1]}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TEXT, NUMBER = {"type": "string"}, {"type": "number"}
TOOLS = (
    tool("execute_bash", command=TEXT),
    tool("str_replace_editor", command=TEXT, path=TEXT, view_range={"type": "array"}, insert_line=NUMBER, new_str=TEXT),
    tool("edit_file", filePath=TEXT, oldString=TEXT, newString=TEXT),
    tool("grep", pattern=TEXT, path=TEXT),
    tool("ls", path=TEXT),
    tool("finish", message=TEXT),
    tool("write_file", path=TEXT, content=TEXT),
    tool("get_weather", city=TEXT, days={**NUMBER, "default": 3}, ratio=NUMBER),
    tool("tag", names={"type": "array", "items": TEXT, "uniqueItems": True}),
)
LONG = "\n".join(f"line {i} = {i * i}" for i in range(200))
TURN = {"analysis": "a", "plan": "p", "commands": [{"keystrokes": "python train.py --lr 0.001 --epochs 10 --seed 1\n"}]}


def call(name: str, **arguments: Any) -> Action:
    return Action("calls", calls=(ToolCall(name, json.dumps(arguments)),))


# weakness, verifier settings, expert action, row fields, (side, probe) that gives it away
DEFECTS: list[tuple[str, dict[str, Any], Action, dict[str, Any], tuple[str, str]]] = [
    (
        "threshold 0.0 takes `rm -rf /` for grep",
        {"name": "single_step", "settings": {"word_count_similarity_threshold": 0.0}},
        call("execute_bash", command="grep -rn foo src"),
        {},
        (WRONG, "destructive_command"),
    ),
    (
        "equal texts overlap by 0.5: above that nobody wins",
        {"name": "single_step", "settings": {"word_count_similarity_threshold": 0.51}},
        call("execute_bash", command="grep -rn foo src"),
        {},
        (GOLD, "expert"),
    ),
    (
        "NaN is not NaN",
        {"name": "single_step"},
        Action("calls", calls=(ToolCall("get_weather", '{"city": "Rome", "ratio": NaN}'),)),
        {},
        (GOLD, "expert"),
    ),
    ("1 is true", {"name": "single_step"}, call("get_weather", city="Rome", days=1), {}, (WRONG, "true_for_one")),
    (
        "2 is not 2.0",
        {"name": "single_step"},
        call("get_weather", city="Rome", days=2),
        {},
        (RIGHT, "whole_number_as_float"),
    ),
    (
        "a default may not be spelled out",
        {"name": "single_step"},
        call("get_weather", city="Rome"),
        {},
        (RIGHT, "default_spelled_out"),
    ),
    ("further calls cost nothing", {"name": "single_step"}, call("ls", path="/w"), {}, (WRONG, "further_call")),
    (
        "0.6: a shell call without its command wins",
        {"name": "swe", "compat": "0.6"},
        call("execute_bash", command="pytest tests"),
        {},
        (WRONG, "no_arguments"),
    ),
    (
        "grep for anything",
        {"name": "swe"},
        call("grep", pattern="def main", path="/w/src"),
        {},
        (WRONG, "garbage_in_one_argument"),
    ),
    ("grep is ls", {"name": "swe"}, call("grep", pattern="def main"), {}, (WRONG, "other_tool")),
    (
        "finish with anything",
        {"name": "swe"},
        call("finish", message="fixed the bug in the parser"),
        {},
        (WRONG, "garbage_arguments"),
    ),
    (
        "view_range [1, -1] wins nothing",
        {"name": "swe"},
        call("str_replace_editor", command="view", path="/w/a.py", view_range=[1, -1]),
        {},
        (GOLD, "expert"),
    ),
    (
        "filePath is not seen: any file will do",
        {"name": "swe"},
        call("edit_file", filePath="/w/a.py", oldString="x = 1", newString="x = 2"),
        {},
        (WRONG, "garbage_in_one_argument"),
    ),
    (
        "text past 2,000 characters is not seen",
        {"name": "swe"},
        call("write_file", path="/w/a.py", content=LONG),
        {},
        (WRONG, "changed_past_2000_characters"),
    ),
    (
        "a variable before a command makes it another",
        {"name": "swe"},
        call("execute_bash", command="pytest tests"),
        {},
        (RIGHT, "variable_before_a_command"),
    ),
    (
        "insert_line does not count",
        {"name": "swe"},
        call("str_replace_editor", command="insert", path="/w/a.py", insert_line=3, new_str="x = 1"),
        {},
        (WRONG, "another_number"),
    ),
    (
        "--seed 2 is --seed 1",
        {"name": "terminus"},
        Action("message", json.dumps(TURN)),
        {"harness": "terminus_2"},
        (WRONG, "another_digit"),
    ),
    (
        "complete too early",
        {"name": "terminus"},
        Action("message", json.dumps(TURN)),
        {"harness": "terminus_2"},
        (WRONG, "complete_too_early"),
    ),
    (
        "a row threshold of 0 takes anything",
        {"name": "terminus"},
        Action("message", json.dumps(TURN)),
        {"harness": "terminus_2", "threshold": 0.0},
        (WRONG, "garbage_keystrokes"),
    ),
    (
        "generic harness: values never compared",
        {"name": "terminal_multi_harness"},
        call("execute_bash", command="ls -la /srv"),
        {"harness": "generic"},
        (WRONG, "destructive_command"),
    ),
]


def audit_of(settings: dict[str, Any], expected: Action, fields: dict[str, Any]) -> Audit:
    """The audit of one candidate among rows of other tools."""
    state = ({"role": "user", "content": "go on"},)
    others = (call("ls", path="/w/elsewhere"), Action("message", "Done."))
    rows = [
        Candidate(str(i), "t", "k", "train", 1, 0, state, TOOLS, action, fields=fields)
        for i, action in enumerate((expected, *others))
    ]
    verifier = load_verifier(build(config.Verifier, settings, "defect"))
    recipe = build(config.Recipe, {"verifier": settings, "audit": {"sample": 0}}, "defect")
    return run_audit(recipe, rows, verifier)


def gives_away(found: Audit, side: str, probe: str) -> bool:
    """Whether the probe's verdict on the first candidate is not the one known beforehand."""
    return any(p.failed for p in found.probes["0"] if (p.side, p.name) == (side, probe))


def table() -> list[tuple[str, str, str, bool, bool]]:
    """(weakness, verifier, probe, found under the released rules, found under functional) of every line."""
    rows = []
    for weakness, settings, expected, fields, (side, probe) in DEFECTS:
        released, ours = (audit_of(s, expected, fields) for s in (settings, {"name": "functional"}))
        name = settings["name"] + (f" {settings['compat']}" if "compat" in settings else "")
        rows.append((weakness, name, probe, gives_away(released, side, probe), gives_away(ours, side, probe)))
    return rows


def main() -> int:
    rows = table()
    print(f"{'weakness':<52}{'released rules of':<24}{'probe':<30}{'released':>9}{'functional':>12}")
    for weakness, name, probe, released, ours in rows:
        print(f"{weakness:<52}{name:<24}{probe:<30}{'found' if released else '-':>9}{'HAS IT' if ours else 'free':>12}")
    found, free = sum(r[3] for r in rows), sum(not r[4] for r in rows)
    print(f"the audit finds {found} of {len(rows)} weaknesses; functional is free of {free}")
    return 0 if found == free == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
