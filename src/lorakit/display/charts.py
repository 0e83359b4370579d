"""Line charts as SVG by matplotlib, with text and axes in the color of the surrounding page.

Charts are 380 units wide with a font size of 12, so that one is readable on a phone and two fit
next to each other on a screen. matplotlib takes 0.5 s to import, so it is imported when the first
chart is drawn; `Figure` is used without pyplot, whose state belongs to the user's program.
"""

from __future__ import annotations

import html
import io
import math
import re
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lorakit.redact import visible

WIDTH, HEIGHT = 380, 210
# Longer curves are reduced to the lowest and the highest point of each segment.
MAX_POINTS = 600
# Readable on white and on black. INK is replaced by currentColor, the page's text color.
INK, BLUE, ORANGE, RED = "#010203", "#2f7fd6", "#d9681c", "#e0453a"
# Colors of the runs in one chart, in order; all readable on white and on black.
RUN_COLORS = (BLUE, ORANGE, "#2f9e5f", "#b65fc7", "#b08a00", "#1b9aaa", "#d6497f", "#7d8590")
Point = tuple[float, float | None]
Kind = Literal["curve", "noisy", "held", "bound"]
_LOOKS: dict[str, dict[str, Any]] = {
    "bound": {"color": INK, "linewidth": 1.2, "linestyle": (0, (4, 3)), "alpha": 0.6},
    "noisy": {"color": BLUE, "linewidth": 1, "alpha": 0.4},
    "curve": {"color": BLUE, "linewidth": 2},
    "held": {"color": ORANGE, "linewidth": 2, "marker": "o", "markersize": 4},
}
_RC = {
    "font.size": 12, "text.color": INK, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False,
    "axes.spines.left": False, "text.parse_math": False,
}  # fmt: skip
_DRAWING = threading.Lock()  # rcParams are global, and a live curve draws in a thread


@dataclass(frozen=True, slots=True)
class Series:
    """Points in order of x; y is None for values that were not finite.

    `color` replaces that of the kind, where several runs are in one chart.
    """

    points: Sequence[Point]
    kind: Kind = "curve"
    label: str = ""
    color: str | None = None


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawn chart; `description` is its text alternative for screen readers."""

    svg: str
    description: str

    def __html__(self) -> str:
        """Return the SVG for a jinja2 template, which inserts it unescaped."""
        return self.svg

    def __repr__(self) -> str:
        return f"<chart: {self.description}>"

    def _repr_svg_(self) -> str:
        return self.standalone()

    def standalone(self, title: str = "") -> str:
        """Return the SVG for use without a page: with background, text color, size and title."""
        head = 24 if title else 0
        box = f'0 {-head} {WIDTH} {HEIGHT + head}"'
        svg = self.svg.replace(f'0 0 {WIDTH} {HEIGHT}"', f'{box} width="570" color="#1c1e21"', 1)
        ground = f'<rect y="{-head}" width="100%" height="100%" fill="#fff"/>'
        label = html.escape(visible(title))
        name = (
            f'<text x="8" y="-6" font-size="13" font-weight="600">{label}</text>' if title else ""
        )
        top, body = svg.split(">", 1)
        return f"{top}>{ground}{name}{body}"


def line_chart(name: str, series: Sequence[Series], zero: bool = False) -> Chart | None:
    """Draw `series` over the step; return None if no value is finite.

    Args:
        zero: start y at 0; otherwise a spike makes the axis logarithmic.
    """
    values = [y for s in series if s.kind != "bound" for _, y in s.points if y is not None]
    if not values:
        return None
    description = f"{name} by step from {values[0]:.4g} to {values[-1]:.4g}"
    with _DRAWING, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        svg = _draw([s for s in series if s.points], zero, description)
    return Chart(svg, description)


def trend(points: Sequence[Point]) -> list[Series]:
    """Series of one line; for 200 points and more a pale line and its running mean."""
    if len(points) < 200:
        return [Series(points, label="each step")]
    mean = Series(running_mean(points), label="running mean")
    return [Series(points, "noisy", "each step"), mean]


def running_mean(points: Sequence[Point]) -> list[Point]:
    """Mean of each point and its neighbors on both sides, about a thirtieth of all points."""
    x, y = _arrays(points)
    index, half = np.arange(len(y)), len(y) // 60
    finite = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    # Symmetric windows that shrink towards the ends, but not to single noisy points.
    near = np.maximum(np.minimum(half, np.minimum(index, index[::-1])), half // 4)
    first, last = np.maximum(0, index - near), np.minimum(len(y), index + near + 1)
    means = (sums[last] - sums[first]) / np.maximum(counts[last] - counts[first], 1)
    return [
        (a, float(b) if ok else None) for a, b, ok in zip(x.tolist(), means, finite, strict=True)
    ]


def thinned(
    x: NDArray[Any], y: NDArray[Any], most: int = MAX_POINTS
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Reduce more than `most` points to the lowest and highest of each segment, and the ends."""
    if len(x) <= most:
        return x, y
    kept = {0, len(x) - 1}
    segment_size = math.ceil(2 * len(x) / (most - 2))
    for begin in range(0, len(x), segment_size):
        segment = y[begin : begin + segment_size]
        missing = np.isnan(segment).all()
        extremes = (0,) if missing else (int(np.nanargmin(segment)), int(np.nanargmax(segment)))
        kept.update(begin + offset for offset in extremes)
    index = np.array(sorted(kept))
    return x[index], y[index]


