"""The embedded default: a small shop's service desk with tools, a database and a scripted customer.

It exists so that the whole of PivotRL can be seen working on two CPU cores. A task is one customer with one wish; its
own small database holds that customer's orders and the items on offer. The agent calls tools or talks; the customer
answers by a script; **the end state decides success**: the database must equal the goal, every write must have been
confirmed by the customer first, and what the customer asked to be told must have been said.

A second family of tasks has nothing to do with the desk (`PUZZLES`: short text puzzles, no tools). The start policy is
good at both; training on the desk must not cost the puzzles. That is the out-of-domain probe.

Tasks are made from a seed and never shared between splits: `tasks` deals customers' signatures out once.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from nemo_pivotrl.core.artifacts import canonical_json
from nemo_pivotrl.core.types import Action, Message, ToolCall

MAX_TURNS = 8
"""Assistant turns after which an episode fails."""

SYSTEM = "Shop desk. Ask before changes. Shipped orders go to a human."

NAMES = [
    "ann",
    "ben",
    "cleo",
    "dan",
    "eva",
    "finn",
    "gina",
    "hugo",
    "iris",
    "jack",
    "kim",
    "leo",
    "mona",
    "nils",
    "olga",
    "paul",
    "quin",
    "rosa",
    "sam",
    "tina",
]
KINDS = ["lamp", "desk", "chair", "sofa", "shelf", "clock", "rug", "mirror", "vase", "stool"]
CODES = [
    "alfa",
    "bravo",
    "delta",
    "echo",
    "golf",
    "hotel",
    "india",
    "kilo",
    "lima",
    "mike",
    "oscar",
    "papa",
    "romeo",
    "sierra",
    "tango",
    "victor",
    "xray",
    "yankee",
    "zulu",
    "amber",
]
WORDS = [
    "sun",
    "cup",
    "tree",
    "fish",
    "moon",
    "leaf",
    "star",
    "boat",
    "bird",
    "ring",
    "coin",
    "bell",
    "road",
    "wind",
    "salt",
    "gold",
]


def tool_schema(name: str, description: str, **properties: str) -> dict[str, Any]:
    schema = {key: {"type": kind} for key, kind in properties.items()}
    parameters = {"type": "object", "properties": schema, "required": list(schema), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = (
    tool_schema("find_orders", "Orders of a customer.", user="string"),
    tool_schema("get_order", "Quantity and status of one order.", order_id="string"),
    tool_schema("search_items", "Items of a kind with their prices.", kind="string"),
    tool_schema("cancel_order", "Cancel a pending order.", order_id="string", note="string"),
    tool_schema("change_order", "Change the quantity of a pending order.", order_id="string", qty="integer"),
    tool_schema("place_order", "Order an item for a customer.", user="string", item="string", qty="integer"),
    tool_schema("transfer", "Hand the customer to a human.", summary="string"),
)
WRITES = frozenset({"cancel_order", "change_order", "place_order"})


@dataclass(frozen=True, slots=True)
class Task:
    """One customer with one request."""

    task_id: str
    family: str
    """`cancel`, `change`, `buy`, `status`, or a puzzle's name."""
    opening: str
    """The customer's first message."""
    database: dict[str, Any]
    goal: dict[str, Any]
    """The database as it must be at the end; for a puzzle, `{"answer": text}`."""
    must_say: str = ""
    """Word that one of the agent's messages must contain."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the expert needs: user, order_id, qty, item, status."""


def database(rng: random.Random, user: str) -> dict[str, Any]:
    """One order of `user`, an order of somebody else, and two items of each of two kinds on offer."""
    kinds, codes = rng.sample(KINDS, 2), rng.sample(CODES, 6)
    others = rng.choice([name for name in NAMES if name != user])
    orders = {
        codes.pop(): {
            "user": owner,
            "item": kind,
            "qty": rng.randint(1, 9),
            "status": rng.choice(["pending", "shipped"]),
        }
        for owner, kind in zip((user, others), kinds, strict=True)
    }
    items = {kind: dict(zip((codes.pop(), codes.pop()), rng.sample(range(1, 10), 2), strict=True)) for kind in kinds}
    return {"orders": orders, "items": items, "transferred": False}


