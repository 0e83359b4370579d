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
from lorakit.doctor.system_info import collect_system_info
from lorakit.errors import LorakitError, RunError
from lorakit.planning.known_models import REPOSITORIES
from lorakit.storage.run_dir import RunDir
from lorakit.web.access import Access
from lorakit.web.arena import arena_routes
from lorakit.web.context import Context, context_of, html_page, in_thread, number_of, posted
from lorakit.web.launch import Launcher
from lorakit.web.run_view import (
    bounds_of,
    compare_values,
    download_of,
    progress_text,
    recipe_settings,
    run_values,
    section,
    state_of,
)
from lorakit.web.study import study_routes
from lorakit.web.worker_client import WorkerClient
from lorakit.web.workspace import Workspace, cached_models, read_facts, sentence

SECONDS = 1.0  # between looks at a run that a page watches
MOST_WATCHERS, MOST_COMPARED = 32, 8
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
        Route("/stop", stop_run, methods=["POST"]),
        Route("/resume", resume_run, methods=["POST"]),
        Route("/forget", forget_run, methods=["POST"]),
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
    values: dict[str, Any] = {"runs": runs, "pending": pending, "progress": progress_text}
    if "part" in request.query_params:
        return html_page("runs_table.html.jinja", **values)
    root, home = context.workspace.root, context.workspace.home
    return html_page("runs.html.jinja", page="runs", root=root, home=home, **values)


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
            refresh = 2 if waiting[name]["alive"] else 0
            log = launcher.log(name)[-LOG_CHARACTERS:]
            return html_page(
                "starting.html.jinja", refresh=refresh, page="", run=waiting[name], log=log
            )
    run = context.workspace.find(name)
    summary = await in_thread(context.summary, name, run.path)
    values = await in_thread(run_values, context.workspace, run, summary)
    process = await in_thread(launcher.process_of, name)
    log = launcher.log(name)
    return html_page(
        "run.html.jinja",
        page="",
        progress=progress_text(summary),
        process=process,
        ended=launcher.ending(name) if not process and summary.status == "stopped" else "",
        log=log[-LOG_CHARACTERS:],
        said=request.query_params.get("said", "")[:200],
        **values,
    )


async def run_curves(request: Request) -> Response:
    """Curves of a run, reduced to what a screen shows, and the lines of its plan."""
    context, run, _ = _run(request)
    points = number_of(request.query_params.get("points", ""), 1000, 4000)
    metrics = await in_thread(context.workspace.metrics, run)
    plan = read_facts(run.plan)
    return JSONResponse(
        {
            "curves": metrics.since({}, max(points, 10)),
            "counts": metrics.counts(),
            "version": metrics.version,
            "bounds": section(lambda: bounds_of(recipe_settings(run), plan), {}),
        }
    )


async def run_events(request: Request) -> Response:
    """Server-sent events of a run: new points, state, and new text of its log."""
    context, run, name = _run(request)
    state = request.app.state
    if state.watchers >= MOST_WATCHERS:
        raise RunError("too many pages watch runs", hint="close some of them and reload")
    known = {
        key: number_of(count, 0)
        for key, count in request.query_params.items()
        if key not in ("name", "version")
    }
    version = number_of(request.query_params.get("version", ""), 0)

    async def events() -> AsyncIterator[str]:
        state.watchers += 1
        try:
            async for kind, value in _changes(context, run, name, known, version):
                yield f"event: {kind}\ndata: {json.dumps(value)}\n\n"
        finally:
            state.watchers -= 1

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(events(), media_type="text/event-stream", headers=headers)


async def _changes(
    context: Context, run: RunDir, name: str, known: dict[str, int], version: int
) -> AsyncIterator[tuple[str, Any]]:
    """Yield what changes in a run until it has ended."""
    workspace, seen, log, quiet = context.workspace, None, "", 0
    while True:
        metrics = await in_thread(workspace.metrics, run)
        if metrics.version != version:
            yield "reload", "the metrics were written again"
            return
        if points := metrics.since(known, 200):
            yield "points", {"curves": points, "counts": metrics.counts()}
            known, quiet = metrics.counts(), 0
        state = state_of(await in_thread(context.summary, name, run.path))
        if state != seen:
            yield "state", state
            seen, quiet = state, 0
        if (text := context.launcher.log(name)[-LOG_CHARACTERS:]) != log:
            yield "log", text
            log = text
        if state["status"] != "running":
            yield "end", state["status"]
            return
        if (quiet := quiet + 1) % 15 == 0:
            yield "state", state  # keeps proxies from closing the connection
        await asyncio.sleep(SECONDS)


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


async def stop_run(request: Request) -> Response:
    """Send the run SIGTERM."""
    name = (await posted(request)).get("name", "")
    said = await in_thread(context_of(request).launcher.stop, name)
    return _to_run(name, said)


async def resume_run(request: Request) -> Response:
    """Continue a stopped run."""
    name = (await posted(request)).get("name", "")
    await in_thread(context_of(request).launcher.resume, name)
    return _to_run(name, "resuming from the last checkpoint")


async def forget_run(request: Request) -> Response:
    """Delete recipe and log of a run that ended without a folder."""
    name = (await posted(request)).get("name", "")
    await in_thread(context_of(request).launcher.forget, name)
    return RedirectResponse("./", 303)


def _to_run(name: str, said: str) -> Response:
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
    return html_page(
        "doctor.html.jinja", refresh=0 if done else 2, page="doctor", findings=findings
    )


def _findings() -> list[Any]:
    return list(examine(collect_system_info()))
