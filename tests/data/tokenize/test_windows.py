"""Windows cover all tokens once, within the limit, and end at a good border."""

import re

from hypothesis import given
from hypothesis import strategies as st

from lorakit.data.tokenize.documents import windows


def cut(text, limit):
    """Windows over one-character tokens, as texts."""
    spans = windows(text, range(len(text)), len(text), limit)
    return [text[begin:end] for begin, end in spans]


def test_a_paragraph_border_wins_over_a_later_sentence_border():
    assert cut("aaaa bbb.\n\nOne. Two. Three more", 20) == ["aaaa bbb.\n\n", "One. Two. Three more"]


def test_a_sentence_border_wins_over_a_full_window():
    assert cut("aaaa bbbbb cc. dddddddddd", 18) == ["aaaa bbbbb cc. ", "dddddddddd"]
    assert cut("一二三四五六。七八九十", 9) == ["一二三四五六。", "七八九十"]


def test_a_border_that_just_fits_is_taken():
    assert cut("aaaa bbb. cccccc", 10) == ["aaaa bbb. ", "cccccc"]
    assert cut("aaaa bbb\n\ncccccc", 10) == ["aaaa bbb\n\n", "cccccc"]


def test_a_space_that_begins_the_next_token_ends_the_sentence_before():
    """Byte-level BPE and SentencePiece write a word with the space before it."""
    text = "One two three. Four five six"
    starts = [found.start() for found in re.finditer(r" ?\w+|\W", text)]
    ends = [*starts, len(text)]
    pieces = [text[ends[a] : ends[b]] for a, b in windows(text, starts, len(starts), 6)]
    assert pieces == ["One two three.", " Four five six"]


def test_a_border_in_the_first_half_is_not_worth_a_small_window():
    assert cut("a. bbbbbbbbbbbbbbbbbbb", 10)[0] == "a. bbbbbbb"


@given(st.text("ab.\n 。!", max_size=80), st.integers(1, 20))
def test_windows_cover_everything_once_within_the_limit(text, limit):
    pieces = cut(text, limit)
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= limit for piece in pieces)


def test_without_offsets_windows_are_full():
    assert list(windows("", None, 7, 3)) == [(0, 3), (3, 6), (6, 7)]
