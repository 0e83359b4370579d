"""Control characters go and letters are composed, each with a count; the rest stays as it is."""

import pytest

from lorakit.data.formats.normalize import clean_item, clean_text
from lorakit.data.issues import IssueLog
from lorakit.types import Conversation, Document, Message, Origin

AT = Origin("rows.jsonl", 3)
NOT_NFC = "letters in several characters (not NFC)"
DECODED_WRONGLY = "text decoded wrongly before (\ufffd, â€™, Ã©)"


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "tab\tand\nline ends",
        "Zürich 日本 👩‍💻 שלום",
        "\x1b[31mred\x1b[0m",
        "\u2028 \u00a0",
    ],
)
def test_good_text_of_any_language_is_the_same_object(text):
    log = IssueLog()
    assert clean_text(text, AT, log) is text
    assert log.faults() == ()


@pytest.mark.parametrize(
    ("text", "clean", "kind"),
    [
        ("a\x00b\x08", "ab", "control characters"),
        ("page\x0cnext\x0bline", "page\nnext\nline", "control characters"),
        ("\ufeffstart", "start", "control characters"),
        ("Zu\u0308rich", "Z\u00fcrich", NOT_NFC),
        ("`Zu\u0308rich` = 1", "`Zu\u0308rich` = 1", NOT_NFC),
        ("a:\n    Zu\u0308rich = 1", "a:\n    Zu\u0308rich = 1", NOT_NFC),
        ("a:\n\tZu\u0308rich = 1", "a:\n\tZu\u0308rich = 1", NOT_NFC),
        ("if (Zu\u0308rich) {\n}", "if (Zu\u0308rich) {\n}", NOT_NFC),
        ("x = 'Zu\u0308rich'; \ny", "x = 'Zu\u0308rich'; \ny", NOT_NFC),
        ("lost \ufffd", "lost \ufffd", DECODED_WRONGLY),
        ("itâ€™s", "itâ€™s", DECODED_WRONGLY),
        ("cafÃ©", "cafÃ©", DECODED_WRONGLY),
        ("ZÃ¼rich", "ZÃ¼rich", DECODED_WRONGLY),
        ("it\x92s", "it\x92s", DECODED_WRONGLY),
    ],
)
def test_each_change_and_doubt_is_counted(text, clean, kind):
    log = IssueLog()
    assert clean_text(text, AT, log) == clean
    assert [(f.kind, f.first_rows) for f in log.faults()] == [(kind, ("rows.jsonl:3",))]


def test_all_turns_of_an_item_are_cleaned():
    log = IssueLog()
    roles = ("system", "user", "assistant", "tool", "assistant")
    talk = [Message(role, f"{role}\x00", {"name": "n"}, i < 3) for i, role in enumerate(roles)]
    made = clean_item(Conversation(tuple(talk), AT), log)
    clean = [Message(role, role, {"name": "n"}, i < 3) for i, role in enumerate(roles)]
    assert made.messages == tuple(clean)
    assert [f.count for f in log.faults()] == [5]
    assert clean_item(made, log) is made
    assert clean_item(Document("a\x00", AT), log) == Document("a", AT)


def test_thoughts_are_cleaned_as_answers_are():
    """They are trained too; calls are data, and stay as they are."""
    log = IssueLog()
    calls = [{"function": {"name": "f", "arguments": {"a": "Zu\u0308rich\x00"}}}]
    answer = Message("assistant", "b", {"reasoning_content": "Zu\u0308rich", "tool_calls": calls})
    made = clean_item(Conversation((Message("user", "a"), answer), AT), log)
    assert made.messages[1].extra == {"reasoning_content": "Z\u00fcrich", "tool_calls": calls}
    assert answer.extra["reasoning_content"] == "Zu\u0308rich", "the row itself stays as it was"
    assert [(f.kind, f.action) for f in log.faults()] == [(NOT_NFC, "composed")]
    assert clean_item(made, log) is made
