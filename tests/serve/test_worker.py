"""One thread answers many: batches of what may share one, texts cut at stops, faults contained."""

import threading

import pytest

from lorakit.data.template import prompt_ids
from lorakit.model.several import Several
from lorakit.records import Message
from lorakit.serve.worker import Request, Worker, _overlap


@pytest.fixture(scope="module")
def several(finish):
    return Several.of(finish().run)


@pytest.fixture
def worker(several):
    made = Worker(several)
    yield made
    made.stop()
    assert not made.alive


def question(several, text="What color is box 3?", **values):
    pieces, done = [], threading.Event()

    def send(piece):
        pieces.append(piece)
        if piece is None:
            done.set()

    tokenizer = several.loaded.tokenizer
    prompt = prompt_ids(tokenizer, [Message("user", text)])
    values = {"max_tokens": 8, "temperature": 0.0, "stop_texts": (), "seed": None, **values}
    request = Request(several.active, prompt, top_p=1.0, send=send, **values)
    return request, pieces, done


def answered(worker, *asked):
    for request, _, _ in asked:
        worker.submit(request)
    for _, _, done in asked:
        assert done.wait(60)
    return [r for r, _, _ in asked]


def test_pieces_add_up_to_the_answer(worker, several):
    request, pieces, _ = asked = question(several)
    answered(worker, asked)
    assert pieces[-1] is None
    assert "".join(pieces[:-1]) == request.text
    assert request.finish in ("stop", "length")
    assert len(request.ids) <= 8


def test_what_waits_together_is_answered_together(several, worker):
    blocker = question(several, max_tokens=64)
    rest = [question(several, f"What color is box {i}?", max_tokens=i + 1) for i in range(9)]
    drawn = question(several, temperature=1.0, seed=3)
    answered(worker, blocker, *rest, drawn)
    # The first alone or with some; nine in two batches of at most eight; the seeded one alone.
    assert worker.batches <= 5
    assert [len(r.ids) <= i + 1 for i, (r, _, _) in enumerate(rest)] == [True] * 9


def test_a_broken_request_does_not_end_the_server(worker, several):
    broken = question(several)
    broken[0].prompt[:] = [10**9]
    (request,) = answered(worker, broken)
    assert request.finish == "error"
    assert request.error
    (fine,) = answered(worker, question(several))
    assert fine.text


def test_stopping_ends_everyone(several):
    worker = Worker(several)
    asked = [question(several, max_tokens=400, temperature=1.0, seed=i) for i in range(3)]
    for request, _, _ in asked:
        worker.submit(request)
    worker.stop()
    for _, pieces, done in asked:
        assert done.wait(10)
        assert pieces[-1] is None


def test_the_start_of_a_stop_text_waits():
    assert _overlap("the EN", "END") == 2
    assert _overlap("the END", "END") == 3
    assert _overlap("the", "END") == 0
