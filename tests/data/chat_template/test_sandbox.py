"""A foreign chat template that loops, explodes or reaches out is ended, and its file is named."""

import gc
import itertools
import resource
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template

from lorakit.data.chat_template import sandbox
from lorakit.data.chat_template.render import Program, TemplateRefusal, render_chat
from lorakit.data.chat_template.sandbox import LimitReached, size_of
from lorakit.errors import ModelError

ASK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "there"}]
DOUBLE = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}"
ENDLESS = {
    "nested ranges": "{% for a in range(9999) %}{% for b in range(9999) %}"
    "{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}",
    "a power": "{{ 10**100000000 }}",
    "a power of a power": "{{ 9**9**9**9**9 }}",
    "a shown power": "{% set x = 10**100000000 %}{{ x }}",
    "1 GB of text": "{% for i in range(9999) %}{% for j in range(9999) %}" + "x" * 20
    + "{% endfor %}{% endfor %}",
    "a product": "{{ 'a' * 1000000000 }}",
    "a product of lists": "{% set x = [1] * 1000000000 %}",
    "doubling by ~": DOUBLE + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "doubling by +": DOUBLE + "{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "doubling by join": DOUBLE + "{% set ns.x = [ns.x, ns.x]|join %}{% endfor %}",
    "doubling by str.join": DOUBLE + "{% set ns.x = ''.join([ns.x, ns.x]) %}{% endfor %}",
    "doubling by replace": DOUBLE + "{% set ns.x = ns.x.replace('a', 'aa' ~ ns.x) %}{% endfor %}",
    "doubling by |replace": DOUBLE + "{% set ns.x = ns.x|replace('b', ns.x) %}{% endfor %}",
    "doubling by a block": DOUBLE + "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}"
    "{% set ns.x = y %}{% endfor %}",
    "doubling a list": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "nesting a list": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "nesting a dict": "{% set ns = namespace(x=1) %}{% for i in range(60) %}"
    "{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x|tojson }}",
    "doubling in a macro": "{% macro m(x) %}{{ m(x + x) }}{% endmacro %}{{ m('ab') }}",
    "two calls of itself": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}"
    "{% endmacro %}{{ m(90) }}",
    "doubling in a branch": DOUBLE + "{% set ns.x = (ns.x + ns.x) if i else 'ab' %}{% endfor %}",
    "doubling while escaping": "{% autoescape true %}" + DOUBLE + "{% set ns.x = ns.x ~ ns.x %}"
    "{% endfor %}{% endautoescape %}",
    "doubling in a filter": DOUBLE + "{% set y %}{% filter upper %}{{ ns.x }}{{ ns.x }}"
    "{% endfilter %}{% endset %}{% set ns.x = y %}{% endfor %}",
    "callers of callers": "{% macro m() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call m() %}" * 19 + "x" + "{% endcall %}" * 19,
    "blocks of blocks": "".join(
        f"{{% block b{i} %}}{{{{ self.b{i + 1}() }}}}{{{{ self.b{i + 1}() }}}}{{% endblock %}}"
        for i in range(40)
    ) + "{% block b40 %}x{% endblock %}",
    "generators of generators": "{% set ns = namespace(g=[1]) %}{% for i in range(9999) %}"
    "{% for j in range(999) %}{% set ns.g = ns.g|map('upper') %}{% endfor %}{% endfor %}",
    "padding": "{{ [1]|batch(9999, 'x' * 900000)|list|length }}",
    "a recursive loop": "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "squaring": "{% set ns = namespace(x=3) %}{% for i in range(60) %}"
    "{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "a wide format": "{{ '%1000000000d' % 1 }}",
    "a star in a format": "{{ '%*d' % (1000000000, 1) }}",
    "many formats": "{{ ('%s' * 9000) % ([('a' * 9000) * 100] * 9000) }}",
    "center": "{{ 'a'|center(1000000000) }}",
    "ljust": "{{ 'a'.ljust(1000000000) }}",
    "indent": "{{ ('\\n' * 9999)|indent(9999) }}",
    "tojson's indent": "{{ messages|tojson(indent=100000) }}",
    "tojson's indent as text": "{{ messages|tojson(indent='x' * 100000) }}",
    "batch": "{{ [1]|batch(1000000000, 'x')|list }}",
    "a range as a list": "{% set x = range(1000000000)|list %}",
    "lists of ranges": "{% set ns = namespace(x=[]) %}{% for i in range(9999) %}"
    "{% set ns.x = ns.x + range(9999)|list %}{% endfor %}",
    "mapping": "{{ range(9999)|map('string')|map('replace', '', 'y' * 9999)|list }}",
    "mapped lists": "{% set x = range(9999)|list %}"
    "{{ ([x] * 9)|map('batch', 2, x)|map('list')|list }}",
    "filtering": "{% set x = 'a' * 900000 %}{% for i in range(9999) %}{% for j in range(99) %}"
    "{% set y = x|upper %}{% endfor %}{% endfor %}",
    "searching": "{% set x = 'a' * 900000 %}{% for i in range(9999) %}{% for j in range(999) %}"
    "{% if 'b' in x %}{% endif %}{% endfor %}{% endfor %}",
    "selecting": "{% set x = 'a' * 900000 %}{% for i in range(9999) %}"
    "{% set y = (['b'] * 9999)|select('in', x)|list %}{% endfor %}",
    "a hex number": "{{ ('f' * 900000)|int(base=16) }}",
    "a wide sum": "{% set x = 'a' * 9999 %}{{ " + " + ".join(["x"] * 80) + " }}",
    "a long source": "{{ 1 }}" * 40_000,
    "many comparisons": "{% if 1 == 2 %}{% endif %}" * 1001,
}  # fmt: skip
OUTSIDE = {
    "classes": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ raise_exception.__globals__.os }}",
    "attr": "{{ (''|attr('__class__')).__mro__ }}",
    "map": "{{ (['']|map(attribute='__class__')|first).__mro__ }}",
    "format": "{{ '{0.__class__}'.format('') }}",
    "wide format": "{{ '{:1000000000}'.format(1) }}",
    "format_map": "{{ '{a:9999999}'.format_map({'a': 1}) }}",
    "taken format": "{% set f = 'a{}'.format %}{{ f(1) }}",
    "filter format": "{{ '%9999999d'|format(1) }}",
    "translate": "{{ 'a'.translate({97: 'b' * 99}) }}",
    "encode": "{{ 'a'.encode() }}",
    "expandtabs": "{{ '\t'.expandtabs(9999) }}",
    "to_bytes": "{{ (1).to_bytes(1000, 'big') }}",
    "append": "{% set x = messages.append(1) %}",
    "update": "{{ messages[0].update(role='x') }}",
    "setdefault": "{{ messages[0].setdefault('a', 1) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import '/etc/passwd' as x %}",
    "extends": "{% extends '/etc/passwd' %}",
    "lipsum": "{{ lipsum(n=100000) }}",
    "pprint": "{{ messages|pprint }}",
    "endless recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "environment": "{{ self._TemplateReference__context.environment }}",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
}


