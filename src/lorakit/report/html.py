"""Render the jinja2 templates of this folder as single-file HTML pages without scripts.

Every value is escaped by jinja2. Control characters are replaced by their codes.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lorakit.data.inspection import Inspection
from lorakit.display.inspection_view import inspection_view, verdict
from lorakit.display.rich_output import as_html
from lorakit.redact import visible
from lorakit.report.load_run import without_path
from lorakit.storage.run_dir import write_text

# Widths of the inspection in characters, on a screen and on a phone.
WIDTHS = {"wide": 100, "narrow": 44}


def render_page(template: str, **values: Any) -> str:
    """Render `template` with `values`."""
    text = _environment().get_template(template).render(values)
    # A lone surrogate, which cannot be encoded, becomes "?".
    return text.encode(errors="replace").decode()


def write_inspection(inspection: Inspection, path: Path) -> None:
    """Write the inspection as one HTML page; the folder of `path` is created."""
    view = inspection_view(inspection, limit=None)
    page = render_page(
        "inspection.html.jinja",
        sources=[source["source"] for source in inspection.report.sources],
        model=inspection.model,
        verdict=verdict(inspection),
        stops=bool(inspection.stopping),
        # as_html escapes; the page contains the view in both widths.
        views={name: Markup(as_html(view, width)) for name, width in WIDTHS.items()},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("lorakit.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.do"],
    )
    environment.filters |= {
        "format_as": format,
        "gib": lambda size: f"{size / 2**30:.1f}",
        "without_path": without_path,
    }
    return environment


def _finalize(value: Any) -> Any:
    """Make control characters visible in text that a template prints."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
