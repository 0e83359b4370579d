"""Chats that were rendered before are told, and end tokens are taken off."""

import pytest

from lorakit.data.formats.rendered import note_rendered
from lorakit.data.issues import IssueLog
from lorakit.types import Conversation, Document, Message, Origin

AT = Origin("rows.jsonl", 1)


@pytest.mark.parametrize(
    "text",
    [
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Ho </s>",
        "### Human: Hi### Assistant: Ho",
        "<start_of_turn>user\nHi<end_of_turn>",
        "USER: Hi\nASSISTANT: Ho",
    ],
)
def test_a_rendered_chat_in_a_text_is_told(text):
    log = IssueLog()
    assert note_rendered(Document(text, AT), log).text == text
    assert [f.kind for f in log.faults()] == ["a chat that was rendered before"]


@pytest.mark.parametrize("text", ["# Notes\n\n## User guide", "a < b > c", "[1] see [2]"])
def test_other_texts_are_no_chats(text):
    log = IssueLog()
    note_rendered(Document(text, AT), log)
    assert log.faults() == ()


@pytest.mark.parametrize("end", ["</s>", "<|eot_id|>", " <|im_end|>\n", "<|im_end|><|endoftext|>"])
def test_end_tokens_are_taken_off_an_answer(end):
    log = IssueLog()
    chat = Conversation((Message("user", "q" + end), Message("assistant", "a" + end)), AT)
    item = note_rendered(chat, log)
    assert [m.content for m in item.messages] == ["q" + end, "a"]
    assert [f.kind for f in log.faults()] == ["answer that ends with an end token"]
