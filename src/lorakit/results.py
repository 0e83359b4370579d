"""Results of plan, inspect and evaluate: records that print and display themselves.

In a terminal, a notebook and `print` each shows the same view; its data stays reachable.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Self

from rich.console import RenderableType

from lorakit.data.inspection import Inspection, Shown
from lorakit.display.console import Displayed
from lorakit.display.evaluation import evaluation_view
from lorakit.display.inspection import example_view, inspection_view
from lorakit.display.plan import plan_view
from lorakit.planning.forecast import Forecast
from lorakit.records import EvalResult


class Plan(Displayed, Forecast):
    """Whether a run fits, and what it takes; `as_dict()` has everything as plain values."""

    __slots__ = ()

    @classmethod
    def of(cls, found: Forecast) -> Self:
        """The same record, able to display itself."""
        return cls(**_values(found))

    def __rich__(self) -> RenderableType:
        return plan_view(self)


class InspectedExample(Displayed, Shown):
    """One example; trained tokens are between ⟦ and ⟧."""

    __slots__ = ()

    def __rich__(self) -> RenderableType:
        return example_view(self)


class Inspected(Displayed, Inspection):
    """What will be trained; `as_dict()` has everything as plain values."""

    __slots__ = ()

    @classmethod
    def of(cls, found: Inspection) -> Self:
        """The same record, able to display itself; so is each example in `shown`."""
        shown = tuple(InspectedExample(**_values(example)) for example in found.shown)
        return cls(**{**_values(found), "shown": shown})

    def __rich__(self) -> RenderableType:
        return inspection_view(self)


class Evaluation(Displayed, EvalResult):
    """Base against tuned; `as_dict()` has everything as plain values."""

    __slots__ = ()

    @classmethod
    def of(cls, found: EvalResult) -> Self:
        """The same record, able to display itself."""
        return cls(**_values(found))

    def __rich__(self) -> RenderableType:
        return evaluation_view(self)


def _values(record: Any) -> dict[str, Any]:
    return {f.name: getattr(record, f.name) for f in fields(record)}
