"""Run the servers that are Python, each behind the guard: `transformers serve`, llama.cpp's.

Run as `python -m lorakit.serve.child HOST PORT transformers OPTION...` where each model is a folder
of the current one, or as `... llama.cpp CONTEXT NAME=FILE...`.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any

import uvicorn

from lorakit.serve.guard import CHAT, HEALTH, Guard

PARALLEL = 4  # answers that llama.cpp makes at once; others wait
STOP: dict[str, Any] = {"timeout_graceful_shutdown": 2}  # seconds for streams at Ctrl-C


def _transformers(options: list[str]) -> None:
    """Run `transformers serve` with the guard around its application, which has no hook for it."""
    from transformers.cli import transformers

    plain = uvicorn.Config
    setattr(uvicorn, "Config", lambda app, **values: plain(Guard(app), **values, **STOP))  # noqa: B010
    transformers.app(["serve", *options])  # its `main` asks the network for a newer version


def _llama_cpp(host: str, port: int, context: int, files: dict[str, str]) -> None:
    """Route a chat request to llama.cpp's own handler, behind the guard."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    servers = {name: _loaded(file, context) for name, file in files.items()}

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def chat(request: Request) -> Response:
        body = await request.json()
        pieces = _pieces(servers[body["model"]], body)
        first = await anext(pieces)
        if "error" in first or not body.get("stream"):
            return JSONResponse(first, first.get("error", {}).get("code", 200))
        return StreamingResponse(_events(first, pieces), media_type="text/event-stream")

    routes = [Route(HEALTH, health), Route(CHAT, chat, methods=["POST"])]
    uvicorn.run(Guard(Starlette(routes=routes)), host=host, port=port, log_level="warning", **STOP)


def _loaded(file: str, context: int) -> Any:
    import xllamacpp

    from lorakit.export.llama_cpp import server_settings

    settings = server_settings(file, context, PARALLEL)
    settings.api_keys = [secrets.token_hex()]  # of a port that it opens and nobody needs
    return xllamacpp.Server(settings)


async def _pieces(server: Any, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """Stream llama.cpp's output; a client that disconnects ends the answer."""
    found: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
    loop, left = asyncio.get_running_loop(), threading.Event()

    def put(piece: dict[str, Any]) -> bool:
        loop.call_soon_threadsafe(found.put_nowait, {**piece, "model": body["model"]})
        return left.is_set()

    task = loop.run_in_executor(None, server.handle_chat_completions, body, put)
    task.add_done_callback(lambda _: found.put_nowait(None))
    try:
        while (piece := await found.get()) is not None:
            yield piece
    finally:
        left.set()


async def _events(first: dict[str, Any], rest: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    yield f"data: {json.dumps(first)}\n\n"
    async for piece in rest:
        yield f"data: {json.dumps(piece)}\n\n"
    yield "data: [DONE]\n\n"


if __name__ == "__main__":
    place, kind, more = sys.argv[1:3], sys.argv[3], sys.argv[4:]
    if kind == "transformers":
        _transformers(["--host", place[0], "--port", place[1], *more])
    else:
        _llama_cpp(place[0], int(place[1]), int(more[0]), dict(x.split("=", 1) for x in more[1:]))
