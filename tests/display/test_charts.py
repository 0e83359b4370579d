"""Charts have every series and every gap, are byte-stable SVG, and take the page's colors."""

import math
import re
import subprocess
import sys
import threading
import xml.etree.ElementTree as ElementTree

import pytest

from lorakit.display.charts import (
    HEIGHT,
    MAX_POINTS,
    WIDTH,
    Series,
    line_chart,
    running_mean,
    thinned,
    trend,
)

SVG = "{http://www.w3.org/2000/svg}"
FALLING = [(step, 4.0 / step) for step in range(1, 9)]
FULL = [
    Series([(s, 4 + math.sin(s)) for s in range(300)], "noisy"),
    Series(FALLING, "curve", "running mean"),
    Series([(2, 2.0), (8, 0.7)], "held", "held out"),
    Series([(1, 1.0), (8, 1.0)], "bound", "the plan"),
]


def parsed(*series, zero=False):
    return ElementTree.fromstring(line_chart("Loss", series, zero).svg)


def places(root, kind):
    """All coordinates of the lines of one kind, in order."""
    (group,) = [g for g in root.iter(f"{SVG}g") if g.get("class") == kind]
    path = group.find(f"{SVG}path").get("d")
    return [tuple(map(float, xy)) for xy in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path)]


def texts(root):
    return [t.text for t in root.iter(f"{SVG}text")]


def test_a_line_rises_with_the_values_and_stays_inside():
    root = parsed(Series([(1, 1.0), (2, 2.0), (3, 4.0)]))
    xs, ys = zip(*places(root, "curve"), strict=True)
    assert list(xs) == sorted(xs)
    assert list(ys) == sorted(ys, reverse=True)
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in zip(xs, ys, strict=True))
    assert (ys[0] - ys[1]) * 2 == pytest.approx(ys[1] - ys[2], abs=0.3)


def test_every_series_is_drawn_and_named():
    root = parsed(*FULL)
    for series in FULL:
        drawn = len(places(root, series.kind))  # less those on a straight line of others
        assert 0.9 * len(series.points) <= drawn <= len(series.points)
        assert series.label in ["", *texts(root)]


def test_text_and_axes_have_the_color_of_the_page():
    root = parsed(*FULL)
    assert {t.get("fill") for t in root.iter(f"{SVG}text")} == {"currentColor"}
    colors = {e.get(name) for e in root.iter() for name in ("stroke", "fill")} - {None, "none"}
    assert colors == {"currentColor", "#2f7fd6", "#d9681c"}  # no black, no white ground


def test_nothing_is_fetched_run_or_stripped():
    svg = line_chart("Loss", FULL).svg
    assert not re.search(r"<style|style=|<script|<metadata|url\(|clip-path|<!", svg)
    assert set(re.findall(r'href="(.)', svg)) == {"#"}
    assert re.findall(r"https?://[^\"]+", svg) == [
        "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink",
    ]  # fmt: skip


def test_the_same_numbers_give_the_same_bytes_also_in_another_process():
    code = "from tests.display.test_charts import *; print(line_chart('Loss', FULL).svg, end='')"
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert line_chart("Loss", FULL).svg == line_chart("Loss", FULL).svg == other.stdout


def test_settings_of_the_users_own_matplotlib_are_neither_used_nor_changed():
    import matplotlib

    plain = line_chart("Loss", FULL).svg
    with matplotlib.rc_context({"lines.linewidth": 9, "axes.facecolor": "red", "font.size": 30}):
        assert line_chart("Loss", FULL).svg == plain
        assert matplotlib.rcParams["font.size"] == 30
    assert "matplotlib.pyplot" not in sys.modules


def test_threads_draw_at_the_same_time():
    plain, drawn = line_chart("Loss", FULL).svg, []
    threads = [
        threading.Thread(target=lambda: drawn.append(line_chart("Loss", FULL).svg))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert drawn == [plain] * 4


def test_ids_of_two_charts_on_a_page_differ():
    ids = [re.findall(r' id="([^"]+)"', line_chart(name, FULL).svg) for name in ("Loss", "Norm")]
    assert ids[0]
    assert not set(ids[0]) & set(ids[1])
    assert len(set(ids[0])) == len(ids[0])


def test_the_axes_have_round_numbers():
    assert texts(parsed(Series([(1, 0.13), (60, 3.7)]), zero=True)) == [
        "20", "40", "60", "0", "1", "2", "3",
    ]  # fmt: skip
    assert "0.0001" in texts(parsed(Series([(1, 5e-5), (60, 1e-4)]), zero=True))
    assert "20,000" in texts(parsed(Series([(1, 1.0), (20_000, 2.0)])))


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
        [(0, 1e100), (2**53 - 1, -1e100)],
        [(1, 5e-324), (2, 1.0)],
    ],
)
@pytest.mark.parametrize("zero", [False, True])
def test_odd_numbers_still_give_a_chart(points, zero):
    root = parsed(Series(points), zero=zero)
    drawn = ElementTree.tostring(root).decode()
    assert 'class="curve"' in drawn
    assert "nan" not in drawn
    assert "inf" not in drawn.replace("no finite value", "")


