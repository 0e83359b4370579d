"""The page's application: routes of runs, live updates, comparison, models and the doctor."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import (
    FileResponse,
    JSONResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from lorakit.doctor.checks import examine
from lorakit.doctor.system_info import cached_models, collect_system_info
from lorakit.errors import LorakitError, RunError
from lorakit.planning.known_models import REPOSITORIES
from lorakit.storage.run_dir import RunDir
from lorakit.web.access import Access
from lorakit.web.arena import arena_routes
from lorakit.web.context import Context, context_of, html_page, in_thread, number_of, posted
from lorakit.web.launch import EXPORT, FORMATS, TRAIN, VERBS, Launcher
from lorakit.web.run_view import bounds_of, compare_values, download_of, progress_text, run_values
from lorakit.web.study import study_routes
from lorakit.web.worker_client import WorkerClient
from lorakit.web.workspace import Workspace, sentence

SECONDS = 1.0  # between looks at a run that a page watches
MOST_WATCHERS, MOST_COMPARED = 32, 8
ACTIONS = ("stop", "resume", "export", "forget")
LOG_CHARACTERS = 20_000


def create_app(
    folder: Path, token: str, hosts: tuple[str, ...] = (), prefix: str = "", framed: bool = False
) -> Access:
    """Build the application for one folder, behind its check of each request.

    Raises:
        RunError: the folder is a run itself.
    """
    workspace = Workspace(folder)
    context = Context(workspace, Launcher(workspace), WorkerClient(folder), WorkerClient(folder))

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await context.close()

    routes = [
        Route("/", runs_page),
        Route("/run", run_page),
        Route("/run-curves", run_curves),
        Route("/run-events", run_events),
        Route("/file", file_download),
        *(Route(f"/{action}", act, methods=["POST"]) for action in ACTIONS),
        Route("/compare", compare_page),
        Route("/models", models_page),
        Route("/doctor", doctor_page, methods=["GET", "POST"]),
        *study_routes(),
        *arena_routes(),
        Mount("/static", StaticFiles(packages=[("lorakit.web", "static")])),
    ]
    kinds = (LorakitError, HTTPException, OSError, Exception)
    handlers: dict[Any, Any] = dict.fromkeys(kinds, fault_page)
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
    app.state.context, app.state.watchers = context, 0
    return Access(app, token, hosts, prefix, framed)


async def fault_page(_: Request, error: Exception) -> Response:
    """One sentence about an error, with what to do; the terminal has the traceback of a bug."""
    status = 500
    if isinstance(error, LorakitError):
        status, text = 400, sentence(error)
    elif isinstance(error, HTTPException):
        status, text = error.status_code, "This page does not exist: choose one in the menu."
    elif isinstance(error, OSError):
        reason = error.strerror or type(error).__name__
        text = f"The system refused it ({reason}): free space or correct the folder's rights."
    else:
        text = f"A fault of lorakit ({type(error).__name__}): report what the terminal shows."
    return html_page("message.html.jinja", status, page="", text=text)


async def runs_page(request: Request) -> Response:
    """List of runs; with `?part=1` the table alone, which the page asks for while it is open."""
    context = context_of(request)
    runs = await in_thread(context.summaries)
    pending = await in_thread(context.launcher.pending)
    if "part" in request.query_params:
        return html_page("runs_table.html.jinja", runs=runs, pending=pending)
    values: dict[str, Any] = {"workspace": context.workspace, "runs": runs, "pending": pending}
    return html_page("runs.html.jinja", page="runs", **values)


def _run(request: Request) -> tuple[Context, RunDir, str]:
    context, name = context_of(request), request.query_params.get("name", "")
    return context, context.workspace.find(name), name


async def run_page(request: Request) -> Response:
    """Everything about one run."""
    context, name = context_of(request), request.query_params.get("name", "")
    launcher = context.launcher
    if name not in context.workspace.folders():
        waiting = {run["name"]: run for run in await in_thread(launcher.pending)}
        if name in waiting:
            pending, log = waiting[name], launcher.log(name)[-LOG_CHARACTERS:]
            refresh = 2 if pending["alive"] else 0
            return html_page("starting.html.jinja", refresh=refresh, page="", run=pending, log=log)
    context, run, name = _run(request)
    summary = await in_thread(context.summary, name, run.path)
    values = await in_thread(run_values, context.workspace, run, summary)
    state = await in_thread(_state, context, run, name)
    ended = [verb for verb in VERBS if not state[verb]]
    return html_page(
        "run.html.jinja",
        page="",
        state=state,
        endings={verb: launcher.ending(name, verb) for verb in ended},
        said=request.query_params.get("said", "")[:200],
        formats=FORMATS,
        **values,
    )


def _state(context: Context, run: RunDir, name: str) -> dict[str, Any]:
    """State of a run for its live page: its processes, progress, curves and logs."""
    summary, launcher = context.summary(name, run.path), context.launcher
    processes = {verb: launcher.process_of(name, verb) is not None for verb in VERBS}
    return {
        **processes,
        "status": summary.status,
        "share": summary.share,
        "text": progress_text(summary),
        "rows": context.workspace.metrics(run).rows,
        "logs": {verb: launcher.log(name, verb)[-LOG_CHARACTERS:] for verb in VERBS},
    }


async def run_curves(request: Request) -> Response:
    """Curves of a run, reduced to what a screen shows, and the lines of its plan."""
    context, run, _ = _run(request)
    points = number_of(request.query_params.get("points", ""), 1000, 4000)
    metrics = await in_thread(context.workspace.metrics, run)
    curves = await in_thread(metrics.curves, max(points, 10))
    return JSONResponse({"curves": curves, "bounds": bounds_of(run)})


async def run_events(request: Request) -> Response:
    """Server-sent events: the state of a run, each time that it changes, until it has ended."""
    context, run, name = _run(request)
    state = request.app.state
    if state.watchers >= MOST_WATCHERS:
        raise RunError("too many pages watch runs", hint="close some of them and reload")

    async def events() -> AsyncIterator[str]:
        state.watchers += 1
        seen, quiet = None, 0
        try:
            while True:
                found = await in_thread(_state, context, run, name)
                quiet += 1
                if found != seen or quiet == 15:  # also keeps proxies from closing the connection
                    yield f"data: {json.dumps(found)}\n\n"
                    seen, quiet = found, 0
                if not any(found[verb] for verb in VERBS):
                    return
                await asyncio.sleep(SECONDS)
        finally:
            state.watchers -= 1

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(events(), media_type="text/event-stream", headers=headers)


async def file_download(request: Request) -> Response:
    """One of the named files of a run, as a download."""
    context, run, _ = _run(request)
    file = request.query_params.get("file", "")
    path = download_of(run, file, context.workspace)
    if path is None:
        raise RunError(
            f"{file[:100]!a}: no such download", hint="choose one on the page of the run"
        )
    saved = f"{run.path.name}-{path.name}"
    return FileResponse(path, media_type="application/octet-stream", filename=saved)


async def act(request: Request) -> Response:
    """Stop, resume or export a run, or forget one that has no folder."""
    fields, launcher = await posted(request), context_of(request).launcher
    name, action = fields.get("name", ""), request.url.path.rpartition("/")[2]
    said = ""
    if action == "stop":
        verb = EXPORT if fields.get("verb") == EXPORT else TRAIN
        said = await in_thread(launcher.stop, name, verb)
    elif action == "resume":
        await in_thread(launcher.resume, name)
        said = "resuming from the last checkpoint"
    elif action == "export":
        form, quantization = fields.get("form", ""), fields.get("quant", "").strip()
        await in_thread(launcher.export, name, form, quantization)
        said = f"exporting to {form}; it is compared with the adapter before it is kept"
    else:
        await in_thread(launcher.forget, name)
        return RedirectResponse("./", 303)
    return RedirectResponse(f"run?name={quote(name)}&said={quote(said)}", 303)


async def compare_page(request: Request) -> Response:
    """Compare the runs named by `?name=a&name=b`."""
    context = context_of(request)
    names = list(dict.fromkeys(request.query_params.getlist("name")))[:MOST_COMPARED]
    known = list(await in_thread(context.workspace.folders))
    values: dict[str, Any] = {"runs": []}
    if names:
        values = await in_thread(compare_values, context.workspace, names)
    return html_page("compare.html.jinja", page="compare", known=known, chosen=names, **values)


async def models_page(request: Request) -> Response:
    """Models that are on this machine or known by name, and the adapters of the folder."""
    context = context_of(request)
    runs = [r for r in await in_thread(context.summaries) if r.status == "finished"]
    local = await in_thread(context.workspace.local_models)
    return html_page(
        "models.html.jinja",
        page="models",
        runs=runs,
        local=local,
        known=list(REPOSITORIES),
        cached=await in_thread(cached_models),
    )


async def doctor_page(request: Request) -> Response:
    """Checks of this machine, in a process of their own; POST repeats them."""
    context = context_of(request)
    if request.method == "POST":
        context.jobs.pop("doctor", None)
        return RedirectResponse("doctor", 303)
    done, findings = await context.job("doctor", lambda: in_thread(_findings))
    refresh = 0 if done else 2
    return html_page("doctor.html.jinja", refresh=refresh, page="doctor", findings=findings)


def _findings() -> list[Any]:
    return list(examine(collect_system_info()))
