"""Rows of chats and what becomes of them, for the tests of formats."""

from lorakit.data.formats.row_formats import guess_format, to_conversation
from lorakit.types import Origin, Row


def convert(values):
    row = Row(values, Origin("rows.jsonl", 1))
    return to_conversation(row, guess_format([row]), None)


def chat(*answers):
    turns = []
    for answer in answers:
        turns += [{"role": "user", "content": "and?"}, {"role": "assistant", **answer}]
    return {"messages": turns}


def turns(item):
    return [(m.role, m.content) for m in item.messages]


CALL = {"type": "function", "function": {"name": "tide", "arguments": {"at": "noon"}}}
ASK = {"role": "user", "content": "tide?"}
END = {"role": "assistant", "content": "high"}
