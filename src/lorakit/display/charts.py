"""Line charts by matplotlib as SVG: text and axes in the color of the page around them.

380 units wide with letters of 12, so that a chart is readable on a phone and two fit side by side
on a screen. matplotlib takes 0.5 s to import, so it is imported when the first chart is drawn; its
`Figure` is used without pyplot, whose figures and backend belong to the user's own program.
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
# A curve of more points is drawn by the lowest and the highest of each stretch.
MAX_POINTS = 600
# Readable on white and on black. INK stands for the page's own color: it becomes currentColor.
INK, BLUE, ORANGE, RED = "#010203", "#2f7fd6", "#d9681c", "#e0453a"
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
_DRAWING = threading.Lock()  # rcParams belong to the process; a live curve draws in a thread


@dataclass(frozen=True, slots=True)
class Series:
    """Points in order of x; y is None where the value was not finite."""

    points: Sequence[Point]
    kind: Kind = "curve"
    label: str = ""


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawn chart. `description` has its numbers for those who do not see it."""

    svg: str
    description: str

    def __html__(self) -> str:
        """The SVG for a jinja2 template, which inserts it as it is."""
        return self.svg

    def __repr__(self) -> str:
        return f"<chart: {self.description}>"

    def _repr_svg_(self) -> str:
        return self.standalone()

    def standalone(self, title: str = "") -> str:
        """The SVG for a place without a page: with white ground, text color, size and title."""
        head = 24 if title else 0
        box = f'0 {-head} {WIDTH} {HEIGHT + head}"'
        svg = self.svg.replace(f'0 0 {WIDTH} {HEIGHT}"', f'{box} width="570" color="#1c1e21"', 1)
        ground = f'<rect y="{-head}" width="100%" height="100%" fill="#fff"/>'
        words = html.escape(visible(title))
        name = (
            f'<text x="8" y="-6" font-size="13" font-weight="600">{words}</text>' if title else ""
        )
        top, body = svg.split(">", 1)
        return f"{top}>{ground}{name}{body}"


def line_chart(name: str, series: Sequence[Series], zero: bool = False) -> Chart | None:
    """Draw `series` over the step; None where no value is finite.

    Args:
        zero: whether y starts at 0; otherwise a spike makes the axis logarithmic.
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
    """One line, or a pale one with its running mean where it would be a solid band."""
    if len(points) < 200:
        return [Series(points, label="each step")]
    mean = Series(running_mean(points), label="running mean")
    return [Series(points, "noisy", "each step"), mean]


def running_mean(points: Sequence[Point]) -> list[Point]:
    """The mean of each point and its neighbors on both sides, about a thirtieth of all."""
    x, y = _arrays(points)
    place, half = np.arange(len(y)), len(y) // 60
    finite = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    # As many on each side; towards the ends fewer, but more than one noisy point.
    near = np.maximum(np.minimum(half, np.minimum(place, place[::-1])), half // 4)
    first, last = np.maximum(0, place - near), np.minimum(len(y), place + near + 1)
    means = (sums[last] - sums[first]) / np.maximum(counts[last] - counts[first], 1)
    return [
        (a, float(b) if ok else None) for a, b, ok in zip(x.tolist(), means, finite, strict=True)
    ]


def thinned(x: NDArray[Any], y: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """All points, or the lowest and the highest of each stretch where there are too many."""
    if len(x) <= MAX_POINTS:
        return x, y
    kept: set[int] = set()
    size = math.ceil(2 * len(x) / MAX_POINTS)
    for begin in range(0, len(x), size):
        part = y[begin : begin + size]
        missing = np.isnan(part).all()
        ends = (0,) if missing else (int(np.nanargmin(part)), int(np.nanargmax(part)))
        kept.update(begin + place for place in ends)
    index = np.array(sorted(kept))
    return x[index], y[index]


def _arrays(points: Sequence[Point]) -> tuple[NDArray[Any], NDArray[Any]]:
    x = np.array([x for x, _ in points], dtype=float)
    return x, np.array([math.nan if y is None else y for _, y in points], dtype=float)


def _draw(series: Sequence[Series], zero: bool, description: str) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # The salt makes the file the same each time and its ids unique on a page of many charts.
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a matplotlibrc of the user would change the drawing
        matplotlib.rcParams.update({**_RC, "svg.hashsalt": description})
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
        axes = figure.add_axes((0.135, 0.12, 0.81, 0.74))
        for one in sorted(series, key=lambda one: list(_LOOKS).index(one.kind)):
            _plot(axes, one)
        _scale(axes, series, zero)
        axes.legend(
            loc="lower left", bbox_to_anchor=(-0.16, 1.04), ncols=4, frameon=False,
            borderpad=0, borderaxespad=0, handlelength=1.4, columnspacing=1.4,
        )  # fmt: skip
        target = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(target, metadata=nothing)
    return _cleaned(target.getvalue(), description)


def _plot(axes: Any, one: Series) -> None:
    x, y = thinned(*_arrays(one.points))
    finite = np.isfinite(np.concatenate([[math.nan], y, [math.nan]]))
    # A value between two that are missing makes no line.
    alone = np.flatnonzero(finite[1:-1] & ~finite[:-2] & ~finite[2:])
    dots = {"marker": ".", "markevery": alone.tolist(), "markersize": 7} if len(alone) else {}
    look = {**dots, **_LOOKS[one.kind]}
    if one.kind == "held":
        look["markevery"] = None
    label = one.label or "_"
    axes.plot(x, y, clip_on=False, label=label, gid=one.kind, solid_capstyle="round", **look)


def _scale(axes: Any, series: Sequence[Series], zero: bool) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

    xs = np.array([x for s in series for x, _ in s.points])
    ys = [y for s in series for _, y in s.points if y is not None]
    low, high = min(ys), max(ys)
    # One spike would press all else flat.
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
    """The `<svg>` element alone, shorter, in the page's color and font.

    Styles become attributes: websites that show notebooks strip `style`.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r' transform="rotate\(-0 [^"]*"', "", svg)
    svg = re.sub(r'style="([^"]*)"', lambda found: _attributes(found[1]), svg)
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
