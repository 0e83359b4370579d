"""What passes the guard, and what the server behind it never sees."""

import asyncio
import json

import pytest

from lorakit.serve.guard import CHAT, ENV, Guard

KEYS = ["model", "messages", "n"]
SETTINGS = {"models": {"fruit": "Be brief.", "plain": None}}
SETTINGS |= {"keys": {"fruit": [*KEYS, "tools"], "plain": KEYS}}
SETTINGS |= {"defaults": {"stop_token_ids": [2]}, "api_key": "secret", "loopback": True}
GOOD = {"model": "plain", "messages": [{"role": "user", "content": "Hi"}]}
HEADERS = {"host": "127.0.0.1:8000", "authorization": "Bearer secret"}


def exchange(monkeypatch, body=b"", path=CHAT, method="POST", headers=(), **settings):
    """(events that the client gets, bodies that the server behind saw)."""
    monkeypatch.setenv(ENV, json.dumps({**SETTINGS, **settings}))
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    half = len(body) // 2
    events = [
        {"type": "http.request", "body": body[:half], "more_body": True},
        {"type": "http.request", "body": body[half:]},
    ]
    sent, seen = [], []

    async def receive():
        return events.pop(0)

    async def send(event):
        sent.append(event)

    async def server(scope, receive, send):
        seen.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    pairs = [(k.encode(), v.encode()) for k, v in {**HEADERS, **dict(headers)}.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": pairs}
    asyncio.run(Guard(server)(scope, receive, send))
    return sent, seen


def ask(monkeypatch, body=b"", path=CHAT, method="POST", headers=(), **settings):
    """(status, error or answer, the body that the server behind saw)."""
    sent, seen = exchange(monkeypatch, body, path, method, headers, **settings)
    answer = json.loads(sent[1]["body"])
    return sent[0]["status"], answer.get("error", answer), seen


def test_a_known_request_passes_with_the_defaults(monkeypatch):
    status, _, (seen,) = ask(monkeypatch, {**GOOD, "n": None})
    assert (status, json.loads(seen)) == (200, {**GOOD, "stop_token_ids": [2]})


def test_the_trained_system_text_is_added_where_a_request_has_none(monkeypatch):
    _, _, (seen,) = ask(monkeypatch, {**GOOD, "model": "fruit"})
    assert json.loads(seen)["messages"][0] == {"role": "system", "content": "Be brief."}
    own = [{"role": "developer", "content": "Be long."}, *GOOD["messages"]]
    body = {**GOOD, "model": "fruit", "messages": own, "tools": []}  # a key of this model alone
    _, _, (seen,) = ask(monkeypatch, body)
    assert json.loads(seen)["messages"] == own


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [({**GOOD, "mirostat": 2}, 400, "'mirostat': has no effect"),
     ({**GOOD, "chat_template": "{{ 10**9 }}"}, 400, "'chat_template': has no effect"),
     ({**GOOD, "tools": []}, 400, "'tools': has no effect"),
     ({**GOOD, "model": "gpt-4"}, 404, "there is: fruit, plain"),
     ({**GOOD, "model": ["plain"]}, 404, "is not served"),
     ({"messages": []}, 404, "model 'None' is not served"),
     ({**GOOD, "messages": "Hi"}, 400, "takes a list"),
     ([], 400, "not a JSON object"),
     (b"{", 400, "not valid JSON"),
     (b"\xff\xfe", 400, "not valid JSON"),
     (b"[" * 100_000, 400, "not valid JSON"),
     (b" " * 5_000_000, 413, "more than 2 MiB")],
)  # fmt: skip
def test_a_bad_body_is_refused_by_what_is_wrong(monkeypatch, body, status, words):
    found, error, seen = ask(monkeypatch, body)
    assert found == status
    assert words in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert seen == []


@pytest.mark.parametrize(
    ("headers", "status"),
    [({"host": "evil.example"}, 403), ({"host": "[::1]:8000"}, 200), ({"host": "["}, 403),
     ({"origin": "https://evil.example"}, 403), ({"origin": "null"}, 403),
     ({"origin": "http://localhost:1"}, 200), ({"authorization": "Bearer wrong"}, 401),
     ({"authorization": ""}, 401), ({"authorization": "Bearer s\xe9cret"}, 401)],
)  # fmt: skip
def test_callers_are_known_by_host_origin_and_key(monkeypatch, headers, status):
    found, _, seen = ask(monkeypatch, GOOD, headers=headers)
    assert found == status
    assert bool(seen) == (status == 200)


