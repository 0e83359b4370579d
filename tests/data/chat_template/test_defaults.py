"""Variables and dates that a recipe fixes are rendered in training and wherever the run is used."""

import copy
import datetime
from importlib.resources import files

import pytest

from lorakit.data.chat_template.defaults import (
    has_default,
    prints_today,
    with_date,
    with_defaults,
    with_thinking_fixed,
)
from lorakit.data.chat_template.render import render_chat
from lorakit.data.chat_template.select import resolve_template
from lorakit.errors import RecipeError

ASK = [{"role": "user", "content": "Why?"}]
GPT_OSS = (files("trl") / "chat_templates" / "gptoss.jinja").read_text("utf-8")


def asked(tokenizer, **options):
    return render_chat(tokenizer, ASK, prompt=True, **options)


@pytest.fixture
def gpt_oss(smollm):
    """SmolLM2's tokenizer as gpt-oss'."""
    tokenizer = copy.deepcopy(smollm)
    marks = ["<|start|>", "<|message|>", "<|end|>", "<|channel|>", "<|return|>", "<|call|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.chat_template = GPT_OSS
    return tokenizer


@pytest.mark.parametrize(("value", "end"), [(True, "assistant\n"), (False, "</think>\n\n")])
@pytest.mark.parametrize("in_data", [True, False])
def test_the_recipe_decides_on_thinking_before_the_data_does(family, value, end, in_data):
    tokenizer = family("qwen3")
    tokenizer.chat_template = tokenizer.chat_template.split("{% endif %}", 1)[1]  # as it came
    info = resolve_template(tokenizer, "m", in_data, {"enable_thinking": value})
    assert f"rendered with enable_thinking={value}" in info.source
    assert "by default" not in info.source
    assert asked(tokenizer).endswith(end)
    assert asked(tokenizer, enable_thinking=True).endswith("assistant\n")
    tokenizer.chat_template = with_thinking_fixed(tokenizer.chat_template)
    assert asked(tokenizer, enable_thinking=not value).endswith(end)


def test_a_runs_template_has_its_variables_and_gets_them_once(gpt_oss):
    values = {"reasoning_effort": "low", "model_identity": 'You are "Ö\\n".'}
    resolve_template(gpt_oss, "m", variables=values)
    once = gpt_oss.chat_template
    assert "Reasoning: low" in asked(gpt_oss)
    assert 'You are "Ö\\n".' in asked(gpt_oss)
    assert "Reasoning: high" in asked(gpt_oss, reasoning_effort="high")
    assert "rendered with" not in resolve_template(gpt_oss, "m", variables=values).source
    assert gpt_oss.chat_template == once


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("enable_thinkin", "did you mean enable_thinking?"),
        ("custom_system", "remove it"),
        ("messages", "remove it"),
    ],
)
def test_a_variable_that_the_template_does_not_read_is_refused(name, said):
    template = (
        "{% if enable_thinking %}{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(RecipeError, match=f"{name} is not read by .* reads enable_thinking") as e:
        with_defaults(template, {name: True})
    assert e.value.hint == said


def test_a_template_without_variables_says_so():
    with pytest.raises(RecipeError, match="which reads no variable of its own"):
        with_defaults("{{ messages[0].content }}{{ eos_token }}", {"x": 1})


def test_only_the_defaults_in_front_count():
    text = with_defaults("{{ a }}{{ b }}", {"a": 1, "b": "x"})
    assert has_default(text, "a")
    assert has_default(text, "b")
    assert not has_default("{{ c }}" + text, "a")
    assert not has_default(text, "c")


@pytest.mark.parametrize("quote", ['"', "'"])
@pytest.mark.parametrize(("form", "written"), [("%Y-%m-%d", "2026-01-31"), ("%d %b %Y", "31 Jan")])
def test_the_date_is_written_in_the_templates_form(smollm, quote, form, written):
    plain = smollm.chat_template
    smollm.chat_template = f"{{{{ strftime_now({quote}{form}{quote}) }}}}{plain}"
    assert prints_today(smollm.chat_template)
    assert not prints_today(plain)
    info = resolve_template(smollm, "m", date="2026-01-31")
    assert "which is fixed to 2026-01-31" in info.source
    assert asked(smollm).startswith(written)


def test_gpt_oss_prints_the_day_of_the_run(gpt_oss):
    assert datetime.date.today().isoformat() in asked(gpt_oss)
    gpt_oss.chat_template = with_date(GPT_OSS, "2026-01-31")
    assert "Current date: 2026-01-31" in asked(gpt_oss)