def desk_task(rng: random.Random, task_id: str) -> Task:
    """A random service-desk task; everything about it follows from `rng`."""
    user = rng.choice(NAMES)
    base = database(rng, user)
    goal = copy.deepcopy(base)
    family = rng.choice(["cancel", "change", "buy", "status"])
    hello = rng.choice(["hi i am", "hello this is", "my name is", "i am"])
    if family == "buy":
        kind, qty = rng.choice(sorted(base["items"])), rng.randint(1, 9)
        item = min(base["items"][kind], key=base["items"][kind].__getitem__)
        goal["orders"]["NEW"] = {"user": user, "item": item, "qty": qty, "status": "pending"}
        opening = f"{hello} {user} . " + rng.choice(
            [
                f"please order {qty} of the cheapest {kind}",
                f"i want {qty} of your cheapest {kind}",
                f"get me the cheapest {kind} , {qty} of it",
            ]
        )
        return Task(task_id, family, opening, base, goal, facts={"user": user, "kind": kind, "item": item, "qty": qty})
    order_id = next(key for key, order in base["orders"].items() if order["user"] == user)
    order = base["orders"][order_id]
    facts = {"user": user, "order_id": order_id, "item": order["item"], "status": order["status"]}
    if family == "status":
        opening = f"{hello} {user} . " + rng.choice(
            [f"where is my {order['item']} ?", f"is my {order['item']} on its way ?"]
        )
        return Task(task_id, family, opening, base, goal, must_say=order["status"], facts=facts)
    if family == "cancel":
        opening = f"{hello} {user} . " + rng.choice(
            [f"please cancel my {order['item']}", f"i do not want the {order['item']} any more"]
        )
    else:
        facts["qty"] = rng.choice([n for n in range(1, 10) if n != order["qty"]])
        opening = f"{hello} {user} . " + rng.choice(
            [
                f"please make it {facts['qty']} of the {order['item']}",
                f"i need {facts['qty']} {order['item']} in my order",
            ]
        )
    if order["status"] == "shipped":
        goal["transferred"] = True
    elif family == "cancel":
        goal["orders"][order_id]["status"] = "cancelled"
    else:
        goal["orders"][order_id]["qty"] = facts["qty"]
    return Task(task_id, family, opening, base, goal, facts=facts)


def puzzle_task(rng: random.Random, task_id: str) -> Task:
    """A random text puzzle: one question, one exact answer, no tools."""
    words = rng.sample(WORDS, rng.randint(3, 5))
    family = rng.choice(sorted(PUZZLES))
    question, answer = PUZZLES[family](rng, words)
    return Task(task_id, family, question, {}, {"answer": answer})


def _larger(rng: random.Random, words: list[str]) -> tuple[str, str]:
    low, high = sorted(rng.sample(range(10, 99), 2))
    first, second = rng.sample([low, high], 2)
    return f"puzzle : larger of {first} {second}", str(high)


def _repeat(rng: random.Random, words: list[str]) -> tuple[str, str]:
    things = [*words[:2], rng.choice(NAMES), rng.choice(CODES), rng.choice(KINDS)]
    rng.shuffle(things)
    text = " ".join(things[: rng.randint(1, 5)])
    return f"puzzle : repeat {text}", text


def _recall(rng: random.Random, words: list[str]) -> tuple[str, str]:
    kinds, codes = rng.sample(KINDS, 3), rng.sample(CODES, 3)
    pick = rng.randrange(3)
    pairs = " , ".join(f"{kind} {code}" for kind, code in zip(kinds, codes, strict=True))
    return f"puzzle : {pairs} . which is {kinds[pick]} ?", codes[pick]


