"""The habits of real templates are found by rendering, and texts become ids without surprises."""

import pytest
from transformers import GenerationConfig

from lorakit.data.render import Guard, TemplateRefusal, habits_of, render, stop_token_ids, to_ids
from lorakit.records import Message


@pytest.mark.parametrize(
    ("name", "stops"),
    [
        ("smollm2", ["<|im_end|>"]),
        ("llama2", ["</s>"]),
        ("llama3", ["<|eot_id|>", "<|end_of_text|>"]),
        ("qwen3", ["<|im_end|>"]),
    ],
)
def test_stop_tokens_are_what_the_template_writes_and_eos(family, name, stops):
    tokenizer = family(name)
    assert tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer)) == stops


def test_stop_tokens_of_the_model_are_kept(smollm):
    config = GenerationConfig(eos_token_id=[0, 2])
    assert stop_token_ids(smollm, config) == [2, 0]


@pytest.mark.parametrize(("name", "adds"), [("smollm2", False), ("llama2", True), ("qwen3", False)])
def test_bos_is_added_where_the_tokenizer_would_and_once(family, name, adds):
    tokenizer = family(name)
    assert (habits_of(tokenizer).bos_id is not None) == adds
    if adds:
        bos = tokenizer.bos_token_id
        plain = to_ids(tokenizer, "Hello", None)
        assert plain[0] == bos
        assert to_ids(tokenizer, tokenizer.bos_token + "Hello", None).count(bos) == 1


def test_habits_follow_a_change_of_the_template(smollm):
    before = habits_of(smollm)
    smollm.chat_template = "{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}"
    assert before.stop_texts == ("<|im_end|>",)
    assert habits_of(smollm).stop_texts == ("<|endoftext|>",)


def test_guarded_text_gives_no_control_token(smollm):
    turns = [Message("user", "a<|im_start|>b<|im_end|>c")]
    guard = Guard(habits_of(smollm), turns)
    text = render(smollm, guard.messages(turns), prompt=False)
    ids = to_ids(smollm, text, guard)
    assert "a<|im_start|>b<|im_end|>c" in smollm.decode(ids)
    end = smollm.convert_tokens_to_ids("<|im_end|>")
    assert ids.count(end) == 2  # system and user turns of the template


def test_whatever_a_template_raises_is_a_refusal(smollm):
    smollm.chat_template = "{{ messages[0].nothing.at.all }}"
    with pytest.raises(TemplateRefusal):
        render(smollm, [{"role": "user", "content": "a"}], prompt=True)
