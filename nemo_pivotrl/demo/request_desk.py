"""A desk with long conversations: a customer brings two or three requests at once, and most of the clerk's turns are routine.

It stands nearer to what the PivotRL paper trains on than the shop of `service_desk.py`: 9 to 16 turns a conversation instead of
four (public Terminal-Pivot trajectories have a median of 14), about 60 % of the turns always done right (the paper: 71 % of random
turns have no signal), and families of requests that no trajectory shows (the paper: 838 training domains, three test domains).

Twelve families come from one grammar: each has a tool of its own name, half of them take a number. `SEEN` are those of the experts'
trajectories and of validation; `UNSEEN` are played in the test alone. A request is done in five turns: open the record, check it,
ask, change it, log it; a held record is passed on instead of changed. The start policy has learned all families from clerks who err
(`EXPERT_ERRORS`) and reads conversations of other clerks (`mixed`), as a post-trained model reads what other models wrote.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

from nemo_pivotrl.core.types import Action, ToolCall
from nemo_pivotrl.demo.service_desk import CODES, KINDS, NAMES, Episode, Task, tool_schema

PLAIN = ("pause", "renew", "repair", "close", "lock", "hide")
COUNTED = ("raise", "lower", "extend", "share", "split", "limit")
SEEN = (*PLAIN[:4], *COUNTED[:4])
UNSEEN = (*PLAIN[4:], *COUNTED[4:])
FAMILIES = (*PLAIN, *COUNTED)
HELD = 0.3
"""Share of the records that are held."""
EXPERT_ERRORS = {"blind": 0.15, "heedless": 0.5, "unasked": 0.25, "stale": 0.2}
"""What careless clerks do, and at how many of the requests: not check the record, change a held one, change it without asking,
write the number that the record has already."""

TOOLS = (
    tool_schema("open", "Open a customer's record.", user="string", kind="string"),
    tool_schema("check", "Status and level of a record.", id="string"),
    tool_schema("pass_on", "Hand a held record to a human.", id="string"),
    tool_schema("log", "Close the request: done or passed.", id="string", result="string"),
    *(tool_schema(name, f"To {name} a free record.", id="string") for name in PLAIN),
    *(tool_schema(name, f"To {name} a free record.", id="string", to="integer") for name in COUNTED),
)

WORDING: dict[str, dict[str, tuple[str, ...]]] = {
    "house": {
        "ask": ("shall i {verb} {id} ?", "{verb} {id} , ok ?", "may i {verb} {id} ?"),
        "end": ("all is done .", "done .", "that is all ."),
    },
    "other": {
        "ask": (
            "thank you for waiting ! do you agree that we {verb} {id} now ?",
            "i see your {kind} here : you wish to {verb} it , right ?",
        ),
        "end": ("great , all settled , thank you for your time !", "good news : your wishes are settled today !"),
    },
}
"""What is said, by teacher. `other` puts arguments in another order, too; it does the same things."""


class RequestEpisode(Episode):
    """One conversation about all requests of a customer."""

    system: ClassVar[str] = "Request desk. Open, check, ask, act, log. Held records go to a human."
    catalogue: ClassVar[tuple[dict[str, Any], ...]] = TOOLS
    writes: ClassVar[frozenset[str]] = frozenset(FAMILIES)
    max_turns: ClassVar[int] = 32

    def answer(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Run one of the tools. What changes a record takes the customer's word with it: each change needs one of its own."""
        records = self.database["records"]
        if name == "open":
            mine = (
                key for key, r in records.items() if r["user"] == arguments["user"] and r["kind"] == arguments["kind"]
            )
            return {"id": key} if (key := next(mine, None)) else {"error": "no record"}
        record = records.get(arguments["id"])
        if record is None:
            return {"error": "no record"}
        if name == "check":
            return {"status": record["status"], "level": record["level"]}
        if name == "pass_on":
            record["status"] = "passed"
        elif name == "log":
            record["log"] = arguments["result"]
        else:
            self.confirmed = False
            record |= {"last": name, "level": arguments.get("to", record["level"])}
        return {"ok": True}


