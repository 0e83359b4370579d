"""Items and examples are read from Arrow files as they were written, by number."""

import hashlib
from functools import partial

import numpy as np
import pytest

from lorakit.data import dataset
from lorakit.data.cache import cached
from lorakit.data.dataset import (
    ConversationDataset,
    Examples,
    as_dataset,
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


HASHES = np.array([7, 8, 9], np.uint64)


@pytest.fixture(params=[2**20, 2])
def batch_size(request, monkeypatch):
    """One record batch for all rows, or one for each."""
    monkeypatch.setattr(dataset, "BATCH_SIZE", request.param)


def conversations(items):
    pairs = [(item, i) for i, item in enumerate(items)]
    return ConversationDataset(cached(None, partial(write_items, items=pairs, meta={"lines": [1]})))


def tokenized(*pairs, log=None):
    def write(path):
        return write_examples(path, pairs, HASHES, log or IssueLog())

    return Examples(cached(None, write))


@pytest.mark.usefixtures("batch_size")
def test_items_are_read_as_they_were_written():
    rows = conversations(ITEMS)
    assert list(rows) == rows[:] == ITEMS
    assert rows[-2] == ITEMS[1]
    assert rows.column("source_index").tolist() == [0, 1, 2]
    assert rows.content_hashes.tolist() == [content_hash(item) for item in ITEMS]
    assert rows.signatures.shape == (3, 64)
    assert (rows.meta["lines"], rows.thinking, str(rows.origin(1))) == ([1], True, "b:c.txt:1")
    with pytest.raises(IndexError):
        rows[3]
    assert content_of(TALK) == "Zwölf\u2028\r\n?\n\n12\n<think>b</think>a"


@pytest.mark.usefixtures("batch_size")
def test_chosen_items_keep_their_columns():
    rows, some = conversations(ITEMS), conversations(ITEMS).select(np.array([2, 1]))
    assert list(some) == some[:] == [ITEMS[2], ITEMS[1]]
    assert some.content_hashes.tolist() == rows.content_hashes[[2, 1]].tolist()
    assert some.signatures.tolist() == rows.signatures[[2, 1]].tolist()
    assert [str(some.origin(i)) for i in range(2)] == ["a.jsonl:3", "b:c.txt:1"]


def test_a_dataset_may_be_empty():
    rows = conversations([])
    assert list(rows) == []
    assert rows.signatures.shape == (0, 64)
    none = tokenized()
    assert (len(none), none.lengths.tolist(), none[:]) == (0, [], [])
    assert none.digest() == hashlib.sha256().hexdigest()


def test_the_digest_follows_ids_masks_borders_and_order():
    def digest(*examples, chosen=(0, 1, 2)):
        made = [Example(ids, labels, TALK.origin) for ids, labels in examples]
        return tokenized((0, made)).select(np.array(chosen)).digest()

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


@pytest.mark.usefixtures("batch_size")
def test_the_digest_is_that_of_the_checkpoints_of_earlier_versions():
    rows = [Example([i, 70000 + i], [IGNORE, 70000 + i], TALK.origin) for i in range(5)]
    lengths = np.full(4, 2, np.int64).tobytes()
    ids = [np.array(rows[i].input_ids, np.int32).tobytes() for i in range(5)]
    runs = ids[0] + ids[1] + bytes([0, 1, 0, 1]) + ids[3] + ids[4] + bytes([0, 1, 0, 1])
    chosen = tokenized((0, rows)).select(np.array([0, 1, 3, 4]))
    assert chosen.digest() == hashlib.sha256(lengths + runs).hexdigest()


@pytest.mark.usefixtures("batch_size")
def test_examples_are_read_as_they_were_written_and_in_the_order_asked_for():
    made = [
        (0, [Example([5, 6, 7], [IGNORE, 6, IGNORE], TALK.origin)]),
        (2, [Example([1, 2], [IGNORE, 2], TALK.origin), Example([70000], [IGNORE], TALK.origin)]),
    ]
    log = IssueLog()
    log.add("too long", TALK.origin, "left out")
    back = tokenized(*made, log=log)
    flat = [example for _, examples in made for example in examples]
    assert [back[i] for i in range(3)] == flat
    assert IssueLog.from_dict(back.meta["faults"]).faults() == log.faults()
    chosen = back.select(np.array([2, 1, 0, 2]))
    assert chosen[:] == list(chosen) == [*flat[::-1], flat[2]]
    assert lengths_of(chosen) == lengths_of(list(chosen)) == chosen.lengths.tolist()
    assert (chosen.lengths.tolist(), chosen.trained.tolist()) == ([1, 2, 3, 1], [0, 1, 1, 0])
    assert chosen.content_hashes.tolist() == [9, 9, 7, 9]
    assert back.column("item_index").tolist() == [0, 2, 2]


def test_the_dataset_of_prepared_examples_is_that_of_the_same_examples_in_memory():
    flat = [Example([5, 6], [IGNORE, 6], TALK.origin), Example([7], [7], Origin("b", 2))]
    made, copied = as_dataset(tokenized((0, flat))), as_dataset(flat)
    assert made.column_names == copied.column_names == ["input_ids", "labels", "source", "row"]
    assert made.features == copied.features
    assert made[:] == copied[:]
    assert made.cache_files
    assert not copied.cache_files
