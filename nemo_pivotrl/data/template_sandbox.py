"""Chat templates of model folders, rendered within bounds of time and memory.

A template is a program by whoever made the folder. Jinja's sandbox keeps it from objects and files, and lets it loop for hours
or fill memory in one expression. Here every loop and macro call counts time, and every value that an expression makes is
weighed in bytes before it is kept or handed on, the items of containers as often as they would be written out. What
multiplies (`*`, `**`, `%`, `replace`, `join`, paddings) is weighed before it happens. The text is transformers' own: same
options, filters and globals, as a test compares.
"""

from __future__ import annotations

import contextvars
import datetime
import functools
import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from nemo_pivotrl.core.errors import InputError, Problem, short

if TYPE_CHECKING:
    from jinja2 import Template
    from transformers import PreTrainedTokenizerBase

MAX_SOURCE = 1 << 20
"""Characters of a template. The longest known ones have 20,000."""
MAX_SECONDS = 10.0
"""Of one rendering, of processor time: what is refused does not depend on how busy the machine is."""
MAX_WEIGHT = 1 << 27
"""Bytes of one value, with what its items hold as often as it stands in it. A state of 131,072 tokens has less than five million."""
MAX_MADE = 1 << 29
"""Bytes of all values of a rendering together."""
CONTAINER, ITEM = 256, 64
"""Bytes of a list or mapping, the note that it was weighed included, and of each of its items beside the item's own."""
MAX_NUMBER = 10_000
"""Of a width, a count or an exponent that a template gives to a filter or method."""
MAX_RANGE = 100_000
MAX_ITEMS = 200_000
"""Of one list or mapping."""
MAX_BITS = 1 << 12
"""Of a whole number."""
PUT, TICK, CONCAT = "__put__", "__tick__", "__concat__"
LONG_NUMBER = re.compile(r"\d{5,}|\*|\{[^}]*\{")
"""In a format string: a width of five digits, or one that an argument gives."""
DROPPED = ("lipsum", "cycler", "joiner")
PLAIN_FILTERS = frozenset(
    ("tojson", "trim", "length", "count", "string", "lower", "upper", "title", "capitalize", "first")
)
PLAIN_FILTERS |= {
    "last",
    "list",
    "items",
    "dictsort",
    "sort",
    "unique",
    "reverse",
    "map",
    "select",
    "reject",
    "selectattr",
}
PLAIN_FILTERS |= {
    "rejectattr",
    "default",
    "d",
    "int",
    "float",
    "abs",
    "min",
    "max",
    "escape",
    "e",
    "safe",
    "attr",
    "groupby",
}
PLAIN_FILTERS |= {"replace", "join", "indent", "center", "round", "truncate", "batch", "slice", "format", "wordcount"}
PLAIN_FILTERS |= {"striptags", "urlencode", "random", "forceescape"}
"""Filters of jinja2 that stay: their work is linear, or what multiplies is weighed."""


SPREADING = frozenset("split rsplit splitlines wordcount list sort unique batch slice groupby dictsort".split())
"""Methods and filters that make an item of every character or word of a text."""


class TemplateTooCostly(TemplateError):
    """A template goes beyond the bounds of time or memory."""


class _Meter:
    """What one rendering has spent."""

    def __init__(self) -> None:
        self.until = time.thread_time() + MAX_SECONDS
        self.made = self.ticks = 0
        self.known: dict[int, tuple[Any, int]] = {}
        """Containers that were weighed, by identity; held, so that no other takes their place."""

    def tick(self, text: int = 0) -> str:
        """One turn of a loop, or one call of a macro, that writes `text` bytes of the template itself."""
        self.ticks += 1
        self.spend(text + ITEM)
        if self.ticks % 64 == 0 and time.thread_time() > self.until:
            raise TemplateTooCostly(f"more than {MAX_SECONDS:g} s")
        return ""

    def spend(self, weight: int) -> None:
        self.made += weight
        if self.made > MAX_MADE:
            raise TemplateTooCostly(f"values of more than {MAX_MADE:,} bytes together")

    def put(self, value: Any) -> Any:
        """A value that an expression made, as it is, once it is known to be small enough."""
        self.spend(self.check(self.weigh(value)))
        return value

    def check(self, weight: int) -> int:
        if weight > MAX_WEIGHT:
            raise TemplateTooCostly(f"a value of more than {MAX_WEIGHT:,} bytes")
        return weight

    def few(self, items: int) -> None:
        if items > MAX_ITEMS:
            raise TemplateTooCostly(f"a list of more than {MAX_ITEMS:,} items")

    def weigh(self, value: Any, depth: int = 0) -> int:
        """Bytes of a value, written out: what stands in it twice counts twice."""
        if not isinstance(value, (list, tuple, dict, set, frozenset)):
            return sys.getsizeof(value) if isinstance(value, (str, bytes, int)) else ITEM
        if (seen := self.known.get(id(value))) is not None:
            return seen[1]
        if depth > 200:
            raise TemplateTooCostly("a value nested more than 200 deep")
        self.few(len(value))
        items = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        weight = CONTAINER
        for item in items:
            weight += ITEM + self.weigh(item, depth + 1)
            self.check(weight)
        self.known[id(value)] = (value, weight)
        return weight


