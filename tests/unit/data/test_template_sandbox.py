"""Chat templates in bounds: hostile ones end soon and small, good ones give transformers' text, as fast."""

import resource
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from nemo_pivotrl.core.errors import InputError
from nemo_pivotrl.data import template_sandbox
from nemo_pivotrl.data.template_sandbox import render

ROOT = Path(__file__).resolve().parents[3]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "description": "<&>", "parameters": {"type": "object", "properties": {}}},
    }
]
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": [1, 2.5, None, "é<"]}}}
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "be <brief> & kind"},
    {"role": "user", "content": "  hello  "},
    {"role": "assistant", "content": "", "reasoning_content": "think", "tool_calls": [CALL]},
    {"role": "tool", "content": "result", "tool_call_id": "c1", "name": "f"},
    {"role": "assistant", "content": "done"},
    {"role": "user", "content": "more"},
]


def tokenizer(template: str) -> Any:
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    return SimpleNamespace(get_chat_template=lambda chosen, tools: template, special_tokens_map=special)


HOSTILE = {
    "long range": "{% for i in range(10**9) %}x{% endfor %}",
    "nested ranges": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "deeply nested ranges": "{% for a in range(999) %}" * 6 + "x" + "{% endfor %}" * 6,
    "filtered loop": "{% for a in range(99999) %}{% for b in range(99999) if b < 0 %}{% endfor %}{% endfor %}",
    "long string": "{{ 'x' * 10**10 }}",
    "long string, folded": "{{ 'x' * 10000000000 }}",
    "long string the other way": "{{ 10000000000 * 'x' }}",
    "long list": "{% set x = [0] * 10**10 %}",
    "long list, longer": "{% set x = range(99999)|list * 99999 %}",
    "power": "{{ 10 ** (10 ** 9) }}",
    "power of powers": "{{ 9 ** (9 ** (9 ** 9)) }}",
    "factors": "{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "doubling": "{% set n = namespace(x='xx') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling by plus": "{% set n = namespace(x='xx') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling lists": "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling blocks": "{% set n = namespace(x='xx') %}{% for i in range(99) %}{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}{% endfor %}",
    "doubling macros": "{% macro d(x) %}{{ x }}{{ x }}{% endmacro %}{% set n = namespace(x='xx') %}{% for i in range(99) %}{% set n.x = d(n.x) %}{% endfor %}",
    "nesting": "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "nesting compared": "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}",
    "nesting in a macro": "{% macro g(x, n) %}{% if n > 0 %}{{ g([x, x], n - 1) }}{% else %}{{ x }}{% endif %}{% endmacro %}{{ g([1], 60) }}",
    "nesting in mappings": "{% set n = namespace(x={}) %}{% for i in range(99) %}{% set n.x = {'a': n.x, 'b': n.x} %}{% endfor %}{{ n.x|tojson }}",
    "nesting by dict()": "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = dict(a=n.x, b=n.x) %}{% endfor %}{{ n.x|string }}",
    "macros without end": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "branching macros": "{% macro m(n) %}{% if n %}{% set a = m(n - 1) %}{% set b = m(n - 1) %}{% endif %}{% endmacro %}{{ m(60) }}",
    "recursive loop": "{% for x in [messages] recursive %}{{ loop([messages]) }}{% endfor %}",
    "centered": "{{ 'x'.center(10000000000) }}",
    "centered by filter": "{{ 'x'|center(10000000000) }}",
    "padded": "{{ 'x'.ljust(9999999999) }}",
    "zeros": "{{ '1'.zfill(9999999999) }}",
    "tabs": "{{ ('\\t' * 9999).expandtabs(9999999) }}",
    "tabs within numbers": "{% set x = ('\\t' * 9999).expandtabs(9999) %}{{ x.expandtabs(9999) }}{{ ('\\t' * 999999).expandtabs(9999) }}",
    "only tabs": "{{ ('\\t' * 999999).expandtabs(9999) }}",
    "translated": "{{ ('x' * 999999).translate({120: 'y' * 999999}) }}",
    "words": "{{ ('x ' * 30000000).split()|length }}",
    "characters": "{{ ('x' * 60000000)|list|length }}",
    "wide characters": "{% for i in range(999) %}{{ '\U0001f600' * 9999999 }}{% endfor %}",
    "small lists": "{% for i in range(99999) %}{% for j in range(999) %}{% set x = [[i], [j]] %}{% endfor %}{% endfor %}",
    "one value in many places": "{{ ('%(a)s' * 90000) % {'a': 'x' * 999999} }}",
    "one argument in many places": "{{ ('{0}' * 90000).format('x' * 999999) }}",
    "format": "{{ '{:>9999999999}'.format(1) }}",
    "format by argument": "{{ '{:>{}}'.format(1, 9999999999) }}",
    "percent": "{{ '%09999999999d' % 1 }}",
    "percent by argument": "{{ '%*d' % (9999999999, 1) }}",
    "format filter": "{{ '%9999999999d'|format(1) }}",
    "replace": "{% set a = 'x' * 90000 %}{{ a.replace('x', a).replace('x', a) }}",
    "replace nothing": "{% set a = 'x' * 90000 %}{{ a.replace('', a) }}",
    "replace filter": "{% set a = 'x' * 90000 %}{{ a|replace('x', a) }}",
    "join": "{% set a = 'x' * 90000 %}{{ a.join(a) }}",
    "join filter": "{% set a = 'x' * 90000 %}{{ range(99999)|join(a) }}",
    "indent": "{% set a = '\\n' * 90000 %}{{ a|indent('y' * 90000) }}",
    "json indent": "{{ range(99999)|list|tojson(indent=99999999) }}",
    "json indent of text": "{{ range(99999)|list|tojson(indent='y' * 99999) }}",
    "batch": "{{ [1]|batch(9999999999, 0)|list }}",
    "bytes": "{{ (1).to_bytes(9999999999, 'big') }}",
    "lipsum": "{{ lipsum(n=999999) }}",
    "text of a loop": "{% for i in range(99999) %}" + "x" * 90_000 + "{% endfor %}",
    "long source": "x" * (2 << 20),
    "deep source": "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
    "deep expression": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "many values": "".join(f"{{% set v{i} = 'x' * 60000000 %}}" for i in range(99)),
    "only in long chats": "{% if messages|length > 5 %}{{ 'x' * 10**10 }}{% endif %}",
    "sum of lists": "{{ ([[1] * 9000] * 9000)|sum(start=[]) }}",
    "urlize": "{{ ('http://' * 900000)|urlize }}",
    "wordwrap": "{{ ('x ' * 900000)|wordwrap(1) }}",
}


@pytest.fixture(autouse=True)
def short_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_SECONDS", 0.3)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_soon_and_small(name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF)
    with pytest.raises((InputError, TemplateError)):
        render(tokenizer(HOSTILE[name]), CHAT, TOOLS)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_maxrss - before.ru_maxrss < 1 << 20  # kB
    assert after.ru_utime - before.ru_utime < 5


def test_time_is_bounded_whatever_a_template_does_with_it() -> None:
    begun = time.thread_time()
    with pytest.raises(InputError, match=r"more than 0\.3 s"):
        render(tokenizer("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"), CHAT)
    assert time.thread_time() - begun < 3


def plainly(template: str, **more: Any) -> str:
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    (text,), _ = render_jinja_template([CHAT], TOOLS, None, template, **special, **more)
    return str(text)


GOOD = [
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m['content'] | trim }}{% if not loop.last %}\n{% endif %}{% endfor %}",
    "{%- set ns = namespace(last=0, text='') %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% set ns.text = ns.text ~ m.role ~ ',' %}{% endfor %}{{ ns.last }} {{ ns.text }}",
    "{% for t in tools %}{{ t | tojson }}\n{{ t | tojson(indent=4) }}\n{{ t['function']|tojson(sort_keys=true) }}{% endfor %}",
    "{% macro show(x, deep=1) %}{% if x is mapping %}{% for k, v in x|items %}{{ k }}={{ show(v, deep + 1) }};{% endfor %}"
    "{% elif x is iterable and x is not string %}{{ x | map('string') | join(', ') }}{% else %}{{ x }}{% endif %}{% endmacro %}"
    "{% for m in messages %}{{ show(m) }}{% endfor %}",
    "{% for m in messages %}{% if m.tool_calls %}{% for c in m.tool_calls %}{{ {'name': c.function.name, 'arguments': "
    "c.function.arguments} | tojson }}{% endfor %}{% continue %}{% endif %}{{ m.content.split('e')[-1].lstrip('\\n') }}{% endfor %}",
    "{% set loop_messages = [messages[0]] + messages[2:] %}{% for m in loop_messages[::-1] %}{{ '%s: %s' % (m.role, m.content) }}"
    "{{ '{}'.format(m.role) }}{{ m.role.upper() + 'x' * 3 }}{{ 7 // 2 + 2 ** 3 - 1 }}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{{ none }}{{ missing }}{{ true }}",
    "{% set (a, b) = (1, 'two') %}{{ a }}{{ b }}{% set x %} block {{ a }} {% endset %}{{ x }}{% filter upper %}u{{ b }}{% endfilter %}"
    "{% with c = [1, 2] %}{{ c|length }}{{ c }}{% endwith %}{% if messages|selectattr('role', 'equalto', 'tool')|list %}t{% endif %}",
    "{% if add_generation_prompt %}go{% endif %}{{ messages | rejectattr('role', 'in', ['tool']) | map(attribute='role') | join('|') }}",
    "{% for a, b in [('x', 1), ('y', 2)] %}{{ a ~ b }}{% else %}none{% endfor %}{{ (messages | last).content | default('d') | replace('m', 'M') }}",
]


