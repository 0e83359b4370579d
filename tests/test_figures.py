"""Figures are sound SVG that forges keep: no style, no script, everything escaped and inside."""

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from lorakit import figures

SHAPES = "{http://www.w3.org/2000/svg}"
MADE = {
    "bars": figures.bars("lengths", {"1-10": 3.0, "11-20": 0.0}, "rows"),
    "stacks": figures.stacks(
        "memory", {"LoRA": {"weights": 12.0, "rest": 1}, "QLoRA": {"rest": 2}}
    ),
    "limit": figures.stacks("memory", {"LoRA": {"weights": 12.0}}, limit=15),
    "curves": figures.curves("loss", {"a": [(1, 2.0), (2, 1.0)], "b": [(1, 3.0)]}, "step", "nats"),
    "log": figures.curves("rank", {"a": [(1, 2.0), (64, 1.0)]}, log_x=True, log_y=True, dots=True),
    "empty": figures.curves("nothing yet", {}),
    "tokens": figures.tokens(
        "row 1", [("<s>", False, True), ("a\nb ", False, False), ("c", True, False)]
    ),
}


def parsed(figure):
    return ElementTree.fromstring(figure._repr_svg_())


@pytest.mark.parametrize("name", MADE)
def test_a_figure_is_sound_and_has_nothing_a_forge_strips(name):
    root = parsed(MADE[name])
    assert root.tag == f"{SHAPES}svg"
    assert root.attrib.pop("style") == "max-width:100%;height:auto"  # fits a phone
    for element in root.iter():
        assert element.tag.removeprefix(SHAPES) in {"svg", "rect", "text", "polyline", "circle"}
        assert not {"style", "class", "href", "onload"} & set(element.attrib)
    assert root.get("viewBox") == f"0 0 {root.get('width')} {root.get('height')}"
    assert MADE[name].words in repr(MADE[name])


@pytest.mark.parametrize("name", MADE)
def test_nothing_is_drawn_outside(name):
    root = parsed(MADE[name])
    width, height = float(root.get("width")), float(root.get("height"))
    for element in root.iter(f"{SHAPES}polyline"):
        for x, y in re.findall(r"([-\d.]+),([-\d.]+)", element.get("points")):
            assert 0 <= float(x) <= width
            assert 0 <= float(y) <= height
    for element in root.iter(f"{SHAPES}text"):
        assert 0 <= float(element.get("x")) <= width
        assert 0 < float(element.get("y")) <= height


def test_a_figure_says_its_numbers_to_those_who_do_not_see_it():
    assert repr(MADE["bars"]) == "<figure: lengths: 1-10 3.00 rows; 11-20 0.00 rows>"
    assert repr(MADE["curves"]) == "<figure: loss: a from 2 to 1; b from 3 to 3>"
    assert "QLoRA 2.0 GiB (rest 2.00)" in repr(MADE["stacks"])
    assert parsed(MADE["bars"]).get("aria-label") == MADE["bars"].words


def test_bars_are_as_long_as_their_numbers():
    root = parsed(figures.bars("", {"a": 4.0, "b": 1.0}))
    lengths = [float(r.get("width")) for r in root.iter(f"{SHAPES}rect") if r.get("stroke")]
    assert lengths[0] == pytest.approx(4 * lengths[1], rel=0.01)


def test_parts_of_a_stack_follow_one_another():
    root = parsed(figures.stacks("", {"a": {"x": 1.0, "y": 3.0}}))
    first, second = [r for r in root.iter(f"{SHAPES}rect") if r.get("height") == "30.0"]
    assert float(second.get("x")) == pytest.approx(
        float(first.get("x")) + float(first.get("width")), abs=0.2
    )
    assert "4.0 GiB" in figures.stacks("", {"a": {"x": 1.0, "y": 3.0}}).svg


def test_a_falling_loss_falls_on_the_screen():
    root = parsed(figures.curves("", {"loss": [(0, 4.0), (1, 2.0), (2, 1.0)]}))
    points = [
        e.get("points") for e in root.iter(f"{SHAPES}polyline") if e.get("stroke-width") == "2.2"
    ]
    heights = [float(y) for _, y in re.findall(r"([-\d.]+),([-\d.]+)", points[0])]
    assert heights == sorted(heights)  # y grows downward in SVG


def test_a_loss_that_is_no_number_leaves_a_gap():
    figure = figures.curves("", {"loss": [(0, 4.0), (1, math.nan), (2, 1.0)]})
    assert "nan" not in figure.svg


@pytest.mark.parametrize(
    ("low", "high", "log", "expected"),
    [
        (0.0, 10.0, False, [0, 2, 4, 6, 8, 10]),
        (1.0, 64.0, True, [1, 10]),
        (1.0, 32.0, True, [1, 2, 4, 8, 16, 32]),
        (0.1, 0.3, False, [0.1, 0.15, 0.2, 0.25, 0.3]),
    ],
)
def test_ticks_are_round(low, high, log, expected):
    axis = figures._Axis(low, high, 0, 100, log)
    assert axis.ticks() == pytest.approx(expected)


def test_text_of_the_data_is_no_markup():
    nasty = "<script>alert(1)</script>&\x1b[31m"
    for figure in (
        figures.tokens(nasty, [(nasty, True, False)]),
        figures.bars(nasty, {nasty: 1.0}),
    ):
        assert "<script" not in figure.svg
        assert "\x1b" not in figure.svg
        parsed(figure)


def test_trained_tokens_are_told_apart_without_color():
    root = parsed(figures.tokens("", [("read", False, False), ("trained", True, False)]))
    assert len(list(root.iter(f"{SHAPES}polyline"))) == 1  # the line under the trained one


def test_long_text_is_broken_into_lines_and_line_ends_show():
    svg = figures.tokens(
        "", [("word ", False, False)] * 40 + [("end\n", True, False)], letters=40
    ).svg
    assert len(set(re.findall(r'y="(\d+\.\d)" font-size="14"', svg))) >= 5
    assert "↵" in svg
