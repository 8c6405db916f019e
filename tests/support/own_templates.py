"""Templates in the forms of models whose own ship in no package: what a call, a prompt or a last turn looks like there.

Everything beside the form is one skeleton. `WRITTEN` has a call form for each parser that no shipped template needs, under the name
of vLLM's parser of the family where it has one; the others are what templates were found to do to turns.
"""

from __future__ import annotations

_NAMED = '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
_COMMA = "{{ ', ' if not loop.last else '' }}"
_LOOP = "{% for c in m.tool_calls %}"


def _listed(begins: str, ends: str, item: str = _NAMED) -> str:
    return f"{begins}[{_LOOP}{item}{_COMMA}{{% endfor %}}]{ends}"


def _invoked(mark: str, block: str, typed: bool) -> str:
    kind = "{{ ' string=\"' ~ ('true' if v is string else 'false') ~ '\"' }}" if typed else ""
    value = "{{ v if v is string else v | tojson }}"
    parameter = f'<{mark}parameter name="{{{{ k }}}}"{kind}>{value}</{mark}parameter>\n'
    each = f"{{% for k, v in c.function.arguments.items() %}}{parameter}{{% endfor %}}"
    call = f'<{mark}invoke name="{{{{ c.function.name }}}}">\n{each}</{mark}invoke>\n'
    return f"<{mark}{block}>\n{_LOOP}{call}{{% endfor %}}</{mark}{block}>"


_KIMI = (
    "<|tool_calls_section_begin|>" + _LOOP + "<|tool_call_begin|>{{ ID }}<|tool_call_argument_begin|>"
    "{{ c.function.arguments | tojson }}<|tool_call_end|>{% endfor %}<|tool_calls_section_end|>"
)
_COHERE = '{"tool_call_id": "{{ loop.index0 }}", "tool_name": "{{ c.function.name }}", '
_COHERE += '"parameters": {{ c.function.arguments | tojson }}}'
CALLS = {
    "nemotron_json": _listed("<TOOLCALL>", "</TOOLCALL>"),
    "kimi_k2": _KIMI.replace("ID", "'functions.' ~ c.function.name ~ ':' ~ loop.index0"),
    "minimax_m2": _invoked("", "minimax:tool_call", typed=False),
    "deepseek_v32": _invoked("｜DSML｜", "function_calls", typed=True),
    "deepseek_v4": _invoked("｜DSML｜", "tool_calls", typed=True),
    "jamba": _listed("<tool_calls>", "</tool_calls>"),
    "hunyuan_a13b": _listed("<tool_calls>", "</tool_calls>"),
    "phi4_mini": _LOOP + "<|tool_call|>{{ c.function | tojson }}<|/tool_call|>{% endfor %}",
    "granite": _listed("<|tool_call|>", ""),
    "phi4_mini_json": _listed("functools", ""),
    "apertus": _listed(
        "<|tools_prefix|>", "<|tools_suffix|>", '{"{{ c.function.name }}": {{ c.function.arguments | tojson }}}'
    ),
    "cohere_command3": _listed("<|START_ACTION|>", "<|END_ACTION|>", _COHERE),
    "xlam": _listed("", ""),
}
"""Name of a parser -> the calls of message m."""


def written(calls: str, prompt: str = "", turn: str = "{{ m.content }}") -> str:
    """A template: `turn` and then `calls` are an assistant turn, `prompt` is the end of its generation prompt."""
    return (
        "{% if tools %}<|system|>{% for t in tools %}{{ t.function | tojson }}{% endfor %}<|end|>{% endif %}"
        "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>"
        + turn
        + "{% if m.tool_calls %}"
        + calls
        + "{% endif %}{% else %}<|{{ m.role }}|>{% if m.role == 'tool' %}{{ m.tool_call_id }}: {% endif %}{{ m.content }}{% endif %}"
        + "<|end|>"
        + "{% endfor %}{% if add_generation_prompt %}<|assistant|>"
        + prompt
        + "{% endif %}"
    )


