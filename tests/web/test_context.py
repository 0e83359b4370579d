"""Work that takes longer than a request, and the reading of numbers."""

import asyncio
import types

import pytest
from pydantic import BaseModel

from lorakit.errors import DataError
from lorakit.web import context
from lorakit.web.context import Context, html_page, number_of, posted, posted_json


@pytest.fixture
def shared(folder):
    from lorakit.web.launch import Launcher
    from lorakit.web.workspace import Workspace

    workspace = Workspace(folder)
    return Context(workspace, Launcher(workspace), None, None)


def test_a_job_is_started_once_and_kept(shared, monkeypatch):
    monkeypatch.setattr(context, "PATIENCE", 0.01)
    started = []

    async def body():
        done = asyncio.Event()

        async def work():
            started.append(1)
            await done.wait()
            return "result"

        assert await shared.job("a", work) == (False, None)
        done.set()
        assert await shared.job("a", work) == (True, "result")
        assert await shared.job("a", work) == (True, "result")

    asyncio.run(body())
    assert started == [1]


def test_a_job_that_failed_is_tried_again(shared):
    async def fail():
        raise DataError("empty")

    async def body():
        for _ in range(2):
            with pytest.raises(DataError):
                await shared.job("a", fail)
        assert shared.jobs == {}

    asyncio.run(body())


def test_a_process_before_its_first_file_is_running(shared, monkeypatch):
    monkeypatch.setattr(shared.launcher, "process_of", lambda name: 5 if "half" in name else None)
    found = {run.name: run.status for run in shared.summaries()}
    assert found == {"runs/half": "running", "runs/good": "finished"}
    assert next(iter(found)) == "runs/half"  # running ones first


def test_forms_and_json():
    def request(body):
        async def read():
            return body

        return types.SimpleNamespace(body=read)

    assert asyncio.run(posted(request(b"a=1&b=&a=%C3%A9"))) == {"a": "é", "b": ""}
    with pytest.raises(DataError):
        asyncio.run(posted(request(b"&".join([b"a=1"] * 300))))

    class Body(BaseModel):
        a: int

    assert asyncio.run(posted_json(request(b'{"a": 1}'), Body)).a == 1
    for bad in (b"", b"[1]", b"\xff", b"[" * 100_000, b"{}"):
        with pytest.raises(DataError):
            asyncio.run(posted_json(request(bad), Body))
    with pytest.raises(DataError, match="a: Input should be a valid integer"):
        asyncio.run(posted_json(request(b'{"a": "x"}'), Body))


def test_numbers_of_a_query():
    assert [number_of(t, 7) for t in ("", "5", "-1", "x", "٣", "1" * 400)] == [7, 5, 7, 7, 7, 10**9]


def test_values_are_escaped():
    page = html_page("message.html.jinja", 400, page="", text="<b>\x1b[2J\ud800</b>")
    assert page.status_code == 400
    assert b"&lt;b&gt;\\x1b[2J?&lt;/b&gt;" in page.body


def test_a_page_that_waits_asks_again():
    page = html_page("doctor.html.jinja", refresh=2, page="doctor", findings=None)
    assert page.headers["refresh"] == "2"
