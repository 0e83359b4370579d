"""A prompt's length is found without tokenizing it, and is the same as if it had been."""

import copy

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorakit.data.chat_template.render import render_chat
from lorakit.data.tokenize.batch_tokenizer import borders_of, tokenize_in_background, tokenizer_key

FAMILIES = ["smollm2", "llama2", "llama3", "qwen3"]
CONTENT = st.text(max_size=20) | st.sampled_from([" ", "\n\n", "  x", "é", "\u2028", "日本", "1+1"])


def plain(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_is_a_prefix_by_its_tail_only_where_it_is_one(family, name):
    tokenizer = family(name)
    borders = borders_of(tokenizer)

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(CONTENT, min_size=2, max_size=6))
    def check(contents):
        roles = ("user", "assistant")
        chat = [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]
        prompt = render_chat(tokenizer, chat[:1], prompt=True)
        text = render_chat(tokenizer, chat, prompt=False)
        if not text.startswith(prompt):
            return
        for shift in (0, 1):
            ids = [tokenizer.bos_token_id or 0] * shift + plain(tokenizer, text)
            own = [tokenizer.bos_token_id or 0] * shift + plain(tokenizer, prompt)
            end = len(prompt)
            tail = plain(tokenizer, borders.tail(text, end))
            (found,) = borders.prompt_lengths(ids, text, [end], [tail])
            if found is not None:
                assert ids[:found] == own
            elif "<" not in "".join(contents):
                assert ids[: len(own)] != own

    check()


def test_blocks_come_in_order_with_the_ids_of_their_texts(smollm):
    blocks = [["a", "b"], [], ["a", "c d"]]
    made = list(tokenize_in_background(smollm, iter(blocks), lambda block: block))
    assert [block for block, _ in made] == blocks
    assert [dict(ids) for _, ids in made] == [{t: plain(smollm, t) for t in b} for b in blocks]


@pytest.fixture
def own(smollm):
    """A tokenizer of this test alone, whose settings and words may change."""
    return copy.deepcopy(smollm)


def ahead(tokenizer, *texts):
    ((_, ids),) = tokenize_in_background(tokenizer, iter([texts]), list)
    return [ids[text] for text in texts]


@pytest.mark.parametrize("setting", ["truncation", "padding", "special tokens as text"])
def test_settings_of_a_tokenizer_alter_no_ids(own, setting):
    """As a tokenizer.json may bring them, or an earlier call may leave them."""
    texts = ("<|im_start|>user\na longer text than the other<|im_end|>", "b")
    expected = [plain(own, text) for text in texts]
    backend = own.backend_tokenizer
    if setting == "truncation":
        backend.enable_truncation(3)
    elif setting == "padding":
        backend.enable_padding(length=40)
    else:
        own("<|im_end|>", split_special_tokens=True)
    assert ahead(own, *texts) == expected


def test_tokens_that_are_added_later_are_seen(own):
    assert len(ahead(own, "a<|new|>")[0]) > 2
    own.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    assert ahead(own, "a<|new|>") == [plain(own, "a<|new|>")]
    assert len(ahead(own, "a<|new|>")[0]) == 2


@pytest.mark.parametrize("name", ["eos_token", "bos_token", "pad_token"])
def test_the_key_of_a_tokenizer_follows_its_special_tokens(own, name):
    """They end documents, begin texts and are given to the template."""
    before = tokenizer_key(own)
    setattr(own, name, "<repo_name>")
    assert tokenizer_key(own) != before


def test_the_key_of_a_tokenizer_follows_its_template_and_words(smollm, load_family):
    one = tokenizer_key(smollm)
    assert one == tokenizer_key(smollm) != tokenizer_key(load_family("qwen3"))
    smollm.chat_template += " "
    assert tokenizer_key(smollm) != one


def test_the_tail_of_a_prompt_begins_at_its_last_mark_however_long_it_is(smollm):
    """A long tail, such as a template's instructions before the answer, is not the whole prompt."""
    tail = "<|im_start|>assistant\n" + "Answer in the language of the question. " * 10
    text = "<|im_start|>user\nWhy?<|im_end|>\n" + tail + "In German<|im_end|>"
    assert borders_of(smollm).tail(text, text.index("In")) == tail
