"""Masks against an independent oracle: the training templates that TRL ships for 31 families.

TRL rewrites a family's template with {% generation %} blocks; the tokens inside them are what it
trains. Here the original template and lorakit's spans find them. Both must train the same text,
apart from the differences listed below, each of which has its reason.
"""

import re
from importlib.resources import files

import pytest
from transformers import AddedToken, AutoTokenizer

from lorakit.data.chat_template.select import resolve_template
from lorakit.data.tokenize.encode import encode, prompt_ids
from lorakit.types import IGNORE, Conversation, Message, Origin

TEMPLATES = files("trl") / "chat_templates"
FAMILIES = sorted(
    path.name.removesuffix("_training.jinja")
    for path in TEMPLATES.iterdir()
    if path.name.endswith("_training.jinja")
)
AT = Origin("rows.jsonl", 7)
MARK = re.compile(
    r"<\|?[｜|A-Za-z_▁]{1,40}\|?>|<\|[^<>\s]{1,40}\|?>|<｜[^<>\s]{1,40}｜>|\[/?INST\]"
)
# Of these the template names none itself: the tokenizer's eos closes an answer.
EOS = {"cohere2": "<|END_OF_TURN_TOKEN|>", "deepseekv3": "<｜end▁of▁sentence｜>"}
EOS["deepseek_r1_distill"] = "<｜end▁of▁sentence｜>"
NOT_MARKS = {"<think>", "</think>"}

PLAIN = (Message("user", "6 x 7?"), Message("assistant", "42."))
CHATS = {
    "plain": PLAIN,
    "system": (Message("system", "Be brief."), *PLAIN),
    "unicode": (Message("user", "größe?"), Message("assistant", "零 🦙 é\n\n- a\n")),
    "thoughts": (PLAIN[0], Message("assistant", "42.", {"reasoning_content": "six sevens"})),
    "thoughts in the text": (
        PLAIN[0],
        Message("assistant", "<think>\nsix sevens\n</think>\n\n42."),
    ),
    "thoughts on one line": (PLAIN[0], Message("assistant", "<think>six sevens</think>42.")),
}
# Templates that take only lists of content parts are refused by name.
PARTS_ONLY = {"idefics3", "llava_next", "smolvlm"}
# R1's prompt opens thoughts; TRL trains an answer that does not close them.
R1 = {"deepseekv3", "deepseek_r1_distill"}
# TRL leaves thoughts in the text where they are, before or behind thoughts that it writes itself;
# lorakit moves them to where the template writes `reasoning_content`.
MOVED = {"qwen3_8", "gptoss", "diffusion_gemma", "muse_glimmer"}
# TRL does not split thoughts on one line as these templates write them.
ONE_LINE = {"nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra", "nemotron_3_5_lightning"}


@pytest.fixture(scope="module")
def tokenizer_of(demo_model):
    """family -> SmolLM2's tokenizer with the marks and the template of that family."""

    def load(family, thinking):
        tokenizer = AutoTokenizer.from_pretrained(demo_model)
        text = (TEMPLATES / f"{family}.jinja").read_text("utf-8")
        marks = sorted(set(MARK.findall(text)) - NOT_MARKS | {EOS.get(family, "<|im_end|>")})
        tokenizer.add_special_tokens({"additional_special_tokens": marks})
        tokenizer.add_tokens([AddedToken(t, special=False) for t in sorted(NOT_MARKS)])
        tokenizer.eos_token = EOS.get(family, tokenizer.eos_token)
        tokenizer.chat_template = text
        resolve_template(tokenizer, family, thinking)
        return tokenizer

    return load


def trained_text(tokenizer, ids, mask):
    return tokenizer.decode([i for i, trained in zip(ids, mask, strict=True) if trained])


def oracle(tokenizer, family, messages, thinking):
    """Text that TRL's training template marks as the model's own."""
    found = tokenizer.apply_chat_template(
        [m.as_dict() for m in messages],
        chat_template=(TEMPLATES / f"{family}_training.jinja").read_text("utf-8"),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        enable_thinking=thinking,
    )
    return trained_text(tokenizer, found["input_ids"], found["assistant_masks"])


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - PARTS_ONLY))
def test_the_trained_text_is_that_of_trl(tokenizer_of, family, name):
    messages, thinking = CHATS[name], name.startswith("thoughts")
    tokenizer = tokenizer_of(family, thinking)
    (example,) = encode(tokenizer, Conversation(messages, AT))
    ours = trained_text(tokenizer, example.input_ids, [t != IGNORE for t in example.labels])
    asked = prompt_ids(tokenizer, messages[:-1])
    assert example.input_ids[: len(asked)] == asked, "trained after what an engine feeds"
    assert example.labels[len(asked)] != IGNORE
    if thinking and family in MOVED and name != "thoughts":
        (own,) = encode(tokenizer, Conversation(CHATS["thoughts"], AT))
        assert example.input_ids == own.input_ids
        return
    theirs = oracle(tokenizer, family, messages, thinking).rstrip()
    assert theirs
    if family in R1:
        assert ours == f"{'six sevens' if thinking else ''}\n</think>\n\n" + theirs.split("｜>")[-2]
        return
    # TRL may train the end of the generation prompt too, and white space after the end of turn.
    whole = tokenizer.decode(asked) + ours
    assert whole.rstrip().endswith(theirs.removesuffix("<|endoftext|>"))
    assert len(theirs) >= len(ours)