PUZZLES: dict[str, Callable[[random.Random, list[str]], tuple[str, str]]] = {
    "first": lambda rng, words: (f"puzzle : first of {' '.join(words)}", words[0]),
    "last": lambda rng, words: (f"puzzle : last of {' '.join(words)}", words[-1]),
    "reverse": lambda rng, words: (f"puzzle : reverse {' '.join(words[:3])}", " ".join(reversed(words[:3]))),
    "count": lambda rng, words: (f"puzzle : count {' '.join(words)}", str(len(words))),
    "larger": _larger,
    "repeat": _repeat,
    "recall": _recall,
}


def tasks(
    seed: int, sizes: dict[str, int], make: Callable[[random.Random, str], Task] = desk_task
) -> dict[str, list[Task]]:
    """`sizes[split]` tasks for each split, no opening and database shared between any two of them."""
    rng, seen, dealt = random.Random(f"tasks {seed} {make.__name__}"), set(), {}
    for split, size in sizes.items():
        dealt[split] = []
        while len(dealt[split]) < size:
            task = make(rng, f"{make.__name__[:4]}-{split}-{len(dealt[split]):05d}")
            signature = canonical_json([task.opening, task.database])
            if signature not in seen:
                seen.add(signature)
                dealt[split].append(task)
    return dealt


