"""Thoughts are told from answers; an answer that only mentions the tags has none."""

import pytest

from lorakit.data.chat_template.thoughts import has_thoughts, never_ends, split_thoughts
from lorakit.types import Message


@pytest.mark.parametrize(
    ("text", "thoughts", "answer"),
    [
        ("<think>\nsix sevens\n</think>\n\n42.", "six sevens", "42."),
        ("<think>six sevens</think>42.", "six sevens", "42."),
        ("\n<think>a</think>\n  indented", "a", "  indented"),
        ("<think>\n\n</think>\n\n42.", "", "42."),
        # DeepSeek-R1's prompt has the opening tag.
        ("six sevens\n</think>\n\n42.", "six sevens", "42."),
        ("six sevens.</think>\n\n42.", "six sevens.", "42."),
        ("<think>a</think>It writes <think> and </think>.", "a", "It writes <think> and </think>."),
        ("The tag </think> closes thoughts.", None, "The tag </think> closes thoughts."),
        ("It writes <think> first and </think> last.", None, None),
        ("It opens <think> only.", None, None),
        ("Write\n<think>\n...\n</think>\nfirst.", None, None),
        ("`</think>`", None, None),
        ("<think>\ncut off", None, None),
        ("", None, ""),
    ],
)
def test_where_thoughts_end_and_the_answer_begins(text, thoughts, answer):
    assert split_thoughts(text) == (thoughts, text if answer is None else answer)


def test_only_thoughts_without_an_end_never_end():
    assert never_ends("<think>\nsix sevens is 42")
    assert not never_ends("<think>a</think>b")
    assert not never_ends("It opens <think> only.")


def test_an_answer_has_thoughts_in_its_text_or_in_a_field_of_its_own():
    assert has_thoughts(Message("assistant", "<think>a</think>b"))
    assert has_thoughts(Message("assistant", "b", {"reasoning_content": "a"}))
    assert not has_thoughts(Message("assistant", "The tag </think> closes thoughts."))
    assert not has_thoughts(Message("assistant", "<think></think>b"))
    assert not has_thoughts(Message("user", "<think>a</think>b"))
