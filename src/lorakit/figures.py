"""Numbers enter; figures leave that a notebook, a forge or a browser shows: SVG, no dependency.

Forges strip styles and scripts from what a notebook shows, and keep an SVG with attributes: so
colors are attributes here, the ground is painted (dark pages), and letters are large enough to be
read when a phone halves the width.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lorakit.chart import short, ticks_between
from lorakit.data.inspection import visible

INK, SOFT, LINE, PAPER = "#1c1e21", "#5b6472", "#d8dce2", "#ffffff"
# Told apart in gray and by color-blind readers too.
COLORS = ("#1d4ed8", "#c2410c", "#0a6b35", "#7a3e9d", "#b45309", "#475569")
WIDTH = 640
# The one style: a page narrower than that shrinks it. Where it is stripped nothing is lost.
FITTED = 'style="max-width:100%;height:auto"'
LETTER = 8.4  # width of a monospaced letter of 14 px

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Figure:
    """One picture; a notebook shows it by itself. `words` is what a screen reader says."""

    words: str
    svg: str

    def _repr_svg_(self) -> str:
        return self.svg

    def __repr__(self) -> str:
        return f"<figure: {self.words}>"


def figure(title: str, height: float, body: Iterable[str], told: Iterable[str] = ()) -> Figure:
    """A frame with its title around shapes drawn by the functions here.

    Args:
        told: what the shapes say, for those who do not see them.
    """
    words = ": ".join([title, *filter(None, ["; ".join(told)])])
    size = f'width="{WIDTH:g}" height="{height:g}" viewBox="0 0 {WIDTH:g} {height:g}"'
    head = text(20, 28, title, size=16, bold=True) if title else ""
    return Figure(
        words,
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {FITTED} role="img" '
        f'aria-label="{_escape(words)}" font-family="system-ui, Helvetica, Arial, sans-serif">'
        f'<rect width="100%" height="100%" rx="8" fill="{PAPER}"/>{head}{"".join(body)}</svg>',
    )


def text(
    x: float,
    y: float,
    words: str,
    color: str = INK,
    size: float = 14,
    anchor: str = "start",
    bold: bool = False,
    mono: bool = False,
) -> str:
    """Words with their baseline at (x, y)."""
    weight = ' font-weight="600"' if bold else ""
    family = ' font-family="ui-monospace, Menlo, DejaVu Sans Mono, monospace"' if mono else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" fill="{color}" '
        f'text-anchor="{anchor}"{weight}{family}>{_escape(words)}</text>'
    )


def box(
    x: float,
    y: float,
    width: float,
    height: float,
    color: str,
    label: str = "",
    filled: bool = True,
) -> str:
    """A rectangle; filled with a pale wash of `color`, or solid where it has no label."""
    wash = f'fill-opacity="{0.12 if label else 0.85}"' if filled else 'fill-opacity="0"'
    shape = (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{height:.1f}" '
        f'rx="2" fill="{color}" {wash} stroke="{color}" stroke-width="1.2"/>'
    )
    middle = text(x + width / 2, y + height / 2 + 5, label, color, anchor="middle", bold=True)
    return shape + (middle if label else "")


def line(points: Sequence[Point], color: str = SOFT, width: float = 2, dashed: bool = False) -> str:
    """A line through `points`."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashes = ' stroke-dasharray="5 4"' if dashed else ""
    return (
        f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width:g}" '
        f'stroke-linejoin="round"{dashes}/>'
    )


def arrow(begin: Point, end: Point, color: str = SOFT) -> str:
    """A line with a head at `end`."""
    angle = math.atan2(end[1] - begin[1], end[0] - begin[0])
    wings = [
        (end[0] - 9 * math.cos(angle + turn), end[1] - 9 * math.sin(angle + turn))
        for turn in (0.45, -0.45)
    ]
    return line([begin, end], color) + line([wings[0], end, wings[1]], color)


