"""One thread answers many: batches of what may share one, texts cut at stops, faults contained."""

import threading

import pytest
from tests.made_runs import LIMIT, answer

from lorakit.data.tokenize.encode import prompt_ids
from lorakit.model.multi_adapter import MultiAdapterModel
from lorakit.serve.batch_worker import Request, Worker, _overlap
from lorakit.types import Message


@pytest.fixture(scope="module")
def several(speaker):
    return MultiAdapterModel.of(speaker("fruit"))


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
        assert done.wait(300)
    return [r for r, _, _ in asked]


def test_pieces_add_up_to_the_answer(worker, several):
    request, pieces, _ = asked = question(several)
    answered(worker, asked)
    assert pieces[-1] is None
    assert "".join(pieces[:-1]) == request.text
    assert request.text.strip() == answer("fruit", 3, 8)
    assert request.finish == "length"
    assert len(request.ids) == 8


def test_what_waits_together_is_answered_together(several, worker):
    """While the first is answered the others wait: it ends once all are there."""
    first, begun = question(several, max_tokens=LIMIT), threading.Event()
    send = first[0].send
    first[0].send = lambda piece: (begun.set(), send(piece))
    worker.submit(first[0])
    assert begun.wait(300)
    rest = [question(several, f"What color is box {i}?", max_tokens=i + 1) for i in range(9)]
    drawn = question(several, temperature=1.0, seed=3)
    for request, _, _ in [*rest, drawn]:
        worker.submit(request)
    first[0].cancel()
    for _, _, done in [first, *rest, drawn]:
        assert done.wait(300)
    # Nine in two batches of at most eight, the seeded one alone.
    assert worker.batches == 4
    for i, (request, _, _) in enumerate(rest):
        assert request.text.strip() == answer("fruit", i, i + 1)


def test_a_broken_request_does_not_end_the_server(worker, several):
    broken = question(several)
    broken[0].prompt[:] = [10**9]
    (request,) = answered(worker, broken)
    assert request.finish == "error"
    assert request.error
    (fine,) = answered(worker, question(several))
    assert fine.text.strip() == answer("fruit", 3, 8)


def test_stopping_ends_everyone(several):
    worker = Worker(several)
    asked = [question(several, max_tokens=LIMIT, temperature=1.0, seed=i) for i in range(3)]
    for request, _, _ in asked:
        worker.submit(request)
    worker.stop()
    assert not worker.alive
    for _, pieces, done in asked:
        assert done.is_set()
        assert pieces[-1] is None


def test_stopping_reaches_a_batch_that_was_just_taken_from_the_queue(several):
    """Neither waiting any more nor at work yet; unnoticed, an endless answer held the exit."""
    worker = Worker(several)
    own = worker._next_batch

    def taken():
        batch = own()
        worker.cancel_all()
        return batch

    worker._next_batch = taken
    answered(worker, question(several, max_tokens=1))  # the thread may have been in its own already
    endless = question(several, max_tokens=LIMIT)
    worker.submit(endless[0])
    worker.stop()
    assert not worker.alive
    assert endless[2].is_set()
    assert endless[0].finish == "cancelled"


def test_after_the_end_a_request_is_cancelled_at_once(several):
    worker = Worker(several)
    worker.stop()
    request, pieces, done = question(several)
    worker.submit(request)
    assert done.is_set()
    assert (pieces, request.finish) == ([None], "cancelled")


def test_the_start_of_a_stop_text_waits():
    assert _overlap("the EN", "END") == 2
    assert _overlap("the END", "END") == 3
    assert _overlap("the", "END") == 0
