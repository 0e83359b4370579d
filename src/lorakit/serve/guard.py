"""ASGI middleware that refuses requests which a server must not answer or would misread.

vLLM, transformers and llama.cpp look at no Host or Origin header, leave routes open that need no
key (model loading, cache reset), and drop keys of a request that they do not know. A web page can
post to 127.0.0.1, or have its own name point there (DNS rebinding).
"""

from __future__ import annotations

import hmac
import json
import os
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
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

    Settings: `models` maps each name to its default system text, and `keys` to the keys that have
    an effect on its answers; `defaults` has values of keys that a request leaves out; `api_key`;
    `loopback` is true where only names of this machine are answered to.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app, self.settings = app, json.loads(os.environ[ENV])
        # `_other_caller` refuses all pages but those of this machine, which may read answers.
        self.for_pages = CORSMiddleware(
            self._answer,
            allow_origin_regex=".*",
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through, or answer with OpenAI's form of an error."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":  # a websocket is not accepted
                await self.app(scope, receive, send)
            return
        loopback = self.settings["loopback"]
        if loopback and (refusal := _other_caller(Headers(scope=scope))):
            await refusal.response(scope, receive, send)
            return
        await (self.for_pages if loopback else self._answer)(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            receive = await self._passed(scope, receive)
            if scope["method"] == "GET" and scope["path"] != HEALTH:
                await JSONResponse(self._models(scope["path"]))(scope, receive, send)
                return
        except Refusal as refusal:
            await refusal.response(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _models(self, path: str) -> dict[str, Any]:
        """Return the list of models, or the one that the path names."""
        about = {"object": "model", "created": 0, "owned_by": "lorakit"}
        models = self.settings["models"]
        if path == MODELS:
            return {"object": "list", "data": [{"id": name, **about} for name in models]}
        name = path.removeprefix(f"{MODELS}/")
        if name not in models:
            words = f"model {name[:80]!a} is not served; there is: {', '.join(models)}"
            raise Refusal(404, words, "model")
        return {"id": name, **about}

    async def _passed(self, scope: Scope, receive: Receive) -> Receive:
        """Check one request and return the `receive` that passes its body on to the server."""
        headers, route = Headers(scope=scope), (scope["method"], scope["path"])
        if route == ("GET", HEALTH):
            return receive
        key, given = self.settings["api_key"], headers.get("authorization", "")
        given = given.removeprefix("Bearer ")
        if key and not hmac.compare_digest(given.encode(), key.encode()):
            raise Refusal(401, "wrong or missing API key")
        if route[0] == "GET" and (route[1] == MODELS or route[1].startswith(f"{MODELS}/")):
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
            raise Refusal(400, "the body is not a JSON object")
        name, models = body.get("model"), self.settings["models"]
        if not isinstance(name, str) or name not in models:
            words = f"model {str(name)[:80]!a} is not served; there is: {', '.join(models)}"
            raise Refusal(404, words, "model")
        keys = self.settings["keys"][name]
        if unknown := sorted(set(body) - set(keys)):
            words = f"{unknown[0][:80]!a}: has no effect in this server; known: {', '.join(keys)}"
            raise Refusal(400, words, unknown[0])
        turns = body.get("messages")
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise Refusal(400, "messages: takes a list of objects", "messages")
        if models[name] and all(turn.get("role") not in ("system", "developer") for turn in turns):
            turns = [{"role": "system", "content": models[name]}, *turns]
        given = {key: value for key, value in body.items() if value is not None}
        return {**self.settings["defaults"], **given, "messages": turns}


def _other_caller(headers: Headers) -> Refusal | None:
    """Return a refusal if the host or the page is another machine's; only this one is answered."""
    if _host(f"//{headers.get('host', '')}") not in LOOPBACK:
        return Refusal(403, "Host names another machine; this server is 127.0.0.1 only")
    if "origin" in headers and _host(headers["origin"]) not in LOOPBACK:
        return Refusal(403, "Origin: web pages of other hosts are not answered")
    return None


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
