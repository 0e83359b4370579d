"""Records enter; a training part and a held-out part leave, decided by content and seed alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from lorakit.data.check import content_key
from lorakit.errors import DataError
from lorakit.records import Conversation, Document

Record = TypeVar("Record", Conversation, Document, Conversation | Document)


def split(
    records: Sequence[Record], held_out: float | int, seed: int
) -> tuple[list[Record], list[Record]]:
    """Hold out a share (below 1) or a number of records. Copies of one text stay on one side.

    Raises:
        DataError: nothing would be left to train on.
    """
    count = round(held_out * len(records)) if held_out < 1 else int(held_out)
    if held_out and len(records) > 1:
        count = max(1, count)
    if count >= len(records) and held_out:
        raise DataError(
            f"val_size: {held_out} of {len(records)} rows leaves none to train on",
            hint="lower val_size, or name other held-out data with val_data",
        )
    order = list(range(len(records)))
    random.Random(seed).shuffle(order)
    chosen = {content_key(records[i]) for i in order[:count]}
    train = [r for r in records if content_key(r) not in chosen]
    val = [r for r in records if content_key(r) in chosen]
    if not train:  # every row is a copy of a held-out one
        return list(records), []
    return train, val