def bars(title: str, rows: Mapping[str, float], unit: str = "", digits: int = 2) -> Figure:
    """One horizontal bar for each name, its number beside it."""
    most = max(rows.values(), default=0) or 1
    left = 28 + 7.3 * max(len(name) for name in rows)
    room = WIDTH - left - 110
    body = []
    for number, (name, value) in enumerate(rows.items()):
        y = 46 + 30 * number
        width = room * value / most
        body.append(text(left - 10, y + 15, name, SOFT, anchor="end"))
        body.append(box(left, y, width, 20, COLORS[0]))
        body.append(text(left + width + 8, y + 15, f"{value:,.{digits}f} {unit}".strip()))
    told = (f"{name} {value:,.{digits}f} {unit}".strip() for name, value in rows.items())
    return figure(title, 58 + 30 * len(rows), body, told)


def stacks(
    title: str, columns: Mapping[str, Mapping[str, float]], unit: str = "GiB", limit: float = 0
) -> Figure:
    """For each name a horizontal bar made of its parts; `limit` is drawn across all of them."""
    parts = list(dict.fromkeys(part for column in columns.values() for part in column))
    totals = {name: sum(column.values()) for name, column in columns.items()}
    left = 28 + 7.3 * max(len(name) for name in columns)
    scale = (WIDTH - left - 90) / max(*totals.values(), limit, 1e-9)
    body = []
    for number, (name, column) in enumerate(columns.items()):
        x, y = left, 50 + 44 * number
        body.append(text(left - 10, y + 21, name, SOFT, anchor="end"))
        for part, value in column.items():
            color = COLORS[parts.index(part) % len(COLORS)]
            body.append(box(x, y, value * scale, 30, color))
            x += value * scale
        body.append(text(x + 8, y + 21, f"{totals[name]:.1f} {unit}", bold=True))
    bottom = 50 + 44 * len(columns)
    if limit:
        x = left + limit * scale
        body.append(line([(x, 42), (x, bottom)], INK, 1.5, dashed=True))
        body.append(text(x, bottom + 16, f"{limit:g} {unit}", anchor="middle"))
        bottom += 20
    for number, part in enumerate(parts):
        y = bottom + 14 + 24 * number
        most = max(column.get(part, 0.0) for column in columns.values())
        body.append(box(28, y, 14, 14, COLORS[number % len(COLORS)]))
        body.append(text(50, y + 12, f"{part}: {most:.2f} {unit}", SOFT))
    told = (
        f"{name} {totals[name]:.1f} {unit} ("
        + ", ".join(f"{part} {value:.2f}" for part, value in column.items())
        + ")"
        for name, column in columns.items()
    )
    return figure(title, bottom + 24 * len(parts) + 22, body, told)


def curves(
    title: str,
    series: Mapping[str, Sequence[Point]],
    x_label: str = "",
    y_label: str = "",
    log_x: bool = False,
    log_y: bool = False,
    dots: bool = False,
    low: float | None = None,
) -> Figure:
    """Lines through points, with axes, round ticks and names at the side.

    Args:
        dots: mark each point; for few of them.
        low: where the y axis begins at the latest; by default at the least value.
    """
    finite = {
        name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in series.items()
    }
    every = [point for points in finite.values() for point in points] or [(0.0, 0.0)]
    left, top, right, bottom = 66.0, 60.0, WIDTH - 24.0, 320.0
    across = _Axis.over([x for x, _ in every], left, right, log_x)
    ys = [y for _, y in every] + ([low] if low is not None else [])
    up = _Axis.over(ys, bottom, top, log_y)
    body = [text(left, 50, y_label, SOFT, 13)]
    for value in up.ticks():
        y = up.at(value)
        body.append(line([(left, y), (right, y)], LINE, 1))
        body.append(text(left - 8, y + 5, short(value), SOFT, 13, "end"))
    body += [
        text(across.at(value), bottom + 20, short(value), SOFT, 13, "middle")
        for value in across.ticks()
    ]
    body.append(line([(left, bottom), (right, bottom)], SOFT, 1))
    body.append(text((left + right) / 2, bottom + 42, x_label, SOFT, 13, "middle"))
    for number, points in enumerate(finite.values()):
        color = COLORS[number % len(COLORS)]
        placed = [(across.at(x), up.at(y)) for x, y in points]
        body.append(line(placed, color, 2.2))
        if dots:
            body += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"/>' for x, y in placed]
    told = [
        f"{name} from {short(points[0][1])} to {short(points[-1][1])}"
        for name, points in finite.items()
        if points
    ]
    body += _legend(series, bottom + 66)
    return figure(title, bottom + 58 + 22 * len(series), body, told)


