"""The client of the worker: answers by number, ends that are noticed, a new start afterwards."""

import asyncio
import sys

import pytest

from lorakit.errors import WorkError
from lorakit.web import worker_client
from lorakit.web.worker_client import WorkerClient

# A worker that answers without models.
CODE = """
import json, sys, os
print_ = lambda m: (sys.stdout.write(json.dumps(m) + "\\n"), sys.stdout.flush())
for line in sys.stdin:
    request = json.loads(line)
    if "cancel" in request:
        open("cancelled", "w").write(str(request["cancel"])); continue
    number = request["id"]
    if request["do"] == "die":
        os._exit(7)
    if request["do"] == "refuse":
        print_({"id": number, "error": "data: empty", "hint": "add rows"}); continue
    if request["do"] == "chat":
        for piece in "abc":
            print_({"id": number, "piece": piece})
    if request["do"] != "hang":
        print_({"id": number, "result": request.get("value")})
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a coroutine function with a client of such a worker."""
    real = asyncio.create_subprocess_exec

    async def start(program, *_, **options):
        return await real(sys.executable, "-c", CODE, **options)

    monkeypatch.setattr(worker_client.asyncio, "create_subprocess_exec", start)

    def go(body):
        async def all_of_it():
            client = WorkerClient(tmp_path)
            try:
                return await asyncio.wait_for(body(client), 30)
            finally:
                await client.close()

        return asyncio.run(all_of_it())

    return go


def test_answers_reach_their_requests(run):
    async def body(client):
        return await asyncio.gather(*(client.ask("echo", value=i) for i in range(5)))

    assert run(body) == [0, 1, 2, 3, 4]


def test_pieces_are_streamed(run):
    async def body(client):
        return [piece async for piece in client.stream("chat")]

    assert run(body) == ["a", "b", "c"]


def test_a_refusal_is_an_error_with_its_hint(run):
    async def body(client):
        with pytest.raises(WorkError) as caught:
            await client.ask("refuse")
        return caught.value

    error = run(body)
    assert (error.message, error.hint) == ("data: empty", "add rows")


def test_the_end_of_the_worker_is_noticed_and_the_next_request_starts_another(run):
    async def body(client):
        with pytest.raises(WorkError, match="exit code 7"):
            await client.ask("die")
        return await client.ask("echo", value="again")

    assert run(body) == "again"


def test_an_answer_that_nobody_reads_is_cancelled(run, tmp_path):
    async def body(client):
        pieces = client.stream("chat")
        await anext(pieces)
        await pieces.aclose()
        return await client.ask("echo", value="next")

    assert run(body) == "next"  # the rest of the answer is skipped
    assert (tmp_path / "cancelled").read_text() == "1"
