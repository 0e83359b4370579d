"""What plan, inspect and evaluate found enters; the same leaves, able to show itself.

On a terminal it prints as the commands do, in a notebook as a page would. All of it stays
reachable as data: each is still the record it was made of.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Self

from rich.console import Console

from lorakit.data.inspection import Inspection
from lorakit.data.page import cell as inspection_cell
from lorakit.data.show import show_inspection
from lorakit.page import fragment
from lorakit.planning.forecast import Forecast
from lorakit.planning.page import cell as plan_cell
from lorakit.planning.show import show_forecast
from lorakit.records import EvalResult
from lorakit.report.answers import STYLE, scores

WIDTH = 100


class Plan(Forecast):
    """Whether a run fits, and what it takes; `as_dict()` has everything as plain values."""

    __slots__ = ()

    @classmethod
    def of(cls, found: Forecast) -> Self:
        """The same, able to show itself."""
        return cls(**_values(found))

    def __repr__(self) -> str:
        return as_text(show_forecast, self)

    def _repr_html_(self) -> str:
        return plan_cell(self)


class Inspected(Inspection):
    """What will be trained; `as_dict()` has everything as plain values."""

    __slots__ = ()

    @classmethod
    def of(cls, found: Inspection) -> Self:
        """The same, able to show itself."""
        return cls(**_values(found))

    def __repr__(self) -> str:
        return as_text(show_inspection, self)

    def _repr_html_(self) -> str:
        return inspection_cell(self)


class Evaluation(EvalResult):
    """Base against tuned; `as_dict()` has everything as plain values."""

    __slots__ = ()

    @classmethod
    def of(cls, found: EvalResult) -> Self:
        """The same, able to show itself."""
        return cls(**_values(found))

    def __repr__(self) -> str:
        from lorakit.evaluate import show  # costs torch

        return as_text(show, self)

    def _repr_html_(self) -> str:
        return fragment(scores(self.as_dict()), STYLE)


def as_text(show: Callable[[Any, Console], None], value: Any) -> str:
    """What `show` prints of `value`, without color."""
    # In a notebook rich would show HTML instead of writing into the buffer.
    console = Console(
        file=io.StringIO(), width=WIDTH, highlight=False, color_system=None, force_jupyter=False
    )
    show(value, console)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text.rstrip("\n")


def _values(record: Any) -> dict[str, Any]:
    return {f.name: getattr(record, f.name) for f in fields(record)}