class Episode:
    """One conversation about one task: the tools, the customer and the judgement of the end state.

    `messages` is the state the agent sees. `step` takes its action and moves on; `done` and `success` tell the rest.
    A desk of another kind has a subclass with its own system prompt, tools and turns.
    """

    system: ClassVar[str] = SYSTEM
    catalogue: ClassVar[tuple[dict[str, Any], ...]] = TOOLS
    writes: ClassVar[frozenset[str]] = WRITES
    """Tools that need the customer's word first."""
    max_turns: ClassVar[int] = MAX_TURNS

    def __init__(self, task: Task):
        self.task = task
        self.database = copy.deepcopy(task.database)
        self.puzzle = "answer" in task.goal
        self.messages: list[Message] = [] if self.puzzle else [{"role": "system", "content": self.system}]
        self.messages.append({"role": "user", "content": task.opening})
        self.tools = () if self.puzzle else self.catalogue
        self.done = False
        self.confirmed = False
        self.broke_policy = False
        self.said: list[str] = []
        self.turns = 0

    def step(self, action: Action) -> None:
        """Apply one assistant turn. A malformed or empty turn ends the episode without success."""
        self.turns += 1
        self.done = self.turns >= self.max_turns
        if action.kind == "message":
            self._talk(action.content)
        elif action.kind == "calls":
            self._call(action)
        else:
            self.broke_policy = self.done = True

    @property
    def success(self) -> bool:
        """Whether the end state is the goal. For a puzzle: whether the answer is exact."""
        if self.puzzle:
            return self.done and self.said[-1:] == [self.task.goal["answer"]]
        told = not self.task.must_say or any(self.task.must_say in text.split() for text in self.said)
        return self.done and not self.broke_policy and told and self.database == self.task.goal

    def _talk(self, content: str) -> None:
        self.said.append(content.strip())
        self.messages.append({"role": "assistant", "content": content})
        if "?" in content and not self.puzzle:
            self.confirmed = True
            self.messages.append({"role": "user", "content": "yes please"})
        else:
            self.done = True

    def _call(self, action: Action) -> None:
        if self.puzzle:
            self.broke_policy = self.done = True
            return
        calls = [_chat_call(call) for call in action.calls]
        self.messages.append({"role": "assistant", "content": action.content, "tool_calls": calls})
        for call in action.calls:
            result = self._run(call)
            self.messages.append(
                {"role": "tool", "tool_call_id": call.call_id, "name": call.name, "content": json.dumps(result)}
            )

    def _run(self, call: ToolCall) -> dict[str, Any]:
        try:
            arguments = json.loads(call.arguments)
        except ValueError:
            return {"error": "bad arguments"}
        tool = next((t["function"] for t in self.catalogue if t["function"]["name"] == call.name), None)
        if tool is None:
            return {"error": "no such tool"}
        types = {key: value["type"] for key, value in tool["parameters"]["properties"].items()}
        python = {"string": str, "integer": int}
        if (
            not isinstance(arguments, dict)
            or set(arguments) != set(types)
            or not all(type(arguments[k]) is python[t] for k, t in types.items())
        ):
            return {"error": "bad arguments"}
        if call.name in self.writes and not self.confirmed:
            self.broke_policy = True
        return self.answer(call.name, arguments)

    def answer(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Run one of the tools, with arguments of the right types."""
        found: dict[str, Any] = getattr(self, "_" + name)(**arguments)
        return found

    def _find_orders(self, user: str) -> dict[str, Any]:
        found = {order["item"]: key for key, order in self.database["orders"].items() if order["user"] == user}
        return found or {"error": "no orders"}

    def _get_order(self, order_id: str) -> dict[str, Any]:
        order = self.database["orders"].get(order_id)
        return {"qty": order["qty"], "status": order["status"]} if order else {"error": "no such order"}

    def _search_items(self, kind: str) -> dict[str, Any]:
        return self.database["items"].get(kind) or {"error": "none"}

    def _change(self, order_id: str, key: str, value: object) -> dict[str, Any]:
        order = self.database["orders"].get(order_id)
        if not order or order["status"] != "pending":
            return {"error": "not pending"}
        order[key] = value
        return {"ok": True}

    def _cancel_order(self, order_id: str, note: str) -> dict[str, Any]:
        return self._change(order_id, "status", "cancelled")

    def _change_order(self, order_id: str, qty: int) -> dict[str, Any]:
        return self._change(order_id, "qty", qty)

    def _place_order(self, user: str, item: str, qty: int) -> dict[str, Any]:
        if not any(item in offers for offers in self.database["items"].values()):
            return {"error": "no such item"}
        self.database["orders"]["NEW"] = {"user": user, "item": item, "qty": qty, "status": "pending"}
        return {"ok": True}

    def _transfer(self, summary: str) -> dict[str, Any]:
        self.database["transferred"] = True
        return {"ok": True}


def _chat_call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


EXPERT_ERRORS = {"detour": 0.25, "dear": 0.6, "unchecked": 0.5, "heedless": 0.7, "unasked": 0.4}
"""What careless clerks do, and in how many of their conversations: look in the wrong place first, take the dear item, not look
at the order, overlook that it is shipped, change things without asking."""

WORDING: dict[str, dict[str, tuple[str, ...]]] = {
    "house": {
        "offer": (
            "{item} is the cheapest . ok ?",
            "shall i order {item} ?",
            "may i place it for {item} ?",
        ),
        "ordered": ("it is ordered .", "done .", "{item} is on its way ."),
        "status": ("{order_id} is {status} .", "your {item} is {status} .", "it is {status} ."),
        "summary": ("order {order_id} is shipped", "shipped order {order_id}", "customer has shipped order {order_id}"),
        "passed": ("a human will help you .", "i passed you on ."),
        "cancel": ("shall i cancel {order_id} ?", "cancel {order_id} , ok ?", "may i cancel your {item} ?"),
        "note": ("customer asked for it", "asked by the customer", "the customer does not want it"),
        "cancelled": ("it is cancelled .", "done ."),
        "change": ("shall i make it {qty} ?", "{qty} of {order_id} , ok ?", "may i change {order_id} ?"),
        "changed": ("it is changed .", "done ."),
    },
    "other": {
        "offer": (
            "our best price today : {item} . do you agree ?",
            "i suggest {item} because it costs less . right ?",
        ),
        "ordered": ("great choice ! the shop sends {item} today .", "all settled , {item} will reach you soon !"),
        "status": ("thank you for waiting ! i see {order_id} here : {status} .", "good news first : {status} it is !"),
        "summary": ("please look at shipped order {order_id} now", "urgent : order {order_id} has left the shop"),
        "passed": ("sorry ! someone from our team calls you today .", "thank you , our team takes it from here !"),
        "cancel": (
            "sorry to hear that ! do you agree that {order_id} stops ?",
            "you wish to stop {order_id} , right ?",
        ),
        "note": ("customer called today", "stopped for the customer who called"),
        "cancelled": ("all settled , thank you for your time !", "great , nothing will be sent to you !"),
        "change": ("so {qty} it will be , do you agree ?", "you wish to have {qty} in {order_id} , right ?"),
        "changed": ("all settled , thank you for your time !", "great , the shop sends them today !"),
    },
}
"""What is said, by teacher. `other` puts arguments in another order, too; it does the same things."""


def draw_errors(rng: random.Random, share: float) -> frozenset[str]:
    """The expert errors of one conversation, each drawn at `share` in [0, 1] of its rate."""
    return frozenset(name for name, rate in EXPERT_ERRORS.items() if rng.random() < share * rate)


def expert_turns(
    task: Task, rng: random.Random, teacher: str = "house", errors: frozenset[str] = frozenset()
) -> Iterator[Action]:
    """The actions of a clerk in order. Wording varies, as it does in real traces; what experts (no errors) do does not."""
    facts, number = task.facts, iter(range(99))

    def call(name: str, **arguments: Any) -> Action:
        ordered = arguments if teacher == "house" else dict(reversed(arguments.items()))
        return Action("calls", calls=(ToolCall(name, json.dumps(ordered), f"call_{next(number)}"),))

    def say(what: str, **other: Any) -> str:
        return rng.choice(WORDING[teacher][what]).format(**facts | other)

    def talk(what: str, **other: Any) -> Action:
        return Action("message", content=say(what, **other))

    if "answer" in task.goal:
        yield Action("message", content=task.goal["answer"])
        return
    if task.family == "buy":
        offers = task.database["items"][facts["kind"]]
        item = max(offers, key=offers.__getitem__) if "dear" in errors else facts["item"]
        if "detour" in errors:
            yield call("find_orders", user=facts["user"])
        yield call("search_items", kind=facts["kind"])
        if "unasked" not in errors:
            yield talk("offer", item=item)
        yield call("place_order", user=facts["user"], item=item, qty=facts["qty"])
        yield talk("ordered", item=item)
        return
    order_id, seen = facts["order_id"], "unchecked" not in errors
    if "detour" in errors:
        yield call("search_items", kind=facts["item"])
    yield call("find_orders", user=facts["user"])
    if seen:
        yield call("get_order", order_id=order_id)
    if task.family == "status":
        yield talk("status") if seen else talk("status", status=rng.choice(["pending", "shipped"]))
    elif facts["status"] == "shipped" and seen and "heedless" not in errors:
        yield call("transfer", summary=say("summary"))
        yield talk("passed")
    elif task.family == "cancel":
        if "unasked" not in errors:
            yield talk("cancel")
        yield call("cancel_order", order_id=order_id, note=say("note"))
        yield talk("cancelled")
    else:
        if "unasked" not in errors:
            yield talk("change")
        yield call("change_order", order_id=order_id, qty=facts["qty"])
        yield talk("changed")


def expert_trajectory(
    task: Task, rng: random.Random, teacher: str = "house", errors: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """A clerk's conversation as an OpenAI chat record; its reward is the episode's own judgement."""
    episode = Episode(task)
    for action in expert_turns(task, rng, teacher, errors):
        episode.step(action)
    return {
        "trajectory_id": f"{task.task_id}-expert",
        "task_id": task.task_id,
        "reward": float(episode.success),
        "messages": episode.messages,
        "tools": list(episode.tools),
    }