_meter: contextvars.ContextVar[_Meter] = contextvars.ContextVar("meter")


def _put(value: Any) -> Any:
    return _meter.get().put(value)


def _tick(text: int) -> str:
    return _meter.get().tick(text)


def _concat(*parts: Any) -> str:
    meter = _meter.get()
    texts = [part if isinstance(part, str) else str(_put(part)) for part in parts]
    meter.spend(meter.check(sum(map(_bytes, texts))))
    return "".join(texts)


def _bytes(text: Any) -> int:
    """The most that a text's characters take; it joins others, so its own header does not count."""
    return len(text) * (1 if isinstance(text, bytes) or text.isascii() else 4) if isinstance(text, (str, bytes)) else 1


def _number(value: Any) -> None:
    if isinstance(value, (int, float)) and not -MAX_NUMBER <= value <= MAX_NUMBER:
        raise TemplateTooCostly(f"the number {short(value, 30)} as a width or count")


def _multiplies(name: str, subject: Any, given: Sequence[Any]) -> None:
    """Weigh a call before it is made: paddings, formats, replacements and joins can be much longer than what they take."""
    meter = _meter.get()
    for value in given:
        _number(value)
        meter.put(value) if isinstance(value, (list, tuple, dict)) else None
    if not isinstance(subject, (str, bytes)) and name not in ("join", "format"):
        return
    if name == "replace" and len(given) >= 2:
        old = len(given[0]) if isinstance(given[0], (str, bytes)) else 1
        places = (
            len(subject) + 1
            if old == 0
            else subject.count(given[0])
            if type(given[0]) is type(subject)
            else len(subject)
        )
        meter.spend(meter.check(_bytes(subject) + places * _bytes(given[1])))
    elif name == "join":
        between, items = (
            (given[0] if given else "", subject) if not isinstance(subject, str) or not given else (subject, given[0])
        )
        if isinstance(items, Sized):
            meter.spend(meter.check(meter.weigh(items) + len(items) * _bytes(between)))
    elif name == "indent" and given:
        width = _bytes(given[0]) if isinstance(given[0], (str, bytes)) else abs(int(given[0]))
        meter.spend(meter.check(_bytes(subject) + (subject.count("\n") + 1) * width))
    elif name in ("format", "format_map"):
        if LONG_NUMBER.search(str(subject)):
            raise TemplateTooCostly("a format with a width of its arguments, or of five digits")
        places = str(subject).count("{") + str(subject).count("%")  # each may stand for all that is given
        meter.check(_bytes(subject) + places * sum(map(meter.weigh, given)))
    elif name == "expandtabs":
        meter.check(_bytes(subject) * (given[0] if given and isinstance(given[0], int) else 8))
    elif name == "translate":
        meter.check(_bytes(subject) * sum(map(meter.weigh, given)))
    elif name in SPREADING and len(subject) > MAX_ITEMS:
        parts = subject.count(given[0]) if given and isinstance(given[0], type(subject)) and given[0] else len(subject)
        meter.few(parts if name in ("split", "rsplit") and given else sum(map(str.isspace, str(subject))))
        if name not in ("split", "rsplit", "splitlines", "wordcount"):
            meter.few(len(subject))


class _Bounded(NodeTransformer):
    """Puts the meter into a template: at each turn of a loop and call of a macro, and around values as they are made."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body = [_counted(node.body), *node.body]
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        node.body = [_counted(node.body), *node.body]
        return node

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        node.body = [_counted(node.body), *node.body]
        return node

    def visit_Assign(self, node: nodes.Assign) -> nodes.Node:
        self.generic_visit(node)
        node.node = _call(PUT, node.node)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call(CONCAT, *node.nodes)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return node if not node.items else _call(PUT, node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return node if not node.items else _call(PUT, node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return node if node.ctx != "load" or not node.items else _call(PUT, node)


def _call(name: str, *values: nodes.Expr) -> nodes.Call:
    made = nodes.Call(nodes.Name(name, "load"), list(values), [], None, None)
    made.set_lineno(values[0].lineno or 1 if values else 1)
    return made


def _counted(body: Sequence[nodes.Node]) -> nodes.Node:
    text = sum(_bytes(data.data) for node in body for data in node.find_all(nodes.TemplateData))
    statement = nodes.ExprStmt(_call(TICK, nodes.Const(text)))
    statement.set_lineno(body[0].lineno if body else 1)
    return statement


class _Generation(Extension):
    """`{% generation %}`, by which templates mark what an assistant wrote: its body as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        found: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return found