@pytest.fixture
def foreign(smollm, tmp_path):
    """A template in a model's folder."""
    name, template = smollm.name_or_path, smollm.chat_template
    smollm.name_or_path = str(tmp_path)

    def write(text):
        (tmp_path / "chat_template.jinja").write_text(text)
        smollm.chat_template = text
        return smollm

    yield write
    smollm.name_or_path, smollm.chat_template = name, template


@pytest.mark.parametrize("kind", ENDLESS)
def test_what_would_not_end_is_stopped_with_file_and_reason(foreign, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 0.7)
    tokenizer = foreign("{{ messages[0].content }}\n" + ENDLESS[kind])
    with pytest.raises(ModelError, match="this chat template was stopped: it ") as caught:
        render_chat(tokenizer, ASK, prompt=False)
    assert str(tmp_path / "chat_template.jinja") in caught.value.message
    assert len(str(caught.value)) < 500
    assert caught.value.hint


def test_memory_stays_low_and_comes_back(foreign):
    process = psutil.Process()
    gc.collect()
    before, highest = process.memory_info().rss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for kind, text in ENDLESS.items():
        if kind.startswith(("1 GB", "a product", "a power", "doubling", "lists", "nesting")):
            with pytest.raises(ModelError):
                render_chat(foreign(text), ASK, prompt=False)
    gc.collect()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - highest) * 1024 < 400e6
    assert process.memory_info().rss - before < 100e6


@pytest.mark.parametrize("kind", OUTSIDE)
def test_what_reaches_out_is_refused(foreign, kind):
    with pytest.raises((TemplateRefusal, ModelError)):
        render_chat(foreign(OUTSIDE[kind]), ASK, prompt=False)


