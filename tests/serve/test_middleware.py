"""Only names of this machine pass the door; a body is read as far as it may be long."""

import asyncio
import json

import pytest
from starlette.requests import Request

from lorakit.serve import middleware
from lorakit.serve.main import LOOPBACK
from lorakit.serve.middleware import Door, read_body
from lorakit.serve.requests import BadOrder


def ask(hosts, **headers):
    """The status that a request with these headers gets."""
    seen = []

    async def inner(scope, receive, send):
        seen.append(200)

    async def send(message):
        seen.append(message.get("status", json.loads(message.get("body") or "0")))

    pairs = [(k.encode(), v.encode()) for k, v in headers.items()]
    scope = {"type": "http", "method": "POST", "path": "/", "headers": pairs}
    asyncio.run(Door(inner, hosts)(scope, None, send))
    return seen[0]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "127.0.0.1:8000"}, 200),
        ({"host": "localhost"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "LOCALHOST:1"}, 200),
        ({"host": "localhost:1", "origin": "http://localhost:3000"}, 200),
        ({"host": "localhost:1", "origin": "http://127.0.0.1"}, 200),
        ({}, 403),
        ({"host": ""}, 403),
        ({"host": "evil.example"}, 403),
        ({"host": "localhost.evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example:8000"}, 403),
        ({"host": "[::1"}, 403),
        ({"host": "localhost@evil.example"}, 403),
        ({"host": "localhost", "origin": "https://evil.example"}, 403),
        ({"host": "localhost", "origin": "null"}, 403),
        ({"host": "localhost", "origin": "http://localhost.evil.example"}, 403),
        ({"host": "localhost", "origin": "file://"}, 403),
        ({"host": "localhost", "origin": ""}, 403),
    ],
)
def test_names_of_other_machines_are_turned_away(headers, status):
    assert ask(LOOPBACK, **headers) == status


def test_on_a_network_any_name_passes_since_the_key_is_asked_for():
    assert ask(None, host="gpu-box:8000", origin="http://desk") == 200


def body(*pieces, length=None):
    """What `read_body` makes of a request that comes in these pieces."""
    waiting = [{"type": "http.request", "body": p, "more_body": True} for p in pieces]
    taken = []

    async def receive():
        taken.append(1)
        return waiting.pop(0) if waiting else {"type": "http.request", "body": b""}

    headers = [] if length is None else [(b"content-length", str(length).encode())]
    scope = {"type": "http", "method": "POST", "path": "/", "headers": headers}
    try:
        return asyncio.run(read_body(Request(scope, receive))), len(taken)
    except BadOrder as fault:
        return fault.status, len(taken)


def test_a_body_is_read_no_further_than_it_may_be_long(monkeypatch):
    assert body(b'{"a":', b" 1}")[0] == {"a": 1}
    monkeypatch.setattr(middleware, "LARGEST_BODY", 100)
    assert body(b"x" * 60, b"x" * 60, b"x" * 60, b"x" * 60) == (413, 2)
    assert body(b"x", length=10**9) == (413, 0)
    assert body(b"1", length="ten")[0] == 1


@pytest.mark.parametrize(
    "text", [b"", b"{", b"\xff", b"[" * 100_000, b'"\\ud800"', b'{"\\udfff": 1}', b"9" * 5000]
)
def test_what_is_no_json_or_no_text_is_the_senders_fault(text):
    assert body(text)[0] == 400
