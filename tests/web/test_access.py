"""Who gets in: the token, the host, the page that asks, and what each answer forbids a browser."""

import asyncio

import pytest
from starlette.responses import PlainTextResponse

from lorakit.web.access import POSTED_BYTES, Access

TOKEN = "secret-of-this-start"
GOOD = {"host": "127.0.0.1:8765", "cookie": ""}


def ask(path="/", method="GET", headers=(), query="", body=b"", **settings):
    """(status, headers, path that the application saw, or None)."""
    seen, sent = [], []

    async def app(scope, receive, send):
        seen.append(scope["path"])
        await PlainTextResponse("inside")(scope, receive, send)

    async def receive():
        return {"type": "http.request", "body": body}

    async def send(message):
        sent.append(message)

    access = Access(app, TOKEN, **settings)
    given = {"host": "127.0.0.1:8765", "cookie": f"{access.cookie}={TOKEN}", **dict(headers)}
    pairs = [(k.encode(), v.encode()) for k, v in given.items() if v is not None]
    scope = {"type": "http", "method": method, "path": path, "query_string": query.encode()}
    asyncio.run(access({**scope, "headers": pairs}, receive, send))
    found = {k.decode().lower(): v.decode() for k, v in sent[0]["headers"]}
    return sent[0]["status"], found, seen[0] if seen else None


def test_the_cookie_lets_in():
    status, headers, seen = ask("/run")
    assert (status, seen) == (200, "/run")
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"


@pytest.mark.parametrize("cookie", [None, "", "lorakit-0=secret", f"x={TOKEN}", ";;=\x01="])
def test_without_the_cookie_nobody_gets_in(cookie):
    status, headers, seen = ask(headers={"cookie": cookie})
    assert (status, seen) == (403, None)
    assert "content-security-policy" in headers


def test_the_printed_address_is_exchanged_for_a_cookie_that_no_script_reads():
    status, headers, seen = ask("/run", query=f"t={TOKEN}&name=a%20b", headers={"cookie": None})
    assert (status, seen) == (200, None)
    assert headers["refresh"] == "0; url=./run?name=a+b"
    assert "HttpOnly" in headers["set-cookie"]
    assert "SameSite=strict" in headers["set-cookie"]


@pytest.mark.parametrize("token", ["", "wrong", TOKEN[:-1], TOKEN + "x"])
def test_another_token_is_refused(token):
    assert ask(query=f"t={token}", headers={"cookie": None})[0] == 403


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "[", "0.0.0.0"])
def test_another_host_name_is_refused(host):
    assert ask(headers={"host": host})[::2] == (403, None)


@pytest.mark.parametrize("host", ["hub.example.org", "a.proxy.org:80"])
def test_a_named_host_is_answered(host):
    assert ask(headers={"host": host}, hosts=("hub.example.org", ".proxy.org"))[0] == 200


@pytest.mark.parametrize(
    "origin", [None, "null", "http://evil.example", "http://127.0.0.1:3000", "http://[", "file://"]
)
def test_a_form_of_another_page_is_refused(origin):
    assert ask(method="POST", headers={"origin": origin})[::2] == (403, None)


def test_a_form_of_our_own_page_is_taken():
    assert ask(method="POST", headers={"origin": "http://127.0.0.1:8765"})[0] == 200


def test_large_forms_and_other_methods_are_refused():
    own = {"origin": "http://127.0.0.1:8765"}
    size = {"content-length": str(POSTED_BYTES + 1)}
    assert ask(method="POST", headers={**own, **size})[0] == 413
    assert ask(method="DELETE", headers=own)[0] == 405


def test_in_a_frame_the_token_is_in_the_path():
    status, headers, seen = ask(f"/~{TOKEN}/run", headers={"cookie": None}, framed=True)
    assert (status, seen) == (200, "/run")
    assert "frame-ancestors *" in headers["content-security-policy"]
    assert ask(f"/~{TOKEN}/run", headers={"cookie": None})[0] == 403  # only where it was asked for
    assert ask("/~wrong/run", headers={"cookie": None}, framed=True)[0] == 403


def test_a_prefix_is_removed():
    for path, seen in [("/user/me/proxy/1/run", "/run"), ("/user/me/proxy/1", "/"), ("/x", "/x")]:
        assert ask(path, prefix="user/me/proxy/1/")[2] == seen