def _arrays(points: Sequence[Point]) -> tuple[NDArray[Any], NDArray[Any]]:
    x = np.array([x for x, _ in points], dtype=float)
    return x, np.array([math.nan if y is None else y for _, y in points], dtype=float)


def _draw(series: Sequence[Series], zero: bool, description: str) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # The salt makes the file reproducible, and its ids unique on a page with several charts.
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # ignore the user's matplotlibrc
        matplotlib.rcParams.update({**_RC, "svg.hashsalt": description})
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
        axes = figure.add_axes((0.135, 0.12, 0.81, 0.74))
        for line in sorted(series, key=lambda line: list(_LOOKS).index(line.kind)):
            _plot(axes, line)
        _scale(axes, series, zero)
        axes.legend(
            loc="lower left", bbox_to_anchor=(-0.16, 1.04), ncols=4, frameon=False,
            borderpad=0, borderaxespad=0, handlelength=1.4, columnspacing=1.4,
        )  # fmt: skip
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(buffer, metadata=no_metadata)
    return _cleaned(buffer.getvalue(), description)


def _plot(axes: Any, line: Series) -> None:
    x, y = thinned(*_arrays(line.points))
    finite = np.isfinite(np.concatenate([[math.nan], y, [math.nan]]))
    # A value between two missing ones has no line, so it gets a marker.
    alone = np.flatnonzero(finite[1:-1] & ~finite[:-2] & ~finite[2:])
    dots = {"marker": ".", "markevery": alone.tolist(), "markersize": 7} if len(alone) else {}
    look = {**dots, **_LOOKS[line.kind]} | ({"color": line.color} if line.color else {})
    if line.kind == "held":
        look["markevery"] = None
    label = line.label or "_"
    axes.plot(x, y, clip_on=False, label=label, gid=line.kind, solid_capstyle="round", **look)


def _scale(axes: Any, series: Sequence[Series], zero: bool) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

    xs = np.array([x for s in series for x, _ in s.points])
    ys = [y for s in series for _, y in s.points if y is not None]
    low, high = min(ys), max(ys)
    # One spike would flatten the rest of the curve.
    if not zero and low > 0 and high > 30 * sorted(ys)[len(ys) // 2]:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=5))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        axes.set_ylim(bottom=min(0.0, low) if zero else None)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.6g}"))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.9g}"))
    if xs.min() < xs.max():
        axes.set_xlim(xs.min(), xs.max())
    axes.tick_params(length=0)
    axes.grid(axis="y", color=INK, alpha=0.15, linewidth=0.8, clip_on=False)
    axes.spines["bottom"].set(color=INK, alpha=0.4)
    axes.patch.set_visible(False)
    axes.figure.patch.set_visible(False)
    missing = np.array([x for s in series for x, y in s.points if y is None])
    if len(missing):
        columns = np.unique((missing - xs.min()) // (np.ptp(xs) / 300 or 1), return_index=True)[1]
        axes.plot(
            missing[columns], np.zeros(len(columns)), "|", color=RED, markersize=12,
            markeredgewidth=2, transform=axes.get_xaxis_transform(), clip_on=False, gid="missing",
            label="no finite value",
        )  # fmt: skip


def _cleaned(svg: str, description: str) -> str:
    """Reduce matplotlib's output to a short `<svg>` element in the page's color and font.

    Styles become attributes, since websites that show notebooks remove `style`.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r' transform="rotate\(-0 [^"]*"', "", svg)
    svg = re.sub(r'style="([^"]*)"', lambda match: _attributes(match[1]), svg)
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), svg)
    svg = re.sub(r">\s+<", "><", svg.replace(INK, "currentColor").replace("<g id=", "<g class="))
    return svg.strip().replace(
        svg[: svg.index(">") + 1],
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{html.escape(description)}" xmlns="http://www.w3.org/2000/svg" '
        'xmlns:xlink="http://www.w3.org/1999/xlink" font-family="system-ui, sans-serif" '
        'fill="currentColor" stroke-linejoin="round">',
        1,
    )


def _attributes(style: str) -> str:
    pairs = (rule.split(": ", 1) for rule in style.split("; "))
    return " ".join(f'{name}="{value}"' for name, value in pairs if name != "font-family")
