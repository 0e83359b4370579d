"""Nearly the same texts are found, others are not; short ones are left to exact comparison."""

import numpy as np

from lorakit.data.dedup import near_twins, report_duplicates, report_overlap, sign
from lorakit.data.issues import IssueLog
from lorakit.types import Origin

LONG = (
    "The museum opens at nine in the morning and closes at six, except on Mondays, when it stays "
    "shut all day. Tickets cost eight euros; children under twelve and students go in for free."
)
OTHER = (
    "A lever is a rigid bar that turns about a fixed point. The longer the arm on which you push, "
    "the smaller the force that lifts a given load, and the further your hand has to travel."
)
CHINESE = "博物馆早上九点开门，下午六点关门，星期一全天不开放。门票八欧元，十二岁以下儿童免费。"


def at(source):
    return lambda number: Origin(source, number + 1)


def test_a_changed_word_white_space_and_case_make_a_near_duplicate():
    texts = [LONG, OTHER, LONG.replace("eight", "seven"), f"  {OTHER.upper()}\n", CHINESE]
    assert near_twins(sign(texts)).tolist() == [-1, -1, 0, 1, -1]
    assert near_twins(sign([CHINESE, CHINESE.replace("八", "九")])).tolist() == [-1, 0]


def test_a_twin_is_found_past_rows_that_share_as_much_with_both():
    """Toy signatures of 16 bands: only the first four are those of the twin."""
    first = np.arange(1, 65, dtype=np.uint8)
    twin = first.copy()
    twin[16::4] += 100  # one byte of each other band: 52 of 64 are equal
    between = np.tile(first, (5, 1))
    between[:, 16:] = np.arange(70, 75, dtype=np.uint8)[:, None]
    found = near_twins(np.stack([first, *between, twin]))
    assert found.tolist() == [-1] * 6 + [0]


def test_texts_with_a_common_half_are_not_nearly_the_same():
    half = LONG[:90]
    assert near_twins(sign([half + OTHER, half + LONG[90:]])).tolist() == [-1, -1]


def test_short_texts_have_no_signature():
    assert near_twins(sign(["What is 3 + 3?\n6", "What is 3 + 3?\n6"])).tolist() == [-1, -1]
    assert sign(["", "x"]).tolist() == [[0] * 64] * 2
    assert sign([]).shape == (0, 64)


def test_other_texts_do_not_alter_signatures():
    texts = [f"{LONG} {i}" for i in range(900)]
    assert (sign(texts)[-50:] == sign(texts[-50:])).all()


def test_held_out_rows_that_are_like_one_another_overlap_with_nothing():
    log = IssueLog()
    near = LONG.replace("eight", "seven")
    trained = np.array([1], np.uint64), sign([OTHER])
    report_overlap(trained, (np.array([2, 3], np.uint64), sign([LONG, near])), at("v"), log)
    assert log.faults() == ()
    report_overlap(trained, (np.array([], np.uint64), sign([])), at("v"), log)
    assert log.faults() == ()


def test_duplicates_and_overlap_are_counted_with_their_first_rows():
    log = IssueLog()
    near = LONG.replace("eight", "seven")
    signatures = sign([LONG, OTHER, LONG, near])
    marks = np.array([1, 2, 1, 3], np.uint64)
    report_duplicates(marks, signatures, at("t"), log)
    held = np.array([2, 9], np.uint64), sign([OTHER, LONG.replace("nine", "ten")])
    report_overlap((marks, signatures), held, at("v"), log)
    assert {(f.kind, f.first_rows, f.action) for f in log.faults()} == {
        ("exact duplicate", ("t:3",), "kept"),
        ("near duplicate", ("t:4",), "kept"),
        ("held-out row is also in the training data", ("v:1",), "kept"),
        ("held-out row is nearly one of the training data", ("v:2",), "kept"),
    }
