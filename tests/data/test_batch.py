"""Batches are padded on the right and masked by length, whatever the pad id is."""

from lorakit.data.batch import collate
from lorakit.records import IGNORE, Example, Origin

AT = Origin("rows", 1)
SHORT, LONG = Example([5, 2], [IGNORE, 2], AT), Example([5, 6, 2], [IGNORE, 6, 2], AT)


def test_padding_is_on_the_right_and_masked_by_position():
    batch = collate([SHORT, LONG], pad_id=2)
    assert batch["input_ids"].tolist() == [[5, 2, 2], [5, 6, 2]]
    assert batch["labels"].tolist() == [[IGNORE, 2, IGNORE], [IGNORE, 6, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]


def test_width_rounds_up_to_the_multiple():
    assert collate([LONG], 0, pad_to_multiple_of=8)["input_ids"].shape == (1, 8)
    assert collate([LONG], 0, pad_to_multiple_of=3)["input_ids"].shape == (1, 3)
