"""Render the jinja2 templates; every value is escaped, control characters are visible."""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from starlette.responses import HTMLResponse

from lorakit.redact import visible
from lorakit.report.tables import duration


def html_page(template: str, status: int = 200, refresh: int = 0, **values: Any) -> HTMLResponse:
    """Response with a rendered template.

    Args:
        refresh: seconds after which the browser asks again, for a page that waits for work.
    """
    text = _environment().get_template(template).render(values)
    headers = {"Refresh": str(refresh)} if refresh else {}
    return HTMLResponse(text.encode(errors="replace"), status, headers)


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("lorakit.web"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: (
            visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
        ),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "duration": duration,
        "size": _size,
        "number": lambda value: "–" if value is None else f"{value:,.4g}",
    }
    return made


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:,.0f} {unit}" if unit in ("B", "kB") else f"{count:,.1f} {unit}"
        count /= 1000
    return ""
