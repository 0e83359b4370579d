"""HTTP requests enter; those of a web page elsewhere, and bodies without measure, are turned away.

A server on this machine is reached by every web page that its user opens: the page posts to
127.0.0.1, or its own name is made to point there (DNS rebinding). A browser says where a page came
from (Origin) and which name it asked (Host); without a key only names of this machine pass.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from lorakit.serve.requests import BadOrder

# A conversation of 400,000 tokens.
LARGEST_BODY = 2 * 2**20


class Door:
    """In front of the routes; `hosts` are the names this server answers to, None for any."""

    def __init__(self, app: ASGIApp, hosts: Collection[str] | None) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through, or answer 403."""
        if scope["type"] == "http":
            reason = self._why_not(Headers(scope=scope))
            if reason:
                fault = BadOrder(reason, status=403, code="forbidden")
                await JSONResponse(fault.as_dict(), 403)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _why_not(self, headers: Headers) -> str | None:
        if self.hosts is None:
            return None
        if _host(f"//{headers.get('host', '')}") not in self.hosts:
            return "this server answers to 127.0.0.1 and localhost only (Host names another)"
        origin = headers.get("origin")
        if origin is not None and _host(origin) not in self.hosts:
            return "requests from web pages of other hosts are not answered (Origin)"
        return None


async def read_body(http: Request) -> Any:
    """The JSON of a request, no more than `LARGEST_BODY` of it.

    Raises:
        BadOrder: too large, no JSON, or text that is none.
    """
    length = http.headers.get("content-length", "0")
    pieces, size = [], int(length) if length.isdigit() else 0
    if size <= LARGEST_BODY:
        size = 0
        async for piece in http.stream():
            size += len(piece)
            if size > LARGEST_BODY:
                break
            pieces.append(piece)
    if size > LARGEST_BODY:
        raise BadOrder(
            f"the body has more than {LARGEST_BODY // 2**20} MiB", status=413, code="too_large"
        )
    try:
        body = json.loads(b"".join(pieces))
        # Half a character ("\\ud800") passes JSON, and neither tokenizer nor answer can hold it.
        json.dumps(body, ensure_ascii=False).encode()
    except RecursionError as error:
        raise BadOrder("the body is nested too deeply") from error
    except ValueError as error:
        raise BadOrder(f"the body is not valid JSON: {ascii(str(error))[1:120]}") from error
    return body


def _host(address: str) -> str:
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""
