"""A judge's verdicts in both orders against a server of this machine; its faults lose nothing."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lorakit.errors import RecipeError
from lorakit.evaluation.answer_store import AnswerStore
from lorakit.evaluation.eval_progress import EvalProgress
from lorakit.evaluation.judge import JudgeEndpoint, endpoint_of, judge_pairs, read_verdict
from lorakit.types import Sample

PAIRS = [
    Sample(f"question {i}", "reference", f"base answer {i}", f"tuned answer {i}") for i in range(4)
]


@pytest.fixture
def server():
    """`server(reply)`: its address; `reply(text of the request, number)` gives text or a status."""
    made, asked = [], []

    def start(reply):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                asked.append((self.path, self.headers.get("Authorization"), body))
                found = reply(body["messages"][-1]["content"], len(asked) - 1)
                status = found if isinstance(found, int) else 200
                message = {"role": "assistant", "content": found}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                value = {"id": "x", "object": "chat.completion", "created": 0, "model": "judge"}
                value["choices"] = [choice]
                data = json.dumps(value if status == 200 else {"error": {"message": "no"}}).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        made.append(httpd)
        return f"http://127.0.0.1:{httpd.server_port}/v1"

    start.asked = asked
    yield start
    for httpd in made:
        httpd.shutdown()
        httpd.server_close()


def judged(url, store=None, pairs=PAIRS, notes=None):
    endpoint = JudgeEndpoint(url, "judge")
    note = print if notes is None else notes.append
    return judge_pairs(endpoint, pairs, store or AnswerStore(), EvalProgress(None), note)


def prefers_tuned(text, number):
    return "A" if text.index("tuned answer") < text.index("base answer") else "The better: B."


def test_both_orders_are_asked_and_agree(server):
    notes = []
    found = judged(server(prefers_tuned), notes=notes)
    assert (found["tuned"], found["base"], found["ties"]) == (4, 0, 0)
    assert found["agreement"] == 1.0
    assert found["first_share"] == 0.5
    assert found["win_rate"] == 1.0
    assert len(server.asked) == 8
    assert "sending 4 questions" in notes[0]


def test_a_judge_that_takes_the_first_place_gives_ties(server):
    found = judged(server(lambda text, number: "A"))
    assert (found["tuned"], found["base"], found["ties"]) == (0, 0, 4)
    assert found["agreement"] == 0.0
    assert found["first_share"] == 1.0
    assert found["win_rate"] == 0.5


def test_garbage_is_counted_and_left_out(server):
    notes = []

    def sometimes(text, number):
        return "both are fine" if "question 2" in text else prefers_tuned(text, number)

    found = judged(server(sometimes), notes=notes)
    assert (found["rows"], found["tuned"], found["unreadable"]) == (3, 3, 1)
    assert "1 pairs without a readable verdict" in notes[-1]


def test_an_endpoint_that_goes_down_loses_nothing(server, tmp_path):
    path, notes = tmp_path / "judge.jsonl", []
    url = server(lambda text, number: 404 if number >= 5 else prefers_tuned(text, number))
    found = judged(url, AnswerStore(path), notes=notes)
    assert found["rows"] == 2
    assert "2 of 4 pairs are judged, the same command continues" in notes[-1]
    before = len(server.asked)
    judged(server(prefers_tuned), AnswerStore(path), notes=notes)
    assert len(server.asked) == before + 8  # another address is another judge


def test_what_was_judged_is_not_asked_again(server, tmp_path):
    path, url = tmp_path / "judge.jsonl", server(prefers_tuned)
    first = judged(url, AnswerStore(path), PAIRS[:2])
    assert len(server.asked) == 4
    again = judged(url, AnswerStore(path))
    assert len(server.asked) == 8
    assert (first["rows"], again["rows"]) == (2, 4)


def test_no_server_is_named():
    notes = []
    assert judged("http://127.0.0.1:9/v1", pairs=PAIRS[:1], notes=notes) is None
    assert "http://127.0.0.1:9/v1: Connection error" in notes[-1]
    assert "0 of 1 pairs are judged" in notes[-1]


def test_the_key_goes_to_its_own_place(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "of-openai-alone")
    monkeypatch.delenv("LORAKIT_JUDGE_API_KEY", raising=False)
    judged(server(prefers_tuned), pairs=PAIRS[:1])
    assert {key for _, key, _ in server.asked} == {"Bearer none"}
    assert JudgeEndpoint("https://api.openai.com/v1", "m").key == "of-openai-alone"
    assert JudgeEndpoint("https://evilopenai.com/v1", "m").key == ""
    monkeypatch.setenv("LORAKIT_JUDGE_API_KEY", "mine")
    assert JudgeEndpoint("http://127.0.0.1/v1", "m").key == "mine"


def test_a_refused_key_is_named(server):
    notes = []
    assert judged(server(lambda *_: 401), pairs=PAIRS[:1], notes=notes) is None
    assert "refuses the key" in notes[-1]


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("A", "first"),
        ("**B**", "second"),
        ("tie", "tie"),
        ("<think>A or B?</think>\nB", "second"),
        ("A is wrong.\nVerdict: B", "second"),
        ("A and B are alike", None),
        ("", None),
        ("Apples", None),
    ],
)
def test_replies_are_read(text, verdict):
    assert read_verdict(text) == verdict


def test_addresses_are_checked():
    assert endpoint_of(None, None) is None
    assert JudgeEndpoint("http://h/v1/chat/completions", "m").base_url == "http://h/v1"
    with pytest.raises(RecipeError, match="found localhost:8000, expected an address"):
        endpoint_of("localhost:8000", "m")
    with pytest.raises(RecipeError, match="--judge-model is missing"):
        endpoint_of("http://h", None)
    with pytest.raises(RecipeError, match="--judge is missing"):
        endpoint_of(None, "m")
