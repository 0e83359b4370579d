"""Find exact and near duplicates of texts with MinHash signatures.

A text is the set of its 8-byte shingles, which works in any language and needs no words. One hash
sorts the shingles into 64 bins and keeps the minimum of each bin as one byte: the share of equal
bytes of two texts estimates the share of their common shingles. Rows are compared where four bytes
in a row agree (LSH), so that a million rows take seconds: 8 µs to sign a short chat, 1.3 µs to find
its duplicates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from lorakit.data.issues import (
    EXACT_DUPLICATE,
    NEAR_DUPLICATE,
    OVERLAP,
    OVERLAP_NEAR,
    SHOWN_ROWS,
    IssueLog,
)
from lorakit.types import Origin

OriginOf = Callable[[int], Origin]

BINS = 64
# Smallest share of common shingles of near duplicates: about one word in 20 changed.
ALIKE = 0.8
_PIECE, _BAND, _EMPTY = 8, 4, 0
# Shorter texts have too few shingles to distinguish them.
SHORTEST = 32
# Characters signed of a longer text.
_LONGEST = 2**20
# A row is compared with this many earlier rows of the same band, not with all.
_COMPARED = 8


def sign(texts: Sequence[str]) -> NDArray[np.uint8]:
    """MinHash signatures of texts, uint8 [N, 64]; all zero for very short ones.

    White space and case are ignored. Texts of 1 MiB take 60 MB to sign.
    """
    words = (" ".join(text[:_LONGEST].lower().split()).encode() for text in texts)
    return _sign(list(words)) if texts else np.zeros((0, BINS), np.uint8)


def _sign(texts: list[bytes]) -> NDArray[np.uint8]:
    lengths = np.array([len(text) for text in texts])
    count = len(texts)
    joined = np.frombuffer(b"".join(texts) + bytes(_PIECE), np.uint8)
    size = len(joined) - _PIECE
    pieces = np.empty(size, np.uint64)
    for shift in range(_PIECE):  # the 8 bytes at each offset, as one integer
        integers = np.frombuffer(
            joined[shift:].tobytes()[: (size - shift + _PIECE) // 8 * 8], "<u8"
        )
        pieces[shift::_PIECE] = integers[: len(pieces[shift::_PIECE])]
    pieces *= np.uint64(0x9E3779B97F4A7C15)
    pieces ^= pieces >> np.uint64(29)
    pieces *= np.uint64(0xBF58476D1CE4E5B9)
    rows = np.repeat(np.arange(count), lengths)
    ends = np.cumsum(lengths)
    # Shingles that cross the end of their text, and all shingles of short texts, are left out.
    valid = (np.arange(size) + _PIECE <= ends[rows]) & (lengths >= SHORTEST)[rows]
    slots = rows[valid] * BINS + (pieces[valid] >> np.uint64(58)).astype(np.int64)
    least = np.full(count * BINS, np.iinfo(np.uint32).max, np.uint32)
    values = (pieces[valid] & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    np.minimum.at(least, slots, values)
    # 0 for an empty bin, else 1..255, from the minimum of the bin.
    bytes_ = (least % np.uint32(255) + np.uint32(1)).astype(np.uint8)
    bytes_[least == np.iinfo(np.uint32).max] = _EMPTY
    return bytes_.reshape(count, BINS)


def near_twins(signatures: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Index of an earlier near duplicate of each row, or -1, int64 [N]."""
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
            alike = _similarity(signatures, later, earlier) >= ALIKE
            twins[later[alike]] = earlier[alike]
    return twins


def _similarity(
    signatures: NDArray[np.uint8], left: NDArray[np.int64], right: NDArray[np.int64]
) -> NDArray[np.float64]:
    shares = np.empty(len(left))
    for begin in range(0, len(left), 2**16):  # 64 bytes a row: 4 MiB at once
        rows = slice(begin, begin + 2**16)
        a, b = signatures[left[rows]], signatures[right[rows]]
        filled = (a != _EMPTY) | (b != _EMPTY)
        same = ((a == b) & filled).sum(axis=1)
        shares[rows] = same / np.maximum(filled.sum(axis=1), 1)
    return shares


def report_duplicates(
    marks: NDArray[np.uint64], signatures: NDArray[np.uint8], place: OriginOf, log: IssueLog
) -> None:
    """Count rows whose content is that of an earlier row, exactly or nearly; all are kept.

    Args:
        marks: content hash of each row.
        place: index of a row -> its origin.
    """
    copies = np.ones(len(marks), bool)
    copies[np.unique(marks, return_index=True)[1]] = False
    near = (near_twins(signatures) >= 0) & ~copies
    _add(np.flatnonzero(copies), EXACT_DUPLICATE, place, log)
    _add(np.flatnonzero(near), NEAR_DUPLICATE, place, log)


def report_overlap(
    trained: tuple[NDArray[np.uint64], NDArray[np.uint8]],
    held: tuple[NDArray[np.uint64], NDArray[np.uint8]],
    place: OriginOf,
    log: IssueLog,
) -> None:
    """Count held-out rows that are also trained on, whose loss does not measure generalization.

    Args:
        trained, held: content hashes and signatures of the rows of either side.
        place: index of a held-out row -> its origin.
    """
    if not len(held[0]):
        return
    both = np.isin(held[0], trained[0])
    # Trained rows come first, so that the duplicate of a held-out row is an earlier one.
    first = len(trained[1])
    twins = near_twins(np.concatenate([trained[1], held[1]]))[first:]
    near = (twins >= 0) & (twins < first) & ~both
    _add(np.flatnonzero(both), OVERLAP, place, log)
    _add(np.flatnonzero(near), OVERLAP_NEAR, place, log)


def _add(rows: NDArray[np.int64], kind: str, origin_of: OriginOf, log: IssueLog) -> None:
    if len(rows):
        log.add_many(kind, len(rows), [str(origin_of(int(i))) for i in rows[:SHOWN_ROWS]], "kept")
