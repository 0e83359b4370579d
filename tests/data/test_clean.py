"""Control characters go and letters are composed, each with a count; the rest stays as it is."""

import pytest

from lorakit.data.check import FaultLog
from lorakit.data.clean import clean_item, clean_text
from lorakit.records import Conversation, Document, Message, Origin

AT = Origin("rows.jsonl", 3)


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "tab\tand\r\nline ends",
        "Zürich 日本 👩‍💻 שלום",
        "\x1b[31mred\x1b[0m",
        "\u2028 \u00a0",
    ],
)
def test_good_text_of_any_language_is_the_same_object(text):
    log = FaultLog()
    assert clean_text(text, AT, log) is text
    assert log.faults() == ()


@pytest.mark.parametrize(
    ("text", "clean", "kind"),
    [
        ("a\x00b\x08", "ab", "control characters"),
        ("page\x0cnext", "page\nnext", "control characters"),
        ("\ufeffstart", "start", "control characters"),
        ("Zu\u0308rich", "Z\u00fcrich", "letters in several characters (not NFC)"),
        ("`Zu\u0308rich` = 1", "`Zu\u0308rich` = 1", "letters in several characters (not NFC)"),
        ("lost \ufffd", "lost \ufffd", "text decoded wrongly before (\ufffd, â€™, Ã©)"),
        ("itâ€™s", "itâ€™s", "text decoded wrongly before (\ufffd, â€™, Ã©)"),
    ],
)
def test_each_change_and_doubt_is_counted(text, clean, kind):
    log = FaultLog()
    assert clean_text(text, AT, log) == clean
    assert [(f.kind, f.first_rows) for f in log.faults()] == [(kind, ("rows.jsonl:3",))]


def test_all_turns_of_an_item_are_cleaned():
    log = FaultLog()
    talk = Conversation((Message("user", "a\x00"), Message("assistant", "b", {}, False)), AT)
    made = clean_item(talk, log)
    assert made.messages == (Message("user", "a"), Message("assistant", "b", {}, False))
    assert clean_item(made, log) is made
    assert clean_item(Document("a\x00", AT), log) == Document("a", AT)
