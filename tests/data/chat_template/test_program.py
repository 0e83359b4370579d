"""A template's text becomes a program, compiled once; {% generation %} blocks are found."""

import pytest
from jinja2 import TemplateError

from lorakit.data.chat_template.program import Program
from lorakit.data.chat_template.sandbox import LimitReached

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "answer"}]
MARKED = "{% for m in messages %}> {% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}"


def test_names_and_turns_are_seen_and_blocks_trimmed():
    program = Program("{{ bos_token }}\n{% for m in messages %}\n{{ m.role }};\n{% endfor %}\n"
                      "{{ tools is none }}", {"bos_token": "<s>"})  # fmt: skip
    assert program.render({"messages": TURNS}) == "<s>\nuser;\nassistant;\nTrue"


def test_generated_blocks_are_places_in_the_text():
    program = Program(MARKED, {})
    text = program.render({"messages": TURNS})
    assert [text[a:b] for a, b in program.generated({"messages": TURNS})] == ["q", "answer"]


def test_limits_hold_for_generated_blocks_too_and_the_program_lives_on():
    trap = "{% if messages|length > 2 %}{{ 9 ** 9999 }}{% endif %}" + MARKED
    program = Program(trap, {})
    with pytest.raises(LimitReached, match="line 1"):
        program.generated({"messages": [*TURNS, TURNS[0]]})
    assert len(program.generated({"messages": TURNS})) == 2


def test_what_is_no_template_is_said():
    with pytest.raises(TemplateError):
        Program("{% for %}", {})
    with pytest.raises(LimitReached, match="longer than 200,000 characters"):
        Program("x" * 200_001, {})
