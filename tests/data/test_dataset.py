"""An item and its JSON line are the same thing; what a run keeps can be read again."""

import json

import pytest

from lorakit.data.dataset import from_values, read_validation, to_line, write_validation
from lorakit.errors import DataError
from lorakit.types import Conversation, Document, Message, Origin

TALK = Conversation((Message("user", "q"), Message("assistant", "a", {}, False)), Origin("a", 3))
TEXT = Document("Text\r\n\u2028of it", Origin("s3://b:c.txt", 1))


@pytest.mark.parametrize("item", [TALK, TEXT])
def test_a_line_holds_the_item(item):
    assert "\n" not in to_line(item)
    assert from_values(json.loads(to_line(item)), item.origin) == item


def test_held_out_rows_survive_and_damage_is_named(tmp_path):
    path = tmp_path / "validation.jsonl"
    write_validation(path, [TALK, TEXT])
    assert read_validation(path) == [TALK, TEXT]
    path.write_text('{"from": "a:3"}\n')
    with pytest.raises(DataError, match="not a held-out row"):
        read_validation(path)
