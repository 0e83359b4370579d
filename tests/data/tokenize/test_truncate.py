"""Pieces cover a conversation once, each as long as fits, each led by the system turn."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from lorakit.data.tokenize.truncate import split_conversation
from lorakit.types import Conversation, Message, Origin

TURNS = st.lists(st.integers(1, 9), min_size=1, max_size=20)


@given(TURNS, st.integers(1, 30), st.booleans())
def test_each_exchange_stands_in_one_piece_and_no_more_would_fit(sizes, limit, system):
    head = (Message("system", "s"),) if system else ()
    turns = [m for n in sizes for m in (Message("user", "u" * n), Message("assistant", "a" * n))]
    talk = Conversation((*head, *turns), Origin("x", 1))

    def size(piece):
        return sum(len(m.content) for m in piece.messages if m.role == "user")

    found = list(split_conversation(talk, lambda piece: size(piece) <= limit))
    assert [m for p in found for m in p.messages[len(head) :]] == turns
    assert all(p.messages[: len(head)] == head for p in found)
    for this, following in pairwise(found):
        exchanges = (len(this.messages) - len(head)) // 2
        assert size(this) <= limit or exchanges == 1
        assert size(this) + len(following.messages[len(head)].content) > limit


def test_pieces_of_like_length_take_few_trials():
    turns = [Message(role, "word") for _ in range(400) for role in ("user", "assistant")]
    trials = []

    def fits(piece):
        trials.append(piece)
        return len(piece.messages) <= 2 * 50

    found = list(split_conversation(Conversation(tuple(turns), Origin("x", 1)), fits))
    assert [len(piece.messages) for piece in found] == [100] * 8
    assert len(trials) <= 12 + 2 * 7  # the first piece is searched for, the others are confirmed