_WITHOUT_THOUGHT = "{{ m.content.split('</think>') | last | trim }}"
_TWO_TURNS = (  # a last turn is one that goes on: its calls begin another
    "{% if loop.last %}<think>\n{{ m.content }}{% if m.tool_calls %}<|end|><|assistant|>{% endif %}"
    "{% else %}{{ m.content }}{% endif %}"
)
WRITTEN = {name: written(calls) for name, calls in CALLS.items()}
HERMES = _LOOP + "<tool_call>" + _NAMED + "</tool_call>{% endfor %}"
OTHER = {
    "closed": written(HERMES, prompt="<think>\n</think>\n"),
    "closed, the end in the turn": written(HERMES, prompt="<think></think>", turn="</think>{{ m.content }}"),
    "drops reasoning": written(HERMES, prompt="<think>\n", turn=_WITHOUT_THOUGHT),
    "drops reasoning, one line": written(HERMES, prompt="<think>", turn=_WITHOUT_THOUGHT),
    "two turns": written(CALLS["nemotron_json"], prompt="<think>\n", turn=_TWO_TURNS),
    "ids": written(_KIMI.replace("ID", "c.id")),
    "ASCII": written(HERMES.replace("arguments | tojson", "arguments | tojson(ensure_ascii=true)")),
    "no calls": written(""),
    "endless": "{% macro kind(s) %}{{ 'null' if s == 'nothing' else kind(s) }}{% endmacro %}"
    "{% for t in tools or [] %}{% if '$ref' in t | tojson %}{{ kind(t) }}{% endif %}{% endfor %}" + written(HERMES),
}
"""What templates were found to do."""
OWN = WRITTEN | OTHER
MALFORMED = {
    "nemotron_json": [
        "<TOOLCALL>",
        "<TOOLCALL>[]</TOOLCALL>",
        '<TOOLCALL>[{"name": "f", "arguments": {}}]',
        '<TOOLCALL>[{"name": "f", "arguments": {}}</TOOLCALL>',
        '<TOOLCALL>{"name": "f", "arguments": {}}</TOOLCALL>',
        '<TOOLCALL>[{"arguments": {}}]</TOOLCALL>',
        '<TOOLCALL>[{"name": "f", "arguments": [1]}]</TOOLCALL>',
        '<TOOLCALL>[{"name": "f", "arguments": {"x": NaN}}]</TOOLCALL>',
        '<TOOLCALL>[{"name": "f", "arguments": {}}]</TOOLCALL><TOOLCALL>[{"name": "f", "arguments": {}}]</TOOLCALL>',
        "text </TOOLCALL>",
    ],
    "kimi_k2": [
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_begin|><|tool_calls_section_end|>",
        "<|tool_calls_section_begin|><|tool_call_begin|>f<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{<|tool_call_end|><|tool_calls_section_end|>",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}<|tool_calls_section_end|>",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>[1]<|tool_call_end|><|tool_calls_section_end|>",
        "<|tool_calls_section_begin|>so<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
        "text <|tool_call_begin|>",
    ],
    "minimax_m2": [
        "<minimax:tool_call>",
        "<minimax:tool_call></minimax:tool_call>",
        '<minimax:tool_call><invoke name=""></invoke></minimax:tool_call>',
        '<minimax:tool_call><invoke name="f"><parameter name="x">1</invoke></minimax:tool_call>',
        '<minimax:tool_call><invoke name="f"><parameter name="x">1</parameter><parameter name="x">2</parameter></invoke>'
        "</minimax:tool_call>",
        '<minimax:tool_call><invoke name="f">so<parameter name="x">1</parameter></invoke></minimax:tool_call>',
        '<minimax:tool_call><invoke name="f"><parameter name="x">1</parameter></minimax:tool_call>',
        '<minimax:tool_call><invoke name="f"></invoke>',
        'text <invoke name="f"></invoke>',
    ],
    "deepseek_v32": [
        "<｜DSML｜function_calls>",
        "<｜DSML｜tool_calls></｜DSML｜tool_calls>",
        '<｜DSML｜tool_calls><｜DSML｜invoke name="f"></｜DSML｜invoke></｜DSML｜function_calls>',
        '<｜DSML｜tool_calls><｜DSML｜invoke name="f"><｜DSML｜parameter name="x">1</｜DSML｜parameter>'
        "</｜DSML｜invoke></｜DSML｜tool_calls>",
        '<｜DSML｜tool_calls><｜DSML｜invoke name="f"><｜DSML｜parameter name="x" string="false">so</｜DSML｜parameter>'
        "</｜DSML｜invoke></｜DSML｜tool_calls>",
        '<｜DSML｜tool_calls><invoke name="f"></invoke></｜DSML｜tool_calls>',
        "text </｜DSML｜invoke>",
    ],
    "jamba": [
        "<tool_calls>",
        "<tool_calls>[]</tool_calls>",
        '<tool_calls>[{"name": "f"}, 1]</tool_calls>',
        "text </tool_calls>",
    ],
    "phi4_mini": [
        "<|tool_call|>",
        "<|tool_call|>[1]<|/tool_call|>",
        '<|tool_call|>{"name": "f", "arguments": {}}',
        "text <|/tool_call|>",
    ],
    "granite": ["<|tool_call|>", '<|tool_call|>[{"name": "f", "arguments": {}}] so', '<|tool_call|>{"name": "f"}'],
    "functools": ["functools[", "functools[]", 'functools[{"name": "f", "arguments": {}}] so'],
    "apertus": [
        "<|tools_prefix|>",
        '<|tools_prefix|>[{"f": {}, "g": {}}]<|tools_suffix|>',
        '<|tools_prefix|>[{"f": [1]}]<|tools_suffix|>',
        "text <|tools_suffix|>",
    ],
    "cohere": [
        "<|START_ACTION|>",
        '<|START_ACTION|>[{"tool_name": "f"}]<|END_ACTION|>',
        '<|START_ACTION|>[{"parameters": {}}]<|END_ACTION|>',
        "text <|END_ACTION|>",
    ],
    "xlam": [
        '[{"name": "f", "arguments": {}}',
        '[{"name": "f", "arguments": {}}] so',
        '[{"name": 1, "arguments": {}}]',
    ],
}
