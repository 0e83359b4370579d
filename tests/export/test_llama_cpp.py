"""The measure between full and partial predictions, and an engine that dies or leaves out."""

import json
import math
import subprocess

import pytest
import torch

from lorakit.errors import WorkError
from lorakit.export import llama_cpp
from lorakit.export.divergence import summed
from lorakit.export.llama_cpp import Task, run_tasks, scored


def place(*pairs):
    return [(i, math.log(p)) for i, p in pairs]


def test_divergence_of_a_case_by_hand():
    p = torch.tensor([[0.5, 0.3, 0.2]]).log()
    kl, same = scored(p, [place((0, 0.4), (1, 0.4), (2, 0.2))])
    assert kl.tolist() == pytest.approx([0.5 * math.log(1.25) + 0.3 * math.log(0.75)], abs=1e-6)
    assert same.tolist() == [True]


def test_tokens_left_out_are_one_class():
    """The rest is 0.2 here, 0.4 there."""
    p = torch.tensor([[0.5, 0.3, 0.1, 0.1]]).log()
    kl, same = scored(p, [place((1, 0.4), (0, 0.2))])
    by_hand = 0.5 * math.log(2.5) + 0.3 * math.log(0.75) + 0.2 * math.log(0.5)
    assert kl.tolist() == pytest.approx([by_hand], abs=1e-4)
    assert same.tolist() == [False]


def test_the_rounding_of_a_sum_is_no_divergence():
    """Of 49,152 float32 probabilities: what they leave of 1 is a little too much or too little."""
    torch.manual_seed(0)
    p = (4 * torch.randn(1, 49152)).log_softmax(-1)
    for off in (1 - 2e-6, 1.0, 1 + 2e-6):
        best = p[0].topk(2048)
        named = [(int(i), float(v) + math.log(off)) for v, i in zip(*best, strict=True)]
        kl, same = scored(p, [named])
        assert 0 <= float(kl) < 1e-7
        assert same.tolist() == [True]


def test_a_probability_that_float32_cannot_hold_is_one_of_the_rest():
    p = torch.tensor([[0.0, -100.0]])
    kl, _ = scored(p, [[(0, 0.0), (1, -3.4e38)]])
    assert 0 <= float(kl) < 1e-9


def test_a_prediction_that_is_no_number_is_an_error_that_names_its_place():
    """JSON says null for it."""
    p = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()
    half = math.log(0.5)
    with pytest.raises(WorkError, match=r"the file: .*nan at token 2 of the answer to .* prompt 1"):
        summed([scored(p, [[(0, half), (1, half)], [(0, None), (1, half)]])], "the file")


def answering(monkeypatch, places, code=0):
    """Another process says that, instead of llama.cpp's."""
    said = "LORAKIT " + json.dumps({"places": places, "stops": True, "chat_ids": []}) + "\n"

    def run(words, **_):
        return subprocess.CompletedProcess(words, code, said, "it broke\n")

    monkeypatch.setattr(llama_cpp.subprocess, "run", run)


def test_fewer_predictions_than_tokens_are_an_error(monkeypatch):
    one = [[7, -0.1]]
    task = Task("x.gguf", [[1], [2]], [[5], [6, 7, 8]], 2)
    answering(monkeypatch, [[one], [one, one, one]])
    assert run_tasks([task])[0].places[1] == [one, one, one]
    for lost in ([one, one], [one, [], one]):
        answering(monkeypatch, [[one], lost])
        with pytest.raises(WorkError, match="2 of the 3 tokens of the answer to held-out prompt 2"):
            run_tasks([task])


def test_an_engine_that_breaks_after_its_last_answer_is_not_believed(monkeypatch):
    answering(monkeypatch, [[[[7, -0.1]]]], code=-11)
    with pytest.raises(WorkError, match=r"cannot run a file \(exit -11\): it broke"):
        run_tasks([Task("x.gguf", [[1]], [[5]], 2)])


def test_a_file_that_is_no_model_is_one_clear_error(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(WorkError, match=r"llama.cpp cannot run x.gguf"):
        run_tasks([Task(str(tmp_path / "x.gguf"), [[1]], [[2]], 2)])


def test_the_engine_is_there():
    """The development install brings it: the tests of GGUF files must not pass by being skipped."""
    assert llama_cpp.installed()
