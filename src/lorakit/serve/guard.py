"""ASGI middleware that refuses requests which a server must not answer or would misread.

vLLM, transformers and llama.cpp look at no Host or Origin header, leave routes open beside the
key's (model loading, cache reset), and drop keys of a request that they do not know. A web page can
post to 127.0.0.1, or have its own name point there (DNS rebinding).
"""

from __future__ import annotations

import hmac
import json
import os
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ENV = "LORAKIT_SERVE"  # settings as JSON: vLLM makes its middleware without arguments
LOOPBACK = ("127.0.0.1", "localhost", "::1")
LARGEST_BODY = 2 * 2**20  # bytes: a conversation of 400,000 tokens
CHAT, MODELS, HEALTH = "/v1/chat/completions", "/v1/models", "/health"


class Refusal(Exception):
    """A response of this status instead of the server's."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        kind = "authentication_error" if status == 401 else "invalid_request_error"
        error = {"message": message, "type": kind, "param": param, "code": None}
        self.response = JSONResponse({"error": error}, status)


class Guard:
    """Pass chat requests for known models with known keys, and answer for the model list.

    Settings: `models` maps each name to its default system text; `keys` are those that have an
    effect, `defaults` their values in requests without; `api_key`; `loopback` is true where only
    names of this machine are answered to.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app, self.settings = app, json.loads(os.environ[ENV])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through, or answer with OpenAI's form of an error."""
        if scope["type"] == "http":
            try:
                receive = await self._passed(scope, receive)
            except Refusal as refusal:
                await refusal.response(scope, receive, send)
                return
        elif scope["type"] != "lifespan":
            return  # a websocket is not accepted
        if scope.get("path") == MODELS:
            about = {"object": "model", "created": 0, "owned_by": "lorakit"}
            data = [{"id": name, **about} for name in self.settings["models"]]
            await JSONResponse({"object": "list", "data": data})(scope, receive, send)
            return
        await self.app(scope, receive, send)

    async def _passed(self, scope: Scope, receive: Receive) -> Receive:
        """Check one request and return the `receive` that passes its body on to the server."""
        headers, route = Headers(scope=scope), (scope["method"], scope["path"])
        if self.settings["loopback"]:
            if _host(f"//{headers.get('host', '')}") not in LOOPBACK:
                raise Refusal(403, "Host names another machine; this server is 127.0.0.1 only")
            if "origin" in headers and _host(headers["origin"]) not in LOOPBACK:
                raise Refusal(403, "Origin: web pages of other hosts are not answered")
        if route == ("GET", HEALTH):
            return receive
        key, given = self.settings["api_key"], headers.get("authorization", "")
        given = given.removeprefix("Bearer ")
        if key and not hmac.compare_digest(given.encode(), key.encode()):
            raise Refusal(401, "wrong or missing API key")
        if route == ("GET", MODELS):
            return receive
        if route != ("POST", CHAT):
            raise Refusal(404, f"no {ascii(route)[:80]}; there are POST {CHAT} and GET {MODELS}")
        body = json.dumps(self._checked(await _read(receive))).encode()
        events: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return events.pop() if events else await receive()

        return replay

    def _checked(self, body: Any) -> dict[str, Any]:
        if not isinstance(body, dict):
            raise Refusal(400, "the body is no JSON object")
        keys, models = self.settings["keys"], self.settings["models"]
        if unknown := sorted(set(body) - set(keys)):
            words = f"{unknown[0][:80]!a}: has no effect in this server; known: {', '.join(keys)}"
            raise Refusal(400, words, unknown[0])
        name = body.get("model")
        if not isinstance(name, str) or name not in models:
            words = f"model {str(name)[:80]!a} is not served; there is: {', '.join(models)}"
            raise Refusal(404, words, "model")
        turns = body.get("messages")
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise Refusal(400, "messages: takes a list of objects", "messages")
        if models[name] and all(turn.get("role") not in ("system", "developer") for turn in turns):
            turns = [{"role": "system", "content": models[name]}, *turns]
        given = {key: value for key, value in body.items() if value is not None}
        return {**self.settings["defaults"], **given, "messages": turns}


async def _read(receive: Receive) -> Any:
    body, more = b"", True
    while more:
        event = await receive()
        body, more = body + event.get("body", b""), event.get("more_body", False)
        if len(body) > LARGEST_BODY:
            raise Refusal(413, f"the body has more than {LARGEST_BODY // 2**20} MiB")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is not valid JSON: {ascii(str(error))[1:120]}") from error


def _host(address: str) -> str:
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""
