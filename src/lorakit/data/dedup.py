"""Texts enter; MinHash signatures leave, and from signatures the rows that say nearly the same.

A text is the set of its pieces of 8 bytes (any language, no words needed). One hash sorts the
pieces into 64 bins and keeps the least of each bin, as one byte: the share of equal bytes of two
texts estimates how much of their pieces they share. Bytes are compared where four in a row agree
(LSH), so that a million rows take seconds: 8 µs to sign a short chat, 1.3 µs to find its twins.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from lorakit.data.issues import SHOWN_ROWS, IssueLog
from lorakit.types import Origin

OriginOf = Callable[[int], Origin]

BINS = 64
# Two texts are nearly the same from this share of common pieces on: about one word in 20 changed.
ALIKE = 0.8
_PIECE, _BAND, _EMPTY = 8, 4, 0
# Shorter texts have too few pieces to be told apart by them.
SHORTEST = 32
# A batch, and what is looked at of a longer text: 1 MiB takes 60 MB to sign.
_BATCH = 2**20
# Rows that share a band are compared with this many that came before, not with all.
_COMPARED = 8


class Signer:
    """Collects texts and signs them in batches of about 1 MiB."""

    def __init__(self) -> None:
        self._done: list[NDArray[np.uint8]] = []
        self._texts: list[bytes] = []
        self._size = 0

    def add(self, text: str) -> None:
        """One more text; white space and case do not count."""
        data = " ".join(text[:_BATCH].lower().split()).encode()
        self._texts.append(data)
        self._size += len(data) + BINS
        if self._size > _BATCH:
            self._flush()

    def signatures(self) -> NDArray[np.uint8]:
        """Signatures of all texts in order, uint8 [N, 64]; all zero for very short ones."""
        self._flush()
        return np.concatenate(self._done) if self._done else np.zeros((0, BINS), np.uint8)

    def _flush(self) -> None:
        if self._texts:
            self._done.append(_sign(self._texts))
        self._texts, self._size = [], 0


def _sign(texts: list[bytes]) -> NDArray[np.uint8]:
    lengths = np.array([len(text) for text in texts])
    count = len(texts)
    joined = np.frombuffer(b"".join(texts) + bytes(_PIECE), np.uint8)
    size = len(joined) - _PIECE
    pieces = np.empty(size, np.uint64)
    for shift in range(_PIECE):  # the 8 bytes from each place on, as one number
        part = np.frombuffer(joined[shift:].tobytes()[: (size - shift + _PIECE) // 8 * 8], "<u8")
        pieces[shift::_PIECE] = part[: len(pieces[shift::_PIECE])]
    pieces *= np.uint64(0x9E3779B97F4A7C15)
    pieces ^= pieces >> np.uint64(29)
    pieces *= np.uint64(0xBF58476D1CE4E5B9)
    rows = np.repeat(np.arange(count), lengths)
    ends = np.cumsum(lengths)
    # Pieces that reach over the end of their text, and all of short texts, are left out.
    whole = (np.arange(size) + _PIECE <= ends[rows]) & (lengths >= SHORTEST)[rows]
    slots = rows[whole] * BINS + (pieces[whole] >> np.uint64(58)).astype(np.int64)
    least = np.full(count * BINS, np.iinfo(np.uint32).max, np.uint32)
    values = (pieces[whole] & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    np.minimum.at(least, slots, values)
    # 1..255 for a bin that holds a piece, 0 for an empty one. The low byte of the least value.
    bytes_ = (least % np.uint32(255) + np.uint32(1)).astype(np.uint8)
    bytes_[least == np.iinfo(np.uint32).max] = _EMPTY
    return bytes_.reshape(count, BINS)


def near_twins(signatures: NDArray[np.uint8]) -> NDArray[np.int64]:
    """For each row the number of an earlier row that says nearly the same, or -1. int64 [N]."""
    twins = np.full(len(signatures), -1, np.int64)
    bands = np.ascontiguousarray(signatures).view(np.uint32)
    for band in range(BINS // _BAND):
        keys = bands[:, band]
        order = np.argsort(keys, kind="stable")
        for back in range(1, _COMPARED + 1):
            later, earlier = order[back:], order[:-back]
            same = (keys[later] == keys[earlier]) & (keys[later] != 0) & (twins[later] < 0)
            later, earlier = later[same], earlier[same]
            if not len(later):
                break
            alike = _likeness(signatures, later, earlier) >= ALIKE
            twins[later[alike]] = earlier[alike]
    return twins


def _likeness(
    signatures: NDArray[np.uint8], left: NDArray[np.int64], right: NDArray[np.int64]
) -> NDArray[np.float64]:
    found = np.empty(len(left))
    for begin in range(0, len(left), 2**16):  # 64 bytes a row: 4 MiB at once
        part = slice(begin, begin + 2**16)
        a, b = signatures[left[part]], signatures[right[part]]
        filled = (a != _EMPTY) | (b != _EMPTY)
        same = ((a == b) & filled).sum(axis=1)
        found[part] = same / np.maximum(filled.sum(axis=1), 1)
    return found


def report_duplicates(
    marks: NDArray[np.uint64], signatures: NDArray[np.uint8], place: OriginOf, log: IssueLog
) -> None:
    """Count rows whose content stood before, in the same or nearly the same words; all are kept.

    Args:
        marks: content hash of each row.
        place: number of a row -> where it came from.
    """
    copies = np.ones(len(marks), bool)
    copies[np.unique(marks, return_index=True)[1]] = False
    near = (near_twins(signatures) >= 0) & ~copies
    _add(np.flatnonzero(copies), "exact duplicate", place, log)
    _add(np.flatnonzero(near), "near duplicate", place, log)


def report_overlap(
    trained: tuple[NDArray[np.uint64], NDArray[np.uint8]],
    held: tuple[NDArray[np.uint64], NDArray[np.uint8]],
    place: OriginOf,
    log: IssueLog,
) -> None:
    """Count held-out rows that are also trained on: their loss says nothing about new questions.

    Args:
        trained, held: marks and signatures of the rows of either side.
        place: number of a held-out row -> where it came from.
    """
    if not len(held[0]):
        return
    both = np.isin(held[0], trained[0])
    # Trained rows come first, so that a twin of a held-out row is an earlier one.
    first = len(trained[1])
    twins = near_twins(np.concatenate([trained[1], held[1]]))[first:]
    near = (twins >= 0) & (twins < first) & ~both
    _add(np.flatnonzero(both), "held-out row is also in the training data", place, log)
    _add(np.flatnonzero(near), "held-out row is nearly one of the training data", place, log)


def _add(rows: NDArray[np.int64], kind: str, place: OriginOf, log: IssueLog) -> None:
    if len(rows):
        log.add_many(kind, len(rows), [str(place(int(i))) for i in rows[:SHOWN_ROWS]], "kept")
