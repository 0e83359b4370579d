"""Numbers become a chart that is well-formed, in bounds and honest about what is missing."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from lorakit.chart import (
    HEIGHT,
    MOST_POINTS,
    WIDTH,
    Series,
    alone,
    dense,
    line_chart,
    short,
    smoothed,
    thinned,
    ticks_between,
)

NAME = "{http://www.w3.org/2000/svg}"


def parsed(*series, zero=False):
    return ElementTree.fromstring(line_chart(series, "Loss <by> step", zero))


def places(root, kind):
    """All coordinates of the paths of one kind."""
    paths = [p.get("d") for p in root.iter(f"{NAME}path") if p.get("class") == kind]
    return [tuple(map(float, xy)) for d in paths for xy in re.findall(r"[ML]([\d.]+) ([\d.]+)", d)]


def test_a_line_rises_where_the_numbers_rise_and_stays_inside():
    root = parsed(Series([(1, 1.0), (2, 2.0), (3, 4.0)]))
    xs, ys = zip(*places(root, "main"), strict=True)
    assert list(xs) == sorted(xs)
    assert list(ys) == sorted(ys, reverse=True)
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in places(root, "main"))
    assert (ys[0] - ys[1]) * 2 == pytest.approx(ys[1] - ys[2], abs=0.3)


def test_the_axes_bear_round_numbers():
    root = parsed(Series([(1, 0.13), (60, 3.7)]), zero=True)
    texts = [t.text for t in root.iter(f"{NAME}text")]
    assert texts == ["0", "1", "2", "3", "1", "20", "40", "60"]
    assert root.find(f"{NAME}title").text == "Loss <by> step"


@pytest.mark.parametrize(
    "points",
    [
        [(5, 2.0)],
        [(1, 3.0), (2, 3.0), (3, 3.0)],
        [(1, 0.0), (2, 0.0)],
        [(1, None), (2, 1.0), (3, None)],
        [(1, 1e-30), (2, 1e30)],
        [(1, -5.0), (2, 1e9)],
        [(1, 1e-9), (2, 2e-9)],
    ],
)
@pytest.mark.parametrize("zero", [False, True])
def test_odd_numbers_still_give_a_chart(points, zero):
    root = parsed(Series(points), zero=zero)
    assert places(root, "main")
    assert "nan" not in ElementTree.tostring(root).decode()


def test_alone_it_has_a_ground_and_a_title():
    root = ElementTree.fromstring(alone(line_chart([Series([(1, 1.0), (2, 2.0)])], "x"), "<run>"))
    assert root.get("viewBox") == f"0 -24 {WIDTH} {HEIGHT + 24}"
    assert root.find(f"{NAME}rect").get("fill") == "#fff"
    assert "<run>" in [t.text for t in root.iter(f"{NAME}text")]


def test_no_number_at_all_gives_no_chart():
    assert line_chart([Series([(1, None)])], "x") == ""
    assert line_chart([], "x") == ""


def test_what_is_missing_breaks_the_line_and_is_marked():
    root = parsed(Series([(1, 1.0), (2, 2.0), (3, None), (4, 2.0), (5, 1.0)]))
    line = next(p.get("d") for p in root.iter(f"{NAME}path") if p.get("class") == "main")
    assert line.count("M") == 2
    (gap,) = [p.get("d") for p in root.iter(f"{NAME}path") if p.get("class") == "gap"]
    assert gap.count("M") == 1


def test_one_spike_does_not_press_the_rest_flat():
    calm = [(x, 1.0 + x / 100) for x in range(100)]
    root = parsed(Series([*calm, (100, 1e6)]))
    heights = [y for _, y in places(root, "main")]
    assert heights[0] - heights[99] > 5
    assert {"1", "1M"} <= {t.text for t in root.iter(f"{NAME}text")}


def test_many_points_keep_their_extremes():
    points = [(x, float(x % 7)) for x in range(50_000)]
    points[12_345] = (12_345, 99.0)
    found = thinned(points)
    assert len(found) <= MOST_POINTS + 2
    assert (12_345, 99.0) in found
    assert [x for x, _ in found] == sorted(x for x, _ in found)


def test_a_band_gets_a_mean():
    assert [s.kind for s in dense([(x, 1.0) for x in range(50)])] == ["main"]
    assert [s.kind for s in dense([(x, 1.0) for x in range(500)])] == ["raw", "main"]


def test_the_running_mean_is_that_of_both_sides():
    points = [(x, float(x)) for x in range(120)]
    assert smoothed(points) == points
    steep = [(x, 0.0 if x else 500.0) for x in range(600)]
    assert smoothed(steep)[0][1] == pytest.approx(500 / 3)
    points[60] = (60, 120.0)
    near = smoothed(points)
    assert near[60][1] == pytest.approx(60 + 60 / 5)
    points[60] = (60, None)
    assert smoothed(points)[60] == (60, None)
    assert smoothed(points)[61][1] == pytest.approx((59 + 61 + 62 + 63) / 4)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.25, "0.25"), (2e-4, "2e-4"), (1500, "1500"), (12_500, "12.5k"), (3.2e6, "3.2M")],
)
def test_numbers_are_short(value, text):
    assert short(value) == text


def test_ticks_are_round_and_inside():
    assert ticks_between(0.0, 1.0) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert ticks_between(-3, 7, 5, whole=True) == [-2.0, 0.0, 2.0, 4.0, 6.0]
    assert ticks_between(1, 3, 5, whole=True) == [1.0, 2.0, 3.0]