def request_task(rng: random.Random, task_id: str, families: tuple[str, ...] = FAMILIES) -> Task:
    """A customer with two or three requests of the given families; everything about it follows from `rng`."""
    user, count = rng.choice(NAMES), rng.randint(2, 3)
    kinds, codes, verbs = rng.sample(KINDS, count), rng.sample(CODES, count), rng.sample(families, count)
    database: dict[str, Any] = {"records": {}}
    wishes, said = [], []
    for kind, code, verb in zip(kinds, codes, verbs, strict=True):
        level, to = rng.sample(range(1, 10), 2)
        status = "held" if rng.random() < HELD else "free"
        database["records"][code] = {
            "user": user,
            "kind": kind,
            "status": status,
            "level": level,
            "last": "",
            "log": "",
        }
        wishes.append({"kind": kind, "id": code, "verb": verb, "status": status, "level": level, "to": to})
        goal = f"{verb} to {to}" if verb in COUNTED else verb
        said.append(rng.choice((f"my {kind} : {goal}", f"{kind} please {goal}")))
    goal_state = copy.deepcopy(database)
    for wish in wishes:
        record = goal_state["records"][wish["id"]]
        if wish["status"] == "held":
            record |= {"status": "passed", "log": "passed"}
        else:
            record |= {"last": wish["verb"], "log": "done"}
            record["level"] = wish["to"] if wish["verb"] in COUNTED else record["level"]
    opening = f"{rng.choice(('hi i am', 'hello this is', 'my name is', 'i am'))} {user} . " + " . ".join(said)
    family = "seen families" if all(verb in SEEN for verb in verbs) else "other families"
    return Task(task_id, family, opening, database, goal_state, facts={"user": user, "wishes": wishes})


def of_families(families: tuple[str, ...]) -> Callable[[random.Random, str], Task]:
    """`request_task` for these families alone."""
    return partial(request_task, families=families)


def draw_errors(rng: random.Random, share: float) -> frozenset[str]:
    """The errors at one request; share in [0, 1] of their rates."""
    return frozenset(name for name, rate in EXPERT_ERRORS.items() if rng.random() < share * rate)


def clerk_turns(
    task: Task, rng: random.Random, teachers: Callable[[], str] = lambda: "house", error_rate: float = 0.0
) -> Iterator[tuple[Action, str]]:
    """The actions of a clerk in order, each with the wording it has.

    teachers: draws the wording of a turn; error_rate: share of EXPERT_ERRORS.
    """
    number = iter(range(99))

    def call(name: str, **arguments: Any) -> tuple[Action, str]:
        teacher = teachers()
        ordered = arguments if teacher == "house" else dict(reversed(arguments.items()))
        return Action("calls", calls=(ToolCall(name, json.dumps(ordered), f"call_{next(number)}"),)), teacher

    def talk(what: str, **facts: Any) -> tuple[Action, str]:
        teacher = teachers()
        return Action("message", content=rng.choice(WORDING[teacher][what]).format(**facts)), teacher

    for wish in task.facts["wishes"]:
        made, key, verb = draw_errors(rng, error_rate), wish["id"], wish["verb"]
        yield call("open", user=task.facts["user"], kind=wish["kind"])
        checked = "blind" not in made
        if checked:
            yield call("check", id=key)
        if checked and wish["status"] == "held" and "heedless" not in made:
            yield call("pass_on", id=key)
            yield call("log", id=key, result="passed")
            continue
        if "unasked" not in made:
            yield talk("ask", **wish)
        number_of = {"to": wish["level" if checked and "stale" in made else "to"]} if verb in COUNTED else {}
        yield call(verb, id=key, **number_of)
        yield call("log", id=key, result="done")
    yield talk("end")


def conversation(
    task: Task, rng: random.Random, teachers: Callable[[], str] = lambda: "house", error_rate: float = 0.0
) -> dict[str, Any]:
    """A clerk's conversation as an OpenAI chat record, with its reward and the wording of each of its turns."""
    episode, worded = RequestEpisode(task), []
    for action, teacher in clerk_turns(task, rng, teachers, error_rate):
        episode.step(action)
        worded.append(teacher)
    return {
        "trajectory_id": f"{task.task_id}-clerk",
        "task_id": task.task_id,
        "reward": float(episode.success),
        "messages": episode.messages,
        "tools": list(episode.tools),
        "wording": worded,
    }


def mixed(rng: random.Random) -> Callable[[], str]:
    """Wordings of a conversation that other clerks take part in: their share of the turns is drawn from [0, 1]."""
    share = rng.random()
    return lambda: "other" if rng.random() < share else "house"
