"""Long texts: every token trained once, in pieces that fit, as plain text or as requests."""

from itertools import pairwise

import pytest

from lorakit.data.chat_template.render import template_capabilities
from lorakit.data.issues import RowError
from lorakit.data.tokenize import documents
from lorakit.data.tokenize.documents import as_instructions, encode_document
from lorakit.types import IGNORE, Document, Origin

FAMILIES = ["smollm2", "llama2", "llama3", "qwen3"]
TEXT = "\n\n".join(f"Paragraph {i}. It says: {i * i}! Is it so? 🙂" for i in range(30))


def book(text, name="book.txt"):
    return Document(text, Origin(name, 1))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_token_of_a_document_is_trained_once(family, name):
    tokenizer = family(name)
    text = "\n\n".join(f"Paragraph {i}. It says: {i * i}! Is it so?" for i in range(30))
    examples = encode_document(tokenizer, Document(text, Origin("book.txt", 1)), cutoff_len=48)
    assert all(len(e.input_ids) <= 48 for e in examples)
    assert len(examples) > 5
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    trained = [label for e in examples for label in e.labels if label != IGNORE]
    # Without a BOS nothing predicts the very first token.
    assert trained == (ids if examples[0].input_ids[0] not in ids[:1] else ids[1:])


@pytest.mark.parametrize("name", FAMILIES)
def test_overlap_is_context_and_every_token_is_still_trained_once(family, name):
    tokenizer = family(name)
    plain = encode_document(tokenizer, book(TEXT), 64)
    lapped = encode_document(tokenizer, book(TEXT), 64, overlap=16)
    trained = [[x for e in part for x in e.labels if x != IGNORE] for part in (plain, lapped)]
    assert trained[0] == trained[1]
    assert all(len(e.input_ids) <= 64 for e in lapped)
    for before, after in pairwise(lapped):
        context = [i for i, x in zip(after.input_ids, after.labels, strict=True) if x == IGNORE]
        assert context[-16:] == before.input_ids[-16:]


@pytest.mark.parametrize("name", ["smollm2", "llama2"])
def test_the_overlap_reaches_over_windows_that_are_shorter_than_itself(family, name):
    tokenizer = family(name)
    text = "\n\n".join(f"It says {i}." for i in range(12))
    examples = encode_document(tokenizer, book(text), 24, overlap=12)
    bos = int(examples[0].input_ids[0] == template_capabilities(tokenizer).bos_id)
    seen, shortest = [], 99
    for example in examples:
        own = example.trained_tokens + (example is examples[0] and not bos)
        context, rest = example.input_ids[bos:-own], example.input_ids[-own:]
        assert context == seen[-12:]
        seen += rest
        shortest = min(shortest, own)
    assert shortest < 12


def test_a_text_of_many_parts_is_cut_at_paragraphs_and_kept_whole(smollm, monkeypatch):
    monkeypatch.setattr(documents, "PART_CHARS", 300)
    trained = [x for e in encode_document(smollm, book(TEXT), 64) for x in e.labels if x != IGNORE]
    first = smollm(TEXT, add_special_tokens=False)["input_ids"][:1]
    assert smollm.decode(first + trained) == TEXT + smollm.eos_token


def test_requests_name_headings_or_quote_what_came_before(smollm):
    text = "# Intro\n\nA lever is a bar.\n\n## Use\n\nIt lifts. " + "More of the same here. " * 20
    chats = as_instructions(smollm, book(text, "levers.md"), 40, overlap=8)
    asked = [c.messages[0].content for c in chats]
    assert asked[0] == 'Write the section "Intro" of "levers".'
    assert asked[-1].startswith('Go on with "levers", from:\n\n')
    assert " ".join(c.messages[1].content for c in chats).split() == text.split()
    plain = as_instructions(smollm, book("Once. Twice."), 40)
    assert plain[0].messages[0].content == 'Write the beginning of "book".'
    inside = as_instructions(smollm, book("A bar.\n\n# Use\n\nIt lifts."), 40)
    assert [c.messages[0].content for c in inside] == ['Write the beginning of "book".']


def test_blank_texts_have_nothing_to_train(smollm):
    with pytest.raises(RowError, match="blank"):
        as_instructions(smollm, book(" \n "), 40)
