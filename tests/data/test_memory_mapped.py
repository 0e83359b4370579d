"""Items and examples come back from the disk as they were put there, by number."""

import numpy as np
import pytest

from lorakit.data import dataset
from lorakit.data.dataset import (
    ConversationDataset,
    Examples,
    Items,
    TokenizedDataset,
    content_of,
    lengths_of,
    write_examples,
    write_items,
)
from lorakit.data.issues import IssueLog, content_hash
from lorakit.types import IGNORE, Conversation, Document, Example, Message, Origin

CALL = {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": "ü"}}}]}
TALK = Conversation(
    (
        Message("system", "S"),
        Message("user", "Zwölf\u2028\r\n?"),
        Message("assistant", "", CALL),
        Message("tool", "12"),
        Message("assistant", "<think>b</think>a", {}, False),
    ),
    Origin("a.jsonl", 3),
    ({"type": "function", "function": {"name": "f"}},),
)
ITEMS = [TALK, Document("Some\ntext", Origin("b:c.txt", 1)), TALK]


@pytest.fixture
def shelf(tmp_path):
    write_items(tmp_path, [(item, i) for i, item in enumerate(ITEMS)], {"lines": [1]})
    return ConversationDataset(tmp_path, "key")


def test_items_come_back_whole(shelf):
    assert list(shelf) == shelf[:] == ITEMS
    assert shelf[-2] == ITEMS[1]
    assert shelf.sources.tolist() == [0, 1, 2]
    assert shelf.content_hashes.tolist() == [content_hash(item) for item in ITEMS]
    assert shelf.signatures.shape == (3, 64)
    assert (shelf.meta["lines"], shelf.thinking, str(shelf.origin(1))) == ([1], True, "b:c.txt:1")
    with pytest.raises(IndexError):
        shelf[3]
    assert list(Items(shelf, shelf.sources[1:].astype(int))) == ITEMS[1:]
    assert content_of(TALK) == "Zwölf\u2028\r\n?\n\n12\n<think>b</think>a"


def test_an_empty_shelf_is_a_shelf(tmp_path):
    write_items(tmp_path, [], {})
    assert list(ConversationDataset(tmp_path, None)) == []


def example_shelf(folder, items, *examples):
    folder.mkdir()
    write_examples(folder, [(0, examples)], IssueLog())
    return TokenizedDataset(folder, items)


def test_the_digest_follows_ids_masks_borders_and_order(shelf, tmp_path):
    def digest(*examples, chosen=(0, 1, 2)):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        made = [Example(ids, labels, TALK.origin) for ids, labels in examples]
        return example_shelf(folder, shelf, *made).digest(np.array(chosen))

    one, two, three = ([5, 6], [IGNORE, 6]), ([7, 8], [IGNORE, 8]), ([9], [9])
    plain = digest(one, two, three)
    assert plain == digest(one, two, three)
    others = [
        digest(one, ([7, 9], [IGNORE, 9]), three),
        digest(one, ([7, 8], [7, 8]), three),
        digest(one, two, ([10], [10])),
        digest(one, ([7], [IGNORE]), ([8, 9], [8, 9])),
        digest(one, two, three, chosen=(0, 1)),
        digest(one, two, three, chosen=(0, 2, 1)),
        digest(one, two, three, chosen=(2, 0, 1)),
    ]
    assert len({plain, *others}) == 8


@pytest.mark.parametrize("at_once", [2**20, 2])
def test_examples_come_back_whole_and_in_the_order_asked_for(shelf, tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(dataset, "_AT_ONCE", at_once)
    made = [
        (0, [Example([5, 6, 7], [IGNORE, 6, IGNORE], TALK.origin)]),
        (2, [Example([1, 2], [IGNORE, 2], TALK.origin), Example([70000], [IGNORE], TALK.origin)]),
    ]
    (tmp_path / "examples").mkdir()
    log = IssueLog()
    log.add("too long", TALK.origin, "left out")
    write_examples(tmp_path / "examples", made, log)
    back = TokenizedDataset(tmp_path / "examples", shelf)
    flat = [example for _, examples in made for example in examples]
    assert [back.example(i) for i in range(3)] == flat
    assert back.faults.faults() == log.faults()
    chosen = Examples(back, back.source_rows.argsort()[::-1].copy())
    assert chosen[:] == list(chosen) == flat[::-1]
    assert lengths_of(chosen) == lengths_of(list(chosen)) == chosen.lengths.tolist()
    assert (chosen.lengths.tolist(), chosen.trained.tolist()) == ([1, 2, 3], [0, 1, 1])
    assert back.source_rows.tolist() == [0, 2, 2]
