"""The worker's answers are those of the commands, and a fault ends one request only."""

import io
import json

import pytest

from lorakit.web import model_worker
from lorakit.web.model_worker import ModelWorker, serve_requests


def exchange(*requests):
    """Answers to requests, with the worker's input then at its end."""
    found = []
    lines = "".join(json.dumps({"id": i, **request}) + "\n" for i, request in enumerate(requests))
    serve_requests(
        io.StringIO(lines), lambda message: found.append(json.loads(json.dumps(message)))
    )
    return found


@pytest.fixture
def source(tiny_model_dir, tiny_data):
    return {"model": str(tiny_model_dir), "data": str(tiny_data), "cutoff_len": 128}


def test_a_plan_is_that_of_the_command(source):
    import lorakit

    (found,) = exchange({"do": "plan", "settings": source, "gpu": "t4"})
    assert found["result"] == json.loads(json.dumps(lorakit.plan(source, gpu="t4").as_dict()))


def test_data_is_that_of_inspect(source):
    import lorakit

    asked = {"source": source, "stamp": ""}
    data, rows, searched, by_row, held = exchange(
        {"do": "data", **asked},
        {"do": "rows", **asked, "part": "train", "offset": 2, "count": 3},
        {
            "do": "rows",
            **asked,
            "part": "train",
            "offset": 0,
            "count": 9,
            "find": "COLOR is box 7?",
        },
        {"do": "rows", **asked, "part": "train", "offset": 0, "count": 9, "find": "colors.jsonl:8"},
        {"do": "rows", **asked, "part": "val", "offset": 0, "count": 9},
    )
    inspected = lorakit.inspect(source, examples=3).as_dict()
    assert data["result"]["lengths"] == json.loads(json.dumps(inspected["lengths"]))
    total = data["result"]["counts"]["train"]
    assert [e["number"] for e in rows["result"]["examples"]] == [2, 3, 4]
    assert rows["result"]["total"] == total
    (first,) = (e for e in searched["result"]["examples"])
    assert first["row"] == "colors.jsonl:8"
    assert by_row["result"]["examples"] == searched["result"]["examples"]
    assert held["result"]["total"] == data["result"]["counts"]["val"] == 2
    trained = "".join(text for text, on, _ in first["tokens"] if on)
    assert trained.startswith("It is blue.")
    assert first["trained"] < first["size"] == len(first["tokens"])


def test_long_examples_are_cut_on_the_page(source, monkeypatch):
    monkeypatch.setattr(model_worker, "SHOWN_TOKENS", 5)
    worker = ModelWorker()
    (example,) = worker.rows(source, "", "train", 0, 1)["examples"]
    assert len(example["tokens"]) == 5
    assert example["left_out"] == example["size"] - 5


def test_faults_are_answers(source):
    bad, missing, fine = exchange(
        {"do": "plan", "settings": {"model": "demo", "data": "x", "lora_r": 0}},
        {"do": "rows", "source": source},
        {"do": "data", "source": {**source, "data": "/nothing.jsonl"}, "stamp": ""},
    )
    assert "lora_r" in bad["error"]
    assert missing["error"].startswith("TypeError")
    assert "no such file" in fine["error"]


def test_base_and_runs_answer_the_same_question(speaker):
    from tests.made_runs import answer

    runs = [str(speaker(name).path) for name in ("fruit", "animal")]
    given = {
        "runs": runs,
        "messages": [{"role": "user", "content": "Number 3"}],
        "settings": {"temperature": 0.0, "max_new_tokens": 4, "seed": 0},
    }
    worker = ModelWorker()
    texts = ["".join(worker.chat(run=run, **given)).strip() for run in runs]
    assert texts == [answer("fruit", 3, 4), answer("animal", 3, 4)]
    assert "".join(worker.chat(run=None, **given)).strip() == answer("base", 3, 4)
    assert len(worker.models) == 1  # both adapters are on one base
