"""Micro-batches: padded on the right or packed in one row, targets where they are predicted."""

import pytest
import torch

from lorakit.data.batching import Layout, collate, pack, step_batches
from lorakit.types import IGNORE, Example, Origin

AT = Origin("rows", 1)
SHORT, LONG = Example([5, 2], [IGNORE, 2], AT), Example([5, 6, 2], [IGNORE, 6, 2], AT)


def test_padding_is_on_the_right_and_carries_no_target():
    batch = collate([SHORT, LONG], pad_id=2)
    assert batch["input_ids"].tolist() == [[5, 2, 2], [5, 6, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    # Position 0 of row 0 predicts its 2; positions 0 and 1 of row 1 (3 and 4 flat) its 6 and 2.
    assert batch["positions"].tolist() == [0, 3, 4]
    assert batch["targets"].tolist() == [2, 6, 2]


def test_rows_of_one_length_need_no_mask():
    assert "attention_mask" not in collate([LONG, LONG], pad_id=0)


def test_packed_documents_stand_in_one_row_with_their_borders():
    batch = pack([LONG, SHORT])
    assert batch["input_ids"].tolist() == [[5, 6, 2, 5, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["borders"].tolist() == [0, 3, 5]
    assert batch["borders"].dtype == torch.int32
    assert batch["positions"].tolist() == [0, 1, 3]
    assert batch["targets"].tolist() == [6, 2, 2]


def test_equal_lengths_are_rows_even_when_packed():
    assert pack([LONG, LONG])["input_ids"].shape == (2, 3)


@pytest.mark.parametrize("packed", [True, False])
def test_a_step_holds_every_example_once(packed):
    rows = [SHORT, LONG, LONG, SHORT, SHORT]
    step = step_batches(rows, Layout(pad_id=0, rows=2, capacity=6, packed=packed))
    assert step.tokens == 12
    assert step.supervised == 7
    assert sum(len(m["targets"]) for m in step.micro) == 7
    assert len(step.micro) == (2 if packed else 3)
