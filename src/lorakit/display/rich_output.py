"""Convert a rich renderable to plain text, HTML, or the display of a notebook cell."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console, RenderableType
from rich.terminal_theme import TerminalTheme
from rich.text import Text

WIDTH = 100
# Readable on white and on black: HTML keeps the page's background and text color.
_GRAY = (115, 124, 138)
_COLORS = [_GRAY, (200, 60, 50), (15, 135, 75), (165, 110, 0), (47, 127, 214), (150, 90, 190),
           (20, 135, 150), _GRAY]  # fmt: skip
_THEME = TerminalTheme(_GRAY, _GRAY, _COLORS, _COLORS)
_CELL = (
    '<pre style="white-space: pre; overflow-x: auto; line-height: normal; '
    "font-family: Menlo, 'DejaVu Sans Mono', Consolas, monospace\">{code}</pre>"
)


class Displayed:
    """Base of records that print and display themselves with the `__rich__` of a subclass."""

    __slots__ = ()

    def __rich__(self) -> RenderableType:
        raise NotImplementedError

    def __repr__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_html(self, code_format=_CELL)


def bar_text(size: float, largest: float, width: int = 24) -> Text:
    """Draw a bar of `width` characters for `largest`; never empty for a size above 0."""
    letters = round(width * size / max(largest, 1))
    return Text("█" * letters or "▏" * (size > 0), style="cyan")


def as_text(view: Any, width: int = WIDTH) -> str:
    """Render as plain text without color."""
    console = _console(width)
    console.print(view)
    return console.export_text().rstrip("\n")


def as_html(view: Any, width: int = WIDTH, code_format: str = "{code}") -> str:
    """Render as escaped text with styled spans, for use in a `<pre>`."""
    console = _console(width)
    console.print(view)
    return console.export_html(theme=_THEME, code_format=code_format, inline_styles=True)


def _console(width: int) -> Console:
    # Without force_jupyter=False rich would display in a notebook instead of recording.
    return Console(
        record=True, file=io.StringIO(), width=width, force_jupyter=False,
        highlight=False, markup=False, emoji=False,
    )  # fmt: skip
