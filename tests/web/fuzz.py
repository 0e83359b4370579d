"""Random requests to every route: paths, queries, forms and JSON that try to break out."""

import json
import random

from starlette.testclient import TestClient

from lorakit.web.app import create_app

TOKEN = "secret-of-this-start"
PAGES = ("", "run", "run-curves", "run-events", "file", "compare", "models", "chat", "data", "new",
         "plan", "static/page.css")  # fmt: skip
FORMS = ("stop", "resume", "export", "forget", "start", "answer", "vote")
KEYS = ("name", "file", "run", "data", "model", "find", "offset", "part", "like", "more", "preset",
        "points", "version", "loss", "messages", "answers", "winner", "runs", "column", "settings",
        "system", "form", "quant", "verb", "learning_rate", "gpu", "from_adapter", "val_data", "t",
        "said")  # fmt: skip


def texts(secret):
    return [
        "", "runs/good", "runs/half", "good", "..", "../..", "/", "/etc/passwd", str(secret),
        f"../{secret.name}", f"runs/good/../../..{secret}", "%2e%2e%2f", "..\\..", "\0", "a\0b",
        "\ud800", "<script>alert(1)</script>", '"\'><img src=x onerror=alert(1)>', "{{7*7}}",
        "${7*7}", "x" * 5000, "-1", "9" * 400, "1e999", "NaN", "true", "null", "[]", "{}",
        "trust_remote_code: true", "output_dir: /tmp/x", "training_args: {output_dir: /x}",
        "data: file:///etc/passwd", "recipe.yaml", "adapter/adapter_model.safetensors", "demo",
        "runs/*", "**/*", "~root", "$HOME", "`id`", ";id", "|id", "\r\nSet-Cookie: a=b", "٣", "𝟛",
    ]  # fmt: skip


def value_of(draw, words, depth=0):
    kind = draw.randrange(6 if depth < 3 else 3)
    if kind < 3:
        return draw.choice([*words, 0, -1, 1e308, True, None])
    if kind == 3:
        return [value_of(draw, words, depth + 1) for _ in range(draw.randrange(4))]
    return {draw.choice((*KEYS, "role", "content")): value_of(draw, words, depth + 1)
            for _ in range(draw.randrange(4))}  # fmt: skip


def fuzz(folder, secret, requests, seed):
    """Send them; return how many, the statuses, and the faults found."""
    draw, words = random.Random(seed), texts(secret)
    text = secret.read_text()
    faults, statuses = [], {}
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    app = create_app(folder, TOKEN)
    # Nothing is trained, planned or generated: what these would get was checked before them.
    context = app.app.state.context
    context.launcher._launch = lambda *_: None

    async def ask(*_, **__):
        return {}

    async def stream(*_, **__):
        yield "piece"

    async def start():
        pass

    for worker in (context.study, context.chat):
        worker.ask, worker.stream, worker.start = ask, stream, start
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        client.get(f"/?t={TOKEN}")
        for number in range(requests):
            form = draw.random() < 0.5
            known = FORMS if form else PAGES
            page = draw.choice(known) if draw.random() < 0.9 else draw.choice(words)[:50]
            page = page.encode(errors="replace").decode().replace("\0", "%00")
            pairs = {draw.choice(KEYS): draw.choice(words) for _ in range(draw.randrange(4))}
            query = {k: v.encode(errors="replace").decode() for k, v in pairs.items()}
            headers = {"Origin": "http://127.0.0.1"}
            if draw.random() < 0.1:
                headers = {"Origin": "http://evil.example"}
            request = {"params": query, "headers": headers, "follow_redirects": False}
            if form:
                method = "POST"
                kind = draw.randrange(3)
                if kind == 0:
                    request["data"] = query
                elif kind == 1:
                    body = {draw.choice(KEYS): value_of(draw, words) for _ in range(5)}
                    request["content"] = json.dumps(body)
                else:
                    request["content"] = draw.randbytes(draw.randrange(200))
            else:
                method = draw.choice(("GET", "GET", "GET", "GET", "HEAD", "PUT"))
            try:
                answer = client.request(method, f"/{page.lstrip('/')}", **request)
            except Exception as error:  # the client itself refuses some addresses
                if type(error).__module__.startswith(("httpx", "h11")):
                    continue
                faults.append(
                    f"{number} {method} {page[:60]}: {type(error).__name__}: {error}"[:300]
                )
                continue
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            if answer.status_code >= 500:
                faults.append(f"{number} {method} /{page[:60]} {pairs}: {answer.status_code}"[:400])
            for word in ("Traceback", text, "<script>alert", "onerror=alert(1)>"):
                if word in answer.text and "html" in answer.headers.get("content-type", ""):
                    if word == "onerror=alert(1)>" and "&gt;&lt;img" in answer.text:
                        continue
                    faults.append(
                        f"{number} {method} /{page[:60]} {pairs}: {word!r} in the page"[:400]
                    )
    own = ("preferences.jsonl", ".lorakit-ui")
    after = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()
             and not any(name in p.parts or p.name == name for name in own)}  # fmt: skip
    if after != before:
        faults.append(
            f"files changed: {sorted(map(str, after.items() ^ before.items()))[:3]}"[:300]
        )
    return {"requests": number + 1, "statuses": statuses, "faults": faults}
