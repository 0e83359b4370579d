"""ASGI middleware that lets only the holder of the token in, and only from this server's own pages.

Another site can post to 127.0.0.1 or have its name point there (DNS rebinding), and other users of
this machine can connect to the port. Host and Origin are checked, and each start has a new token:
in the printed address, then in a cookie; in a frame, where browsers send no cookie, in the path.
"""

from __future__ import annotations

import hashlib
import hmac
import html
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import HTMLResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

THIS_MACHINE = ("127.0.0.1", "localhost", "::1")
POSTED_BYTES = 2**20
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors "
)
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    # Not "no-referrer": a browser then posts forms with `Origin: null`.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}
LOGIN_HINT = "open the address that `lorakit ui` printed; it has the token of this start"


class Access:
    """Check host, origin, method, token and size of each request, and set the security headers.

    Args:
        token: secret of this start.
        hosts: further host names that are answered, such as a proxy's; `.name` includes all below.
        prefix: path that a proxy puts in front and does not remove, such as /user/me/proxy/8765.
        framed: the token may be in the path, `/~TOKEN/run`, and such pages in a notebook's frame. A
            site that does not know it can send no such request, whatever its host and origin.
    """

    def __init__(
        self,
        app: ASGIApp,
        token: str,
        hosts: tuple[str, ...] = (),
        prefix: str = "",
        framed: bool = False,
    ) -> None:
        self.app, self.token, self.hosts, self.framed = app, token, hosts, framed
        self.prefix = f"/{prefix.strip('/')}" if prefix.strip("/") else ""
        # Cookies are shared by all ports of a host: each server has a name of its own.
        self.cookie = f"lorakit-{hashlib.sha256(token.encode()).hexdigest()[:8]}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer with the reason why not."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":  # there are no websockets
                await self.app(scope, receive, send)
            return
        scope = {**scope, "path": scope["path"].removeprefix(self.prefix) or "/"}
        in_path = f"/~{self.token}/"
        by_path = self.framed and _equal(scope["path"][: len(in_path)], in_path)
        if by_path:
            scope["path"] = scope["path"][len(in_path) - 1 :]
        refusal = self._refusal(scope, by_path)
        if refusal is None and scope["method"] == "POST":
            receive = _limited(receive)

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=message.setdefault("headers", []))
                headers.update(HEADERS)
                frames = "*" if by_path else "'none'"
                headers["Content-Security-Policy"] = POLICY + frames
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        await (self.app if refusal is None else refusal)(scope, receive, guarded)

    def _refusal(self, scope: Scope, by_path: bool) -> Response | None:
        headers = Headers(scope=scope)
        if not by_path and not self._known(_hostname(f"//{headers.get('host', '')}")):
            return _refused(403, "this host name is not answered", "add it with --allow-host")
        if scope["method"] not in ("GET", "HEAD", "POST"):
            return _refused(405, f"method {scope['method'][:20]}: not used here", "use GET or POST")
        if not by_path and not self._has_cookie(headers):
            return self._with_token(scope)
        if scope["method"] != "POST":
            return None
        origin = headers.get("origin", "")
        same = _place(origin) == headers.get("host") or self._allowed(_hostname(origin))
        if not by_path and not same:
            return _refused(403, "another page sent this form", "send it from lorakit's own page")
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > POSTED_BYTES:
            return _refused(413, f"more than {POSTED_BYTES // 2**20} MiB sent", "send less text")
        return None

    def _has_cookie(self, headers: Headers) -> bool:
        try:
            found = SimpleCookie(headers.get("cookie", "")).get(self.cookie)
        except CookieError:
            return False
        return found is not None and _equal(found.value, self.token)

    def _with_token(self, scope: Scope) -> Response:
        """Exchange `?t=` for the cookie; a request without it is refused."""
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = next((value for key, value in query if key == "t"), "")
        if scope["method"] == "POST" or not _equal(given, self.token):
            return _refused(403, "the token is missing or of another start", LOGIN_HINT)
        rest = urlencode([pair for pair in query if pair[0] != "t"])
        address = f"./{quote(scope['path'].rsplit('/', 1)[-1])}" + (f"?{rest}" if rest else "")
        # Not a redirect: after a click on another site a browser follows it without the cookie.
        link = (
            '<!doctype html><title>lorakit</title><link rel="icon" href="static/icon.svg">'
            f'<a href="{html.escape(address)}">lorakit</a>'
        )
        answer = HTMLResponse(link, headers={"Refresh": f"0; url={address}"})
        answer.set_cookie(
            self.cookie, self.token, httponly=True, samesite="strict", path=self.prefix or "/"
        )
        return answer

    def _known(self, name: str) -> bool:
        return name in THIS_MACHINE or self._allowed(name)

    def _allowed(self, name: str) -> bool:
        return any(
            name == host.lstrip(".") or (host.startswith(".") and name.endswith(host))
            for host in self.hosts
        )


def _place(address: str) -> str | None:
    """Host and port of an address as a Host header writes them; None if it is not one."""
    try:
        return urlsplit(address).netloc or None
    except ValueError:
        return None


def _hostname(address: str) -> str:
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""


def _equal(given: str, secret: str) -> bool:
    return hmac.compare_digest(given.encode(errors="replace"), secret.encode())


def _refused(status: int, what: str, hint: str) -> Response:
    text = f"<!doctype html><title>lorakit</title><p>{html.escape(what)}: {html.escape(hint)}.</p>"
    return HTMLResponse(text, status)


def _limited(receive: Receive) -> Receive:
    """Cut a body that is longer than its header states."""
    total = 0

    async def read() -> Message:
        nonlocal total
        message = await receive()
        total += len(message.get("body", b""))
        if total > POSTED_BYTES:
            return {"type": "http.disconnect"}
        return message

    return read
