"""The template is the tokenizer's own; where one is supplied or given a default, it is said."""

import pytest

from lorakit.data.chat_template.defaults import with_thinking_fixed
from lorakit.data.chat_template.select import resolve_template
from lorakit.data.tokenize.encode import encode, prompt_ids
from lorakit.errors import ModelError


def test_the_own_template_stays_untouched(load_family):
    for name in ("smollm2", "llama3"):
        tokenizer = load_family(name)
        own = tokenizer.chat_template
        info = resolve_template(tokenizer, name)
        assert info.text == own == tokenizer.chat_template
        assert info.source.startswith("the tokenizer's own")


def test_a_default_system_text_is_reported(smollm):
    assert "You are a helpful AI assistant named SmolLM" in resolve_template(smollm, "x").source


def test_llama2_gets_its_own_form(family, chat):
    tokenizer = family("llama2")
    item = chat("Hi ", "Hello.", "Bye", "See you.", system="Be brief.")
    (example,) = encode(tokenizer, item)
    assert tokenizer.decode(example.input_ids, skip_special_tokens=False) == (
        "<s> [INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello. </s>"
        "<s> [INST] Bye [/INST] See you. </s>"
    )


def test_a_base_model_gets_the_plain_template_and_it_is_said(smollm, chat, trained_runs):
    smollm.chat_template = None
    info = resolve_template(smollm, "some/base-model")
    examples = encode(smollm, chat("Hi", "Hello.", "Bye", "See you.", system="Be brief."))
    assert "### User:" in info.source
    assert smollm.decode(examples[0].input_ids).startswith(
        "Be brief.\n\n### User:\nHi\n\n### Assistant:\nHello.<|im_end|>"
    )
    assert trained_runs(smollm, examples) == ["Hello.<|im_end|>", "See you.<|im_end|>"]


def test_no_template_and_no_eos_is_refused(smollm):
    eos, smollm.chat_template, smollm.eos_token = smollm.eos_token, None, None
    try:
        with pytest.raises(ModelError, match="neither a chat template nor an eos token"):
            resolve_template(smollm, "some/base")
    finally:
        smollm.eos_token = eos


def test_thinking_is_off_by_default_and_resolving_twice_changes_nothing(load_family):
    tokenizer = load_family("qwen3")
    own = tokenizer.chat_template
    try:
        once = resolve_template(tokenizer, "qwen3")
        twice = resolve_template(tokenizer, "qwen3", thinking=True)
        assert once.text == twice.text != own
        assert "thinking off" in once.source
        ask = [{"role": "user", "content": "Hi"}]
        options = {"tokenize": False, "add_generation_prompt": True}
        assert tokenizer.apply_chat_template(ask, **options).endswith("<think>\n\n</think>\n\n")
        on = tokenizer.apply_chat_template(ask, enable_thinking=True, **options)
        assert on.endswith("assistant\n")
    finally:
        tokenizer.chat_template = own


@pytest.mark.parametrize(("thinks", "end"), [(False, "</think>\n\n"), (True, "assistant\n")])
def test_thinking_set_outright_listens_to_no_request(load_family, thinks, end):
    """llama.cpp defines `enable_thinking` as true where nobody asked."""
    tokenizer = load_family("qwen3")
    own = tokenizer.chat_template
    try:
        resolve_template(tokenizer, "qwen3", thinking=thinks)
        tokenizer.chat_template = with_thinking_fixed(tokenizer.chat_template)
        for asked in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": "Hi"}],
                tokenize=False,
                add_generation_prompt=True,
                **asked,
            )
            assert text.endswith(end)
    finally:
        tokenizer.chat_template = own
    assert with_thinking_fixed(own) == own


@pytest.mark.parametrize(("thinking", "end"), [(True, "assistant\n"), (False, "</think>\n\n")])
def test_thinking_is_what_the_data_says_and_what_chat_asks_for(family, chat, thinking, end):
    tokenizer = family("qwen3", thinking=thinking)
    ids = prompt_ids(tokenizer, chat("Hi", "x").messages[:1])
    assert tokenizer.decode(ids).endswith(end)


def test_a_forgotten_bos_is_put_into_the_template(family, chat):
    tokenizer = family("llama2")
    tokenizer.chat_template = tokenizer.chat_template.replace("bos_token + ", "")
    info = resolve_template(tokenizer, "some/model")
    assert "<s> put before it" in info.source
    ids = prompt_ids(tokenizer, chat("Hi", "x").messages[:1])
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=False
    )
    assert ids == rendered
    assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{{ 'always the same' }}", "{% if %}"])
def test_a_template_that_cannot_render_a_chat_is_refused(smollm, template):
    smollm.chat_template = template
    with pytest.raises(ModelError, match="some/model"):
        resolve_template(smollm, "some/model")


def test_a_template_made_for_another_model_is_refused(family):
    tokenizer = family("llama3")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    with pytest.raises(ModelError, match=r"made for another model: it writes <\|im_start\|>, <"):
        resolve_template(tokenizer, "some/model")


def test_marks_that_are_no_tokens_are_noted_where_answers_are_closed(family):
    """As Zephyr's template writes <|user|>, which its tokenizer splits."""
    tokenizer = family("llama2")
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    )
    source = resolve_template(tokenizer, "some/zephyr").source
    assert "it writes <|user|>, <|assistant|>, which this tokenizer has no token for" in source


@pytest.mark.parametrize("spelling", ["by name", "as a list"])
def test_rows_with_tools_get_the_template_that_is_named_for_them(smollm, chat, spelling):
    plain = smollm.chat_template
    tools = "{{ tools | tojson }}\n" + plain + "\n"
    named = {"rag": "{{ 1 / 0 }}", "tool_use": tools, "default": plain + "\n"}
    asked = [{"role": "user", "content": "Hi"}]
    schema = {"type": "function", "function": {"name": "find", "description": "d"}}
    options = {"tokenize": False, "add_generation_prompt": True}
    smollm.chat_template = named
    expected = [
        smollm.apply_chat_template(asked, tools=given, **options) for given in (None, [schema])
    ]
    if spelling == "as a list":
        smollm.chat_template = [{"name": k, "template": v} for k, v in named.items()]
    assert "tool_use for rows with tools" in resolve_template(smollm, "some/model").source
    found = [
        smollm.apply_chat_template(asked, tools=given, **options) for given in (None, [schema])
    ]
    assert found == expected
    assert "find" in found[1]
    assert "find" not in found[0]