def test_no_value_at_all_gives_no_chart():
    assert line_chart("x", [Series([(1, None)])]) is None
    assert line_chart("x", [Series([]), Series([(1, 2.0), (2, 2.0)], "bound")]) is None


def test_a_missing_value_breaks_the_line_and_is_marked():
    root = parsed(Series([(1, 1.0), (2, 2.0), (3, None), (4, 2.0), (5, None), (6, 1.0), (7, 1.0)]))
    line, mark = (
        [g for g in root.iter(f"{SVG}g") if g.get("class") == kind] for kind in ("curve", "missing")
    )
    assert line[0].find(f"{SVG}path").get("d").count("M") == 3
    assert len(list(line[0].iter(f"{SVG}use"))) == 1  # the value alone between two is a dot
    assert len(list(mark[0].iter(f"{SVG}use"))) == 2
    assert "no finite value" in texts(root)


def test_one_spike_does_not_press_the_rest_flat():
    calm = [(x, 1.0 + x / 100) for x in range(100)]
    root = parsed(Series([*calm, (100, 1e6)]))
    heights = [y for _, y in places(root, "curve")]
    assert heights[0] - heights[-2] > 5
    assert {"1", "10,000"} <= set(texts(root))


def test_many_points_keep_their_extremes_and_a_small_file():
    points = [(x, float(x % 7) + 1) for x in range(50_000)]
    points[12_345] = (12_345, 20.0)
    points[20_000:20_400] = [(x, None) for x in range(20_000, 20_400)]
    x, y = thinned(*map(list_to_array, zip(*points, strict=True)))
    assert len(x) <= MAX_POINTS + 2
    assert (12_345, 20.0) in set(zip(x, y, strict=True))
    assert list(x) == sorted(x)
    svg = line_chart("Loss", trend(points)).svg
    assert len(svg) < 40_000
    assert svg.count("<use") < 20  # one mark a pixel, not one a step


def list_to_array(values):
    import numpy as np

    return np.array([math.nan if v is None else v for v in values])


def test_a_band_gets_a_mean():
    assert [s.kind for s in trend([(x, 1.0) for x in range(50)])] == ["curve"]
    assert [s.kind for s in trend([(x, 1.0) for x in range(500)])] == ["noisy", "curve"]


def test_the_running_mean_is_that_of_both_sides():
    points = [(x, float(x)) for x in range(120)]
    assert running_mean(points) == points
    steep = [(x, 0.0 if x else 500.0) for x in range(600)]
    assert running_mean(steep)[0][1] == pytest.approx(500 / 3)
    points[60] = (60, 120.0)
    assert running_mean(points)[60][1] == pytest.approx(60 + 60 / 5)
    points[60] = (60, None)
    assert running_mean(points)[60] == (60, None)
    assert running_mean(points)[61][1] == pytest.approx((59 + 61 + 62 + 63) / 4)


def test_without_a_page_it_has_a_ground_a_title_and_says_its_numbers():
    chart = line_chart("Loss", [Series(FALLING)])
    root = ElementTree.fromstring(chart.standalone("<run>\x1b $x$"))
    assert root.get("viewBox") == f"0 -24 {WIDTH} {HEIGHT + 24}"
    assert root.get("color") == "#1c1e21"
    assert root.find(f"{SVG}rect").get("fill") == "#fff"
    assert "<run>\\x1b $x$" in texts(root)
    assert ElementTree.fromstring(chart._repr_svg_()).get("viewBox") == f"0 0 {WIDTH} {HEIGHT}"
    assert root.get("aria-label") == "Loss by step from 4 to 0.5"
    assert repr(chart) == "<chart: Loss by step from 4 to 0.5>"
