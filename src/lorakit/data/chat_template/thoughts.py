"""Separate the thoughts of an answer from the answer itself."""

from __future__ import annotations

import re

from lorakit.types import Message

OPEN_TAG, CLOSE_TAG = "<think>", "</think>"
_TAGGED = re.compile(r"\s*<think>(.*?)</think>", re.DOTALL)
# Where the prompt opened the thoughts, an answer has the closing tag only: on a line of its own, or
# before a blank line.
_CLOSED = re.compile(
    r"(.*?)(?:^[ \t]*</think>[ \t]*$|</think>(?=[ \t]*\n[ \t]*\n))", re.DOTALL | re.MULTILINE
)
_UNCLOSED = re.compile(r"\s*<think>(?!.*</think>)", re.DOTALL)


def split_thoughts(text: str) -> tuple[str | None, str]:
    """Split an answer into its thoughts, without tags, and the rest.

    An answer that only mentions the tags has no thoughts: they are None, and the rest is `text`.
    """
    match = _TAGGED.match(text)
    if match is None and OPEN_TAG not in text:
        match = _CLOSED.match(text)
    if match is None:
        return None, text
    return match[1].strip(), text[match.end() :].lstrip("\n")


def never_ends(text: str) -> bool:
    """True if an answer opens thoughts and does not close them."""
    return _UNCLOSED.match(text) is not None


def has_thoughts(message: Message) -> bool:
    """True for an answer with thoughts, in its text or in `reasoning_content`."""
    return message.role == "assistant" and bool(
        message.extra.get("reasoning_content") or split_thoughts(message.content)[0]
    )
