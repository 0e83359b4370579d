"""Series of numbers enter; one line chart leaves as SVG text, with axes that can be read.

Drawn 380 wide with letters of 12, so that a chart on a phone and two abreast on a screen are both
legible. Colors come from the page's style; where styles are stripped, attributes stand in.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

WIDTH, HEIGHT = 380, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 12, 26
# More points than this are drawn as the range that each pixel column covers.
MOST_POINTS = 2 * (WIDTH - LEFT - RIGHT)
Point = tuple[float, float | None]
Kind = Literal["main", "raw", "held", "bound"]
_LOOKS = {
    "main": 'stroke="#1f5fae" stroke-width="2"',
    "raw": 'stroke="#1f5fae" stroke-width="1" stroke-opacity=".35"',
    "held": 'stroke="#b4540a" stroke-width="2"',
    "bound": 'stroke="#667085" stroke-width="1.2" stroke-dasharray="5 4"',
}


@dataclass(frozen=True, slots=True)
class Series:
    """Points in order of x; y is None where there was no finite number."""

    points: Sequence[Point]
    kind: Kind = "main"
    name: str = ""


@dataclass(frozen=True, slots=True)
class Axis:
    """What values of y lie where: linear from `low` to `high`, or their logarithms."""

    low: float
    high: float
    log: bool = False
    ticks: tuple[float, ...] = field(default=())

    def at(self, value: float) -> float:
        """Place of a value, 0 to 1, kept inside."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, low))
        return min(1.0, max(0.0, (value - low) / (high - low)))


def line_chart(series: Sequence[Series], label: str, zero: bool = False) -> str:
    """One chart as an `<svg>` element.

    Args:
        label: what it shows, for readers who hear it.
        zero: whether y begins at 0.
    """
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points if y is not None]
    if not ys:
        return ""
    across, up = _steps(min(xs), max(xs)), _values(ys, zero)
    body = [*_grid(across, up)]
    order: tuple[Kind, ...] = ("bound", "raw", "main", "held")
    body += [_line(s, across, up) for kind in order for s in series if s.kind == kind]
    body += [_gaps(s, across) for s in series if s.kind in ("main", "raw")]
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'xmlns="http://www.w3.org/2000/svg" font-family="system-ui, sans-serif" font-size="12">'
        f"<title>{html.escape(label)}</title>{''.join(body)}</svg>"
    )


def alone(chart: str, title: str) -> str:
    """A chart for a place without a page around it: its own ground, size and title."""
    head, body = chart.split(">", 1)
    top = f"0 -24 {WIDTH} {HEIGHT + 24}"
    head = head.replace(f"0 0 {WIDTH} {HEIGHT}", top)
    ground = f'<rect x="0" y="-24" width="{WIDTH}" height="{HEIGHT + 24}" fill="#fff"/>'
    words = f'<text x="6" y="-6" font-weight="600" fill="#1c1e21">{html.escape(title)}</text>'
    return f'{head} width="570">{ground}{words}{body}'