def test_on_a_network_any_host_passes_with_the_key(monkeypatch):
    headers = {"host": "gpu.example", "origin": "https://app.example"}
    assert ask(monkeypatch, GOOD, headers=headers, loopback=False)[0] == 200
    wrong = {**headers, "authorization": "Bearer wrong"}
    assert ask(monkeypatch, GOOD, headers=wrong, loopback=False)[0] == 401


def test_only_three_routes_are_open(monkeypatch):
    for path in ("/reset", "/load_model", "/v1/completions", "/invocations", "/docs"):
        status, error, seen = ask(monkeypatch, GOOD, path=path)
        assert (status, seen) == (404, [])
        assert CHAT in error["message"]
    status, answer, seen = ask(monkeypatch, path="/v1/models", method="GET")
    assert ([m["id"] for m in answer["data"]], seen) == (["fruit", "plain"], [])
    no_key = {"authorization": ""}
    assert ask(monkeypatch, path="/v1/models", method="GET", headers=no_key)[0] == 401
    assert ask(monkeypatch, path="/health", method="GET", headers=no_key)[0] == 200


@pytest.mark.parametrize("name", ["fruit", "plain"])
def test_one_model_is_retrieved_by_its_name(monkeypatch, name):
    status, found, seen = ask(monkeypatch, path=f"/v1/models/{name}", method="GET")
    assert (status, found["id"], found["object"], seen) == (200, name, "model", [])


@pytest.mark.parametrize("name", ["gpt-4", "", "fruit/more", "fruit "])
def test_another_model_is_not_found(monkeypatch, name):
    status, error, _ = ask(monkeypatch, path=f"/v1/models/{name}", method="GET")
    assert status == 404
    assert "there is: fruit, plain" in error["message"]
    status, _, _ = ask(
        monkeypatch, path="/v1/models/fruit", method="GET", headers={"authorization": "Bearer x"}
    )
    assert status == 401


PAGE = "http://localhost:3000"


def headers_of(event):
    return {name.decode(): value.decode() for name, value in event["headers"]}


def test_a_page_of_this_machine_is_answered_after_its_preflight(monkeypatch):
    asked = {
        "origin": PAGE,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-os",
    }
    # A browser sends the preflight without the key.
    (start, _), seen = exchange(
        monkeypatch, method="OPTIONS", headers={**asked, "authorization": ""}
    )
    told = headers_of(start)
    assert (start["status"], seen) == (200, [])
    assert told["access-control-allow-origin"] == PAGE
    assert "POST" in told["access-control-allow-methods"]
    assert "x-stainless-os" in told["access-control-allow-headers"]
    (start, _), (body,) = exchange(monkeypatch, GOOD, headers={"origin": PAGE})
    assert (start["status"], json.loads(body)["model"]) == (200, "plain")
    assert headers_of(start)["access-control-allow-origin"] == PAGE
    # The page can read why it was refused.
    (start, _), _ = exchange(monkeypatch, {**GOOD, "mirostat": 2}, headers={"origin": PAGE})
    assert start["status"] == 400
    assert headers_of(start)["access-control-allow-origin"] == PAGE
    assert headers_of(start)["vary"] == "Origin"


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://127.0.0.1.evil.example"]
)
@pytest.mark.parametrize("method", ["OPTIONS", "POST"])
def test_pages_of_other_hosts_are_refused_in_both(monkeypatch, origin, method):
    (start, _), seen = exchange(monkeypatch, GOOD, method=method, headers={"origin": origin})
    assert (start["status"], seen) == (403, [])
    assert "access-control-allow-origin" not in headers_of(start)


def test_without_a_page_and_on_an_open_network_nothing_is_allowed(monkeypatch):
    (start, _), _ = exchange(monkeypatch, GOOD)
    assert "access-control-allow-origin" not in headers_of(start)
    (start, _), _ = exchange(monkeypatch, GOOD, headers={"origin": PAGE}, loopback=False)
    assert "access-control-allow-origin" not in headers_of(start)
    (start, _), seen = exchange(monkeypatch, method="OPTIONS", loopback=False)
    assert (start["status"], seen) == (404, [])