def test_the_line_is_named(foreign):
    with pytest.raises(ModelError, match=r"a number of more than 4,096 bits \(its line 3\)"):
        render_chat(
            foreign("one\n{% for m in messages %}\n{{ 2 ** 5000 }}\n{% endfor %}"), ASK, False
        )


def test_a_template_that_explodes_on_one_row_only_stops_the_run(foreign):
    """Trying it out once would not find this."""
    trap = "{% if messages|length > 2 %}{% for a in range(9999) %}{% for b in range(9999) %}"
    trap += "{% endfor %}{% endfor %}{% endif %}fine"
    tokenizer = foreign(trap)
    assert render_chat(tokenizer, ASK, prompt=False) == "fine"
    with pytest.raises(ModelError, match="turns of loops"):
        render_chat(tokenizer, ASK * 2, prompt=False)


def test_a_large_row_is_no_attack(foreign):
    """Limits grow with what is given: 5 MB in one turn, said twice."""
    tokenizer = foreign(
        "{% for m in messages %}{{ m.content | trim ~ '!' ~ m.content }}{% endfor %}"
    )
    long = "long text " * 500_000
    assert (
        len(render_chat(tokenizer, [{"role": "user", "content": long}], prompt=False))
        == 9_999_999 + 1
    )


def test_many_turns_are_no_attack(smollm):
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"turn {i}"} for i in range(20_000)]
    assert "turn 19999" in render_chat(smollm, turns, prompt=False)


def test_time_is_a_limit_of_its_own(monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 0.05)
    program = Program(
        "{% for a in range(9999) %}{% for b in range(99) %}{% endfor %}{% endfor %}", {}
    )
    began = time.thread_time()
    with pytest.raises(LimitReached, match=r"ran for more than 0\.05 seconds \(its line 1\)"):
        program.render({"messages": ASK})
    assert time.thread_time() - began > 0.05


def test_time_that_others_take_is_not_the_templates(monkeypatch):
    """On a busy machine the clock goes on while a template waits for its turn."""
    hours = itertools.count(step=3600).__next__
    clocks = {"time": hours, "monotonic": hours, "perf_counter": hours}
    clock = SimpleNamespace(**clocks, thread_time=time.thread_time)
    monkeypatch.setattr(sandbox, "time", clock)
    turns = [{"role": "user", "content": str(i)} for i in range(100)]
    program = Program("{% for m in messages %}{{ m.content }}{% endfor %}", {})
    assert program.render({"messages": turns}) == "".join(map(str, range(100)))


def test_sizes_count_texts_items_and_levels():
    assert size_of("abc", 99) == 3
    assert size_of(["abc", {"a": 1}], 999) == 2 * 8 + 3 + 8 + 1 + 8
    assert size_of([[0]], 999, indent=2) == (8 + 2) + (8 + 4) + 8
    nested = []
    for _ in range(60):
        nested = [nested, nested]
    assert 100 < size_of(nested, 100) < 200


def _published():
    import trl

    return sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))


def test_published_templates_are_rendered_as_transformers_does(smollm):
    """A third of those that trl ships, with system text, tools, thoughts and sixty turns."""
    call = {"name": "f", "arguments": {"a": "é", "b": [1, 2]}}
    calls = [{"id": "call7qzx0", "type": "function", "function": call}]
    system, ask = {"role": "system", "content": "S"}, {"role": "user", "content": " q\n"}
    say = {"role": "assistant", "content": "<think>t</think> a"}
    chats = [
        [system, ask],
        [ask, {"role": "assistant", "content": "a", "reasoning_content": "r"}],
        [ask, {"role": "assistant", "content": "", "tool_calls": calls},
         {"role": "tool", "content": "42", "tool_call_id": "call7qzx0", "name": "f"}, say],
        [ask] + [say, ask] * 30,
    ]  # fmt: skip
    schema = {"type": "object", "properties": {"a": {"type": "string", "description": "x"}}}
    tools = [
        {"type": "function", "function": {"name": "f", "description": "d", "parameters": schema}}
    ]
    seen = 0
    for path in _published()[::3]:
        text = path.read_text()
        program = Program(text, smollm.special_tokens_map)
        theirs = _compile_jinja_template(text)
        for chat in chats:
            values = {"messages": chat, "tools": tools, "add_generation_prompt": True}
            names = {**smollm.special_tokens_map, "documents": None}
            try:
                expected = theirs.render(**values, **names)
            except Exception:
                continue
            assert program.render(values) == expected, path.name
            seen += 1
    assert seen > 60