def smoothed(points: Sequence[Point]) -> list[Point]:
    """The mean of each point and its neighbors on both sides, about a thirtieth of all."""
    half = len(points) // 60
    sums, counts = [0.0], [0]
    for _, y in points:
        sums.append(sums[-1] + (y or 0.0))
        counts.append(counts[-1] + (y is not None))
    found: list[Point] = []
    for place, (x, y) in enumerate(points):
        # As many on each side; towards the ends fewer, but more than one noisy point.
        near = max(min(half, place, len(points) - 1 - place), half // 4)
        first, last = max(0, place - near), min(len(points), place + near + 1)
        count = counts[last] - counts[first]
        found.append((x, None if y is None else (sums[last] - sums[first]) / count))
    return found


def dense(points: Sequence[Point]) -> list[Series]:
    """One line, or a pale one with its running mean where it would be a solid band."""
    if len(points) < 200:
        return [Series(points)]
    return [Series(points, "raw"), Series(smoothed(points))]


def short(value: float) -> str:
    """A number in the few letters that an axis has room for."""
    if value == 0:
        return "0"
    size = abs(value)
    for bound, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= bound:
            return f"{value / (1e3 if letter == 'k' else bound):.4g}{letter}"
    if size >= 0.01:
        return f"{value:.4g}"
    head, _, power = f"{value:.2e}".partition("e")
    return f"{float(head):g}e{int(power)}"


def ticks_between(low: float, high: float, count: int = 4, whole: bool = False) -> list[float]:
    """Round numbers from `low` to `high`, about `count` of them.

    Args:
        whole: whether fractions of one are no numbers here.
    """
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    steps = (unit * m for m in ((1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)))
    step = next(s for s in steps if s >= rough * 0.999)
    step = max(step, 1.0) if whole else step
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [float(f"{n * step:.12g}") for n in range(first, last + 1)]


def _steps(low: float, high: float) -> Axis:
    if low == high:
        return Axis(low - 0.5, high + 0.5, ticks=(low,))
    ticks = ticks_between(low, high, 5, whole=True)
    if ticks and ticks[0] - low > 0.1 * (high - low):
        ticks.insert(0, low)
    return Axis(low, high, ticks=tuple(ticks))


def _values(ys: Sequence[float], zero: bool) -> Axis:
    low, high = min(ys), max(ys)
    middle = sorted(ys)[len(ys) // 2]
    # One spike would press all else flat.
    if not zero and low > 0 and high > 30 * middle:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        every = math.ceil(len(powers) / 5)
        ticks = tuple(10.0**p for p in powers)[::every]
        return Axis(10.0 ** powers[0], 10.0 ** powers[-1], True, ticks)
    low = min(0.0, low) if zero else low
    room = (high - low) or abs(high) or 1.0
    low = low if zero and low == 0 else low - 0.06 * room
    high += 0.06 * room
    return Axis(low, high, ticks=tuple(ticks_between(low, high)))


def _x(axis: Axis, value: float) -> float:
    return LEFT + axis.at(value) * (WIDTH - LEFT - RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - axis.at(value) * (HEIGHT - TOP - BOTTOM)


def _grid(across: Axis, up: Axis) -> list[str]:
    end, floor = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for tick in up.ticks:
        y = _y(up, tick)
        parts.append(
            f'<path class="grid" stroke="#d8dce2" d="M{LEFT} {y:.1f}H{end}"/>'
            f'<text class="tick" fill="#667085" text-anchor="end" x="{LEFT - 6}" '
            f'y="{y + 4:.1f}">{short(tick)}</text>'
        )
    for tick in across.ticks:
        x = _x(across, tick)
        side = "end" if x > end - 12 else "middle"
        parts.append(
            f'<path class="grid" stroke="#98a1ae" d="M{x:.1f} {floor}v4"/>'
            f'<text class="tick" fill="#667085" text-anchor="{side}" x="{x:.1f}" '
            f'y="{floor + 17}">{short(tick)}</text>'
        )
    parts.append(f'<path class="axis" stroke="#98a1ae" d="M{LEFT} {floor}H{end}"/>')
    return parts


def _line(series: Series, across: Axis, up: Axis) -> str:
    look = f'class="{series.kind}" fill="none" stroke-linejoin="round" {_LOOKS[series.kind]}'
    path, pen, dots = [], "M", []
    points = thinned(series.points)
    for number, (x, y) in enumerate(points):
        if y is None:
            pen = "M"
            continue
        place = f"{_x(across, x):.1f} {_y(up, y):.1f}"
        alone = pen == "M" and (number + 1 == len(points) or points[number + 1][1] is None)
        if series.kind == "held" or alone:
            dots.append(place)
        path.append(f"{pen}{place}")
        pen = "L"
    # A line of no length with round ends is a dot.
    ends = "".join(f"M{place}h0" for place in dots)
    drawn = f'<path {look} d="{"".join(path)}"/>'
    wide = f'<path {look.replace("stroke-width", "data-width")} stroke-width="6" '
    return drawn + (f'{wide}stroke-linecap="round" d="{ends}"/>' if dots else "")


def thinned(points: Sequence[Point]) -> list[Point]:
    """All points, or the lowest and the highest of each stretch where there are too many."""
    if len(points) <= MOST_POINTS:
        return list(points)
    size = math.ceil(2 * len(points) / MOST_POINTS)
    found: list[Point] = []
    for begin in range(0, len(points), size):
        part = [p for p in points[begin : begin + size] if p[1] is not None]
        if not part:
            found.append((points[begin][0], None))
            continue
        ends = {min(part, key=lambda p: p[1] or 0.0), max(part, key=lambda p: p[1] or 0.0)}
        found += sorted(ends)
    return found


def _gaps(series: Series, across: Axis) -> str:
    """A mark at the foot of the chart where there was no finite number."""
    foot = HEIGHT - BOTTOM
    marks = "".join(f"M{_x(across, x):.1f} {foot}v-7" for x, y in series.points if y is None)
    return f'<path class="gap" stroke="#b42318" stroke-width="2.5" d="{marks}"/>' if marks else ""