def _legend(names: Iterable[str], y: float) -> list[str]:
    made = []
    for number, name in enumerate(names):
        color = COLORS[number % len(COLORS)]
        at = y + 22 * number
        made.append(line([(66, at - 5), (90, at - 5)], color, 3))
        made.append(text(98, at, name, SOFT, 13))
    return made


@dataclass(frozen=True, slots=True)
class _Axis:
    """Values from `low` to `high` laid out from pixel `begin` to pixel `end`."""

    low: float
    high: float
    begin: float
    end: float
    log: bool

    @classmethod
    def over(cls, values: Sequence[float], begin: float, end: float, log: bool) -> _Axis:
        values = [v for v in values if not log or v > 0] or [1.0]
        low, high = min(values), max(values)
        if not log:
            room = (high - low) * 0.02 or abs(high) * 0.1 or 1.0
            low, high = (low if low == 0 else low - room), high + room
        elif low == high:
            low, high = low / 2, high * 2
        return cls(low, high, begin, end, log)

    def at(self, value: float) -> float:
        """The pixel of a value."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = (math.log(max(v, 1e-300)) for v in (value, low, high))
        share = (value - low) / (high - low)
        return self.begin + (self.end - self.begin) * share

    def ticks(self) -> list[float]:
        """About five round numbers."""
        if self.log:
            base = 10.0 if self.high / self.low > 50 else 2.0
            first, last = math.log(self.low, base), math.log(self.high, base)
            step = max(1, math.ceil((last - first) / 7))
            powers = range(math.ceil(first - 1e-9), math.floor(last + 1e-9) + 1, step)
            return [base**power for power in powers]
        return ticks_between(self.low, self.high, 5)


def tokens(title: str, pieces: Iterable[tuple[str, bool, bool]], letters: int = 70) -> Figure:
    """Text as a model sees it: (piece, trained, special); trained ones colored and underlined.

    Args:
        letters: of a line; a line end in the text ends the line and shows as a sign too.
    """
    body: list[str] = []
    column, row = 0, 0
    for words, trained, special in pieces:
        color = COLORS[2] if trained else (COLORS[3] if special else SOFT)
        for part in _lines(words):
            if column + len(part.rstrip("\n")) > letters:
                column, row = 0, row + 1
            shown = part.replace("\n", "↵")
            body.append(_token(shown, column, row, color, trained))
            column += len(shown)
            if part.endswith("\n"):
                column, row = 0, row + 1
    row += column > 0
    y = 62 + 27 * row
    key = [("trained", COLORS[2]), ("read only", SOFT), ("special", COLORS[3])]
    body += [
        text(20 + 110 * n, y, name, color, 13, bold=True) for n, (name, color) in enumerate(key)
    ]
    return figure(title, y + 16, body)


def _token(words: str, column: int, row: int, color: str, trained: bool) -> str:
    x, y, width = 20 + LETTER * column, 60 + 27 * row, LETTER * len(words)
    ground = (
        f'<rect x="{x:.1f}" y="{y - 15:.1f}" width="{width:.1f}" height="21" fill="{color}" '
        f'fill-opacity="{0.14 if trained else 0.05}" stroke="{PAPER}" stroke-width="1"/>'
    )
    under = line([(x, y + 5), (x + width, y + 5)], color, 1.5) if trained else ""
    # Blanks at the ends would be dropped and the letters set in another font's width.
    kept = words.replace(" ", "\u00a0")
    return (
        ground
        + under
        + (
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="14" fill="{color}" textLength="{width:.1f}" '
            f'lengthAdjust="spacingAndGlyphs" font-family="ui-monospace, Menlo, DejaVu Sans Mono, '
            f'monospace">{_escape(kept)}</text>'
        )
    )


def _lines(words: str) -> list[str]:
    return [part for part in words.splitlines(keepends=True) if part]


def _escape(words: str) -> str:
    return html.escape(visible(words))