@pytest.mark.parametrize("template", GOOD + sorted(p.read_text() for p in ROOT.rglob("recipes/**/*.jinja")))
def test_a_good_template_gives_transformers_own_text(template: str) -> None:
    for prompt in (False, True):
        try:
            expected = plainly(template, add_generation_prompt=prompt)
        except TemplateError as error:
            with pytest.raises(TemplateError, match=str(error)):
                render(tokenizer(template), CHAT, TOOLS, prompt)
            continue
        assert render(tokenizer(template), CHAT, TOOLS, prompt) == expected


def test_what_a_template_raises_itself_is_its_own() -> None:
    with pytest.raises(TemplateError, match="no system"):
        render(tokenizer("{{ raise_exception('no system') }}"), CHAT)


def test_a_long_state_renders_about_as_fast_as_without_bounds() -> None:
    chat = [dict(m, content=f"{m['content']} {i}" * 20) for i in range(200) for m in CHAT]
    template = GOOD[0] + GOOD[4]
    used = tokenizer(template)

    def cost(do: Any) -> float:
        do()
        begun = time.thread_time()
        for _ in range(3):
            do()
        return time.thread_time() - begun

    bounded = min(cost(lambda: render(used, chat, TOOLS)) for _ in range(3))
    plain = min(cost(lambda: render_jinja_template([chat], TOOLS, None, template, bos_token="<s>")) for _ in range(3))
    assert bounded < 3 * plain + 0.05
