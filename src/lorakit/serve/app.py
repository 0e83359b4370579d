"""HTTP requests enter; OpenAI's answers leave: chat, streamed or whole, the list of models, health.

Prompts are made by the code that made the training examples, with the tokenizer and template that
lie beside the adapter. `transformers serve` (5.23), by its source, loads the base once more for
each adapter, has no key and answers with the base's template.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from lorakit.data.tokenize.encode import prompt_ids
from lorakit.errors import LorakitError
from lorakit.model.multi_adapter import MultiAdapterModel
from lorakit.serve.batch_worker import Request, Worker
from lorakit.serve.middleware import Door, read_body
from lorakit.serve.requests import BadOrder, Order, read_order
from lorakit.types import Message

WAITING_LIMIT = 256
Handler = Callable[[HttpRequest], Awaitable[Response]]


class Server:
    """The routes, the model behind them, and the key that opens them."""

    def __init__(self, several: MultiAdapterModel, api_key: str | None = None) -> None:
        self.several, self.api_key = several, api_key
        self.worker = Worker(several)
        self.started = int(time.time())

    def app(self, hosts: Collection[str] | None) -> ASGIApp:
        """The application, for uvicorn; it answers to `hosts` alone, or to any name."""
        routes = Starlette(
            routes=[
                Route("/health", self.health),
                Route("/v1/models", self.guarded(self.models)),
                Route("/v1/chat/completions", self.guarded(self.chat), methods=["POST"]),
            ],
            exception_handlers={404: _unknown_route, 405: _unknown_route, Exception: _our_fault},
        )
        return Door(routes, hosts)

    def guarded(self, handler: Handler) -> Handler:
        """`handler` behind the key, its faults in OpenAI's form."""

        async def guard(request: HttpRequest) -> Response:
            try:
                given = request.headers.get("authorization", "").removeprefix("Bearer ")
                if self.api_key and not hmac.compare_digest(given.encode(), self.api_key.encode()):
                    raise BadOrder("wrong or missing API key", status=401, code="invalid_api_key")
                return await handler(request)
            except BadOrder as fault:
                return JSONResponse(fault.as_dict(), fault.status)
            except LorakitError as error:
                return JSONResponse(BadOrder(error.message).as_dict(), 400)

        return guard

    async def health(self, _: HttpRequest) -> Response:
        """200 while the model's thread lives, without a key: for load balancers."""
        if self.worker.alive:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "the model's thread has ended"}, 503)

    async def models(self, _: HttpRequest) -> Response:
        """Every adapter, and the untuned base."""
        names = [*self.several.tuned, self.several.base_name]
        about = {"object": "model", "created": self.started, "owned_by": "lorakit"}
        data = [{"id": n, **about, "parent": None if n == names[-1] else names[-1]} for n in names]
        return JSONResponse({"object": "list", "data": data})

    async def chat(self, http: HttpRequest) -> Response:
        """One answer, whole or in pieces."""
        order = read_order(await read_body(http))
        if self.worker.waiting.qsize() >= WAITING_LIMIT:
            raise BadOrder("too many requests wait", status=429, code="rate_limit_exceeded")
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def send(piece: str | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        request = self.request(order, send)
        self.worker.submit(request)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time())}
        head["model"] = order.model or next(iter(self.several.tuned))
        if order.stream:
            events = _events(request, pieces, head, order.with_usage)
            return StreamingResponse(events, media_type="text/event-stream")
        return await _whole(http, request, pieces, head)

    def request(self, order: Order, send: Callable[[str | None], None]) -> Request:
        """The order with its prompt made, for the adapter it names.

        Raises:
            BadOrder: no such model, or the prompt is longer than the model reads.
        """
        several = self.several
        is_base = order.model == several.base_name
        name = order.model or next(iter(several.tuned))
        if name not in several.tuned and not is_base:
            known = ", ".join([*several.tuned, several.base_name])
            raise BadOrder(
                f"model {name!r} is not served here; there is: {known}",
                "model",
                404,
                "model_not_found",
            )
        tuned = next(iter(several.tuned.values())) if is_base else several.tuned[name]
        messages = order.messages
        if tuned.system and all(m.role != "system" for m in messages):
            messages = (Message("system", tuned.system), *messages)
        prompt = prompt_ids(tuned.tokenizer, messages, order.tools)
        config = several.model.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None) or 10**9
        if len(prompt) >= limit:
            raise BadOrder(
                f"the messages take {len(prompt)} tokens, this model reads {limit}",
                "messages",
                code="context_length_exceeded",
            )
        return Request(
            adapter=None if is_base else name,
            prompt=prompt,
            max_tokens=min(order.max_tokens or limit, limit - len(prompt)),
            temperature=order.temperature,
            top_p=order.top_p,
            seed=order.seed,
            stop_texts=order.stop,
            send=send,
        )


async def _whole(
    http: HttpRequest, request: Request, pieces: asyncio.Queue[str | None], head: dict[str, Any]
) -> Response:
    """Wait for the end; a client that left frees its place in the batch."""
    while True:
        try:
            if await asyncio.wait_for(pieces.get(), timeout=1.0) is None:
                break
        except TimeoutError:
            if await http.is_disconnected():
                request.cancel()
    if request.error:
        fault = BadOrder(f"the answer failed: {request.error}", status=500)
        return JSONResponse(fault.as_dict(), 500)
    message = {"role": "assistant", "content": request.text}
    choice = {"index": 0, "message": message, "finish_reason": _finish(request), "logprobs": None}
    values = {**head, "object": "chat.completion", "choices": [choice], "usage": _usage(request)}
    return JSONResponse(values)


async def _events(
    request: Request, pieces: asyncio.Queue[str | None], head: dict[str, Any], with_usage: bool
) -> AsyncIterator[str]:
    """Server-sent events; leaving early (the client went away) ends the generation."""
    head = {**head, "object": "chat.completion.chunk"}

    def event(delta: dict[str, Any], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return f"data: {json.dumps({**head, 'choices': [choice]}, ensure_ascii=False)}\n\n"

    try:
        yield event({"role": "assistant", "content": ""})
        while (piece := await pieces.get()) is not None:
            yield event({"content": piece})
        if request.error:
            yield f"data: {json.dumps(BadOrder(request.error, status=500).as_dict())}\n\n"
        yield event({}, _finish(request))
        if with_usage:
            values = {**head, "choices": [], "usage": _usage(request)}
            yield f"data: {json.dumps(values)}\n\n"
        yield "data: [DONE]\n\n"
    finally:
        request.cancel()


def _finish(request: Request) -> str:
    """OpenAI knows no word for an answer that the server cut short."""
    return "stop" if request.finish == "stop" else "length"


def _usage(request: Request) -> dict[str, int]:
    # The stop token is generated too, and counted as OpenAI and vLLM do.
    made = len(request.ids) + (request.finish == "stop")
    asked = len(request.prompt)
    return {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made}


async def _unknown_route(request: HttpRequest, _: Exception) -> Response:
    fault = BadOrder(
        f"no {request.method} {request.scope['path'][:80]!a}; there are POST /v1/chat/completions, "
        "GET /v1/models and GET /health",
        status=404,
    )
    return JSONResponse(fault.as_dict(), 404)


async def _our_fault(_: HttpRequest, __: Exception) -> Response:
    """The trace goes to the server's own screen; a client learns nothing of the inside."""
    fault = BadOrder("lorakit failed on this request; see the server's log", status=500)
    return JSONResponse(fault.as_dict(), 500)
