"""Objects that all routes share, the reading of requests, and the rendering of templates.

Every value of a template is escaped, and control characters in it are visible.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse

from lorakit.errors import DataError
from lorakit.redact import visible
from lorakit.report.tables import duration
from lorakit.web.launch import Launcher
from lorakit.web.worker_client import WorkerClient
from lorakit.web.workspace import Summary, Workspace

T = TypeVar("T")
Body = TypeVar("Body", bound=BaseModel)
PATIENCE = 2.0  # seconds that a page waits for work before it answers that it waits


@dataclass
class Context:
    """Workspace, processes, and work that takes longer than a request."""

    workspace: Workspace
    launcher: Launcher
    study: WorkerClient  # plans and prepared data
    chat: WorkerClient  # models: a long answer must not delay a plan
    jobs: dict[str, asyncio.Task[Any]] = field(default_factory=dict)

    def summary(self, name: str, path: Path) -> Summary:
        """Summary of a run, which runs from the start of its process on."""
        found = self.workspace.summary(name, path)
        if found.status in ("stopped", "damaged") and self.launcher.process_of(name):
            return replace(found, status="running", fault="")
        return found

    def summaries(self) -> list[Summary]:
        """Summaries of all runs: running ones first, then the last changed."""
        found = [self.summary(name, path) for name, path in self.workspace.folders().items()]
        return sorted(found, key=lambda run: (run.status != "running", -run.changed))

    async def job(self, key: str, make: Callable[[], Awaitable[T]]) -> tuple[bool, T | None]:
        """Result of a job of this key, which is started once and kept; (done, result).

        Raises:
            Exception: the one that ended the job, which is then forgotten.
        """
        if key not in self.jobs:
            self.jobs[key] = asyncio.ensure_future(make())
            while len(self.jobs) > 20:
                self.jobs.pop(next(iter(self.jobs))).cancel()
        task = self.jobs[key]
        done, _ = await asyncio.wait([task], timeout=PATIENCE)
        if not done:
            return False, None
        if task.cancelled() or task.exception() is not None:
            self.jobs.pop(key, None)
        return True, task.result()

    async def close(self) -> None:
        """End the workers; runs continue."""
        for task in self.jobs.values():
            task.cancel()
        await self.study.close()
        await self.chat.close()


def context_of(request: Request) -> Context:
    """Shared objects of the application that got `request`."""
    found: Context = request.app.state.context
    return found


async def in_thread(call: Callable[..., T], *args: Any) -> T:
    """Run a function that reads the disk in a thread, so that other pages are answered."""
    return await run_in_threadpool(call, *args)


async def posted(request: Request) -> dict[str, str]:
    """Fields of a form, the last value of each."""
    text = (await request.body()).decode(errors="replace")
    try:
        fields = parse_qs(text, keep_blank_values=True, max_num_fields=200)
    except ValueError as error:
        raise DataError(f"the form cannot be read: {error}", hint="reload the page") from error
    return {key: values[-1] for key, values in fields.items()}


async def posted_json(request: Request, kind: type[Body]) -> Body:
    """JSON body of the given form.

    Raises:
        DataError: it has another form; names the first fault.
    """
    try:
        return kind.model_validate_json(await request.body())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise DataError(f"{place or 'request'}: {first['msg']}", hint="correct it") from error


def number_of(text: str, default: int, largest: int = 10**9) -> int:
    """Whole number of a query, within bounds."""
    return min(largest, int(text)) if text.isascii() and text.isdigit() else default


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
        extensions=["jinja2.ext.do"],
    )
    made.globals["zip"] = zip
    made.policies["json.dumps_kwargs"] = {"sort_keys": False}
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