class Sandbox(ImmutableSandboxedEnvironment):
    """transformers' environment for chat templates, with a meter."""

    intercepted_binops = frozenset(("*", "**", "%", "+", "//", "/", "-"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=_put)
        for name in DROPPED:
            self.globals.pop(name, None)
        self.filters = {name: _weighed(name, f) for name, f in self.filters.items() if name in PLAIN_FILTERS}
        self.filters["tojson"] = _weighed("tojson", _tojson)
        self.globals |= {PUT: _put, TICK: _tick, CONCAT: _concat, "raise_exception": _raise, "strftime_now": _now}
        self.globals["range"] = _range

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        made: nodes.Template = _Bounded().visit(super()._parse(source, name, filename))
        return made

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operator, once what it makes is known to be small enough."""
        meter = _meter.get()
        texts = (str, bytes, list, tuple)
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, texts) and isinstance(other, int):
                    meter.check(meter.weigh(one) * max(other, 0))
                    meter.few(0 if isinstance(one, (str, bytes)) else len(one) * max(other, 0))
            _small(_bits(left) + _bits(right))
        elif operator == "**":
            _small(max(_bits(left), 1) * abs(right) if isinstance(right, int) else 1)
        elif operator == "%" and isinstance(left, (str, bytes)):
            if LONG_NUMBER.search(str(left)):
                raise TemplateTooCostly("a format with a width of its arguments, or of five digits")
            meter.put(right)
            meter.check(_bytes(left) + left.count("%" if isinstance(left, str) else b"%") * meter.weigh(right))
        elif isinstance(left, texts):
            meter.check(meter.weigh(left) + meter.weigh(right))
            meter.few(
                len(left) + len(right) if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)) else 0
            )
        return meter.put(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *given: Any, **named: Any) -> Any:
        """A function, macro or method, with its arguments weighed."""
        if __obj not in (_put, _tick, _concat):
            plain = getattr(__obj, "__wrapped__", __obj)  # of `format`, which jinja2 replaces by its own
            subject, name = getattr(plain, "__self__", None), getattr(plain, "__name__", "")
            values = [*given, *named.values()]
            if isinstance(subject, (str, bytes, int, float, list, tuple, dict)):
                _multiplies(name, subject, values)
            else:
                for value in values:
                    if isinstance(value, (list, tuple, dict)):
                        _put(value)
        return super().call(__context, __obj, *given, **named)


def _small(bits: int) -> None:
    if bits > MAX_BITS:
        raise TemplateTooCostly(f"a number of more than {MAX_BITS:,} bits")


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 1


def _weighed(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose arguments and result are weighed."""
    passed = getattr(plain, "jinja_pass_arg", None)

    @functools.wraps(plain)
    def weighed(*given: Any, **named: Any) -> Any:
        own = given[1:] if passed is not None else given
        meter = _meter.get()
        if name == "join" and own and not isinstance(own[0], Sized):  # a generator of another filter
            given = (*given[: len(given) - len(own)], list(own[0]), *own[1:])
            own = given[len(given) - len(own) :]
        if own and isinstance(own[0], (list, tuple, dict)):
            meter.put(own[0])
        _multiplies(name, own[0] if own else None, [*own[1:], *named.values()])
        return meter.put(plain(*given, **named))

    return weighed


def _tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """transformers' own: jinja2's would escape HTML."""
    if isinstance(indent, str):
        _meter.get().check(len(indent) * _meter.get().weigh(x))
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _range(*given: int) -> range:
    made = range(*given)
    if len(made) > MAX_RANGE:
        raise TemplateTooCostly(f"a range of more than {MAX_RANGE:,}")
    return made


@functools.lru_cache(32)
def compiled(source: str) -> Template:
    """A template with a meter in it. Raises TemplateError for one that is too long, or is no template."""
    if len(source) > MAX_SOURCE:
        raise TemplateTooCostly(f"a template of {len(source):,} characters, more than {MAX_SOURCE:,}")
    token = _meter.set(_Meter())  # constants are folded while it is compiled
    try:
        return Sandbox().from_string(source)
    except RecursionError:
        raise TemplateTooCostly("a template nested too deeply") from None
    finally:
        _meter.reset(token)


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    **more: Any,
) -> str:
    """What `tokenizer.apply_chat_template(..., tokenize=False)` gives, within bounds.

    Raises InputError for a template that goes beyond them, TemplateError for one that calls itself without an end, and what the
    template raises otherwise.
    """
    source = tokenizer.get_chat_template(None, list(tools) if tools else None)
    token = _meter.set(_Meter())
    try:
        values = {**tokenizer.special_tokens_map, **more}
        text: str = compiled(source).render(
            messages=list(messages),
            tools=list(tools) if tools else None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **values,
        )
        return text
    except RecursionError as error:  # some templates follow a schema of this state without an end
        raise TemplateError("it calls itself without an end") from error
    except (TemplateTooCostly, MemoryError) as error:
        found = str(error) if isinstance(error, TemplateTooCostly) else type(error).__name__
        remedy = "no chat needs this: the template is broken or hostile; use another (policy.chat_template)"
        raise InputError(Problem("chat template", None, "rendering", found, remedy)) from error
    finally:
        _meter.reset(token)
